"""Batched generation with a key-value cache, two modes, and a thinking budget that is kept exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .batch import Document, pack
from .language import CacheStep, LayerCache
from .multimodal import MultimodalModel


@dataclass(frozen=True)
class ControlTokens:
    """The ids that steer generation. ``close``: what is forced when a thought has used up its budget, last id ``think_end``."""

    think_start: int
    think_end: int
    end: int
    close: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.close or self.close[-1] != self.think_end:
            raise ValueError(f"the closing sequence {self.close} must end with think_end, {self.think_end}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing; the seed fixes every draw."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ValueError(f"{self}: max_tokens >= 1, temperature, top_k and seed >= 0, and 0 < top_p <= 1 are needed")


@dataclass
class Completion:
    """What one prompt was continued with.

    tokens: ids, the end token included when it came; forced: whether the budget forced the token rather than the policy sampling
    it; log_probs: in nats, under the policy at the sampling temperature (1 when greedy), before top-k, top-p and any forcing.
    """

    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class _Turn:
    """The state of one sequence: thinking or not, tokens thought, what is still to be forced."""

    def __init__(self, prompt: Document, budget: int | None, control: ControlTokens):
        self.budget, self.control = budget, control
        self.thinking = int(prompt.tokens[-1]) == control.think_start
        self.thought, self.queue = 0, list[int]()
        self.completion, self.done = Completion(), False

    def next_forced(self) -> int | None:
        if self.thinking and not self.queue and self.budget is not None and self.thought >= self.budget:
            self.queue = list(self.control.close)
        return self.queue.pop(0) if self.queue else None

    def add(self, token: int, forced: bool, log_prob: float, max_tokens: int) -> None:
        c = self.completion
        c.tokens.append(token)
        c.forced.append(forced)
        c.log_probs.append(log_prob)
        if token == self.control.think_end and not self.queue:
            self.thinking = False
        elif self.thinking:
            self.thought += not forced
        elif token == self.control.think_start:
            self.thinking = True  # a thought opened again spends what the budget has left
        self.done = token == self.control.end or len(c.tokens) >= max_tokens


@torch.no_grad()
def generate(
    model: MultimodalModel,
    prompts: Sequence[Document],
    control: ControlTokens,
    sampling: Sampling,
    budgets: int | Sequence[int | None] | None = None,
    use_cache: bool = True,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue each prompt until its end token or ``sampling.max_tokens``.

    A prompt whose last token is ``think_start`` is in think mode; ``budgets`` (one for all, or one a prompt; None: unlimited) is the
    number of tokens it may think before the closing sequence is forced. What a prompt is continued with does not depend on
    its neighbours, up to rounding. ``use_cache=False`` recomputes everything at each step; it is there to check against.
    ``numbers``: from which, with the seed, the draws of each prompt follow; its place among the prompts when not given.
    Raises ValueError for an empty prompt or a negative budget, number, or one too few of them.
    """
    each = list(budgets) if isinstance(budgets, Sequence) else [budgets] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(each)} budgets for {len(prompts)} prompts")
    if any(b is not None and b < 0 for b in each):
        raise ValueError("a thinking budget is a number of tokens, at least 0")
    numbers = range(len(prompts)) if numbers is None else numbers
    if len(numbers) != len(prompts) or min(numbers, default=0) < 0:
        raise ValueError(f"{len(numbers)} numbers for {len(prompts)} prompts, one of at least 0 is needed for each")
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt cannot be continued")
    if not prompts:
        return []
    turns = [_Turn(p, b, control) for p, b in zip(prompts, each, strict=True)]
    uniform = _uniform_draws(numbers, sampling)
    source = _CachedLogits(model, prompts, sampling.max_tokens) if use_cache else _UncachedLogits(model, prompts)
    active = list(range(len(prompts)))
    while active:
        log_probs = _policy(source.logits(), sampling)
        draws = uniform[active, [len(turns[i].completion.tokens) for i in active]]
        chosen = _choose(log_probs, sampling, draws)
        forced = [turns[i].next_forced() for i in active]
        for row, token in enumerate(forced):
            if token is not None:
                chosen[row] = token
        picked = log_probs.gather(1, chosen[:, None]).squeeze(1)
        for i, token, was_forced, log_prob in zip(active, chosen.tolist(), forced, picked.tolist(), strict=True):
            turns[i].add(token, was_forced is not None, log_prob, sampling.max_tokens)
        keep = [row for row, i in enumerate(active) if not turns[i].done]
        source.advance(chosen, keep)
        active = [active[row] for row in keep]
    return [t.completion for t in turns]


def _uniform_draws(numbers: Sequence[int], sampling: Sampling) -> Tensor:
    """One number in [0, 1) a sequence and token, each row from its own generator: a neighbour more changes nothing."""
    if sampling.temperature == 0:
        return torch.zeros(len(numbers), sampling.max_tokens, dtype=torch.float64)
    # numpy mixes all of the key into its state; torch's CPU generator keeps the low 32 bits of a seed and drops the others.
    keys = [np.random.SeedSequence(sampling.seed, spawn_key=(number,)) for number in numbers]
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(sampling.max_tokens) for key in keys]))


def _policy(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [B, V] at the sampling temperature."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / (sampling.temperature or 1.0), -1)


def _choose(log_probs: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The next token of each row, int64 [B]: the likeliest, or by inverse transform of ``draws`` over what top-k and top-p leave."""
    if sampling.temperature == 0:
        return log_probs.argmax(-1)
    ordered, index = torch.sort(log_probs.double(), dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0.0
    # Nucleus (Holtzman et al. 2020, arXiv 1904.09751): the shortest prefix whose mass reaches top_p, of what top-k left.
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= sampling.top_p * mass[:, -1:], 0.0)
    cumulative = probs.cumsum(-1)
    threshold = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    # The number of tokens left is a bound: rounding must not pick one that was cut.
    rank = torch.minimum((cumulative <= threshold).sum(-1), (probs > 0).sum(-1) - 1)
    return index.gather(1, rank[:, None]).squeeze(1)


class _CachedLogits:
    """Prefill once as one pack, then one row a sequence and step. Finished sequences leave the batch."""

    def __init__(self, model: MultimodalModel, prompts: Sequence[Document], max_tokens: int):
        self.model = model
        self.device = model.language.head_weight.device
        lengths = [len(p) for p in prompts]
        batch = pack(list(prompts), sum(lengths), model.config.image_attention, model.config.vision.tile).to(self.device)
        x = model.embed(batch.tokens, batch.image_index, batch.tiles)
        capacity = max(lengths) + max_tokens
        self.layers = [LayerCache(len(prompts), capacity, model.config.language, x) for _ in model.language.blocks]
        sequence = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths)).to(self.device)
        step = CacheStep(self.layers, sequence, batch.positions.long(), decode=False)
        hidden = model.language(x, model.language.rows(batch.positions, batch.kv_start, batch.kv_end, x.dtype), step)
        self.next_position = torch.tensor(lengths, device=self.device)
        self.hidden = hidden[self.next_position.cumsum(0) - 1]

    def logits(self) -> Tensor:
        return (self.hidden @ self.model.language.head_weight.T).cpu()

    def advance(self, tokens: Tensor, keep: list[int]) -> None:
        if not keep:
            return
        if len(keep) < len(tokens):
            left = torch.tensor(keep, device=self.device)
            for layer in self.layers:
                layer.select(left)
            tokens, self.next_position = tokens[keep], self.next_position[left]
        x = self.model.language.embedding(tokens.to(self.device))
        sequence = torch.arange(len(keep), device=self.device)
        step = CacheStep(self.layers, sequence, self.next_position, decode=True)
        nothing = self.next_position.new_zeros(len(keep))  # a decode step reads the cache, not intervals
        rows = self.model.language.rows(self.next_position, nothing, nothing, x.dtype, decode=True)
        self.hidden = self.model.language(x, rows, step)
        self.next_position = self.next_position + 1


class _UncachedLogits:
    """The whole of every sequence again at each step."""

    def __init__(self, model: MultimodalModel, prompts: Sequence[Document]):
        self.model, self.documents = model, list(prompts)

    def logits(self) -> Tensor:
        weight = self.model.language.head_weight
        lengths = torch.tensor([len(d) for d in self.documents])
        config = self.model.config
        batch = pack(self.documents, int(lengths.sum()), config.image_attention, config.vision.tile).to(weight.device, weight.dtype)
        hidden = self.model.hidden(batch)[(lengths.cumsum(0) - 1).to(weight.device)]
        return (hidden @ weight.T).cpu()

    def advance(self, tokens: Tensor, keep: list[int]) -> None:
        self.documents = [_continued(self.documents[row], int(tokens[row])) for row in keep]


def _continued(document: Document, token: int) -> Document:
    return replace(document, tokens=np.append(document.tokens, token), targets=np.append(document.targets, False))
