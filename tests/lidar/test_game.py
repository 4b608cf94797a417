from dataclasses import replace

import pytest
import torch
from line_frames import Counting, toy_frame
from torch import Tensor, nn

from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.frames import Frame, LinePixels, frames_of
from lightning_eff.lidar.game import Completion, CompletionOptions, FrameGame, LineGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.metrics import depth_errors
from lightning_eff.shapley import GroupedGame, RegressionShapley
from lightning_eff.shapley.table import coalitions_of


def game_of(frame: Frame, model: nn.Module | None = None, lines: range = range(3, 11), **options: object) -> FrameGame:
    return FrameGame(frame, lines, Completion(model or PullPushCompletion(), CompletionOptions(**options)))


def some_coalitions(n: int = 8, count: int = 40) -> Tensor:
    return torch.rand(count, n, generator=torch.Generator().manual_seed(1)) < 0.5


# Frames.


def test_images_of_a_frame_must_have_one_size() -> None:
    frame = toy_frame("a")
    with pytest.raises(ValueError, match=r"frame 'a': sparse must be \[1, 16, 24\] .* got \[1, 15, 24\]"):
        replace(frame, sparse=frame.sparse[:, 1:])


def test_lines_must_be_integers() -> None:
    frame = toy_frame("a")
    with pytest.raises(ValueError, match=r"frame 'a': line_idx must be an integer tensor, got torch.float32, values 3"):
        replace(frame, line_idx=frame.line_idx.float())


def test_a_batch_falls_apart_into_frames_with_the_ids_it_has() -> None:
    frames = [toy_frame(id_) for id_ in ("a", "b")]
    batch = {name: torch.stack([getattr(f, name) for f in frames]) for name in ("rgb", "sparse", "line_idx")}
    gt = torch.stack([frame.gt for frame in frames])
    assert [frame.id for frame in frames_of(batch, gt, first=6)] == [6, 7]
    named = frames_of(batch | {"sample_id": ["a", "b"], "sequence": ["x", "y"]}, gt)
    assert [(frame.id, frame.sequence) for frame in named] == [("a", "x"), ("b", "y")]
    assert [frame.id for frame in frames_of(batch | {"sample_id": torch.tensor([4, 9])}, gt)] == [4, 9]
    torch.testing.assert_close(named[1].gt, frames[1].gt)


def test_pixels_of_every_line_are_counted_and_add_up_over_frames() -> None:
    frames = [toy_frame("a"), toy_frame("b", missing=(2,))]
    frames[1].line_idx[0, 0, 0] = 255  # a pixel of line 3 that belongs to none
    pixels = LinePixels.count(frames, 64)
    assert pixels.per_line[3:11].tolist() == [23, 24, 12, 24, 24, 24, 24, 24]
    assert int(pixels.per_line.sum()) == 23 + 12 + 6 * 24
    assert pixels.unassigned == 1
    both = LinePixels.count(frames[:1], 64) + LinePixels.count(frames[1:], 64)
    torch.testing.assert_close(both.per_line, pixels.per_line)
    assert both.share_unassigned == pytest.approx(1 / 180)


def test_candidates_are_the_lines_with_pixels_enough_or_those_named() -> None:
    pixels = LinePixels(torch.tensor([0, 5, 2, 9]))
    assert pixels.candidates() == [1, 2, 3]
    assert pixels.candidates(min_pixels=3) == [1, 3]
    assert pixels.candidates("all") == [0, 1, 2, 3]
    assert pixels.candidates([3, 0]) == [0, 3]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([4], r"candidates must be lines in 0\.\.3, got \[4\]"),
        ([1, 1], "distinct lines"),
        ([], "distinct lines"),
        ("visibly", "distinct lines"),
    ],
)
def test_candidates_that_are_no_lines_are_refused(which: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinePixels(torch.tensor([0, 5, 2, 9])).candidates(which)


def test_no_visible_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="no line has 10 pixels with depth"):
        LinePixels(torch.tensor([0, 5, 2, 9])).candidates(min_pixels=10)


def test_a_line_beyond_the_sensor_is_refused_with_the_frame() -> None:
    with pytest.raises(ValueError, match=r"frame 'a': .*0 to 7.*values from 3 to 10"):
        LineGame(PullPushCompletion(), [toy_frame("a")], num_lines=8)


# The game of a frame.


def test_a_value_is_the_error_that_lines_take_off() -> None:
    frame = toy_frame("a")
    game, kept = game_of(frame), some_coalitions()

    def error(row: Tensor) -> Tensor:
        lines = (row.nonzero().flatten() + 3).to(torch.uint8)
        sparse = torch.where(torch.isin(frame.line_idx, lines), frame.sparse, 0.0)
        return depth_errors(PullPushCompletion()(None, sparse[None]), frame.gt[None])["rmse"][0]

    expected = error(torch.zeros(8)) - torch.stack([error(row) for row in kept])
    torch.testing.assert_close(game(kept), expected)
    torch.testing.assert_close(game.errors(kept), torch.stack([error(row) for row in kept]))


def test_no_line_is_worth_nothing_and_all_are_worth_the_whole_drop() -> None:
    game = game_of(toy_frame("a"))
    values = game(torch.tensor([[False], [True]]).expand(2, 8))
    assert values.tolist() == [0.0, game.empty_error - game.full_error]
    assert game.full_error < game.mean_depth_error < 2 * game.empty_error


def test_pixels_of_lines_that_are_no_candidates_are_left_out_everywhere() -> None:
    frame = toy_frame("a")
    game = game_of(frame, lines=range(3, 6))
    without = replace(frame, sparse=torch.where(frame.line_idx < 6, frame.sparse, 0.0))
    assert game.full_error == game_of(without).full_error
    assert game.n_players == 3


def test_every_coalition_is_completed_once() -> None:
    model = Counting()
    game = game_of(toy_frame("a"), model, coalition_batch=4)
    kept = some_coalitions(count=6)
    game.errors(torch.cat([kept, kept, torch.ones(2, 8, dtype=torch.bool)]))
    assert sum(model.sizes) == game.evaluations == 7
    game.errors(torch.ones(1, 8, dtype=torch.bool))
    assert game.evaluations == 7


def test_the_image_is_encoded_once_for_many_coalitions() -> None:
    model = Counting()
    kept = some_coalitions()
    game_of(toy_frame("a"), model, coalition_batch=4).errors(kept[kept.any(1) & ~kept.all(1)])
    assert len(model.sizes) >= 8
    assert model.encoded == 1


def test_the_number_of_coalitions_in_a_forward_does_not_matter() -> None:
    kept = some_coalitions(count=100)
    one, many = (game_of(toy_frame("a"), Counting().eval(), coalition_batch=size)(kept) for size in (1, 32))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_the_network_comes_back_as_it_was() -> None:
    model = Counting().train()
    model.norm.eval()
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    generator = torch.get_rng_state()
    game_of(toy_frame("a"), model)(some_coalitions())
    assert (model.training, model.norm.training) == (True, False)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_network_in_training_mode_is_evaluated_in_evaluation_mode() -> None:
    kept = some_coalitions()
    torch.testing.assert_close(
        game_of(toy_frame("a"), Counting().train())(kept), game_of(toy_frame("a"), Counting().eval())(kept)
    )


def test_a_network_that_writes_into_its_input_spoils_nothing() -> None:
    class Rude(nn.Module):
        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            dense = PullPushCompletion()(None, sparse)
            sparse.fill_(7.0)
            return dense

    kept = some_coalitions()
    for size in (1, 8):
        game = game_of(toy_frame("a"), Rude(), coalition_batch=size)
        torch.testing.assert_close(game(kept), game_of(toy_frame("a"))(kept))


@pytest.mark.parametrize(("scale", "batch"), [(8, 4), (4, 2), (2, 1)])
def test_small_frames_share_a_forward(scale: int, batch: int) -> None:
    size = (1, 352 // scale, 1216 // scale)
    frame = Frame(torch.zeros(3, *size[1:]), torch.ones(size), torch.ones(size), torch.zeros(size, dtype=torch.uint8))
    model = Counting()
    completion = Completion(model)
    FrameGame(frame, [0], completion).errors(torch.ones(1, 1, dtype=torch.bool))
    assert completion.batch == batch


@pytest.mark.parametrize("limit", [1, 3])
def test_out_of_memory_halves_the_batch_and_goes_on(limit: int) -> None:
    class Small(Counting):
        def decode(self, features: Tensor, sparse: Tensor) -> Tensor:
            if len(sparse) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().decode(features, sparse)

    kept = some_coalitions()
    completion = Completion(Small(), CompletionOptions(coalition_batch=16))
    found = FrameGame(toy_frame("a"), range(3, 11), completion)(kept)
    assert completion.batch == {1: 1, 3: 2}[limit]
    torch.testing.assert_close(found, game_of(toy_frame("a"), Counting())(kept))


def test_out_of_memory_with_one_coalition_is_an_error() -> None:
    class Never(nn.Module):
        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        game_of(toy_frame("a"), Never(), coalition_batch=4)(some_coalitions())


def test_depth_that_is_not_finite_is_an_error_with_frame_and_lines() -> None:
    class Broken(nn.Module):
        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            dense = PullPushCompletion()(None, sparse)
            few = (sparse > 0).flatten(1).sum(1) < 30
            dense[few] = torch.nan
            return dense

    game = game_of(toy_frame("a"), Broken(), empty_value=9000.0)
    game(torch.ones(1, 8, dtype=torch.bool))
    kept = torch.tensor([[True] * 8, [False, True, False, True] + [False] * 4])
    with pytest.raises(ValueError, match=r"not finite for frame 'a' with 2 of 8 lines kept \(.* \[1, 3\]\)"):
        game(kept)


def test_depth_of_another_shape_is_an_error_with_the_frame() -> None:
    class Flat(nn.Module):
        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            return sparse.flatten(1)

    with pytest.raises(ValueError, match="gave depth of shape") as caught:
        game_of(toy_frame("a"), Flat())(some_coalitions())
    assert any("frame 'a'" in note for note in caught.value.__notes__)


def test_errors_without_any_line_are_asked_for_estimated_or_given() -> None:
    frame, kept = toy_frame("a"), some_coalitions()
    model, mean, given = (game_of(frame, empty_value=value) for value in ("model", "mean_depth", 11315.0))
    assert mean.empty_error == mean.mean_depth_error
    guess = torch.full_like(frame.gt, float(frame.gt.mean()))
    assert mean.empty_error == pytest.approx(float(depth_errors(guess[None], frame.gt[None])["rmse"]))
    assert given.empty_error == 11315
    torch.testing.assert_close(given(kept) - 11315, model(kept) - model.empty_error)


@pytest.mark.parametrize("metric", ["rmse", "mae", "irmse", "imae", "mse"])
def test_errors_are_those_of_the_metrics_room(metric: str) -> None:
    class Sunken(nn.Module):
        """Some predictions are below zero, which counts as the least depth."""

        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            return PullPushCompletion()(None, sparse) - 6

    frame, kept = toy_frame("a"), torch.ones(1, 8, dtype=torch.bool)
    frame.gt[0, :, 5] = 0
    dense = Sunken()(frame.rgb[None], frame.sparse[None])
    assert bool((dense < 0).any())
    expected = depth_errors(dense, frame.gt[None], [metric], min_depth=0.5)[metric]
    torch.testing.assert_close(game_of(frame, Sunken(), metric=metric, min_depth=0.5).errors(kept), expected)


def test_an_error_of_ones_own_can_be_played_for() -> None:
    def worst(depth: Tensor, truth: Tensor) -> Tensor:
        return (depth - truth).abs().amax(1)

    frame = toy_frame("a")
    game = game_of(frame, metric=worst)
    dense = PullPushCompletion()(None, frame.sparse[None])
    assert game.full_error == pytest.approx(float((dense - frame.gt).abs().max()))
    assert Completion(PullPushCompletion(), CompletionOptions(metric=worst)).metric == "worst"


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (lambda depth, truth: (depth - truth).abs().mean(), r"expected \[3\], got \[\] for frame 'a'"),
        (lambda depth, truth: (depth - truth).abs(), r"expected \[3\], got \[3, \d+\] for frame 'a'"),
        (lambda depth, truth: 1.0, r"expected \[3\], got float for frame 'a'"),
        (lambda depth, truth: (depth - truth).mean(1).abs().neg().sqrt(), r"got \[nan, nan, nan\] for frame 'a'"),
    ],
)
def test_a_callable_metric_must_return_a_finite_number_for_every_coalition(metric: object, told: str) -> None:
    game = game_of(toy_frame("a"), metric=metric, coalition_batch=3)
    with pytest.raises(ValueError, match=r"must return \[B\] finite numbers for depth \[B, N\], truth.*" + told):
        game.errors(some_coalitions(count=3))


def test_truth_counts_above_a_least_depth() -> None:
    frame = toy_frame("a")
    frame.gt[0, :, :12] = 0.05
    game = game_of(frame, min_target=0.1)
    dense = PullPushCompletion()(None, frame.sparse[None])
    right = depth_errors(dense[..., 12:], frame.gt[None, ..., 12:])["rmse"]
    assert game.full_error == pytest.approx(float(right))


def test_lower_precision_gives_nearly_the_same_values() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(1, 1, 1)
            nn.init.ones_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            return self.mix(PullPushCompletion()(None, sparse))

    kept = some_coalitions()
    full, half = (game_of(toy_frame("a"), Small(), precision=precision)(kept) for precision in ("32", "bf16"))
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0, atol=0.01 * float(full.max()))


@pytest.mark.parametrize("kind", ["drop", "always_keep"])
def test_pixels_of_no_line_are_dropped_or_kept_everywhere(kind: str) -> None:
    frame = toy_frame("a")
    frame.line_idx[0, 0, :4] = 255  # two pixels of the first line
    game = game_of(frame, unassigned=kind)
    known = frame.sparse * (frame.line_idx == 255)
    expected = known if kind == "always_keep" else torch.zeros_like(known)
    torch.testing.assert_close(game.masked(torch.zeros(1, 8, dtype=torch.bool))[0], expected)
    everything = frame.sparse if kind == "always_keep" else frame.sparse * (frame.line_idx != 255)
    torch.testing.assert_close(game.masked(torch.ones(1, 8, dtype=torch.bool))[0], everything)


def test_a_frame_without_truth_is_refused() -> None:
    frame = toy_frame("a")
    with pytest.raises(ValueError, match=r"frame 'a' has no ground truth above 0\.0 m"):
        game_of(replace(frame, gt=torch.zeros_like(frame.gt)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "rms"}, "metric must be one of"),
        ({"empty_value": "zero"}, "empty_value must be"),
        ({"empty_value": -1.0}, "empty_value must be"),
        ({"unassigned": "keep"}, "unassigned must be"),
        ({"coalition_batch": 0}, "coalition_batch must be"),
        ({"precision": "64"}, "precision must be"),
        ({"min_depth": 0.0}, "min_depth must be"),
        ({"min_target": -0.1}, "min_target must be"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompletionOptions(**options)


# The game of all frames.


def test_the_game_is_the_mean_over_frames_and_each_frame_a_group() -> None:
    frames = [toy_frame("a"), toy_frame("b")]
    game, kept = LineGame(PullPushCompletion(), frames), some_coalitions()
    assert isinstance(game, GroupedGame)
    assert game.lines == list(range(3, 11))
    assert game.names[0] == "line 3"
    torch.testing.assert_close(game(kept), (game_of(frames[0])(kept) + game_of(frames[1])(kept)) / 2)
    torch.testing.assert_close(game.call_group(1, kept), game_of(frames[1])(kept))


def test_estimators_of_the_shapley_room_take_it() -> None:
    game = LineGame(PullPushCompletion(), [toy_frame("a"), toy_frame("b")])
    result = RegressionShapley(60).estimate(game, generator=0)
    assert float(result.efficiency_gap.abs()) < 1e-9
    assert result.names == game.names


def test_lines_that_no_frame_shows_are_no_players() -> None:
    game = LineGame(PullPushCompletion(), [toy_frame("a", missing=(0,)), toy_frame("b", missing=(0, 4))])
    assert game.lines == [4, 5, 6, 7, 8, 9, 10]
    assert game.null_lines == [0, 1, 2, 3, *range(11, 64)]


def test_coalitions_that_differ_in_lines_a_frame_lacks_are_one() -> None:
    model = Counting()
    game = LineGame(model, [toy_frame("a", missing=(2, 5)), toy_frame("b")])
    kept = torch.zeros(4, 8, dtype=torch.bool)
    kept[:, 0] = True
    kept[1, 2] = kept[2, 5] = kept[3, 7] = True
    values = game.call_group(0, kept)
    assert values[0] == values[1] == values[2] != values[3]
    assert game.frames[0].evaluations == 3  # two coalitions, and none
    assert game.frames[0].present.tolist() == [0, 1, 3, 4, 6, 7]


def test_a_frame_without_any_candidate_is_worth_nothing() -> None:
    game = LineGame(PullPushCompletion(), [toy_frame("a"), toy_frame("b", missing=tuple(range(8)))])
    assert game.frames[1].n_players == 0
    assert game.call_group(1, some_coalitions()).tolist() == [0.0] * 40


def test_frames_without_truth_are_left_out_and_counted() -> None:
    empty = replace(toy_frame("b"), gt=torch.zeros(1, 16, 24))
    game = LineGame(PullPushCompletion(), [toy_frame("a"), empty])
    assert (game.n_groups, game.skipped) == (1, 1)
    with pytest.raises(ValueError, match="none of 1 frames has ground truth"):
        LineGame(PullPushCompletion(), [empty])


def test_two_frames_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct ids"):
        LineGame(PullPushCompletion(), [toy_frame("a"), toy_frame("a")])


def test_many_pixels_of_no_line_are_reported() -> None:
    frame = toy_frame("a")
    frame.line_idx[0, :4] = 255
    with pytest.warns(LidarWarning, match=r"24 pixels with depth \(25.0 %\) belong to no line; they are left out"):
        LineGame(PullPushCompletion(), [frame])
    with pytest.raises(ValueError, match="24 pixels with depth"):
        LineGame(PullPushCompletion(), [frame], options=CompletionOptions(unassigned="error"))


def test_every_coalition_of_few_lines_has_its_value() -> None:
    game = LineGame(PullPushCompletion(), [toy_frame("a", lines=3)])
    values = game(coalitions_of(torch.arange(8), 3))
    assert values.unique().numel() == 8
