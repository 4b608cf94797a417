"""The feed-forward network that a mixture of experts replaces, which is also what shared experts are."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lightning_eff.moe.config import Activation, Initialisation
from lightning_eff.moe.experts.activations import activate, width


class DenseFFN(nn.Module):
    """Feed-forward network of two matrices, or of three with a gate.

    Args:
        d_model: Width of tokens, d.
        d_ff: Hidden width; None is 4 d.
        activation: ``"swiglu"`` has a gate.
        bias: Both matrices have a bias.
        init: Weights at the start, the same as of experts.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        activation: Activation = "relu",
        bias: bool = False,
        init: Initialisation | None = None,
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.activation: Activation = activation
        self.init = init or Initialisation()
        self.up = InitialisedLinear(d_model, width(activation) * d_ff, self.init, bias)
        self.down = InitialisedLinear(d_ff, d_model, self.init, bias)

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., d] for tokens [..., d]."""
        y: Tensor = self.down(activate(self.up(x), self.activation))
        return y

    def extra_repr(self) -> str:
        """Name the activation."""
        return f"activation={self.activation}"


class InitialisedLinear(nn.Linear):
    """Linear layer that knows how its weights begin, so that one made on the meta device gets them, too.

    Args:
        in_features: Width of the input, which is the fan-in.
        out_features: Width of the output.
        init: Weights at the start.
        bias: Whether there is a bias; it begins with zeros.
    """

    def __init__(self, in_features: int, out_features: int, init: Initialisation, bias: bool = False) -> None:
        self.init = init  # the base class draws weights at once
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw new weights; the bias becomes zero."""
        truncated_normal_(self.weight, self.in_features, self.init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def truncated_normal_(weight: Tensor, fan_in: int, init: Initialisation) -> None:
    """Fill ``weight`` in place with a truncated normal of standard deviation ``sqrt(scale / fan_in)``."""
    std = math.sqrt(init.scale / fan_in)
    limit = 2 * std if init.truncation == "std" else 2 * init.scale
    nn.init.trunc_normal_(weight, std=std, a=-limit, b=limit)
