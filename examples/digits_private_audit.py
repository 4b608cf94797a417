"""An attack on the private step: how well can somebody tell whether one example took part?

The attacker knows the network, all other examples, and what every step released; he made the example (a canary) so that
its gradient lies where no other example has one. He adds up the released gradients along it and says "took part" above
a threshold. Theory knows his rates exactly: with k of T steps holding the canary, the score is normal around k with
standard deviation sigma sqrt(T). Too high a rate means too little noise, a bound that does not hold, or a draw that is
not the one that is accounted; too low a rate means noise that nobody asked for. From the measured rates follows a lower
bound of epsilon (Clopper-Pearson), which must stay below what the accountant says.

Leaves with status 1 where a rate is not where theory puts it or the bound passes the accountant. ``--fault`` breaks the
step on purpose, to see that the audit notices.

Run: python examples/digits_private_audit.py          (about two minutes on one core)
     python examples/digits_private_audit.py --fast   (20 trainings, which prove little)
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import beta, binom, norm
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.sampling import PoissonBatchSampler
from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.stepping import PrivateStep
from lightning_eff.reporting import KEPT, REFERENCE, REMOVED, Column, Table, new_figure, progress, save_figure

OTHERS = 60  # digits beside the canary
CLIP = 0.7
DELTA = 1e-5
FAULTS = ("none", "little-noise", "loose-clipping", "always-drawn")


@dataclass(frozen=True)
class Setting:
    """How the canary is trained on."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    drop_rate: float

    def rates(self, threshold: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positive rate of a threshold on the score."""
        taken = np.arange(self.steps + 1)
        deviation = self.noise_multiplier * math.sqrt(self.steps)
        above = norm.sf((np.asarray(threshold)[..., None] - taken) / deviation)
        return above @ binom.pmf(taken, self.steps, self.sample_rate), above[..., 0]

    def threshold(self, trials: int) -> float:
        """The threshold that promises the largest lower bound, chosen before anything is measured."""
        candidates = np.linspace(-1, self.steps + 3 * self.noise_multiplier * math.sqrt(self.steps), 400)
        bounds = [
            lower_bound(trials * hit, trials * alarm, trials)
            for hit, alarm in zip(*self.rates(candidates), strict=True)
        ]
        return float(candidates[int(np.argmax(bounds))])


SETTINGS = (Setting(1.0, 1.0, 1, 0.0), Setting(2.0, 1.0, 4, 0.5), Setting(0.8, 0.5, 4, 0.5))


class Attack:
    """The private step of a small network on digits and a canary: an input that only the canary has."""

    def __init__(self, setting: Setting, fault: str, noise_seed: int | None) -> None:
        self.setting, self.fault = setting, fault
        self.seeds = None if noise_seed is None else itertools.count(1_000_000 * noise_seed)
        images, labels = load_digits(return_X_y=True)
        self.inputs = torch.zeros(OTHERS + 1, 65)
        self.inputs[:OTHERS, :64] = torch.as_tensor(images[:OTHERS], dtype=torch.float32) / 16
        self.inputs[OTHERS, 64] = 1000.0  # against this its other gradients are nothing
        self.labels = torch.as_tensor(labels[: OTHERS + 1])
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(65, 16), nn.Tanh(), nn.Linear(16, 10))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            self.model[0].weight[:, 64] = 0
        loss = nn.functional.cross_entropy(self.model(self.inputs[OTHERS:]), self.labels[OTHERS:])
        (gradient,) = torch.autograd.grad(loss, [self.model[0].weight])
        self.direction = gradient[:, 64]

    def score(self, takes_part: bool) -> float:
        """Train once with secret noise and return what was released along the canary, in units of C."""
        setting, total = self.setting, 0.0
        streams = SecretStreams() if self.seeds is None else SecretStreams.from_seed(next(self.seeds))
        loose = 3.0 if self.fault == "loose-clipping" else 1.0
        noise = setting.noise_multiplier * (0.5 if self.fault == "little-noise" else 1.0)
        parameters = dict(self.model.named_parameters())
        # what is selected is public, so the attacker knows it as well
        plan = SelectionPlan(drop_rate=setting.drop_rate, granularity="row" if setting.drop_rate else "element")
        step = PrivateStep(self.model, parameters, plan, streams, max_grad_norm=CLIP * loose, total_steps=setting.steps)
        sampler = PoissonBatchSampler(OTHERS + 1, setting.sample_rate, setting.steps, streams=streams)
        expected = (OTHERS + 1) * setting.sample_rate
        for t in range(setting.steps):
            step.begin(t, 0)
            drawn = [i for i in sampler.draw(t) if i != OTHERS or takes_part]
            if self.fault == "always-drawn" and takes_part and OTHERS not in drawn:
                drawn.append(OTHERS)
            if drawn:
                self._collect(step, drawn)
            step.release(step.add_up(), noise / loose, expected, t)
            released = self.model[0].weight.grad[:, 64] * expected / CLIP
            direction = self.direction * step.selections["0.weight"].full_mask()[:, 64]
            total += float(released @ direction / direction.norm())
            self.model.zero_grad()
        return total

    def _collect(self, step: PrivateStep, drawn: list[int]) -> None:
        with step.record(len(drawn)):
            loss = nn.functional.cross_entropy(self.model(self.inputs[drawn]), self.labels[drawn])
        (len(drawn) * loss).backward()
        step.collect()


def interval(hits: float, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits >= trials else float(beta.isf(tail, hits + 1, trials - hits))
    return low, high


def lower_bound(hits: float, alarms: float, trials: int) -> float:
    """Epsilon that the rates prove with 95% confidence: ``TPR <= exp(epsilon) FPR + delta`` would fail below it."""
    hit, alarm = interval(hits, trials, 0.95)[0], interval(alarms, trials, 0.95)[1]
    return max(0.0, math.log((hit - DELTA) / alarm)) if hit > DELTA else 0.0


def audit(setting: Setting, trials: int, fault: str, seed: int | None) -> tuple[list[object], bool, dict[bool, Tensor]]:
    """Attack ``trials`` trainings with the canary and as many without; tell whether theory holds."""
    attack, threshold = Attack(setting, fault, seed), setting.threshold(trials)
    scores = {True: torch.zeros(trials), False: torch.zeros(trials)}
    with progress(
        f"sigma {setting.noise_multiplier:g}, q {setting.sample_rate:g}", 2 * trials, unit="trainings"
    ) as bar:
        for i in range(trials):
            for takes_part, found in scores.items():
                found[i] = attack.score(takes_part)
            bar.advance(2)
    hits, alarms = (int((found > threshold).sum()) for found in scores.values())
    theory = [float(rate) for rate in setting.rates(threshold)]
    ledger = PrivacyLedger(DELTA)
    ledger.record(setting.noise_multiplier, setting.sample_rate, setting.steps)
    bound, epsilon = lower_bound(hits, alarms, trials), ledger.epsilon()
    # of a thousand sound audits about six would fail
    inside = [
        low <= rate <= high
        for rate, (low, high) in zip(theory, (interval(n, trials, 0.999) for n in (hits, alarms)), strict=True)
    ]
    sound = all(inside) and bound <= epsilon
    row = [setting.noise_multiplier, setting.sample_rate, setting.steps, setting.drop_rate, theory[0], hits / trials]
    return [*row, theory[1], alarms / trials, bound, epsilon, "yes" if sound else "NO"], sound, scores


def draw(found: list[tuple[Setting, dict[bool, Tensor]]], path: Path) -> None:
    """Histograms of the scores and the densities that theory promises."""
    figure, axes = new_figure(1, len(found), width=4.4 * len(found))
    for axis, (setting, scores) in zip(axes[0], found, strict=True):
        deviation = setting.noise_multiplier * math.sqrt(setting.steps)
        grid = np.linspace(-4 * deviation, setting.steps + 4 * deviation, 300)
        taken = np.arange(setting.steps + 1)
        weights = binom.pmf(taken, setting.steps, setting.sample_rate)
        densities = {False: norm.pdf(grid / deviation) / deviation}
        densities[True] = norm.pdf((grid[:, None] - taken) / deviation) @ weights / deviation
        for takes_part, colour, label in ((False, KEPT, "canary left out"), (True, REMOVED, "canary took part")):
            axis.hist(scores[takes_part].numpy(), bins=30, density=True, color=colour, alpha=0.4, label=label)
            axis.plot(grid, densities[takes_part], color=colour)
        axis.axvline(setting.threshold(len(scores[True])), color=REFERENCE, linestyle="--", label="threshold")
        steps = "1 step" if setting.steps == 1 else f"{setting.steps} steps"
        axis.set_title(f"sigma {setting.noise_multiplier:g}, q {setting.sample_rate:g}, {steps}")
        axis.set_xlabel("released along the canary / C")
    axes[0, 0].set_ylabel("density (lines: theory)")
    axes[0, 0].legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, help="of the noise, to repeat a run; default: secret noise, as in training")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_private_audit"), help="folder of results")
    parser.add_argument("--trials", type=int, help="trainings with the canary, and as many without (default 1000)")
    parser.add_argument("--fault", choices=FAULTS, default="none", help="break the private step on purpose")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trials = args.trials or (20 if args.fast else 1000)

    rows, found, sound = [], [], True
    for setting in SETTINGS:
        row, holds, scores = audit(setting, trials, args.fault, args.seed)
        rows.append(row)
        found.append((setting, scores))
        sound = sound and holds
    draw(found, args.out / "scores.png")
    table = Table(
        f"Attack on one example, {trials} trainings with it and {trials} without",
        [
            Column("sigma", "g"),
            Column("q", "g"),
            Column("steps", "d"),
            Column("drop rate", "g"),
            Column("TPR in theory", ".3f"),
            Column("TPR", ".3f"),
            Column("FPR in theory", ".3f"),
            Column("FPR", ".3f"),
            Column("epsilon >=", ".2f"),
            Column("epsilon", ".2f"),
            "holds",
        ],
        rows,
        caption=f"delta {DELTA:g}; rates must lie within 99.9% of theory, the lower bound (95%) below epsilon",
    )
    table.print()
    if not sound:
        sys.exit("the private step does not give what theory promises")


if __name__ == "__main__":
    main()
