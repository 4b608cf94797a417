"""The examples of random channel pruning: their YAML, their scripts, and what they promise of real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXAMPLES, import_script, run_python

from lightning_eff.surgery import ChannelGraph

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not at hand")


def rows(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Read a table written as JSON, by one of its columns."""
    return {row[key]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize(("net", "params", "macs"), [("plain", 72_666, 7_338_880), ("residual", 77_754, 2_636_672)])
def test_networks_of_the_fashion_example_have_the_sizes_it_states(net: str, params: int, macs: int) -> None:
    model = import_script(EXAMPLES / "fashion_random_channel.py").NETS[net]().eval()
    graph = ChannelGraph.from_model(model, torch.randn(2, 1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == params == graph.params().item()
    assert graph.macs().item() == macs
    assert [name for name, group in graph.groups.items() if group.protected] == [list(graph.groups)[-1]]  # the outputs


@pytest.mark.slow
@needs_fashion
@pytest.mark.parametrize(("net", "repaired"), [("plain", 0.85), ("residual", 0.78)])
def test_repair_without_training_lifts_random_configurations_and_criteria_hardly_differ(
    net: str, repaired: float, tmp_path: Path
) -> None:
    run_python(EXAMPLES / "fashion_random_channel.py", "--net", net, "--out", str(tmp_path), cwd=tmp_path, timeout=3600)
    means = {name: row["mean"] for name, row in rows(tmp_path / net / "repairs.json", "repair").items()}
    assert means["none"] < 0.35
    assert means["gram, BatchNorm recalibrated"] >= repaired
    assert means["sequential, BatchNorm recalibrated"] > 0.84
    lines = (tmp_path / net / "criteria.csv").read_text().splitlines()
    place = lines[0].split(",").index("mean")
    of_criteria = [float(line.split(",")[place]) for line in lines[1:]]
    assert len(of_criteria) >= 8
    assert max(of_criteria) - min(of_criteria) < 0.04
    tuned = rows(tmp_path / net / "tuned.json", "network")
    assert tuned["best of 11"]["fine-tuned"] >= tuned["dense"]["test accuracy"] - 0.012


def test_convolution_before_pixel_shuffle_is_left_alone_and_the_rest_of_the_network_is_not() -> None:
    net = import_script(EXAMPLES / "photo_super_resolution.py").SmallEDSR(width=8, blocks=1)
    graph = ChannelGraph.from_model(net, torch.rand(2, 3, 12, 12))
    assert graph.prunable == ("head", "blocks.0.conv1")
    assert set(graph.groups["head"].producers) == {"head", "blocks.0.conv2", "tail"}
    assert "wrongly onto out" in graph.groups["up.0"].protected


def test_network_for_super_resolution_begins_as_bicubic_interpolation() -> None:
    example = import_script(EXAMPLES / "photo_super_resolution.py")
    small = torch.rand(1, 3, 12, 14)
    assert torch.equal(example.SmallEDSR(width=4, blocks=1)(small), example.bicubic(small))


def test_photographs_are_real_and_their_halves_meet() -> None:
    small, large = import_script(EXAMPLES / "photo_super_resolution.py").photograph(1)
    assert (small.shape, large.shape) == ((1, 3, 213, 320), (1, 3, 426, 640))
    means = torch.nn.functional.avg_pool2d(large, 2)
    assert (small - means).abs().mean() < 0.01  # the same picture, nothing is shifted


@pytest.mark.slow
def test_quarter_of_a_super_resolution_network_is_as_good_as_the_whole_without_training(tmp_path: Path) -> None:
    run_python(EXAMPLES / "photo_super_resolution.py", "--out", str(tmp_path), cwd=tmp_path, timeout=1800)
    psnr = {name: row["PSNR"] for name, row in rows(tmp_path / "psnr.json", "network").items()}
    assert psnr["bicubic"] + 0.4 < psnr["dense"]
    assert psnr["uniform, weights as they were"] < psnr["dense"] - 0.2
    assert psnr["best of 50, repaired"] > psnr["dense"] - 0.1
