"""docs/kernels.md: its example runs, and its picture of intervals is what the model's batch makes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from smalt.model import Document, pack

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


@pytest.mark.slow
def test_the_head_in_another_trainer():
    transformers = pytest.importorskip("transformers")
    text = DOCS.read_text()
    (code,) = re.findall(r"^    (from smalt\.kernels import linear_cross_entropy\n(?:.*\n)*?    \(nll.*)$", text, re.MULTILINE)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
    )
    model = transformers.LlamaForCausalLM(config)
    input_ids, mask = torch.randint(0, 40, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    model(input_ids, attention_mask=mask, labels=input_ids).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    exec(
        "\n".join(line.removeprefix("    ") for line in code.splitlines()),
        {"model": model, "input_ids": input_ids, "mask": mask, "torch": torch},
    )
    for p, want in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-6)


def test_the_picture_of_intervals():
    picture = DOCS.read_text().split("kv_start  kv_end\n")[1].split("\n\n")[0]
    shown = [tuple(map(int, re.findall(r"\|\s+(\d+)\s+(\d+)", line)[0])) for line in picture.splitlines()]

    def document(length, span):
        spans = np.array(span, np.int64).reshape(-1, 2)
        image = np.concatenate([np.arange(a, b) for a, b in spans] or [np.zeros(0, np.int64)])
        return Document(np.arange(6, 6 + length), np.ones(length, bool), image, np.zeros((len(spans), 3, 2, 2), np.float32), spans)

    batch = pack([document(4, []), document(6, [(1, 4)])], 12, "bidirectional", 2)
    assert shown == list(zip(batch.kv_start.tolist(), batch.kv_end.tolist(), strict=True))
