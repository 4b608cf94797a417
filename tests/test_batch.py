"""The one convention of what a batch is."""

import pytest
import torch
from torch import nn

from lightning_eff.batch import BatchKeys, batch_size, call_model, split_batch, take
from lightning_eff.early_exit import EarlyExitModule
from lightning_eff.glimpse import AdaGlimpseModule, AgentConfig, CanvasBackbone, ClassificationTask, GlimpseConfig
from lightning_eff.moe import DecoderConfig, MoEScalingModule
from lightning_eff.pruning import Samples
from lightning_eff.synthesis import DPNTKGenerator

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


@pytest.mark.parametrize("kind", [tuple, list])
def test_two_entries_are_inputs_and_target(kind):
    inputs, target = split_batch(kind([X, Y]))
    assert inputs is X
    assert target is Y


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ({"image": X, "label": Y}, "dict with keys .*image.*label"),
        ((X, Y, X), "tuple of 3"),
        ([X], "list of 1"),
        (X, "Tensor"),
    ],
)
def test_anything_else_is_refused_saying_what_came_and_what_to_pass(batch, came):
    with pytest.raises((TypeError, ValueError), match=rf'{came}.*split_batch=.*BatchKeys\("image", "label"\)'):
        split_batch(batch)


def test_batch_keys_take_one_entry_as_it_is():
    assert BatchKeys("image", "label")({"image": X, "label": Y, "path": "a.png"}) == (X, Y)


def test_batch_keys_take_several_entries_by_name():
    inputs, target = BatchKeys(["ids", "mask"], "label")({"ids": X, "mask": Y, "label": 1})
    assert inputs == {"ids": X, "mask": Y}
    assert target == 1


def test_missing_key_is_named_with_those_present():
    with pytest.raises(KeyError, match=r"label.*image.*split_batch=BatchKeys\(inputs, target\)"):
        BatchKeys("image", "label")({"image": X})


def test_batch_keys_refuse_a_batch_without_names():
    with pytest.raises(TypeError, match="tuple"):
        BatchKeys("image", "label")((X, Y))


class Sum(nn.Module):
    def forward(self, a, b=None):
        return a if b is None else a + b


@pytest.mark.parametrize("inputs", [(X, X), [X, X], {"a": X, "b": X}])
def test_model_gets_tuples_by_position_and_dicts_by_keyword(inputs):
    assert torch.equal(call_model(Sum(), inputs), 2 * X)


def test_model_gets_a_tensor_as_its_one_argument():
    assert call_model(Sum(), X) is X


@pytest.mark.parametrize("inputs", [X, (X, Y), {"name": "a", "x": X}, [torch.tensor(1.0), {"deep": Y}]])
def test_batch_size_is_that_of_the_first_tensor(inputs):
    assert batch_size(inputs) == 6


def test_batch_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="expected at least one tensor"):
        batch_size({"name": "a"})


@pytest.mark.parametrize("index", [slice(2, 4), torch.tensor([2, 3])])
def test_samples_are_taken_out_of_every_tensor_and_nothing_else(index):
    taken = take({"x": X, "rest": (Y, "name", torch.tensor(7))}, index)
    assert torch.equal(taken["x"], X[2:4])
    assert torch.equal(taken["rest"][0], Y[2:4])
    assert taken["rest"][1:] == ("name", torch.tensor(7))


def test_batches_of_another_form_are_told_alike_by_every_technique_with_the_way_to_split_them():
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.zeros(2, dtype=torch.int64)}
    exits = EarlyExitModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3)), ["1"], 3)
    experts = MoEScalingModule(DecoderConfig(vocab_size=16, d_model=8, n_layers=1, n_heads=1, max_seq_len=4))
    seen = AgentConfig(state_parts=("patch", "box"))
    glimpses = AdaGlimpseModule(CanvasBackbone(1, 3), ClassificationTask(3), GlimpseConfig(8, patch_size=2), seen)
    records = DPNTKGenerator(1.0, num_classes=3, input_shape=(1, 8, 8), feature_widths=(4,))
    readers = {
        "calibration of a cut": lambda: Samples.collect([batch], 2, split_batch),
        "early exits": lambda: exits.split_batch(batch),
        "experts": lambda: experts.training_step(batch, 0),
        "glimpses": lambda: glimpses._images_and_target(batch),
        "release": lambda: records.release([batch]),
    }
    for name, read in readers.items():
        with pytest.raises(TypeError) as told:
            read()
        assert "got a dict with keys ['image', 'label']: pass split_batch=, a callable" in str(told.value), name
