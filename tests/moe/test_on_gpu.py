"""Mixtures of experts on a GPU: backends as on the CPU, a language model that trains, compiles and goes on."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_eff.data import ByteTextDataModule
from lightning_eff.moe import DecoderConfig, ExpertLoadMonitor, FineGrainedMoE, MoEScalingModule, total_aux_loss
from lightning_eff.moe.functional import choose_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPTIONS = [
    {"activation": "swiglu"},
    {"granularity": 1, "bias": True},
    {"n_shared": 1, "routing": {"capacity_factor": 0.75}},
    {"router": "expert_choice"},
    {"balance": {"method": "bias"}, "activation": "gelu"},
]


def make(backend="auto", device="cuda", dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = FineGrainedMoE(64, **{"expansion_rate": 4, "init": {"scale": 1.0}, "backend": backend} | options)
    return layer.to(device, dtype)


def step(layer, x):
    layer.zero_grad()
    y = layer(x)
    (y.float().square().mean() + total_aux_loss(layer)).backward()
    return [y.detach(), *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_backends_of_the_gpu_equal_the_cpu_in_float64(options, backend):
    x = torch.randn(8, 16, 64, dtype=torch.float64)
    expected = step(make("reference", "cpu", torch.float64, **options), x)
    got = step(make(backend, dtype=torch.float64, **options), x.cuda())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_grouped_products_in_bfloat16_equal_the_fused_backend(options):
    x = torch.randn(8, 16, 64, device="cuda", dtype=torch.bfloat16)
    grouped, fused = make("grouped", dtype=torch.bfloat16, **options), make("fused", dtype=torch.bfloat16, **options)
    assert choose_backend(grouped.w1, grouped.w2) == "grouped"
    for ours, theirs in zip(step(grouped, x), step(fused, x), strict=True):
        scale = theirs.float().abs().max().clamp(min=1e-3)
        torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, rtol=0, atol=2e-2)


def test_grouped_products_wait_for_no_device():
    layer = make(dtype=torch.bfloat16, activation="swiglu")
    x = torch.randn(8, 16, 64, device="cuda", dtype=torch.bfloat16)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers_equal_plain_ones():
    layer = make(dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(8, 16, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_language_model_learns_and_goes_on(tmp_path, precision):
    (tmp_path / "text.txt").write_bytes(b"To be, or not to be, that is the question. " * 400)

    def fit(steps, ckpt_path=None):
        torch.manual_seed(0)
        decoder = DecoderConfig.of(d_model=64, n_layers=2, n_heads=4, max_seq_len=64, moe={"expansion_rate": 4})
        module = MoEScalingModule(decoder, lambda p: torch.optim.AdamW(p, lr=1e-2), loss_window=5)
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            max_steps=steps,
            precision=precision,
            callbacks=[ExpertLoadMonitor(2, tmp_path)],
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = ByteTextDataModule(str(tmp_path / "text.txt"), seq_len=64, batch_size=16)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, trainer

    module, trainer = fit(20)
    assert trainer.callback_metrics["val/loss"] < 3.5  # of ln 256 = 5.5 at the start
    assert next(module.parameters()).device.type == "cuda"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, again = fit(24, tmp_path / "last.ckpt")
    assert again.global_step == 24
    assert resumed.tokens_seen == 24 * 16 * 64


def test_up_cycled_networks_stay_on_the_device():
    from lightning_eff.moe import replace_ffn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))).cuda()
    x = torch.randn(32, 64, device="cuda")
    before = model(x)
    replace_ffn(model, "0", {"expansion_rate": 4, "granularity": 4}, init="upcycle")
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
