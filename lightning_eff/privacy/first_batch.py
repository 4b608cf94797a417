"""What the first private batch shows about the user's step that nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.batches import number_of_examples, some_examples
from lightning_eff.privacy.budget import note
from lightning_eff.privacy.isolation import check_sample_isolation
from lightning_eff.privacy.options import IsolationCheck

# enough for several classes to be among them; each is run alone once
_MOST = 16


class FirstBatch:
    """Checks made once in a fit.

    Args:
        isolation: What to do where the loss of an example depends on other examples.
    """

    def __init__(self, isolation: IsolationCheck) -> None:
        self._isolation: IsolationCheck = isolation
        self._buffers_seen = False

    def check_isolation(self, module: LightningModule, step: Callable[[Any, Any], Tensor], batch: Any) -> None:
        """Compare gradients of examples inside of a batch with their gradients alone, on the first batch of several.

        The user's step runs on a copy of the module that logs nothing, so that its metrics and counters stay.

        Raises:
            ValueError: An example's gradient depends on the others, and the check is to be an error.
            RuntimeError: The module cannot be copied.
        """
        if self._isolation == "off":
            return
        try:
            copied = copy.deepcopy(module)
        except Exception as error:
            raise RuntimeError(
                f"{type(module).__name__} cannot be copied, so the isolation of examples cannot be checked: make sure "
                "that no example's loss depends on other examples and set isolation_check='off'"
            ) from error
        copied._trainer = module._trainer
        vars(copied).update(dict.fromkeys(("log", "log_dict"), _log_nothing))
        some = some_examples(batch, slice(0, min(_MOST, number_of_examples(batch))))
        report = check_sample_isolation(copied, step, some)
        kind, self._isolation = self._isolation, "off"
        if report.isolated:
            return
        if kind == "error":
            raise ValueError(str(report))
        rank_zero_warn(str(report))

    @contextmanager
    def watch_buffers(self, module: LightningModule, ledger: PrivacyLedger) -> Iterator[None]:
        """Tell once which buffers the first step changes: they keep private data without noise."""
        if self._buffers_seen:
            yield
            return
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        yield
        self._buffers_seen = True
        changed = [
            name
            for name, buffer in module.named_buffers()
            if name in before and not torch.equal(before[name].nan_to_num(), buffer.nan_to_num())
        ]
        if changed:
            rank_zero_warn(f"training_step changes the buffers {changed}: epsilon does not cover what they keep")
            note(ledger.not_covered, f"Buffers that training steps change: {', '.join(changed)}.")


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take what is logged."""
