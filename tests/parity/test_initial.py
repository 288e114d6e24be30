"""Weights that each rank reads its own share of, from Hugging Face folders, are those of one process, bit for bit."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
LAYOUTS = [
    (8, {"fsdp": 8}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (4, {"cp": 2, "tp": 2}),
    (4, {"fsdp": 2, "tp": 2}),
    (4, {"pp": 2, "tp": 2, "schedule": "interleaved"}),
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path_factory):
    """The folder of folders, whether the head is tied, what is in them, and what one process reads."""
    sys.path.insert(0, str(Path(__file__).parent))
    import initial

    from smalt.parallel import alone

    root = tmp_path_factory.mktemp("folders")
    written = initial.write_folders(root, request.param)
    return root, request.param, written, initial.run(alone(torch.device("cpu")), root, request.param)


def test_one_process_has_what_is_in_the_folders(folders):
    _, tie, written, one = folders
    assert ("language.head.weight" in one) is not tie
    for name, tensor in one.items():
        if not name.startswith("projector"):
            assert torch.equal(tensor[: len(written[name])], written[name]), name
            assert len(tensor) - len(written[name]) == (3 if name in ("language.embedding.weight", "language.head.weight") else 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(f"{k}{v}" for k, v in layout[1].items()))
def test_every_layout_has_the_bits_of_one_process(layout, folders, workers):
    root, tie, _, one = folders
    got = workers.initial(*layout, root, tie)
    assert got.keys() == one.keys()
    assert not [name for name, tensor in one.items() if not torch.equal(got[name], tensor)]
