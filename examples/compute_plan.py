"""Which network, of which granularity, on how many tokens, for a budget of training FLOPs?

Plans with a published law, or with one fitted to runs of your own (a CSV with n_total, n_tokens, granularity, loss).
Prints the plan, the same rounded to a network that can be built, every granularity at this budget, and what the plan
saves against dense networks and against experts of standard size; writes tables and figures.

Run: python examples/compute_plan.py --flops 1e20
     python examples/compute_plan.py --n-active 1e9 --law moe16
     python examples/compute_plan.py --flops 1e18 --runs runs.csv
     python examples/compute_plan.py --fast   (fewer resampled fits)
"""

import argparse
import warnings
from pathlib import Path

from lightning_eff.moe import (
    ComputePlanner,
    FineGrainedMoELaw,
    FitResult,
    Plan,
    PlanTable,
    fit_scaling_law,
    load_law,
)
from lightning_eff.moe.scaling import ScalingLaw
from lightning_eff.moe.scaling.figures import frontier_figure, isoflops_figure, overhead_figure
from lightning_eff.reporting import Column, Table, save_figure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the resampled fits")
    parser.add_argument("--out", type=Path, default=Path("runs/compute_plan"), help="folder of results")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--flops", type=float, help="training budget (default 1e20)")
    asked.add_argument("--n-active", type=float, help="active parameters: tells the tokens they are the optimum for")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--law", default="moe64", help="moe64, moe16, dense, chinchilla2022 ..., or a JSON file")
    what.add_argument("--runs", type=Path, help="fit a law to these runs")
    parser.add_argument("--baseline", help="law to compare with; default: dense networks, for the published laws")
    parser.add_argument("--granularity", type=int, help="hold it; default: the best")
    return parser.parse_args()


def savings(planner: ComputePlanner, flops: float, baseline: ScalingLaw | None) -> Table:
    """How many times the FLOPs others need for the same loss."""
    rows = [] if baseline is None else [[baseline.source or "baseline", planner.savings(flops, baseline)]]
    if isinstance(planner.law, FineGrainedMoELaw):
        rows += [[f"experts of granularity {g}", planner.savings(flops, g)] for g in (1, 4, 16)]
    return Table(f"FLOPs for the loss of the best plan at {flops:.3g}", ["with", Column("times", ".2f")], rows)


def fit(runs: Path, out: Path, bootstrap: int, seed: int) -> FitResult:
    result = fit_scaling_law(runs, bootstrap=bootstrap, seed=seed)
    result.print()
    result.save(out / "fit.json")
    result.write(out)
    return result


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    result = fit(args.runs, args.out, 20 if args.fast else 200, args.seed) if args.runs else None
    # losses of other data than that of the law cannot be compared
    compared = args.baseline or ("dense" if not args.runs and args.law in ("moe16", "moe64") else None)
    baseline = load_law(compared) if compared else None
    planner = ComputePlanner(result.law if result else load_law(args.law))

    plan: Plan
    if args.n_active:
        plan = planner.tokens_for(args.n_active, args.granularity)
    else:
        plan = planner.optimal(args.flops or 1e20, args.granularity)
    built = planner.realise(plan)
    print(f"\nOptimum\n{plan}\n\nAs a network that can be built\n{built}\n")
    plans = PlanTable([plan, built], "Plan and network")
    plans.table().save(args.out / "plan.json")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the plan's warning said holds for what follows
        tables = {"granularities": planner.compare(plan.flops), "sizes": planner.table()}
        if result:
            low_high = planner.intervals(plan.flops, result.laws())
            rows = [[name, *ends] for name, ends in low_high.items()]
            Table("Resampled fits", ["", Column("10 %", ".4g"), Column("90 %", ".4g")], rows).print()
        for name, table in tables.items():
            print(table, end="\n\n")
            table.table().save(args.out / f"{name}.csv")
            table.table().save(args.out / f"{name}.md")
        if baseline or isinstance(planner.law, FineGrainedMoELaw):
            savings(planner, plan.flops, baseline).print()
        span = plan.flops / 1e3, plan.flops * 1e3
        laws = result.laws() if result else ()
        figures = {
            "frontier": frontier_figure(planner, *span, baseline=baseline, laws=laws, mark=plan),
            "isoflops": isoflops_figure(planner, [plan.flops / 100, plan.flops / 10, plan.flops, plan.flops * 10]),
        }
        if isinstance(planner.law, FineGrainedMoELaw):
            others = [1, 4] if baseline is None else [baseline, 1, 4]
            figures["overhead"] = overhead_figure(planner, *span, others)
    for name, figure in figures.items():
        print(save_figure(figure, args.out / f"{name}.png"))


if __name__ == "__main__":
    main()
