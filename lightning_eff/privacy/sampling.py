"""Poisson sampling: every sample takes part in a step with the same probability, whatever the others do.

This is the sampling the accountants account for. A batch may be empty, and batches differ in size.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.privacy.batches import some_samples
from lightning_eff.privacy.budget import PrivateData
from lightning_eff.privacy.noise import SecretStreams
from lightning_eff.privacy.records import check_each_record_once
from lightning_eff.surgery.state import untouched_generators


class PoissonBatchSampler(Sampler[list[int]]):
    """Batches of a step: each of a rank's samples independently with probability ``sample_rate``; some are empty.

    Args:
        num_samples: Samples in the data set, all ranks together.
        sample_rate: q in (0, 1].
        steps: Batches of one pass. Every rank yields exactly as many.
        rank: Of this process; it draws from the samples ``rank, rank + world_size, ...``.
        world_size: Number of processes.
        streams: Where the randomness comes from; ``None`` takes it from the operating system.
        first_step: Tells at the start of a pass which step it begins with, so that draws are reproducible where
            ``streams`` are. ``None`` leaves the count to ``streams``: no draw is ever repeated, neither in a later
            pass nor by another sampler of the same streams.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        sample_rate: float,
        steps: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        streams: SecretStreams | None = None,
        first_step: Callable[[], int] | None = None,
    ) -> None:
        check_whole("num_samples", num_samples)
        check_number("sample_rate", sample_rate, above=0, most=1)
        check_whole("steps", steps)
        check_whole("rank", rank, 0, world_size - 1)
        self.num_samples, self.sample_rate, self.steps = num_samples, sample_rate, steps
        self.rank, self.world_size = rank, world_size
        self._streams = SecretStreams() if streams is None else streams
        self._first_step = first_step
        self._drawn: deque[int] = deque()

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first = None if self._first_step is None else self._first_step()
        self._drawn = drawn = deque[int]()
        for place in range(self.steps):
            batch = self.draw(self._streams.next_step(self._purpose) if first is None else first + place)
            drawn.append(len(batch))
            yield batch

    def draw(self, step: int) -> list[int]:
        """Draw the batch of a step, ascending indices."""
        generator = self._streams.numpy_generator(self._purpose, step)
        shard = len(range(self.rank, self.num_samples, self.world_size))
        return [self.rank + self.world_size * place for place in _bernoulli(shard, self.sample_rate, generator)]

    def next_count(self) -> int:
        """Tell how many samples were drawn for the next batch of this pass; asked once for every batch, in order.

        Raises:
            RuntimeError: No such batch was drawn.
        """
        if not self._drawn:
            raise RuntimeError("a batch came that this run did not draw: give the Trainer the loader and nothing else")
        return self._drawn.popleft()

    @property
    def _purpose(self) -> str:
        return f"sampling {self.rank}"


def _bernoulli(count: int, probability: float, generator: np.random.Generator) -> list[int]:
    """Places in ``range(count)`` that come out True, by the gaps between them: the work grows with the result."""
    places: list[int] = []
    last, expected = -1, count * probability
    while True:
        gaps = generator.geometric(probability, size=int(expected + 6 * math.sqrt(expected) + 16))
        # a gap may be as large as an integer can be, so it is cut before it is added up
        drawn = last + np.cumsum(np.minimum(gaps, count + 1))
        places.extend(drawn[drawn < count].tolist())
        last = int(drawn[-1])
        if last >= count:
            return places


class CollateOrEmpty:
    """The user's collate function, and a batch of the same structure with zero samples where it would make none.

    That is where nobody was drawn, and where the function gives None for those who were: the step is taken all the
    same, as whether it is taken must not depend on who was drawn.

    Args:
        collate: The loader's collate function; it never sees an empty list.
        dataset: Its first sample shows the structure of a batch; none of its values is kept.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Any) -> None:
        self.collate = collate
        self.dataset = dataset
        self._empty: Any = None

    def __call__(self, samples: list[Any]) -> Any:
        """Make a batch of what was drawn.

        Raises:
            ValueError: The function gives None for every sample there is.
        """
        batch = self.collate(samples) if samples else None
        if batch is not None:
            return batch
        if self._empty is None:
            with untouched_generators():
                one = self.one()
            self._empty = some_samples(one, slice(0, 0))
        return self._empty

    def one(self) -> Any:
        """Make a batch of one sample: the first that makes one.

        Raises:
            ValueError: None of them does.
        """
        for index in range(len(self.dataset)):
            if (batch := self.collate([self.dataset[index]])) is not None:
                return batch
        raise ValueError(f"collate_fn gives None for each of the {len(self.dataset)} samples alone: return a batch")


def check_poisson_possible(loader: object) -> None:
    """Refuse a loader whose order is part of what the user wants, or whose samples cannot be reached by index.

    Raises:
        ValueError: Says what stands in the way and what to do.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(_refusal(f"the train dataloader is a {type(loader).__name__}, not a torch DataLoader"))
    if isinstance(loader.dataset, IterableDataset) or not _sized(loader.dataset):
        raise ValueError(_refusal(f"{type(loader.dataset).__name__} cannot be read by index and has no length"))
    if loader.batch_sampler is None:
        raise ValueError(_refusal("the train dataloader does not make batches (batch_size=None)"))
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(_refusal(f"the train dataloader has its own {type(loader.batch_sampler).__name__}"))
    sampler = loader.sampler
    replacement = getattr(sampler, "replacement", False)
    if replacement or not (type(sampler) in (RandomSampler, SequentialSampler) or _permutes(sampler, loader.dataset)):
        how = " with replacement" if replacement else ""
        raise ValueError(_refusal(f"the train dataloader has its own {type(sampler).__name__}{how}"))
    if isinstance(sampler, RandomSampler) and sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
        raise ValueError(_refusal(f"the train dataloader's RandomSampler draws {sampler.num_samples} samples"))


def check_no_replacement(loader: Any) -> None:
    """Refuse samplers that take a sample several times: not even the order of batches is what is accounted then.

    Raises:
        ValueError: Names the sampler.
    """
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(owner, "sampler", None)
        indices: Any = getattr(sampler, "indices", None)
        more = isinstance(sampler, RandomSampler) and sampler.num_samples > len(loader.dataset)
        if (
            getattr(sampler, "replacement", False)
            or more
            or (_sized(indices) and len(set(map(int, indices))) < len(indices))
        ):
            raise ValueError(
                f"{type(sampler).__name__} takes samples several times, so that some count for more than epsilon says: "
                "use shuffle=True, and weigh the losses of samples instead"
            )


def poisson_loader(loader: DataLoader[Any], sampler: PoissonBatchSampler) -> DataLoader[Any]:
    """Copy a loader, of whatever subclass, with other batches; workers, collate function and all else stay.

    Raises:
        ValueError: See :func:`check_poisson_possible`.
    """
    check_poisson_possible(loader)
    changed = copy.copy(loader)
    # torch forbids to assign these, because an iterator that runs would not notice; the copy has none
    vars(changed).update(
        batch_sampler=sampler,
        sampler=sampler,
        batch_size=None,
        drop_last=False,
        collate_fn=CollateOrEmpty(loader.collate_fn, loader.dataset),
        _iterator=None,
        # batches have to come as they were drawn, so that each can be compared with its number of samples
        in_order=True,
        # batches owe nothing to those before them: a run that goes on within an epoch has none to skip
        state_dict=dict,
        load_state_dict=_nothing_to_load,
    )
    return changed


def _nothing_to_load(state: Mapping[str, Any]) -> None:
    """Take a state that says nothing."""


def _permutes(sampler: object, dataset: object) -> bool:
    """Whether it only orders the data set and splits it among processes."""
    return (
        isinstance(sampler, DistributedSampler)
        and type(sampler).__iter__ is DistributedSampler.__iter__
        and sampler.dataset is dataset
    )


def _sized(dataset: Any) -> bool:
    try:
        return len(dataset) > 0
    except (TypeError, NotImplementedError):
        return False


def _refusal(reason: str) -> str:
    return (
        f"{reason}, and Poisson sampling would replace or break that: use a DataLoader over a map-style data set with "
        "batch_size and shuffle, or poisson_sampling=False, whose epsilon is approximate and every report says so"
    )


def private_loader(
    loader: Any,
    *,
    poisson: bool,
    streams: SecretStreams,
    first_step: Callable[[], int] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Any, PrivateData, Callable[[], int]]:
    """Make the loader that trains, and tell what the accounting needs of it.

    Args:
        loader: The user's; its batch size is that of one process.
        poisson: False leaves the loader as it is.
        streams: Secret of this run.
        first_step: See :class:`PoissonBatchSampler`.
        rank: Of this process.
        world_size: Number of processes.

    Returns:
        The loader, the data, and a function that is asked once for every batch and tells the most samples it can have.

    Raises:
        ValueError: Poisson sampling is not possible, the number of samples is not known, or a sample is taken several
            times.
    """
    if poisson:
        check_poisson_possible(loader)
    dataset = getattr(loader, "dataset", None)
    batch_size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    if not _sized(dataset) or not batch_size:
        raise ValueError(
            f"the sampling rate is not known: expected a train dataloader with a batch size and a data set with a "
            f"length, got a {type(loader).__name__} over a {type(dataset).__name__} with batch size {batch_size}"
        )
    check_each_record_once(dataset)
    check_no_replacement(loader)
    samples = len(dataset)  # type: ignore[arg-type]
    logical = min(batch_size * world_size, samples)
    steps = max(1, samples // logical if getattr(loader, "drop_last", False) else math.ceil(samples / logical))
    data = PrivateData(samples, logical, steps, _name(dataset))
    if not poisson:
        return loader, data, lambda: int(batch_size)
    sampler = PoissonBatchSampler(
        samples,
        logical / samples,
        steps,
        rank=rank,
        world_size=world_size,
        streams=streams,
        first_step=first_step,
    )
    return poisson_loader(loader, sampler), data, sampler.next_count


def _name(dataset: Any) -> str:
    """Types of a data set and of those inside of it."""
    inner = getattr(dataset, "dataset", None)
    return type(dataset).__name__ + ("" if inner is None else f" of {_name(inner)}")
