"""Checkpoints of cut networks load whatever the shapes, in every way that does not need a Trainer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from networks import build
from test_cut import half_plan
from torch import Tensor, nn

from lightning_eff.surgery import ChannelGraph, apply_plan, load_pruned, prunable, save_pruned, structure_of
from lightning_eff.surgery.structure import KEY, apply_structure, is_prunable, unprunable


class Lit(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


X = torch.randn(2, 1, 8, 8)


@pytest.fixture(autouse=True)
def _fresh_class():
    yield
    unprunable(Lit)


def cut(model: nn.Module, x: Tensor = X) -> nn.Module:
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)
    return model


def save(model: pl.LightningModule, path: Path) -> Path:
    pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).strategy.connect(model)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def test_plain_torch_model_survives_a_file_in_a_fresh_instance(tmp_path: Path) -> None:
    model, x = build("ResNet-18")
    save_pruned(cut(model, x), tmp_path / "net.pt")
    fresh = load_pruned(build("ResNet-18", seed=1)[0], tmp_path / "net.pt")
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["MobileNetV2", "DenseNet", "ResNeXt", "transposed", "ViT"])
def test_every_kind_of_layer_takes_on_the_shapes_of_the_file(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    save_pruned(cut(model, x), tmp_path / "net.pt")
    fresh = load_pruned(build(name, seed=1)[0], tmp_path / "net.pt")
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert [str(m) for m in fresh.modules()] == [str(m) for m in model.modules()]


def test_wider_and_dense_states_load_into_a_narrower_model(tmp_path: Path) -> None:
    model, x = build("SmallCNN")
    dense = copy.deepcopy(model)
    save_pruned(dense, tmp_path / "dense.pt")
    save_pruned(cut(model, x), tmp_path / "half.pt")
    half = copy.deepcopy(model)
    cut(model, x)  # a quarter now
    for path, expected in (("half.pt", half), ("dense.pt", dense)):
        load_pruned(model, tmp_path / path)
        assert torch.equal(model.eval()(x), expected.eval()(x))
        assert ChannelGraph.from_model(model, x).sizes == ChannelGraph.from_model(expected, x).sizes


def test_apply_plan_lets_the_class_of_a_lightning_module_save_shapes(tmp_path: Path) -> None:
    model = cut(Lit())
    path = save(model, tmp_path / "cut.ckpt")
    assert is_prunable(Lit)
    for weights_only in (True, False, None):
        loaded = Lit.load_from_checkpoint(path, weights_only=weights_only)
        assert torch.equal(loaded.eval()(X), model.eval()(X))


def test_unmodified_class_says_which_helper_to_use_and_the_helper_works(tmp_path: Path) -> None:
    model = cut(Lit())
    path = save(model, tmp_path / "cut.ckpt")
    unprunable(Lit)
    with pytest.raises(RuntimeError, match=r"lightning_eff\.load_pruned"):
        Lit.load_from_checkpoint(path)
    loaded = load_pruned(Lit, path)
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    again = load_pruned(Lit(), path)
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_loaded_module_saves_its_shapes_again(tmp_path: Path) -> None:
    path = save(cut(Lit()), tmp_path / "one.ckpt")
    loaded = load_pruned(Lit, path)
    twice = load_pruned(Lit, save(loaded, tmp_path / "two.ckpt"))
    assert torch.equal(twice.eval()(X), loaded.eval()(X))


def test_decorated_class_calls_the_users_own_hooks(tmp_path: Path) -> None:
    @prunable
    class Own(Lit):
        def on_save_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            self.mine = checkpoint["mine"]
            self.keys = list(checkpoint["state_dict"])

    model = cut(Own())
    loaded = Own.load_from_checkpoint(save(model, tmp_path / "own.ckpt"))
    assert loaded.mine == 3
    assert loaded.keys == list(model.state_dict())


def test_checkpoint_of_a_whole_network_is_untouched(tmp_path: Path) -> None:
    prunable(Lit)
    path = save(Lit(), tmp_path / "dense.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert KEY not in checkpoint
    assert list(checkpoint["state_dict"]) == list(Lit().state_dict())


def test_unprunable_gives_the_class_its_hooks_back() -> None:
    before = Lit.on_save_checkpoint, Lit.on_load_checkpoint
    prunable(prunable(Lit))
    assert is_prunable(Lit)
    unprunable(Lit)
    assert (Lit.on_save_checkpoint, Lit.on_load_checkpoint) == before
    assert "on_save_checkpoint" not in vars(Lit)


def test_checkpoint_of_another_network_or_version_changes_nothing() -> None:
    model = cut(Lit())
    structure = structure_of(model)
    assert structure is not None
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"has no layer net\.0"):
        apply_structure(other, structure)
    with pytest.raises(ValueError, match="version 1, got 9"):
        apply_structure(Lit(), {**structure, "version": 9})
    assert structure_of(other) is None


def test_same_layers_of_other_width_give_the_strict_error(tmp_path: Path) -> None:
    path = save(Lit(width=12), tmp_path / "wide.ckpt")
    model = Lit()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])


def test_cut_module_can_be_copied_and_pickled() -> None:
    model = cut(Lit())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(X), model.eval()(X))
        assert structure_of(twin) == structure_of(model)


def test_part_cut_on_its_own_is_remembered_by_the_whole() -> None:
    model = Lit()
    cut(model.net)
    assert set(structure_of(model)["modules"]) == {"net.0", "net.1", "net.3", "net.6"}


def test_load_pruned_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not a LightningModule"):
        load_pruned(nn.Linear, tmp_path / "x")
    with pytest.raises(TypeError, match="no options"):
        load_pruned(nn.Linear(1, 1), tmp_path / "x", strict=False)
