"""Small runs of AdaGlimpseModule: digits of 16 pixels in scenes of 32, glimpses of 8 pixels."""

from dataclasses import replace
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer

from lightning_eff.data import CanvasDataModule
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ClassificationTask,
    GlimpseConfig,
    ReplayOptions,
    TrainingPlan,
)

GLIMPSE = GlimpseConfig(image_size=32, num_glimpses=2, patch_size=4)
REPLAY = ReplayOptions(buffer_size=128, batch_size=32, random_steps=2)
AGENT = AgentConfig(hidden=16, heads=4, lr=1e-3, state_parts=("patch", "box"), ent_coef="auto_0.1", replay=REPLAY)
PLAN = TrainingPlan(pretrain_epochs=1, rl_only_epochs=1, alternate_unit="batch")


def make_backbone(num_classes=10):
    return CanvasBackbone(num_classes=num_classes, widths=(4, 4, 8, 8))


def make_module(backbone=None, task=None, seed=0, **options):
    """The module with weights given by ``seed``; options of GlimpseConfig, AgentConfig, ReplayOptions, TrainingPlan by
    their own names, others as the module has them."""
    torch.manual_seed(seed)
    configs = {"glimpse": GLIMPSE, "agent": AGENT, "plan": PLAN}
    fields = {name: options.pop(name) for name in list(options) if hasattr(REPLAY, name)}
    configs["agent"] = replace(configs["agent"], replay=replace(REPLAY, **fields))
    for name, config in configs.items():
        fields = {field: options.pop(field) for field in list(options) if hasattr(config, field)}
        configs[name] = replace(config, **fields)
    options.setdefault("backbone_optimizer", partial(torch.optim.AdamW, lr=1e-2))
    return AdaGlimpseModule(backbone or make_backbone(), task or ClassificationTask(10), **configs, **options)


def make_data(train_size=32, batch_size=16, **options):
    return CanvasDataModule(
        canvas=32, train_size=train_size, batch_size=batch_size, val_size=16, test_size=16, **options
    )


def make_trainer(path, max_epochs=1, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(path)}
    return Trainer(max_epochs=max_epochs, **(defaults | quiet | options))


def state_of(module):
    """Weights and statistics of every part, copied."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after):
    """Names of what is not bitwise the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class SaveAfter(Callback):
    """Save after so many batches, and stop there or go on."""

    def __init__(self, batches, path, stop=False):
        self.left, self.path, self.stop = batches, path, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop
