"""Runs: configuration, data, the training loop, checkpoints, evaluation."""

import os

# Here, before torch is imported, which takes seconds in which torchrun can die: engine/preemption.py watches for that.
LAUNCHER = os.getppid()
