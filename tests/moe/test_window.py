"""The window of losses forgets the oldest, and goes on where it was saved."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_eff.moe.window import LossWindow


def filled(count: int, size: int = 3) -> LossWindow:
    window = LossWindow(size)
    for loss in range(count):
        window.add(torch.tensor(float(loss)))
    return window


@pytest.mark.parametrize(("count", "kept"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (4, [1, 2, 3]), (8, [5, 6, 7])])
def test_last_losses_are_kept_in_order(count: int, kept: list[float]) -> None:
    window = filled(count)
    assert (len(window), window.state().tolist()) == (len(kept), kept)
    assert math.isnan(window.mean()) if not kept else window.mean() == sum(kept) / len(kept)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_saved_window_goes_on_as_if_it_had_not_been(count: int) -> None:
    straight, resumed = filled(count), LossWindow(3)
    resumed.load(filled(count).state())
    for loss in (10.0, 20.0):
        straight.add(torch.tensor(loss))
        resumed.add(torch.tensor(loss))
        assert torch.equal(straight.state(), resumed.state())


def test_mean_is_the_same_to_the_last_bit_wherever_the_ring_has_come_to() -> None:
    torch.manual_seed(0)
    straight = LossWindow(7)
    for loss in torch.rand(12) * 3:
        straight.add(loss)
        resumed = LossWindow(7)
        resumed.load(straight.state())
        assert straight.mean() == resumed.mean()


def test_smaller_window_takes_the_last_of_what_was_saved() -> None:
    window = LossWindow(2)
    window.load(filled(5).state())
    assert window.state().tolist() == [3, 4]
    window.add(torch.tensor(9.0))
    assert window.state().tolist() == [4, 9]


def test_losses_carry_no_graph() -> None:
    window = LossWindow(2)
    window.add(torch.tensor(1.0, requires_grad=True) * 2)
    assert not window.mean().requires_grad


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_size_must_be_a_count(size) -> None:
    with pytest.raises(ValueError, match="loss_window must be a whole number >= 1"):
        LossWindow(size)
