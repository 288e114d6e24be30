"""What a run begins with: weights of another run, whole or pruned, and the teachers of its stages."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from smalt.model import Document, ModelConfig, MultimodalModel, PackedBatch, build_model, pack
from smalt.model.importance import measure_importance
from smalt.model.pruning import Kept, Origin, choose, differences, origins
from smalt.parallel import Distillation, ParallelModel, World, make_teacher

from .checkpoints import Checkpoint
from .config import RunConfig, flat
from .data.mixture import fixed_mix, mixture_of
from .data.reading import Reader
from .data.stream import Mix, Presentation, SampleStream, seed_of
from .errors import UserError
from .lineage import INIT, Lineage, channels_kept, check_tokenizer, find_parent, make_lineage, make_parent, teacher_key
from .stored_weights import open_weights
from .weights.begin import take_folders

# Samples that are looked at for one calibration document: the others are bad records, or longer than a pack.
MOST_TRIES = 10
# May differ between a run and the one that it begins with: what makes random weights, and how images are cut into tiles. YaRN is
# compared as a whole.
FREE = ("model.init_std", "model.tiling.", "model.language.yarn")


@dataclass(frozen=True)
class Beginnings:
    """initial: what the first stage begins with, None for random weights and where a run goes on; kept: of its model, None for all;
    teachers: by stage; lineage: of every checkpoint of the run."""

    initial: Checkpoint | None
    kept: Kept | None
    teachers: dict[str, Checkpoint]
    lineage: Lineage


def find_beginnings(config: RunConfig, world: World, reader: Reader, resumed: Checkpoint | None) -> Beginnings:
    """Every rank calls it; the main process reads the checkpoints and chooses what pruning keeps, for which it holds the whole parent
    model on its device. Raises UserError for a parent that is not there, or does not fit."""

    def find() -> Beginnings:
        before = resumed.state.get("lineage", {"parents": {}})["parents"] if resumed else {}
        parents, initial, kept = {}, None, None
        if resumed is not None:
            parents = {key: parent for key, parent in before.items() if key == INIT}
        elif (given := config.init.run) is not None:
            initial = find_parent(INIT, given, {})
            kept = _fit(config, world, reader, initial)
            parents[INIT] = make_parent(given, initial, kept)
        teachers = {}
        for name, stage in config.stages.items():
            if stage.teacher is not None:
                teachers[name] = find_parent(teacher_key(name), stage.teacher, before)
                check_tokenizer(teacher_key(name), teachers[name], config)
                check_teacher(config, name, _model_of(teachers[name]), str(teachers[name].path))
                parents[teacher_key(name)] = make_parent(stage.teacher, teachers[name])
        return Beginnings(initial, kept, teachers, make_lineage(config, reader.sources, parents))

    found: Beginnings = world.agree(find, "beginnings")
    _check_seen(found, world)
    return found


def take_initial(model: ParallelModel, config: RunConfig, beginnings: Beginnings) -> None:
    """Put what a run begins with, where it is not random weights, into a fresh model; every rank calls it, and reads its own share of
    each weight. Raises UserError, on all ranks, for a folder that does not fit."""
    take_folders(config, model, model.world)
    checkpoint, kept = beginnings.initial, beginnings.kept
    if checkpoint is not None and kept is None:
        take_weights(model, checkpoint)
    elif checkpoint is not None and kept is not None:
        names = [name for name, _ in model.named_parameters()]
        take_weights(model, checkpoint, origins(kept, _model_of(checkpoint), model.config, names))


def take_weights(model: ParallelModel, checkpoint: Checkpoint, of: dict[str, Origin] | None = None) -> None:
    """Put the weights of a checkpoint into a model. of: where each comes from, the weight of its name when None."""
    with open_weights(checkpoint) as weights:

        def read(name: str, bounds: tuple[tuple[int, int], ...]) -> torch.Tensor:
            origin = of[name] if of is not None else Origin(name, (None,) * len(bounds))
            return origin.take(weights.tensor(origin.name), bounds)

        model.fill({name: partial(read, name) for name, _ in model.named_parameters()})


def make_distillation(config: RunConfig, name: str, model: ParallelModel, beginnings: Beginnings) -> Distillation:
    """The teacher of a stage beside its student. Raises UserError where it does not fit the layout."""
    stage, checkpoint = config.stages[name], beginnings.teachers[name]
    try:
        teacher = make_teacher(_model_of(checkpoint), model.world, model.dtype, stage.sequence_length, model.autocast)
    except ValueError as error:
        raise UserError(f"{teacher_key(name)} = {stage.teacher}: the teacher does not fit the layout: {error}") from error
    take_weights(teacher, checkpoint)
    own = stage.distillation
    channels = _shared_channels(config, name, checkpoint, beginnings.lineage) if own.hidden else None
    return Distillation(
        teacher, cross_entropy=own.cross_entropy, kl=own.kl, temperature=own.temperature, hidden=own.hidden,
        distance=own.hidden_distance, channels=channels,
    )  # fmt: skip


def _shared_channels(config: RunConfig, name: str, teacher: Checkpoint, lineage: Lineage) -> torch.Tensor | None:
    theirs, own = _model_of(teacher).language.width, config.model.language.width
    channels = channels_kept(lineage, teacher)
    if channels is not None:
        return torch.tensor(channels)
    if theirs == own:
        return None
    raise UserError(
        f"stages.{name}.distillation.hidden compares the channels that pruning kept of the teacher, and this model, {own} wide, was "
        f"not pruned from {teacher.path}, {theirs} wide: set it to 0, or init.run and init.prune.documents to begin with what is kept"
    )


def _fit(config: RunConfig, world: World, reader: Reader, parent: Checkpoint) -> Kept | None:
    """What is kept of the parent's model, None for all of it."""
    check_tokenizer(INIT, parent, config)
    larger, smaller = _model_of(parent), config.model
    check_fit(config, larger, str(parent.path))
    if not config.init.prune.documents:
        return None
    model = _whole(parent, world.device, {"float64": torch.float64}.get(config.dtype, torch.float32))
    autocast = torch.autocast(world.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()
    with autocast:
        importance = measure_importance(model, (one.to(world.device) for one in _calibration_packs(config, reader)))
    return choose(importance, larger, smaller)


def check_fit(config: RunConfig, theirs: ModelConfig, of: str) -> None:
    """Raise UserError where a run cannot begin with a model, which is that of a checkpoint or of a run; ``of`` names it."""
    if config.init.prune.documents:
        if wrong := differences(theirs, config.model):
            raise UserError("\n  ".join([f"init.prune: the model of {of} cannot be pruned to that of this run:", *wrong]))
    elif wrong := [*_other(theirs, config.model), *_other_yarn(config, theirs)]:
        advice = "; set the model to these sizes, or init.prune.documents to prune a larger one"
        raise UserError("\n  ".join([f"init.run: {of} is of another architecture{advice}:", *wrong]))


def _whole(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> MultimodalModel:
    model = build_model(_model_of(checkpoint), 0, "meta", dtype).to_empty(device=device)
    with open_weights(checkpoint) as weights, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights.tensor(name))
    return model


def _calibration_packs(config: RunConfig, reader: Reader) -> list[PackedBatch]:
    """The first documents of the calibration mixture that fit a pack of the first stage, packed in their order."""
    stage, prune = next(iter(config.stages.values())), config.init.prune
    length, attention, tile = stage.sequence_length, config.model.image_attention, config.model.vision.tile
    names = [name for name, weight in prune.mixture.items() if weight] or stage.sources
    sizes = {name: len(reader.sources[name]) for name in names}
    stream = SampleStream(sizes, Presentation(stage.think, 0.0), seed_of(config.seed, "calibration"))
    stream.change(0, fixed_mix(prune.mixture) if prune.mixture else Mix(mixture_of(stage, sizes).mix(1).weights))
    packs: list[list[Document]] = [[]]
    count = 0
    for i in range(MOST_TRIES * prune.documents):
        sample = reader.read(stream[i])
        if not isinstance(sample, Document) or len(sample) > length:
            continue
        if sum(map(len, packs[-1])) + len(sample) > length:
            packs.append([])
        packs[-1].append(sample)
        count += 1
        if count == prune.documents:
            return [pack(documents, length, attention, tile) for documents in packs]
    raise UserError(
        f"init.prune.documents = {prune.documents}: of the first {MOST_TRIES * prune.documents} samples only {count} can be read and "
        f"fit a pack of {length} tokens; ask for fewer, or see to the sources of init.prune.mixture"
    )


def check_teacher(config: RunConfig, name: str, theirs: ModelConfig, of: str) -> None:
    """Raise UserError where the teacher of stage ``name``, of a model that ``of`` names, has other tokens or image rows."""
    own = config.model
    wrong = []
    for section, field in (("language", "vocabulary"), ("vision", "tile"), ("vision", "tokens_per_tile")):
        a, b = getattr(getattr(theirs, section), field), getattr(getattr(own, section), field)
        if a != b:
            wrong.append(f"{section}.{field}: {a} of the teacher, {b} here")
    if theirs.image_attention != own.image_attention:
        wrong.append(f"image_attention: {theirs.image_attention} of the teacher, {own.image_attention} here")
    if wrong:
        said = f"{teacher_key(name)}: the model of {of} does not read the same packs as that of this run:"
        raise UserError("\n  ".join([said, *wrong]))


def _other(theirs: ModelConfig, own: ModelConfig) -> list[str]:
    a, b = flat(theirs.model_dump(), "model."), flat(own.model_dump(), "model.")
    hidden = {"model.projector_width": (theirs.projector_width or theirs.language.width, own.projector_width or own.language.width)}
    pairs = {key: (a.get(key), b[key]) for key in b if not key.startswith(FREE)} | hidden
    return [f"{key}: {one} there, {other} here" for key, (one, other) in pairs.items() if one != other]


def _other_yarn(config: RunConfig, theirs: ModelConfig) -> list[str]:
    """Weights that learned with YaRN are to be used with it, unless the first stage says otherwise."""
    if next(iter(config.stages.values())).yarn is not None:
        return []
    there, here = (None if y is None or y.factor == 1 else y for y in (theirs.language.yarn, config.model.language.yarn))
    if there == here:
        return []
    return [f"model.language.yarn: {there or 'none'} there, {here or 'none'} here; or set stages.NAME.yarn of the first stage"]


def _model_of(checkpoint: Checkpoint) -> ModelConfig:
    return ModelConfig.model_validate(checkpoint.state["model"])


def _check_seen(found: Beginnings, world: World) -> None:
    """Raise UserError where a rank does not see the files that the main process has read."""
    for checkpoint in [*([found.initial] if found.initial else []), *found.teachers.values()]:
        blind = [rank for rank, seen in enumerate(world.gather(checkpoint.path.is_dir())) if not seen]
        if blind:
            raise UserError(f"{checkpoint.path} is not there on rank {blind[0]}; put it where every machine sees it by that path")
