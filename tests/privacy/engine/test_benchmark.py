"""The benchmark compares the same work."""

import dp_step
import pytest
import torch

# of opacus: a first layer's input needs no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


@pytest.mark.parametrize("net", ["tanh_cnn", "vit"])
def test_every_way_has_the_clipped_sum_of_torch_func(net: str) -> None:
    model, images, labels = dp_step.make(net, 3)
    steps = {mode: make(model, images, labels) for mode, make in dp_step.MODES.items()}
    dp_step.verify(steps, model, images, labels)
    for step in steps.values():
        before = [p.detach().clone() for p in step.model.parameters()]
        step()
        assert any(not torch.equal(p, old) for p, old in zip(step.model.parameters(), before, strict=True))


def test_another_sum_is_refused() -> None:
    model, images, labels = dp_step.make("tanh_cnn", 3)
    step = dp_step.MODES["ours"](model, images, labels)
    step.images = images.flip(0)
    with pytest.raises(AssertionError, match="ours: the clipped sum differs"):
        dp_step.verify({"ours": step}, model, images, labels)
