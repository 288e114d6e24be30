"""``python -m smalt.profiling.bench kernels``: Smalt's kernels on a GPU that may have no more than torch, Triton, numpy and pytest.

There ``pip install --no-deps -e .`` makes the module known. ``smalt bench kernels`` is the same command where everything is installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from smalt.kernels.launch import INTERPRET, triton

from .kernels.bench import OPERATIONS, SECONDS, chosen, failures, measure_all, table
from .kernels.bench_gate import CHECKS, run_gate, run_tests
from .kernels.bench_machine import Machine
from .kernels.bench_results import DOCS, RESULTS, read_results, render, write_docs, write_result
from .kernels.bench_time import Gpu


def bench_kernels(
    out: Path = RESULTS,
    only: Sequence[str] = (),
    quick: bool = False,
    write: bool = False,
    measure: bool = True,
    seconds: float = SECONDS,
    docs: Path = DOCS,
    say: Callable[[str], None] = print,
) -> int:
    """Check, measure, store and show; returns the exit code.

    out: folder of results; only: operations; quick: fewer shapes and rounds; write: rewrite the table in ``docs`` from all results
    in ``out``; measure: False shows and writes from what is there, which needs no GPU; seconds: after which nothing more is begun.
    1 without a GPU, where a kernel is wrong (then nothing is measured or written), or where one of Smalt's could not be measured.
    Raises ValueError for an unknown operation or a foreign file among the results.
    """
    deadline = time.monotonic() + seconds
    chosen(only, quick)
    code = 0
    if measure:
        if problem := no_gpu():
            say(f"error: {problem}")
            return 1
        tests, wrong = check(say)
        if wrong:
            say(f"error: {len(wrong)} red; nothing was measured:")
            for problem in wrong:
                say(f"  {problem}")
            return 1
        result = measure_all(Gpu(), Machine.current(), only, quick, deadline, tests, say)
        say(f"written: {write_result(result, out)}")
        say(render([result], [(operation.name, (shape.name,)) for operation, shape in chosen(only, quick)]))
        for failure in failures(result):
            say(f"error: Smalt was not measured: {failure}")
            code = 1
    if write or not measure:
        section = table(read_results(out))
        if write:
            write_docs(section, docs)
            say(f"written: {docs}")
        else:
            say(section)
    return code


def no_gpu() -> str:
    """Why kernels cannot be timed here; empty where they can."""
    if triton is None:
        return "the kernels need Triton, which is not installed: pip install triton"
    if not torch.cuda.is_available():
        return f"timing kernels needs a GPU, and torch {torch.__version__} sees none"
    if INTERPRET:
        return "TRITON_INTERPRET is set: the interpreter would be timed; unset it"
    return ""


def check(say: Callable[[str], None] = print) -> tuple[dict, list[str]]:
    """Every correctness test that can run on this GPU: what was run, for the result, and what is wrong."""
    start = time.monotonic()
    wrong = run_gate("cuda", CHECKS, say)
    outcome, red = ("not run: red before", []) if wrong else run_tests()
    say(f"{len(CHECKS)} checks in bf16, {len(wrong)} red, {time.monotonic() - start:.0f} s; tests: {outcome}")
    return {"checks": len(CHECKS), "pytest": outcome}, wrong + red


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m smalt.profiling.bench", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("kernels", help="Check and time every kernel.")
    command.add_argument("--out", type=Path, default=RESULTS, help="folder of results (%(default)s)")
    names = ", ".join(repr(o.name) if " " in o.name else o.name for o in OPERATIONS)
    command.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"only this operation; may be given again: {names}"
    )
    command.add_argument("--quick", action="store_true", help="fewer shapes, fewer rounds")
    command.add_argument("--write-docs", action="store_true", help="rewrite the table in docs/kernels.md from all results in --out")
    command.add_argument("--no-measure", action="store_true", help="show or write from the results that are there; needs no GPU")
    command.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing more after this (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        return bench_kernels(given.out, given.only, given.quick, given.write_docs, not given.no_measure, given.seconds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
