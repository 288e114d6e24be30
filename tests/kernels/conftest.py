"""How a kernel is judged: against float64, by twice the error that torch makes in the same precision.

Outputs are poisoned: uninitialised memory is NaN, so a row that a kernel forgets is seen. So is an address outside of the tensors.
"""

import itertools
import random
from contextlib import contextmanager, nullcontext

import pytest
import torch

from smalt.kernels import backend
from smalt.kernels.launch import INTERPRET
from smalt.profiling.kernels.bench_gate import FLOOR, errors

from .addresses import watched_addresses


@pytest.fixture(scope="session")
def device():
    """Where kernels run: a GPU, or a CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _watched():
    with watched_addresses() if INTERPRET else nullcontext():
        yield


def outputs_and_gradients(function, inputs, seed=0):
    """The outputs of function(*inputs) and the gradients of all floating inputs, for fixed random upstream gradients."""
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    outputs = function(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    differentiable = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    # Rounded to bf16, so that every precision is given the same gradient.
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in differentiable]
    wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    if not differentiable:
        return [y.detach() for y in outputs], []
    gradients = torch.autograd.grad(differentiable, wanted, upstream, allow_unused=True)
    return [y.detach() for y in outputs], list(gradients)


@pytest.fixture(scope="session")
def check_rule():
    """check_rule(function, inputs, floor=None): the rule for every output and every gradient of a function of kernels.

    The function runs on the ``triton`` backend and on ``reference`` in the inputs' precision, and on ``reference`` in float64.
    """

    def check(function, inputs, floor=None, seed=0):
        dtypes = {x.dtype for x in inputs if torch.is_tensor(x) and x.is_floating_point()}
        floor = max(FLOOR[d] for d in dtypes) if floor is None else floor
        wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
        with backend("triton"):
            kernel = outputs_and_gradients(function, inputs, seed)
        with backend("reference"):
            plain = outputs_and_gradients(function, inputs, seed)
            truth = outputs_and_gradients(function, wide, seed)
        for kind, got, base, want in zip(("output", "gradient"), kernel, plain, truth, strict=True):
            # Some true gradients are zero, or almost: against themselves they would be noise.
            given = [w for w in want if w is not None] if kind == "gradient" else []
            numel = sum(w.numel() for w in given)
            smallest = 1e-3 * (sum(w.square().sum().item() for w in given) / numel) ** 0.5 if numel else 0.0
            for i, (g, b, w) in enumerate(zip(got, base, want, strict=True)):
                assert (g is None) == (w is None), f"{kind} {i}: {g} is not {w}"
                if g is None:
                    continue
                assert g.dtype == b.dtype, f"{kind} {i}: {g.dtype} is not {b.dtype}"
                for name, mine, torchs in zip(("RMS", "max"), errors(g, w, smallest), errors(b, w, smallest), strict=True):
                    assert mine <= 2 * torchs + floor, f"{kind} {i}: {name} error {mine:.3g}, torch's {torchs:.3g}, floor {floor:.3g}"

    return check


@contextmanager
def random_grid_order(seed):
    """Inside, the interpreter visits the programs of every grid in a random order."""
    if not INTERPRET:
        pytest.skip("the order of a grid can only be chosen in the interpreter")
    from triton.runtime.interpreter import interpreter_builder

    original, orders, rng = interpreter_builder.set_grid_idx, {}, random.Random(seed)

    def set_grid_idx(x, y, z):
        dim = tuple(interpreter_builder.grid_dim)
        if (x, y, z) == (0, 0, 0):  # a new launch
            cells = list(itertools.product(*(range(n) for n in dim)))
            orders[dim] = dict(zip(cells, rng.sample(cells, len(cells)), strict=True))
        original(*orders[dim][x, y, z])

    interpreter_builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        interpreter_builder.set_grid_idx = original


@pytest.fixture(scope="session")
def check_grid_order():
    """check_grid_order(function, inputs, orders=100): every output and gradient has the same bits in any order of the grid."""

    def check(function, inputs, orders=100):
        with backend("triton"):
            first = outputs_and_gradients(function, inputs)
            for seed in range(orders):
                with random_grid_order(seed):
                    again = outputs_and_gradients(function, inputs)
                for a, b in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
                    assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()), f"order {seed} changes the result"

    return check


@pytest.fixture(scope="session")
def check_operator():
    """check_operator(function, inputs): fullgraph compilation of a function of kernels gives what eager gives, gradients too."""

    def check(function, inputs):
        torch._dynamo.reset()
        with backend("triton"):
            eager = outputs_and_gradients(function, inputs)
            compiled = outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
        for a, b in zip(itertools.chain(*eager), itertools.chain(*compiled), strict=True):
            assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num())

    return check


LAYOUTS = ("contiguous", "sliced", "transposed", "expanded", "strided")


def laid_out(x, layout):
    """x in memory as users bring it; "expanded": its first row instead, over and over, from one place in memory."""
    if layout == "sliced":  # columns of something wider
        return torch.cat([x, x[..., :1], x], -1)[..., x.shape[-1] + 1 :]
    if layout == "transposed":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x.repeat_interleave(2, -1)[..., ::2] if layout == "strided" else x


@pytest.fixture(scope="session")
def check_layouts():
    """check_layouts(function, inputs, layouts): the strides of the inputs and of the upstream gradient change no bit.

    layouts: one of LAYOUTS for each input, and one for the gradient.
    """

    def check(function, inputs, layouts):
        given, results = [laid_out(x, layout) for x, layout in zip(inputs, layouts[:-1], strict=True)], []
        for arrange in (lambda x: x, torch.Tensor.contiguous):
            leaves = [arrange(x).detach().requires_grad_() for x in given]
            with backend("triton"):
                y = function(*leaves)
                upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
                gradients = torch.autograd.grad(y, leaves, arrange(laid_out(upstream, layouts[-1])))
            results.append([y.detach(), *gradients])
        for strided, contiguous in zip(*results, strict=True):
            assert torch.equal(strided, contiguous)

    return check
