"""A search from a trained network finds, repairs and reports what it says, and leaves no trace."""

from __future__ import annotations

import copy
import csv
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from searched import Untouched, likeness, small
from torch import Tensor, nn

from lightning_eff.pruning.criteria import importance
from lightning_eff.pruning.random_channel import Candidates, Processes, config_of, random_search, sample_configs
from lightning_eff.pruning.random_channel.bench import ranking_repair
from lightning_eff.pruning.repair import Repair
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan

NONE = Repair("none", bn_samples=0)


def run(
    found: tuple[nn.Module, ChannelGraph, list[tuple[Tensor, Tensor]]] | None = None, **options: Any
) -> tuple[nn.Module, ChannelGraph, Any]:
    model, graph, batches = found or small()
    given = {"score_fn": likeness(model, batches), "amount": 0.5, "n": 8, "progress": False, "top_k": 2}
    return model, graph, random_search(model, graph, batches=batches, **{**given, **options})


def counting(score: Callable[[nn.Module], float]) -> tuple[Callable[[nn.Module], float], list[int]]:
    calls: list[int] = []

    def counted(model: nn.Module) -> float:
        calls.append(1)
        return score(model)

    return counted, calls


def without_seconds(result: Candidates) -> list[tuple[Any, ...]]:
    return [
        (c.number, c.stage, c.score, str(c.reconstruction_error), c.macs, c.params, c.config) for c in result.candidates
    ]


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_scores_equal_those_of_copies_that_are_cut() -> None:
    model, graph, batches = small()
    score = likeness(model, batches)
    configs = sample_configs(graph, 6, 0.5)
    _, _, found = run((model, graph, batches), amount=None, configs=configs, repair=NONE, top_k=0)
    l1 = graph.weight_norms(model, 1)
    for row, candidate in zip(configs, found.candidates, strict=True):
        smaller = copy.deepcopy(model).eval()
        plan = PruningPlan.from_scores(graph, l1, config_of(graph, row))
        apply_plan(smaller, plan, batches[0][0], graph=graph)
        with torch.no_grad():
            assert candidate.score == pytest.approx(score(smaller), rel=1e-5)
        assert candidate.macs == graph.macs(row[None]).item()
        assert candidate.params == sum(p.numel() for p in smaller.parameters())
        assert math.isnan(candidate.reconstruction_error)


def test_the_network_is_the_same_afterwards_bit_for_bit() -> None:
    found = small()
    untouched = Untouched(found[0])
    run(found, repair=Repair(), criterion="taylor", loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    untouched.check()


def test_an_interrupted_search_leaves_the_network_as_it_was() -> None:
    model, graph, batches = small()
    score, calls = counting(likeness(model, batches))

    def interrupted(smaller: nn.Module) -> float:
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(smaller)

    untouched = Untouched(model)
    with pytest.raises(KeyboardInterrupt):
        run((model, graph, batches), score_fn=interrupted)
    untouched.check()


def test_the_applied_winner_scores_what_the_search_said() -> None:
    model, graph, batches = small()
    score = likeness(model, batches)
    _, _, found = run((model, graph, batches))
    cut = found.apply(model, graph, batches[0][0])
    with torch.no_grad():
        assert score(model.eval()) == pytest.approx(found.best.score, rel=1e-4)
    assert (cut.macs[1], cut.params[1]) == (found.best.macs, found.best.params)
    assert found.best.stage == "final"


def test_repair_brings_candidates_nearer_to_the_whole_network() -> None:
    plain, corrected = (run(repair=repair, top_k=0)[2] for repair in (NONE, Repair("gram", bn_samples=0)))
    for a, b in zip(plain.candidates, corrected.candidates, strict=True):
        assert b.score > a.score
        assert 0 < b.reconstruction_error < 1


def test_finalists_are_the_best_ranked_and_judged_by_the_final_score() -> None:
    model, graph, batches = small()
    score = likeness(model, batches)
    _, _, found = run((model, graph, batches), final_score_fn=lambda m: score(m) - 100, top_k=3)
    assert found.stages == ["ranked", "final"]
    assert [c.number for c in found.candidates if c.stage == "final"] == [c.number for c in found.top(3, "ranked")]
    assert found.best is found.top(1, "final")[0]
    assert found.best.score < -100
    assert found.dense_scores == {"ranked": pytest.approx(0, abs=1e-9), "final": pytest.approx(-100)}
    assert found.dense_score == found.dense_scores["final"]


def test_the_least_score_wins_where_less_is_better() -> None:
    model, graph, batches = small()
    score = likeness(model, batches)
    most = run((model, graph, batches), top_k=0)[2]
    least = run((model, graph, batches), score_fn=lambda m: -score(m), mode="min", top_k=0)[2]
    assert least.best.number == most.best.number
    assert least.best.score == -most.best.score


def test_kept_channels_are_the_best_scored_ones() -> None:
    model, graph, found = run(top_k=0)
    scores = importance(model, graph, "l1")
    for name, kept in found.plan.keep.items():
        worst = min(float(scores[name][c]) for c in kept)
        assert worst >= max(float(s) for c, s in enumerate(scores[name]) if c not in kept)
    assert found.plan.config(graph) == {**graph.sizes, **found.best.config}


@pytest.mark.parametrize(
    ("repair", "recalibrate", "update", "bn_samples"),
    [
        (Repair(), "auto", "gram", 0),
        (Repair(), "always", "gram", 512),
        (Repair("sequential"), "auto", "sequential", 0),
        (Repair("none"), "auto", "none", 512),
        (Repair("none"), "never", "none", 0),
    ],
)
def test_new_statistics_while_ranking_only_where_weights_are_not_corrected(
    repair: Repair, recalibrate: Any, update: str, bn_samples: int
) -> None:
    used = ranking_repair(repair, recalibrate)
    assert (used.update, used.bn_samples) == (update, bn_samples)


def test_an_interrupted_search_goes_on_behind_its_last_candidate(tmp_path: Path) -> None:
    found, path = small(), tmp_path / "run" / "candidates.csv"
    plain = likeness(found[0], found[2])
    _, _, whole = run(found, score_fn=plain)
    score, calls = counting(plain)

    def dies(smaller: nn.Module) -> float:
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(smaller)

    dies.__qualname__ = plain.__qualname__
    with pytest.raises(KeyboardInterrupt):
        run(found, score_fn=dies, journal=path)
    written = lines(path)
    assert [row["index"] for row in written] == ["0", "1", "2", "3"]  # two calls judged the whole network
    score, calls = counting(plain)
    score.__qualname__ = plain.__qualname__
    _, _, resumed = run(found, score_fn=score, journal=path)
    assert len(calls) == 2 + 4 + 2  # whole network twice, four candidates, two finalists
    assert without_seconds(resumed) == without_seconds(whole)
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in whole.state.items())
    assert len(lines(path)) == 10
    score, calls = counting(plain)
    score.__qualname__ = plain.__qualname__
    _, _, again = run(found, score_fn=score, journal=path)
    assert len(calls) == 2
    assert without_seconds(again) == without_seconds(whole)
    assert all(torch.equal(again.state[name], tensor) for name, tensor in whole.state.items())


def test_scores_of_another_criterion_or_score_function_are_not_taken_up(tmp_path: Path) -> None:
    class Weighted:
        def __init__(self, sign: float) -> None:
            self.sign = sign

        def __call__(self, model: nn.Module, graph: Any, batches: Any, loss_fn: Any) -> Any:
            norms = graph.weight_norms(model, p=1)
            return {name: self.sign * values for name, values in norms.items()}

    found = small()
    plain = likeness(found[0], found[2])
    for number, (first, second) in enumerate(
        (
            ({"criterion": Weighted(1.0)}, {"criterion": Weighted(-1.0)}),
            ({"score_fn": lambda net: 2 * plain(net) + 1}, {"score_fn": lambda net: plain(net) - 1}),
        )
    ):
        journal = tmp_path / f"{number}.csv"
        run(found, **{"score_fn": plain, **first}, journal=journal)
        _, _, fresh = run(found, **{"score_fn": plain, **second})
        with pytest.warns(UserWarning, match="is of another search"):
            _, _, again = run(found, **{"score_fn": plain, **second}, journal=journal)
        assert without_seconds(again) == without_seconds(fresh)


def test_the_line_that_a_process_died_in_is_left_out(tmp_path: Path) -> None:
    found, path = small(), tmp_path / "candidates.csv"
    _, _, whole = run(found, journal=path, top_k=0)
    text = path.read_text()
    path.write_text(text[: text.rstrip("\n").rfind("\n") + 9])
    _, _, again = run(found, journal=path, top_k=0)
    assert without_seconds(again) == without_seconds(whole)
    assert path.read_text().count("\n") == text.count("\n")


@pytest.mark.parametrize("changed", ["seed", "data", "weights", "repair", "criterion"])
def test_a_journal_of_another_search_is_put_aside(tmp_path: Path, changed: str) -> None:
    model, graph, batches = small()
    path = tmp_path / "candidates.csv"
    run((model, graph, batches), journal=path, top_k=0)
    before = path.read_text()
    options: dict[str, Any] = {}
    if changed == "seed":
        options["seed"] = 1
    elif changed == "repair":
        options["repair"] = Repair(ridge=1e-2)
    elif changed == "criterion":
        options["criterion"] = "l2"
    elif changed == "data":
        batches[0][0][0, 0, 0, 0] += 1
    else:
        with torch.no_grad():
            next(model.parameters())[0] *= 2
    score, calls = counting(likeness(model, batches))
    score.__qualname__ = likeness(model, batches).__qualname__
    with pytest.warns(UserWarning, match=r"another search .* renamed to candidates\.csv\.previous"):
        run((model, graph, batches), score_fn=score, journal=path, top_k=0, **options)
    assert len(calls) == 9
    assert (tmp_path / "candidates.csv.previous").read_text() == before


def test_a_candidate_without_score_ranks_last_and_is_told() -> None:
    model, graph, batches = small()
    score, calls = counting(likeness(model, batches))

    def sometimes(smaller: nn.Module) -> float:
        value = score(smaller)
        return {3: math.nan, 5: math.inf}.get(len(calls) - 1, value)  # the whole network is judged first

    _, _, found = run((model, graph, batches), score_fn=sometimes, top_k=0)
    assert [math.isnan(c.score) for c in found.candidates] == [i in (2, 4) for i in range(8)]
    assert [c.number for c in found.top(8)][-2:] == [2, 4]
    assert found.notes == ["2 of 8 candidates have no score (2, 4)."]
    assert "2 of 8 candidates" in str(found)


def test_when_no_candidate_has_a_score_the_search_fails_and_the_network_is_as_it_was() -> None:
    found = small()
    untouched = Untouched(found[0])
    with pytest.raises(RuntimeError, match=r"not a single score is a number: 8 of 8 .* as it was"):
        run(found, score_fn=lambda m: math.nan)
    untouched.check()


def test_failing_candidates_are_skipped_only_where_that_was_asked_for() -> None:
    model, graph, batches = small()
    score, calls = counting(likeness(model, batches))

    def fails(smaller: nn.Module) -> float:
        value = score(smaller)
        if len(calls) == 4:
            raise ZeroDivisionError("no samples")
        return value

    _, _, found = run((model, graph, batches), score_fn=fails, top_k=0, on_error="skip")
    assert found.notes == ["1 of 8 candidates have no score (2); the first error was ZeroDivisionError: no samples."]
    calls.clear()
    untouched = Untouched(model)
    with pytest.raises(ZeroDivisionError):
        run((model, graph, batches), score_fn=fails, top_k=0)
    untouched.check()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_find_what_one_finds(world: int, tmp_path: Path) -> None:
    alone = run()[2]
    barrier, parts, results, failures = threading.Barrier(world), [None] * world, {}, []
    judged: list[list[int]] = [[] for _ in range(world)]
    shared = [small() for _ in range(world)]
    turn = threading.Lock()  # the processes of a real run have generators and modes of their own

    def process(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            parts[rank] = value
            turn.release()
            barrier.wait(60)
            everything = list(parts)
            barrier.wait(60)
            turn.acquire()
            return everything

        try:
            with turn:
                model, _, batches = shared[rank]
                score = likeness(model, batches)

                def counted(smaller: nn.Module) -> float:
                    judged[rank].append(1)
                    return score(smaller)

                options = {"score_fn": counted, "journal": tmp_path / "candidates.csv"}
                results[rank] = run(shared[rank], processes=Processes(rank, world, gather), **options)[2]
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for rank in range(world):
        assert without_seconds(results[rank]) == without_seconds(alone)
        assert all(torch.equal(results[rank].state[name], tensor) for name, tensor in alone.state.items())
        assert len(judged[rank]) <= 2 + math.ceil(8 / world) + math.ceil(2 / world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.csv", "candidates.fingerprint.json"]
    assert len(lines(tmp_path / "candidates.csv")) == 10


def test_one_process_goes_on_with_what_several_wrote(tmp_path: Path) -> None:
    found, path = small(), tmp_path / "candidates.csv"

    def stopped(value: Any) -> list[Any]:
        if isinstance(value, dict):  # importance, before the search
            return [value, value]
        raise KeyboardInterrupt

    for rank in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(found, journal=path, top_k=0, processes=Processes(rank, 2, stopped))
    assert [row["index"] for row in lines(tmp_path / "candidates.rank1.csv")] == ["1", "3", "5", "7"]
    score, calls = counting(likeness(found[0], found[2]))
    score.__qualname__ = likeness(found[0], found[2]).__qualname__
    _, _, whole = run(found, score_fn=score, journal=path, top_k=0)
    assert len(calls) == 1  # of the whole network
    assert without_seconds(whole) == without_seconds(run(found, top_k=0)[2])


def test_tables_have_a_column_for_each_group_and_files_are_written(tmp_path: Path) -> None:
    _, graph, found = run()
    first, *rows = csv.reader(found.table("candidates").to_csv().splitlines())
    known = ["index", "stage", "score", "macs", "params", "reconstruction_error", "seconds"]
    assert first == [*known, *graph.prunable]
    assert [row[:2] for row in rows] == [
        *([str(i), "ranked"] for i in range(8)),
        *([str(c.number), "final"] for c in found.candidates[8:]),
    ]
    found.score_name = "likeness"
    text = str(found)
    assert all(word in text for word in ("dense", "uniform", "median of 8", f"best: {found.best.number}", "likeness"))
    assert all(path.stat().st_size for path in found.write(tmp_path / "b"))


def test_candidates_go_through_a_checkpoint(tmp_path: Path) -> None:
    _, _, found = run()
    torch.save(found.to_dict(), tmp_path / "state.pt")
    again = Candidates.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert without_seconds(again) == without_seconds(found)
    assert again.best.number == found.best.number
    assert again.quantities().keys() == found.quantities().keys()
    assert again.dense_score == found.dense_score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": None}, "either amount, a fraction to remove, or configs"),
        ({"amount": 0.5, "configs": torch.ones(1, 6, dtype=torch.int64)}, "either amount"),
        ({"n": 0}, "number of candidates must be a whole number >= 1, got 0"),
        ({"amount": 1.5}, r"amount must lie in \[0, 1\)"),
        ({"mode": "best"}, "mode must be one of max, min, got 'best'"),
        ({"recalibrate": "yes"}, "recalibrate must be one of auto, always, never, got 'yes'"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, got -1"),
        ({"criterion": "l7"}, "criterion must be one of .*'l1'.* got 'l7'"),
        ({"criterion": "taylor"}, "needs a loss"),
        ({"processes": Processes(2, 2)}, "rank must be a whole number from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_told_before_any_work(options: dict[str, Any], message: str) -> None:
    found = small()
    score, calls = counting(likeness(found[0], found[2]))
    with pytest.raises(ValueError, match=message):
        run(found, score_fn=score, **options)
    assert not calls
