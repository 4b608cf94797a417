"""Training of a language model: loss, schedule, counts, logs, loss-free bias, what is refused."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_eff import BatchKeys
from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import (
    DecoderConfig,
    ExpertLoad,
    FineGrainedMoE,
    MoEScalingModule,
    collect_aux_losses,
    total_aux_loss,
)
from lightning_eff.moe.routing import bias_step

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

DECODER = {"vocab_size": 11, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
MOE = {"expansion_rate": 4, "granularity": 2}


def module(moe=MOE, lr: float = 1e-2, **options) -> MoEScalingModule:
    torch.manual_seed(0)
    decoder = {**DECODER, "moe": moe, **options.pop("decoder", {})}
    made = MoEScalingModule(decoder, lambda p: torch.optim.SGD(p, lr), **options)
    made.configure_model()
    return made


def batches(count: int, sequences: int = 4, length: int = 8):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(11, (sequences, length + 1), generator=generator) for _ in range(count)]
    return [(window[:, :-1].clone(), window[:, 1:].clone()) for window in tokens]


def loader(data) -> DataLoader:
    return DataLoader(data, batch_size=None)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(**{"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 1, **quiet, **options})


class Watch(L.Callback):
    """Keeps what a run shows after each batch."""

    def __init__(self) -> None:
        self.loss, self.rate, self.logged, self.loads, self.bias = [], [], [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rate.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss.append(outputs["loss"].item())
        self.logged.append(dict(trainer.callback_metrics))
        layers = module.model.mixtures
        self.loads.append([layer.last_load for layer in layers])
        self.bias.append([None if layer.balance_bias is None else layer.balance_bias.clone() for layer in layers])


def test_loss_is_cross_entropy_and_weighted_auxiliary_losses() -> None:
    model, ((tokens, targets),) = module(), batches(1)
    model._trainer = trainer()
    loss = model.training_step((tokens, targets), 0)
    model.zero_grad()
    loss.backward()
    by_module = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    logits = model.model(tokens)
    aux = collect_aux_losses(model.model)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.01 * aux["balance"] + 1e-3 * aux["z"]
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(by_module[name], parameter.grad)


def test_auxiliary_losses_alone_move_a_router() -> None:
    model, ((tokens, _),) = module(), batches(1)
    model._trainer = trainer()
    nothing = torch.full_like(tokens, -100)
    nothing[0, 0] = 1  # one target, so that the loss is a number
    model.training_step((tokens, nothing), 0)
    total_aux_loss(model).backward()
    assert all(layer.router.grad.abs().sum() > 0 for layer in model.model.mixtures)


def test_subclass_may_have_a_training_step_of_its_own() -> None:
    class Plain(MoEScalingModule):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    model = Plain({**DECODER, "moe": {**MOE, "balance": {"method": "bias"}}})
    trainer(log_every_n_steps=1).fit(model, loader(batches(1)))
    assert model.model.mixtures[0].balance_bias.abs().max() > 0


def test_batches_of_a_step_that_was_never_made_are_forgotten() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise RuntimeError("the lights went out")

    watch, model = Watch(), module(moe=None)
    with pytest.raises(RuntimeError, match="lights"):
        trainer(accumulate_grad_batches=2, callbacks=[Stop()]).fit(model, loader(batches(2)))
    trainer(callbacks=[watch]).fit(model, loader(batches(2)[1:]))
    assert model.smoothed_loss() == pytest.approx(watch.loss[0])


def test_loads_of_a_step_that_was_never_made_are_forgotten() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise RuntimeError("the lights went out")

    watch, model = Watch(), module({**MOE, "balance": {"method": "bias", "bias_rate": 0.1}})
    with pytest.raises(RuntimeError, match="lights"):
        trainer(accumulate_grad_batches=2, callbacks=[Stop()]).fit(model, loader(batches(2, sequences=50)))
    trainer(callbacks=[watch]).fit(model, loader(batches(1)))
    torch.testing.assert_close(watch.bias[0][0], bias_step(watch.loads[0][0], 0.1))


@pytest.mark.parametrize("fresh", [True, False])
def test_losses_are_averaged_over_processes_where_these_can_talk(monkeypatch, fresh: bool) -> None:
    model, saved, seen = module(), {}, []
    trainer().fit(model, loader(batches(2)))
    model.on_save_checkpoint(saved)
    other = module()
    if not fresh:
        other.on_load_checkpoint(saved)
    made = trainer()
    made.strategy.connect(other)
    other.trainer = made
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    # of two GPUs, whose processes cannot exchange what lies on the host
    monkeypatch.setattr(type(made.strategy), "root_device", torch.device("meta"))
    monkeypatch.setattr(made.strategy, "reduce", lambda value, reduce_op: seen.append(value.device.type) or value)
    other._mean_of_processes(other._losses.mean())
    other._mean_of_processes(other._losses.state())
    assert seen == ["meta", "meta"]


def test_module_can_be_copied_in_the_middle_of_a_run() -> None:
    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.copy = copy.deepcopy(module.model), copy.deepcopy(module._losses)

    keep, model = Copy(), module()
    trainer(callbacks=[keep]).fit(model, loader(batches(2)))
    tokens = batches(1)[0][0]
    torch.testing.assert_close(keep.copy[0](tokens), model(tokens))
    assert torch.equal(keep.copy[1].mean(), model._losses.mean())


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    watch, model = Watch(), module(lr=1.0, warmup_fraction=0.25, final_lr_fraction=0.1)
    trainer(max_steps=16, max_epochs=-1, callbacks=[watch], gradient_clip_val=1e-3).fit(model, loader(batches(4)))
    steps = torch.arange(12.0)
    cosine = 0.1 + 0.45 * (1 + torch.cos(torch.pi * steps / 12))
    assert watch.rate == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine.tolist()])


def test_learning_rate_follows_optimizer_steps_when_batches_are_accumulated() -> None:
    watch, model = Watch(), module(lr=1.0, warmup_fraction=0.5, final_lr_fraction=1.0)
    trainer(callbacks=[watch], accumulate_grad_batches=2, gradient_clip_val=1e-3).fit(model, loader(batches(8)))
    assert watch.rate == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_learning_rate_without_warm_up_begins_at_its_peak() -> None:
    watch, model = Watch(), module(lr=1.0, warmup_fraction=0.0)
    trainer(callbacks=[watch], gradient_clip_val=1e-3).fit(model, loader(batches(3)))
    assert watch.rate[0] == 1.0


def test_tokens_and_flops_are_counted_in_whole_numbers() -> None:
    model = module()
    trainer(accumulate_grad_batches=2, max_epochs=2).fit(model, loader(batches(3) + batches(1, sequences=2)))
    assert model.tokens_seen == 2 * (3 * 4 * 8 + 2 * 8)
    assert model.flops_seen == model.tokens_seen * model.model.flops_per_token
    assert isinstance(model.flops_seen, int)


def test_flops_of_a_batch_are_those_of_the_hardware() -> None:
    model = module(moe=None)
    trainer().fit(model, loader(batches(1)))
    matrices = 12 * 16**2 * 2 + 16 * 11
    assert model.flops_per_batch == 4 * 8 * (6 * matrices + 12 * 8 * 16 * 2)


def test_throughput_monitor_of_lightning_finds_them(tmp_path) -> None:
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=3)
    logger = CSVLogger(tmp_path)
    trainer(callbacks=[monitor], logger=logger, log_every_n_steps=2).fit(module(), loader(batches(6)))
    assert "train/device/flops_per_sec" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_logged_values_are_those_of_the_paper_trail() -> None:
    watch, model = Watch(), module(moe={**MOE, "balance": {"weight": 0.0, "z_weight": 0.0}}, loss_window=3)
    trainer(callbacks=[watch], log_every_n_steps=2).fit(model, loader(batches(5)))
    assert watch.logged[0] == {}
    assert set(watch.logged[1]) == {"train/loss", "train/loss_smoothed", "train/tokens", "train/flops"}
    assert watch.logged[1]["train/loss"].item() == pytest.approx(watch.loss[1])
    assert watch.logged[1]["train/loss_smoothed"].item() == pytest.approx(sum(watch.loss[:2]) / 2)
    assert watch.logged[3]["train/loss_smoothed"].item() == pytest.approx(sum(watch.loss[1:4]) / 3)
    assert watch.logged[3]["train/tokens"] == 4 * 4 * 8
    assert watch.logged[3]["train/flops"].item() == pytest.approx(4 * 4 * 8 * model.model.flops_per_token)
    assert model.smoothed_loss() == pytest.approx(sum(watch.loss[2:]) / 3)  # also what no interval logged


def test_auxiliary_losses_are_logged_before_their_weights() -> None:
    watch = Watch()
    trainer(callbacks=[watch], log_every_n_steps=1).fit(module(), loader(batches(1)))
    assert watch.logged[0]["train/aux_balance"].item() == pytest.approx(1, abs=0.3)  # 1 is balance
    assert watch.logged[0]["train/aux_z"].item() == pytest.approx(torch.log(torch.tensor(8.0)).item() ** 2, rel=0.1)
    loss = watch.loss[0] - 0.01 * watch.logged[0]["train/aux_balance"] - 1e-3 * watch.logged[0]["train/aux_z"]
    assert watch.logged[0]["train/loss"].item() == pytest.approx(loss.item())


def test_a_step_of_several_batches_is_one_loss_of_the_window() -> None:
    watch, model = Watch(), module(moe=None, loss_window=2)
    trainer(callbacks=[watch], accumulate_grad_batches=2).fit(model, loader(batches(6)))
    assert model.smoothed_loss() == pytest.approx(2 * sum(watch.loss[2:]) / 4)  # Lightning halves what is accumulated


def test_no_step_between_logging_waits_for_the_device() -> None:
    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.waits += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Enter(L.Callback):
        def __init__(self) -> None:
            self.waits = []

        def on_train_batch_start(self, *args):
            self.mode = Count()
            self.mode.__enter__()

        def on_train_batch_end(self, *args):
            self.mode.__exit__(None, None, None)
            self.waits.append(self.mode.waits)

    count = Enter()
    trainer(callbacks=[count], log_every_n_steps=100).fit(module(moe=None), loader(batches(4)))
    assert count.waits == [0, 0, 0, 0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_free_bias_moves_once_a_step_by_all_loads_since_the_last(accumulate: int) -> None:
    watch = Watch()
    model = module(moe={**MOE, "balance": {"method": "bias", "bias_rate": 0.003}})
    trainer(callbacks=[watch], accumulate_grad_batches=accumulate).fit(model, loader(batches(4)))
    for layer in range(2):
        bias = torch.zeros(8)
        for batch in range(4):
            if (batch + 1) % accumulate == 0:
                since = [watch.loads[i][layer] for i in range(batch + 1 - accumulate, batch + 1)]
                bias = bias + bias_step(torch.stack(since).sum(0), 0.003)
            torch.testing.assert_close(watch.bias[batch][layer], bias)
        assert bias.abs().max() > 0


def test_validation_loss_is_the_mean_over_tokens_that_count() -> None:
    model = module(decoder={"vocab_size": 256})
    data = batches(1, sequences=4) + batches(1, sequences=1) + batches(1, sequences=2)
    data[0][1][:, 4:] = -100
    data[2][1][:] = -100
    made = trainer()
    made.validate(model, loader(data), verbose=False)
    model.eval()
    with torch.no_grad():
        total = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in data)
    loss = total.item() / (4 * 4 + 8)
    assert made.callback_metrics["val/loss"].item() == pytest.approx(loss, rel=1e-5)
    assert made.callback_metrics["val/bits_per_byte"].item() == pytest.approx(loss / 0.6931472, rel=1e-5)


def test_several_sets_are_evaluated_and_predicted_each_by_itself() -> None:
    one, sets = module(), [loader(batches(2)), loader(batches(2, length=4))]
    by_itself = [trainer().validate(one, each, verbose=False)[0]["val/loss"] for each in sets]
    for stage, run in {"val": trainer().validate, "test": trainer().test}.items():
        together = run(one, sets, verbose=False)
        losses = [values[f"{stage}/loss/dataloader_idx_{i}"] for i, values in enumerate(together)]
        assert losses == by_itself
    assert by_itself[0] != by_itself[1]
    shapes = [[logits.shape[1] for logits in each] for each in trainer().predict(one, sets)]
    assert shapes == [[8, 8], [4, 4]]


def test_bits_a_byte_are_told_of_bytes_alone() -> None:
    made = trainer()
    made.test(module(), loader(batches(1)), verbose=False)
    assert set(made.callback_metrics) == {"test/loss"}


def test_padding_named_in_the_batch_reaches_the_experts() -> None:
    tokens, targets = batches(1)[0]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 6:] = False
    model = module(split_batch=BatchKeys(["tokens", "token_mask"], "next"))
    trainer().fit(model, loader([{"tokens": tokens, "token_mask": mask, "next": targets}]))
    assert model.model.mixtures[0].last_load.sum() == 4 * 6 * 2


def test_prediction_gives_logits_of_pairs_and_of_tokens() -> None:
    model, data = module().eval(), batches(2)
    for given in (data, [tokens for tokens, _ in data]):
        logits = trainer().predict(model, loader(given))
        torch.testing.assert_close(logits[1], model(data[1][0]).detach())


def test_network_is_made_once_and_when_asked_for() -> None:
    model = MoEScalingModule(DECODER)
    assert not list(model.parameters())
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 11)
    network = model.model
    model.configure_model()
    trainer().fit(model, loader(batches(1)))
    assert model.model is network
    assert model.decoder == DecoderConfig.of(DECODER)


def test_default_optimizer_is_the_papers() -> None:
    watch, model = Watch(), MoEScalingModule(DECODER, warmup_fraction=0)
    made = trainer(callbacks=[watch])
    made.fit(model, loader(batches(1)))
    (optimizer,) = made.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (watch.rate, optimizer.param_groups[0]["weight_decay"]) == ([2e-4], 0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.model.parameters()))


def test_half_precision_trains_with_losses_in_single() -> None:
    watch = Watch()
    trainer(callbacks=[watch], precision="bf16-mixed", log_every_n_steps=1).fit(module(), loader(batches(2)))
    assert watch.logged[-1]["train/loss"].dtype == torch.float32
    assert watch.logged[-1]["train/loss"].item() == pytest.approx(2.4, abs=0.1)  # ln 11


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what a compiler warns of is not ours
def test_compiled_network_trains_to_the_same_weights() -> None:
    plain, compiled = module(), module(compile=True)
    for model in (plain, compiled):
        trainer().fit(model, loader(batches(3)))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for name, weights in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], weights, atol=1e-5, rtol=1e-4)


def test_loss_that_is_no_number_is_told_when_anomalies_are_looked_for() -> None:
    broken = module()
    nn.init.constant_(broken.model.head.weight, float("nan"))
    with pytest.raises(ValueError, match="the loss of batch 0 at step 0 is nan"):
        trainer(detect_anomaly=True).fit(broken, loader(batches(1)))


def test_loss_that_is_no_number_takes_lightnings_path_otherwise() -> None:
    model = module(decoder={"moe": {**MOE, "balance": {"method": "bias"}}})
    nn.init.constant_(model.model.blocks[0].ffn.router, float("inf"))
    trainer(log_every_n_steps=1).fit(model, loader(batches(2)))
    load = ExpertLoad(n_layers=2, n_experts=8)
    load.update(model)
    assert load.compute()["max_over_mean"] >= 1  # measures of balance stand it, too
    assert model.smoothed_loss() != model.smoothed_loss()  # NaN
    assert model.tokens_seen == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_fraction": 1.0}, r"warmup_fraction must lie in \[0, 1\), got 1.0"),
        ({"final_lr_fraction": 1.5}, r"final_lr_fraction must lie in \[0, 1\], got 1.5"),
        ({"loss_window": 0}, "loss_window must be a whole number >= 1, got 0"),
        ({"decoder": {"d_modell": 8}}, "DecoderConfig has no d_modell"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEScalingModule(**options)


@pytest.mark.parametrize("made", [None, torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)])
def test_optimizer_that_makes_none_is_refused(made: object) -> None:
    with pytest.raises(ValueError, match=rf"optimizer must be a function.*got {type(made).__name__}"):
        MoEScalingModule(DECODER, made)


# its own learning rate replaces the schedule; networks of configure_model may be large
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch", "ignore:You're using the WeightAver")
def test_averages_of_weights_are_taken_of_a_network_that_is_there() -> None:
    def average() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=1)

    late = MoEScalingModule(DECODER)
    with pytest.raises(ValueError, match=r"would average nothing: .*configure_model\(\)"):
        trainer(callbacks=[average()]).fit(late, loader(batches(2)))
    assert late.tokens_seen == 0
    one, watch = module(), LastWeights()
    trainer(callbacks=[watch, average()], max_epochs=3).fit(one, loader(batches(2)))
    assert not torch.equal(one.model.head.weight, watch.weights)
    late = MoEScalingModule(DECODER)
    trainer(callbacks=[watch, EMAWeightAveraging(decay=0.5)]).fit(late, loader(batches(4)))
    assert not torch.equal(late.model.head.weight, watch.weights)


class LastWeights(L.Callback):
    """Keeps the weights of the last step."""

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.weights = module.model.head.weight.detach().clone()


def test_run_without_an_end_has_no_schedule() -> None:
    with pytest.raises(ValueError, match="give the Trainer max_steps or max_epochs"):
        trainer(max_epochs=-1).fit(module(), loader(batches(1)))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abcdefghij" * 100)  # bytes up to 106
    return lambda **options: ByteTextDataModule(str(tmp_path / "text.txt"), batch_size=4, **options)


def test_vocabulary_smaller_than_the_text_is_told_before_training(text) -> None:
    with pytest.raises(ValueError, match="the text has bytes up to 106, but the decoder's vocab_size is 106; use 256"):
        trainer().fit(module(decoder={"vocab_size": 106}), datamodule=text(seq_len=8))
    trainer(max_steps=1).fit(module(decoder={"vocab_size": 107}), datamodule=text(seq_len=8))


def test_windows_longer_than_the_network_takes_are_told_before_training(text) -> None:
    with pytest.raises(ValueError, match="seq_len = 9 are longer than the decoder's max_seq_len = 8"):
        trainer().fit(module(decoder={"vocab_size": 256}), datamodule=text(seq_len=9))


def test_expert_choice_trains_on_text(text) -> None:
    model = module(moe={**MOE, "router": "expert_choice"}, decoder={"vocab_size": 256})
    trainer(max_steps=4).fit(model, datamodule=text(seq_len=8))
    assert model.model.mixtures[0].last_load.tolist() == [8] * 8  # 4 sequences, 8 positions, E = 4: one each
    assert isinstance(model.model.mixtures[0], FineGrainedMoE)
