"""Small networks, one a kind of layer, with inputs: what the engine must agree with `torch.func` on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N = 5  # samples


@dataclass(frozen=True)
class Specimen:
    """A network (float64) and inputs for ``N`` samples; ``loop``: `torch.func` cannot run it, plain passes can."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loop: bool = False


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def tokens(length: int, vocabulary: int) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        drawn = torch.randint(vocabulary, (N, length))
        drawn[:, 0] = drawn[:, -1]  # a token that comes twice in one sample
        return drawn

    return draw


class Frozen(nn.Sequential):
    """Layers in evaluation mode with running statistics that are not trivial."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        self.eval()


class Attention(nn.Module):
    """Multi-head attention between sequences that are made of one input by linear maps."""

    def __init__(self, same: str = "qkv", batch_first: bool = True, masks: str = "", **options: Any) -> None:
        super().__init__()
        kdim, vdim = options.get("kdim") or 6, options.get("vdim") or 6
        self.same, self.batch_first, self.masks = same, batch_first, masks
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, kdim), nn.Linear(4, vdim)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x)
        key = query if "k" in self.same else self.k(torch.cat([x, x.cos()[:, :1]], 1))
        value = key if "v" in self.same else self.v(x if "k" in self.same else torch.cat([x, x.cos()[:, :1]], 1))
        arguments: dict[str, Any] = {"need_weights": "weights" in self.masks}
        if "attn" in self.masks:
            allowed = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
            arguments["attn_mask"] = ~allowed
        if "padding" in self.masks:
            left_out = torch.cat([x, x[:, :1]], 1)[:, : key.shape[1], 0] > 0
            arguments["key_padding_mask"] = left_out & (torch.arange(key.shape[1]) > 0)
        if not self.batch_first:
            query, swapped = query.transpose(0, 1), key.transpose(0, 1)
            value = swapped if value is key else value.transpose(0, 1)
            key = query if "k" in self.same else swapped
            value = key if "v" in self.same else value
        attended, weights = self.attention(query, key, value, **arguments)
        if not self.batch_first:
            attended = attended.transpose(0, 1)
        return attended if weights is None else torch.cat([attended.flatten(1), weights.flatten(1)], 1)


class Tokens(nn.Module):
    """Embedding, learned positions, class token: what a small transformer has before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), self.embed(x)], 1)
        return (tokens + self.positions) * self.scale


class LookedUpTwice(nn.Module):
    """What was looked up tells what to look up next in the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.table(x)
        return first + self.table((first.detach().abs() * 3).long().remainder(7)).mean(-2)


class LookedUpPositions(nn.Module):
    """Positions by an embedding of `arange`, as long as the batch is large: no row of it is a sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(7, 4), nn.Embedding(N, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.embed(x) + self.positions(torch.arange(x.shape[1]))).tanh()


class RelativeBias(nn.Module):
    """A table, looked up, reshaped and added to what comes from the input, as in windowed attention."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("index", torch.tensor([[0, 1, 1], [3, 0, 1], [4, 3, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
        return (x + bias).softmax(-1)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised on every call."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return functional.conv2d(input, weight, self.bias, padding=1)


class Conv1D(nn.Module):
    """The projection of GPT-2 as transformers writes it: `addmm` of flattened positions, weight transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.bias.shape[0])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class TiedLanguageModel(nn.Module):
    """Embedding and output projection share one weight; one norm is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embed(x))
        return self.out(self.norm(self.hidden(hidden).tanh()))


class LastState(nn.Module):
    """The output of a recurrent layer."""

    def __init__(self, layer: nn.Module, transposed: bool = False) -> None:
        super().__init__()
        self.layer, self.transposed = layer, transposed

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.transpose(0, 1) if self.transposed else x)[0]
        return out.transpose(0, 1) if self.transposed else out


class MatrixProduct(nn.Module):
    """Parameters in products that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 3))
        self.right = nn.Parameter(torch.randn(2, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,hio->ntho", x @ self.left, self.right)


class Pair(nn.Module):
    """A layer of two inputs, given one and its sine."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sin())


NORMS = [
    Specimen("layer norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), images(4)),
    Specimen("layer norm of positions", lambda: nn.LayerNorm(6), images(2, 3, 6)),
    Specimen("layer norm over two dimensions", lambda: nn.LayerNorm((3, 6)), images(2, 3, 6)),
    Specimen("layer norm without bias", lambda: nn.LayerNorm(6, bias=False), images(3, 6)),
    Specimen("rms norm", lambda: nn.RMSNorm(6), images(3, 6)),
    Specimen("rms norm with eps", lambda: nn.RMSNorm(6, eps=0.1), images(6)),
    Specimen("group norm", lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6)), images(2, 5, 5)),
    Specimen("group norm without positions", lambda: nn.GroupNorm(2, 4), images(4)),
    Specimen("instance norm", lambda: nn.InstanceNorm2d(3, affine=True), images(3, 4, 4)),
    Specimen("instance norm of sequences", lambda: nn.InstanceNorm1d(3, affine=True), images(3, 7)),
    Specimen("frozen batch norm", lambda: Frozen(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), images(2, 5, 5)),
    Specimen("frozen batch norm of vectors", lambda: Frozen(nn.BatchNorm1d(4)), images(4)),
    Specimen("norm and in-place activation", lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(True)), images(4, 3)),
]
EMBEDDINGS = [
    Specimen("embedding", lambda: nn.Embedding(7, 4), tokens(6, 7)),
    Specimen("embedding with padding", lambda: nn.Embedding(7, 4, padding_idx=3), tokens(6, 7)),
    Specimen("embedding of one token", lambda: nn.Embedding(7, 4), lambda: torch.randint(7, (N,))),
    Specimen("embedding of a grid", lambda: nn.Embedding(7, 4), lambda: torch.randint(7, (N, 2, 3))),
    Specimen("embedding called twice", LookedUpTwice, tokens(3, 7)),
    *(
        Specimen(f"embedding bag, {mode}", lambda mode=mode: nn.EmbeddingBag(7, 4, mode=mode), tokens(5, 7), loop=True)
        for mode in ("sum", "mean", "max")
    ),
    Specimen("padded bag", lambda: nn.EmbeddingBag(7, 4, mode="mean", padding_idx=1), tokens(5, 7), loop=True),
    Specimen("tied language model", TiedLanguageModel, tokens(5, 7)),
]
ATTENTION = [
    Specimen(
        f"attention {same or 'apart'}{', sequence first' * (not first)}{masks and ' with ' + masks}",
        build,
        images(3, 4),
    )
    for same in ("qkv", "v", "")
    for first in (True, False)
    for masks in ("", "attn", "padding", "attn padding weights")
    if first or masks in ("", "attn padding weights")
    for build in [lambda same=same, first=first, masks=masks: Attention(same, first, masks)]
] + [
    Specimen("attention with its own key and value widths", lambda: Attention("", kdim=5, vdim=3), images(3, 4)),
    Specimen("attention without bias", lambda: Attention("v", bias=False), images(3, 4)),
    Specimen("attention with key and value biases", lambda: Attention("qkv", add_bias_kv=True), images(3, 4)),
    Specimen("attention to zero", lambda: Attention("", add_zero_attn=True), images(3, 4)),
    Specimen(
        "encoder layer",
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        images(3, 4),
    ),
    Specimen(
        "encoder layer, norm first, evaluating",
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True).eval(),
        images(3, 4),
    ),
]
EXPANDED = [
    Specimen("class token and positions", Tokens, tokens(3, 7)),
    Specimen("positions looked up", LookedUpPositions, tokens(N, 7)),
    Specimen("relative bias table", RelativeBias, images(2, 3, 3)),
    Specimen("standardised weight", lambda: nn.Sequential(Standardised(2, 3, 3), nn.Tanh()), images(2, 4, 4)),
    Specimen("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), images(4)),
]
FALLBACK = [
    Specimen("prelu", lambda: nn.PReLU(3), images(3, 4)),
    Specimen("bilinear", lambda: Pair(nn.Bilinear(4, 4, 3)), images(4)),
    Specimen("transposed convolution", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), images(2, 4, 4)),
    Specimen("projection of GPT-2", lambda: nn.Sequential(Conv1D(4, 6), nn.Tanh(), Conv1D(6, 3)), images(3, 4)),
    Specimen("products without layer", MatrixProduct, images(3, 4)),
    Specimen("lstm", lambda: LastState(nn.LSTM(4, 3, batch_first=True)), images(3, 4), loop=True),
    Specimen(
        "lstm of two layers", lambda: LastState(nn.LSTM(4, 3, 2, bidirectional=True), True), images(3, 4), loop=True
    ),
    Specimen("gru", lambda: LastState(nn.GRU(4, 3, batch_first=True)), images(3, 4), loop=True),
    Specimen("recurrent tanh", lambda: LastState(nn.RNN(4, 3), True), images(3, 4), loop=True),
]
