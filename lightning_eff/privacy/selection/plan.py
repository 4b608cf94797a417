"""Which coordinates of which parameter are trained at a step: rate, rule, units and how often to choose anew.

The choice depends on a seed and the step or epoch; on every process it is the same. Drop rate and choice do not enter
the privacy accounting, because no rule sees a private gradient.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_number, check_whole, plain
from lightning_eff.documents import whole_state
from lightning_eff.privacy.selection.granularity import Granularity, Scope, Units
from lightning_eff.privacy.selection.schedule import RateSchedule
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.selection.selectors import SelectionContext, Selector, SelectorName, selector_from

ALWAYS_KEPT = ("*bias", "*norm*")
"""Names of parameters that are always trained, beside every tensor of one dimension: they are few and cheap."""


class SelectionPlan:
    """Chooses, for every optimizer step, the coordinates that it trains.

    Args:
        drop_rate: share of the units that a step does not train, in [0, 1), or a schedule of it.
        selection: the rule: ``"random"``, ``"magnitude"``, ``"noisy_gradient"``, or a selector object, e.g.
            ``PublicGradientSelector(data)``.
        granularity: what a unit is: ``"element"``, ``"row"`` (an output neuron or channel), ``"row_col"`` (rows and
            input columns), ``"tensor"``. All but ``element`` make a step cheaper.
        scope: ``"layerwise"`` keeps the share in every tensor, at least one unit; ``"global"`` keeps it of all units
            together.
        refresh: choose anew every ``"step"``, every ``"epoch"``, or every so many optimizer steps.
        explore: share in [0, 1) of the chosen units that is random although the rule has scores.
        always_keep: patterns of parameter names that are always trained; None is ``*bias``, ``*norm*`` and every
            tensor of one dimension, class tokens ``[1, 1, E]`` and scales ``[C, 1, 1]`` among them.
        seed: of random choices, independent of the noise's and the sampling's randomness.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        drop_rate: float | RateSchedule = 0.0,
        selection: SelectorName | Selector | Any = "random",
        granularity: Granularity = "element",
        scope: Scope = "layerwise",
        refresh: Literal["step", "epoch"] | int = "step",
        explore: float = 0.0,
        always_keep: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(drop_rate, RateSchedule):
            check_number("drop_rate", drop_rate, least=0, below=1)
        for name, value, known in (("granularity", granularity, Granularity), ("scope", scope, Scope)):
            check_choice(name, value, get_args(known))
        if refresh not in ("step", "epoch") and (
            not isinstance(refresh, int) or isinstance(refresh, bool) or refresh < 1
        ):
            raise ValueError(f'refresh must be "step", "epoch" or a number of steps >= 1, got {refresh!r}')
        check_number("explore", explore, least=0, below=1)
        check_whole("seed", seed, 0)
        if isinstance(always_keep, str):
            raise ValueError(f"always_keep must be a list of patterns, got the string {always_keep!r}")
        self.drop_rate = plain(drop_rate)
        self.selector = selector_from(selection)
        self.granularity, self.scope, self.refresh, self.explore = granularity, scope, refresh, explore
        self.always_keep = None if always_keep is None else tuple(always_keep)
        self.seed = int(seed)
        self._parameters: dict[str, Tensor] = {}
        self._current: dict[str, Selection] | None = None
        self._key: tuple[int, ...] | None = None
        self._loaded: Mapping[str, Any] | None = None

    def bind(
        self,
        parameters: Mapping[str, Tensor],
        *,
        static_masks: Mapping[str, Tensor] | None = None,
        module: nn.Module | None = None,
        total_steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """Say what there is to choose from. May be called again, e.g. when masks come later.

        Args:
            parameters: trainable parameters by name, on the device they are trained on.
            static_masks: by name, bool of the parameter's shape: what pre-pruning left. Choices stay inside of them;
                rates count what is inside.
            module: the module that is trained, for rules that ask it.
            total_steps: optimizer steps of the whole fit, for schedules; None where that is unknown.
            epochs: epochs of the whole fit; None where that is unknown.

        Raises:
            ValueError: masks do not fit the parameters, or a schedule over the fit has no known length.
        """
        masks = dict(static_masks or {})
        check_masks(masks, parameters)
        schedule = self.drop_rate
        if isinstance(schedule, RateSchedule) and schedule.kind != "constant":
            needed = [epochs] if self.refresh == "epoch" else []
            if (schedule.over == "fit") != (self.refresh == "epoch"):
                needed.append(total_steps)
            if None in needed:
                raise ValueError(
                    "the RateSchedule of drop_rate needs to know how long training takes: give the Trainer max_epochs "
                    "or max_steps and a loader with a length, or RateSchedule(over=STEPS) with refresh by steps"
                )
        warmup = getattr(self.selector, "warmup_steps", 0)
        if self.drop_rate != 0 and total_steps is not None and warmup >= total_steps:
            warnings.warn(
                f"{type(self.selector).__name__} trains everything in its first {warmup} steps and training has only "
                f"{total_steps}: nothing is ever dropped. Give it fewer warmup_steps, or train longer",
                stacklevel=2,
            )
        self._parameters = dict(parameters)
        self._module, self._total_steps, self._epochs = module, total_steps, epochs
        self._candidates = {
            name: _candidate(parameter, masks.get(name)) for name, parameter in self._parameters.items()
        }
        self._free = [name for name, parameter in self._parameters.items() if not self._is_kept(name, parameter)]
        self._units = Units({name: self._candidates[name] for name in self._free}, self.granularity, self.scope)
        self._current = self._key = None

    def at(self, step: int, epoch: int = 0) -> dict[str, Selection]:
        """Return the selection of every parameter for an optimizer step.

        While a choice holds, the very same dict comes back.

        Args:
            step: number of optimizer steps taken so far, empty batches included.
            epoch: the epoch this step belongs to.
        """
        key = self._key_at(step, epoch)
        if self._current is None or key != self._key:
            self._current = self._take_loaded(key) or self._choose(key, step, epoch)
            self._key = key
        return self._current

    def rate_at(self, step: int, epoch: int = 0) -> float:
        """Return the drop rate of an optimizer step; it changes only when a new choice is made."""
        if not isinstance(self.drop_rate, RateSchedule):
            return self.drop_rate
        schedule = self.drop_rate
        if self.refresh == "epoch":
            if schedule.over == "fit":
                return schedule.rate(epoch, self._epochs or 1)
            return schedule.rate(epoch * (self._total_steps or 0) / (self._epochs or 1), schedule.over)
        begun = step if self.refresh == "step" else step - step % int(self.refresh)
        return schedule.rate(begun, (self._total_steps or 1) if schedule.over == "fit" else schedule.over)

    @property
    def dropped(self) -> float:
        """Share of the coordinates there are to choose from that the present choice leaves out."""
        if self._current is None or all(self._current[name] is self._candidates[name] for name in self._free):
            return 0.0
        there = sum(self._candidates[name].count for name in self._free)
        return 1 - sum(self._current[name].count for name in self._free) / max(1, there)

    def check_public(self, private: Any) -> None:
        """Raise ValueError if the rule uses data of the private loader or data set."""
        if isinstance(self.selector, Selector):
            self.selector.check(private)

    def observe(self, released: Mapping[str, Tensor], noise_std: float) -> None:
        """Tell the rule what the last step released.

        Args:
            released: by name, the noisy mean gradient as blocks of the current selections.
            noise_std: standard deviation of the noise in it, sigma C / (q N).
        """
        if isinstance(self.selector, Selector) and self._current is not None:
            self.selector.observe({name: released[name] for name in self._free}, self._current, noise_std)

    def start_anew(self) -> None:
        """Forget what the rule has learned, because the parameters are others now or another fit begins."""
        if isinstance(self.selector, Selector):
            self.selector.start_anew()
        self._current = self._key = self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """What cannot be chosen again from the seed: plain Python and tensors."""
        selector = self.selector.state_dict() if hasattr(self.selector, "state_dict") else {}
        replayable = getattr(self.selector, "replayable", False)
        if replayable or self._current is None or self._key is None:
            return {"selector": selector}
        chosen = {name: self._current[name].state() for name in self._free}
        return {"selector": selector, "key": list(self._key), "chosen": chosen}

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote; a choice that still holds is not made anew."""
        if hasattr(self.selector, "load_state_dict"):
            self.selector.load_state_dict(state["selector"])
        self._loaded = state
        self._current = self._key = None

    def _is_kept(self, name: str, parameter: Tensor) -> bool:
        if self.always_keep is None and is_vector(parameter.shape):
            return True
        patterns = ALWAYS_KEPT if self.always_keep is None else self.always_keep
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def _key_at(self, step: int, epoch: int) -> tuple[int, ...]:
        if self.drop_rate == 0:
            return (0,)
        number = epoch if self.refresh == "epoch" else step if self.refresh == "step" else step // int(self.refresh)
        return number, getattr(self.selector, "phase", 0)

    def _choose(self, key: tuple[int, ...], step: int, epoch: int) -> dict[str, Selection]:
        keep = 1 - self.rate_at(step, epoch)
        if keep == 1 or not self._free:
            return dict(self._candidates)
        context = SelectionContext(
            parameters={name: self._parameters[name].detach() for name in self._free},
            candidates={name: self._candidates[name] for name in self._free},
            keep=keep,
            explore=self.explore,
            units=self._units,
            step=step,
            epoch=epoch,
            seed=_seed(self.seed, key),
            module=self._module,
        )
        with torch.no_grad():
            chosen = self.selector.select(context)
        self._check(chosen)
        return {**self._candidates, **chosen}

    def _check(self, chosen: Mapping[str, Selection]) -> None:
        if isinstance(self.selector, Selector) and type(self.selector).__module__ == Selector.__module__:
            return
        who = type(self.selector).__name__
        if set(chosen) != set(self._free):
            raise ValueError(
                f"{who}.select must choose for exactly the parameters it was given: missing "
                f"{sorted(set(self._free) - set(chosen))}, unknown {sorted(set(chosen) - set(self._free))}"
            )
        for name, selection in chosen.items():
            device = self._parameters[name].device
            if selection.shape != self._parameters[name].shape:
                shapes = f"{list(selection.shape)}, expected {list(self._parameters[name].shape)}"
                raise ValueError(f"{who}.select gave for {name!r} a selection of shape {shapes}")
            allowed = self._candidates[name]
            if not allowed.is_all and bool((selection.full_mask(device) & ~allowed.full_mask(device)).any()):
                raise ValueError(
                    f"{who}.select chose coordinates of {name!r} that pre-pruning took out: stay inside of "
                    "context.candidates"
                )

    def _take_loaded(self, key: tuple[int, ...]) -> dict[str, Selection] | None:
        loaded, self._loaded = self._loaded, None
        if loaded is None or tuple(loaded.get("key", ())) != key or set(loaded["chosen"]) != set(self._free):
            return None
        chosen = {
            name: Selection.from_state(state).to(self._parameters[name].device)
            for name, state in loaded["chosen"].items()
        }
        if any(one.shape != self._parameters[name].shape for name, one in chosen.items()):
            return None
        return {**self._candidates, **chosen}


def is_vector(shape: Sequence[int]) -> bool:
    """Whether a tensor has one dimension, perhaps in disguise: ``[1, 1, E]`` class tokens, ``[C, 1, 1]`` scales."""
    return len(shape) <= 1 or (len(shape) > 2 and max(shape) == math.prod(shape))


def check_masks(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError that lists every mask without a parameter or of another shape or type."""
    wrong = [f"{name!r} is no trainable parameter" for name in masks if name not in parameters]
    for name, mask in masks.items():
        if name in parameters and (mask.dtype != torch.bool or mask.shape != parameters[name].shape):
            wrong.append(
                f"{name!r} is {mask.dtype} {list(mask.shape)}, expected torch.bool {list(parameters[name].shape)}"
            )
    if wrong:
        raise ValueError(f"static masks do not fit, none is applied: {'; '.join(wrong)}")


def _candidate(parameter: Tensor, mask: Tensor | None) -> Selection:
    """What a mask leaves of a parameter, by whole rows where it can be said so."""
    if mask is None or bool(mask.all()):
        return Selection.all(parameter.shape)
    mask = mask.to(parameter.device)
    if mask.ndim:
        rows = mask.reshape(len(mask), -1)
        first = rows[:, 0]
        if bool((rows == first.unsqueeze(1)).all()):
            return Selection(parameter.shape, rows=first.nonzero().squeeze(1))
    return Selection(parameter.shape, mask=mask)


def _seed(*parts: Any) -> int:
    """63 bits that depend on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
