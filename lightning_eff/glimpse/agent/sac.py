"""Soft actor-critic on packed observations: Stable-Baselines3's networks, a faster update, room for a Trainer.

arXiv 1801.01290; temperature: arXiv 1812.05905. Inside, actions are u = 2 a - 1 in [-1, 1]^3, as Stable-Baselines3 has
them; densities of a and u differ by a factor of 2 a dimension: log p(a) = log p(u) + 3 ln 2.

Letters: M transitions of an update, h width of the extractor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.glimpse.agent.extractor import GlimpseExtractor
from lightning_eff.glimpse.agent.policy import GlimpsePolicy
from lightning_eff.glimpse.agent.replay import GlimpseReplayBuffer
from lightning_eff.glimpse.backbones.base import GlimpseBackbone
from lightning_eff.glimpse.config import ACTION_SIZE, AgentConfig, GlimpseConfig
from lightning_eff.glimpse.observation import Observation, observation_space
from lightning_eff.glimpse.world import check_state_parts, evaluating
from lightning_eff.surgery.state import parameters_require_grad

#: log p on [0, 1]^3 less log p on [-1, 1]^3, in nats.
NATS_OF_UNITS = ACTION_SIZE * math.log(2)


def make_sac(agent: AgentConfig, glimpse: GlimpseConfig, backbone: GlimpseBackbone) -> GlimpseSAC:
    """Build agent and replay buffer on the CPU; global random generators advance by what new weights take.

    Args:
        agent: Options.
        glimpse: Tells sizes of patches and numbers of tokens.
        backbone: Tells channels and what states can hold.

    Raises:
        ValueError: The agent looks at a part of the state that the backbone does not have.
    """
    check_state_parts(agent.state_parts, backbone)
    sac = GlimpseSAC(
        GlimpsePolicy,
        None,
        update=agent.update,
        gradient_clip=agent.gradient_clip,
        learning_rate=agent.lr,
        buffer_size=agent.replay.buffer_size,
        batch_size=agent.replay.batch_size,
        tau=agent.tau,
        gamma=agent.gamma,
        ent_coef=agent.ent_coef,
        target_entropy=agent.target_entropy + NATS_OF_UNITS,
        replay_buffer_class=GlimpseReplayBuffer,
        replay_buffer_kwargs={
            "patches_per_glimpse": glimpse.patches_per_glimpse,
            "latent_dtype": agent.replay.latent_dtype,
        },
        policy_kwargs={
            "features_extractor_class": GlimpseExtractor,
            "features_extractor_kwargs": {"hidden": agent.hidden, "heads": agent.heads},
            "net_arch": {"pi": [agent.hidden], "qf": [agent.hidden]},
            "activation_fn": nn.GELU,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": agent.weight_decay, "fused": True},
        },
        device="cpu",
        _init_setup_model=False,
    )
    # without an environment there is nobody else to tell it
    sac.observation_space = observation_space(glimpse, agent.state_parts, backbone.channels, backbone.latent_dim)
    sac.action_space = spaces.Box(0.0, 1.0, (ACTION_SIZE,))
    sac.n_envs = 1
    sac._setup_model()
    return sac


class GlimpseSAC(SAC):
    """Stable-Baselines3's SAC with packed observations, three losses in one pass, and hooks for a Trainer.

    Everything of ``stable_baselines3.SAC`` works as there: ``learn``, ``predict``, ``save``, ``load``. The learning
    rate of optimizers is not overwritten before each update unless ``learning_rate`` is a schedule, so that those of a
    Trainer have an effect. The temperature is a parameter of the policy.

    Args:
        policy: See ``stable_baselines3.SAC``.
        env: As above; None with ``_init_setup_model=False``.
        update: ``"fused"``: losses of temperature, critics and actor at the same parameters, one backward pass;
            ``"sb3"``: temperature, critics, then the actor by the new critics, as in ``stable_baselines3.SAC``.
        gradient_clip: Largest norm of each network's gradient; None does not clip.
        options: Of ``stable_baselines3.SAC``; ``target_entropy`` is on [-1, 1]^3.

    Attributes:
        backward: Called with every loss; ``loss.backward()`` unless replaced, by ``manual_backward`` of a module.
        log: Called with a name and a scalar tensor, the mean over the updates of a call of :meth:`train`, for
            ``actor_loss``, ``critic_loss``, ``alpha_loss``, ``alpha``, ``entropy`` (on [0, 1]^3) and ``q_mean``.
            Writes to the logger of Stable-Baselines3 unless replaced.
    """

    def __init__(
        self, policy: Any, env: Any, *, update: str = "fused", gradient_clip: float | None = None, **options: Any
    ) -> None:
        if update not in ("fused", "sb3"):
            raise ValueError(f"update must be one of fused, sb3, got {update!r}")
        self.update, self.gradient_clip = update, gradient_clip
        self.backward: Callable[[Tensor], None] = _backward
        self.log: Callable[[str, Tensor], None] | None = None
        super().__init__(policy, env, **options)

    def act(self, observation: Observation, deterministic: bool = False) -> Tensor:
        """Return actions (y, x, z) in [0, 1]^3 [R, 3] for packed observations.

        Args:
            observation: R states.
            deterministic: Take the mode, tanh(mu), instead of a draw.
        """
        with torch.no_grad(), evaluating(self.actor), torch.autocast(self.policy.device.type, enabled=False):
            inner: Tensor = self.actor(observation.to(self.policy.device), deterministic)
        return ((inner.float() + 1) / 2).clamp(0, 1)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Take an environment to :meth:`learn` on; any number of them with our replay buffer."""
        if isinstance(self.replay_buffer, GlimpseReplayBuffer):
            self.n_envs = getattr(env, "num_envs", 1)
        super().set_env(env, force_reset)

    @property
    def optimizers(self) -> list[Any]:
        """Of actor, critics and, where it is learnt, temperature."""
        found = [self.actor.optimizer, self.critic.optimizer]
        return found if self.ent_coef_optimizer is None else [*found, self.ent_coef_optimizer]

    @optimizers.setter
    def optimizers(self, optimizers: Sequence[Any]) -> None:
        """Put others in their places: those that a Trainer has wrapped, or the plain ones again."""
        if len(optimizers) != len(self.optimizers):
            raise ValueError(f"expected {len(self.optimizers)} optimizers, got {len(optimizers)}")
        self.actor.optimizer, self.critic.optimizer = optimizers[:2]
        if self.ent_coef_optimizer is not None:
            self.ent_coef_optimizer = optimizers[2]

    def move_to(self, device: torch.device | str) -> None:
        """Move networks, temperature and replay buffer."""
        self.device = torch.device(device)
        self.policy.to(self.device)
        if self.log_ent_coef is None:
            self.ent_coef_tensor = self.ent_coef_tensor.to(self.device)
        if isinstance(self.replay_buffer, GlimpseReplayBuffer):
            self.replay_buffer.move_to(self.device)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Take ``gradient_steps`` updates with ``batch_size`` transitions of the replay buffer each.

        None while our own buffer waits for the first episode of an environment to end.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        if isinstance(self.replay_buffer, GlimpseReplayBuffer) and self.replay_buffer.waits:
            return
        self.policy.set_training_mode(True)
        if callable(self.learning_rate):
            self._update_learning_rate(self.optimizers)
        update = self._update_fused if self.update == "fused" else self._update_in_turn
        sums: dict[str, Tensor] = {}
        with torch.autocast(self.policy.device.type, enabled=False):
            for _ in range(gradient_steps):
                for name, value in update(self._sample(batch_size)).items():
                    sums[name] = sums[name] + value if name in sums else value
                self._n_updates += 1
                if self._n_updates % self.target_update_interval == 0:
                    self._follow()
        # one look at the device a call
        values = torch.stack([value.float() for value in sums.values()]) / gradient_steps
        if not torch.isfinite(values).all():
            told = ", ".join(f"{name} {value:g}" for name, value in zip(sums, values.tolist(), strict=True))
            raise FloatingPointError(f"the agent's losses are not finite after {self._n_updates} updates: {told}")
        self._tell(dict(zip(sums, values, strict=True)))

    def _setup_model(self) -> None:
        super()._setup_model()
        self.critic_target.requires_grad_(False)
        if self.log_ent_coef is not None:
            # a parameter of a module is saved, moved and kept equal between processes like all others
            self.log_ent_coef = self.policy.log_ent_coef = nn.Parameter(self.log_ent_coef.detach())
            self.ent_coef_optimizer = torch.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "backward", "log"]

    def _sample(self, batch_size: int) -> Any:
        assert self.replay_buffer is not None
        if isinstance(self.replay_buffer, GlimpseReplayBuffer):
            return self.replay_buffer.draw(batch_size)
        return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)

    def _update_fused(self, batch: Any) -> dict[str, Tensor]:
        actions, log_prob = self._actions(batch.observations)
        alpha, alpha_loss = self._temperature(log_prob)
        targets = self._targets(batch, alpha)
        features = self.critic.extract_features(batch.observations, self.critic.features_extractor)
        values = self._values(features, batch.actions)
        critic_loss = _critic_loss(values, targets)
        with parameters_require_grad(self.critic, False):
            # the same parameters, hence the same features: the extractor runs once
            actor_loss = _actor_loss(self._values(features.detach(), actions), log_prob, alpha)
        loss = critic_loss + actor_loss if alpha_loss is None else critic_loss + actor_loss + alpha_loss
        self._descend(loss, *self.optimizers)
        return self._record(values, log_prob, alpha, critic_loss, actor_loss, alpha_loss)

    def _update_in_turn(self, batch: Any) -> dict[str, Tensor]:
        actions, log_prob = self._actions(batch.observations)
        alpha, alpha_loss = self._temperature(log_prob)
        if alpha_loss is not None:
            self._descend(alpha_loss, self.ent_coef_optimizer)
        targets = self._targets(batch, alpha)
        values = torch.cat(self.critic(batch.observations, batch.actions), dim=1)
        critic_loss = _critic_loss(values, targets)
        self._descend(critic_loss, self.critic.optimizer)
        with parameters_require_grad(self.critic, False):
            actor_loss = _actor_loss(torch.cat(self.critic(batch.observations, actions), dim=1), log_prob, alpha)
        self._descend(actor_loss, self.actor.optimizer)
        return self._record(values, log_prob, alpha, critic_loss, actor_loss, alpha_loss)

    def _actions(self, observations: Any) -> tuple[Tensor, Tensor]:
        """Draw u [M, 3] from the policy, and log p(u) [M, 1]."""
        actions, log_prob = self.actor.action_log_prob(observations)
        return actions, log_prob.unsqueeze(1)

    def _temperature(self, log_prob: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.log_ent_coef is None:
            return self.ent_coef_tensor.to(log_prob.device), None
        error = (log_prob + float(self.target_entropy)).detach()
        return self.log_ent_coef.detach().exp(), -(self.log_ent_coef * error).mean()

    @torch.no_grad()
    def _targets(self, batch: Any, alpha: Tensor) -> Tensor:
        """Return r + gamma (1 - done) (min Q'(s', u') - alpha log p(u')) [M, 1]."""
        actions, log_prob = self._actions(batch.next_observations)
        values = torch.cat(self.critic_target(batch.next_observations, actions), dim=1)
        future = values.min(1, keepdim=True).values - alpha * log_prob
        discounts = getattr(batch, "discounts", None)
        discounts = self.gamma if discounts is None else discounts
        # where, not a product: an end has no future, not even one that is infinite
        targets: Tensor = batch.rewards + discounts * torch.where(batch.dones > 0, 0, future)
        return targets

    def _values(self, features: Tensor, actions: Tensor) -> Tensor:
        """Return Q of every critic [M, 2] from features [M, h] of the critics' extractor."""
        inputs = torch.cat([features, actions], dim=1)
        return torch.cat([network(inputs) for network in self.critic.q_networks], dim=1)

    @torch.no_grad()
    def _follow(self) -> None:
        """Q' <- (1 - tau) Q' + tau Q, all parameters in two calls."""
        targets: list[Tensor] = list(self.critic_target.parameters())
        leaders: list[Tensor] = list(self.critic.parameters())
        torch._foreach_mul_(targets, 1 - self.tau)
        torch._foreach_add_(targets, leaders, alpha=self.tau)

    def _descend(self, loss: Tensor, *optimizers: Any) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.backward(loss)
        for optimizer in optimizers:
            if self.gradient_clip is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
            optimizer.step()

    def _record(
        self,
        values: Tensor,
        log_prob: Tensor,
        alpha: Tensor,
        critic_loss: Tensor,
        actor_loss: Tensor,
        alpha_loss: Tensor | None,
    ) -> dict[str, Tensor]:
        record = {"actor_loss": actor_loss, "critic_loss": critic_loss, "alpha": alpha.reshape(())}
        record |= {"entropy": -log_prob.mean() - NATS_OF_UNITS, "q_mean": values.mean()}
        if alpha_loss is not None:
            record["alpha_loss"] = alpha_loss
        return {name: value.detach() for name, value in record.items()}

    def _tell(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if self.log is not None:
                self.log(name, value)
            elif hasattr(self, "_logger"):
                self.logger.record(f"train/{name}", value.item())
        if self.log is None and hasattr(self, "_logger"):
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def _critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Return half the sum over critics of the mean squared error."""
    return 0.5 * values.size(1) * F.mse_loss(values, targets.expand_as(values))


def _actor_loss(values: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    return (alpha * log_prob - values.min(1, keepdim=True).values).mean()
