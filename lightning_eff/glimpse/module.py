"""AdaGlimpseModule: train an agent that looks and a backbone that predicts from what it saw, by any Lightning Trainer.

One training step is one episode of every image of a batch: arXiv 2404.03482, section 3. Letters: B images, T glimpses.
"""

from __future__ import annotations

from typing import Any, Self

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch
from lightning_eff.glimpse.backbones.base import GlimpseBackbone
from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, RewardOptions, TrainingPlan
from lightning_eff.glimpse.episodic_module import EpisodicModule
from lightning_eff.glimpse.exploration import Predictions, Trajectory, explore, needs_scores
from lightning_eff.glimpse.metrics import PolicyMetrics
from lightning_eff.glimpse.policies import Policy, PolicyLike, make_policy
from lightning_eff.glimpse.scheduling.options import paper_optimizer, plain_arguments
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.surgery.structure import prunable


@prunable
class AdaGlimpseModule(EpisodicModule):
    """Learn where to look next and how far to zoom, and what to make of what was seen.

    Batches are ``(images, target)``, or images alone where the task needs no target; images ``[B, C, H, W]`` are
    floating point or bytes. Episodes of training never stop early, whatever ``stop_threshold`` says: the backbone
    learns from all T glimpses, and thresholds can be changed afterwards.

    Every step of every optimizer counts in ``trainer.global_step``, hence in ``max_steps`` and ``every_n_train_steps``:
    ``updates_per_step`` times T times two or three a batch for the agent, one for the backbone. A ModelCheckpoint with
    ``every_n_train_steps`` saves only after batches at whose end their count is a multiple of it, seldom or never:
    ``every_n_epochs`` and ``train_time_interval`` are sure. It warns that it saves the state after a batch's steps:
    that is the state to go on from.

    Training logs, behind ``glimpse/``: ``return``, ``score_first`` and ``score_last`` (means over images after the
    first and after the last glimpse), ``mean_scale_t{t}`` (zoom), ``actor_loss``, ``critic_loss``, ``alpha_loss``,
    ``alpha``, ``entropy`` (nats on [0, 1]^3), ``q_mean``, ``backbone_loss``, ``buffer_fill`` (share), ``env_steps``
    (transitions stored), ``phase`` (0 pretraining, 1 agent, 2 backbone, 3 both). Validation and test log each metric
    of the task after t glimpses and after the last one (``val/accuracy@{t}``, ``val/accuracy``), ``val/avg_glimpses``
    and ``val/pixel_percent`` of the policy without its noise; the same of each baseline (``val/random/accuracy``).

    Args:
        backbone: Predicts from glimpses.
        task: Judges predictions.
        glimpse: Camera, scene, end of an episode.
        agent: Soft actor-critic and its replay buffer.
        plan: Who learns when.
        reward: What a glimpse is paid.
        backbone_optimizer: ``parameters -> optimizer`` of the backbone; AdamW with the paper's 1e-5 by default. The
            command line's own ``--optimizer`` would take the place of this one and of the agent's.
        teacher: Called with whole scenes; its predictions take the place of targets where the task says so. Neither
            trained nor written into checkpoints.
        baselines: Names of policies to validate and test besides, see
            :func:`~lightning_eff.glimpse.policies.make_policy`.
        split_batch: ``batch -> (images, target)``, for batches of another form.
        every_glimpse: Whether validation and test predict after every glimpse; False predicts once an image, where
            predictions are dear.

    Attributes:
        sac: The agent, a ``stable_baselines3.SAC``; its ``save`` works, and ``GlimpseSAC.load`` of that file.
        results: Of the last pass over ``"val"`` and over ``"test"`` data: policy, ``"policy"`` being the agent's, to
            name to value.

    Raises:
        ValueError: Arguments that do not go together, before any work.
    """

    # for those who would change the training of any module
    refuses = {
        "pruning": "its backbone is called with glimpses, not with a batch. Prune the backbone before, inside of a "
        "module that maps whole images to its predictions, and hand it over then",
        "private training": "the agent is paid for and replays what it saw of single images, which no noise covers. "
        "Train the backbone privately before, and explore images that nobody needs to protect",
    }

    def __init__(
        self,
        backbone: GlimpseBackbone,
        task: Task,
        glimpse: GlimpseConfig,
        agent: AgentConfig = AgentConfig(),  # noqa: B008 (frozen)
        plan: TrainingPlan = TrainingPlan(),  # noqa: B008 (frozen)
        reward: RewardOptions = RewardOptions(),  # noqa: B008 (frozen)
        backbone_optimizer: OptimizerCallable = paper_optimizer,
        teacher: nn.Module | None = None,
        baselines: tuple[str, ...] = ("random",),
        split_batch: SplitBatch | None = None,
        every_glimpse: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(backbone, task, glimpse, agent, plan, reward, backbone_optimizer, teacher, split_batch)
        self._hyperparameters(given)
        self.baselines, self.every_glimpse = tuple(baselines), every_glimpse
        self._baseline_policies()  # say which one is unknown
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        self._metrics: dict[str, PolicyMetrics] = {}
        self._judged: dict[str, PolicyLike] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Return predictions from the glimpses that the agent takes of images [B, C, H, W]: [B, ...]."""
        prediction = self.explore(images).prediction
        assert prediction is not None
        return prediction.to(self.device)

    def explore(
        self,
        images: Tensor,
        policy: str | PolicyLike | None = None,
        target: Any = None,
        *,
        deterministic: bool = True,
        predictions: Predictions = "last",
        scored: bool = False,
        max_glimpses: int | None = None,
        batch_size: int = 256,
    ) -> Trajectory:
        """Look at images, without a Trainer; see :func:`~lightning_eff.glimpse.exploration.explore`.

        Args:
            images: Scenes [B, C, H, W].
            policy: The agent if None; the name of a baseline, or anything from observations to actions.
            target: Of the images, where something needs it.
            deterministic: Whether the agent leaves its noise out.
            predictions: ``"last"``, ``"all"`` or ``"none"``.
            scored: Whether to score after every glimpse.
            max_glimpses: T, if not the configuration's.
            batch_size: Images looked at together.
        """
        if policy is None:
            policy = self.act if deterministic else self.sac.act
        elif isinstance(policy, str):
            policy = make_policy(policy, self.glimpse)
        images = images.to(self.device)
        teacher = self._teach(images) if scored or needs_scores(policy) else None
        return explore(
            self.world,
            images,
            policy,
            self._on_device(target),
            teacher=teacher,
            predictions=predictions,
            scored=scored,
            max_glimpses=max_glimpses,
            batch_size=batch_size,
        )

    # Validation, test, prediction

    def on_validation_epoch_start(self) -> None:
        """Begin a pass."""
        self._begin_pass()

    def on_test_epoch_start(self) -> None:
        """Begin a pass."""
        self._begin_pass()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Let every policy look at a batch."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Let every policy look at a batch."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what every policy reached."""
        self._end_pass("val")

    def on_test_epoch_end(self) -> None:
        """Log what every policy reached."""
        self._end_pass("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Trajectory:
        """Look at one batch ``(images, target)``, or at images alone."""
        return self.explore(self._images_and_target(batch)[0])

    def _begin_pass(self) -> None:
        self._judged = {"policy": self.act, **self._baseline_policies()}
        self._metrics = {name: PolicyMetrics(self.world, self.every_glimpse) for name in self._judged}

    def _evaluate(self, batch: Any) -> None:
        images, target = self._images_and_target(batch)
        teacher = self._teach(images) if any(needs_scores(policy) for policy in self._judged.values()) else None
        for name, policy in self._judged.items():
            self._metrics[name].update(policy, images, target, teacher)

    def _end_pass(self, stage: str) -> None:
        metrics, self._metrics, self._judged = self._metrics, {}, {}
        self.results[stage] = {}
        for policy, one in metrics.items():
            values = one.compute()
            self.results[stage][policy] = {name: float(value) for name, value in values.items()}
            prefix = stage if policy == "policy" else f"{stage}/{policy}"
            self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, sync_dist=True)

    def _baseline_policies(self) -> dict[str, Policy]:
        return {name: make_policy(name, self.glimpse) for name in self.baselines}

    def _on_device(self, target: Any) -> Any:
        return target.to(self.device) if isinstance(target, Tensor) else target

    # Checkpoints

    def _hyperparameters(self, given: dict[str, Any]) -> None:
        self.save_hyperparameters(ignore=list(given))
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives everything as plain data
            self.save_hyperparameters()
            return
        plain = plain_arguments(given)
        self.save_hyperparameters(plain)
        default = {"backbone_optimizer": paper_optimizer}
        self._not_held = [name for name, value in given.items() if name not in plain and default.get(name) != value]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module from a checkpoint; see Lightning's method of this name.

        Args:
            checkpoint_path: Of the checkpoint.
            *args: Of Lightning's method.
            **kwargs: Of Lightning's method and of the module. A module built in Python has its backbone and task
                handed over again, and what else is not plain data: ``load_from_checkpoint(path, backbone=...,
                task=...)``.

        Raises:
            TypeError: Backbone or task are missing.
        """
        try:
            loaded = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except TypeError as error:
            if "missing" not in str(error):
                raise
            raise TypeError(
                f"{error}. A backbone and a task that were handed over as objects are not in the checkpoint: call "
                f"{cls.__name__}.load_from_checkpoint(path, backbone=..., task=...)"
            ) from error
        forgotten = [name for name in loaded._not_held if name not in kwargs]
        if forgotten:
            rank_zero_warn(
                f"{', '.join(forgotten)}: not plain data, so not in the checkpoint, and not handed over to "
                "load_from_checkpoint; this module has the default"
            )
        return loaded
