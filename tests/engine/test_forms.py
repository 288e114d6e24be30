"""The forms of records by example and by property: what is meant is read, what is unclear or leads elsewhere is refused by name."""

import base64
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.data.chat import num_placeholders
from smalt.engine.data.files import follow
from smalt.engine.data.forms import Place, find_form_of_object, read_object, read_record
from smalt.engine.data.records import Image, Part
from smalt.engine.errors import BadRecord

A, B = Image(b"a", None), Image(b"b", None)
DATA_A = f"data:image/png;base64,{base64.b64encode(b'a').decode()}"
DISK = Place("/data")


def _record(row, columns=(), place=DISK):
    columns = dict(columns)
    return read_record(row, find_form_of_object(row, columns), place)


def _parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("row", "text", "images"),
    [
        (_parts({"type": "text", "text": "hi"}), "hi", ()),
        (
            _parts({"type": "image_url", "image_url": {"url": DATA_A, "detail": "x"}}, {"type": "text", "text": "?"}),
            "<image>?",
            (A,),
        ),
        (_parts({"type": "image_url", "image_url": "x/a.png"}), "<image>", (Image(None, "/data/x/a.png"),)),
        (_parts({"type": "image", "url": DATA_A}), "<image>", (A,)),
        (_parts({"type": "image", "path": "a.png"}), "<image>", (Image(None, "/data/a.png"),)),
        (_parts({"type": "image", "image": {"bytes": b"a", "path": None}}), "<image>", (A,)),
        (_parts({"type": "image", "base64": base64.b64encode(b"a").decode(), "text": None}), "<image>", (A,)),
        (_parts({"type": "image", "url": "data:,a%20b"}), "<image>", (Image(b"a b", None),)),
        # Places without an image of their own take those beside the messages, in order.
        ({**_parts({"type": "image"}, {"type": "text", "text": "<image>"}), "images": [b"a", b"b"]}, "<image><image>", (A, B)),
        ({**_parts({"type": "image", "image": b"b"}, {"type": "image"}), "images": [b"a"]}, "<image><image>", (B, A)),
        ({**_parts({"type": "image"}, {"type": "image", "image": b"b"}), "images": [b"a"]}, "<image><image>", (A, B)),
        ({**_parts({"type": "image", "index": 0}, {"type": "image", "index": 1}), "images": [b"a", b"b"]}, "<image><image>", (A, B)),
        # As the template counts placeholders, it also says where they are too few.
        ({**_parts({"type": "text", "text": "hi"}), "images": [b"a"]}, "hi", (A,)),
        ({"conversations": [{"from": "human", "value": "<image>\nhi"}], "image": b"a", "id": 3}, "<image>\nhi", (A,)),
        ({"conversations": [{"role": "user", "content": "hi"}]}, "hi", ()),
        ({"messages": [{"from": "user", "value": "hi"}], "text": None}, "hi", ()),
        ({"text": "hi"}, "hi", ()),
        ({"text": "a cat", "image": b"a"}, "<image>a cat", (A,)),
        ({"text": "a <image> b <image>", "images": [b"a", b"b"]}, "a <image> b <image>", (A, B)),
        ({"caption": "a cat", "image": "a.png", "images": None}, "<image>a cat", (Image(None, "/data/a.png"),)),
    ],
    ids=repr,
)
def test_what_is_meant(row, text, images):
    record = _record(row)
    assert [content for _, content in record.messages] == [text]
    assert record.images == images


def test_speakers_and_texts_become_roles():
    speakers = ("system", "human", "gpt", "user", "assistant", "chatgpt")
    said = _record({"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]})
    assert [role for role, _ in said.messages] == ["system", "user", "assistant", "user", "assistant", "assistant"]
    assert _record({"text": "x"}).messages == (("text", "x"),)
    assert _record({"caption": "x", "image": b"a"}).messages == (("text", "<image>x"),)


@pytest.mark.parametrize(
    ("row", "cause", "named"),
    [
        ({"body": "x", "url": "y"}, "no known form", "there are body, url"),
        ({}, "no known form", "there are nothing"),
        ({"text": "x", "messages": [], "url": 1}, "several forms", "there are text, messages, url"),
        ({"text": "x", "image": b"a", "images": [b"b"]}, "several forms", "images and image are images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "malformed message", "video"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "malformed message", "'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "malformed message", "5"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "text", "content": "x"}]}, "malformed message", "stands alone"),
        ({"messages": [{"role": "text", "content": "x"}] * 2}, "malformed message", "stands alone"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "malformed message", "human"),
        ({"conversations": [{"from": "human", "value": None}]}, "malformed message", "None"),
        ({"conversations": "x"}, "no messages", "empty or missing"),
        ({**_parts({"type": "image", "index": 1}), "images": [b"a", b"b"]}, "malformed message", "its index is 0"),
        ({**_parts({"type": "image", "image": b"a"}, {"type": "image"}), "images": [b"a", b"b"]}, "placeholder mismatch", "1 places"),
        (_parts({"type": "image_url", "image_url": {"detail": "low"}}), "malformed image", "detail"),
        (_parts({"type": "image", "base64": "!"}), "malformed image", "not base64"),
        (_parts({"type": "image", "url": "data:image/png;base64"}), "malformed image", "without data"),
        ({"caption": "x"}, "no image", "'x'"),
        ({"text": ""}, "no text", "''"),
        ({"text": 5}, "no text", "5"),
        ({"text": "x\ud800"}, "malformed text", "surrogates"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "malformed text", "surrogates"),
        ({"text": "x", "image": "http://169.254.0.1/a.png"}, "refused image", "its source is none"),
        (_parts({"type": "image_url", "image_url": {"url": "s3://bucket/a.png"}}), "refused image", "its source is none"),
    ],
    ids=repr,
)
def test_what_is_unclear_is_named(row, cause, named):
    with pytest.raises(BadRecord, match=named) as caught:
        _record(row)
    assert caught.value.cause == cause


def test_named_columns_leave_no_other_form():
    row = {"text": "x", "messages": 5, "dialog": [{"role": "user", "content": "<image>hi"}], "pics": [b"a"], "images": [b"b"]}
    record = _record(row, {"messages": "dialog", "images": "pics"})
    assert (record.messages, record.images) == ((("user", "<image>hi"),), (A,))
    assert _record(row, {"text": "text", "images": "pics"}).messages == (("text", "<image>x"),)
    with pytest.raises(BadRecord, match="needed is exactly one of alt"):
        _record(row, {"caption": "alt"})


def test_the_word_of_a_placeholder_in_what_the_assistant_says_is_text():
    asked = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "Which tag?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "<image>"}]}
    record = _record(row)
    assert [image.path for image in record.images] == ["/data/a.png"]
    assert num_placeholders(record.messages) == 1


def test_names_of_a_tar_are_those_of_its_sample():
    first, second = (Image(None, "t.tar", Part(f"./d/k.{at}.png", at, 1)) for at in range(2))
    place = Place("", (first, second))
    for name in ("./d/k.1.png", "d/k.1.png", "k.1.png", "1.png"):
        assert _record({"text": "x", "image": name}, place=place).images == (second,)
    assert _record({"text": "x"}, place=place).images == (first, second)
    assert _record(_parts({"type": "image", "url": "k.1.png"}), place=place).images == (second,)
    for name in ("/etc/passwd", "../k.1.png", "k.2.png"):
        with pytest.raises(BadRecord, match=r"no image of its sample, which has \./d/k\.0\.png, \./d/k\.1\.png"):
            _record({"text": "x", "image": name}, place=place)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"{", "broken JSON"),
        (b'{"a": 1} x', "broken JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"a": "\xff"}', "unreadable record"),
        ('{"a": "ä"}'.encode("utf-16"), "unreadable record"),
        (b"[1]", "malformed record"),
        (b"null", "malformed record"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_json_object_is_named(data, cause):
    with pytest.raises(BadRecord, match=r"here") as caught:
        read_object(data, "here")
    assert caught.value.cause == cause


@pytest.mark.parametrize(
    ("folder", "path", "found"),
    [
        ("/data", "a.png", "/data/a.png"),
        ("/data", "/else/a.png", "/else/a.png"),
        ("/data", "file:///else/a.png", "/else/a.png"),
        ("", "deep/a.png", "deep/a.png"),
        ("s3://bucket/set", "a.png", "s3://bucket/set/a.png"),
        ("s3://bucket/set", "../pictures/a.png", "s3://bucket/pictures/a.png"),
        ("s3://bucket/set", "s3://other/a.png", "s3://other/a.png"),
        ("https://host/set", "https://host/a.png", "https://host/a.png"),
        ("/data", "https://host/a.png", None),
        ("/data", "HTTP://host/a.png", None),
        ("s3://bucket/set", "gs://bucket/a.png", None),
        ("s3://bucket/set", "/etc/passwd", None),
        ("s3://bucket/set", "file:///etc/passwd", None),
        ("s3://bucket/set", "a.zip::https://host/a.png", None),
        ("https://host/set", "https://inside/a.png", None),
        ("https://host/set", "../../inside/a.png", None),
    ],
)
def test_where_the_paths_of_a_source_lead(folder, path, found):
    if found is not None:
        assert follow(folder, path) == found
        return
    with pytest.raises(ValueError, match=r"it is "):
        follow(folder, path)


@given(path=st.text(st.sampled_from("./:@?#ab\\htps"), max_size=24))
def test_no_path_leads_from_a_host_to_another(path):
    try:
        found = follow("https://host/a/b", path)
    except ValueError:
        return
    assert urlsplit(found)[:2] == ("https", "host")
    assert "::" not in found
