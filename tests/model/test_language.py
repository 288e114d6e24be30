"""The decoder against a Llama written out token by token."""

import math

import pytest
import torch

from smalt.kernels import backend


def rms(x, weight, eps=1e-6):
    return x / math.sqrt(x.square().mean().item() + eps) * weight


def rotated(x, position, theta=100.0):
    half = len(x) // 2
    angle = torch.tensor([position * theta ** (-2 * i / len(x)) for i in range(half)], dtype=x.dtype)
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag])


def attended(block, x, heads=4, kv_heads=2, D=4):
    """The attention of one block over one document x [L, C]: causal, each group of heads on its key and value head."""
    a = block.attention
    q, k, v = (p(x).view(len(x), -1, D) for p in (a.q, a.k, a.v))
    rows = []
    for t in range(len(x)):
        row = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = rotated(rms(q[t, h], a.q_norm.weight), t)
            keys = torch.stack([rotated(rms(k[s, g], a.k_norm.weight), s) for s in range(t + 1)])
            row.append(torch.softmax(keys @ query / math.sqrt(D), 0) @ v[: t + 1, g])
        rows.append(torch.cat(row))
    return torch.stack(rows) @ a.out.weight.T


def decoded(model, tokens):
    """Final hidden states of one text document."""
    language = model.language
    x = language.embedding.weight[tokens]
    for block in language.blocks.values():
        x = x + attended(block, torch.stack([rms(row, block.norm1.weight) for row in x]))
        h = torch.stack([rms(row, block.norm2.weight) for row in x])
        gate, up = h @ block.gate.weight.T, h @ block.up.weight.T
        x = x + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    return torch.stack([rms(row, language.norm.weight) for row in x])


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_document_by_hand(make_model, make_document, make_pack, error, name):
    model = make_model(qk_norm=True, qkv_bias=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    documents = [make_document([("text", n)], seed=n) for n in (5, 1, 7)]
    with torch.no_grad(), backend(name):
        got = model.hidden(make_pack(documents))
        want = torch.cat([decoded(model, torch.from_numpy(d.tokens)) for d in documents])
    assert error(got, want) <= 1e-13
