"""Rules that say which units are trained. None of them sees a gradient of private data that is not noised.

That is why the choice costs no privacy: it depends on parameters (released already), public data, released noisy
gradients and randomness that is independent of the data (arXiv 2306.11754, arXiv 2303.04612).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.batch import LossFunction
from lightning_eff.documents import whole_state
from lightning_eff.privacy.public_data import (
    PublicSource,
    check_not_private,
    mean_gradients,
    public_loader,
)
from lightning_eff.privacy.selection.granularity import Units
from lightning_eff.privacy.selection.selected import Selection

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class SelectionContext:
    """What a selector may look at.

    Attributes:
        parameters: by name, the tensors to choose from, as they are now, without gradient.
        candidates: by name, what of each may be chosen: all, or what pre-pruning left.
        keep: share of the units to choose, 1 - drop rate, in (0, 1).
        explore: share of them that is drawn at random even where there are scores.
        units: the units of the given granularity and scope.
        step: optimizer step at which the choice begins to hold.
        epoch: epoch of that step.
        seed: of this choice; the same on every process, independent of the data.
        module: the module that is trained.
    """

    parameters: Mapping[str, Tensor]
    candidates: Mapping[str, Selection]
    keep: float
    explore: float
    units: Units
    step: int
    epoch: int
    seed: int
    module: nn.Module | None = None

    def random(self) -> dict[str, Selection]:
        """Choose units at random."""
        return self.units.choose(self.keep, self._generator())

    def best(self, scores: Scores) -> dict[str, Selection]:
        """Choose the units with the largest scores (by name, one of every coordinate), and ``explore`` at random."""
        return self.units.choose(self.keep, self._generator(), scores, self.explore)

    def _generator(self) -> torch.Generator:
        device = next((parameter.device for parameter in self.parameters.values()), torch.device("cpu"))
        return torch.Generator(device).manual_seed(self.seed)


class Selector:
    """A rule for choosing what is trained; derive from it, or pass any object with such a ``select``."""

    replayable = False
    """Whether the choice depends on nothing but the context's seed and rates, so that no checkpoint need keep it."""
    phase = 0
    """A new choice is made whenever this changes."""

    def select(self, context: SelectionContext) -> Mapping[str, Selection]:
        """Choose; by name, one for every parameter of the context, inside of its candidates."""
        raise NotImplementedError

    def check(self, private: Any) -> None:
        """Raise ValueError if this rule uses data that is in the private loader or data set."""

    def observe(self, released: Mapping[str, Tensor], selections: Mapping[str, Selection], noise_std: float) -> None:
        """Take note of the noisy mean gradient that a step released: blocks, and the deviation of their noise."""

    def start_anew(self) -> None:
        """Forget what was observed: the parameters have been replaced by others, or another fit begins."""

    def state_dict(self) -> dict[str, Any]:
        """Plain Python and tensors."""
        return {}

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""


class RandomSelector(Selector):
    """Any units, without replacement."""

    replayable = True

    def select(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose at random."""
        return context.random()


class MagnitudeSelector(Selector):
    """The units with the largest absolute values now."""

    def select(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose by ``|theta|``."""
        return context.best({name: parameter.abs() for name, parameter in context.parameters.items()})


class PublicGradientSelector(Selector):
    """The units with the largest mean gradient on public data.

    Args:
        public_data: a data set, a loader or list of batches, or a data module whose training loader is taken; nothing
            of it may be private.
        rule: ``"gradient"`` is |g|, ``"taylor"`` is |theta g|, the first-order change of the loss without it.
        batches: how many batches the gradient is averaged over, >= 1.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch; None asks the training step of a copy of the
            module.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        public_data: PublicSource,
        rule: Literal["gradient", "taylor"] = "gradient",
        batches: int = 1,
        loss_fn: LossFunction | None = None,
    ) -> None:
        check_choice("PublicGradientSelector's rule", rule, ("gradient", "taylor"))
        check_whole("PublicGradientSelector's batches", batches)
        self.public_data, self.rule, self.batches, self.loss_fn = public_data, rule, batches, loss_fn
        self._loader = public_loader(public_data)

    def check(self, private: Any) -> None:
        """Refuse private data given as public."""
        check_not_private(self._loader, private, "PublicGradientSelector(public_data=...)")

    def select(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose by the gradient on the first batches of the loader."""
        if context.module is None:
            raise ValueError("PublicGradientSelector needs the module: bind the plan with module=...")
        gradients = mean_gradients(
            context.module,
            self._loader,
            context.parameters,
            loss_fn=self.loss_fn,
            most=self.batches,
            seed=context.seed,
        )
        scores = {name: gradient.abs() for name, gradient in gradients.items()}
        if self.rule == "taylor":
            scores = {name: score * context.parameters[name].abs() for name, score in scores.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for score in scores.values():  # every process has read batches of its own
                torch.distributed.broadcast(score, 0)
        return context.best(scores)


class NoisyGradientSelector(Selector):
    """The units whose noisy gradients had the most energy beyond the noise's in the first steps (arXiv 2606.04375).

    The first steps train everything; they are private steps like any other and are accounted as such. Afterwards a
    coordinate's score is the mean of its squared noisy gradient less the noise's variance.

    Args:
        warmup_steps: steps that train everything, >= 1.

    Raises:
        ValueError: ``warmup_steps`` lies outside its range.
    """

    def __init__(self, warmup_steps: int = 20) -> None:
        check_whole("NoisyGradientSelector's warmup_steps", warmup_steps)
        self.warmup_steps = warmup_steps
        self._steps = 0
        self._energy: dict[str, Tensor] = {}

    @property
    def phase(self) -> int:  # type: ignore[override]
        """1 when the first steps are over, else 0."""
        return int(self._steps >= self.warmup_steps)

    def observe(self, released: Mapping[str, Tensor], selections: Mapping[str, Selection], noise_std: float) -> None:
        """Sum up squared gradients less the noise's variance, during the first steps."""
        if self.phase:
            return
        for name, block in released.items():
            selection = selections[name]
            energy = selection.expand(block.detach().float().square() - noise_std**2)
            before = self._energy.get(name)
            self._energy[name] = energy if before is None else energy + before.to(energy.device)
        self._steps += 1

    def select(self, context: SelectionContext) -> dict[str, Selection]:
        """Choose everything at first, then the units with the most energy.

        Raises:
            ValueError: What was observed is of another network.
        """
        if not self.phase:
            return dict(context.candidates)
        observed = {name: energy.shape for name, energy in self._energy.items()}
        wrong = [name for name, parameter in context.parameters.items() if observed.get(name) != parameter.shape]
        if wrong:
            raise ValueError(
                f"NoisyGradientSelector has observed gradients of another network, not of {', '.join(wrong)}: take a "
                "new selector, or begin the fit without ckpt_path"
            )
        scores = {name: self._energy[name].to(parameter.device) for name, parameter in context.parameters.items()}
        return context.best(scores)

    def start_anew(self) -> None:
        """Begin with the first steps again."""
        self._steps, self._energy = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and energies."""
        return {"steps": self._steps, "energy": {name: energy.cpu() for name, energy in self._energy.items()}}

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self._steps = state["steps"]
        self._energy = dict(state["energy"])


SelectorName = Literal["random", "magnitude", "public_gradient", "noisy_gradient"]


def selector_from(selection: SelectorName | Selector | Any) -> Any:
    """Return the selector of a name, or the object itself.

    Raises:
        ValueError: another name, a rule that cannot be made from a name, or an object without ``select``.
    """
    if selection == "public_gradient":
        raise ValueError(
            'selection="public_gradient" needs data: pass selection=PublicGradientSelector(public_data=...)'
        )
    named = {"random": RandomSelector, "magnitude": MagnitudeSelector, "noisy_gradient": NoisyGradientSelector}
    if isinstance(selection, str):
        if selection not in named:
            raise ValueError(f"selection must be one of {', '.join(named)}, public_gradient, got {selection!r}")
        return named[selection]()
    if not callable(getattr(selection, "select", None)):
        raise ValueError(
            f"selection must be a name or an object with select(context), got a {type(selection).__name__}"
        )
    return selection
