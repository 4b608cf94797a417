"""Callbacks for any module with experts: loads counted as they were, training undisturbed, biases moved once a step."""

import csv
import os
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_eff import cli
from lightning_eff.data import ByteTextDataModule
from lightning_eff.data.loading import ResumableLoader
from lightning_eff.moe import FineGrainedMoE, MoEScalingModule, total_aux_loss
from lightning_eff.moe.callbacks import BalanceBiasUpdater, ExpertLoadMonitor
from lightning_eff.moe.load_history import LoadHistory, loads_figure

D = 8


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go beside what the trainer logs, here the working directory."""
    monkeypatch.chdir(tmp_path)


class Network(L.LightningModule):
    """Two layers of 8 and 6 experts in somebody's own module, which keeps the loads of every batch."""

    def __init__(self, second: bool = True, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = FineGrainedMoE(D, 16, expansion_rate=4, granularity=2, **options)
        self.second = FineGrainedMoE(D, 16, expansion_rate=3, granularity=2, **options)
        self.head = nn.Linear(D, 1)
        self.runs_second = second
        self.loads: list[tuple[Tensor, Tensor]] = []
        self.dropped = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.first(x)
        hidden = self.second(hidden) if self.runs_second else hidden
        if self.runs_second:
            self.loads.append((self.first.last_load, self.second.last_load))
        for layer in (self.first, self.second):
            if layer.last_load is not None:
                self.dropped += int(layer.last_load.sum() - layer.last_counts.sum())
        return (self.head(hidden) - y).square().mean() + total_aux_loss(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(batches: int = 6) -> ResumableLoader:
    x = torch.randn(8 * batches, 5, D, generator=torch.Generator().manual_seed(1))
    both = TensorDataset(x, x.sum(-1, keepdim=True))
    return ResumableLoader(both, batch_size=8, sampler=DistributedSampler(both, 1, 0, shuffle=False))


def trainer(*callbacks: L.Callback, **options: object) -> L.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, "max_epochs": 1, **options})


def by_hand(load: Tensor) -> tuple[float, float]:
    load = load.double()
    return float(load.max() / load.mean()), float(load.std(correction=0) / load.mean())


def test_logged_loads_are_those_of_the_batches_since_the_last_log() -> None:
    net, monitor = Network(), ExpertLoadMonitor(every_n_steps=2)
    fitting = trainer(monitor)
    fitting.fit(net, data())
    last = [a + b for a, b in zip(*net.loads[-2:], strict=True)]
    worst, spread = zip(*map(by_hand, last), strict=True)
    assert fitting.callback_metrics["moe/load_max_over_mean"].item() == pytest.approx(max(worst))
    assert fitting.callback_metrics["moe/load_cv"].item() == pytest.approx(sum(spread) / 2)
    assert fitting.callback_metrics["moe/dead_experts"] == sum(int((load == 0).sum()) for load in last)
    assert fitting.callback_metrics["moe/dropped_fraction"] == 0
    assert monitor.history.steps == [2, 4, 6]
    total = sum(torch.cat(loads) for loads in net.loads)
    assert torch.equal(monitor.history.chosen.sum(0), total)
    assert Path("moe/expert_loads.png").stat().st_size > 0


def test_experts_without_a_token_are_dead_and_what_capacity_dropped_is_told() -> None:
    net = Network(routing={"capacity_factor": 1.0}, balance={"method": "none", "z_weight": 0.0})
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.router.zero_()
            layer.router[:2, 0] = 50.0  # every token chooses the first two, or none of them
    fitting = trainer(ExpertLoadMonitor(every_n_steps=6), max_epochs=1)
    fitting.fit(net, data())
    chosen = 6 * 8 * 5 * 2 * 2
    assert net.dropped > 0
    assert fitting.callback_metrics["moe/dropped_fraction"].item() == pytest.approx(net.dropped / chosen)
    total = sum(torch.cat(loads) for loads in net.loads)
    assert fitting.callback_metrics["moe/dead_experts"] == int((total == 0).sum())


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1e4, 0.0)])
def test_router_entropy_tells_no_preference_from_certainty(scale: float, expected: float) -> None:
    net = Network(balance={"method": "none", "z_weight": 0.0})
    for layer in (net.first, net.second):
        layer.router.requires_grad_(False).mul_(scale)
    fitting = trainer(ExpertLoadMonitor(every_n_steps=3))
    fitting.fit(net, data())
    assert fitting.callback_metrics["moe/router_entropy"].item() == pytest.approx(expected, abs=2e-3)


def test_monitor_changes_nothing_and_leaves_no_hook() -> None:
    plain, watched = (Network(routing={"jitter": 0.1}) for _ in range(2))
    for net, callbacks in ((plain, []), (watched, [ExpertLoadMonitor(every_n_steps=1)])):
        L.seed_everything(3, verbose=False)
        trainer(*callbacks).fit(net, data())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    assert not watched.first._forward_pre_hooks


def test_monitor_leaves_no_hook_after_an_exception() -> None:
    class Broken(Network):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("out of luck")

    net = Broken()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(ExpertLoadMonitor(every_n_steps=1)).fit(net, data())
    assert not net.first._forward_pre_hooks


def test_layer_that_does_not_run_is_not_counted() -> None:
    monitor = ExpertLoadMonitor(every_n_steps=3)
    net = Network(second=False, balance={"method": "none", "z_weight": 0.0})
    net.second(torch.randn(4, D))  # before the fit
    trainer(monitor).fit(net, data())
    layers = monitor.history.layers(monitor.history.chosen)
    assert layers["first"].sum() == 6 * 8 * 5 * 2
    assert layers["second"].sum() == 0


def test_layer_that_runs_in_validation_alone_is_not_counted() -> None:
    class Dropping(Network):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.second(self.first(batch[0]))

    monitor = ExpertLoadMonitor(every_n_steps=3)
    net = Dropping(second=False, balance={"method": "none", "z_weight": 0.0})
    trainer(monitor, val_check_interval=2).fit(net, data(), data(1))
    layers = monitor.history.layers(monitor.history.chosen)
    assert layers["first"].sum() == 6 * 8 * 5 * 2
    assert layers["second"].sum() == 0


@pytest.mark.parametrize("optimizers", [1, 2])
def test_loads_are_logged_at_the_steps_of_what_the_module_logs(tmp_path: Path, optimizers: int) -> None:
    class Logging(Network):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            self.manual_backward(loss)
            for optimizer in self.optimizers() if optimizers > 1 else [self.optimizers()]:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.first, self.second)][:optimizers]

    logger = CSVLogger(tmp_path)
    monitor = ExpertLoadMonitor(every_n_steps=2 * optimizers)
    trainer(monitor, logger=logger, log_every_n_steps=2).fit(Logging(), data(7))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses, loads = ({int(row["step"]) for row in rows if row[name]} for name in ("loss", "moe/load_cv"))
    assert losses == {1, 3, 5}
    assert loads == {1, 3, 5, 6}  # the last is the rest of a window
    assert monitor.history.steps == [optimizers * step for step in (2, 4, 6, 7)]


def test_accumulated_batches_are_counted_once_a_step() -> None:
    monitor = ExpertLoadMonitor(every_n_steps=1)
    trainer(monitor, accumulate_grad_batches=2).fit(Network(), data())
    assert monitor.history.steps == [1, 2, 3]
    assert monitor.history.chosen.sum(1).tolist() == [2 * 8 * 5 * 2 * 2] * 3


def test_resumed_history_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = ExpertLoadMonitor(every_n_steps=3)
    trainer(whole).fit(Network(), data())
    # stopped in the middle of a window, in the middle of an epoch
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer(ExpertLoadMonitor(every_n_steps=3), saver, enable_checkpointing=True).fit(Network(), data())
    resumed = ExpertLoadMonitor(every_n_steps=3)
    trainer(resumed).fit(Network(), data(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True)
    assert resumed.history.steps == whole.history.steps
    assert torch.equal(resumed.history.chosen, whole.history.chosen)


@pytest.mark.slow
# dynamo looks at gradients of what is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model_tells_its_loads_and_is_compiled_once(whole: bool) -> None:
    class Compiled(Network):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Sequential(self.first, self.second)
            for module in [self.both] if whole else [self.first, self.second]:
                module.compile(fullgraph=True)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            hidden = self.both(x)
            self.loads.append((self.first.last_load, self.second.last_load))
            return (self.head(hidden) - y).square().mean() + total_aux_loss(self)

    torch._dynamo.reset()
    net, monitor = Compiled(), ExpertLoadMonitor(every_n_steps=1)
    with torch._dynamo.config.patch(error_on_recompile=whole):  # the second layer's input wants a gradient
        trainer(monitor).fit(net, data())
    assert torch.equal(monitor.history.chosen.sum(0), sum(torch.cat(loads) for loads in net.loads))


def test_second_fit_with_one_monitor_begins_anew() -> None:
    monitor = ExpertLoadMonitor(every_n_steps=3)
    for _ in range(2):
        trainer(monitor).fit(Network(), data())
    assert monitor.history.steps == [3, 6]


def test_table_and_heat_map_are_written_at_the_end(tmp_path: Path) -> None:
    monitor = ExpertLoadMonitor(every_n_steps=4, dirpath=tmp_path / "loads")
    trainer(monitor).fit(Network(), data())
    assert (tmp_path / "loads" / "expert_loads.png").stat().st_size > 0
    with (tmp_path / "loads" / "expert_loads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (8 + 6)  # the last window ends with the run
    assert {row["step"] for row in rows} == {"4", "6"}
    assert sum(int(row["chosen"]) for row in rows) == int(monitor.history.chosen.sum())


def test_many_windows_become_fewer_and_no_token_is_lost() -> None:
    history = LoadHistory({"layer": 3})
    for step in range(1, 1002):
        history.add(step, torch.tensor([step, 1, 0]), torch.tensor([step, 0, 0]))
    assert len(history) <= 200
    assert history.steps[-1] == 1001
    assert history.steps == sorted(set(history.steps))
    assert history.chosen.sum(0).tolist() == [1001 * 1002 // 2, 1001, 0]
    assert history.computed.sum(0).tolist() == [1001 * 1002 // 2, 0, 0]
    # every window holds the steps it says
    ends = [0, *history.steps]
    widths = [end - begin for begin, end in pairwise(ends)]
    assert history.chosen[:, 1].tolist() == widths


def test_heat_map_shows_loads_over_their_mean_and_marks_the_idle() -> None:
    history = LoadHistory({"a": 4, "b": 2})
    history.add(10, torch.tensor([4, 2, 2, 0, 5, 5]), torch.tensor([4, 2, 2, 0, 5, 5]))
    figure = loads_figure(history)
    image = figure.axes[1].collections[0].get_array().reshape(6)
    assert image.mask.tolist() == [False, False, False, True, False, False]
    assert image.compressed().tolist() == [1, 0, 0, 0, 0]  # powers of two
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("layers", [2, 12])
def test_one_record_is_drawn_as_points_since_a_line_through_it_shows_nothing(layers: int) -> None:
    history = LoadHistory({f"layer {number}": 2 for number in range(layers)})
    history.add(10, torch.tensor([1, 3] * layers), torch.tensor([1, 3] * layers))
    drawn = [line for line in loads_figure(history).axes[0].lines if len(line.get_xdata()) == 1]
    assert drawn
    assert {line.get_marker() for line in drawn} == {"o"}


def test_empty_history_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="no step has been recorded"):
        loads_figure(LoadHistory({"a": 4}))


def test_balance_bias_moves_after_every_optimizer_step() -> None:
    net, expected = (Network(balance={"method": "bias", "bias_rate": 0.01}) for _ in range(2))
    trainer(BalanceBiasUpdater(), accumulate_grad_batches=2, max_epochs=2).fit(net, data())
    optimizer = expected.configure_optimizers()
    for _ in range(2):
        for number, batch in enumerate(data()):
            (expected.training_step(batch, 0) / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
                expected.first.update_balance_bias()
                expected.second.update_balance_bias()
    assert expected.first.balance_bias.abs().max() > 0.01
    for mine, theirs in ((net.first, expected.first), (net.second, expected.second)):
        torch.testing.assert_close(mine.balance_bias, theirs.balance_bias, rtol=0, atol=1e-7)


def test_balance_bias_moves_once_however_many_ask() -> None:
    once, thrice = (Network(balance={"method": "bias"}) for _ in range(2))
    trainer(BalanceBiasUpdater()).fit(once, data())
    trainer(*(BalanceBiasUpdater() for _ in range(3))).fit(thrice, data())
    assert once.first.balance_bias.abs().max() > 0
    assert torch.equal(once.first.balance_bias, thrice.first.balance_bias)


@pytest.mark.parametrize("callback", [ExpertLoadMonitor, BalanceBiasUpdater])
def test_module_without_experts_is_refused_before_training(callback: type[L.Callback]) -> None:
    class Plain(Network):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Identity()

    net = Plain()
    with pytest.raises(ValueError, match=f"{callback.__name__} wants a module with FineGrainedMoE layers"):
        trainer(callback()).fit(net, data())
    assert not net.loads


def test_module_without_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its layers have \['aux'\]"):
        trainer(BalanceBiasUpdater()).fit(Network(), data())


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_monitor_refuses_intervals_that_are_none(steps: object) -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number >= 1"):
        ExpertLoadMonitor(every_n_steps=steps)


def test_module_that_moves_biases_itself_is_not_moved_twice(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(i * i % 251 for i in range(3000)))
    biases = []
    for callbacks in ((), (BalanceBiasUpdater(), ExpertLoadMonitor(every_n_steps=2))):
        torch.manual_seed(0)
        moe = {"expansion_rate": 4, "granularity": 2, "balance": {"method": "bias", "bias_rate": 0.01}}
        module = MoEScalingModule({"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "moe": moe})
        text = ByteTextDataModule(str(tmp_path / "text.txt"), seq_len=16, batch_size=4)
        trainer(*callbacks, max_steps=6, limit_val_batches=0).fit(module, text)
        biases.append(module.model.mixtures[0].balance_bias)
    assert biases[0].abs().max() > 0.01
    assert torch.equal(*biases)


YAML = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 6
  limit_val_batches: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: lightning_eff.moe.ExpertLoadMonitor, init_args: {every_n_steps: 2, dirpath: loads}}
    - class_path: lightning_eff.moe.BalanceBiasUpdater
    - {class_path: lightning_eff.moe.RunRecorder, init_args: {path: runs.csv, run_name: mine, law: moe64}}
model:
  class_path: MoEScalingModule
  init_args:
    decoder: {d_model: 16, n_layers: 1, n_heads: 2, max_seq_len: 16, moe: {balance: {method: bias}}}
data:
  class_path: ByteTextDataModule
  init_args: {path: text.txt, seq_len: 16, batch_size: 4}
"""


@pytest.mark.filterwarnings("ignore:the law was fitted at expansion rate 64")
def test_callbacks_are_reached_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-eff"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the CLI puts its seed there
        monkeypatch.setenv(name, "0")
    Path("text.txt").write_bytes(bytes(i * i % 251 for i in range(3000)))
    Path("run.yaml").write_text(YAML)
    trained = cli.main(["fit", "--config", "run.yaml", "--trainer.val_check_interval=3"])
    assert Path("loads/expert_loads.png").is_file()
    assert "mine" in Path("runs.csv").read_text()
    logged = {name for name in trained.trainer.callback_metrics if name.startswith("moe/")}
    assert logged == {
        *("moe/load_max_over_mean", "moe/load_cv", "moe/dead_experts", "moe/router_entropy", "moe/dropped_fraction"),
        *("moe/predicted_loss", "moe/loss_gap"),
    }


TWO_PROCESSES = """
from pathlib import Path
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import MoEScalingModule, RunRecorder
from test_callbacks import BalanceBiasUpdater, ExpertLoadMonitor, Network, data, trainer

net, monitor = Network(balance={"method": "bias", "bias_rate": 0.01}), ExpertLoadMonitor(every_n_steps=2)
saver = ModelCheckpoint(".", every_n_train_steps=3, filename="third", save_top_k=-1)  # in the middle of a window
fitting = trainer(monitor, BalanceBiasUpdater(), saver, devices=2, strategy="ddp", enable_checkpointing=True)
fitting.fit(net, DataLoader(data(8).dataset, batch_size=8))
own = sum(torch.cat(loads) for loads in net.loads)
both = fitting.strategy.reduce(own.clone(), reduce_op="sum")
biases = fitting.strategy.all_gather(net.first.balance_bias)
third = fitting.strategy.reduce(torch.cat(net.loads[2]), reduce_op="sum")
if fitting.is_global_zero:
    print("steps", monitor.history.steps)
    print("sums agree", torch.equal(monitor.history.chosen.sum(0), both), not torch.equal(own, both))
    saved = torch.load("third.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    print("saved counts agree", torch.equal(saved["since"][0], third))
    print("biases agree", torch.equal(biases[0], biases[1]), bool(biases[0].abs().max() > 0))
    print("entropy", 0 < fitting.callback_metrics["moe/router_entropy"] < 1)
    Path("text.txt").write_bytes(bytes(i * i % 251 for i in range(3000)))
fitting.strategy.barrier()

module = MoEScalingModule({"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "moe": {}}, loss_window=2)
callbacks = RunRecorder("runs.csv", "both"), ExpertLoadMonitor(2, "loads")
recorded = trainer(*callbacks, devices=2, strategy="ddp", max_steps=4, max_epochs=-1)
recorded.fit(module, ByteTextDataModule("text.txt", seq_len=16, batch_size=4))
"""


def test_two_processes_count_each_others_tokens_and_keep_one_bias(tmp_path: Path) -> None:
    env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    printed = run_ddp(TWO_PROCESSES, tmp_path, env=env).stdout
    assert "steps [2, 4]" in printed
    assert "sums agree True True" in printed
    assert "saved counts agree True" in printed
    assert "biases agree True True" in printed
    assert "entropy tensor(True)" in printed
    with (tmp_path / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["n_tokens"]) == 4 * 2 * 4 * 16
    assert 0 < float(row["loss"]) < 6
    with (tmp_path / "loads" / "expert_loads.csv").open() as file:
        chosen = sum(int(line["chosen"]) for line in csv.DictReader(file))
    assert chosen == int(row["n_tokens"]) * 4  # of 32 experts, a token uses 4
