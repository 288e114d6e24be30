"""The command line of ``engine/train.py``: a config, and overrides of any of its values by their dotted names."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, cast, get_args

import tyro
from pydantic import BaseModel
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from smalt.model import PRESETS
from smalt.parallel import Watchdog, World, lay_out

from .checkpoints import Checkpoint, check_architecture, check_optimizer, holds_checkpoints, latest_checkpoint
from .config import RunConfig, flat, load_config, parse_config
from .errors import UserError, warn
from .run_folder import CHAIN, CHECKPOINTS, CONFIG, STALLS, latest_run, lock_folder, new_run, read_config, run_of_this_torchrun
from .sections import ColumnsConfig, TaskConfig

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits.toml"
USAGE = """\
Train a model: torchrun [--nproc-per-node N] engine/train.py [CONFIG.toml] [OPTIONS] [--DOTTED.NAME VALUE ...]

  CONFIG.toml         the run, or a chain of runs; configs/digits.toml when not given
  --folder DIR        folder of the run; runs/NAME-DATE-TIME when not given
  --resume            go on from the newest checkpoint of --folder DIR, or of the newest run of that name, with the config it has
  --continue          go on where the run of --folder (else of torchrun's --rdzv-id) stopped, or begin it: for a scheduler that queues
                      the same command again; workers that torchrun restarts go on where their own run stopped without it
  --dry-run           check config, layout and files, build the first stage, say what would run, and stop before the first step
"""


@dataclass(frozen=True)
class Launch:
    """What the command line asks for. folder: the run's; checkpoint: where a run that is to be resumed goes on from, None for a new
    run and until :func:`agree_on_launch` has found it; resume: the folder may be that of a run already; may_begin: it held no
    checkpoint when it was looked at, and need not; lock: of the main process on a folder that was there before."""

    config: RunConfig
    folder: Path
    checkpoint: Checkpoint | None
    dry_run: bool
    resume: bool
    may_begin: bool = False
    lock: IO[str] | None = None


def agree_on_launch(arguments: Sequence[str], world: World) -> Launch:
    """What the command line asks for, read by the main process alone, so that no two processes see different files; every rank calls
    it. Raises UserError on all for a wrong config, or where there is no checkpoint to go on from, or one of another architecture."""
    lock: IO[str] | None = None

    def read() -> Launch:
        nonlocal lock
        launch = parse_launch(arguments, world.restarted)
        if launch.resume and launch.folder.exists() and not launch.dry_run:
            # Workers that outlive their torchrun take as long as that to see it, save and end.
            lock = lock_folder(launch.folder, launch.config.checkpoint.grace_seconds + 30)
            if launch.may_begin and holds_checkpoints(launch.folder / CHECKPOINTS):
                # It has begun meanwhile: its own config counts.
                launch = parse_launch(arguments, world.restarted)
        return replace(launch, checkpoint=_checkpoint(launch))

    return replace(world.agree(read, "launch"), lock=lock)


@dataclass(frozen=True)
class Command:
    """A command line. given: it names the config, which is the default one otherwise; options: of values of the config."""

    path: Path
    given: bool
    options: list[str]
    folder: Path | None
    resume: bool
    go_on: bool
    dry_run: bool

    @property
    def wants_help(self) -> bool:
        return bool({"-h", "--help"} & set(self.options))


def read_command(arguments: Sequence[str]) -> Command:
    """Raises UserError where the config is not the first argument."""
    parser = argparse.ArgumentParser(prog="engine/train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--folder", type=Path)
    go_on = parser.add_mutually_exclusive_group()
    go_on.add_argument("--resume", action="store_true")
    go_on.add_argument("--continue", action="store_true", dest="go_on")
    parser.add_argument("--dry-run", action="store_true")
    own, rest = parser.parse_known_args(list(arguments))
    path, given = DEFAULT_CONFIG, bool(rest) and not rest[0].startswith("-")
    if given:
        path, rest = Path(rest[0]), rest[1:]
    elif late := [word for word in rest if word.endswith(".toml") and not word.startswith("-")]:
        raise UserError(f"{late[0]} comes after an option; the config is the first argument: engine/train.py {late[0]} --...")
    return Command(path, given, rest, own.folder, own.resume, own.go_on, own.dry_run)


def parse_launch(arguments: Sequence[str], restarted: bool = False) -> Launch:
    """Read the command line. restarted: torchrun has started workers of this run before. Raises UserError for a wrong config; exits
    with tyro's message for an option that is none, or a value of the wrong type."""
    command = read_command(arguments)
    path, options = command.path, command.options
    if command.wants_help:
        sys.stdout.write(f"{USAGE}\nEvery value of the config, with the one it has in {path}:\n\n")
        sys.stdout.flush()
    config = overridden(load_config(path), options)
    folder = folder_to_go_on_in(config.name, command, restarted, CONFIG)
    began = folder is not None and (command.resume or holds_checkpoints(folder / CHECKPOINTS))
    if folder is not None and began:
        asked, config = config, overridden(read_config(folder), options)
        if command.given:
            _warn_of_differences(asked, config, path, folder)
    return Launch(config, folder or new_run(config.name, command.folder), None, command.dry_run, folder is not None, not began)


def folder_to_go_on_in(name: str, command: Command, restarted: bool, holds: str) -> Path | None:
    """None to begin in a new one. Workers that were restarted take only what earlier ones of them began. holds: the file that a folder
    to resume has. Raises UserError for a folder that is a run's where a chain's is meant, and the other way round."""
    ours = run_of_this_torchrun(name, command.folder, restarted) if restarted or command.go_on else None
    folder = (command.folder if command.go_on else None) or ours
    if command.resume and folder is None:
        folder = latest_run(name, command.folder, holds)
    kind, other, of_other = ("run", CHAIN, "chain of runs") if holds == CONFIG else ("chain of runs", CONFIG, "run")
    if folder is not None and (folder / other).exists():
        raise UserError(f"{folder} holds a {of_other}, and {command.path} is a {kind}: give the config that it was begun with")
    return folder


def _warn_of_differences(asked: RunConfig, used: RunConfig, path: Path, folder: Path) -> None:
    """The run's own config counts; what the file would have now is not to be passed over in silence."""
    there, here = flat(asked.model_dump()), flat(used.model_dump())
    different = [f"{key}: {here.get(key)} ({there.get(key)} in the file)" for key in here | there if here.get(key) != there.get(key)]
    if different:
        more = f", and {len(different) - 5} more" if len(different) > 5 else ""
        warn(
            f"{path} differs from the config of the run, {folder / CONFIG}, which is used: {', '.join(different[:5])}{more}; give an "
            "option to change a value"
        )


def lay_out_run(config: RunConfig, world: World) -> World:
    """The world with the layout of the run. Raises UserError when the number of processes is not that of the layout."""
    try:
        return lay_out(world, config.device, config.parallel)
    except ValueError as error:
        raise UserError(str(error)) from error


def watch(world: World, folder: Path) -> Watchdog:
    """A watchdog over the run, that knows the axes by name."""
    limit = timedelta(seconds=world.parallel.watchdog_seconds)
    watchdog = Watchdog(world.rank, world.size, limit, world.store, folder / STALLS)
    for axis, group in world.groups:
        watchdog.name_group(group, axis)
    return watchdog


def _checkpoint(launch: Launch) -> Checkpoint | None:
    if not launch.resume or (launch.may_begin and not holds_checkpoints(launch.folder / CHECKPOINTS)):
        return None
    checkpoint = latest_checkpoint(launch.folder / CHECKPOINTS, set_aside=not launch.dry_run)
    check_architecture(checkpoint, launch.config.model)
    check_optimizer(checkpoint, launch.config.optimizer.kind)
    return checkpoint


def overridden(config: RunConfig, options: list[str]) -> RunConfig:
    """The config as options of the command line change it. Raises UserError, or exits, as :func:`parse_launch` does."""
    if not options:
        return config
    changed = _override(config, options)
    if changed["preset"] != config.preset and changed["preset"] in PRESETS:
        # The preset that the command line names stands in for the model of the file; other options still change it.
        changed = _override(config.model_copy(update={"model": PRESETS[changed["preset"]]}), options)
    return parse_config(changed, "command line")


def _override(config: RunConfig, options: list[str]) -> dict[str, Any]:
    """The values of the config with those of the options, not checked yet."""
    known = _with_new_entries(config, options)
    values: Any = tyro.cli(RunConfig, default=known, args=options, prog="engine/train.py", registry=_VALUES)
    return values


def _with_new_entries(config: RunConfig, options: list[str]) -> RunConfig:
    """The config with an entry for each option that names a new source, task, weight or part, and with the optional sections that
    options name: tyro knows what the default has."""
    config = config.model_copy(deep=True)
    for name, stage in config.stages.items():
        _begin_sections(stage, f"--stages.{_hyphened(name)}", options)
    _begin_sections(config.model.language, "--model.language", options)
    tables: dict[str, tuple[dict[str, Any], str | float]] = {
        "data.sources": (config.data.sources, ""),
        "data.validation": (config.data.validation, ""),
        "evaluation.sources": (config.evaluation.sources, ""),
        "init.prune.mixture": (config.init.prune.mixture, 0.0),
    }
    for name, stage in config.stages.items():
        tables[f"stages.{_hyphened(name)}.mixture"] = stage.mixture, 0.0
        tables[f"stages.{_hyphened(name)}.epochs"] = stage.epochs, 0.0
        tables[f"stages.{_hyphened(name)}.trainable"] = stage.trainable, 0.0
    columns = config.data.columns
    for option in options:
        key, _, entry = option.partition("=")[0].removeprefix("--").rpartition(".")
        section, _, source = key.rpartition(".")
        if section == "data.columns" and _hyphened(source) not in map(_hyphened, columns):
            columns[source] = ColumnsConfig()
        if option.startswith("--") and section == "evaluation.tasks":
            _add_task(config.evaluation.tasks, source)
        entries, value = tables.get(_hyphened(key), ({}, 0.0))
        if option.startswith("--") and entry and _hyphened(entry) not in map(_hyphened, entries):
            entries[entry] = value
    for name, stage in config.stages.items():
        _set_weights(stage.mixture, f"--stages.{_hyphened(name)}.mixture", options)
    return config


def _set_weights(mixture: dict[str, float | tuple[float, float]], prefix: str, options: list[str]) -> None:
    """Give each weight of a mixture that an option names the kind that it has there, one number or two: tyro goes by the default."""
    for source in mixture:
        option = f"{prefix}.{_hyphened(source)}"
        for at, word in enumerate(options):
            if _hyphened(word).partition("=")[0] == option:
                given = list(itertools.takewhile(lambda following: not following.startswith("--"), options[at + 1 :]))
                mixture[source] = (0.0, 0.0) if len(given) == 2 and "=" not in word else 0.0


def _begin_sections(section: BaseModel, prefix: str, options: list[str]) -> None:
    """Begin each optional section of a section of which an option names a value; tyro asks for the values that it needs."""
    for name, field in type(section).model_fields.items():
        kind = _optional_section(field.annotation)
        named = any(_hyphened(option).startswith(f"{prefix}.{_hyphened(name)}.") for option in options)
        if kind is not None and getattr(section, name) is None and named:
            needed = {key: tyro.MISSING for key, value in kind.model_fields.items() if value.is_required()}
            section.__dict__[name] = kind.model_construct(**needed)  # the model's sections are frozen, but this one is a copy


def _optional_section(annotation: Any) -> type[BaseModel] | None:
    """The section of ``Section | None``."""
    sections = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sections[0] if type(None) in get_args(annotation) and sections else None


def _add_task(tasks: dict[str, TaskConfig], name: str) -> None:
    if _hyphened(name) not in map(_hyphened, tasks):
        tasks[name] = TaskConfig.model_construct(path="")


def _hyphened(name: str) -> str:
    """As tyro spells an option; it takes either."""
    return name.replace("_", "-")


_VALUES = ConstructorRegistry()


@_VALUES.struct_rule
def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A section as a plain dict: :func:`parse_config` checks what comes of the command line, and explains it as it does a file."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None

    def values(**given: Any) -> dict[str, Any]:
        return given

    values.__doc__ = info.type.__doc__  # what --help says of the section
    fields = []
    for name, field in info.type.model_fields.items():
        default, kind = getattr(info.default, name), field.annotation
        if _optional_section(kind) is not None:
            kind = type(default)
        fields.append(StructFieldSpec(name, cast("Any", kind), default, helptext=field.description))
    return StructConstructorSpec(values, tuple(fields))
