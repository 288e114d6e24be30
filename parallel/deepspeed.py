"""DeepSpeed as the other runtime: its ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) shards the same model over all processes.

Losses, gradients, norms, initial weights and checkpoints are those of the torch runtime. DeepSpeed owns the gradients from
``accumulate`` to the step, and the step; what it means by them is set here to what Smalt means.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from smalt.model import ModelConfig, MultimodalModel, PackedBatch, pack
from smalt.model.init import initial_rows
from smalt.model.language import DecoderBlock

from .batch import PackShard
from .config import ParallelConfig
from .gradients import check_gradients
from .layout import Bounds
from .mesh import World
from .model import ParallelModel, freeze
from .part import ModelPart
from .recompute import recompute_blocks
from .sharding import round_weights
from .swap import swap_folder

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 500_000_000
"""Most elements of gradients that are reduced at a time: DeepSpeed's own default."""
NVME_GROUP = 100_000_000
"""Elements that are read from the disk, stepped and written back at a time."""


class DeepSpeedModel(ParallelModel):
    """The model under ZeRO-2 or ZeRO-3; :meth:`start` hands it to DeepSpeed and makes its optimiser.

    Parameters are those of :class:`ParallelModel`. ``skeleton`` is the whole model on meta, for the groups of the optimiser: under
    ZeRO-3 parameters lose their shapes. Raises ValueError where DeepSpeed is not installed, or lacks what the config needs.
    """

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        seed: int,
        dtype: torch.dtype,
        trainable: Collection[str],
        sequence_length: int,
        autocast: bool = False,
    ):
        self.disk = _swap_folder(world.parallel)
        self.library = load_deepspeed(world)
        with torch.device("meta"):
            self.skeleton = MultimodalModel(config).to(dtype)
        freeze(self.skeleton, trainable)
        num_parameters = sum(p.numel() for p in self.skeleton.parameters())
        self.settings = zero_settings(world.parallel, num_parameters, self.disk.name if self.disk else None)
        self.stage3 = world.parallel.deepspeed.stage == 3
        # ZeRO-3 averages gradients over ranks and cannot be told to sum them, as ZeRO-2 can. A power of two changes no bit.
        self.loss_scale = float(world.size) if self.stage3 else 1.0
        self.engine: Any = None
        self.steps = 0  # AdamW's count
        self.divisor = 1.0  # of gradients, in the next step
        self.waiting = False  # gradients for a step
        super().__init__(config, world, seed, dtype, trainable, sequence_length, autocast=autocast)

    def _build(self, blocks: range, trainable: Collection[str], seed: int) -> ModelPart:
        """Parameters are made module by module, children first; ZeRO-3 cuts each before the next is made."""
        with torch.device("meta"):
            part = ModelPart(self.config, blocks, self.world, self.autocast).to(self.dtype)
        freeze(part, trainable)
        recompute_blocks(part, self.world.parallel)
        for prefix, module in reversed(list(part.named_modules())):
            module.to_empty(device=self.world.device, recurse=False)
            own = list(module.named_parameters(prefix, recurse=False))
            with torch.no_grad():
                for name, p in own:
                    p.copy_(initial_rows(self.config, name, p.shape, seed, 0, len(p)))
            if self.stage3 and own:
                self.library.zero.Init(module=module, config_dict_or_path=self.settings)
        if self.stage3:
            _name_borrowed(part, self.library.zero.register_external_parameter)
        if self.autocast:
            # Linear maps round their weights themselves; of a rounded copy made before, backward would keep every one.
            round_weights(part, torch.bfloat16, but=nn.Linear)
        return part

    def start(self, groups: list[dict[str, Any]], rate: float, betas: tuple[float, float], eps: float) -> ZeroOptimizer:
        """Hand the model, with the weights that it has, to DeepSpeed; once, before the first pack.

        groups: of the skeleton's parameters, as AdamW takes them.
        """
        names = {p: name for name, p in self.skeleton.named_parameters()}
        mine = dict(self.named_parameters())
        groups = [{**group, "params": [mine[names[p]] for p in group["params"]]} for group in groups]
        # DeepSpeed puts parameters of its own into AdamW's groups.
        self.adamw = torch.optim.AdamW([dict(group) for group in groups], rate, betas, eps, fused=True)
        self.engine, *_ = self.library.initialize(
            model=self.parts[0], optimizer=self.adamw, config=self.settings, dist_init_required=False
        )
        self._divide_gradients(1.0)
        return ZeroOptimizer(self, groups, rate)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this rank holds of them."""
        return (getattr(p, "ds_tensor", p) for _, p in self.named_parameters())

    def accumulate(self, packs: list[PackedBatch], loss: Callable[[Tensor, PackShard], Tensor]) -> Tensor:
        """As in :class:`ParallelModel`, but DeepSpeed reduces the gradients of every pack."""
        self._begin(packs)
        (part,), total, numbers = self.parts, self._zero(), self._numbers(len(packs))
        reached, hooks = self._watch()
        for i, shard in enumerate(part.shards):
            self.engine.set_gradient_accumulation_boundary(i == len(packs) - 1)
            value = loss(self.engine(microbatch=numbers[i]), shard)
            total += value.detach()
            # A loss that is not finite makes gradients that are not: by those DeepSpeed drops a step.
            factor = torch.where(value.detach().isfinite(), self.loss_scale, math.nan)
            self.engine.backward(value * factor, scale_wrt_gas=False)
        self.waiting = True
        for hook in hooks:
            hook.remove()
        if not self.checked:
            # DeepSpeed has taken away the gradients themselves.
            check_gradients({name: p for name, p in self.named_parameters() if name not in reached})
            self.checked = True
        return total

    def _watch(self) -> tuple[set[str], list[Any]]:
        """The names that gradients reach, filled as they do, and the hooks that fill it; no hooks after the first time."""
        reached: set[str] = set()
        learning = [(name, p) for name, p in self.named_parameters() if p.requires_grad and not self.checked]
        return reached, [p.register_hook(lambda _, name=name: reached.add(name)) for name, p in learning]

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient, the same on every rank; after :meth:`clip_gradients`, of the clipped one."""
        if self.stage3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            # The one private name of DeepSpeed: the norm as its step takes it, wherever the gradients are.
            norm = combine_grad_norm_groups(self.engine.optimizer._get_norm_groups())
        else:
            norm = self.engine.optimizer.scaled_global_norm()
        return float(norm) / self.divisor

    def clip_gradients(self, max_norm: float) -> float:
        """Have the step scale the gradients so that their norm is at most ``max_norm``; returns the norm before."""
        norm = self.gradient_norm()
        # DeepSpeed's own clipping adds 1e-6 to the norm.
        self.divisor = norm / max_norm if max_norm < norm < math.inf else 1.0
        return norm

    def step(self, rates: list[float]) -> None:
        """Step the weights. rates: the learning rate of each group."""
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate
        if not self._run_step():
            raise RuntimeError(f"DeepSpeed {self.library.__version__} dropped a step whose gradients are finite")
        if self.steps == 0 and not self.stage3:
            self._link_moments()
        self.steps += 1

    def _link_moments(self) -> None:
        """After the first step: DeepSpeed links parameters to their moments when it has stepped the first group, and no other."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.engine.optimizer
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, self.adamw.state)

    def drop_gradients(self) -> None:
        """Forget gradients that no step was taken with. DeepSpeed forgets only what is not finite, so finite ones are made so."""
        if not self.waiting:
            return
        if math.isfinite(self.gradient_norm()):
            empty = self._empty_pack()
            self.accumulate([replace(empty, labels=torch.zeros_like(empty.labels))], lambda nll, shard: nll.sum() * math.nan)
        if self._run_step():
            raise RuntimeError(f"DeepSpeed {self.library.__version__} took a step with gradients that are not finite")

    def _run_step(self) -> bool:
        """DeepSpeed's step; whether it took one."""
        self._divide_gradients(self.divisor)
        self.engine.step()
        self._divide_gradients(1.0)
        self.divisor, self.waiting = 1.0, False
        return self.engine.was_step_applied()

    def _divide_gradients(self, divisor: float) -> None:
        """By what the step divides gradients: DeepSpeed's loss scale. It would multiply losses by it too, so it is 1 between steps."""
        self.engine.optimizer.override_loss_scale(divisor)

    def close(self) -> None:
        """Let go of gradients and moments."""
        self.engine.destroy()
        self.adamw.state.clear()
        self.engine = None
        if self.disk:
            self.disk.cleanup()

    def copy_weights(self, other: ParallelModel) -> None:
        """Take the weights of a model on the same layout."""
        theirs = dict(other.named_parameters())
        for name, p in self.named_parameters():
            self._write(p, self._whole(theirs[name]))

    def fill(self, values: Mapping[str, Callable[[Bounds], Tensor]]) -> None:
        """Take weights from elsewhere. Each is made whole on every rank, one after the other."""
        shapes = {name: p.shape for name, p in self.skeleton.named_parameters()}
        for name, p in self.named_parameters():
            if name in values:
                self._write(p, values[name](tuple((0, size) for size in shapes[name])))

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter of the model, whole, on each rank. Every rank of the world calls it."""
        return {name: self._whole(p) for name, p in self.named_parameters()}

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, sharded along dim 0 over all ranks: copies, gathered one after the other."""
        return {name: self._share(self._whole(p)) for name, p in self.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """Clipped gradients, sharded as :meth:`weights`, between :meth:`accumulate` and the step."""
        from deepspeed.utils import safe_get_full_grad

        return {name: self._share(safe_get_full_grad(p) / self.divisor) for name, p in self._learning()}

    def state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of a parameter that learns, as torch's AdamW has it: copies, the moments sharded as :meth:`weights`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.steps == 0:  # DeepSpeed has none yet
            zeros = torch.zeros(getattr(p, "ds_shape", p.shape), device=self.world.device)
            moments = {moment: self._share(zeros) for moment in MOMENTS}
        else:
            moments = {moment: self._share(safe_get_full_optimizer_state(p, moment)) for moment in MOMENTS}
        return {"step": torch.tensor(float(self.steps)), **moments}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Write weights, and AdamW's state in the form of :meth:`state_of`, to where DeepSpeed has them.

        Raises ValueError where parameters have taken different numbers of steps.
        """
        self.restore_state(tensors)
        for name, p in self.named_parameters():
            self._write(p, self._whole(tensors[f"model.{name}"]))

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """:meth:`restore` of AdamW's state alone; the weights stay as they are."""
        steps = {int(value) for key, value in tensors.items() if key.startswith("optimizer.step.")}
        if len(steps) != 1:
            raise ValueError(f"DeepSpeed counts the steps of all parameters as one, and here they are {sorted(steps)}")
        self._make_moments()
        for moment in MOMENTS:
            for name, p in self._learning():
                self._write_moment(p, self._whole(tensors[f"optimizer.{moment}.{name}"]), moment)
        (self.steps,) = steps
        for state in self.adamw.state.values():
            state["step"].fill_(self.steps)

    def _make_moments(self) -> None:
        """DeepSpeed makes AdamW's moments, wherever they are to be, in its first step: take one on an empty pack, at rate 0."""
        self.accumulate([self._empty_pack()], lambda nll, shard: nll.sum())
        self.step([0.0] * len(self.adamw.param_groups))

    def _empty_pack(self) -> PackedBatch:
        return pack([], self.sequence_length, self.config.image_attention, self.config.vision.tile)

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def _share(self, whole: Tensor) -> Tensor:
        """This rank's rows, in memory of their own, of a tensor that every rank has."""
        assert self.world.meshes is not None
        cut = distribute_tensor(whole, self.world.meshes.weights, [Shard(0)], src_data_rank=None)
        assert isinstance(cut, DTensor)
        own = cut.to_local().clone()
        return DTensor.from_local(own, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride())

    def _whole(self, tensor: Tensor) -> Tensor:
        """A copy of a parameter, or of a DTensor, with every shard gathered."""
        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
        with self.library.zero.GatheredParameters(tensor):
            return tensor.detach().clone()

    def _write(self, p: nn.Parameter, whole: Tensor) -> None:
        """Into the parameter, and into the copy of it that DeepSpeed steps."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with torch.no_grad(), self.library.zero.GatheredParameters(p, modifier_rank=0):
            p.copy_(whole)
        if self.engine is None or not p.requires_grad:
            return
        if self.stage3:
            safe_set_local_fp32_param(p, self._partition(whole))
        else:
            safe_set_full_fp32_param(p, whole)

    def _write_moment(self, p: nn.Parameter, whole: Tensor, moment: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage3:
            safe_set_local_optimizer_state(p, self._partition(whole), moment)
        else:
            safe_set_full_optimizer_state(p, whole, moment)

    def _partition(self, whole: Tensor) -> Tensor:
        """This rank's elements of a parameter as ZeRO-3 cuts it: flat, in equal parts, the last ones filled up with zeros."""
        size = math.ceil(whole.numel() / self.world.size)
        own = whole.flatten()[self.world.rank * size :][:size]
        return torch.cat([own, own.new_zeros(size - len(own))])


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's step as an optimiser of torch. Its state is DeepSpeed's, by DeepSpeed's own parameters: :meth:`copy_state`."""

    def __init__(self, model: DeepSpeedModel, groups: list[dict[str, Any]], rate: float):
        super().__init__(groups, {"lr": rate})
        self.model, self.state = model, model.adamw.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Scale the gradients as they were clipped, and step the weights."""
        self.model.step([group["lr"] for group in self.param_groups])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step was taken with."""
        self.model.drop_gradients()

    def copy_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of one of the model's parameters. Every rank of the world calls it."""
        return self.model.state_of(p)


def load_deepspeed(world: World) -> Any:
    """The library, for the kind of device of this process. Raises ValueError where it cannot be had."""
    # It chooses a kind of device once, when it is imported, and would take a GPU that the run leaves alone.
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise ValueError(
            f'parallel.runtime = "deepspeed", and DeepSpeed cannot be imported ({error}): pip install "smalt[deepspeed]", or set '
            'parallel.runtime to "torch"'
        ) from error
    chosen = get_accelerator().device_name()
    if chosen != world.device.type:
        raise ValueError(f"the device is {world.device.type}, and DeepSpeed runs on {chosen} in this process: start a new one")
    if world.device.type == "cpu":
        # Compiled where processes meet, for minutes; of use to inference alone.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.parallel.deepspeed.offload_optimizer == "nvme":
        _load_async_io()
    # What torch tells DeepSpeed, at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated")
    return deepspeed


def _load_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    try:
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("libaio or its headers are not found")
        builder.load(verbose=False)
    except Exception as error:  # of compilers, linkers and loaders
        raise ValueError(
            f'parallel.deepspeed.offload_optimizer = "nvme": DeepSpeed cannot build its async_io ({error}); install libaio with its '
            'headers (libaio-dev or libaio-devel) and a C++ compiler, or set offload_optimizer to "cpu"'
        ) from error


def _swap_folder(parallel: ParallelConfig) -> TemporaryDirectory[str] | None:
    """A folder of this process's own on the disk, for the optimiser's state."""
    disk = parallel.deepspeed.nvme_path
    if parallel.deepspeed.offload_optimizer != "nvme" or disk is None:
        return None
    try:
        return swap_folder(disk)
    except OSError as error:
        raise ValueError(f"parallel.deepspeed.nvme_path = {disk}: {error.strerror}") from error


def zero_settings(parallel: ParallelConfig, num_parameters: int, nvme_path: str | None) -> dict[str, Any]:
    """DeepSpeed's own config. nvme_path: this process's folder on the disk."""
    own = parallel.deepspeed
    # DeepSpeed allocates as many elements as it is to reduce at a time.
    zero: dict[str, Any] = {"stage": own.stage, "reduce_bucket_size": min(BUCKET, num_parameters)}
    if own.stage == 3:
        zero["stage3_param_persistence_threshold"] = own.keep_whole
    if own.stage == 3 and not parallel.prefetch:
        zero["stage3_prefetch_bucket_size"] = 0
    if own.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": own.offload_optimizer, "nvme_path": nvme_path}
    if own.offload_optimizer == "nvme":
        zero["sub_group_size"] = NVME_GROUP
    settings: dict[str, Any] = {
        # A pack is a microbatch; which is the last of a step is said as they come.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # torch's AdamW steps everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if own.stage == 2:
        settings["gradient_allreduce_op"] = "sum"
    return settings


def _name_borrowed(part: ModelPart, register: Callable[[nn.Module, Tensor], None]) -> None:
    """Tell ZeRO-3, which gathers weights for the module that is called, of modules that read the weight of another."""
    register(part, part.language.head_weight)
    for block in part.language.blocks.values():
        assert isinstance(block, DecoderBlock)
        for norm in (block.attention.q_norm, block.attention.k_norm):
            if norm is not None:
                register(block.attention, norm.weight)
