"""Sources to curate, made in a line, and a curation of them in this process."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smalt.engine.data.curation.config import CurationConfig
from smalt.engine.data.curation.curate import curate
from smalt.engine.data.records import Image as StoredImage
from smalt.engine.data.records import Record

_CONTENT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def png(seed, size=(48, 48), form="PNG", scale=1.0):
    """The file of a smooth picture that the seed fixes, whatever its size and form."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(tuple(int(side * scale) for side in size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def record(question, answer="", images=(), number=0, **extra):
    """One question and its answer, with the bytes of images before the question."""
    messages = (("user", "<image>" * len(images) + question), ("assistant", answer))
    return Record(messages, tuple(StoredImage(data, None) for data in images), "test", number, tuple(extra.items()))


def write_source(path, records, columns=()):
    """A Parquet file of records; a record that is a dict is a row as it stands."""
    rows = [r if isinstance(r, dict) else _row(r, columns) for r in records]
    schema = pa.schema([("messages", _CONTENT), ("images", _IMAGES), *((c, pa.string()) for c in columns)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=7)
    return path


def _row(record, columns):
    return {
        "messages": [{"role": role, "content": content} for role, content in record.messages],
        "images": [{"bytes": image.data, "path": image.path} for image in record.images],
        **{name: dict(record.extra).get(name) for name in columns},
    }


def run_steps(folder, sources, steps, **values):
    """Curate sources (paths by name) into folder; returns the report."""
    config = {"output": folder, "sources": {n: str(p) for n, p in sources.items()}, "steps": steps, "processes": 1, "chunk": 5}
    return curate(CurationConfig.model_validate({**config, **values}))


def kept(folder, *names):
    """The (source, record) of all that is kept."""
    tables = [pq.read_table(folder / f"{name}.parquet") for name in names]
    return [(row["source"], row["record"]) for table in tables for row in table.select(["source", "record"]).to_pylist()]


def removed(folder):
    """Each removed record: {(source, record): (step, cause)}."""
    lines = map(json.loads, (folder / "removed.jsonl").read_text().splitlines())
    return {(line["source"], line["record"]): (line["step"], line["cause"]) for line in lines}
