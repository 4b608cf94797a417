"""What importance switches say of the layers: how clear the cut is, and how channels share each layer's importance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_eff.pruning.dirichlet.figures import Kept, Posteriors, cut_figure, posterior_figure, share_figure
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SwitchReport(Report):
    """Switches of all layers after training: table ``switches``, figures ``posterior``, ``cut`` and ``shares``.

    Attributes:
        posteriors: of each layer, at least one.
        kept: channels that stay, of each layer; of a layer that is not named all stay.
    """

    posteriors: Posteriors
    kept: Kept

    def tables(self) -> dict[str, Table]:
        """A row a layer: channels kept, shares of the best and the worst channel, and how sure the cut is."""
        rows = []
        for name, posterior in self.posteriors.items():
            stays, size = self.kept.get(name, range(len(posterior.mean))), len(posterior.mean)
            sure = posterior.prob_at_cut(stays) if len(stays) < size else math.nan
            told = None if math.isnan(sure) else sure
            rows.append((name, size, len(stays), posterior.relative.max(), posterior.relative.min(), told))
        shares = [Column("highest share", ".2f"), Column("lowest share", ".2f")]
        columns: list[str | Column] = ["layer", "channels", "kept", *shares, Column("sure of the cut", ".1%")]
        caption = (
            "Share: 1 is an average channel of the layer. Sure of the cut: probability that the last channel kept "
            "matters more than the first one removed."
        )
        return {"switches": Table("Importance switches", columns, rows, caption)}

    def figures(self) -> dict[str, Figure]:
        """Switches of each layer with the cut, how sure it is, and shares of all channels."""
        return {
            "posterior": posterior_figure(self.posteriors, self.kept),
            "cut": cut_figure(self.posteriors, self.kept),
            "shares": share_figure(self.posteriors),
        }
