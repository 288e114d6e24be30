"""The ``smalt`` command: wrong options are refused before anything is read or written, in one line that names them."""

import pytest

from smalt.engine.cli import main


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(*words): the one line that the command ends with."""

    def refuse(*words):
        monkeypatch.setattr("sys.argv", ["smalt", *map(str, words)])
        assert main() == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refuse


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("data digits --records 0", "--records is 0; it must be at least 1"),
        ("data digits --questions 0", "--questions is 0; it must be at least 1"),
        ("data digits --seed -1", "--seed is -1; it must be at least 0"),
        ("eval --run gone --questions 0", "--questions is 0; it must be at least 1"),
        ("eval --run gone --questions -2", "--questions is -2; it must be at least 1"),
        ("eval --run gone --budget -1", "--budget is -1; it must be at least 0"),
        ("eval --run gone --budget 1 --mode answer", "--budget is of thoughts, and --mode answer has none; leave one of them out"),
        ("eval --run gone --task x", "--task x is not NAME=FILE with a name of its own"),
        ("eval --run gone --task x=a.tsv --task x=b.tsv", "--task x=b.tsv is not NAME=FILE with a name of its own"),
        (
            "eval --run gone --task x=a.tsv",
            "data source 'x': a.tsv does not exist. `smalt data digits` makes the data of the default run.",
        ),
        ("generate --run gone --prompt x --budget -1", "--budget is -1; it must be at least 0"),
        ("generate --run gone --prompt x --max-tokens 0", "--max-tokens is 0; it must be at least 1"),
        ("generate --run gone --prompt x --temperature nan", "--temperature is nan; it must be at least 0 and finite"),
        ("generate --run gone --prompt x --top-p 1.5", "--top-p is 1.5; it must be above 0 and at most 1"),
        ("generate --run gone --prompt x --image nope.png", "image nope.png does not exist"),
        ("generate --run gone --prompt x --image .", "image . is not a file"),
        ("generate --run gone --prompt <image>", "the prompt has 1 <image>; the images given are 0"),
        ("generate --run gone --prompt x", "gone is not the folder of a run: config.json is missing"),
        ("export --run gone --out new --shard-size inf", "--shard-size is inf; it must be at least 0 and finite"),
        ("bench cpu --rounds 0", "--rounds is 0; it must be at least 1"),
        ("bench cpu --batch 0", "--batch is 0; it must be at least 1"),
        ("bench checkpoint --step-seconds nan", "--step-seconds is nan; it must be at least 0 and finite"),
        ("bench tiles --tiles -1", "--tiles is -1; it must be at least 1"),
        ("bench overlap --steps 0", "rounds = 5 and steps = 0: both must be at least 1"),
        ("kernels check --jobs 0", "--jobs is 0; it must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(refusal, tmp_path, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    assert refusal(*command.split()) == f"error: {said}"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_named(refusal, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x"
    assert refusal("data", "digits", "--out", out, "--records", 1, "--questions", 1) == (
        f"error: {out} cannot be written: Not a directory; choose another folder with --out"
    )
    assert refusal("bench", "checkpoint", "--disk", out) == f"error: {out}: Not a directory"
