"""What synthetic data are good for and how they differ from the real ones. Nothing in here is private."""

from lightning_eff.synthesis.evaluation.classifiers import IMAGE_CLASSIFIERS, TABLE_CLASSIFIERS, make_classifier
from lightning_eff.synthesis.evaluation.coordinates import classifier_inputs
from lightning_eff.synthesis.evaluation.correlations import associations
from lightning_eff.synthesis.evaluation.downstream import Downstream, TSTRScore, train_synthetic_test_real
from lightning_eff.synthesis.evaluation.figures import marginals_figure, nearest_figure, pairs_figure
from lightning_eff.synthesis.evaluation.marginals import Cells, MarginalTV
from lightning_eff.synthesis.evaluation.nearest import NearestRecords, nearest_records
from lightning_eff.synthesis.evaluation.report import TableQuality, evaluate_table

__all__ = [
    "IMAGE_CLASSIFIERS",
    "TABLE_CLASSIFIERS",
    "Cells",
    "Downstream",
    "MarginalTV",
    "NearestRecords",
    "TSTRScore",
    "TableQuality",
    "associations",
    "classifier_inputs",
    "evaluate_table",
    "make_classifier",
    "marginals_figure",
    "nearest_figure",
    "nearest_records",
    "pairs_figure",
    "train_synthetic_test_real",
]
