"""Runs over other kinds of sources: the same records give the same numbers, and one that vanishes ends a run with a clear word."""

import base64
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest

from smalt.engine.stage import Stage
from smalt.engine.train import main

from .source_writers import add

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(digits):
    return pq.read_table(digits / "train" / "read.parquet").to_pylist()


def _write_lines(path, rows):
    with path.open("w") as file:
        for row in rows:
            images = [f"data:image/png;base64,{base64.b64encode(image['bytes']).decode()}" for image in row["images"]]
            said = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in row["messages"]]
            print(json.dumps({"conversations": said, "image": images}), file=file)
    return path


def _write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for at, image in enumerate(row["images"]):
                add(tar, f"{number:06}.{at}.png", image["bytes"])
            add(tar, f"{number:06}.json", json.dumps({"messages": row["messages"]}).encode())
    return path


def _write_saved(path, rows):
    import datasets

    whole = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    whole.save_to_disk(str(path))
    return path


def _changes(path, steps):
    return {
        "stages.align": None, "evaluation": {}, "data.validation": {}, "checkpoint.every": 1000, "stages.sft.steps": steps,
        "data.sources": {"read": path}, "stages.sft.mixture": {"read": 1.0},
    }  # fmt: skip


def test_the_same_records_give_the_same_run_whatever_holds_them(digits, rows, tiny_config, tmp_path, figures):
    paths = [
        digits / "train" / "read.parquet", _write_lines(tmp_path / "a.jsonl", rows), _write_tar(tmp_path / "a.tar", rows),
        _write_saved(tmp_path / "saved", rows),
    ]  # fmt: skip
    runs = []
    for number, path in enumerate(paths):
        folder = tmp_path / f"run{number}"
        assert main([str(tiny_config(_changes(path, 3))), "--folder", str(folder)]) == 0
        assert (folder / "skipped.jsonl").read_text() == ""
        runs.append(figures(folder))
    assert runs[0][-1]["loss"] > 0
    assert runs == [runs[0]] * len(runs)


@pytest.mark.parametrize(("write", "name", "cause"), [(_write_lines, "a.jsonl", "unreadable"), (_write_tar, "a.tar", "unreadable")])
def test_a_source_that_vanishes_in_mid_run_ends_it_and_says_why(rows, tiny_config, tmp_path, monkeypatch, capsys, write, name, cause):
    path, train_step = write(tmp_path / name, rows), Stage.train_step

    def vanish(self, batch, asked):
        if self.done == 2:
            os.unlink(path)
        return train_step(self, batch, asked)

    monkeypatch.setattr(Stage, "train_step", vanish)
    assert main([str(tiny_config(_changes(path, 1000))), "--folder", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "error: no usable record: 256 records in a row were skipped" in said
    assert f"{cause} record" in said
    assert name in said
    assert "Traceback" not in said
