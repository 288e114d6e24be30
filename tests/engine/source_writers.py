"""Writes records in each kind of source, by the libraries that users write them with. A written record is a form with its texts and
images; ``as_read`` is what a source makes of it."""

import base64
import gzip
import io
import json
import tarfile
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class Written:
    """turns: (role, text before its images, number of images, text after them); a text or a caption is one turn of the role text."""

    form: str
    turns: tuple[tuple[str, str, int, str], ...]
    images: tuple[bytes, ...]


def as_read(written):
    """(messages, bytes of the images)."""
    return tuple((role, f"{before}{'<image>' * count}{after}") for role, before, count, after in written.turns), written.images


def row(written, images):
    """The record as a row. images: what stands for each image beside it."""
    texts = [f"{before}{'<image>' * count}{after}" for _, before, count, after in written.turns]
    if written.form == "text":
        return {"text": texts[0], "images": images}
    if written.form == "caption":
        return {"caption": written.turns[0][3], "image": images[0]}
    if written.form == "conversations":
        said = [{"from": ROLES[turn[0]], "value": text} for turn, text in zip(written.turns, texts, strict=True)]
        return {"conversations": said, "images": images}
    if written.form == "parts":
        return {"messages": [{"role": turn[0], "content": _parts(turn)} for turn in written.turns], "images": images}
    said = [{"role": turn[0], "content": text} for turn, text in zip(written.turns, texts, strict=True)]
    return {"messages": said, "images": images}


def _parts(turn):
    _, before, count, after = turn
    return [{"type": "text", "text": before}, *[{"type": "image", "text": None}] * count, {"type": "text", "text": after}]


def put(path, content):
    with fsspec.open(path, "wb") as file:
        file.write(content)


def write_parquet(folder, records):
    """Two files, of several row groups."""
    rows = [row(r, [{"bytes": image, "path": None} for image in r.images]) for r in records]
    for name, part in (("a", rows[: len(rows) // 2 + 1]), ("b", rows[len(rows) // 2 + 1 :])):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part, schema=pa.Table.from_pylist(rows).schema), buffer, row_group_size=2)
        put(f"{folder}/{name}.parquet", buffer.getvalue())
    return folder


def _json_rows(folder, records):
    """Images are files beside, and every second one a data: URL."""
    for number, record in enumerate(records):
        images = []
        for at, image in enumerate(record.images):
            name = f"picture {number}.{at}.png"
            put(f"{folder}/{name}", image)
            images.append(name if at % 2 == 0 else f"data:image/png;base64,{base64.b64encode(image).decode()}")
        yield row(record, images)


def write_json_lines(folder, records, ending=".jsonl", pack=lambda content: content):
    """A file, with a blank line between two records, and none at its end."""
    lines = [json.dumps(found, ensure_ascii=number % 2 == 0) for number, found in enumerate(_json_rows(folder, records))]
    put(f"{folder}/records{ending}", pack("\n \r\n".join(lines).encode()))
    return f"{folder}/records{ending}"


def write_json_lines_gz(folder, records):
    return write_json_lines(folder, records, ".jsonl.gz", gzip.compress)


def write_json_lines_zst(folder, records):
    return write_json_lines(folder, records, ".json.zst", lambda content: pa.compress(content, "zstd", asbytes=True))


def write_json_array(folder, records):
    put(f"{folder}/records.json", json.dumps(list(_json_rows(folder, records)), indent=1).encode())
    return f"{folder}/records.json"


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(folder, records):
    """Two tars; texts and captions are members .txt, in others the JSON names the images or leaves them to the sample."""
    half = len(records) // 2 + 1
    for name, part in (("0", records[:half]), ("1", records[half:])):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, record in enumerate(part):
                _add_sample(tar, f"./{name}/{number:05}", record, names_images=number % 2 == 0)
        put(f"{folder}/{name}.tar", buffer.getvalue())
    return f"{folder}/*.tar"


def _add_sample(tar, key, record, names_images):
    endings = [f"{at}.png" for at in range(len(record.images))]
    for ending, image in zip(endings, record.images, strict=True):
        add(tar, f"{key}.{ending}", image)
    found = row(record, endings)
    if record.form in ("text", "caption"):
        add(tar, f"{key}.txt", found[record.form].encode())
        add(tar, f"{key}.json", json.dumps({"url": "https://elsewhere", "caption": "metadata"}).encode())
        return
    if not names_images:
        del found["images"]
    add(tar, f"{key}.json", json.dumps(found).encode())


def write_saved_dataset(folder, records):
    import datasets

    rows = [row(r, [{"bytes": image, "path": None} for image in r.images]) for r in records]
    datasets.Dataset.from_list(rows).save_to_disk(f"{folder}/saved", num_proc=None)
    return f"{folder}/saved"


WRITERS = {
    "parquet": write_parquet, "json lines": write_json_lines, "json lines, gzip": write_json_lines_gz,
    "json lines, zstd": write_json_lines_zst, "json array": write_json_array, "tars": write_tars, "saved dataset": write_saved_dataset,
}  # fmt: skip
