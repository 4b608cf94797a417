"""Every report of the package: text, Markdown, and the files that it promises and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.early_exit import MultiExitNetwork
from lightning_eff.early_exit.analysis import (
    Dominance,
    DominanceHistory,
    Information,
    LayerInformation,
    LinearPath,
    LossPlane,
)
from lightning_eff.early_exit.evaluation.answers import Answers, ExitUse
from lightning_eff.early_exit.evaluation.curve import CurveResult
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ClassificationTask,
    ExplorationReport,
    GlimpseConfig,
    PolicyCurve,
    PolicyCurves,
)
from lightning_eff.lidar.evaluation import ALL, NONE, OPTIMUM, RANDOM, LineEvaluation, Row
from lightning_eff.lidar.report import LineSelection, Round
from lightning_eff.moe.load_history import LoadHistory
from lightning_eff.moe.scaling import ComputePlanner, FineGrainedMoELaw, FitResult, PlanTable, fit_scaling_law
from lightning_eff.privacy import IsolationReport
from lightning_eff.pruning import ComparisonReport, PruneReport, Scores, SearchResult
from lightning_eff.pruning.allocation import Dense
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.dirichlet.report import SwitchReport
from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates
from lightning_eff.pruning.random_channel.scratch import ScratchResult
from lightning_eff.pruning.report import Stage
from lightning_eff.reporting import Report
from lightning_eff.shapley import (
    ConvergenceCurve,
    CostBenefit,
    ExactShapley,
    OracleSets,
    PermutationShapley,
    RankReport,
    RankStability,
    ShapleyResult,
    TableGame,
    compare_ranks,
    convergence_curve,
    cost_benefit,
    oracle_sets,
    rank_stability,
)
from lightning_eff.surgery import ChannelGraph, Latency, Profile
from lightning_eff.synthesis.evaluation import Downstream, TableQuality, evaluate_table
from lightning_eff.synthesis.evaluation.nearest import NearestRecords
from lightning_eff.synthesis.report import PrivacyReport
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema

OUTPUTS = ("exit 0", "exit 1", "final")


def doubles(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prune_report() -> PruneReport:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = ChannelGraph.from_model(model, torch.zeros(2, 4))
    stages = [Stage("dense", 0, 0.91, 42, 51, 0.5), Stage("pruned, step 1", 0, 0.55, 21, 27, 0.4)]
    scores = {
        "0": (Scores(torch.rand(6, generator=torch.Generator().manual_seed(0)), torch.full((6,), 0.1)), [0, 2, 5])
    }
    return PruneReport("accuracy", "6 samples", Dense.of(graph), graph, stages, scores, {"0": 0.3}, ["A note."])


def tried() -> dict[str, Any]:
    ranked = [
        Candidate(i, {"a": 4 + i % 3, "b": 4 - i % 3}, 48 + i, 480 + i, 0.5 + 0.03 * (i * 7 % 10), 0.1, 0.2)
        for i in range(10)
    ]
    final = [Candidate(7, {"a": 5, "b": 3}, 55, 487, 0.83, 0.1, 0.4, "final")]
    dense = {"ranked": 0.9, "final": 0.95}
    return {
        "candidates": [*ranked, *final],
        "mode": "max",
        "sizes": {"a": 8, "b": 8},
        "macs": 100,
        "params": 1000,
        "dense_scores": dense,
    }


def comparison() -> ComparisonReport:
    generator = torch.Generator().manual_seed(0)
    luck = torch.randn(20, generator=generator, dtype=torch.float64) * 0.02
    noise = torch.randn(3, 20, generator=generator, dtype=torch.float64) * 0.002
    before, zeros = 0.8 + luck + doubles(0.0, 0.0, 0.01)[:, None] + noise, torch.zeros(3, 20)
    names, configs = ["random", "l1", "taylor"], torch.ones(20, 2, dtype=torch.int64)
    return ComparisonReport(names, before, None, zeros, [0.0] * 3, configs, "max", 0.9, zeros[0])


def switches() -> SwitchReport:
    posteriors = {
        "features.0": DirichletPosterior(torch.tensor([30.0, 2.0, 20.0, 1.0])),
        "features.3": DirichletPosterior(torch.tensor([1.0, 1.0, 0.5, 0.1, 0.1, 2.0])),
    }
    return SwitchReport(posteriors, {"features.0": [0, 2], "features.3": [0, 1, 5]})


def selection() -> LineSelection:
    return LineSelection(
        num_lines=8,
        lines=[0, 1, 2, 4, 5, 6],
        values=doubles(300, 100, 90, -5, 40, 41),
        se=doubles(10, 3, 4, 1, 0.1, 0.1),
        selected={3: [0, 2, 6], 1: [0]},
        rules={3: "region", 1: "none"},
        per_frame={"b": torch.arange(6.0).double(), 7: torch.ones(6, dtype=torch.float64)},
        pixels=torch.tensor([9, 8, 7, 0, 6, 5, 4, 0]),
        error_empty=2000.0,
        error_full=1434.0,
        settings={"metric": "rmse"},
        forwards=400,
        elevations=[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        rounds=[Round(200, 30.0), Round(400, 10.0, 0.5), Round(800, 7.0, 1.0)],
    )


def evaluation() -> LineEvaluation:
    errors = {"rmse": 1.0, "mae": 0.5, "irmse": 0.01, "imae": 0.005, "points": 900.0}
    levels = [("region", 800), ("gap_greedy", 850), (OPTIMUM, 700), (RANDOM, 1100)]
    rows = [
        Row(rule, k, None, {name: value * level * (1 + 4 / k) for name, value in errors.items()}, 90.0)
        for k in (2, 4, 8)
        for rule, level in levels
    ]
    ends = [
        Row(rule, None, None, {name: value * level for name, value in errors.items()})
        for rule, level in ((ALL, 600), (NONE, 4000))
    ]
    return LineEvaluation("test", [*rows, *ends], 12, skipped=1)


def privacy_report() -> PrivacyReport:
    event = {"noise_multiplier": 3.73, "sample_rate": 1.0, "steps": 1, "label": "release", "sensitivity": 2.0}
    facts = {"private": True, "epsilon": 1.0, "delta": 1e-5, "releases": 2, "release_in_use": 2}
    classes = [{"class": c, "records": 100.0 + c, "signal_to_noise": 1.5 * c, "remark": None} for c in range(3)]
    caveats, terms = ["noise_seed makes the noise known."], ["Names are public."]
    return PrivacyReport(facts, caveats, terms, ["Logs."], classes, [event, event])


def quality() -> TableQuality:
    def rows(seed: int) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        age = random.uniform(20, 80, 200)
        return {"age": age, "job": random.choice(["clerk", "cook"], 200), "rich": np.where(age > 55, "yes", "no")}

    columns = [NumericColumn("age", 0, 100, bins=10), CategoricalColumn("job", ["clerk", "cook"])]
    schema = TableSchema(columns, "rich", ["no", "yes"])
    return evaluate_table(schema, rows(0), rows(1), rows(2), classifiers=["gaussian_nb"], progress=False)


def nearest() -> NearestRecords:
    near = np.linspace(0, 0.3, 20)
    return NearestRecords(near, near + 0.01, near[::-1] / 2, 20)


def scores_of_classifiers() -> Downstream:
    scores = {score: [0.8, 0.9] for score in ("roc_auc", "average_precision", "f1", "accuracy")}
    return Downstream({source: {"gaussian_nb": dict(scores)} for source in ("synthetic", "real")})


def fit() -> FitResult:
    law, rows = FineGrainedMoELaw.paper(), {"n_total": [], "n_tokens": [], "granularity": [], "loss": []}
    noise = np.random.default_rng(0)
    for n_total in (1e8, 3e8, 1e9):
        for n_tokens in (1e10, 3e10):
            for granularity in (1, 4, 16):
                loss = float(law(n_total, n_tokens, granularity)) * (1 + 1e-3 * noise.standard_normal())
                for name, value in zip(rows, (n_total, n_tokens, granularity, loss), strict=True):
                    rows[name].append(value)
    return fit_scaling_law(rows, fixed={"c": 0.472}, bootstrap=0)


def loads() -> LoadHistory:
    history, generator = LoadHistory({"blocks.0": 4, "blocks.1": 4}), torch.Generator().manual_seed(0)
    for step in range(10, 110, 10):
        chosen = torch.randint(5, 60, (8,), generator=generator)
        chosen[6] = 0 if step > 50 else chosen[6]
        history.add(step, chosen, chosen - 2 * (chosen > 40).long())
    return history


def ledger() -> PrivacyLedger:
    found = PrivacyLedger(accountant="rdp", max_epsilon=3.0)
    found.record(1.0, 0.01, 100, label="training")
    found.caveats.append("Batches were shuffled.")
    found.assumptions.append("The loss is a mean.")
    return found


def curve() -> CurveResult:
    rates = [[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]
    right = [[0.6, 0.08, 0.0], [0.4, 0.27, 0.15], [0.1, 0.19, 0.62]]
    costs, alone = [0.3, 0.6, 1.0], [0.66, 0.85, 0.92]
    limits, accuracy, cost = [0.3, 0.6, 0.9], [0.68, 0.82, 0.91], [0.32, 0.58, 0.9]
    return CurveResult("max_prob", limits, accuracy, cost, costs, alone, rates, right, 0.95, 0.02)


def exit_use() -> ExitUse:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    network = MultiExitNetwork(backbone, ["0", "2"], 3).build(torch.zeros(2, 4))
    n = 40
    probability = torch.rand(3, n) * 0.6 + 0.4
    correct, target = torch.rand(3, n) < probability, torch.randint(3, (n,))
    where = torch.randint(3, (n,))
    prediction = torch.where(correct[0], target, (target + 1) % 3)
    images = {"images": torch.rand(6, 1, 8, 8), "exit_index": where[:6], "confidence": probability[0, :6]}
    images |= {"prediction": prediction[:6], "target": target[:6]}
    answers = Answers(where, probability[0], prediction, target, probability, correct, curve(), images)
    history = [{"exit 0": 0.3 + 0.1 * epoch, "final": 0.5 + 0.1 * epoch} for epoch in range(4)]
    return ExitUse(answers, network, history=history, phases=["backbone", "backbone", "all", "all"])


def dominance() -> DominanceHistory:
    history = [
        {"epoch": epoch, "step": 10 * epoch, "phase": epoch // 2, "train": "all", "groups": ["stage 1", "backbone"]}
        | {"outputs": list(OUTPUTS), "values": [[0.2, 0.3 + 0.1 * epoch, 0.5 - 0.1 * epoch], [0.1, -0.2, 1.1]]}
        for epoch in range(4)
    ]
    return DominanceHistory(history, "share")


def path() -> LinearPath:
    positions = torch.linspace(0, 1, 7, dtype=torch.float64)
    loss = 0.3 + doubles(1.0, 0.6, 0.2) * (positions * (1 - positions) * 4)[:, None]
    return LinearPath(positions, loss, 0.95 - loss / 3, OUTPUTS)


def plane() -> LossPlane:
    positions = torch.linspace(-1, 1, 9, dtype=torch.float64)
    bowl = 0.2 + positions[:, None] ** 2 + 2 * positions[None] ** 2
    loss = torch.stack([bowl, 2 * bowl, 5 * bowl], -1)
    return LossPlane(positions, loss, 1 / (1 + loss), OUTPUTS)


def information() -> LayerInformation:
    bounds = tuple(Information(3.0 - k, 3.6 - k, 0.1) for k in range(3))
    return LayerInformation(OUTPUTS, bounds, (0.4, 0.8, 1.0), 500)


def policies() -> PolicyCurves:
    glimpses = tuple(float(t) for t in range(1, 5))
    percent = tuple(6.25 * t for t in glimpses)
    told = {"random": (0.4, 0.5, 0.55, 0.6), "learned": (0.5, 0.7, 0.8, 0.85), "fixed_grid": (0.3, 0.45, 0.6, 0.7)}
    return PolicyCurves(
        [PolicyCurve(name, "accuracy", True, values, glimpses, percent, None, 1.9e6) for name, values in told.items()]
    )


def exploration() -> ExplorationReport:
    torch.manual_seed(0)
    config = GlimpseConfig(image_size=16, num_glimpses=2, patch_size=4)
    agent = AgentConfig(state_parts=("patch", "box"))
    backbone = CanvasBackbone(1, num_classes=3, widths=(2, 2, 4, 4))
    module = AdaGlimpseModule(backbone, ClassificationTask(3), config, agent)
    named = {"accuracy@1": 0.5, "accuracy@2": 0.7, "avg_glimpses": 2.0, "pixel_percent": 25.0}
    module.results["test"] = {"policy": named, "random": {**named, "accuracy@2": 0.6}}
    images, target = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
    seen = module.explore(images, predictions="all")
    return ExplorationReport(module, images, seen, target, seen)


GAME = TableGame(torch.tensor([bin(code).count("1") ** 0.5 + (code & 1) for code in range(16)], dtype=torch.float64))


def sampled(seed: int = 0) -> ShapleyResult:
    return PermutationShapley(6).estimate(GAME, generator=seed)


def ranks() -> RankReport:
    return compare_ranks({"exact": ExactShapley().estimate(GAME).rank(), "walks": sampled().rank()}, GAME)


class Promise(NamedTuple):
    """How a report is made, and the stems of what it writes."""

    make: Callable[[], Report]
    read: set[str]
    data: set[str] = set()
    figures: set[str] = set()


REPORTS = {
    PruneReport: Promise(prune_report, {"layers", "course"}, figures={"scores"}),
    SearchResult: Promise(lambda: SearchResult(**tried()), {"search"}, {"candidates"}, {"candidates", "ratios"}),
    ScratchResult: Promise(lambda: ScratchResult(**tried()), {"search"}, {"candidates"}, {"candidates", "ratios"}),
    ComparisonReport: Promise(comparison, {"criteria", "paired"}, {"scores"}, {"criteria"}),
    SwitchReport: Promise(switches, {"switches"}, figures={"posterior", "cut", "shares"}),
    LineSelection: Promise(selection, {"selection"}, {"values"}, {"values", "elevation", "frames", "convergence"}),
    LineEvaluation: Promise(evaluation, {"errors"}, figures={"errors"}),
    PrivacyReport: Promise(privacy_report, {"privacy", "releases", "classes", "terms"}),
    TableQuality: Promise(quality, {"classifiers", "columns", "nearest"}, figures={"marginals", "pairs", "nearest"}),
    Downstream: Promise(scores_of_classifiers, {"classifiers"}),
    NearestRecords: Promise(nearest, {"nearest"}, figures={"nearest"}),
    FitResult: Promise(fit, {"coefficients"}, figures={"fit", "granularity"}),
    PlanTable: Promise(lambda: ComputePlanner(FineGrainedMoELaw.paper()).compare(1e19), {"plans"}),
    LoadHistory: Promise(loads, {"expert_layers"}, {"expert_loads"}, {"expert_loads"}),
    PrivacyLedger: Promise(ledger, {"spent", "history", "terms"}),
    IsolationReport: Promise(lambda: IsolationReport((1.0, 2.0), (1.0, 1.0), 0.3, 1e-4), {"isolation"}),
    CurveResult: Promise(curve, {"budgets"}, {"points"}, {"curve"}),
    ExitUse: Promise(
        exit_use, {"outputs", "budgets"}, {"exits"}, {"curve", "exits", "reliability", "samples", "history"}
    ),
    Dominance: Promise(lambda: dominance().results[0], {"dominance"}),
    DominanceHistory: Promise(dominance, {"gradient_dominance"}, figures={"gradient_dominance"}),
    LinearPath: Promise(path, {"path"}, figures={"path"}),
    LossPlane: Promise(plane, {"plane"}, {"points"}, {"plane"}),
    LayerInformation: Promise(information, {"information"}, figures={"information"}),
    PolicyCurves: Promise(policies, {"policies"}, figures={"policies"}),
    ExplorationReport: Promise(
        exploration, {"policies"}, figures={"curves", "exploration", "steps", "coverage", "scales"}
    ),
    ShapleyResult: Promise(sampled, {"values"}, figures={"values"}),
    OracleSets: Promise(lambda: oracle_sets(GAME), {"oracle"}),
    RankReport: Promise(ranks, {"ranks"}, figures={"ranks"}),
    ConvergenceCurve: Promise(
        lambda: convergence_curve(GAME, PermutationShapley(), [10, 20, 40]), {"convergence"}, figures={"convergence"}
    ),
    CostBenefit: Promise(
        lambda: cost_benefit(GAME, {"walks": PermutationShapley()}, [10, 20, 40], 3),
        {"cost_benefit"},
        figures={"cost_benefit"},
    ),
    RankStability: Promise(lambda: rank_stability([sampled(seed) for seed in range(3)]), {"stability"}),
    Profile: Promise(lambda: Profile(1_000, 200, 800, Latency(1.0, 0.9, 1.2)), {"profile"}),
}


def titled(figure: Figure) -> bool:
    """Whether it says what it shows."""
    told = [axis.get_title(loc=loc) for axis in figure.axes for loc in ("left", "center")]
    return any(told) or bool(figure.get_suptitle())


@pytest.mark.parametrize("kind", REPORTS, ids=lambda kind: kind.__name__)
def test_a_report_gives_text_markdown_and_the_files_that_it_promises(
    kind: type[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, read, data, figures = REPORTS[kind]
    report = make()
    assert type(report) is kind
    drawn = report.figures()
    assert all(titled(figure) for figure in drawn.values())
    monkeypatch.setattr(kind, "figures", lambda self: drawn)  # once is enough
    written = report.write(tmp_path)
    promised = {f"{stem}.{suffix}" for stem in read for suffix in ("md", "csv", "json")}
    promised |= {f"{stem}.{suffix}" for stem in data for suffix in ("csv", "json")}
    promised |= {f"{stem}.png" for stem in figures}
    assert {one.name for one in written} == {one.name for one in tmp_path.iterdir()} == promised
    assert all(one.stat().st_size > (5_000 if one.suffix == ".png" else 0) for one in written)
    text, markdown = str(report), report.to_markdown()
    for stem, table in report.tables().items():
        assert (str(table) in text, table.to_markdown() in markdown) == (stem in read, stem in read)
    assert all(text.index(one) < text.index(str(report.table())) for one in report.preface())


def test_every_report_of_the_package_is_here() -> None:
    def below(one: type) -> set[type]:
        own = {one} if one.__module__.startswith("lightning_eff") else set()
        return own.union(*map(below, one.__subclasses__()))

    assert below(Report) - {Report, Candidates} == set(REPORTS)  # the base, and that of both searches
