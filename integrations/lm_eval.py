"""The language side of a run as a model of lm-evaluation-harness, so that its tasks run on Smalt.

    python -m smalt.integrations.lm_eval run --model smalt --model_args run=RUN --tasks NAME --include_path FOLDER

Importing this module registers the model under the name "smalt"; the command above is the harness's own, with this imported before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from smalt.engine.data.chat import Mode
from smalt.engine.inference import load_run
from smalt.kernels import linear_statistics
from smalt.model import Document, pack
from smalt.model.generate import Sampling, generate

# How a prompt begins that :meth:`SmaltLM.apply_chat_template` has made; in any other text, special tokens are text.
_TEMPLATE_BEGINS = ("<|user|>", "<|system|>")
logger = logging.getLogger(__name__)
_Scored = tuple[Any, list[int], list[int]]  # (what the harness calls it, ids of the context, ids of the continuation)


@register_model("smalt")
class SmaltLM(TemplateLM):
    """The newest checkpoint of a run.

    run: folder of the run; mode: of prompts in the chat template, think or answer; budget: tokens of a thought, unlimited when None;
    max_length: tokens of context and continuation, the longest sequence_length of the run's stages when None; longer contexts lose
    their beginning; batch_size: answers that are generated at a time; pack: tokens that are scored at a time, at least max_length;
    device and max_batch_size count for nothing, the run's config has the device. Raises ValueError for another mode.
    """

    def __init__(
        self,
        run: str,
        mode: Mode = "answer",
        budget: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 64,
        pack: int = 8192,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,  # these two the harness gives to every model, asked or not
        device: str | None = None,
    ):
        super().__init__()
        if mode not in ("think", "answer"):
            raise ValueError(f"mode is {mode!r}; it must be think or answer")
        loaded = load_run(Path(run))
        self.model, self.encoder, self._device = loaded.model, loaded.data.encoder, loaded.device
        self.run_name, self.mode, self.budget, self.max_gen_toks = Path(run).name, mode, budget, max_gen_toks
        self.max_length = max_length or max(stage.sequence_length for stage in loaded.config.stages.values())
        self.batch_size = 64 if batch_size == "auto" else int(batch_size)
        self.pack = max(pack, self.max_length)

    @property
    def eot_token_id(self) -> int:
        return self.encoder.control.end

    @property
    def tokenizer_name(self) -> str:
        return f"smalt/{self.run_name}"

    @cached_property
    def template_tokenizer(self) -> Tokenizer:
        """The run's, that reads special tokens as what they are."""
        tokenizer = Tokenizer.from_str(self.encoder.tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        if string.startswith(_TEMPLATE_BEGINS):
            return self.template_tokenizer.encode(string, add_special_tokens=False).ids
        return self.encoder.text(string)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What tells cached requests of one template from those of another."""
        return f"smalt, {self.mode}"

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The chat template of engine/data/chat.py as text, special tokens spelled out. An answer that is begun stays open."""
        opened = {mode: f"<|assistant|><|{mode}|>" + ("<think>" if mode == "think" else "") for mode in ("think", "answer")}
        parts = []
        for message in chat_history:
            start = opened["answer"] if message["role"] == "assistant" else f"<|{message['role']}|>"
            parts.append(f"{start}{message['content']}<|end|>")
        if add_generation_prompt:
            return "".join(parts) + opened[self.mode]
        return "".join(parts).removesuffix("<|end|>")

    def _loglikelihood_tokens(self, requests: Sequence[_Scored], **unused: Any) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether each is the likeliest token) of each continuation, many to a pack."""
        # The harness moves spaces from the end of a context to its continuation: of a blank one nothing is left.
        requests = [(key, context or [self.prefix_token_id], continuation) for key, context, continuation in requests]
        if any(context[-1] == self.encoder.control.think_start for _, context, _ in requests):
            raise ValueError("a continuation cannot be scored where a thought comes before it: give mode=answer for such tasks")
        self._warn_of_cut([len(context) + len(continuation) for _, context, continuation in requests])
        documents = [self._document(context, continuation) for _, context, continuation in requests]
        results: dict[int, tuple[float, bool]] = {}
        for numbers in self._packs(documents):
            results |= zip(numbers, self._score([documents[n] for n in numbers]), strict=True)
        done = [results[number] for number in range(len(requests))]
        for (key, _, _), result in zip(requests, done, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return done

    def _document(self, context: list[int], continuation: list[int]) -> Document:
        """What the model reads of both, at most max_length tokens; the continuation is what it is to predict."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into max_length = {self.max_length}")
        ids = [*context[-room:], *continuation]
        return _text_document(ids, len(ids) - len(continuation), self.model.config.vision.tile)

    def _warn_of_cut(self, lengths: list[int]) -> None:
        if cut := sum(length > self.max_length for length in lengths):
            logger.warning("%d of %d contexts lose their beginning to fit into max_length = %d", cut, len(lengths), self.max_length)

    def _packs(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        """The numbers of the documents of each pack, longest first."""
        numbers, total = list[int](), 0
        for number in sorted(range(len(documents)), key=lambda n: -len(documents[n])):
            if numbers and total + len(documents[number]) > self.pack:
                yield numbers
                numbers, total = [], 0
            numbers.append(number)
            total += len(documents[number])
        if numbers:
            yield numbers

    @torch.no_grad()
    def _score(self, documents: list[Document]) -> list[tuple[float, bool]]:
        config, lengths = self.model.config, [len(d) for d in documents]
        weight = self.model.language.head_weight
        batch = pack(documents, sum(lengths), config.image_attention, config.vision.tile).to(weight.device, weight.dtype)
        rows = (batch.labels >= 0).nonzero().squeeze(1)
        labels = batch.labels[rows]
        found = linear_statistics(self.model.hidden(batch)[rows], weight, labels)
        counts = [int(d.targets.sum()) for d in documents]
        sums = [float(part.double().sum()) for part in found.logprob.split(counts)]
        greedy = [bool(part.all()) for part in (found.argmax == labels).split(counts)]
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, every token once, in windows of max_length tokens where it is longer."""
        windows: list[_Scored] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            own = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, context_len=1)
            own = [(None, *make_disjoint_window(window)) for window in own]
            windows += own
            counts.append(len(own))
        scored = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, result in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, without the thought, up to the first stop sequence; draws follow from the place among the requests."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            for low in range(0, len(numbers), self.batch_size):
                texts |= self._generate({n: requests[n] for n in numbers[low : low + self.batch_size]})
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _generate(self, requests: dict[int, Instance]) -> dict[int, str]:
        """requests: by number, all with the same options."""
        options = normalize_gen_kwargs(next(iter(requests.values())).args[1], self.max_gen_toks)
        until = handle_stop_sequences(options.get("until"), None)
        longest = options["max_gen_toks"]
        sampling = Sampling(
            longest, options.get("temperature", 0.0), int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
        )
        encoded = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests.values()]
        self._warn_of_cut([len(ids) + longest for ids in encoded])
        prompts = [self._prompt(ids, longest) for ids in encoded]
        completions = generate(self.model, prompts, self.encoder.control, sampling, self.budget, numbers=list(requests))
        texts = {}
        for number, prompt, completion in zip(requests, prompts, completions, strict=True):
            thinking = int(prompt.tokens[-1]) == self.encoder.control.think_start
            texts[number] = postprocess_generated_text(self._text(completion.tokens, thinking), until, None)
        return texts

    def _prompt(self, ids: list[int], max_tokens: int) -> Document:
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks = {max_tokens} leaves no room for a prompt in max_length = {self.max_length}")
        ids = ids[-room:]
        return _text_document(ids, len(ids), self.model.config.vision.tile)

    def _text(self, tokens: list[int], thinking: bool) -> str:
        """White space at the beginning stays, which a stop sequence may be."""
        if thinking:
            return self.encoder.split(tokens, thinking=True)[1]
        return self.encoder.decode([t for t in tokens if t != self.encoder.control.end])


def _text_document(ids: Sequence[int], first_target: int, side: int) -> Document:
    """Text alone; targets: the tokens from ``first_target`` on."""
    return Document(
        tokens=np.array(ids, np.int64),
        targets=np.arange(len(ids)) >= first_target,
        image_index=np.zeros(0, np.int64),
        tiles=np.zeros((0, 3, side, side), np.float32),
        spans=np.zeros((0, 2), np.int64),
    )


if __name__ == "__main__":
    cli_evaluate()
