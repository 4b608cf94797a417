"""Private data generation: a generator or a table to hand on, with a formal (epsilon, delta) guarantee."""

from lightning_eff.synthesis.callback import SynthesisFigures, SyntheticDataWriter
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.figures import images_figure, loss_figure, signal_figure
from lightning_eff.synthesis.generators import (
    ConvImageGenerator,
    MLPGenerator,
    ResNetImageGenerator,
    TabularGenerator,
)
from lightning_eff.synthesis.metrics import NTKMMD
from lightning_eff.synthesis.module import DPNTKGenerator
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet, paper_feature_net
from lightning_eff.synthesis.options import FeatureOptions, MatchingOptions, ReleaseOptions
from lightning_eff.synthesis.release import release_mean_embedding
from lightning_eff.synthesis.report import PrivacyReport
from lightning_eff.synthesis.synthetic import SyntheticData
from lightning_eff.synthesis.tables import CategoricalColumn, NumericColumn, TableSchema, TabularDataModule

__all__ = [
    "NTKMMD",
    "CategoricalColumn",
    "ConvFeatureNet",
    "ConvImageGenerator",
    "DPNTKGenerator",
    "FCFeatureNet",
    "FeatureOptions",
    "MLPGenerator",
    "MatchingOptions",
    "MeanEmbedding",
    "NTKFeatures",
    "NumericColumn",
    "PrivacyReport",
    "ReleaseOptions",
    "ResNetImageGenerator",
    "SynthesisFigures",
    "SyntheticData",
    "SyntheticDataWriter",
    "TableSchema",
    "TabularDataModule",
    "TabularGenerator",
    "images_figure",
    "loss_figure",
    "paper_feature_net",
    "release_mean_embedding",
    "signal_figure",
]
