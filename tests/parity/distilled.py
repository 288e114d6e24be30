"""What the matrix trains, with a teacher of other sizes."""

import torch
import torch.nn.functional as F
import workload

from smalt.model import ModelConfig, VisionConfig, build_model
from smalt.parallel import Distillation, make_teacher

WEIGHTS = {"cross_entropy": 0.3, "kl": 0.7, "temperature": 2.0, "hidden": 0.2}
CHANNELS = torch.arange(1, 24)[:16]


def teacher_config(variant):
    """Wider and deeper than the student; tiles are the same."""
    student = workload.make_config(variant)
    language = student.language.model_copy(update={"num_layers": 5, "width": 24, "ffn": 32})
    vision = VisionConfig(num_layers=1, width=12, num_heads=2, ffn=8, patch=2, tile=6, merge=2)
    return ModelConfig(vision=vision, language=language, image_attention=student.image_attention, init_std=0.5)


def make_distillation(model, variant, distance):
    teacher = make_teacher(teacher_config(variant), model.world, model.dtype, workload.LENGTH, autocast=False)
    return Distillation(teacher, **WEIGHTS, distance=distance, channels=CHANNELS)


def row_losses(model, teacher, one, distance):
    """The definition, with all logits in memory."""
    hidden = model.hidden(one)
    with torch.no_grad():
        target = teacher.hidden(one)
        soft = (target @ teacher.language.head_weight.T / WEIGHTS["temperature"]).log_softmax(-1)
    logits = hidden @ model.language.head_weight.T
    nll = F.cross_entropy(logits, one.labels, reduction="none")
    kl = F.kl_div((logits / WEIGHTS["temperature"]).log_softmax(-1), soft, log_target=True, reduction="none").sum(-1)
    target = target[:, CHANNELS]
    apart = (hidden - target).square().mean(-1) if distance == "mse" else 1 - F.cosine_similarity(hidden, target, dim=-1)
    return WEIGHTS["cross_entropy"] * nll + WEIGHTS["kl"] * WEIGHTS["temperature"] ** 2 * kl + WEIGHTS["hidden"] * apart


def run_reference(variant, distance):
    """One process with plain models: nothing of smalt.parallel."""
    student = build_model(workload.make_config(variant), seed=0, dtype=torch.float64)
    teacher = build_model(teacher_config(variant), seed=0, dtype=torch.float64)
    optimizer = workload.make_optimizer(student.parameters())
    result = {"loss": []}
    for step, packs in enumerate(workload.make_steps(variant, torch.float64)):
        total = workload.denominator(packs)
        if step == 0:
            with torch.no_grad():
                result["evaluated"] = sum(float((student(one) * one.loss_weight).sum()) for one in packs) / total
        losses = [(row_losses(student, teacher, one, distance) * one.loss_weight).sum() / total for one in packs]
        sum(losses).backward()
        result["loss"].append(float(sum(losses)))
        if step == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in student.named_parameters()}
        norm = workload.norm_of(p.grad for p in student.parameters())
        for p in student.parameters():
            p.grad *= min(1.0, workload.MAX_NORM / norm)
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = {name: p.detach().clone() for name, p in student.named_parameters()}
    return result
