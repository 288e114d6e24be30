"""Equations between plain numbers in a text, as 12+8=20, and whether they hold. What is not clear is not judged."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_SUM = rf"-?(?:{_NUMBER})(?:[ \t]*[-+*/][ \t]*(?:{_NUMBER}))*"
_EQUATION = re.compile(rf"{_SUM}(?:[ \t]*=[ \t]*{_SUM})+")
_TOKEN = re.compile(rf"{_NUMBER}|[-+*/]")
_PLAIN = {0x2212: "-", 0xD7: "*", 0xB7: "*", 0xF7: "/"}
# Before or after these an equation is a part of something else: 2x+3=5, 2^3+1=9, 1 1/2+1/2=2, 3+4=7k, 50/2=25%, 9-8=1:00.
_BEFORE = re.compile(r"(?:[\w.,^√\\]|[-+*/^)\]}=\d][ \t]*)$")
_BULLET = re.compile(r"(?:^|\n)[ \t]*(?:[-*•]|\d+[.)])[ \t]+$")
_AFTER = re.compile(r"\w|[.:]\d|[ \t]*[-+*/^%!=(\[{\\√]")


def wrong_equation(text: str) -> str | None:
    """The first equation that does not hold; None where all do.

    Products come before sums. With a division or decimals a result may be rounded or cut: it is right within a unit of its last digit.
    10,200 may be one number or two.
    """
    text = text.translate(_PLAIN)  # other signs for minus, times and divided by
    for match in _EQUATION.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        if (_BEFORE.search(before) and not _BULLET.search(before)) or _AFTER.match(text, match.end()):
            continue
        sides = match[0].split("=")
        if any(re.search(r"[-+*/]", side.strip()[1:]) for side in sides) and not _holds(sides):
            return match[0]
    return None


def _holds(sides: list[str]) -> bool:
    # Read as two numbers, the first belongs to this equation and the second to what follows.
    readings = [sides, [*sides[:-1], sides[-1].split(",")[0]]]
    return any(all(_equal(left, right) for left, right in pairwise(reading)) for reading in readings)


def _equal(left: str, right: str) -> bool:
    try:
        difference = abs(_value(left) - _value(right))
    except ZeroDivisionError:
        return False
    if "/" in left + right or "." in left + right:
        return difference < Fraction(1, 10 ** len(_TOKEN.findall(right)[-1].partition(".")[2]))
    return difference == 0


def _value(side: str) -> Fraction:
    """Of a sum of products; raises ZeroDivisionError."""
    total, product, sign, operator = Fraction(0), Fraction(1), 1, "*"
    for token in _TOKEN.findall(side):
        if token in "*/":
            operator = token
        elif token in "+-":
            if operator:  # the sign of the first number
                sign = -1
                continue
            total, product, sign, operator = total + sign * product, Fraction(1), 1 if token == "+" else -1, "*"
        else:
            number = Fraction(token.replace(",", ""))
            product = product * number if operator == "*" else product / number
            operator = ""
    return total + sign * product
