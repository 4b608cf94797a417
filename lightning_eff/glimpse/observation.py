"""What the agent sees: a set of tokens a state, packed one state behind the other, so that nothing is padded.

Letters: R states, N tokens of all of them, P largest number of tokens of a state, p patch side, D latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """Tokens of R states; those of state 0 first, then those of state 1, and so on.

    Attributes:
        lengths: Tokens of each state [R], int64; 0 before the first glimpse.
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
