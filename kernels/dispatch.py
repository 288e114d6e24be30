"""Which implementation an operation runs on.

``triton``     Smalt's kernels: the default on a GPU; on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
``torch``      the same formulas in plain torch, arranged so that they do not compute what no row sees: the default elsewhere,
               and for dtypes that the kernels do not take (float64).
``reference``  the definition: dense, readable, any float dtype.
``liger``      Liger's kernels where it has the operation, Smalt's where it has not. To compare with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable

from .launch import INTERPRET, triton

BACKENDS = ("reference", "torch", "triton", "liger")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A plain global, not a ContextVar: torch.compile guards on it, and the threads of the backward pass see it.
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation of :mod:`smalt.kernels` inside the ``with`` block on the named implementation.

    Holds for the whole process. Raises ValueError for a name that is not one of ``BACKENDS``, and RuntimeError where ``triton``
    or ``liger`` is not installed.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name in ("triton", "liger") and triton is None:
        raise RuntimeError(f"backend {name!r} needs Triton, which is not installed: pip install triton")
    if name == "liger":
        _require_liger()
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def current_backend(x: Tensor | None = None) -> str:
    """The implementation in force for a tensor; without one, what was chosen, or ``torch``.

    Raises RuntimeError when ``triton`` was chosen and cannot run on the tensor's device.
    """
    if x is None:
        return _forced or "torch"
    on_gpu = x.device.type == "cuda"
    name = _forced or ("triton" if on_gpu and triton is not None else "torch")
    if name not in ("triton", "liger"):
        return name
    if x.dtype not in KERNEL_DTYPES:
        return "torch"
    if not on_gpu and not INTERPRET and not is_abstract(x):
        raise RuntimeError(
            f"kernel backend {name!r} needs a GPU, and the tensor is on {x.device}; to run the kernels in Triton's interpreter, "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    return name


def runs_kernel(implementation: str, x: Tensor, max_width: int | None = None) -> bool:
    """Whether an operator launches its kernel on x: it was asked to, and the rows of x are not wider than the kernel takes."""
    return implementation in ("triton", "liger") and (max_width is None or x.shape[-1] <= max_width)


def runs_definition(implementation: str, x: Tensor) -> bool:
    """Whether an operation of a few passes is its definition: asked to be, or in plain torch where nothing has to be widened, since
    there torch's own backward pass, which keeps what forward has, is faster than one that recomputes."""
    plain = implementation == "torch" and x.dtype in (torch.float32, torch.float64)
    return implementation == "reference" or (plain and not is_abstract(x))


def without_dispatcher(operator: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of torch.library, or, for plain torch on numbers, its function: small tensors feel the dispatcher.

    compute: what the operator is registered with. The first argument is a tensor, the last the implementation.
    """

    def call(*args: Any) -> Any:
        return compute(*args) if args[-1] == "torch" and not is_abstract(args[0]) else operator(*args)

    return call


def differentiable(operator: Any, compute: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """:func:`without_dispatcher` of an operator with a gradient: there a plain autograd function, that computes the same.

    setup, backward: what the operator's autograd is registered with.
    """
    compute.__signature__ = inspect.signature(compute)  # type: ignore[attr-defined]  # torch asks for it at every call
    members = {"forward": compute, "setup_context": setup, "backward": once_differentiable(backward)}
    plain: Any = type(compute.__name__, (torch.autograd.Function,), {name: staticmethod(f) for name, f in members.items()})
    return without_dispatcher(operator, plain.apply)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside, the operands alone decide what products round to. Autocast does not know meta tensors."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_abstract(x: Tensor) -> bool:
    """True where no numbers exist: tracing, FakeTensor, meta. The registered operators then stand in for every implementation."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, (FakeTensor, FunctionalTensor))


def _require_liger() -> None:
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        raise RuntimeError("backend 'liger' needs Liger, which is not installed: pip install liger-kernel") from error
