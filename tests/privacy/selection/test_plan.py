"""Which coordinates a step trains: how many, which units, when anew, inside of what pre-pruning left."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import run_python
from torch import Tensor, nn

from lightning_eff.privacy.selection.plan import SelectionPlan
from lightning_eff.privacy.selection.schedule import RateSchedule
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.selection.selectors import SelectionContext, Selector


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


PARAMETERS = dict(network().named_parameters())
WEIGHTS = [name for name, parameter in PARAMETERS.items() if parameter.ndim > 1]
BIASES = [name for name, parameter in PARAMETERS.items() if parameter.ndim == 1]


def plan(masks: Mapping[str, Tensor] | None = None, parameters: Mapping[str, Tensor] = PARAMETERS, **options: Any):
    made = SelectionPlan(**options)
    made.bind(parameters, static_masks=masks, total_steps=100, epochs=10)
    return made


def masks_of(selections: Mapping[str, Selection]) -> dict[str, Tensor]:
    return {name: selection.full_mask() for name, selection in selections.items()}


def assert_same(one: Mapping[str, Selection], other: Mapping[str, Selection]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equals(other[name])] == []


@pytest.mark.parametrize("selection", ["random", "magnitude"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_exactly_the_kept_share_of_every_weight_is_chosen_and_biases_and_norms_whole(
    selection: str, rate: float
) -> None:
    chosen = plan(drop_rate=rate, selection=selection).at(0)
    assert list(chosen) == list(PARAMETERS)
    for name in WEIGHTS:
        assert chosen[name].count == max(1, round((1 - rate) * PARAMETERS[name].numel()))
    assert all(chosen[name].is_all for name in BIASES)


def test_rate_zero_chooses_everything_and_never_anew() -> None:
    dense = plan()
    assert all(selection.is_all for selection in dense.at(0).values())
    assert dense.at(0) is dense.at(57, 3)


@pytest.mark.parametrize("selection", ["random", "magnitude"])
def test_rows_are_chosen_whole_and_a_bias_that_is_not_always_kept_goes_with_them(selection: str) -> None:
    chosen = plan(drop_rate=0.5, granularity="row", selection=selection, always_keep=["3.*"]).at(0)
    for layer, rows in (("0", 4), ("2", 10), ("4", 2)):  # round(2.5) is 2
        weight, bias = chosen[f"{layer}.weight"], chosen[f"{layer}.bias"]
        assert weight.mask is None
        assert len(weight.rows) == rows
        assert torch.equal(weight.rows, weight.rows.sort().values)
        assert torch.equal(bias.rows, weight.rows)
    assert chosen["3.weight"].is_all


def test_rows_and_columns_each_keep_the_square_root_of_the_share() -> None:
    chosen = plan(drop_rate=0.75, granularity="row_col").at(0)
    assert chosen["2.weight"].block_shape == (10, 16)
    assert chosen["0.weight"].block_shape == (4, 2, 3, 3)  # round(1.5) columns


def test_tensors_are_chosen_whole_against_each_other() -> None:
    for step in range(5):
        chosen = plan(drop_rate=0.6, granularity="tensor").at(step)
        counts = [chosen[name].count for name in WEIGHTS]
        assert sum(count > 0 for count in counts) == 1  # round(0.4 * 3)
        assert all(count in (0, PARAMETERS[name].numel()) for count, name in zip(counts, WEIGHTS, strict=True))


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("selection", ["random", "magnitude"])
def test_global_scope_keeps_the_share_of_all_units_together(granularity: str, selection: str) -> None:
    chosen = plan(drop_rate=0.8, scope="global", granularity=granularity, selection=selection).at(0)
    if granularity == "element":
        units = sum(chosen[name].count for name in WEIGHTS)
        everything = sum(PARAMETERS[name].numel() for name in WEIGHTS)
    else:
        units = sum(len(chosen[name].rows) for name in WEIGHTS if chosen[name].rows is not None)
        everything = sum(len(PARAMETERS[name]) for name in WEIGHTS)
    assert units == round(0.2 * everything)


def test_global_magnitude_takes_the_largest_of_all_tensors() -> None:
    parameters = {"a": torch.tensor([[1.0, 9.0], [2.0, 8.0]]), "b": torch.tensor([[7.0, -10.0], [3.0, 4.0]])}
    chosen = plan(parameters=parameters, drop_rate=0.5, scope="global", selection="magnitude").at(0)
    assert masks_of(chosen)["a"].tolist() == [[False, True], [False, True]]
    assert masks_of(chosen)["b"].tolist() == [[True, True], [False, False]]


def test_magnitude_looks_at_the_values_of_that_step_and_ties_go_to_the_lower_index() -> None:
    weight = torch.tensor([[1.0, -5.0], [5.0, 5.0]])
    made = plan(parameters={"w": weight}, drop_rate=0.5, selection="magnitude")
    assert made.at(0)["w"].full_mask().tolist() == [[False, True], [True, False]]
    weight[0, 0] = -6.0
    assert made.at(1)["w"].full_mask().tolist() == [[True, True], [False, False]]


def test_explore_draws_its_share_of_the_chosen_at_random() -> None:
    weight = torch.arange(1000.0).reshape(10, 100)
    made = plan(parameters={"w": weight}, drop_rate=0.5, selection="magnitude", explore=0.2)
    first, second = (made.at(step)["w"].full_mask().reshape(-1) for step in (0, 1))
    for mask in (first, second):
        assert int(mask.sum()) == 500
        assert bool(mask[600:].all())  # the 400 best
    assert int((first[:600] & second[:600]).sum()) < 40  # 17 are expected of two draws of 100 of 600


@pytest.mark.parametrize(
    ("refresh", "same", "other"),
    [("step", (7, 1), (8, 1)), ("epoch", (13, 1), (20, 2)), (5, (9, 0), (10, 0))],
)
def test_a_choice_holds_as_long_as_refresh_says(
    refresh: str | int, same: tuple[int, int], other: tuple[int, int]
) -> None:
    made = plan(drop_rate=0.5, refresh=refresh)
    first = made.at(*{"step": (7, 1), "epoch": (10, 1), 5: (5, 0)}[refresh])
    assert made.at(*same) is first
    assert made.at(*other) is not first
    assert not made.at(*other)["2.weight"].equals(first["2.weight"])


@pytest.mark.parametrize("refresh", ["step", "epoch", 3])
@pytest.mark.parametrize("granularity", ["element", "row", "row_col", "tensor"])
def test_a_random_choice_depends_on_seed_and_step_alone(refresh: str | int, granularity: str) -> None:
    options = {"drop_rate": 0.5, "refresh": refresh, "granularity": granularity}
    whole_run = plan(**options)
    for step in range(17):
        whole_run.at(step, step // 10)
    torch.manual_seed(step)  # the global generator does not matter, nor do values
    others = {name: torch.randn(parameter.shape) for name, parameter in PARAMETERS.items()}
    resumed = plan(parameters=others, **options)
    assert_same(whole_run.at(17, 1), resumed.at(17, 1))
    assert resumed.state_dict() == {"selector": {}}
    seeds = [plan(seed=seed, **options).at(17, 1) for seed in range(8)]
    assert len({tuple(torch.cat([one[name].full_mask().flatten() for name in WEIGHTS]).tolist()) for one in seeds}) > 1


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    plan(drop_rate=0.5, selection="magnitude", explore=0.5).at(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_process_chooses_the_same() -> None:
    script = """
import torch
from lightning_eff.privacy.selection.plan import SelectionPlan
plan = SelectionPlan(0.9, refresh=3, seed=5)
plan.bind({"w": torch.empty(50, 40)})
print("chosen", plan.at(11)["w"].positions.tolist())
"""
    made = plan(parameters={"w": torch.empty(50, 40)}, drop_rate=0.9, refresh=3, seed=5)
    result = run_python(script)  # where strings have other hashes
    assert f"chosen {made.at(11)['w'].positions.tolist()}" in result.stdout


def element_mask(rate: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(PARAMETERS[name].shape, generator=generator) >= rate for name in WEIGHTS}


@pytest.mark.parametrize("selection", ["random", "magnitude"])
@pytest.mark.parametrize("scope", ["layerwise", "global"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_the_share_counts_what_pre_pruning_left_and_nothing_else_is_chosen(
    selection: str, scope: str, rate: float
) -> None:
    masks = element_mask()
    chosen = plan(masks, drop_rate=rate, selection=selection, scope=scope).at(0)
    for name in WEIGHTS:
        assert not (chosen[name].full_mask() & ~masks[name]).any()
    left = {name: int(mask.sum()) for name, mask in masks.items()}
    if scope == "global":
        assert sum(chosen[name].count for name in WEIGHTS) == round((1 - rate) * sum(left.values()))
    else:
        assert [chosen[name].count for name in WEIGHTS] == [round((1 - rate) * left[name]) for name in WEIGHTS]


@pytest.mark.parametrize("granularity", ["row", "row_col", "tensor"])
def test_units_with_nothing_left_are_not_chosen(granularity: str) -> None:
    mask = element_mask()["2.weight"]
    mask[:10] = False  # of 20 rows
    mask[:, :8] = False  # of 32 columns
    chosen = plan({"2.weight": mask}, drop_rate=0.75, granularity=granularity).at(0)["2.weight"]
    assert not (chosen.full_mask() & ~mask).any()
    if granularity == "row":
        assert len(chosen.rows) == 2  # a quarter of the ten rows that are left, round(2.5)
        assert int(chosen.rows.min()) >= 10
    if granularity == "row_col":
        assert chosen.block_shape == (5, 12)
        assert int(chosen.columns.min()) >= 8


def test_masks_of_whole_rows_become_rows() -> None:
    mask = torch.ones(20, 32, dtype=torch.bool)
    mask[::2] = False
    dense = plan({"2.weight": mask}).at(0)["2.weight"]
    assert dense.mask is None
    assert dense.rows.tolist() == list(range(1, 20, 2))
    half = plan({"2.weight": mask}, drop_rate=0.5, granularity="row").at(0)["2.weight"]
    assert half.mask is None
    assert len(half.rows) == 5
    assert all(row % 2 for row in half.rows.tolist())
    assert plan({"2.weight": torch.ones_like(mask)}).at(0)["2.weight"].is_all


def test_a_tensor_with_one_row_or_without_dimension_is_never_lost() -> None:
    parameters = {"token": torch.randn(1, 1, 6), "scale": torch.tensor(2.0)}
    for granularity in ("element", "row", "row_col", "tensor"):
        for scope in ("layerwise", "global"):
            made = plan(parameters=parameters, drop_rate=0.9, granularity=granularity, scope=scope, always_keep=[])
            assert sum(one.count for one in made.at(0).values()) >= 1


def test_always_keep_patterns_replace_the_default() -> None:
    chosen = plan(drop_rate=0.5, always_keep=["2.*"]).at(0)
    assert {name for name, one in chosen.items() if one.is_all} == {"2.weight", "2.bias"}
    shapes = {"encoder.norm_1.table": (4, 4), "head_bias": (4, 4), "token": (1, 1, 6), "w": (4, 4), "head": (1, 6)}
    chosen = plan(parameters={name: torch.randn(shape) for name, shape in shapes.items()}, drop_rate=0.5).at(0)
    assert [one.is_all for one in chosen.values()] == [True, True, True, False, False]


class TopLeft(Selector):
    def select(self, context: SelectionContext) -> dict[str, Selection]:
        assert not hasattr(context, "gradients")
        return {
            name: Selection(parameter.shape, rows=torch.tensor([0])) for name, parameter in context.parameters.items()
        }


def test_a_selector_of_ones_own_chooses_and_what_it_does_wrong_is_told() -> None:
    chosen = plan(drop_rate=0.5, selection=TopLeft()).at(0)
    assert [chosen[name].rows.tolist() for name in WEIGHTS] == [[0], [0], [0]]

    class Forgetful(Selector):
        def select(self, context: SelectionContext) -> dict[str, Selection]:
            return {"4.weight": Selection.all((5, 20)), "nothing": Selection.all((1,))}

    with pytest.raises(ValueError, match=r"Forgetful.select .* missing \['0.weight', '2.weight'\], unknown \['noth"):
        plan(drop_rate=0.5, selection=Forgetful()).at(0)

    class Small(Selector):
        def select(self, context: SelectionContext) -> dict[str, Selection]:
            return {name: Selection.all((1, 1)) for name in context.parameters}

    with pytest.raises(ValueError, match=r"Small\.select gave for '\d\.\w+' a selection of shape \[1, 1\], expected"):
        plan(drop_rate=0.5, selection=Small()).at(0)
    masks = {"2.weight": torch.ones(20, 32, dtype=torch.bool)}
    masks["2.weight"][0, 3] = False
    with pytest.raises(ValueError, match=r"TopLeft\.select chose coordinates of '2.weight' that pre-pruning took out"):
        plan(masks, drop_rate=0.5, selection=TopLeft()).at(0)


def test_a_choice_that_values_decided_is_in_the_state_and_holds_after_resuming() -> None:
    parameters = {name: parameter.detach().clone() for name, parameter in PARAMETERS.items()}
    made = plan(parameters=parameters, drop_rate=0.5, selection="magnitude", refresh="epoch")
    before = made.at(13, 1)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    for parameter in parameters.values():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    resumed = plan(parameters=parameters, drop_rate=0.5, selection="magnitude", refresh="epoch")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(resumed.at(14, 1), before)
    assert not resumed.at(20, 2)["2.weight"].equals(before["2.weight"])


def test_a_loaded_choice_of_another_epoch_or_network_is_not_taken() -> None:
    made = plan(drop_rate=0.5, selection="magnitude", refresh="epoch")
    made.at(0, 0)
    state = made.state_dict()
    later = plan(drop_rate=0.5, selection="magnitude", refresh="epoch")
    later.load_state_dict(state)
    assert later.at(10, 1)["2.weight"].count == 320
    other = plan(parameters={"w": torch.randn(6, 6)}, drop_rate=0.5, selection="magnitude", refresh="epoch")
    other.load_state_dict(state)
    assert other.at(0, 0)["w"].count == 18


def test_gradual_cooling_reaches_the_final_rate_in_the_last_epoch() -> None:
    made = plan(drop_rate=RateSchedule(final=0.9), refresh="epoch")
    assert [made.rate_at(10 * e, e) for e in range(12)] == pytest.approx([0.9 * min(e, 9) / 9 for e in range(12)])
    assert all(one.is_all for one in made.at(0, 0).values())
    assert made.at(99, 9)["2.weight"].count == 64


@pytest.mark.parametrize(
    ("options", "refresh", "expected"),
    [
        ({"final": 0.99}, "step", {0: 0.0, 50: 0.5, 99: 0.99, 150: 0.99}),
        ({"final": 0.99}, 10, {0: 0.0, 9: 0.0, 10: 0.1, 99: 0.9}),
        ({"final": 0.2, "initial": 0.8, "over": 11}, "step", {0: 0.8, 5: 0.5, 10: 0.2, 90: 0.2}),
        ({"final": 0.8, "kind": "cosine", "over": 21}, "step", {0: 0.0, 5: 0.4 * (1 - 0.5**0.5), 10: 0.4, 20: 0.8}),
        ({"final": 0.4, "initial": 0.1, "kind": "constant"}, "step", {0: 0.4, 99: 0.4}),
        ({"final": 0.5, "over": 51}, "epoch", {0: 0.0, 10: 0.1, 19: 0.1, 50: 0.5, 90: 0.5}),
    ],
)
def test_rates_follow_their_schedule(options: dict[str, Any], refresh: str | int, expected: dict[int, float]) -> None:
    made = plan(drop_rate=RateSchedule(**options), refresh=refresh)
    assert {step: made.rate_at(step, step // 10) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_a_schedule_over_a_fit_of_unknown_length_is_refused(refresh: str) -> None:
    made = SelectionPlan(RateSchedule(final=0.9), refresh=refresh)
    with pytest.raises(ValueError, match="give the Trainer max_epochs or max_steps"):
        made.bind(PARAMETERS)
    SelectionPlan(RateSchedule(final=0.9, over=50)).bind(PARAMETERS)
    SelectionPlan(RateSchedule(final=0.9, kind="constant")).bind(PARAMETERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, r"drop_rate must lie in \[0, 1\), got 1.0"),
        ({"drop_rate": -0.1}, "got -0.1"),
        ({"drop_rate": float("nan")}, "got nan"),
        ({"selection": "snip"}, "one of random, magnitude, noisy_gradient, public_gradient, got 'snip'"),
        ({"selection": "public_gradient"}, r"pass selection=PublicGradientSelector\(public_data="),
        ({"selection": 3}, r"a name or an object with select\(context\), got a int"),
        ({"granularity": "column"}, "granularity must be one of element, row, row_col, tensor, got 'column'"),
        ({"scope": "local"}, "scope must be one of layerwise, global, got 'local'"),
        ({"refresh": 0}, 'refresh must be "step", "epoch" or a number of steps >= 1, got 0'),
        ({"refresh": "batch"}, "got 'batch'"),
        ({"refresh": True}, "got True"),
        ({"explore": 1.0}, r"explore must lie in \[0, 1\), got 1.0"),
        ({"seed": 0.5}, "seed must be a whole number >= 0, got 0.5"),
        ({"always_keep": "*bias"}, "always_keep must be a list of patterns, got the string"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionPlan(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 1.0}, r"RateSchedule's final must lie in \[0, 1\), got 1.0"),
        ({"final": 0.5, "initial": -1}, r"initial must lie in \[0, 1\), got -1"),
        ({"final": 0.5, "kind": "step"}, "got 'step'"),
        ({"final": 0.5, "over": 0}, 'over must be "fit" or a number of steps >= 1, got 0'),
    ],
)
def test_schedules_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateSchedule(**options)


def test_masks_that_do_not_fit_are_listed_and_none_is_applied() -> None:
    made = SelectionPlan(0.5)
    made.bind(PARAMETERS)
    wrong = {
        "0.weight": torch.ones(8, 3, 3, 3),
        "2.weight": torch.ones(20, 31, dtype=torch.bool),
        "4.weight": torch.ones(5, 20, dtype=torch.bool),
        "5.weight": torch.ones(5, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match="none is applied") as error:
        made.bind(PARAMETERS, static_masks=wrong)
    message = str(error.value)
    assert "'5.weight' is no trainable parameter" in message
    assert "'0.weight' is torch.float32" in message
    assert "'2.weight' is torch.bool [20, 31], expected torch.bool [20, 32]" in message
    assert "'4.weight'" not in message
    assert made.at(0)["4.weight"].count == 50
