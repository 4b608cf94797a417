"""The agent of active visual exploration against Stable-Baselines3, and torchrl where that is installed.

World, update, whole training and memory of the replay buffer, with the same networks; where results can be compared
they are, before anything is timed::

    python examples/benchmarks/glimpse_agent.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from harness import Headline, compare, entry, main
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_eff.glimpse.agent import GlimpseExtractor, GlimpseReplayBuffer, GlimpseSAC, make_sac
from lightning_eff.glimpse.backbones import ElasticViT
from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayOptions, StatePart, ViTSize
from lightning_eff.glimpse.environments import GlimpseEnv, GlimpseVecEnv
from lightning_eff.glimpse.observation import PRESENT, Observation, observation_space
from lightning_eff.glimpse.tasks import ClassificationTask
from lightning_eff.glimpse.world import GlimpseWorld
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Active visual exploration"
ENVIRONMENTS = 64
CAMERA = GlimpseConfig(image_size=64, num_glimpses=4, patch_size=8, grid=2)
AGENT = AgentConfig(hidden=64, ent_coef="auto_0.1", replay=ReplayOptions(buffer_size=4096, batch_size=256))
PAPER_CAMERA = GlimpseConfig(image_size=224, num_glimpses=14)
PAPER_AGENT = AgentConfig(replay=ReplayOptions(buffer_size=1792, batch_size=128))
PARTS: tuple[StatePart, ...] = ("patch", "box", "importance", "latent")


class PaddedExtractor(GlimpseExtractor):
    """The same layers on every slot of a padded state, absent ones masked in the softmax: the usual way."""

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        present = observations[PRESENT].bool()
        states, slots = present.shape
        tokens = [self.encoders[part](observations[part].flatten(0, 1)) for part in self.parts]
        values = self.token(torch.cat([self.sink, torch.cat(tokens, 1)]))
        logits = self.logits(values)
        sink = [table[:1].expand(states, 1, -1) for table in (values, logits)]
        values = torch.cat([sink[0], values[1:].view(states, slots, -1)], 1)
        logits = torch.cat(
            [sink[1], logits[1:].view(states, slots, -1).masked_fill(~present.unsqueeze(2), -torch.inf)], 1
        )
        weights = logits.softmax(1).unsqueeze(3)
        out: Tensor = self.out((weights * values.unflatten(2, (self.heads, -1))).sum(1).flatten(1))
        return out


def scenes() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(ENVIRONMENTS, 3, *CAMERA.scene, generator=generator)
    return TensorDataset(images, torch.randint(10, (ENVIRONMENTS,), generator=generator))


def new_world() -> GlimpseWorld:
    torch.manual_seed(0)
    backbone = ElasticViT(10, CAMERA.image_size, ViTSize(64, 2, 4), CAMERA.patch_size)
    return GlimpseWorld(backbone, ClassificationTask(10), CAMERA, state_parts=PARTS)


def dummy_environments(world: GlimpseWorld) -> VecEnv:
    """One environment a scene, stepped one after the other."""
    data = scenes()
    return DummyVecEnv([lambda i=i: GlimpseEnv(world, TensorDataset(*data[i : i + 1])) for i in range(len(data))])


def batched_environments(world: GlimpseWorld) -> VecEnv:
    return GlimpseVecEnv(world, scenes(), ENVIRONMENTS)


# the world alone


def actions() -> np.ndarray:
    return np.random.default_rng(0).random((CAMERA.num_glimpses, ENVIRONMENTS, 3), np.float32)


def total_in_environments(environments: VecEnv) -> Tensor:
    """Return the mean over scenes of the sum of an episode's rewards."""
    environments.reset()
    return torch.tensor(float(np.mean(np.sum([environments.step(a)[1] for a in actions()], axis=0))))


def total_in_world(world: GlimpseWorld) -> Tensor:
    images, target = scenes()[:]
    world.reset(images, target)
    return torch.stack([world.step(torch.from_numpy(a)).reward for a in actions()]).sum(0).mean()  # type: ignore[arg-type]


def worlds(repeats: int = 5) -> Table:
    dummy, batched, world = dummy_environments(new_world()), batched_environments(new_world()), new_world()
    contenders: dict[str, Callable[[], Any]] = {
        "SB3 DummyVecEnv": lambda: total_in_environments(dummy),
        "GlimpseVecEnv": lambda: total_in_environments(batched),
        "GlimpseWorld": lambda: total_in_world(world),
    }
    if find_spec("torchrl"):
        from glimpse_torchrl import BatchedWorld, total_in_torchrl

        environment = BatchedWorld(new_world(), scenes())
        contenders["torchrl EnvBase, batched"] = lambda: total_in_torchrl(environment, actions())
    title = f"World: {ENVIRONMENTS} scenes of 64 x 64, {CAMERA.num_glimpses} glimpses of each"
    return compare(contenders, reference="SB3 DummyVecEnv", repeats=repeats, title=title)


# one update


def filled(sac: SAC, camera: GlimpseConfig, images: int) -> None:
    """Fill the replay buffer with episodes of noise."""
    buffer = sac.replay_buffer
    assert isinstance(buffer, GlimpseReplayBuffer)
    k = camera.patches_per_glimpse
    for _ in range(buffer.buffer_size // (images * camera.num_glimpses)):
        boxes = torch.rand(images, camera.max_patches, 4) * 2 - 1
        patches = torch.rand(images, camera.max_patches, 3, camera.patch_size, camera.patch_size)
        for t in range(1, camera.num_glimpses + 1):
            n = k * t
            state = Observation.of_equal_lengths(
                boxes[:, :n], patches[:, :n], torch.full((images, n, 1), 1 / n), torch.randn(images, n, 768)
            )
            ended = torch.full((images,), t == camera.num_glimpses)
            buffer.add_step(state, torch.rand(images, 3), torch.randn(images), ended)


def new_agent(update: Literal["fused", "sb3"] = "fused", padded: bool = False) -> GlimpseSAC:
    """Return an agent of the paper's size; with ``padded``, its networks read every slot."""
    torch.manual_seed(0)
    sac = make_sac(replace(PAPER_AGENT, update=update), PAPER_CAMERA, ElasticViT(10, 224, ViTSize(768, 1, 12)))
    if padded:
        for network in (sac.actor, sac.critic, sac.critic_target):
            network.features_extractor.__class__ = PaddedExtractor
    sac.set_logger(Logger(None, []))
    filled(sac, PAPER_CAMERA, 64)
    return sac


def check_update(agents: dict[str, Callable[[], tuple[GlimpseSAC, Callable[..., None]]]]) -> None:
    """Raise if losses of a first update differ, or parameters after it where the order of updates is the same."""
    losses, weights = {}, {}
    for name, make in agents.items():
        sac, train = make()
        torch.manual_seed(1)
        train(sac, 1, PAPER_AGENT.replay.batch_size)
        values = sac.logger.name_to_value
        losses[name] = torch.tensor(float(values["train/critic_loss"]))
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in sac.policy.parameters()])
    expected = next(iter(losses))
    for name in losses:
        torch.testing.assert_close(losses[name], losses[expected], rtol=1e-4, atol=1e-5, msg=name)
        if "fused" not in name:
            # a first step of AdamW is the sign of the gradient: where that is 0 but for rounding, it may be either
            distance = (weights[name] - weights[expected]).abs().mean().item()
            assert distance < 0.01 * PAPER_AGENT.lr, f"{name}: parameters differ by {distance} on average"


def updates(repeats: int = 5) -> Table:
    agents: dict[str, Callable[[], tuple[GlimpseSAC, Callable[..., None]]]] = {
        "SB3 SAC.train, padded": lambda: (new_agent(padded=True), SAC.train),
        "SB3 SAC.train, packed by our extractor": lambda: (new_agent(), SAC.train),
        "ours, order of SB3": lambda: (new_agent("sb3"), GlimpseSAC.train),
        "ours, fused": lambda: (new_agent("fused"), GlimpseSAC.train),
    }
    check_update(agents)
    made = {name: make() for name, make in agents.items()}
    size = PAPER_AGENT.replay.batch_size
    contenders = {name: (lambda sac=sac, train=train: train(sac, 1, size)) for name, (sac, train) in made.items()}
    title = f"One update: {size} transitions, up to {PAPER_CAMERA.max_patches} tokens of width 768, hidden 256"
    return compare(contenders, reference="SB3 SAC.train, padded", repeats=repeats, check=None, title=title)


# training


def peer(environments: VecEnv) -> SAC:
    """Return Stable-Baselines3's own agent, one update a step of all environments."""
    torch.manual_seed(0)
    sac = SAC(
        "MultiInputPolicy",
        environments,
        learning_rate=AGENT.lr,
        buffer_size=AGENT.replay.buffer_size,
        batch_size=AGENT.replay.batch_size,
        learning_starts=ENVIRONMENTS * CAMERA.num_glimpses,
        ent_coef=AGENT.ent_coef,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": PaddedExtractor,
            "features_extractor_kwargs": {"hidden": AGENT.hidden, "heads": AGENT.heads},
            "net_arch": {"pi": [AGENT.hidden], "qf": [AGENT.hidden]},
            "activation_fn": nn.GELU,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": AGENT.weight_decay, "fused": True},
        },
    )
    sac.set_logger(Logger(None, []))
    return sac


def learn(sac: SAC) -> None:
    """Learn for two episodes of every scene."""
    sac.learn(2 * ENVIRONMENTS * CAMERA.num_glimpses, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]


class Loop:
    """Training on tensors, as the Lightning module does it."""

    def __init__(self) -> None:
        self.world = new_world()
        torch.manual_seed(0)
        self.sac = make_sac(AGENT, CAMERA, self.world.backbone)
        self.images, self.target = scenes()[:]
        self.episode(learn=False)

    def episode(self, learn: bool = True) -> None:
        buffer = self.sac.replay_buffer
        assert isinstance(buffer, GlimpseReplayBuffer)
        self.world.reset(self.images, self.target)
        while self.world.active:
            step = self.world.step(self.sac.act(self.world.observation))
            assert step.reward is not None
            buffer.add_step(step.observation, step.actions, step.reward, step.done, step.rows)
            if learn:
                self.sac.train(1, AGENT.replay.batch_size)

    def __call__(self) -> None:
        self.episode()
        self.episode()


def trainings(repeats: int = 5) -> Table:
    dummy, batched = peer(dummy_environments(new_world())), peer(batched_environments(new_world()))
    contenders: dict[str, Callable[[], Any]] = {
        "SB3 learn, DummyVecEnv": lambda: learn(dummy),
        "SB3 learn, GlimpseVecEnv": lambda: learn(batched),
        "ours": Loop(),
    }
    if find_spec("torchrl"):
        from glimpse_torchrl import TorchRLLoop

        contenders["torchrl SACLoss, an extractor a critic"] = TorchRLLoop(
            new_world(), scenes(), AGENT, PaddedExtractor
        )
    title = (
        f"Training: {2 * CAMERA.num_glimpses} glimpses of each of {ENVIRONMENTS} scenes, an update of 256 after each"
    )
    return compare(contenders, reference="SB3 learn, DummyVecEnv", repeats=repeats, check=None, title=title)


# memory


def memory() -> Table:
    space, box = observation_space(PAPER_CAMERA, PARTS, 3, 768), spaces.Box(0.0, 1.0, (3,))
    size = 140
    padded = DictReplayBuffer(size, space, box, device="cpu")
    arrays = [*padded.observations.values(), *padded.next_observations.values(), padded.actions, padded.rewards]
    held = {"SB3 DictReplayBuffer": sum(array.nbytes for array in arrays) / size}
    for dtype in ("float32", "float16"):
        ours = GlimpseReplayBuffer(
            size, space, box, "cpu", patches_per_glimpse=PAPER_CAMERA.patches_per_glimpse, latent_dtype=dtype
        )
        held[f"GlimpseReplayBuffer, latents {dtype}"] = ours.nbytes / size
    first = held["SB3 DictReplayBuffer"]
    rows = [[name, value / 1e3, 1e4 * value / 1e9, first / value] for name, value in held.items()]
    columns = ["buffer", Column("kB a transition", ".1f"), Column("GB for 10 000", ".2f"), Column("smaller [x]", ".1f")]
    return Table("Memory: 14 glimpses of 4 patches of 16 x 16 x 3, latents of width 768", columns, rows)


def tables(repeats: int = 5) -> list[Table]:
    return [worlds(repeats), updates(repeats), trainings(repeats), memory()]


def headlines(tables: list[Table]) -> list[Headline]:
    cases = [
        ("World", "GlimpseWorld", "SB3 DummyVecEnv", 10),
        ("World", "GlimpseWorld", "torchrl EnvBase, batched", 1),
        ("One update", "ours, fused", "SB3 SAC.train, padded", 2.5),
        ("Training", "ours", "SB3 learn, DummyVecEnv", 2.5),
        ("Training", "ours", "SB3 learn, GlimpseVecEnv", 1.6),
        ("Training", "ours", "torchrl SACLoss, an extractor a critic", 2.2),
    ]
    lines = []
    for title, ours, who, aim in cases:
        table = next(table for table in tables if table.title.startswith(title))
        mine, measured = entry([table], title, ours, "median [s]"), any(row[0] == who for row in table.rows)
        theirs = entry([table], title, who, "median [s]") if measured else None
        name, aside = who if measured else f"{who} (not installed)", who == "SB3 learn, DummyVecEnv"
        lines.append(Headline(table.title, mine, theirs, name, target=aim, aside=aside))
    held = [
        entry(tables, "Memory", name, "kB a transition")
        for name in ("GlimpseReplayBuffer, latents float32", "SB3 DictReplayBuffer")
    ]
    return [
        *lines,
        Headline("replay memory, a transition of the paper's size", *held, "SB3 DictReplayBuffer", "kB", target=6),
    ]


if __name__ == "__main__":
    main(tables, headlines, lambda: tables(repeats=3))
