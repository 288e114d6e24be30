"""What is sampled: the policy's frequencies, what top-k and top-p leave of them, and what the seed decides."""

from collections import Counter
from dataclasses import replace

import pytest

from smalt.model.generate import Sampling, generate

NUM = 2000


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def prompt(make_document):
    return make_document([("text", 2)], 1)


def left_by(probs, top_k, top_p):
    """{token: probability} after top-k, then top-p, by their definitions."""
    ranked = sorted(enumerate(probs), key=lambda item: -item[1])[: top_k or None]
    total, kept, mass = sum(p for _, p in ranked), {}, 0.0
    for token, p in ranked:
        if mass >= top_p * total:
            break
        kept[token] = p
        mass += p
    return {token: p / mass for token, p in kept.items()}


def assert_frequencies(tokens, expected):
    """Pearson's chi-square, five standard deviations above its mean; tokens outside ``expected`` are wrong outright."""
    counts = Counter(tokens)
    assert counts.keys() <= expected.keys()
    statistic = sum((counts[t] - len(tokens) * p) ** 2 / (len(tokens) * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (2.0, 0, 0.5), (2.0, 12, 0.5), (1.0, 40, 1e-9)],
)
def test_frequencies(model, prompt, control, policy, temperature, top_k, top_p):
    sampling = Sampling(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    drawn = [c.tokens[0] for c in generate(model, [prompt] * NUM, control, sampling)]
    expected = left_by(policy(model, prompt, temperature)[-1].exp().tolist(), top_k, top_p)
    assert (len(expected) < 24) == (top_k > 0 or top_p < 1)
    assert_frequencies(drawn, expected)


def test_the_second_token_is_drawn_afresh(model, prompt, control, policy, make_document):
    sampling = Sampling(max_tokens=2, temperature=2.0, seed=1)
    pairs = [c.tokens for c in generate(model, [prompt] * NUM, control, sampling)]
    first = Counter(pair[0] for pair in pairs).most_common(1)[0][0]
    assert first != control.end
    document = make_document([("text", 3)], last=first)
    document.tokens[:2] = prompt.tokens
    expected = left_by(policy(model, document, 2.0)[-1].exp().tolist(), 0, 1.0)
    seconds = [pair[1] for pair in pairs if pair[0] == first]
    assert len(seconds) > 100
    assert_frequencies(seconds, expected)


def test_top_k_of_one_is_greedy(model, prompt, control, make_document):
    prompts = [prompt, make_document([("image", 1), ("text", 2)])]
    greedy = generate(model, prompts, control, Sampling(max_tokens=10))
    top_one = generate(model, prompts, control, Sampling(max_tokens=10, temperature=1.5, top_k=1, seed=2))
    assert [c.tokens for c in top_one] == [c.tokens for c in greedy]


def test_the_seed_fixes_every_draw(model, prompt, control):
    endless = replace(control, end=-1)

    def draw(seed):
        return [tuple(c.tokens) for c in generate(model, [prompt] * 4, endless, Sampling(12, temperature=5.0, seed=seed))]

    seeds = [0, 1, 2**32, 2**40 + 1]
    drawn = [draw(seed) for seed in seeds]
    assert draw(1) == drawn[1]
    # Every seed and every place in the list has draws of its own.
    assert len({tokens for one in drawn for tokens in one}) == 4 * len(seeds)
