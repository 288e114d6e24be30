"""What a checkpoint came from: hashes of config, tokenizer and data of its run, and the checkpoints that the run began with.

It is the entry ``lineage`` of a checkpoint's state:

    {"config": hash, "tokenizer": hash, "data": hash, "sources": {name: {"records": number, "bytes": size}}, "parents": {key: parent}}

where key is ``init.run`` or ``stages.NAME.teacher``, and a parent is {"given": path in the config, "checkpoint": path, "step": number,
"kept": what pruning kept of its decoder, "lineage": its own}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalt.model.pruning import Kept

from .checkpoints import Checkpoint, checkpoint_of_step, latest_checkpoint
from .config import RunConfig
from .data.records import Records
from .errors import UserError
from .run_folder import CHECKPOINTS

Lineage = dict[str, Any]
INIT = "init.run"


def teacher_key(stage: str) -> str:
    return f"stages.{stage}.teacher"


def make_lineage(config: RunConfig, sources: Mapping[str, Records], parents: Mapping[str, Any]) -> Lineage:
    """Of a run. sources: of training; parents: as in the lineage."""
    sizes = {name: {"records": len(records), "bytes": _bytes(Path(records.path))} for name, records in sources.items()}
    return {
        "config": _hash(config.model_dump(mode="json")),
        "tokenizer": tokenizer_hash(config.data.tokenizer),
        "data": _hash(sizes),
        "sources": sizes,
        "parents": dict(parents),
    }


def make_parent(given: Path, checkpoint: Checkpoint, kept: Kept | None = None) -> dict[str, Any]:
    """An entry of ``parents``."""
    decoder = kept and {"blocks": [block.number for block in kept.language.blocks], "channels": kept.language.channels}
    lineage = checkpoint.state.get("lineage")
    return {"given": str(given), "checkpoint": str(checkpoint.path), "step": checkpoint.step, "kept": decoder, "lineage": lineage}


def find_parent(key: str, given: Path, before: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a path in the config means, verified; the one that it meant before, where the run goes on from a lineage
    with these parents. Raises UserError, which names the key, where there is none."""
    known = before.get(key, {})
    is_known = "given" in known and Path(known["given"]).resolve() == given.resolve()
    path = Path(known["checkpoint"]) if is_known else given
    try:
        if path.name.startswith("step-") and path.name[5:].isdigit():
            return checkpoint_of_step(path.parent, int(path.name[5:]))
        return latest_checkpoint(path / CHECKPOINTS, set_aside=False)
    except UserError as error:
        raise UserError(f"{key} = {given}: {error}") from error


def check_tokenizer(key: str, parent: Checkpoint, config: RunConfig) -> None:
    """Raise UserError, which begins with the key, where the checkpoint was trained with another tokenizer than the config's of today.
    Checkpoints before version 0.4 do not say with which."""
    theirs = parent.state.get("lineage", {}).get("tokenizer")
    if theirs is not None and theirs != tokenizer_hash(config.data.tokenizer):
        raise UserError(
            f"{key}: {parent.path} was trained with another tokenizer than data.tokenizer = {config.data.tokenizer}; its tokens have "
            "other meanings here: use the tokenizer of that run"
        )


def channels_kept(lineage: Lineage, ancestor: Checkpoint) -> list[int] | None:
    """The channels of an ancestor's decoder that a run's model has, None where it was not pruned from it."""
    parent = lineage["parents"].get(INIT)
    if parent is None:
        return None
    if parent["kept"] is None:
        return channels_kept(parent["lineage"], ancestor) if parent["lineage"] else None
    is_at_its_place = Path(parent["checkpoint"]).resolve() == ancestor.path.resolve()
    # Folders may have moved since. Checkpoints before version 0.4 have no lineage.
    theirs = ancestor.state.get("lineage")
    is_known = theirs is not None and (parent["step"], parent["lineage"]) == (ancestor.step, theirs)
    return parent["kept"]["channels"] if is_at_its_place or is_known else None


def tokenizer_hash(path: Path) -> str:
    """Of what a tokenizer.json says, however it is laid out."""
    try:
        return _hash(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: {path} cannot be read: {error}") from error


def _bytes(path: Path) -> int | None:
    """Of a source's files; None where they are on no file system of this machine."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
