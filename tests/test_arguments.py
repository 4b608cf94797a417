"""Arguments that cannot be meant are told in the same words everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_eff.arguments import check_choice, check_number, check_whole


@pytest.mark.parametrize("value", [0, 1.0, 2.5, math.nan, math.inf, True, "3", None])
def test_what_is_no_whole_number_of_the_least_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"steps must be a whole number >= 1, got {value!r}"):
        check_whole("steps", value)


def test_whole_numbers_may_come_from_numpy_and_have_a_largest() -> None:
    check_whole("steps", np.int64(3))
    check_whole("rank", 0, 0, 7)
    with pytest.raises(ValueError, match="rank must be a whole number from 0 to 7, got 8"):
        check_whole("rank", 8, 0, 7)


@pytest.mark.parametrize(
    ("bounds", "wanted", "bad", "good"),
    [
        ({"above": 0}, "be > 0", [0, -1, math.nan, True, "1", None], [1e-9, 7]),
        ({"least": 0}, "be >= 0", [-1e-9, math.nan, False], [0, np.float32(0.5)]),
        ({"most": 1}, "be <= 1", [1.1, math.nan], [1, -5.0]),
        ({"below": 1}, "be < 1", [1, math.nan], [0.9]),
        ({"least": 0, "below": 1}, r"lie in \[0, 1\)", [1, -0.1, math.nan], [0, 0.99]),
        ({"above": 0, "most": 1}, r"lie in \(0, 1\]", [0, 1.5, "half"], [1, 0.5]),
        ({}, "be a number", [math.nan, "x", True], [-3]),
    ],
)
def test_numbers_outside_of_their_range_are_refused(
    bounds: dict[str, float], wanted: str, bad: list[Any], good: list[Any]
) -> None:
    for value in good:
        check_number("rate", value, **bounds)
    for value in bad:
        with pytest.raises(ValueError, match=f"^rate must {wanted}, got {value!r}$"):
            check_number("rate", value, **bounds)
    with pytest.raises(ValueError, match=f"^rate must {wanted} and finite, got inf$"):
        check_number("rate", math.inf, **bounds)


@pytest.mark.parametrize("value", ["best", 1, True, None, ["min"]])
def test_unknown_choices_are_refused_with_the_known_ones(value: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of min, max, 3, got "):
        check_choice("mode", value, ("min", "max", 3))
    check_choice("mode", "max", ("min", "max", 3))
