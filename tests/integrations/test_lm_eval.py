"""Smalt as a model of lm-evaluation-harness: packed scores are those of requests one by one, and local tasks run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

from lm_eval.api.instance import Instance  # noqa: E402 - only where it is installed

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["1+2=3", "The sum of the digits is 12.", " 7", "a", "read the digits", "1234567890" * 4]


@pytest.fixture(scope="module")
def model(run_folder):
    from smalt.integrations.lm_eval import SmaltLM

    return SmaltLM(str(run_folder), pack=128, batch_size=3)


def ask(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def by_hand(model, ids, first):
    """(sum of log-probabilities of ids[first:], whether they are the likeliest), from the logits of the uncached model."""
    from smalt.integrations.lm_eval import _text_document
    from smalt.model import pack

    document = _text_document(ids, first, 8)
    with torch.no_grad():
        hidden = model.model.hidden(pack([document], len(ids), model.model.config.image_attention, 8).to("cpu", torch.float64))
        logits = (hidden @ model.model.language.head_weight.T)[first - 1 : -1]
    wanted = torch.tensor(ids[first:])
    return logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


def test_packed_likelihoods_are_those_of_requests_one_by_one(model):
    pairs = [(a, b) for a in TEXTS for b in TEXTS] + [("", b) for b in TEXTS]
    together = model.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (logprob, greedy) in zip(pairs, together, strict=True):
        (alone,) = model.loglikelihood(ask("loglikelihood", (context, continuation)))
        assert alone == (pytest.approx(logprob, rel=1e-12), greedy)
        before = model.encoder.text(context.rstrip()) or [model.eot_token_id]
        after = model.encoder.text(context + continuation)[len(before) if context else 0 :]
        wanted, is_greedy = by_hand(model, before + after, len(before))
        assert (logprob, greedy) == (pytest.approx(wanted, rel=1e-12), is_greedy)
    assert len(list(model._packs([model._document([1] * 50, [2] * n) for n in range(1, 40)]))) > 10


def test_the_likeliest_continuation_is_called_so(model):
    ids = model.encoder.text(TEXTS[1])
    likeliest = [max(range(320), key=lambda token: by_hand(model, [*ids, token], len(ids))[0])]
    assert model._loglikelihood_tokens([(None, ids, likeliest)])[0][1]
    assert not model._loglikelihood_tokens([(None, ids, [(likeliest[0] + 1) % 320])])[0][1]


def test_rolling_likelihood_counts_every_token_once(model):
    text = "the digits 1 2 3 4 5 6 7 8 9 0 " * 12
    ids = model.encoder.text(text)
    assert len(ids) > 2 * model.max_length
    short, long = model.loglikelihood_rolling(ask("loglikelihood_rolling", (TEXTS[1],), (text,)))
    prefix = model.eot_token_id
    assert short == pytest.approx(by_hand(model, [prefix, *model.encoder.text(TEXTS[1])], 1)[0], rel=1e-12)
    window = model.max_length - 1
    wanted = by_hand(model, [prefix, *ids[:window]], 1)[0]
    for low in range(window, len(ids), window):
        high = min(low + window, len(ids))
        begin = max(0, high - window - 1)
        wanted += by_hand(model, ids[begin:high], low - begin)[0]
    assert long == pytest.approx(wanted, rel=1e-12)


def test_generation_follows_the_chat_template_stops_and_keeps_thoughts_to_itself(model, run_folder):
    from smalt.engine.data.records import Record
    from smalt.integrations.lm_eval import SmaltLM
    from smalt.model.generate import Sampling, generate

    history = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2"}]
    record = Record(tuple((m["role"], m["content"]) for m in history), ())
    for mode, budget in (("answer", None), ("think", 3)):
        own = SmaltLM(str(run_folder), mode=mode, budget=budget)
        text = own.apply_chat_template(history)
        prompt = own.encoder.prompt(record, mode)
        assert own.tok_encode(text) == prompt.tokens.tolist()
        (completion,) = generate(own.model, [prompt], own.encoder.control, Sampling(12), budget)
        (said,) = own.generate_until(ask("generate_until", (text, {"until": [], "max_gen_toks": 12})))
        assert said.strip() == own.encoder.split(completion.tokens, thinking=mode == "think")[1]
        stop = said.strip()[2:4]
        (cut,) = own.generate_until(ask("generate_until", (text, {"until": [stop], "max_gen_toks": 12})))
        assert cut == said[: said.index(stop)]
    assert own.apply_chat_template(history[:2], add_generation_prompt=False) == "<|user|>1+1<|end|><|assistant|><|answer|>2"
    with pytest.raises(ValueError, match="give mode=answer"):
        own.loglikelihood(ask("loglikelihood", (text, "4")))
    many = [(f"{a}+{b}=", {"until": ["\n"], "max_gen_toks": 6}) for a in range(4) for b in range(2)]
    assert model.generate_until(ask("generate_until", *many)) == [model.generate_until(ask("generate_until", m))[0] for m in many]


def test_wrong_arguments_are_named(run_folder):
    from smalt.integrations.lm_eval import SmaltLM

    with pytest.raises(ValueError, match="mode is 'x'"):
        SmaltLM(str(run_folder), mode="x")
    with pytest.raises(TypeError, match="budgett"):
        SmaltLM(str(run_folder), budgett=3)


def test_text_that_spells_a_special_token_is_text(model):
    assert model.tok_encode("a<|end|>") == model.encoder.text("a<|end|>")
    assert model.eot_token_id not in model.tok_encode("a<|end|>")


def test_of_a_blank_context_the_first_token_is_predicted_too(model):
    # The harness moves the space to the continuation.
    assert model.loglikelihood(ask("loglikelihood", (" ", "2"))) == model.loglikelihood(ask("loglikelihood", ("", " 2")))


def test_long_contexts_lose_their_beginning_and_it_is_said(model, caplog):
    long, short = "1" * 500, "1" * (model.max_length - 1)
    assert model.loglikelihood(ask("loglikelihood", (long, "2"))) == model.loglikelihood(ask("loglikelihood", (short, "2")))
    assert "1 of 1 contexts lose their beginning to fit into max_length = 128" in caplog.text
    with pytest.raises(ValueError, match="does not fit into max_length = 128"):
        model.loglikelihood(ask("loglikelihood", ("1", "2" * 200)))
    with pytest.raises(ValueError, match="leaves no room"):
        model.generate_until(ask("generate_until", ("1", {"max_gen_toks": 128})))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""


def test_local_tasks_run_by_the_command(run_folder, tmp_path):
    rows = [
        {"question": f"{a}+{b}=", "options": [str(a + b), str(a), "x"], "answer": 0, "sum": str(a + b)}
        for a in range(3)
        for b in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "local_choice": ("multiple_choice", 'doc_to_choice: "{{options}}"\ndoc_to_target: answer'),
        "local_generate": (
            "generate_until",
            'doc_to_target: "{{sum}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]',
        ),
        "local_rolling": ("loglikelihood_rolling", 'doc_to_target: "{{question}}"\nmetric_list: [{metric: word_perplexity}]'),
    }  # fmt: skip
    for name, (kind, more) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=tmp_path / "data.jsonl", kind=kind, more=more))
    command = [
        sys.executable, "-m", "smalt.integrations.lm_eval", "run", "--model", "smalt", "--model_args", f"run={run_folder}",
        "--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--batch_size", "8",
        "--output_path", str(tmp_path / "results.json"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert set(results) == set(tasks)
    assert 0 <= results["local_choice"]["acc,none"] <= 1
    assert 0 <= results["local_generate"]["exact_match,none"] <= 1
    assert math.isfinite(results["local_rolling"]["word_perplexity,none"])
