"""Rows of test_deepspeed.py under torchrun: ``deepspeed_ranks.py FOLDER``.

Takes the rows of FOLDER/rows.json one after the other and leaves of each, from rank 0, NAME.pt or NAME.error with the traceback; after
an error it takes no more, for the ranks may have parted.
"""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

import faults
import torch
import workload

from smalt.engine.optimizers import optimizer_tensors
from smalt.parallel import ParallelConfig, ParallelModel
from smalt.parallel.deepspeed import DeepSpeedModel
from smalt.parallel.mesh import join_world, leave_world

RATE, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-5, 0.1  # those of workload.make_optimizer


def fill(row, world):
    """The whole weights of a model, before and after its step, when some were filled in before DeepSpeed had it."""
    config = workload.make_config(row["variant"])
    model = DeepSpeedModel(config, world, 0, torch.float32, workload.TRAINABLE[row["trainable"]], workload.LENGTH)
    fresh, values = model.full_state(), {name: counted(p.shape) for name, p in model.skeleton.named_parameters() if "blocks" in name}
    model.fill({name: lambda bounds, v=value: v[tuple(slice(*b) for b in bounds)] for name, value in values.items()})
    filled = model.full_state()
    optimizer = start(model)
    step(model, optimizer, workload.make_steps(row["variant"], torch.float32)[0])
    return {"fresh": fresh, "values": values, "filled": filled, "stepped": model.full_state()}


def counted(shape):
    """Different numbers of the size of weights."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) / count - 0.5).view(shape)


def build(row, world):
    """A model and its optimiser: of DeepSpeed, or, where the row has no section deepspeed, of torch."""
    config = workload.make_config(row["variant"])
    if row.get("ffn"):
        config = config.model_copy(update={"language": config.language.model_copy(update={"ffn": row["ffn"]})})
    common = config, world, 0, torch.float32, workload.TRAINABLE[row["trainable"]], workload.LENGTH
    if world.parallel.runtime == "torch":
        model = ParallelModel(*common, autocast=row["autocast"])
        return model, workload.make_optimizer(p for p in model.parameters() if p.requires_grad)
    model = DeepSpeedModel(*common, autocast=row["autocast"])
    if row["fault"] == "averaging left on":
        model.settings.pop("gradient_allreduce_op", None)
        model.loss_scale = 1.0
    return model, start(model)


def start(model):
    learning = [p for p in model.skeleton.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learning if p.ndim > 1], [p for p in learning if p.ndim == 1]
    return model.start([{"params": g, "weight_decay": DECAY} for g in (matrices, vectors)], RATE, BETAS, EPS)


def gradients_of(model):
    if isinstance(model, DeepSpeedModel):
        learned = {name: tensor.full_tensor() for name, tensor in model.gradients().items()}
        return {name: learned.get(name) for name, _ in model.named_parameters()}
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def step(model, optimizer, packs, loss=workload.pack_loss, take=True):
    """A step on this replica's share of the packs, taken where it is finite and to be taken; gives loss and norm."""
    world, total = model.world, workload.denominator(packs)
    mine = packs[world.replica :: world.num_replicas]
    value = float(world.sum(model.accumulate(mine, lambda nll, shard: loss(nll, shard) / total)))
    norm = model.clip_gradients(workload.MAX_NORM)
    if take and torch.isfinite(torch.tensor([value, norm])).all():
        optimizer.step()
    optimizer.zero_grad()
    return value, norm


def train(row, world, order=lambda packs: packs):
    """What tests/parity/workload.py finds of one process; order: of the packs of a step."""
    model, optimizer = build(row, world)
    steps = map(order, workload.make_steps(row["variant"], torch.float32))
    return workload.train_layout(model, optimizer, steps, gradients_of)


def go_on(row, world):
    """Three steps, the last also from the state after the second in a new model, and in one that stepped on other data before."""
    steps = [packs[: 2 * world.size] for packs in workload.make_steps(row["variant"], torch.float32)]
    model, optimizer = build(row, world)
    for packs in steps[:2]:
        step(model, optimizer, packs)
    saved = {f"model.{name}": tensor for name, tensor in model.weights().items()} | state_of(model, optimizer)
    last = step(model, optimizer, steps[2])
    found = {"last": [last], "parameters": [model.full_state()], "moments": [whole_state(model, optimizer)]}
    model.close()
    for before in ([], steps[2:]):
        other, optimizer = build(row, world)
        for packs in before:
            step(other, optimizer, packs)
        other.restore(saved)
        found["last"].append(step(other, optimizer, steps[2]))
        found["parameters"].append(other.full_state())
        found["moments"].append(whole_state(other, optimizer))
        other.close()
    return found


def state_of(model, optimizer):
    """AdamW's state, as a checkpoint has it."""
    return optimizer_tensors(optimizer, {p: name for name, p in model.named_parameters()})


def whole_state(model, optimizer):
    return {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in state_of(model, optimizer).items()}


def skip(row, world):
    """Three steps, and before each three that are not taken: not finite on one rank alone, in the loss and in gradients alone, and a
    finite one, as of a loss spike."""
    steps = workload.make_steps(row["variant"], torch.float32)
    found = []
    for spoil in (False, True):
        model, optimizer = build(row, world)
        skipped = []
        for packs in steps:
            if spoil:
                skipped.append(step(model, optimizer, packs, lambda nll, shard: infinite(nll, shard, world)))
                skipped.append(step(model, optimizer, packs, lambda nll, shard: steep(nll, shard, world)))
                skipped.append(step(model, optimizer, packs, take=False))
            step(model, optimizer, packs)
        found.append({"skipped": skipped, "parameters": model.full_state(), "moments": whole_state(model, optimizer)})
        model.close()
    return found


def infinite(nll, shard, world):
    """A loss that is infinite on one rank, with finite gradients."""
    return workload.pack_loss(nll, shard) + (float("inf") if world.rank == 1 else 0.0)


def steep(nll, shard, world):
    """A finite loss, on one rank with infinite gradients."""
    loss = workload.pack_loss(nll, shard)
    return loss + (loss - loss.detach()).abs().sqrt() * 0.0 if world.rank == 1 else loss


def run(row):
    parallel = ParallelConfig(runtime="deepspeed", deepspeed=row["deepspeed"], **row["parallel"])
    world = replace(WORLD, parallel=parallel.sized(WORLD.size))
    with faults.planted(row["fault"] if row["fault"] in faults.FAULTS else None):
        return {"train": train, "go on": go_on, "skip": skip, "fill": fill}[row["kind"]](row, world)


def main(folder):
    for row in json.loads((folder / "rows.json").read_text()):
        try:
            result = run(row)
        except Exception:
            if WORLD.rank == 0:
                (folder / f"{row['name']}.error").write_text(traceback.format_exc())
            if not row["fault"]:
                raise
        else:
            if WORLD.rank == 0:
                torch.save(result, folder / f"{row['name']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    WORLD = join_world("cpu", ParallelConfig(runtime="deepspeed"))
    main(Path(sys.argv[1]))
    leave_world(WORLD)
