"""Rules that choose by public gradients and by released noisy gradients."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ddp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import NoisyGradientSelector, PublicGradientSelector

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(24, 6, generator=GENERATOR), torch.arange(24) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 3))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def bound(selector: Any, model: nn.Module, **options: Any) -> SelectionPlan:
    plan = SelectionPlan(0.5, selector, **options)
    plan.bind(dict(model.named_parameters()), module=model)
    return plan


@pytest.mark.parametrize("rule", ["gradient", "taylor"])
def test_public_gradient_chooses_where_the_mean_gradient_on_public_batches_is_large(rule: str) -> None:
    model = network()
    batches = [(INPUTS[:8], LABELS[:8]), (INPUTS[8:16], LABELS[8:16]), (INPUTS[16:], LABELS[16:])]
    chosen = bound(PublicGradientSelector(batches, rule, batches=2, loss_fn=cross_entropy), model).at(0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    model.eval()
    cross_entropy(model, (INPUTS[:16], LABELS[:16])).backward()
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        score = (weight.grad * (weight.detach() if rule == "taylor" else 1)).abs()
        mask = chosen[name].full_mask()
        assert int(mask.sum()) == weight.numel() // 2
        assert score[mask].min() >= score[~mask].max() * (1 - 1e-5)


def test_public_loaders_are_shuffled_by_the_choices_own_seed_and_the_global_generator_is_untouched() -> None:
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True)
    model = network()
    plan = bound(PublicGradientSelector(loader, loss_fn=cross_entropy), model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = plan.at(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = bound(PublicGradientSelector(loader, loss_fn=cross_entropy), model).at(0)
    assert again["0.weight"].equals(first["0.weight"])
    assert not plan.at(1)["0.weight"].equals(first["0.weight"])  # another batch


def test_public_gradient_asks_a_lightning_module_for_its_loss_and_leaves_it_as_it_was() -> None:
    model = ImageClassifier(SmallCNN(width=8))
    public = TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = set(vars(model))
    chosen = bound(PublicGradientSelector(public), model).at(0)
    assert chosen["net.layers.conv1.weight"].count == 36
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_public_gradient_tells_what_it_lacks() -> None:
    public = [(INPUTS, LABELS)]
    with pytest.raises(ValueError, match=r"Sequential has no training_step: pass loss_fn"):
        bound(PublicGradientSelector(public), network()).at(0)
    plan = SelectionPlan(0.5, PublicGradientSelector(public, loss_fn=cross_entropy))
    plan.bind(dict(network().named_parameters()))
    with pytest.raises(ValueError, match="bind the plan with module="):
        plan.at(0)
    with pytest.raises(ValueError, match="public_data gave no batch"):
        bound(PublicGradientSelector([], loss_fn=cross_entropy), network()).at(0)
    with pytest.raises(ValueError, match="loss of a public batch as a scalar tensor, got Tensor"):
        bound(PublicGradientSelector(public, loss_fn=lambda model, batch: model(batch[0])), network()).at(0)
    model = ImageClassifier(SmallCNN(width=8))
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        bound(PublicGradientSelector(public), model).at(0)
    with pytest.raises(ValueError, match="rule must be one of gradient, taylor, got 'l1'"):
        PublicGradientSelector(public, "l1")
    with pytest.raises(ValueError, match="batches must be a whole number >= 1, got 0"):
        PublicGradientSelector(public, batches=0)


def test_private_data_as_public_is_refused_by_the_plan() -> None:
    private = TensorDataset(INPUTS, LABELS)
    plan = SelectionPlan(0.5, PublicGradientSelector(private, loss_fn=cross_entropy))
    with pytest.raises(ValueError, match=r"PublicGradientSelector\(public_data=...\) holds samples of the private"):
        plan.check_public(DataLoader(private, batch_size=4))
    plan.check_public(DataLoader(TensorDataset(INPUTS + 1, LABELS), batch_size=4))
    SelectionPlan(0.5).check_public(DataLoader(private))


SIGNAL, NOISE = 0.3, 1.0


def released(step: int) -> dict[str, Tensor]:
    """Noisy gradients with signal in the first half of the weight's coordinates."""
    generator = torch.Generator().manual_seed(step)
    noise = NOISE * torch.randn(40, 50, generator=generator)
    noise[:20] += SIGNAL
    return {"w": noise, "b": torch.randn(40, generator=generator)}


def noisy_plan(steps: int = 400, **options: Any) -> SelectionPlan:
    plan = SelectionPlan(0.5, NoisyGradientSelector(steps), **options)
    plan.bind({"w": torch.zeros(40, 50), "b": torch.zeros(40)})
    return plan


def test_noisy_gradient_trains_everything_first_and_then_where_energy_exceeds_that_of_the_noise() -> None:
    plan = noisy_plan()
    for step in range(400):
        assert all(selection.is_all for selection in plan.at(step).values())
        plan.observe(released(step), NOISE)
    chosen = plan.at(400)["w"].full_mask()
    assert int(chosen.sum()) == 1000
    # energies differ by 0.09 with a deviation of sqrt(2 / 400) = 0.07 each: 0.74 of the better half exceed the median
    assert float(chosen[:20].float().mean()) == pytest.approx(0.74, abs=0.05)
    energy = plan.selector.state_dict()["energy"]["w"] / 400
    assert float(energy[20:].mean()) == pytest.approx(0, abs=4 * (2 / 400 / 1000) ** 0.5)
    assert float(energy[:20].mean()) == pytest.approx(SIGNAL**2, abs=0.012)
    assert plan.at(401)["w"].equals(plan.at(400)["w"])
    plan.observe({name: 100 * block for name, block in released(0).items()}, NOISE)  # heard no more
    assert plan.at(402)["w"].equals(plan.at(400)["w"])


def test_noisy_gradient_chooses_at_the_end_of_the_first_steps_also_with_a_choice_an_epoch() -> None:
    plan = noisy_plan(3, refresh="epoch")
    for step in range(3):
        assert plan.at(step, 0)["w"].is_all
        plan.observe(released(step), NOISE)
    assert plan.at(3, 0)["w"].count == 1000


def test_noisy_gradient_goes_on_after_resuming() -> None:
    whole = noisy_plan(10)
    for step in range(10):
        if step == 6:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
        whole.at(step)
        whole.observe(released(step), NOISE)
    file.seek(0)
    resumed = noisy_plan(10)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(6, 10):
        assert resumed.at(step)["w"].is_all
        resumed.observe(released(step), NOISE)
    assert resumed.at(10)["w"].equals(whole.at(10)["w"])


def test_noisy_gradients_of_another_network_are_refused_and_a_reset_begins_anew() -> None:
    plan = noisy_plan(1)
    plan.at(0)
    plan.observe(released(0), NOISE)
    plan.bind({"w": torch.zeros(40, 60), "b": torch.zeros(40)})
    with pytest.raises(ValueError, match="another network, not of w"):
        plan.at(1)
    plan.start_anew()
    assert plan.at(1)["w"].is_all


def test_noisy_gradient_works_on_what_pre_pruning_left() -> None:
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[::2] = True
    plan = SelectionPlan(0.5, NoisyGradientSelector(2))
    plan.bind({"w": torch.zeros(40, 50), "b": torch.zeros(40)}, static_masks={"w": mask})
    for step in range(2):
        chosen = plan.at(step)
        plan.observe({name: chosen[name].compact(block) for name, block in released(step).items()}, NOISE)
    assert plan.at(2)["w"].count == 500
    assert not (plan.at(2)["w"].full_mask() & ~mask).any()
    with pytest.raises(ValueError, match="warmup_steps must be a whole number >= 1, got 0"):
        NoisyGradientSelector(0)


TWO_PROCESSES = """
import os, torch, torch.distributed as dist
from torch import nn
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.selectors import PublicGradientSelector
import lightning as L
fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
torch.manual_seed(0)
model = nn.Linear(40, 30)
torch.manual_seed(fabric.global_rank + 1)  # whatever the processes draw and read
public = [torch.randn(8, 40)]
loss = lambda model, batch: model(batch).square().mean()
for selection in ("random", "magnitude", PublicGradientSelector(public, loss_fn=loss)):
    plan = SelectionPlan(0.5, selection, explore=0.25)
    plan.bind(dict(model.named_parameters()), module=model)
    for step in range(3):
        masks = fabric.all_gather(plan.at(step)["weight"].full_mask().int())
        assert int(masks[0].sum()) == 600
        assert torch.equal(masks[0], masks[1]), selection
print("agrees")
"""


@pytest.mark.slow
def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    assert run_ddp(TWO_PROCESSES, tmp_path).stdout.count("agrees") == 2
