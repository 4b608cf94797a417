"""From real records to classifiers trained on synthetic ones, with the settings of the examples and seeded noise."""

import statistics

import lightning as L
import pytest
import torch
from dp_ntk_quality import FourierFeatures
from sklearn.datasets import load_breast_cancer
from synthesis.adult_table import adult

from lightning_eff.synthesis import DPNTKGenerator, ReleaseOptions, TableSchema, TabularDataModule
from lightning_eff.synthesis.evaluation import Cells, classifier_inputs, train_synthetic_test_real
from lightning_eff.synthesis.tables import split_rows


def synthetic(schema, train, epsilon, *, epochs, seed=0):
    L.seed_everything(seed, verbose=False)
    model = DPNTKGenerator(
        epsilon,
        schema=schema,
        feature_widths=(50,),
        latent_dim=20,
        samples_per_class=200,
        lr=3e-3,
        release_options=ReleaseOptions(noise_seed=seed),
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=TabularDataModule(train, schema))
    return model.generate(len(train[schema.label]), seed=seed).rows


def auc(schema, made, test, *classifiers):
    result = train_synthetic_test_real(
        classifier_inputs(schema, made), classifier_inputs(schema, test), classifiers=classifiers, progress=False
    )
    return [result.mean("roc_auc", name) for name in classifiers]


def test_four_hundred_records_of_breast_cancer_teach_a_classifier_at_epsilon_10():
    data = load_breast_cancer()
    rows = dict(zip(data.feature_names.tolist(), data.data.T, strict=True)) | {"benign": data.target.tolist()}
    schema = TableSchema.infer(rows, "benign", public=True, encoding="minmax")
    train, test = split_rows(rows, 0.3)
    made = synthetic(schema, train, 10.0, epochs=3)
    assert auc(schema, made, test, "logistic_regression")[0] >= 0.95  # real records: .99


@pytest.mark.slow
def test_adult_at_epsilon_1():
    schema, train, test = adult()
    made = synthetic(schema, train, 1.0, epochs=4)
    logistic, boosting = auc(schema, made, test, "logistic_regression", "hist_gradient_boosting")
    assert logistic >= 0.88  # real records: .900
    assert boosting >= 0.885  # real records: .927
    cells = Cells(schema)
    assert float(cells.single(cells.count(train), cells.count(made)).mean()) <= 0.03


@pytest.mark.slow
def test_more_privacy_costs_quality():
    schema, train, test = adult()
    means = [
        statistics.fmean(
            auc(schema, synthetic(schema, train, epsilon, epochs=1, seed=seed), test, "logistic_regression")[0]
            for seed in range(3)
        )
        for epsilon in (0.2, 1.0)
    ]
    assert means[0] <= means[1]


def test_the_peer_of_the_benchmark_has_features_of_unit_norm():
    numeric = torch.tensor([True, True, False, False, False])
    x = torch.cat(
        [torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.eye(3)[torch.arange(20) % 3]], 1
    )
    features = FourierFeatures(numeric, columns=1, dim=4000, length_scale=2.0)
    phi = features.dense(x)
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(20))
    # the Gaussian kernel beside that of equal categories
    kernel = (torch.cdist(x[:, :2], x[:, :2]).square() / -8).exp() + x[:, 2:] @ x[:, 2:].T
    torch.testing.assert_close(phi @ phi.T, kernel / 2, atol=0.05, rtol=0)
