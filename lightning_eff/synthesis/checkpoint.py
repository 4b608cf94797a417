"""What a checkpoint must agree on with the module that takes it over, and that no release is forgotten by that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.options import ReleaseOptions


def release_fingerprint(embedding: MeanEmbedding) -> str:
    """Tell one release from all others, by its noisy values."""
    digest: Any = hashlib.blake2b(digest_size=16)
    for values in (*embedding.blocks.values(), embedding.counts):
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return str(digest.hexdigest())


def promises(options: ReleaseOptions) -> dict[str, Any]:
    """Those of the options on which rests what a release promises."""
    return {
        "adjacency": options.adjacency,
        "max_contributions": options.max_contributions,
        "label_prior": options.label_prior,
        "count_weight": options.kappa if options.counts_are_released else None,
    }


def require_identity(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first field in which a checkpoint is of another module."""
    for name, value in own.items():
        if saved.get(name) != value:
            told = repr(value), repr(saved.get(name))
            if name in ("epsilon", "delta"):
                raise ValueError(
                    f"the checkpoint holds a release made with {name} = {told[1]}, and the model was built with "
                    f"{told[0]}: leave {name} out of load_from_checkpoint; it comes from the checkpoint. "
                    "Another guarantee needs another release, by a new model"
                )
            raise ValueError(
                f"the checkpoint was made with another {name}: expected {told[0]}, got {told[1]}; build the "
                "model as it was, or use load_from_checkpoint without other options"
            )


def joined_history(
    own: PrivacyLedger, own_releases: Sequence[str], saved: PrivacyLedger, saved_releases: Sequence[str]
) -> tuple[PrivacyLedger, list[str]]:
    """The longer of two histories, one of which goes on where the other ends.

    Args:
        own: What the module has spent.
        own_releases: Fingerprints of its releases, in order: equal entries of ledgers may be different releases.
        saved: What the checkpoint says.
        saved_releases: Fingerprints of these.

    Returns:
        A ledger of everything that was spent, with the sentences of both, and its fingerprints.

    Raises:
        ValueError: Each of them has releases that the other does not know.
    """
    if _goes_on(saved, saved_releases, own, own_releases):
        return saved, list(saved_releases)
    if not _goes_on(own, own_releases, saved, saved_releases):
        raise ValueError(
            f"this module has made {own.steps} releases and the checkpoint tells of {saved.steps}, not all of them the "
            "same: either ledger alone would say less than was spent. Give the checkpoint to a new module "
            "(load_from_checkpoint), and count the releases of this one besides"
        )
    joined = PrivacyLedger()
    joined.load_state_dict(own.state_dict())
    for name in ("caveats", "assumptions", "not_covered"):
        sentences = getattr(joined, name)
        sentences.extend(sentence for sentence in getattr(saved, name) if sentence not in sentences)
    return joined, list(own_releases)


def _goes_on(
    later: PrivacyLedger, later_releases: Sequence[str], earlier: PrivacyLedger, earlier_releases: Sequence[str]
) -> bool:
    if list(later_releases[: len(earlier_releases)]) != list(earlier_releases):
        return False
    known, more = earlier.history, later.history
    if not known:
        return True
    if len(more) < len(known) or more[: len(known) - 1] != known[:-1]:
        return False
    last, same = known[-1], more[len(known) - 1]  # equal steps that follow each other are one entry
    return same.steps >= last.steps and replace(same, steps=last.steps) == last
