"""The digits: no image on both sides, true answers, sound thoughts, a token for each digit."""

import io
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PIL_Image
from tokenizers import Tokenizer

from smalt.engine.data import digits as digits_module
from smalt.engine.data.chat import PLACEHOLDER, SPECIAL_TOKENS, split_thought
from smalt.engine.data.digits import TASKS, write_digits

SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Digits that were not augmented, so that a training image is found again by its pixels."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_module, "augment", lambda pixels, rng: pixels)
        patch.setattr(digits_module, "VARIANTS", 2)
        write_digits(folder, records=400, questions=200, seed=3)
    return folder


@pytest.fixture(scope="module")
def label_of():
    """Label by the pixels of each of scikit-learn's images."""
    pixels, labels = digits_module.read_digits()
    known = {digits_module.png(p): int(label) for p, label in zip(pixels, labels, strict=True)}
    assert len(known) > 1790
    return {_pixels(png): label for png, label in known.items()}


def _pixels(png):
    return np.asarray(PIL_Image.open(io.BytesIO(png))).tobytes()


def _rows(folder, split, task):
    return pq.read_table(folder / split / f"{task}.parquet").to_pylist()


def _images(folder, split):
    return {_pixels(image["bytes"]) for task in TASKS for row in _rows(folder, split, task) for image in row["images"]}


@pytest.mark.slow
def test_no_image_of_the_evaluation_was_trained_on(plain, label_of):
    train, held_out = _images(plain, "train"), _images(plain, "held_out")
    assert len(train) > 1000
    assert len(held_out) > 300
    assert train | held_out <= set(label_of)
    assert not train & held_out


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("task", "truth"),
    [("read", lambda d: "".join(map(str, d))), ("sum", lambda d: str(sum(d))), ("largest", lambda d: str(max(d)))],
)
def test_the_answers_are_true_of_the_images(plain, label_of, split, task, truth):
    for row in _rows(plain, split, task):
        shown = [label_of[_pixels(image["bytes"])] for image in row["images"]]
        question, answer = (message["content"] for message in row["messages"])
        assert split_thought(answer)[1] == truth(shown)
        assert question.count(PLACEHOLDER) == len(shown)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_text_asks_the_same_of_digits_that_are_written_out(plain):
    rows = _rows(plain, "train", "text")
    assert len(rows) == 400
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        digits, asked = question.split(":")
        assert asked in TASKS["sum"].questions
        assert split_thought(answer)[1] == str(sum(map(int, digits.split(","))))
        assert row["images"] == []


def _in_order(wanted, numbers):
    rest = iter(numbers)
    return all(number in rest for number in wanted)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_every_claim_of_a_thought_is_true(plain, label_of, split, task):
    claims = 0
    for row in _rows(plain, split, task):
        shown = [label_of[_pixels(image["bytes"])] for image in row["images"]]
        thought, answer = split_thought(row["messages"][1]["content"])
        numbers = [int(n) for n in re.findall(r"\d+", thought)]
        for a, b, total in re.findall(r"(\d+)\+(\d+)=(\d+)", thought):
            assert int(a) + int(b) == int(total)
            claims += 1
        for a, b, ones, same in re.findall(r"(\d+)\+(\d):(\d+)\+(\d)=", thought):
            assert (int(ones), same) == (int(a) % 10, b)
        for a, sign, b in re.findall(r"(\d+)(<|>=)(\d+)", thought):
            assert (int(a) < int(b)) == (sign == "<")
            claims += 1
        if task == "sum":
            assert _in_order(np.cumsum(shown)[1:], numbers)
            assert numbers[-1] == int(answer)
        else:
            assert _in_order(shown, numbers)
    assert (claims > 100) == (task != "read")


def test_every_count_and_every_form_of_thought_occurs(plain):
    for task in TASKS:
        rows = _rows(plain, "train", task)
        assert {len(row["images"]) for row in rows} == set(TASKS[task].counts)
        assert {len(row["images"]) for row in _rows(plain, "held_out", task)} == set(TASKS[task].held_out_counts)
        assert {row["messages"][0]["content"].replace(PLACEHOLDER, "") for row in rows} == set(TASKS[task].questions)
    assert len({bool(re.search("=", row["messages"][1]["content"])) for row in _rows(plain, "train", "sum")}) == 2


def test_training_images_are_augmented_and_held_out_ones_are_not(digits, label_of):
    train, held_out = _images(digits, "train"), _images(digits, "held_out")
    assert held_out <= set(label_of)
    assert len(train & set(label_of)) == 0
    assert len(train) > 1000


def test_an_augmented_digit_still_looks_like_itself():
    pixels = digits_module.read_digits()[0][:200]
    moved = digits_module.augment(pixels, np.random.default_rng(0))
    alike = np.corrcoef(pixels.reshape(200, -1), moved.reshape(200, -1))[:200, 200:]
    assert alike.diagonal().mean() > alike.mean() + 0.2
    assert (moved >= 0).all()
    assert (moved <= 16).all()
    assert not np.array_equal(moved[0], pixels[0])


@pytest.mark.slow
def test_the_same_arguments_write_the_same_records(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "augment", lambda pixels, rng: pixels)
    monkeypatch.setattr(digits_module, "VARIANTS", 2)
    write_digits(tmp_path / "same", records=400, questions=200, seed=3)
    write_digits(tmp_path / "other", records=400, questions=200, seed=4)
    for split in SPLITS:
        for task in TASKS:
            assert _rows(tmp_path / "same", split, task) == _rows(plain, split, task)
            assert _rows(tmp_path / "other", split, task) != _rows(plain, split, task)
    assert (tmp_path / "same" / "tokenizer.json").read_text() == (plain / "tokenizer.json").read_text()


def test_the_files_have_as_many_records_as_asked(digits):
    assert {len(_rows(digits, "train", task)) for task in TASKS} == {200}
    assert {len(_rows(digits, "held_out", task)) for task in TASKS} == {24}


def test_every_digit_and_sign_is_a_token_of_its_own(digits):
    tokenizer = Tokenizer.from_file(str(digits / "tokenizer.json"))
    text = "1234567890+=,:<>="
    assert tokenizer.encode(text, add_special_tokens=False).tokens == list(text)
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.get_vocab_size() <= digits_module.VOCABULARY


@pytest.mark.parametrize("text", ["read the digits", " two  spaces\n", "naïve £5 数字 \U0001f642", "a\tb\0c"])
def test_any_text_survives_the_tokenizer(digits, text):
    tokenizer = Tokenizer.from_file(str(digits / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_examples_are_held_out_digits_under_their_own_names(plain):
    pixels, labels = digits_module.read_digits()
    for digit in range(10):
        data = (plain / "examples" / f"{digit}.png").read_bytes()
        found = np.round(np.asarray(PIL_Image.open(io.BytesIO(data)), float) * 16 / 255)
        assert digit in labels[(pixels == found).all((1, 2))]
        assert data not in {image["bytes"] for task in TASKS for row in _rows(plain, "train", task) for image in row["images"]}
