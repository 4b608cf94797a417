"""Shapley values without a network: how much is each pixel column of scikit-learn's digits worth?

Players are the 8 columns, the value of a coalition is the accuracy of a logistic regression that sees no other
column. All 256 coalitions can be evaluated, so that estimators and rankings can be held against the truth. To use
it for a game of your own, replace `column_accuracy`.

Run: python examples/digits_column_values.py          (ten seconds)
     python examples/digits_column_values.py --fast   (fewer repetitions)
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lightning_eff import shapley
from lightning_eff.reporting import Column, Table, save_figure
from lightning_eff.shapley.diagnostics import convergence_curve, cost_benefit
from lightning_eff.shapley.figures import values_figure
from lightning_eff.shapley.interaction import shapley_interactions
from lightning_eff.shapley.oracle import compare_ranks, oracle_rank, oracle_sets

ESTIMATORS = {
    "permutation": shapley.PermutationShapley(antithetic=False),
    "antithetic permutation": shapley.PermutationShapley(),
    "leave-one-out": shapley.LeaveOneOut(),
    "regression": shapley.RegressionShapley(),
    "unbiased kernel": shapley.UnbiasedKernelShapley(),
    "stratified": shapley.StratifiedShapley(),
    "top 4": shapley.TopKShapley(k=4),
}


def column_accuracy(train: int = 300, test: int = 600) -> shapley.CachedGame:
    """The game: a function of coalitions (bool [M, 8], True = column seen), remembered once evaluated."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16

    def accuracy(seen: Tensor) -> float:
        if not seen.any():
            return 0.1  # a guess among ten digits
        pixels = images[:, :, seen.numpy()].reshape(len(images), -1)
        model = LogisticRegression(max_iter=500, tol=1e-2).fit(pixels[:train], labels[:train])
        return model.score(pixels[train : train + test], labels[train : train + test])

    names = [f"col {column}" for column in range(8)]
    game = shapley.as_game(lambda seen: torch.tensor([accuracy(row) for row in seen]), 8, names=names)
    return shapley.CachedGame(game, f"digits {train} {test}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the estimators")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_column_values"), help="folder of results")
    args = parser.parse_args()
    game = column_accuracy()
    numbers = [Column(name, ".3f") for name in game.names]

    results = {"exact": shapley.shapley_values(game, "exact")}
    for name, estimator in ESTIMATORS.items():
        results[name] = estimator.with_budget(80, 8).estimate(game, generator=args.seed)
    rows = [(name, result.n_evals, *result.values) for name, result in results.items()]
    values = Table("What the columns are worth", ["estimator", "evaluations", *numbers], rows)

    oracle = oracle_sets(game)
    ranks = compare_ranks(
        {
            "Oracle rank": oracle_rank(oracle),
            "greedy backward": oracle_rank(oracle, method="greedy"),
            "Shapley value": results["exact"].rank(),
            "leave-one-out": results["leave-one-out"].rank(),
            "random ranking": torch.randperm(8, generator=torch.Generator().manual_seed(args.seed)),
        },
        oracle,
    )
    rows = [(name, *row) for name, row in zip(game.names, shapley_interactions(game), strict=True)]
    pairs = Table("What pairs are worth beyond the sum of the two", ["column", *numbers], rows)
    benefit = cost_benefit(
        game, ESTIMATORS, [16, 24, 40, 80, 160, 240], 2 if args.fast else 20, exact=results["exact"].values
    )

    walks = results["antithetic permutation"]
    course = convergence_curve(game, shapley.PermutationShapley(), [16, 32, 64, 128, 256, 512])
    tables = {"values": values, "oracle": oracle.table(), "ranks": ranks.table(), "pairs": pairs}
    for name, table in {**tables, "cost_benefit": benefit.table(), "convergence": course.table()}.items():
        table.save(args.out / f"{name}.md")
        print(table, end="\n\n")
    figures = {**ranks.figures(), **benefit.figures(), **course.figures()}
    for name, figure in {**figures, "values": values_figure(walks, kept=walks.top(4))}.items():
        save_figure(figure, args.out / f"{name}.png")
    print(f"{game.misses} coalitions evaluated, {game.hits} answered from memory; tables and figures in {args.out}")


if __name__ == "__main__":
    main()
