"""How results leave the package: reports of tables and figures of one style, and progress whose cost is known before.

Nothing here knows a technique; matplotlib and rich are imported where they are used.
"""

from lightning_eff.reporting.figures import HIGHLIGHT, KEPT, REFERENCE, REMOVED, SERIES, new_figure, save_figure
from lightning_eff.reporting.progress_bar import Progress, progress
from lightning_eff.reporting.report import Report, results_folder
from lightning_eff.reporting.tables import Column, Table, human

__all__ = [
    "HIGHLIGHT",
    "KEPT",
    "REFERENCE",
    "REMOVED",
    "SERIES",
    "Column",
    "Progress",
    "Report",
    "Table",
    "human",
    "new_figure",
    "progress",
    "results_folder",
    "save_figure",
]
