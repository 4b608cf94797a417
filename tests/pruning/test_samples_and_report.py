"""Calibration samples in groups; tables, files and pictures that say what pruning did; scores kept on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from magnitude import Net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import BatchKeys, split_batch
from lightning_eff.pruning import PruneReport, Samples, Scores
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.memory import ScoreMemory, fingerprint
from lightning_eff.pruning.report import Stage
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan


def batches(count: int, size: int = 10) -> list[tuple[Tensor, Tensor]]:
    x, y = torch.arange(float(count))[:, None], torch.arange(count)
    return list(zip(x.split(size), y.split(size), strict=True))


def sizes(samples: Samples) -> list[int]:
    return [int(count) for count in samples.counts]


@pytest.mark.parametrize(
    ("count", "groups"),
    [(1, 1), (31, 1), (63, 1), (64, 2), (100, 3), (512, 16), (1000, 16)],
)
def test_sixteen_groups_of_at_least_thirty_two_samples(count: int, groups: int) -> None:
    samples = Samples.collect(batches(count), count, split_batch)
    assert len(samples.groups) == groups
    assert sum(sizes(samples)) == count
    assert max(sizes(samples)) - min(sizes(samples)) <= 1
    assert groups == 1 or min(sizes(samples)) >= 32


def test_every_sample_is_in_one_group_with_its_target() -> None:
    samples = Samples.collect(batches(100), 100, split_batch)
    seen = []
    for group in samples.groups:
        for x, y in group:
            assert torch.equal(x[:, 0], y.float())
            seen += y.tolist()
    assert seen == list(range(100))


def test_only_the_samples_asked_for_are_taken() -> None:
    read = []

    def stream() -> Any:
        for batch in batches(100):
            read.append(1)
            yield batch

    samples = Samples.collect(stream(), 25, split_batch, groups=2)
    assert sizes(samples) == [12, 13]
    assert len(read) == 3


def test_fewer_samples_than_asked_are_all_taken() -> None:
    assert sizes(Samples.collect(batches(25), 1024, split_batch)) == [25]


def test_more_groups_than_samples_leave_no_group_empty() -> None:
    samples = Samples.collect(batches(5), 5, split_batch, groups=8)
    assert sizes(samples) == [1, 1, 1, 1, 1]


def test_example_is_two_samples_at_most() -> None:
    assert Samples.collect(batches(100), 100, split_batch).example.tolist() == [[0], [1]]
    assert Samples.collect(batches(1), 1, split_batch).example.tolist() == [[0]]


def test_a_process_takes_its_share_and_counts_are_sums() -> None:
    def two_processes(values: Tensor) -> Tensor:
        return 2 * values

    samples = Samples.collect(batches(100), 129, split_batch, reduce=two_processes, world_size=2)
    assert sum(sizes(samples)) == 130  # 65 each
    assert len(samples.groups) == 4  # 130 samples over both processes


def test_inputs_of_other_shapes_stay_in_the_loaders_batches() -> None:
    uneven = [(torch.zeros(4, 3, 8), torch.zeros(4)), (torch.zeros(2, 3, 6), torch.zeros(2))]
    samples = Samples.collect(uneven, 100, split_batch, groups=5)
    assert [group[0][0].shape for group in samples.groups] == [(4, 3, 8), (2, 3, 6)]
    assert sizes(samples) == [4, 2]


def test_targets_that_are_no_tensors_stay_in_the_loaders_batches() -> None:
    boxes = [(torch.zeros(2, 3), [{"box": torch.zeros(5, 4)}, {"box": torch.zeros(1, 4)}])] * 3
    assert sizes(Samples.collect(boxes, 100, split_batch)) == [2, 2, 2]


def test_dict_batches_are_joined_key_by_key() -> None:
    data = [{"a": torch.full((6, 2), i), "b": torch.full((6,), i), "y": torch.full((6,), i)} for i in range(4)]
    samples = Samples.collect(data, 100, BatchKeys(["a", "b"], "y"), groups=3)
    inputs, target = samples.groups[1][0]
    assert target.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(inputs["b"], target)
    assert torch.equal(inputs["a"][:, 1], target)


@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 2), torch.zeros(0))]])
def test_empty_loader_is_refused(empty: list[Any]) -> None:
    with pytest.raises(ValueError, match="the calibration loader gave no sample"):
        Samples.collect(empty, 10, split_batch)


# The report


def measured(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-adds per sample as torch counts them, and parameters."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() // 2 // len(x), sum(p.numel() for p in model.parameters())


@pytest.fixture
def report() -> PruneReport:
    """A network cut to about half, with scores of another kind in each layer."""
    model, x = Net(width=8), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = ChannelGraph.from_model(model, x)
    dense, before = Dense.of(graph), measured(model, x)
    generator = torch.Generator().manual_seed(0)
    keep = {"body.0": [0, 1, 2, 5], "body.4": list(range(9)), "body.7": [3]}
    scores = {
        "body.0": Scores(torch.rand(8, generator=generator), torch.full((8,), 0.05)),
        "body.4": Scores(
            torch.randn(16, generator=generator), torch.cat([torch.full((15,), 0.2), torch.tensor([torch.nan])])
        ),
        "body.7": Scores(torch.rand(16, generator=generator) * 1e-3),
    }
    after = apply_plan(model, PruningPlan(keep), x, graph=graph).graph
    now = measured(model, x)
    return PruneReport(
        value_name="accuracy",
        data="256 validation samples",
        dense=dense,
        graph=after,
        stages=[
            Stage("dense", 0, 0.91, *before, 0.5),
            Stage("pruned, step 1", 0, 0.55, *now, 0.4),
            Stage("fine-tuned", 3, 0.9, *now, 0.4),
        ],
        scores={name: (scores[name], keep[name]) for name in scores},
        removed_value={name: float(scores[name].values.sum()) for name in scores},
        notes=["A note."],
    )


def test_layer_table_counts_what_the_layers_cost(report: PruneReport) -> None:
    rows = {row[0]: row[1:] for row in report.table("layers").rows}
    first = report.removed_value["body.0"]
    # 3x3 kernels; weights and biases and the norm's two vectors; 8x8, 4x4 and 2x2 positions
    assert rows["body.0"] == (8, 4, first, 8 * 9 + 8 + 16, 4 * 9 + 4 + 8, 8 * 9 * 64, 4 * 9 * 64)
    assert rows["body.4"][3:5] == (16 * 8 * 9 + 16 + 32, 9 * 4 * 9 + 9 + 18)
    assert rows["body.7"][5:] == (16 * 16 * 9 * 4, 1 * 9 * 9 * 4)


def test_totals_are_those_of_the_dense_and_of_the_cut_model(report: PruneReport) -> None:
    total = report.table("layers").rows[-1]
    dense, last = report.stages[0], report.stages[-1]
    assert total == ("whole network", 40, 14, None, dense.params, last.params, dense.macs, last.macs)
    assert (dense.params, dense.macs) == (report.dense.params, report.dense.macs)
    assert (last.params, last.macs) == (report.graph.params().item(), report.graph.macs().item())


def test_rows_and_the_head_add_up_to_the_totals(report: PruneReport) -> None:
    *rows, total = report.table("layers").rows
    head_now = 1 * 4 * 10  # one channel of 2 x 2 positions to ten classes
    assert sum(row[5] for row in rows) + head_now + 10 == total[5]
    assert sum(row[7] for row in rows) + head_now == total[7]


def test_course_shows_every_stage(report: PruneReport) -> None:
    text = str(report)
    for words in ("dense", "pruned, step 1", "fine-tuned", "0.9100", "256 validation samples", "A note."):
        assert words in text


def test_every_format_is_written(report: PruneReport, tmp_path: Path) -> None:
    written = report.write(tmp_path / "new")
    names = {f"{stem}.{suffix}" for stem in ("layers", "course") for suffix in ("csv", "md", "json")}
    assert {path.name for path in written} == {*names, "scores.png"}
    assert all(path.stat().st_size for path in written)
    folder = tmp_path / "new"
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["body.0", "body.4", "body.7", "whole network"]
    records = json.loads((folder / "layers.json").read_text())
    assert records[-1]["MACs now"] == report.stages[-1].macs
    assert (folder / "course.md").read_text().startswith("**Course**\n\n| stage")


def test_figure_shows_kept_and_removed_channels(report: PruneReport, tmp_path: Path) -> None:
    figure = report.figures()["scores"]
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == ["body.0: 4 of 8 kept", "body.4: 9 of 16 kept", "body.7: 1 of 16 kept"]
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    assert bars == sorted(report.scores["body.0"][0].values.tolist(), reverse=True)
    colours = [bar.get_facecolor() for bar in figure.axes[2].patches]
    assert len(set(colours)) == 2
    report.write(tmp_path)
    assert matplotlib.image.imread(tmp_path / "scores.png").std() > 0.05


def test_report_without_scores_has_no_figure_file(report: PruneReport, tmp_path: Path) -> None:
    report.scores = {}
    assert not any(path.suffix == ".png" for path in report.write(tmp_path))


def test_scores_survive_json() -> None:
    values, curve = torch.tensor([0.1, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    back = Scores.from_dict(json.loads(json.dumps(Scores(values, curve=curve).to_dict())))
    assert torch.equal(back.values, values)
    assert (back.stderr, back.ties) == (None, None)
    assert torch.equal(back.curve, curve)


# Scores on disk


class Computing:
    """Counts how often it had to work."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Scores:
        self.times += 1
        return Scores(torch.tensor([float(self.times)], dtype=torch.float64))


def test_memory_gives_back_scores_of_the_same_game(tmp_path: Path) -> None:
    compute = Computing()
    assert ScoreMemory(tmp_path, 0, "print")("layer.0", compute).values.item() == 1
    assert ScoreMemory(tmp_path, 0, "print")("layer.0", compute).values.item() == 1
    assert compute.times == 1


def test_memory_refuses_another_fingerprint_step_or_layer(tmp_path: Path) -> None:
    compute = Computing()
    ScoreMemory(tmp_path, 0, "print")("layer.0", compute)
    ScoreMemory(tmp_path, 0, "print")("layer.1", compute)
    ScoreMemory(tmp_path, 1, "print")("layer.0", compute)
    ScoreMemory(tmp_path, 0, "other")("layer.0", compute)
    assert compute.times == 4
    assert ScoreMemory(tmp_path, 0, "other")("layer.0", compute).values.item() == 4


def test_memory_without_a_folder_keeps_nothing() -> None:
    compute = Computing()
    for _ in range(2):
        ScoreMemory(None, 0, "print")("layer.0", compute)
    assert compute.times == 2


def test_an_unfinished_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Computing()

    def dies(path: Path, text: str, **options: Any) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            ScoreMemory(tmp_path, 0, "print")("layer.0", compute)
    assert ScoreMemory(tmp_path, 0, "print")("layer.0", compute).values.item() == 2


def test_fingerprint_follows_weights_data_and_settings() -> None:
    model = nn.Linear(1, 2)
    samples = Samples.collect(batches(20), 20, split_batch)
    first = fingerprint(model, samples, ("a", 1))
    assert fingerprint(model, Samples.collect(batches(20), 20, split_batch), ("a", 1)) == first
    prints = {first, fingerprint(model, samples, ("a", 2))}
    prints.add(fingerprint(model, Samples.collect(batches(19), 19, split_batch), ("a", 1)))
    prints.add(fingerprint(model, Samples.collect([(x + 1, y) for x, y in batches(20)], 20, split_batch), ("a", 1)))
    model.weight.data[0, 0] += 1
    prints.add(fingerprint(model, samples, ("a", 1)))
    assert len(prints) == 5
