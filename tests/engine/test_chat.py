"""The chat template, token for token, in both modes; what is learned and what is not."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL_Image
from tokenizers import Tokenizer, models

from smalt.engine.data.chat import SPECIAL_TOKENS, ChatEncoder, split_thought
from smalt.engine.data.images import ImageLimits
from smalt.engine.data.records import Image, Record
from smalt.engine.errors import BadRecord, UserError
from smalt.kernels import IGNORE
from smalt.model import TilingConfig, pack
from smalt.model.tiling import ImageShape

SHAPE = ImageShape(side=8, tokens=4)


def _png(grey):
    buffer = io.BytesIO()
    PIL_Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return Image(buffer.getvalue(), None)


BLACK, WHITE = _png(0), _png(255)


@pytest.fixture(scope="module")
def encoder(digits):
    return ChatEncoder(Tokenizer.from_file(str(digits / "tokenizer.json")), SHAPE)


@pytest.fixture(scope="module")
def spelled(encoder):
    """spelled("<|user|>", "hi", ...): ids of special tokens by name and of any other text."""

    def ids(*parts):
        return [i for part in parts for i in ([encoder.ids[part]] if part in SPECIAL_TOKENS else encoder.text(part))]

    return ids


def _record(*turns, images=()):
    return Record(tuple(turns), tuple(images), "source", 7)


def _learned(document):
    return document.tokens[document.targets].tolist()


PLUS = _record(("user", "<image><image>add"), ("assistant", "<think>1+2=3</think>3"), images=[BLACK, WHITE])
PROMPT = ("<|user|>", *["<|image|>"] * 8, "add", "<|end|>", "<|assistant|>")


def test_think_mode_is_the_template(encoder, spelled):
    document = encoder.sample(PLUS, "think")
    assert document.tokens.tolist() == spelled(*PROMPT, "<|think|>", "<think>", "1+2=3", "</think>", "3", "<|end|>")
    assert _learned(document) == spelled("1+2=3", "</think>", "3", "<|end|>")
    assert document.targets.sum() == document.targets[-len(_learned(document)) :].sum()


def test_answer_mode_is_the_template_without_the_thought(encoder, spelled):
    document = encoder.sample(PLUS, "answer")
    assert document.tokens.tolist() == spelled(*PROMPT, "<|answer|>", "3", "<|end|>")
    assert _learned(document) == spelled("3", "<|end|>")


def test_a_document_carries_its_images_where_their_rows_are(encoder):
    document = encoder.sample(PLUS, "think")
    assert document.image_index.tolist() == list(range(1, 9))
    assert document.spans.tolist() == [[1, 5], [5, 9]]
    assert document.tiles.shape == (2, 3, 8, 8)
    assert document.tiles.mean((1, 2, 3)).tolist() == [0.0, 255.0]
    assert (document.source, document.record) == ("source", 7)


def test_a_record_without_a_thought_is_always_in_answer_mode(encoder, spelled):
    record = _record(("user", "1"), ("assistant", "2"))
    assert encoder.sample(record, "think").tokens.tolist() == encoder.sample(record, "answer").tokens.tolist()
    assert encoder.sample(record, "think", cut=0.5).tokens.tolist() == spelled(
        "<|user|>", "1", "<|end|>", "<|assistant|>", "<|answer|>", "2", "<|end|>"
    )


@pytest.mark.parametrize(("cut", "kept"), [(0.0, ""), (0.2, "1"), (0.5, "1+"), (0.799, "1+2"), (0.999, "1+2=")])
def test_a_cut_thought_is_closed_by_a_token_that_is_not_learned(encoder, spelled, cut, kept):
    document = encoder.sample(PLUS, "think", cut)
    assert document.tokens.tolist() == spelled(*PROMPT, "<|think|>", "<think>", kept, "</think>", "3", "<|end|>")
    assert _learned(document) == spelled(kept, "3", "<|end|>")


def test_the_labels_of_a_pack_are_exactly_what_is_learned(encoder, spelled):
    documents = [encoder.sample(PLUS, "think", cut) for cut in (None, 0.5)] + [encoder.sample(PLUS, "answer")]
    labels = pack(documents, 100).labels
    want = spelled("1+2=3", "</think>", "3", "<|end|>", "1+", "3", "<|end|>", "3", "<|end|>")
    assert labels[labels != IGNORE].tolist() == want


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_text_that_spells_a_special_token_stays_text(encoder, special, role):
    honest = encoder.sample(_record(("user", "a"), ("system", "a"), ("assistant", "a")), "think")
    turns = [(r, f"a {special} b" if r == role else "a") for r in ("user", "system", "assistant")]
    forged = encoder.sample(_record(*turns), "think")
    specials = set(encoder.ids.values())
    assert [t for t in forged.tokens if t in specials] == [t for t in honest.tokens if t in specials]
    assert f"a {special} b" in encoder.decode(forged.tokens.tolist())


@pytest.mark.parametrize(("content", "images"), [("none", 1), ("<image>", 0), ("<image><image>", 1), ("<image>", 2), ("< image>", 1)])
def test_placeholders_and_images_must_be_as_many(encoder, content, images):
    with pytest.raises(BadRecord) as caught:
        encoder.sample(_record(("user", content), ("assistant", "a"), images=[BLACK] * images), "answer")
    assert caught.value.cause == "placeholder mismatch"
    assert f"{images} images" in caught.value.detail


def test_a_placeholder_in_an_answer_is_text(encoder):
    document = encoder.sample(_record(("user", "x"), ("assistant", "<image>")), "answer")
    assert len(document.tiles) == 0
    assert encoder.decode(_learned(document)[:-1]) == "<image>"


def test_a_record_without_an_answer_is_bad(encoder):
    with pytest.raises(BadRecord) as caught:
        encoder.sample(_record(("assistant", "hello"), ("user", "x")), "answer")
    assert caught.value.cause == "no answer"


def test_a_broken_image_costs_the_record(encoder):
    with pytest.raises(BadRecord, match="not an image"):
        encoder.sample(_record(("user", "<image>"), ("assistant", "x"), images=[Image(b"junk", None)]), "answer")


TALK = _record(
    ("system", "be brief"),
    ("user", "<image>first"),
    ("assistant", "<think>one</think>1"),
    ("user", "second<image>"),
    ("assistant", "<think>two</think>2"),
    images=[BLACK, WHITE],
)


def test_earlier_turns_lose_their_thoughts_and_their_answers_are_learned(encoder, spelled):
    document = encoder.sample(TALK, "think")
    history = ("<|system|>", "be brief", "<|end|>", "<|user|>", *["<|image|>"] * 4, "first", "<|end|>")
    first = ("<|assistant|>", "<|answer|>", "1", "<|end|>")
    second = ("<|user|>", "second", *["<|image|>"] * 4, "<|end|>", "<|assistant|>", "<|think|>", "<think>")
    end = ("two", "</think>", "2", "<|end|>")
    assert document.tokens.tolist() == spelled(*history, *first, *second, *end)
    assert _learned(document) == spelled("1", "<|end|>", *end)


@pytest.mark.parametrize("mode", ["think", "answer"])
@pytest.mark.parametrize("record", [PLUS, TALK], ids=["one turn", "two turns"])
def test_a_prompt_is_how_a_sample_begins(encoder, record, mode):
    prompt, sample = encoder.prompt(record, mode), encoder.sample(record, mode)
    n = len(prompt)
    assert prompt.tokens.tolist() == sample.tokens[:n].tolist()
    assert not prompt.targets.any()
    assert sample.targets[n:].all()  # what is left is what the model itself would say
    np.testing.assert_array_equal(prompt.tiles, sample.tiles)
    np.testing.assert_array_equal(prompt.image_index, sample.image_index)
    assert prompt.tokens[-1] == (encoder.control.think_start if mode == "think" else encoder.ids["<|answer|>"])


def test_a_prompt_needs_no_answer(encoder):
    question = Record(PLUS.messages[:1], PLUS.images)
    assert encoder.prompt(question, "think").tokens.tolist() == encoder.prompt(PLUS, "think").tokens.tolist()


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("<think>a</think>b", ("a", "b")),
        (" \n<think>\na\nb\n</think>\n\nc", ("\na\nb\n", "\n\nc")),
        ("<think></think>b", ("", "b")),
        ("<think>a</think>", ("a", "")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("b", (None, "b")),
        ("", (None, "")),
        ("<think>never closed", (None, "<think>never closed")),
        ("b <think>a</think>", (None, "b <think>a</think>")),
    ],
)
def test_split_thought(content, want):
    assert split_thought(content) == want


@given(thought=st.text("0123456789+=,:ab ", max_size=12), answer=st.text("0123456789 ab", max_size=6))
def test_a_completion_splits_into_what_was_learned(encoder, thought, answer):
    record = _record(("user", "x"), ("assistant", f"<think>{thought}</think>{answer}"))
    for mode, want in (("think", thought), ("answer", "")):
        completion = encoder.sample(record, mode).tokens[len(encoder.prompt(record, mode)) :].tolist()
        thought_ids, said = encoder.split(completion, thinking=mode == "think")
        assert (encoder.decode(thought_ids), said) == (want, answer.strip())


def test_a_thought_that_is_not_closed_leaves_no_answer(encoder, spelled):
    assert encoder.split(spelled("1+1=2", "<|end|>"), thinking=True) == (spelled("1+1=2"), "")
    assert encoder.split([], thinking=True) == ([], "")
    assert encoder.split([], thinking=False) == ([], "")


def test_tokens_that_have_no_place_in_an_answer_stay_visible(encoder, spelled):
    assert encoder.split(spelled("3", "<|image|>", "<|end|>"), thinking=False)[1] == "3<|image|>"


@pytest.fixture
def load(digits, tmp_path):
    """load(change, vocabulary=320): the encoder of the digits' tokenizer after change(tokenizer), through a file."""

    def make(change=lambda tokenizer: None, vocabulary=320):
        tokenizer = Tokenizer.from_file(str(digits / "tokenizer.json"))
        changed = change(tokenizer) or tokenizer
        changed.save(str(tmp_path / "tokenizer.json"))
        return ChatEncoder.load(tmp_path / "tokenizer.json", SHAPE, vocabulary, ImageLimits())

    return make


def test_special_tokens_that_are_missing_are_named(load):
    with pytest.raises(UserError, match=r"has no <\|system\|>, .*</think>; add them"):
        load(lambda tokenizer: Tokenizer(models.BPE()))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(load):
    size = load().tokenizer.get_vocab_size()
    assert load(vocabulary=size).ids["<|system|>"] == 0
    with pytest.raises(UserError, match=rf"{size} tokens; set model\.language\.vocabulary \(now {size - 1}\)"):
        load(vocabulary=size - 1)


def test_ids_count_not_tokens(load):
    """A pruned vocabulary has gaps: fewer tokens than its largest id."""

    def with_gap(tokenizer):
        content = json.loads(tokenizer.to_str())
        content["model"]["vocab"]["~~"] = 500
        return Tokenizer.from_str(json.dumps(content))

    with pytest.raises(UserError, match="501"):
        load(with_gap, vocabulary=330)


def test_a_tokenizer_that_would_truncate_or_pad_does_neither(load):
    def careless(tokenizer):
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=16)

    encoder = load(careless)
    assert encoder.decode(encoder.text("1,2,3,4,5")) == "1,2,3,4,5"


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        ChatEncoder.load(tmp_path / "gone.json", SHAPE, 320, ImageLimits())
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"broken\.json cannot be read"):
        ChatEncoder.load(tmp_path / "broken.json", SHAPE, 320, ImageLimits())


def test_a_text_is_learned_whole_but_for_its_images(encoder, spelled):
    document = encoder.sample(_record(("text", "<image>black, <image>white"), images=[BLACK, WHITE]), "think")
    image = ["<|image|>"] * 4
    assert document.tokens.tolist() == spelled(*image, "black, ", *image, "white", "<|end|>")
    assert _learned(document) == spelled("black, ", "white", "<|end|>")
    with pytest.raises(BadRecord, match="no question"):
        encoder.prompt(_record(("text", "x")), "answer")


def test_an_image_takes_the_rows_of_its_tiles(encoder):
    wide = ChatEncoder(encoder.tokenizer, ImageShape(8, 4, TilingConfig(max_rows=2, max_columns=3)))
    buffer = io.BytesIO()
    PIL_Image.new("L", (24, 16), 90).save(buffer, "PNG")
    record = _record(("user", "<image>and<image>"), ("assistant", "x"), images=[Image(buffer.getvalue(), None), BLACK])
    draft = wide.draft(record, "answer")
    document = draft.decode(8, wide.limits)
    assert draft.num_tiles == len(document.tiles) == 7 + 1
    assert (document.spans[:, 1] - document.spans[:, 0]).tolist() == [28, 4]
    assert len(document.image_index) == 4 * 8
    batch = pack([document], len(document))
    low, high = document.spans[0]
    assert set(batch.kv_end[low:high].tolist()) == {high}
