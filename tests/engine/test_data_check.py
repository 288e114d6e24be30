"""smalt data check: what it says of a source is what is in it."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image as PIL_Image
from tokenizers import Tokenizer

from smalt.engine.cli_data import check
from smalt.engine.config import load_config
from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.check import check_sources, contact_sheet, stage_shares
from smalt.engine.data.reading import Reader
from smalt.engine.data.sources import open_sources
from smalt.engine.data.stream import Mix, Presentation, SampleStream
from smalt.engine.trainer import open_encoder
from smalt.model import Document, TilingConfig
from smalt.model.tiling import ImageShape


def _png(width, height):
    buffer = io.BytesIO()
    PIL_Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """12 records, of which one has no image file, one is cut off, and one is no conversation."""
    lines = []
    for i in range(12):
        width = 24 if i % 2 else 8
        (tmp_path / f"{i}.png").write_bytes(_png(width, 8)[: 50 if i == 7 else None])
        messages = [{"role": "user", "content": "<image>" + "1" * i}, {"role": "assistant", "content": "2"}]
        lines.append({"messages": messages if i != 3 else [{"role": "nobody", "content": "x"}], "images": [f"{i}.png"]})
    (tmp_path / "5.png").unlink()
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def encoder(digits):
    return ChatEncoder(Tokenizer.from_file(str(digits / "tokenizer.json")), ImageShape(8, 4, TilingConfig(max_rows=2, max_columns=3)))


def test_counts_lengths_tiles_and_causes_are_those_of_the_records(source, encoder):
    (report,) = check_sources(open_sources({"mine": str(source)}), encoder, limit=None, num_workers=0, num_shown=2)
    assert (report.records, report.looked_at) == (12, 12)
    assert report.bad == {"missing image": 1, "corrupt image": 1, "malformed message": 1}
    assert {cause: example.record for cause, example in report.examples.items()} == {
        "missing image": 5, "corrupt image": 7, "malformed message": 3,
    }  # fmt: skip
    good = [i for i in range(12) if i not in (3, 5, 7)]
    assert report.tiles == [4 if i % 2 else 1 for i in good]
    assert report.lengths == [len(encoder.sample(open_sources({"m": str(source)})["m"][i], "think")) for i in good]
    assert [document.record for document in report.shown] == [0, 1]


def test_fewer_records_are_spread_over_the_source(source, encoder):
    (report,) = check_sources(open_sources({"mine": str(source)}), encoder, limit=4, num_workers=0, num_shown=9)
    assert report.looked_at == 4
    assert [document.record for document in report.shown] == [0, 6, 9]


def test_the_sheet_shows_every_tile(source, encoder, tmp_path):
    reports = check_sources(open_sources({"mine": str(source)}), encoder, limit=None, num_workers=0, num_shown=2)
    assert contact_sheet(reports, encoder, tmp_path / "sheet.png") == 1 + 4
    pixels = np.asarray(PIL_Image.open(tmp_path / "sheet.png"))
    red = (np.abs(pixels.astype(int) - (200, 30, 30)).max(-1) <= 1).sum()
    # One tile that the picture fills, a thumbnail of which it fills a third, three tiles that it fills.
    assert red / 48**2 == pytest.approx(1 + 3 / 8 + 3, abs=0.1)
    assert contact_sheet([], encoder, tmp_path / "none.png") == 0
    assert not (tmp_path / "none.png").exists()


def test_what_a_stage_takes_adds_up(tiny_config):
    config = load_config(tiny_config())
    from smalt.engine.trainer import open_data

    data = open_data(config)
    reports = check_sources(data.sources, data.encoder, limit=100, num_workers=0, num_shown=0)
    means = {report.name: np.mean(report.lengths) for report in reports}
    for name, stage in config.stages.items():
        shares = [share for share in stage_shares(config, reports) if share.stage == name]
        assert sum(share.tokens for share in shares) == pytest.approx(stage.steps * 2 * stage.sequence_length)
        assert sum(share.share for share in shares) == pytest.approx(1)
        assert all(share.tokens == pytest.approx(share.epochs * 200 * means[share.source]) for share in shares)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [{}, {"half": 1.0}, {"half": 1.0, "whole": 2.0}])
def test_what_a_stage_takes_is_what_its_stream_has(epochs, tiny_config, tmp_path):
    """Of bad records and of a source that is used up too."""
    good = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("half", "whole")}
    paths["half"].write_text("".join(json.dumps(row) + "\n" for row in [good, {"messages": []}] * 50))
    paths["whole"].write_text((json.dumps(good) + "\n") * 100)
    changes = {
        "stages.align": None, "stages.sft.mixture": {"half": 0.5, "whole": 0.5}, "stages.sft.epochs": epochs, "data.sources": paths,
        "data.validation": {}, "stages.sft.steps": 60,
    }  # fmt: skip
    config = load_config(tiny_config(changes))
    sources, encoder = open_sources(paths), open_encoder(config)
    shares = {s.source: s for s in stage_shares(config, check_sources(sources, encoder, limit=None, num_workers=0, num_shown=0))}
    stream = SampleStream(dict.fromkeys(paths, 100), Presentation(1.0, 0.0), 0)
    stream.change(0, Mix(dict.fromkeys(paths, 1), {name: int(100 * number) for name, number in epochs.items()}))
    reader, tokens, drawn = Reader(sources, encoder), Counter(), Counter()
    wanted = 60 * config.packs_of("sft") * config.stages["sft"].sequence_length
    for sample in stream.available(range(4000)):
        if tokens.total() >= wanted:
            break
        found = reader.read(stream[sample])
        drawn[stream[sample].source] += 1
        tokens[stream[sample].source] += len(found) if isinstance(found, Document) else 0
    for name, share in shares.items():
        assert share.tokens == pytest.approx(tokens[name], rel=0.05)
        assert share.epochs == pytest.approx(drawn[name] / 100, rel=0.05)
        assert share.share == pytest.approx(drawn[name] / drawn.total(), rel=0.05)
        assert share.enough == pytest.approx(min(1.0, tokens.total() / wanted), rel=0.05)
    assert (share.enough < 1) == (len(epochs) == 2)


@pytest.mark.slow
def test_the_command_prints_it_all(source, tiny_config, tmp_path, capsys):
    check((str(source),), config=tiny_config(), limit=None, show=1, sheet=tmp_path / "sheet.png", workers=1)
    said = capsys.readouterr().out
    assert "bad in mine: 1 x corrupt image; record 7: " in said
    assert "mine, record 0: " in said
    assert "<|user|><|image|> x 4 <|end|><|assistant|><|answer|>2<|end|>" in said
    assert f"{tmp_path / 'sheet.png'}: 1 tiles" in said
    (tmp_path / "other").mkdir()
    other = shutil.copy(source, tmp_path / "other" / source.name)
    check((str(source), str(other)), config=tiny_config(), limit=None, show=0, workers=0)
    said = "".join(capsys.readouterr().out.split())
    assert f"badin{source}:1x" in said, "files of one name are two sources"
    assert f"badin{other}:1x" in said
    check(config=tiny_config(), limit=20, show=0, workers=0)
    assert "What each stage takes" in capsys.readouterr().out
