"""Sweeps: a YAML a run, runs that are killed and go on, and what they say together."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import REPOSITORY

from lightning_eff import cli
from lightning_eff.moe import DecoderConfig, FineGrainedMoELaw, FitResult, append_run, load_law
from lightning_eff.moe.sweep import fit_sweep, make_sweep, plan_budget, run_sweep, running
from lightning_eff.moe.sweep.__main__ import main

BASE = {
    "trainer": {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 2,
    },
    "model": {
        "class_path": "MoEScalingModule",
        "init_args": {
            "decoder": {
                "d_model": 16,
                "n_layers": 1,
                "n_heads": 2,
                "max_seq_len": 16,
                "moe": {"expansion_rate": 4, "granularity": 2, "activation": "swiglu"},
            },
        },
    },
    "data": {"class_path": "ByteTextDataModule", "init_args": {"seq_len": 16, "batch_size": 4}},
}
PER_STEP = 16 * 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(bytes(i * i % 251 for i in range(3000)))
    config = yaml.safe_load(yaml.safe_dump(BASE))
    config["data"]["init_args"]["path"] = str(tmp_path / "text.txt")
    return changed(tmp_path / "base.yaml", config)


def changed(path: Path, config: dict[str, Any] | None = None, **by_name: Any) -> Path:
    """Write a config, or the one that is there with values by ``a__b`` changed; None removes."""
    config = config or yaml.safe_load(path.read_text())
    for name, value in by_name.items():
        *groups, last = name.split("__")
        place = config
        for group in groups:
            place = place[group]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(config))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_gets_a_yaml_and_a_row(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    made = make_sweep(base, out, "1e3,2560", d_model=[16, 32], granularity="1,2", seed=[3])
    assert len(made) == 8
    table = rows(out / "sweep.csv")
    assert [row["run_name"] for row in table] == [run.name for run in made]
    assert {path.stem for path in out.glob("*.yaml")} == {run.name for run in made}
    by_name = {row["run_name"]: row for row in table}
    row = by_name["d32-l1-e4-g2-40steps-seed3"]
    decoder = DecoderConfig.of(BASE["model"]["init_args"]["decoder"], d_model=32)
    assert int(row["n_total"]) == decoder.shape.n_total
    assert int(row["n_tokens"]) == 2560 == 40 * PER_STEP
    assert int(row["flops"]) == decoder.shape.flops_per_token() * 2560
    assert {int(row["n_tokens"]) for row in table} == {16 * PER_STEP, 2560}  # 1,000 tokens are nearest to 16 steps
    config = yaml.safe_load((out / "d32-l1-e4-g2-40steps-seed3.yaml").read_text())
    assert config["seed_everything"] == 3
    assert config["trainer"]["max_steps"] == 40
    assert config["model"]["init_args"]["decoder"]["d_model"] == 32
    assert config["model"]["init_args"]["decoder"]["moe"]["granularity"] == 2
    assert config["model"]["init_args"]["loss_window"] == 2


def test_dense_run_has_the_active_parameters_activation_and_norm_of_the_experts(base: Path, tmp_path: Path) -> None:
    (dense,) = make_sweep(base, tmp_path / "sweep", [640], granularity=["dense"], expansion_rate=[4, 8])
    (fine, _) = make_sweep(base, tmp_path / "other", [640], granularity=[2], expansion_rate=[4, 8])
    assert dense.row["n_total"] == dense.row["n_active"] == fine.row["n_active"]
    assert dense.row["expansion_rate"] == 1
    decoder = DecoderConfig.of(dense.config["model"]["init_args"]["decoder"])
    assert (decoder.moe, decoder.dense_activation, decoder.ffn_output_norm) == (None, "swiglu", "layernorm")


@pytest.mark.parametrize(("steps", "checkpoints"), [(1, 10), (8, 10), (40, 10), (1000, 10), (1000, 1)])
def test_no_checkpoint_is_at_the_end(base: Path, tmp_path: Path, steps: int, checkpoints: int) -> None:
    (run,) = make_sweep(base, tmp_path / "sweep", [steps * PER_STEP], checkpoints=checkpoints)
    every = run.config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"]
    assert steps % every
    assert steps // every <= checkpoints


def test_run_is_validated_at_its_end_unless_the_base_says_otherwise(base: Path, tmp_path: Path) -> None:
    changed(base, trainer__accumulate_grad_batches=2)
    (run,) = make_sweep(base, tmp_path / "a", [10 * PER_STEP * 2])
    assert run.config["trainer"]["max_steps"] == 10
    assert run.config["trainer"]["val_check_interval"] == 20
    changed(base, trainer__val_check_interval=4)
    short, long = make_sweep(base, tmp_path / "b", [PER_STEP * 2, 10 * PER_STEP * 2])
    assert short.config["trainer"]["val_check_interval"] == 2
    assert long.config["trainer"]["val_check_interval"] == 4


@pytest.mark.parametrize(("devices", "processes"), [(2, 2), ("3", 3), ([0, 1], 2), ("0,1,2,", 3)])
def test_tokens_of_a_step_are_those_of_all_processes(base: Path, tmp_path: Path, devices: Any, processes: int) -> None:
    changed(base, trainer__devices=devices, trainer__num_nodes=2)
    (run,) = make_sweep(base, tmp_path / "sweep", [100 * PER_STEP * processes * 2])
    assert run.row["steps"] == 100


def test_learning_rates_are_an_axis_of_the_optimizer_of_the_base(base: Path, tmp_path: Path) -> None:
    changed(base, model__init_args__optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1, "eps": 1e-9}})
    one, other = make_sweep(base, tmp_path / "sweep", [640], lr="1e-3,3e-3")
    assert [run.row["lr"] for run in (one, other)] == [1e-3, 3e-3]
    assert one.config["model"]["init_args"]["optimizer"] == {
        "class_path": "torch.optim.Adam",
        "init_args": {"lr": 1e-3, "eps": 1e-9},
    }
    assert other.name.endswith("-lr0.003")


def test_sweep_can_grow_but_not_change(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    make_sweep(base, out, [640], granularity=[1])
    make_sweep(base, out, [640], granularity=[2, 1])
    assert [row["run_name"] for row in rows(out / "sweep.csv")] == ["d16-l1-e4-g2-10steps", "d16-l1-e4-g1-10steps"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed(base, model__init_args__warmup_fraction=0.1)
    with pytest.raises(ValueError, match="is there and differs"):
        make_sweep(base, out, [640, 1280], granularity=[1, 4])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_numbers_of_the_base_are_read_as_the_command_line_reads_them(base: Path, tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 7e-3}}
    changed(base, model__init_args__optimizer=optimizer, model__init_args__decoder__moe__balance={"z_weight": 2e-3})
    base.write_text(base.read_text().replace("0.007", "7e-3").replace("0.002", "2e-3"))
    (run,) = make_sweep(base, tmp_path / "sweep", [640])
    assert run.row["lr"] == 0.007
    assert run.config["model"]["init_args"]["decoder"]["moe"]["balance"]["z_weight"] == 0.002


def test_base_that_is_no_yaml_is_told(base: Path, tmp_path: Path) -> None:
    base.write_text("model: [")
    with pytest.raises(ValueError, match=r"base.yaml is no YAML: (.|\n)*line 2"):
        make_sweep(base, tmp_path / "sweep", [640])


@pytest.mark.parametrize("killed_at", range(3))
def test_make_that_is_killed_can_be_repeated(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    write, written = Path.write_text, []

    def killed(path: Path, text: str, **options: Any) -> int:
        written.append(path)
        if len(written) > killed_at:
            write(path, text[: len(text) // 2], **options)
            raise KeyboardInterrupt
        return write(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            make_sweep(base, tmp_path / "sweep", [640], granularity="1,2")
    names = [run.name for run in make_sweep(base, tmp_path / "sweep", [640], granularity="1,2")]
    assert [row["run_name"] for row in rows(tmp_path / "sweep" / "sweep.csv")] == names
    for name in names:
        assert yaml.safe_load((tmp_path / "sweep" / f"{name}.yaml").read_text())["trainer"]["max_steps"] == 10


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tokens": "many"}, "expected tokens as numbers"),
        ({}, {"tokens": []}, "at least one"),
        ({}, {"tokens": "0"}, "tokens must be >= 1, got 0"),
        ({}, {"tokens": "nan"}, "tokens must be >= 1, got nan"),
        ({}, {"d_model": "16,16"}, "without repetitions"),
        ({}, {"d_model": "17"}, "n_heads must divide d_model = 17"),
        ({}, {"granularity": "1,3"}, "granularity must divide d_ff = 64, got 3"),
        ({}, {"granularity": "sparse"}, "expected granularity as numbers"),
        ({}, {"lr": "-1"}, "lr must be > 0, got -1"),
        ({}, {"seed": "-1"}, "seed must be >= 0"),
        ({}, {"checkpoints": 0}, "checkpoints must be a whole number >= 1"),
        ({}, {"tokens": "640,641"}, "two runs would be the same"),
        ({"model": None}, {}, "has no model"),
        ({"model__class_path": "ImageClassifier"}, {}, "expected class_path MoEScalingModule, got 'ImageClassifier'"),
        ({"model__init_args__decoder": "decoder.yaml"}, {}, "options of the decoder under decoder:"),
        ({"model__init_args__decoder__widht": 3}, {}, "DecoderConfig has no widht"),
        ({"model__init_args__loss_window": 100}, {}, "loss_window = 100 is longer than the run"),
        ({"model__init_args__optimizer": "AdamW"}, {"lr": "1e-3"}, "optimizer as class_path"),
        ({"data__init_args__seq_len": None, "data__class_path": "TheirText"}, {}, "the base lacks one of them"),
        ({"data__init_args__seq_len": 17}, {}, "seq_len = 17 is more than the decoder's max_seq_len = 16"),
        ({"model__init_args__decoder__moe__router": "expert_choice"}, {"expansion_rate": "4,9"}, "cannot share out"),
        ({"trainer__accelerator": "gpu"}, {}, "say trainer.devices as a number, got 'auto'"),
        ({"trainer__enable_checkpointing": False}, {}, "has enable_checkpointing: false: leave it out"),
        ({"trainer__callbacks": [{"class_path": "lightning_eff.moe.RunRecorder"}]}, {}, "has a RunRecorder"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    base: Path, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    changed(base, **changes)
    with pytest.raises(ValueError, match=message):
        make_sweep(base, tmp_path / "sweep", **{"tokens": [640], **options})
    assert not (tmp_path / "sweep").exists()


def test_missing_base_and_missing_sweep_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no base"):
        make_sweep(tmp_path / "base.yaml", tmp_path / "sweep", [640])
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        run_sweep(tmp_path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path | None]]:
    """Runs that only leave their row, but for those whose name holds g4, which fail; and how they were called."""
    called = []

    def command(config: Path, checkpoint: Path | None) -> list[str]:
        called.append((config.stem, checkpoint))
        line = f"{config.stem},1,1,1"
        code = f"open({str(config.parent / 'runs.csv')!r}, 'a').write({line!r} + chr(10))"
        return [sys.executable, "-S", "-c", "raise SystemExit('no memory')" if "g4" in config.stem else code]

    monkeypatch.setattr(running, "_command", command)
    return called


def sweep_of(base: Path, out: Path, granularity: str = "1,2") -> list[str]:
    names = [run.name for run in make_sweep(base, out, [640], granularity=granularity)]
    (out / "runs.csv").write_text("run_name,n_total,n_tokens,loss\n")
    return names


def test_finished_runs_are_not_run_again(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    first, second = sweep_of(base, tmp_path / "sweep")
    append_run(tmp_path / "sweep" / "runs.csv", {"run_name": first, "n_total": 1, "n_tokens": 1, "loss": 1})
    assert run_sweep(tmp_path / "sweep") == [first, second]
    assert [name for name, _ in commands] == [second]
    run_sweep(tmp_path / "sweep")
    assert len(commands) == 1


def test_failed_run_is_told_and_holds_no_other_up(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    failing, other = sweep_of(base, tmp_path / "sweep", "4,1")
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed(.|\n)*ended with status 1(.|\n)*no memory"):
        run_sweep(tmp_path / "sweep")
    assert [row["run_name"] for row in rows(tmp_path / "sweep" / "runs.csv")] == [other]
    assert [name for name, _ in commands] == [failing, other]


def test_killed_run_goes_on_from_its_last_whole_checkpoint(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    first, _ = sweep_of(base, tmp_path / "sweep")
    folder = tmp_path / "sweep" / "runs" / first
    folder.mkdir(parents=True)
    for age, step in enumerate((9, 6, 3)):
        torch.save({"step": step}, folder / f"step={step}.ckpt")
        os.utime(folder / f"step={step}.ckpt", (1e9 - age, 1e9 - age))
    whole = (folder / "step=9.ckpt").read_bytes()
    (folder / "step=9.ckpt").write_bytes(whole[: len(whole) // 2])
    os.utime(folder / "step=9.ckpt", (1e9, 1e9))
    run_sweep(tmp_path / "sweep", most=1)
    assert commands == [(first, folder / "step=6.ckpt")]
    assert not (folder / "step=9.ckpt").exists()


def test_checkpoints_may_be_folders(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    first, _ = sweep_of(base, tmp_path / "sweep")
    folder = tmp_path / "sweep" / "runs" / first
    for age, step in enumerate((9, 6)):
        (folder / f"step={step}.ckpt").mkdir(parents=True)
        torch.save({"step": step}, folder / f"step={step}.ckpt" / "__0_0.distcp")
        if step == 6:
            torch.save({"step": step}, folder / f"step={step}.ckpt" / "meta.pt")
        os.utime(folder / f"step={step}.ckpt", (1e9 - age, 1e9 - age))
    run_sweep(tmp_path / "sweep", most=1)
    assert commands == [(first, folder / "step=6.ckpt")]
    assert not (folder / "step=9.ckpt").exists()


def test_run_that_somebody_else_is_at_is_left_to_him(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    first, second = sweep_of(base, tmp_path / "sweep")
    folder = tmp_path / "sweep" / "runs" / first
    folder.mkdir(parents=True)
    # another process holds the lock until it has written its row
    code = (
        f"import fcntl, time; lock = open({str(folder / 'lock')!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        f"print('held', flush=True); time.sleep(1.5)\n"
        f"open({str(tmp_path / 'sweep' / 'runs.csv')!r}, 'a').write('{first},1,1,1\\n')"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run_sweep(tmp_path / "sweep") == [first, second]
    assert [name for name, _ in commands] == [second]


def test_lock_lasts_while_the_run_lasts_although_its_caller_is_gone(tmp_path: Path) -> None:
    with running._lock(tmp_path, wait=False) as lock:
        assert lock is not None
        run = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    # here the caller has let go of the file, as it does when it is killed
    with running._lock(tmp_path, wait=False) as lock:
        assert lock is None
    run.kill()
    run.wait()
    with running._lock(tmp_path, wait=False) as lock:
        assert lock is not None


@pytest.mark.parametrize("name", ["läufe", "a folder of many words " * 4 + "end", "it's: #1"])
def test_folder_may_have_any_name(base: Path, tmp_path: Path, commands: list[Any], name: str) -> None:
    names = sweep_of(base, tmp_path / name)
    assert run_sweep(tmp_path / name) == names


def test_moved_sweep_is_refused(base: Path, tmp_path: Path, commands: list[Any]) -> None:
    sweep_of(base, tmp_path / "sweep")
    (tmp_path / "sweep").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="was made for another folder"):
        run_sweep(tmp_path / "moved")
    assert not commands


def test_yaml_of_a_run_trains_and_leaves_its_row(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    example = REPOSITORY / "examples" / "configs" / "moe_sweep.yaml"
    theirs = changed(tmp_path / "theirs.yaml", yaml.safe_load(example.read_text()))
    changed(theirs, data__init_args__path=str(tmp_path / "text.txt"))
    made = make_sweep(base, tmp_path / "sweep", [640], granularity="2,dense", lr="1e-2")
    made += make_sweep(theirs, tmp_path / "sweep", [4096], d_model=[32], granularity=[4])
    for run in made:
        cli.main(["fit", "--config", str(tmp_path / "sweep" / f"{run.name}.yaml")])
        row = rows(tmp_path / "sweep" / "runs.csv")[-1]
        told = {name: str(value) for name, value in run.row.items() if name != "lr"}
        assert {name: row[name] for name in told} == told
        assert 0 < float(row["loss"]) < 6
        assert 0 < float(row["loss_val"]) < 6


LAW = FineGrainedMoELaw(a=18.1, alpha=0.3, b=30.8, beta=0.25, g=8.0, gamma=0.58, c=0.5, expansion_rate=8)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs that keep to a law, each of them once more with a learning rate that did worse; and dense ones."""
    folder = tmp_path / "sweep"
    for n in (1e5, 1e6, 1e7):
        for d in (1e6, 1e7, 1e8):
            for g in (1, 2, 4, 8):
                for worse in (0.0, 0.3):
                    loss = LAW(n, d, g) + worse
                    row = {"n_total": n, "n_tokens": d, "granularity": g, "expansion_rate": 8, "loss": loss}
                    append_row(folder, f"{n}-{d}-{g}-{worse}", row)
            append_row(
                folder,
                f"{n}-{d}",
                {"n_total": n, "n_tokens": d, "granularity": 1, "expansion_rate": 1, "loss": 9 + 1 / n},
            )
    return folder


def append_row(folder: Path, name: str, row: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "runs.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["run_name", *row])
        if new:
            writer.writeheader()
        writer.writerow({"run_name": name, **row})


def test_fit_finds_the_law_in_the_best_of_equal_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", str(runs), "--expansion_rate", "8", "--fixed.c", "0.5", "--bootstrap", "5"])
    printed = capsys.readouterr().out
    assert "Scaling law, fine_grained" in printed
    fit = FitResult.load(runs / "fit.json")
    assert len(fit.runs) == 36
    assert fit.fixed == ("c",)
    for name, value in LAW.coefficients.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-3), name
    for name in ("fit.json", "fit.png", "granularity.png"):
        assert (runs / name).stat().st_size > 0


def test_fit_of_all_runs_takes_the_worse_ones_too(runs: Path, tmp_path: Path) -> None:
    fit = fit_sweep(
        runs / "runs.csv", expansion_rate=8, best=False, bootstrap=0, fixed={"c": 0.5}, out=tmp_path / "all"
    )
    assert len(fit.runs) == 72
    assert np.median(fit.runs.loss - LAW(fit.runs.n_total, fit.runs.n_tokens, fit.runs.granularity)) > 0.1
    assert (tmp_path / "all" / "fit.json").is_file()
    assert not (runs / "fit.json").exists()


def test_plan_under_a_fitted_law_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAW.save(tmp_path / "fit.json")
    main(["plan", "--flops", "1e17", "--law", str(tmp_path / "fit.json"), "--out", str(tmp_path / "plan.csv")])
    printed = capsys.readouterr().out
    assert "As a network that can be built" in printed
    table = rows(tmp_path / "plan.csv")
    assert float(table[0]["loss"]) == min(float(row["loss"]) for row in table)
    assert len(table) == 2 + 9  # optimum, rounded, and G = 1 to 256


def test_plan_at_another_expansion_rate_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fitted at expansion rate 64"):
        table = plan_budget(1e20, expansion_rate=8, granularity=4)
    assert table[0].granularity == 4
    assert load_law("moe64").expansion_rate == 64


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "--flops", "-1"], "error: flops must be > 0"),
        (["plan", "--flops", "1e20", "--law", "moe65"], "error: expected a file or one of moe64"),
        (["run", "nowhere"], "nowhere holds no sweep"),
        (["make", "--base", "base.yaml", "--out", "sweep", "--tokens", "1e6"], "error: there is no base base.yaml"),
    ],
)
def test_shell_tells_what_is_wrong_in_a_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert str(ended.value).startswith("error: ")
    assert message in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_shell_makes_a_sweep_and_shows_its_cost(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["make", "--base", str(base), "--out", str(tmp_path / "s"), "--tokens", "640,1280", "--granularity", "[1, 2]"])
    printed = capsys.readouterr().out
    assert printed.startswith("4 runs, ")
    assert "d16-l1-e4-g2-20steps" in printed


@pytest.mark.slow
def test_killed_sweep_loses_nothing(base: Path, tmp_path: Path) -> None:
    """SIGKILL to the caller and its run half-way; then once more to the caller alone."""
    changed(base, model__init_args__decoder__d_model=32)
    options = {"granularity": "1,2,4", "checkpoints": 20}
    whole = [run.name for run in make_sweep(base, tmp_path / "whole", [200 * PER_STEP], **options)]
    assert run_sweep(tmp_path / "whole") == whole

    out = tmp_path / "killed"
    names = [run.name for run in make_sweep(base, out, [200 * PER_STEP], **options)]
    command = [sys.executable, "-m", "lightning_eff.moe.sweep", "run", str(out)]
    for name, everybody in ((names[0], True), (names[1], False)):
        caller = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        begun = time.monotonic()
        while not list((out / "runs" / name).glob("*.ckpt")):
            assert caller.poll() is None
            assert time.monotonic() - begun < 240
            time.sleep(0.02)
        if everybody:
            os.killpg(caller.pid, signal.SIGKILL)
        else:
            caller.kill()
        caller.wait()
    run_sweep(out)
    finished = rows(out / "runs.csv")
    assert sorted(row["run_name"] for row in finished) == sorted(names)
    expected = {row["run_name"]: row for row in rows(tmp_path / "whole" / "runs.csv")}
    for row in finished:
        assert {**row, "seconds": ""} == {**expected[row["run_name"]], "seconds": ""}
    # the first went on from a checkpoint; the second, whose caller alone was killed, was left to end by itself
    assert ["Restoring states" in (out / "runs" / name / "log.txt").read_text() for name in names] == [
        True,
        False,
        False,
    ]
