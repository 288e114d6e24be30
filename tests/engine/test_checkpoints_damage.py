"""A checkpoint is trusted only when every byte is the one that was written."""

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from smalt.engine import checkpoints
from smalt.engine.checkpoints import (
    CheckpointWriter,
    checkpoint_before,
    checkpoint_of_step,
    distrust_from,
    holds_checkpoints,
    latest_checkpoint,
    load_tensors,
)
from smalt.engine.errors import UserError
from smalt.parallel import alone

SHARD = "shard-00000.safetensors"


def values(step):
    """The tensors of a step; any mixture of two steps is seen."""
    return {
        "model.a": torch.full((40, 30), float(step)),
        "optimizer.step.a": torch.tensor(float(step)),
        "random_state.0": torch.tensor([step] * 9),
    }


def writer(folder, keep=3):
    def failed(message):
        raise UserError(message)

    return CheckpointWriter(folder, keep, alone(torch.device("cpu")), failed)


def save(folder, steps, keep=3):
    saving = writer(folder, keep)
    for step in steps:
        saving.save(step, values(step), {"note": "ü" * 40})
    saving.wait()


@pytest.fixture
def three(tmp_path):
    """Three whole checkpoints."""
    save(tmp_path / "checkpoints", (1, 2, 3))
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def assert_loads(checkpoint, step):
    assert (checkpoint.step, checkpoint.state["step"], checkpoint.state["note"]) == (step, step, "ü" * 40)
    tensors = {name: torch.full_like(t, -1) for name, t in values(step).items()}
    load_tensors(checkpoint, tensors)
    assert all(torch.equal(tensors[name], t) for name, t in values(step).items())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def header_bit(path):
    # In the words by which DCP knows where a piece belongs.
    return 8 * path.read_bytes().index(b"saved_offsets")


DAMAGES = {
    "shard cut off": (lambda f: truncate(f / SHARD), "shard-00000.safetensors has 5,", "bytes, 5,"),
    "shard grown": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"\0"), "shard-00000.safetensors has 5,"),
    "shard gone": (lambda f: (f / SHARD).unlink(), "shard-00000.safetensors is missing"),
    "shard empty": (lambda f: (f / SHARD).write_bytes(b""), "shard-00000.safetensors has 0 bytes"),
    "bit of a tensor": (lambda f: flip(f / SHARD, 8 * 5000), "shard-00000.safetensors is not what was written: its checksum differs"),
    "bit of DCP's metadata": (lambda f: flip(f / SHARD, header_bit(f / SHARD)), "shard-00000.safetensors is not what was written"),
    "another's shard": (lambda f: shutil.copy(f / SHARD, f / "shard-00001.safetensors"), "shard-00001.safetensors is not of it"),
    "shard of another step": (lambda f: shutil.copy(f.with_name("step-00000002") / SHARD, f / SHARD), "its checksum differs"),
    "state cut off": (lambda f: truncate(f / "state.json"), "state.json has"),
    "state gone": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "bit of the state": (lambda f: flip(f / "state.json", 100), "state.json is not what was written: its checksum differs"),
    "checksums gone": (lambda f: (f / "checksums.json").unlink(), "checksums.json is missing"),
    "checksums cut off": (lambda f: truncate(f / "checksums.json"), "checksums.json cannot be read"),
    "state and checksums gone": (lambda f: [(f / n).unlink() for n in ("state.json", "checksums.json")], "state.json cannot be read"),
    "all gone": (lambda f: [p.unlink() for p in f.iterdir()], "it holds no .safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_is_used(three, kind, capfd):
    damage, *said = DAMAGES[kind]
    newest = three / "step-00000003"
    damage(newest)
    left = {p.name: p.read_bytes() for p in newest.iterdir()}
    assert_loads(latest_checkpoint(three), 2)
    heard = capfd.readouterr().err
    assert f"warning: checkpoint {newest} is damaged: " in heard
    assert not [words for words in said if words not in heard]
    assert "set aside as step-00000003.damaged" in heard
    assert f"step 2 is used instead: {three / 'step-00000002'}" in heard
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
    assert {p.name: p.read_bytes() for p in (three / "step-00000003.damaged").iterdir()} == left
    # The second time there is nothing to say.
    assert latest_checkpoint(three).step == 2
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_no_bit_of_any_file_can_flip_unseen(three):
    newest, kept, draw = three / "step-00000003", three / "kept", random.Random(0)
    shutil.copytree(newest, kept)
    for name in names(kept):
        size = 8 * (kept / name).stat().st_size
        for bit in {0, size - 1, *draw.sample(range(size), 60)}:
            flip(newest / name, bit)
            assert latest_checkpoint(three).step == 2, (name, bit)
            shutil.rmtree(three / "step-00000003.damaged")
            shutil.copytree(kept, newest)
    assert latest_checkpoint(three).step == 3


def test_whole_ones_are_believed_in_silence(three, capfd):
    assert_loads(latest_checkpoint(three), 3)
    assert capfd.readouterr().err == ""
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_file_that_is_none_of_ours_is_left_alone(three):
    (three / "step-00000003" / "notes.txt").write_text("the good one")
    assert latest_checkpoint(three).step == 3


def test_only_when_none_is_left_it_is_an_error(three, capfd):
    for step in (3, 2):
        truncate(three / f"step-0000000{step}" / SHARD)
    assert_loads(latest_checkpoint(three), 1)
    assert capfd.readouterr().err.count("is damaged") == 2
    truncate(three / "step-00000001" / "state.json")
    with pytest.raises(
        UserError, match=r"holds no whole checkpoint, only step-00000001\.damaged, step-00000002\.damaged, step-00000003\.damaged"
    ):
        latest_checkpoint(three)
    assert names(three) == [f"step-0000000{n}.damaged" for n in (1, 2, 3)]


def test_the_damaged_are_neither_counted_nor_removed(three):
    truncate(three / "step-00000003" / SHARD)
    assert latest_checkpoint(three).step == 2
    save(three, (3, 4), keep=2)
    assert names(three) == ["step-00000003", "step-00000003.damaged", "step-00000004"]
    truncate(three / "step-00000003" / SHARD)
    truncate(three / "step-00000004" / SHARD)
    with pytest.raises(UserError):
        latest_checkpoint(three)
    assert names(three) == ["step-00000003.damaged", "step-00000003.damaged-2", "step-00000004.damaged"]


def test_a_folder_that_cannot_be_changed_is_passed_over(tmp_path, capfd):
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        save(folder, (1, 2))
        truncate(folder / "step-00000002" / SHARD)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert_loads(latest_checkpoint(folder), 1)
        assert "it is passed over where it is, for it cannot be renamed" in capfd.readouterr().err
        assert names(folder) == ["step-00000001", "step-00000002"]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_what_a_run_diverged_from_is_set_aside_or_said_to_be_where_it_is(tmp_path, monkeypatch):
    save(tmp_path, (1, 2, 3))
    said = distrust_from(tmp_path, 3)
    assert said == f"{tmp_path / 'step-00000003'} is set aside as step-00000003.diverged; --resume goes on from step-00000002"

    def refuse(path, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    said = distrust_from(tmp_path, 2)
    assert said.startswith(f"{tmp_path / 'step-00000002'} is left where it is, for it cannot be renamed (")
    assert said.endswith("; --resume goes on from step-00000002")


def test_steps_are_ordered_as_numbers(tmp_path):
    save(tmp_path, (99_999_999, 100_000_000))
    assert latest_checkpoint(tmp_path).step == 100_000_000


def test_a_step_is_taken_or_refused_by_name(three):
    assert_loads(checkpoint_of_step(three, 1), 1)
    with pytest.raises(UserError, match=r"holds no checkpoint of step 7; the steps are 1, 2, 3"):
        checkpoint_of_step(three, 7)
    truncate(three / "step-00000001" / SHARD)
    with pytest.raises(UserError, match=r"step-00000001 is damaged: shard-00000\.safetensors has"):
        checkpoint_of_step(three, 1)
    assert "step-00000001" in names(three)


def test_a_reader_renames_nothing(three, capfd):
    for step in (3, 2):
        truncate(three / f"step-0000000{step}" / SHARD)
    for _ in range(2):
        assert_loads(latest_checkpoint(three, set_aside=False), 1)
        said = capfd.readouterr().err
        assert said.count("is damaged: shard-00000.safetensors has") == 2
        assert said.count("it is passed over, and left as it is") == 2
        assert f"step 1 is used instead: {three / 'step-00000001'}" in said
    truncate(three / "step-00000001" / SHARD)
    with pytest.raises(UserError, match="holds no whole checkpoint, only step-00000001, step-00000002, step-00000003"):
        latest_checkpoint(three, set_aside=False)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.fixture
def disk(monkeypatch):
    """disk.fail(path, error): opening the file, or listing the folder, fails; disk.fail_reading: the file opens, and then fails."""

    class Disk:
        def __init__(self):
            self.failing, self.unread = {}, {}

        def fail(self, path, number):
            self.failing[path] = number

        def fail_reading(self, path, number):
            self.unread[path] = number

    disk, opens, lists, sums = Disk(), Path.open, os.scandir, checkpoints.checksum

    def refuse(path, failing, named=True):
        if number := failing.get(Path(path)):
            raise OSError(number, os.strerror(number), *([str(path)] if named else []))

    monkeypatch.setattr(Path, "open", lambda path, *rest, **named: (refuse(path, disk.failing), opens(path, *rest, **named))[1])
    monkeypatch.setattr(os, "scandir", lambda path=".": (refuse(path, disk.failing), lists(path))[1])
    # A read that fails names no file.
    monkeypatch.setattr(checkpoints, "checksum", lambda path: (refuse(path, disk.unread, named=False), sums(path))[1])
    return disk


READERS = {
    "latest": latest_checkpoint,
    "latest, reading": lambda folder: latest_checkpoint(folder, set_aside=False),
    "of a step": lambda folder: checkpoint_of_step(folder, 3),
    "before": lambda folder: checkpoint_before(folder, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", [SHARD, "state.json", "checksums.json"])
def test_what_cannot_be_read_is_not_damaged(three, disk, name, number, reader, capfd):
    disk.fail(three / "step-00000003" / name, number)
    with pytest.raises(UserError) as refused:
        READERS[reader](three)
    assert f"{three / 'step-00000003' / name} cannot be read: {os.strerror(number)}; check the disk, then start again" in str(
        refused.value
    )
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]
    assert "damaged" not in capfd.readouterr().err
    disk.failing.clear()
    assert_loads(READERS[reader](three), 3)


def test_a_read_that_fails_midway_is_not_damage(three, disk):
    disk.fail_reading(three / "step-00000003" / SHARD, errno.EIO)
    with pytest.raises(UserError, match=rf"step-00000003/{SHARD} cannot be read: Input/output error"):
        latest_checkpoint(three)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_folder_that_cannot_be_listed_is_not_empty(three, disk):
    # Else --continue would begin the run anew.
    disk.fail(three, errno.EACCES)
    for look in (holds_checkpoints, latest_checkpoint):
        with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
            look(three)
    assert not holds_checkpoints(three / "nowhere")


@pytest.fixture
def old(tmp_path):
    """Two checkpoints as version 0.2.1 wrote them."""
    for step in (1, 2):
        folder = tmp_path / f"step-0000000{step}"
        dcp.save(values(step), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "note": "ü" * 40}))
    return tmp_path


def test_those_of_an_older_version_load(old, capfd):
    assert_loads(latest_checkpoint(old), 2)
    assert "step-00000002 has no checksums, as those of version 0.2.1" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json"])
def test_those_of_an_older_version_are_refused_when_cut_off(old, name, capfd):
    truncate(old / "step-00000002" / name)
    assert_loads(latest_checkpoint(old), 1)
    assert f"{name} cannot be read" in capfd.readouterr().err
    assert "step-00000002.damaged" in names(old)


def test_those_of_an_older_version_that_cannot_be_read_are_not_damaged(old, disk):
    shard = old / "step-00000002" / "shard-00001-model-00001-of-00001.safetensors"
    disk.fail(shard, errno.EACCES)
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read: Permission denied"):
        latest_checkpoint(old)
    assert "step-00000002" in names(old)


def test_a_rollback_passes_over_damage_and_says_so(three, capsys):
    flip(three / "step-00000002" / "state.json", 9)
    assert checkpoint_before(three, 2).step == 1
    said = capsys.readouterr().err
    assert "step-00000002 is damaged" in said
    assert "step-00000003" not in said
    assert checkpoint_before(three, 0) is None
    assert checkpoint_before(three, 9).step == 3
