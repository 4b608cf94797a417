"""What the agent sees: a set of tokens a state, packed one state behind the other, so that nothing is padded.

Letters: R states, N tokens of all of them, P largest number of tokens of a state, p patch side, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.glimpse.config import GlimpseConfig, StatePart

if TYPE_CHECKING:
    from gymnasium import spaces

#: Name of a part in dicts and in the attributes of an observation.
PARTS: dict[StatePart, str] = {"patch": "patches", "box": "boxes", "importance": "importance", "latent": "latents"}

#: Of padded dicts: 1 where there is a token, 0 where there is none.
PRESENT = "present"


@dataclass(frozen=True)
class Observation:
    """Tokens of R states; those of state 0 first, then those of state 1, and so on.

    Attributes:
        lengths: Tokens of each state [R], int64, always on the CPU, so that no device has to be waited for; 0 before
            the first glimpse.
        boxes: y0, x0, y1, x1 of each patch [N, 4], from -1 to 1 over the scene.
        patches: As captured [N, C, p, p]; None if the agent does not look at them.
        importance: Of each patch to the backbone [N, 1]; None as above.
        latents: The backbone's [N, D]; None as above.
    """

    lengths: Tensor
    boxes: Tensor
    patches: Tensor | None = None
    importance: Tensor | None = None
    latents: Tensor | None = None

    @classmethod
    def of_equal_lengths(
        cls,
        boxes: Tensor,
        patches: Tensor | None = None,
        importance: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Observation:
        """Pack states of n >= 0 tokens each: boxes [R, n, 4], patches [R, n, C, p, p], importance [R, n, 1], ..."""
        states, tokens = boxes.shape[:2]
        packed = (None if part is None else part.flatten(0, 1) for part in (patches, importance, latents))
        return cls(torch.full((states,), tokens), boxes.flatten(0, 1), *packed)

    @classmethod
    def from_padded(cls, padded: Mapping[str, Tensor]) -> Observation:
        """Pack tokens by the mask ``present`` [R, P] of :meth:`padded`; what stands elsewhere is not read."""
        present = padded[PRESENT].bool()
        parts = {name: padded[key][present] for key, name in PARTS.items() if key in padded}
        if "boxes" not in parts:  # an agent that does not look at them
            parts["boxes"] = present.new_zeros((int(present.sum()), 4), dtype=torch.float32)
        return cls(lengths=present.sum(1).cpu(), **parts)

    @classmethod
    def joined(cls, observations: Sequence[Observation]) -> Observation:
        """Return the states of one or more observations, one behind the other."""
        parts: dict[str, Any] = {}
        for name in ("lengths", *PARTS.values()):
            found = [getattr(observation, name) for observation in observations]
            parts[name] = None if found[0] is None else torch.cat(found)
        return cls(**parts)

    def __len__(self) -> int:
        """Return R, the number of states."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.boxes.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Observation:
        """Return the same tokens on another device or in another floating-point type."""
        return self._with_tokens(lambda part: part.to(device, dtype))

    def detach(self) -> Observation:
        """Return the same tokens without a graph."""
        return self._with_tokens(lambda part: part.detach())

    def take(self, states: Tensor) -> Observation:
        """Return the states of these numbers [M], in this order, or those where a mask [R] is true."""
        states = states.cpu()
        if states.dtype == torch.bool:
            states = states.nonzero().squeeze(1)
        lengths = self.lengths[states]
        tokens = ranges(self._starts()[states], lengths).to(self.device, non_blocking=True)
        return self._with_tokens(lambda part: part[tokens], lengths)

    def padded(self, max_tokens: int) -> dict[str, Tensor]:
        """Return what Stable-Baselines3 takes: each part as [R, P, ...], zero where there is no token, and the mask.

        Args:
            max_tokens: P.

        Raises:
            ValueError: A state has more tokens.
        """
        if len(self) and int(self.lengths.max()) > max_tokens:
            raise ValueError(
                f"expected at most max_tokens = {max_tokens} tokens a state, got {int(self.lengths.max())}"
            )
        slots = self.slots(max_tokens).to(self.device, non_blocking=True)
        present = torch.zeros(len(self) * max_tokens, dtype=torch.int8, device=self.device)
        padded = {PRESENT: present.index_fill(0, slots, 1).view(len(self), max_tokens)}
        for key, name in PARTS.items():
            part: Tensor | None = getattr(self, name)
            if part is not None:
                filled = part.new_zeros(len(self) * max_tokens, *part.shape[1:]).index_copy(0, slots, part)
                padded[key] = filled.view(len(self), max_tokens, *part.shape[1:])
        return padded

    def slots(self, max_tokens: int) -> Tensor:
        """Return the place of each token [N] in a table of R x ``max_tokens``, row by row; on the CPU."""
        return ranges(torch.arange(len(self)) * max_tokens, self.lengths)

    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    def _with_tokens(self, change: Callable[[Tensor], Tensor], lengths: Tensor | None = None) -> Observation:
        parts = {name: getattr(self, name) for name in PARTS.values()}
        changed: dict[str, Any] = {name: None if part is None else change(part) for name, part in parts.items()}
        return Observation(self.lengths if lengths is None else lengths, **changed)


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return ``starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1`` of every i, one behind the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def part_shapes(space: spaces.Dict) -> dict[StatePart, tuple[int, ...]]:
    """Return the shape of a token's parts in a space of :func:`observation_space`.

    Raises:
        ValueError: It is another space.
    """
    known = getattr(space, "spaces", {})
    shapes: dict[StatePart, tuple[int, ...]] = {part: known[part].shape[1:] for part in PARTS if part in known}
    if PRESENT not in known or not shapes:
        raise ValueError(
            f"expected a Dict space with a mask {PRESENT!r} and one or more of {tuple(PARTS)}, as "
            f"lightning_eff.glimpse.observation.observation_space makes it, got {space}"
        )
    return shapes


def observation_space(
    glimpse: GlimpseConfig, parts: tuple[StatePart, ...], channels: int, latent_dim: int = 0
) -> spaces.Dict:
    """Return the space of :meth:`Observation.padded`: what Stable-Baselines3 and gymnasium are told.

    Args:
        glimpse: Tells P and p.
        parts: What the agent sees of each patch.
        channels: C of scenes.
        latent_dim: D.
    """
    import numpy as np
    from gymnasium import spaces

    tokens, side = glimpse.max_patches, glimpse.patch_size
    bounds: dict[StatePart, tuple[float, float, tuple[int, ...]]] = {
        "patch": (-np.inf, np.inf, (channels, side, side)),
        "box": (-1.0, 1.0, (4,)),
        "importance": (0.0, 1.0, (1,)),
        "latent": (-np.inf, np.inf, (latent_dim,)),
    }
    space: dict[str, spaces.Space[Any]] = {PRESENT: spaces.MultiBinary(tokens)}
    for part in PARTS:
        if part in parts:
            low, high, shape = bounds[part]
            space[part] = spaces.Box(low, high, (tokens, *shape), np.float32)
    return spaces.Dict(space)
