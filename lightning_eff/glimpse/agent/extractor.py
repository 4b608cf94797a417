"""From a set of tokens to one vector: an encoder a part, then attention pooling; arXiv 2404.03482, supplement.

A learned sink token stands beside the tokens of every state: a state without tokens has a vector of its own, absent
tokens weigh exactly nothing, and the sink's share of the attention tells how many tokens there are.

Letters: R states, N tokens of all of them, L most tokens of a state in the batch, h width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from lightning_eff.glimpse.config import StatePart
from lightning_eff.glimpse.observation import PARTS, Observation, part_shapes

# Two convolutions shrink 16 pixels to one, as in the paper, and smaller patches to nothing: their pixels are taken as
# they are. Padded convolutions were tried there: they took three times as long and learnt no better.
_LEAST_SIDE = 16


class GlimpseExtractor(BaseFeaturesExtractor):
    """Pool tokens into one vector a state; the order of tokens does not matter.

    Takes packed observations and, by Stable-Baselines3's own policies, padded dicts: these are packed first, so that
    what stands in absent slots is not read and both give the same vectors.

    Args:
        observation_space: Of :func:`~lightning_eff.glimpse.observation.observation_space`; its parts are encoded.
        hidden: h; a multiple of ``heads``, and 2 h of the number of parts.
        heads: H.

    Raises:
        ValueError: The space is another one, or ``hidden`` does not fit.
    """

    def __init__(self, observation_space: spaces.Dict, hidden: int = 256, heads: int = 8) -> None:
        shapes = part_shapes(observation_space)
        super().__init__(observation_space, features_dim=hidden)
        self.parts = tuple(shapes)
        if hidden % heads or 2 * hidden % len(shapes):
            raise ValueError(
                f"hidden must be a multiple of heads = {heads}, and 2 * hidden of the {len(shapes)} parts "
                f"{self.parts}, got {hidden}"
            )
        self.heads = heads
        width = 2 * hidden // len(self.parts)
        self.encoders = nn.ModuleDict({part: _encoder(part, shape, width) for part, shape in shapes.items()})
        self.sink = nn.Parameter(0.02 * torch.randn(1, 2 * hidden))
        self.token = _dense(2 * hidden, hidden)
        self.logits = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, heads))
        self.out = _dense(hidden, hidden)

    def forward(self, observations: Observation | Mapping[str, Tensor]) -> Tensor:
        """Return vectors [R, h]."""
        if not isinstance(observations, Observation):
            observations = Observation.from_padded(observations)
        tokens = torch.cat([self._encode(part, observations) for part in self.parts], dim=1)
        values = self.token(torch.cat([self.sink, tokens]))
        logits = self.logits(values)
        out: Tensor = self.out(self._pool(values, logits, observations))
        return out

    def _encode(self, part: StatePart, observation: Observation) -> Tensor:
        tokens: Tensor | None = getattr(observation, PARTS[part])
        if tokens is None:
            raise ValueError(f"the agent looks at the {part} of each patch, but the observation has none")
        # the agent's own type, whatever the precision of the backbone
        encoded: Tensor = self.encoders[part](tokens.to(self.sink.dtype))
        return encoded

    def _pool(self, values: Tensor, logits: Tensor, observation: Observation) -> Tensor:
        """Average values [1 + N, h] of each state by the softmax of logits [1 + N, H]; row 0 is the sink."""
        states = len(observation)
        longest = int(observation.lengths.max()) if states else 0
        slots = None
        if len(values) - 1 != states * longest:
            slots = observation.slots(longest).to(values.device, non_blocking=True)
        parts = []
        for table, absent in ((values, 0.0), (logits, -torch.inf)):
            tokens = table[1:]
            if slots is not None:
                tokens = table.new_full((states * longest, table.size(1)), absent).index_copy(0, slots, tokens)
            tokens = tokens.reshape(states, longest, table.size(1))
            parts.append(torch.cat([table[:1].expand(states, 1, -1), tokens], dim=1))
        weights = parts[1].softmax(1)
        by_head = parts[0].view(states, longest + 1, self.heads, values.size(1) // self.heads)
        return (weights.unsqueeze(3) * by_head).sum(1).flatten(1)


class _ChannelsLastConv(nn.Conv2d):
    """Convolution whose output lies channels-last: pooling, and the next convolution, are twice as fast on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        # of the weight a copy: the parameter and its gradient stay as optimizers and processes expect them
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        out: Tensor = self._conv_forward(input.contiguous(memory_format=torch.channels_last), weight, self.bias)
        return out.contiguous(memory_format=torch.channels_last)


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU())


def _encoder(part: StatePart, shape: tuple[int, ...], width: int) -> nn.Sequential:
    if part != "patch":
        return _dense(shape[0], width)
    channels, side = shape[0], shape[1]
    if side < _LEAST_SIDE:
        pixels = channels * side * side
        return nn.Sequential(nn.Flatten(), *_dense(pixels, 2 * width), *_dense(2 * width, width))
    layers: list[nn.Module] = []
    for outputs in (8, 32):
        layers += [_ChannelsLastConv(channels, outputs, 5), nn.GroupNorm(1, outputs), nn.GELU(), nn.MaxPool2d(2)]
        side, channels = (side - 4) // 2, outputs
    return nn.Sequential(*layers, nn.Flatten(), *_dense(channels * side * side, width))
