"""The border between two stages of a run whose pipelines are cut at different blocks."""

import torch
import torch.distributed as dist
import workload

from smalt.engine.optimizers import build_optimizer, continue_optimizer, optimizer_tensors
from smalt.engine.optimizers import optimizer_state as state_of
from smalt.engine.sections import OptimizerConfig, StageConfig
from smalt.model.cost import Workload
from smalt.parallel import ParallelModel
from smalt.parallel.layout import local_part

TIED = "language.embedding.weight"
STAGE = StageConfig(
    steps=3, sequence_length=workload.LENGTH, mixture={"any": 1.0}, trainable=dict.fromkeys(workload.ALL, 1.0), learning_rate=1e-2
)  # fmt: skip
OPTIMIZER = OptimizerConfig(kind="smalt_adamw", state_dtype="bfloat16")
# Many tiles, which leave the stage with the vision tower few blocks, and none.
WORK = [Workload(workload.LENGTH, workload.LENGTH, 200), Workload(workload.LENGTH, workload.LENGTH, 0)]


def run(world):
    """blocks: of both models' pipeline stages; trained, taken_over: weights of the first after three steps, and of the second; tied:
    this rank's part of the tied weight, of every rank; changed: weights that gathering them has written into, on any rank; states: of
    the first optimiser and of three that go on with it, of the second model, of one without a language model that learns, and of the
    second again; from all ranks."""
    config = workload.make_config("")
    first, second = (
        ParallelModel(config, world, seed, torch.float32, workload.ALL, workload.LENGTH, work) for seed, work in enumerate(WORK)
    )
    optimizer = build_optimizer(first, STAGE, OPTIMIZER)
    for packs in workload.make_steps("", torch.float32):
        total = workload.denominator(packs)
        first.accumulate(
            packs[world.replica :: world.num_replicas], lambda nll, shard, total=total: workload.pack_loss(nll, shard) / total
        )
        optimizer.step()
        optimizer.zero_grad()
    mine = dict(first.named_parameters())
    tied = local_part(mine[TIED]).detach().clone() if TIED in mine else None
    if not first.parts[0].is_first and tied is not None:
        local_part(mine[TIED]).data.mul_(2)  # a copy that is like the first would hide that it was written into
    own = {name: local_part(p).detach().clone() for name, p in mine.items()}
    trained = first.full_state()
    changed = [name for name, p in mine.items() if not torch.equal(local_part(p), own[name])]
    second.copy_weights(first)
    states = [_state(optimizer, first, world)]
    after = build_optimizer(second, STAGE, OPTIMIZER)
    continue_optimizer(after, second, first, state_of(optimizer, _names(first)), workload.ALL)
    states.append(_state(after, second, world))
    # The language model, whose blocks move, stops to learn and begins again.
    few = ("vision", "projector")
    third = ParallelModel(config, world, 0, torch.float32, few, workload.LENGTH, WORK[0])
    frozen = build_optimizer(third, STAGE.model_copy(update={"trainable": dict.fromkeys(few, 1.0)}), OPTIMIZER)
    continue_optimizer(frozen, third, second, state_of(after, _names(second)), few)
    states.append(_state(frozen, third, world))
    last = build_optimizer(second, STAGE, OPTIMIZER)
    continue_optimizer(last, second, third, state_of(frozen, _names(third)), few)
    states.append(_state(last, second, world))
    found = [None] * world.size
    dist.all_gather_object(found, (tied, changed, *states))
    return {
        "blocks": [[list(blocks) for blocks in model.blocks] for model in (first, second)],
        "trained": trained, "taken_over": second.full_state(),
        "tied": [tied for tied, *_ in found], "changed": sorted({name for _, names, *_ in found for name in names}),
        "states": [{key: tensor for held in state for key, tensor in held.items()} for state in list(zip(*found, strict=True))[2:]],
    }  # fmt: skip


def _names(model):
    return {p: name for name, p in model.named_parameters()}


def _state(optimizer, model, world):
    """What this rank holds of the optimiser's state, by name and by its place on the axes that cut parameters."""
    place = tuple(index for axis, index in world.coordinates.items() if axis != "pp")
    return {(key, place): local_part(t).detach().clone() for key, t in optimizer_tensors(optimizer, _names(model)).items()}
