"""Train a model, or a chain of them: ``torchrun engine/train.py [CONFIG.toml] [--continue] [--dry-run] [--stages.sft.steps 100 ...]``.

This file is the recipe. Each line of it is one file of the engine.
"""

import faulthandler
import sys
import time

from smalt.engine.chain import agree_on_chain
from smalt.engine.errors import BadRecord, UserError, tell
from smalt.engine.launch import Launch, agree_on_launch, lay_out_run, watch
from smalt.engine.preemption import Preemption
from smalt.engine.trainer import Run, dry_run
from smalt.parallel import Watchdog, World, leave_world, meet


def train(launch: Launch, world: World, watchdog: Watchdog, preemption: Preemption) -> bool:
    """Whether the run came to its end: it can be asked to stop before."""
    with Run(launch, world, watchdog, preemption) as run:
        for stage in run.stages():
            started = time.perf_counter()
            for batch in stage.batches():
                result = stage.train_step(batch, preemption.asked)
                if run.after_step(stage, batch, result, seconds=time.perf_counter() - started):
                    run.stop()
                    return False
                started = time.perf_counter()
        run.finish()
    return True


def run(arguments: list[str], world: World, preemption: Preemption) -> bool:
    """One run of processes that have met. Returns whether it came to its end."""
    launch = agree_on_launch(arguments, world)
    world, ended = lay_out_run(launch.config, world), True
    if launch.dry_run:
        plan = dry_run(launch, world)
        if world.is_main:
            print(plan)
    else:
        preemption.begin(launch.config.checkpoint.grace_seconds)
        with watch(world, launch.folder) as watchdog:
            ended = train(launch, world, watchdog, preemption)
    leave_world(world)
    return ended


def main(arguments: list[str]) -> int:
    world = None
    try:
        with Preemption() as preemption:
            world = meet()
            with agree_on_chain(arguments, world) as chain:
                for link, joined in chain.links_left():
                    if not run(link, joined, preemption):
                        chain.stop()
                        break
    except (UserError, BadRecord) as error:
        tell(error, world)
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a process that dies in native code says in which line each thread was
    sys.exit(main(sys.argv[1:]))
