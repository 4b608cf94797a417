"""AdaGlimpseModule in a Trainer: who learns, what is logged, what is refused."""

import copy
import io
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from glimpse_runs import AGENT, changed, make_backbone, make_data, make_module, make_trainer, state_of
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from stable_baselines3 import SAC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.batch import BatchKeys
from lightning_eff.glimpse import (
    CanvasBackbone,
    ClassificationTask,
    ElasticViT,
    GlimpseSAC,
    ReconstructionTask,
    RewardOptions,
    ViTSize,
)
from lightning_eff.glimpse.in_trainer import check_trainer


class Logged(Callback):
    """What was logged after each batch, and the state of the module before the first and after each epoch."""

    def __init__(self):
        self.batches, self.states, self.rates = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.states.append(state_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(state_of(pl_module))


def fit(module, tmp_path, max_epochs=1, data=None, **options):
    logged = Logged()
    callbacks = [logged, *options.pop("callbacks", ())]
    trainer = make_trainer(tmp_path, max_epochs, callbacks=callbacks, log_every_n_steps=1, **options)
    trainer.fit(module, data or make_data())
    return trainer, logged


def scenes(count=16, size=32, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator), torch.arange(count) % 10


# Who learns


def test_each_phase_changes_the_weights_of_those_who_learn_and_no_bit_of_the_others(tmp_path):
    plan = {"pretrain_epochs": 1, "rl_only_epochs": 1, "alternate_unit": "epoch", "regime": "alternating"}
    # pretraining, the agent's own epoch, the agent's turn, the backbone's turn
    _, logged = fit(make_module(**plan, random_steps=0), tmp_path, 4)
    pretrained, alone, turn, back = (
        changed(before, after) for before, after in zip(logged.states, logged.states[1:], strict=False)
    )
    for names in (pretrained, back):
        assert "backbone.features.0.1.running_mean" in names
        assert all(name.startswith("backbone.") for name in names)
    for names in (alone, turn):
        assert "policy.log_ent_coef" in names
        assert any(name.startswith("policy.critic_target.") for name in names)
        assert all(name.startswith("policy.") for name in names)
    assert [batch["glimpse/phase"] for batch in logged.batches] == [0, 0, 1, 1, 1, 1, 2, 2]


def test_agents_turn_leaves_the_state_of_the_backbones_optimizer_alone(tmp_path):
    module = make_module(pretrain_epochs=1, rl_only_epochs=1)
    trainer, _ = fit(module, tmp_path, 2)
    backbones = trainer.optimizers[-1].state.values()
    assert {int(state["step"]) for state in backbones} == {2}
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {3}


def test_both_learn_in_the_constant_regime(tmp_path):
    module = make_module(pretrain_epochs=0, rl_only_epochs=0, regime="constant")
    _, logged = fit(module, tmp_path)
    names = {name.split(".")[0] for name in changed(*logged.states)}
    assert names == {"backbone", "policy"}
    assert logged.batches[-1]["glimpse/phase"] == 3


def test_backbone_alone_learns_from_the_policys_glimpses_and_nothing_is_stored(tmp_path):
    module = make_module(pretrain_epochs=0, rl_only_epochs=0, regime="backbone_only", random_steps=0)
    _, logged = fit(module, tmp_path)
    assert {name.split(".")[0] for name in changed(*logged.states)} == {"backbone"}
    assert module.sac.replay_buffer.size() == 0
    assert not math.isnan(logged.batches[-1]["glimpse/backbone_loss"])


@pytest.mark.parametrize("loss_at", ["all", "random"])
def test_loss_can_be_taken_after_other_glimpses_than_the_last(tmp_path, loss_at):
    module = make_module(pretrain_epochs=0, rl_only_epochs=0, regime="backbone_only", loss_at=loss_at)
    seen = []
    encode = module.backbone.encode
    module.backbone.encode = lambda one, **asked: (seen.append(one.views.shape[1]), encode(one, **asked))[1]
    fit(module, tmp_path, limit_train_batches=8, limit_val_batches=0, data=make_data(64, 8))
    if loss_at == "all":
        assert seen == [1, 2] * 8
    else:
        assert set(seen) == {1, 2}
        assert len(seen) == 8


def test_pretraining_sees_every_number_of_glimpses_that_teaches_something(tmp_path):
    for backbone, least in ((make_backbone(), 1), (make_vit(), 0)):
        module = make_module(backbone, pretrain_epochs=1, num_glimpses=3)
        seen = []
        encode = backbone.encode
        backbone.encode = lambda one, seen=seen, encode=encode, **asked: (
            seen.append(one.views.shape[1]),
            encode(one, **asked),
        )[1]
        fit(module, tmp_path, limit_val_batches=0, data=make_data(64, 4))
        assert set(seen) == set(range(least, 4))


def test_pretraining_can_prefer_views_that_show_something(tmp_path):
    # one bright pixel in a dark scene: a single view seldom shows it
    images = torch.zeros(512, 1, 32, 32)
    images[:, :, 20, 9] = 1
    shown = {}
    for tries in (1, 8):
        module = make_module(pretrain_tries=tries, fixed_scale=0.0)
        torch.manual_seed(0)
        actions = module._drawn_views(images)
        assert actions.shape == (512, 3)
        world = module.world
        world.reset(images, torch.zeros(512, dtype=torch.int64), scored=False)
        shown[tries] = float((world.step(actions).glimpse.patches.amax((1, 2, 3, 4)) > 0).float().mean())
    # 8 of 25 places in each direction show the pixel
    assert shown[1] == pytest.approx((8 / 25) ** 2, abs=0.04)
    assert shown[8] == pytest.approx(1 - (1 - (8 / 25) ** 2) ** 8, abs=0.06)


def make_vit():
    return ElasticViT(10, 32, ViTSize(16, 1, 2), patch_size=4, channels=1)


def test_agent_can_see_latents_and_importance_of_a_transformer(tmp_path):
    parts = ("patch", "box", "importance", "latent")
    module = make_module(make_vit(), state_parts=parts, rl_only_epochs=1, pretrain_epochs=0, num_glimpses=3)
    _, logged = fit(module, tmp_path)
    assert {name.split(".")[0] for name in changed(*logged.states)} == {"policy"}
    assert math.isfinite(logged.batches[-1]["glimpse/critic_loss"])


def test_training_never_stops_early_and_testing_does(tmp_path):
    module = make_module(stop_threshold=0.0, pretrain_epochs=0, rl_only_epochs=1)
    trainer, logged = fit(module, tmp_path)
    assert "glimpse/mean_scale_t2" in logged.batches[0]
    trainer.test(module, make_data(), verbose=False)
    assert trainer.callback_metrics["test/avg_glimpses"] == 1
    assert trainer.callback_metrics["test/pixel_percent"] == pytest.approx(100 * 8**2 / 32**2)
    assert trainer.callback_metrics["test/accuracy@1"] == trainer.callback_metrics["test/accuracy@2"]


def test_transitions_are_forgotten_once_the_backbone_has_learnt_if_so_wished(tmp_path):
    fills = {}
    for forget in (True, False):
        module = make_module(pretrain_epochs=0, rl_only_epochs=0, alternate_every=1, clear_on_switch=forget)
        _, logged = fit(module, tmp_path, data=make_data(48), limit_val_batches=0)
        fills[forget] = [batch["glimpse/buffer_fill"] * 128 for batch in logged.batches]
    assert fills == {True: [32, 32, 32], False: [32, 64, 96]}


# Learning rates, steps, checkpoints of the trainer


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")  # after the batch is right
@pytest.mark.filterwarnings("ignore:ModelCheckpoint.every_n_train_steps")
def test_global_step_counts_the_agents_steps_and_checkpoints_by_steps_are_written(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    module = make_module(pretrain_epochs=0, rl_only_epochs=1, random_steps=0)
    trainer, _ = fit(module, tmp_path, enable_checkpointing=True, callbacks=[saved])
    # from the second glimpse on there are 32 transitions: 3 updates of actor, critics and temperature
    assert trainer.global_step == 9
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=9.ckpt"]


def test_checkpoints_by_steps_that_batches_may_never_end_at_are_told(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    with pytest.warns(UserWarning, match=r"multiple of 5 .* seldom or never; use every_n_epochs"):
        fit(make_module(pretrain_epochs=0), tmp_path, enable_checkpointing=True, callbacks=[every])
    assert not list(tmp_path.glob("*.ckpt"))


def test_learning_rates_follow_the_plan_each_from_its_own_start(tmp_path):
    plan = {"pretrain_epochs": 1, "rl_only_epochs": 1, "warmup_fraction": 0.0}
    _, logged = fit(make_module(**plan), tmp_path, 2)
    agent, backbone = [rates[0] for rates in logged.rates], [rates[-1] for rates in logged.rates]
    half_cosine = [(1 + math.cos(math.pi * share)) / 2 for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)]
    assert backbone == pytest.approx([1e-2 * factor for factor in half_cosine])
    half_way = (1 + math.cos(math.pi / 4)) / 2
    assert agent == pytest.approx([1e-3, 1e-3, 1e-3 * half_way, 1e-3 * (1 - half_way)])
    _, logged = fit(make_module(**plan, learning_rates="cosine_backbone"), tmp_path, 2)
    assert [rates[-1] for rates in logged.rates] == pytest.approx(backbone)
    assert {rates[0] for rates in logged.rates} == {1e-3}
    _, logged = fit(make_module(**plan, learning_rates="constant"), tmp_path, 2)
    assert {tuple(rates) for rates in logged.rates} == {(1e-3, 1e-3, 1e-3, 1e-2)}


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_time": "00:00:00:00"}, {"max_steps": 4}])
def test_trainer_may_end_when_it_likes(tmp_path, options):
    trainer, _ = fit(make_module(pretrain_epochs=0, random_steps=0), tmp_path, **options)
    assert trainer.state.finished


def test_agent_is_given_back_as_it_was_also_after_an_error(tmp_path):
    module = make_module(pretrain_epochs=0)
    plain = list(module.sac.optimizers)
    for error in (False, True):
        if error:
            module.task.score = None
        try:
            fit(module, tmp_path)
        except TypeError:
            assert error
        assert module.sac.optimizers == plain
        assert module.sac.log is None
        assert module.sac.backward.__name__ == "_backward"


def test_global_random_numbers_of_training_are_left_alone(tmp_path):
    class Draws(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = torch.get_rng_state()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(torch.get_rng_state(), self.before)

    fit(make_module(), tmp_path, 3, callbacks=[Draws()])


def test_same_seed_gives_the_same_weights_and_another_one_others(tmp_path):
    states = []
    for seed in (1, 1, 2):
        module = make_module(seed=seed)
        fit(module, tmp_path, 3)
        states.append(state_of(module))
    assert not changed(*states[:2])
    assert changed(states[0], states[2])


# What is logged and told


def test_training_logs_what_the_documentation_says(tmp_path):
    _, logged = fit(make_module(pretrain_epochs=0, rl_only_epochs=0, regime="constant"), tmp_path)
    told = "return score_first score_last mean_scale_t1 mean_scale_t2 actor_loss critic_loss alpha_loss alpha entropy "
    told += "q_mean backbone_loss buffer_fill env_steps phase"
    assert {name for name in logged.batches[-1] if name.startswith("glimpse/")} == {
        f"glimpse/{name}" for name in told.split()
    }
    last = logged.batches[-1]
    assert last["glimpse/env_steps"] == 2 * 2 * 16
    assert last["glimpse/buffer_fill"] == 64 / 128
    assert last["glimpse/alpha"] == pytest.approx(0.1, rel=0.1)


def test_return_is_the_rise_of_the_score(tmp_path):
    module = make_module(pretrain_epochs=0, rl_only_epochs=1, reward=RewardOptions(scale=2.0))
    _, logged = fit(module, tmp_path)
    # before the first glimpse all ten classes are as likely
    for batch in logged.batches:
        assert batch["glimpse/return"] == pytest.approx(2 * (batch["glimpse/score_last"] + math.log(10)), abs=1e-4)


def test_validation_logs_metrics_after_every_glimpse_of_agent_and_baselines(tmp_path):
    module = make_module(baselines=("random", "repeat_full_view"), pretrain_epochs=0)
    trainer, _ = fit(module, tmp_path)
    per_policy = ["accuracy@1", "accuracy@2", "accuracy", "avg_glimpses", "pixel_percent"]
    expected = {f"val/{policy}{name}" for policy in ("", "random/", "repeat_full_view/") for name in per_policy}
    assert {name for name in trainer.callback_metrics if name.startswith("val/")} == expected
    assert trainer.callback_metrics["val/pixel_percent"] == pytest.approx(12.5)
    results = module.results["val"]
    assert set(results) == {"policy", "random", "repeat_full_view"}
    assert results["repeat_full_view"]["accuracy@1"] == results["repeat_full_view"]["accuracy@2"]
    assert results["random"]["accuracy"] == float(trainer.callback_metrics["val/random/accuracy"])


def test_metrics_are_those_of_the_predictions_of_an_exploration(tmp_path):
    module = make_module()
    data = make_data()
    trainer = make_trainer(tmp_path)
    trainer.test(module, data, verbose=False)
    images, target = next(iter(data.test_dataloader()))
    told = module.explore(images, predictions="all")
    accuracy = (told.predictions.argmax(2) == target.unsqueeze(1)).float().mean(0)
    assert [module.results["test"]["policy"][f"accuracy@{t}"] for t in (1, 2)] == pytest.approx(accuracy.tolist())


def test_baseline_that_knows_the_truth_is_told_it_also_by_a_teacher(tmp_path):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    module = make_module(
        task=ClassificationTask(10, score="kl"), teacher=teacher, baselines=("greedy_lookahead",), num_glimpses=1
    )
    make_trainer(tmp_path).test(module, make_data(), verbose=False)
    assert set(module.results["test"]) == {"policy", "greedy_lookahead"}
    assert module.explore(scenes(4)[0], "greedy_lookahead").taken.tolist() == [1] * 4


def test_predictions_are_made_once_an_image_where_they_are_dear(tmp_path):
    module = make_module(every_glimpse=False)
    asked = []
    predict = module.backbone.predict
    module.backbone.predict = lambda encoded, seen: (asked.append(seen.views.shape[1]), predict(encoded, seen))[1]
    make_trainer(tmp_path).test(module, make_data(), verbose=False)
    assert asked == [2, 2]  # agent and baseline
    assert set(module.results["test"]["policy"]) == {"accuracy@2", "accuracy", "avg_glimpses", "pixel_percent"}


def test_baselines_draw_the_same_glimpses_in_every_pass(tmp_path):
    module = make_module()
    found = []
    for _ in range(2):
        make_trainer(tmp_path).test(module, make_data(), verbose=False)
        found.append(module.results["test"])
    assert found[0] == found[1]


def test_agent_that_is_not_asked_in_an_epoch_is_told_with_the_steps_to_go(tmp_path):
    module = make_module(pretrain_epochs=1, rl_only_epochs=3, random_steps=100)
    with pytest.warns(UserWarning, match="has not been asked.* 96 of random_steps = 100") as told:
        fit(module, tmp_path, 3)
    assert len([one for one in told if "has not been asked" in str(one.message)]) == 1


def test_agent_whose_glimpses_change_nothing_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_eff.glimpse.episodic_module._PATIENCE", 2)
    # a scene without anything on it is reconstructed before anybody looks
    data = DataLoader(TensorDataset(torch.zeros(64, 1, 32, 32), torch.zeros(64)), batch_size=16)
    module = blind(CanvasBackbone(1), reward=RewardOptions(scale_penalty=0.1))
    with pytest.warns(UserWarning, match="no glimpse changed a score in 2 batches") as told:
        make_trainer(tmp_path).fit(module, data, data)
    assert len([one for one in told if "changed a score" in str(one.message)]) == 1


def blind(backbone, **options):
    return make_module(backbone, ReconstructionTask(), regime="frozen", pretrain_epochs=0, **options)


def test_zoom_without_effect_is_told(tmp_path, caplog):
    module = make_module(patch_size=16, pretrain_epochs=0)
    with caplog.at_level("INFO"):
        fit(module, tmp_path, limit_train_batches=1)
    assert "zoom has no effect" in caplog.text


# What is refused


def test_backbone_without_weights_cannot_be_trained():
    with pytest.raises(ValueError, match=r"CanvasBackbone has no weights.*regime='frozen'"):
        make_module(CanvasBackbone(1), ReconstructionTask(), pretrain_epochs=0)


def test_stop_threshold_needs_confidence_before_any_work():
    with pytest.raises(ValueError, match="ReconstructionTask cannot"):
        blind(CanvasBackbone(1), stop_threshold=0.5)


def test_agent_cannot_see_what_the_backbone_does_not_have():
    with pytest.raises(ValueError, match="latent"):
        make_module(state_parts=("box", "latent"))


def test_unknown_baseline_is_refused_before_any_work():
    with pytest.raises(ValueError, match="got 'nowhere'"):
        make_module(baselines=("nowhere",))


def trainer_with(strategy, precision=None):
    return SimpleNamespace(strategy=strategy, precision_plugin=precision or Precision())


def test_strategies_that_reduce_all_gradients_at_once_or_split_parameters_are_refused():
    check_trainer(trainer_with(SingleDeviceStrategy("cpu")), AGENT)
    check_trainer(trainer_with(DDPStrategy(find_unused_parameters=True)), AGENT)
    for strategy in (DDPStrategy(), FSDPStrategy()):
        with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
            check_trainer(trainer_with(strategy), AGENT)


def test_half_precision_is_refused_where_it_would_go_wrong(tmp_path):
    scaled = MixedPrecision("16-mixed", "cpu")
    alone = SingleDeviceStrategy("cpu")
    check_trainer(trainer_with(alone, scaled), AGENT)
    check_trainer(trainer_with(alone, MixedPrecision("bf16-mixed", "cpu")), replace(AGENT, update="sb3"))
    for agent, message in (
        (replace(AGENT, update="sb3"), "use update='fused'"),
        (replace(AGENT, gradient_clip=1.0), "gradient_clip=None"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trainer(trainer_with(alone, scaled), agent)
    with pytest.raises(ValueError, match="got precision='bf16-true': use 'bf16-mixed'"):
        fit(make_module(), tmp_path, precision="bf16-true")


def test_buffer_that_never_holds_a_batch_of_transitions_is_refused(tmp_path):
    module = make_module(buffer_size=60, batch_size=48, pretrain_epochs=0)
    with pytest.raises(ValueError, match=r"holds 32 of them.*buffer_size >= 64"):
        fit(module, tmp_path)


def test_buffer_that_is_emptied_before_it_holds_a_batch_of_transitions_is_refused_before_pretraining(tmp_path):
    options = {"clear_on_switch": True, "batch_size": 48}
    for plan, turn in (
        ({"regime": "constant"}, "1 x 32"),
        ({"alternate_unit": "batch"}, "1 x 32"),
        ({"alternate_unit": "epoch"}, "1 x 32"),
    ):
        with pytest.raises(ValueError, match=rf"so that {turn} are together.*batch_size = 48.*clear_on_switch=False"):
            fit(make_module(**options, **plan), tmp_path, 3, limit_train_batches=1)
    fit(make_module(**options, alternate_unit="batch", alternate_every=2), tmp_path)
    fit(make_module(**options, regime="frozen", rl_only_epochs=0), tmp_path)
    fit(make_module(batch_size=128, buffer_size=128), tmp_path, data=make_data(60, 60))  # pretraining alone


def test_scenes_of_another_size_are_refused(tmp_path):
    images, target = scenes(size=24)
    data = DataLoader(TensorDataset(images, target), batch_size=16)
    with pytest.raises(ValueError, match=r"32.*\[16, 1, 24, 24\]"):
        make_trainer(tmp_path, num_sanity_val_steps=0).fit(make_module(), data, data)


def test_score_that_is_no_number_stops_training_with_images_glimpse_and_phase(tmp_path):
    module = make_module(pretrain_epochs=0)
    score = module.task.score
    nan = torch.where(torch.arange(16) == 5, torch.nan, 0.0)
    module.task.score = lambda *given: score(*given) + nan
    with pytest.raises(FloatingPointError, match=r"images \[5\] .* glimpse 0.*phase agent, epoch 0, batch 0"):
        fit(module, tmp_path)


def test_loss_that_is_no_number_stops_training_before_the_weights_take_it(tmp_path):
    module = make_module(pretrain_epochs=1)
    before = state_of(module)
    module.task.loss = lambda prediction, *given: prediction.sum() * math.inf
    with pytest.raises(FloatingPointError, match=r"loss of the backbone.*phase pretraining, epoch 0, batch 0"):
        fit(module, tmp_path)
    weights = dict(module.named_parameters())
    assert not [name for name in changed(before, state_of(module)) if name in weights]


def test_agent_whose_losses_are_no_numbers_stops_training_with_the_phase(tmp_path):
    module = make_module(pretrain_epochs=0, random_steps=0)
    next(module.policy.critic_target.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"agent's losses.*critic_loss nan.*phase agent, epoch 0, batch 0"):
        fit(module, tmp_path, num_sanity_val_steps=0)


# Other data, precision, use without a trainer


def test_last_batch_may_be_smaller(tmp_path):
    _, logged = fit(make_module(pretrain_epochs=0, random_steps=0), tmp_path, data=make_data(41))
    assert logged.batches[-1]["glimpse/env_steps"] == 2 * (16 + 16 + 9)


def test_last_batch_may_be_smaller_where_the_buffer_holds_one_batch_of_transitions(tmp_path):
    module = make_module(pretrain_epochs=0, random_steps=0, buffer_size=32, batch_size=32)
    _, logged = fit(module, tmp_path, 2, data=make_data(41))
    assert [batch["glimpse/buffer_fill"] for batch in logged.batches] == [1, 1, 18 / 32] * 2


def test_scenes_may_be_bytes_colourful_and_not_square_and_come_without_target(tmp_path):
    images = torch.randint(0, 256, (8, 4, 24, 40), dtype=torch.uint8)
    options = {"image_size": (24, 40), "num_glimpses": 1, "grid": 1, "batch_size": 8, "random_steps": 0}
    module = blind(CanvasBackbone(4), **options)
    data = DataLoader(images, batch_size=8)
    make_trainer(tmp_path).fit(module, data, data)
    assert module.explore(images).prediction.shape == (8, 4, 24, 40)


def test_batches_of_another_form_are_split_as_told(tmp_path):
    images, target = scenes()
    samples = [{"x": image, "y": label} for image, label in zip(images, target, strict=True)]
    module = make_module(split_batch=BatchKeys("x", "y"))
    data = DataLoader(samples, batch_size=8)
    make_trainer(tmp_path).fit(module, data, data)


def test_teacher_takes_the_labels_place_and_is_neither_trained_nor_saved(tmp_path):
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1024), nn.Linear(1024, 10))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher[0].eval()
    module = make_module(task=ClassificationTask(10, score="kl"), teacher=teacher, rl_only_epochs=0, regime="constant")
    _, logged = fit(module, tmp_path, 2)
    assert not changed(before, teacher.state_dict())
    assert [part.training for part in teacher] == [False, True, True]
    assert not [name for name in module.state_dict() if name.startswith("teacher")]
    assert logged.batches[-1]["glimpse/score_last"] < 0


def test_backbone_may_run_in_half_precision_while_the_agent_stays_in_single(tmp_path):
    seen = []
    backbone = make_vit()
    predict = backbone.predict
    backbone.predict = lambda *given: (seen.append(predict(*given)), seen[-1])[1]
    module = make_module(
        backbone, state_parts=("box", "latent"), rl_only_epochs=0, pretrain_epochs=0, regime="constant"
    )
    fit(module, tmp_path, precision="bf16-mixed", limit_val_batches=0)
    assert {one.dtype for one in seen} == {torch.bfloat16}
    assert {one.dtype for one in module.parameters()} == {torch.float32}
    assert module.sac.replay_buffer.draw(4).observations.latents.dtype == torch.float32


def test_exploring_needs_no_trainer_and_takes_any_policy():
    module = make_module()
    images, target = scenes(5)
    learnt = module.explore(images, target=target, scored=True, predictions="all")
    assert learnt.actions.shape == (5, 2, 3)
    assert torch.equal(module(images), learnt.prediction)
    assert torch.equal(module.explore(images, "repeat_full_view").views[:, 1], torch.tensor([[0.0, 0, 32]] * 5))
    centre = module.explore(images, lambda observation: torch.full((len(observation), 3), 0.5), max_glimpses=1)
    assert centre.actions.unique().tolist() == [0.5]
    noisy = module.explore(images, deterministic=False)
    assert not torch.equal(noisy.actions, module.explore(images, deterministic=False).actions)


def test_exploring_leaves_modes_and_random_numbers_alone():
    module = make_module().train()
    module.backbone.features[0].eval()
    before, state = torch.get_rng_state(), state_of(module)
    modes = {name: part.training for name, part in module.named_modules()}
    module.explore(scenes(4)[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not changed(state, state_of(module))
    assert {name: part.training for name, part in module.named_modules()} == modes


def test_prediction_gives_a_trajectory_a_batch(tmp_path):
    module = make_module()
    told = make_trainer(tmp_path).predict(module, make_data())
    assert [len(one) for one in told] == [16]
    assert torch.equal(told[0].prediction, module.explore(next(iter(module_scenes()))[0]).prediction)


def module_scenes():
    data = make_data()
    data.setup()
    return data.test_dataloader()


def test_module_can_be_copied_and_pickled_and_copies_learn_on_their_own(tmp_path):
    module = make_module(pretrain_epochs=0)
    fit(module, tmp_path)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.sac.policy is copied.policy
        assert copied.sac.log_ent_coef is copied.policy.log_ent_coef
        assert not changed(state_of(module), state_of(copied))
        before = state_of(module)
        fit(copied, tmp_path)
        assert changed(before, state_of(copied))
        assert not changed(before, state_of(module))


def test_agent_is_saved_and_loaded_by_stable_baselines_own_files(tmp_path):
    module = make_module(pretrain_epochs=0)
    fit(module, tmp_path)
    file = io.BytesIO()
    module.sac.save(file)
    file.seek(0)
    assert isinstance(module.sac, SAC)
    loaded = GlimpseSAC.load(file, device="cpu")
    # what a plan has made of the learning rate by its end is not what the agent goes on with elsewhere
    assert {optimizer.param_groups[0]["lr"] for optimizer in loaded.optimizers} == {module.agent.lr}
    world = module.world
    observation = world.reset(*scenes(3))
    assert torch.equal(loaded.act(observation, True), module.act(observation))


def test_module_goes_on_training_by_another_trainer(tmp_path):
    module = make_module(pretrain_epochs=0, random_steps=0)
    first, _ = fit(module, tmp_path)
    second, logged = fit(module, tmp_path)
    assert logged.batches[-1]["glimpse/env_steps"] == 4 * 32
    # the buffer is full enough from the first glimpse on
    assert second.global_step == 12 > first.global_step
