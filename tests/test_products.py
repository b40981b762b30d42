"""oneDNN's matrix products: against PyTorch's in double precision, in all orders, through training, and where they are taken."""

import pytest
import torch
import torch.nn.functional as F

import train_celeba as celeba
from kernels import linear, products

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def taken(monkeypatch):
    """As on Zen 5, for products of all sizes; holds (matrices, rows) of each one taken."""
    calls, by_onednn = [], products._by_onednn
    monkeypatch.setattr(products, "is_zen5", lambda: True)
    monkeypatch.setattr(products, "LEAST", {2: 0, 3: 0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(products, "_by_onednn", lambda a, b, bias: calls.append(tuple(a.shape)) or by_onednn(a, b, bias))
    return calls


def close(ours, exact):
    """Each to float32's rounding, relative to its largest number: 5e-6 seen, of third derivatives, also of PyTorch's own."""
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one row for all", "one column for all", "every second row"])
def test_a_product_of_any_layout(layout, taken):
    def make(rows, columns):
        return {"contiguous": lambda: torch.randn(rows, columns), "transposed": lambda: torch.randn(columns, rows).mT,
                "one row for all": lambda: torch.randn(1, columns).expand(rows, columns),
                "one column for all": lambda: torch.randn(rows, 1).expand(rows, columns),
                "every second row": lambda: torch.randn(2 * rows, columns)[::2]}[layout]()
    a, b, bias = make(37, 19), make(23, 19), torch.randn(23)
    close([products.product(a, b), products.product(a, b, bias)],
          [a.double() @ b.double().mT, F.linear(a.double(), b.double(), bias.double())])
    assert len(taken) == 2


@pytest.mark.parametrize("rows", [8, 9, 17])
def test_a_sum_over_many_rows_goes_in_parts(rows, taken, monkeypatch):
    monkeypatch.setattr(products, "LONG", 8)
    G, x = torch.randn(rows, 5), torch.randn(rows, 7)
    assert products._long(G.mT, x.mT) and not any(products._long(*pair) for pair in ((G[:7].mT, x[:7].mT), (G.mT, x.mT.contiguous())))
    close([products.product(G.mT, x.mT)], [G.double().mT @ x.double()])
    assert taken == [(5, rows)]


def three_orders(run, inputs):
    """The output, its gradient, and the gradients of a function of that gradient and of one of theirs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = run(*inputs)
    found = [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).pow(3).mean(), inputs, create_graph=True)]
    for _ in range(2):
        found += torch.autograd.grad(sum(g.pow(3).sum() for g in found[-len(inputs):]), inputs, create_graph=True)
    return [t.detach() for t in found]


@pytest.mark.parametrize("shapes", [[(9, 7), (5, 7), (5,)], [(3, 9, 7), (5, 7), (5,)], [(3, 9, 7), (3, 5, 7), (3, 5)]],
                         ids=["a matrix", "shared by tasks", "each task's own"])
@pytest.mark.parametrize("biased", [True, False])
def test_all_orders_of_a_layer(shapes, biased, taken):
    def plain(x, weight, *bias):
        return x @ weight.mT + (bias[0].unsqueeze(-2) if bias else 0)
    inputs = [torch.randn(shape) for shape in shapes[:2 + biased]]
    close(three_orders(linear, inputs), three_orders(plain, [t.double() for t in inputs]))
    assert len(taken) > 8 and {shape[0] for shape in taken} <= {9, 27, 5, 7}             # of the batch, or of one task


def test_a_gradient_that_nobody_asks_for_is_not_computed(taken):
    x, weight = torch.randn(9, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    torch.autograd.grad(linear(x, weight).sum(), weight)
    assert taken == [(9, 7), (5, 9)]                                                      # y and dL/dweight


def test_it_is_for_large_float32_products_on_zen5(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    large, weight = torch.zeros(250, 128), torch.zeros(128, 128)
    per_task = torch.zeros(3, 250, 128), torch.zeros(3, 128, 128)
    for zen5 in (True, False):
        monkeypatch.setattr(products, "is_zen5", lambda: zen5)
        assert products.pays(large, weight) == products.pays(*per_task) == products.pays(weight, large.mT[:, :128]) == zen5
    monkeypatch.setattr(products, "is_zen5", lambda: True)
    for a, b in ((large[:80], weight), (large.double(), weight.double()), (large.bfloat16(), weight.bfloat16()),
                 (large.to("meta"), weight.to("meta")), (per_task[0][:, :200], per_task[1])):
        assert not products.pays(a, b)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not products.pays(large, weight)
    monkeypatch.undo()
    monkeypatch.setattr(products, "is_zen5", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert products.pays(large, weight) and not products.pays(large[:150], weight)
    assert not products.pays(torch.zeros(128, 250).mT, weight)                            # a copy, by one of the two
    G, x = torch.zeros(products.LONG, 128), torch.zeros(products.LONG, 128)
    assert products.pays(G.mT, x.mT) and not products.pays(G[1:].mT, x[1:].mT)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=["both", "rows", "weights"])
def test_vmap_goes_without(in_dims, taken):
    shapes = [(2, 9, 7) if in_dims[0] == 0 else (9, 7), (2, 5, 7) if in_dims[1] == 0 else (5, 7)]
    x, weight = (torch.randn(shape) for shape in shapes)
    torch.testing.assert_close(torch.vmap(linear, in_dims)(x, weight), x @ weight.mT, rtol=1e-5, atol=1e-5)
    assert not taken


@pytest.mark.parametrize("shape", [(64, 16, 32, 49), (36, 48, 16, 1), (1, 64, 64, 100)], ids=str)
def test_a_product_of_each_group_is_that_of_its_matrix(shape, monkeypatch):
    groups, k, n, rows = shape
    x, matrices = torch.randn(rows, groups, k), torch.randn(groups, k, n)
    assert not products.takes_grouped(x.double(), k, n) and not products.takes_grouped(x, k, 100)
    monkeypatch.setattr(products, "is_zen5", lambda: True)
    assert products.takes_grouped(x, k, n) and not products.takes_grouped(x.double(), k, n) and not products.takes_grouped(x, k, 100)
    multiply = products.grouped_product(matrices, rows)
    for factor in (1, 2):                                                                         # packed once
        torch.testing.assert_close(multiply(factor * x), factor * torch.einsum("rgk,gkn->rgn", x, matrices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known, expected", [
    ({"cpu_name": "AMD EPYC 9575F", "avx512_vp2intersect": True}, True), ({"cpu_name": "AMD EPYC 9354", "avx512_vp2intersect": False}, False),
    ({"cpu_name": "Intel(R) Core(TM) i7-1165G7", "avx512_vp2intersect": True}, False), ({}, False)], ids=["Zen 5", "Zen 4", "Intel", "unknown"])
def test_zen5_is_told_from_others(known, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert products.is_zen5.__wrapped__() == expected


@pytest.mark.parametrize("flags", [["--inner-lr", "1"], ["--kernel", "closed", "--inner-lr", "1", "--inner-steps", "2"], ["--method", "maml"],
                                   ["--method", "cavia"], ["--method", "cnp"]], ids=" ".join)
def test_a_trajectory_of_thirty_steps_is_the_plain_one(flags, taken, monkeypatch):
    def trajectory():
        args = celeba.parse_flags(["--width", "16", "--context-dim", "8", "--meta-batch", "3", "--device", "cpu", *flags])
        torch.manual_seed(0)
        learner, rng = celeba.build_learner(args, torch.device("cpu")), torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(learner.parameters(), 1e-3)
        batches = [celeba.sample_tasks(images, args, rng) for _ in range(30)]
        return torch.stack([celeba.meta_step(learner, optimiser, args, batch, None)[0] for batch in batches])

    images = torch.from_numpy(celeba.synthetic_split("val"))
    fast, count = trajectory(), len(taken)
    monkeypatch.setattr(products, "is_zen5", lambda: False)
    plain = trajectory()
    assert count == len(taken) > 30 * 10
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=0)               # 5e-6 seen: rounding, which Adam and the steps multiply
