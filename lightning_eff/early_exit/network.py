"""A network with several exits around any backbone, which is not rewritten.

Heads run inside of hooks on the layers of the backbone. Training takes all outputs along; ``predict`` really stops:
samples that are sure enough leave the batch and what comes behind sees only the others (section numbers in the files
beside this one are of arXiv 2407.14320). Shapes: ``B`` batch, ``C`` classes, ``E`` exits, ``K = E + 1`` outputs.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.batch import SplitBatch, batch_size, call_model
from lightning_eff.documents import parsed, reading
from lightning_eff.early_exit.attaching.attachment import Engine, attach, check_inputs, hooks_from_dict
from lightning_eff.early_exit.attaching.costs import ExitCosts
from lightning_eff.early_exit.attaching.features import feature_of
from lightning_eff.early_exit.attaching.heads import Head, HeadBuilder, head_from
from lightning_eff.early_exit.attaching.kept_costs import KeptCosts
from lightning_eff.early_exit.attaching.placement import Exits, named_exits, number_of_exits
from lightning_eff.early_exit.attaching.probe import probe, samples
from lightning_eff.early_exit.attaching.self_check import SelfCheck, check_exits
from lightning_eff.early_exit.attaching.sizes import Sizes
from lightning_eff.early_exit.calibration import Calibration
from lightning_eff.early_exit.inference.evaluation_mode import Evaluation
from lightning_eff.early_exit.inference.hooks import Collect, Compact, LastExit, Tape, place, running
from lightning_eff.early_exit.inference.leaving import AllLeft, ExitOutput, Leaving, Rule, select_from_all
from lightning_eff.early_exit.inference.policies import Policy, ScoreFunction, policy_from
from lightning_eff.reporting import human
from lightning_eff.surgery.state import quiet_model

ENGINES = ("auto", "hooks", "staged", "off")
log = logging.getLogger(__name__)


class MultiExitNetwork(nn.Module):
    """Exits on intermediate layers of a backbone.

    Args:
        backbone: any module; it stays as it is, and so do the keys of its state dict.
        exits: names of layers (``"layer1"``; ``"block@2"`` is the second call of a layer), a dict name -> head,
            fractions of the cost, or a number of exits to be spread evenly over the cost.
        num_classes: ``C`` >= 1, width of the backbone's own output.
        head: a kind of :class:`Head`, a ``Head``, or a callable ``(shape of one sample's feature, C) -> module``.
        example_input: a batch of inputs (tensor, tuple or dict); without it, call :meth:`build` before anything else.
        policy: ``"max_prob"``, ``"entropy"``, ``"normalized_entropy"``, ``"margin"``, ``"patience"``, a
            :class:`Policy` or a callable ``(logits, exit_index, state) -> (scores, state)``.
        thresholds: one for all exits or one each, in the policy's unit; None disables an exit, and without any all are.
        engine: how ``predict`` stops. ``"hooks"``: inside of the backbone's own forward; ``"staged"``: torch.export
            cuts it into stages; ``"off"``: it does not, all is computed and then chosen from; ``"auto"``: hooks where
            a self-check passes, stages elsewhere.
        clone_features: copy features before heads read them, needed where something later writes into them;
            ``"auto"`` finds out.
        compact_min_fraction: where fewer samples than this fraction leave, in [0, 1], they stay in the batch until a
            later exit, which saves a copy of the features; answers are the same.
        output_fn: takes the logits out of what the backbone returns; by default the first tensor, or ``.logits``.

    Attributes:
        exits: names of the layers, in the order in which they run.
        heads: one module an exit.
        costs: what each output costs; see :meth:`measure_costs`.
        checked: result of the self-check, None with the engines ``"off"`` and ``"staged"``.
        gradient_scaling: ``"none"`` or ``"equilibrium"`` (:mod:`~lightning_eff.early_exit.training.equilibrium`).

    Raises:
        ValueError: what cannot work, with the reason and the way out.
    """

    score_thresholds: Tensor
    temperatures: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        exits: Exits,
        num_classes: int,
        *,
        head: str | Head | HeadBuilder = "auto",
        example_input: Any = None,
        policy: str | Policy | ScoreFunction = "max_prob",
        thresholds: float | Sequence[float | None] | None = None,
        engine: Engine = "auto",
        clone_features: bool | Literal["auto"] = "auto",
        compact_min_fraction: float = 0.0,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_classes", num_classes)
        check_choice("engine", engine, ENGINES)
        check_number("compact_min_fraction", compact_min_fraction, least=0, most=1)
        check_choice("clone_features", clone_features, (True, False, "auto"))
        self.num_exits = number_of_exits(exits)
        self.backbone = backbone
        self.heads = nn.ModuleList()
        self.num_classes = num_classes
        self.policy = policy_from(policy)
        self.engine: Engine = engine
        self.gradient_scaling: Literal["none", "equilibrium"] = "none"
        self.compact_min_fraction = compact_min_fraction
        self.exits: tuple[str, ...] = ()
        self.checked: SelfCheck | None = None
        self.tape = Tape(self.heads)
        self.output_of = output_fn or feature_of
        self._asked, self._head, self._clone_features = exits, head_from(head), clone_features
        self._heads_by_name = exits if isinstance(exits, dict) else {}
        self._clone: set[int] = set()
        self._structure: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._costs = KeptCosts()
        self._stages_of = Sizes()
        self._stages: Any = None
        self._evaluation = Evaluation(self)
        self.register_buffer("score_thresholds", torch.full((self.num_exits,), math.inf, dtype=torch.float32))
        self.register_buffer("temperatures", torch.ones(self.num_exits + 1, dtype=torch.float32))
        self._rule: tuple[Any, Rule] | None = None
        if thresholds is not None:
            self.set_thresholds(thresholds)
        if example_input is not None:
            self.build(example_input)

    # Attaching

    @property
    def built(self) -> bool:
        """Whether exits stand on the backbone."""
        return bool(self._structure)

    @property
    def num_outputs(self) -> int:
        """``K``, the exits and the backbone's own output."""
        return self.num_exits + 1

    def build(self, example_input: Any) -> MultiExitNetwork:
        """Put the exits on the backbone: find layers and batch dimensions, build heads, choose the engine, count costs.

        Args:
            example_input: a batch of inputs, one sample or more.

        Raises:
            ValueError: a layer no exit can stand on, a backbone whose output is not ``[B, num_classes]``, or an engine
                that does not work on it.
        """
        if self.built:
            raise ValueError("the exits of this network are built already")
        with torch.inference_mode(False):  # weights of heads that can be trained
            self._build(example_input)
        return self

    def _build(self, example_input: Any) -> None:
        attached = attach(
            self.backbone,
            self._asked,
            self.num_classes,
            example_input,
            engine=self.engine,
            clone_features=self._clone_features,
            output_of=self.output_of,
        )
        self._attach(attached.structure)
        self.checked, self._stages = attached.checked, attached.stages
        self._check_heads(example_input)
        try:
            self.measure_costs(example_input)
        except ValueError as error:
            warnings.warn(f"no costs: {error}", stacklevel=2)
        else:
            if self.num_exits and self.costs.backbone[self.num_exits - 1] >= self.costs.base:
                warnings.warn(
                    f"nothing is computed behind exit {self.exits[-1]!r}: samples that leave there save no work",
                    stacklevel=2,
                )

    def structure(self) -> dict[str, Any]:
        """Return where the exits are and what they read, plain Python, for checkpoints."""
        self._need_built()
        costs = None if self._costs.known is None else self.costs.to_dict()
        return {**self._structure, "num_classes": self.num_classes, "costs": costs}

    def build_from(self, structure: dict[str, Any]) -> MultiExitNetwork:
        """Put the exits where :meth:`structure` says, without data; weights are loaded afterwards.

        Raises:
            ValueError: this network asks for other exits, or has others; the message lists them.
        """
        with reading("not where a network had its exits"):
            names = [parsed(str, one["name"], "name") for one in structure["exits"]]
        own = set(self.exits)
        if not self.built and not isinstance(self._asked, int):
            own = {one for one in self._asked if isinstance(one, str)}
        if (own and {*map(_first_call, own)} != {*map(_first_call, names)}) or len(names) != self.num_exits:
            raise ValueError(
                f"the exits differ: missing here are {sorted(set(names) - own)}, only here are "
                f"{sorted(own - set(names))}; {len(names)} exits were saved, this network has {self.num_exits}"
            )
        if structure.get("num_classes") != self.num_classes:
            raise ValueError(f"{structure.get('num_classes')} classes were saved, this network has {self.num_classes}")
        if not self.built:
            try:
                with reading("not where a network had its exits"):
                    costs = structure["costs"]
                    self._costs = KeptCosts(None if costs is None else ExitCosts.from_dict(costs))
                    self._attach({key: structure[key] for key in ("exits", "hooks", "inputs", "engine")})
            except ValueError:
                self._costs = KeptCosts()
                self.remove()
                raise
        return self

    def remove(self) -> nn.Module:
        """Take the exits off and return the backbone as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._structure, self._stages, self.exits = [], {}, None, ()
        self.heads = self.tape.heads = nn.ModuleList()
        return self.backbone

    def summary(self) -> str:
        """Return one line: layers, shapes and costs of the exits, parameters of the heads, engine and why."""
        self._need_built()
        told = [f"{one['name']} {tuple(one['shape'])}" for one in self._structure["exits"]]
        if self._costs.known is not None:
            told = [f"{one} at {share:.0%}" for one, share in zip(told, self.costs.fractions(), strict=False)]
        weights = human(sum(p.numel() for p in self.heads.parameters()), "parameters")
        why = f" (with hooks {self.checked.problem})" if self.checked is not None and self.checked.problem else ""
        count = f"{self.num_exits} {'exit' if self.num_exits == 1 else 'exits'}"
        return f"{count}: {', '.join(told)} of the cost; heads {weights}; engine {self.engine}{why}"

    # Thresholds and costs

    @property
    def thresholds(self) -> list[float | None]:
        """Threshold of each exit in the policy's unit, None where it is disabled."""
        return [self.policy.to_threshold(score) for score in self.score_thresholds.tolist()]

    def set_thresholds(self, thresholds: float | Sequence[float | None] | Calibration | None) -> None:
        """Set when samples leave.

        Args:
            thresholds: one for all exits or a list of ``E``, in the policy's unit; None disables. Or what
                :func:`~lightning_eff.early_exit.calibrate` found.

        Raises:
            ValueError: another number of thresholds, or one that is not a number.
        """
        if isinstance(thresholds, Calibration):
            thresholds = [self.policy.to_threshold(score) for score in thresholds.thresholds]
        listed = list(thresholds) if isinstance(thresholds, Sequence) else [thresholds] * self.num_exits
        if len(listed) != self.num_exits:
            raise ValueError(f"expected {self.num_exits} thresholds, one an exit, got {len(listed)}")
        scores = [self.policy.to_score(one) for one in listed]
        off = [k for k, one in enumerate(listed) if one is not None and scores[k] == math.inf]
        if off:
            log.info("the thresholds of exits %s are out of reach: these exits are disabled", off)
        self.score_thresholds.copy_(torch.tensor(scores))

    @property
    def rule(self) -> Rule:
        """When samples leave, as it stands."""
        a, b = self.score_thresholds, self.temperatures
        state = (id(a), a._version, id(b), b._version, id(self.policy), self.compact_min_fraction)
        if self._rule is None or self._rule[0] != state:
            self._rule = state, Rule(self.policy, a.tolist(), b.tolist(), self.compact_min_fraction)
        return self._rule[1]

    @property
    def costs(self) -> ExitCosts:
        """What each output costs, as last measured; measured anew where channels were removed since.

        Raises:
            ValueError: nothing was measured, or channels were removed and no example is known.
        """
        return self._costs.of(self)

    @costs.setter
    def costs(self, costs: ExitCosts) -> None:
        self._costs.keep(costs, self)

    def measure_costs(self, example_input: Any, kind: Literal["flops", "latency"] = "flops") -> ExitCosts:
        """Measure and keep what each output costs; see :func:`exit_costs`."""
        self._need_built()
        return self._costs.measure(self, example_input, kind)

    def keep_shapes(self, example_input: Any) -> None:
        """Note what inputs look like, not what is in them, to measure costs anew when channels are removed."""
        self._costs.keep_shapes(example_input)

    def self_check(self, example_input: Any) -> SelfCheck:
        """Let some samples of a small batch leave inside of the backbone's forward and compare the others."""
        self._need_built()
        seen = probe(self.backbone, example_input)
        return check_exits(self.backbone, named_exits(self.backbone, self.exits, seen), self.exits, seen, example_input)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the logits of all ``K`` outputs, each ``[B, C]``."""
        self._need_built()
        branch = None
        if self.gradient_scaling == "equilibrium":
            from lightning_eff.early_exit.training.equilibrium import equilibrium_branch

            branch = equilibrium_branch(self.num_outputs)
        run = Collect(self.tape, self._classify, self._clone, branch)
        output = self._run(run, args, kwargs)
        again = run.overwritten()
        if again and self._clone_features == "auto":
            self._clone |= again  # from now on these heads read a copy
            return self.forward(*args, **kwargs)
        return [*self._in_order(run), self.output_of(output)]

    def forward_heads(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the logits of the ``E`` heads on a backbone without gradients, which stops after the last exit."""
        self._need_built()

        def classify(index: int, feature: Tensor) -> Tensor:
            with torch.enable_grad():
                return self._classify(index, feature.detach())

        stop = None if torch.compiler.is_compiling() else self.num_exits - 1
        run = Collect(self.tape, classify, set(range(self.num_exits)) & self._clone, stop=stop)
        with torch.no_grad(), suppress(LastExit):
            self._run(run, args, kwargs)
        return self._in_order(run)

    def features(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return what the ``E`` heads read, batch first, and what the backbone returns."""
        self._need_built()
        run = Collect(self.tape, lambda index, feature: feature, set(range(self.num_exits)))
        output = self._run(run, args, kwargs)
        return [*self._in_order(run), self.output_of(output)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.inference_mode()
    def predict(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answer a batch; each sample is computed only until it leaves.

        Runs in evaluation mode without gradients, whatever mode the network is in. Threads may call it at once.
        """
        self._need_built()
        batch = batch_size(args[0] if args and isinstance(args[0], Tensor) else (args, kwargs))
        with self._evaluation:
            if batch == 0:
                return ExitOutput.empty(self.num_classes, self.score_thresholds.device)
            rule = self.rule
            if self.engine == "off":
                return select_from_all(rule, self.forward(*args, **kwargs))
            if not any(map(rule.enabled, range(self.num_exits))):
                return Leaving(rule, self.heads, batch).finish(self.output_of(self.backbone(*args, **kwargs)))
            if self.engine == "staged":
                from lightning_eff.early_exit.inference.staged import predict_staged

                return predict_staged(self, self.stages((args, kwargs)), args, kwargs)
            check_inputs(self.backbone, self._structure["inputs"], args, kwargs)
            leaving = Leaving(rule, self.heads, batch)
            run = Compact(self.tape, leaving)
            try:
                with running(run):
                    logits = self.output_of(self.backbone(*args, **kwargs))
            except AllLeft:
                return leaving.finish(None)
            self._check_visited(k for k in range(self.num_exits) if rule.enabled(k) and k not in run.visited)
            return leaving.finish(logits)

    def stream(
        self, loader: Iterable[Any], merge_batch: int | None = None, split_batch: SplitBatch | None = None
    ) -> ExitOutput:
        """Answer all batches of a loader, putting survivors of several batches together; see :func:`stream`."""
        from lightning_eff.early_exit.inference.stream import stream

        return stream(self, loader, merge_batch, split_batch)

    def stages(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Return the backbone cut at the exits for inputs like these; it is cut on first use and for other shapes."""
        args, kwargs = inputs
        if self._stages_of.changed(self) or self._stages is None or not self._stages.fit(args, kwargs):
            from lightning_eff.early_exit.inference.stages import cut_stages

            self._stages = cut_stages(self.backbone, self.exits, args, kwargs)
            self._stages_of = Sizes(self)
        return self._stages

    # Parts of the above

    def _run(self, run: Collect, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self.tape.run = run
            output = self.backbone(*args, **kwargs)
            self.tape.run = None
        else:
            with running(run):
                output = self.backbone(*args, **kwargs)
        return output

    def _in_order(self, run: Collect) -> list[Any]:
        self._check_visited(k for k in range(self.num_exits) if k not in run.results)
        return [run.results[k] for k in range(self.num_exits)]

    def _check_visited(self, missing: Iterable[int]) -> None:
        if names := [self.exits[k] for k in missing]:
            raise RuntimeError(
                f"the layers {', '.join(names)} did not run, or were compiled alone: compile the whole network for "
                "training, not its backbone; predict is not compiled"
            )

    def _classify(self, index: int, feature: Tensor) -> Tensor:
        logits: Tensor = self.heads[index](feature)
        return logits

    def _check_heads(self, example_input: Any) -> None:
        with quiet_model(self), torch.no_grad():
            shapes = [tuple(logits.shape) for logits in call_model(self, samples(example_input, 2))]
        for layer, shape in zip(self.exits, shapes, strict=False):
            if shape != (2, self.num_classes):
                self.remove()
                raise ValueError(
                    f"the head on {layer!r} returned {shape} for a batch of two, expected (2, {self.num_classes}), one "
                    "logit a class"
                )

    def _need_built(self) -> None:
        if not self._structure:
            raise ValueError("the exits are not built: give example_input, or call build with a batch of inputs")

    def _attach(self, structure: dict[str, Any]) -> None:
        self._structure = structure
        self.exits = tuple(one["name"] for one in structure["exits"])
        self.engine = structure["engine"]
        self._clone = {k for k, one in enumerate(structure["exits"]) if one["clone"]}
        heads = {_first_call(name): head for name, head in self._heads_by_name.items()}
        for one in structure["exits"]:
            head = head_from(heads.get(_first_call(one["name"]), self._head))
            if isinstance(head, Head):
                head = head.on(self.backbone, one["channels"])
            self.heads.append(head if isinstance(head, nn.Module) else head(one["shape"], self.num_classes))
        like = next((p for p in self.backbone.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.heads.to(like.device, like.dtype)
        self._handles = place(self.backbone, hooks_from_dict(self.tape, structure["hooks"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiExitNetwork:
        """Move as any module; thresholds and temperatures stay float32, in bfloat16 0.999 would be 1."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module; costs that came with the file are of the shapes that are there now."""
        self._costs.hold_for(self)
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again on use."""
        return {**self.__dict__, "_stages": None, "_rule": None, "_evaluation": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take on what was saved or copied."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._evaluation = Evaluation(self)


def _first_call(name: str) -> str:
    """One name for the first call of a layer, which may be told as ``layer`` and as ``layer@1``."""
    return name.removesuffix("@1")
