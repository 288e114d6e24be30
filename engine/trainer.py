"""A run: what lasts from stage to stage, and what happens between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sized

import torch
from torch import Tensor

from smalt.model import MultimodalModel, build_model, count_parameters
from smalt.model.tiling import ImageShape
from smalt.parallel import FIRST_STEP, ParallelConfig, ParallelModel, Watchdog, World
from smalt.parallel.compat import gathered_axis_by_axis
from smalt.profiling.record import TraceRecorder, recording_folder

from .checkpoints import Checkpoint, CheckpointWriter, checkpoint_before, distrust_from
from .config import RunConfig
from .data.agreement import Account, Entry, read_alike
from .data.chat import ChatEncoder
from .data.images import ImageLimits
from .data.loader import StepBatch
from .data.records import Records
from .data.sources import CACHED_BYTES, open_sources
from .errors import UserError
from .evaluation import conditions_of, evaluate, headline, open_tasks, scores_json, scores_table
from .initial import Beginnings, find_beginnings
from .launch import Launch
from .memory import explain_out_of_memory
from .plots import plot_run
from .preemption import Preemption
from .progress import RunProgress
from .run_folder import CHECKPOINTS, EVALUATION, PLOT, TRACES, RunFolder, read_metrics
from .spikes import SPIKES, Verdict, write_spike
from .stage import RunData, Stage, StepResult


class _AskedToStop(Exception):
    pass


class Run:
    """Data, logs, checkpoints and counters; ``stages`` hands weights and optimiser state on."""

    def __init__(self, launch: Launch, world: World, watchdog: Watchdog, preemption: Preemption):
        self.config, self.world, self.checkpoint = launch.config, world, launch.checkpoint
        self.watchdog, self.preemption = watchdog, preemption
        check_layout(self.config, world.parallel)
        self.data = open_alike(self.config, world)
        with watchdog.pause("looking at what the run begins with"):
            self.beginnings = open_beginnings(launch, world, self.data)
        self.step = self.checkpoint.step if self.checkpoint else 0
        self.counters: Counter[str] = Counter(self.checkpoint.state["counters"] if self.checkpoint else {})
        self.bad_steps: int = self.checkpoint.state.get("bad_steps", 0) if self.checkpoint else 0
        self.last_save = False
        self.model: ParallelModel | None = None
        self.folder = world.attempt(lambda: RunFolder(launch.folder, self.config, world.is_main, launch.lock))
        self.recorder: TraceRecorder | None = None
        self.writer = CheckpointWriter(launch.folder / CHECKPOINTS, self.config.checkpoint.keep, world, self._checkpoint_failed)
        self.progress = RunProgress(self.config.total_steps, self.step, world.is_main)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        """Whatever ends the run: the trace is written, the terminal given back, the folder freed."""
        self.progress.close()
        if self.recorder is not None:
            self.recorder.close()
        self.folder.close()

    def stages(self) -> Iterator[Stage]:
        """The stages that are left; the first of a resumed run goes on where its checkpoint was written."""
        names = stages_left(self.config, self.checkpoint)
        stage: Stage | None = None
        for name in names:
            checkpoint = self.checkpoint if name == names[0] else None
            with self.watchdog.pause(f"building stage {name}"):
                stage = Stage(self.config, name, self.world, self.data, stage, checkpoint, self.step, self.beginnings)
            self.model = stage.model  # the last stage's weights are given up
            self.recorder = self._recorder()
            try:
                if name == names[0]:
                    self._begin(stage)
                self.watchdog.beat(self.step, FIRST_STEP)
                yield stage
                with self.watchdog.pause("keeping the optimiser's state"):
                    stage.end()
            finally:
                # Sharded weights cannot be made while torch's profiler holds tensors; nor is that part of a step.
                self.recorder.close()
                stage.close()

    def _begin(self, stage: Stage) -> None:
        """Nothing that a wrong option breaks is left: the config becomes that of the run."""
        self.world.attempt(lambda: self.folder.begin(self.checkpoint.step if self.checkpoint else None))
        if self.checkpoint is not None:
            self.progress.say(f"goes on from {where_it_goes_on(self.checkpoint, stage)}")

    def _recorder(self) -> TraceRecorder:
        first, count = self.config.logging.trace_first, self.config.logging.trace_steps
        folder = self.world.agree(lambda: recording_folder(self.folder.path / TRACES, first, count, self.step))
        return TraceRecorder(folder, self.world.rank, first, count, dict(self.world.groups), self.step)

    def after_step(self, stage: Stage, batch: StepBatch, result: StepResult, seconds: float) -> bool:
        """Count, log, save, validate, evaluate: whatever is due after this step. Returns whether the run is to stop after it."""
        self.step += 1
        assert self.recorder is not None
        self.recorder.step()
        config, last_of_stage, stop = self.config, stage.done == stage.config.steps, result.stop
        last = last_of_stage and stage.name == list(config.stages)[-1]
        self.counters.update(f"records skipped: {s.cause}" for s in batch.skipped)
        self.folder.skip(self.step, batch.skipped)
        self._count_skipped(result)
        self.progress.step(stage.name, self.step, result.loss, batch.tokens / seconds)
        values = {
            "stage": stage.name, "loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": stage.rate,
            "tokens_per_second": batch.tokens / seconds, "tokens": batch.tokens, "loss_tokens": batch.loss_tokens, "fill": batch.fill,
            "cost_spread": batch.spread, "data_seconds": stage.waited,
            **{f"documents/{source}": n for source, n in sorted(batch.documents.items())}, **self.counters, **result.norms,
        }  # fmt: skip
        resample = stage.resampler.due(stage.done)
        if last_of_stage or resample or _due(self.step, config.logging.validate_every):
            with self.watchdog.pause("validation"):
                values |= stage.validate()
        if resample:
            found = stage.resample(values)
            self.folder.resampled(self.step, stage.name, found)
            values |= found
        if _due(self.step, config.evaluation.every) and not last and not stop:
            scores = self._evaluate(config.evaluation.questions_during, final=False)
            stop = scores is None
            values |= scores or {}
        self.folder.log(self.step, values, charts=last_of_stage or _due(self.step, config.logging.every))
        self.writer.poll()
        # Before the save: what goes on from it must not judge this step again, nor have the weights that were given up.
        self._answer_spike(stage, batch, result)
        # Weights from which steps are not finite must not take the place of those before, unless all else would be lost.
        if stop or (not self.bad_steps and (last or _due(self.step, config.checkpoint.every))):
            self._save(stage)
        self._stop_if_diverged(last)
        self.watchdog.beat(self.step)
        return stop

    def _save(self, stage: Stage) -> None:
        self.folder.sync()
        state = {
            "model": stage.model.config.model_dump(), "optimizer": self.config.optimizer.kind, "counters": dict(self.counters),
            "bad_steps": self.bad_steps, "lineage": self.beginnings.lineage, **stage.state(),
        }  # fmt: skip
        with self.watchdog.pause("a checkpoint"):
            self.writer.save(self.step, stage.tensors(), state)

    def stop(self) -> None:
        """End a run that was asked to, when its checkpoint is whole. Raises UserError when that cannot be written."""
        self._finish_last_save()
        self.progress.close()
        # Who was asked says so, but where the first process was told by another it would not.
        why = "" if self.preemption.asked else " as another rank was asked to"
        self.progress.say(f"stopped{why} after step {self.step}, which is saved; go on with --continue --folder {self.folder.path}")

    def finish(self) -> None:
        """The last save, the final evaluation, the plot. Raises UserError when the save fails."""
        self._finish_last_save()
        self.preemption.end_at_once()
        self._evaluate(None, final=True)
        self.progress.close()
        if self.world.is_main:
            plot_run(read_metrics(self.folder.path), self.folder.path)
            self.progress.say(f"the run is in {self.folder.path}; its picture is {self.folder.path / PLOT}")

    def _finish_last_save(self) -> None:
        self.last_save = True
        with self.watchdog.pause("the last checkpoint"):
            self.writer.wait()

    def _count_skipped(self, result: StepResult) -> None:
        self.bad_steps = self.bad_steps + 1 if result.skipped == "non-finite" else 0
        if result.skipped:
            self.counters[f"steps skipped: {result.skipped}"] += 1
            self.progress.say(f"step {self.step} skipped: {result.skipped} (loss {result.loss}, gradient norm {result.grad_norm})")

    def _stop_if_diverged(self, last: bool) -> None:
        if not self.bad_steps or not (last or self.bad_steps >= self.config.optimizer.max_bad_steps):
            return
        self._wait_for_save()
        # The weights were already what they are after the step before, whose own loss was that of the weights it had.
        left = self.world.agree(lambda: distrust_from(self.folder.path / CHECKPOINTS, self.step - self.bad_steps))
        raise UserError(
            f"the loss or its gradient was not finite in {self.bad_steps} steps in a row, up to step {self.step}; lower learning_rate "
            f"or raise warmup_steps of the stage; {left}"
        )

    def _wait_for_save(self) -> None:
        with self.watchdog.pause("a checkpoint"):
            self.writer.wait()

    def _answer_spike(self, stage: Stage, batch: StepBatch, result: StepResult) -> None:
        """Write down whose samples a spike had; go back to a checkpoint, or stop, where the rule says so. The data goes on."""
        verdict = result.verdict
        if verdict.action == "ok":
            return
        if self.world.is_main:
            write_spike(self.folder.path, self.step, verdict, result.loss, result.grad_norm, batch.samples)
        if verdict.action == "stop":
            self._wait_for_save()
            raise UserError(
                f"step {self.step}: {verdict.reason}; the samples are in {self.folder.path / SPIKES}; before --resume lower "
                "learning_rate of the stage, or raise spikes.sigmas or spikes.max_rollbacks"
            )
        if verdict.action == "rollback":
            with self.watchdog.pause("a rollback"):
                self._roll_back(stage, verdict)

    def _roll_back(self, stage: Stage, verdict: Verdict) -> None:
        self.writer.wait()
        checkpoint = self.world.agree(lambda: checkpoint_before(self.folder.path / CHECKPOINTS, verdict.before))
        if checkpoint is None or checkpoint.state["stage"] != stage.name:
            stage.rule.accept()
            self.progress.say(f"step {self.step}: {verdict.reason}; there is no checkpoint of this stage to go back to, going on")
            return
        stage.roll_back(checkpoint)
        # Their weights are given up too: a later rollback must not take them, nor must they take the place of those before them.
        self.writer.remove_after(checkpoint.step)
        self.counters["rollbacks"] += 1
        self.progress.say(f"step {self.step}: {verdict.reason}; the weights go back to those of step {checkpoint.step}")

    def _checkpoint_failed(self, message: str) -> None:
        if self.last_save:
            raise UserError(f"{message}; it was the last of this run: make room, then --continue --folder {self.folder.path}")
        if self.config.checkpoint.on_error == "stop":
            raise UserError(f"{message}; stopped, as checkpoint.on_error says")
        self.counters["checkpoints failed"] += 1
        self.progress.say(f"warning: {message}; going on, as checkpoint.on_error says")

    def _evaluate(self, questions: int | None, final: bool) -> dict[str, float] | None:
        """Accuracies by name; the final ones are also written and shown. None where a rank was asked to end the run meanwhile."""
        if not self.data.questions or self.model is None:
            return {}
        config = self.config.evaluation
        advice = f"a smaller evaluation.batch (now {config.batch}) or evaluation.max_tokens (now {config.max_tokens})"
        try:
            with self.watchdog.pause("evaluation"), explain_out_of_memory(self.model.parameters(), None, "evaluation", advice):
                model = whole_model(self.model)
                tasks = self.data.questions
                found = evaluate(
                    model, self.data.encoder, tasks, conditions_of(tasks), config, questions, self.world, self._between_conditions
                )
        except _AskedToStop:
            self.progress.say(f"the evaluation after step {self.step} is given up: the run was asked to end")
            return None
        self.folder.skip(self.step, found.skipped)
        self.folder.write_answers(self.step, found.answers)
        if final:
            self.folder.write_json(EVALUATION, scores_json(found.scores))
            self.progress.say(scores_table(found.scores, found.skipped))
        return headline(found.scores)

    def _between_conditions(self, done: int, total: int) -> None:
        """Of an evaluation, which takes longer than whoever asks the run to end will wait."""
        self.progress.evaluation(done, total)
        asked = torch.tensor(float(self.preemption.asked), device=self.world.device)
        if self.world.sum(asked) > 0:
            raise _AskedToStop


def open_data(config: RunConfig) -> RunData:
    """Tokenizer and sources. Raises UserError for what is missing or empty."""
    encoder = open_encoder(config)
    sources, validation = open_sources_of(config, config.data.sources), open_sources_of(config, config.data.validation)
    return RunData(encoder, sources, validation, open_tasks(config.evaluation.all_tasks()))


def open_encoder(config: RunConfig) -> ChatEncoder:
    limits = ImageLimits(config.data.max_image_bytes, config.data.max_image_pixels)
    return ChatEncoder.load(config.data.tokenizer, ImageShape.of(config.model), config.model.language.vocabulary, limits)


def open_sources_of(config: RunConfig, paths: Mapping[str, str]) -> dict[str, Records]:
    """Sources by name, read as the config says."""
    columns = {name: section.model_dump(exclude_none=True) for name, section in config.data.columns.items()}
    return open_sources(paths, columns, CACHED_BYTES // max(1, config.data.workers))


def open_alike(config: RunConfig, world: World) -> RunData:
    """:func:`open_data` on every rank. Raises UserError where one has a source of another length, from which another order follows."""

    def lengths(data: RunData) -> Account:
        kinds: dict[str, Mapping[str, Sized]] = {
            "data.sources": data.sources,
            "data.validation": data.validation,
            "evaluation": data.questions,
        }
        return Account.of([Entry(f"{k}.{n}", f"{len(s)} records long") for k, sources in kinds.items() for n, s in sources.items()])

    return read_alike(world, "before the first step", lambda: open_data(config), lengths)


def open_beginnings(launch: Launch, world: World, data: RunData) -> Beginnings:
    """What the run begins with, or began with where it goes on."""
    return find_beginnings(launch.config, world, data.reader, launch.checkpoint)


def dry_run(launch: Launch, world: World) -> str:
    """Build everything that a run builds, leave no folder, and say what would run."""
    config = launch.config
    check_layout(config, world.parallel)
    data = open_alike(config, world)
    checkpoint = launch.checkpoint
    beginnings = open_beginnings(launch, world, data)
    name, step = stages_left(config, checkpoint)[0], checkpoint.step if checkpoint else 0
    stage = Stage(config, name, world, data, None, checkpoint, step, beginnings)
    batch = next(stage.batches(), None)
    stage.close()
    model = build_model(stage.model.config, config.seed, "meta")
    lines = [
        "parameters: " + ", ".join(f"{part} {n:,}" for part, n in count_parameters(model).items()),
        "records: " + ", ".join(f"{name} {len(source):,}" for name, source in data.sources.items()),
        *(f"stage {n}: {s.steps} steps of {config.packs_of(n)} x {s.sequence_length} tokens" for n, s in config.stages.items()),
    ]
    if batch is not None:
        lines.append(f"first step: {sum(batch.documents.values())} documents, {batch.tokens} tokens, fill {batch.fill:.1%}")
    if checkpoint is not None:
        lines.append(f"would go on from {where_it_goes_on(checkpoint, stage)}")
    lines.append(f"would write to {launch.folder}; dry run, stopped before the first step")
    return "\n".join(lines)


def stages_left(config: RunConfig, checkpoint: Checkpoint | None) -> list[str]:
    """All stages, or those from the one in which the checkpoint was written. Raises UserError where the config has no such stage."""
    names = list(config.stages)
    if checkpoint is None:
        return names
    if (started := checkpoint.state["stage"]) not in names:
        raise UserError(f"the checkpoint is of stage {started!r}; the config has {', '.join(names)}")
    return names[names.index(started) :]


def where_it_goes_on(checkpoint: Checkpoint, stage: Stage) -> str:
    """stage: the one that has loaded the checkpoint."""
    names = list(stage.run_config.stages)
    later = sum(stage.run_config.stages[name].steps for name in names[names.index(stage.name) + 1 :])
    left = max(0, stage.config.steps - stage.done) + later
    return f"{checkpoint.path}, stage {stage.name}{f', {left} steps left' if left else ': nothing is left to train'}"


def whole_model(model: ParallelModel) -> MultimodalModel:
    """The model itself where one process has it as it is, else a copy with every shard gathered."""
    if model.world.meshes is None and not model.autocast:
        return model.parts[0]
    with gathered_axis_by_axis():
        weights: dict[str, Tensor] = model.full_state()
    with torch.device("meta"):
        copy = MultimodalModel(model.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def check_layout(config: RunConfig, parallel: ParallelConfig) -> None:
    """Raise UserError for what no layout of these sizes can train. parallel: with the sizes that it has over the processes."""
    try:
        for name, stage in config.stages.items():
            key = f"stages.{name}.packs_per_step" if stage.packs_per_step else "data.packs_per_step"
            parallel.check_microbatches(config.packs_of(name), key)
            parallel.check_model(config.model, stage.sequence_length, f"stages.{name}.sequence_length")
    except ValueError as error:
        raise UserError(str(error)) from error


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
