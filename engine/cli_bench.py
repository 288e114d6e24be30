"""``smalt bench`` and ``smalt kernels``: measure on this machine, look at the compiled kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

from .cli_options import at_least, check_outputs, write_json
from .errors import UserError

bench, compiled = SubcommandApp(), SubcommandApp()


@bench.command
def cpu(
    config: Path = Path("configs/digits.toml"),
    documents: int = 2000,
    batch: int | None = None,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Train the same sizes on the same records with transformers and with Smalt, alternating, and compare.

    Args:
        config: Config whose model, last stage and data are used.
        documents: Documents that both train on.
        batch: Documents of a batch of transformers; as many as a pack holds on average when not given.
        rounds: Times that all contestants take their turn.
        threads: Threads of torch.
    """
    from smalt.profiling.bench_cpu import bench_cpu, print_report

    from .config import load_config
    from .data.stream import stream_documents
    from .stage import stage_stream
    from .trainer import open_data

    at_least(1, documents=documents, batch=batch, rounds=rounds, threads=threads)
    loaded = load_config(config)
    name, stage = list(loaded.stages.items())[-1]
    opened = open_data(loaded)
    chosen = stream_documents(stage_stream(loaded, name, opened), opened.reader, documents)
    length = stage.sequence_length
    batch = batch or max(1, length * len(chosen) // sum(map(len, chosen)))
    print_report(bench_cpu(chosen, loaded.model, pack_length=length, batch=batch, rounds=rounds, threads=threads))


@bench.command(name="data")
def bench_of_data(
    tokenizer: Path = Path("data/digits/tokenizer.json"),
    workers: tuple[int, ...] = (0, 1, 2),
    length: int = 8192,
    packs: int = 2,
    steps: int = 8,
    step_seconds: tuple[float, ...] = (1.0, 4.0),
    pictures: int = 84,
    json: Path | None = None,
) -> None:
    """How fast photographs become packs of tiles, by worker processes, and how long training waits for them.

    Args:
        tokenizer: tokenizer.json with the special tokens of the chat template.
        workers: Numbers of worker processes to try.
        length: Tokens of a pack.
        packs: Packs of a step.
        steps: Steps of each measurement.
        step_seconds: What a step of training takes; each is tried.
        pictures: Photographs that are made for it.
        json: Write the results to this file too.
    """
    import tempfile

    from .bench_data import bench_data, print_rates, rates_json, write_pictures

    at_least(1, length=length, packs=packs, steps=steps, pictures=pictures)
    at_least(0, workers=min(workers), step_seconds=min(step_seconds))
    check_outputs(json)
    with tempfile.TemporaryDirectory() as folder:
        path = write_pictures(Path(folder), pictures)
        rates = bench_data(path, tokenizer, workers, length=length, packs=packs, steps=steps, seconds=step_seconds)
    print_rates(rates, length, packs)
    write_json(json, rates_json(rates))


@bench.command
def packing(ranks: int = 8, steps: int = 20, seed: int = 0, json: Path | None = None) -> None:
    """How full packs are and how evenly their cost is spread over ranks, on a long-tailed set, beside two simpler methods.

    Args:
        ranks: Ranks that take different packs.
        steps: Steps that are packed.
        seed: Of the set.
        json: Write the results to this file too.
    """
    from smalt.profiling.bench_packing import BASELINES, bench_packing, print_packing

    from .data.balance import choose_packs, deal_packs
    from .data.packing import POOL

    at_least(1, ranks=ranks, steps=steps)
    at_least(0, seed=seed)
    check_outputs(json)
    rows = bench_packing({**BASELINES, "Smalt": (choose_packs, deal_packs)}, ranks, POOL, steps, seed)
    print_packing(rows, ranks)
    write_json(json, rows)


@bench.command
def yarn(config: Path = Path("configs/digits_long.toml"), seeds: int = 3, json: Path | None = None) -> None:
    """Train a config whose last stage is one of long context; accuracy by length before it, after it, and after it without its YaRN.

    Args:
        config: Config that is trained; its data is that of `smalt data digits-long`.
        seeds: Runs, with the seeds 0, 1, ...
        json: Write the results to this file too.
    """
    from rich.console import Console

    from smalt.profiling.tables import print_table

    from .bench_yarn import bench_yarn, yarn_json, yarn_table
    from .config import load_config

    at_least(1, seeds=seeds)
    check_outputs(json)
    console = Console(highlight=False)
    found = bench_yarn(load_config(config), seeds, console.print)
    print_table(console, yarn_table(found))
    write_json(json, yarn_json(found))


@bench.command
def gguf(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")], questions: int | None = None, json: Path | None = None
) -> None:
    """Accuracy of a run with its language part as each type of GGUF file stores it, and the size of the file.

    Args:
        folder: Folder of the run; its newest checkpoint is measured.
        questions: Questions a task; as many as the run's config says when not given.
        json: Write the results to this file too.
    """
    from rich.console import Console

    from smalt.profiling.tables import print_table

    from .bench_gguf import bench_gguf, gguf_json, gguf_table

    at_least(1, questions=questions)
    check_outputs(json)
    console = Console(highlight=False)
    found = bench_gguf(folder, questions, console.print)
    print_table(console, gguf_table(found))
    write_json(json, gguf_json(found))


@bench.command
def resampling(seeds: int = 3, json: Path | None = None) -> None:
    """Tokens to the same held-out accuracy on easy, hard and noisy digits, with the sources resampled by what is measured and without.

    Args:
        seeds: Runs of either kind, with the seeds 0, 1, ...
        json: Write the results to this file too.
    """
    from rich.console import Console

    from smalt.profiling.tables import print_table

    from .bench_resampling import bench_resampling, resampling_json, resampling_table

    at_least(1, seeds=seeds)
    check_outputs(json)
    console = Console(highlight=False)
    found = bench_resampling(seeds, progress=console.print)
    print_table(console, resampling_table(found))
    write_json(json, resampling_json(found))


@bench.command
def kernels(
    out: Path | None = None,
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    quick: bool = False,
    write_docs: bool = False,
    measure: bool = True,
    seconds: float = 420.0,
) -> None:
    """Check every kernel on the GPU, then time it against torch, Liger, flash-attn and apex. Ends with 1 where a kernel is wrong.

    Args:
        out: Folder of results; profiling/results when not given.
        only: Only this operation; give the option once an operation.
        quick: Fewer shapes and rounds.
        write_docs: Rewrite the table in docs/kernels.md from all results in the folder.
        measure: Off: show, or write, what was measured before. Needs no GPU.
        seconds: Begin nothing more after this; what is left out is "not measured".
    """
    from smalt.profiling.bench import bench_kernels
    from smalt.profiling.kernels.bench_results import RESULTS

    raise SystemExit(bench_kernels(out or RESULTS, only, quick, write_docs, measure, seconds))


@bench.command
def overlap(rounds: int = 5, steps: int = 2, json: Path | None = None, traces: Path | None = None) -> None:
    """Which collectives of sharded data parallel and of context parallel overlap with compute, and how long the rest take.

    Args:
        rounds: Times that all contestants take their turn.
        steps: Steps of a turn that are recorded.
        json: Write the results to this file too.
        traces: Keep the traces in this folder, for smalt trace; a temporary one when not given.
    """
    from smalt.profiling.bench_overlap import bench_overlap, print_report

    check_outputs(json)
    result = bench_overlap(rounds, steps, traces)
    print_report(result)
    write_json(json, result)


@bench.command
def checkpoint(
    config: Path | None = None,
    disk: Path = Path("runs"),
    rounds: int = 12,
    steps: int = 2,
    step_seconds: float = 1.0,
    threads: int = 1,
) -> None:
    """Measure what a save costs training: the same steps with and without one in progress, in turns, on the CPU.

    Args:
        config: Config whose model is used; one of 16 million parameters when not given.
        disk: Folder on the disk to write to; what is written is removed.
        rounds: Times that both take their turn.
        steps: Steps of a turn; a save should end within them.
        step_seconds: What a step takes at least; the pack is made as long as that needs.
        threads: Threads of torch. The writing thread wants a core beside them.
    """
    import tempfile

    import torch

    from smalt.parallel import alone
    from smalt.profiling.bench_checkpoint import SIZES, bench_checkpoint, print_report

    from .checkpoints import CheckpointWriter
    from .config import load_config
    from .optimizers import optimizer_tensors

    def failed(message: str) -> None:
        raise UserError(message)

    at_least(1, rounds=rounds, steps=steps, threads=threads)
    at_least(0, step_seconds=step_seconds)
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        writer = CheckpointWriter(Path(folder), 1, alone(torch.device("cpu")), failed)
        sizes = load_config(config).model if config else SIZES
        print_report(
            bench_checkpoint(sizes, writer, optimizer_tensors, rounds=rounds, steps=steps, step_seconds=step_seconds, threads=threads)
        )


@bench.command
def tiles(rounds: int = 7, steps: int = 1, tokens: int = 2048, tiles: int = 48, json: Path | None = None) -> None:
    """What it gains to share the tiles of a pack out over the ranks of cp and tp, against the vision tower on every rank.

    Args:
        rounds: Times that all contestants take their turn.
        steps: Steps of a turn.
        tokens: Tokens of the pack.
        tiles: Tiles of the pack.
        json: Write the results to this file too.
    """
    from smalt.profiling.bench_tiles import bench_tiles, print_report

    at_least(1, tokens=tokens, tiles=tiles)
    check_outputs(json)
    result = bench_tiles(rounds, steps, tokens, tiles)
    print_report(result)
    write_json(json, result)


@compiled.command
def check(
    kernel: str | None = None,
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    write: bool = False,
    beside: bool = True,
    jobs: int = 2,
    rows: Path | None = None,
    table: Path | None = None,
) -> None:
    """Compile every kernel for every chip, without a GPU, and compare with the committed table. Ends with 1 where a rule is broken.

    Args:
        kernel: Only this kernel or operation.
        target: Only this chip (sm_80, sm_90, sm_100, sm_120, gfx942, gfx950); give the option once a chip.
        write: Rewrite the table and docs/kernels.md.
        beside: Compile the same operations of Liger and flash-linear-attention too, where installed.
        jobs: Processes that compile.
        rows: Launch configurations to try, a file or a folder, in place of those that ship.
        table: Table to compare with and to write; then docs/kernels.md is left alone.
    """
    from smalt.profiling.kernels.check import TABLE, TARGETS
    from smalt.profiling.kernels.check import check as compare
    from smalt.profiling.kernels.report import print_outcome, write_docs

    at_least(1, jobs=jobs)
    check_outputs(table if write else None)
    outcome = compare(kernel, target or TARGETS, rows, table or TABLE, beside, jobs, write)
    if write and kernel is None and table is None:
        write_docs(outcome)
    raise SystemExit(print_outcome(outcome))


@compiled.command
def traffic(write: bool = False) -> None:
    """Count the bytes that the kernels move, in Triton's interpreter. Ends with 1 where they are more than they should be.

    Args:
        write: Put the tables into docs/kernels.md.
    """
    import subprocess

    # The interpreter needs a process of its own.
    command = [sys.executable, "-m", "smalt.profiling.kernels.traffic", *(["--write"] if write else [])]
    raise SystemExit(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode)


@compiled.command
def configure(
    kernel: str | None = None, target: tyro.conf.UseAppendAction[tuple[str, ...]] = (), write: bool = False, jobs: int = 2
) -> None:
    """Choose tiles, warps and stages of every kernel for every chip by a model of the chip, confirmed by the compiler.

    Args:
        kernel: Only this kernel.
        target: Only this chip; give the option once a chip.
        write: Write the launch tables.
        jobs: Processes that compile.
    """
    from smalt.kernels.launch import TARGETS
    from smalt.profiling.kernels.configure import configure as choose
    from smalt.profiling.kernels.configure import describe, write_rows

    at_least(1, jobs=jobs)
    rows, refused = choose(kernel, target or TARGETS, jobs)
    print(*(f"refused  {line}" for line in refused), *(describe(row) for row in rows), sep="\n")
    if write:
        print(*(f"written  {path}" for path in write_rows(rows)), sep="\n")


@compiled.command
def tune(kernel: str | None = None, candidates: int = 8, write: bool = False) -> None:
    """Time launch configurations on this machine's GPU, those that ship against the model's best guesses.

    Args:
        kernel: Only this kernel.
        candidates: Guesses of the model that are tried for each row.
        write: Write what is faster into the launch tables, row by row.
    """
    from smalt.profiling.kernels.tune import tune_kernels

    tune_kernels(kernel, candidates, write)
