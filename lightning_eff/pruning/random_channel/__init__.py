"""Random channel pruning: random configurations under a budget, judged by criteria and repaired without training."""

from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates
from lightning_eff.pruning.random_channel.comparison import ComparisonReport, PairedDifference, compare_criteria
from lightning_eff.pruning.random_channel.figures import candidates_figure, comparison_figure, ratio_figure
from lightning_eff.pruning.random_channel.sampling import config_of, sample_configs
from lightning_eff.pruning.random_channel.scratch import ScratchResult, search_from_scratch
from lightning_eff.pruning.random_channel.search import Processes, SearchResult, random_search

__all__ = [
    "Candidate",
    "Candidates",
    "ComparisonReport",
    "PairedDifference",
    "Processes",
    "ScratchResult",
    "SearchResult",
    "candidates_figure",
    "compare_criteria",
    "comparison_figure",
    "config_of",
    "random_search",
    "ratio_figure",
    "sample_configs",
    "search_from_scratch",
]
