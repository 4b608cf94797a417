"""Every script and every YAML of the examples runs in a fast variant, in this process."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXAMPLES, REPOSITORY, own_setup, run_here

from lightning_eff import cli
from lightning_eff.data.fashion_mnist import DEBIAN

ADULT = Path(os.environ.get("LIGHTNING_EFF_DATA", ".")) / "dp_ntk" / "adult.data"
TEXT = str(REPOSITORY / "lightning_eff" / "moe" / "m*.py")
WEAK_RELEASE = (".*the signal of the release is below its noise",)
FEW_THRESHOLDS = ("thresholds of single exits are likely to over-fit",)
GLIMPSES = (*(f"{name}.png" for name in ("exploration", "steps", "coverage", "scales", "comparison")), "seeds.csv")


def rows(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Read a table written as JSON, by one of its columns."""
    return {row[key]: row for row in json.loads(path.read_text())}


def _configurations(out: Path) -> None:
    assert len(rows(out / "residual/repairs.json", "repair")) == 7
    tuned = rows(out / "residual/tuned.json", "network")
    assert tuned["uniform"]["MACs"] < 0.51 * tuned["dense"]["MACs"]


def _quarter(out: Path) -> None:
    found = rows(out / "psnr.json", "network")
    (kept,) = (row["MACs kept"] for name, row in found.items() if name.startswith("best of"))
    assert kept == pytest.approx(0.25, abs=0.03)


def _rates(out: Path) -> None:
    found = list(csv.DictReader((out / "grid.csv").read_text().splitlines()))
    assert len({row["epsilon"] for row in found}) == 1
    assert [int(row["active_coordinates"]) for row in found] == [4810, 548, 548, 121]


def _private(out: Path) -> None:
    found = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["setting"] for row in found] == ["dense", "row-0.5", "dense", "epoch-0.9"]
    assert len({row["epsilon prv"] for row in found}) == 1


def _no_step_in_the_loss(out: Path) -> None:
    lines = [line.split("|") for line in (out / "table.md").read_text().splitlines() if "|" in line]
    at_first = {line[1].strip(): line[3].strip() for line in lines}
    assert at_first["up-cycled"] == at_first["dense, going on"] != at_first["new experts"]


def _five_networks(out: Path) -> None:
    *networks, longer = rows(out / "table.json", "network").values()
    assert len({row["tokens, M"] for row in networks}) == 1
    assert longer["tokens, M"] > networks[0]["tokens, M"]
    assert [row["busiest over mean load"] is None for row in (*networks, longer)] == [True, True, False, False, True]


@dataclass(frozen=True)
class Fast:
    """How an example runs here, and what it must leave behind.

    Attributes:
        args: Of the command line, besides ``--fast`` for scripts.
        writes: Files below its folder of results.
        prints: Texts among what it prints.
        needs: A file or folder without which it cannot run.
        check: A further look at the folder.
        then: Further commands of a YAML's comment, each with its arguments.
        warns: Beginnings of the warnings that so little data brings.
    """

    args: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()
    needs: Path | None = None
    check: Callable[[Path], None] | None = None
    then: tuple[str, ...] = ()
    warns: tuple[str, ...] = ()


SCRIPTS = {
    "adult_private_table": Fast(
        writes=("synthetic.csv", "privacy.json", "not_private/columns.md"),
        prints=("epsilon = 1 at delta = 1e-05",),
        needs=ADULT,
        warns=WEAK_RELEASE,
    ),
    "breast_cancer_private_table": Fast(
        writes=("columns.md", "epsilon.md"), prints=("real records",), warns=WEAK_RELEASE
    ),
    "compute_plan": Fast(
        writes=("frontier.png", "overhead.png", "isoflops.png", "sizes.csv", "plan.json"),
        prints=("G = 16, 1,024 experts", "arXiv 2402.07871, dense     21.28"),
    ),
    "digits_adaglimpse": Fast(writes=(*GLIMPSES, "stopping.csv", "trajectories.jsonl")),
    "digits_column_values": Fast(
        writes=("values.png", "ranks.png", "cost_benefit.png", "convergence.png", "ranks.md"),
        prints=("256 coalitions evaluated", "What the columns are worth", "Rankings against the oracle"),
    ),
    "digits_private_audit": Fast(args=("--seed=1",), writes=("scores.png",), prints=("epsilon >=",)),
    "digits_private_rates": Fast(writes=("tension.png",), check=_rates),
    "digits_shapley": Fast(writes=("plan.json", "scores.png", "final.ckpt", "pruned.pt2"), prints=("fine-tuned",)),
    "fashion_adaglimpse": Fast(writes=tuple(f"reconstruction/{name}" for name in GLIMPSES), needs=DEBIAN),
    "fashion_early_exit": Fast(
        writes=("outputs.md", "budgets.md", "calibration.md", "time.md", "curves.png"),
        prints=("joint", "mixed", "disjoint"),
        needs=DEBIAN,
        warns=FEW_THRESHOLDS,
    ),
    "fashion_lenet_dirichlet": Fast(
        writes=("accuracy.json", "accuracy.md", "accuracy.png", "posterior.png"),
        needs=DEBIAN,
        warns=(".*the switches of all channels are equal",),
    ),
    "fashion_private_data": Fast(
        writes=("accuracy.md", "epsilon-10/loss.png", "epsilon-10/samples-00010.png", "epsilon-10/privacy.md"),
        prints=("Accuracy on real images",),
        needs=DEBIAN,
        warns=WEAK_RELEASE,
    ),
    "fashion_private_training": Fast(writes=("cnn_accuracy.png", "mlp_privacy.json"), needs=DEBIAN, check=_private),
    "fashion_random_channel": Fast(
        args=("--net=residual",),
        writes=tuple(f"residual/{name}" for name in ("criteria.md", "paired.md", "tuned.md", "criteria.png")),
        needs=DEBIAN,
        check=_configurations,
    ),
    "fashion_resnet18_shapley": Fast(writes=("plan.json", "course.md"), prints=("fine-tuned",), needs=DEBIAN),
    "fashion_surgery": Fast(
        writes=("accuracy.md", "plan.json", "small.pt2", "small.onnx"),
        prints=("the resumed network has the same weights", "small.onnx differs by"),
        needs=DEBIAN,
    ),
    "overview": Fast(writes=("overview.png",), needs=DEBIAN, warns=(*WEAK_RELEASE, ".*the switches of all channels")),
    "photo_super_resolution": Fast(writes=("psnr.md", "crops.png", "candidates.csv", "plan.json"), check=_quarter),
    "shakespeare_experts": Fast(
        args=("--text", TEXT),
        writes=("table.md", "curves.csv", "curves.png", "expert_loads.png", "expert_loads.csv"),
        check=_five_networks,
    ),
    "synthetic_lidar_lines": Fast(writes=("points.png", "completion.png", "test/errors.md")),
    "text_upcycling": Fast(args=("--text", TEXT), writes=("curves.png",), check=_no_step_in_the_loss),
}


def _spent(out: Path) -> None:
    (path,) = out.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["lightning_eff.dp"]


def _half(out: Path) -> None:
    whole = json.loads((out / "layers.json").read_text())[-1]
    assert whole["MACs now"] == pytest.approx(0.5 * whole["MACs"], rel=0.1)


def _thresholds(out: Path) -> None:
    told = json.loads((out / "val/thresholds.json").read_text())["thresholds"]
    held = torch.load(out / "calibrated.ckpt", weights_only=True)["state_dict"]["network.score_thresholds"].tolist()
    assert [math.inf if one is None else one for one in told] == pytest.approx(held)


CALLBACK = "--trainer.callbacks.init_args."
TWO_EPOCHS = ("--trainer.max_epochs=2", "--trainer.limit_val_batches=1")
SHORT = (*TWO_EPOCHS, "--trainer.limit_train_batches=2")
PRUNED = ("plan.json", "scores.png", "layers.csv", "course.md", "pruned.ckpt")
SMALL_TEXT = (f"--data.path={TEXT}", "--data.batch_size=4", "--trainer.limit_val_batches=1")
CONFIGS = {
    "dirichlet": Fast(
        args=(*TWO_EPOCHS, f"{CALLBACK}schedule.start=1", f"{CALLBACK}switches.epochs=1"),
        writes=PRUNED,
        prints=("fine-tuned", "test/accuracy"),
        check=_half,
        then=("test --ckpt_path runs/dirichlet/pruned.ckpt",),
    ),
    "early_exit": Fast(
        args=SHORT, writes=("val/curve.json", "val/history.png"), check=_thresholds, warns=FEW_THRESHOLDS
    ),
    "glimpse": Fast(
        args=(
            *SHORT,
            "--trainer.check_val_every_n_epoch=1",
            "--model.plan.pretrain_epochs=1",
            "--model.plan.rl_only_epochs=1",
            "--model.agent.replay.batch_size=16",
            "--model.agent.replay.random_steps=2",
            "--model.agent.replay.updates_per_step=1",
            "--data.batch_size=8",
            "--data.train_size=16",
        ),
        writes=("exploration-000.png", "exploration.gif", "policies.md"),
        then=("test --ckpt_path runs/glimpse/last.ckpt --trainer.limit_test_batches=1 --data.batch_size=8",),
    ),
    "lidar": Fast(
        args=(
            "--data.train_size=2",
            "--data.batch_size=1",
            "--data.scale=16",
            "--model.estimation.budget=120",
            "--trainer.limit_val_batches=0",
        ),
        writes=("elevation.png", "lines.json", "test/errors.md"),
        then=("test --ckpt_path runs/lidar/last.ckpt --data.scale=16 --data.test_size=1",),
    ),
    "moe": Fast(
        args=(*SMALL_TEXT, "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
        writes=("last.ckpt",),
        then=(
            f"fit {SMALL_TEXT[0]} {SMALL_TEXT[1]} --trainer.max_steps=1 '--model.decoder={{\"moe\": null}}'"
            " --trainer.callbacks=null",
            f"fit {' '.join(SMALL_TEXT)} --trainer.max_steps=3 --ckpt_path runs/moe/last.ckpt",
        ),
    ),
    "moe_replace": Fast(
        args=(*SHORT, "--data.batch_size=16"),
        writes=("last.ckpt", "expert_loads.png"),
        prints=("test/accuracy",),
        needs=DEBIAN,
        then=("test --ckpt_path runs/moe_replace/last.ckpt --trainer.limit_test_batches=1",),
    ),
    "moe_sweep": Fast(
        args=(f"--data.path={TEXT}", "--trainer.max_steps=2", "--seed_everything=0")
    ),  # tests/moe/test_sweep.py runs a sweep
    "private_data": Fast(
        args=("--trainer.max_epochs=1", "--model.init_args.steps_per_epoch=3"), writes=("loss.png", "samples-00003.png")
    ),
    "private_training": Fast(args=("--trainer.max_steps=3", "--trainer.limit_val_batches=1"), check=_spent),
    "quickstart": Fast(
        args=(
            *TWO_EPOCHS,
            f"{CALLBACK}schedule.start=1",
            f"{CALLBACK}calibration.samples=64",
            f"{CALLBACK}estimator={{class_path: PermutationShapley, init_args: {{walks: 2, depth: matched}}}}",
        ),
        writes=PRUNED,
        prints=("fine-tuned", "test/accuracy"),
        check=_half,
        then=("test --ckpt_path runs/quickstart/pruned.ckpt",),
    ),
    "random_channel": Fast(
        args=(
            *TWO_EPOCHS,
            f"{CALLBACK}schedule.start=1",
            f"{CALLBACK}search.candidates=5",
            f"{CALLBACK}search.top_k=2",
        ),
        writes=(*PRUNED, "candidates.csv"),
        prints=("fine-tuned", "test/accuracy"),
        check=_half,
        then=("test --ckpt_path runs/random_channel/pruned.ckpt",),
    ),
}


def stems(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))


def skip_unless_there(needed: Path | None) -> None:
    if needed is not None and not needed.exists():
        pytest.skip(f"needs {needed}")


@contextmanager
def let_pass(warned: tuple[str, ...]) -> Iterator[None]:
    with warnings.catch_warnings():
        for text in warned:
            warnings.filterwarnings("ignore", message=text)
        yield


def look(fast: Fast, out: Path, printed: str) -> None:
    """Fail where a file is missing or empty, or a text was not printed."""
    for name in fast.writes:
        assert (out / name).stat().st_size > 0, name
    for text in fast.prints:
        assert text in printed
    if fast.check:
        fast.check(out)


def scripts() -> list[Any]:
    """Names of all scripts; those that are not quick even when fast are marked slow."""
    slow = ("fashion_resnet18_shapley", "overview")
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in stems(EXAMPLES, ".py")]


@pytest.mark.parametrize("name", scripts())
def test_script_runs_in_its_fast_variant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in SCRIPTS, f"tell in SCRIPTS how examples/{name}.py runs here and what it writes"
    fast = SCRIPTS[name]
    skip_unless_there(fast.needs)
    monkeypatch.chdir(tmp_path)
    with let_pass(fast.warns):
        run_here(EXAMPLES / f"{name}.py", "--fast", *fast.args)
    look(fast, tmp_path / "runs" / name, capsys.readouterr().out)


@pytest.mark.parametrize("name", stems(EXAMPLES / "configs", ".yaml"))
def test_yaml_runs_in_a_fast_variant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in CONFIGS, f"tell in CONFIGS how examples/configs/{name}.yaml runs here and what it writes"
    fast = CONFIGS[name]
    skip_unless_there(fast.needs)
    monkeypatch.chdir(tmp_path)
    path = str(EXAMPLES / "configs" / f"{name}.yaml")
    for task, *args in (["fit", *fast.args], *map(shlex.split, fast.then)):
        with let_pass(fast.warns), own_setup("lightning-eff"):
            cli.main([task, "--config", path, "--trainer.enable_progress_bar=false", *args])
    look(fast, tmp_path / "runs" / name, capsys.readouterr().out)
