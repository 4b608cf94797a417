"""From one YAML to many: a run for every combination of sizes, granularities and tokens."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader

from lightning_eff.arguments import check_whole
from lightning_eff.data import ByteTextDataModule
from lightning_eff.documents import reading, write_text
from lightning_eff.moe.decoder import DecoderConfig
from lightning_eff.moe.scaling.plan import readable
from lightning_eff.reporting import Column, Table

#: File of a sweep's folder that lists its runs.
SWEEP_FILE = "sweep.csv"
#: File in which finished runs leave their rows.
RUNS_FILE = "runs.csv"
#: Granularity that stands for the network without experts.
DENSE = "dense"

_COLUMNS = (
    *("run_name", "n_total", "n_active", "n_tokens", "granularity", "expansion_rate", "flops"),
    *("d_model", "n_layers", "steps", "lr", "seed"),
)
_RECORDER = "lightning_eff.moe.RunRecorder"
_SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
_OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.1}}
_WINDOW = 20  # share of the steps whose mean loss is the run's: one in so many

_T = TypeVar("_T", int, float)
Config = dict[str, Any]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        row: What it is, by column of the sweep's table.
        config: Of `lightning-eff fit`.
    """

    row: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """Name of its row, its YAML and its folder."""
        return str(self.row["run_name"])


def make_sweep(
    base: str | Path,
    out: str | Path,
    tokens: list[float] | str,
    *,
    d_model: list[int] | str | None = None,
    n_layers: list[int] | str | None = None,
    expansion_rate: list[int] | str | None = None,
    granularity: list[int | str] | str | None = None,
    lr: list[float] | str | None = None,
    seed: list[int] | str | None = None,
    checkpoints: int = 10,
) -> list[SweepRun]:
    """Write a YAML for every combination, and a table of all of them.

    Values are lists, or text with commas: ``"128,256"``. What is not given stays as the base has it. A folder that
    holds a sweep already gets the runs it lacks.

    Args:
        base: YAML of ``lightning-eff fit`` for a :class:`MoEScalingModule`, whose options stand under ``decoder:``.
        out: Folder of the sweep. Its place is written into the YAMLs: it must stay there.
        tokens: Training tokens, each made a whole number of optimizer steps.
        d_model: Widths.
        n_layers: Numbers of blocks.
        expansion_rate: E.
        granularity: G; ``dense`` is the network without experts, with their activation and output norm.
        lr: Peak learning rates.
        seed: Seeds of weights; data has its own. None takes that of the base, or 0.
        checkpoints: How often a run is saved on its way, >= 1: a killed one loses at most its share of the work.

    Returns:
        All runs asked for.

    Raises:
        FileNotFoundError: There is no base.
        ValueError: A value is out of range, or the base is no such YAML. Nothing has been written then.
    """
    check_whole("checkpoints", checkpoints)
    out = Path(out).resolve()
    config = _read_base(Path(base))
    axes: dict[str, list[Any]] = {
        "tokens": _values("tokens", tokens, float),
        "d_model": _values("d_model", d_model, int),
        "n_layers": _values("n_layers", n_layers, int),
        "expansion_rate": _values("expansion_rate", expansion_rate, int),
        "granularity": _values("granularity", granularity, _granularity),
        "lr": _values("lr", lr, float),
        "seed": _values("seed", seed, int, least=0),
    }
    runs: dict[str, SweepRun] = {}
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        run = _run(config, point, out, checkpoints)
        # a dense network has no expansion rate: what differs in it alone is the same run
        if run.name in runs and not (point["granularity"] == DENSE and runs[run.name] == run):
            raise ValueError(f"two runs would be the same, {run.name}: tokens are whole optimizer steps")
        runs[run.name] = run
    _write(out, list(runs.values()))
    return list(runs.values())


def sweep_table(runs: Sequence[SweepRun]) -> Table:
    """Table of the runs of a sweep, with numbers to read."""
    plain = ("run_name", "granularity", "expansion_rate", "d_model", "n_layers", "steps", "lr", "seed")
    rows = [[run.row[name] for name in _COLUMNS] for run in runs]
    total = sum(run.row["flops"] for run in runs)
    columns = [Column(name, "" if name in plain else partial(readable, name)) for name in _COLUMNS]
    return Table(f"{len(runs)} runs, {total:.2e} FLOPs in all", columns, rows)


def _read_base(path: Path) -> Config:
    """Return the base after the checks that need no run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no base {path}")
    try:  # as the command line reads it: for PyYAML alone 1e-3 is a text
        config = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no YAML of `lightning-eff fit`: expected model, data and trainer")
    for name in ("model", "data", "trainer"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{path} has no {name}: expected a YAML of `lightning-eff fit`")
    for name in ("model", "data"):
        config[name].setdefault("init_args", {})
    if str(config["model"].get("class_path")).rpartition(".")[2] != "MoEScalingModule":
        raise ValueError(f"{path}: expected class_path MoEScalingModule, got {config['model'].get('class_path')!r}")
    decoder = config["model"]["init_args"].setdefault("decoder", {})
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: expected the options of the decoder under decoder:, got {decoder!r}")
    if config["trainer"].get("enable_checkpointing") is False:
        raise ValueError(f"{path} has enable_checkpointing: false: leave it out, a killed run goes on from checkpoints")
    for callback in _callbacks(config):
        if str(callback).rpartition(".")[2] == "RunRecorder":
            raise ValueError(f"{path} has a RunRecorder: leave it out, every run of a sweep gets its own")
    return config


def _callbacks(config: Config) -> list[Any]:
    """Class paths of the callbacks of a config."""
    given = config["trainer"].get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    return [callback.get("class_path") if isinstance(callback, dict) else callback for callback in given]


def _values(name: str, given: Sequence[Any] | str | None, kind: Callable[[Any], Any], least: float = 1) -> list[Any]:
    """Return values of an axis; None alone where the base decides."""
    if given is None:
        return [None]
    listed = given.split(",") if isinstance(given, str) else list(given)
    try:
        values = [kind(value) for value in listed]
    except (TypeError, ValueError):
        raise ValueError(f"expected {name} as numbers, in a list or with commas between, got {given!r}") from None
    lowest = 0 if name == "lr" else least
    for value in values:
        if value != DENSE and not (lowest <= value < float("inf") and (value > 0 or name == "seed")):
            raise ValueError(f"{name} must be {'> 0' if name == 'lr' else f'>= {least:g}'}, got {value}")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"expected {name} without repetitions and at least one, got {given!r}")
    return values


def _granularity(value: Any) -> int | str:
    return DENSE if str(value).strip() == DENSE else int(value)


def _run(base: Config, point: Mapping[str, Any], out: Path, checkpoints: int) -> SweepRun:
    """Return the run of one combination."""
    config = copy.deepcopy(base)
    decoder = _decoder(config, point)
    shape = decoder.shape
    sequences, positions = _batch(config)
    together = _devices(config["trainer"]) * int(config["trainer"].get("num_nodes", 1))
    per_step = sequences * positions * together * int(config["trainer"].get("accumulate_grad_batches", 1))
    steps = max(1, round(point["tokens"] / per_step))
    seed = point["seed"] if point["seed"] is not None else config.get("seed_everything")
    seed = 0 if seed is None or isinstance(seed, bool) else seed  # true: LightningCLI draws one
    row = {
        "n_total": shape.n_total,
        "n_active": shape.n_active,
        "n_tokens": steps * per_step,
        "granularity": shape.granularity,
        "expansion_rate": shape.expansion_rate,
        "flops": int(shape.flops_per_token()) * steps * per_step,
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "steps": steps,
        "lr": _learning_rate(config, point["lr"]),
        "seed": seed,
    }
    network = "dense" if decoder.moe is None else f"e{shape.expansion_rate:g}-g{shape.granularity:g}"
    told = [f"d{shape.d_model:g}", f"l{shape.n_layers:g}", network, f"{steps}steps"]
    told += [] if point["lr"] is None else [f"lr{point['lr']:g}"]
    told += [] if point["seed"] is None else [f"seed{seed}"]
    name = "-".join(told)
    _check_batch(name, decoder, sequences, positions)

    config["seed_everything"] = seed
    model, trainer = config["model"]["init_args"], config["trainer"]
    window = model.setdefault("loss_window", max(1, steps // _WINDOW))
    if window > steps:
        raise ValueError(f"{name}: loss_window = {window} is longer than the run; leave it out for {steps // _WINDOW}")
    folder = str(out / "runs" / name)
    _validate_at_the_end(trainer, steps)
    trainer.update(max_steps=steps, max_epochs=-1, default_root_dir=folder)
    given = trainer.get("callbacks") or []
    # no monitor: the last one is kept, the one before is removed when it is whole
    saving = {"dirpath": folder, "every_n_train_steps": _saved_every(steps, checkpoints), "save_top_k": 1}
    trainer["callbacks"] = [
        *(given if isinstance(given, list) else [given]),
        {"class_path": _SAVER, "init_args": saving},
        {"class_path": _RECORDER, "init_args": {"path": str(out / RUNS_FILE), "run_name": name}},
    ]
    return SweepRun({"run_name": name, **row}, config)


def _saved_every(steps: int, checkpoints: int) -> int:
    """Return the steps between checkpoints, so that none is at the end: one resumed there would not be validated."""
    every = max(1, steps // checkpoints)
    while steps % every == 0:
        every += 1
    return every


def _validate_at_the_end(trainer: Config, steps: int) -> None:
    """Let the base decide about validation as far as a run is long enough for it."""
    batches = steps * int(trainer.get("accumulate_grad_batches", 1))
    interval = trainer.get("val_check_interval")
    if interval is None or (isinstance(interval, int) and interval > batches):
        trainer.update(val_check_interval=batches, check_val_every_n_epoch=None)
    elif isinstance(interval, int):
        trainer["check_val_every_n_epoch"] = None


def _decoder(config: Config, point: Mapping[str, Any]) -> DecoderConfig:
    """Change the decoder's options in a config, and return them."""
    options = config["model"]["init_args"]["decoder"]
    for name in ("d_model", "n_layers"):
        if point[name] is not None:
            options[name] = point[name]
    experts = {name: point[name] for name in ("expansion_rate", "granularity") if point[name] is not None}
    dense = experts.get("granularity") == DENSE
    if dense:
        experts = {}
    if experts:
        options["moe"] = {**(options.get("moe") or {}), **experts}
    if dense:
        twin = DecoderConfig.of(options).dense_twin()
        options.update(moe=None, moe_every=1, activation=twin.dense_activation, ffn_output_norm=twin.ffn_output_norm)
    return DecoderConfig.of(options)


def _learning_rate(config: Config, lr: float | None) -> float | None:
    """Change the peak learning rate in a config, and return it; None if the base leaves it to the module."""
    model = config["model"]["init_args"]
    if lr is None:
        optimizer = model.get("optimizer")
        return optimizer.get("init_args", {}).get("lr") if isinstance(optimizer, dict) else None
    optimizer = model.setdefault("optimizer", copy.deepcopy(_OPTIMIZER))
    if not isinstance(optimizer, dict) or "class_path" not in optimizer:
        raise ValueError(f"a sweep over lr wants the optimizer as class_path and init_args, got {optimizer!r}")
    optimizer.setdefault("init_args", {})["lr"] = lr
    return lr


def _batch(config: Config) -> tuple[int, int]:
    """Return the sequences of a batch and the positions of each."""
    data = config["data"]
    bytes_of_text = str(data.get("class_path")).rpartition(".")[2] == ByteTextDataModule.__name__
    sizes = {"batch_size": 64, "seq_len": 256} if bytes_of_text else {}
    sizes.update({name: size for name, size in data["init_args"].items() if name in ("batch_size", "seq_len")})
    if len(sizes) < 2:
        raise ValueError("tokens become steps by data.init_args.batch_size and seq_len, and the base lacks one of them")
    return sizes["batch_size"], sizes["seq_len"]


def _check_batch(name: str, decoder: DecoderConfig, sequences: int, positions: int) -> None:
    """Raise a ValueError where the network could not take a batch."""
    if positions > decoder.max_seq_len:
        raise ValueError(
            f"{name}: seq_len = {positions} is more than the decoder's max_seq_len = {decoder.max_seq_len}"
        )
    moe = decoder.moe
    if moe is not None and moe.router == "expert_choice":
        group = moe.routing.group_size or sequences
        if sequences % group or not round(group * moe.experts_per_token / moe.n_experts):
            raise ValueError(
                f"{name}: {moe.n_experts} experts cannot share out batches of {sequences} sequences in groups of "
                f"{group}; under expert choice a group wants about expansion_rate = {moe.expansion_rate} or more"
            )


def _devices(trainer: Config) -> int:
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([one for one in devices.split(",") if one.strip()])
    if str(devices) == "auto" and trainer.get("accelerator") == "cpu":
        return 1
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(
        f"tokens become steps by the number of processes: say trainer.devices as a number, got {devices!r} "
        f"(accelerator {trainer.get('accelerator', 'auto')!r})"
    )


def _write(out: Path, runs: Sequence[SweepRun]) -> None:
    """Write YAMLs, then the table, after a look at what is there."""
    table = out / SWEEP_FILE
    there = read_rows(out) if table.is_file() else []
    texts = {run.name: yaml.safe_dump(run.config, sort_keys=False) for run in runs}
    for name, text in texts.items():
        path = out / f"{name}.yaml"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is there and differs: give the sweep a folder of its own")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out / f"{name}.yaml", text)
    kept = [[row.get(name, "") for name in _COLUMNS] for row in there if row["run_name"] not in texts]
    write_text(table, Table("", _COLUMNS, [*kept, *([run.row[name] for name in _COLUMNS] for run in runs)]).to_csv())


def read_rows(sweep: str | Path) -> list[dict[str, str]]:
    """Rows of a sweep's table, as text by column.

    Raises:
        FileNotFoundError: The folder holds no sweep.
        ValueError: The table lacks names.
    """
    path = Path(sweep) / SWEEP_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{sweep} holds no sweep: there is no {path}; `make` writes one")
    with reading(f"{path} is no table of runs"), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not all(row.get("run_name") for row in rows):
        raise ValueError(f"{path} is no table of runs: expected a column run_name and at least one row")
    return rows
