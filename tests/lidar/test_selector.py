"""LidarSaSSelector: the verbs of a Trainer, what a run leaves alone, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adding import EMPTY, LINES, SEEN, Adding, loader, sample, trainer, values
from helpers import run_ddp
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.data import SyntheticLidarDataModule
from lightning_eff.lidar.datasets import KittiScanDataset
from lightning_eff.lidar.frames import frames_of
from lightning_eff.lidar.journal import ValueJournal
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable, LidarWarning
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.selector import LidarSaSSelector
from lightning_eff.lidar.settings import Dynamic, LineGameOptions, Spread
from lightning_eff.lidar.values import EstimationOptions, line_shapley

HERE = Path(__file__).parent
EVERY_FOURTH = LaserTable(KITTI_HDL64E.elevations[::4], KITTI_HDL64E.heights[::4])
TWO_ROUNDS = EstimationOptions(budget=40, rounds=2)


MAE = LineGameOptions(metric="mae")


def selector(model: nn.Module | None = None, **options: Any) -> LidarSaSSelector:
    given = {"k": [3, 2], "num_lines": LINES, "estimation": TWO_ROUNDS, "game": MAE, **options}
    return LidarSaSSelector(Adding() if model is None else model, **given)


def streets(**options: Any) -> SyntheticLidarDataModule:
    """Streets seen by a sensor of sixteen lines."""
    sizes = {"train_size": 3, "val_size": 2, "test_size": 2, "batch_size": 1}
    return SyntheticLidarDataModule(**{**sizes, "scale": 16, "table": EVERY_FOURTH, **options})


def street_selector(model: nn.Module | None = None, **options: Any) -> LidarSaSSelector:
    given = {"k": [6, 3], "num_lines": 16, "estimation": EstimationOptions(budget=60, rounds=2), **options}
    return LidarSaSSelector(PullPushCompletion() if model is None else model, **given)


def fitted(made: LidarSaSSelector, data: Any = None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    run = trainer(*callbacks, **options)
    run.fit(made, loader() if data is None else data)
    return run


# fit


def test_values_of_a_game_that_adds_up_are_what_each_line_adds() -> None:
    made = selector()
    fitted(made)
    result = made.result
    assert result.lines == list(range(SEEN))
    assert result.null_lines == [6, 7]
    torch.testing.assert_close(result.values, values(), rtol=1e-5, atol=0)
    assert result.error_empty - result.error_full == pytest.approx(float(result.values.sum()), rel=1e-9)
    assert result.selected == {3: [0, 2, 5], 2: [0, 3]}  # the best of each region
    assert not result.partial


def test_values_are_those_of_the_functional_form_to_the_bit() -> None:
    data, made = streets(), street_selector()
    fitted(made, data)
    samples = [data.train_set[i] for i in range(3)]
    batch = torch.utils.data.default_collate(samples)
    frames = frames_of(*LidarKeys()(batch))
    found = line_shapley(PullPushCompletion(), frames, budget=60, num_lines=16)
    assert torch.equal(made.result.values, found.values)
    assert torch.equal(made.result.se, found.stderr)
    assert all(torch.equal(made.result.per_frame[name], found.per_frame[name]) for name in found.per_frame)


def test_rounds_and_the_order_of_frames_change_no_bit() -> None:
    results = []
    for rounds, seed in ((1, 0), (3, 7)):
        made = street_selector(estimation=EstimationOptions(budget=60, rounds=rounds))
        data = streets()
        data.seed = seed  # of the order: scenes are settled
        fitted(made, data, max_epochs=rounds)
        results.append(made.result.values)
    assert torch.equal(*results)


def test_frames_without_an_id_are_told_apart_by_what_they_show() -> None:
    samples = [{k: v for k, v in sample(i).items() if k not in ("sample_id", "sequence")} for i in range(4)]
    made = selector()
    fitted(made, loader(samples))
    torch.testing.assert_close(made.result.values, values(), rtol=1e-5, atol=0)
    assert len(made.result.per_frame) == 4


def test_a_fit_ends_after_its_rounds_whatever_epochs_it_may_have() -> None:
    made = selector()
    run = fitted(made, max_epochs=50)
    assert run.current_epoch == 2


def test_a_second_fit_begins_anew() -> None:
    made = selector()
    fitted(made, loader(2))
    fitted(made, loader(4))
    torch.testing.assert_close(made.result.values, values(4), rtol=1e-5, atol=0)
    assert len(made.result.per_frame) == 4


def test_early_stopping_ends_a_fit_whose_values_are_sure_enough() -> None:
    stop = EarlyStopping("lidar/max_se", stopping_threshold=1.0)
    made = selector(estimation=EstimationOptions(budget=60, rounds=3))
    run = fitted(made, None, stop, max_epochs=3)
    assert run.current_epoch < 3  # a game that adds up has no error
    assert made.result.partial
    assert "Partial" in str(made.result)


def test_what_happens_is_logged_behind_sas() -> None:
    made = selector()
    run = fitted(made)
    logged = run.callback_metrics
    quantities = ("max_se", "rank_stability", "forwards", "forwards_per_second", "v_empty")
    assert {f"lidar/{name}" for name in quantities} <= set(logged)
    assert float(logged["lidar/phi_line_02"]) == pytest.approx(float(values()[2]), rel=1e-5)
    assert float(logged["lidar/rank_stability"]) == 1.0
    assert float(logged["lidar/forwards"]) == made.result.forwards == 4 * 40


def test_the_network_is_left_as_it_was() -> None:
    model = Adding().train()
    model.norm.eval()
    model.offset.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = selector(model)
    run = fitted(made)
    run.test(made, loader(shuffle=False), verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    assert not model.offset.requires_grad
    assert model.norm.weight.requires_grad


# resume, processes, files


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def test_a_resumed_fit_ends_with_the_same_bits(tmp_path: Path) -> None:
    class EachBatch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")

    whole = street_selector(spread=Spread("auto"))
    fitted(whole, streets(), each_epoch(tmp_path), EachBatch())
    for name in ("epoch=0", "step=2", "step=3", "step=4"):  # three batches an epoch
        resumed = street_selector(spread=Spread("auto"))
        trainer().fit(resumed, streets(), ckpt_path=tmp_path / f"{name}.ckpt", weights_only=True)
        assert resumed.result.to_dict() == whole.result.to_dict()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 5}, "seed"),
        ({"game": LineGameOptions(metric="rmse")}, "metric"),
        ({"estimation": EstimationOptions(budget=44, rounds=2)}, "budget"),
        ({"game": LineGameOptions(metric="mae", candidates=[0, 1, 2, 3])}, "candidates"),
        ({"num_lines": 16}, "num_lines"),
    ],
)
def test_a_fit_resumed_with_other_settings_names_them(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    fitted(selector(), None, each_epoch(tmp_path))
    with pytest.raises(ValueError, match=field):
        trainer().fit(selector(**options), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_fit_resumed_with_another_model_is_refused(tmp_path: Path) -> None:
    fitted(selector(), None, each_epoch(tmp_path))
    other = Adding()
    other.offset.data.fill_(1.0)
    with pytest.raises(ValueError, match="model"):
        trainer().fit(selector(other), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_holds_the_selection_and_the_settings(tmp_path: Path) -> None:
    made = selector(spread=Spread("none"), baselines=["uniform"])
    fitted(made, None, each_epoch(tmp_path))
    loaded = LidarSaSSelector.load_from_checkpoint(tmp_path / "epoch=1.ckpt", model=Adding(), weights_only=True)
    assert loaded.result.to_dict() == made.result.to_dict()
    assert loaded.study.settings.spread == Spread("none")
    assert loaded.study.settings.estimation == TWO_ROUNDS
    fresh = selector()
    trainer().test(fresh, loader(shuffle=False), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False, weights_only=True)
    assert fresh.evaluations["test"].row("all lines").errors["mae"] == pytest.approx(made.result.error_full)


DDP = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import os
from test_selector import street_selector, streets
from adding import trainer
from lightning_eff.lidar.settings import Dynamic, Spread
import json
made = street_selector(spread=Spread("auto"), dynamic=Dynamic("oracle"))
data, devices = streets(), int(os.environ.get("DEVICES", "1"))
run = trainer(strategy="ddp" if devices > 1 else "auto", devices=devices)
run.fit(made, data)
run.test(made, data, verbose=False)
if run.is_global_zero:
    made.result.save(sys.argv[1])
    open(sys.argv[1] + ".test", "w").write(json.dumps(made.evaluations["test"].to_dict()))
"""


def test_two_processes_give_the_values_of_one_to_the_bit_though_samplers_repeat_frames(tmp_path: Path) -> None:
    made = street_selector(spread=Spread("auto"), dynamic=Dynamic("oracle"))  # three frames: one is repeated
    run = fitted(made, streets())
    run.test(made, streets(), verbose=False)
    run_ddp(DDP, tmp_path, str(tmp_path / "two.json"))
    assert LineSelection.load(tmp_path / "two.json").to_dict() == made.result.to_dict()
    found = json.loads((tmp_path / "two.json.test").read_text())
    assert found == json.loads(json.dumps(made.evaluations["test"].to_dict()))


def the_file(folder: Path) -> Path:
    """The file of values of a folder."""
    (path,) = folder.glob("values-*.jsonl")
    return path


class Dying(Adding):
    """Breaks down after so many calls."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        if self.calls >= self.after:
            raise RuntimeError("out of order")
        return super().forward(rgb, sparse)


def test_a_run_that_dies_goes_on_from_the_file_of_values(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        fitted(selector(Dying(50), dirpath=tmp_path), loader(batch_size=1))
    model = Dying(10_000)
    made = selector(model, dirpath=tmp_path)
    fitted(made, loader(batch_size=1))
    assert len(the_file(tmp_path).read_text().splitlines()) == 1 + 4 * 40
    assert model.calls < 4 * 40 - 20
    whole = selector(Dying(10_000))
    fitted(whole, loader(batch_size=1))
    assert torch.equal(whole.result.values, made.result.values)
    assert whole.result.forwards == made.result.forwards


def test_a_run_that_dies_has_a_partial_result() -> None:
    made = selector(Dying(4 * 20 + 30))  # in the second round
    with pytest.raises(RuntimeError, match="out of order"):
        fitted(made, loader(batch_size=1))
    assert made.result.partial
    torch.testing.assert_close(made.result.values, values(), rtol=1e-5, atol=0)


def test_values_of_another_metric_or_other_frames_are_not_taken(tmp_path: Path) -> None:
    fitted(selector(dirpath=tmp_path))
    models = Adding(), Adding()
    fitted(selector(models[0], dirpath=tmp_path, game=LineGameOptions(metric="rmse")))
    fitted(selector(models[1], dirpath=tmp_path), loader([{**sample(i), "rgb": torch.ones(3, 2, 4)} for i in range(4)]))
    assert [model.calls for model in models] == [4 * 40, 4 * 40]
    assert len(list(tmp_path.glob("values-*.jsonl"))) == 2


def test_a_file_of_values_of_something_else_is_refused(tmp_path: Path) -> None:
    ValueJournal(tmp_path / "values.jsonl", {"format": 1, "metric": "mae"})
    with pytest.raises(ValueError, match="metric is 'mae' there and 'rmse' here"):
        ValueJournal(tmp_path / "values.jsonl", {"format": 1, "metric": "rmse"})


def test_a_file_of_values_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    fitted(selector(dirpath=tmp_path))
    path = the_file(tmp_path)
    path.write_text(path.read_text()[:-5])
    model = Adding()
    fitted(selector(model, dirpath=tmp_path))
    assert model.calls == 1 + 4 * 3  # three of each frame prove what the file says


def test_a_fit_writes_its_folder(tmp_path: Path) -> None:
    made = selector(dirpath=tmp_path)
    run = fitted(made)
    run.test(made, loader(shuffle=False), verbose=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"lines.json", "values.json", "values.csv", "selection.md", "values.png", "frames.png"} <= names
    tested = {path.name for path in (tmp_path / "test").iterdir()}
    overlays = {f"points_k{k}.png" for k in made.result.selected}
    assert {"errors.md", "errors.csv", "errors.json", "errors.png", *overlays} == tested
    assert overlays
    assert LineSelection.load(tmp_path / "lines.json").to_dict() == made.result.to_dict()


# test and predict


def test_a_test_measures_every_selection_beside_the_others() -> None:
    names = ("uniform", "uniform_sensor", "random", "top", "most_points", "loo", "greedy", "gap_greedy", "gap_dp")
    made = selector(baselines=names)
    run = fitted(made)
    run.test(made, loader(shuffle=False), verbose=False)
    found = made.evaluations["test"]
    assert {row.rule for row in found.rows if row.k == 2} == {"region", *names}
    left = EMPTY - float(values()[[0, 3]].sum())  # k = 2 keeps lines 0 and 3
    assert found.row("region", 2).errors["mae"] == pytest.approx(left, rel=1e-5)
    assert found.row("greedy", 2).lines == [0, 2]
    assert found.row("loo", 3).lines == [0, 2, 3]
    assert found.row("no lidar").errors["mae"] == pytest.approx(EMPTY)
    assert found.row("all lines").errors["points"] == SEEN
    logged = run.callback_metrics["test/rmse/region/k2"]
    assert float(logged) == pytest.approx(found.row("region", 2).errors["rmse"], rel=1e-6)
    assert found.row("random", 2).spread > 0  # type: ignore[operator]
    assert found.row("greedy", 2).forwards == 4 * (6 + 5 + 4)
    assert found.row("uniform", 2).forwards == 0


def test_auto_is_never_worse_than_uniform_on_the_calibration_frames() -> None:
    data, made = streets(), street_selector(spread=Spread("auto"))
    run = fitted(made, data)
    run.validate(made, data.train_dataloader(), verbose=False)
    found = made.evaluations["val"]
    for k in (6, 3):
        assert found.row("auto", k).errors["rmse"] <= found.row("uniform", k).errors["rmse"]
        assert made.result.scores[k][made.result.rules[k]] == max(made.result.scores[k].values())


def test_swapping_finds_the_best_lines_of_a_game_that_adds_up() -> None:
    made = selector(spread=Spread("region", refine="swap"), k=[2])
    fitted(made)
    assert made.result.selected == {2: [0, 2]}
    assert made.result.rules == {2: "region, swapped"}


def test_greedy_takes_no_values() -> None:
    made = selector(spread=Spread(refine="greedy"), k=[4, 1])
    fitted(made)
    assert made.result.selected == {4: [0, 2, 3, 5], 1: [0]}


def test_prediction_is_the_networks_from_the_lines_selected() -> None:
    made, batch = selector(), next(iter(loader(shuffle=False)))
    run = fitted(made)
    depth = run.predict(made, loader(shuffle=False))[0]
    worth = torch.tensor([5.0 + 4.0 + 2.0])  # lines 0, 2 and 5 of frame 0
    torch.testing.assert_close(depth[0, 0, 0, 0], 100 - worth[0])
    masked = made.mask(batch, 3)
    assert set(masked["line_idx"].unique().tolist()) == {0, 2, 5, 255}
    assert torch.equal(masked["gt"], batch["gt"])
    assert made.select(1) == [0]
    assert made.select(2, Spread("none")) == [0, 2]


def test_a_test_before_any_fit_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"call trainer\.fit first, or give ckpt_path"):
        trainer().test(selector(), loader(shuffle=False), verbose=False)


# lines by frame


def different(frame: int, sequence: str = "drive") -> dict[str, Any]:
    """Frames that show different lines: even ones the first three, odd ones the last three."""
    return sample(frame, lines=range(3) if frame % 2 == 0 else range(3, 6), sequence=sequence)


def test_a_line_that_a_frame_does_not_show_is_worth_nothing_there() -> None:
    made = selector()
    fitted(made, loader([different(i) for i in range(4)]))
    assert made.result.per_frame["frame 0"][3:].tolist() == [0, 0, 0]
    assert made.result.per_frame["frame 1"][:3].tolist() == [0, 0, 0]
    assert float(made.result.per_frame["frame 1"][3]) > 0


def test_lines_by_frame_follow_the_frames_own_values_or_those_of_the_frame_before() -> None:
    best = {"oracle": [3, 0, 3], "previous": [0, 3, 0]}  # the first of a drive takes the mean values
    for source in ("oracle", "previous"):
        made = selector(dynamic=Dynamic(source), k=[1], spread=Spread("none"))
        run = fitted(made, loader([different(i) for i in range(4)]))
        held = [different(i, "another") for i in (5, 6, 7)]
        run.test(made, loader(held, shuffle=False), verbose=False)
        chosen = {name: lines[1] for name, lines in made._measurement.own.items()}
        assert [chosen[f"frame {i}"][0] for i in (5, 6, 7)] == best[source]
        row = made.evaluations["test"].row(f"dynamic {source}", 1)
        assert row.lines is None
    assert "bound and no method" in " ".join(made.result.notes) or source == "previous"


def test_the_oracle_is_the_best_of_all_on_frames_that_differ() -> None:
    made = selector(dynamic=Dynamic("oracle"), k=[1], spread=Spread("none"))
    run = fitted(made, loader([different(i) for i in range(4)]))
    run.test(made, loader([different(i) for i in (4, 5)], shuffle=False), verbose=False)
    found = made.evaluations["test"]
    assert found.row("dynamic oracle", 1).errors["rmse"] < found.row("none", 1).errors["rmse"]
    assert any("bound" in note for note in found.notes)


def test_a_predictor_tells_lines_from_the_image_alone() -> None:
    # frame i is 0.1 i bright; even ones show the first lines, odd ones the last: two kinds are enough to learn
    samples = [{**different(i % 2), "sample_id": f"frame {i}"} for i in range(6)]
    made = selector(dynamic=Dynamic("predictor", steps=400), k=[1], spread=Spread("none"))
    run = fitted(made, loader(samples))
    held = [{**different(i), "sample_id": f"held {i}"} for i in (0, 1)]
    run.test(made, loader(held, shuffle=False), verbose=False)
    assert [made._measurement.own[f"held {i}"][1] for i in (0, 1)] == [[0], [3]]
    no_truth = [{k: v for k, v in one.items() if k != "gt"} for one in held]
    depth = run.predict(made, loader(no_truth, shuffle=False))
    assert float(depth[0][1, 0, 0, 0]) == pytest.approx(100 - 3 * 1.25)


def test_prediction_by_the_oracle_asks_for_frames_it_knows() -> None:
    made = selector(dynamic=Dynamic("oracle"), k=[1])
    run = fitted(made)
    run.predict(made, loader(shuffle=False))  # the calibration frames
    with pytest.raises(ValueError, match="no values of frame 'frame 9'"):
        run.predict(made, loader([sample(9)], shuffle=False))


# real frames


def test_on_two_real_frames_spread_beats_value_alone_and_auto_beats_even_spread() -> None:
    frames = Path(os.environ.get("LIGHTNING_EFF_DATA", "/nowhere")) / "kitti"
    if not frames.is_dir():
        pytest.skip("no KITTI frames: LIGHTNING_EFF_DATA does not name a folder that holds kitti/")
    data = DataLoader(KittiScanDataset(frames, scale=4), 1)
    made = LidarSaSSelector(
        PullPushCompletion(), [16, 8], estimation=EstimationOptions(budget=300), spread=Spread("auto")
    )
    run = fitted(made, data, max_epochs=1)
    run.test(made, data, verbose=False)
    found = made.evaluations["test"]

    def rmse(rule: str, k: int) -> float:
        return found.row(rule, k).errors["rmse"]

    assert made.result.lines == list(range(46))  # what the camera sees of 64
    for k in (16, 8):
        assert rmse("auto", k) <= rmse("uniform", k) < rmse("random", k)
        assert rmse("auto", k) < rmse("top", k)
    assert rmse("top", 8) > 1.5 * rmse("random", 8)
    values = made.result.values  # far range takes most of the RMSE
    assert float(values[:15].mean()) > float(values[-15:].mean())


# bad input


def test_missing_lines_are_told_with_the_ways_to_obtain_them() -> None:
    samples = [{k: v for k, v in sample(0).items() if k != "line_idx"}]
    with pytest.raises(KeyError, match=r"no 'line_idx'.*LidarKeys\(line_idx=\.\.\.\).*assign_lines"):
        fitted(selector(), loader(samples))


def test_keys_are_renamed() -> None:
    samples = [{"image" if k == "rgb" else k: v for k, v in sample(i).items()} for i in range(4)]
    made = selector(split_batch=LidarKeys(rgb="image"))
    run = fitted(made, loader(samples))
    torch.testing.assert_close(made.result.values, values(), rtol=1e-5, atol=0)
    run.predict(made, loader(samples, shuffle=False))


def test_lines_that_the_sensor_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        fitted(selector(num_lines=4, k=[2]))
    normalised = {**sample(0), "line_idx": sample(0)["line_idx"] / 255}
    with pytest.raises(ValueError, match="integers"):
        fitted(selector(), loader([normalised]))


def lost(frame: int) -> dict[str, Any]:
    one = sample(frame)
    one["line_idx"][0, 0, 1] = 255
    return one


def test_depth_of_no_line_is_left_out_and_told() -> None:
    made = selector()
    with pytest.warns(LidarWarning, match="belong to no line"):
        fitted(made, loader([lost(i) for i in range(4)]))
    assert made.result.lines == [0, 2, 3, 4, 5]
    assert any("belong to no line" in note for note in made.result.notes)
    assert made.result.error_full == pytest.approx(EMPTY - float(values().sum() - values()[1]), rel=1e-5)
    with pytest.raises(ValueError, match="belong to no line"):
        fitted(selector(game=LineGameOptions(metric="mae", unassigned="error")), loader([lost(0)]))


def test_frames_without_truth_are_left_out_and_counted() -> None:
    blind = {**sample(4), "gt": torch.zeros(1, 2, 4)}
    made = selector()
    run = fitted(made, loader([*(sample(i) for i in range(4)), blind]))
    torch.testing.assert_close(made.result.values, values(), rtol=1e-5, atol=0)
    assert made.result.skipped == 1
    run.test(made, loader([sample(0), blind], shuffle=False), verbose=False)
    assert (made.evaluations["test"].frames, made.evaluations["test"].skipped) == (1, 1)
    with pytest.raises(ValueError, match="none of 1 frames has ground truth"):
        fitted(selector(), loader([blind]))
    with pytest.raises(ValueError, match="no frame of test has valid ground truth"):
        run.test(made, loader([blind], shuffle=False), verbose=False)


class Infinite(Adding):
    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        return super().forward(rgb, sparse) / (sparse.sum() > 6)


def test_depth_that_is_not_finite_names_the_frame() -> None:
    with pytest.raises(ValueError, match=r"not finite for frame 'frame \d'"):
        fitted(selector(Infinite()))


def test_a_network_far_off_without_lines_is_told() -> None:
    made = selector()
    model: Any = made.model
    model.offset.data.fill_(100.0)
    with pytest.warns(LidarWarning, match="without any line"):
        fitted(made)


def test_more_lines_than_candidates_keep_them_all_with_a_warning() -> None:
    made = selector(k=[7])
    with pytest.warns(LidarWarning, match="7"):
        fitted(made)
    assert made.result.selected == {7: list(range(SEEN))}


def test_no_line_is_a_selection_too() -> None:
    made = selector(k=[0, 6])
    run = fitted(made)
    run.test(made, loader(shuffle=False), verbose=False)
    found = made.evaluations["test"]
    assert made.result.selected == {0: [], 6: list(range(SEEN))}
    assert found.row("region", 0).errors == found.row("no lidar").errors
    assert found.row("region", 6).errors == found.row("all lines").errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": [2, 2]}, "k must be distinct"),
        ({"k": [-1]}, "k must be distinct"),
        ({"k": [2.5]}, "k must be distinct"),
        ({"k": [9]}, "k must be distinct numbers of lines in 0..8"),
        ({"num_lines": 300}, "num_lines"),
        ({"baselines": ["best"]}, "best"),
        ({"spread": Spread(elevations=[1.0, 0.0])}, "expected 8 elevations"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        selector(**options)


def test_settings_check_themselves() -> None:
    for made, match in (
        (lambda: Spread("region", distance="angle"), "elevations"),
        (lambda: Spread("auto", {"gap": 2}), "auto"),
        (lambda: Spread("best"), "rule"),  # type: ignore[arg-type]
        (lambda: Dynamic("next"), "source"),  # type: ignore[arg-type]
        (lambda: LineGameOptions(min_pixels=0), "min_pixels"),
        (lambda: LineGameOptions(metric="rsme"), "metric"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=match):
            made()


def test_a_budget_too_small_tells_the_least() -> None:
    with pytest.raises(ValueError, match="at least"):
        fitted(selector(estimation=EstimationOptions(budget=5)), loader(1))


def test_a_trainer_of_low_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision"):
        fitted(selector(), precision="bf16-true")


def test_weights_come_from_a_checkpoint_and_missing_ones_are_named(tmp_path: Path) -> None:
    held = nn.Module()
    held.net = Adding()
    held.net.offset.data.fill_(2.0)
    torch.save({"state_dict": held.state_dict()}, tmp_path / "whole.ckpt")
    made = selector(checkpoint_path=tmp_path / "whole.ckpt")
    assert made.model.state_dict()["offset"].item() == 2.0
    torch.save({"offset": torch.zeros(())}, tmp_path / "part.pt")
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        selector(checkpoint_path=tmp_path / "part.pt")
