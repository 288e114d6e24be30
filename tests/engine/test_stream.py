"""The order of training: a pure function of (seed, index), with the shares that the config asks for."""

import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalt.engine.config import load_config
from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.images import ImageLimits
from smalt.engine.data.mixture import fixed_mix
from smalt.engine.data.reading import Reader, SkippedSample
from smalt.engine.data.sources import open_source, open_sources
from smalt.engine.data.stream import Presentation, SampleStream, stream_documents
from smalt.engine.stage import stage_stream
from smalt.engine.trainer import open_data
from smalt.model.tiling import ImageShape

ALWAYS_THINK = Presentation(think=1.0, truncate=0.0)


@pytest.fixture(scope="module")
def encoder(digits):
    return ChatEncoder.load(digits / "tokenizer.json", ImageShape(8, 4), 320, ImageLimits())


@pytest.fixture(scope="module")
def make_stream(digits, encoder):
    """make_stream(mixture, presentation=ALWAYS_THINK, seed=0): a stream over freshly opened digits."""

    def make(mixture, presentation=ALWAYS_THINK, seed=0):
        sources = open_sources({task: digits / "train" / f"{task}.parquet" for task in ("read", "sum")})
        return Stream(sources, mixture, encoder, presentation, seed)

    return make


class Stream:
    """A stream whose records are read at once."""

    def __init__(self, sources, mixture, encoder, presentation=ALWAYS_THINK, seed=0):
        mix = fixed_mix(mixture)
        self.draws = SampleStream({name: len(sources[name]) for name in mix.weights}, presentation, seed)
        self.draws.change(0, mix)
        self.reader = Reader(sources, encoder)

    def __getitem__(self, index):
        return self.reader.read(self.draws[index])


def _shown(item):
    return item.source, item.record, item.tokens.tolist(), item.targets.tolist(), item.tiles.tobytes()


def _write(path, rows, name="text"):
    messages = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in rows]
    pq.write_table(pa.table({"messages": messages}), path)
    return open_source(name, path)


def test_a_sample_depends_on_nothing_but_seed_and_index(make_stream):
    mixture, presentation = {"read": 0.4, "sum": 0.6}, Presentation(0.5, 0.5)
    first, second = make_stream(mixture, presentation), make_stream(mixture, presentation)
    indices = [*range(60), 500, 501, 12_345, 10**9]
    forward = {i: _shown(first[i]) for i in indices}
    random.Random(0).shuffle(indices)
    assert {i: _shown(second[i]) for i in indices} == forward
    assert {i: _shown(first[i]) for i in indices} == forward


def test_seeds_differ(make_stream):
    orders = [[make_stream({"read": 1.0}, seed=seed)[i].record for i in range(20)] for seed in (0, 1, 1000)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_sources_come_in_the_shares_of_the_mixture(make_stream):
    stream = make_stream({"read": 1.0, "sum": 3.0})  # weights need not sum to 1
    counts = Counter(stream[i].source for i in range(400))
    assert counts == {"read": pytest.approx(100, abs=2), "sum": pytest.approx(300, abs=2)}
    assert {stream[i].source for i in range(10)} == {"read", "sum"}


def test_every_epoch_has_each_record_once_in_an_order_of_its_own(encoder, tmp_path):
    rows = [(str(i), "x") for i in range(50)]
    sources = {name: _write(tmp_path / f"{name}.parquet", rows, name) for name in ("a", "b")}
    stream = Stream(sources, {"a": 0.5, "b": 0.5}, encoder, ALWAYS_THINK, seed=0)
    records = [[s.record for s in map(stream.__getitem__, range(300)) if s.source == name] for name in sources]
    epochs = [order[low : low + 50] for order in records for low in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(50)]))) == 7


def test_a_source_of_weight_zero_is_as_if_it_were_not_there(make_stream):
    with_zero, without = make_stream({"sum": 0.0, "read": 2.0}), make_stream({"read": 1.0})
    assert [_shown(with_zero[i]) for i in range(30)] == [_shown(without[i]) for i in range(30)]


def _modes(stream, encoder, count):
    """How many samples are in answer mode, in think mode, and in think mode with a thought that was cut."""
    modes = Counter()
    for document in map(stream.__getitem__, range(count)):
        tokens = document.tokens.tolist()
        if encoder.ids["<|think|>"] not in tokens:
            modes["answer"] += 1
        else:
            closed = document.targets[tokens.index(encoder.ids["</think>"])]
            modes["think" if closed else "cut"] += 1
    return modes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("think", "truncate", "want"),
    [
        (0.0, 1.0, {"answer": 600}),
        (1.0, 0.0, {"think": 600}),
        (1.0, 1.0, {"cut": 600}),
        (0.5, 0.4, {"answer": 300, "think": 180, "cut": 120}),
    ],
)
def test_modes_come_in_the_shares_asked_for(make_stream, encoder, think, truncate, want):
    modes = _modes(make_stream({"sum": 1.0}, Presentation(think, truncate)), encoder, 600)
    assert modes == {mode: n if len(want) == 1 else pytest.approx(n, abs=45) for mode, n in want.items()}


def test_a_record_is_not_always_shown_in_the_same_way(encoder, tmp_path):
    records = _write(tmp_path / "text.parquet", [("1+1", "<think>one and one</think>2")] * 20)
    stream = Stream({"text": records}, {"text": 1.0}, encoder, Presentation(0.7, 0.7), seed=0)
    lengths = {}
    for document in map(stream.__getitem__, range(160)):
        lengths.setdefault(document.record, set()).add(len(document))
    assert len(lengths) == 20
    assert min(map(len, lengths.values())) >= 2


@pytest.mark.slow
def test_thoughts_are_cut_at_every_length_however_few_are_cut(make_stream, encoder):
    stream, kept = make_stream({"sum": 1.0}, Presentation(1.0, 0.3)), set()
    for document in map(stream.__getitem__, range(800)):
        tokens = document.tokens.tolist()
        close = tokens.index(encoder.ids["</think>"])
        if not document.targets[close]:
            kept.add(close - tokens.index(encoder.ids["<think>"]) - 1)
    assert set(range(12)) <= kept


@pytest.mark.slow
def test_one_cut_in_ten_leaves_nothing_and_the_others_a_uniform_share(encoder, tmp_path):
    records = _write(tmp_path / "long.parquet", [("1+1", "<think>" + "1" * 200 + "</think>2")])
    stream = Stream({"long": records}, {"long": 1.0}, encoder, Presentation(1.0, 1.0), seed=0)
    kept = []
    for document in map(stream.__getitem__, range(2000)):
        tokens = document.tokens.tolist()
        kept.append(tokens.index(encoder.ids["</think>"]) - tokens.index(encoder.ids["<think>"]) - 1)
    # 0.1 + 0.9 / 200, within five standard deviations; of the others the middle and the quarters of 200.
    assert abs(kept.count(0) / 2000 - 0.1045) < 0.035
    others = sorted(k for k in kept if k)
    for quarter in (0.25, 0.5, 0.75):
        assert abs(others[int(quarter * len(others))] - quarter * 200) < 12


def test_a_bad_record_is_named(encoder, tmp_path):
    records = _write(tmp_path / "text.parquet", [("1+1", "2"), ("<image>", "x"), ("2+2", "4")])
    stream = Stream({"text": records}, {"text": 1.0}, encoder, ALWAYS_THINK, seed=0)
    epoch = [stream[i] for i in range(3)]
    (bad,) = [item for item in epoch if isinstance(item, SkippedSample)]
    assert (bad.source, bad.record, bad.cause) == ("text", 1, "placeholder mismatch")
    assert bad.detail == "1 <image> in the messages, 0 images"
    assert {item.record for item in epoch} == {0, 1, 2}
    usable = [item.record for item in map(stream.__getitem__, range(9)) if not isinstance(item, SkippedSample)]
    assert [document.record for document in stream_documents(stream.draws, stream.reader, 6)] == usable


def test_stages_differ_in_order_and_follow_their_config(tiny_config, encoder):
    stage = {"stages.align.think": 0.0, "stages.sft.think": 1.0, "stages.sft.truncate": 0.0, "stages.sft.mixture": {"read": 1.0}}
    config = load_config(tiny_config(stage))
    data = open_data(config)
    align, sft = (Stream(data.sources, config.stages[name].mixture, encoder) for name in ("align", "sft"))
    align.draws, sft.draws = (stage_stream(config, name, data) for name in ("align", "sft"))
    assert [align[i].record for i in range(20)] != [sft[i].record for i in range(20)]
    assert _modes(align, encoder, 20) == {"answer": 20}
    assert _modes(sft, encoder, 20) == {"think": 20}
