"""Evaluation: the same questions in every condition, images really exchanged, figures that are what they say."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smalt.engine.config import load_config
from smalt.engine.errors import UserError
from smalt.engine.evaluation import conditions_of, evaluate, headline, measure, open_tasks, scores_json, scores_table, with_questions
from smalt.engine.evaluation.scores import Answer, score_answers, write_answers
from smalt.engine.inference import Asked
from smalt.engine.sections import EvaluationConfig, TaskConfig
from smalt.engine.trainer import open_data
from smalt.model import build_model
from smalt.model.generate import Completion, Sampling, generate
from smalt.parallel import alone

ALONE = alone(torch.device("cpu"))
CONFIG = EvaluationConfig(max_tokens=8, batch=5, keep_answers=10)


def scores_of(model, encoder, tasks, limit, config=CONFIG):
    return evaluate(model, encoder, tasks, conditions_of(tasks), config, limit, ALONE).scores


@pytest.fixture
def setup(tiny_config):
    """(model, encoder, tasks) of the tiny run, untrained."""
    config = load_config(tiny_config({"evaluation.budgets": [0, 3]}))
    data = open_data(config)
    return build_model(config.model, seed=0).eval(), data.encoder, data.questions


@pytest.fixture
def parrot(monkeypatch, setup):
    """parrot(say): a model that completes every prompt with the tokens that say(number of the question, budget) gives."""
    encoder = setup[1]

    def make(say):
        def generate(model, prompts, control, sampling, budget, numbers):
            assert control == encoder.control
            assert sampling.max_tokens == CONFIG.max_tokens
            return [Completion(tokens=say(prompt.record, budget)) for prompt in prompts]

        monkeypatch.setattr(measure, "generate", generate)

    return make


def _truth(tasks, name, number):
    return tasks[name].questions.records[number].messages[-1][1].rpartition("</think>")[2]


def _tasks(tmp_path, rows, **config):
    """rows: (question, images, answer or None)."""
    messages = [[{"role": "user", "content": q}, *([] if a is None else [{"role": "assistant", "content": a}])] for q, _, a in rows]
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.table({"messages": messages, "images": pa.array([i for _, i, _ in rows], pa.list_(pa.binary()))}), path)
    return open_tasks({"asked": TaskConfig(path=str(path), **config)})


def test_every_condition_is_asked_once(setup):
    scores = scores_of(*setup, 6)
    assert [(s.task, s.mode, s.budget, s.shuffled) for s in scores] == [
        ("read", "answer", None, False), ("read", "think", None, False), ("sum", "answer", None, False), ("sum", "think", None, False),
        ("sum", "think", 0, False), ("sum", "think", 3, False), ("sum", "think", None, True),
    ]  # fmt: skip
    assert list(headline(scores)) == [
        "accuracy/read/answer", "accuracy/read/think", "accuracy/sum/answer", "accuracy/sum/think", "accuracy/sum/think/budget_0",
        "accuracy/sum/think/budget_3", "accuracy/sum/think/shuffled",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_untrained_model_has_sound_scores_twice_the_same(setup):
    model, encoder, tasks = setup
    first = scores_of(model, encoder, tasks, 10)
    assert scores_of(model.train(), encoder, tasks, 10) == first
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
    model, encoder, tasks = setup
    asked = [tasks["sum"][i].record for i in range(9)]
    sampling = Sampling(CONFIG.max_tokens)
    for mode, budget in (("answer", None), ("think", 0)):
        said = generate(model, [encoder.prompt(r, mode) for r in asked], encoder.control, sampling, [budget] * 9)
        answers = [encoder.split(c.tokens, thinking=mode == "think")[1] for c in said]
        assert all(answers)
        rows = [
            (r.messages[0][1], [i.data for i in r.images], a + "x" * (n % 2))
            for n, (r, a) in enumerate(zip(asked, answers, strict=True))
        ]
        own = _tasks(tmp_path, rows, budgets=[0])
        found = evaluate(model, encoder, own, conditions_of(own), CONFIG, 9, ALONE)
        (score,) = [s for s in found.scores if (s.mode, s.budget) == (mode, budget)]
        assert score.accuracy == pytest.approx(5 / 9)
        assert score.standard_error == pytest.approx(math.sqrt(5 / 9 * 4 / 9 / 9))
        kept = [a for a in found.answers if (a.mode, a.budget) == (mode, budget)]
        assert [(a.question, a.answer, a.score) for a in kept] == [(n, a, float(n % 2 == 0)) for n, a in enumerate(answers)]
        assert [a.prompt for a in kept] == [r.messages[0][1] for r in asked]


def test_accuracy_counts_right_answers_and_thoughts_are_measured(setup, parrot):
    _, encoder, tasks = setup

    def say(number, budget):
        thought = encoder.text("12" if number % 2 else "1234")
        answer = _truth(tasks, "sum", number) if number % 4 == 0 else "no"
        return [*thought, encoder.ids["</think>"], *encoder.text(answer), encoder.ids["<|end|>"]]

    parrot(say)
    by_name = {(s.task, s.mode, s.budget, s.shuffled): s for s in scores_of(*setup, 24)}
    score = by_name["sum", "think", None, False]
    assert score.accuracy == pytest.approx(6 / 24)
    assert score.thought_tokens == pytest.approx(3.0)
    assert by_name["sum", "answer", None, False].accuracy == 0  # the thought is then part of the answer


def test_an_answer_that_never_comes_is_wrong_and_counted_as_unparsed(setup, parrot):
    _, encoder, _ = setup
    parrot(lambda number, budget: [*encoder.text("12"), *([] if number % 3 else [encoder.ids["</think>"], *encoder.text("7")])])
    score = scores_of(*setup, 9)[1]
    assert (score.mode, score.unparsed) == ("think", pytest.approx(6 / 9))


def test_budgets_reach_the_generator(setup, parrot):
    _, encoder, _ = setup
    parrot(lambda number, budget: [*encoder.text("1" * (5 if budget is None else budget)), encoder.ids["</think>"]])
    lengths = {s.budget: s.thought_tokens for s in scores_of(*setup, 7) if s.task == "sum" and s.mode == "think"}
    assert lengths == {None: 5.0, 0: 0.0, 3: 3.0}


def test_the_commonest_answer_is_a_model_that_never_looks(setup, parrot):
    _, encoder, tasks = setup
    truths = Counter(_truth(tasks, "sum", i) for i in range(24))
    answer, count = truths.most_common(1)[0]
    assert count > 1
    parrot(lambda number, budget: [encoder.ids["</think>"], *encoder.text(answer)])
    score = scores_of(*setup, 24)[3]
    assert (score.task, score.mode) == ("sum", "think")
    assert score.accuracy == score.commonest == pytest.approx(count / 24)


def _answer(question, score, sample=0, **values):
    return Answer("t", "think", None, False, question, sample, "q", ("7",), "", "7", "7", score, 3, **values)


@pytest.mark.parametrize(("right", "questions"), [(50, 100), (1, 7), (0, 5), (5, 5)])
def test_the_standard_error_is_that_of_a_share(right, questions):
    score = score_answers([_answer(i, float(i < right)) for i in range(questions)], 100)
    p = right / questions
    assert score.standard_error == pytest.approx(math.sqrt(p * (1 - p) / questions))
    assert scores_json([score])[0]["standard_error"] == score.standard_error


def test_several_answers_to_a_question_count_as_one_and_give_pass_at_k():
    right = [4, 1, 0]  # of four answers
    score = score_answers([_answer(q, float(s < right[q]), s, groups=(f"level={q % 2}",)) for q in range(3) for s in range(4)], 100)
    assert (score.questions, score.samples, score.accuracy) == (3, 4, pytest.approx(5 / 12))
    assert score.standard_error == pytest.approx(torch.tensor([1, 0.25, 0]).std(correction=0).item() / math.sqrt(3))
    assert score.pass_at == pytest.approx({1: 5 / 12, 2: (1 + 1 / 2 + 0) / 3, 4: 2 / 3})
    assert score.groups == {"level=0": (2, 0.5), "level=1": (1, 0.25)}
    assert score_answers([_answer(0, 1.0)], 100).pass_at == {}


def test_sampled_answers_follow_from_the_question_and_not_from_the_batch(setup, tmp_path):
    model, encoder, _ = setup
    rows = [("1+1", [], "2"), ("3+4", [], "7"), ("12", [], "3")]
    own = _tasks(tmp_path, rows, samples=5, temperature=1.0, modes=["answer"])
    found = [
        evaluate(model, encoder, own, conditions_of(own), CONFIG.model_copy(update={"batch": b, "keep_answers": 99}), 3, ALONE)
        for b in (2, 15)
    ]
    assert found[0] == found[1]
    assert len(found[0].answers) == 15
    assert len({a.answer for a in found[0].answers}) > 5


def test_kept_answers_are_bounded_and_long_texts_cut(setup, tmp_path):
    model, encoder, tasks = setup
    found = evaluate(model, encoder, tasks, conditions_of(tasks), CONFIG.model_copy(update={"keep_answers": 3}), 8, ALONE)
    assert [a.question for a in found.answers] == [0, 3, 6] * 7
    long = _answer(0, 1.0)
    write_answers(tmp_path / "answers.jsonl", 7, [long, Answer(**{**vars(long), "prompt": "x" * 5000})])
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert (first["step"], first["prompt"], first["truth"]) == (7, "q", ["7"])
    assert second["prompt"] == "x" * 4000 + " ... (1000 more characters)"


@pytest.mark.parametrize("name", ["read", "sum"])
def test_shuffled_questions_have_the_images_of_others(setup, name):
    model, encoder, tasks = setup
    task = tasks[name]
    usable = measure._usable(model, encoder, task, 24, ALONE, CONFIG)[0]
    shuffled = measure._with_images_of_others(usable)
    groups = Counter(len(task[i].record.images) for i in range(24))
    assert [q.number for q in shuffled] == [i for i in range(24) if groups[len(task[i].record.images)] > 1]
    sources = {task[i].record.images: i for i in range(24)}
    assert len(sources) == 24
    asked = {q.number: measure._read(task, q) for q in shuffled}
    for number, question in asked.items():
        own = task[number]
        assert (question.record.messages, question.truth) == (own.record.messages, own.truth)
        assert len(question.record.images) == len(own.record.images)
        assert sources[question.record.images] != number
    assert len({q.record.images for q in asked.values()}) == len(shuffled)


@pytest.mark.parametrize("shown", ["aabbcc", "aaab", "abaaca", "ab", "aabb"])
def test_several_questions_about_one_image_get_another(setup, tmp_path, shown):
    model, encoder, tasks = setup
    pictures = {name: tasks["sum"][i].record.images[0].data for i, name in enumerate("abc")}
    own = _tasks(tmp_path, [(f"<image>{n}", [pictures[name]], "1") for n, name in enumerate(shown)])
    usable = measure._usable(model, encoder, own["asked"], 9, ALONE, CONFIG)[0]
    shuffled = measure._with_images_of_others(usable)
    assert [q.number for q in shuffled] == list(range(len(shown)))
    assert not [q for q in shuffled if shown[q.images_of] == shown[q.number]]
    if max(map(shown.count, shown)) * 2 <= len(shown):
        assert sorted(q.images_of for q in shuffled) == list(range(len(shown)))


def test_a_question_that_can_exchange_with_none_is_left_out(setup, tmp_path):
    model, encoder, tasks = setup
    a, b, c, d = (tasks["sum"][i].record.images[0].data for i in range(4))
    rows = [("<image>", [a], "1"), ("<image><image>", [b, c], "2"), ("<image>", [d], "3"), ("text", [], "4")]
    own = _tasks(tmp_path, rows, shuffle_images=True)
    answer, think, shuffled = scores_of(model, encoder, own, 10)
    assert (answer.questions, think.questions, shuffled.questions) == (4, 4, 2)
    assert [s.shuffled for s in scores_of(model, encoder, own, 1)] == [False, False]


def test_bad_questions_are_left_out_not_fatal(setup, tmp_path):
    model, encoder, tasks = setup
    picture = tasks["sum"][0].record.images[0].data
    rows = [("<image>", [picture], "1"), ("<image>", [b"junk"], "1"), ("<image>", [], "1"), ("1+1", [], None), ("1+1", [], "2")]
    own = _tasks(tmp_path, rows)
    found = evaluate(model, encoder, own, conditions_of(own), CONFIG, 10, ALONE)
    assert {s.questions for s in found.scores} == {2}
    assert [(s.source, s.record, s.cause) for s in found.skipped] == [
        ("asked", 1, "not an image"), ("asked", 2, "placeholder mismatch"), ("asked", 3, "no answer"),
    ]  # fmt: skip
    assert (
        "left out, of asked: not an image, 1; of asked: placeholder mismatch, 1; of"
        in scores_table(found.scores, found.skipped).caption
    )
    with pytest.raises(UserError, match=r"'asked': none of the 3 records that were read.*the first is skipped for 'not an image'"):
        scores_of(model, encoder, _tasks(tmp_path, rows[1:4]), 10)


def test_fewer_questions_are_spread_evenly_and_said_to_be_fewer(setup, tmp_path):
    model, encoder, _ = setup
    own = _tasks(tmp_path, [(f"{i}+0", [], str(i)) for i in range(10)], questions=4, modes=["answer"])
    config = CONFIG.model_copy(update={"questions": 2})
    asked = {}
    for name, tasks, limit in (("own", own, None), ("during", own, 3), ("said", with_questions(own, 5), None)):
        found = evaluate(model, encoder, tasks, conditions_of(tasks), config, limit, ALONE)
        asked[name] = [a.question for a in found.answers]
    assert asked == {"own": [0, 2, 5, 7], "during": [0, 3, 6], "said": [0, 2, 4, 6, 8]}
    assert list(scores_table(found.scores).columns[-1].cells) == ["5 of 10"]


def test_only_the_evaluation_of_the_config_is_the_final_one():
    asked = [Asked(), Asked(questions=20), Asked(tasks={"a": "b"}), Asked(mode="think"), Asked(budget=3)]
    assert [a.is_the_final_one for a in asked] == [True, False, False, False, False]


def test_questions_are_dealt_by_cost():
    costs = [100.0, *[1.0] * 8, 90.0, 5.0]
    dealt = measure.deal(costs, 3)
    assert sorted(i for part in dealt for i in part) == list(range(11))
    assert sorted(map(len, dealt)) == [3, 4, 4]
    assert sorted(sum(costs[i] for i in part) for part in dealt)[1:] == pytest.approx([92, 103], abs=3)
    assert all(costs[a] >= costs[b] for part in dealt for a, b in pairwise(part))
    assert measure.deal([1.0], 4) == [[0], [], [], []]


def _on_ranks(path, size, fault="none"):
    """What each rank finds."""
    script = Path(__file__).with_name("evaluation_ranks.py")
    ranks = [subprocess.Popen([sys.executable, script, str(path), str(rank), str(size), fault]) for rank in range(size)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * size
    return [json.loads(Path(f"{path}.found-{rank}").read_text()) for rank in range(size)]


@pytest.mark.slow
def test_two_ranks_give_the_answers_and_scores_of_one(tiny_config, digits, tmp_path):
    sampled = {"path": digits / "held_out" / "read.parquet", "samples": 3, "temperature": 1.0, "questions": 5}
    path = tiny_config({"evaluation.tasks": {"sampled": sampled}, "evaluation.questions": 7, "evaluation.batch": 3})
    config = load_config(path)
    data = open_data(config)
    model, settings = build_model(config.model, 0, dtype=torch.float64).eval(), config.evaluation
    alone_found = evaluate(model, data.encoder, data.questions, conditions_of(data.questions), settings, 7, ALONE)
    wanted = json.loads(json.dumps([list(map(asdict, alone_found.scores)), list(map(asdict, alone_found.answers))]))
    assert len({answer["answer"] for answer in wanted[1]}) > 5
    assert _on_ranks(path, 2) == [wanted, wanted]


@pytest.mark.slow
def test_a_question_that_one_rank_cannot_read_again_ends_the_evaluation_on_all(tiny_config):
    first, second = _on_ranks(tiny_config(), 2, "fault")
    assert first == second
    assert first == ("evaluation source 'read': a question that was read before cannot be read any more on rank 1: the disk is gone")
