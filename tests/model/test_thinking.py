"""The thinking budget is kept exactly, and what keeps it is marked as forced."""

from dataclasses import replace

import pytest

from smalt.model.generate import ControlTokens, Sampling, generate

# So hot that every token, those of control too, comes about once in 24.
HOT = Sampling(max_tokens=40, temperature=50.0, seed=5)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def prompts(make_document, control):
    """40 prompts that think, 20 that do not."""
    return [make_document([("text", 3)], i, last=control.think_start if i < 40 else 7) for i in range(60)]


def replay(c, thinking, budget, control):
    """Follow a completion by the rules of the budget; returns what happened in it."""
    thought, at, seen = 0, 0, []
    while at < len(c.tokens):
        if thinking and thought == budget:
            rest = len(c.tokens) - at
            assert c.tokens[at : at + len(control.close)] == list(control.close)[:rest]
            assert all(c.forced[at : at + len(control.close)])
            thinking, at = False, at + len(control.close)
            seen.append("forced")
            continue
        token = c.tokens[at]
        assert not c.forced[at]
        if thinking and token == control.think_end:
            thinking = False
            seen.append("closed")
        elif thinking:
            thought += 1
            seen.append("start inside" if token == control.think_start else "thought")
        elif token == control.think_start:
            thinking = True
            seen.append("opened")
        at += 1
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("close", [(3,), (5, 3), (3, 9, 5, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("budget", [0, 1, 6, None])
def test_the_rules(model, prompts, control, close, budget):
    control = replace(control, close=close)
    completions = generate(model, prompts, control, HOT, budget)
    seen = set()
    for i, c in enumerate(completions):
        events = replay(c, i < 40, budget, control)
        if budget is not None:
            assert sum(event in ("thought", "start inside") for event in events) <= budget
        seen.update(events)
    expected = {0: {"forced", "opened"}, None: {"closed", "thought", "start inside", "opened"}}
    assert seen == expected.get(budget, {"forced", "closed", "thought", "start inside", "opened"})


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.7, seed=2)], ids=["greedy", "sampled"])
def test_by_hand(model, make_document, budget, sampling):
    # This prompt neither stops thinking by itself nor ends: the budget is spent to the last token, then the sequence closes.
    control = ControlTokens(think_start=2, think_end=3, end=4, close=(9, 5, 3))
    think = make_document([("text", 3)], 6, last=2)
    answer = make_document([("text", 3)], 6, last=7)
    thinking, answering = generate(model, [think, answer], control, sampling, [budget, budget])
    assert not set(thinking.tokens[:budget]) & {2, 3, 4}
    assert thinking.tokens[budget : budget + 3] == [9, 5, 3]
    assert thinking.forced[: budget + 4] == [False] * budget + [True] * 3 + [False]
    assert not any(answering.forced)


def test_budgets_are_per_prompt(model, make_document, control):
    think = make_document([("text", 3)], 6, last=control.think_start)
    budgets = [4, 0, None, 2]
    completions = generate(model, [think] * 4, control, Sampling(12), budgets)
    for budget, c in zip(budgets, completions, strict=True):
        assert c.forced.index(True) == budget if budget is not None else not any(c.forced)


def test_max_tokens_cut_the_closing_sequence(model, make_document, control):
    think = make_document([("text", 3)], 6, last=control.think_start)
    (c,) = generate(model, [think], control, Sampling(max_tokens=3), 2)
    assert c.forced == [False, False, True]
    assert c.tokens[-1] == control.close[0]
