"""A model that Smalt trained, of transformers' own tower and decoder; what is here holds them together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_smalt import SmaltConfig


class ThinkingBudget(LogitsProcessor):
    """Forces ``</think>`` where a thought has used up its tokens. A thought that is opened again spends what is left.

    The prompt is what it sees first; a row whose prompt ends in ``<think>`` is thinking.
    """

    def __init__(self, budget: int, think_start: int, think_end: int):
        if budget < 0:
            raise ValueError(f"thinking_budget is {budget}; it is a number of tokens, at least 0")
        self.budget, self.think_start, self.think_end, self.begin = budget, think_start, think_end, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.begin < 0:
            self.begin = input_ids.shape[1] - 1
        ids = input_ids[:, self.begin :]  # from the last token of the prompt on
        start, end = ids == self.think_start, ids == self.think_end
        # Inside a thought after a token: the last of the two that came was a <think>.
        steps = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(start | end, steps, -1).cummax(1).values
        inside = (last >= 0) & start.gather(1, last.clamp(min=0))
        thought = (inside[:, :-1] & ~end[:, 1:]).sum(1)
        spent = inside[:, -1] & (thought >= self.budget)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.think_end] = 0
        return torch.where(spent[:, None], forced, scores)


class SmaltProjector(nn.Module):
    """Merges neighbouring patches and maps them into the decoder's width by a two-layer MLP."""

    def __init__(self, config: SmaltConfig):
        super().__init__()
        self.merge = config.spatial_merge_size
        self.up = nn.Linear(config.vision_config.hidden_size * self.merge**2, config.projector_hidden_size)
        self.down = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[tiles, grid * grid, width] to [tiles * tokens of a tile, width of the decoder], in reading order."""
        grid, m = round(patches.shape[1] ** 0.5), self.merge
        pad = -grid % m
        x = F.pad(patches.unflatten(1, (grid, grid)), (0, 0, 0, pad, 0, pad))
        n, g, _, c = x.shape
        x = x.view(n, g // m, m, g // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m * c)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SmaltForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Text and images to text.

    The processor makes the inputs. pixel_values [B, N, 3, S, S]: the tiles of each row, in order, uint8, or floating-point in [-1, 1];
    num_tiles [B, M]: of each image of a row. Rows with fewer tiles or images than others are filled up, with anything and with 0.
    """

    config_class = SmaltConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers has it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False  # it has no mask for images whose tokens see each other
    _supports_flex_attn = False
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}  # noqa: RUF012 - as transformers has it

    def __init__(self, config: SmaltConfig):
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        self.vision_tower = getattr(tower, "vision_model", tower)  # where the first 5.x of transformers hold it
        self.projector = SmaltProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As everywhere; but a tensor that is missing, or that nothing asks for, is a ValueError: the model would be another one."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = [
            f"{kind.removesuffix('_keys')}: {name}" for kind in ("missing_keys", "unexpected_keys") for name in sorted(info[kind])
        ]
        if wrong:
            raise ValueError("\n  ".join(["the weights are not those of the model that config.json describes:", *wrong]))
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Tensor, num_tiles: Tensor) -> Tensor:
        """What the decoder sees of the images, [tokens, width], row after row of the batch."""
        places = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        tiles = pixel_values[places < num_tiles.sum(1, keepdim=True)]
        dtype = self.projector.up.weight.dtype
        tiles = tiles.to(dtype) / 127.5 - 1.0 if tiles.dtype == torch.uint8 else tiles.to(dtype)
        return self.projector(self.vision_tower(pixel_values=tiles).last_hidden_state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Raises ValueError for images that do not fit the image tokens of input_ids."""
        # generate takes of a user what stands in this signature; the cache has one name or the other, by version.
        kwargs |= {name: value for name, value in (("past_key_values", past_key_values), ("cache", cache)) if value is not None}
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            if input_ids is None or num_tiles is None:
                raise ValueError("pixel_values need input_ids, whose image tokens they replace, and num_tiles")
            is_image = input_ids == self.config.image_token_id
            features = self._features(is_image, pixel_values, num_tiles)
            embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings))
            if self.config.image_attention == "bidirectional":
                attention_mask = self._mask(self._image_numbers(is_image, num_tiles), attention_mask, embeddings.dtype, kwargs)
        outputs = self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, **{**kwargs, "return_dict": True}
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}  # the cache has another name by version
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def _features(self, is_image: Tensor, pixel_values: Tensor, num_tiles: Tensor) -> Tensor:
        there, wanted = is_image.sum(1), num_tiles.sum(1) * self.config.tokens_per_tile
        if not torch.equal(there, wanted):
            raise ValueError(f"the rows have {there.tolist()} image tokens, and their images make {wanted.tolist()}")
        return self.get_image_features(pixel_values, num_tiles)

    def _image_numbers(self, is_image: Tensor, num_tiles: Tensor) -> Tensor:
        """Which image of its row a token belongs to, [B, L]; -1 for text. Images may stand side by side."""
        tile = (is_image.cumsum(1) - 1) // self.config.tokens_per_tile
        number = (tile[..., None] >= num_tiles.cumsum(1)[:, None]).sum(-1)
        return torch.where(is_image, number, -1)

    def _mask(self, images: Tensor, attention_mask: Tensor | None, dtype: torch.dtype, kwargs: dict[str, Any]) -> Tensor:
        """What is added to the scores, [B, 1, L, K]: rows see what came before, and the whole of the image that they are in.

        images [B, L]: of :meth:`_image_numbers`; attention_mask [B, K]: 0 where there is padding; K counts what is in the cache too.
        """
        batch, length = images.shape
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is None:
            attention_mask = images.new_ones(batch, past + length)
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask must be [{batch}, {past + length}] beside images; of caches, only dynamic ones take them"
            )
        rows, keys = torch.arange(past, past + length, device=images.device), torch.arange(past + length, device=images.device)
        image_of_key = F.pad(images, (past, 0), value=-1)
        same = (images[:, :, None] == image_of_key[:, None]) & (images >= 0)[:, :, None]
        seen = ((keys <= rows[:, None]) | same) & attention_mask.bool()[:, None]
        seen |= keys == rows[:, None]  # a row of padding sees itself: a softmax over nothing is not a number
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def prepare_inputs_for_generation(self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = None  # the cache has seen them
        return inputs

    def generate(
        self, *args: Any, thinking_budget: int | None = None, logits_processor: LogitsProcessorList | None = None, **kwargs: Any
    ) -> Any:
        """As everywhere. thinking_budget: tokens of a thought, after which ``</think>`` is forced; unlimited when None."""
        if thinking_budget is not None:
            forcing = ThinkingBudget(thinking_budget, self.config.think_start_token_id, self.config.think_end_token_id)
            logits_processor = LogitsProcessorList([*(logits_processor or []), forcing])
        return super().generate(*args, logits_processor=logits_processor, **kwargs)
