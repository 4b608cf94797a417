"""What a test of an agent found: how well each policy did, where the agent looked, how far it zoomed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_eff.glimpse.evaluation import PolicyCurve
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.glimpse.figures import (
    coverage_figure,
    curve_figure,
    exploration_figure,
    scale_figure,
    steps_figure,
)
from lightning_eff.glimpse.module import AdaGlimpseModule
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEARNED = "learned"  # as tables call the agent


@dataclass(frozen=True)
class ExplorationReport(Report):
    """The last test or validation of a module: table ``policies``, and figures of what was explored.

    Figures: ``curves`` where images do not stop early, ``exploration`` and ``steps`` of images that are shown,
    ``coverage`` and ``scales`` of more of them.

    Args:
        module: That was validated or tested.
        images: Shown [B, C, H, W]; None shows none.
        seen: What the agent did with them, with predictions after every glimpse.
        target: Theirs, where these are tensors.
        places: What it did with more images, for coverage and scales.
        class_names: In the order of the classes.
        stage: ``"test"`` or ``"val"``.

    Raises:
        ValueError: There was no such pass.
    """

    module: AdaGlimpseModule
    images: Tensor | None = None
    seen: Trajectory | None = None
    target: Tensor | None = None
    places: Trajectory | None = None
    class_names: Sequence[str] | None = None
    stage: str = "test"

    def __post_init__(self) -> None:
        known = self.module.results
        if self.stage not in known:
            raise ValueError(
                f"the module has no results of {self.stage!r}, only of {sorted(known)}: run that pass first"
            )

    def tables(self) -> dict[str, Table]:
        """A row a policy: the task's first metric after glimpses, mean glimpses, pixels."""
        module, (metric, steps) = self.module, self._metric()
        results = module.results[self.stage]
        digits = (
            ".3f" if all(abs(values[f"{metric}@{t}"]) <= 1 for values in results.values() for t in steps) else ".2f"
        )
        columns: list[str | Column] = ["policy", *(Column(f"{metric}@{t}", digits) for t in steps)]
        columns += [Column("glimpses", ".2f"), Column("pixel %", ".2f")]
        rows = [
            [
                _LEARNED if name == "policy" else name,
                *(values[f"{metric}@{t}"] for t in steps),
                values["avg_glimpses"],
                values["pixel_percent"],
            ]
            for name, values in results.items()
        ]
        better = "higher" if module.task.higher_is_better else "lower"
        caption = f"{metric} after each number of glimpses, {better} is better"
        return {"policies": Table("Policies", columns, rows, caption)}

    def figures(self) -> dict[str, Figure]:
        """The metric against pixels, explorations, and where and how large views were."""
        module = self.module
        figures: dict[str, Figure] = {}
        if module.every_glimpse and module.glimpse.stop_threshold is None:
            figures["curves"] = curve_figure(self._curves(), learned=_LEARNED)
        if self.images is not None and self.seen is not None:
            shown = self.images, self.seen
            names = self.class_names
            figures["exploration"] = exploration_figure(*shown, self.target, names, len(self.images))
            figures["steps"] = steps_figure(*shown, 0, self.target, names)
        if self.places is not None:
            figures["coverage"] = coverage_figure(self.places)
            figures["scales"] = scale_figure(self.places)
        return figures

    def _metric(self) -> tuple[str, list[int]]:
        """Return the name of the task's first metric, and the numbers of glimpses it is known after."""
        names = [name.split("@") for name in self.module.results[self.stage]["policy"] if "@" in name]
        metric = names[0][0]
        return metric, [int(t) for name, t in names if name == metric]

    def _curves(self) -> list[PolicyCurve]:
        metric, steps = self._metric()
        return [
            PolicyCurve(
                policy=_LEARNED if name == "policy" else name,
                metric=metric,
                higher_is_better=self.module.task.higher_is_better,
                values=tuple(values[f"{metric}@{t}"] for t in steps),
                glimpses=tuple(map(float, steps)),
                pixel_percent=tuple(map(self.module.glimpse.pixel_percent, steps)),
            )
            for name, values in self.module.results[self.stage].items()
        ]
