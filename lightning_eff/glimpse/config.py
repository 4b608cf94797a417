"""Options of active visual exploration: camera, agent, replay, reward and course of training; arXiv 2404.03482."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_eff.arguments import check_choice, check_number, check_whole

StatePart = Literal["patch", "box", "importance", "latent"]
RewardKind = Literal["difference", "score", "score_normalized"]
Regime = Literal["alternating", "constant", "frozen", "backbone_only"]
LossAt = Literal["last", "all", "random"]
LearningRates = Literal["cosine", "cosine_backbone", "constant"]

#: Numbers of an action: row, column and zoom, each in [0, 1].
ACTION_SIZE = 3


@dataclass(frozen=True)
class GlimpseConfig:
    """What the camera can do in a scene of H x W pixels.

    A glimpse is a grid of ``grid`` x ``grid`` patches of ``patch_size`` pixels a side, whatever it shows of the scene:
    ``camera_size = grid * patch_size`` pixels at most zoom, up to ``max_scale * min(H, W)`` at least zoom.

    Args:
        image_size: Of scenes in pixels: a side, or (height, width).
        num_glimpses: T, glimpses of an episode, >= 1.
        patch_size: p in pixels, >= 1.
        grid: g, >= 1.
        max_scale: Largest field of view over the shorter side, in (0, 1].
        antialias: Shrink with a filter. Without one, fine structure turns into noise of the size of the error that
            reconstruction competes with.
        quantize: Round fields of view and corners down to whole pixels, as the paper's code does.
        first_glimpse: ``"full"`` looks at the whole scene first, without asking the policy.
        fixed_scale: Zoom of every glimpse in [0, 1]; None leaves it to the policy.
        stop_threshold: An image whose task is that confident takes no more glimpses; None never stops.

    Raises:
        ValueError: A value lies outside its range, or a glimpse is larger than the field of view.
    """

    image_size: int | tuple[int, int]
    num_glimpses: int = 12
    patch_size: int = 16
    grid: int = 2
    max_scale: float = 1.0
    antialias: bool = True
    quantize: bool = True
    first_glimpse: Literal["policy", "full"] = "policy"
    fixed_scale: float | None = None
    stop_threshold: float | None = None

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, tuple | list) else (self.image_size,)
        if len(sides) not in (1, 2):
            raise ValueError(f"image_size must be a side or (height, width), got {self.image_size!r}")
        for side in sides:
            check_whole("image_size", side)
        for name in ("num_glimpses", "patch_size", "grid"):
            check_whole(name, getattr(self, name))
        check_choice("first_glimpse", self.first_glimpse, ("policy", "full"))
        check_number("max_scale", self.max_scale, above=0, most=1)
        for name in ("fixed_scale", "stop_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if self.camera_size > self.max_view:
            side = int(self.max_scale * min(self.scene))
            raise ValueError(
                f"patch_size * grid = {self.camera_size} px is more than the largest field of view, max_scale * "
                f"min{self.scene} = {side} px: nothing is left to zoom; use patch_size <= {side // self.grid} or grid "
                f"<= {side // self.patch_size}"
            )

    @property
    def scene(self) -> tuple[int, int]:
        """Height and width of scenes in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def camera_size(self) -> int:
        """Pixels a side of every glimpse as sampled, g p; also the smallest field of view."""
        return self.grid * self.patch_size

    @property
    def max_view(self) -> float:
        """Largest field of view in pixels a side."""
        return self.max_scale * min(self.scene)

    @property
    def patches_per_glimpse(self) -> int:
        """Patches of a glimpse, k = g^2."""
        return self.grid**2

    @property
    def max_patches(self) -> int:
        """Patches after the last glimpse, P = k T."""
        return self.patches_per_glimpse * self.num_glimpses

    def pixel_percent(self, glimpses: float) -> float:
        """Return pixels captured by ``glimpses`` glimpses in percent of the scene; overlaps count twice."""
        height, width = self.scene
        return 100 * glimpses * self.camera_size**2 / (height * width)


@dataclass(frozen=True)
class ViTSize:
    """How large a vision transformer is.

    Args:
        dim: D, width of tokens; a multiple of 8 and of ``heads``.
        depth: Blocks, >= 1.
        heads: Of the attention, >= 1.

    Raises:
        ValueError: A value lies outside its range.
    """

    dim: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            check_whole(name, getattr(self, name))
        if self.dim % 8 or self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of 8 and of heads = {self.heads}, got {self.dim}")


@dataclass(frozen=True)
class ReplayOptions:
    """How transitions are kept and used.

    Args:
        buffer_size: Transitions kept, >= ``batch_size``.
        batch_size: Transitions of an update, >= 1.
        updates_per_step: Updates after every glimpse of a batch, >= 1.
        random_steps: Glimpses of a batch that are drawn at random before the policy is asked, >= 0.
        latent_dtype: Of latents in the buffer.
        clear_on_switch: Forget transitions when the backbone has been trained: their latents are stale.
        resume_buffer: Keep transitions in checkpoints that training can go on from, and take them up again; without
            them the number of glimpses may change.

    Raises:
        ValueError: A value lies outside its range.
    """

    buffer_size: int = 10_000
    batch_size: int = 256
    updates_per_step: int = 1
    random_steps: int = 10_000
    latent_dtype: Literal["float32", "float16"] = "float32"
    clear_on_switch: bool = False
    resume_buffer: bool = True

    def __post_init__(self) -> None:
        for name in ("buffer_size", "batch_size", "updates_per_step"):
            check_whole(name, getattr(self, name))
        check_whole("random_steps", self.random_steps, least=0)
        check_choice("latent_dtype", self.latent_dtype, ("float32", "float16"))
        if self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size must be >= batch_size = {self.batch_size}, got {self.buffer_size}")


@dataclass(frozen=True)
class AgentConfig:
    """Soft actor-critic on a set of tokens; arXiv 1801.01290, 1812.05905.

    Args:
        hidden: Width h; a multiple of ``heads``, and 2 h of the number of ``state_parts``.
        heads: Of the attention pooling, >= 1.
        state_parts: What the agent sees of each patch: any of patch, box, importance, latent.
        lr: Learning rate of actor, critics and temperature, > 0.
        weight_decay: Of actor and critics, >= 0.
        gamma: Discount in [0, 1].
        tau: Polyak rate of the target critics in (0, 1].
        ent_coef: Temperature alpha: a number > 0, ``"auto"``, or ``"auto_0.1"`` to start learning it at 0.1.
        target_entropy: In nats on [0, 1]^3, whatever the units within.
        update: ``"fused"`` takes all losses at the same parameters; ``"sb3"`` is Stable-Baselines3's order.
        gradient_clip: Largest norm of each network's gradient, > 0; None does not clip.
        replay: Of transitions.

    Raises:
        ValueError: A value lies outside its range.
    """

    hidden: int = 256
    heads: int = 8
    state_parts: tuple[StatePart, ...] = ("patch", "box", "importance", "latent")
    lr: float = 5e-4
    weight_decay: float = 1e-2
    gamma: float = 0.99
    tau: float = 0.005
    ent_coef: float | str = "auto"  # in this order: a number on the command line is no text
    target_entropy: float = -3.0
    update: Literal["fused", "sb3"] = "fused"
    gradient_clip: float | None = None
    replay: ReplayOptions = field(default_factory=ReplayOptions)

    def __post_init__(self) -> None:
        check_whole("hidden", self.hidden)
        check_whole("heads", self.heads)
        parts = tuple(self.state_parts)
        object.__setattr__(self, "state_parts", parts)
        if not parts or len(set(parts)) < len(parts):
            raise ValueError(f"state_parts must name one part or more, none twice, got {parts}")
        for part in parts:
            check_choice("state_parts", part, get_args(StatePart))
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads = {self.heads}, got {self.hidden}")
        if 2 * self.hidden % len(parts):
            raise ValueError(f"2 * hidden must be a multiple of the {len(parts)} state_parts, got {2 * self.hidden}")
        check_number("lr", self.lr, above=0)
        check_number("tau", self.tau, above=0, most=1)
        for name in ("weight_decay", "gamma"):
            check_number(name, getattr(self, name), least=0, most=1 if name == "gamma" else None)
        check_number("target_entropy", self.target_entropy)
        check_choice("update", self.update, ("fused", "sb3"))
        if self.gradient_clip is not None:
            check_number("gradient_clip", self.gradient_clip, above=0)
        self._check_ent_coef()

    def _check_ent_coef(self) -> None:
        given, start = self.ent_coef, self.ent_coef
        if isinstance(given, str):
            head, _, tail = given.partition("_")
            start = tail or "1" if head == "auto" and given != "auto_" else "nan"
        try:
            check_number("ent_coef", float(start), above=0)
        except ValueError:
            raise ValueError(f"ent_coef must be > 0, 'auto' or 'auto_<start>', got {given!r}") from None


@dataclass(frozen=True)
class RewardOptions:
    """What the agent is paid for a glimpse.

    Args:
        kind: ``"difference"``: rise of the score, so that rewards of an episode sum to the whole rise; ``"score"``;
            or ``"score_normalized"`` by mean and standard deviation of the batch.
        scale: Multiplied to it, > 0; aim at rewards of about 1.
        scale_penalty: c >= 0, times the zoom of the glimpse, is taken off.

    Raises:
        ValueError: A value lies outside its range.
    """

    kind: RewardKind = "difference"
    scale: float = 1.0
    scale_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(RewardKind))
        check_number("scale", self.scale, above=0)
        check_number("scale_penalty", self.scale_penalty, least=0)


@dataclass(frozen=True)
class TrainingPlan:
    """Who learns when.

    Args:
        pretrain_epochs: The backbone learns from random glimpses, without an agent; >= 0.
        rl_only_epochs: The agent learns alone after that, >= 0.
        regime: Afterwards: ``"alternating"``, both at once (``"constant"``), the agent alone (``"frozen"``), or the
            backbone alone from the policy's glimpses (``"backbone_only"``).
        alternate_every: Length of a turn, >= 1; the agent begins.
        alternate_unit: Of that length.
        loss_at: Glimpses after which the backbone's loss is taken; ``"all"`` costs T backward passes.
        pretrain_tries: Views drawn for each glimpse of pretraining, of which the one with the most contrast is taken,
            >= 1. With a single one, close views seldom show anything in scenes that are mostly empty, and the backbone
            does not learn to read them.
        learning_rates: ``"cosine"``: they rise during the warm-up and fall along half a cosine; those of the agent
            begin after pretraining, if ``max_epochs`` tells when that is, or stay as they are (``"cosine_backbone"``).
            Or ``"constant"``.
        warmup_fraction: Share of all batches in which they rise, in [0, 1).

    Raises:
        ValueError: A value lies outside its range.
    """

    pretrain_epochs: int = 0
    rl_only_epochs: int = 10
    regime: Regime = "alternating"
    alternate_every: int = 1
    alternate_unit: Literal["epoch", "batch"] = "epoch"
    loss_at: LossAt = "last"
    pretrain_tries: int = 1
    learning_rates: LearningRates = "cosine"
    warmup_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_whole("pretrain_epochs", self.pretrain_epochs, least=0)
        check_whole("rl_only_epochs", self.rl_only_epochs, least=0)
        check_whole("alternate_every", self.alternate_every)
        check_whole("pretrain_tries", self.pretrain_tries)
        check_choice("regime", self.regime, get_args(Regime))
        check_choice("alternate_unit", self.alternate_unit, ("epoch", "batch"))
        check_choice("loss_at", self.loss_at, get_args(LossAt))
        check_choice("learning_rates", self.learning_rates, get_args(LearningRates))
        check_number("warmup_fraction", self.warmup_fraction, least=0, below=1)
