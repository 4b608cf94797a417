"""The 1,797 handwritten digits that come with scikit-learn: real images, nothing to download.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

import torch

from lightning_eff.arguments import check_number
from lightning_eff.data.images import ImageSet
from lightning_eff.data.loading import SplitDataModule

MEAN, STD = 0.3053, 0.3760
"""Mean and standard deviation of all pixels in [0, 1]."""


class DigitsDataModule(SplitDataModule):
    """Digits 0 to 9 as images ``[1, 8, 8]``, split so that every part has the same share of each class.

    Args:
        batch_size: Samples a batch, per process, >= 1.
        val_fraction: Share of the 1,797 images for validation, in (0, 1).
        test_fraction: Share for the test, in (0, 1); something must remain for training.
        num_workers: Processes that load, >= 0.
        seed: Of the split and of the order of the training set, >= 0.
        normalize: Whether pixels are made to have mean 0 and standard deviation 1; otherwise they lie in [0, 1].

    Raises:
        ValueError: An argument lies outside its range.
    """

    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for name, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            check_number(name, fraction, above=0, below=1)
        if val_fraction + test_fraction >= 1:
            raise ValueError(f"expected val_fraction + test_fraction < 1, got {val_fraction} + {test_fraction}")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.normalize = normalize

    def load(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Read the digits and split them."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = digits.target
        rest, test = train_test_split(
            range(len(labels)), test_size=self.test_fraction, stratify=labels, random_state=self.seed
        )
        train, val = train_test_split(
            rest,
            test_size=self.val_fraction / (1 - self.test_fraction),
            stratify=labels[rest],
            random_state=self.seed,
        )
        mean, std = (MEAN, STD) if self.normalize else (0.0, 1.0)
        images, classes = torch.from_numpy(digits.images).float(), torch.from_numpy(labels).long()
        train_set, val_set, test_set = (
            ImageSet(images[part], classes[part], scale=16, mean=mean, std=std) for part in (train, val, test)
        )
        return train_set, val_set, test_set
