"""The ``smalt`` command: generate, evaluate and export from a run, write data, look at models and the machine, measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from .cli_bench import bench, compiled
from .cli_data import data
from .cli_options import at_least, check_outputs, write_json
from .errors import BadRecord, UserError

app = SubcommandApp()
app.command(data, name="data", help="Write data, look at it, clean it.")
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

    at_least(0, budget=budget, temperature=temperature, top_k=top_k, seed=seed)
    at_least(1, max_tokens=max_tokens)
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    question = make_question(prompt, image)  # before the run is loaded, which takes longer
    thought, answer = respond(load_run(folder), question, mode, budget, sampling)
    if mode == "think":
        print(f"thought: {thought}")
    print(f"answer: {answer}")


@app.command(name="eval")
def evaluate(
    folder: RunDir,
    questions: int | None = None,
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    mode: Literal["think", "answer"] | None = None,
    budget: int | None = None,
    json: Path | None = None,
    answers: Path | None = None,
) -> None:
    """Evaluate the newest checkpoint of a run. Without task, mode and budget it is the final evaluation again, and rewrites its files.

    Args:
        folder: Folder of the run.
        questions: Questions a task, spread evenly over its file; as many as the run's config says when not given. With it,
            --task, --mode or --budget the files of the run's final evaluation stay.
        task: NAME=FILE, instead of the tasks of the run: questions in a format of docs/evaluation.md; give the option once a task.
        mode: Ask in this mode only.
        budget: Ask in think mode only, with so many tokens for the thought.
        json: Write the scores to this file too.
        answers: Write the answers that are kept to this file too, as JSON lines.
    """
    from .inference import Asked, evaluate_run

    at_least(1, questions=questions)
    at_least(0, budget=budget)
    if budget is not None and mode == "answer":
        raise UserError("--budget is of thoughts, and --mode answer has none; leave one of them out")
    check_outputs(json, answers)
    evaluate_run(folder, Asked(questions, _task_files(task), mode, budget, json, answers))


def _task_files(options: tuple[str, ...]) -> dict[str, str]:
    files: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not name or not path or name in files:
            raise UserError(f"--task {option} is not NAME=FILE with a name of its own")
        files[name] = path
    return files


@app.command
def compare(folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DIR")]) -> None:
    """Show the final accuracies of runs side by side; runs of the same name, as with several seeds, as their mean.

    Args:
        folders: Folders of finished runs.
    """
    from rich.console import Console

    from smalt.profiling.tables import print_table

    from .compare import compare_runs

    print_table(Console(highlight=False), compare_runs(folders))


@app.command
def export(
    folder: RunDir,
    out: Path,
    part: Literal["language", "vision"] | None = None,
    format: Literal["transformers", "smalt", "gguf"] = "transformers",
    step: int | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    shard_size: float | None = None,
    type: Literal["f16", "q8_0", "q4_0"] | None = None,
) -> None:
    """Write the model of a run as a folder of safetensors files that transformers loads, with processor and chat template, or its
    language part as one GGUF file.

    Args:
        folder: Folder of the run.
        out: New folder to write to; of gguf a new file.
        part: Write this part alone; the whole model when not given.
        format: transformers: the whole model with the code for it, or a part as one of its classes. smalt: the whole model in
            safetensors under Smalt's own names. gguf, for llama.cpp: one file with the language part, tokenizer and chat template.
        step: Step of the checkpoint; the newest whole one when not given.
        dtype: Type of the weights in safetensors; as in the checkpoint when not given.
        shard_size: Gigabytes (1e9 bytes) of a file of safetensors at most; 5 when not given.
        type: Type of the matrices in gguf; f16 when not given.
    """
    from .export import export_run
    from .export_gguf import export_gguf

    if format == "gguf":
        if part == "vision" or dtype is not None or shard_size is not None:
            raise UserError(
                "--format gguf writes the language part as one file of one --type; leave out --part, --dtype and --shard-size"
            )
        gguf = export_gguf(folder, out, step, type or "f16")
        print(f"{out}: {len(gguf.layout)} tensors of step {gguf.checkpoint.step}, {gguf.size:,} bytes; {gguf.describe()}")
        return
    if type is not None:
        raise UserError(f"--type is of --format gguf; --format {format} has a --dtype")
    at_least(0, shard_size=shard_size)
    done = export_run(folder, out, step, dtype, 5.0 if shard_size is None else shard_size, part, format)
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(f"{out}: {done.num_tensors} tensors of step {done.checkpoint.step}, {done.size:,} bytes in {files}")


@app.command
def model(folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")], tokenizer: Path | None = None) -> None:
    """Print the sections of a config that begins with the weights of a Hugging Face folder.

    Args:
        folder: A folder of Llama, Qwen2, Qwen3, SigLIP or SigLIP2.
        tokenizer: Write the folder's tokenizer, with the special tokens of the chat template, to this file.
    """
    from .weights.describe import describe_folder, write_tokenizer

    num_tokens = write_tokenizer(folder, tokenizer) if tokenizer is not None else 0
    print(describe_folder(folder, num_tokens))


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

    check_outputs(json, plot)
    traces = read_traces(folder)
    report = overlap_report(traces)
    print_overlap(report)
    write_json(json, report)
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
