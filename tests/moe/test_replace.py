"""Mixtures of experts in any model: what is found, what is refused, and that up-cycled ones compute what was there."""

import copy
import doctest
import io
import pickle
import sys
from functools import partial

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_eff.moe import DecoderLM, DenseFFN, FineGrainedMoE, MoEConfig, ReplaceFFN, replace_ffn, total_aux_loss
from lightning_eff.moe import replace as replace_module

RATE = {"expansion_rate": 4, "granularity": 2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and biases that all matter: torchvision, for one, begins with a head and biases of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def mlp(d: int = 16, f: int = 32, activation: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, f, bias=bias), activation or nn.ReLU(), nn.Linear(f, d, bias=bias))


class Block(nn.Module):
    """A residual block around a feed-forward network."""

    def __init__(self, ffn: nn.Module, d: int = 16) -> None:
        super().__init__()
        self.norm, self.ffn, self.head = nn.LayerNorm(d), ffn, nn.Linear(d, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.ffn(self.norm(x)))


class GateFirst(nn.Module):
    """SwiGLU with one matrix for gates and the others, in either order."""

    def __init__(self, gate_first: bool, activation=F.silu) -> None:
        super().__init__()
        self.down, self.both = nn.Linear(24, 16), nn.Linear(16, 48)
        self.gate_first, self.activation = gate_first, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.both(x).chunk(2, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.down(self.activation(gate) * up)


def vit(dropout: float = 0.0) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, dropout=dropout, num_classes=5)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], num_classes=5)


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, **{"dropout": 0.0, "batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


def decoder() -> nn.Module:
    sizes = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 8}
    return DecoderLM(**sizes, activation="swiglu", ffn_output_norm="layernorm")


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra bench")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LogitsOf(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra bench")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return LogitsOf(transformers.GPT2LMHeadModel(config))


class LogitsOf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


IMAGES, TOKENS = random(2, 3, 16, 16), torch.arange(16).reshape(2, 8)
MODELS = {
    "sequential": (lambda: Block(mlp()), random(2, 5, 16), "ffn", ["ffn"]),
    "without biases": (lambda: Block(mlp(bias=False)), random(2, 5, 16), "ffn", ["ffn"]),
    "dense twin": (lambda: Block(DenseFFN(16, 24, "swiglu")), random(2, 5, 16), "ffn", ["ffn"]),
    "gate first": (lambda: Block(GateFirst(True)), random(2, 5, 16), "ffn", ["ffn"]),
    "gate last": (lambda: Block(GateFirst(False)), random(2, 5, 16), "ffn", ["ffn"]),
    "torchvision vit": (
        vit, IMAGES, "encoder.layers.*.mlp", [f"encoder.layers.encoder_layer_{i}.mlp" for i in (0, 1)]
    ),
    "torchvision swin": (
        swin, random(2, 3, 32, 32), "features.*.*.mlp", [f"features.{name}.mlp" for name in ("1.0", "3.0", "3.1")]
    ),
    "torch encoder": (
        partial(encoder, activation="gelu", norm_first=True), random(2, 5, 16), "layers.*",
        ["layers.0.linear1", "layers.1.linear1"],
    ),
    "torch encoder, sequences second": (
        partial(encoder, batch_first=False), random(5, 2, 16), "layers.1", ["layers.1.linear1"]
    ),
    "dense decoder": (decoder, TOKENS, "blocks.*.ffn", ["blocks.0.ffn", "blocks.1.ffn"]),
    "hugging face llama": (llama, TOKENS, "**.mlp", ["model.model.layers.0.mlp", "model.model.layers.1.mlp"]),
    "hugging face gpt-2": (gpt2, TOKENS, "model.transformer.h.*.mlp", [f"model.transformer.h.{i}.mlp" for i in (0, 1)]),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, torch.Tensor, str, list[str]]:
    make, x, match, names = MODELS[name]
    return randomised(make()), x, match, names


@pytest.mark.parametrize("name", MODELS)
def test_up_cycled_model_gives_what_the_dense_one_gave(name) -> None:
    model, x, match, names = made(name)
    with torch.no_grad():
        expected = model.eval()(x)
        assert replace_ffn(model, match, RATE, init="upcycle") == names
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    for layer in map(model.get_submodule, names):
        assert isinstance(layer, FineGrainedMoE)
        assert layer.config.n_experts == 8
        assert not layer.training


@pytest.mark.parametrize("name", MODELS)
def test_fresh_model_learns_with_every_weight(name) -> None:
    model, x, match, names = made(name)
    assert replace_ffn(model.train(), match, RATE) == names
    model(x).square().mean().backward()
    for layer in map(model.get_submodule, names):
        assert all(parameter.grad.any() for parameter in layer.parameters())
        assert layer.training


@pytest.mark.parametrize(("granularity", "top_k"), [(1, None), (1, 3), (2, 2), (2, 4), (4, None), (4, 8)])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_up_cycling_is_exact_for_any_granularity_and_multiple_of_it(granularity, top_k, activation) -> None:
    model, x = randomised(Block(mlp(activation=activation))), random(40, 16)
    expected = model(x)
    replace_ffn(model, "ffn", {"expansion_rate": 4, "granularity": granularity, "top_k": top_k}, init="upcycle")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    used = (model.ffn.last_load > 0).sum().item()
    assert used > model.ffn.config.experts_per_token or used == model.ffn.config.n_experts


def test_up_cycled_router_learns_from_the_task() -> None:
    # with one expert a token and normalised weights its gradient would be zero
    model = randomised(Block(mlp()))
    replace_ffn(model, "ffn", {"granularity": 1, "balance": {"method": "none", "z_weight": 0.0}}, init="upcycle")
    (model(random(40, 16)) * random(40, 3, seed=2)).sum().backward()
    # copies of one network differ in nothing, so that a choice between them has no gradient until they do
    assert model.ffn.router.grad.abs().max() < 1e-4
    with torch.no_grad():
        model.ffn.w2 += random(*model.ffn.w2.shape, seed=3)
    model.zero_grad()
    (model(random(40, 16)) * random(40, 3, seed=2)).sum().backward()
    assert model.ffn.router.grad.abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_evaluation_of_torch_encoder_with_padding_keeps_off_the_fused_kernel() -> None:
    model, x = randomised(encoder()).eval(), random(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        replace_ffn(model, "layers.*", RATE, init="upcycle")
        given = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(given[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


def test_torch_decoder_layer_is_replaced() -> None:
    model = nn.ModuleDict({"layer": nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)})
    x, memory = random(2, 5, 16), random(2, 3, 16)
    expected = model["layer"](x, memory)
    assert replace_ffn(model, "layer", RATE, init="upcycle") == ["layer.linear1"]
    torch.testing.assert_close(model["layer"](x, memory), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_dropout_behind_a_torch_layer_is_not_done_twice(kind) -> None:
    model = nn.ModuleDict({"layer": kind(16, 4, 32, dropout=0.3, batch_first=True)})
    with pytest.warns(UserWarning, match=r"dropout of 0.3 on hidden units is left out"):
        replace_ffn(model, "layer", RATE)
    y = model["layer"]._ff_block(random(50, 20, 16))
    assert (y == 0).float().mean() == pytest.approx(0.3, abs=0.03)  # 16,000 draws: standard deviation 0.004


@pytest.mark.parametrize("which", [0, 2])
def test_weights_that_are_computed_are_taken_as_they_are(which: int) -> None:
    ffn = mlp()
    nn.utils.parametrizations.weight_norm(ffn[which])
    model, x = Block(ffn), random(7, 16)
    expected = model(x)
    replace_ffn(model, "ffn", RATE, init="upcycle")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_what_config_leaves_out_is_as_the_network_has_it() -> None:
    model = Block(DenseFFN(16, 24, "swiglu"))
    replace_ffn(model, "ffn", {"granularity": 2})
    assert (model.ffn.config.activation, model.ffn.config.bias, model.ffn.d_ff) == ("swiglu", False, 24)
    model = Block(mlp(activation=nn.GELU()))
    replace_ffn(model, "ffn", MoEConfig(activation="silu"))
    assert (model.ffn.config.activation, model.ffn.config.bias) == ("silu", False)


def test_unknown_activation_is_replaced_when_one_is_named() -> None:
    model = Block(mlp(activation=nn.Mish()))
    with pytest.raises(ValueError, match=r"ffn \(Sequential\) cannot be replaced: it does not compute down\("):
        replace_ffn(model, "ffn", RATE)
    replace_ffn(model, "ffn", {"activation": "silu"})
    assert isinstance(model.ffn, FineGrainedMoE)


class WithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class WithScale(WithResidual):
    """Starts as the identity, so that trying it with its own weights would not show the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * self.mlp(x)


@pytest.mark.parametrize(
    ("ffn", "told"),
    [
        (nn.Linear(16, 16), "the layer itself is one linear layer; a feed-forward network has 2"),
        (nn.Sequential(mlp(), mlp()), "the module has 4 linear layers"),
        (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), r"\(16 -> 32, 32 -> 8\) do not lead from 16"),
        (nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16)), "does not compute down"),
        (nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), "does not compute down"),
        (WithResidual(), "does not compute down"),
        (WithScale(), "does not compute down"),
        (GateFirst(True, activation=F.gelu), "does not compute down"),
        (mlp(activation=nn.ReLU6()), "does not compute down"),
        (mlp(activation=nn.Hardtanh(0, 20)), "does not compute down"),
        (nn.MultiheadAttention(16, 4), "the module has 1 linear layers"),
        (nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32), 1), "cannot be run on tokens|linear layers"),
    ],
)
def test_what_is_no_feed_forward_network_is_refused(ffn, told) -> None:
    model = nn.ModuleDict({"first": Block(mlp()), "second": Block(ffn)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"second.ffn \(\w+\) cannot be replaced: .*({told})"):
        replace_ffn(model, "*.ffn", RATE)
    assert isinstance(model["first"].ffn, nn.Sequential)
    assert model["second"].ffn is ffn
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"router": "expert_choice"}, "would change the output with router='expert_choice'; leave it out or use init"),
        ({"output_norm": "layernorm"}, "output_norm='layernorm'"),
        ({"n_shared": 1}, "n_shared=1"),
        ({"routing": {"capacity_factor": 1.5}}, r"capacity_factor=1\.5"),
        ({"routing": {"weight_scale": 3.0}}, r"weight_scale=3\.0 \(granularity 2 needs 2\)"),
        ({"activation": "silu"}, r"activation='silu' \(the network has 'relu'\)"),
        ({"bias": False}, r"bias=False \(the network has biases\)"),
        ({"top_k": 3}, "top_k of at least 2 and a multiple of granularity = 2, .* got 3"),
        ({"granularity": 1, "top_k": 1}, "top_k of at least 2 .* got 1"),
        ({"granularity": 1, "expansion_rate": 1}, "needs 2 experts or more, got 1; raise expansion_rate"),
        ({"granularity": 5}, "granularity must divide d_ff = 32, got 5; the nearest that does is 4"),
        ({"granularty": 2}, "MoEConfig has no granularty"),
    ],
)
def test_options_that_up_cycling_cannot_keep_are_refused(options, told) -> None:
    model = Block(mlp())
    with pytest.raises(ValueError, match=f"ffn .*cannot be replaced: .*{told}"):
        replace_ffn(model, "ffn", {**RATE, **options}, init="upcycle")
    assert isinstance(model.ffn, nn.Sequential)


def test_matches_that_are_none_or_too_many_are_told() -> None:
    model = nn.ModuleDict({"block": Block(mlp())})
    with pytest.raises(ValueError, match=r"no module of ModuleDict matches 'ffn'; what looks like .*: block.ffn"):
        replace_ffn(model, "ffn")
    with pytest.raises(ValueError, match=r"block.ffn lies within block, and both match"):
        replace_ffn(model, lambda name, _: name in ("block", "block.ffn"))
    with pytest.raises(ValueError, match=r"match must be text .* or a function .*, got \['block.ffn'\]"):
        replace_ffn(model, ["block.ffn"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model itself matches"):
        replace_ffn(mlp(), lambda *_: True)
    with pytest.raises(ValueError, match="init must be one of fresh, upcycle, got 'up'"):
        replace_ffn(model, "block.ffn", init="up")
    with pytest.raises(ValueError, match="aux_mode must be one of inject, collect, got 'both'"):
        replace_ffn(model, "block.ffn", aux_mode="both")
    with pytest.raises(ValueError, match=r"layers.0 .*cannot be replaced: expert choice needs sequences in the first"):
        replace_ffn(encoder(batch_first=False), "layers.0", {"router": "expert_choice"})


def test_star_stays_within_a_part_of_a_name() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.ModuleDict({"ffn": mlp()})})})
    with pytest.raises(ValueError, match="no module"):
        replace_ffn(model, "a.*ffn")
    assert replace_ffn(copy.deepcopy(model), "a.*.ffn") == ["a.b.ffn"]
    assert replace_ffn(model, "**ffn") == ["a.b.ffn"]


def test_replacing_again_does_nothing_unless_options_differ() -> None:
    for init in ("fresh", "upcycle"):
        for config in (RATE, MoEConfig.of(RATE, bias=True)):
            model = nn.ModuleDict({"block": Block(mlp()), "layer": nn.TransformerEncoderLayer(16, 4, 32, 0.0)})
            names = [replace_ffn(model, match, config, init) for match in ("block.ffn", "layer")]
            there = model["block"].ffn
            assert [replace_ffn(model, match, config, init) for match in ("block.ffn", "layer")] == names
            assert model["block"].ffn is there
            with pytest.raises(ValueError, match=r"already, with other options \(granularity\)"):
                replace_ffn(model, "block.ffn", {"granularity": 1}, init)
            with pytest.raises(ValueError, match=r"already, with other options \(aux_mode\)"):
                replace_ffn(model, "block.ffn", config, init, aux_mode="collect")


def test_network_of_several_names_stays_one() -> None:
    shared = mlp()
    model = nn.ModuleDict({"a": Block(shared), "b": Block(shared)})
    assert replace_ffn(model, "*.ffn") == ["a.ffn", "b.ffn"]
    assert model["a"].ffn is model["b"].ffn


def test_device_dtype_mode_and_frozen_weights_are_kept() -> None:
    model = randomised(Block(mlp())).double().eval()
    model.ffn[0].requires_grad_(False)
    x = random(40, 16).double()
    expected = model(x)
    replace_ffn(model, "ffn", {**RATE, "balance": {"method": "bias"}}, init="upcycle")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    layer = model.ffn
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    assert frozen == ["w1", "b1"]
    assert not layer.training
    assert layer.w1.dtype == torch.float64
    assert layer.balance_bias.dtype == torch.float32


def test_dropout_of_the_output_stays_and_that_of_hidden_units_is_told() -> None:
    model = nn.ModuleDict({"ffn": torchvision.ops.MLP(16, [32, 16], dropout=0.4)})
    with pytest.warns(UserWarning, match=r"dropout of 0.4 on hidden units is left out"):
        replace_ffn(model, "ffn")
    y = model["ffn"](random(50, 16))
    assert 0.2 < (y == 0).float().mean() < 0.6
    assert not (model["ffn"].eval()(random(50, 16)) == 0).any()
    model = nn.ModuleDict({"ffn": nn.Sequential(*mlp(), nn.Dropout(0.4))})  # nothing is lost: no warning
    replace_ffn(model, "ffn")
    assert model["ffn"].dropout == 0.4


def test_fresh_layers_can_be_planned_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Block(mlp(activation=nn.GELU()))
    with pytest.raises(ValueError, match="its weights are on the meta device"):
        replace_ffn(model, "ffn", RATE, init="upcycle")
    replace_ffn(model, "ffn", RATE)
    assert model.ffn.w1.is_meta
    assert model.ffn.config.activation == "gelu"
    model.to_empty(device="cpu")
    model.ffn.reset_parameters()
    assert model.ffn(random(4, 16)).isfinite().all()


def test_default_device_and_dtype_do_not_matter() -> None:
    model, x = randomised(Block(mlp())), random(40, 16)
    expected = model(x)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for "bf16-true"
    try:
        with torch.device("meta"):
            replace_ffn(model, "ffn", RATE, init="upcycle")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_global_generator_is_used_for_new_weights_alone() -> None:
    torch.manual_seed(0)
    layer = FineGrainedMoE(16, 32, RATE, bias=True)
    after = torch.rand(1)
    model = Block(mlp())
    torch.manual_seed(0)
    replace_ffn(model, "ffn", RATE)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(model.ffn.w1, layer.w1)


@pytest.mark.parametrize("aux_mode", ["inject", "collect"])
def test_copies_and_pickles_and_compiles(aux_mode) -> None:
    model, x = randomised(Block(mlp())), random(40, 16)
    replace_ffn(model, "ffn", RATE, "upcycle", aux_mode)
    model(x).sum().backward()
    expected = model.ffn.router.grad
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        twin.zero_grad()
        twin(x).sum().backward()
        torch.testing.assert_close(twin.ffn.router.grad, expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Block(mlp())
    replace_ffn(other, "ffn", RATE, "upcycle", aux_mode)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), model(x))


def test_examples_of_docstrings_hold() -> None:
    result = doctest.testmod(replace_module)
    assert result.attempted > 0
    assert result.failed == 0


class Net(L.LightningModule):
    """Somebody's module that knows nothing of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Block(mlp())

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).square().mean()

    def test_step(self, batch: torch.Tensor) -> None:
        self.log("loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class NetWithExperts(Net):
    def __init__(self) -> None:
        super().__init__()
        replace_ffn(self, "net.ffn", RATE)


class NetConfigured(Net):
    def configure_model(self) -> None:
        replace_ffn(self, "net.ffn", RATE)


def trainer_of(tmp_path, *callbacks, max_epochs: int = 1, **settings) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=tmp_path, max_epochs=max_epochs, callbacks=list(callbacks), **quiet, **settings)


def loader() -> DataLoader:
    return DataLoader(random(32, 16), batch_size=8)


@pytest.mark.parametrize("kind", [NetWithExperts, NetConfigured])
def test_checkpoints_load_where_the_module_replaces_by_itself(kind, tmp_path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.fit(kind(), loader())
    path = trainer.checkpoint_callback.best_model_path
    loaded = kind.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(loaded.net(random(4, 16)), trainer.lightning_module.net(random(4, 16)))
    module = kind()
    trainer_of(tmp_path, max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    assert isinstance(module.net.ffn, FineGrainedMoE)


def test_callback_replaces_resumes_and_evaluates(tmp_path) -> None:
    def run(path=None, max_epochs=2) -> tuple[Net, str]:
        L.seed_everything(3, verbose=False)
        module, trainer = Net(), trainer_of(tmp_path, ReplaceFFN("net.ffn", RATE, "upcycle"), max_epochs=max_epochs)
        trainer.fit(module, loader(), ckpt_path=path, weights_only=True if path else None)
        return module, trainer.checkpoint_callback.best_model_path

    whole, _ = run()
    _, half = run(max_epochs=1)
    resumed, path = run(half)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    evaluated = Net()
    trainer_of(tmp_path, ReplaceFFN("net.ffn", RATE, "upcycle")).test(
        evaluated, loader(), ckpt_path=path, weights_only=True, verbose=False
    )
    assert torch.equal(evaluated.net.ffn.w1, whole.net.ffn.w1)
    with pytest.raises(RuntimeError, match=r"call lightning_eff.moe.replace_ffn on the model before it is loaded"):
        Net.load_from_checkpoint(path, weights_only=True)
    again = Net()
    replace_ffn(again, "net.ffn", RATE, "upcycle")
    again.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(again.net.ffn.w1, whole.net.ffn.w1)


def test_callback_that_matches_by_class_knows_its_layers_again(tmp_path) -> None:
    callback, module = ReplaceFFN(lambda name, ffn: isinstance(ffn, nn.Sequential), RATE), Net()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, loader())
    layer = module.net.ffn
    trainer.test(module, loader(), verbose=False)
    assert module.net.ffn is layer
    trainer.test(other := Net(), loader(), verbose=False)  # another module is replaced as the first was
    assert isinstance(other.net.ffn, FineGrainedMoE)


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1),
}


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_weights_are_those_of_the_experts(average, tmp_path) -> None:
    class Noting(L.Callback):
        """Keeps the weights after every step or epoch, whichever is averaged."""

        def __init__(self) -> None:
            self.steps: list[torch.Tensor] = []
            self.epochs: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer, module, *_) -> None:
            self.steps.append(module.net.ffn.w1.detach().clone())

        def on_train_epoch_end(self, trainer, module) -> None:
            self.epochs.append(module.net.ffn.w1.detach().clone())

    module, noting = Net(), Noting()
    callbacks = [ReplaceFFN("net.ffn", RATE, "upcycle"), noting, AVERAGES[average]()]
    trainer_of(tmp_path, *callbacks, max_epochs=3).fit(module, loader())
    if average == "ema":
        expected = noting.steps[0]
        for weights in noting.steps[1:]:
            expected = torch.lerp(weights, expected, 0.5)
    else:
        expected = (noting.epochs[0] + noting.epochs[1]) / 2  # taken where the second and third begin
    torch.testing.assert_close(module.net.ffn.w1, expected)
    assert not torch.allclose(module.net.ffn.w1, noting.steps[-1])


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_that_copied_the_dense_network_are_refused_before_training(average, tmp_path) -> None:
    callbacks = [AVERAGES[average](), ReplaceFFN("net.ffn", RATE)]
    trainer = trainer_of(tmp_path, *callbacks)
    with pytest.raises(ValueError, match=r"WeightAveraging stands before ReplaceFFN.*put ReplaceFFN before it"):
        trainer.fit(Net(), loader())
    assert trainer.global_step == 0
    trainer = trainer_of(tmp_path, AVERAGES[average](), ReplaceFFN("net.ffn", RATE))
    trainer.fit(NetWithExperts(), loader())  # nothing was left to replace


def test_dense_checkpoint_in_a_replaced_model_is_told() -> None:
    model = Block(mlp())
    dense = model.state_dict()
    replace_ffn(model, "ffn", RATE)
    with pytest.raises(RuntimeError, match=r"ffn is a mixture of experts, but the checkpoint holds a dense network"):
        model.load_state_dict(dense)


def test_network_that_configure_model_builds_is_told(tmp_path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            self.net = Block(mlp())

    with pytest.raises(ValueError, match=r"no module of Late matches 'net.ffn'.*configure_model"):
        trainer_of(tmp_path, ReplaceFFN("net.ffn")).fit(Late(), loader())


def test_losses_that_are_collected_are_those_of_all_layers() -> None:
    model = randomised(encoder())
    replace_ffn(model, "layers.*", RATE, aux_mode="collect")
    model(random(2, 5, 16))
    assert total_aux_loss(model).requires_grad


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  limit_val_batches: 1
  callbacks:
    - class_path: lightning_eff.moe.ReplaceFFN
      init_args:
        match: net.layers.*.ffn
        config: {expansion_rate: 4, granularity: 2, balance: {weight: 0.02}}
        init: upcycle
model:
  class_path: lightning_eff.models.ImageClassifier
  init_args:
    net: {class_path: patches.Patches}
data:
  class_path: lightning_eff.data.DigitsDataModule
"""

NET = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        return x + self.ffn(x)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.Sequential(Block(), Block()), nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.layers(images.flatten(0, 1)).flatten(1))
"""


def test_callback_is_reached_from_yaml(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "patches.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-eff"])
    cli = LightningCLI(args=["--config", "config.yaml"], run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, cli.datamodule)
    layer = cli.model.get_submodule("net.layers.1.ffn")
    assert (layer.config.n_experts, layer.config.balance.weight) == (8, 0.02)
    assert layer.config.routing.normalize_weights  # up-cycled
    torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
