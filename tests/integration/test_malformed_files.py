"""Files that were cut off, edited or written by another program: each is read as something valid or clearly refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import FAST, damaged, mutated, only_value_errors, refused, rewritten, same
from torch import nn

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.early_exit.attaching.costs import ExitCosts
from lightning_eff.early_exit.calibration.calibrate import Calibration
from lightning_eff.early_exit.evaluation.curve import CurveResult
from lightning_eff.early_exit.inference.export import export_early_exit
from lightning_eff.early_exit.inference.exported import load_early_exit
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.lidar.evaluation import LineEvaluation
from lightning_eff.lidar.hyperparameters import load_weights
from lightning_eff.lidar.journal import ValueJournal
from lightning_eff.lidar.report import LineSelection
from lightning_eff.moe.scaling.fitting import fit_scaling_law
from lightning_eff.moe.scaling.laws import ChinchillaLaw, law_from_dict, load_law
from lightning_eff.moe.scaling.result import FitResult
from lightning_eff.moe.scaling.runs import append_run, read_runs, run_names
from lightning_eff.moe.sweep.points import SWEEP_FILE, read_rows
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.dirichlet.memory import SwitchMemory
from lightning_eff.pruning.memory import ScoreMemory
from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates
from lightning_eff.pruning.random_channel.journal import Journal
from lightning_eff.pruning.record import Record
from lightning_eff.pruning.report import Scores, Stage
from lightning_eff.shapley import CachedGame, PermutationShapley, ShapleyResult
from lightning_eff.shapley.games import TableGame
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan, load_pruned, save_pruned
from lightning_eff.surgery.graph import groups_from_dict
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

# a small game has no variance, an edited one no error bars
pytestmark = pytest.mark.filterwarnings("ignore::lightning_eff.shapley.ShapleyWarning")


def network() -> nn.Module:
    """Two prunable layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


GRAPH = ChannelGraph.from_model(network(), torch.zeros(2, 3))
GAME = [0.0, 0.1, 0.3, 0.2, 0.9, 0.4, 0.8, 1.0]
PLAN = PruningPlan({"0": [0, 2, 5], "2": [1, 3]}, GRAPH.sizes, {"settings": {"amount": 0.5}})


def ledger() -> PrivacyLedger:
    made = PrivacyLedger(1e-4, max_epsilon=20.0, accountant="rdp")
    made.record(1.5, 0.1, 10, label="training")
    made.record(4.0, 1.0, 1, label="release")
    made.assumptions.append("examples are drawn at random")
    return made


def law() -> ChinchillaLaw:
    return ChinchillaLaw(a=400.0, alpha=0.3, b=400.0, beta=0.3, c=1.7, fitted_flops=(1e17, 1e19))


def runs() -> dict[str, Any]:
    sizes, tokens = np.meshgrid([1e6, 3e6, 1e7], [1e7, 3e7, 1e8])
    n, d = sizes.ravel(), tokens.ravel()
    return {
        "run_name": [f"r{i}" for i in range(9)],
        "n_total": n,
        "n_tokens": d,
        "granularity": n * 0 + 1,
        "loss": law()(n, d),
    }


@cache
def fit() -> FitResult:
    found = fit_scaling_law(runs(), "chinchilla", bootstrap=2, holdout=0.0)
    assert isinstance(found, FitResult)
    return found


def schema() -> TableSchema:
    age = NumericColumn("age", 17, 90, bins=[30, 50.5], integer=True, missing=True)
    return TableSchema(
        [age, NumericColumn("gain", 0, 1e5, "unit", transform="log1p"), CategoricalColumn("sex", ["Male", "Female"])],
        label="income",
        label_categories=["<=50K", ">50K"],
        unknown="missing",
    )


def selection() -> LineSelection:
    return LineSelection(
        num_lines=5,
        lines=[0, 1, 2, 4],
        values=torch.tensor([300.0, 100.0, float("nan"), -5.0], dtype=torch.float64),
        se=torch.tensor([10.0, 3.0, float("inf"), 1.0], dtype=torch.float64),
        selected={2: [0, 1]},
        rules={2: "region"},
        scores={2: {"region": 1.5}},
        per_frame={"b": torch.zeros(4, dtype=torch.float64), 7: torch.zeros(4, dtype=torch.float64)},
        pixels=torch.tensor([9, 8, 7, 0, 6]),
        error_empty=2000.0,
        error_full=1434.0,
        settings={"metric": "rmse", "seed": 3},
        baselines={"uniform": {2: [0, 4]}},
        elevations=[2.0, 1.0, 0.0, -1.0, -2.0],
    )


@cache
def result() -> ShapleyResult:
    made: ShapleyResult = PermutationShapley(walks=4).estimate(TableGame(GAME), generator=0)
    return made


def trajectory() -> Trajectory:
    config = GlimpseConfig(image_size=32, num_glimpses=2, patch_size=4)
    views = torch.tensor([[0.0, 0.0, 8.0], [4.0, 8.0, 16.0]]).repeat(2, 1, 1)
    return Trajectory(config, torch.zeros(2, 2, 3), views, torch.tensor([2, 1]))


def candidate(number: int = 0) -> Candidate:
    return Candidate(number, {"0": 3, "2": 2}, 100, 50, 0.5, 0.25, 0.1)


def plain(state: Any) -> Any:
    """As JSON reads it back."""
    return json.loads(json.dumps(state))


def _record(folder: Path) -> dict[str, Any]:
    record = Record(Dense(GRAPH.sizes, 100, 50), [Stage("dense", 0, 1.5, 100, 50, 0.1)], notes=["a note"])
    record.keep({"0": Scores(torch.arange(6.0).double())}, PLAN)
    return record.to_dict()


@dataclass
class Document:
    """Plain Python or a text file that something is read from.

    Args:
        make: ``folder -> document``, valid: a path or plain Python.
        load: ``document -> what it holds``.
        use: does what is done with it.
    """

    make: Callable[[Path], Any]
    load: Callable[[Any], Any]
    use: Callable[[Any], Any] = lambda loaded: loaded


def saved(thing: Any, name: str) -> Callable[[Path], Path]:
    """``folder -> path`` for things with ``save``."""

    def make(folder: Path) -> Path:
        thing().save(folder / name)
        return folder / name

    return make


def _runs_file(folder: Path) -> Path:
    for i in range(9):
        append_run(folder / "runs.csv", {name: column[i] for name, column in runs().items()})
    return folder / "runs.csv"


def _sweep_table(folder: Path) -> Path:
    (folder / SWEEP_FILE).write_text("run_name,n_total,steps\na,100,3\nb,200,4\n")
    return folder / SWEEP_FILE


HEADER = {"model": "abc", "metric": "mae", "lines": [0, 1, 2]}


def _line_journal(folder: Path) -> Path:
    journal = ValueJournal(folder / "values.jsonl", HEADER)
    journal.write("frame 0", "0123", ["60", "e0"], [1.5, 0.5])
    return folder / "values.jsonl"


def _search_journal(folder: Path) -> Path:
    journal = Journal(folder / "candidates.csv", "f", ["0", "2"])
    for number in range(3):
        journal.add(candidate(number))
    return folder / "candidates.csv"


def _fingerprint(folder: Path) -> Path:
    _search_journal(folder)
    return folder / "candidates.fingerprint.json"


def _read_search_journal(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(.|\n)* is of another search")
        return Journal(path.parent / "candidates.csv", "f", ["0", "2"]).known


def _score_memory(folder: Path) -> Path:
    ScoreMemory(folder, 0, "f")("0", lambda: Scores(torch.arange(3.0)))
    return folder / "scores" / "step0-0.json"


def _coalition_file(folder: Path) -> Path:
    game = CachedGame(TableGame(GAME), "f")
    game(torch.tensor([[True, False, True], [True, True, True]]))
    game.export_official(folder / "values.txt", "flags")
    return folder / "values.txt"


def _cached() -> CachedGame:
    return CachedGame(TableGame(GAME), "f")


def _import_official(path: Path) -> CachedGame:
    game = _cached()
    why = refused(lambda: game.import_official(path))
    assert why is None or len(game) == 0
    return game


def _take_ledger(state: Any) -> PrivacyLedger:
    mine = PrivacyLedger(1e-5)
    mine.record(2.0, 0.5, 3)
    before = mine.state_dict()
    why = refused(lambda: mine.load_state_dict(state))
    assert why is None or mine.state_dict() == before
    return mine


def _spend(taken: PrivacyLedger) -> None:
    assert taken.epsilon() >= 0
    PrivacyLedger().load_state_dict(taken.state_dict())
    taken.to_markdown()


def _use_schema(read: TableSchema) -> None:
    x = torch.zeros(2, read.width)
    y = None if read.label is None else torch.zeros(2, dtype=torch.int64)
    rows = read.decode(x, y, seed=0)
    read.encode(rows)
    assert TableSchema.from_dict(read.to_dict()) == read


def _use_result(read: ShapleyResult) -> None:
    assert repr(ShapleyResult.from_dict(plain(read.to_dict())).to_dict()) == repr(read.to_dict())
    PermutationShapley(walks=6).estimate(TableGame(GAME), resume=read)


def _use_selection(read: LineSelection) -> None:
    str(read.table())
    assert plain(read.to_dict()).keys() == read.to_dict().keys()


def _use_fit(read: FitResult) -> None:
    str(read.table())
    read.law(1e7, 1e8)


def _use_plan(read: PruningPlan) -> None:
    with suppress(KeyError):  # documented: a group that the model does not have
        read.config(GRAPH)
    assert PruningPlan.from_dict(plain(read.to_dict())).to_dict() == read.to_dict()


CONFIG = GlimpseConfig(image_size=32, num_glimpses=2, patch_size=4)
CURVE: dict[str, Any] = {
    "schema": 1,
    "policy": "confidence",
    "thresholds": [0.1, 0.9],
    "accuracy": [0.5, 0.9],
    "cost": [0.4, 1.0],
    "costs": [0.4, 1.0],
    "head_accuracy": [0.5, 0.9],
    "exit_rate": [[1.0, 0.0], [0.1, 0.9]],
    "exit_right": [[0.5, 0.0], [0.1, 0.8]],
    "oracle_accuracy": 0.95,
    "overthinking": 0.05,
}

FILES: dict[str, Document] = {
    "plan": Document(saved(lambda: PLAN, "plan.json"), PruningPlan.load, _use_plan),
    "ledger": Document(saved(ledger, "privacy.json"), PrivacyLedger.load, _spend),
    "law": Document(saved(law, "law.json"), load_law, lambda read: read(1e7, 1e8)),
    "fit": Document(saved(fit, "fit.json"), FitResult.load, _use_fit),
    "law of a fit": Document(saved(fit, "fit.json"), load_law, lambda read: read(1e7, 1e8)),
    "runs": Document(_runs_file, read_runs, lambda read: read.take(read.loss > read.loss.min()).duplicates),
    "rows of runs": Document(
        _runs_file, lambda path: (run_names(path), append_run(path, {"run_name": "z", "loss": 1}))
    ),
    "sweep": Document(_sweep_table, lambda path: read_rows(path.parent)),
    "schema": Document(saved(schema, "schema.yaml"), TableSchema.load, _use_schema),
    "lines": Document(saved(selection, "lines.json"), LineSelection.load, _use_selection),
    "values of lines": Document(
        _line_journal, lambda path: ValueJournal(path, HEADER), lambda read: read.doubted("0123")
    ),
    "candidates": Document(_search_journal, _read_search_journal),
    "fingerprint of candidates": Document(_fingerprint, _read_search_journal),
    "scores": Document(
        _score_memory, lambda path: ScoreMemory(path.parents[1], 0, "f")("0", lambda: Scores(torch.ones(3)))
    ),
    "Shapley values": Document(saved(result, "values.json"), ShapleyResult.load, _use_result),
    "official values": Document(_coalition_file, _import_official),
    "explorations": Document(
        saved(trajectory, "seen.jsonl"), lambda path: Trajectory.load(path, CONFIG), lambda read: read.records()
    ),
}


def _cut() -> nn.Module:
    model = network()
    apply_plan(model, PLAN, torch.zeros(2, 3))
    return model


def _pruned(folder: Path) -> Path:
    save_pruned(_cut(), folder / "pruned.ckpt")
    return folder / "pruned.ckpt"


def _load_pruned(path: Path) -> nn.Module:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    why = refused(lambda: _load(lambda: load_pruned(model, path)))
    assert why is None or same(dict(model.state_dict()), before)
    return model


def _load(load: Callable[[], Any]) -> None:
    with suppress(RuntimeError):  # torch's own, which names weights that are missing or of other shapes
        load()


def _weights(folder: Path) -> Path:
    torch.save({"state_dict": network().state_dict()}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


def _values(folder: Path) -> Path:
    game = _cached()
    game(torch.tensor([[True, False, True], [True, True, True]]))
    game.save(folder / "values.npz")
    return folder / "values.npz"


def _load_values(path: Path) -> CachedGame:
    game = _cached()
    why = refused(lambda: game.load(path))
    assert why is None or len(game) == 0
    return game


def _switches(folder: Path) -> Path:
    SwitchMemory(folder, 0, "f").keep({"theta": torch.ones(3)})
    return folder / "scores" / "step0-switches.pt"


@cache
def _exported() -> bytes:
    exits = MultiExitNetwork(network(), ["0"], 2, example_input=torch.zeros(2, 3), thresholds=0.75)
    with TemporaryDirectory() as folder:
        return export_early_exit(exits, Path(folder) / "exits.zip", torch.zeros(2, 3), mode="stages").read_bytes()


def _export(folder: Path) -> Path:
    return rewritten(folder / "exits.zip", _exported())


BINARY: dict[str, Document] = {
    "pruned checkpoint": Document(_pruned, _load_pruned),
    "weights": Document(_weights, lambda path: _load(lambda: load_weights(network(), path))),
    "values of coalitions": Document(_values, _load_values, lambda read: read(torch.ones(1, 3, dtype=torch.bool))),
    "switches": Document(_switches, lambda path: SwitchMemory(path.parents[1], 0, "f").stored()),
    "exported exits": Document(_export, load_early_exit),
}

# those that are one nested document
EDITED = ["plan", "ledger", "law", "fit", "schema", "lines", "scores", "Shapley values", "fingerprint of candidates"]

STATES: dict[str, Document] = {
    "plan": Document(lambda folder: PLAN.to_dict(), PruningPlan.from_dict, _use_plan),
    "ledger": Document(lambda folder: ledger().state_dict(), _take_ledger, _spend),
    "law": Document(lambda folder: law().to_dict(), law_from_dict, lambda read: read(1e7, 1e8)),
    "schema": Document(lambda folder: schema().to_dict(), TableSchema.from_dict, _use_schema),
    "lines": Document(lambda folder: selection().to_dict(), LineSelection.from_dict, _use_selection),
    "Shapley values": Document(lambda folder: result().to_dict(), ShapleyResult.from_dict, _use_result),
    "groups": Document(lambda folder: GRAPH.to_dict(), groups_from_dict),
    "scores": Document(lambda folder: Scores(torch.arange(3.0), torch.ones(3)).to_dict(), Scores.from_dict),
    "candidates": Document(
        lambda folder: Candidates(
            [candidate(0), candidate(1)], "max", {"0": 6, "2": 4}, 200, 90, {"ranked": 0.9}
        ).to_dict(),
        Candidates.from_dict,
        lambda read: (str(read.table()), read.best),
    ),
    "thresholds": Document(
        lambda folder: Calibration((0.5, float("inf")), 0.9, 0.5, True, (0.5, 0.0, 0.5), "lagrangian").to_dict(),
        Calibration.from_dict,
        lambda read: Calibration.from_dict(plain(read.to_dict())),
    ),
    "costs": Document(
        lambda folder: ExitCosts((1.0, 2.0, 3.0), (0.1, 0.1)).to_dict(),
        ExitCosts.from_dict,
        lambda read: read.fractions(),
    ),
    "curve": Document(lambda folder: CURVE, CurveResult.from_dict, lambda read: (read.auc(), str(read.budget_table()))),
    "record of pruning": Document(_record, Record.from_dict, lambda read: Record.from_dict(plain(read.to_dict()))),
    "evaluation of lines": Document(
        lambda folder: {
            "stage": "test",
            "rows": [{"rule": "all", "k": None, "lines": None, "errors": {"rmse": 1.0}}],
            "frames": 3,
        },
        LineEvaluation.from_dict,
        lambda read: read.to_dict(),
    ),
}


def fresh(folder: Path) -> Path:
    """A folder of an example's own."""
    made = folder / str(len(list(folder.iterdir())))
    made.mkdir()
    return made


@pytest.mark.parametrize("name", [*FILES, *BINARY])
def test_whole_file_is_read(name: str, tmp_path: Path) -> None:
    document = {**FILES, **BINARY}[name]
    document.use(document.load(document.make(tmp_path)))


@pytest.mark.parametrize("name", BINARY)
@settings(FAST, max_examples=6)
@given(data=st.data())
def test_damaged_archive_is_read_or_refused_with_a_reason(name: str, tmp_path: Path, data: st.DataObject) -> None:
    document = BINARY[name]
    path = document.make(fresh(tmp_path))
    content = data.draw(damaged(path.read_bytes()))
    only_value_errors(lambda: document.load(rewritten(path, content)), document.use)


@pytest.mark.parametrize("name", STATES)
def test_whole_state_is_taken(name: str, tmp_path: Path) -> None:
    STATES[name].use(STATES[name].load(plain(STATES[name].make(tmp_path))))


@pytest.mark.parametrize("name", FILES)
@FAST
@given(data=st.data())
def test_damaged_file_is_read_or_refused_with_a_reason(name: str, tmp_path: Path, data: st.DataObject) -> None:
    document = FILES[name]
    path = document.make(fresh(tmp_path))
    content = data.draw(damaged(path.read_bytes()))
    only_value_errors(lambda: document.load(rewritten(path, content)), document.use)


@pytest.mark.parametrize("name", EDITED)
@FAST
@given(data=st.data())
def test_edited_file_is_read_or_refused_with_a_reason(name: str, tmp_path: Path, data: st.DataObject) -> None:
    document = FILES[name]
    path = document.make(fresh(tmp_path))
    text = path.read_text()
    write = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
    wrong = data.draw(mutated(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)))
    only_value_errors(lambda: document.load(rewritten(path, write(wrong).encode())), document.use)


@pytest.mark.parametrize("name", STATES)
@FAST
@given(data=st.data())
def test_edited_state_is_taken_or_refused_with_a_reason(name: str, data: st.DataObject) -> None:
    document = STATES[name]
    wrong = data.draw(mutated(document.make(Path())))
    only_value_errors(lambda: document.load(wrong), document.use)
