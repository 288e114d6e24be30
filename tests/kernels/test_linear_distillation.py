"""KL from a teacher's head to a student's: kernel, plain torch and definition."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.kernels import backend, linear_distillation
from smalt.kernels.launch import TARGETS, recording

module = importlib.import_module("smalt.kernels.linear_distillation")
head = importlib.import_module("smalt.kernels.head")
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 2.0, "teacher_softcap": 5.0}, {"temperature": 2.0, "teacher_softcap": 1.0}]


def problem(T, D, E, V, dtype=torch.float32, seed=0, padding=0):
    """hidden, weight, teacher's hidden, teacher's weight, with rows that may be padded."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d + padding, generator=generator)[:, :d].to(dtype) for n, d in ((T, D), (V, D), (T, E), (V, E))]


def gradients_of(name, tensors, **options):
    hidden, weight, *teacher = (x.detach().requires_grad_() for x in tensors)
    with backend(name):
        kl = linear_distillation(hidden, weight, *teacher, **options)
    upstream = torch.linspace(-1, 2, len(kl), dtype=kl.dtype, device=kl.device)
    *gradients, none, nothing = torch.autograd.grad(kl, (hidden, weight, *teacher), upstream, allow_unused=True)
    assert none is None
    assert nothing is None
    return kl.detach(), gradients


@st.composite
def cases(draw):
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 80))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    tensors = problem(*shape, dtype, draw(st.integers(0, 99)), draw(st.integers(0, 3)))
    tensors[1] = tensors[1].to(draw(st.sampled_from([dtype, torch.float32])))
    return tensors, draw(st.sampled_from(OPTIONS))


def check_kernel(check_rule, device, tensors, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MIN_CHUNK", 32)
        check_rule(lambda *x: linear_distillation(*x, **options), [x.to(device) for x in tensors])


@pytest.mark.parametrize("options", OPTIONS)
def test_kernel_obeys_the_rule(check_rule, device, options):
    check_kernel(check_rule, device, problem(20, 9, 5, 40), options)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=25)
def test_kernel_obeys_the_rule_everywhere(check_rule, device, case):
    check_kernel(check_rule, device, *case)


@given(case=cases(), chunk_elements=st.sampled_from([1, 300, 1 << 22]))
def test_torch_is_the_reference_in_float64(error, gradient_error, case, chunk_elements):
    tensors, options = [x.double() for x in case[0]], case[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_ELEMENTS", chunk_elements)
        got, gradients = gradients_of("torch", tensors, **options)
    want, want_gradients = gradients_of("reference", tensors, **options)
    assert error(got, want, floor=1e-3) < 1e-12
    assert gradient_error(gradients, want_gradients) < 1e-12 or tensors[1].shape[0] == 1  # of one word the gradient is noise


def test_reference_by_gradcheck():
    hidden, weight, *teacher = (x.double() for x in problem(4, 3, 2, 5))
    for options in ((1.0, None, None), (0.6, 1.5, 2.0)):
        assert torch.autograd.gradcheck(
            lambda h, w, options=options: module.linear_distillation_reference(h, w, *teacher, *options),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


def test_reference_is_torchs_own(error):
    hidden, weight, teacher_hidden, teacher_weight = (x.double() for x in problem(6, 4, 3, 9))
    log_p, log_q = ((h @ w.T / 0.7).log_softmax(-1) for h, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
    want = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    for name in ("reference", "torch"):
        with backend(name):
            got = linear_distillation(hidden, weight, teacher_hidden, teacher_weight, temperature=0.7)
        assert error(got, want) < 1e-13


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_a_teacher_that_agrees_leaves_nothing(name, device):
    hidden, weight, *_ = (x.to(device) for x in problem(20, 8, 8, 40))
    kl, gradients = gradients_of(name, [hidden, weight, hidden, weight])
    assert kl.abs().max() < 1e-6
    assert all(g.abs().max() < 1e-5 for g in gradients)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_large_logits_do_not_overflow(name, error, device):
    tensors = [x.to(device) for x in problem(20, 5, 4, 40)]
    tensors[0], tensors[2] = tensors[0] * 1e3, tensors[2] * 1e3
    kl, gradients = gradients_of(name, tensors)
    assert error(kl, gradients_of("reference", [x.double() for x in tensors])[0]) < 1e-5
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_nan_stays_in_its_row_and_is_not_hidden(name, device):
    for side in (0, 2):
        tensors = [x.to(device) for x in problem(20, 5, 4, 40)]
        tensors[side][3] = torch.nan
        assert gradients_of(name, tensors)[0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_gradient_is_asked_for(name, wanted, device):
    tensors = [x.to(device) for x in problem(20, 5, 4, 40)]
    want = gradients_of(name, tensors)[1][wanted]
    tensors[wanted] = tensors[wanted].detach().requires_grad_()
    with backend(name):
        kl = linear_distillation(*tensors)
    assert torch.equal(torch.autograd.grad(kl, tensors[wanted], torch.linspace(-1, 2, 20, device=device))[0], want)


@pytest.mark.slow
def test_a_row_depends_on_no_other(device):
    hidden, weight, teacher_hidden, teacher_weight = (x.to(device) for x in problem(19, 8, 5, 40))
    rows = torch.tensor([3, 15, 16, 18])

    def run(hidden, teacher_hidden):
        with backend("triton"):
            return linear_distillation(hidden, weight, teacher_hidden, teacher_weight)

    want = run(hidden, teacher_hidden)[rows]
    others = torch.randn_like(hidden) * 9, torch.randn_like(teacher_hidden)
    for other, mine in zip(others, (hidden, teacher_hidden), strict=True):
        other[rows] = mine[rows]
    assert torch.equal(run(*others)[rows], want)
    assert torch.equal(run(hidden[rows], teacher_hidden[rows]), want)
    assert torch.equal(run(hidden.roll(5, 0), teacher_hidden.roll(5, 0))[(rows + 5) % 19], want)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_autocast_multiplies_in_bf16_and_gives_fp32_gradients(name, error, device):
    tensors = [x.to(device) for x in problem(20, 8, 5, 40)]
    with torch.autocast(device, torch.bfloat16):
        kl, gradients = gradients_of(name, tensors)
    assert {x.dtype for x in (kl, *gradients)} == {torch.float32}
    want, _ = gradients_of("reference", [x.bfloat16().double() for x in tensors])
    assert error(kl, want) < 0.02
    assert error(kl, gradients_of("reference", [x.double() for x in tensors])[0]) > 1e-4


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    check_grid_order(linear_distillation, [x.to(device) for x in problem(20, 8, 5, 40)])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    tensors = [x.to(device) for x in problem(9, 6, 4, 20)]
    check_operator(lambda *x: linear_distillation(*x, temperature=0.7), tensors)
    hidden, weight, *teacher = tensors
    for name in ("triton", "torch"):
        args = (hidden.requires_grad_(), weight.requires_grad_(), *teacher, 0.7, None, 2.0, name)
        torch.library.opcheck(module._linear_distillation, args)


@pytest.mark.parametrize("target", TARGETS)
def test_the_wider_of_student_and_teacher_chooses_the_tiles(target):
    def configs(student, teacher):
        hidden, weight, *others = (x.to("meta") for x in problem(20, 9, 5, 40))
        tensors = hidden.to(student), weight.to(student), *(x.to(teacher) for x in others)
        with recording(target) as record:
            kl, lses = module.launch_forward(*tensors, 1.0, None, None)
            module.launch_backward(kl, lses, *tensors, 1.0, None, None, True, True)
        return {launch.name: launch.config for launch in record}

    narrow, wide = configs(torch.bfloat16, torch.bfloat16), configs(torch.float32, torch.float32)
    assert narrow["linear_distillation_forward"] != wide["linear_distillation_forward"]
    assert configs(torch.bfloat16, torch.float32) == configs(torch.float32, torch.bfloat16) == wide
    assert configs(torch.float16, torch.bfloat16) == narrow


def test_bad_arguments_are_named():
    hidden, weight, teacher_hidden, teacher_weight = problem(5, 4, 3, 6)
    for arguments, options, message in (
        ((hidden, weight[:, :3], teacher_hidden, teacher_weight), {}, r"hidden \(5, 4\), weight \(6, 3\)"),
        ((hidden, weight, teacher_hidden[:4], teacher_weight), {}, r"teacher's hidden \(4, 3\)"),
        ((hidden, weight, teacher_hidden, teacher_weight[:5]), {}, r"weight \(5, 3\) do not fit"),
        ((hidden[0], weight, teacher_hidden, teacher_weight), {}, r"hidden \(4,\)"),
        ((hidden, weight, teacher_hidden, teacher_weight), {"temperature": -1.0}, "temperature is -1.0"),
        ((hidden, weight, teacher_hidden, teacher_weight), {"teacher_softcap": 0.0}, "teacher_softcap is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_distillation(*arguments, **options)
