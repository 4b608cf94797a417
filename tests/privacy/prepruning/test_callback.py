"""DPPrePruneCallback in a Trainer: with any optimizer, network, strategy; resumed; from YAML; with bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.models import VisionTransformer, mobilenet_v3_small, resnet18

from lightning_eff import cli
from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

DIGITS = str(Path(__file__).parents[2] / "conf" / "digits.yaml")


class Momentum(ImageClassifier):
    """Momentum and weight decay move weights whose gradient is zero."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def module(kind: str = "momentum", seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    net = SmallCNN(width=8)
    return Momentum(net) if kind == "momentum" else ImageClassifier(net, optimizer=kind, weight_decay=0.01, lr=0.01)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {"max_steps": 25, "max_epochs": None, "logger": False, "enable_checkpointing": False}
    return L.Trainer(
        **{**defaults, **options},
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def data(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(batch_size=32, **options)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def public_set(n: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10)


class AfterEveryStep(L.Callback):
    """Notes at every batch's end whether what is out holds its value, and what moved."""

    def __init__(self, prune: DPPrePruneCallback) -> None:
        self.prune = prune
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = values(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.steps += 1
        for name, mask in self.prune.masks.items():
            now, out = pl_module.get_parameter(name), ~mask
            assert torch.equal(now[out], self.before[name][out])
            if self.prune.mode == "prune":
                assert not now[out].any()


@pytest.mark.parametrize("mode", ["prune", "freeze"])
@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
def test_what_is_out_holds_its_bits_after_every_step_and_the_rest_trains(kind: str, mode: str) -> None:
    prune = DPPrePruneCallback(0.5, mode=mode)
    watch = AfterEveryStep(prune)
    model = module(kind)
    initial = values(model)
    trainer(prune, watch).fit(model, data())
    assert watch.steps == 25
    for name, parameter in model.named_parameters():
        if name in prune.masks:
            mask = prune.masks[name]
            assert int(mask.sum()) == round(0.5 * mask.numel())
            assert bool((parameter != initial[name])[mask].any())
            assert torch.equal(parameter[~mask], initial[name][~mask] if mode == "freeze" else parameter[~mask] * 0)
    weights = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert set(prune.masks) == weights


def test_steps_inside_of_a_hand_written_loop_are_guarded_too() -> None:
    class ByHand(Momentum):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
                weight = self.get_parameter("net.layers.conv1.weight")
                assert not weight[~prune.masks["net.layers.conv1.weight"]].any()

    prune = DPPrePruneCallback(0.5)
    model = ByHand(SmallCNN(width=8))
    assert "net.layers.conv1.weight" in values(model)
    trainer(prune, max_steps=6).fit(model, data())


def test_optimizers_module_and_global_generator_are_left_as_they_came() -> None:
    prune = DPPrePruneCallback(0.5, score="synflow", rounds=3)
    random: list[Tensor] = []

    class Watch(L.Callback):
        def on_fit_start(self, *args: Any) -> None:
            random.append(torch.get_rng_state())

    model = module()
    before = set(vars(model)), [set(vars(child)) for child in model.modules()]
    fit = trainer(Watch(), prune, Watch(), max_steps=2)
    fit.fit(model, data())
    assert torch.equal(*random)
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    assert (set(vars(model)), [set(vars(child)) for child in model.modules()]) == before

    class Stop(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stopped here")

    fit = trainer(prune, Stop())
    with pytest.raises(RuntimeError, match="stopped here"):
        fit.fit(module(), data())
    assert not fit.optimizers[0]._optimizer_step_post_hooks


NETWORKS = {
    "resnet18": (lambda: resnet18(num_classes=10), (3, 32, 32)),
    "mobilenet": (lambda: mobilenet_v3_small(num_classes=10), (3, 32, 32)),
    "vit": (
        lambda: VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
        ),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize(
    ("network", "score"),
    [
        *(pytest.param("resnet18", one, marks=pytest.mark.slow) for one in ("random", "magnitude", "snip", "synflow")),
        *((network, score) for network in ("mobilenet", "vit") for score in ("random", "magnitude", "snip", "synflow")),
    ],
)
def test_networks_of_torchvision_are_pruned_as_they_are(network: str, score: str) -> None:
    build, shape = NETWORKS[network]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(12, *shape, generator=generator)
    torch.manual_seed(0)
    model = Momentum(build())
    names = list(model.state_dict())
    public = [(torch.randn(4, *shape, generator=generator), torch.arange(4))] if score == "snip" else None
    prune = DPPrePruneCallback(0.9, score=score, public_data=public, rounds=2, scope="layerwise")
    loader = DataLoader(TensorDataset(pictures, torch.arange(12) % 10), batch_size=6)
    trainer(prune, AfterEveryStep(prune), max_steps=2).fit(model, loader)
    assert list(model.state_dict()) == names
    for mask in prune.masks.values():
        assert int(mask.sum()) == round(0.1 * mask.numel())
    pruned = sum(mask.numel() for mask in prune.masks.values())
    assert pruned > 0.9 * sum(parameter.numel() for parameter in model.parameters())


def test_what_no_optimizer_changes_is_left_alone() -> None:
    class Half(Momentum):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.layers.conv1.parameters(), 0.1)

    prune = DPPrePruneCallback(0.5)
    trainer(prune, max_steps=1).fit(Half(SmallCNN(width=8)), data())
    assert list(prune.masks) == ["net.layers.conv1.weight"]


def test_snip_keeps_what_public_data_needs() -> None:
    torch.manual_seed(0)
    model = module()
    model.log = None  # asking the module for its loss must not log
    prune = DPPrePruneCallback(0.5, score="snip", public_data=public_set(), granularity="row")
    prune.setup(trainer(), model, "fit")
    del model.log
    trainer(prune, max_steps=1).fit(model, data())
    from lightning_eff.privacy.prepruning.scores import snip_scores

    fresh = module()
    loader = DataLoader(public_set(), batch_size=256)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    scores = snip_scores(fresh, loader, dict(fresh.named_parameters()), loss_fn=loss)
    for name, mask in prune.masks.items():
        of_rows = scores[name].flatten(1).mean(1)
        kept = mask.flatten(1).all(1)
        assert of_rows[kept].min() >= of_rows[~kept].max()


def test_training_step_is_asked_of_a_copy_that_logs_nothing() -> None:
    class Counting(Momentum):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls = self.calls + 1
            return super().training_step(batch, batch_idx)

    model = Counting(SmallCNN(width=8))
    trainer(DPPrePruneCallback(score="snip", public_data=public_set()), max_steps=3).fit(model, data())
    assert model.calls == 3


def test_synflow_finds_the_shape_of_inputs_in_the_data_and_prefers_what_is_told() -> None:
    prune = DPPrePruneCallback(0.5, score="synflow", rounds=2)
    trainer(prune, max_steps=1).fit(module(), data())
    told = DPPrePruneCallback(0.5, score="synflow", rounds=2, input_shape=[1, 8, 8])
    trainer(told, max_steps=1).fit(module(), data())
    assert all(torch.equal(prune.masks[name], told.masks[name]) for name in told.masks)
    example = DPPrePruneCallback(0.5, score="synflow", rounds=2)
    torch.manual_seed(0)
    trainer(example, max_steps=1).fit(Momentum(SmallCNN(width=8), example_input_shape=[1, 8, 8]), data())
    assert all(torch.equal(prune.masks[name], example.masks[name]) for name in example.masks)

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(public_set())

    with pytest.raises(ValueError, match="does not know the shape of an input here: give input_shape"):
        trainer(DPPrePruneCallback(score="synflow"), max_steps=1).fit(module(), DataLoader(Stream(), batch_size=8))


def test_a_resumed_run_takes_masks_from_the_checkpoint_and_does_not_choose_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str, ckpt_path: Path | None, **options: Any) -> tuple[DPPrePruneCallback, nn.Module]:
        prune = DPPrePruneCallback(**{"amount": 0.5, "score": "magnitude", "seed": 1, **options})
        model = module()
        save = ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        length = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7, "enable_checkpointing": True}
        fit = trainer(prune, AfterEveryStep(prune), save, **length)
        fit.fit(model, data(), ckpt_path=ckpt_path, weights_only=True)
        return prune, model

    for mode in ("prune", "freeze"):
        before, whole = run(mode, None, mode=mode)
        path = tmp_path / mode / "epoch=0.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["DPPrePruneCallback"]
        for name, mask in before.masks.items():
            assert state["masks"][name]["bits"].dtype == torch.uint8
            assert len(state["masks"][name]["bits"]) == -(-mask.numel() // 8)
        with monkeypatch.context() as patch:
            patch.setattr(DPPrePruneCallback, "_choose", None)
            after, resumed = run("resumed", path, mode=mode)
        assert all(torch.equal(after.masks[name], before.masks[name]) for name in before.masks)
        expected = values(whole)
        assert all(torch.equal(one, expected[name]) for name, one in values(resumed).items())
    with pytest.warns(UserWarning, match=r"amount is 0\.5 there and 0\.9 now"):
        other, _ = run("other", path, amount=0.9, mode="prune")
    assert all(torch.equal(other.masks[name], before.masks[name]) for name in before.masks)
    assert other.mode == "freeze"


def test_masks_of_another_network_are_refused(tmp_path: Path) -> None:
    prune = DPPrePruneCallback()
    trainer(prune, max_steps=1).fit(module(), data())
    with pytest.raises(ValueError, match=r"chosen for another network: .* is torch.bool \[8, 1, 3, 3\], expected"):
        trainer(prune, max_steps=1).fit(Momentum(SmallCNN(width=4)), data())


def test_loaded_weights_are_pruned_and_a_second_fit_goes_on() -> None:
    prune = DPPrePruneCallback()
    model = module()
    trainer(prune, max_steps=3).fit(model, data())
    masks = dict(prune.masks)
    trainer(prune, AfterEveryStep(prune), max_steps=3).fit(model, data())
    assert all(torch.equal(prune.masks[name], masks[name]) for name in masks)


def test_a_strategy_that_knows_static_masks_gets_them_and_nothing_is_put_back_here() -> None:
    class Knows(L.pytorch.strategies.SingleDeviceStrategy):
        def set_static_masks(self, masks: dict[str, Tensor], mode: str) -> None:
            self.got = dict(masks), mode

    strategy = Knows("cpu")
    prune = DPPrePruneCallback(0.5, mode="freeze")
    trainer(prune, strategy=strategy, max_steps=2).fit(module(), data())
    masks, mode = strategy.got
    assert mode == "freeze"
    assert all(masks[name] is prune.masks[name] for name in prune.masks)
    assert prune._keeping == []


def test_sharding_strategies_are_refused_before_work() -> None:
    fit = trainer(max_steps=1)
    fit.strategy.__class__ = type("Sharding", (L.pytorch.strategies.FSDPStrategy,), {})
    with pytest.raises(ValueError, match="needs whole parameters in every process, Sharding splits them"):
        DPPrePruneCallback().setup(fit, module(), "fit")


@pytest.mark.parametrize(
    "public",
    [
        lambda private: private,
        lambda private: Subset(private, range(10)),
        lambda private: DataLoader(Subset(Subset(private, range(50)), range(5)), batch_size=2),
        lambda private: ConcatDataset([public_set(), private]),
        lambda private: TensorDataset(*(tensor.clone() for tensor in private.tensors)),
        lambda private: _Module(private),
    ],
    ids=["itself", "subset", "loader of a subset of a subset", "part of several", "a copy", "data module"],
)
def test_private_data_given_as_public_is_refused(public: Any) -> None:
    private = TensorDataset(torch.randn(80, 1, 8, 8), torch.arange(80) % 10)
    prune = DPPrePruneCallback(score="snip", public_data=public(private))
    with pytest.raises(ValueError, match=r"DPPrePruneCallback\(public_data=...\) holds samples of the private"):
        trainer(prune, max_steps=1).fit(module(), DataLoader(private, batch_size=16))


class _Module(L.LightningDataModule):
    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=8)


def test_public_and_private_parts_of_one_data_set_are_told_apart_by_their_examples() -> None:
    whole = public_set()
    private, public = Subset(whole, range(40)), Subset(whole, range(40, 64))
    fit = trainer(DPPrePruneCallback(score="snip", public_data=public), max_steps=1)
    fit.fit(module(), DataLoader(private, batch_size=16))
    overlapping = DPPrePruneCallback(score="snip", public_data=Subset(whole, range(39, 64)))
    with pytest.raises(ValueError, match="holds samples of the private training data"):
        trainer(overlapping, max_steps=1).fit(module(), DataLoader(private, batch_size=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, r"amount must lie in \[0, 1\), got 1.0"),
        ({"amount": -0.1}, "got -0.1"),
        ({"score": "l1"}, "score must be one of random, magnitude, snip, synflow, got 'l1'"),
        ({"mode": "drop"}, "mode must be one of prune, freeze, got 'drop'"),
        ({"scope": "local"}, "scope must be one of layerwise, global, got 'local'"),
        ({"granularity": "tensor"}, "granularity must be one of element, row, got 'tensor'"),
        ({"score": "snip"}, 'score="snip" needs public_data'),
        ({"score": "random", "public_data": []}, "public_data serves score=\"snip\" only, got score='random'"),
        ({"score": "snip", "public_data": 5}, "a DataLoader or list of batches, got a int"),
        ({"min_keep_per_tensor": 0}, "min_keep_per_tensor must be a whole number >= 1, got 0"),
        ({"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"rounds": 2.5}, "rounds must be a whole number >= 1, got 2.5"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"exclude": "head*"}, "exclude must be a list of patterns, got the string"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPPrePruneCallback(**options)


def test_a_tensor_that_would_go_empty_is_told() -> None:
    prune = DPPrePruneCallback(0.995)
    with pytest.warns(UserWarning, match=r"amount=0.995 would leave net\.layers\.conv1\.weight with less than"):
        trainer(prune, max_steps=1).fit(module(), data())
    assert int(prune.masks["net.layers.conv1.weight"].sum()) == 1


def test_the_table_tells_the_kept_share_of_every_tensor() -> None:
    prune = DPPrePruneCallback(0.75, exclude=["*conv1*"])
    trainer(prune, max_steps=1).fit(module(), data())
    rows = {row[0]: row[1:] for row in prune.table().rows}
    assert "net.layers.conv1.weight" not in rows
    for name, (kept, whole, share) in rows.items():
        assert (kept, whole) == (round(0.25 * whole), prune.masks[name].numel())
        assert share == pytest.approx(0.25, abs=0.01)


def test_yaml_prunes_with_public_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    path = "lightning_eff.privacy.prepruning.callback.DPPrePruneCallback"
    public = {"class_path": "DigitsDataModule", "init_args": {"seed": 7}}
    options = {"amount": 0.8, "score": "snip", "public_data": public, "scope": "global", "exclude": ["*conv1*"]}
    config = {"trainer": {"max_epochs": 1, "callbacks": [{"class_path": path, "init_args": options}]}}
    (tmp_path / "prune.yaml").write_text(yaml.safe_dump(config))
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0"]
    done = cli.main(["fit", "--config", DIGITS, "--config", "prune.yaml", *short])
    prune = next(one for one in done.trainer.callbacks if isinstance(one, DPPrePruneCallback))
    assert isinstance(prune.public_data, DigitsDataModule)
    shares = [float(mask.float().mean()) for mask in prune.masks.values()]
    kept, whole = sum(int(mask.sum()) for mask in prune.masks.values()), sum(map(Tensor.numel, prune.masks.values()))
    assert kept == round(0.2 * whole)
    assert max(shares) > min(shares)
    for name, mask in prune.masks.items():
        assert not done.model.get_parameter(name)[~mask].any()


TWO_PROCESSES = """
import os, torch, lightning as L
from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, SmallCNN
from lightning_eff.privacy.prepruning.callback import DPPrePruneCallback
torch.manual_seed(0)
rank = int(os.environ.get("LOCAL_RANK", 0))
public = [(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(rank)), torch.arange(16) % 10)]
prune = DPPrePruneCallback(0.7, score="snip", public_data=public)
model = ImageClassifier(SmallCNN(width=8))
trainer = L.Trainer(max_steps=3, accelerator="cpu", devices=2, strategy="ddp", callbacks=[prune], logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, DigitsDataModule(batch_size=16))
for name, mask in prune.masks.items():
    both = trainer.strategy.all_gather(mask.int())
    assert torch.equal(both[0], both[1]), name
    weights = trainer.strategy.all_gather(model.get_parameter(name).detach())
    assert torch.equal(weights[0], weights[1]), name
    assert not model.get_parameter(name)[~mask].any()
print("agrees")
"""


def test_two_processes_prune_the_same_though_they_read_other_public_batches(tmp_path: Path) -> None:
    assert run_ddp(TWO_PROCESSES, tmp_path).stdout.count("agrees") == 2
