"""DPPrePruneCallback: prune or freeze most coordinates before the first step, and keep them so.

Source: arXiv 2306.11754 (pre-pruning) and arXiv 2303.04612 (parameter freezing, choices from public data only).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.documents import whole_state
from lightning_eff.privacy.prepruning.masks import (
    Masks,
    PruningUnit,
    choose_masks,
    prune_in_rounds,
    pruning_targets,
)
from lightning_eff.privacy.prepruning.scores import SynFlow, magnitude_scores, snip_scores
from lightning_eff.privacy.public_data import PublicSource, check_not_private, public_loader
from lightning_eff.privacy.selection.granularity import Scope
from lightning_eff.privacy.selection.plan import check_masks
from lightning_eff.privacy.selection.selected import Selection, pack_bits, unpack_bits
from lightning_eff.reporting import Column, Table, progress
from lightning_eff.surgery.in_trainer import cutters

Score = Literal["random", "magnitude", "snip", "synflow"]
Mode = Literal["prune", "freeze"]


class DPPrePruneCallback(Callback):
    """Restrict training to a part of the coordinates, chosen once without looking at private data.

    With ``DPGradientDropStrategy`` the coordinates that are out take part in neither clipping nor noise. With any other
    strategy they are put back after every optimizer step. Masks are written into checkpoints; a resumed run takes them
    from there and does not choose anew. With ``scope="layerwise"`` every tensor keeps ``round((1 - amount) n)``
    units. Biases and tensors of one dimension stay whole.

    Args:
        amount: share of the coordinates that goes, in [0, 1).
        score: ``"random"``; ``"magnitude"`` for weights that were trained on public data; ``"snip"`` asks the gradient
            on public data; ``"synflow"`` asks the network alone, in ``rounds`` rounds.
        mode: ``"prune"`` sets them to zero, ``"freeze"`` leaves them at the values they have when training starts.
        scope: the share holds in every tensor (``"layerwise"``), or of all coordinates together (``"global"``); None
            is global for ``synflow`` and layerwise otherwise.
        granularity: ``"element"``, or ``"row"``: output neurons and channels.
        public_data: for ``snip``: a data set, a loader or list of batches, or a data module whose training loader is
            taken. Nothing of it may be private.
        input_shape: for ``synflow``: shape of one input without the batch. None takes it from
            ``example_input_array``, or from the first sample of the training data, of which nothing else is used.
        exclude: patterns of parameter names that stay whole.
        min_keep_per_tensor: coordinates that every tensor keeps at least, >= 1.
        seed: of random choices.
        public_batches: how many public batches ``snip`` averages over, >= 1.
        rounds: of ``synflow``, >= 1.
        loss_fn: for ``snip``: ``(model, batch) -> loss``, the mean over the batch; None asks the training step of a
            copy of the module.
        split_batch: ``batch -> (inputs, target)``, for batches of another form; ``synflow`` without ``input_shape``
            reads one.

    Attributes:
        masks: by name, True where a coordinate is trained; empty until training starts.

    Raises:
        ValueError: an argument lies outside its range, or ``snip`` has no public data.
    """

    def __init__(
        self,
        amount: float = 0.5,
        score: Score = "random",
        mode: Mode = "prune",
        *,
        scope: Scope | None = None,
        granularity: PruningUnit = "element",
        public_data: PublicSource | None = None,
        input_shape: Sequence[int] | None = None,
        exclude: Sequence[str] = (),
        min_keep_per_tensor: int = 1,
        seed: int = 0,
        public_batches: int = 1,
        rounds: int = 100,
        loss_fn: LossFunction | None = None,
        split_batch: SplitBatch | None = None,
    ) -> None:
        check_number("amount", amount, least=0, below=1)
        for name, value, known in (
            ("score", score, Score),
            ("mode", mode, Mode),
            ("granularity", granularity, PruningUnit),
            ("scope", scope or "global", Scope),
        ):
            check_choice(name, value, get_args(known))
        for name, number in (
            ("min_keep_per_tensor", min_keep_per_tensor),
            ("public_batches", public_batches),
            ("rounds", rounds),
        ):
            check_whole(name, number)
        check_whole("seed", seed, 0)
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of patterns, got the string {exclude!r}")
        if (score == "snip") != (public_data is not None):
            raise ValueError(
                'score="snip" needs public_data, data that nobody needs to protect'
                if score == "snip"
                else f'public_data serves score="snip" only, got score={score!r}'
            )
        self.amount, self.score, self.mode = float(amount), score, mode
        self.scope: Scope = scope or ("global" if score == "synflow" else "layerwise")
        self.granularity = granularity
        self.public_data = public_data
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.exclude, self.min_keep_per_tensor, self.seed = tuple(exclude), int(min_keep_per_tensor), int(seed)
        self.public_batches, self.rounds, self.loss_fn = int(public_batches), int(rounds), loss_fn
        self.split_batch = split_batch
        self._public = None if public_data is None else public_loader(public_data)
        self.masks: Masks = {}
        self._settings: dict[str, Any] = {}
        self._keeping: list[tuple[nn.Parameter, Selection, Tensor]] = []
        self._hooks: list[Any] = []
        self._watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies whose processes hold pieces of parameters."""
        if stage == "fit" and isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"DPPrePruneCallback needs whole parameters in every process, {type(trainer.strategy).__name__} splits "
                'them: use one device, strategy="ddp" or "dp_gradient_drop_ddp"'
            )
        if stage == "fit" and (names := cutters(trainer)):
            raise ValueError(
                f"{names[0]} makes tensors smaller that DPPrePruneCallback has masks for: prune first, in a fit of its "
                f"own on public data, and pre-prune the smaller network then; or let {names[0]} only mask, "
                'Schedule(physical="never")'
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose, or take the choice of the checkpoint; apply it and see that it holds."""
        if self.masks:
            self._adopt(pl_module)
        else:
            targets = pruning_targets(pl_module, self.exclude, _optimized(trainer))
            self._check_public(trainer)
            masks, rescued = self._choose(trainer, pl_module, targets)
            if rescued:
                rank_zero_warn(
                    f"amount={self.amount} would leave {', '.join(rescued)} with less than "
                    f"min_keep_per_tensor={self.min_keep_per_tensor} coordinates: so many are kept"
                )
            self.masks = self._same_everywhere(trainer, masks)
            self._settings = self._current_settings()
        self._apply(trainer, pl_module)
        kept, whole = self._counts()
        verb = "pruned to zero" if self.mode == "prune" else "frozen"
        rank_zero_info(
            f"DPPrePruneCallback: {whole - kept:,} of {whole:,} coordinates in {len(self.masks)} tensors are {verb} "
            f"({self._settings['score']}, {self._settings['scope']}, by {self._settings['granularity']})."
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Follow a module that takes another optimizer while it is trained."""
        if self._keeping:
            self._watch(optimizer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Put coordinates back where an optimizer has no hook for it."""
        if self._keeping and not self._hooks:
            self._put_back()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take hooks off the optimizers."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take hooks off the optimizers."""
        self._release()

    def table(self) -> Table:
        """Kept coordinates of every tensor."""
        rows = [(name, int(mask.sum()), mask.numel(), float(mask.float().mean())) for name, mask in self.masks.items()]
        columns: list[str | Column] = ["tensor", Column("kept", ","), Column("of", ","), Column("share", ".1%")]
        return Table("Coordinates that are trained", columns, rows)

    def state_dict(self) -> dict[str, Any]:
        """Masks packed to bits, and the settings they were chosen with."""
        masks = {name: {"shape": list(mask.shape), "bits": pack_bits(mask)} for name, mask in self.masks.items()}
        return {"masks": masks, "settings": self._settings}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up masks; they hold, whatever the settings are now."""
        self.masks = {name: unpack_bits(one["bits"], one["shape"]) for name, one in state_dict["masks"].items()}
        self._settings = dict(state_dict["settings"])

    def _current_settings(self) -> dict[str, Any]:
        return {
            "amount": self.amount,
            "score": self.score,
            "mode": self.mode,
            "scope": self.scope,
            "granularity": self.granularity,
            "exclude": list(self.exclude),
            "min_keep_per_tensor": self.min_keep_per_tensor,
            "seed": self.seed,
        }

    def _counts(self) -> tuple[int, int]:
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return kept, sum(mask.numel() for mask in self.masks.values())

    def _check_public(self, trainer: Trainer) -> None:
        if self._public is None:
            return
        trainer.fit_loop.setup_data()
        check_not_private(self._public, trainer.train_dataloader, "DPPrePruneCallback(public_data=...)")

    def _choose(
        self, trainer: Trainer, pl_module: LightningModule, targets: Mapping[str, nn.Parameter]
    ) -> tuple[Masks, list[str]]:
        options: dict[str, Any] = {
            "scope": self.scope,
            "granularity": self.granularity,
            "min_keep_per_tensor": self.min_keep_per_tensor,
        }
        if self.score == "synflow":
            synflow = SynFlow(pl_module, self._inputs(trainer, pl_module), targets)
            with progress("SynFlow", self.rounds, enabled=trainer.is_global_zero, unit="rounds") as bar:
                return prune_in_rounds(
                    {name: one.detach() for name, one in targets.items()},
                    self.amount,
                    synflow.scores,
                    rounds=self.rounds,
                    advance=bar.advance,
                    **options,
                )
        scores = None
        if self.score == "magnitude":
            scores = magnitude_scores(targets)
        elif self.score == "snip":
            assert self._public is not None
            scores = snip_scores(
                pl_module, self._public, targets, loss_fn=self.loss_fn, most=self.public_batches, seed=self.seed
            )
        return choose_masks(targets, self.amount, scores, seed=self.seed, **options)

    def _inputs(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Something of the form of the network's inputs."""
        if self.input_shape is not None:
            return torch.ones(1, *self.input_shape)
        if pl_module.example_input_array is not None:
            return pl_module.example_input_array
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
            raise ValueError(
                'score="synflow" does not know the shape of an input here: give input_shape, e.g. [3, 224, 224]'
            )
        collate = getattr(loader, "collate_fn", None) or default_collate
        batch = trainer.strategy.batch_to_device(collate([dataset[0]]), pl_module.device)
        return (self.split_batch or split_pair)(batch)[0]

    def _same_everywhere(self, trainer: Trainer, masks: Masks) -> Masks:
        """The first process's masks: public loaders and sums on accelerators may differ between processes."""
        if trainer.world_size == 1:
            return masks
        bits = trainer.strategy.broadcast({name: pack_bits(mask) for name, mask in masks.items()})
        return {name: unpack_bits(one, masks[name].shape).to(masks[name].device) for name, one in bits.items()}

    def _adopt(self, pl_module: LightningModule) -> None:
        """Take masks that were chosen before."""
        parameters = {name: one for name, one in pl_module.named_parameters() if one.requires_grad}
        try:
            check_masks(self.masks, parameters)
        except ValueError as error:
            raise ValueError(f"the masks of DPPrePruneCallback were chosen for another network: {error}") from None
        changed = {
            name: (old, new)
            for name, new in self._current_settings().items()
            if (old := self._settings.get(name)) != new
        }
        if changed:
            told = ", ".join(f"{name} is {old!r} there and {new!r} now" for name, (old, new) in changed.items())
            rank_zero_warn(
                f"DPPrePruneCallback goes on with the masks it was saved with; other settings have no effect ({told}). "
                "To choose anew, make a new callback and start from weights alone"
            )
            self.mode = self._settings["mode"]

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        self.masks = {name: mask.to(parameters[name].device) for name, mask in self.masks.items()}
        if self.mode == "prune":
            with torch.no_grad():
                for name, mask in self.masks.items():
                    parameters[name].masked_fill_(~mask, 0)
        if hasattr(trainer.strategy, "set_static_masks"):
            trainer.strategy.set_static_masks(self.masks, self.mode)
            return
        self._release()
        for name, mask in self.masks.items():
            parameter = parameters[name]
            before = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            if self.mode == "freeze":
                before = parameter.detach().clone()
            self._keeping.append((parameter, Selection(mask.shape, mask=mask), before))
        if all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in trainer.optimizers):
            for optimizer in trainer.optimizers:
                self._watch(optimizer)

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.Optimizer) and optimizer not in self._watched:
            self._watched.add(optimizer)
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._put_back()))

    def _put_back(self) -> None:
        for parameter, selection, before in self._keeping:
            selection.put_back(parameter, before)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._keeping, self._watched = [], [], weakref.WeakSet()


def _optimized(trainer: Trainer) -> set[int] | None:
    """Ids of the parameters that optimizers change; None where optimizers do not tell."""
    groups = [getattr(optimizer, "param_groups", None) for optimizer in trainer.optimizers]
    if not groups or None in groups:
        return None
    return {id(parameter) for several in groups for group in several or () for parameter in group["params"]}
