"""The hand-written derivatives, number by number: Triton's on the GPU where there is one or in Triton's interpreter,
else the closed forms that CPU tensors get.

The interpreter has to be chosen before the kernels are imported: `test_kernels_interpreter.py` runs this file once more
in a process of its own.
"""

import importlib
import os

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kernels import benchmark, modulate, modulate_reference, modulated_step, modulated_step_reference

source = importlib.import_module("kernels.modulate")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNEL = "triton" if INTERPRETED or DEVICE == "cuda" else "closed"
triton_only = pytest.mark.skipif(KERNEL != "triton", reason="about the Triton kernels")
SHAPES = [(1, 1), (1, 64), (5, 7), (33, 130)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NETWORK = [(6, 9), (1, 4), (5, 20), (1, 6)]                 # two matrices and two biases


def random(*shape, dtype=torch.float64, seed=0):
    """Return normal values rounded to dtype, drawn on the CPU so that every device gets the same."""
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def inputs(shape, tasks=2, dtype=torch.float64, theta="shared", seed=0):
    """Return theta, grad, row, col that require gradients."""
    n1, n2 = shape
    theta_shape = {"shared": (n1, n2), "per task": (tasks, n1, n2)}[theta]
    shapes = theta_shape, (tasks, n1, n2), (tasks, n1), (tasks, n2)
    return [random(*s, dtype=dtype, seed=100 * seed + k).requires_grad_() for k, s in enumerate(shapes)]


def network_inputs(tasks=2, dtype=torch.float64, shapes=NETWORK):
    """Return lists thetas, grads, rows, cols."""
    return [list(group) for group in zip(*(inputs(s, tasks, dtype, seed=k) for k, s in enumerate(shapes)))]


def fused_step(*tensors):
    return modulated_step(*tensors, kernel=KERNEL)


def fused(*tensors):
    return modulate(*tensors, kernel=KERNEL)


def all_orders(step, tensors, context_only=False, drawn_in=None):
    """Return y, its gradients, and the gradients of those, all with fixed random cotangents.

    `drawn_in`: dtype to which the cotangents are rounded first, so that a wider computation sees the same numbers.
    With `context_only` the second order starts from the gradients of row and col, as ModGrad's context does.
    """
    grad, row, col = tensors[-3:]
    cotangents = [random(*t.shape, dtype=drawn_in or t.dtype, seed=50 + k).detach().to(t.dtype)
                  for k, t in enumerate((grad, grad, row, col))]
    G = cotangents[0].requires_grad_()
    y = step(*tensors)
    first = torch.autograd.grad(y, tensors, G, create_graph=True)
    start, weights = (first[-2:], cotangents[2:]) if context_only else (first[-3:], cotangents[1:])
    second = torch.autograd.grad(start, (G, grad, row, col), weights)
    return [value.detach() for value in (y, *first, *second)]


def assert_as_good_as_eager(step, reference, tensors, context_only=False):
    """Assert that each error is at most twice that of eager in the same dtype plus one unit of rounding; four times for the
    closed forms, whose terms are multiplied by 1 / a and 1 / b and so have twice the roundings.

    The unit covers an eager result that is exact by luck and the interpreter's truncating bfloat16 cast.
    """
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = all_orders(reference, wide, context_only, tensors[-1].dtype)
    eager = all_orders(reference, tensors, context_only)
    for index, (true, plain, ours) in enumerate(zip(exact, eager, all_orders(step, tensors, context_only))):
        assert ours.dtype == tensors[0].dtype and ours.shape == true.shape
        factor = 2 if KERNEL == "triton" else 4
        allowed = factor * (plain.double() - true).abs().max() + torch.finfo(ours.dtype).eps * true.abs().max()
        error = (ours.double() - true).abs().max()
        assert error <= allowed, f"result {index}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def no_matrix_is_small(monkeypatch):
    monkeypatch.setattr(source, "CLOSED_FROM", 1)


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 4 x 8, three down per program, so that small matrices have many tiles of every kind."""
    monkeypatch.setattr(source, "_block", lambda n1, n2: (4, 8, 3))
    source._plan.cache_clear()
    yield
    source._plan.cache_clear()


@pytest.fixture(params=[False, pytest.param(True, marks=triton_only)], ids=["small", "large"])
def large(request, monkeypatch):
    """Both ways to the gradient of a shared theta: that of small matrices, and that of large ones for all that are not biases."""
    if request.param:
        monkeypatch.setattr(source, "LARGE", 8)
    return request.param


# --- values -----------------------------------------------------------------------------------------------

@triton_only
@pytest.mark.parametrize("theta", ["shared", "per task", "expanded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_forward_is_bitwise_eager(shape, theta, monkeypatch):
    # A fused multiply-add rounds once where eager rounds twice, so it is switched off for this comparison.
    monkeypatch.setattr(source, "LAUNCH_OPTIONS", {**source.LAUNCH_OPTIONS, "enable_fp_fusion": False})
    first, *rest = inputs(shape, 3, torch.float32, "shared" if theta == "expanded" else theta)
    first = first.expand(3, *shape) if theta == "expanded" else first
    assert torch.equal(fused_step(first, *rest), modulated_step_reference(first, *rest))
    assert torch.equal(fused(*rest), modulate_reference(*rest))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_orders_as_good_as_eager(shape, dtype, large):
    assert_as_good_as_eager(fused_step, modulated_step_reference, inputs(shape, 3, dtype))
    assert_as_good_as_eager(fused, modulate_reference, inputs(shape, 3, dtype)[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tensors_are_rounded_once(dtype, large):
    tensors = inputs((33, 130), 2, dtype)
    exact = all_orders(modulated_step_reference, [t.detach().double().requires_grad_() for t in tensors], drawn_in=dtype)
    for index, (ours, true) in enumerate(zip(all_orders(fused_step, tensors), exact)):
        if index == 1 and KERNEL == "closed":
            continue                               # the gradient of theta is PyTorch's own sum over tasks
        # One rounding at the end (the interpreter truncates bfloat16, hence eps and not eps / 2), float32 before.
        allowed = torch.finfo(dtype).eps * true.abs() + 1e-5 * true.abs().max()
        assert ((ours.double() - true).abs() <= allowed).all(), f"result {index}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_context_path_without_cotangent_of_d_grad(dtype):
    tensors = inputs((5, 70), 2, dtype)
    assert_as_good_as_eager(fused_step, modulated_step_reference, tensors, context_only=True)


@triton_only
def test_programs_that_walk_down_several_tiles(tiny_tiles, large):
    for shape in [(1, 1), (13, 9), (26, 17)]:
        for ours, true in zip(all_orders(fused_step, inputs(shape)),
                              all_orders(modulated_step_reference, inputs(shape))):
            # Two float64 sums of at most 26 terms of order 10 differ by rounding alone: 26 * 10 * 2e-16.
            torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)


@triton_only
@pytest.mark.parametrize("tasks", [1, 17])
def test_many_partial_sums(tiny_tiles, large, tasks):
    # 17 > 16 column tiles, or tasks: the second stage takes more than one block of partial sums.
    ours, true = (all_orders(step, inputs((3, 136), tasks)) for step in (fused_step, modulated_step_reference))
    for one, other in zip(ours, true):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-12)      # 136 terms of order 10


@pytest.mark.parametrize("special", ["transposed grad", "expanded grad", "strided row", "expanded theta"])
def test_strided_inputs(special):
    theta, grad, row, col = inputs((5, 7), 3)
    if special == "transposed grad":
        grad = random(3, 7, 5).requires_grad_().transpose(1, 2)
    if special == "expanded grad":
        grad = random(1, 5, 7).requires_grad_().expand(3, 5, 7)
    if special == "strided row":
        row = random(3, 10).requires_grad_()[:, ::2]
    if special == "expanded theta":
        theta = random(7, 5).requires_grad_().t().expand(3, 5, 7)
    tensors = theta, grad, row, col
    for ours, true in zip(all_orders(fused_step, tensors), all_orders(modulated_step_reference, tensors)):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)


def test_expanded_output_gradient():
    tensors = inputs((5, 7))
    ours, true = (torch.autograd.grad(step(*tensors).sum(), tensors)
                  for step in (fused_step, modulated_step_reference))
    for one, other in zip(ours, true):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_shared_theta_is_the_sum_over_tasks(shape, large):
    theta, *rest = inputs(shape, 3)
    weights = random(3, *shape, seed=9).requires_grad_()
    ours, = torch.autograd.grad(fused_step(theta, *rest), theta, weights, create_graph=True)
    torch.testing.assert_close(ours, weights.sum(0), rtol=1e-15, atol=1e-15)       # three terms of order 1
    again, = torch.autograd.grad(ours, weights, random(*shape, seed=10))
    assert torch.equal(again, random(*shape, seed=10).expand(3, *shape))


@triton_only
def test_non_finite_values_follow_relu():
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -2.0, 1e-30, -1e-30],
                            device=DEVICE)
    row, col = specials.repeat(4, 1).requires_grad_(), specials.repeat(4, 1).requires_grad_()
    grad = torch.tensor([1.0, float("inf"), float("nan"), 0.0], device=DEVICE)[:, None, None].expand(4, 9, 9)
    grad, theta = grad.clone().requires_grad_(), torch.ones(9, 9, device=DEVICE)
    results = []
    for step in (fused_step, modulated_step_reference):
        y = step(theta, grad, row, col)
        results.append([y, *torch.autograd.grad(y, (grad, row, col), torch.ones_like(y))])
    assert results[1][0].isnan().any() and results[1][0].isfinite().any()
    for ours, true in zip(*results):
        torch.testing.assert_close(ours, true, rtol=0, atol=0, equal_nan=True)


@triton_only
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 130)])
def test_every_entry_is_written_and_nothing_beside_it(shape, monkeypatch, large):
    clean = all_orders(fused_step, inputs(shape))
    plain_empty, buffers, margin = torch.empty, [], 64

    def poisoned(size, dtype, device):
        """A tensor of NaN inside a larger one of NaN."""
        count = torch.Size(size).numel()
        buffers.append(plain_empty(count + 2 * margin, dtype=dtype, device=device).fill_(float("nan")))
        return buffers[-1][margin:margin + count].view(size)

    monkeypatch.setattr(source.torch, "empty", poisoned)
    results = all_orders(fused_step, inputs(shape))
    monkeypatch.undo()
    assert len(buffers) == 11                      # forward 1, backward 2 + 3, double backward 2 + 3
    assert all(torch.equal(one, other) for one, other in zip(results, clean))
    for buffer in buffers:
        assert buffer[:margin].isnan().all() and buffer[-margin:].isnan().all()
        assert buffer[margin:-margin].isfinite().all()


def test_euler_identity(large):
    # relu(a b^T) has degree one in a and in b, so a . d_a = b . d_b = s <m ⊙ g, G> for each task.
    theta, grad, row, col = inputs((33, 130), 3, torch.float32)
    G = random(3, 33, 130, dtype=torch.float32, seed=8)
    d_row, d_col = torch.autograd.grad(fused_step(theta, grad, row, col), (row, col), G)
    terms = modulate_reference(grad, row, col) * G
    # A sum of 33 * 130 terms in a tree makes log2 of that many roundings, 12.
    bound = 12 * torch.finfo(torch.float32).eps * terms.abs().sum((1, 2))
    assert terms.abs().sum() > 0
    for value in ((row * d_row).sum(1), (col * d_col).sum(1)):
        assert ((value + terms.sum((1, 2))).abs() <= bound).all()


def test_repeated_runs_agree_bit_for_bit(large):
    tensors = inputs((33, 130), 3, torch.float32)
    first = all_orders(fused_step, tensors)
    for _ in range(250 if DEVICE == "cuda" else 2):
        assert all(torch.equal(one, other) for one, other in zip(all_orders(fused_step, tensors), first))


def test_a_task_does_not_depend_on_its_batch(large):
    theta, *rest = inputs((33, 130), 3, torch.float32)
    G, found = random(3, 33, 130, dtype=torch.float32, seed=9), []
    for tasks in (1, 3):
        y = fused_step(theta, *(t[:tasks] for t in rest))
        found.append([y, *torch.autograd.grad(y, rest, G[:tasks])])
    assert all(torch.equal(alone[:1], together[:1]) for alone, together in zip(*found))


@pytest.mark.skipif(DEVICE == "cpu", reason="70,000 programs take minutes in the interpreter")
def test_more_tasks_than_a_grid_axis_holds():
    tensors = inputs((2, 3), 70_000, torch.float32)
    assert_as_good_as_eager(fused_step, modulated_step_reference, tensors)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 17 GB and a GPU")
def test_offsets_beyond_32_bits():
    tasks, n = 5, 21_000                           # 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 30 * 2 ** 30:
        pytest.skip("needs 30 GB of free GPU memory")
    grad = torch.ones(tasks, n, n, device=DEVICE, dtype=torch.bfloat16)
    row = torch.arange(1, tasks + 1, device=DEVICE)[:, None].expand(tasks, n).to(torch.bfloat16)
    out = modulate(grad, row, torch.ones_like(row), kernel=KERNEL)
    assert all((out[task] == task + 1).all() for task in range(tasks))


@pytest.mark.skipif(KERNEL != "closed", reason="about the closed forms")
def test_zero_factors_close_the_gate_in_the_closed_forms():
    # Zeros and signs of every kind: 1 / a stands for 0 where a is 0, as relu's derivative does there.
    theta, grad, _, _ = inputs((4, 4), 2)
    row = torch.tensor([[0.0, -0.0, 1.5, -2.0]] * 2, dtype=torch.float64, requires_grad=True)
    col = torch.tensor([[3.0, 0.0, -0.5, 1e-200]] * 2, dtype=torch.float64, requires_grad=True)
    tensors = theta, grad, row, col
    for ours, true in zip(all_orders(fused_step, tensors), all_orders(modulated_step_reference, tensors)):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)
    row = torch.full((2, 4), 1e-310, dtype=torch.float64, requires_grad=True)        # 1 / row overflows
    assert all(value.isfinite().all() for value in all_orders(fused_step, (theta, grad, row, col)))


@pytest.mark.skipif(KERNEL != "closed", reason="about the closed forms")
def test_values_of_the_closed_forms_are_exact_for_non_finite_numbers():
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -2.0, 1e-30, -1e-30])
    row, col = specials.repeat(4, 1), specials.repeat(4, 1)
    grad = torch.tensor([1.0, float("inf"), float("nan"), 0.0])[:, None, None].expand(4, 9, 9)
    ours, true = (step(torch.ones(9, 9), grad, row, col) for step in (fused_step, modulated_step_reference))
    torch.testing.assert_close(ours, true, rtol=0, atol=0, equal_nan=True)


# --- lists ------------------------------------------------------------------------------------------------

def test_list_form_equals_single_form(large):
    thetas, grads, rows, cols = network_inputs(dtype=torch.float32)
    together = fused_step(thetas, grads, rows, cols)
    alone = [fused_step(*entry) for entry in zip(thetas, grads, rows, cols)]
    assert isinstance(together, list) and all(torch.equal(*pair) for pair in zip(together, alone))
    leaves = thetas + grads + rows + cols
    derivatives = [torch.autograd.grad(sum(y.square().sum() for y in out), leaves, create_graph=True)
                   for out in (together, alone)]
    assert all(torch.equal(*pair) for pair in zip(*derivatives))
    second = [torch.autograd.grad(sum(d.square().sum() for d in first), leaves) for first in derivatives]
    assert all(torch.equal(*pair) for pair in zip(*second))


def test_list_of_mixed_theta_and_of_more_tensors_than_one_launch():
    shapes = [(1, 2 + k) for k in range(source.MAX_TENSORS_PER_LAUNCH + 1)]
    thetas, grads, rows, cols = network_inputs(shapes=shapes, dtype=torch.float32)
    thetas[1] = random(2, 1, 3, dtype=torch.float32)
    steps, alone = fused_step(thetas, grads, rows, cols), fused(grads, rows, cols)
    assert len(steps) == len(alone) == len(shapes)
    for ours, entry in zip(steps, zip(thetas, grads, rows, cols)):
        # A fused multiply-add saves one rounding of numbers of order 1.
        torch.testing.assert_close(ours, modulated_step_reference(*entry), rtol=2e-7, atol=2e-7)
    for ours, entry in zip(alone, zip(grads, rows, cols)):
        torch.testing.assert_close(ours, modulate_reference(*entry), rtol=2e-7, atol=0)


def test_list_output_that_is_not_used():
    tensors = network_inputs()
    _, grads, rows, _ = tensors
    unused, used = torch.autograd.grad(fused_step(*tensors)[1].sum(), (rows[0], rows[1]))
    assert not unused.any() and used.any()


# --- derivatives ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("theta", ["shared", "per task"])
def test_derivatives_fast(theta, tiny_tiles, large):
    tensors = inputs((5, 9), theta=theta)
    assert gradcheck(fused_step, tensors, fast_mode=True)
    assert gradgradcheck(fused_step, tensors, fast_mode=True)


def test_derivatives_of_modulate_fast():
    assert gradcheck(fused, inputs((3, 5))[1:], fast_mode=True)
    assert gradgradcheck(fused, inputs((3, 5))[1:], fast_mode=True)


def test_derivatives_every_entry():
    tensors = inputs((2, 3), 1)
    assert gradcheck(fused_step, tensors)
    assert gradgradcheck(fused_step, tensors)


def test_derivatives_of_a_list_fast(large):
    tensors = [t for group in network_inputs(shapes=[(3, 3), (1, 4)]) for t in group]       # with `large` one of each kind

    def flat(*flat_tensors):
        return tuple(fused_step(*(list(flat_tensors[k:k + 2]) for k in range(0, 8, 2))))

    assert gradgradcheck(flat, tensors, fast_mode=True)


@pytest.mark.parametrize("context_only", [False, True])
def test_third_derivatives_equal_eager(context_only):
    results = []
    for step in (fused_step, modulated_step_reference):
        tensors = inputs((3, 5))
        order = torch.autograd.grad(step(*tensors).square().sum(), tensors, create_graph=True)
        order = order[-2:] if context_only else order
        order = torch.autograd.grad(sum(d.square().sum() for d in order), tensors[1:], create_graph=True)
        results.append(torch.autograd.grad(sum(d.square().sum() for d in order), tensors[1:]))
    for ours, true in zip(*results):
        assert true.abs().max() > 0
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-9)    # entries reach 1e5 in float64


def test_meta_gradient_of_an_inner_step_equals_eager():
    def meta_gradient(step):
        theta, x, nu_weight = random(4, 6).requires_grad_(), random(3, 8, 6), random(10, 5, seed=7)
        nu_weight.requires_grad_()
        nu = torch.ones(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
        start = theta.expand(3, 4, 6)

        def loss(weight):
            return torch.tanh(x @ weight.transpose(1, 2)).square().sum()

        grad, = torch.autograd.grad(loss(start), start, create_graph=True)
        factors = (nu @ nu_weight.t()).abs()
        trial = step(start, grad, factors[:, :4], factors[:, 4:])
        context, = torch.autograd.grad(loss(trial), nu, create_graph=True)
        factors = ((nu - context) @ nu_weight.t()).abs()
        outer = loss(step(start, grad, factors[:, :4], factors[:, 4:]))
        return torch.autograd.grad(outer, (theta, nu_weight))

    for ours, true in zip(meta_gradient(fused_step), meta_gradient(modulated_step_reference)):
        assert true.abs().min() > 0
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-11)   # a chain of ~1e3 float64 operations


# --- torch.func -------------------------------------------------------------------------------------------

def quadratic(step):
    return lambda row, theta, grad, col: step(theta, grad, row, col).square().sum()


def mapped_inputs(in_dims):
    """Return row, theta, grad, col for vmap, four of each where mapped."""
    shapes = [[2, 3], [3, 5], [2, 3, 5], [2, 5]]
    for shape, axis in zip(shapes, in_dims):
        if axis is not None:
            shape.insert(axis, 4)
    return [random(*shape, seed=k) for k, shape in enumerate(shapes)]


def test_func_second_derivative_equals_eager():
    theta, grad, row, col = (t.detach() for t in inputs((3, 5)))

    def second(step):
        first = torch.func.grad(quadratic(step))
        return torch.func.grad(lambda r: first(r, theta, grad, col).square().sum())(row)

    torch.testing.assert_close(second(fused_step), second(modulated_step_reference), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, None, 0, 0), (1, 0, 1, None), (None, None, 2, 1)])
def test_vmap_of_gradients_equals_eager(in_dims):
    tensors = mapped_inputs(in_dims)

    def first(step):
        every = torch.func.grad(quadratic(step), argnums=(0, 1, 2, 3))
        return torch.func.vmap(every, in_dims)(*tensors)

    def over_the_map(step):
        total = lambda *args: torch.func.vmap(quadratic(step), in_dims)(*args).sum()
        return torch.func.grad(total, argnums=(0, 1, 2, 3))(*tensors)

    for of in (first, over_the_map):
        for ours, true in zip(of(fused_step), of(modulated_step_reference)):
            assert true.any()
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, None, 0, 0), (1, 0, 1, None), (None, None, 2, 1)])
def test_vmap_of_second_derivative_equals_eager(in_dims):
    tensors = mapped_inputs(in_dims)

    def second(step):
        first = torch.func.grad(quadratic(step))
        return torch.func.vmap(torch.func.grad(lambda *args: first(*args).square().sum()), in_dims)(*tensors)

    torch.testing.assert_close(second(fused_step), second(modulated_step_reference), rtol=1e-12, atol=1e-9)


def test_jacrev_equals_eager():
    theta, grad, row, col = (t.detach() for t in inputs((2, 3)))
    ours, true = (torch.func.jacrev(lambda r: step(theta, grad, r, col))(row)
                  for step in (fused_step, modulated_step_reference))
    torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)


def test_benchmark_finds_the_kernels_in_agreement():
    case = benchmark.make_case([(5, 70), (1, 9)], 2, torch.float32, torch.device(DEVICE))
    names = ("triton", "triton-single") if KERNEL == "triton" else ("closed",)
    contenders = {name: benchmark.make_passes(name, case) for name in names}
    assert 0 < max(benchmark.check_agreement(contenders, case, "here").values()) <= 1
