"""The private data of a fit: the loader that draws them, and how many samples a batch may have of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_eff.privacy.batches import number_of_samples
from lightning_eff.privacy.budget import PrivateData
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.public_data import holds_private
from lightning_eff.privacy.records import check_rows
from lightning_eff.privacy.sampling import CollateOrEmpty, private_loader
from lightning_eff.surgery.state import untouched_generators


class TrainingData:
    """What a fit trains on, from the user's loader to the rows of a batch.

    Attributes:
        known: What the accounting needs of it; ``None`` before there is a loader.
    """

    def __init__(self) -> None:
        self.known: PrivateData | None = None
        self._loaders: list[Any] = []
        self._count_drawn: Callable[[], int] | None = None
        self._drawn = 0
        self._fewer_rows_seen = False

    def draw_from(
        self,
        loader: Any,
        *,
        poisson: bool,
        streams: SecretStreams,
        first_step: Callable[[], int] | None,
        rank: int,
        world_size: int,
        anew: bool,
    ) -> Any:
        """Make the loader that trains of the user's; see :func:`private_loader`.

        Args:
            loader: The user's.
            poisson: See there.
            streams: See there.
            first_step: See there.
            rank: See there.
            world_size: See there.
            anew: Whether it comes in place of the loader before, while training runs.
        """
        drawing, self.known, self._count_drawn = private_loader(
            loader, poisson=poisson, streams=streams, first_step=first_step, rank=rank, world_size=world_size
        )
        self._loaders = [loader] if anew else [*self._loaders, loader]
        return drawing

    def loader(self) -> Any:
        """Return the user's loader.

        Raises:
            ValueError: There are several.
        """
        if len(self._loaders) != 1:
            raise ValueError(
                f"private training takes one train dataloader, got {len(self._loaders)}: samples of several "
                "take part with several rates, which no accountant counts. Join the data sets, for example with "
                "ConcatDataset"
            )
        return self._loaders[0]

    def refuse(self, data: Any, train_dataloader: Any, who: str, strategy: str) -> None:
        """Refuse data that somebody is about to choose by, if samples of the training data are in it.

        Args:
            data: Loader or data set.
            train_dataloader: What the Trainer trains on.
            who: Name of the callback that would choose.
            strategy: Name of the strategy, whose epsilon would not cover it.

        Raises:
            ValueError: They are; tells the ways out.
        """
        for private in self._loaders:
            if data is train_dataloader or holds_private(data, private):
                raise ValueError(
                    f"{who} would choose or report by private training data, which epsilon of {strategy} does not "
                    "cover: give it data that nobody needs to protect, Calibration(loader=...), and the Trainer a "
                    "validation loader; or let it follow a plan that was made without private data (plan=...); or "
                    "prune in a fit on public data before"
                )

    def next_batch(self) -> None:
        """Note how many samples were drawn for the batch that comes."""
        assert self._count_drawn is not None
        self._drawn = self._count_drawn()

    def check_rows(self, rows: int, as_steps_get_it: Callable[[Any], Any]) -> None:
        """Compare the rows of a batch with the samples drawn; fewer ask, once, how many rows a single sample makes.

        Args:
            rows: Of the batch.
            as_steps_get_it: Brings a batch of the loader to where it reaches the step.

        Raises:
            ValueError: A sample has several rows.
        """
        check_rows(rows, self._drawn)
        loader = self._loaders[0]
        if rows == self._drawn or self._fewer_rows_seen or not hasattr(loader, "collate_fn"):
            return
        self._fewer_rows_seen = True
        with untouched_generators():
            one = as_steps_get_it(CollateOrEmpty(loader.collate_fn, loader.dataset).one())
        check_rows(rows, self._drawn, number_of_samples(one))
