import json
import re
from pathlib import Path

import pytest
import torch
from shapley.table_games import random_game

import lightning_eff.shapley
from lightning_eff.shapley import ExactShapley, LeaveOneOut, PermutationShapley, ShapleyResult


def result_of(values, **entries):
    values = torch.tensor(values, dtype=torch.float64)
    defaults = {
        "stderr": torch.ones_like(values),
        "n_evals": 1,
        "n_unique": 1,
        "v_empty": None,
        "v_full": None,
        "method": "permutation",
        "depth": 1,
        "seconds": 0.0,
        "converged": True,
    }
    return ShapleyResult(values=values, **{**defaults, **entries})


def test_rank_is_best_first_and_breaks_ties_by_lowest_index():
    assert result_of([0.0, 2.0, 0.0, 2.0, 1.0]).rank().tolist() == [1, 3, 4, 0, 2]


def test_top_is_best_first_and_bottom_worst_first():
    result = result_of([0.0, 2.0, 0.0, 3.0])
    assert (result.top(2).tolist(), result.bottom(2).tolist()) == ([3, 1], [2, 0])


def test_more_players_than_there_are_cannot_be_asked_for():
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        result_of([0.0, 1.0]).top(3)


def test_player_without_a_value_is_not_ranked():
    with pytest.raises(ValueError, match=r"players \[1\] have no value"):
        result_of([0.0, float("nan")]).rank()


def test_interval_is_normal():
    low, high = result_of([1.0]).interval(0.95)
    assert high.item() - 1 == 1 - low.item() == pytest.approx(1.959964, abs=1e-6)  # the 97.5 % point of N(0, 1)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_impossible_confidence_level_is_refused(level):
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        result_of([1.0]).interval(level)


def test_selected_component_of_a_vector_game_is_the_result_of_that_component():
    vector = ExactShapley().estimate(random_game(4, components=3))
    scalar = ExactShapley().estimate(type(random_game(4))(random_game(4, components=3).values[:, 1]))
    chosen = vector.select(1)
    torch.testing.assert_close(chosen.values, scalar.values, rtol=0, atol=1e-14)
    assert chosen.rank().tolist() == scalar.rank().tolist()
    assert (chosen.v_full, chosen.v_empty) == (scalar.v_full, scalar.v_empty)


def test_vector_values_are_ranked_by_component_only():
    vector = ExactShapley().estimate(random_game(3, components=2))
    with pytest.raises(ValueError, match="select"):
        vector.rank()
    with pytest.raises(ValueError, match="no component 2"):
        vector.select(2)


def test_efficiency_gap_of_a_partial_value_is_refused():
    with pytest.raises(ValueError, match="depth n = 3, this result has depth 1"):
        _ = LeaveOneOut().estimate(random_game(3)).efficiency_gap


@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("depth", ["full", 3])
def test_json_file_gives_the_result_back_to_the_bit(tmp_path, components, depth):
    result = PermutationShapley(8, depth=depth).estimate(random_game(5, components=components), generator=0)
    result.names = list("abcde")
    result.save(tmp_path / "values.json")
    assert ShapleyResult.load(tmp_path / "values.json").to_dict() == result.to_dict()
    assert json.loads((tmp_path / "values.json").read_text())["names"] == list("abcde")


def test_missing_values_and_error_bars_survive_the_file(tmp_path):
    result_of([float("nan")], stderr=torch.tensor([float("inf")])).save(tmp_path / "values.json")
    back = ShapleyResult.load(tmp_path / "values.json")
    assert back.values.isnan().all()
    assert back.stderr.isinf().all()


def test_dict_loads_in_a_checkpoint_with_weights_only(tmp_path):
    result = PermutationShapley(4).estimate(random_game(4), generator=0)
    torch.save(result.to_dict(), tmp_path / "result.ckpt")
    assert torch.load(tmp_path / "result.ckpt", weights_only=True) == result.to_dict()


def test_readme_prints_what_it_says(capsys):
    readme = (Path(lightning_eff.shapley.__file__).parent / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", readme, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
