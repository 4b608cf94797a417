"""Injected auxiliary losses are the same as added ones, whatever the loss is multiplied by on its way."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_eff.moe import AuxLossScale, ReplaceFFN, collect_aux_losses, replace_ffn, set_aux_scale, total_aux_loss

#: Weights so large that a wrong scale cannot hide.
CONFIG = {"expansion_rate": 4, "granularity": 2, "balance": {"weight": 2.0, "z_weight": 0.5}}


class Net(nn.Module):
    """Two residual feed-forward networks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def make(aux_mode: str, **options) -> Net:
    torch.manual_seed(0)
    net = Net()
    replace_ffn(net, "ffns.*", {**CONFIG, **options}, aux_mode=aux_mode)
    return net


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task(y: torch.Tensor) -> torch.Tensor:
    return (y.float() * tokens(*y.shape, seed=2)).mean()


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [x.grad, *(parameter.grad for parameter in net.parameters())]


def assert_equal(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def added(x: torch.Tensor, scale: float = 1.0, autocast: bool = False, **options) -> list[torch.Tensor]:
    """Gradients where the auxiliary losses are part of the loss."""
    net, x = make("collect", **options), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    (scale * (task(y) + total_aux_loss(net))).backward()
    return gradients(net, x)


def injected(x: torch.Tensor, scale: float = 1.0, autocast: bool = False, **options) -> list[torch.Tensor]:
    net, x = make("inject", **options), x.clone().requires_grad_()
    set_aux_scale(net, scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    (scale * task(y)).backward()
    return gradients(net, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": 1},
        {"router": "expert_choice"},
        {"balance": {"method": "bias", "z_weight": 0.5}},
        {"routing": {"capacity_factor": 0.75}, "n_shared": 1, "bias": True},
    ],
)
def test_injected_losses_give_the_gradients_of_added_ones(options) -> None:
    x = tokens(16, 4, 16)
    assert_equal(injected(x, **options), added(x, **options))
    without = added(x, **options, **({} if "balance" in options else {"balance": {"weight": 0.0, "z_weight": 0.0}}))
    if "balance" not in options:
        assert not torch.allclose(without[1], added(x, **options)[1], atol=1e-3)


@pytest.mark.parametrize("scale", [0.25, 65536.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_scale_is_that_of_the_loss(scale, autocast) -> None:
    x = tokens(64, 16)
    expected = added(x, scale, autocast)
    for given, wanted in zip(injected(x, scale, autocast), expected, strict=True):
        torch.testing.assert_close(given / scale, wanted / scale, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(injected(x, 2 * scale, autocast)[1] / scale, expected[1] / scale, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_injection_goes_through_checkpointed_layers(reentrant) -> None:
    # the re-entrant kind has no graph in the first pass, so that added losses would be lost
    net, x = make("inject"), tokens(64, 16).requires_grad_()
    y = x
    for ffn in net.ffns:
        y = y + checkpoint(ffn, y, use_reentrant=reentrant)
    task(net.head(y)).backward()
    assert_equal(gradients(net, x), added(tokens(64, 16)))


def test_injection_compiles() -> None:
    net, x = make("inject"), tokens(64, 16).requires_grad_()
    net.ffns[0].compile(backend="aot_eager", fullgraph=True)
    for scale in (1.0, 0.5):
        net.zero_grad()
        x.grad = None
        set_aux_scale(net, scale)
        (scale * task(net(x))).backward()
        assert_equal(gradients(net, x), added(tokens(64, 16), scale))


def test_losses_are_told_and_added_once_though_they_are_injected() -> None:
    net, collected = make("inject"), make("collect")
    net(tokens(64, 16))
    collected(tokens(64, 16))
    assert not total_aux_loss(net).requires_grad
    torch.testing.assert_close(total_aux_loss(net), total_aux_loss(collected).detach())
    for name, loss in collect_aux_losses(collected).items():
        torch.testing.assert_close(collect_aux_losses(net)[name], loss.detach())


def test_replacing_in_two_calls_shares_the_losses_out_as_in_one() -> None:
    torch.manual_seed(0)
    net = Net()
    replace_ffn(net, "ffns.0", CONFIG)
    replace_ffn(net, "ffns.1", {**CONFIG, "balance": {"weight": 2.0, "z_weight": 0.0}})
    assert [ffn.aux_shares for ffn in net.ffns] == [{"balance": 0.5, "z": 1.0}, {"balance": 0.5}]


def test_nothing_is_injected_in_evaluation_or_without_gradients() -> None:
    net = make("inject").eval()
    x = tokens(64, 16).requires_grad_()
    task(net(x)).backward()
    assert_equal(gradients(net, x), added(tokens(64, 16), balance={"weight": 0.0, "z_weight": 0.0}))
    with torch.no_grad():
        assert not net.train()(x).requires_grad


class Module(L.LightningModule):
    """Training step as anyone would write it; with ``add`` it knows of auxiliary losses."""

    def __init__(self, net: nn.Module, add: bool, manual: bool = False) -> None:
        super().__init__()
        self.net, self.add = net, add
        self.automatic_optimization = not manual
        self.norms: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = task(self.net(batch))
        if self.add:
            loss = loss + total_aux_loss(self.net)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss / 4)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(aux_mode: str, *callbacks: L.Callback, manual: bool = False, scaler: bool = False, **settings) -> Net:
    module = Module(make(aux_mode), add=aux_mode == "collect", manual=manual)
    if scaler:
        settings["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(tokens(6 * 16, 16), batch_size=16))
    return module.net


SETTINGS = {
    "plain": {},
    "accumulated batches": {"accumulate_grad_batches": 3},
    "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "gradient scaler": {"scaler": True, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trainer_ends_with_the_weights_of_added_losses(name) -> None:
    settings = SETTINGS[name]
    expected = train("collect", **settings)
    given = train("inject", AuxLossScale(), **settings)
    # in half precision rounding depends on the order of sums
    atol = 1e-4 if name in ("bf16-mixed", "gradient scaler") else 1e-6
    for one, other in zip(given.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    if "accumulate_grad_batches" in settings:
        off = train("inject", **settings).ffns[0].router - expected.ffns[0].router
        assert off.abs().max() > 10 * atol


def test_scale_follows_a_schedule_of_accumulation_and_manual_optimization() -> None:
    schedule = {0: 2, 1: 3}
    expected = train("collect", GradientAccumulationScheduler(schedule))
    given = train("inject", GradientAccumulationScheduler(schedule), AuxLossScale())
    manual, added_manually = train("inject", AuxLossScale(0.25), manual=True), train("collect", manual=True)
    for net, other in ((given, expected), (manual, added_manually)):
        for one, two in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_callback_that_replaces_scales_as_well() -> None:
    expected = train("collect", accumulate_grad_batches=3)
    torch.manual_seed(0)
    net = Net()
    module = Module(net, add=False)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accumulate_grad_batches=3, callbacks=[ReplaceFFN("net.ffns.*", CONFIG)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(tokens(6 * 16, 16), batch_size=16))
    for one, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_scale_is_one_again_after_training_and_after_an_exception() -> None:
    net = train("inject", AuxLossScale(), accumulate_grad_batches=3)
    assert [ffn.aux_scale for ffn in net.ffns] == [1.0, 1.0]

    class Broken(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            self.net = pl_module.net
            self.scales = [ffn.aux_scale for ffn in pl_module.net.ffns]
            raise RuntimeError("on purpose")

    broken = Broken()
    with pytest.raises(RuntimeError, match="on purpose"):
        train("inject", AuxLossScale(), broken, accumulate_grad_batches=4)
    assert broken.scales == [0.25, 0.25]
    assert [ffn.aux_scale for ffn in broken.net.ffns] == [1.0, 1.0]


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_none_is_refused(scale) -> None:
    with pytest.raises(ValueError, match=r"scale must be > 0.*, got"):
        AuxLossScale(scale)


def test_copies_keep_their_own_scale() -> None:
    net = make("inject")
    set_aux_scale(net, 0.5)
    twin = copy.deepcopy(net)
    set_aux_scale(net, 1.0)
    assert [ffn.aux_scale for ffn in twin.ffns] == [0.5, 0.5]
