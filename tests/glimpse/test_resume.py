"""Training that stops goes on as if it had not, and checkpoints give modules back."""

import pytest
import torch
from glimpse_runs import SaveAfter, changed, make_backbone, make_data, make_module, make_trainer, state_of
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.batch import BatchKeys
from lightning_eff.glimpse import AdaGlimpseModule, ClassificationTask, ElasticViT, ViTSize

# pretraining, the agent's epoch, and turns of a batch: every phase on both sides of the interruption
COURSE = {"pretrain_epochs": 1, "rl_only_epochs": 1, "alternate_every": 1, "lr": 3e-3}


def everything(module, trainer):
    """All that training depends on, as tensors by name."""
    found = state_of(module)
    for i, optimizer in enumerate(trainer.optimizers):
        for j, state in enumerate(optimizer.state.values()):
            found |= {f"optimizer{i}.{j}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    held = {**module.sac.replay_buffer.state_dict(), "stream": module._stream.state_dict()["states"]["cpu"]}
    return found | {f"kept.{name}": torch.as_tensor(value) for name, value in held.items()}


def train(tmp_path, module, epochs, ckpt_path=None, callbacks=(), seed=5, **options):
    torch.manual_seed(seed)  # must not matter
    trainer = make_trainer(tmp_path, epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
    return everything(module, trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What four epochs without an interruption lead to."""
    return train(tmp_path_factory.mktemp("whole"), make_module(**COURSE), 4)


@pytest.mark.parametrize("batches", [1, 4, 5, 6])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, whole, batches):
    path = tmp_path / "stopped.ckpt"
    train(tmp_path, make_module(**COURSE), 4, callbacks=[SaveAfter(batches, path, stop=True)])
    resumed = train(tmp_path, make_module(seed=9, **COURSE), 4, path, seed=6)
    assert not changed(whole, resumed)


def test_resumed_training_is_the_same_with_latents_in_the_buffer_and_the_order_of_stable_baselines(tmp_path):
    def made(seed=0):
        backbone = ElasticViT(10, 32, ViTSize(16, 1, 2), patch_size=4, channels=1)
        return make_module(backbone, seed=seed, state_parts=("box", "latent"), update="sb3", **COURSE)

    torch.manual_seed(0)
    first = made()
    start = state_of(first)
    whole = train(tmp_path, first, 4)
    path = tmp_path / "stopped.ckpt"
    again = made()
    again.load_state_dict(start)
    train(tmp_path, again, 4, callbacks=[SaveAfter(4, path, stop=True)])
    assert not changed(whole, train(tmp_path, made(seed=9), 4, path))


def test_two_epochs_and_two_more_are_four_where_rates_do_not_depend_on_the_end(tmp_path):
    options = {**COURSE, "learning_rates": "constant"}
    whole = train(tmp_path, make_module(**options), 4)
    saved = ModelCheckpoint(tmp_path, filename="two")
    train(tmp_path, make_module(**options), 2, callbacks=[saved], enable_checkpointing=True)
    assert not changed(whole, train(tmp_path, make_module(seed=9, **options), 4, tmp_path / "two.ckpt"))


def stopped(tmp_path, **options):
    """A checkpoint after the agent's own epoch, and the module that wrote it."""
    module = make_module(pretrain_epochs=0, rl_only_epochs=4, **options)
    train(tmp_path, module, 2, callbacks=[SaveAfter(2, tmp_path / "stopped.ckpt", stop=True)])
    return tmp_path / "stopped.ckpt", module


def test_number_of_glimpses_may_not_change_with_transitions_of_the_other_one(tmp_path):
    path, _ = stopped(tmp_path)
    more = {"pretrain_epochs": 0, "rl_only_epochs": 4, "num_glimpses": 3}
    with pytest.raises(ValueError, match=r"num_glimpses = 2, this module takes 3.*resume_buffer=False"):
        train(tmp_path, make_module(**more), 2, path)
    module = make_module(**more, resume_buffer=False)
    train(tmp_path, module, 2, path)
    assert module.sac.replay_buffer.size() == 2 * 16 * 3


def test_transitions_stay_out_of_checkpoints_that_are_not_to_hold_them(tmp_path):
    with_them, _ = stopped(tmp_path)
    size = with_them.stat().st_size
    without, module = stopped(tmp_path, resume_buffer=False)
    assert without.stat().st_size < size - 64 * 4 * 16 * 4  # patches of 64 transitions
    fresh = make_module(pretrain_epochs=0, rl_only_epochs=4, resume_buffer=False, random_steps=0)
    train(tmp_path, fresh, 2, without)
    assert fresh.sac.replay_buffer.size() == 64
    assert fresh.counts.env_steps == module.counts.env_steps + 64


def test_weights_saved_alone_hold_no_transitions_and_are_read(tmp_path):
    module = make_module(pretrain_epochs=0)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert saved["lightning_eff.glimpse"]["buffer"] is None
    loaded = load(tmp_path / "weights.ckpt")
    assert not changed(state_of(module), state_of(loaded))


def load(path, **options):
    parts = {"backbone": make_backbone(), "task": ClassificationTask(10), "backbone_optimizer": torch.optim.SGD}
    return AdaGlimpseModule.load_from_checkpoint(path, weights_only=True, **(parts | options))


def test_module_built_in_python_is_loaded_with_its_backbone_and_task(tmp_path):
    path, module = stopped(tmp_path, num_glimpses=3, baselines=("random_area",))
    loaded = load(path)
    assert not changed(state_of(module), state_of(loaded))
    for name in ("glimpse", "agent", "plan", "reward", "baselines"):
        assert getattr(loaded, name) == getattr(module, name)
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(loaded.explore(images).actions, module.explore(images).actions)
    assert loaded.sac.replay_buffer.size() == 0


def test_module_that_was_loaded_can_be_saved_and_loaded_again(tmp_path):
    path, module = stopped(tmp_path, num_glimpses=3)
    trainer = make_trainer(tmp_path)
    trainer.test(load(path), make_data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    again = load(tmp_path / "again.ckpt")
    assert (again.glimpse, again.agent) == (module.glimpse, module.agent)
    assert not changed(state_of(module), state_of(again))


def test_options_can_be_changed_when_a_module_is_loaded(tmp_path):
    path, module = stopped(tmp_path)
    loaded = load(path, glimpse=make_module(num_glimpses=5, stop_threshold=0.9).glimpse)
    assert loaded.explore(torch.rand(4, 1, 32, 32)).actions.shape == (4, 5, 3)
    assert loaded.agent == module.agent


def test_loading_without_the_backbone_says_how(tmp_path):
    path, _ = stopped(tmp_path)
    with pytest.raises(TypeError, match=r"load_from_checkpoint\(path, backbone=\.\.\., task=\.\.\.\)"):
        AdaGlimpseModule.load_from_checkpoint(path)


def test_loading_tells_of_arguments_that_fell_back_to_their_defaults(tmp_path):
    path, _ = stopped(tmp_path, split_batch=lambda batch: tuple(batch))
    parts = {"backbone": make_backbone(), "task": ClassificationTask(10)}
    with pytest.warns(UserWarning, match=r"^backbone_optimizer, split_batch: not plain data"):
        AdaGlimpseModule.load_from_checkpoint(path, **parts)


def test_checkpoint_is_validated_tested_and_predicted_from(tmp_path):
    path, module = stopped(tmp_path)
    data = make_data()
    make_trainer(tmp_path).test(module, data, verbose=False)
    other = make_module(seed=9)
    make_trainer(tmp_path).test(other, data, ckpt_path=path, verbose=False, weights_only=True)
    assert other.results["test"] == module.results["test"]
    make_trainer(tmp_path).validate(other, data, ckpt_path=path, verbose=False, weights_only=True)
    told = make_trainer(tmp_path).predict(other, data, ckpt_path=path, weights_only=True)
    images = next(iter(data.test_dataloader()))[0]
    assert torch.equal(told[0].actions, module.explore(images).actions)


def test_weights_of_another_origin_are_loaded_without_a_word(tmp_path):
    path, module = stopped(tmp_path)
    saved = torch.load(path, weights_only=True)
    del saved["lightning_eff.glimpse"]
    torch.save(saved, tmp_path / "foreign.ckpt")
    assert not changed(state_of(module), state_of(load(tmp_path / "foreign.ckpt")))


def test_checkpoint_of_another_version_is_refused(tmp_path):
    path, _ = stopped(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["lightning_eff.glimpse"]["version"] = 99
    torch.save(saved, path)
    with pytest.raises(ValueError, match="version 1, got 99"):
        train(tmp_path, make_module(), 2, path)


def test_run_interrupted_in_the_middle_of_an_episode_loses_that_episode_alone(tmp_path):
    module = make_module(pretrain_epochs=0, rl_only_epochs=4, random_steps=0)
    learn = module.sac.train

    def interrupted(*given):
        learn(*given)
        if module.current_epoch == 1 and module.counts.glimpses % 2:
            raise KeyboardInterrupt  # between the glimpses of an episode

    module.sac.train = interrupted
    trainer = make_trainer(tmp_path, 3)
    with pytest.raises(SystemExit):
        trainer.fit(module, make_data())
    assert module.sac.replay_buffer.size() % 32 == 16
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    resumed = make_module(pretrain_epochs=0, rl_only_epochs=4, random_steps=0)
    train(tmp_path, resumed, 3, tmp_path / "middle.ckpt")
    batch = resumed.sac.replay_buffer.draw(200)
    steps = batch.next_observations.lengths - batch.observations.lengths
    assert steps.unique().tolist() == [4]


def test_batch_keys_in_a_checkpoint_are_told_as_not_held(tmp_path):
    module = make_module(split_batch=BatchKeys("x", "y"))
    assert module._not_held == ["backbone", "task", "backbone_optimizer", "split_batch"]
