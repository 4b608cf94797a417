"""Backends against the reference that goes token by token: outputs and all gradients."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.moe import moe_ffn
from lightning_eff.moe.config import Activation
from lightning_eff.moe.experts import fused
from lightning_eff.moe.functional import choose_backend

ACTIVATIONS = get_args(Activation)


class Problem:
    """Random tokens, experts and assignments, of which some may not count."""

    def __init__(
        self, counts: list[int], *, tokens=12, d=8, h=8, activation="relu", bias=False, idle=0, dtype=torch.float64
    ) -> None:
        random = torch.Generator().manual_seed(len(counts) + tokens)
        n, inner = len(counts), (2 if activation == "swiglu" else 1) * h
        normal = {"generator": random, "dtype": dtype}
        assigned = sum(counts) + idle
        self.activation = activation
        self.token_index = torch.randint(max(tokens, 1), (assigned,), generator=random)
        self.counts = torch.tensor(counts)
        self.inputs = {
            "x": torch.randn(tokens, d, **normal),
            "w1": torch.randn(n, d, inner, **normal) / d**0.5,
            "w2": torch.randn(n, h, d, **normal) / h**0.5,
            "weights": torch.rand(assigned, **normal),
            "b1": torch.randn(n, inner, **normal) if bias else None,
        }
        self.grad = torch.randn(tokens, d, **normal)

    def run(self, backend: str, **replaced: Tensor) -> Tensor:
        given = {**self.inputs, **replaced}
        b1 = given.pop("b1")
        return moe_ffn(
            **given,
            token_index=self.token_index,
            counts=self.counts,
            activation=self.activation,
            backend=backend,
            b1=b1,
        )

    def results(self, backend: str) -> list[Tensor]:
        """Output, then the gradient by every input."""
        given = {k: v if v is None else v.detach().clone().requires_grad_() for k, v in self.inputs.items()}
        y = self.run(backend, **given)
        return [
            y.detach(),
            *torch.autograd.grad(y, [v for v in given.values() if v is not None], self.grad.to(y.dtype)),
        ]


def assert_equal_results(problem: Problem, backend: str, tolerance: float) -> None:
    for ours, expected in zip(problem.results(backend), problem.results("reference"), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("fused", torch.float64, 1e-12), ("fused", torch.float32, 1e-5), ("grouped", torch.float32, 1e-5)],
)
def test_backend_equals_the_reference(backend, dtype, tolerance, activation, bias) -> None:
    problem = Problem([5, 0, 3, 9], activation=activation, bias=bias, dtype=dtype)
    assert_equal_results(problem, backend, tolerance)


@pytest.mark.parametrize("h", [1, 20, 32, 50])
def test_gates_of_any_width(h) -> None:
    assert_equal_results(Problem([5, 0, 3], activation="swiglu", h=h), "fused", 1e-12)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("counts", [[4], [0, 7, 0, 0], [1] * 32, [0, 1, 30, 0, 2, 0]])
def test_empty_and_crowded_experts(counts, backend) -> None:
    assert_equal_results(Problem(counts, activation="swiglu", bias=True, dtype=torch.float32), backend, 1e-5)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_assignments_behind_the_counts_do_nothing_and_get_no_gradient(backend) -> None:
    problem = Problem([5, 0, 3], bias=True, idle=6, activation="gelu", dtype=torch.float32)
    assert_equal_results(problem, backend, 1e-5)
    by_weights = problem.results(backend)[4]
    assert not by_weights[8:].any()
    assert by_weights[:8].all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_chunks_of_any_size_give_the_same(rows, activation, monkeypatch) -> None:
    monkeypatch.setattr(fused, "_rows_of", lambda d: rows)
    assert_equal_results(Problem([5, 0, 1, 1, 14, 2], bias=True, activation=activation, idle=2), "fused", 1e-12)


def test_chunks_hold_whole_experts_where_they_fit() -> None:
    chunks = fused._chunks([3, 0, 4, 20, 1, 8], 8)
    assert [(c.rows.start, c.rows.stop, c.experts, c.sizes, c.goes_on) for c in chunks] == [
        (0, 7, [0, 2], [3, 4], False),
        (7, 14, [3], [7], False),
        (14, 21, [3], [7], True),
        (21, 28, [3, 4], [6, 1], True),
        (28, 36, [5], [8], False),
    ]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_derivatives_of_the_fused_experts_are_those_of_differences(activation) -> None:
    problem = Problem([2, 0, 3], tokens=4, d=3, h=2, activation=activation, bias=True, idle=1)
    inputs = [value.requires_grad_() for value in problem.inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *values: problem.run("fused", **dict(zip(problem.inputs, values, strict=True))), inputs
    )


def test_operators_keep_what_torch_asks_of_operators() -> None:
    problem = Problem([2, 0, 3], tokens=4, d=3, h=2, activation="swiglu", bias=True)
    x, w1, w2, weights, b1 = (value.requires_grad_() for value in problem.inputs.values())
    arguments = (x, w1, b1, w2, weights, problem.token_index, problem.counts, "swiglu", True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.lightning_eff.moe_ffn.default, arguments, test_utils=tests)


@pytest.mark.parametrize("frozen", ["x", "w1", "w2", "weights", "b1"])
def test_frozen_inputs_get_no_gradient_and_leave_the_others_theirs(frozen) -> None:
    problem = Problem([5, 0, 3], activation="swiglu", bias=True)
    expected = dict(zip(problem.inputs, problem.results("reference")[1:], strict=True))
    given = {k: v.clone().requires_grad_(k != frozen) for k, v in problem.inputs.items()}
    problem.run("fused", **given).backward(problem.grad)
    assert given[frozen].grad is None
    for name in given.keys() - {frozen}:
        torch.testing.assert_close(given[name].grad, expected[name], rtol=1e-12, atol=1e-12)


def test_expert_without_a_token_gets_zeros_as_gradient() -> None:
    problem = Problem([0, 4, 0])
    given = {k: v if v is None else v.requires_grad_() for k, v in problem.inputs.items()}
    problem.run("fused", **given).sum().backward()
    for name in ("w1", "w2"):
        assert not given[name].grad[[0, 2]].any()
        assert given[name].grad[1].any()


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_strided_inputs_and_expanded_gradients(backend) -> None:
    problem = Problem([5, 0, 3], dtype=torch.float32)
    inputs = {k: v for k, v in problem.inputs.items() if v is not None}
    y = problem.run("reference", **{k: v.requires_grad_() for k, v in inputs.items()})
    expected = torch.autograd.grad(y.sum(), list(inputs.values()))
    strided = {k: v.detach().repeat_interleave(2, 0)[::2].requires_grad_() for k, v in inputs.items()}
    strided["x"] = strided["x"].detach().t().contiguous().t().requires_grad_()
    found = torch.autograd.grad(problem.run(backend, **strided).sum(), list(strided.values()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_the_exact_result(backend, dtype) -> None:
    exact = Problem([5, 0, 3, 8], activation="swiglu", bias=True, dtype=torch.float32)
    low = Problem([5, 0, 3, 8], activation="swiglu", bias=True, dtype=torch.float32)
    low.inputs = {k: v if k == "weights" else v.to(dtype) for k, v in exact.inputs.items()}
    for ours, expected in zip(low.results(backend), exact.results("reference"), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=2e-2 * scale)
    assert low.results(backend)[4].dtype == torch.float32


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(backend) -> None:
    problem = Problem([5, 0, 3, 8], activation="swiglu", bias=True, dtype=torch.float32)
    expected = problem.results("reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.results(backend)
    assert [t.dtype for t in found] == [torch.bfloat16] + [torch.float32] * 5
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0, atol=2e-2 * exact.abs().max().item())


def test_reference_can_be_differentiated_twice() -> None:
    problem = Problem([2, 3], tokens=3, d=2, h=2, activation="silu")
    inputs = {k: v for k, v in problem.inputs.items() if v is not None}
    values = [v.requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradgradcheck(
        lambda *given: problem.run("reference", **dict(zip(inputs, given, strict=True))), values
    )


def test_fused_experts_refuse_to_be_differentiated_twice() -> None:
    problem = Problem([2, 3])
    x = problem.inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(problem.run("fused").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_ffn_backward"):
        grad.sum().backward()


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come() -> None:
    problem = Problem([5, 0, 3])
    args = (*(problem.inputs[k] for k in ("x", "w1", "b1", "w2", "weights")), problem.token_index, problem.counts)
    assert torch.ops.lightning_eff.moe_ffn(*args, "relu", False)[1].numel() == 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        problem.run("fused")
        with torch.no_grad():
            problem.run("fused", x=problem.inputs["x"].requires_grad_())
    assert not kept


def test_backward_pass_keeps_the_tokens_and_the_first_products_alone() -> None:
    problem = Problem([5, 0, 3, 9], tokens=40, activation="swiglu", h=8)
    given = {k: v if v is None else v.requires_grad_() for k, v in problem.inputs.items()}
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        problem.run("fused", **given)
    own = {v.data_ptr() for k, v in given.items() if v is not None and k != "x"}
    own |= {problem.token_index.data_ptr(), problem.counts.data_ptr()}
    assert sum(size for pointer, size in kept.items() if pointer not in own) == 40 * 8 + 17 * 16


def test_flops_are_counted() -> None:
    problem = Problem([5, 0, 3], d=8, h=4, activation="swiglu")
    given = {k: v if v is None else v.requires_grad_() for k, v in problem.inputs.items()}
    with FlopCounterMode(display=False) as counter:
        problem.run("fused", **given).sum().backward()
    # three products of every matrix (8 x 8 and 4 x 8) for each of eight assignments, two FLOPs a multiplication
    assert counter.get_total_flops() == 3 * 2 * 8 * (8 * 8 + 4 * 8)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_nobody_goes_anywhere(backend, tokens) -> None:
    problem = Problem([0, 0, 0], tokens=tokens, bias=True, dtype=torch.float32)
    y, *gradients = problem.results(backend)
    assert y.shape == (tokens, 8)
    assert not any(result.any() for result in (y, *gradients))
    assert problem.run("reference").shape == (tokens, 8)


def test_grouped_products_tell_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"take float32, bfloat16 and float16, got torch.float64; use backend='fused'"):
        Problem([3]).run("grouped")
    with pytest.raises(ValueError, match=r"rows of a multiple of 16 bytes, got 6 columns of torch.float32"):
        Problem([3], h=6, dtype=torch.float32).run("grouped")


def test_cpu_runs_the_fused_loop() -> None:
    inputs = Problem([3], dtype=torch.bfloat16).inputs
    assert choose_backend(inputs["w1"], inputs["w2"]) == "fused"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (12, 7), r"x must have shape \[12, 8\], got \[12, 7\]"),
        ("w1", (3, 8, 16), r"w1 must have shape \[3, 8, 8\], got \[3, 8, 16\]"),
        ("weights", (7,), r"weights must have shape \[8\], got \[7\]"),
        ("b1", (3, 4), r"b1 must have shape \[3, 8\], got \[3, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_told(name, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        Problem([5, 0, 3]).run("fused", **{name: torch.zeros(shape)})
