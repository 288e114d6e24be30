"""The whole model trained twice, once by the kernels and once by their definitions: every loss and the final weights agree.

Each operation of the model is then given one fault, and the comparison must fail.
"""

import importlib

import pytest
import torch

from smalt.kernels import AdamW, backend
from smalt.model import build_model

STEPS = 32
DOCUMENTS = [[("text", 9), ("image", 2), ("text", 6)], [("text", 13)], [("image", 1), ("text", 4)], [("text", 1)]]


@pytest.fixture(scope="module")
def run(make_config, make_document, make_pack):
    """run(name, steps): losses and final weights of a training run on one backend, in fp32."""
    packs = [make_pack([make_document(d, seed=i + j) for j, d in enumerate(DOCUMENTS)], tail=5) for i in range(3)]

    def train(name, steps=STEPS):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = make_config(init_std=0.2, qkv_bias=True, qk_norm=True, head_dim=16, num_layers=1)
        model = build_model(config, 0, dtype=torch.float32).to(device)
        # A key's bias has no gradient but rounding noise, which Adam would blow up to full steps if epsilon were smaller.
        optimizer = AdamW(model.parameters(), lr=3e-3, eps=1e-4, weight_decay=0.1)
        losses = []
        with backend(name):
            for step in range(steps):
                batch = packs[step % len(packs)].to(device, torch.float32)
                loss = (model(batch) * batch.loss_weight).sum() / batch.loss_weight.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, [p.detach().double() for p in model.parameters()]

    return train


@pytest.fixture(scope="module")
def reference(run):
    return run("reference")


def difference(got, want):
    """Largest relative difference of a loss, and of a weight by the size of its tensor.

    A tensor counts as no smaller than the RMS of all weights: a key's bias stays as small as the rounding that moves it.
    """
    losses = max(abs(a - b) / abs(b) for a, b in zip(got[0], want[0], strict=False))
    usual = torch.cat([b.flatten() for b in want[1]]).square().mean().sqrt()
    weights = max(((a - b).abs().max() / b.abs().max().clamp(min=usual)).item() for a, b in zip(got[1], want[1], strict=True))
    return losses, weights


@pytest.mark.slow
def test_kernels_train_like_their_definitions(run, reference):
    losses, weights = difference(run("triton"), reference)
    assert reference[0][-1] < 0.7 * reference[0][0], "the run must learn something"
    assert losses <= 1e-5
    assert weights <= 1e-4


def _scaled(launcher, index, factor):
    """The launcher with one of its outputs scaled."""

    def faulty(*args, **kwargs):
        outputs = launcher(*args, **kwargs)
        if isinstance(outputs, torch.Tensor):
            return outputs * factor
        return tuple(x * factor if i == index else x for i, x in enumerate(outputs))

    return faulty


def _attention_off_by_one(launcher):
    """Each row sees one key too few, if it sees more than one."""

    def faulty(q, k, v, rows, scale, softcap):
        rows = rows.clone()
        rows[1] -= ((rows[1] - rows[0]) > 1).int()
        return launcher(q, k, v, rows, scale, softcap)

    return faulty


def _attention_scale(launcher):
    return lambda q, k, v, rows, scale, softcap: launcher(q, k, v, rows, 1.0, softcap)


def _attention_without_delta(launcher):
    """dz = P dP instead of P (dP - delta)."""
    return lambda q, k, v, rows, keys, out, *rest: launcher(q, k, v, rows, keys, torch.zeros_like(out), *rest)


def _first_partial_row_lost(launcher):
    return lambda x_PD, dtype: launcher(x_PD[1:] if len(x_PD) > 1 else 0 * x_PD, dtype)


def _turned_the_wrong_way(launcher):
    return lambda dy, x, cos, sin, weight, eps: launcher(dy, x, cos, -sin, weight, eps)


def _gelu_for_silu(launcher):
    return lambda gate, up, activation: launcher(gate, up, "gelu" if activation == "silu" else "silu")


def _labels_one_off(launcher):
    return lambda hidden, weight, labels, *rest: launcher(hidden, weight, torch.where(labels > 0, labels - 1, labels), *rest)


FAULTS = {
    "attention sees one key too few": ("attention", "launch_forward", _attention_off_by_one),
    "attention drops its scale": ("attention", "launch_forward", _attention_scale),
    "attention's gradient drops delta": ("attention", "launch_backward", _attention_without_delta),
    "rms_norm loses a row of partial sums": ("rms_norm", "column_sum", _first_partial_row_lost),
    "rms_norm is a little small": ("rms_norm", "launch_forward", lambda f: _scaled(f, 0, 0.9999)),
    "layer_norm loses a row of partial sums": ("layer_norm", "column_sum", _first_partial_row_lost),
    "layer_norm's dx is too large": ("layer_norm", "launch_backward", lambda f: _scaled(f, 0, 1.1)),
    "rotary's gradient turns the wrong way": ("rotary", "launch_norm_backward", _turned_the_wrong_way),
    "the two activations are exchanged": ("gated", "launch_forward", _gelu_for_silu),
    "the head takes the wrong word": ("linear_statistics", "launch_forward", _labels_one_off),
    "the head's dweight has the wrong sign": ("linear_statistics", "launch_backward", lambda f: _scaled(f, 1, -1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_in_one_kernel_is_seen(run, monkeypatch, fault):
    module, name, spoil = FAULTS[fault]
    module = importlib.import_module(f"smalt.kernels.{module}")
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    # Two steps are enough: every gradient has gone into the weights.
    losses, weights = difference(run("triton", steps=2), run("reference", steps=2))
    assert losses > 1e-5 or weights > 1e-4
