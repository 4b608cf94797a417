"""Private data whose reading is counted, and small generators of them."""

from collections import Counter

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_eff.synthesis import DPNTKGenerator, FCFeatureNet, NTKFeatures


class CountingDataset(Dataset):
    """Records ``(x, y)`` that count how often each was asked for."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.reads = Counter()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.x[index], self.y[index]


class CountedData(L.LightningDataModule):
    """Training and validation records that count their reading, and how often loaders are asked for."""

    def __init__(self, train, val=None, **loading):
        super().__init__()
        self.train, self.val = CountingDataset(*train), CountingDataset(*(val or train))
        self.loading = {"batch_size": 16, **loading}
        self.asked = 0

    def train_dataloader(self):
        self.asked += 1
        return DataLoader(self.train, shuffle=True, **self.loading)

    def val_dataloader(self):
        return DataLoader(self.val, **self.loading)


def records(n=101, classes=3, shape=(4,), seed=0):
    """``n`` uniform records in [0, 1], every class among them."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=random), torch.arange(n) % classes


def features(inputs=4, width=8, classes=3):
    return NTKFeatures(FCFeatureNet(inputs, (width,), classes))


def small(epsilon=5.0, **arguments):
    """A module that trains in no time on :func:`records`."""
    defaults = {"num_classes": 3, "input_shape": (4,), "feature_widths": (8,), "latent_dim": 3}
    return DPNTKGenerator(epsilon, **{**defaults, "samples_per_class": 4, "steps_per_epoch": 7, **arguments})


def trainer(**arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments})
