"""Costs of a network's outputs that are kept, and measured anew once channels were removed or layers replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size
from lightning_eff.early_exit.attaching.costs import ExitCosts, exit_costs
from lightning_eff.early_exit.attaching.probe import samples
from lightning_eff.early_exit.attaching.sizes import Sizes

if TYPE_CHECKING:
    from lightning_eff.early_exit.network import MultiExitNetwork


class KeptCosts:
    """What each output costs, as last measured.

    Args:
        known: costs of a checkpoint, for the shapes that the network has when they are first asked for.

    Attributes:
        known: the costs, of whatever shapes; None before they are measured.
    """

    def __init__(self, known: ExitCosts | None = None) -> None:
        self.known = known
        self._of = Sizes()
        self._example: Any = None  # zeros: operations are counted anew on them

    def of(self, network: MultiExitNetwork) -> ExitCosts:
        """Return the costs of a network as it is now.

        Raises:
            ValueError: nothing was measured, or channels were removed and no example is known.
        """
        if self.known is None:
            raise ValueError("no costs are known: call build, or measure_costs with an example, or set costs")
        if self.known.unit == "given" or torch.compiler.is_compiling():
            return self.known
        if self._of.resized(network) or (self._example is not None and self._of.replaced(network)):
            with torch.inference_mode(False):
                self.measure(network, self._example_for(network), "latency" if self.known.unit == "s" else "flops")
        return self.known

    def keep(self, costs: ExitCosts, network: MultiExitNetwork) -> None:
        """Keep costs of the shapes that a network has now.

        Raises:
            ValueError: they are of another number of exits.
        """
        if len(costs.heads) != network.num_exits or len(costs.backbone) != network.num_outputs:
            raise ValueError(f"expected costs of {network.num_exits} heads, got {costs}")
        self.known, self._of = costs, Sizes(network)

    def measure(self, network: MultiExitNetwork, example: Any, kind: Literal["flops", "latency"]) -> ExitCosts:
        """Measure and keep; see :func:`exit_costs`."""
        costs = exit_costs(network, example, kind)
        self.keep(costs, network)
        self._example = None
        self.keep_shapes(example)
        return costs

    def keep_shapes(self, example: Any) -> None:
        """Note what inputs look like, not what is in them, unless that is known."""
        if self._example is not None or torch.compiler.is_compiling():
            return
        few = samples(example, 2) if batch_size(example) > 2 else example
        with torch.inference_mode(False):
            self._example = pytree.tree_map(lambda one: torch.zeros_like(one) if isinstance(one, Tensor) else one, few)

    def hold_for(self, network: MultiExitNetwork) -> None:
        """Take the costs of a checkpoint for those of the shapes that a network has now."""
        self._of.changed(network)

    def _example_for(self, network: MultiExitNetwork) -> Any:
        """The example on the device and in the precision that a network has now."""
        if self._example is None:
            raise ValueError("channels were removed since costs were measured: call measure_costs with an example")
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))

        def here(one: Any) -> Any:
            return (
                one.to(like.device, like.dtype if one.is_floating_point() else None) if isinstance(one, Tensor) else one
            )

        return pytree.tree_map(here, self._example)
