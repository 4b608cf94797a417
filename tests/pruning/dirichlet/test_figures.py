"""Pictures of importance switches show what they say."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from lightning_eff.pruning import DirichletPosterior, cut_figure, feature_figure, posterior_figure, share_figure
from lightning_eff.reporting import KEPT, REMOVED, save_figure

POSTERIORS = {
    "a": DirichletPosterior(torch.tensor([3.0, 0.1, 2.0, 0.2])),
    "a.layer.with.a.long.name": DirichletPosterior(torch.tensor([1.0, 1.0, 0.5, 0.1, 0.1, 2.0])),
}
KEPT_CHANNELS = {"a": [0, 2], "a.layer.with.a.long.name": [0, 1, 5]}


def test_kept_and_removed_channels_have_their_colours_and_heights() -> None:
    axis = posterior_figure(POSTERIORS, KEPT_CHANNELS).axes[0]
    assert [round(bar.get_height(), 4) for bar in axis.patches] == [0.566, 0.3774, 0.0377, 0.0189]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axis.patches] == [KEPT, KEPT, REMOVED, REMOVED]
    assert axis.lines[0].get_xdata()[0] == 1.5  # the line of the cut


def test_certainty_of_the_cut_is_drawn_for_every_layer_that_was_cut() -> None:
    axis = cut_figure(POSTERIORS, {**KEPT_CHANNELS, "a": [0, 1, 2, 3]}).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [POSTERIORS["a.layer.with.a.long.name"].prob_at_cut([0, 1, 5])]


def test_shares_are_sorted_and_short_layers_padded() -> None:
    shown = share_figure(POSTERIORS).axes[0].images[0].get_array()
    assert shown.shape == (2, 6)
    torch.testing.assert_close(
        torch.tensor(shown[0, :4].tolist()), POSTERIORS["a"].relative.sort(descending=True).values
    )


def test_highest_and_lowest_channels_are_shown_with_their_maps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).train()
    x = torch.randn(3, 1, 6, 6)
    figure = feature_figure(model, "0", x, POSTERIORS["a"], count=1)
    first, second = figure.axes[1], figure.axes[5]
    assert first.get_title().startswith("0: ")
    assert figure.axes[1 + 2 * 2].get_title().startswith("1: ")
    expected = model[0](x[:1])[0, 0].detach()
    torch.testing.assert_close(torch.tensor(figure.axes[3].images[0].get_array().tolist()), expected)
    assert second.images
    assert model.training
    assert not model[0]._forward_hooks


def test_features_of_what_is_no_convolution_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a Conv2d with 4 output channels at '0'"):
        feature_figure(nn.Sequential(nn.Linear(4, 4)), "0", torch.zeros(1, 4), POSTERIORS["a"])


def test_figures_are_written(tmp_path: pytest.TempPathFactory) -> None:
    for number, figure in enumerate(
        (posterior_figure(POSTERIORS, KEPT_CHANNELS), cut_figure(POSTERIORS, KEPT_CHANNELS), share_figure(POSTERIORS))
    ):
        assert save_figure(figure, tmp_path / f"{number}.png").stat().st_size > 5_000
