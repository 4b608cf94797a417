"""Checkpoints of every technique: plain and loadable with ``weights_only=True``; what does not fit is refused whole."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import FAST, mutated, refused, same
from small_runs import RUNS, quiet
from torch import Tensor

LIGHTNING = {
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "state_dict",
    "loops",
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "hparams_name",
    "hyper_parameters",
    "MixedPrecision",
}


@cache
def checkpoint_of(name: str) -> dict[str, Any]:
    """What a run of the technique writes at its end, read with ``weights_only=True``."""
    with TemporaryDirectory() as folder:
        RUNS[name].fit(Path(folder))
        found: dict[str, Any] = torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    return found


def plain(value: Any, where: str) -> None:
    """Plain Python and tensors that need no gradient, all the way down."""
    if isinstance(value, dict):
        for key, entry in value.items():
            assert isinstance(key, str | int), where
            plain(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            plain(entry, f"{where}[{i}]")
    elif isinstance(value, Tensor):
        assert not value.requires_grad, where
        assert value.untyped_storage().nbytes() <= max(1, value.nbytes), f"{where} drags a larger tensor along"
    else:
        assert value is None or type(value) in (bool, int, float, str), f"{where} is a {type(value)}"


@pytest.mark.parametrize("name", RUNS)
def test_everything_in_a_checkpoint_is_plain(name: str) -> None:
    plain(dict(checkpoint_of(name)), name)


@pytest.mark.parametrize("name", RUNS)
@FAST
@given(data=st.data())
def test_state_of_a_callback_that_does_not_fit_changes_nothing(name: str, data: st.DataObject) -> None:
    for callback in RUNS[name].callbacks(Path()):
        state = checkpoint_of(name)["callbacks"].get(callback.state_key)
        if state:
            before = copy.deepcopy(callback.state_dict())
            wrong = data.draw(mutated(state))
            why = refused(lambda one=callback, wrong=wrong: one.load_state_dict(copy.deepcopy(wrong)))
            assert why is None or same(callback.state_dict(), before), why
            callback.state_dict()


@pytest.mark.parametrize("name", RUNS)
@FAST
@given(data=st.data())
def test_entry_of_a_module_that_does_not_fit_changes_nothing(name: str, data: st.DataObject) -> None:
    checkpoint = checkpoint_of(name)
    own = {key: entry for key, entry in checkpoint.items() if key not in LIGHTNING}
    if not own:
        return
    module = RUNS[name].module(Path())
    before, weights = _entries(module), copy.deepcopy(module.state_dict())
    wrong = {**checkpoint, **data.draw(mutated(own, root=False))}
    with quiet():
        why = refused(lambda: module.on_load_checkpoint(copy.deepcopy(wrong)))
    assert why is None or (same(_entries(module), before) and same(dict(module.state_dict()), dict(weights))), why
    _entries(module)


def _entries(module: Any) -> dict[str, Any]:
    written: dict[str, Any] = {"state_dict": {}, "hyper_parameters": {}}
    module.on_save_checkpoint(written)
    return written
