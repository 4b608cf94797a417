"""AdaGlimpseModule on a GPU: it trains, goes on where it stopped, and answers as on the CPU."""

import copy

import pytest
import torch
from glimpse_runs import SaveAfter, changed, make_data, make_module, make_trainer, state_of
from lightning.pytorch.callbacks import Callback

from lightning_eff.glimpse import ElasticViT, ViTSize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
COURSE = {"pretrain_epochs": 1, "rl_only_epochs": 1, "alternate_every": 1}


class Places(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.buffer = pl_module.sac.replay_buffer.device.type


def made(seed=0, **options):
    torch.manual_seed(seed)
    backbone = ElasticViT(10, 32, ViTSize(16, 1, 2), patch_size=4, channels=1)
    parts = ("patch", "box", "importance", "latent")
    return make_module(backbone, seed=seed, state_parts=parts, **COURSE, **options)


def fit(module, tmp_path, ckpt_path=None, **options):
    trainer = make_trainer(tmp_path, 4, accelerator="gpu", **options)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_phase_trains_on_a_gpu(tmp_path, precision):
    module = made()
    before = state_of(module)
    places = Places()
    trainer = fit(module, tmp_path, precision=precision, callbacks=[places])
    assert {name.split(".")[0] for name in changed(before, {k: v.cpu() for k, v in state_of(module).items()})} == {
        "backbone",
        "policy",
    }
    assert (places.buffer, module.sac.replay_buffer.device.type) == ("cuda", "cpu")
    assert 0 <= float(trainer.callback_metrics["val/accuracy"]) <= 1


def test_resumed_training_goes_on_with_the_same_random_numbers(tmp_path):
    path = tmp_path / "stopped.ckpt"
    whole = made()
    fit(whole, tmp_path, callbacks=[SaveAfter(5, path)])
    resumed = made(seed=9)
    fit(resumed, tmp_path, path)
    for name, value in state_of(whole).items():
        torch.testing.assert_close(state_of(resumed)[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_trained_module_answers_on_the_cpu_as_on_the_gpu(tmp_path):
    module = made()
    fit(module, tmp_path)
    images = torch.rand(8, 1, 32, 32)
    on_cpu = copy.deepcopy(module).cpu().explore(images, predictions="all")
    on_gpu = module.cuda().explore(images, predictions="all")
    torch.testing.assert_close(on_gpu.actions, on_cpu.actions, atol=1e-4, rtol=0)
