"""Image sets small enough to be held in memory as bytes."""

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Sample = tuple[Tensor, Tensor]


class ImageSet(Dataset[Sample]):
    """Grey images kept as stored, made floating point when they are asked for.

    Args:
        images: Stored images ``[N, H, W]``, any dtype.
        labels: Classes ``[N]``, int64.
        scale: Largest stored value; images are divided by it, so that they lie in [0, 1].
        mean: Subtracted after scaling.
        std: Divided by after that, > 0.
        channels: 1, or 3 to repeat the grey value.
        size: Side of the square images handed out, in pixels; other sizes than the stored one are interpolated.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scale: float,
        mean: float = 0.0,
        std: float = 1.0,
        channels: int = 1,
        size: int | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"expected as many labels as images, got {len(labels)} and {len(images)}")
        self.images, self.labels = images, labels
        self.scale, self.mean, self.std = scale, mean, std
        self.channels, self.size = channels, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return samples ``([channels, size, size] float32, [] int64)``; a DataLoader asks for a whole batch."""
        images = self.images[indices].unsqueeze(1).float().div_(self.scale)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", align_corners=False)
        images = images.sub_(self.mean).div_(self.std).expand(-1, self.channels, -1, -1)
        return list(zip(images.unbind(), self.labels[indices].unbind(), strict=True))
