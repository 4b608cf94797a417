"""Releases of tests are small and often mostly noise, by chance more or less; only tests of that warning look at it."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    mark = pytest.mark.filterwarnings("ignore:class .* the signal of the release is below its noise")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark, append=False)
