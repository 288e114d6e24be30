"""The curriculum: every config of the 3B model fits the one before it and its layout; the digits twin of the whole chain runs."""

import json
from pathlib import Path

import pytest

from smalt.engine.chain import check_links, read_links
from smalt.engine.checkpoints import latest_checkpoint
from smalt.engine.config import load_chain, load_config
from smalt.engine.data import digits_long
from smalt.engine.launch import read_command
from smalt.engine.schedules import learning_rate
from smalt.engine.train import main
from smalt.model import PRESETS, build_model, count_parameters

ROOT = Path(__file__).resolve().parents[2]
RUNS = ["teacher", "prune", "distill", "align", "joint", "reasoning", "long_context", "sft"]


@pytest.mark.parametrize(("kind", "sizes"), [("bluelm_3b", (8, 64)), ("digits", (1, 2))])
def test_every_run_of_the_curriculum_fits_the_one_before_it_and_its_layout(kind, sizes):
    path = ROOT / "configs" / kind / "all.toml"
    links = read_links(read_command([str(path)]), load_chain(path), Path("out"))
    assert [link.name for link in links] == [link.path.stem for link in links] == RUNS
    assert {path.stem for path in path.parent.glob("*.toml")} - {"from_scratch", "all"} == set(RUNS)
    for size in sizes:
        check_links(links, 0, size)


def test_the_runs_of_the_3b_model_have_its_parameters():
    configs = [load_config(ROOT / "configs" / "bluelm_3b" / f"{name}.toml") for name in RUNS[1:]]
    models = {config.model_of(name) for config in configs for name in config.stages}
    assert {model.language.yarn and model.language.yarn.factor for model in models} == {None, 8.0}
    wanted = count_parameters(build_model(PRESETS["bluelm_3b"], 0, "meta"))
    assert 2.8e9 < wanted["total"] < 3.0e9
    for model in models:
        assert count_parameters(build_model(model, 0, "meta")) == wanted


def test_the_learning_rate_of_joint_and_reasoning_is_one_line():
    for kind in ("bluelm_3b", "digits"):
        joint, reasoning = (load_config(ROOT / "configs" / kind / f"{name}.toml") for name in ("joint", "reasoning"))
        last = learning_rate(joint, "joint", joint.stages["joint"].steps - 1)
        assert learning_rate(reasoning, "reasoning", reasoning.stages["reasoning"].warmup_steps) == pytest.approx(last, rel=1e-9)
        falls = [s.learning_rate * (1 - s.final_share) / s.steps for s in (joint.stages["joint"], reasoning.stages["reasoning"])]
        assert falls[1] == pytest.approx(falls[0], rel=0.02)


SHORT = [
    *("--data.workers", "0", "--data.packs_per_step", "2", "--data.validation_documents", "1", "--logging.validate_every", "0"),
    *("--evaluation.questions", "2", "--evaluation.max_tokens", "3", "--checkpoint.every", "2"),
    *("--prune.init.prune.documents", "8", "--teacher.stages.pretrain.steps", "1", "--teacher.stages.train.steps", "1"),
    *("--prune.stages.heal.steps", "2", "--distill.stages.distill.steps", "4", "--align.stages.align.steps", "1"),
    *("--joint.stages.joint.steps", "2", "--reasoning.stages.reasoning.steps", "2"),
    *("--long-context.stages.long_context.steps", "2", "--sft.stages.sft.steps", "2"),
]


@pytest.mark.slow
def test_the_whole_chain_of_the_digits_runs(digits, tmp_path, monkeypatch):
    """As its one command, with shorter runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.setattr(digits_long, "VARIANTS", 1)
    digits_long.write_long_digits(tmp_path / "data" / "digits_long", records=80, questions=4)
    chain = tmp_path / "chain"
    command = [str(ROOT / "configs/digits/all.toml"), "--folder", str(chain), *SHORT]
    assert main([*command, "--dry-run"]) == 0
    assert not chain.exists()
    assert main(command) == 0
    assert json.loads((chain / "chain.json").read_text()) == {"links": RUNS, "ended": RUNS}
    lineage = latest_checkpoint(chain / "sft" / "checkpoints").state["lineage"]
    for name in reversed(RUNS[:-1]):
        assert {"config", "data", "tokenizer"} <= lineage.keys()
        parent = lineage["parents"]["init.run"]
        assert Path(parent["checkpoint"]).parents[1] == chain / name
        lineage = parent["lineage"]
    steps = {name: len((chain / name / "metrics.jsonl").read_text().splitlines()) for name in RUNS}
    assert steps == dict(zip(RUNS, (2, 2, 4, 1, 2, 2, 2, 2), strict=True))
