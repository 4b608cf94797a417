"""Printed coefficients of arXiv 2402.07871, 2203.15556 and 2404.10102."""

import numpy as np
import pytest

from lightning_eff.moe.scaling import ChinchillaLaw, FineGrainedMoELaw, load_law
from lightning_eff.moe.scaling.laws import PRESETS, law_from_dict


@pytest.mark.parametrize(
    ("n_total", "n_tokens", "granularity", "loss"),
    [
        (1e9, 2e10, 1, 3.276133),
        (1e9, 2e10, 8, 3.140393),
        (135266304, 16e9, 1, 3.789626),
        (135266304, 16e9, 16, 3.594607),
        (3652190208, 33e9, 4, 2.859098),
    ],
)
def test_paper_coefficients_predict(n_total: float, n_tokens: float, granularity: float, loss: float) -> None:
    assert FineGrainedMoELaw.paper()(n_total, n_tokens, granularity) == pytest.approx(loss, abs=1e-6)


def test_dense_coefficients_predict() -> None:
    assert ChinchillaLaw.paper_dense()(1e9, 2e10) == pytest.approx(2.980305, abs=1e-6)


def test_finer_networks_have_less_loss_down_to_what_size_and_tokens_leave() -> None:
    law = FineGrainedMoELaw.paper()
    losses = law(1e9, 2e10, 2.0 ** np.arange(12))
    assert (np.diff(losses) < 0).all()
    assert losses[-1] > law.c + law.a / 1e9**law.alpha + law.b / 2e10**law.beta


def test_arguments_broadcast_and_scalars_give_a_float() -> None:
    law = FineGrainedMoELaw.paper()
    grid = law(np.array([1e8, 1e9])[:, None], np.array([1e9, 1e10, 1e11]), 4)
    assert grid.shape == (2, 3)
    assert type(law(1e8, 1e9, 4)) is float
    assert grid[0, 0] == law(1e8, 1e9, 4)


def test_law_of_one_granularity_is_a_chinchilla_law() -> None:
    law = FineGrainedMoELaw.paper()
    single = law.at(8)
    assert isinstance(single, ChinchillaLaw)
    assert single(1e9, 2e10) == pytest.approx(law(1e9, 2e10, 8), rel=1e-14)
    assert single.expansion_rate == 64


@pytest.mark.parametrize("name", PRESETS)
def test_law_survives_its_file(name: str, tmp_path) -> None:
    law = load_law(name)
    assert load_law(law.save(tmp_path / "some" / "law.json")) == law


def test_other_expansion_rates_have_no_published_coefficients() -> None:
    assert FineGrainedMoELaw.paper(16).alpha == 0.124
    with pytest.raises(ValueError, match=r"16 and 64, got 32.*fit_scaling_law"):
        FineGrainedMoELaw.paper(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1e9), "n_total must be > 0"),
        ((1e9, -1), "n_tokens must be > 0"),
        ((1e9, float("nan")), "n_tokens"),
        ((1e9, 1e9, 0.5), "granularity must be >= 1"),
    ],
)
def test_sizes_out_of_range_are_named(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineGrainedMoELaw.paper()(*arguments)


def test_coefficients_must_be_finite() -> None:
    with pytest.raises(ValueError, match="beta = nan"):
        ChinchillaLaw(a=1, alpha=0.1, b=1, beta=float("nan"), c=1)


def test_what_is_no_law_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"moe64.*got 'moe32'"):
        load_law("moe32")
    (tmp_path / "law.json").write_text('{"law": "chinchilla", "a": 1}')
    with pytest.raises(ValueError, match="holds no scaling law"):
        load_law(tmp_path / "law.json")
    with pytest.raises(ValueError, match="got 'kaplan'"):
        law_from_dict({"law": "kaplan"})
