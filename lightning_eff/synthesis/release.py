"""The one look at private data: class sums of unit-norm features and class counts, released with Gaussian noise.

DP-NTK (arXiv 2303.01687), with the noise of the analytic Gaussian mechanism (arXiv 1805.06530) on one joint vector
(S_1..S_C, kappa m_1..kappa m_C). Whatever is done with the result is post-processing and costs nothing.

Shapes: B records of a batch, C classes, P coordinates of a feature, n records in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_eff.accounting import PrivacyBudgetExceeded, PrivacyLedger, gaussian_sigma
from lightning_eff.arguments import check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery.state import untouched_generators
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import ClassSums, NTKFeatures
from lightning_eff.synthesis.noise import NormalNoise
from lightning_eff.synthesis.options import ReleaseOptions
from lightning_eff.synthesis.processes import Processes
from lightning_eff.synthesis.reading import PrivateData, Shard, records_of, shard_of

NOT_PRIVATE = "NOT PRIVATE: epsilon is infinite, no noise was added."
KNOWN_NOISE = "NOT PRIVATE: the noise was drawn from noise_seed, and whoever knows it can take the noise away."


def release_mean_embedding(
    data: PrivateData,
    features: NTKFeatures,
    num_classes: int,
    *,
    epsilon: float,
    delta: float = 1e-5,
    options: ReleaseOptions | None = None,
    ledger: PrivacyLedger | None = None,
    split_batch: SplitBatch | None = None,
    check: Callable[[Tensor, int], None] | None = None,
    progress: bool = True,
) -> MeanEmbedding:
    """Read every private record once and release noisy class sums and counts.

    Where torch.distributed runs, every process calls it with the same data and gets the same result: each reads a
    disjoint shard, process 0 draws the noise.

    Args:
        data: A data loader or map-style data set of ``(x, y)``, tensors or arrays ``(x [n, ...], y [n])``, or an
            iterable of batches. Map-style data are read in order and completely by a loader of its own, whatever the
            given loader's order and ``drop_last``.
        features: Whose network no private data have entered.
        num_classes: C, >= 1; with 1, ``x`` alone will do.
        epsilon: > 0; infinity adds no noise, which the ledger says.
        delta: In (0, 1), less than 1 / n.
        options: What the release promises and how it reads.
        ledger: Where the release is recorded; ``None`` makes one that is dropped.
        split_batch: ``batch -> (x, y)``, for batches of another form.
        check: Called with the records ``[B, ...]`` of a batch and the batch's number; raises where they are not what
            they should be.
        progress: Whether to show a bar.

    Returns:
        float32 blocks ``(C, ...)`` and counts ``(C,)`` with noise, on the device of the features.

    Raises:
        ValueError: Arguments, data or records are not what they should be. Nothing was released or recorded.
        PrivacyBudgetExceeded: The ledger's ``max_epsilon`` would be passed. No record was read.
        RuntimeError: This process is one of several that have no process group yet, or another one failed.
    """
    options = options or ReleaseOptions()
    check_whole("num_classes", num_classes, least=1)
    prior = _prior(options, num_classes)
    # one part in 10^12 more noise: what is recorded must not round to an epsilon above the one asked for
    sigma = gaussian_sigma(epsilon, delta) * (1 + 1e-12)
    if ledger is None:
        ledger = PrivacyLedger(delta, max_epsilon=options.max_epsilon, adjacency=options.adjacency)
    if ledger.adjacency != options.adjacency:
        raise ValueError(f"the ledger is for adjacency {ledger.adjacency!r}, the release for {options.adjacency!r}")
    _record(ledger_copy(ledger), sigma, options)

    processes = Processes.running()
    shard = _shard(data, options, processes)
    problem: Exception | None = None
    sums = features.sums(num_classes, dtype=torch.float64)
    try:
        try:
            with untouched_generators():
                _read(
                    shard, sums, device_of(features), split_batch or split_pair, check, progress and processes.rank == 0
                )
        except Exception as error:
            problem = error
        processes.agree(problem)
        clean = sums.embedding()
        for values in (*clean.blocks.values(), clean.counts):
            processes.sum(values)
        n = round(float(clean.counts.sum()))
        _check_number(n, delta, options)
        _warn_of_degenerate(processes.sum(torch.tensor(sums.degenerate, device=clean.counts.device)), n)
        _record(ledger, sigma, options)
        embedding = _with_noise(clean, sigma, n, prior, options, processes)
    finally:
        for values in sums.embedding().blocks.values():  # also where somebody keeps the traceback
            values.zero_()
    embedding.private = math.isfinite(epsilon) and options.noise_seed is None
    embedding.meta = {
        "epsilon": float(epsilon),
        "delta": float(delta),
        "sigma": sigma,
        "sensitivity": options.sensitivity,
        "adjacency": options.adjacency,
        "count_weight": options.kappa if options.counts_are_released else None,
        "label_prior": options.label_prior,
        "max_contributions": options.max_contributions,
        "noise": "operating system" if options.noise_seed is None else "noise_seed",
    }
    _explain(ledger, embedding, options, shard.assumptions)
    return embedding


def ledger_copy(ledger: PrivacyLedger) -> PrivacyLedger:
    """Return a ledger with the same history, to try things on."""
    other = PrivacyLedger(ledger.delta, adjacency=ledger.adjacency)
    other.load_state_dict(ledger.state_dict())
    return other


def _record(ledger: PrivacyLedger, sigma: float, options: ReleaseOptions) -> None:
    try:
        ledger.record(sigma, label="release of class sums", sensitivity=options.sensitivity)
    except PrivacyBudgetExceeded as error:
        raise PrivacyBudgetExceeded(
            f"{error}; train on the release that is there, which costs nothing, or raise max_epsilon"
        ) from None


def _prior(options: ReleaseOptions, num_classes: int) -> Tensor | None:
    """Public shares of the classes ``(C,)``, ``None`` where counts are released."""
    if options.counts_are_released:
        return None
    if options.label_prior == "uniform":
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    if len(options.label_prior) != num_classes:
        raise ValueError(f"label_prior must hold a share for each of {num_classes} classes, got {options.label_prior}")
    return torch.tensor(options.label_prior, dtype=torch.float64)


def _shard(data: PrivateData, options: ReleaseOptions, processes: Processes) -> Shard:
    """What this process reads, or in all of them the error of any."""
    shard, problem = None, None
    try:
        shard = shard_of(
            data,
            batch_size=options.batch_size,
            max_contributions=options.max_contributions,
            adjacency=options.adjacency,
            processes=processes,
        )
    except Exception as error:
        problem = error
    processes.agree(problem)
    assert shard is not None
    seen = processes.gathered((shard.records, shard.fingerprint))
    if len(set(seen)) > 1:
        sizes = ", ".join("unknown" if records is None else str(records) for records, _ in seen)
        raise ValueError(
            f"the processes hold other records, or the same in another order (their numbers: {sizes}), so that some "
            "would be read twice: whatever splits or shuffles them must do so alike in every process, e.g. "
            "random_split(..., generator=torch.Generator().manual_seed(0))"
        )
    return shard


def _read(
    shard: Shard,
    sums: ClassSums,
    device: torch.device,
    split_batch: SplitBatch,
    check: Callable[[Tensor, int], None] | None,
    show: bool,
) -> None:
    shown, read = show and shard.mine is not None, 0
    with (
        torch.autocast(device.type, enabled=False),
        progress_bar("Reading private records", shard.mine or 0, enabled=shown, unit="records") as bar,
    ):
        for number, batch in enumerate(shard):
            x, y = records_of(batch, sums.num_classes, number, split_batch, device)
            if check is not None:
                check(x, number)
            sums.add(x, y)
            read += len(x)
            bar.advance(len(x))
    shard.check_number(read)


def device_of(features: NTKFeatures) -> torch.device:
    """Where the network of the features is."""
    return next((tensor.device for tensor in features.parameters()), torch.device("cpu"))


def _check_number(n: int, delta: float, options: ReleaseOptions) -> None:
    if not n:
        raise ValueError("expected private records, got none")
    public = options.adjacency == "replace_one"
    if public and options.num_records is not None and n != options.num_records:
        raise ValueError(
            f"expected num_records = {options.num_records} records, read {n}: under adjacency='replace_one' their "
            "number is public and must be right; drop num_records to take the number read"
        )
    if n == 1:
        rank_zero_warn("the release is of one record: it can say nothing about a population")
    if delta >= 1 / n:
        number = f" = {1 / n:.3g} for n = {n} records" if public else ""
        rank_zero_warn(
            f"delta = {delta:g} is not below 1 / n{number}: a mechanism that publishes one record at random would be "
            "as private; choose a smaller delta"
        )


def _warn_of_degenerate(degenerate: Tensor, n: int) -> None:
    if int(degenerate):
        rank_zero_warn(
            f"the feature of {int(degenerate) / n:.1%} of the records is zero: every unit of the feature network is "
            "dead for them and there is no bias; they add nothing to the class sums. Other feature_options may help"
        )


def _with_noise(
    clean: MeanEmbedding, sigma: float, n: int, prior: Tensor | None, options: ReleaseOptions, processes: Processes
) -> MeanEmbedding:
    """Overwrite the clean sums, and return the noisy ones in single precision."""
    source, scale = NormalNoise(options.noise_seed), options.sensitivity * sigma
    blocks = {}
    for name, block in clean.blocks.items():
        if scale and processes.rank == 0:
            block += scale * source.draw(block.numel()).view_as(block).to(block.device)
        blocks[name] = processes.from_first(block.float())
    if prior is None:
        counts = options.kappa * clean.counts
        if scale and processes.rank == 0:
            counts += scale * source.draw(len(counts)).to(counts.device)
        counts = processes.from_first(counts) / options.kappa
    else:
        total = n if options.adjacency == "replace_one" else options.num_records
        counts = float(total or 0) * prior.to(clean.counts.device)
    counts = counts.clamp(min=1.0)
    public = options.adjacency == "replace_one"
    if public:
        counts = counts * (n / counts.sum())
    return MeanEmbedding(blocks, counts.float(), num_records=n if public else None)


def _explain(
    ledger: PrivacyLedger, embedding: MeanEmbedding, options: ReleaseOptions, unchecked: Sequence[str]
) -> None:
    """Enter what the guarantee rests on, each sentence once."""
    caveats, assumptions, not_covered = [], [], []
    if math.isinf(embedding.meta["epsilon"]):
        caveats.append(NOT_PRIVATE)
    elif options.noise_seed is not None:
        caveats.append(KNOWN_NOISE)
    if embedding.num_records is not None:
        assumptions.append(f"The number of records, {embedding.num_records:,}, is public.")
    records = "one record" if options.max_contributions == 1 else f"{options.max_contributions} records"
    assumptions.append(f"One person contributes at most {records}.")
    assumptions.extend(unchecked)
    if not options.counts_are_released:
        assumptions.append("The shares of the classes are public.")
    assumptions.append(
        "Feature network, ranges, schema and all settings were chosen without looking at the private records."
    )
    not_covered.append("What is told while reading, such as an error about a record, is for whoever holds the data.")
    for sentences, new in (
        (ledger.caveats, caveats),
        (ledger.assumptions, assumptions),
        (ledger.not_covered, not_covered),
    ):
        sentences.extend(sentence for sentence in new if sentence not in sentences)
