import logging

import lightning as L
import pytest
import torch

from lightning_eff import FashionMNISTDataModule
from lightning_eff.data.fashion_mnist import DEBIAN
from lightning_eff.synthesis import DPNTKGenerator
from lightning_eff.synthesis.evaluation import train_synthetic_test_real


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_classifiers_trained_on_private_clothes_know_real_ones():
    # 6,000 real images in the place of the generated ones give 0.82 and 0.85
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = FashionMNISTDataModule(normalize=False, val_size=1)
    data.setup()
    L.seed_everything(0, verbose=False)
    model = DPNTKGenerator(10.0, num_classes=10, input_shape=(1, 28, 28), steps_per_epoch=500)
    L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(model, datamodule=data)  # fmt: skip
    made = model.generate(6_000, seed=0)
    test = tuple(map(torch.stack, zip(*data.test_set.__getitems__(list(range(10_000))), strict=True)))
    scores = train_synthetic_test_real((made.x, made.y), test, classifiers=("logistic_regression", "mlp"))
    assert scores.mean("accuracy", "logistic_regression") >= 0.70
    assert scores.mean("accuracy", "mlp") >= 0.72
    assert model.ledger.epsilon() == pytest.approx(10.0, rel=1e-9)
