"""The coloured digits: one answer, a true one, anywhere in rows of the asked lengths; no image on both sides."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PIL_Image

from smalt.engine.bench_yarn import bench_yarn, yarn_table
from smalt.engine.config import load_config
from smalt.engine.data import digits_long
from smalt.engine.data.chat import PLACEHOLDER, split_thought
from smalt.engine.data.digits import read_digits
from smalt.engine.data.digits_long import COLOURS, LENGTH, TEMPLATE_TOKENS, write_long_digits
from smalt.engine.trainer import open_data, open_sources_of
from smalt.model import YarnConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs/digits_long.toml"
HELD_OUT = {"x1": 1, "x8": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("digits_long"), seed=0)


def _write(folder, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_long, "VARIANTS", 1)
        write_long_digits(folder, records=80, questions=8, seed=seed)
    return folder


@pytest.fixture
def config(folder):
    """The shipped config over the little data."""
    config = load_config(CONFIG)
    config.data.tokenizer = folder / "tokenizer.json"
    config.data.sources = {name: folder / "train" / f"{name}.parquet" for name in config.data.sources}
    config.evaluation.sources = {name: str(folder / "held_out" / f"{name}.parquet") for name in config.evaluation.sources}
    return config


def _rows(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def _shown(row):
    """Colour and grey pixels of each digit of a row."""
    found = []
    for image in row["images"]:
        pixels = np.asarray(PIL_Image.open(io.BytesIO(image["bytes"]))).astype(int)
        brightest = pixels.reshape(-1, 3).max(0)
        colours = [n for n, c in COLOURS.items() if np.abs(np.array(c) * brightest.max() - brightest).max() <= 1]
        assert len(colours) == 1
        found.append((colours[0], np.round(pixels.max(-1) * 16 / 255).astype(np.uint8).tobytes()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", HELD_OUT)
def test_one_digit_has_the_colour_and_is_the_answer(folder, name):
    pixels, labels = read_digits()
    label_of = {p.astype(np.uint8).tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}
    places = []
    for row in _rows(folder, f"held_out/{name}"):
        question, answer = (message["content"] for message in row["messages"])
        shown, asked = _shown(row), question.removeprefix(PLACEHOLDER * len(row["images"])).removesuffix("?")
        (at,) = [i for i, (colour, _) in enumerate(shown) if colour == asked]
        digit = label_of[shown[at][1]]
        assert split_thought(answer) == (f"{asked}{digit}", str(digit))
        places.append(at / len(shown))
    assert max(places) - min(places) > 0.4


@pytest.mark.slow
def test_rows_are_as_long_as_their_source_says(config):
    data = open_data(config)
    lengths = {
        name: [len(data.encoder.sample(records[i], "think")) for i in range(len(records))]
        for name, records in {**data.sources, **open_sources_of(config, config.evaluation.sources)}.items()
    }
    assert set(lengths["few"]) == {TEMPLATE_TOKENS + n for n in range(1, 5)}
    assert max(lengths["short"]) <= LENGTH == config.stages["long_context"].yarn.original_length
    assert np.median(lengths["short"]) < LENGTH / 2 < max(lengths["short"])
    assert (
        7 * LENGTH <= min(lengths["long"]) + TEMPLATE_TOKENS <= max(lengths["long"]) + TEMPLATE_TOKENS <= 8 * LENGTH + TEMPLATE_TOKENS
    )
    assert config.stages["long_context"].sequence_length == 8 * LENGTH
    for name, times in HELD_OUT.items():
        assert set(lengths[name]) == {times * LENGTH}


@pytest.mark.slow
def test_no_held_out_image_was_trained_on(folder):
    train, held_out = (
        {pixels for name in names for row in _rows(folder, name) for _, pixels in _shown(row)}
        for names in (["train/few", "train/short"], ["held_out/x1", "held_out/x8"])
    )
    assert len(train) > 300
    assert len(held_out) > 200
    assert not train & held_out


@pytest.mark.slow
def test_the_same_arguments_write_the_same_records(folder, tmp_path):
    for seed in (0, 1):
        again = _write(tmp_path / str(seed), seed)
        for name in ("train/short", "train/long", "held_out/x8"):
            assert (_rows(again, name) == _rows(folder, name)) == (seed == 0)


@pytest.mark.slow
def test_the_comparison_has_every_length_before_and_after_with_yarn_and_without(config):
    for stage in config.stages.values():
        stage.steps = 2
    config.evaluation.questions = 2
    said = []
    found = bench_yarn(config, 2, said.append)
    assert [(a.seed, a.yarn, a.trained) for a in found] == [(s, y, t) for s in (0, 1) for y in (False, True) for t in (False, True)]
    assert all(list(a.by_source) == list(HELD_OUT) for a in found)
    assert len(said) == yarn_table(found).row_count == 8
    assert config.stages["long_context"].yarn == YarnConfig(factor=8, original_length=64), "the config itself stays"
