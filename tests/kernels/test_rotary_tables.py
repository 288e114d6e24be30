"""The tables of rotary: against math.cos, against each other, and against transformers."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from smalt.kernels import YarnScaling, mrope_table, rotary, rotary_table, rotary_table_2d

F64 = torch.float64


def grid(T, axes, seed=0):
    return torch.randint(0, 50, (axes, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-24), (torch.float64, 1e-9)])
def test_table_at_position_a_million(dtype, tolerance):
    position = 1_000_000
    cos, sin = rotary_table(torch.tensor([position], dtype=torch.int32), 128, 1e6, dtype)
    for i in range(64):
        angle = position * 1e6 ** (-2 * i / 128)
        assert abs(cos[0, i].item() - math.cos(angle)) <= tolerance + 1e-9
        assert abs(sin[0, i].item() - math.sin(angle)) <= tolerance + 1e-9


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_formula(truncate):
    # Turns of dim i within the original length: L theta^(-2i/R) / 2 pi. The ramp is linear in i between 32 turns and one.
    R, theta, L, s = 64, 10_000.0, 4096, 8.0
    low, high = (R * math.log(L / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    cos, sin = rotary_table(torch.tensor([3]), R, theta, F64, YarnScaling(s, L, truncate=truncate))
    magnitude = 0.1 * math.log(s) + 1
    seen = set()
    for i in range(R // 2):
        slowed = min(max((i - low) / (high - low), 0), 1)
        seen.add(0 < slowed < 1)
        angle = 3 * theta ** (-2 * i / R) * (slowed / s + 1 - slowed)
        assert cos[0, i].item() == pytest.approx(magnitude * math.cos(angle), abs=1e-13)
        assert sin[0, i].item() == pytest.approx(magnitude * math.sin(angle), abs=1e-13)
    assert seen == {False, True}


def test_yarn_without_scaling_is_plain():
    positions = torch.arange(9)
    for got, want in zip(
        rotary_table(positions, 32, 1e4, F64, YarnScaling(1.0, 64)), rotary_table(positions, 32, 1e4, F64), strict=True
    ):
        assert torch.allclose(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("sections", "interleaved"), [((16, 24, 24), False), ((24, 20, 20), True), ((5, 4, 3), True), ((1, 0, 2), False)]
)
def test_text_turns_in_mrope_as_without_it(sections, interleaved):
    positions, R, yarn = torch.arange(40, dtype=torch.int32), 2 * sum(sections), YarnScaling(4.0, 16)
    got = mrope_table(positions.expand(3, -1), R, 1e6, torch.float32, sections, interleaved, yarn)
    for g, w in zip(got, rotary_table(positions, R, 1e6, torch.float32, yarn), strict=True):
        assert g.is_contiguous()
        assert torch.equal(g, w)


@pytest.mark.parametrize(
    ("interleaved", "axes"), [(False, "t t t t t h h h h w w w"), (True, "t h w t h w t h w t h t")], ids=["sections", "interleaved"]
)
def test_axes_of_mrope(interleaved, axes):
    positions = grid(7, 3)
    cos, sin = mrope_table(positions, 24, 100.0, F64, (5, 4, 3), interleaved)
    for i, axis in enumerate(axes.split()):
        want = rotary_table(positions["thw".index(axis)], 24, 100.0, F64)
        assert torch.equal(cos[:, i], want[0][:, i])
        assert torch.equal(sin[:, i], want[1][:, i])


def test_2d_is_two_tables_side_by_side():
    positions = grid(7, 2)
    for both, row, column in zip(
        rotary_table_2d(positions, 24, 100.0, F64), *(rotary_table(p, 12, 100.0, F64) for p in positions), strict=True
    ):
        assert both.is_contiguous()
        assert torch.equal(both, torch.cat([row, column], 1))


class FromTheHost(TorchFunctionMode):
    """Counts the tensors that are made from Python's numbers: each is a copy that a GPU is waited for."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.made += function in (torch.tensor, torch.as_tensor)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make",
    [
        lambda device: rotary_table(torch.arange(7, device=device), 24, 100.0, F64, YarnScaling(4.0, 16)),
        lambda device: mrope_table(grid(7, 3).to(device), 24, 100.0, F64, (5, 4, 3)),
        lambda device: mrope_table(grid(7, 3).to(device), 24, 100.0, F64, (5, 4, 3), True, YarnScaling(4.0, 16)),
        lambda device: rotary_table_2d(grid(7, 2).to(device), 24, 100.0, F64),
    ],
    ids=["1-D", "sections", "interleaved", "2-D"],
)
def test_nothing_is_copied_from_the_host(make):
    with FromTheHost() as host:
        make("cuda" if torch.cuda.is_available() else "cpu")
    assert host.made == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncate": False},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 1.3},
        {"factor": 0.5},
        {"original_length": 20},
        {"original_length": 6},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(options):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import Qwen2Config

    scaling = YarnScaling(**{"factor": 40.0, "original_length": 4096, **options})
    names = {"original_length": "original_max_position_embeddings"}
    parameters = {names.get(k, k): v for k, v in {"factor": 40.0, "original_length": 4096, **options}.items()}
    config = Qwen2Config(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=163_840,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **parameters},
    )  # fmt: skip
    want, magnitude = rope_utils._compute_yarn_parameters(config)
    plain = 1e6 ** (-torch.arange(0, 128, 2, dtype=F64) / 128)
    # theirs is fp32, which a ramp between dims magnifies where it ends: f (1 - r) + f r / 40 with r near one
    tolerance = 5e-7 if scaling.truncate else 5e-6
    assert (scaling.scale(plain, 1e6) / want.double() - 1).abs().max() < tolerance
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_is_that_of_qwen(error, interleaved):
    pytest.importorskip("transformers")
    if interleaved:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Embedding
        from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
    else:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Embedding
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb
    sections = (24, 20, 20) if interleaved else (16, 24, 24)
    config = Config(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)},
    )  # fmt: skip
    positions, q = grid(11, 3), torch.randn(11, 2, 128, dtype=F64)
    cos, sin = Embedding(config)(q, positions[:, None])
    want, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)
    got = rotary(q, *mrope_table(positions, 128, 1e6, F64, sections, interleaved))
    assert error(got, want[0].transpose(0, 1)) < 1e-5  # angles up to 50, in fp32 there


@pytest.mark.slow
def test_2d_is_that_of_qwens_vision_tower(error):
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VLVisionConfig,
        Qwen2VLVisionRotaryEmbedding,
        apply_rotary_pos_emb_vision,
    )

    module = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=160, num_heads=2))
    theta, positions, q = module.config.rope_parameters["rope_theta"], grid(13, 2), torch.randn(13, 2, 80)
    cos, sin = module(q, positions.T)
    want, _ = apply_rotary_pos_emb_vision(q, q, cos, sin)
    assert error(rotary(q, *rotary_table_2d(positions, 80, theta, torch.float32)), want) < 1e-5  # angles up to 50, in fp32 there


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotary_table(torch.arange(3), 7, 1e4, F64), "rotary_dim 7"),
        (lambda: rotary_table(torch.arange(3), 0, 1e4, F64), "rotary_dim 0"),
        (lambda: rotary_table_2d(grid(3, 2), 6, 1e4, F64), "rotary_dim 6"),
        (lambda: rotary_table_2d(grid(3, 3), 8, 1e4, F64), r"positions \(3, 3\)"),
        (lambda: mrope_table(grid(3, 2), 8, 1e4, F64, (2, 1, 1)), r"positions \(2, 3\)"),
        (lambda: mrope_table(grid(3, 3), 8, 1e4, F64, (2, 1, 2)), r"sections \(2, 1, 2\) of 4 pairs"),
        (lambda: mrope_table(grid(3, 3), 8, 1e4, F64, (0, 2, 2), True), r"sections \(0, 2, 2\)"),
        (lambda: YarnScaling(0.0, 4096), "factor=0.0"),
        (lambda: YarnScaling(2.0, 0), "original_length=0"),
        (lambda: YarnScaling(2.0, 4096, beta_fast=1.0, beta_slow=2.0), "beta_fast=1.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
