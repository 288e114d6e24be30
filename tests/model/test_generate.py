"""generate(): the cache, the batch and the bookkeeping change nothing of what the policy says."""

from dataclasses import replace

import numpy as np
import pytest

from smalt.model.generate import ControlTokens, Sampling, generate

GREEDY = Sampling(max_tokens=14)
SAMPLED = Sampling(max_tokens=14, temperature=1.0, seed=3)
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "top_k": replace(SAMPLED, temperature=1.7, top_k=5),
    "top_p": replace(SAMPLED, temperature=1.3, top_p=0.8),
    "both": replace(SAMPLED, temperature=2.0, top_k=9, top_p=0.7),
}
BUDGETS = [3, 0, None, 2, None]


@pytest.fixture(scope="module", params=["bidirectional", "causal"])
def model(request, make_model):
    return make_model(image_attention=request.param, tie_embeddings=request.param == "causal")


@pytest.fixture(scope="module")
def prompts(make_document, control):
    """Of several lengths, in both modes, with images and without; one of a single token."""
    return [
        make_document([("text", 3)], 1, last=control.think_start),
        make_document([("text", 2), ("image", 1), ("text", 2)], 2, last=control.think_start),
        make_document([("image", 2), ("text", 1)], 3),
        make_document([("text", 1)], 4),
        make_document([("text", 9)], 5, last=control.think_start),
    ]


def same(got, want):
    assert (got.tokens, got.forced) == (want.tokens, want.forced)
    assert got.log_probs == pytest.approx(want.log_probs, rel=0, abs=1e-9)


def continued(prompt, tokens):
    return replace(prompt, tokens=np.append(prompt.tokens, tokens), targets=np.append(prompt.targets, [False] * len(tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_cache_changes_nothing(model, prompts, control, sampling):
    cached = generate(model, prompts, control, sampling, BUDGETS)
    uncached = generate(model, prompts, control, sampling, BUDGETS, use_cache=False)
    for got, want in zip(cached, uncached, strict=True):
        same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_log_probs_are_those_of_the_policy(model, prompts, control, policy, sampling):
    completions = generate(model, prompts, control, sampling, BUDGETS)
    assert any(any(c.forced) for c in completions)
    for prompt, c in zip(prompts, completions, strict=True):
        log_probs = policy(model, continued(prompt, c.tokens), sampling.temperature or 1.0)[len(prompt) - 1 : -1]
        assert c.log_probs == pytest.approx(log_probs[range(len(c.tokens)), c.tokens].tolist(), rel=0, abs=1e-9)
        if sampling is GREEDY:
            free = [i for i, forced in enumerate(c.forced) if not forced]
            assert [c.tokens[i] for i in free] == log_probs.argmax(-1)[free].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, replace(SAMPLED, temperature=2.0)], ids=["greedy", "sampled"])
def test_neighbours_change_nothing(model, prompts, control, sampling):
    together = generate(model, prompts, control, sampling, BUDGETS)
    if sampling is not GREEDY:
        assert len({len(c.tokens) for c in together}) > 1, "no sequence left the batch before another"
    same(generate(model, prompts[:1], control, sampling, BUDGETS[:1])[0], together[0])
    # The place in the list keys the draws, so the second prompt stays second.
    for first in (0, 2, 4):
        pair = generate(model, [prompts[first], prompts[1]], control, sampling, [BUDGETS[first], BUDGETS[1]])
        same(pair[1], together[1])


def test_generation_goes_on_until_the_end(model, prompts, control):
    for max_tokens in (1, 2, 30):
        sampling = Sampling(max_tokens=max_tokens, temperature=4.0, seed=1)
        completions = generate(model, prompts * 4, control, sampling)
        for c in completions:
            assert len(c.tokens) == len(c.forced) == len(c.log_probs) <= max_tokens
            assert control.end not in c.tokens[:-1]
            assert c.tokens[-1] == control.end or len(c.tokens) == max_tokens
            assert not any(c.forced)
    assert {c.tokens[-1] == control.end for c in completions} == {True, False}


def test_one_budget_for_all(model, prompts, control):
    one, each = (generate(model, prompts, control, GREEDY, budgets) for budgets in (2, [2] * len(prompts)))
    for got, want in zip(one, each, strict=True):
        same(got, want)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [(-1, "at least 0"), ([0, None, -2, 1, 1], "at least 0"), ([3, 3], "2 budgets for 5 prompts"), ([], "0 budgets")],
)
def test_impossible_budgets(model, prompts, control, budgets, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, control, GREEDY, budgets)


def test_empty_prompt(model, prompts, control, make_document):
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [prompts[0], make_document([])], control, GREEDY)


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}], ids=str
)
def test_impossible_sampling(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}={next(iter(bad.values()))}"):
        Sampling(**bad)


@pytest.mark.parametrize("close", [(), (5,), (3, 5)])
def test_impossible_closing_sequence(close):
    with pytest.raises(ValueError, match="must end with think_end, 3"):
        ControlTokens(think_start=2, think_end=3, end=4, close=close)
