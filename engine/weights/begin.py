"""The weights of a new run from the folders that the section init names."""

from __future__ import annotations

from contextlib import ExitStack

from smalt.parallel import ParallelModel, World

from ..config import RunConfig
from .load import Values, open_weights


def take_folders(config: RunConfig, model: ParallelModel, world: World) -> None:
    """Have the parts of a fresh model take the weights of the folders that the section init names; every rank calls it.

    Each rank reads its own share. Raises UserError, on all ranks, for a folder that does not fit.
    """
    if config.init.language is None and config.init.vision is None:
        return
    with ExitStack() as opened:
        model.fill(world.attempt(lambda: _open(config, opened)))


def _open(config: RunConfig, opened: ExitStack) -> Values:
    init, values = config.init, Values()
    if init.language is not None:
        values |= opened.enter_context(open_weights(init.language, "language", config.model, config.seed))
    if init.vision is not None:
        values |= opened.enter_context(open_weights(init.vision, "vision", config.model, config.seed))
    return values
