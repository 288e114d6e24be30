"""Evaluation: the same questions in every condition, images really exchanged, figures that are what they say."""

import json
import math
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smalt.engine import evaluation as evaluation_module
from smalt.engine.config import EvaluationConfig, load_config
from smalt.engine.data.chat import split_thought
from smalt.engine.data.records import ParquetRecords
from smalt.engine.errors import UserError
from smalt.engine.evaluation import Score, _with_images_of_others, evaluate, headline, scores_json, scores_table
from smalt.engine.trainer import open_data
from smalt.model import build_model
from smalt.model.generate import Completion, Sampling, generate
from smalt.parallel import World, alone

ALONE = alone(torch.device("cpu"))
CONFIG = EvaluationConfig(sources={"read": "r", "sum": "s"}, budget_tasks=["sum"], budgets=[0, 3], max_tokens=8, batch=5)


@pytest.fixture
def setup(tiny_config):
    """(model, encoder, questions by task) of the tiny run, untrained."""
    config = load_config(tiny_config())
    data = open_data(config)
    return build_model(config.model, seed=0).eval(), data.encoder, data.questions


@pytest.fixture
def parrot(monkeypatch, setup):
    """parrot(say): a model that completes every prompt with the tokens that say(number of the question, budget) gives."""
    encoder = setup[1]

    def make(say):
        def generate(model, prompts, control, sampling, budgets):
            assert control == encoder.control
            assert sampling.max_tokens == CONFIG.max_tokens
            return [Completion(tokens=say(prompt.record, budget)) for prompt, budget in zip(prompts, budgets, strict=True)]

        monkeypatch.setattr(evaluation_module, "generate", generate)

    return make


def _truth(record):
    return split_thought(record.messages[-1][1])[1]


def _records(tmp_path, rows):
    """rows: (question, images, answer or None)."""
    messages = [[{"role": "user", "content": q}, *([] if a is None else [{"role": "assistant", "content": a}])] for q, _, a in rows]
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.table({"messages": messages, "images": pa.array([i for _, i, _ in rows], pa.list_(pa.binary()))}), path)
    return ParquetRecords("asked", path)


def test_every_condition_is_asked_once(setup):
    scores = evaluate(*setup, CONFIG, 6, ALONE)
    assert [(s.task, s.mode, s.budget, s.shuffled) for s in scores] == [
        ("read", "answer", None, False), ("read", "think", None, False), ("sum", "answer", None, False), ("sum", "think", None, False),
        ("sum", "think", 0, False), ("sum", "think", 3, False), ("sum", "think", None, True),
    ]  # fmt: skip
    assert list(headline(scores)) == [
        "accuracy/read/answer", "accuracy/read/think", "accuracy/sum/answer", "accuracy/sum/think", "accuracy/sum/think/budget_0",
        "accuracy/sum/think/budget_3", "accuracy/sum/think/shuffled",
    ]  # fmt: skip


def test_an_untrained_model_has_sound_scores_twice_the_same(setup):
    model, encoder, questions = setup
    first = evaluate(model, encoder, questions, CONFIG, 10, ALONE)
    assert evaluate(model.train(), encoder, questions, CONFIG, 10, ALONE) == first
    assert model.training
    for score in first:
        assert score.questions == 10
        assert 0 <= score.accuracy <= 1
        assert 0 <= score.thought_tokens <= CONFIG.max_tokens
        assert score.mode == "think" or score.thought_tokens == 0
        assert score.budget is None or score.thought_tokens <= score.budget
    json.dumps(scores_json(first))
    assert scores_table(first).row_count == len(first)


def test_a_model_is_right_exactly_where_it_says_the_truth(setup, tmp_path):
    """Every other question has for truth what the untrained model happens to answer."""
    model, encoder, questions = setup
    asked = [questions["sum"][i] for i in range(9)]
    sampling = Sampling(CONFIG.max_tokens)
    for mode, budget in (("answer", None), ("think", 0)):
        said = generate(model, [encoder.prompt(r, mode) for r in asked], encoder.control, sampling, [budget] * 9)
        answers = [encoder.split(c.tokens, thinking=mode == "think")[1] for c in said]
        rows = [
            (r.messages[0][1], [i.data for i in r.images], a + "x" * (n % 2))
            for n, (r, a) in enumerate(zip(asked, answers, strict=True))
        ]
        config = CONFIG.model_copy(update={"sources": {"asked": "x"}, "budget_tasks": ["asked"]})
        scores = evaluate(model, encoder, {"asked": _records(tmp_path, rows)}, config, 9, ALONE)
        (score,) = [s for s in scores if (s.mode, s.budget) == (mode, budget)]
        assert score.accuracy == pytest.approx(5 / 9)


def test_accuracy_counts_right_answers_and_thoughts_are_measured(setup, parrot):
    _, encoder, questions = setup

    def say(number, budget):
        thought = encoder.text("12" if number % 2 else "1234")
        answer = _truth(questions["sum"][number]) if number % 4 == 0 else "no"
        return [*thought, encoder.ids["</think>"], *encoder.text(answer), encoder.ids["<|end|>"]]

    parrot(say)
    by_name = {(s.task, s.mode, s.budget, s.shuffled): s for s in evaluate(*setup, CONFIG, 22, ALONE)}
    score = by_name["sum", "think", None, False]
    assert score.accuracy == pytest.approx(6 / 22)
    assert score.thought_tokens == pytest.approx(3.0)
    assert by_name["sum", "answer", None, False].accuracy == 0  # the thought is then part of the answer


def test_budgets_reach_the_generator(setup, parrot):
    _, encoder, _ = setup
    parrot(lambda number, budget: [*encoder.text("1" * (5 if budget is None else budget)), encoder.ids["</think>"]])
    lengths = {s.budget: s.thought_tokens for s in evaluate(*setup, CONFIG, 7, ALONE) if s.task == "sum" and s.mode == "think"}
    assert lengths == {None: 5.0, 0: 0.0, 3: 3.0}


def test_the_commonest_answer_is_a_model_that_never_looks(setup, parrot):
    _, encoder, questions = setup
    truths = Counter(_truth(questions["sum"][i]) for i in range(24))
    answer, count = truths.most_common(1)[0]
    assert count > 1
    parrot(lambda number, budget: [encoder.ids["</think>"], *encoder.text(answer)])
    score = evaluate(*setup, CONFIG, 24, ALONE)[3]
    assert (score.task, score.mode) == ("sum", "think")
    assert score.accuracy == score.commonest == pytest.approx(count / 24)


@pytest.mark.parametrize(("accuracy", "questions"), [(0.5, 100), (0.1, 7), (0.0, 5), (1.0, 5)])
def test_the_standard_error_is_that_of_a_share(accuracy, questions):
    score = Score("t", "think", None, False, questions, accuracy, 0.5, 3.0)
    assert score.standard_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / questions))
    assert scores_json([score])[0]["standard_error"] == score.standard_error


@pytest.mark.parametrize("task", ["read", "sum"])
def test_shuffled_questions_have_the_images_of_others(setup, task):
    records = [setup[2][task][i] for i in range(24)]
    shuffled = _with_images_of_others(records)
    by_number = {r.number: r for r in records}
    groups = Counter(len(r.images) for r in records)
    assert [r.number for r in shuffled] == [r.number for r in records if groups[len(r.images)] > 1]
    sources = {r.images: r.number for r in records}
    assert len(sources) == len(records)
    for record in shuffled:
        own = by_number[record.number]
        assert record.messages == own.messages
        assert len(record.images) == len(own.images)
        assert sources[record.images] != record.number
    assert len({r.images for r in shuffled}) == len(shuffled)


def test_a_question_that_can_exchange_with_none_is_left_out(setup, digits, tmp_path):
    model, encoder, questions = setup
    a, b, c, d = (questions["sum"][i].images[0].data for i in range(4))
    records = _records(tmp_path, [("<image>", [a], "1"), ("<image><image>", [b, c], "2"), ("<image>", [d], "3"), ("text", [], "4")])
    config = EvaluationConfig(sources={"asked": "x"}, budget_tasks=["asked"], budgets=[], max_tokens=2)
    answer, think, shuffled = evaluate(model, encoder, {"asked": records}, config, 10, ALONE)
    assert (answer.questions, think.questions, shuffled.questions) == (4, 4, 2)
    lonely = evaluate(model, encoder, {"asked": records}, config, 2, ALONE)
    assert [s.shuffled for s in lonely] == [False, False]


def test_bad_questions_are_left_out_not_fatal(setup, tmp_path):
    model, encoder, questions = setup
    picture = questions["sum"][0].images[0].data
    rows = [("<image>", [picture], "1"), ("<image>", [b"junk"], "1"), ("<image>", [], "1"), ("1+1", [], None), ("1+1", [], "2")]
    config = EvaluationConfig(sources={"asked": "x"}, max_tokens=2)
    records = _records(tmp_path, rows)
    assert {s.questions for s in evaluate(model, encoder, {"asked": records}, config, 10, ALONE)} == {2}
    with pytest.raises(UserError, match=r"'asked': none of the first 10 records"):
        evaluate(model, encoder, {"asked": _records(tmp_path, rows[1:4])}, config, 10, ALONE)


def test_ranks_share_the_questions(setup, parrot, monkeypatch):
    """What two ranks answer together is what one answers alone."""
    model, encoder, questions = setup
    asked = []
    # One after the other in one process: there is nobody to ask.
    monkeypatch.setattr(World, "is_same", lambda world, number: True)

    def say(number, budget):
        asked.append(number)
        return encoder.text(_truth(questions["read"][number]))

    parrot(say)
    config = EvaluationConfig(sources={"read": "r"}, max_tokens=8)
    parts = [evaluate(model, encoder, questions, config, 7, replace(ALONE, rank=rank, size=2)) for rank in (0, 1)]
    assert sorted(asked) == sorted([*range(7)] * 2)
    assert parts[0][0].accuracy + parts[1][0].accuracy == pytest.approx(1.0)
