import pytest
import torch
from shapley.table_games import CountingGame, all_coalitions, grouped_saturating_game, random_game

from lightning_eff.shapley import CachedGame, TableGame

HUNDREDTHS = TableGame(torch.arange(16, dtype=torch.float64) / 400)  # 0 to 3.75 %


def imported(path, text, n=4, style="auto"):
    path.write_text(text)
    counting = CountingGame(TableGame(torch.full((2**n,), -1.0)))
    game = CachedGame(counting)
    game.import_official(path, style)
    return game, counting


def kept(n, *players):
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, list(players)] = True
    return mask


def test_indices_name_the_players_that_are_removed(tmp_path):
    game, counting = imported(tmp_path / "f.txt", "4\n: 99.27\n0: 87.5\n1,3: 12.34\n0,1,2,3: 10.00\n")
    asked = torch.cat([kept(4, 0, 1, 2, 3), kept(4, 1, 2, 3), kept(4, 0, 2), kept(4)])
    assert game(asked).tolist() == pytest.approx([0.9927, 0.875, 0.1234, 0.1], abs=1e-15)
    assert (len(game), counting.count) == (4, 0)


def test_flags_name_the_players_that_are_removed(tmp_path):
    game, counting = imported(tmp_path / "f.txt", "4\n0,0,0,0: 99.27\n0,1,0,1: 12.34\n1,1,1,1: 10\n")
    asked = torch.cat([kept(4, 0, 1, 2, 3), kept(4, 0, 2), kept(4)])
    assert game(asked).tolist() == pytest.approx([0.9927, 0.1234, 0.1], abs=1e-15)
    assert counting.count == 0


def test_order_of_indices_spaces_and_empty_lines_do_not_matter(tmp_path):
    game, _ = imported(tmp_path / "f.txt", "\n 12 \n\n8,1: 50\n 11 , 2 :25.5 \n", n=12)
    assert len(game) == 2
    assert game(~kept(12, 1, 8)).item() == 0.5
    assert game(~kept(12, 2, 11)).item() == 0.255


@pytest.mark.parametrize(("text", "style", "left"), [("0,1: 7", "flags", (0,)), ("0,1: 7", "indices", ())])
def test_two_players_can_be_read_both_ways_and_the_style_decides(tmp_path, text, style, left):
    game, counting = imported(tmp_path / "f.txt", f"2\n{text}\n", n=2, style=style)
    assert game(kept(2, *left)).item() == 0.07
    assert counting.count == 0


def test_two_players_are_read_as_flags_where_every_line_allows_it(tmp_path):
    assert imported(tmp_path / "f.txt", "2\n0,1: 7\n1,1: 5\n", n=2)[0](kept(2, 0)).item() == 0.07
    assert imported(tmp_path / "f.txt", "2\n0,1: 7\n1: 5\n", n=2)[0](kept(2)).item() == 0.07


@pytest.mark.parametrize("style", ["indices", "flags"])
@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_round_trip_keeps_every_value(tmp_path, style, n):
    table = TableGame(torch.arange(2**n, dtype=torch.float64) / 10_000)  # whole hundredths of a per cent
    game = CachedGame(table)
    game(all_coalitions(n))
    game.export_official(tmp_path / "f.txt", style)
    again, counting = imported(tmp_path / "f.txt", (tmp_path / "f.txt").read_text(), n, style)
    assert torch.allclose(again(all_coalitions(n)), table.values, rtol=0, atol=1e-15)
    assert counting.count == 0


def test_style_of_a_written_file_is_found_from_three_players_on(tmp_path):
    game = CachedGame(TableGame(torch.arange(8, dtype=torch.float64) / 10))
    game(all_coalitions(3))
    for style in ("indices", "flags"):
        game.export_official(tmp_path / "f.txt", style)
        again, counting = imported(tmp_path / "f.txt", (tmp_path / "f.txt").read_text(), 3)
        assert torch.allclose(again(all_coalitions(3)), game.game.values)
        assert counting.count == 0


def test_written_text_is_in_the_official_form(tmp_path):
    game = CachedGame(HUNDREDTHS)
    game(torch.cat([kept(4, 2), kept(4, 0, 1, 2, 3), kept(4, 0, 2)]))
    game.export_official(tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_text() == "4\n: 3.75\n1,3: 1.25\n0,1,3: 1.00\n"
    game.export_official(tmp_path / "f.txt", "flags", decimals=1)
    assert (tmp_path / "f.txt").read_text() == "4\n0,0,0,0: 3.8\n0,1,0,1: 1.2\n1,1,0,1: 1.0\n"


def test_official_decimals_round_and_more_of_them_do_not(tmp_path):
    value = 0.123456789
    for decimals, error in ((2, 5e-5), (12, 1e-14)):
        game = CachedGame(TableGame([value, value]))
        game(all_coalitions(1))
        game.export_official(tmp_path / "f.txt", decimals=decimals)
        again, _ = imported(tmp_path / "f.txt", (tmp_path / "f.txt").read_text(), 1, "indices")
        assert 0 <= abs(again(kept(1)).item() - value) <= error


def test_known_values_stay(tmp_path):
    game = CachedGame(HUNDREDTHS)
    game(kept(4, 0))
    (tmp_path / "f.txt").write_text("4\n1,2,3: 50\n0: 50\n0: 60\n")
    game.import_official(tmp_path / "f.txt")
    assert game(torch.cat([kept(4, 0), kept(4, 1, 2, 3)])).tolist() == [1 / 400, 0.5]


def test_values_of_groups_are_neither_read_nor_written(tmp_path):
    game = CachedGame(grouped_saturating_game(3, 2))
    game.call_group(0, all_coalitions(3))
    game.export_official(tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_text() == "3\n"
    game.import_official(tmp_path / "f.txt")
    assert len(game) == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 1: expected the number of players"),
        ("\nfour\n", "line 2: expected the number of players, at least 1, got 'four'"),
        ("0\n", "line 1: expected the number of players"),
        ("5\n0: 10\n", "line 1: it is for 5 players, this game has 4"),
        ("4\n0: 10\n\n4: 20\n", r"line 4: expected different players in 0\.\.3, got '4'"),
        ("4\n2,2: 10\n", "line 2: expected different players"),
        ("4\n0 10\n", "line 2: expected removed players, a colon and an accuracy"),
        ("4\n0: ten\n", "line 2: expected removed players, a colon"),
        ("4\n0: 100.5\n", r"line 2: .* in 0\.\.100 %, got '0: 100.5'"),
        ("4\n0: nan\n", "line 2"),
        ("4\n-1: 10\n", "line 2: expected whole numbers before the colon, got '-1'"),
        ("4\n0,,1: 10\n", "line 2: expected whole numbers"),
        ("4\n0,1,0,1: 10\n0,1,0: 10\n", "line 3: expected a 0 or 1 for each of the 4 players, got '0,1,0'"),
        ("4\n0,1,0,1: 10\n: 10\n", "line 3: expected a 0 or 1 for each"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_line(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=f"f.txt: {complaint}"):
        imported(tmp_path / "f.txt", text)


@pytest.mark.parametrize(
    ("game", "complaint"),
    [
        (TableGame([-1.2, 0.0]), r"fractions in \[0, 1\], got -1.2 to 0.0"),
        (random_game(1, components=2), "vectors of 2"),
    ],
)
def test_what_is_no_accuracy_is_not_written(tmp_path, game, complaint):
    cached = CachedGame(game)
    cached(all_coalitions(1))
    with pytest.raises(ValueError, match=complaint):
        cached.export_official(tmp_path / "f.txt")
    assert not (tmp_path / "f.txt").exists()


def test_unknown_style_is_refused(tmp_path):
    with pytest.raises(ValueError, match="style must be one of indices, flags, got 'bits'"):
        CachedGame(HUNDREDTHS).export_official(tmp_path / "f.txt", "bits")
    with pytest.raises(ValueError, match="style must be one of auto, indices, flags, got 'bits'"):
        imported(tmp_path / "f.txt", "4\n", style="bits")
    with pytest.raises(ValueError, match="decimals must be a whole number >= 0, got -1"):
        CachedGame(HUNDREDTHS).export_official(tmp_path / "f.txt", decimals=-1)
