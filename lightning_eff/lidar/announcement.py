"""What a line selection says of itself when it begins."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_eff.lidar.study import LineStudy


def announcement(study: LineStudy) -> str:
    """Tell in a sentence which lines are candidates and how much is evaluated.

    Args:
        study: that is about to evaluate coalitions.
    """
    assert study.estimation is not None
    missing = [line for line in range(study.settings.num_lines) if line not in study.lines]
    null = [line for line in missing if not study.pixels.per_line[line]]
    left_out = [line for line in missing if line not in null]
    told = [f"{name}: {_ranges(lines)}" for name, lines in (("null", null), ("left out", left_out)) if lines]
    return (
        f"{len(study.lines)} of {study.settings.num_lines} lines are candidates"
        + (f" ({'; '.join(told)})" if told else "")
        + f"; {study.estimation.budget:,} coalitions of each of {study.expected} frames in "
        f"{study.settings.estimation.rounds} rounds"
    )


def _ranges(lines: Sequence[int]) -> str:
    """Increasing numbers in words: 0-3, 7."""
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
