"""The small objects that say what is played for and how lines are selected, fit for YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from torch import Tensor

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.lidar.completion.forwarding import Forward
from lightning_eff.lidar.estimators import EstimationOptions
from lightning_eff.lidar.frames import Candidates, Unassigned
from lightning_eff.lidar.game import CompletionOptions, Metric
from lightning_eff.lidar.lines import KITTI_HDL64E
from lightning_eff.lidar.selection import Rule

Spreading = Literal[Rule, "auto"]
Baseline = Literal["uniform", "uniform_sensor", "random", "top", "most_points", "loo", "greedy", "gap_greedy", "gap_dp"]
Source = Literal["oracle", "previous", "predictor"]

BASELINES: tuple[Baseline, ...] = ("uniform", "random", "top", "most_points", "gap_greedy", "gap_dp")


@dataclass(frozen=True)
class LineGameOptions:
    """What is played for, and by whom.

    Attributes:
        metric: error that is to stay low; see `CompletionOptions`, like all that is not told here.
        empty_value: error without any line.
        candidates: which lines are players: `"visible"`, those with `min_pixels` pixels in the calibration frames,
            `"all"`, or their numbers.
        min_pixels: see there, >= 1.
        unassigned: what becomes of sparse pixels that belong to no line.
        min_depth: what predictions <= 0 count as, in metres.
        min_target: ground truth is valid above it, in metres.
        coalition_batch: coalitions in one forward.
        precision: of the forwards.
    """

    metric: Metric | Callable[[Tensor, Tensor], Tensor] = "rmse"
    empty_value: Literal["model", "mean_depth"] | float = "model"
    candidates: Candidates = "visible"
    min_pixels: int = 1
    unassigned: Unassigned = "drop"
    min_depth: float = 0.9
    min_target: float = 0.0
    coalition_batch: int | Literal["auto"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        self.completion()
        check_whole("min_pixels", self.min_pixels)

    def completion(self, forward: Forward = "auto") -> CompletionOptions:
        """How the network is asked."""
        shared = {name: entry for name, entry in vars(self).items() if name not in ("candidates", "min_pixels")}
        return CompletionOptions(**shared, forward=forward)


@dataclass(frozen=True)
class Spread:
    """How lines are selected by value and spread.

    Attributes:
        rule: `"region"`, `"separation"`, `"mmr"`, `"facility"` and `"none"` as in
            :func:`lightning_eff.lidar.selection.select_lines`; `"auto"` tries them all out on the calibration frames
            and keeps the best, which is there never worse than evenly spread lines.
        options: of the rule, such as `{"gap": 2}`.
        distance: what lines are apart by: their numbers, or the angles between them, which needs `elevations`.
        elevations: of every line of the sensor in degrees, falling; `"kitti"` stands for those of `KITTI_HDL64E`.
            Tables and figures show them too.
        refine: `"swap"` exchanges lines one by one on the calibration frames while that helps; `"greedy"` takes no
            values at all but adds the line that helps most, k times.
        max_swaps: most exchanges for `"swap"`, >= 1.
    """

    rule: Spreading = "region"
    options: dict[str, Any] = field(default_factory=dict)
    distance: Literal["index", "angle"] = "index"
    elevations: Sequence[float] | Literal["kitti"] | None = None
    refine: Literal["none", "swap", "greedy"] = "none"
    max_swaps: int = 20

    def __post_init__(self) -> None:
        """Check the choices."""
        rules = (*get_args(Rule), "auto")
        for name, choices in (
            ("rule", rules),
            ("distance", ("index", "angle")),
            ("refine", ("none", "swap", "greedy")),
        ):
            check_choice(name, getattr(self, name), choices)
        if isinstance(self.elevations, str) and self.elevations != "kitti":
            raise ValueError(f'elevations must be angles, "kitti" or None, got {self.elevations!r}')
        if self.distance == "angle" and self.elevations is None:
            raise ValueError('distance "angle" needs elevations, one angle a line of the sensor')
        if self.rule == "auto" and self.options:
            raise ValueError(f'rule "auto" tries out options of its own, got {self.options}')
        check_whole("max_swaps", self.max_swaps)

    @property
    def angles(self) -> list[float] | None:
        """Elevation of every line of the sensor in degrees; None where it is not known."""
        if self.elevations is None:
            return None
        return [float(angle) for angle in (KITTI_HDL64E.elevations if self.elevations == "kitti" else self.elevations)]


@dataclass(frozen=True)
class Dynamic:
    """Let every frame have lines of its own.

    Attributes:
        source: whose values select the lines of a frame: `"oracle"` its own, measured with its ground truth, a bound
            and no method; `"previous"` those of the frame before in the same sequence, in the order of
            `sample_id` (digits count as numbers), the mean values for the first; `"predictor"` those that a small
            network, trained on the calibration frames, tells from the image alone.
        steps: of training the predictor, >= 1.
    """

    source: Source = "oracle"
    steps: int = 200

    def __post_init__(self) -> None:
        """Check choice and range."""
        check_choice("source", self.source, get_args(Source))
        check_whole("steps", self.steps)


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for; see :class:`~lightning_eff.lidar.selector.LidarSaSSelector`."""

    k: Sequence[int] = (32, 16, 8, 4)
    num_lines: int = 64
    game: LineGameOptions = field(default_factory=LineGameOptions)
    estimation: EstimationOptions = field(default_factory=lambda: EstimationOptions(rounds=4))
    spread: Spread = field(default_factory=Spread)
    dynamic: Dynamic | None = None
    baselines: Sequence[Baseline] = BASELINES
    forward: Forward = "auto"

    def __post_init__(self) -> None:
        """Check what the parts cannot check themselves."""
        check_whole("num_lines", self.num_lines, 1, 255)
        object.__setattr__(self, "k", check_sizes(self.k, self.num_lines))
        unknown = [name for name in self.baselines if name not in get_args(Baseline)]
        if unknown:
            raise ValueError(f"baselines {unknown} are not known: {', '.join(get_args(Baseline))} are")
        elevations = self.spread.angles
        if elevations is not None and len(elevations) != self.num_lines:
            raise ValueError(f"expected {self.num_lines} elevations, one a line of the sensor, got {len(elevations)}")


def check_sizes(k: Any, num_lines: int) -> list[int]:
    """The sizes as a list; ValueError unless they are distinct ints in 0..num_lines, at least one of them."""
    sizes = list(k) if isinstance(k, Sequence) and not isinstance(k, str) else [k]
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not sizes or not whole or len(set(sizes)) < len(sizes) or not all(0 <= size <= num_lines for size in sizes):
        raise ValueError(f"k must be distinct numbers of lines in 0..{num_lines}, got {k!r}")
    return cast("list[int]", sizes)
