"""Search from a trained network: random configurations are cut on trial, repaired without training, and judged.

Y. Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv 2205.05676. Scores of
channels and moments of inputs are taken once; a candidate then costs the solves of its repair and one evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.batch import LossFunction, SplitBatch
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.criteria import Criterion, check_needs, importance
from lightning_eff.pruning.memory import fingerprint
from lightning_eff.pruning.random_channel.bench import Bench, Recalibrate, ScoreFunction, judged, ranking_repair
from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates, Mode, rank
from lightning_eff.pruning.random_channel.journal import Journal
from lightning_eff.pruning.random_channel.sampling import config_of, sample_configs
from lightning_eff.pruning.repair import Repair
from lightning_eff.pruning.samples import Samples
from lightning_eff.reporting import Progress
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph, Cut, PruningPlan, apply_plan


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Processes:
    """Several processes that share a search: process ``rank`` judges candidates ``rank, rank + world_size, ...``.

    Attributes:
        rank: of this process, in 0..world_size - 1.
        world_size: number of processes.
        gather: returns what every process passed in, in the order of ranks, to all of them; plain Python and tensors.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = _alone


@dataclass
class SearchResult(Candidates):
    """What a search found.

    Attributes:
        plan: channels that the best candidate keeps.
        state: its corrected weights and statistics by name in the state dict, as long as the smaller network.
        scores: importance of the channels of each prunable group ``[C]``.
    """

    plan: PruningPlan = field(default_factory=lambda: PruningPlan({}))
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, model: nn.Module, graph: ChannelGraph, example_inputs: Any = None) -> Cut:
        """Cut ``model``, the network that was searched, to the best candidate and give it the corrected weights.

        Args:
            model: changed in place.
            graph: its channel graph.
            example_inputs: the cut is verified on them where they are given.
        """
        cut = apply_plan(model, self.plan, example_inputs, graph=graph, verify=example_inputs is not None)
        model.load_state_dict(self.state, strict=False)
        return cut


def random_search(
    model: nn.Module,
    graph: ChannelGraph,
    *,
    batches: Sequence[Any],
    score_fn: ScoreFunction,
    final_score_fn: ScoreFunction | None = None,
    mode: Mode = "max",
    amount: float | None = None,
    n: int = 100,
    configs: Tensor | None = None,
    criterion: str | Criterion = "l1",
    loss_fn: LossFunction | None = None,
    repair: Repair = Repair(),  # noqa: B008 (frozen)
    recalibrate: Recalibrate = "auto",
    top_k: int = 5,
    on_error: Literal["raise", "skip"] = "raise",
    split_batch: SplitBatch | None = None,
    seed: int = 0,
    progress: bool = True,
    journal: str | Path | None = None,
    processes: Processes = Processes(),
) -> SearchResult:
    """Find the best of many random channel configurations of a trained network, without training.

    The model is the same afterwards, bit for bit, also after an exception or Ctrl-C: candidates are cut on trial.

    Args:
        model: the trained network.
        graph: its channel graph.
        batches: calibration batches on the model's device, for criteria that need data and for the repair. In several
            processes: the same ones in each.
        score_fn: ``model -> score`` on a small part of the validation data; called in evaluation mode without
            gradients, while the model is the smaller network.
        final_score_fn: judges the finalists, on more data; by default ``score_fn``.
        mode: whether the ``"max"`` or the ``"min"`` score is best.
        amount: fraction of the multiply-adds removed, in [0, 1): ``n`` configurations are drawn by the power law. For
            anything else draw them by :func:`sample_configs`.
        n: candidates, >= 1.
        configs: channel counts ``[n, G]`` of :func:`sample_configs` instead of ``amount``.
        criterion: which channels of a layer stay; a name or a callable, see :func:`importance`.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch, for criteria that need a loss.
        repair: how weights are corrected.
        recalibrate: new BatchNorm statistics for candidates that are being ranked: ``"auto"`` where weights are not
            corrected; finalists get them in any case, as ``repair`` says.
        top_k: finalists, which are repaired again as ``repair`` says for what is kept, and judged by
            ``final_score_fn``; 0 for none.
        on_error: ``"skip"`` gives a candidate whose repair or evaluation fails the score NaN and tells so in the notes.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        seed: of the configurations, of criteria and of the repair.
        progress: show a bar.
        journal: CSV file that grows by a line a candidate. A search that was interrupted and is called again with the
            same file, network, data and options goes on behind the last line.
        processes: share the candidates among several processes; each gets the same result as one alone would.

    Raises:
        ValueError: arguments out of range, an unknown criterion, or data or a loss that it needs is missing.
        BudgetError: the amount cannot be reached.
        RuntimeError: not a single candidate has a score that is a number.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> graph, whole = ChannelGraph.from_model(model, x[:2]), model(x).detach()
        >>> near = lambda smaller: -float((smaller(x) - whole).square().mean())
        >>> found = random_search(model, graph, batches=[(x, None)], score_fn=near, amount=0.5, n=1,
        ...                       progress=False)
        >>> _ = found.apply(model, graph)
        >>> model[0].out_features
        4
    """
    _check(mode, amount, n, configs, recalibrate, top_k, on_error, processes)
    check_needs(criterion, batches, loss_fn)
    if configs is None:
        assert amount is not None
        configs = sample_configs(graph, n, amount, seed=seed)
    macs, params = (cost(configs).round().long().tolist() for cost in (graph.macs, graph.params))
    waiting = [
        Candidate(number, config_of(graph, row), macs[number], params[number], nan, nan, 0.0)
        for number, row in enumerate(configs)
    ]
    judges = {"ranked": score_fn, "final": final_score_fn or score_fn}
    dense_scores = {stage: judged(model, judges[stage]) for stage in ("ranked", "final")[: 1 + bool(top_k)]}
    scores = processes.gather(
        importance(model, graph, criterion, batches, loss_fn, split_batch=split_batch, seed=seed)
    )[0]
    told = (
        (configs.tolist(), graph.sizes, repair, recalibrate, top_k, seed, mode),
        {name: values.argsort(descending=True, stable=True).tolist() for name, values in scores.items()},
        {stage: f"{score:.4g}" for stage, score in dense_scores.items()},  # functions of one name differ here
        [described(judge) for judge in judges.values()],
    )
    known = Journal(
        journal,
        "" if journal is None else fingerprint(model, Samples([list(map(split_batch or split_pair, batches))]), told),
        graph.prunable,
        processes.rank,
    )
    ranking = Bench(model, graph, scores, batches, ranking_repair(repair, recalibrate), split_batch, seed)
    finalists: list[Candidate] = []
    with progress_bar("random search", len(waiting) + top_k, enabled=progress, unit="candidates") as bar:
        last = judge = _Judge(ranking, judges["ranked"], mode, on_error, known, processes, bar)
        ranked = judge(waiting)
        if top_k:
            finals = Bench(model, graph, scores, batches, repair, split_batch, seed, final=True, moments=ranking.taken)
            last = _Judge(finals, judges["final"], mode, on_error, known, processes, bar)
            best = [candidate for candidate in rank(ranked, mode)[:top_k] if not isnan(candidate.score)]
            finalists = last([replace(candidate, stage="final") for candidate in best])
    known.replace([*ranked, *finalists])
    plan, state = last.winner(rank(finalists or ranked, mode)[0])
    known.forget_parts()
    return SearchResult(
        candidates=[*ranked, *finalists],
        mode=mode,
        sizes={name: graph.sizes[name] for name in graph.prunable},
        macs=round(graph.macs().item()),
        params=round(graph.params().item()),
        dense_scores=dense_scores,
        notes=[*judge.notes, *(last.notes if last is not judge else ())],
        plan=plan,
        state=state,
        scores=scores,
    )


def _check(
    mode: str,
    amount: float | None,
    n: int,
    configs: Tensor | None,
    recalibrate: str,
    top_k: int,
    on_error: str,
    processes: Processes,
) -> None:
    if (amount is None) == (configs is None):
        raise ValueError("pass either amount, a fraction to remove, or configs, rows of sample_configs")
    check_whole("the number of candidates", n if configs is None else len(configs))
    for name, value, known in (
        ("mode", mode, ("max", "min")),
        ("recalibrate", recalibrate, ("auto", "always", "never")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        check_choice(name, value, known)
    check_whole("top_k", top_k, 0)
    check_whole("rank", processes.rank, 0, processes.world_size - 1)


class _Judge:
    """Scores a stage of candidates, on all processes, and keeps the corrected weights of the best one seen here."""

    def __init__(
        self,
        bench: Bench,
        score_fn: ScoreFunction,
        mode: Mode,
        on_error: str,
        journal: Journal,
        processes: Processes,
        bar: Progress,
    ) -> None:
        self._bench, self._score_fn, self._mode, self._on_error = bench, score_fn, mode, on_error
        self._journal, self._processes, self._bar = journal, processes, bar
        self._held: tuple[Candidate, dict[str, Tensor]] | None = None
        self._owner: dict[int, int] = {}
        self._errors: dict[int, str] = {}
        self.notes: list[str] = []

    def __call__(self, waiting: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates with their scores."""
        world, rank_here = self._processes.world_size, self._processes.rank
        self._owner = {candidate.number: place % world for place, candidate in enumerate(waiting)}
        mine: list[Candidate] = []
        for candidate in waiting[rank_here::world]:
            done = self._journal.known.get((candidate.stage, candidate.number))
            if done is None:
                done = self._judged(candidate)
                self._journal.add(done)
            mine.append(done)
            best = rank(mine, self._mode)[0]
            self._bar.advance(world, f"best {best.score:.4g}")
        parts = self._processes.gather((mine, self._errors))
        scored = [parts[place % world][0][place // world] for place in range(len(waiting))]
        self._report(scored, {number: error for _, errors in parts for number, error in errors.items()})
        return scored

    def winner(self, best: Candidate) -> tuple[PruningPlan, dict[str, Tensor]]:
        """Return plan and corrected weights of the best candidate, in every process."""
        bench = self._bench
        state = None
        if self._owner[best.number] == self._processes.rank:
            if self._held is None or self._held[0].number != best.number:  # its score came from the journal
                state = bench.repaired(best.config)[0].state()
            else:
                state = self._held[1]
            if self._processes.world_size > 1:  # others may have no such device
                state = {name: tensor.cpu() for name, tensor in state.items()}
        state = next(part for part in self._processes.gather(state) if part is not None)
        return PruningPlan.from_scores(bench.graph, bench.scores, best.config), state

    def _judged(self, candidate: Candidate) -> Candidate:
        start = time.perf_counter()
        score = error = nan
        trial = None
        try:
            trial, error = self._bench.repaired(candidate.config)
            score = self._bench.score(trial, self._score_fn)
        except Exception as failure:
            if self._on_error == "raise":
                raise
            self._errors[candidate.number] = f"{type(failure).__name__}: {failure}"
        seconds = time.perf_counter() - start
        done = replace(candidate, score=score, reconstruction_error=error, seconds=seconds)
        if trial is not None and (self._held is None or rank([self._held[0], done], self._mode)[0] is done):
            self._held = done, trial.state()
        return done

    def _report(self, scored: Sequence[Candidate], errors: Mapping[int, str]) -> None:
        unknown = [candidate.number for candidate in scored if isnan(candidate.score)]
        if not unknown:
            return
        first = next((f"; the first error was {text}" for _, text in sorted(errors.items())), "")
        note = f"{len(unknown)} of {len(scored)} candidates have no score ({', '.join(map(str, unknown[:10]))}){first}."
        if len(unknown) == len(scored):
            raise RuntimeError(
                f"not a single score is a number: {note} Does score_fn return a finite number for the whole network? "
                "The model is as it was."
            )
        self.notes.append(note)


def described(what: Any) -> str:
    """Name a function or an object in the same words in every process."""
    if isinstance(what, str) or what is None:
        return str(what)
    text = repr(what)
    return text if " at 0x" not in text else str(getattr(what, "__qualname__", type(what).__qualname__))
