"""A chain: runs one after another in the same processes, each of which begins with the last checkpoint of the one before it.

    name = "curriculum"
    chain = ["teacher.toml", "prune.toml", "distill.toml"]

Each link is a run like any other, in a folder of its name inside that of the chain. Its config says what it begins with, ``init.run =
"runs/NAME"``, where NAME is the link before it: for paths of links, teachers too, ``runs/`` is the folder of the chain. ``chain.json``
in that folder says which links have ended; a chain that goes on passes them over, and goes on in the one that was cut short.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from smalt.model import ModelConfig
from smalt.parallel import World, rejoin

from .checkpoints import holds_checkpoints
from .config import ChainConfig, RunConfig, load_chain, load_config
from .errors import UserError
from .initial import check_fit, check_teacher
from .launch import USAGE, Command, folder_to_go_on_in, overridden, read_command
from .lineage import INIT, teacher_key
from .run_folder import CHAIN, CHECKPOINTS, lock_folder, make_folder, mark_folder, new_run, read_config, refuse_a_run
from .tensor_files import sync_folder, write_file
from .trainer import check_layout, open_data

RUNS = Path("runs")


@dataclass(frozen=True)
class Link:
    """name: of the run, and of its folder; path: of its config; config: with the options that are meant for it; options: those, and
    where the runs that it names are."""

    name: str
    path: Path
    config: RunConfig
    options: list[str]


@dataclass(frozen=True)
class _Plan:
    """What all processes agree on. left: name and arguments of each run; folder: of the chain, None for a run alone; ended: links, by
    name, that had ended before; compiles: a run uses torch.compile; again: the arguments that go on with it; said: for people, before
    the first run."""

    left: list[tuple[str, list[str]]]
    folder: Path | None = None
    names: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    compiles: bool = False
    again: str = ""
    dry_run: bool = False
    said: str | None = None


class Chain:
    """The links of a chain that are left, or a run alone, as one link in a folder of its own. A context manager: it has the folder."""

    def __init__(self, plan: _Plan, world: World, lock: IO[str] | None):
        self.plan, self.world, self.lock = plan, world, lock

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.lock is not None:
            self.lock.close()

    def links_left(self) -> Iterator[tuple[list[str], World]]:
        """The arguments of the launch of each link, and the processes, which have no layout yet. Ask for the next when one has ended
        and its processes have left their layout."""
        self._say(self.plan.said)
        ended = list(self.plan.ended)
        for number, (name, arguments) in enumerate(self.plan.left):
            if number:
                # Cycles of references, and compiled code, which also counts how often it was compiled, would keep the run before.
                gc.collect()
                if self.plan.compiles:
                    torch.compiler.reset()
            if self.plan.folder is not None and not self.plan.dry_run:
                self._say(f"link {len(ended) + 1} of {len(self.plan.names)}: {name}, in {self.plan.folder / name}")
            yield arguments, rejoin(self.world, f"link {number}") if number else self.world
            ended.append(name)
            if self.plan.folder is not None and self.world.is_main and not self.plan.dry_run:
                _write(self.plan.folder, self.plan.names, ended)

    def stop(self) -> None:
        """Say how to go on with a chain whose link was asked to stop."""
        if self.plan.folder is not None:
            self._say(f"the chain stops here; go on with {self.plan.again}")

    def _say(self, text: str | None) -> None:
        if self.world.is_main and text:
            print(text, flush=True)


def agree_on_chain(arguments: Sequence[str], world: World) -> Chain:
    """What the command line asks for, read by the main process alone; every rank calls it. Raises UserError on all for a chain of
    which a link is missing, does not begin with the one before it, or cannot: found here, not when its turn comes."""
    lock: IO[str] | None = None

    def read() -> _Plan:
        nonlocal lock
        command = read_command(arguments)
        chain = load_chain(command.path)
        if chain is None:
            return _Plan([("", list(arguments))])
        if command.wants_help:
            _help(command, chain)
        folder = folder_to_go_on_in(chain.name, command, world.restarted, CHAIN)
        begins, folder = folder is None, folder or new_run(chain.name, command.folder)
        links = read_links(command, chain, folder)
        if begins:
            for link in links:
                refuse_a_run(folder / link.name)
        if not command.dry_run:
            make_folder(folder)
            lock = lock_folder(folder, max(link.config.checkpoint.grace_seconds for link in links) + 30)
            if begins:
                refuse_a_run(folder)  # another launch may have been quicker
            mark_folder(folder)
        names = tuple(link.name for link in links)
        ended = _read_ended(folder, names)
        check_links(links, len(ended), world.size)
        if not command.dry_run:
            _write(folder, names, ended)
        left = [(link.name, _launch_of(link, folder, command.dry_run)) for link in links[len(ended) :]]
        if not command.dry_run:
            compiles = any(link.config.parallel.compile for link in links)
            again = shlex.join([str(command.path), "--continue", "--folder", str(folder), *command.options])
            return _Plan(left, folder, names, tuple(ended), compiles, again)
        for link in links[len(ended) :]:
            open_data(link.config)
        # The next one alone has something to begin with.
        return _Plan(left[:1], folder, names, tuple(ended), dry_run=True, said=_describe(folder, links, ended))

    return Chain(world.agree(read, "chain"), world, lock)


def read_links(command: Command, chain: ChainConfig, folder: Path) -> list[Link]:
    """The links in order. Raises UserError for one that is missing, is there twice, or does not begin with the one before it."""
    paths = [command.path.parent / path for path in chain.chain]
    configs = [_load(path, command.path) for path in paths]
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config {command.path}: chain has two runs of the name {name!r}; each has its folder by its name")
        if name in RunConfig.model_fields:
            raise UserError(f"config {command.path}: no run of a chain can have the name {name!r}: --{name} is an option of all runs")
    options = split_options(names, command.options)
    links: list[Link] = []
    for path, name, config in zip(paths, names, configs, strict=True):
        config = overridden(config, options[name])
        moved = _runs_of_chain(config, [link.name for link in links], names, folder, f"config {command.path}: link {path.name}")
        own = [*options[name], *moved]
        if holds_checkpoints(folder / name / CHECKPOINTS):  # what has begun keeps its config, whatever the file says now
            config = overridden(read_config(folder / name), own)
        links.append(Link(name, path, config, own))
    return links


def check_links(links: Sequence[Link], num_ended: int, size: int) -> None:
    """Raise UserError where a link that has not ended cannot be laid out over so many processes, or where its sizes, or its teacher's,
    do not fit those of the runs that it names."""
    if sum(link.config.parallel.async_tp for link in links) > 1:
        raise UserError("parallel.async_tp in several links of a chain: torch keeps what it sets up for the first one; set it in one")
    models = {link.name: link.config.model_of(list(link.config.stages)[-1]) for link in links}
    for number, link in enumerate(links):
        if number < num_ended:
            continue
        try:
            check_layout(link.config, link.config.parallel.sized(size))
            if number:
                check_fit(link.config, models[links[number - 1].name], f"link {links[number - 1].name}")
            for name, stage in link.config.stages.items():
                if stage.teacher is not None and (teacher := _name_of_run(stage.teacher)) in models:
                    check_teacher(link.config, name, models[teacher], f"link {teacher}")
                    _check_layout_of_teacher(link.config, name, models[teacher], size)
        except (UserError, ValueError) as error:
            raise UserError(f"link {link.name}, {link.path}: {error}") from error


def _check_layout_of_teacher(config: RunConfig, name: str, teacher: ModelConfig, size: int) -> None:
    try:
        config.parallel.sized(size).check_model(teacher, config.stages[name].sequence_length)
    except ValueError as error:
        raise UserError(f"{teacher_key(name)}: the teacher does not fit the layout: {error}") from error


def split_options(names: Sequence[str], options: Sequence[str]) -> dict[str, list[str]]:
    """The options of each link: ``--NAME.KEY`` is meant for the link of that name, every other for all."""
    found: dict[str, list[str]] = {name: [] for name in names}
    receivers = list(names)
    for word in options:
        if word.startswith("--"):
            first, dot, key = word.removeprefix("--").partition(".")
            own = [name for name in names if dot and name.replace("_", "-") == first.replace("_", "-")]
            receivers, word = own or list(names), f"--{key}" if own else word
        for name in receivers:
            found[name].append(word)
    return found


def _load(path: Path, chain: Path) -> RunConfig:
    try:
        return load_config(path)
    except UserError as error:
        raise UserError(f"config {chain}: chain: {error}") from error


def _runs_of_chain(config: RunConfig, before: list[str], names: list[str], folder: Path, where: str) -> list[str]:
    """Options by which a config finds the runs that it names in the folder of the chain. before: the links before it."""
    run = config.init.run
    if before and (run is None or _name_of_run(run) != before[-1]):
        raise UserError(
            f"{where} has {INIT} = {run}, and the link before it is {before[-1]}: set it to {RUNS / before[-1]}, or change the order"
        )
    named = {INIT: run} | {teacher_key(name): stage.teacher for name, stage in config.stages.items()}
    options = []
    for key, given in named.items():
        if given is None or (name := _name_of_run(given)) not in names:
            continue
        if name not in before:
            raise UserError(f"{where} has {key} = {given}, a link that does not come before it: change the order")
        options += [f"--{key}", str(folder / given.relative_to(RUNS))]
    return options


def _name_of_run(path: Path) -> str | None:
    """NAME of runs/NAME, or of a path inside."""
    parts = path.parts
    return parts[1] if len(parts) > 1 and parts[0] == RUNS.name else None


def _launch_of(link: Link, folder: Path, dry_run: bool) -> list[str]:
    dry = ["--dry-run"] if dry_run else []
    return [str(link.path), "--folder", str(folder / link.name), "--continue", *dry, *link.options]


def _read_ended(folder: Path, names: tuple[str, ...]) -> list[str]:
    path = folder / CHAIN
    if not path.exists():
        return []
    try:
        ended = [str(name) for name in json.loads(path.read_text())["ended"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if ended != list(names[: len(ended)]):
        raise UserError(
            f"{path}: the links {', '.join(ended)} have ended, and the chain is now {', '.join(names)}: what has ended must be its "
            "beginning; begin another chain with --folder"
        )
    return ended


def _write(folder: Path, names: Sequence[str], ended: Sequence[str]) -> None:
    partial = folder / f"{CHAIN}.partial"
    try:
        write_file(partial, [json.dumps({"links": list(names), "ended": list(ended)}, indent=1).encode()])
        partial.rename(folder / CHAIN)
        sync_folder(folder)
    except OSError as error:
        raise UserError(f"{folder / CHAIN} cannot be written: {error.strerror}; make room, then --continue") from error


def _describe(folder: Path, links: Sequence[Link], ended: Sequence[str]) -> str:
    lines = [f"chain of {len(links)} runs in {folder}"]
    for link in links:
        state = "has ended" if link.name in ended else f"{link.config.total_steps:,} steps of {', '.join(link.config.stages)}"
        lines.append(f"  {link.name}: {state}")
    return "\n".join(lines)


def _help(command: Command, chain: ChainConfig) -> None:
    """Raises SystemExit."""
    listed = "\n".join(f"  {path}" for path in chain.chain)
    sys.stdout.write(
        f"{USAGE}\n{command.path} is a chain of runs:\n\n{listed}\n\nAn option --NAME.KEY is for the run of that name, --KEY for "
        "all. --help after the config of one of them lists its values.\n"
    )
    raise SystemExit(0)
