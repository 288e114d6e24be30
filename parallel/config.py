"""How a model is laid out over processes: the sizes of the axes, and how each axis works."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from smalt.model import FrozenSection, ModelConfig

AXES = ("pp", "dp", "fsdp", "cp", "tp")


class DeepSpeedConfig(FrozenSection):
    """What DeepSpeed shards, and where it keeps the optimiser's state."""

    stage: Literal[2, 3] = 3
    """Stage of ZeRO: 2 shards optimiser state and gradients, 3 the weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """cpu: optimiser state and arithmetic on the CPU; nvme: the state on a disk, under stage 3."""
    nvme_path: Path | None = None
    """Folder on a fast local disk for offload_optimizer = "nvme"."""
    keep_whole: int = Field(100_000, ge=0)
    """Stage 3: parameters of at most this many elements stay whole on every process."""

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload_optimizer == "nvme" and self.stage == 2:
            raise ValueError('offload_optimizer = "nvme" is of stage 3; set stage to 3, or offload_optimizer to "cpu"')
        if self.offload_optimizer == "nvme" and self.nvme_path is None:
            raise ValueError('offload_optimizer = "nvme" needs nvme_path, a folder on a fast local disk')
        return self


class ParallelConfig(FrozenSection):
    """The axes, outermost first, and how they work. The product of their sizes is the number of processes."""

    pp: int = Field(1, ge=1)
    """Pipeline parallel: groups of decoder blocks, one after the other."""
    dp: int = Field(1, ge=1)
    """Replicas of the shards (hybrid sharding): gradients are summed over them."""
    fsdp: int | None = Field(None, ge=1)
    """Shards of weights, gradients and optimiser state; as many as processes are left when not given."""
    cp: int = Field(1, ge=1)
    """Context parallel: rows of a pack."""
    tp: int = Field(1, ge=1)
    """Tensor parallel: heads, hidden units and vocabulary; the rows between blocks are shared out too (sequence parallel)."""
    context: Literal["gather", "scatter"] = "gather"
    """cp: "gather" brings keys and values to the rows, chunk by chunk; "scatter" shares out the heads (Ulysses)."""
    context_chunks: int = Field(4, ge=1)
    """Chunks of rows that a rank of cp holds, chosen so that the ranks' work is even ("gather")."""
    tiles: Literal["shared", "replicated"] = "shared"
    """Whether each tile of a pack goes through the vision tower on one rank of its cp x tp group, or on all (to compare with)."""
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of the microbatches in a pipeline; "zero_bubble" is the interleaved one (Qi et al. 2023, arXiv 2401.10241)."""
    virtual_stages: int = Field(2, ge=1)
    """Pipeline stages a rank under "interleaved" and "zero_bubble"."""
    reshard_after_forward: bool | None = None
    """Give gathered weights up after the forward pass of a block; when not given, yes, but not in a pipeline."""
    reduce_every_pack: bool = False
    """Reduce gradients after each pack, not once a step: whole gradients do not wait for the last pack, and more is exchanged."""
    prefetch: bool = True
    """Gather the weights of the next block while one computes."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """What backward computes again: nothing, every block, or all of a block but its matrix products and attention."""
    compile: bool = False
    """torch.compile of every block."""
    memory_budget: float | None = Field(None, ge=0, le=1)
    """With compile: share of a block's activations that is kept, the rest is computed again; torch chooses which."""
    watchdog_seconds: float = Field(300, ge=0, le=1e6)
    """Seconds without the end of a step, while a collective waits, after which the run ends and says which and where; 0: never."""
    async_tp: bool = False
    """With compile, on GPUs whose links allow it: collectives of tp inside the products beside them (symmetric memory)."""
    runtime: Literal["torch", "deepspeed"] = "torch"
    """What shards over fsdp and steps: "torch" (FSDP2), or "deepspeed" (ZeRO), which has no other axis."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of runtime = "deepspeed"; otherwise they are not read."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.runtime == "deepspeed":
            self._check_deepspeed()
        if self.memory_budget is not None and not self.compile:
            raise ValueError("memory_budget needs compile = true")
        if self.memory_budget is not None and self.checkpointing != "none":
            raise ValueError(f"memory_budget and checkpointing = {self.checkpointing!r} both choose what is kept; use one")
        if self.reduce_every_pack and self.pp > 1:
            raise ValueError("reduce_every_pack does not work with pp above 1: the schedule reduces, once; leave it out")
        if self.async_tp and not (self.compile and self.tp > 1):
            raise ValueError("async_tp needs compile = true and tp above 1")
        if self.schedule == "zero_bubble" and self.pp > 1 and self.reshard_after_forward:
            raise ValueError(
                'schedule "zero_bubble" with reshard_after_forward = true loses gradients: the weights\' half of backward would '
                "meet weights that were given up; leave reshard_after_forward out"
            )
        if self.schedule == "zero_bubble" and self.pp > 1 and self.checkpointing == "selective":
            raise ValueError(
                'schedule "zero_bubble" with checkpointing = "selective": backward comes in halves, and torch gives out what it kept '
                'once; use checkpointing = "full" or "none", or another schedule'
            )
        return self

    def _check_deepspeed(self) -> None:
        larger = [f"{axis} = {getattr(self, axis)}" for axis in AXES if axis != "fsdp" and getattr(self, axis) > 1]
        if larger:
            raise ValueError(
                f'runtime = "deepspeed" shards over all processes, along fsdp alone, and there is {", ".join(larger)}; leave it out, '
                'or set runtime to "torch"'
            )
        if self.compile:
            raise ValueError('compile works with runtime = "torch" only; set compile to false')
        if self.checkpointing == "selective" and self.deepspeed.stage == 3:
            raise ValueError(
                'checkpointing = "selective" fails under stage 3 of DeepSpeed, which gathers weights inside what is computed again; '
                'use "full", or stage = 2'
            )
        if self.reshard_after_forward is not None:
            raise ValueError('reshard_after_forward is of runtime = "torch"; DeepSpeed chooses by itself: leave it out')

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * (1 if self.pp == 1 or self.schedule == "1f1b" else self.virtual_stages)

    @property
    def chunks_a_rank(self) -> int:
        """Chunks of rows that a rank of cp holds; 1 where the rows of a rank follow one another."""
        return self.context_chunks if self.cp > 1 and self.context == "gather" else 1

    @property
    def keeps_gathered(self) -> bool:
        """Whether gathered weights stay until the backward pass."""
        return self.pp > 1 if self.reshard_after_forward is None else not self.reshard_after_forward

    def sized(self, num_processes: int) -> ParallelConfig:
        """The same with fsdp filled in. Raises ValueError when the axes do not multiply to the number of processes."""
        others = self.pp * self.dp * self.cp * self.tp
        fsdp = self.fsdp or max(1, num_processes // others)
        if others * fsdp != num_processes:
            sizes = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if axis != "fsdp")
            given = f" x fsdp {self.fsdp}" if self.fsdp else " (times fsdp, which takes what is left)"
            wanted = f"{others * self.fsdp} processes" if self.fsdp else f"a multiple of {others} processes"
            smaller = [f"--parallel.{axis} 1" for axis in AXES if axis != "fsdp" and getattr(self, axis) > 1]
            smaller += ["--parallel.fsdp None"] if self.fsdp else []
            raise ValueError(
                f"parallel: {sizes}{given} do not multiply to the {num_processes} processes that run; start {wanted} (on one machine "
                f"torchrun --nproc-per-node {others * fsdp}), or give {' '.join(smaller)}"
            )
        return self.model_copy(update={"fsdp": fsdp})

    def check_model(self, model: ModelConfig, sequence_length: int, key: str = "sequence_length") -> None:
        """Raise ValueError, naming the sizes, where a model or a pack does not divide over the axes. key: of the sequence length."""
        text, wrong = model.language, []
        for name, size in (("num_heads", text.num_heads), ("num_kv_heads", text.num_kv_heads), ("ffn", text.ffn)):
            if size % self.tp:
                wrong.append(f"model.language.{name} = {size} is not a multiple of tp = {self.tp}")
        if text.vocabulary % self.tp:
            rounded = -(-text.vocabulary // self.tp) * self.tp
            wrong.append(f"model.language.vocabulary = {text.vocabulary} is not a multiple of tp = {self.tp}; {rounded} is")
        if self.cp > 1 and self.context == "scatter" and not wrong:
            heads, kv_heads = text.num_heads // self.tp, text.num_kv_heads // self.tp
            if heads % self.cp:
                wrong.append(f'context = "scatter": {heads} heads a rank of tp do not divide over cp = {self.cp}; use "gather"')
            elif kv_heads % self.cp and self.cp % kv_heads:
                wrong.append(
                    f'context = "scatter": {kv_heads} key and value heads a rank of tp neither divide over cp = {self.cp} nor can be '
                    'repeated to it; use "gather"'
                )
        multiple = math.lcm(self.cp * self.chunks_a_rank, self.cp * self.tp)
        if sequence_length % multiple:
            wrong.append(
                f"{key} = {sequence_length} is not a multiple of cp {self.cp} x context_chunks {self.chunks_a_rank} and of "
                f"cp {self.cp} x tp {self.tp}; {-(-sequence_length // multiple) * multiple} is"
            )
        if self.num_stages > text.num_layers:
            each = self.num_stages // self.pp
            virtual = f' x virtual_stages {each} (schedule = "{self.schedule}")' if each > 1 else ""
            wrong.append(
                f"pp {self.pp}{virtual} makes {self.num_stages} pipeline stages, and model.language.num_layers = {text.num_layers}, "
                f"of which each needs one; lower pp{' or virtual_stages' if virtual else ''}"
            )
        if wrong:
            raise ValueError("\n".join(["parallel:", *(f"  {line}" for line in wrong)]))

    def check_microbatches(self, packs_per_step: int, key: str = "data.packs_per_step") -> int:
        """Packs of a step on each data rank. key: their name in the config. Raises ValueError where they do not divide, or are too few
        for the pipeline."""
        replicas = self.dp * (self.fsdp or 1)
        if packs_per_step % replicas:
            raise ValueError(f"{key} = {packs_per_step} is not a multiple of dp {self.dp} x fsdp {self.fsdp} = {replicas}")
        count = packs_per_step // replicas
        if self.pp > 1 and (count < self.pp or count % self.pp):
            raise ValueError(
                f"a pipeline of {self.pp} ranks needs a multiple of {self.pp} packs a step on each data rank, and has {count}: "
                f"{key} = {packs_per_step} over dp {self.dp} x fsdp {self.fsdp}"
            )
        return count
