"""One private step: clipped sums of physical batches, one reduction, noise, and what the optimizer may change.

With G the sum over the logical batch of per-sample gradients on the active coordinates S, each clipped to norm C, the
optimizer gets ``(G + sigma C z) / (q N)`` on S and zero elsewhere. The order matters: select, clip, add up, add noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_eff.arguments import check_choice
from lightning_eff.privacy.engine.engine import Clipping, PerSampleEngine
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.options import Dropped
from lightning_eff.privacy.selection.plan import SelectionPlan, check_masks
from lightning_eff.privacy.selection.selected import Selection

MaskMode = Literal["prune", "freeze"]


class StaticMasks:
    """What training never touches: coordinates that were pruned or frozen before it began.

    Args:
        masks: By parameter name, bool of its shape, True where it is trained.
        mode: ``"prune"`` makes the others zero, ``"freeze"`` leaves them as they are.
        parameters: Trainable parameters by name.

    Raises:
        ValueError: Names or shapes do not fit; lists all differences, and nothing was applied.
    """

    def __init__(self, masks: Mapping[str, Tensor], mode: MaskMode, parameters: Mapping[str, Tensor]) -> None:
        check_choice("mode", mode, ("prune", "freeze"))
        check_masks(masks, parameters)
        self.masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
        self.mode = mode
        if mode == "prune":
            with torch.no_grad():
                for name, mask in self.masks.items():
                    parameters[name].masked_fill_(~mask, 0)


class PrivateStep:
    """Takes one private step after another.

    Args:
        module: The module that is trained.
        parameters: By name, those the optimizer changes. Others are not trained, even if they require a gradient.
        plan: Chooses the active coordinates; bound here.
        streams: Where the noise comes from, the same on every process.
        max_grad_norm: C > 0.
        clipping: See :meth:`PerSampleEngine.clipped_sum`.
        dropped: ``"freeze"`` gives inactive coordinates their value back after the update; ``"zero_grad"`` leaves
            to the optimizer what it does with a gradient of zero.
        static: Pruned or frozen coordinates, which never change.
        memory_budget_mb: See :class:`PerSampleEngine`.
        tune: See :class:`PerSampleEngine`.
        add_up: Adds a tensor up over all processes.
        total_steps: Optimizer steps of the whole fit, for schedules.
        epochs: Epochs of the whole fit, for schedules.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        plan: SelectionPlan,
        streams: SecretStreams,
        *,
        max_grad_norm: float = 1.0,
        clipping: Clipping = "flat",
        dropped: Dropped = "freeze",
        static: StaticMasks | None = None,
        memory_budget_mb: float = 256,
        tune: bool = True,
        add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        total_steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.plan = plan
        self._streams = streams
        self._max_grad_norm, self._clipping, self._dropped = max_grad_norm, clipping, dropped
        self._static = {} if static is None else static.masks
        self._add_up = add_up
        self._engine = PerSampleEngine(module, memory_budget_mb=memory_budget_mb, tune=tune)
        masks = {name: mask for name, mask in self._static.items() if name in self.parameters}
        plan.bind(self.parameters, static_masks=masks, module=module, total_steps=total_steps, epochs=epochs)
        self._untrained = {
            name: Selection.none(parameter.shape, parameter.device)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name not in self.parameters
        }
        self._kept_static = {name: Selection(mask.shape, mask=mask) for name, mask in masks.items()}
        self.selections: dict[str, Selection] = {}
        self._sums: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._begun = False

    def trains(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether these are the parameters that the step trains: the same names in order, and the same objects."""
        ours = self.parameters
        return list(ours) == list(parameters) and all(ours[name] is one for name, one in parameters.items())

    def begin(self, step: int, epoch: int) -> None:
        """Choose what the next optimizer step trains, and forget what was collected for one that never came."""
        if self._sums:
            rank_zero_warn(
                "no optimizer step came after a batch, so that its samples count for nothing: batches cannot be added "
                "up by an optimizer_step that skips some of them. Take the batch size you want to train with and "
                "max_physical_batch_size="
            )
        selections = self.plan.at(step, epoch)
        if selections is not self.selections:
            self.selections = selections
            self._engine.select({**selections, **self._untrained})
        self._engine.reset()
        self._sums = {}
        self._begun = True

    @contextmanager
    def record(self, samples: int) -> Iterator[None]:
        """Record the forward pass of a physical batch of ``samples`` >= 1 samples."""
        with self._engine.record(samples):
            yield

    def collect(self) -> None:
        """Add the clipped sum of the physical batch whose backward pass of ``n * loss`` has run."""
        sums = self._engine.clipped_sum(self._max_grad_norm, self._clipping)
        for name in self.parameters:
            self._sums[name] = self._sums[name].add_(sums[name]) if name in self._sums else sums[name]
        self._engine.reset()

    def add_up(self) -> Tensor:
        """Add the active coordinates up over all processes; not private before :meth:`release`.

        Raises:
            RuntimeError: No batch was begun since the last step.
        """
        if not self._begun:
            raise RuntimeError(
                "the optimizer asked for a second gradient of one batch, which would be a second look at the same "
                "samples that no accountant counts: use an optimizer that takes one gradient a step"
            )
        self._begun = False
        wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in self.parameters.values()]
        dtype = torch.float64 if torch.float64 in wide else torch.float32
        parts = []
        for name, parameter in self.parameters.items():
            selection = self.selections[name]
            if name in self._sums:
                parts.append(selection.pack(self._sums[name]).to(dtype))
            else:
                parts.append(torch.zeros(selection.count, dtype=dtype, device=parameter.device))
        self._sums = {}
        return self._add_up(torch.cat(parts))

    @torch.no_grad()
    def release(self, flat: Tensor, noise_multiplier: float, expected_batch: float, step: int) -> None:
        """Add noise, divide by the expected batch, write gradients, and note what the update must not change.

        Args:
            flat: From :meth:`add_up`, changed in place.
            noise_multiplier: sigma >= 0.
            expected_batch: q N, of all processes.
            step: Number of the step, which the noise is drawn for: never twice the same.
        """
        if noise_multiplier > 0:
            flat.add_(self._streams.normal(step, flat), alpha=noise_multiplier * self._max_grad_norm)
        flat.div_(expected_batch)
        pieces = torch.split(flat, [self.selections[name].count for name in self.parameters])
        released = {}
        self._before = {}
        for (name, parameter), piece in zip(self.parameters.items(), pieces, strict=True):
            selection = self.selections[name]
            block = selection.unpack(piece)
            released[name] = block
            parameter.grad = selection.expand(block).to(parameter.dtype)
            if self._put_back(name) is not None:
                self._before[name] = parameter.detach().clone()
        self.plan.observe(released, noise_multiplier * self._max_grad_norm / expected_batch)

    def restore(self) -> None:
        """After the update, give coordinates that were not trained their value back, bit for bit."""
        for name, before in self._before.items():
            selection = self._put_back(name)
            assert selection is not None
            selection.put_back(self.parameters[name], before)
        self._before = {}

    @property
    def active_coordinates(self) -> int:
        """Coordinates that the current selection trains."""
        return sum(selection.count for selection in self.selections.values())

    @property
    def kept_coordinates(self) -> int:
        """Coordinates that are left to choose from."""
        return sum(
            int(self._static[name].count_nonzero()) if name in self._static else parameter.numel()
            for name, parameter in self.parameters.items()
        )

    def _put_back(self, name: str) -> Selection | None:
        """What an update may change of a parameter; None is everything."""
        if self._dropped == "freeze":
            selection = self.selections[name]
            return None if selection.is_all else selection
        return self._kept_static.get(name)
