"""Importing the package is free, and every public name is there."""

from pathlib import Path

import pytest
from helpers import run_python

import lightning_eff

HEAVY = ("opacus", "stable_baselines3", "gymnasium", "torch_pruning", "sklearn", "jsonargparse")
# Lightning itself imports matplotlib, torchvision and the like through torchmetrics: what counts is what comes on top
IMPORT = f"""
import sys, time
import lightning.pytorch
for name in [name for name in sys.modules if name.split(".")[0] in {HEAVY}]:
    del sys.modules[name]  # known to the process this one is a fork of
before, start = set(sys.modules), time.process_time()
import lightning_eff
print(time.process_time() - start, *sorted(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def imported():
    seconds, *modules = run_python(IMPORT).stdout.split()[-20:]
    return float(seconds), modules


def test_import_costs_less_than_a_fifth_of_a_second_of_cpu_on_top_of_lightning(imported):
    assert imported[0] < 0.2


def test_import_brings_nothing_but_the_package_itself(imported):
    assert imported[1] == ["lazy_loader", "lightning_eff", "lightning_eff.strategy_names"]


def test_import_alone_brings_neither_torch_nor_anything_heavy():
    loaded = run_python("import lightning_eff, sys; print(*sys.modules)", fresh=True).stdout.split()
    assert not {"torch", "lightning", "matplotlib", *HEAVY} & set(loaded)


@pytest.mark.parametrize("first", ["lightning_eff", "lightning.pytorch"])
def test_strategies_are_registered_whatever_is_imported_first(first):
    known = run_python(
        f"""
import {first}, lightning_eff, lightning.pytorch, sys
from lightning.pytorch.strategies import StrategyRegistry
assert not any(name.startswith("lightning_eff.privacy") for name in sys.modules)
print(*StrategyRegistry.available_strategies())
""",
        fresh=first == "lightning_eff",
    ).stdout.split()
    assert set(lightning_eff.strategy_names.STRATEGIES) <= set(known)


@pytest.mark.parametrize("name", lightning_eff.__all__)
def test_public_name_resolves(name):
    assert getattr(lightning_eff, name) is not None


def test_public_names_are_listed_by_dir():
    assert set(lightning_eff.__all__) <= set(dir(lightning_eff))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lightning_eff attribute Nothing"):
        _ = lightning_eff.Nothing


def test_package_tells_type_checkers_that_it_is_typed():
    assert Path(lightning_eff.__file__).with_name("py.typed").is_file()
