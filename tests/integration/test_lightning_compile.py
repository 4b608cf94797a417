"""Every technique with compiled modules: what runs is compared with the same run as it is."""

from __future__ import annotations

import pytest
import torch
from lightning_cases import CASES, NOISE, PRIVATE_CASES

pytestmark = [*NOISE, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]  # the compiler looks at it

OTHERS = [name for name in CASES if name not in PRIVATE_CASES]
QUICK = {"handed over": ["LidarSaSSelector"], "in place": ["RandomChannelPruningCallback", "ReplaceFFN"]}


@pytest.mark.parametrize(
    ("way", "name"),
    [pytest.param(way, name, marks=[] if name in QUICK[way] else pytest.mark.slow) for way in QUICK for name in OTHERS],
)
def test_a_compiled_module_ends_like_any_other(way: str, name: str) -> None:
    case = CASES[name]
    plain, _ = case.fit()
    module = case.module()
    torch.compiler.reset()
    if way == "in place":
        module.compile(backend="aot_eager")
        case.fit(module=module)
    else:
        case.fit(module=torch.compile(module, backend="aot_eager"))
    assert torch.compiler.is_compiling() is False
    torch.testing.assert_close(
        case.answer(module, case.batch()), case.answer(plain, case.batch()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_a_network_compiled_by_inductor_is_cut_and_trained_on() -> None:
    case = CASES["RandomChannelPruningCallback"]
    plain, _ = case.fit()
    module = case.module()
    _, trainer = case.fit(module=torch.compile(module))
    assert case.done(module, trainer)
    torch.testing.assert_close(
        case.answer(module, case.batch()), case.answer(plain, case.batch()), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", PRIVATE_CASES)
@pytest.mark.parametrize("handed_over", [False, True])
def test_private_training_of_compiled_modules_is_refused(name: str, handed_over: bool) -> None:
    module = CASES[name].module()
    if handed_over:
        module = torch.compile(module, backend="aot_eager")
    else:
        module.compile(backend="aot_eager")
    with pytest.raises(
        ValueError, match=r"is compiled, .*train it without torch.compile, and compile it for inference"
    ):
        CASES[name].fit(module=module)
