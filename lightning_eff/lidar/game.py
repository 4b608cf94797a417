"""The lines of a lidar as players of a cooperative game: what a depth completion loses without some of them.

v_f(S) = e_f(no line) - e_f(S), where e_f(S) is the error of the completion of frame f with only the lines S left in its
sparse depth, measured where ground truth is valid; v is the mean over the frames. After "Lidar Line Selection with
Spatially-Aware Shapley Value" (arXiv 2303.11720).

Players are the candidates, lines that the camera sees. A line of which a single frame has no pixel is no player of that
frame's game: it is worth exactly 0 there.

Shapes: `F` frames, `H`, `W` of the image, `L` lines of the sensor, `n` candidates, `p` lines of one frame, `M`
coalitions, `B` of them in one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_eff.lidar.batches import NO_LINE
from lightning_eff.lidar.completion.forwarding import DepthForward, Forward
from lightning_eff.lidar.frames import Candidates, Frame, LinePixels, Unassigned
from lightning_eff.surgery.state import quiet_model

Metric = Literal["rmse", "mae", "irmse", "imae", "mse"]

# Pixels in one forward, and coalitions at most, where their number is not given: on the CPU what stays in its caches,
# measured; nothing is timed, so that values do not depend on how busy the machine is.
_CPU, _ACCELERATOR = (2**16, 4), (2**23, 64)


@dataclass(frozen=True)
class CompletionOptions:
    """How a network completes the depth of a coalition, and what its error is.

    Attributes:
        metric: error that is played for, in mm (mm^2 for `"mse"`, 1/km for the inverse ones); or a callable
            `(depth [B, N], truth [B, N]) -> [B]` in metres at the valid pixels, lower being better.
        empty_value: error without any line: `"model"` asks the network, `"mean_depth"` takes that of the frame's mean
            depth everywhere; a number is the error itself. It moves all values alike and changes no rank.
        unassigned: what becomes of sparse pixels that belong to no line: `"drop"` them everywhere, `"always_keep"`
            them, or `"error"`.
        coalition_batch: coalitions in one forward. `"auto"`: 65,000 pixels on the CPU, 8 million on an accelerator, by
            the size of the first frame. Halved for good where memory runs out.
        precision: of the forwards: `"32"`, `"bf16"` or `"16"` (autocast).
        min_depth: what predictions <= 0 count as, in metres.
        min_target: ground truth is valid above it, in metres; the published code has 0.1.
        forward: how the network is called; see `DepthForward`.
    """

    metric: Metric | Callable[[Tensor, Tensor], Tensor] = "rmse"
    empty_value: Literal["model", "mean_depth"] | float = "model"
    unassigned: Unassigned = "drop"
    coalition_batch: int | Literal["auto"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"
    min_depth: float = 0.9
    min_target: float = 0.0
    forward: Forward = "auto"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        choices = {
            "metric": callable(self.metric) or self.metric in get_args(Metric),
            "empty_value": self.empty_value in ("model", "mean_depth") or _positive(self.empty_value),
            "unassigned": self.unassigned in ("drop", "always_keep", "error"),
            "coalition_batch": self.coalition_batch == "auto"
            or (isinstance(self.coalition_batch, int) and self.coalition_batch >= 1),
            "precision": self.precision in ("32", "bf16", "16"),
            "min_depth": _positive(self.min_depth),
            "min_target": self.min_target == 0 or _positive(self.min_target),
        }
        expected = {
            "metric": f"one of {get_args(Metric)} or a callable",
            "empty_value": '"model", "mean_depth" or a positive number',
            "unassigned": '"drop", "always_keep" or "error"',
            "coalition_batch": '"auto" or an int >= 1',
            "precision": '"32", "bf16" or "16"',
            "min_depth": "a positive number of metres",
            "min_target": "a number of metres >= 0",
        }
        for name, good in choices.items():
            if not good:
                raise ValueError(f"{name} must be {expected[name]}, got {getattr(self, name)!r}")

    def has_truth(self, frame: Frame) -> bool:
        """Whether the frame has any valid ground truth."""
        return bool((frame.gt > self.min_target).any())


class Completion:
    """A network together with how it is asked; shared by the games of all frames.

    Args:
        model: the network; evaluated in evaluation mode and left as it was.
        options: how it is asked.

    Attributes:
        batch: coalitions in one forward, None until the first frame has told its size.
    """

    def __init__(self, model: nn.Module, options: CompletionOptions | None = None) -> None:
        self.options = options or CompletionOptions()
        self.model = model
        self.forward = DepthForward(model, self.options.forward)
        size = self.options.coalition_batch
        self.batch: int | None = None if size == "auto" else size

    @property
    def metric(self) -> str:
        """Name of the metric."""
        metric = self.options.metric
        return getattr(metric, "__name__", type(metric).__name__) if callable(metric) else metric

    def device(self, default: torch.device) -> torch.device:
        """Where the network is; `default` if it has neither parameters nor buffers."""
        held = (*self.model.parameters(), *self.model.buffers())
        return held[0].device if held else default

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The precision to evaluate in."""
        if self.options.precision == "32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16 if self.options.precision == "bf16" else torch.float16)


class FrameGame:
    """The game of one frame: a `lightning_eff.shapley.Game` whose players are those candidates that the frame shows.

    Args:
        frame: the frame; it must have valid ground truth.
        candidates: lines that are players of the whole game, in increasing order. Pixels of other lines are left out
            everywhere.
        completion: the network.

    Attributes:
        id: of the frame.
        present: players as positions among the candidates, int64 `[p]`.
        n_players: their number.
        evaluations: coalitions completed so far.

    Raises:
        ValueError: the frame has no valid ground truth.
    """

    def __init__(self, frame: Frame, candidates: Sequence[int], completion: Completion) -> None:
        options = completion.options
        if not options.has_truth(frame):
            raise ValueError(
                f"frame {frame.id!r} has no ground truth above {options.min_target} m to measure errors on"
            )
        self.frame, self.id, self._completion = frame, frame.id, completion
        position = torch.full((NO_LINE + 1,), -1, dtype=torch.int64)
        position[torch.as_tensor(candidates, dtype=torch.int64)] = torch.arange(len(candidates))
        line = position.to(frame.line_idx.device)[frame.line_idx.long()].flatten()
        depth = frame.sparse.flatten()
        self._pixels = ((depth > 0) & (line >= 0)).nonzero().flatten()
        self.present, self._player = torch.unique(line[self._pixels], return_inverse=True)
        self.present = self.present.cpu()
        self._depth = depth[self._pixels]
        self._base = torch.zeros_like(frame.sparse)
        if options.unassigned == "always_keep":
            self._base = torch.where(frame.line_idx == NO_LINE, frame.sparse, 0.0)
        self._valid = (frame.gt.flatten() > options.min_target).nonzero().flatten()
        self._truth = frame.gt.flatten()[self._valid].double()
        self.n_players = len(self.present)
        self.evaluations = 0

    @property
    def asks_empty(self) -> bool:
        """Whether the error without any line is the network's."""
        return self._completion.options.empty_value == "model"

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `lightning_eff.shapley.Game.__call__`: e(no line) - e(S)."""
        return self.empty_error - self.errors(coalitions)

    @cached_property
    def empty_error(self) -> float:
        """Error without any line, as `CompletionOptions.empty_value` says."""
        value = self._completion.options.empty_value
        if value == "mean_depth":
            return self.mean_depth_error
        return float(self._errors(torch.zeros(1, self.n_players, dtype=torch.bool))) if value == "model" else value

    @cached_property
    def full_error(self) -> float:
        """Error with all lines."""
        return float(self._errors(torch.ones(1, self.n_players, dtype=torch.bool)))

    @cached_property
    def mean_depth_error(self) -> float:
        """Error of the frame's mean depth everywhere."""
        return float(self._measure(self._truth.mean().expand(1, len(self._truth))))

    def errors(self, coalitions: Tensor) -> Tensor:
        """Errors e(S) of coalitions, each evaluated once.

        Args:
            coalitions: bool `[M, p]`.

        Returns:
            float64 `[M]` on the CPU, in the unit of the metric.

        Raises:
            ValueError: the network returned depth that is not finite, or no depth; it says for which frame and lines.
        """
        if not self.n_players:
            return torch.full((len(coalitions),), self.empty_error, dtype=torch.float64)
        distinct, place = torch.unique(coalitions, dim=0, return_inverse=True)
        size = distinct.sum(1)
        inner = (size > 0) & (size < self.n_players)
        errors = torch.empty(len(distinct), dtype=torch.float64)
        errors[inner] = self._errors(distinct[inner])
        if bool((size == 0).any()):
            errors[size == 0] = self.empty_error
        if bool((size == self.n_players).any()):
            errors[size == self.n_players] = self.full_error
        return errors[place]

    def _errors(self, coalitions: Tensor) -> Tensor:
        completion, device = self._completion, self._completion.device(self.frame.sparse.device)
        if completion.batch is None:
            pixels, most = _CPU if device.type == "cpu" else _ACCELERATOR
            completion.batch = max(1, min(most, pixels // self.frame.sparse.numel()))
        parts, done = [torch.empty(0, dtype=torch.float64)], 0
        with quiet_model(completion.model), torch.no_grad(), completion.autocast(device):
            complete = completion.forward.of_image(self.frame.rgb[None].to(device))
            while done < len(coalitions):
                part = coalitions[done : done + completion.batch]
                try:
                    parts.append(self._forward(part, complete, device))
                except torch.OutOfMemoryError:
                    if completion.batch == 1:
                        raise
                    completion.batch //= 2
                    continue
                done += len(part)
        self.evaluations += len(coalitions)
        return torch.cat(parts)

    def _forward(self, coalitions: Tensor, complete: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        sparse = self.masked(coalitions).to(device)
        try:
            dense = complete(sparse)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            error.add_note(
                f"for frame {self.id!r}, {len(coalitions)} coalition(s) of {coalitions.sum(1).tolist()} lines"
            )
            raise
        found = dense.flatten(1).index_select(1, self._valid.to(device)).double()
        finite = torch.isfinite(found.sum(1)).cpu()  # a sum is where all its terms are
        if not bool(finite.all()):
            players = coalitions[~finite][0].nonzero().flatten()
            raise ValueError(
                f"the network returned depth that is not finite for frame {self.id!r} with {len(players)} of "
                f"{self.n_players} lines kept (positions among the candidates: {self.present[players].tolist()})"
            )
        return self._measure(found.to(self._truth.device)).cpu()

    def masked(self, coalitions: Tensor) -> Tensor:
        """Sparse depth of every one of `coalitions` (bool `[B, p]`): `[B, 1, H, W]` in metres."""
        # never a buffer that is used again: networks may write into what they are given
        sparse = self._base.repeat(len(coalitions), 1, 1, 1)
        kept = coalitions.to(self._depth.device, self._depth.dtype).index_select(1, self._player)
        sparse.view(len(coalitions), -1).index_copy_(1, self._pixels, kept.mul_(self._depth))
        return sparse

    def _measure(self, depth: Tensor) -> Tensor:
        """Errors of depth `[B, N]`, float64, at the valid pixels: float64 `[B]`."""
        options = self._completion.options
        depth = torch.where(depth > 0, depth, options.min_depth)
        if callable(options.metric):
            return self._checked(options.metric(depth, self._truth.expand_as(depth)), len(depth))
        return _ERRORS[options.metric](depth, self._truth)

    def _checked(self, found: Any, count: int) -> Tensor:
        """What a callable metric returned, float64 `[count]`."""
        metric = f"the metric {self._completion.metric!r} must return [B] finite numbers for depth [B, N], truth [B, N]"
        if not isinstance(found, Tensor) or list(found.shape) != [count]:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{metric}: expected {[count]}, got {shape} for frame {self.id!r}")
        errors = found.detach().double()
        if not bool(errors.isfinite().all()):
            raise ValueError(f"{metric}: got {errors.tolist()} for frame {self.id!r}")
        return errors


# What `metrics.depth_errors` measures, without looking for the valid pixels again in every coalition.
_ERRORS: dict[Metric, Callable[[Tensor, Tensor], Tensor]] = {
    "rmse": lambda p, g: 1000 * (p - g).square().mean(1).sqrt(),
    "mae": lambda p, g: 1000 * (p - g).abs().mean(1),
    "irmse": lambda p, g: 1000 * (1 / p - 1 / g).square().mean(1).sqrt(),
    "imae": lambda p, g: 1000 * (1 / p - 1 / g).abs().mean(1),
    "mse": lambda p, g: 1e6 * (p - g).square().mean(1),
}


class LineGame:
    """The mean of the games of frames: a `lightning_eff.shapley.GroupedGame`, one group a frame.

    Args:
        model: the network; evaluated in evaluation mode and left as it was.
        frames: the calibration set; those without valid ground truth are left out.
        num_lines: lines of the sensor.
        candidates: which lines are players; see `LinePixels.candidates`.
        min_pixels: see there.
        options: how the network is asked.

    Attributes:
        lines: the players' numbers, `n` of them, in increasing order.
        null_lines: lines of the sensor that no frame shows.
        pixels: how many pixels every line has.
        skipped: number of frames without valid ground truth.
        frames: the game of every frame.

    Raises:
        ValueError: no frame has valid ground truth, two frames have the same id, or lines do not fit the sensor.

    Warns:
        LidarWarning: more than 5 % of the sparse pixels belong to no line.
    """

    def __init__(
        self,
        model: nn.Module,
        frames: Iterable[Frame],
        *,
        num_lines: int = 64,
        candidates: Candidates = "visible",
        min_pixels: int = 1,
        options: CompletionOptions | None = None,
    ) -> None:
        self.completion = Completion(model, options)
        options = self.completion.options
        given = list(frames)
        used = [frame for frame in given if options.has_truth(frame)]
        self.skipped = len(given) - len(used)
        if not used:
            raise ValueError(f"none of {len(given)} frames has ground truth above {options.min_target} m")
        if len({frame.id for frame in used}) < len(used):
            raise ValueError("frames must have distinct ids: coalitions and values belong to an id")
        self.pixels = LinePixels.count(used, num_lines)
        self.pixels.check(options.unassigned)
        self.lines = self.pixels.candidates(candidates, min_pixels)
        self.null_lines = (self.pixels.per_line == 0).nonzero().flatten().tolist()
        self.frames = [FrameGame(frame, self.lines, self.completion) for frame in used]
        self.n_players, self.n_groups = len(self.lines), len(used)
        self.group_weights = torch.full((len(used),), 1 / len(used), dtype=torch.float64)
        self.names = [f"line {line}" for line in self.lines]

    def __call__(self, coalitions: Tensor) -> Tensor:
        """As `lightning_eff.shapley.Game.__call__`."""
        return torch.stack([self.call_group(group, coalitions) for group in range(self.n_groups)]).mean(0)

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        """As `lightning_eff.shapley.GroupedGame.call_group`; lines that the frame does not show make no difference."""
        game = self.frames[group]
        return game(coalitions[:, game.present])


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
