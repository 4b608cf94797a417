"""A private table on Adult: 32,561 census records go in, as many synthetic rows come out, epsilon = 1.

The records are read once; everything after that works on noisy class sums. The guarantee is printed and written beside
the rows. As Adult is public after all, a second report compares the rows with the real ones: classifiers trained on
synthetic rows and tested on 16,281 real ones, shares of every column, pairs of columns, nearest records. That report
is not private and has a folder of its own, ``not_private``.

Download adult.data and adult.test from the UCI Machine Learning Repository (doi:10.24432/C5XW20).

Run: python examples/adult_private_table.py --data FOLDER          (ten seconds for the rows, one minute in all)
     python examples/adult_private_table.py --data FOLDER --fast   (2,000 records, fewer steps and classifiers)
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import lightning as L

from lightning_eff.synthesis import DPNTKGenerator, TableSchema, TabularDataModule
from lightning_eff.synthesis.evaluation import TABLE_CLASSIFIERS, evaluate_table
from lightning_eff.synthesis.tables import read_csv

SCHEMA = Path(__file__).with_name("adult_schema.yaml")


def read_adult(folder: Path, schema: TableSchema) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and test rows by column. The files have no heading; labels of the test file end in a dot."""
    for name in ("adult.data", "adult.test"):
        if not (folder / name).is_file():
            raise SystemExit(f"expected {name} in {folder}: pass --data, a folder that holds the files of UCI Adult")
    train = read_csv(folder / "adult.data", names=schema.names)
    test = read_csv(folder / "adult.test", names=schema.names, skip_lines=1)  # the first line is a comment
    return train, test | {"income": [label.rstrip(".") for label in test["income"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the generator; never of the noise")
    parser.add_argument("--out", type=Path, default=Path("runs/adult_private_table"), help="folder of results")
    default = Path(os.environ.get("LIGHTNING_EFF_DATA", ".")) / "dp_ntk"
    parser.add_argument("--data", type=Path, default=default, help="folder with adult.data and adult.test")
    parser.add_argument("--epsilon", type=float, default=1.0, help="inf for no privacy")
    options = parser.parse_args()

    start = time.perf_counter()
    schema = TableSchema.load(SCHEMA)  # public: bounds and categories are those of adult.names
    train, test = read_adult(options.data, schema)
    if options.fast:
        train, test = ({name: values[:2_000] for name, values in part.items()} for part in (train, test))
    L.seed_everything(options.seed, verbose=False)
    model = DPNTKGenerator(
        options.epsilon,
        delta=1e-5,
        schema=schema,
        feature_widths=(50,),
        latent_dim=20,
        samples_per_class=200,
        lr=3e-3,
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1 if options.fast else 4, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=TabularDataModule(train, schema))
    made = model.generate(len(train["income"]), seed=options.seed)
    path = made.to_csv(options.out / "synthetic.csv")
    print(f"{path}: {len(made):,} rows after {time.perf_counter() - start:.1f} s\n")
    report = model.privacy_report()
    report.write(options.out)
    print(report)

    quality = evaluate_table(
        schema,
        made.rows,
        train,
        test,
        classifiers=TABLE_CLASSIFIERS[:2] if options.fast else TABLE_CLASSIFIERS,
        compare_real=not options.fast,
    )
    quality.write(options.out / "not_private")
    print(f"\n{quality}\n\nwritten to {options.out / 'not_private'}")


if __name__ == "__main__":
    main()
