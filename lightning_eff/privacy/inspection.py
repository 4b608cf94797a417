"""What the user's step shows about itself only while it runs on private batches.

Looked at on the first, second, fourth, eighth ... batch of a fit: what begins later is found then, and the cost fades.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.batches import number_of_samples, some_samples
from lightning_eff.privacy.budget import note
from lightning_eff.privacy.isolation import IsolationReport, check_sample_isolation
from lightning_eff.privacy.options import IsolationCheck

# samples of the first batch, and of later ones; each is run alone once
_FIRST, _LATER = 32, 8
_ISOLATED = (
    "The loss of a sample does not depend on other samples ({}), nor does what collate_fn and transfer hooks make "
    "of it."
)
_MIXED = "A sample's gradient was seen to depend on other samples of its batch: epsilon does not hold."


class Inspection:
    """Checks of one fit.

    Args:
        isolation: What to do where the loss of a sample depends on other samples.
        public_buffers: fnmatch patterns of buffers that may change, because nothing private is in them.
    """

    def __init__(self, isolation: IsolationCheck, public_buffers: Sequence[str] = ()) -> None:
        self._isolation: IsolationCheck = isolation
        self._public_buffers = tuple(public_buffers)
        self._batches = self._watched = 0
        self._checks: list[int] = []
        self._told: str | None = None
        self._changed: set[str] = set()

    def tell(self, ledger: PrivacyLedger) -> None:
        """Write down how often the isolation of samples was checked, and with how many."""
        checked = "not checked"
        if self._checks:
            times = len(self._checks)
            checked = f"checked on {times} batch{'es' if times > 1 else ''}, with up to {max(self._checks)} samples"
        sentence = _ISOLATED.format(checked)
        if sentence != self._told and self._told in ledger.assumptions:
            ledger.assumptions.remove(self._told)
        note(ledger.assumptions, sentence)
        self._told = sentence

    def check_isolation(
        self, module: LightningModule, step: Callable[[Any, Any], Tensor], batch: Any, ledger: PrivacyLedger
    ) -> None:
        """Compare gradients of samples inside of a batch with their gradients without the others.

        The user's step runs on a copy of the module that logs nothing, so that its metrics and counters stay.

        Args:
            module: The user's.
            step: Takes module and batch, returns the loss.
            batch: Of two samples or more; others are not looked at.
            ledger: Is told of the check and of what it found.

        Raises:
            ValueError: A sample's gradient depends on the others, or nothing can be told, and the check is to be an
                error; or the step does not work for one sample.
            RuntimeError: The module cannot be copied.
        """
        samples = number_of_samples(batch)
        if self._isolation == "off" or samples < 2:
            return
        self._batches += 1
        if not _is_power_of_two(self._batches):
            return
        # samples may come in an order, of their classes for example
        apart = -(-samples // (_LATER if self._checks else _FIRST))
        some = some_samples(batch, slice(len(self._checks) % apart, None, apart))
        report = self._compare(module, step, some)
        if report.isolated:
            self._checks.append(number_of_samples(some))
            self.tell(ledger)
            return
        if self._isolation == "error":
            raise ValueError(report.outcome)
        rank_zero_warn(report.outcome)
        if not report.random:
            note(ledger.caveats, _MIXED)
        self._isolation = "off"

    @contextmanager
    def watch_buffers(self, module: LightningModule, ledger: PrivacyLedger) -> Iterator[None]:
        """Tell which buffers a step changes: they keep private data without noise."""
        self._watched += 1
        if not _is_power_of_two(self._watched):
            yield
            return
        before = {name: buffer.clone() for name, buffer in self._private_buffers(module)}
        yield
        changed = [
            name
            for name, buffer in self._private_buffers(module)
            if name in before and not torch.equal(before[name].nan_to_num(), buffer.nan_to_num())
        ]
        if changed:
            self._changed.update(changed)
            rank_zero_warn(
                f"training_step changes the buffers {changed}, and no noise covers what they keep. Where nothing of "
                "the samples is in them (a counter of steps), name them in public_buffers of PrivateTrainingOptions"
            )
            note(ledger.caveats, f"Training steps write to buffers, without noise: {', '.join(changed)}.")

    def _compare(self, module: LightningModule, step: Callable[[Any, Any], Tensor], batch: Any) -> IsolationReport:
        try:
            copied = copy.deepcopy(module)
        except Exception as error:
            raise RuntimeError(
                f"{type(module).__name__} cannot be copied, so the isolation of samples cannot be checked: make sure "
                "that no sample's loss depends on other samples and set isolation_check='off'"
            ) from error
        copied._trainer = module._trainer
        vars(copied).update(dict.fromkeys(("log", "log_dict"), _log_nothing))
        return check_sample_isolation(copied, step, batch)

    def _private_buffers(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """Buffers that could keep something of the samples and have not been told of."""
        # the power iteration sees weights alone
        of_weights = {
            id(buffer) for part in module.modules() if isinstance(part, _SpectralNorm) for buffer in part.buffers()
        }
        return [
            (name, buffer)
            for name, buffer in module.named_buffers()
            if id(buffer) not in of_weights
            and name not in self._changed
            and not any(fnmatch(name, pattern) for pattern in self._public_buffers)
        ]


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Take what is logged."""
