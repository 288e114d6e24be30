"""Train a model: ``torchrun engine/train.py [CONFIG.toml] [--continue] [--dry-run] [--stages.sft.steps 100 ...]``.

This file is the recipe. Each line of it is one file of the engine.
"""

import faulthandler
import sys
import time

from smalt.engine.errors import BadRecord, UserError, tell
from smalt.engine.launch import Launch, agree_on_launch, lay_out_run, watch
from smalt.engine.preemption import Preemption
from smalt.engine.trainer import Run, dry_run
from smalt.parallel import Watchdog, World, leave_world, meet


def train(launch: Launch, world: World, watchdog: Watchdog, preemption: Preemption) -> None:
    with Run(launch, world, watchdog, preemption) as run:
        for stage in run.stages():
            started = time.perf_counter()
            for batch in stage.batches():
                result = stage.train_step(batch, preemption.asked)
                if run.after_step(stage, batch, result, seconds=time.perf_counter() - started):
                    return run.stop()
                started = time.perf_counter()
        run.finish()


def main(arguments: list[str]) -> int:
    world = None
    try:
        with Preemption() as preemption:
            world = meet()
            launch = agree_on_launch(arguments, world)
            world = lay_out_run(launch.config, world)
            if launch.dry_run:
                plan = dry_run(launch, world)
                if world.is_main:
                    print(plan)
            else:
                preemption.begin(launch.config.checkpoint.grace_seconds)
                with watch(world, launch.folder) as watchdog:
                    train(launch, world, watchdog, preemption)
            leave_world(world)
    except (UserError, BadRecord) as error:
        tell(error, world)
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a process that dies in native code says in which line each thread was
    sys.exit(main(sys.argv[1:]))
