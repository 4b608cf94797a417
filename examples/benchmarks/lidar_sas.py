"""Values of lidar lines: masks, forwards, error at equal evaluations, time to a given error; against peers.

a. Sparse depth of 20 coalitions of a 352 x 1216 frame: against a bank of one dense mask a line, summed as the published
   code sums it.
b. As many forwards of the same network (176 x 608, 46 lines): against captum's `ShapleyValueSampling`, and against the
   bare network.
c. A game of 14 groups of neighbouring lines of which all 2^14 coalitions are known, 4 frames: error (RMS over the
   standard deviation of the true values) at equal evaluations a frame, median of 20 seeds.
d. The game of all lines, 4 frames: RMS error at 600 evaluations a frame, median of 5 seeds, against a long run.
e. Seconds until that error is 0.3: evaluations needed times seconds for one, against the published procedure, which
   goes through the data once for a coalition (decode the frame, sum the bank, complete, measure) and fits by its
   regression.

Frames: KITTI's two object frames at a quarter of the resolution where LIGHTNING_EFF_DATA names a folder that holds
`kitti/`, and synthetic streets. The truth is the depth of all lines.

Needs the extra ``bench``. Run: python examples/benchmarks/lidar_sas.py          (about 5 minutes)
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import shapiq
import torch
from captum.attr import KernelShap, ShapleyValueSampling
from harness import Headline, best, compare, entry, machine, main, one_thread
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, write_png

from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.completion.light import LightDepthCompletionNet
from lightning_eff.lidar.datasets import KittiScanDataset
from lightning_eff.lidar.files import read_depth_png, write_depth_png
from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.game import Completion, FrameGame, LineGame
from lightning_eff.lidar.metrics import depth_errors
from lightning_eff.lidar.official import OfficialLineRegression
from lightning_eff.lidar.synthetic import SyntheticLidarDataset
from lightning_eff.lidar.values import EstimationOptions, LineEstimation
from lightning_eff.reporting import Column, Table
from lightning_eff.shapley import (
    ExactShapley,
    PermutationShapley,
    RegressionShapley,
    ShapleyEstimator,
    TableGame,
)
from lightning_eff.shapley.table import coalitions_of

TECHNIQUE = "Lidar line selection"
GROUPS, SEEDS = 14, 20
GOAL = 0.3


def frame_of(sample: dict[str, object]) -> Frame:
    batch = {key: entry[None] for key, entry in sample.items() if isinstance(entry, Tensor)}
    return frames_of(batch | {"sample_id": [sample["sample_id"]]}, batch["sparse"])[0]


def street(index: int, scale: int) -> Frame:
    return frame_of(SyntheticLidarDataset(index + 1, "val", scale=scale)[index])


def four_frames() -> tuple[list[Frame], str]:
    root = Path(os.environ.get("LIGHTNING_EFF_DATA", "")) / "kitti"
    real = [frame_of(sample) for sample in KittiScanDataset(root, scale=4)] if root.is_dir() else []
    streets = [street(index, 4) for index in range(4 - len(real))]
    return real + streets, f"{len(real)} KITTI frames and {len(streets)} synthetic streets, 88 x 304"


# a and b: time.


def masks(repeats: int = 5) -> Table:
    """Sparse depth without some lines."""
    frame = street(0, 1)
    game = FrameGame(frame, range(64), Completion(PullPushCompletion()))
    kept = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    depth = frame.sparse[0].numpy().astype(np.float64)

    def summed(bank: np.ndarray, row: Tensor) -> Tensor:
        mask = np.zeros_like(depth)
        for line in row.nonzero().flatten().tolist():
            mask += bank[line]
        return torch.from_numpy(mask * depth).float()[None, None]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.npy"
        np.save(file, np.stack([(frame.line_idx[0] == line).numpy().astype(np.float64) for line in range(65)]))
        held = np.load(file)
        shown = kept[:, game.present]
        contenders = {
            "bank of masks, read for a coalition": lambda: [summed(np.load(file), row) for row in kept][-1],
            "bank of masks, held": lambda: [summed(held, row) for row in kept][-1],
            "ours": lambda: [None, *(game.masked(row[None]) for row in shown)][-1],
        }
        title = "a. Sparse depth of 20 coalitions, 352 x 1216"
        return compare(contenders, reference="bank of masks, read for a coalition", repeats=repeats, title=title)


def forwards(repeats: int = 5) -> list[Table]:
    """The same number of forwards."""
    frame, model = street(0, 2), PullPushCompletion()
    frame = replace(frame, line_idx=torch.where(frame.line_idx < 46, frame.line_idx, 255))
    frame = replace(frame, sparse=torch.where(frame.line_idx < 255, frame.sparse, 0.0))
    features = torch.where(frame.line_idx < 255, frame.line_idx, 0).long()[None]  # 46 lines
    rounds = 4
    count = 46 * rounds + 2

    def drop(sparse: Tensor) -> Tensor:
        return -depth_errors(model(None, sparse), frame.gt.expand_as(sparse), ["rmse"])["rmse"]

    def captum() -> Tensor:
        torch.manual_seed(0)
        found = ShapleyValueSampling(drop).attribute(frame.sparse[None], feature_mask=features, n_samples=rounds)
        first = [(features == line).flatten().nonzero()[0] for line in range(46)]
        return found.flatten()[torch.cat(first)].double().sum()

    def ours(network: torch.nn.Module = model, budget: int = count) -> Tensor:
        game = FrameGame(frame, range(46), Completion(network))
        return RegressionShapley(budget).estimate(game, generator=0).values.sum()

    def bare(network: torch.nn.Module, budget: int) -> Tensor:
        with torch.no_grad():
            for _ in range(budget):
                network(frame.rgb[None], frame.sparse[None])
        return torch.zeros(())

    against = compare(
        {"captum ShapleyValueSampling": captum, "ours": ours, "bare network": lambda: bare(model, count)},
        reference="captum ShapleyValueSampling",
        repeats=repeats,
        check=None,
        title=f"b. {count} forwards of pull-push, 176 x 608, 46 lines",
    )
    torch.testing.assert_close(captum(), ours(), rtol=1e-3, atol=1.0)  # both share out the same drop of the error
    torch.manual_seed(0)
    light = LightDepthCompletionNet().eval()
    overhead = compare(
        {"bare network": lambda: bare(light, 100), "ours": lambda: ours(light, 100)},
        reference="bare network",
        check=None,
        repeats=min(3, repeats),
        title="b. 100 forwards of LightDepthCompletionNet, 176 x 608, 46 lines",
    )
    return [against, overhead]


# c: error at equal evaluations.


class KnownFrame(FrameGame):
    """The game of a frame whose coalitions have all been evaluated."""

    def __init__(self, frame: Frame, completion: Completion) -> None:
        super().__init__(frame, range(GROUPS), completion)
        self.known = super().errors(coalitions_of(torch.arange(2**GROUPS), GROUPS))
        self.table = TableGame(self.known[0] - self.known)

    def errors(self, coalitions: Tensor) -> Tensor:
        return self.known[(coalitions.long() << torch.arange(GROUPS)).sum(1)]


class KnownGame:
    """The mean of known frames, one group a frame."""

    def __init__(self, frames: list[Frame]) -> None:
        shown = max(int(frame.line_idx[frame.sparse > 0].max()) for frame in frames) + 1
        grouped = [self._grouped(frame, shown) for frame in frames]
        self.frames = [KnownFrame(frame, Completion(PullPushCompletion())) for frame in grouped]
        self.n_players, self.n_groups = GROUPS, len(frames)
        self.group_weights = torch.full((len(frames),), 1 / len(frames), dtype=torch.float64)
        self.whole = TableGame(torch.stack([frame.table.values for frame in self.frames]).mean(0))
        self.exact = ExactShapley().estimate(self.whole).values

    @staticmethod
    def _grouped(frame: Frame, shown: int) -> Frame:
        group = frame.line_idx.long() * GROUPS // shown
        return replace(frame, line_idx=torch.where(frame.sparse > 0, group, 255).to(torch.uint8))

    def __call__(self, coalitions: Tensor) -> Tensor:
        return self.whole(coalitions)

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        return self.frames[group].table(coalitions)

    def error(self, values: Tensor) -> float:
        return float((values - self.exact).square().mean().sqrt() / self.exact.std(correction=0))


class Shapiq(shapiq.Game):
    """A table for shapiq."""

    def __init__(self, table: TableGame) -> None:
        super().__init__(n_players=table.n_players, normalize=False)
        self._values, self._powers = table.values.numpy(), 1 << np.arange(table.n_players)

    def value_function(self, coalitions: np.ndarray) -> np.ndarray:
        return self._values[coalitions.astype(np.int64) @ self._powers]


Method = Callable[[KnownGame, int, int], Tensor]


def by_shapiq(kind: type) -> Method:
    def run(game: KnownGame, budget: int, seed: int) -> Tensor:
        found = kind(n=GROUPS, random_state=seed).approximate(budget, Shapiq(game.whole))
        return torch.tensor([found[(i,)] for i in range(GROUPS)], dtype=torch.float64)

    return run


def by_captum_kernel(game: KnownGame, budget: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    explainer = KernelShap(lambda mask: game.whole(mask > 0.5))
    return explainer.attribute(torch.ones(1, GROUPS), n_samples=budget)[0].double()


def by_captum_sampling(game: KnownGame, budget: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    explainer = ShapleyValueSampling(lambda mask: game.whole(mask > 0.5))
    return explainer.attribute(torch.ones(1, GROUPS), n_samples=max(1, budget // GROUPS))[0].double()


def by_core(make: Callable[[int], ShapleyEstimator], whole: bool = True) -> Method:
    def run(game: KnownGame, budget: int, seed: int) -> Tensor:
        return make(budget).estimate(game.whole if whole else game, generator=seed).values

    return run


def by_lines(game: KnownGame, budget: int, seed: int, **options: object) -> Tensor:
    estimation = LineEstimation(range(GROUPS), game.n_groups, EstimationOptions(budget=budget, seed=seed, **options))
    for frame in game.frames:
        estimation.advance(frame)
    return estimation.result().values


METHODS: dict[str, Method] = {
    "published code": by_core(OfficialLineRegression),
    "captum KernelShap": by_captum_kernel,
    "captum ShapleyValueSampling": by_captum_sampling,
    "shapiq PermutationSamplingSV": by_shapiq(shapiq.PermutationSamplingSV),
    "shapiq SVARM": by_shapiq(shapiq.SVARM),
    "shapiq KernelSHAP": by_shapiq(shapiq.KernelSHAP),
    "lightning_eff.shapley, antithetic walks": by_core(lambda m: PermutationShapley().with_budget(m, GROUPS)),
    "lightning_eff.shapley, regression": by_core(RegressionShapley),
    "lightning_eff.shapley, regression, a group a frame": by_core(RegressionShapley, whole=False),
    "lines without control variate": partial(by_lines, control_variate=False),
    "lines": by_lines,
}


def errors(game: KnownGame, what: str, budgets: Sequence[int] = (112, 224, 448, 896)) -> Table:
    """Median error of every method."""
    rows = [
        [name, *(statistics.median(game.error(run(game, m, seed)) for seed in range(SEEDS)) for m in budgets)]
        for name, run in METHODS.items()
    ]
    columns = ["method", *(Column(f"{m} evaluations", ".3f") for m in budgets)]
    return Table(f"c. Error on {GROUPS} groups of lines", columns, rows, f"{what}; median of {SEEDS} seeds")


# d: all lines.


def all_lines(frames: list[Frame], what: str, short: bool = False) -> Table:
    """RMS error at 600 evaluations a frame; ``short`` for two methods alone."""
    truth, seeds = (6_000, 3) if short else (16_000, 5)
    game = LineGame(PullPushCompletion(), frames)

    def lines(budget: int, seed: int, **options: object) -> Tensor:
        estimation = LineEstimation(game.lines, len(frames), EstimationOptions(budget=budget, seed=seed, **options))
        for frame in game.frames:
            estimation.advance(frame)
        return estimation.result().values

    reference = lines(truth, 1_000)
    plain = {"sampling": "kernel", "size_terms": 0}
    methods: dict[str, Callable[[int], Tensor]] = {
        "regression, shared coalitions": lambda seed: (
            RegressionShapley(600, share_coalitions=True, **plain).estimate(game, generator=seed).values
        ),
        "regression, coalitions for each frame": lambda seed: (
            RegressionShapley(600, **plain).estimate(game, generator=seed).values
        ),
        "lightning_eff.shapley, regression": lambda seed: RegressionShapley(600).estimate(game, generator=seed).values,
        "lines without control variate": lambda seed: lines(600, seed, control_variate=False),
        "lines": lambda seed: lines(600, seed),
    }
    if short:
        methods = {name: methods[name] for name in ("regression, shared coalitions", "lines")}
    found = {
        name: statistics.median(float((run(seed) - reference).square().mean().sqrt()) for seed in range(seeds))
        for name, run in methods.items()
    }
    first = next(iter(found.values()))
    rows = [[name, error, first / error] for name, error in found.items()]
    spread = float(reference.std(correction=0))
    caption = (
        f"{what}; {game.n_players} lines; standard deviation of the values {spread:.0f} mm; median of {seeds} seeds"
    )
    columns = ["method", Column("RMS error [mm]", ".1f"), Column("smaller than the first [x]", ".1f")]
    return Table("d. Error on all lines, 600 evaluations a frame", columns, rows, caption)


# e: time to an error.


def evaluations_to(game: KnownGame, run: Method, most: int) -> int | None:
    """Fewest evaluations a frame, in steps of 1.25, whose median error reaches the goal; None up to `most`."""
    budget = 30
    while budget <= most:
        if statistics.median(game.error(run(game, budget, seed)) for seed in range(7)) <= GOAL:
            return budget
        budget = int(1.25 * budget)
    return None


def official_pass(frames: list[Frame], folder: Path) -> Callable[[Tensor], Tensor]:
    """One coalition through all frames the way the published code goes: everything read and computed anew."""
    model = PullPushCompletion()
    for number, frame in enumerate(frames):
        write_png((frame.rgb * 255).to(torch.uint8), str(folder / f"{number}.png"))
        write_depth_png(folder / f"{number}_depth.png", frame.sparse)
        np.save(folder / f"{number}_bank.npy", np.stack([(frame.line_idx[0] == g).numpy() * 1.0 for g in range(65)]))

    def evaluate(kept: Tensor) -> Tensor:
        found = []
        for number in range(len(frames)):
            rgb = decode_image(str(folder / f"{number}.png"), ImageReadMode.RGB).float() / 255
            depth = read_depth_png(folder / f"{number}_depth.png")
            bank = np.load(folder / f"{number}_bank.npy")
            mask = torch.from_numpy(sum(bank[line] for line in kept.nonzero().flatten().tolist())).float()
            with torch.no_grad():
                dense = model(rgb[None], (depth * mask)[None])
            found.append(depth_errors(dense, depth[None], ["rmse"])["rmse"])
        return torch.cat(found).mean()

    return evaluate


def time_to_goal(game: KnownGame, frames: list[Frame], what: str) -> Table:
    """Seconds until the error is small enough."""
    kept = torch.rand(12, GROUPS, generator=torch.Generator().manual_seed(0)) < 0.5
    with tempfile.TemporaryDirectory() as folder:
        once = official_pass([known.frame for known in game.frames], Path(folder))
        once(kept[0])
        start = time.process_time()
        for row in kept:
            once(row)
        their_cost = (time.process_time() - start) / len(kept)
    most = 2**GROUPS
    needed = evaluations_to(game, METHODS["published code"], most)
    theirs = (needed or most) * their_cost

    ours_needed = evaluations_to(game, by_lines, most)
    assert ours_needed is not None
    start = time.process_time()
    fresh = [FrameGame(known.frame, range(GROUPS), Completion(PullPushCompletion())) for known in game.frames]
    estimation = LineEstimation(range(GROUPS), len(fresh), EstimationOptions(budget=ours_needed))
    for frame in fresh:
        estimation.advance(frame)
    estimation.result()
    ours = time.process_time() - start
    sign = "" if needed else "more than "
    rows = [
        ["published procedure", f"{sign}{needed or most}", f"{sign}{theirs:.1f}", "1"],
        ["lines", str(ours_needed), f"{ours:.2f}", f"{sign}{theirs / ours:.0f}"],
    ]
    columns = ["method", "evaluations a frame", "seconds", "faster [x]"]
    return Table(f"e. Time until the error is {GOAL}, {GROUPS} groups of lines", columns, rows, what)


def tables(short: bool = False) -> list[Table]:
    """Measure; ``short`` with fewer rounds and seeds, and errors at 224 evaluations alone."""
    found = [masks(1), *forwards(1)] if short else [masks(), *forwards()]
    with one_thread():
        frames, what = four_frames()
        game = KnownGame(frames)
        what = f"{what}; {machine()}"
        found.append(errors(game, what, [224]) if short else errors(game, what))
        found.append(all_lines(frames, what, short))
        found.append(time_to_goal(game, frames, what))
    return found


def headlines(tables: list[Table]) -> list[Headline]:
    def seconds(title: str, who: str) -> float:
        return entry(tables, title, who, "median [s]")

    captum, bare = "captum ShapleyValueSampling", "bare network"
    light = "b. 100 forwards of LightDepthCompletionNet"
    others = [name for name in METHODS if name.startswith(("published", "captum", "shapiq"))]
    error, rival = best(tables, "c.", others, "224 evaluations")
    published, lines = (row for row in next(table for table in tables if table.title.startswith("e.")).rows)
    least = float(published[2].removeprefix("more than "))
    return [
        Headline(
            tables[0].title[3:],
            seconds("a.", "ours"),
            *best(tables, "a.", ["bank of masks, held", "bank of masks, read for a coalition"], "median [s]"),
            target=50,
        ),
        Headline(tables[1].title[3:], seconds("b.", "ours"), seconds("b.", captum), captum, target=3),
        Headline(tables[2].title[3:], seconds(light, "ours"), seconds(light, bare), bare, target=0.952, aside=True),
        Headline(
            f"error at 224 evaluations, {GROUPS} groups of lines, over the spread of the values",
            entry(tables, "c.", "lines", "224 evaluations"),
            error,
            rival,
            "",
            limit=0.3,
        ),
        Headline(
            "error on all lines, 600 evaluations a frame",
            entry(tables, "d.", "lines", "RMS error [mm]"),
            entry(tables, "d.", "regression, shared coalitions", "RMS error [mm]"),
            "regression with coalitions that frames share",
            "mm",
            target=2,
            aside=True,
        ),
        Headline(
            f"time until that error is {GOAL}, {GROUPS} groups of lines",
            float(lines[2]),
            least,
            f"published procedure{' (at least)' if published[2].startswith('more') else ''}",
            target=30,
        ),
    ]


if __name__ == "__main__":
    main(tables, headlines, lambda: tables(short=True))
