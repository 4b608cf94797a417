"""Pictures of a search: scores against cost, what the best candidates keep, and criteria against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_eff.arguments import check_whole
from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates, Mode
from lightning_eff.reporting import HIGHLIGHT, KEPT, REFERENCE, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_eff.pruning.random_channel.comparison import ComparisonReport

_WORDS = {"ranked": "candidates", "final": "finalists"}
_SMALL = 8  # points, of legends
_MANY = 24  # layers; more have a name at every second, third ... line


def candidates_figure(found: Candidates) -> Figure:
    """Scores against multiply-adds of all candidates with their front; dense, uniform and best are marked.

    Candidates without score are left out, as is the network before where its score is not known. On the front lie the
    candidates that none beats at the same or a lower cost.
    """
    figure, axes = new_figure(width=6.4, height=4.2)
    axis = axes[0, 0]
    stages, colours = found.stages, (KEPT, *(c for c in SERIES[1:] if c != HIGHLIGHT))
    told = [c for c in found.candidates if not math.isnan(c.score)]
    for number, stage in enumerate(stages):
        of_stage = [c for c in told if c.stage == stage]
        last = number == len(stages) - 1 and number > 0
        axis.scatter(
            [100 * c.macs / found.macs for c in of_stage],
            [c.score for c in of_stage],
            s=34 if last else 18,
            color=colours[number % len(colours)],
            alpha=1.0 if last else 0.6,
            linewidths=0,
            marker="D" if last else "o",
            label=_stage_label(stage, len(of_stage), len(stages)),
            zorder=2 + number,
        )
    line = front([c for c in told if c.stage == stages[0]], found.mode)
    if len(line) > 1:
        style: dict[str, Any] = {"color": REFERENCE, "linewidth": 1, "zorder": 1.5, "label": "front"}
        axis.step([100 * c.macs / found.macs for c in line], [c.score for c in line], where="post", **style)
    uniform = next((c for c in told if c.number == 0 and c.stage == stages[0]), None)
    if uniform is not None:
        at = (100 * uniform.macs / found.macs, uniform.score)
        axis.scatter(*at, marker="s", s=48, facecolors="none", edgecolors="black", linewidths=1.6, label="uniform")
    best = found.best
    at = (100 * best.macs / found.macs, best.score)
    label = f"best: {best.score:.4g}"
    axis.scatter(*at, marker="*", s=150, color=HIGHLIGHT, edgecolors="black", linewidths=0.6, label=label, zorder=9)
    judged_alike = len(set(found.dense_scores.values())) < 2
    for number, stage in enumerate(stages):
        dense = found.dense_scores.get(stage, math.nan)
        if not math.isnan(dense) and not (judged_alike and number):
            label = f"dense{'' if judged_alike else f', as {_WORDS.get(stage, stage)}'}: {dense:.4g}"
            colour = "black" if judged_alike else colours[number % len(colours)]
            axis.axhline(dense, color=colour, linestyle="--", linewidth=1, label=label, zorder=1)
    axis.margins(x=0.06, y=0.08)
    axis.set_xlabel("multiply-adds, % of the whole network")
    axis.set_ylabel(found.score_name if found.mode == "max" else f"{found.score_name} (lower is better)")
    axis.set_title(f"{len(told)} candidates, the best with {at[0]:.0f} % of the multiply-adds")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=_SMALL)
    return figure


def front(candidates: Sequence[Candidate], mode: Mode) -> list[Candidate]:
    """Candidates that none beats at the same or a lower cost, by rising cost; those without score are left out."""
    sign = 1 if mode == "max" else -1
    line: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.macs, -sign * c.score)):
        if not math.isnan(candidate.score) and (not line or sign * candidate.score > sign * line[-1].score):
            line.append(candidate)
    return line


def ratio_figure(found: Candidates, count: int = 10) -> Figure:
    """Parallel coordinates: the part of its channels that each layer keeps, in the best candidates and the uniform one.

    Args:
        found: the candidates.
        count: how many of the best, >= 1; those of the first stage, where all were judged alike. The best one of all
            is marked.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    check_whole("count", count)
    first = found.stages[0]
    top = [c for c in found.top(count, first) if not math.isnan(c.score)]
    names = list(found.sizes)
    figure, axes = new_figure(width=max(5.0, min(12.0, 1.6 + 0.34 * len(names))), height=4.0)
    axis = axes[0, 0]

    def ratios(candidate: Candidate) -> list[float]:
        return [100 * candidate.config[name] / found.sizes[name] for name in names]

    scores = [c.score for c in top]
    best = max(scores) if found.mode == "max" else min(scores)
    colour = LinearSegmentedColormap.from_list("kept", ["#C6DBEF", KEPT])
    norm = Normalize(min(scores), max(scores)) if min(scores) < max(scores) else Normalize(best - 1, best + 1)
    if found.mode == "min":
        colour = colour.reversed()
    for place, candidate in reversed(list(enumerate(top))):
        axis.plot(names, ratios(candidate), color=colour(norm(candidate.score)), linewidth=1.1, zorder=3 - place / 100)
    axis.plot(
        names, ratios(found.best), color=HIGHLIGHT, linewidth=2.2, marker="o", markersize=4, label="best", zorder=4
    )
    uniform = next((c for c in found.candidates if c.number == 0 and c.stage == first), None)
    if uniform is not None and uniform.number != found.best.number:
        axis.plot(names, ratios(uniform), color="black", linewidth=1.2, linestyle="--", label="uniform", zorder=5)
    step = -(-len(names) // _MANY)
    shown = [_short(name) for name in names[::step]]
    long = max(map(len, shown)) > 4
    axis.set_xticks(range(0, len(names), step), shown, rotation=60 if long else 0, ha="right" if long else "center")
    for tick in axis.get_xticklabels():
        tick.set_rotation_mode("anchor")
    axis.set_xlabel("layer")
    axis.set_title("Channels that the best candidates keep")
    axis.set_xlim(-0.3, len(names) - 0.7)
    axis.set_ylim(0, 104)
    axis.set_ylabel("channels kept, %")
    if len(top) > 1:
        bar = figure.colorbar(ScalarMappable(norm, colour), ax=axis, pad=0.02)
        bar.set_label(f"{found.score_name}, best {len(top)}")
        bar.ax.tick_params(labelsize=_SMALL)
        bar.ax.ticklabel_format(axis="y", useOffset=False)
        bar.outline.set_visible(False)
    axis.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=_SMALL, ncols=2)
    return figure


def comparison_figure(report: ComparisonReport) -> Figure:
    """Scores of each criterion on the same configurations, and paired differences with their 95 % intervals.

    Differences are to ``random`` where it took part, else to the best criterion; after fine-tuning where there was one.
    """
    from lightning_eff.pruning.random_channel.comparison import CONTROL

    order = report.order
    reference = CONTROL if CONTROL in order else order[0]
    others = [name for name in order if name != reference]
    figure, axes = new_figure(1, 2, width=8.8, height=1.5 + 0.36 * len(order))
    scores, gains = axes[0]
    places = {name: place for place, name in enumerate(order)}
    rows = {name: report.scores[list(report.criteria).index(name), report.usable] for name in order}
    jitter = torch.linspace(-0.22, 0.22, len(next(iter(rows.values()))))
    jitter = jitter[torch.randperm(len(jitter), generator=torch.Generator().manual_seed(0))]
    for name, values in rows.items():
        heights = (places[name] + jitter).tolist()
        scores.scatter(values.tolist(), heights, s=10, color=KEPT, alpha=0.45, linewidths=0)
        middle = [float(values.mean())] * 2
        scores.plot(middle, [places[name] - 0.34, places[name] + 0.34], color="black", linewidth=1.8)
    if report.dense_score == report.dense_score:
        scores.axvline(report.dense_score, color=REFERENCE, linestyle="--", linewidth=1)
        style: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "color": REFERENCE, "fontsize": _SMALL}
        scores.annotate("dense", (report.dense_score, 1.01), ha="center", **style)
    scores.set_yticks(range(len(order)), order)
    scores.set_ylabel("criterion")
    figure.suptitle(f"Criteria on the same {int(report.usable.sum())} configurations")
    tuned = "" if report.after is None else " after fine-tuning"
    scores.set_xlabel(f"score{tuned}; points: configurations, bar: mean")
    for name in others:
        pair = report.difference(name, reference)
        colour = REFERENCE if pair.contains_zero else KEPT
        low, high = (min(max(end, -1e300), 1e300) for end in (pair.low, pair.high))
        gains.plot([low, high], [places[name]] * 2, color=colour, linewidth=2, solid_capstyle="butt")
        gains.scatter([pair.mean], [places[name]], s=30, color=colour, zorder=3)
    gains.axvline(0, color="black", linewidth=0.8)
    gains.annotate(reference, (0, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=_SMALL)
    gains.set_yticks(range(len(order)), [""] * len(order))
    gains.set_xlabel(f"mean difference to {reference}, 95 % interval")
    for axis in (scores, gains):
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.locator_params(axis="x", nbins=5)
    return figure


def _stage_label(stage: str, count: int, stages: int) -> str:
    word = _WORDS.get(stage, stage if stages > 1 else "candidates")
    return f"{word} ({count})"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"\N{HORIZONTAL ELLIPSIS}{name[-19:]}"
