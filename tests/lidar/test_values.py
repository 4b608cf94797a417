import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from line_frames import Counting, street, toy_frame
from torch import Tensor, nn

from lightning_eff.lidar.completion.columns import ColumnInterpolation
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.estimators import SinglesFirstRegression, regression_alone
from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.game import CompletionOptions, LineGame
from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.official import OfficialLineRegression
from lightning_eff.lidar.records import frame_seed
from lightning_eff.lidar.selection import as_coalitions, best_selection, random_lines, select_lines
from lightning_eff.lidar.values import EstimationOptions, LineEstimation, LineValues, line_shapley
from lightning_eff.shapley import ExactShapley, PermutationShapley, RegressionShapley, as_game, evaluate


@dataclass
class TableFrame:
    """Stands for the game of a frame: the error is minus `value`, a function of coalitions of `present`."""

    id: str | int
    value: Callable[[Tensor], Tensor]
    present: Tensor
    evaluations: int = 0
    asks_empty: bool = True
    mean_depth_error: float = float("inf")

    @property
    def n_players(self) -> int:
        return len(self.present)

    @property
    def empty_error(self) -> float:
        return float(self.errors(torch.zeros(1, self.n_players, dtype=torch.bool)))

    @property
    def full_error(self) -> float:
        return float(self.errors(torch.ones(1, self.n_players, dtype=torch.bool)))

    def __call__(self, coalitions: Tensor) -> Tensor:
        return self.empty_error - self.errors(coalitions)

    def errors(self, coalitions: Tensor) -> Tensor:
        self.evaluations += len(coalitions)
        return -self.value(coalitions).double()


def table(value: Callable[[Tensor], Tensor], n: int, id_: str | int = 0) -> TableFrame:
    return TableFrame(id_, value, torch.arange(n))


def estimated(*frames: TableFrame, n: int, **options: object) -> LineValues:
    estimation = LineEstimation(range(n), len(frames), EstimationOptions(control_variate=False, **options))
    for _ in range(estimation.options.rounds):
        for frame in frames:
            estimation.advance(frame)
    return estimation.result()


def wobbly(seed: int, n: int = 12) -> Callable[[Tensor], Tensor]:
    """A game with interactions of all orders."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)

    def value(kept: Tensor) -> Tensor:
        sums = (kept * weights).sum(1)  # not a product of matrices, whose bits depend on the number of rows
        return 100 * sums.sqrt() + 20 * torch.sin(3 * sums)

    return value


# Known answers.


def test_values_share_out_the_whole_drop_of_the_error() -> None:
    for estimator in ("regression", "stratified", "permutation", "exact"):
        found = estimated(table(wobbly(0), 12), table(wobbly(1), 12, 1), n=12, estimator=estimator, budget=200)
        assert float(found.values.sum()) == pytest.approx(found.error_empty - found.error_full, abs=1e-9)


def test_lines_that_cover_rows_are_worth_their_share_of_them() -> None:
    # line i covers the rows i - 1, i and i + 1 of 64
    def covered(kept: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(kept, (1, 1))
        return (padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]).sum(1)

    found = estimated(table(covered, 64), n=64, budget=4000)
    exact = torch.ones(64, dtype=torch.float64)
    exact[[0, 63]], exact[[1, 62]] = 5 / 6, 7 / 6
    assert bool(((found.values - exact).abs() <= 4 * found.stderr + 1e-9).all())
    assert float(found.stderr.max()) < 0.07


def test_the_airport_game_has_its_known_values() -> None:
    # the longest runway needed: w_i = (i + 1) / 64, v = max
    worth = (torch.arange(64, dtype=torch.float64) + 1) / 64
    found = estimated(table(lambda kept: (kept * worth).amax(1), 64), n=64, budget=4000)
    exact = (1 / 64 / (64 - torch.arange(64, dtype=torch.float64))).cumsum(0)
    assert float(exact[0]) == 1 / 4096
    assert float(exact[63]) == pytest.approx(0.0741233, abs=1e-7)
    assert bool(((found.values - exact).abs() <= 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.01


def test_a_budget_for_all_coalitions_gives_the_exact_values() -> None:
    game = table(wobbly(0, 8), 8)
    found = estimated(game, n=8, budget=256)
    exact = ExactShapley().estimate(as_game(wobbly(0, 8), 8)).values
    torch.testing.assert_close(found.values, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.stderr, torch.zeros(8, dtype=torch.float64))


def test_lines_that_do_the_same_are_worth_the_same() -> None:
    # lines 2 and 5 may stand for each other
    def value(kept: Tensor) -> Tensor:
        return wobbly(0, 7)(torch.cat([kept[:, :5], (kept[:, 2] ^ kept[:, 5])[:, None], kept[:, 6:]], 1)) + 50 * (
            kept[:, 2] | kept[:, 5]
        )

    def alike(kept: Tensor) -> Tensor:
        swapped = kept[:, [0, 1, 5, 3, 4, 2, 6]]
        return value(kept) + value(swapped)

    found = estimated(table(alike, 7), n=7, budget=128)
    assert float(found.values[2]) == pytest.approx(float(found.values[5]), abs=1e-9)


def test_values_of_the_mean_game_are_the_means_of_the_frames() -> None:
    frames = [table(wobbly(seed), 12, seed) for seed in range(3)]
    found = estimated(*frames, n=12, budget=200)
    torch.testing.assert_close(found.values, torch.stack([found.per_frame[seed] for seed in range(3)]).mean(0))
    assert list(found.per_frame) == [0, 1, 2]


def test_a_line_that_a_frame_lacks_is_worth_exactly_nothing_there() -> None:
    few = TableFrame("few", wobbly(0, 5), torch.tensor([0, 1, 3, 4, 6]))
    found = estimated(few, table(wobbly(1, 7), 7, "all"), n=7, budget=40)
    assert found.per_frame["few"][[2, 5]].tolist() == [0.0, 0.0]
    exact = ExactShapley().estimate(as_game(wobbly(0, 5), 5)).values
    torch.testing.assert_close(found.per_frame["few"][few.present], exact)
    assert few.evaluations <= 2**5 + 4  # all there are, and the ends


def test_frames_of_one_line_or_none_have_their_values() -> None:
    one = TableFrame("one", lambda kept: 70.0 * kept[:, 0], torch.tensor([3]))
    none = TableFrame("none", lambda kept: torch.zeros(len(kept)), torch.tensor([], dtype=torch.int64))
    found = estimated(one, none, table(wobbly(0, 5), 5, "all"), n=5, budget=32)
    assert found.per_frame["one"].tolist() == [0, 0, 0, 70, 0]
    assert found.per_frame["none"].tolist() == [0.0] * 5


def test_error_bars_hold_what_they_promise() -> None:
    exact = ExactShapley().estimate(as_game(wobbly(0), 12)).values
    results = [estimated(table(wobbly(0), 12), n=12, budget=100, seed=seed) for seed in range(20)]
    inside = torch.stack([(found.values - exact).abs() < 2 * found.stderr for found in results])
    assert 0.88 < float(inside.double().mean()) <= 1.0


def test_single_lines_come_first_where_the_budget_is_neither_small_nor_large() -> None:
    def single(n_frames: int) -> list[bool]:
        chosen = [regression_alone(46, budget, n_frames) for budget in (300, 600, 1200, 2400)]
        return [isinstance(estimator, SinglesFirstRegression) for estimator in chosen]

    assert single(8) == [False, True, True, False]
    assert single(9) == [False, False, True, False]
    units = SinglesFirstRegression().sequence(46, 0, 0).take(500)
    assert torch.equal(units[:46], torch.eye(46, dtype=torch.bool))
    assert 2 <= int(units[46:].sum(1).min()) <= int(units[46:].sum(1).max()) <= 23


def test_values_with_single_lines_first_are_right_and_their_error_bars_hold() -> None:
    gap = GapGame.of_frame(street(0), range(46)).as_rmse()
    results = [estimated(table(gap, 46), n=46, budget=600, seed=seed) for seed in range(6)]
    errors = torch.stack([found.values - gap.shapley() for found in results])
    stderr = torch.stack([found.stderr for found in results])
    assert bool((errors.mean(0).abs() < 4 * stderr.square().mean(0).sqrt() / 6**0.5).all())
    assert 0.9 < float((errors.abs() < 2 * stderr).double().mean()) < 0.995


# Rounds, processes, resume.


@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_rounds_do_not_change_a_bit(rounds: int) -> None:
    once, often = (
        estimated(table(wobbly(0), 12, "a"), table(wobbly(1), 12, "b"), n=12, budget=150, rounds=count)
        for count in (1, rounds)
    )
    assert torch.equal(once.values, often.values)
    assert torch.equal(once.stderr, often.stderr)


def test_nothing_is_left_to_do_after_the_last_round() -> None:
    estimation = LineEstimation(range(12), 1, EstimationOptions(budget=100, rounds=2, control_variate=False))
    game = table(wobbly(0), 12)
    assert estimation.advance(game) > 0
    assert estimation.advance(game) > 0
    assert estimation.advance(game) == 0


def test_a_frame_has_the_same_coalitions_whatever_other_frames_there_are() -> None:
    alone = estimated(table(wobbly(0), 12, "a"), n=12, budget=150)
    both = estimated(table(wobbly(1), 12, "b"), table(wobbly(0), 12, "a"), n=12, budget=150)
    assert torch.equal(alone.values, both.per_frame["a"])
    other = estimated(table(wobbly(0), 12, "c"), n=12, budget=150)
    assert not torch.equal(alone.values, other.values)


def test_the_seed_of_a_frame_is_the_same_everywhere() -> None:
    assert frame_seed(0, "a") == 18048436348892616
    assert len({frame_seed(0, "1"), frame_seed(0, 1), frame_seed(1, 1), frame_seed(0, 11)}) == 4


def test_two_processes_and_a_resumed_run_give_the_bits_of_one() -> None:
    frames = {id_: street(index) for index, id_ in enumerate("ab")}
    games = LineGame(ColumnInterpolation(), frames.values(), candidates=list(range(4, 44, 4))).frames
    options = EstimationOptions(budget=200, rounds=3)

    def estimation() -> LineEstimation:
        return LineEstimation(range(10), 2, options)

    straight = estimation()
    for _ in range(3):
        for game in games:
            straight.advance(game)

    # each frame in a process of its own, stopped after a round, saved, and gone on with
    merged = estimation()
    for game in reversed(games):
        first, second = estimation(), estimation()
        first.advance(game)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        second.advance(game)
        second.advance(game)
        merged.load_state_dict(second.state_dict())
        merged.load_state_dict(first.state_dict())  # has fewer rounds: changes nothing
    expected, found = straight.result(), merged.result()
    assert torch.equal(expected.values, found.values)
    assert torch.equal(expected.stderr, found.stderr)
    assert list(expected.per_frame) == list(found.per_frame)


@pytest.mark.parametrize(
    ("lines", "metric", "options", "field"),
    [
        (range(12), "rmse", {"seed": 1}, "seed: 0 there, 1 here"),
        (range(12), "mae", {}, "metric: 'rmse' there, 'mae' here"),
        (range(11), "rmse", {}, "lines"),
        (range(12), "rmse", {"budget": 120}, "budget"),
        (range(12), "rmse", {"estimator": "stratified"}, "estimator"),
        (range(12), "rmse", {"rounds": 4}, "rounds"),
    ],
)
def test_other_settings_are_not_resumed(lines: range, metric: str, options: dict[str, object], field: str) -> None:
    plain = {"budget": 100, "rounds": 2, "control_variate": False}
    made = LineEstimation(range(12), 1, EstimationOptions(**plain))
    made.advance(table(wobbly(0), 12))
    other = LineEstimation(lines, 1, EstimationOptions(**plain | options), metric)
    with pytest.raises(ValueError, match=field):
        other.load_state_dict(made.state_dict())


def test_too_few_rounds_for_values_are_told() -> None:
    estimation = LineEstimation(range(12), 1, EstimationOptions(budget=64, rounds=8, control_variate=False))
    with pytest.raises(ValueError, match="no frame was evaluated"):
        estimation.result()
    estimation.advance(table(wobbly(0), 12, "a"))
    with pytest.raises(ValueError, match="frame 'a' has 6 coalitions after 1 of 8 rounds, too few for 12 lines"):
        estimation.result()


# Few coalitions a frame.


def test_frames_with_few_coalitions_are_pooled() -> None:
    exact = torch.stack([ExactShapley().estimate(as_game(wobbly(seed), 12)).values for seed in range(40)]).mean(0)
    frames = [table(wobbly(seed), 12, seed) for seed in range(40)]
    found = estimated(*frames, n=12, budget=16)
    assert found.pooled
    assert found.per_frame == {}
    assert float(found.values.sum()) == pytest.approx(found.error_empty - found.error_full, abs=1e-9)
    assert bool(((found.values - exact).abs() < 4 * found.stderr).all())
    assert float(found.stderr.mean()) < 0.2 * float(exact.mean())
    with pytest.raises(ValueError, match=r"frame 3 has no values of its own \(frames were pooled: budget=54"):
        found.select(3, frame=3)


def test_a_budget_that_solves_every_frame_is_the_one_the_message_names() -> None:
    frames = [table(wobbly(seed), 12, seed) for seed in range(4)]
    assert estimated(*frames, n=12, budget=53).pooled
    assert not estimated(*frames, n=12, budget=54).pooled


def test_pooled_frames_may_lack_lines() -> None:
    frames = [TableFrame(seed, wobbly(seed, 5), torch.tensor([0, 1, 3, 4, 6])) for seed in range(30)]
    found = estimated(*frames, n=7, budget=10)
    assert found.pooled
    assert bool((found.values[[2, 5]].abs() < 4 * found.stderr[[2, 5]]).all())


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_few_lines_that_are_pooled_have_values_of_the_size_of_the_game(n: int) -> None:
    exact = torch.stack([ExactShapley().estimate(as_game(wobbly(seed, n), n)).values for seed in range(8)]).mean(0)
    found = estimated(*(table(wobbly(seed, n), n, seed) for seed in range(8)), n=n, budget=2 * n)
    assert found.pooled
    torch.testing.assert_close(found.values, exact, rtol=0.4, atol=0)  # eight frames; divided by rounding, 1000 times


def test_a_budget_below_the_smallest_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="regression of 12 players needs at least 28 evaluations, the budget is 20"):
        LineEstimation(range(12), 1, EstimationOptions(budget=20))


# The control variate.


@pytest.mark.parametrize("estimator", ["regression", "stratified"])
def test_the_gap_game_takes_over_noise_of_interpolation(estimator: str) -> None:
    frames = [replace(frame, gt=frame.sparse) for frame in (street(0), street(1))]
    common = {"budget": 300, "estimator": estimator}
    raw, controlled = (
        line_shapley(ColumnInterpolation(), frames, control_variate=on, **common) for on in (False, True)
    )
    assert raw.proxy_correlation is None
    assert controlled.proxy_correlation > 0.6
    left = float(controlled.stderr.square().sum() / raw.stderr.square().sum())
    assert left == pytest.approx(1 - controlled.proxy_correlation**2, rel=0.05)
    assert controlled.evaluations == raw.evaluations


def test_the_control_variate_has_no_bias() -> None:
    frames, lines = [street(0), street(1)], [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    options = {"candidates": lines, "budget": 80}
    exact = line_shapley(PullPushCompletion(), frames, candidates=lines, estimator="exact").values
    errors = [line_shapley(PullPushCompletion(), frames, seed=seed, **options).values - exact for seed in range(6)]
    spread = torch.stack(errors)
    assert bool((spread.mean(0).abs() < 4 * spread.std(0) / 6**0.5).all())


def test_a_network_that_ignores_what_is_near_gains_nothing_from_the_gap_game_and_loses_nothing() -> None:
    class Counted(nn.Module):
        """Depth by the number of points: position means nothing."""

        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            points = (sparse > 0).flatten(1).sum(1)
            return (5 + points % 7).float().view(-1, 1, 1, 1).expand_as(sparse)

    frame = street(0)
    raw, controlled = (
        line_shapley(Counted(), [frame], budget=200, candidates=list(range(0, 45, 3)), control_variate=on)
        for on in (False, True)
    )
    assert controlled.proxy_correlation < 0.3
    assert float(controlled.stderr.square().sum()) <= float(raw.stderr.square().sum())


# Other estimators.


def test_the_gap_game_needs_no_network() -> None:
    model, frames = Counting(), [street(0), street(1)]
    found = line_shapley(model, frames, estimator="gap")
    assert model.sizes == []
    assert found.evaluations == 0
    exact = torch.stack([GapGame.of_frame(frame, found.lines).as_rmse().shapley() for frame in frames]).mean(0)
    torch.testing.assert_close(found.values, exact)
    assert float(found.values.sum()) == pytest.approx(found.error_empty - found.error_full)


def test_squared_errors_of_the_gap_game_are_in_square_millimetres() -> None:
    frame = street(0)
    found = line_shapley(PullPushCompletion(), [frame], estimator="gap", completion=CompletionOptions("mse"))
    torch.testing.assert_close(found.values, 1e6 * GapGame.of_frame(frame, found.lines).shapley())


def test_an_estimator_of_ones_own_has_the_budget_asked_for() -> None:
    estimation = LineEstimation(range(12), 1, EstimationOptions(RegressionShapley(ridge=0.1), budget=60))
    assert estimation.estimator == RegressionShapley(60, ridge=0.1)
    walks = LineEstimation(range(12), 1, EstimationOptions(PermutationShapley(), budget=60, control_variate=False))
    game = table(wobbly(0), 12)
    walks.advance(game)
    assert game.evaluations <= 60 + 4


def test_the_published_estimator_is_far_off_on_a_game_of_fourteen_lines() -> None:
    lines = list(range(1, 43, 3))
    gap = GapGame.of_frame(street(0), lines)
    game = as_game(lambda kept: -1000 * gap.total(kept).sqrt(), 14)  # the RMSE of interpolation
    exact = ExactShapley().estimate(game).values

    def error(estimator: OfficialLineRegression | RegressionShapley) -> float:
        found = [estimator.estimate(game, generator=seed).values - exact for seed in range(10)]
        return float(torch.stack(found).square().mean().sqrt() / exact.std())

    for budget in (224, 896):
        official, ours = error(OfficialLineRegression(budget)), error(RegressionShapley(budget))
        assert ours < 0.3
        assert official > 3 * ours
    assert error(OfficialLineRegression(4000)) > 0.4  # it does not converge to the Shapley value


def test_the_published_estimator_is_exact_where_lines_add_up() -> None:
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    game = as_game(lambda kept: kept.double() @ weights + 3, 9)
    found = OfficialLineRegression(60).estimate(game, generator=0)
    torch.testing.assert_close(found.values, weights)
    assert bool(found.stderr.isnan().all())


def test_the_published_estimator_is_not_corrected_by_exact_values() -> None:
    estimation = LineEstimation(range(12), 1, EstimationOptions("official", budget=60))
    assert not estimation.controlled
    assert not LineEstimation(range(12), 1, EstimationOptions(RegressionShapley(sampling="official"), 60)).controlled


def test_captum_finds_the_same_values() -> None:
    attr = pytest.importorskip("captum.attr")
    game = LineGame(PullPushCompletion(), [toy_frame("a")])
    exact = ExactShapley().estimate(game).values
    torch.manual_seed(0)
    theirs = attr.ShapleyValueSampling(lambda kept: game(kept > 0.5)).attribute(torch.ones(1, 8), n_samples=200)[0]
    ours = PermutationShapley(walks=200).estimate(game, generator=0)
    assert bool(((ours.values - exact).abs() < 4 * ours.stderr).all())
    assert bool(((theirs.double() - ours.values).abs() < 4 * 2**0.5 * ours.stderr).all())


# What a user sees.


def test_selections_name_lines_of_the_sensor() -> None:
    found = line_shapley(PullPushCompletion(), [toy_frame("a"), toy_frame("b")], budget=60)
    assert found.lines == list(range(3, 11))
    assert found.select(3) == [3 + place for place in select_lines(found.values, 3)]
    own = select_lines(found.per_frame["b"], 2, "none")
    assert found.select(2, "none", frame="b") == [3 + place for place in own]
    with pytest.raises(ValueError, match=r"frame 'c' has no values of its own \(2 have\)"):
        found.select(2, frame="c")


def test_a_network_that_is_lost_without_any_line_is_reported() -> None:
    class Lost(nn.Module):
        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            return PullPushCompletion(empty_depth=500.0)(None, sparse)

    with pytest.warns(LidarWarning, match="without any line the error is .* was not trained for that"):
        line_shapley(Lost(), [toy_frame("a")], budget=60)
    line_shapley(Lost(), [toy_frame("a")], budget=60, completion=CompletionOptions(empty_value="mean_depth"))


@pytest.mark.parametrize("control_variate", [True, False])
def test_the_error_without_any_line_moves_all_values_alike_and_adds_no_noise(control_variate: bool) -> None:
    asked, given = (
        line_shapley(
            PullPushCompletion(),
            [toy_frame("a")],
            budget=60,
            control_variate=control_variate,
            completion=CompletionOptions(empty_value=value),
        )
        for value in ("model", 1e6)
    )
    shift = given.values - asked.values
    expected = (given.error_empty - asked.error_empty) / 8
    torch.testing.assert_close(shift, torch.full((8,), expected, dtype=torch.float64), rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(given.stderr, asked.stderr, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("frames", "budget"), [(1, 1200), (16, 1200), (17, 256), (200, 256), (201, 128)])
def test_the_automatic_budget_falls_with_the_number_of_frames(frames: int, budget: int) -> None:
    assert LineEstimation(range(46), frames).budget == budget


def test_a_budget_may_be_a_multiple_of_the_candidates() -> None:
    assert LineEstimation(range(46), 3, EstimationOptions(budget="20n")).budget == 20 * 46


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "kernel"}, "estimator must be one of"),
        ({"budget": 0}, "budget must be an int >= 1"),
        ({"budget": 10.0}, "budget must be an int >= 1"),
        ({"budget": "many"}, 'a multiple of the players such as "20n" or "auto", got \'many\''),
        ({"rounds": 0}, "rounds must be a whole number >= 1"),
        ({"seed": -1}, "seed must be a whole number >= 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EstimationOptions(**options)


# Real frames.


def quarter_frames(kitti: Path) -> list[Frame]:
    from lightning_eff.lidar.datasets import KittiScanDataset

    samples = list(KittiScanDataset(kitti, scale=4))
    return [
        frames_of(
            {k: v[None] for k, v in s.items() if isinstance(v, Tensor)} | {"sample_id": [s["sample_id"]]}, s["gt"][None]
        )[0]
        for s in samples
    ]


@pytest.mark.slow
def test_on_real_frames_spread_matters_more_than_value(kitti: Path) -> None:
    frames = quarter_frames(kitti)
    game = LineGame(PullPushCompletion(), frames, options=CompletionOptions(coalition_batch=8))
    assert game.lines == list(range(46))
    found = line_shapley(PullPushCompletion(), frames, budget=1200, completion=CompletionOptions(coalition_batch=8))
    upper, lower = found.values[:15].mean(), found.values[-15:].mean()
    assert float(upper) > 1.2 * float(lower)  # far returns take most of the RMSE

    def error(sets: list[list[int]]) -> float:
        return found.error_empty - float(evaluate(game, as_coalitions(sets, 46)).mean())

    for k in (8, 16):
        top, spread = error([select_lines(found.values, k, "none")]), error([select_lines(found.values, k)])
        chance = error(random_lines(46, k, draws=20))
        best = best_selection(found.values, k, game)
        assert top > 1.2 * chance
        assert spread < chance
        assert best.score >= best.scores["uniform"]
