"""The training of agent and backbone in a Trainer: an episode a batch, and whose turn it is learns.

arXiv 2404.03482, section 3; :class:`~lightning_eff.glimpse.module.AdaGlimpseModule` adds what comes after training.
Letters: B images, T glimpses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.documents import whole_state
from lightning_eff.glimpse.agent.replay import GlimpseReplayBuffer
from lightning_eff.glimpse.agent.sac import make_sac
from lightning_eff.glimpse.backbones.base import GlimpseBackbone, Seen
from lightning_eff.glimpse.config import ACTION_SIZE, AgentConfig, GlimpseConfig, RewardOptions, TrainingPlan
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.geometry import views_of
from lightning_eff.glimpse.in_trainer import (
    check_trainer,
    progress,
    refuse_averages_of_one_optimizer,
    share_buffers,
    tell_of_missed_checkpoints,
)
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.scheduling.options import options_from
from lightning_eff.glimpse.scheduling.phases import (
    Counts,
    Phase,
    batches_of_a_turn,
    learning_rate_factor,
    phase_of,
    progress_after,
    trains_agent,
    trains_backbone,
    turns_begun,
)
from lightning_eff.glimpse.scheduling.randomness import RandomStream
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.world import FULL_VIEW, GlimpseWorld, evaluating

_KEY = "lightning_eff.glimpse"
_VERSION = 1
_PATIENCE = 50  # batches without any change of scores until that is worth a warning
_SHOWN = ("return", "alpha", "phase")  # by the progress bar
_FULL_FIRST = 0.5  # share of batches of pretraining that begin with the largest view


class EpisodicModule(LightningModule):
    """Trains a backbone and an agent of its own; arguments as of AdaGlimpseModule.

    Attributes:
        sac: The agent.
        policy: Its networks.
        counts: How far training has come.

    Raises:
        ValueError: Arguments that do not go together.
    """

    def __init__(
        self,
        backbone: GlimpseBackbone,
        task: Task,
        glimpse: GlimpseConfig,
        agent: AgentConfig,
        plan: TrainingPlan,
        reward: RewardOptions,
        backbone_optimizer: OptimizerCallable,
        teacher: nn.Module | None,
        split_batch: SplitBatch | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.glimpse = options_from(GlimpseConfig, glimpse)
        self.agent = options_from(AgentConfig, agent)
        self.plan = options_from(TrainingPlan, plan)
        self.reward = options_from(RewardOptions, reward)
        self.backbone, self.task, self.backbone_optimizer = backbone, task, backbone_optimizer
        vars(self)["teacher"] = teacher  # no submodule: it is not trained, and not this run's to save
        self._split = split_batch
        if trains_backbone(self.plan) and not any(one.requires_grad for one in backbone.parameters()):
            raise ValueError(
                f"{type(backbone).__name__} has no weights to train, and the plan trains them: use "
                "TrainingPlan(pretrain_epochs=0, regime='frozen')"
            )
        _ = self.world  # say what does not go together
        self.sac = make_sac(self.agent, self.glimpse, backbone)
        self.policy = self.sac.policy
        self.counts = Counts()
        self._seed = int(torch.randint(2**62, ()))
        self._stream: RandomStream | None = None
        self._warned_of_warmup = False
        self._not_held: list[str] = []  # arguments that checkpoints cannot hold

    teacher: nn.Module | None

    @property
    def world(self) -> GlimpseWorld:
        """A new world of this backbone, task and camera."""
        return GlimpseWorld(self.backbone, self.task, self.glimpse, self.reward, self.agent.state_parts)

    def act(self, observation: Observation, deterministic: bool = True) -> Tensor:
        """Return the agent's actions (y, x, z) in [0, 1] [A, 3]."""
        return self.sac.act(observation, deterministic)

    def setup(self, stage: str) -> None:
        """Say what the trainer cannot do, before any work."""
        if stage == "fit":
            check_trainer(self.trainer, self.agent)
            refuse_averages_of_one_optimizer(self.trainer)
            tell_of_missed_checkpoints(self.trainer)
            self.policy.train()  # Lightning warns of modules that are not

    def configure_optimizers(self) -> Any:
        """Return the agent's own optimizers, of actor, critics and temperature, then the backbone's."""
        optimizers = list(self.sac.optimizers)
        if trains_backbone(self.plan):
            parameters = [one for one in self.backbone.parameters() if one.requires_grad]
            optimizers.append(self.backbone_optimizer(parameters))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        return optimizers

    def on_fit_start(self) -> None:
        """Bring what is no submodule to the device."""
        self._begin()
        self._warned_of_warmup = False
        if self.glimpse.max_view == self.glimpse.camera_size:
            rank_zero_info("The largest field of view is the smallest one: the agent's zoom has no effect.")

    def on_train_start(self) -> None:
        """Bring it there where a tuner trains before the fit begins."""
        self._begin()

    def _begin(self) -> None:
        self.sac.move_to(self.device)
        if self._stream is None:
            self._stream = RandomStream(self._seed + self.trainer.global_rank)

    # Training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take one episode of each image, and let learn whose turn it is."""
        assert self._stream is not None
        images, target = self._images_and_target(batch)
        phase = phase_of(self.plan, self.current_epoch, self.counts.turns)
        if not batch_idx:  # of an epoch's batches the last one alone may be smaller
            self._check_room(len(images))
        self._set_learning_rates(batch_idx)
        told: dict[str, list[Tensor]] = {}
        with self._stream.running(self.device), self._agent_in_trainer(told):
            try:
                logged = self._pretrain(images, target) if phase.random else self._play(images, target, phase)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error} (phase {phase.name}, epoch {self.current_epoch}, batch {batch_idx})"
                ) from error
        self.counts.turns += turns_begun(self.plan, self.current_epoch)
        logged |= {name: torch.stack(values).mean() for name, values in told.items()}
        logged["phase"] = torch.tensor(float(phase.number))
        for shown in (True, False):
            some = {f"glimpse/{name}": value for name, value in logged.items() if (name in _SHOWN) is shown}
            self.log_dict(some, prog_bar=shown, batch_size=len(images))

    def _pretrain(self, images: Tensor, target: Any) -> dict[str, Tensor]:
        """Teach the backbone from 0 to T glimpses at random places, half of the batches from the largest view on."""
        world = self._training_world(("box",))
        world.reset(images, target, scored=False)
        images, seen = world.images, world.seen
        count = int(torch.randint(self.backbone.least_glimpses, self.glimpse.num_glimpses + 1, ()))
        full_first = bool(torch.rand(()) < _FULL_FIRST)
        for t in range(count):
            if t == 0 and full_first:
                actions = torch.tensor(FULL_VIEW, device=self.device).expand(len(images), ACTION_SIZE)
            else:
                actions = self._drawn_views(images)
            seen = world.step(actions).seen
        return {"backbone_loss": self._teach_backbone([seen], images, target, self._teach(images))}

    def _drawn_views(self, images: Tensor) -> Tensor:
        """Return actions at random [B, 3], of several the one that shows the most contrast."""
        drawn = torch.rand(self.plan.pretrain_tries, len(images), ACTION_SIZE, device=self.device)
        if len(drawn) == 1:
            return drawn[0]
        shown = [take_glimpse(images, views_of(actions, self.glimpse), self.glimpse).patches for actions in drawn]
        contrast = torch.stack([patches.float().flatten(1).std(1) for patches in shown])
        return drawn[contrast.argmax(0), torch.arange(len(images), device=self.device)]

    def _play(self, images: Tensor, target: Any, phase: Phase) -> dict[str, Tensor]:
        """Let the agent look, remember what it was paid, and let learn whose turn it is."""
        replay = self.agent.replay
        buffer = self._buffer
        stores = phase.agent or (trains_agent(self.plan) and not replay.clear_on_switch)
        if phase.agent and self.counts.stale and replay.clear_on_switch:
            buffer.reset()
            self.counts.stale = False
        world = self._training_world(self.agent.state_parts)
        teacher = self._teach(images)
        world.reset(images, target, teacher, scored=stores)
        images = world.images
        seen: list[Seen] = []
        logged: dict[str, Tensor] = {}
        rewards, scores, rises = [], [], []
        while world.active:
            actions, before = self._choose(world.observation), world.score
            step = world.step(actions)
            self.counts.glimpses += 1
            logged[f"mean_scale_t{world.taken}"] = step.actions[:, 2].mean()
            if phase.backbone:
                seen = [*seen, step.seen] if self.plan.loss_at != "last" else [step.seen]
            if step.reward is not None and step.score is not None and before is not None:
                buffer.add_step(step.observation, actions, step.reward, step.done, step.rows)
                self.counts.env_steps += len(step.rows)
                rewards.append(step.reward)
                scores.append(step.score.mean())
                rises.append(step.score - before)
            if phase.agent and buffer.size() >= replay.batch_size:
                self.sac.train(replay.updates_per_step, replay.batch_size)
        if rewards:
            paid = torch.stack(rewards).sum(0).mean()
            logged |= {"return": paid, "score_first": scores[0], "score_last": scores[-1]}
            self._watch(torch.stack(rises))
        if phase.backbone:
            if self.plan.loss_at == "random":
                seen = [seen[int(torch.randint(len(seen), ()))]]
            logged["backbone_loss"] = self._teach_backbone(seen, images, target, teacher)
            self.counts.stale = True
        logged["buffer_fill"] = torch.tensor(buffer.size() / replay.buffer_size)
        logged["env_steps"] = torch.tensor(float(self.counts.env_steps))
        return logged

    def _choose(self, observation: Observation) -> Tensor:
        if self.counts.glimpses < self.agent.replay.random_steps:
            return torch.rand(len(observation), ACTION_SIZE, device=self.device)
        return self.sac.act(observation)

    def _teach_backbone(self, seen: list[Seen], images: Tensor, target: Any, teacher: Tensor | None) -> Tensor:
        losses = []
        for one in seen:
            prediction = self.backbone.predict(self.backbone.encode(one), one)
            losses.append(self.task.loss(prediction, images, target, teacher))
        loss = torch.stack(losses).mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of the backbone is {loss.item()} after {[one.views.shape[1] for one in seen]} glimpses: "
                "lower its learning rate, or look at the images and targets of this batch"
            )
        optimizer = self._optimizers()[-1]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.trainer.world_size > 1:
            share_buffers(self.backbone)
        return loss.detach()

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor | None:
        """What the teacher says of whole scenes."""
        if self.teacher is None:
            return None
        self.teacher.to(self.device)
        with evaluating(self.teacher):
            predicted: Tensor = call_model(self.teacher, images if images.is_floating_point() else images.float() / 255)
        return predicted

    def _training_world(self, state_parts: tuple[Any, ...]) -> GlimpseWorld:
        config = replace(self.glimpse, stop_threshold=None)
        return GlimpseWorld(self.backbone, self.task, config, self.reward, state_parts)

    def _set_learning_rates(self, batch_idx: int) -> None:
        plan, done = self.plan, progress(self.trainer, batch_idx)
        epochs = self.trainer.max_epochs
        start = min(plan.pretrain_epochs / epochs, 1) if epochs is not None and epochs > 0 else 0
        backbone = learning_rate_factor(plan, done)
        still = plan.learning_rates == "cosine_backbone"
        agent = 1.0 if still else learning_rate_factor(plan, progress_after(done, start))
        optimizers = self._optimizers()
        for i, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (agent if i < len(self.sac.optimizers) else backbone)

    @contextmanager
    def _agent_in_trainer(self, told: dict[str, list[Tensor]]) -> Iterator[None]:
        """Let the agent's steps count in the trainer, its gradients be those of all processes, and gather its logs."""
        sac, plain, backward, log = self.sac, self.sac.optimizers, self.sac.backward, self.sac.log
        try:
            sac.optimizers = self._optimizers()[: len(plain)]
            sac.backward = self.manual_backward
            sac.log = lambda name, value: told.setdefault(name, []).append(value)
            yield
        finally:
            sac.optimizers, sac.backward, sac.log = plain, backward, log

    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)  # of actor and critics at least
        return optimizers

    @property
    def _buffer(self) -> GlimpseReplayBuffer:
        assert isinstance(self.sac.replay_buffer, GlimpseReplayBuffer)
        return self.sac.replay_buffer

    def _check_room(self, images: int) -> None:
        """Raise a ValueError, also before pretraining, if the buffer would never hold a batch of transitions.

        It drops whole batches of episodes, and everything on a switch if so wished.
        """
        plan, epochs = self.plan, self.trainer.max_epochs
        if not trains_agent(plan) or (epochs is not None and 0 <= epochs <= plan.pretrain_epochs):
            return
        replay, transitions = self.agent.replay, images * self.glimpse.num_glimpses
        held = replay.buffer_size // transitions * transitions
        if held < replay.batch_size:
            raise ValueError(
                f"{images} images of {self.glimpse.num_glimpses} glimpses are {transitions} transitions, which leave "
                f"the buffer together: buffer_size = {replay.buffer_size} holds {held} of them, and an update takes "
                f"batch_size = {replay.batch_size}; use buffer_size >= "
                f"{-(-replay.batch_size // transitions) * transitions}"
            )
        turn = batches_of_a_turn(plan, self.trainer.num_training_batches)
        if replay.clear_on_switch and turn * transitions < replay.batch_size:
            raise ValueError(
                f"clear_on_switch forgets transitions once the backbone has learnt, so that {turn} x {transitions} are "
                f"together at most, and an update takes batch_size = {replay.batch_size}: use a smaller one, longer "
                "turns (alternate_every), or clear_on_switch=False"
            )

    def _watch(self, rises: Tensor) -> None:
        self.counts.unpaid = 0 if bool(rises.any()) else self.counts.unpaid + 1
        if self.counts.unpaid == _PATIENCE:
            rank_zero_warn(
                f"no glimpse changed a score in {_PATIENCE} batches: the task is solved without looking, or the "
                "backbone does not look at glimpses (train it first: pretrain_epochs)"
            )

    def on_train_epoch_end(self) -> None:
        """Tell of an agent that has not been asked yet."""
        left = self.agent.replay.random_steps - self.counts.glimpses
        asked = trains_agent(self.plan) and self.current_epoch >= self.plan.pretrain_epochs
        if asked and left > 0 and not self._warned_of_warmup:
            self._warned_of_warmup = True
            rank_zero_warn(
                f"the agent has not been asked for a glimpse in this epoch: {left} of random_steps = "
                f"{self.agent.replay.random_steps} steps at random are still to go, {self.glimpse.num_glimpses} a batch"
            )

    def on_fit_end(self) -> None:
        """Leave the device, as the trainer lets the module do, and the agent with the learning rate it was given."""
        self._buffer.move_to("cpu")
        for optimizer in self.sac.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]

    def _images_and_target(self, batch: Any) -> tuple[Tensor, Any]:
        if self._split is None and isinstance(batch, Tensor):
            return batch, None
        return (self._split or split_pair)(batch)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what training needs to go on as if it had not stopped: transitions, counters, random numbers."""
        goes_on = "optimizer_states" in checkpoint  # else weights alone are saved
        checkpoint[_KEY] = {
            "version": _VERSION,
            "num_glimpses": self.glimpse.num_glimpses,
            "not_held": self._not_held,
            "counts": asdict(self.counts),
            "updates": self.sac._n_updates,
            "stream": None if self._stream is None else self._stream.state_dict(),
            "buffer": self._buffer.state_dict() if goes_on and self.agent.replay.resume_buffer else None,
        }

    @whole_state
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where training stopped; in several processes, all of them from the transitions of the first."""
        saved = checkpoint.get(_KEY)
        if saved is None:
            return
        if saved["version"] != _VERSION:
            raise ValueError(f"expected a checkpoint of glimpses in version {_VERSION}, got {saved['version']!r}")
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            self._not_held = saved["not_held"]
            return
        own, theirs = self.glimpse.num_glimpses, saved["num_glimpses"]
        resumes = self.agent.replay.resume_buffer and saved["buffer"] is not None
        if resumes and own != theirs:
            raise ValueError(
                f"the checkpoint holds transitions of num_glimpses = {theirs}, this module takes {own}: go on without "
                "them (ReplayOptions(resume_buffer=False)), or with the same number"
            )
        if resumes:
            self._buffer.load_state_dict(saved["buffer"])
        self.counts, self.sac._n_updates = Counts(**saved["counts"]), saved["updates"]
        self._stream = None  # of a checkpoint from before the fit, as tuners write them
        if saved["stream"] is not None:
            self._stream = RandomStream(self._seed)
            self._stream.load_state_dict(saved["stream"], other=trainer.global_rank)
