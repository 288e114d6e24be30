"""The folder of a run: resolved config, metrics, skipped records, checkpoints, evaluation."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from .config import RunConfig, parse_config
from .data.stream import SkippedSample
from .errors import UserError
from .spikes import SPIKES

CONFIG, METRICS, SKIPPED, EVALUATION, PLOT, CHECKPOINTS, TRACES, STALLS = (
    "config.json", "metrics.jsonl", "skipped.jsonl", "evaluation.json", "evaluation.png", "checkpoints", "traces",
    "stalls.txt",
)  # fmt: skip


def new_run(config: RunConfig, folder: Path | None) -> Path:
    """The folder of a new run, not yet made: the one given, or ``runs/NAME-DATE-TIME``. Raises UserError if it holds a run."""
    path = folder or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (path / CONFIG).exists():
        raise UserError(f"{path} holds a run already; continue it with --resume, or choose another folder with --folder")
    return path


def latest_run(name: str, folder: Path | None) -> Path:
    """The folder to resume: the one given, or the newest of this name. Raises UserError when there is none."""
    if folder is not None:
        if not (folder / CONFIG).exists():
            raise UserError(f"{folder} holds no run to resume: {CONFIG} is missing")
        return folder
    found = sorted((p for p in Path("runs").glob(f"{name}-*") if (p / CONFIG).exists()), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run of {name!r} under runs/ to resume")
    return found[-1]


def read_config(folder: Path) -> RunConfig:
    """The resolved config that a run was started with."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} is not the folder of a run: {CONFIG} is missing")
    return parse_config(json.loads(path.read_text()), str(path))


class RunFolder:
    """Writes what the main process has to say; on other ranks every method does nothing.

    resume_step: the step that the run goes on from; what a killed run wrote after it is dropped, for it will be written again.
    """

    def __init__(self, path: Path, config: RunConfig, is_main: bool, resume_step: int | None):
        self.path, self.config, self.is_main = path, config, is_main
        if not is_main:
            return
        path.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            (path / CONFIG).write_text(config.model_dump_json(indent=1))
        else:
            for name in (METRICS, SKIPPED, SPIKES):
                _drop_after(path / name, resume_step)
        self.metrics = (path / METRICS).open("a")
        self.skipped = (path / SKIPPED).open("a")
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=resume_step and resume_step + 1)
        self.wandb = self._wandb() if config.logging.wandb_project else None

    def _wandb(self) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError("logging.wandb_project is set but wandb is not installed: pip install 'smalt[wandb]'") from error
        name = self.path.name
        return wandb.init(
            project=self.config.logging.wandb_project, id=name, name=name, dir=str(self.path), resume="allow",
            config=self.config.model_dump(mode="json"),
        )  # fmt: skip

    def log(self, step: int, values: dict[str, Any], charts: bool) -> None:
        """One line of metrics; numbers go to TensorBoard and Weights & Biases too where ``charts`` is true."""
        if not self.is_main:
            return
        # JSON knows no NaN: a figure that is not finite is null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.metrics.flush()
        if charts:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)
            if self.wandb is not None:
                self.wandb.log(numbers, step=step)

    def skip(self, step: int, samples: list[SkippedSample]) -> None:
        """Name the records that were skipped."""
        if not self.is_main or not samples:
            return
        for s in samples:
            line = {"step": step, "source": s.source, "record": s.record, "cause": s.cause, "detail": s.detail}
            self.skipped.write(json.dumps(line) + "\n")
        self.skipped.flush()

    def write_json(self, name: str, value: Any) -> None:
        if self.is_main:
            (self.path / name).write_text(json.dumps(value, indent=1) + "\n")

    def close(self) -> None:
        if not self.is_main:
            return
        self.metrics.close()
        self.skipped.close()
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of a run."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A killed run can leave half a line at the end.
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    path.write_text("".join(kept))
