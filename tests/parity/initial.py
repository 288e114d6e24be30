"""A model on a layout that takes its weights from Hugging Face folders, and the folders."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
import workload
from safetensors.torch import save_file

from smalt.engine.weights.load import PREFIXES, open_weights, transformers_layout
from smalt.engine.weights.settings import language_json, vision_json
from smalt.model import build_model
from smalt.parallel import ParallelModel

NEW_ROWS = 3  # of the vocabulary, beyond the folder's


def make_config(tie):
    """The matrix's model as a Qwen3."""
    language = workload.LANGUAGE.model_copy(update={"qkv_bias": False, "tie_embeddings": tie})
    return workload.make_config("").model_copy(update={"language": language})


def write_folders(root, tie):
    """Random weights in root/language and root/vision, by their names in the model."""
    config = make_config(tie)
    smaller = config.language.model_copy(update={"vocabulary": config.language.vocabulary - NEW_ROWS})
    config = config.model_copy(update={"language": smaller})
    own = {name: torch.randn_like(p) for name, p in build_model(config, 7).named_parameters()}
    for part in ("language", "vision"):
        folder = root / part
        folder.mkdir()
        layout = transformers_layout(config, part, PREFIXES[part])
        save_file({name: own[twin.own].view(twin.shape) for name, twin in layout.items()}, folder / "model.safetensors")
        settings = language_json(config.language, 64, None, "float32") if part == "language" else vision_json(config.vision, "float32")
        (folder / "config.json").write_text(json.dumps(settings))
    return own


def run(world, folder, tie):
    """The whole weights after they were read, each rank its own share."""
    config = make_config(tie)
    model = ParallelModel(config, world, 0, torch.float32, workload.ALL, workload.LENGTH)
    with ExitStack() as opened:
        for part in ("language", "vision"):
            model.fill(opened.enter_context(open_weights(Path(folder) / part, part, config, 0)))
    # The last pipeline stage has a copy of a tied weight, which gathering leaves out.
    if model.tied_group is not None:
        tied = dict(model.named_parameters()).get("language.embedding.weight")
        sums = (
            torch.zeros(2)
            if tied is None
            else getattr(tied, "to_local", lambda: tied)().detach().sum().repeat(2) * torch.tensor([1, -1])
        )
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.MAX, group=model.tied_group)
        assert tied is None or sums.sum() == 0, "copies of the tied weight differ"
    return model.full_state()
