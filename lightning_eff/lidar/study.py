"""The course of a line selection, whoever drives it: count lines, evaluate coalitions, select.

Frames come one at a time, in any order and on any of several processes; what processes know of them is put together by
the frames' ids, so that a frame that two of them saw counts once.

Shapes: `n` candidates, `M` coalitions.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.documents import whole_state
from lightning_eff.lidar.choosing import choose
from lightning_eff.lidar.contest import Frames, Gather, PassGame, alone, baseline_lines
from lightning_eff.lidar.frames import Frame, LinePixels
from lightning_eff.lidar.game import Completion, FrameGame
from lightning_eff.lidar.gap import GapGame, mean_gap_game
from lightning_eff.lidar.journal import ValueJournal, agree, frame_fingerprint, model_hash
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.predictor import ValuePredictor, thumbnail
from lightning_eff.lidar.records import FrameId, FrameRecord
from lightning_eff.lidar.report import LineSelection, Round, in_order, overlap
from lightning_eff.lidar.settings import Settings
from lightning_eff.lidar.values import LineEstimation, LineValues

_TOLERANCE = 1e-3  # relative, of a frame's errors when a run goes on, maybe on another device


class LineStudy:
    """One selection of lines, in the making and afterwards.

    Args:
        model: the network; evaluated in evaluation mode and left as it was.
        settings: what was asked for.
        gather: how processes tell each other what they know.

    Attributes:
        completion: the network and how it is asked.
        estimation: coalitions evaluated so far; None before `begin`.
        rounds: how sure the values were after every round.
        selection: the result, as far as it is known; None before the first round.
    """

    def __init__(self, model: nn.Module, settings: Settings, gather: Gather = alone) -> None:
        self.settings, self.gather = settings, gather
        self.completion = Completion(model, settings.game.completion(settings.forward))
        self.estimation: LineEstimation | None = None
        self.rounds: list[Round] = []
        self.selection: LineSelection | None = None
        self.predictor: ValuePredictor | None = None
        self.journal: ValueJournal | None = None
        self.notes: list[str] = []
        self.skipped = self.expected = 0
        self._resumed = False  # whether the network is still to be asked for what a checkpoint says
        self.pixels = LinePixels(torch.zeros(settings.num_lines, dtype=torch.int64))
        self._counted: dict[FrameId, tuple[list[int], int, bool]] = {}
        self._costs: dict[FrameId, Tensor] = {}
        self._thumbnails: dict[FrameId, Tensor] = {}

    # Which lines are players.

    def count(self, frame: Frame) -> None:
        """Look which lines a frame shows; ValueError where `line_idx` does not fit the sensor."""
        if frame.id in self._counted:
            return
        pixels = LinePixels.count([frame], self.settings.num_lines)
        truth = self.completion.options.has_truth(frame)
        self._counted[frame.id] = pixels.per_line.tolist(), pixels.unassigned, truth

    def begin(self) -> None:
        """Settle the players, once all frames were counted.

        Raises:
            ValueError: no frame has valid ground truth, no line is left, or the budget is too small.

        Warns:
            LidarWarning: more than 5 % of the pixels belong to no line.
        """
        counted = {id_: entry for part in self.gather(self._counted) for id_, entry in part.items()}
        self._counted = {}
        used = [(lines, unassigned) for lines, unassigned, truth in counted.values() if truth]
        self.skipped, self.expected = len(counted) - len(used), len(used)
        if not used:
            least = self.completion.options.min_target
            raise ValueError(f"none of {len(counted)} frames has ground truth above {least} m to measure errors on")
        for lines, unassigned in used:
            self.pixels += LinePixels(torch.tensor(lines, dtype=torch.int64), unassigned)
        self.pixels.check(self.settings.game.unassigned)
        self._prepare(self.pixels.candidates(self.settings.game.candidates, self.settings.game.min_pixels))

    def _prepare(self, lines: list[int]) -> None:
        asked = self.settings
        self.estimation = LineEstimation(lines, self.expected, asked.estimation, self.completion.metric)
        if self.estimation.pooled and asked.dynamic is not None:
            raise ValueError(
                f"a budget of {self.estimation.budget} coalitions a frame gives no values of single frames, which "
                "dynamic selection needs: raise it"
            )

    @property
    def lines(self) -> list[int]:
        """The candidates; RuntimeError before they are known."""
        if self.estimation is None:
            raise RuntimeError("no frames were counted yet")
        return self.estimation.lines

    # Coalitions.

    def keep_values(self, dirpath: Path, process: int) -> None:
        """Keep every value in a file of a folder at once; another network or game has a file of its own.

        Args:
            dirpath: the folder.
            process: number of this process.
        """
        told = {name: one for name, one in self.told_game().items() if name not in ("candidates", "min_pixels")}
        header = {"format": 1, "model": model_hash(self.completion.model), "lines": self.lines, **told}
        self.journal = ValueJournal.in_folder(dirpath, header, process)

    def frame_game(self, frame: Frame) -> FrameGame:
        """The game of a frame, with what the journal knows of it."""
        if self.journal is not None:
            return self.journal.game(frame, self.lines, self.completion)
        return FrameGame(frame, self.lines, self.completion)

    def _played(self, frame: Frame) -> FrameGame | None:
        return self.frame_game(frame) if self.completion.options.has_truth(frame) else None

    def advance(self, frame: Frame, rounds: int) -> int:
        """Evaluate coalitions of a frame until it has done `rounds` rounds; the number of forwards it took.

        Raises:
            ValueError: what is known already is of another frame with this id, or of a network that answered
                otherwise.
        """
        assert self.estimation is not None
        if not self.completion.options.has_truth(frame):
            return 0
        record = self.estimation.records.get(frame.id)
        missing = rounds - (0 if record is None else record.rounds)
        if missing < 1:
            return 0
        game, shown = self.frame_game(frame), frame_fingerprint(frame)
        if record is not None:
            self._check(game, record, shown)
        else:
            if {"gap_dp", "gap_greedy"} & {*self.settings.baselines} and game.n_players:
                self._costs[frame.id] = GapGame.of_frame(frame, self.lines).costs
            if self.settings.dynamic is not None and self.settings.dynamic.source == "predictor":
                self._thumbnails[frame.id] = thumbnail(frame.rgb)
        forwards = sum(self.estimation.advance(game) for _ in range(missing))
        self.estimation.records[frame.id].fingerprint = shown
        return forwards

    def _check(self, game: FrameGame, record: FrameRecord, shown: str) -> None:
        if record.fingerprint and record.fingerprint != shown:
            raise ValueError(
                f"frame {game.id!r} shows something else than when it was evaluated before: go on with the same data "
                "(folder, seed, crop, size, no random augmentation), give frames distinct ids, or begin anew without "
                "the checkpoint"
            )
        assert self.estimation is not None
        if not self._resumed or self.estimation.estimator is None:  # the gap game asks no network
            return
        self._resumed = False
        ends = {"error_full": (record.full, game.full_error), "error_empty": (record.empty, game.empty_error)}
        for name, (then, now) in ends.items():
            if not agree(then, now, self.completion.options.precision, _TOLERANCE):
                raise ValueError(
                    f"the network answers otherwise than when this run began ({name} of frame {game.id!r}: {then:g} "
                    f"then, {now:g} now): resume with the same network, forward and metric, or begin anew without the "
                    "checkpoint"
                )

    def share(self) -> None:
        """Let all processes know what each has evaluated."""
        assert self.estimation is not None
        for state in self.gather(self.estimation.state_dict()):
            self.estimation.load_state_dict(state)
        for name in ("_costs", "_thumbnails"):
            setattr(self, name, {id_: one for part in self.gather(getattr(self, name)) for id_, one in part.items()})

    @property
    def complete(self) -> bool:
        """Whether all frames have done all rounds."""
        if self.estimation is None:
            return False
        records = self.estimation.records.values()
        return len(records) >= self.expected and all(one.rounds >= self.settings.estimation.rounds for one in records)

    # The selection.

    def note_round(self) -> Round:
        """Solve for the values, select without asking the network again, and note how sure both are.

        Raises:
            ValueError: too few coalitions so far to tell the lines apart.
        """
        before = self.selection
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LidarWarning)  # said once, by `finish`
            now = self.select()
        error = float(now.se.max()) if bool(now.se.isfinite().all()) else math.inf
        stability = None if before is None else overlap(before.selected, now.selected)
        self.rounds.append(Round(now.forwards, error, stability))
        self.selection = replace(now, rounds=list(self.rounds))
        return self.rounds[-1]

    def finish(self, frames: Frames) -> LineSelection:
        """Solve for the values and select, trying sets out on the calibration frames where that was asked for.

        Args:
            frames: reads the calibration frames of this process once more.
        """
        spread, wanted = self.settings.spread, {*self.settings.baselines}
        game = PassGame(len(self.lines), frames, self._played, self.gather)
        played = spread.rule == "auto" or spread.refine != "none" or bool(wanted & {"greedy", "loo"})
        self.selection = self.select(game if played else None)
        dynamic = self.settings.dynamic
        if dynamic is not None and dynamic.source == "predictor":
            known, seed = self.selection.per_frame, self.settings.estimation.seed
            self.predictor = ValuePredictor.of_frames(self._thumbnails, known, dynamic.steps, seed)
        return self.selection

    def select(self, game: PassGame | None = None) -> LineSelection:
        """The lines that the values known so far select; what needs a game is left out without one."""
        assert self.estimation is not None
        asked, found = self.settings, self.estimation.result()
        sizes, lines = list(asked.k), self.lines
        chosen = choose(found.values, sizes, lines, asked.spread, game)
        spent = game.forwards if game is not None else 0
        gap = None
        if self._costs:
            gap = mean_gap_game([GapGame(self._costs[id_]) for id_ in in_order(self._costs)])
        baselines, forwards = baseline_lines(asked, found, self.pixels.per_line, game, gap)
        notes = [*self.notes, *self._notes(found)]
        selection = LineSelection(
            num_lines=asked.num_lines,
            lines=lines,
            values=found.values,
            se=found.stderr,
            selected={k: one.lines for k, one in chosen.items()},
            rules={k: one.rule for k, one in chosen.items()},
            scores={k: one.scores for k, one in chosen.items() if one.scores},
            per_frame=dict(found.per_frame),
            pixels=self.pixels.per_line,
            error_empty=found.error_empty,
            error_full=found.error_full,
            settings=self._told(found),
            forwards=found.evaluations + spent,
            skipped=self.skipped,
            baselines=baselines,
            baseline_forwards=forwards,
            elevations=asked.spread.angles,
            rounds=list(self.rounds),
            partial=not self.complete,
            notes=notes,
        )
        doubts = [selection.unresolved(k) for k in sizes]
        return replace(selection, notes=[*notes, *filter(None, doubts)])

    def _notes(self, found: LineValues) -> list[str]:
        notes = []
        if self.pixels.unassigned:
            notes.append(f"{100 * self.pixels.share_unassigned:.1f} % of the pixels belong to no line.")
        if self.skipped:
            notes.append(f"{self.skipped} frames without ground truth are left out.")
        if found.pooled:
            notes.append("All frames were solved together, for want of coalitions of each.")
        dynamic = self.settings.dynamic
        if dynamic is not None and dynamic.source == "oracle":
            notes.append("Lines by frame are chosen with the frame's own ground truth: a bound, no method.")
        return notes

    def _told(self, found: LineValues) -> dict[str, Any]:
        estimation = self.estimation
        assert estimation is not None
        return {
            **estimation.settings(),
            "metric": self.completion.metric,
            "empty_value": self.settings.game.empty_value,
            "method": found.method,
            "proxy_correlation": found.proxy_correlation,
            "share_unassigned": self.pixels.share_unassigned,
            "model": type(self.completion.model).__name__,
            "model_hash": model_hash(self.completion.model),
            "spread": self.settings.spread.rule,
            "refine": self.settings.spread.refine,
            "dynamic": None if self.settings.dynamic is None else self.settings.dynamic.source,
        }

    def known(self) -> LineSelection:
        """The selection; RuntimeError before there is any."""
        if self.selection is None:
            raise RuntimeError("no lines are selected yet: call trainer.fit first, or give ckpt_path")
        return self.selection

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Plain Python and tensors, fit for checkpoints with `weights_only=True`."""
        return {
            "game": self.told_game(),
            "lines": None if self.estimation is None else self.lines,
            "expected": self.expected,
            "skipped": self.skipped,
            "pixels": self.pixels.per_line.tolist(),
            "unassigned": self.pixels.unassigned,
            "estimation": None if self.estimation is None else self.estimation.state_dict(),
            "costs": [[id_, self._costs[id_]] for id_ in in_order(self._costs)],
            "thumbnails": [[id_, self._thumbnails[id_]] for id_ in in_order(self._thumbnails)],
            "rounds": [vars(one) for one in self.rounds],
            "selection": None if self.selection is None else self.selection.to_dict(),
            "predictor": None if self.predictor is None else self.predictor.state_dict(),
        }

    @whole_state
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: it was made with other settings; the message names them.
        """
        for name, own in self.told_game().items():
            if state["game"][name] != own:
                there = state["game"][name]
                raise ValueError(
                    f"these values were estimated with other settings ({name}: {there} there, {own} here): resume with "
                    "the same"
                )
        self.expected, self.skipped = state["expected"], state["skipped"]
        self.pixels = LinePixels(torch.tensor(state["pixels"], dtype=torch.int64), state["unassigned"])
        if state["lines"] is not None:
            self._prepare(list(state["lines"]))
            assert self.estimation is not None
            self.estimation.load_state_dict(state["estimation"])
            self._resumed = True
        self._costs = dict(state["costs"])
        self._thumbnails = dict(state["thumbnails"])
        self.rounds = [Round(**one) for one in state["rounds"]]
        self.selection = None if state["selection"] is None else LineSelection.from_dict(state["selection"])
        self.predictor = None if state["predictor"] is None else ValuePredictor.from_state(state["predictor"])

    def told_game(self) -> dict[str, str]:
        """What is played for, in words for checkpoints and files."""
        asked = self.settings
        written = {name: str(entry) for name, entry in vars(asked.game).items() if name != "coalition_batch"}
        return {**written, "metric": self.completion.metric, "num_lines": str(asked.num_lines)}
