"""The trained part of Dirichlet pruning: one vector of free parameters per layer, its draws, its prior.

``phi = softplus(theta) + 1e-4`` is the concentration; a gate is ``kappa * s``, with ``s`` the mean ``phi / phi_+`` or a
draw ``g / sum g``, ``g_j ~ Gamma(phi_j, 1)``, whose gradient is ``-(dF/dphi) / p`` (implicit reparameterisation).

Shape letters: ``C`` channels of a layer, ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.documents import whole_state
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior, dirichlet_kl

EPSILON = 1e-4  # keeps draws away from underflow, where gradients are useless


class Switches:
    """Importance switches of several layers.

    Args:
        sizes: channels of each layer.
        options: how they are trained.
        device: where the network is.
        seed: of the draws; the global generators are not used.
    """

    def __init__(
        self, sizes: Mapping[str, int], options: DirichletOptions, *, device: torch.device | None = None, seed: int = 0
    ) -> None:
        self._options = options
        self.theta = {
            name: torch.full((size,), options.init, device=device, requires_grad=True) for name, size in sizes.items()
        }
        self._generator = torch.Generator(device or "cpu").manual_seed(seed)
        thetas = list(self.theta.values())
        self._optimizer = (
            torch.optim.Adam(thetas, options.lr)
            if options.optimizer == "adam"
            else torch.optim.SGD(thetas, options.lr, momentum=0.9)
        )

    def concentration(self, name: str) -> Tensor:
        """``phi`` of a layer ``[C]``, float32, with its gradient."""
        return F.softplus(self.theta[name]) + EPSILON

    def gate(self, name: str, batch: int) -> Tensor:
        """Values for the gates of one forward pass: ``[C]``, or ``[B, C]`` where every sample has its own."""
        phi = self.concentration(name)
        scale = self._options.gate.scale
        kappa = len(phi) if scale == "dim" else scale
        if self._options.estimator == "mean":
            return kappa * phi / phi.sum()
        if self._options.draws.scope == "sample":
            phi = phi.expand(batch, -1)
        draws = torch._standard_gamma(phi, generator=self._generator)
        return kappa * draws / draws.sum(-1, keepdim=True)

    @property
    def passes(self) -> int:
        """Forward passes per batch and layer."""
        return self._options.draws.number if self._options.estimator == "sample" else 1

    def kl(self, name: str) -> Tensor:
        """Divergence of a layer's switches from the prior, in nats."""
        return dirichlet_kl(self.concentration(name), self._options.prior.alpha0)

    def step(self, gradients: Mapping[str, Tensor], kl_weight: float) -> None:
        """Move every layer's parameters against ``gradients`` (of the loss) and ``kl_weight`` times the divergence's.

        Layers do not influence each other: the optimizers treat every number by itself.
        """
        for name, theta in self.theta.items():
            theta.grad = gradients[name].to(theta, copy=True)
            if kl_weight > 0:
                theta.grad += kl_weight * torch.autograd.grad(self.kl(name), theta)[0]
        self._optimizer.step()

    def posterior(self) -> dict[str, DirichletPosterior]:
        """What is known now."""
        return {name: DirichletPosterior(self.concentration(name)) for name in self.theta}

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, tensors and plain Python."""
        return {
            "theta": {name: theta.detach().cpu().clone() for name, theta in self.theta.items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        with torch.no_grad():
            for name, theta in self.theta.items():
                theta.copy_(state["theta"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
