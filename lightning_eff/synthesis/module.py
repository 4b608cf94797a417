"""DPNTKGenerator: release once in ``on_fit_start``, then train a generator on the release, without data.

``on_fit_start`` and not ``setup``: there a checkpoint has been restored, so that a resumed run finds its release and
does not look at the data again. The data module's loaders are covered earlier, before anything can ask for them
(:class:`~lightning_eff.synthesis.loaders.DataFreeModule`).

Shapes: B = b C samples of a step, b of each class; Z numbers of a latent code; P coordinates of a feature.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_eff.accounting import PrivacyLedger, gaussian_sigma
from lightning_eff.arguments import check_number, check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.documents import parsed, whole_state
from lightning_eff.surgery.state import quiet_model
from lightning_eff.surgery.structure import prunable
from lightning_eff.synthesis.checkpoint import joined_history, promises, release_fingerprint, require_identity
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features import MMD2Terms, NTKFeatures
from lightning_eff.synthesis.loaders import DataFreeModule, StepToken
from lightning_eff.synthesis.networks import FCFeatureNet
from lightning_eff.synthesis.options import (
    FeatureOptions,
    MatchingOptions,
    ReleaseOptions,
    options_from,
    plain_options,
)
from lightning_eff.synthesis.processes import ONE_RELEASE, Processes
from lightning_eff.synthesis.reading import PrivateData, encoded, records_of
from lightning_eff.synthesis.release import NOT_PRIVATE, release_mean_embedding
from lightning_eff.synthesis.report import VALIDATION, PrivacyReport, privacy_report
from lightning_eff.synthesis.sampling import Labels, class_labels, latent_codes
from lightning_eff.synthesis.schedule import lr_scheduler
from lightning_eff.synthesis.signal import (
    class_warnings,
    class_weights,
    noise_floor,
    noise_norms,
    signal_norms,
)
from lightning_eff.synthesis.spaces import RecordSpace
from lightning_eff.synthesis.synthetic import SyntheticData
from lightning_eff.synthesis.tables import Rows, TableSchema

_KEY = "dp_ntk"
_TWO_WAYS = (
    "either trainer.fit(model, datamodule=...) or trainer.fit(model, loader), whose training data are read once, or, "
    "in one process, model.release(data) before trainer.fit(model)"
)


@prunable
class DPNTKGenerator(DataFreeModule):
    """Learn to generate records like private ones, with an (epsilon, delta) guarantee for these.

    ``trainer.fit(model, datamodule=...)`` reads every training record once, releases noisy class sums of their
    neural-tangent features, and trains a generator to match them. Nothing after the release looks at the data: more
    epochs, other generators and any number of samples cost no privacy.

    Logs ``train/mmd2`` (squared discrepancy), ``train/mmd2_cross`` (without the constant norm of the target),
    ``train/lr``, ``val/mmd2`` where that was allowed, and once ``synthesis/epsilon``, ``synthesis/sigma``,
    ``synthesis/noise_norm``, ``synthesis/signal_norm`` (norms of the class means, root mean square over classes) and
    ``synthesis/release_seconds``.

    Args:
        epsilon: > 0; infinity (``.inf`` in YAML) adds no noise, for comparison.
        delta: In (0, 1), less than 1 / n.
        schema: Of a table: a TableSchema, its dictionary, or its YAML file. Then classes and shape are known.
        num_classes: C of images or vectors; 1 for records without labels.
        input_shape: Shape of one image ``[channels, height, width]`` or vector ``[D]``.
        feature_widths: Hidden units of the feature network.
        latent_dim: Z, >= 1.
        samples_per_class: b, >= 2 (>= 1 with the estimator ``"v"``).
        steps_per_epoch: >= 1, in each process.
        lr: Learning rate of Adam, > 0.
        generator: Your own, see :mod:`lightning_eff.synthesis.generators`; ``None`` takes one that suits the records.
        release_options: What the release promises and how it reads: ReleaseOptions or a dictionary.
        feature_options: The feature network and the range of records: FeatureOptions or a dictionary.
        matching: Loss and schedule: MatchingOptions or a dictionary.
        split_batch: ``batch -> (x, y)``, for batches of another form.

    Attributes:
        embedding: The release, ``None`` before it.
        ledger: Every release and what it cost.
        steps_trained: How often the generator was trained on the release.
        features: The features; float32 whatever the trainer's precision.
        schema: Of a table, or ``None``.

    Raises:
        ValueError: An argument lies outside its range, or generator and records do not fit.
    """

    # for those who would change the training of any module
    refuses = {
        "pruning": "no batch of data is there to call it with. Cut the generator with apply_plan, with latent codes "
        "and labels as example, and go on training; that costs no privacy. Prune classifiers of what it generates in "
        "fits of their own",
        "private training": "its release is private already, and its steps read no data that noise would protect. Give "
        "it a Trainer without this strategy",
    }

    def __init__(
        self,
        epsilon: float,
        delta: float = 1e-5,
        *,
        schema: TableSchema | dict[str, Any] | str | Path | None = None,
        num_classes: int | None = None,
        input_shape: Sequence[int] | None = None,
        feature_widths: Sequence[int] = (200,),
        latent_dim: int = 10,
        samples_per_class: int = 50,
        steps_per_epoch: int = 100,
        lr: float = 1e-2,
        generator: nn.Module | None = None,
        release_options: ReleaseOptions | dict[str, Any] | None = None,
        feature_options: FeatureOptions | dict[str, Any] | None = None,
        matching: MatchingOptions | dict[str, Any] | None = None,
        split_batch: SplitBatch | None = None,
    ) -> None:
        super().__init__()
        gaussian_sigma(epsilon, delta)  # names the one that is out of range
        self.release_options = options_from(ReleaseOptions, release_options)
        self.feature_options = options_from(FeatureOptions, feature_options)
        self.matching = options_from(MatchingOptions, matching)
        check_whole("latent_dim", latent_dim, least=1)
        check_whole("samples_per_class", samples_per_class, least=2 if self.matching.estimator == "u" else 1)
        check_whole("steps_per_epoch", steps_per_epoch, least=1)
        check_number("lr", lr, above=0)
        self.epsilon, self.delta = float(epsilon), float(delta)
        self.space = RecordSpace.of(schema, num_classes, input_shape, self.feature_options.input_range)
        self.schema = self.space.schema
        self.num_classes = self.space.num_classes
        self.samples_per_class, self.steps_per_epoch, self.lr = samples_per_class, steps_per_epoch, lr
        self.split_batch = split_batch or split_pair
        self._save_plain_hyperparameters(schema, feature_widths)

        network = self.feature_options.network or FCFeatureNet(
            math.prod(self.space.shape), feature_widths, self.num_classes, seed=self.feature_options.seed
        )
        # no submodule: the features are not trained, stay in evaluation mode, and in single precision whatever the
        # trainer's, as vectors of bfloat16 would not be of norm 1
        vars(self)["features"] = NTKFeatures(
            network, input_shape=self.space.shape, sketch_dim=self.feature_options.sketch_dim
        )
        self.generator = generator or self.space.generator(latent_dim)
        self.noise_dim = int(getattr(self.generator, "noise_dim", latent_dim))
        self.space.check_generator(self.generator, self.noise_dim)

        self.embedding: MeanEmbedding | None = None
        self.ledger = PrivacyLedger(
            self.delta, max_epsilon=self.release_options.max_epsilon, adjacency=self.release_options.adjacency
        )
        self._tell_of_validation()
        self.keep_validation = self.release_options.allow_nonprivate_validation
        self.steps_trained = 0
        self._releases: list[str] = []
        self._trained_on: str | None = None
        self._in_use: str | None = None
        self._weights: Tensor | None = None
        self._release_seconds: float | None = None
        self._validation: Any = None

    def release(self, data: PrivateData | Rows, *, epsilon: float | None = None) -> MeanEmbedding:
        """Read private data once and release what the generator is trained on; the only method that reads them.

        A further call makes a further release, which the ledger adds up, and replaces the one in use: train again.

        Args:
            data: See :func:`~lightning_eff.synthesis.release_mean_embedding`; with a schema also rows.
            epsilon: Of this release, if another than the constructor's.

        Raises:
            ValueError: The data are not what they should be; nothing was released.
            PrivacyBudgetExceeded: ``max_epsilon`` would be passed; no record was read.
            RuntimeError: This process is one of several that do not run together yet; no record was read.
        """
        epsilon = self.epsilon if epsilon is None else epsilon
        data = encoded(data, self.schema)
        self.features.to(self.device)
        start = time.perf_counter()
        embedding = release_mean_embedding(
            data,
            self.features,
            self.num_classes,
            epsilon=epsilon,
            delta=self.delta,
            options=self.release_options,
            ledger=self.ledger,
            split_batch=self.split_batch,
            check=self.space.check_records,
        )
        self._release_seconds = time.perf_counter() - start
        self.embedding, self._weights = embedding, None
        self._in_use = release_fingerprint(embedding)
        self._releases.append(self._in_use)
        if math.isinf(epsilon):
            rank_zero_warn(NOT_PRIVATE)
        for sentence in class_warnings(embedding):
            rank_zero_warn(sentence)
        return embedding

    def privacy_report(self) -> PrivacyReport:
        """Return the guarantee, what it rests on and what it does not cover."""
        in_use = self._releases.index(self._in_use) + 1 if self._in_use in self._releases else None
        return privacy_report(self.ledger, self.embedding, self.release_options, self.schema, in_use)

    @property
    def noise_floor(self) -> float | None:
        """The ``train/mmd2`` that the noise of the release alone leaves in expectation; ``None`` before a release."""
        return None if self.embedding is None else noise_floor(self.embedding, self._class_weights().cpu())

    def generate(
        self,
        n: int,
        labels: Labels = None,
        *,
        seed: int | None = None,
        batch_size: int = 4096,
    ) -> SyntheticData:
        """Make records; costs no privacy.

        Args:
            n: How many, >= 1.
            labels: Class of all of them, or of each ``[n]``, as a number or as a category of the schema's label;
                ``None`` takes every class as often as the release has it, in random order.
            seed: Of latent codes and order; the same seed gives the same records. ``None`` draws one.
            batch_size: Samples at a time; the result does not depend on it.

        Raises:
            ValueError: ``n`` or ``batch_size`` is below 1, or a class is out of range.
        """
        check_whole("n", n, least=1)
        check_whole("batch_size", batch_size, least=1)
        if not self.steps_trained:
            rank_zero_warn("the generator has not been trained: its samples are arbitrary")
        elif self._trained_on not in (None, self._in_use):
            rank_zero_warn("the generator was trained on an earlier release: call trainer.fit(model) to train it again")
        seed = int.from_bytes(os.urandom(4)) if seed is None else seed
        random = torch.Generator().manual_seed(seed)
        names = () if self.schema is None else self.schema.label_categories or ()
        y = class_labels(n, labels, self._shares(), random, names)
        z = torch.randn(n, self.noise_dim, generator=random, dtype=torch.float32)
        with quiet_model(self.generator), torch.no_grad():
            x = torch.cat(
                [
                    self.generator(codes.to(self.device, self._generator_dtype), classes.to(self.device)).float().cpu()
                    for codes, classes in zip(torch.split(z, batch_size), torch.split(y, batch_size), strict=True)
                ]
            )
        return SyntheticData(x, y, self.schema, seed)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Map latent codes ``z [B, Z]`` and classes ``y [B]`` to records ``[B, ...]``."""
        x: Tensor = self.generator(z, y)
        return x

    features: NTKFeatures

    # Lightning's hooks, in the order in which they are called

    def on_fit_start(self) -> None:
        """Release, unless that has been done."""
        if self.trainer.world_size > 1:
            held = None if self.embedding is None else release_fingerprint(self.embedding)
            if len(set(Processes.running().gathered(held))) > 1:
                raise RuntimeError(
                    "the processes hold different releases, which add up to more than one ledger tells, and training "
                    f"would match a mixture: {ONE_RELEASE}"
                )
        if self.embedding is not None and self.private_loader is not None and self.trainer.ckpt_path is None:
            rank_zero_info(
                "There is a release already: the training data are not read; model.release(data) makes another one."
            )
        if self.embedding is None:
            if self.trainer.ckpt_path is not None:
                raise RuntimeError(
                    f"the checkpoint {self.trainer.ckpt_path} has not given its release back yet, and a second one "
                    "would spend privacy again: this strategy restores too late; call load_from_checkpoint and fit "
                    "that, or take another strategy"
                )
            if self.private_loader is None:
                raise RuntimeError(f"there is nothing to train on: {_TWO_WAYS}")
            self.release(self.private_loader())
        assert self.embedding is not None
        self.embedding, _ = self.embedding.to(self.device), self.features.to(self.device)
        self._weights = None
        self._class_weights()  # there may be no class with enough records
        if self.trainer.ckpt_path is None:
            self._log_release()

    def configure_optimizers(self) -> Any:
        """Adam over the generator's parameters, with the schedule asked for."""
        optimizer = torch.optim.Adam([p for p in self.generator.parameters() if p.requires_grad], self.lr)
        schedule = lr_scheduler(optimizer, self.matching, self.trainer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the squared discrepancy of new samples, ``b`` of each class.

        Raises:
            RuntimeError: The batch is no step token, so a private one.
        """
        if not isinstance(batch, StepToken):
            raise RuntimeError(f"training got a batch of data, which the release does not cover: {_TWO_WAYS}")
        x, y = self._samples(self.current_epoch, batch_idx)
        with torch.autocast(x.device.type, enabled=False):
            terms: MMD2Terms = self.features.mmd2_terms(
                self._released(), x.float(), y, weights=self._class_weights(), estimator=self.matching.estimator
            )
        self.steps_trained, self._trained_on = self.steps_trained + 1, self._in_use
        self.log("train/mmd2", terms.mmd2.detach(), batch_size=len(y), prog_bar=True)
        self.log("train/mmd2_cross", terms.mmd2.detach() - terms.target, batch_size=len(y))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(y))
        return terms.mmd2

    def on_validation_epoch_start(self) -> None:
        """Begin new class sums."""
        self._validation = self.features.to(self.device).sums(self.num_classes)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add private records to class sums, where that was allowed.

        Raises:
            RuntimeError: It was not.
        """
        if not self.release_options.allow_nonprivate_validation:
            raise RuntimeError(
                "validation got private records, and what it tells of them is not covered by the release: pass them "
                "in a datamodule, where they are left out, or ReleaseOptions(allow_nonprivate_validation=True)"
            )
        x, y = records_of(batch, self.num_classes, batch_idx, self.split_batch, self.device)
        self.space.check_records(x, batch_idx)
        with torch.autocast(x.device.type, enabled=False):
            self._validation.add(x, y)

    def on_validation_epoch_end(self) -> None:
        """Log the squared discrepancy of validation records and new samples, each class with the same weight."""
        held_out, self._validation = self._validation.embedding().to(dtype=torch.float32), None
        present = (held_out.counts > 0).float()
        held_out.counts = held_out.counts.clamp(min=1)
        x, y = self._samples(self.current_epoch, self.steps_per_epoch)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            value = self.features.mmd2(held_out, x.float(), y, weights=present / present.sum())
        self.log("val/mmd2", value, batch_size=len(y), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add release and ledger. Nothing else of the private data is held that could be added."""
        embedding = None if self.embedding is None else self.embedding.to("cpu").state_dict()
        checkpoint[_KEY] = {
            "embedding": embedding,
            "ledger": self.ledger.state_dict(),
            "releases": list(self._releases),
            "identity": self._identity(),
            "features": {name: tensor.cpu() for name, tensor in self.features.state_dict().items()},
            "steps_trained": self.steps_trained,
            "trained_on": self._trained_on,
        }
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if saved is not None:  # a subclass may have saved objects, or the name of a file, over plain values
            saved.update({"schema": self._plain["schema"]} if "_instantiator" in saved else self._plain)
            saved.update({name: value.item() for name, value in saved.items() if isinstance(value, np.generic)})

    @whole_state
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take release and ledger over.

        Raises:
            ValueError: The checkpoint is of another kind, or of another schema, feature network or promise; the first
                difference is named. Or both module and checkpoint have releases that the other does not know.
        """
        if _KEY not in checkpoint:
            raise ValueError("expected a checkpoint of DPNTKGenerator, got one without a release")
        state = checkpoint[_KEY]
        require_identity(self._identity(), state["identity"])
        saved = PrivacyLedger()
        saved.load_state_dict(state["ledger"])
        releases = parsed(list[str], state.get("releases", []), "releases")
        joined, self._releases = joined_history(self.ledger, self._releases, saved, releases)
        self.embedding = None if state["embedding"] is None else MeanEmbedding.from_state_dict(state["embedding"])
        self._in_use = None if self.embedding is None else release_fingerprint(self.embedding)
        self._weights, self.steps_trained = None, parsed(int, state["steps_trained"], "steps_trained")
        self._trained_on = parsed(str | None, state.get("trained_on"), "trained_on")
        own = {name: tensor.shape for name, tensor in self.features.state_dict().items()}
        if {name: tensor.shape for name, tensor in state["features"].items()} != own:
            raise ValueError(f"expected a feature network of {own}")
        # what cannot be undone comes last
        self.features.load_state_dict(state["features"])
        self.ledger.load_state_dict(joined.state_dict())
        self.ledger.max_epsilon = self.release_options.max_epsilon
        self._tell_of_validation()

    def _tell_of_validation(self) -> None:
        if self.release_options.allow_nonprivate_validation and VALIDATION not in self.ledger.not_covered:
            self.ledger.not_covered.append(VALIDATION)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "input_shape": list(self.space.shape),
            "schema": None if self.schema is None else self.schema.to_dict(),
            "feature network": {name: list(shape) for name, shape in self.features.layout.items()},
            "generator": type(self.generator).__name__,
            **promises(self.release_options),
            "epsilon": self.epsilon,
            "delta": self.delta,
        }

    def _save_plain_hyperparameters(self, schema: Any, feature_widths: Sequence[int]) -> None:
        # objects among the hyperparameters could not be loaded again: torch reads plain values only
        self._plain: dict[str, Any] = {
            "schema": None if self.schema is None else self.schema.to_dict(),
            "feature_widths": list(map(int, feature_widths)),
            "input_shape": None if self.schema is not None else list(self.space.shape),
            "release_options": plain_options(self.release_options),
            "feature_options": plain_options(self.feature_options),
            "matching": plain_options(self.matching),
        }
        self.save_hyperparameters(ignore=["generator", "split_batch", *self._plain])
        if "_instantiator" in self.hparams:  # built by LightningCLI, which knows all arguments as plain values
            self.save_hyperparameters()
            self.save_hyperparameters({"schema": self._plain["schema"]})  # the name of a file is true in one folder
        else:
            self.save_hyperparameters(self._plain)

    def _log_release(self) -> None:
        assert self.embedding is not None
        values = {
            "synthesis/epsilon": self.ledger.epsilon(),
            "synthesis/sigma": self.embedding.meta["sigma"],
            "synthesis/noise_norm": float(noise_norms(self.embedding).square().mean().sqrt()),
            "synthesis/signal_norm": float(
                (signal_norms(self.embedding) / self.embedding.counts).square().mean() ** 0.5
            ),
        }
        if self._release_seconds is not None:
            values["synthesis/release_seconds"] = self._release_seconds
        for logger in self.loggers:
            logger.log_metrics(values, step=0)

    def _released(self) -> MeanEmbedding:
        if self.embedding is None:
            raise RuntimeError(
                f"there is no release to train on yet: {_TWO_WAYS}. What trains before a fit has begun, such as a "
                "search of the learning rate, needs model.release(data) beforehand"
            )
        return self.embedding

    def _class_weights(self) -> Tensor:
        if self._weights is None:
            self._weights = class_weights(self._released(), self.matching.weighting)
        return self._weights

    def _samples(self, epoch: int, batch_idx: int) -> tuple[Tensor, Tensor]:
        """``b`` new samples of each class ``[B, ...]`` and their classes ``[B]``, from a stream of their own."""
        y = torch.arange(self.num_classes, device=self.device).repeat_interleave(self.samples_per_class)
        z = latent_codes(len(y), self.noise_dim, (self.matching.seed, self.global_rank, epoch, batch_idx))
        return self(z.to(self.device, self._generator_dtype), y), y

    @property
    def _generator_dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.generator.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def _shares(self) -> Tensor:
        prior = self.release_options.label_prior
        if not isinstance(prior, str):
            return torch.tensor(prior, dtype=torch.float64)
        if self.embedding is None:
            return torch.ones(self.num_classes, dtype=torch.float64)
        return self.embedding.counts.double().cpu()
