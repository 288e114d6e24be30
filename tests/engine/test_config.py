"""Configs: what is wrong is named with its file and the nearest right key; every value can be overridden by its dotted name."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from smalt.engine.config import RunConfig, load_chain, load_config, parse_config
from smalt.engine.data.curation.config import load_curation
from smalt.engine.errors import UserError
from smalt.engine.launch import parse_launch
from smalt.engine.sections import StageConfig, TaskConfig
from smalt.model import PRESETS, YarnConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refusal(tiny_config):
    """refusal(changes): the error that the changed config is refused with; it always names the file."""

    def refuse(changes):
        path = tiny_config(changes)
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def overridden(tiny_config, tmp_path):
    """overridden(*arguments): the tiny config as the command line changes it."""
    return lambda *arguments: parse_launch([str(tiny_config()), "--folder", str(tmp_path / "run"), *arguments]).config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sede", "seed"),
        ("optimizer.weight_decai", "optimizer.weight_decay"),
        ("model.vision.widht", "model.vision.width"),
        ("data.window_size", "data.window"),
        ("stages.sft.sequence_lenght", "stages.sft.sequence_length"),
        ("evaluation.budget", "evaluation.budgets"),
        ("model.language.yarn.facto", "model.language.yarn.factor"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(refusal, key, nearest):
    assert f" {key}: unknown key; did you mean {nearest}?" in refusal({key: 1})


def test_an_unknown_key_of_a_task_is_named_with_the_nearest_of_a_task(refusal):
    wrong = "evaluation.tasks.gsm.scorrer: unknown key; did you mean evaluation.tasks.gsm.scorer?"
    assert wrong in refusal({"evaluation.tasks.gsm": {"path": "x", "scorrer": "exact"}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "many"}, ["seed", "integer", "'many'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"stages.sft.steps": 0}, ["stages.sft.steps", "greater than or equal to 1", "given: 0"]),
        ({"stages.sft": 3}, ["stages.sft"]),
        ({"stages": {}}, ["stages is empty"]),
        ({"dtype": "float16"}, ["dtype", "bfloat16", "'float16'"]),
        ({"optimizer.betas": [0.9]}, ["optimizer.betas"]),
        ({"stages.sft.think": 1.5}, ["stages.sft.think", "1.5"]),
        ({"model.vision.tile": 9}, ["model.vision", "tile 9 is not a multiple of patch 2"]),
        ({"data.tokenizer": None}, ["data.tokenizer: missing"]),
        ({"data": None}, ["data: missing"]),
        ({"stages.align.learning_rate": None}, ["stages.align: learning_rate is missing"]),
        ({"preset": "bluelm_4b"}, ["preset 'bluelm_4b' is unknown", "bluelm_3b"]),
        ({"preset": ["bluelm_3b"]}, ["preset ['bluelm_3b'] is unknown"]),
        ({"preset": "bluelm_3b", "model": 3}, ["model"]),
        ({"stages.sft.mixture": {"reed": 1.0}}, ["stages.sft.mixture names reed", "read, sum"]),
        ({"stages.sft.mixture": {"read": -1.0}}, ["stages.sft.mixture.read", "-1.0"]),
        ({"evaluation.budget_tasks": ["largest"]}, ["evaluation.budget_tasks names largest"]),
        ({"stages.sft.mixture": {}}, ["stages.sft: mixture names no source with a weight above 0"]),
        ({"stages.sft.mixture": {"read": 0.0, "sum": 0.0}}, ["stages.sft: mixture names no source with a weight above 0"]),
        ({"stages.sft.trainable": {"visoin": 1.0}}, ["stages.sft", "trainable names visoin", "vision, projector, language"]),
        ({"stages.sft.trainable": {"vision": 0.0}}, ["stages.sft", "no part with a learning rate above 0"]),
        ({"stages.sft.trainable": {"vision": -1.0}}, ["stages.sft.trainable.vision", "-1.0"]),
        ({"logging": {"trace_first": 5, "trace_steps": 4}}, ["trace_first and trace_steps ask for steps 5 to 8; the run ends with 7"]),
        (
            {"parallel": {"pp": 2, "schedule": "zero_bubble"}, "stages.sft.reshard_after_forward": True},
            ["stages.sft with the section parallel", "loses gradients"],
        ),
    ],
    ids=repr,
)
def test_a_wrong_value_is_named(refusal, changes, said):
    message = refusal(changes)
    assert all(part in message for part in said), message


def test_every_finding_is_named_at_once(refusal):
    message = refusal({"sede": 1, "data.tokenizer": None, "stages.sft.steps": "x"})
    assert all(part in message for part in ("sede", "data.tokenizer", "stages.sft.steps"))


def test_one_finding_is_one_line_and_begins_with_what_is_wrong(refusal):
    assert refusal({"stages.sft.mixture": {"reed": 1.0}}).endswith(
        "config.toml: stages.sft.mixture names reed; data.sources has read, sum"
    )


def _numbers(schema, key=""):
    """(dotted key, schema) of every number in a JSON schema."""
    if schema.get("type") in ("integer", "number") and "enum" not in schema:
        yield key, schema
    for name, inner in schema.items():
        for number, part in enumerate(inner if isinstance(inner, list) else [inner]):
            if isinstance(part, dict):
                yield from _numbers(part, f"{key}.{name}{number or ''}")


def test_every_number_has_a_smallest_value():
    found = dict(_numbers(RunConfig.model_json_schema()))
    assert len(found) > 70
    assert [key for key, number in found.items() if not {"minimum", "exclusiveMinimum"} & set(number)] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "key",
    ["optimizer.weight_decay", "stages.align.learning_rate", "stages.sft.mixture.read", "model.init_std", "model.vision.norm_eps",
     "model.language.rope_theta", "parallel.watchdog_seconds", "checkpoint.grace_seconds", "spikes.sigmas"],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused(tiny_values, key, value):
    with pytest.raises(UserError, match=rf"^here: {key}: Input should be a finite number \(given: {value}\)$"):
        parse_config(tiny_values({key: value}), "here")


@pytest.mark.parametrize("content", [b"seed = \n", b"[data\n", b"\xff\xfe\x00PAR1", b"seed = 1\nseed = 2"])
def test_what_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.toml"):
        load_config(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml")
    with pytest.raises(UserError, match=r"Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.toml")), ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_shipped_config_loads(path):
    if path.name.startswith("curate_"):
        assert load_curation(path).steps
    elif (chain := load_chain(path)) is not None:
        assert all((path.parent / link).exists() for link in chain.chain)
    else:
        assert load_config(path).total_steps >= 1


def _sections():
    found = [RunConfig, StageConfig]
    for section in found:
        for info in section.model_fields.values():
            for kind in (info.annotation, *get_args(info.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
                    found.append(kind)
    return found


@pytest.mark.parametrize("section", _sections(), ids=lambda s: s.__name__)
def test_every_value_has_a_description(section):
    assert [name for name, info in section.model_fields.items() if not info.description] == []


def test_a_preset_gives_the_model_and_single_values_can_still_differ(tiny_values):
    config = parse_config(tiny_values({"preset": "bluelm_3b", "model": None}), "here")
    assert config.model == PRESETS["bluelm_3b"]
    config = parse_config(tiny_values({"preset": "bluelm_3b", "model": {"language": {"num_layers": 4}}}), "here")
    assert config.model.language == PRESETS["bluelm_3b"].language.model_copy(update={"num_layers": 4})
    assert config.model.vision == PRESETS["bluelm_3b"].vision


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--seed", "7"], lambda c: c.seed == 7),
        (["--model.language.num-layers", "3"], lambda c: c.model.language.num_layers == 3 and c.model.language.width == 32),
        (["--model.language.qk-norm"], lambda c: c.model.language.qk_norm),
        (["--stages.sft.steps", "9"], lambda c: c.stages["sft"].steps == 9 and c.stages["align"].steps == 3),
        (["--stages.sft.mixture.read", "0.5"], lambda c: c.stages["sft"].mixture == {"read": 0.5, "sum": 0.6}),
        (["--stages.sft.mixture.read", "0.2", "0.6"], lambda c: c.stages["sft"].mixture == {"read": (0.2, 0.6), "sum": 0.6}),
        (["--stages.sft.epochs.sum", "2.5"], lambda c: c.stages["sft"].epochs == {"sum": 2.5}),
        (["--stages.align.mixture.sum=2"], lambda c: c.stages["align"].mixture == {"read": 1.0, "sum": 2.0}),
        (["--stages.align.trainable.vision", "0.1"], lambda c: c.stages["align"].trainable == {"projector": 1.0, "vision": 0.1}),
        (
            ["--data.sources.my_own", "/a", "--stages.sft.mixture.my_own", "3"],
            lambda c: c.data.sources["my_own"] == "/a" and c.stages["sft"].mixture == {"read": 0.4, "sum": 0.6, "my_own": 3.0},
        ),
        (["--data.validation.sum", "/a"], lambda c: [*c.data.validation] == ["read", "sum"]),
        (["--evaluation.sources.new", "/a"], lambda c: c.evaluation.sources["new"] == "/a" and len(c.evaluation.sources) == 3),
        (
            ["--stages.sft.yarn.factor", "8", "--stages.sft.yarn.original_length=64"],
            lambda c: c.stages["sft"].yarn == YarnConfig(factor=8, original_length=64) and c.stages["align"].yarn is None,
        ),
        (
            ["--model.language.yarn.factor=2", "--model.language.yarn.original-length=9"],
            lambda c: c.model.language.yarn == YarnConfig(factor=2, original_length=9),
        ),
        (
            ["--evaluation.tasks.my_own.path", "/a", "--evaluation.tasks.my-own.modes", "think"],
            lambda c: c.evaluation.tasks == {"my_own": TaskConfig(path="/a", modes=["think"])},
        ),
        (["--parallel.fsdp", "None"], lambda c: c.parallel.fsdp is None),
        (["--data.sources.sum", "/else"], lambda c: c.data.sources["sum"] == "/else"),
        (["--data.sources.web", "s3://a/*.tar"], lambda c: c.data.sources["web"] == "s3://a/*.tar"),
        (
            ["--data.columns.read.messages", "dialog", "--data.columns.read.images=pics"],
            lambda c: c.data.columns["read"].model_dump(exclude_none=True) == {"messages": "dialog", "images": "pics"},
        ),
        (["--evaluation.budgets", "1", "2", "3"], lambda c: c.evaluation.budgets == [1, 2, 3]),
        (["--evaluation.budget-tasks"], lambda c: c.evaluation.budget_tasks == []),
        (["--optimizer.betas", "0.8", "0.9"], lambda c: c.optimizer.betas == (0.8, 0.9)),
        (["--optimizer.weight_decay=0.5"], lambda c: c.optimizer.weight_decay == 0.5),
        (["--logging.wandb-project", "smalt"], lambda c: c.logging.wandb_project == "smalt"),
        (["--preset", "bluelm_3b"], lambda c: c.model == PRESETS["bluelm_3b"]),
        (
            ["--preset", "bluelm_3b", "--model.language.num-layers", "4"],
            lambda c: c.model.language == PRESETS["bluelm_3b"].language.model_copy(update={"num_layers": 4}),
        ),
    ],
    ids=lambda argument: " ".join(argument) if isinstance(argument, list) else "",
)
def test_the_command_line_overrides_any_value(overridden, arguments, value):
    assert value(overridden(*arguments))


def test_without_overrides_the_config_is_the_file_and_the_folder_is_dated(tiny_config):
    launch = parse_launch([str(tiny_config()), "--dry-run"])
    assert launch.config == load_config(tiny_config())
    assert launch.folder.parts[0] == "runs"
    assert launch.folder.name.startswith("tiny-20")
    assert (launch.dry_run, launch.checkpoint) == (True, None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stages.sft.stepz", "7"], "--stages.sft.stepz"),
        (["--stages.more.mixture.read", "1"], "--stages.more.mixture.read"),
        (["--data.sources.new"], "--data.sources.new"),
        (["--stages.sft.yarn.factor", "8"], "--stages.sft.yarn.original-length"),
        (["--dtype", "float16"], "bfloat16"),
    ],
)
def test_a_wrong_option_ends_the_program_and_is_named(overridden, capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        overridden(*arguments)
    assert ended.value.code != 0
    assert named in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--parallel.fsdp 0", "parallel.fsdp: Input should be greater than or equal to 1 (given: 0)"),
        ("--stages.sft.steps 0", "stages.sft.steps: Input should be greater than or equal to 1 (given: 0)"),
        ("--optimizer.betas 0.9 2", "optimizer.betas.1: Input should be less than 1 (given: 2.0)"),
        ("--optimizer.eps -1", "optimizer.eps: Input should be greater than 0 (given: -1.0)"),
        ("--optimizer.weight-decay nan", "optimizer.weight_decay: Input should be a finite number (given: nan)"),
        ("--evaluation.budgets 4 -3", "evaluation.budgets.1: Input should be greater than or equal to 0 (given: -3)"),
        ("--name a/b", "name: String should match pattern '^[^/\\x00]+$' (given: 'a/b')"),
        ("--stages.align.mixture.read 0", "stages.align: mixture names no source with a weight above 0"),
        ("--stages.align.mixture.reed 1", "stages.align.mixture names reed; data.sources has read, sum"),
        ("--model.language.head-dim 31", "model.language: language head_dim 31 is odd; rotary embedding needs pairs"),
        ("--data.columns.reed.text body", "data.columns names reed; the sources are read, sum"),
        ("--data.sources.read=", "data.sources.read: String should have at least 1 character (given: '')"),
        ("--evaluation.budget-tasks largest", "evaluation.budget_tasks names largest, which evaluation.sources lacks"),
        (
            "--model.language.yarn.factor 0 --model.language.yarn.original-length 8",
            "model.language.yarn.factor: Input should be greater than or equal to 1 (given: 0.0)",
        ),
        ("--preset x", "preset 'x' is unknown; there are bluelm_3b, bluelm_7b"),
    ],
)
def test_a_wrong_value_is_explained_as_one_of_a_file_is(overridden, option, said):
    with pytest.raises(UserError) as caught:
        overridden(*option.split())
    assert str(caught.value) == f"command line: {said}"


def test_a_config_after_an_option_is_named(tiny_config):
    path = str(tiny_config())
    with pytest.raises(UserError, match=f"^{re.escape(path)} comes after an option; the config is the first argument"):
        parse_launch(["--parallel.tp", "2", path])


def _options(section, prefix=""):
    """Dotted names of all values of a config, as the command line spells them."""
    for name, value in section:
        dotted = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, BaseModel):
            yield from _options(value, f"{dotted}.")
        elif isinstance(value, dict):
            yield from _options(value.items(), f"{dotted}.")
        else:
            yield dotted


@pytest.mark.slow
def test_help_lists_every_value_and_the_own_options(tiny_config):
    path = tiny_config()
    command = [sys.executable, "engine/train.py", str(path), "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = ["resume", "folder", "dry-run", *_options(load_config(path))]
    assert len(wanted) > 80
    assert [name for name in wanted if f"--{name}" not in shown] == []
