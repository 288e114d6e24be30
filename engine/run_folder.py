"""The folder of a run: resolved config, metrics, skipped records, checkpoints, evaluation. One process at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from .config import RunConfig, parse_config
from .data.reading import SkippedSample
from .errors import UserError, warn
from .evaluation import Answer, write_answers
from .spikes import SPIKES
from .tensor_files import sync_folder, write_file

CONFIG, METRICS, SKIPPED, EVALUATION, ANSWERS, PLOT, CHECKPOINTS, TRACES, STALLS, RESAMPLING, WANDB = (
    "config.json", "metrics.jsonl", "skipped.jsonl", "evaluation.json", "answers", "evaluation.png", "checkpoints", "traces",
    "stalls.txt", "resampling.jsonl", "wandb_id",
)  # fmt: skip
# Of the folder of a chain, which has those of its runs inside.
CHAIN = "chain.json"
# What tells whose the folder is: the id of the torchrun that writes there, and the file that its main process locks.
TORCHRUN, LOCK = "torchrun_id", "lock"


def new_run(name: str, folder: Path | None) -> Path:
    """The folder of a new run or chain, not yet made: the one given, or ``runs/NAME-DATE-TIME``. Raises UserError if it holds one."""
    path = folder or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    refuse_a_run(path)
    return path


def refuse_a_run(path: Path) -> None:
    """Raise UserError where a folder is that of a run or of a chain already."""
    if (path / CONFIG).exists() or (path / CHAIN).exists():
        what = "run" if (path / CONFIG).exists() else "chain of runs"
        raise UserError(
            f"{path} holds a {what} already; continue it with --resume or --continue, or choose another folder with --folder"
        )


def latest_run(name: str, folder: Path | None, holds: str) -> Path:
    """The folder to resume: the one given, or the newest of this name. holds: the file that makes it one. Raises UserError when there
    is none."""
    if folder is not None:
        if not (folder / holds).exists():
            raise UserError(f"{folder} holds no run to resume: {holds} is missing")
        return folder
    found = [path for path in _runs_named(name) if (path / holds).exists()]
    if not found:
        raise UserError(f"there is no run of {name!r} under runs/ to resume")
    return found[-1]


def _runs_named(name: str) -> list[Path]:
    """The folders that :func:`new_run` has named, oldest first."""
    dated = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
    return sorted(path for path in Path("runs").glob("*") if dated.fullmatch(path.name))


def run_of_this_torchrun(name: str, folder: Path | None, restarted: bool) -> Path | None:
    """The folder where earlier workers of this torchrun began a run of that name: the one given, or the newest under runs/ that they
    have marked; None if they began none.

    restarted: this torchrun has restarted its workers. An id that the user gave to torchrun (--rdzv-id) holds over launches too.
    """
    wanted = _torchrun_id()
    if wanted is None or not (restarted or _has_own_id()):
        return None
    folders = [folder] if folder is not None else _runs_named(name)
    return next((path for path in reversed(folders) if _mark(path) == wanted), None)


def mark_folder(folder: Path) -> None:
    """Have workers that this torchrun restarts find a folder."""
    if run_id := _torchrun_id():
        (folder / TORCHRUN).write_text(run_id)


def _mark(folder: Path) -> str | None:
    try:
        return (folder / TORCHRUN).read_text()
    except OSError:  # there is none, or it is someone else's
        return None


def _torchrun_id() -> str | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Torchrun's name for what was given none: of all of those that are under way, the address of its store is its own.
    return run_id if run_id is None or _has_own_id() else f"{run_id} {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _has_own_id() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID") not in (None, "none")


def lock_folder(folder: Path, seconds: float) -> IO[str]:
    """Take the folder, an existing one, for this process, until the file that is returned is closed or the process ends, however.

    Workers can outlive a killed torchrun for a while: waits ``seconds`` for whoever has the folder. Raises UserError if it is not
    freed. Where the file system knows no locks, says so and goes on.
    """
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise _not_writable(folder, error) from error
    deadline, waiting = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                warn(f"{folder} cannot be locked ({error}); see to it yourself that no two runs write there")
                return file
        if time.monotonic() > deadline:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another run (host and process {file.read().strip()}); end that one first, or, "
                f"if its machine is gone and the file system does not know, remove {folder / LOCK}"
            )
        if not waiting:
            warn(f"{folder} is in use by another process; waiting for it to end, {seconds:g} s at most")
        waiting = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"{os.uname().nodename} {os.getpid()}\n")
    file.flush()
    return file


def make_folder(folder: Path, inside: str = "") -> None:
    """Make the folder of a run, and one inside. Raises UserError where that cannot be done."""
    try:
        (folder / inside).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written to: {error.strerror}; choose another folder with --folder")


def read_config(folder: Path) -> RunConfig:
    """The resolved config that a run was started with."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} is not the folder of a run: {CONFIG} is missing")
    try:
        raw = dict(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {error}; put a good one in its place, such as the same config and options write when they begin a "
            "run in another folder"
        ) from error
    return parse_config(raw, str(path))


class RunFolder:
    """Writes what the main process has to say; on other ranks every method does nothing.

    Made, it is this process's, and restarted workers find it; :meth:`begin` makes the config that of the run. lock: of a folder that
    was there before the command line was read. Raises UserError where the folder cannot be made, is in use, or, new when the command
    line was read, has become that of a run.
    """

    def __init__(self, path: Path, config: RunConfig, is_main: bool, lock: IO[str] | None = None):
        self.path, self.config, self.is_main = path, config, is_main
        self._opened = ExitStack()
        if not is_main:
            return
        make_folder(path, CHECKPOINTS)
        self._opened.enter_context(lock or lock_folder(path, config.checkpoint.grace_seconds))
        if lock is None:
            refuse_a_run(path)
        mark_folder(path)

    def begin(self, resume_step: int | None) -> None:
        """Call when nothing of the config is left that could be refused: it is that of the run from here on.

        resume_step: the step that the run goes on from, None for one that begins; what a killed run wrote after it is dropped, for it
        will be written again. Raises UserError where Weights & Biases is asked for and not installed.
        """
        if not self.is_main:
            return
        path = self.path
        self.wandb = self._wandb() if self.config.logging.wandb_project else None
        if self.wandb is not None:
            self._opened.callback(self.wandb.finish)
        write_file(path / f"{CONFIG}.partial", [self.config.model_dump_json(indent=1).encode()])
        (path / f"{CONFIG}.partial").rename(path / CONFIG)
        sync_folder(path)
        for name in (METRICS, SKIPPED, SPIKES, RESAMPLING):
            _drop_after(path / name, resume_step or 0)
        for answers in (path / ANSWERS).glob("step-*.jsonl"):
            if int(answers.stem.removeprefix("step-")) > (resume_step or 0):
                answers.unlink()
        if (resume_step or 0) < self.config.total_steps:  # it was that of an earlier end
            (path / EVALUATION).unlink(missing_ok=True)
            (path / PLOT).unlink(missing_ok=True)
        self.metrics = self._opened.enter_context((path / METRICS).open("a"))
        self.skipped = self._opened.enter_context((path / SKIPPED).open("a"))
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = self._opened.enter_context(SummaryWriter(str(path / "tensorboard"), purge_step=(resume_step or 0) + 1))

    def _wandb(self) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError("logging.wandb_project is set but wandb is not installed: pip install 'smalt[wandb]'") from error
        # Of this folder alone: runs of one name, as links of two chains, are two. A run that goes on is the one that it was.
        file = self.path / WANDB
        if not file.exists():
            write_file(file, [uuid.uuid4().hex.encode()])
        name = f"{self.path.parent.name}/{self.path.name}" if (self.path.parent / CHAIN).exists() else self.path.name
        return wandb.init(
            project=self.config.logging.wandb_project, id=file.read_text(), name=name, dir=str(self.path), resume="allow",
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

    def resampled(self, step: int, stage: str, found: dict[str, float]) -> None:
        """The weights that were posted after a step, named as metrics."""
        if self.is_main:
            with (self.path / RESAMPLING).open("a") as file:
                file.write(json.dumps({"step": step, "stage": stage, **found}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Put the lines so far on disk: a checkpoint is not to outlive those of the steps before it."""
        if self.is_main:
            for file in (self.metrics, self.skipped):
                os.fsync(file.fileno())

    def write_json(self, name: str, value: Any) -> None:
        if self.is_main:
            (self.path / name).write_text(json.dumps(value, indent=1) + "\n")

    def write_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Those of the evaluation after a step, in place of what an evaluation after it gave before."""
        if self.is_main and answers:
            write_answers(answers_file(self.path, step), step, answers)

    def close(self) -> None:
        """Free the folder."""
        self._opened.close()


def answers_file(folder: Path, step: int) -> Path:
    """The answers of the evaluation after a step."""
    return folder / ANSWERS / f"step-{step:08d}.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of a run, without damaged ones, which stderr names."""
    return [line for _, line in _whole_lines(folder / METRICS)]


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = 0
    for end, line in _whole_lines(path):
        if line["step"] > step:
            break
        kept = end
    # Cut where it is: a kill while the file is written anew would lose the lines that are kept.
    os.truncate(path, kept)


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What each line of a file of JSON lines holds, with the bytes up to its end. A damaged one is named on stderr and passed over;
    half a line at the end is what a killed run can leave, and no damage."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
                values["step"] + 0
            except (ValueError, TypeError, KeyError):
                warn(f"{path}, line {number} is damaged; it is passed over, in the plots too")
            else:
                yield end, values
