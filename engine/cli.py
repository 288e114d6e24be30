"""The ``smalt`` command: generate, evaluate and export from a run, write data, look at the machine, measure."""

from __future__ import annotations

import math
import os
import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from .errors import BadRecord, UserError

app, data, bench, compiled = SubcommandApp(), SubcommandApp(), SubcommandApp(), SubcommandApp()
app.command(data, name="data", help="Write data.")
app.command(bench, name="bench", help="Measure speed and memory on this machine.")
app.command(compiled, name="kernels", help="Look at the compiled kernels.")
RunDir = Annotated[Path, tyro.conf.arg(name="run", metavar="DIR")]


@app.command
def generate(
    folder: RunDir,
    prompt: str,
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    mode: Literal["think", "answer"] = "think",
    budget: int | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Answer one question from a trained run.

    Args:
        folder: Folder of the run; its newest checkpoint answers.
        prompt: The question. Each <image> in it stands for one image; images without one come first.
        image: An image file; give the option once an image.
        mode: Think first, or answer at once.
        budget: Tokens that may be thought before the answer is forced; unlimited when not given.
        max_tokens: Longest completion in tokens.
        temperature: 0 takes the likeliest token, 1 samples from the model.
        top_k: Sample among the k likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability.
        seed: Fixes what is sampled.
    """
    from smalt.model.generate import Sampling

    from .inference import load_run, make_question, respond

    _at_least(0, budget=budget, temperature=temperature, top_k=top_k, seed=seed)
    _at_least(1, max_tokens=max_tokens)
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    question = make_question(prompt, image)  # before the run is loaded, which takes longer
    thought, answer = respond(load_run(folder), question, mode, budget, sampling)
    if mode == "think":
        print(f"thought: {thought}")
    print(f"answer: {answer}")


@app.command(name="eval")
def evaluate(folder: RunDir, questions: int | None = None) -> None:
    """Repeat the final evaluation of a run on its newest checkpoint, and rewrite its files.

    Args:
        folder: Folder of the run.
        questions: Questions a task; as many as the run's config says when not given.
    """
    from .inference import evaluate_run

    _at_least(1, questions=questions)
    evaluate_run(folder, questions)


@app.command
def export(
    folder: RunDir, out: Path, step: int | None = None, dtype: Literal["bfloat16", "float32"] | None = None, shard_size: float = 5.0
) -> None:
    """Write the weights of a run as Hugging Face style safetensors files, with config.json and tokenizer.json beside them.

    Args:
        folder: Folder of the run.
        out: New folder to write to.
        step: Step of the checkpoint; the newest whole one when not given.
        dtype: Type of the weights; as in the checkpoint when not given.
        shard_size: Gigabytes (1e9 bytes) of a file at most.
    """
    from .export import export_run

    _at_least(0, shard_size=shard_size)
    done = export_run(folder, out, step, dtype, shard_size)
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(f"{out}: {done.num_tensors} tensors of step {done.checkpoint.step}, {done.size:,} bytes in {files}")


@data.command
def digits(out: Path = Path("data/digits"), records: int = 20_000, questions: int = 500, seed: int = 0) -> None:
    """Write the data of the default run: questions about scikit-learn's handwritten digits.

    Args:
        out: Folder to write to.
        records: Training records a task.
        questions: Held-out questions a task.
        seed: Fixes the split, the augmentation and the questions.
    """
    from .data.digits import write_digits

    _at_least(1, records=records, questions=questions)
    _at_least(0, seed=seed)
    try:
        written = write_digits(out, records, questions, seed)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another folder with --out") from error
    for path, count in written.items():
        print(f"{path}: {count:,} records")


@app.command
def doctor() -> None:
    """Say what this machine can do and what is wrong with it."""
    from smalt.profiling.doctor import doctor as examine
    from smalt.profiling.doctor import print_doctor

    raise SystemExit(print_doctor(examine()))


@app.command
def trace(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")], json: Path | None = None, plot: Path | None = None
) -> None:
    """Say how much communication hides behind compute, by mesh axis and kind, from the traces that a run recorded.

    Args:
        folder: Folder of traces, one a rank: the folder traces of a run with logging.trace_steps, or any of torch.profiler.
        json: Write everything to this file too.
        plot: Draw the last recorded step of each rank, and covered and exposed time by axis, into this file.
    """
    from smalt.profiling.trace_report import overlap_report, plot_overlap, print_overlap
    from smalt.profiling.traces import read_traces

    _check_outputs(json, plot)
    traces = read_traces(folder)
    report = overlap_report(traces)
    print_overlap(report)
    _write_json(json, report)
    if plot is not None:
        plot_overlap(traces, report, plot)


@app.command
def memory(write: bool = False) -> None:
    """What a rank holds, by model and layout: weights, gradients, optimiser state, gathered weights, inputs of blocks.

    Args:
        write: Put the table into docs/parallel.md.
    """
    from smalt.profiling.memory import memory_table, print_memory, write_docs

    rows = memory_table()
    print_memory(rows)
    if write:
        write_docs(rows)


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

    _at_least(1, documents=documents, batch=batch, rounds=rounds, threads=threads)
    loaded = load_config(config)
    name, stage = list(loaded.stages.items())[-1]
    chosen = stream_documents(stage_stream(loaded, name, open_data(loaded)), documents)
    length = stage.sequence_length
    batch = batch or max(1, length * len(chosen) // sum(map(len, chosen)))
    print_report(bench_cpu(chosen, loaded.model, pack_length=length, batch=batch, rounds=rounds, threads=threads))


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

    _check_outputs(json)
    result = bench_overlap(rounds, steps, traces)
    print_report(result)
    _write_json(json, result)


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

    _at_least(1, rounds=rounds, steps=steps, threads=threads)
    _at_least(0, step_seconds=step_seconds)
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

    _at_least(1, tokens=tokens, tiles=tiles)
    _check_outputs(json)
    result = bench_tiles(rounds, steps, tokens, tiles)
    print_report(result)
    _write_json(json, result)


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

    _at_least(1, jobs=jobs)
    _check_outputs(table if write else None)
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

    _at_least(1, jobs=jobs)
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


def _at_least(lowest: int, **options: float | None) -> None:
    """Raise UserError for an option that is below ``lowest`` or not finite; None is one that was not given."""
    for name, value in options.items():
        if value is not None and not lowest <= value < math.inf:
            also = " and finite" if isinstance(value, float) else ""
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {lowest}{also}")


def _check_outputs(*paths: Path | None) -> None:
    """Make the folders of files that are to be written, before what takes long. Raises UserError for one that cannot be written."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}; choose another file") from error
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path} is a folder, or not to be written; choose another file")


def _write_json(path: Path | None, value: object) -> None:
    if path is not None:
        path.write_text(dumps(value, indent=2) + "\n")


def main() -> int:
    try:
        app.cli(prog="smalt", description=__doc__)
    except (UserError, BadRecord, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
