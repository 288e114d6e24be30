"""An export is the checkpoint's weights, bit for bit, whatever layout of processes wrote them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from smalt.engine.checkpoints import CheckpointWriter, latest_checkpoint, load_tensors
from smalt.engine.config import parse_config
from smalt.engine.errors import UserError
from smalt.engine.export import export_run
from smalt.engine.export_gguf import export_gguf
from smalt.engine.inference import load_run
from smalt.engine.lineage import tokenizer_hash
from smalt.engine.run_folder import read_config
from smalt.engine.tensor_files import write_tensors
from smalt.model import ModelConfig, build_model
from smalt.parallel import alone

ROOT = Path(__file__).resolve().parents[2]


def save(run, tensors, config, steps=(3,), state=()):
    def failed(message):
        raise UserError(message)

    saving = CheckpointWriter(run / "checkpoints", 5, alone(torch.device("cpu")), failed)
    for step in steps:
        saving.save(step, {name: t + step for name, t in tensors.items()}, {"model": config.model.model_dump(), **dict(state)})
    saving.wait()


def weights(config):
    """A model's weights under the names that a checkpoint has."""
    return {f"model.{name}": p.data for name, p in build_model(config.model, 1).named_parameters()}


@pytest.fixture
def make_run(tmp_path, tiny_values):
    """make_run(changes={}, change=..., steps=(3,), state={}): a run with checkpoints of random weights.

    change(tensors) alters what is saved; state: more of what a checkpoint says."""

    def make(changes=(), change=lambda tensors: None, steps=(3,), state=()):
        config = parse_config(tiny_values(changes), "test")
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text(config.model_dump_json())
        tensors = {**weights(config), "optimizer.exp_avg.language.norm.weight": torch.zeros(32), "random_state.0": torch.zeros(9)}
        change(tensors)
        save(run, tensors, config, steps, state)
        return run

    return make


def exported(out):
    """Every tensor by name; the index must be right."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    found = {}
    for file in files:
        of_file = load_file(file)
        assert not found.keys() & of_file.keys()
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(of_file)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= of_file
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def checkpointed(run):
    """The weights of the newest checkpoint, read by torch.distributed.checkpoint into a model."""
    model = build_model(read_config(run).model, 0)
    load_tensors(latest_checkpoint(run / "checkpoints"), {f"model.{name}": p.data for name, p in model.named_parameters()})
    return {name: p.data for name, p in model.named_parameters()}


def assert_same_bits(found, want, dtype=torch.float32):
    assert found.keys() == want.keys()
    assert {t.dtype for t in found.values()} == {dtype}
    assert not [name for name, t in want.items() if not torch.equal(found[name], t.to(dtype))]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_of_a_run_on_one_and_on_two_processes(tiny_config, tmp_path, train, nproc):
    run, out = tmp_path / "run", tmp_path / "out"
    train([tiny_config(), "--folder", run], nproc=nproc)
    command = [sys.executable, "-m", "smalt.engine.cli", "export", "--run", run, "--out", out, "--format", "smalt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((run / "checkpoints" / "step-00000007").glob("*.safetensors"))) == nproc
    found, config = exported(out), read_config(run)
    assert f"{out}: {len(found)} tensors of step 7, {sum(t.nbytes for t in found.values()):,} bytes in 1 file\n" == done.stdout
    assert_same_bits(found, checkpointed(run))
    assert ModelConfig.model_validate_json((out / "config.json").read_text()) == config.model
    assert (out / "tokenizer.json").read_bytes() == config.data.tokenizer.read_bytes()


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_written_once(make_run, tmp_path, tie):
    run = make_run({"model.language.tie_embeddings": tie})
    export_run(run, tmp_path / "out", form="smalt")
    found = exported(tmp_path / "out")
    assert_same_bits(found, checkpointed(run))
    assert ("language.head.weight" in found) is not tie
    assert json.loads((tmp_path / "out" / "config.json").read_text())["language"]["tie_embeddings"] is tie


def test_files_hold_no_more_than_asked(make_run, tmp_path):
    run, limit = make_run(), 20_000
    done = export_run(run, tmp_path / "out", shard_size=limit / 1e9, form="smalt")
    found = exported(tmp_path / "out")
    assert_same_bits(found, checkpointed(run))
    assert len(done.files) > 3
    for file in done.files:
        held = load_file(tmp_path / "out" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
    # The embedding is larger than a file may be: it has one to itself.
    assert max(t.nbytes for t in found.values()) > limit


def test_dtype_and_step(make_run, tmp_path):
    run = make_run(steps=(1, 2, 3))
    export_run(run, tmp_path / "bf16", dtype="bfloat16", form="smalt")
    assert_same_bits(exported(tmp_path / "bf16"), checkpointed(run), torch.bfloat16)
    export_run(run, tmp_path / "first", step=1, form="smalt")
    first = {name: t - 2 for name, t in checkpointed(run).items()}
    assert not [n for n, t in exported(tmp_path / "first").items() if (t - first[n]).abs().max() > 1e-5]
    with pytest.raises(UserError, match="no checkpoint of step 9; the steps are 1, 2, 3"):
        export_run(run, tmp_path / "out", step=9)


def test_a_damaged_checkpoint_is_passed_over_and_not_renamed(make_run, tmp_path, capfd):
    run = make_run(steps=(1, 2))
    shard = run / "checkpoints" / "step-00000002" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert export_run(run, tmp_path / "out", form="smalt").checkpoint.step == 1
    said = capfd.readouterr().err
    assert f"checkpoint {shard.parent} is damaged" in said
    assert "step 1 is used instead" in said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_float64_stays_what_it_is(make_run, tmp_path):
    run = make_run(change=lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}))
    export_run(run, tmp_path / "out", form="smalt")
    assert {t.dtype for t in exported(tmp_path / "out").values()} == {torch.float64}


def test_every_tensor_is_accounted_for(make_run, tmp_path):
    def change(tensors):
        del tensors["model.language.norm.weight"]
        tensors["model.language.extra.weight"] = torch.zeros(3)
        tensors["model.vision.norm.bias"] = torch.zeros(17)

    with pytest.raises(UserError) as refused:
        export_run(make_run(change=change), tmp_path / "out")
    said = str(refused.value)
    assert "missing: language.norm.weight" in said
    assert "unexpected: language.extra.weight" in said
    assert "of another shape: vision.norm.bias is [17] in the checkpoint, [16] in the model" in said
    assert len(said.splitlines()) == 4
    assert not (tmp_path / "out").exists()


def test_a_tensor_with_a_hole_is_refused(make_run, tmp_path):
    run = make_run()
    # As if the shard of the process in the middle had never been: the first and last rows are there.
    (checkpoint,) = (run / "checkpoints").iterdir()
    shard = checkpoint / "shard-00000.safetensors"
    # load_file maps the file, which is written anew below.
    raw = {name: t.clone() for name, t in load_file(shard).items()}
    embedding = raw.pop("model.language.embedding.weight")

    def write(name, tensors, offsets):
        pieces = {key: {"saved_offsets": offsets.get(key, [0] * t.ndim)} for key, t in tensors.items()}
        layout = {key: (t.dtype, t.shape) for key, t in tensors.items()}
        write_tensors(checkpoint / name, layout, tensors.__getitem__, {"DCP_SHARDING_INFO": json.dumps(pieces)})

    key = "model.language.embedding.weight"
    write(shard.name, {**raw, key: embedding[:100]}, {})
    write("shard-00001.safetensors", {key: embedding[200:].contiguous()}, {key: [200, 0]})
    # Without checksums, as those of an older version: nothing else would see it.
    (checkpoint / "checksums.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["format"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"incomplete: language\.embedding\.weight"):
        export_run(run, tmp_path / "out", form="smalt")


def test_what_is_in_the_way_is_named(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(UserError, match="out is there already"):
        export_run(run, out)
    (out / "file").unlink()
    with pytest.raises(UserError, match="above 0"):
        export_run(run, out, shard_size=0)
    shard = next((run / "checkpoints").glob("*/*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is damaged: shard-00000"):
        export_run(run, out, step=3)
    shard.write_bytes(whole)
    config = json.loads((run / "config.json").read_text())
    config["data"]["tokenizer"] = "nowhere.json"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer of .*run cannot be read.*nowhere\.json"):
        export_run(run, out)
    assert list(out.iterdir()) == []
    assert not out.with_name("out.partial").exists()


def test_another_tokenizer_than_that_of_the_training_is_refused(make_run, digits, tmp_path):
    run = make_run(state={"lineage": {"tokenizer": tokenizer_hash(digits / "tokenizer.json")}})
    export_run(run, tmp_path / "out")
    other = json.loads((digits / "tokenizer.json").read_text())
    other["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(other))
    config = json.loads((run / "config.json").read_text())
    config["data"]["tokenizer"] = str(tmp_path / "other.json")
    (run / "config.json").write_text(json.dumps(config))
    for export in (export_run, export_gguf):
        with pytest.raises(UserError, match=r"step-00000003 was trained with another tokenizer than data.tokenizer = .*other\.json"):
            export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        load_run(run)


def test_a_full_disk_leaves_nothing(make_run, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    run, disk = make_run(), tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(UserError, match="No space left on device"):
            export_run(run, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


MEMORY = """
import sys
from pathlib import Path
from smalt.engine import export
from smalt.engine.stored_weights import StoredWeights
def anonymous():
    return sum(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")) / 1024
before, peak, tensor = anonymous(), 0.0, StoredWeights.tensor
def watched(self, name):
    global peak
    whole = tensor(self, name)
    peak = max(peak, anonymous())
    return whole
StoredWeights.tensor = watched
done = export.export_run(Path(sys.argv[1]), Path(sys.argv[2]), form="smalt")
print(done.size / 2**20, peak - before)
"""


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(make_run, tmp_path):
    # 24 blocks with three matrices of 2 MiB each. What is mapped from the checkpoint is the kernel's to drop, and not counted.
    run = make_run({"model.language.num_layers": 24, "model.language.ffn": 16_384})
    done = subprocess.run([sys.executable, "-c", MEMORY, run, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size > 140
    assert grown < 40
