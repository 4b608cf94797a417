"""Make the shared modules importable; give classes that a test cut their own hooks back."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _whole_classes() -> Iterator[None]:
    yield
    from magnitude import Net

    from lightning_eff.models import ImageClassifier
    from lightning_eff.surgery.structure import unprunable

    for cls in (Net, ImageClassifier):
        unprunable(cls)
