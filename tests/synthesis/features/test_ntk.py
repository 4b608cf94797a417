"""Features in closed form are the per-sample gradients of the network, whatever it is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from synthesis.features.reference import expanded, looped, summed, unit, vmapped
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.synthesis.features import NTKFeatures, sums
from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet, paper_feature_net

NETWORKS = {
    "fc_1l": lambda: paper_feature_net("fc_1l", (12,), (30,), 3),
    "fc_2l": lambda: paper_feature_net("fc_2l", (12,), (20, 10), 3),
    "cnn_1l": lambda: paper_feature_net("cnn_1l", (12,), (4,), 3),
    "cnn_2l": lambda: paper_feature_net("cnn_2l", (12,), (4, 7), 3),
    "conv1d": lambda: ConvFeatureNet((2, 12), (4, 6), (5,), 3),
    "conv2d": lambda: ConvFeatureNet((3, 8, 8), (4, 6), (), 3),
    # few positions and many channels: the patches' form instead of the per-sample gradient's
    "conv2d, wide": lambda: ConvFeatureNet((3, 4, 4), (16, 24, 16), (), 3, layer_norm=True),
}


def samples(shape: tuple[int, ...], n: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, generator=generator), torch.randint(3, (n,), generator=generator)


def tiny() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network[0].weight.copy_(torch.eye(2))
        network[2].weight.copy_(torch.tensor([[1.0, 2.0]]))
    return network


def test_tiny_network_by_hand() -> None:
    # W1 = I, W2 = [1, 2]: at (3, -1) the second unit is off; at (1, 1) both are on
    features = NTKFeatures(tiny())
    x = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    first = torch.tensor([3.0, -1, 0, 0, 1, 0, 3, 0, 1]) / math.sqrt(21)
    second = torch.tensor([1.0, 1, 2, 2, 1, 2, 1, 1, 1]) / math.sqrt(18)
    torch.testing.assert_close(features.dense(x), torch.stack([first, second]))
    assert features.kernel(x)[0, 1].item() == pytest.approx(0.3600411499, abs=1e-7)  # 7 / sqrt(21 * 18)


@pytest.mark.parametrize("name", NETWORKS)
def test_class_sums_are_those_of_the_autograd_loop_and_of_vmap(name: str) -> None:
    network = NETWORKS[name]()
    x, y = samples(network.input_shape)
    features = NTKFeatures(network, collapse_last=False)
    actual = features.class_sums(x, y, 3)
    names = list(features.layout)
    assert set(names) == {name for name, _ in network.named_parameters()}
    for gradients in (looped(network, x, names), vmapped(network, x, names)):
        torch.testing.assert_close(actual.flatten(), summed(unit(gradients), y, 3), atol=1e-5, rtol=0)
    assert actual.counts.tolist() == torch.bincount(y, minlength=3).tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_collapsed_last_layer_loses_nothing(name: str) -> None:
    network = NETWORKS[name]()
    x, y = samples(network.input_shape)
    features, full = NTKFeatures(network), NTKFeatures(network, collapse_last=False)
    width = network.layers[-1].in_features
    assert full.feature_dim - features.feature_dim == (3 - 1) * (width + 1)
    torch.testing.assert_close(features.kernel(x), full.kernel(x), atol=1e-6, rtol=0)
    collapsed = features.class_sums(x, y, 3)
    torch.testing.assert_close(
        expanded(features, collapsed.flatten(), network), full.class_sums(x, y, 3).flatten(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(collapsed.norm(), full.class_sums(x, y, 3).norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["fc_2l", "conv2d", "conv2d, wide"])
def test_kernel_is_the_product_of_features(name: str) -> None:
    features = NTKFeatures(NETWORKS[name]())
    x, _ = samples(features.input_shape)
    x2, _ = samples(features.input_shape, n=4, seed=2)
    torch.testing.assert_close(features.kernel(x, x2), features.dense(x) @ features.dense(x2).T, atol=1e-6, rtol=0)
    torch.testing.assert_close(features.kernel(x).diagonal(), torch.ones(9), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["fc_1l", "conv2d", "conv2d, wide"])
def test_dense_and_kernel_are_differentiable(name: str) -> None:
    features = NTKFeatures(NETWORKS[name]().double())
    x = samples(features.input_shape, n=2)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(features.dense, x, fast_mode=True)
    assert torch.autograd.gradcheck(features.kernel, x, fast_mode=True)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        nn.Conv2d(2, 4, 3, padding="same", bias=False),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(2, 40, 5),  # out * in * 25 weights, 4 x 4 positions: patches
        nn.Conv2d(2, 40, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(2, 40, (5, 4), stride=(1, 2), padding=(1, 0), bias=False),
    ],
    ids=str,
)
def test_convolutions_of_every_setting(convolution: nn.Conv2d) -> None:
    network = nn.Sequential(copy.deepcopy(convolution), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    x, _ = samples((2, 8, 8))
    network(x)
    features = NTKFeatures(network.double(), input_shape=(2, 8, 8), collapse_last=False)
    x = x.double().requires_grad_()
    expected = unit(vmapped(network, x, list(features.layout)))
    torch.testing.assert_close(features.dense(x), expected)
    target = features.class_sums(x.detach().flip(-1), torch.zeros(9, dtype=torch.int64), 1)
    (actual,) = torch.autograd.grad(features.mmd2(target, x, torch.zeros(9, dtype=torch.int64), estimator="v"), x)
    loss = (expected.mean(0) - target.flatten()[0] / 9).square().sum()
    torch.testing.assert_close(actual, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("outputs", [2, 40], ids=["per-sample gradients", "Gram matrices"])
def test_dense_layer_at_many_positions(outputs: int) -> None:
    network = nn.Sequential(nn.Linear(3, outputs), nn.Tanh(), nn.Linear(outputs, 2)).double()
    features = NTKFeatures(network, input_shape=(6, 3))
    x, y = samples((6, 3))
    x = x.double().requires_grad_()
    expected = unit(vmapped(network, x, list(features.layout)))
    torch.testing.assert_close(features.dense(x), expected)
    torch.testing.assert_close(features.class_sums(x, y, 3).flatten(), summed(expected, y, 3))
    target = features.class_sums(x.detach() ** 2, y, 3)
    (actual,) = torch.autograd.grad(features.mmd2(target, x, y, estimator="v"), x)
    sizes = torch.bincount(y)[:, None]
    loss = (summed(expected, y, 3) / sizes - target.flatten() / sizes).square().sum() / 3
    torch.testing.assert_close(actual, torch.autograd.grad(loss, x)[0])


def test_three_dimensional_convolution() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 8, 2))
    x, _ = samples((1, 3, 3, 3))
    features = NTKFeatures(network, input_shape=(1, 3, 3, 3), collapse_last=False)
    torch.testing.assert_close(features.dense(x), unit(vmapped(network, x, list(features.layout))))


class Overwriting(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.relu = relu
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        return self.last(self.relu(self.second(h)) + h)


def test_outputs_overwritten_by_functions_are_seen_through() -> None:
    torch.manual_seed(0)
    in_place, plain = Overwriting(torch.relu_), Overwriting(torch.relu)
    plain.load_state_dict(in_place.state_dict())
    features = NTKFeatures(in_place, input_shape=(5,), collapse_last=False)
    x = samples((5,))[0] - 0.5
    torch.testing.assert_close(features.dense(x), unit(vmapped(plain, x, list(features.layout))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


class Reused(nn.Module):
    """One layer called twice, one whose weight is also read outside of its call, one parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(x)))) + self.shift
        return self.last(torch.tanh(self.read(h)) + F.linear(h, self.read.weight))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


def normalised() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    network.append(nn.LayerNorm(5))
    with torch.no_grad():
        network(torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0)))  # statistics of its own
        network[-1].weight.copy_(torch.linspace(0.5, 2, 5))
    return network


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for attention
@pytest.mark.parametrize(
    ("make", "shape", "named"),
    [
        (Reused, (4,), ["twice.weight", "twice.bias", "read.weight", "shift"]),
        (Tied, (4,), ["first.weight"]),
        (Recurrent, (5, 3), ["cell.weight_ih_l0 (GRU)"]),
        (Attending, (5, 4), ["attention.in_proj_weight (MultiheadAttention)", "attention.out_proj.weight"]),
        (normalised, (1, 6, 6), ["1.weight (BatchNorm2d)", "5.bias (LayerNorm)"]),
        (lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten()), (1, 5), ["0."]),
    ],
    ids=["shared and read elsewhere", "tied", "recurrent", "attention", "affine norms", "circular padding"],
)
def test_what_has_no_closed_form_is_worked_out_sample_by_sample_and_told(
    make: type[nn.Module], shape: tuple[int, ...], named: list[str]
) -> None:
    torch.manual_seed(0)
    network = make()
    with pytest.warns(UserWarning, match="no closed form") as told:
        features = NTKFeatures(network, input_shape=shape, collapse_last=False)
    message = next(str(warning.message) for warning in told if "no closed form" in str(warning.message))
    assert all(name in message for name in named)
    x, y = samples(shape)
    network.eval()
    names = list(features.layout)
    assert set(names) == {name for name, _ in network.named_parameters()}  # none is dropped
    expected = unit(looped(network, x, names))
    torch.testing.assert_close(features.dense(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.class_sums(x, y, 3).flatten(), summed(expected, y, 3), atol=1e-5, rtol=0)
    z = x.clone().requires_grad_()
    target = features.class_sums(x.flip(0), torch.zeros_like(y), 1)
    (actual,) = torch.autograd.grad(features.mmd2(target, z, torch.zeros_like(y), estimator="v"), z)
    (plain,) = torch.autograd.grad((features.dense(z).mean(0) - target.flatten()[0] / 9).square().sum(), z)
    torch.testing.assert_close(actual, plain, atol=1e-6, rtol=1e-4)


def test_evaluation_mode_is_kept_and_the_network_left_alone() -> None:
    network = normalised().train()
    before = copy.deepcopy(network.state_dict())
    with pytest.warns(UserWarning, match="no closed form"):
        features = NTKFeatures(network, input_shape=(1, 6, 6))
    features.train()
    assert not any(module.training for module in features.modules())
    x, y = samples((1, 6, 6))
    alone = features.class_sums(x[:1], y[:1], 3).flatten() + features.class_sums(x[1:], y[1:], 3).flatten()
    torch.testing.assert_close(features.class_sums(x, y, 3).flatten(), alone, atol=1e-6, rtol=0)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in features.modules())


def test_batch_norm_without_statistics_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="'1' has no running statistics"):
        NTKFeatures(network)


def test_final_bias_can_be_left_out() -> None:
    network = FCFeatureNet(12, (8,), 3)
    features, kept = NTKFeatures(network, drop_final_bias=True), NTKFeatures(network)
    assert features.feature_dim == kept.feature_dim - 1
    assert "layers.3.bias" not in features.layout
    x, _ = samples((12,))
    gradients = vmapped(network, x, [*list(kept.layout)])[:, :-3]  # without the three biases
    torch.testing.assert_close(features.kernel(x), unit(gradients) @ unit(gradients).T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_feature_is_longer_than_one(scale: float) -> None:
    features = NTKFeatures(NETWORKS["conv2d"]())
    x = scale * torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    norms = features.class_sums(x, torch.arange(200), 200).norm(per_class=True)  # each a class of its own
    torch.testing.assert_close(norms, torch.ones(200, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_record_without_gradient_has_the_feature_zero_and_is_counted() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
    x = torch.tensor([[100.0, 100.0], [0.0, 0.0], [0.1, 0.1]])
    with torch.no_grad():
        network[0].weight.fill_(1)
        network[0].bias.fill_(-10)
    features = NTKFeatures(network)
    sums_ = features.sums(1)
    sums_.add(x, torch.zeros(3, dtype=torch.int64))
    assert (sums_.degenerate, sums_.records) == (2, 3)
    assert float(sums_.embedding().norm()) == pytest.approx(1)
    assert sums_.embedding().counts.tolist() == [3]
    z = x.clone().requires_grad_()
    value = features.mmd2(sums_.embedding().to(dtype=torch.float32), z, torch.zeros(3, dtype=torch.int64))
    value.backward()
    # ||t||^2 - 2 <t, e> + 0 with t = e = phi / 3
    assert float(value.detach()) == pytest.approx(-1 / 9)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_sums_do_not_depend_on_batches_or_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    features = NTKFeatures(NETWORKS["conv2d"]())
    x, y = samples((3, 8, 8), n=50)
    at_once = features.sums(3)
    at_once.add(x, y)
    monkeypatch.setattr("lightning_eff.synthesis.features.ntk.CHUNK_FLOATS", 2000)
    in_parts = features.sums(3)
    for start in range(0, 50, 7):
        in_parts.add(x[start : start + 7].flatten(1), y[start : start + 7].int())
    one, other = at_once.embedding(), in_parts.embedding()
    assert one.blocks["layers.0.weight"].dtype == torch.float64
    torch.testing.assert_close(one.flatten(), other.flatten(), atol=1e-6, rtol=0)
    assert torch.equal(one.counts, other.counts)


def test_reduced_precision_of_the_process_does_not_enter_the_sums() -> None:
    features = NTKFeatures(NETWORKS["fc_1l"]())
    x, y = samples((12,), n=64)
    expected = features.class_sums(x, y, 3).flatten()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            actual = features.class_sums(x, y, 3).flatten()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, expected)


def test_data_take_no_part_in_how_the_features_are_made() -> None:
    state = torch.get_rng_state()
    one, other = (NTKFeatures(FCFeatureNet(6, (5,), seed=7)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 3]), "expected labels from 0 to 2, got labels from 0 to 3"),
        (torch.tensor([0, -1, 1]), "got labels from -1 to 1"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected integer labels"),
        (torch.tensor([0, 1]), r"expected integer labels of shape \(3,\)"),
        (torch.tensor([[0], [1], [1]]), r"got torch.int64 of \(3, 1\)"),
    ],
)
def test_labels_that_are_none_are_refused(y: Tensor, message: str) -> None:
    features = NTKFeatures(FCFeatureNet(4, (3,)))
    with pytest.raises(ValueError, match=message):
        features.class_sums(torch.rand(3, 4), y, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_records_without_a_finite_feature_are_refused(value: float) -> None:
    x = torch.rand(3, 4)
    x[1, 2] = value
    with pytest.raises(ValueError, match="no finite feature"):
        NTKFeatures(FCFeatureNet(4, (3,))).sums(1).add(x, torch.zeros(3, dtype=torch.int64))


def test_sums_too_large_for_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    features = NTKFeatures(FCFeatureNet(100, (50,)))  # 5,101 coordinates
    monkeypatch.setattr(sums, "memory_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"1000 classes times 5101 coordinates need 40,808,000 bytes.*sketch_dim"):
        features.sums(1000)


def test_what_cannot_be_a_feature_network_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        NTKFeatures(nn.Flatten(), input_shape=(3,))
    with pytest.raises(ValueError, match="pass input_shape="):
        NTKFeatures(nn.Conv2d(1, 1, 3))
    with pytest.raises(TypeError, match="expected a module"):
        NTKFeatures(torch.sum)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected samples of shape \(4,\).*got a batch of shape \(2, 5\)"):
        NTKFeatures(FCFeatureNet(4, (3,))).kernel(torch.rand(2, 5))
