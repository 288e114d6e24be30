"""Exported folders as someone loads them who has transformers and no Smalt: ``python elsewhere.py JOB.json OUT.pt FOLDER...``."""

import json
import shutil
import sys
from pathlib import Path

import torch
from exact import exactly
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.modules["smalt"] = None  # an import of it fails


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    return exactly(model), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def prepare(processor, conversations, **kwargs):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def completions(model, inputs, **kwargs):
    """The new ids of each row, up to the end token."""
    end, start = model.generation_config.eos_token_id, inputs["input_ids"].shape[1]
    rows = model.generate(**inputs, do_sample=False, **kwargs)[:, start:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def by_halves(model, inputs):
    """Logits of a prompt with two images, of which the cache has the first when the second comes; and those of all at once."""
    ids, tiles, counts = inputs["input_ids"], inputs["pixel_values"], inputs["num_tiles"]
    is_image, in_first = ids[0] == model.config.image_token_id, int(counts[0, 0])
    cut = int(is_image.nonzero()[in_first * model.config.tokens_per_tile - 1]) + 1
    first = model(input_ids=ids[:, :cut], pixel_values=tiles[:, :in_first], num_tiles=counts[:, :1], use_cache=True)
    cache = {name: value for name, value in first.items() if name in ("cache", "past_key_values")}
    second = model(input_ids=ids[:, cut:], pixel_values=tiles[:, in_first:], num_tiles=counts[:, 1:], **cache)
    return torch.cat([first.logits, second.logits], 1), model(**inputs).logits


def continued(model, inputs):
    """What generate makes of a prompt, its answer and three tokens more: from the cache of the answer, and from the start."""
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    cache = {name: first[name] for name in ("cache", "past_key_values") if name in first}
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    common = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
    images = {name: inputs[name] for name in ("pixel_values", "num_tiles")}
    return model.generate(**common, **cache).tolist(), model.generate(**common, **images).tolist()


def refusal(folder, change):
    """What loading says of weights that were changed."""
    broken = folder.with_name("broken")
    shutil.copytree(folder, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    (broken / "model.safetensors.index.json").unlink()
    file.unlink()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    try:
        load(broken)
    except ValueError as error:
        return str(error)
    finally:
        shutil.rmtree(broken)
    return "loaded"


@torch.no_grad()
def main(folder, job):
    model, processor = load(folder)
    found = {"prompts": [], "text": []}
    for conversation in job["conversations"]:
        for thinking in (True, False):
            inputs = prepare(processor, conversation, enable_thinking=thinking)
            budgets = job["budgets"] if thinking else [None]
            found["prompts"].append(
                {
                    **inputs,
                    "logits": model(**inputs).logits[0],
                    "completions": [
                        completions(model, inputs, thinking_budget=budget, max_new_tokens=job["max_tokens"])[0] for budget in budgets
                    ],
                }
            )
    batch = prepare(processor, job["conversations"])
    found["batch"] = completions(model, batch, thinking_budget=job["budgets"][-1], max_new_tokens=job["max_tokens"])
    beams = model.generate(**batch, num_beams=2, num_return_sequences=2, max_new_tokens=3)
    found["beams"] = list(beams.shape)
    found["halves"], found["at_once"] = by_halves(model, prepare(processor, job["conversations"][-1]))
    found["from_cache"], found["from_start"] = continued(model, prepare(processor, job["conversations"][-1]))
    again = folder.with_name("again")
    model.save_pretrained(again)
    processor.save_pretrained(again)
    model_again, processor_again = load(again)
    inputs, same = prepare(processor, job["conversations"]), prepare(processor_again, job["conversations"])
    assert inputs.keys() == same.keys()
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)
    assert torch.equal(model(**inputs).logits, model_again(**same).logits)
    shutil.rmtree(again)

    def exchange(tensors):
        tensors["projector.sideways.weight"] = tensors.pop("projector.down.weight")

    found["refusal"] = refusal(folder, exchange)
    found["rendered"] = [processor.apply_chat_template(c, add_generation_prompt=True) for c in job["conversations"]]
    names = {}
    exec(job["example"].replace("DIR", str(folder)), names)
    found["example"] = names["tokens"][0, names["inputs"]["input_ids"].shape[1] :].tolist()
    return found


if __name__ == "__main__":
    job, out, *folders = sys.argv[1:]
    torch.save([main(Path(folder), json.loads(Path(job).read_text())) for folder in folders], out)
