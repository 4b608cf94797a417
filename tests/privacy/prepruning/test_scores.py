"""Scores before training against their definitions, and masks made of them."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_eff.privacy.prepruning.masks import choose_masks, prune_in_rounds, pruning_targets
from lightning_eff.privacy.prepruning.scores import SynFlow, magnitude_scores, snip_scores


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False))


def test_synflow_of_ones_counts_paths() -> None:
    inputs, hidden, outputs = 7, 5, 3
    model = two_layers(inputs, hidden, outputs)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    scores = SynFlow(model, torch.ones(4, inputs), dict(model.named_parameters())).scores()
    assert torch.equal(scores["0.weight"], torch.full((hidden, inputs), float(outputs), dtype=torch.float64))
    assert torch.equal(scores["1.weight"], torch.full((outputs, hidden), float(inputs), dtype=torch.float64))
    assert {float(score.sum()) for score in scores.values()} == {inputs * hidden * outputs}


def test_synflow_is_conserved_between_layers_and_by_every_hidden_neuron() -> None:
    torch.manual_seed(0)
    model = two_layers(7, 5, 3)
    scores = SynFlow(model, torch.ones(1, 7), dict(model.named_parameters())).scores()
    assert torch.allclose(scores["0.weight"].sum(1), scores["1.weight"].sum(0), rtol=1e-12)


def test_synflow_sees_masks_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 2)).train()
    model[0].requires_grad_(False)
    inputs = torch.randn(2, 4)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[:, 1] = True
    wanted = {name: one for name, one in model.named_parameters() if name.endswith("weight")}
    scores = SynFlow(model, inputs, wanted).scores({"4.weight": mask})
    assert not scores["4.weight"][~mask].any()
    assert not scores["0.weight"][[0, 2]].any()  # no path is left from these neurons
    assert bool(scores["0.weight"][1].all())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert [one.requires_grad for one in model.parameters()] == [False, False, True, True, True, True]
    assert all(one.grad is None for one in model.parameters())


def test_synflow_tells_what_it_cannot_feed_and_what_does_not_run() -> None:
    model = two_layers(7, 5, 3)
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r'feeds the network ones, but an input is torch.int64: use score="magnitude"'):
        SynFlow(model, torch.ones(1, 7, dtype=torch.int64), parameters)
    with pytest.raises(ValueError, match=r"with ones of shapes \[\[1, 6\]\], which failed: .* Give input_shape"):
        SynFlow(model, torch.ones(1, 6), parameters).scores()


@pytest.mark.parametrize("base", [nn.Module, L.LightningModule])
def test_synflow_names_the_forward_that_a_module_lacks(base: type[nn.Module]) -> None:
    class WithoutForward(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

    module = WithoutForward()
    with pytest.raises(ValueError, match="WithoutForward has no forward: give it one"):
        SynFlow(module, torch.ones(1, 3), dict(module.named_parameters())).scores()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_snip_is_the_value_times_the_mean_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]
    parameters = dict(model.named_parameters())
    random = torch.get_rng_state()
    scores = snip_scores(model, batches, parameters, loss_fn=cross_entropy, most=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(one.grad is None for one in model.parameters())
    model.eval()
    (sum(cross_entropy(model, batch) for batch in batches[:2]) / 2).backward()
    for name, one in parameters.items():
        assert torch.allclose(scores[name], (one * one.grad).abs(), rtol=1e-5, atol=1e-8)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 20), "b": (8, 4, 3, 3), "c": (10, 7)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("score", ["random", "magnitude"])
def test_exactly_the_share_stays_in_every_tensor(rate: float, score: str) -> None:
    targets = weights()
    masks, rescued = choose_masks(targets, rate, None if score == "random" else magnitude_scores(targets))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: round((1 - rate) * one.numel()) for name, one in targets.items()
    }
    assert rescued == []
    if score == "magnitude":
        for name, mask in masks.items():
            if rate > 0:
                assert targets[name][mask].abs().min() >= targets[name][~mask].abs().max()


@pytest.mark.parametrize("score", ["random", "magnitude"])
def test_exactly_the_share_of_all_coordinates_stays_with_global_scope(score: str) -> None:
    targets = weights()
    scores = None if score == "random" else magnitude_scores(targets)
    masks, _ = choose_masks(targets, 0.7, scores, scope="global")
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * (600 + 288 + 70))


def test_rows_stay_or_go_whole() -> None:
    masks, _ = choose_masks(weights(), 0.5, granularity="row")
    for name, rows in (("a", 15), ("b", 4), ("c", 5)):
        flat = masks[name].flatten(1)
        assert torch.equal(flat.any(1), flat.all(1))
        assert int(flat.all(1).sum()) == rows


def test_random_masks_depend_on_the_seed_alone() -> None:
    one, same, other = (choose_masks(weights(), 0.5, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["a"], other["a"])


def test_tensors_that_would_go_empty_keep_their_best_and_are_named() -> None:
    targets = weights()
    masks, rescued = choose_masks(targets, 0.995, magnitude_scores(targets), min_keep_per_tensor=2)
    assert rescued == ["b", "c"]  # round(1.44) is 1, round(0.35) is 0; a keeps 3
    assert [int(mask.sum()) for mask in masks.values()] == [3, 2, 2]
    assert float(targets["c"][masks["c"]].abs().max()) == float(targets["c"].abs().max())
    _, rescued = choose_masks(targets, 0.995)
    assert rescued == ["c"]
    tiny = {**targets, "c": targets["c"] * 1e-3}
    masks, rescued = choose_masks(tiny, 0.5, magnitude_scores(tiny), scope="global")
    assert rescued == ["c"]
    assert int(masks["c"].sum()) == 1
    masks, rescued = choose_masks(tiny, 0.5, magnitude_scores(tiny), scope="global", granularity="row")
    assert rescued == ["c"]
    assert masks["c"].sum(1).tolist().count(7) == 1


def test_synflow_prunes_to_99_percent_without_cutting_the_network_in_two() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    targets = pruning_targets(model)
    flow = SynFlow(model, torch.ones(1, 64), targets)
    rounds = []
    masks, rescued = prune_in_rounds(targets, 0.99, flow.scores, advance=lambda: rounds.append(1))
    assert len(rounds) == 100
    assert rescued == []
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.01 * (64 * 64 * 2 + 640))
    left = flow.scores(masks)
    on_a_path = {name: float((left[name][mask] > 0).float().mean()) for name, mask in masks.items()}
    assert min(on_a_path.values()) > 0.75  # the last round takes from some the path they were kept for


def test_what_is_pruned_stays_pruned_from_round_to_round() -> None:
    targets = weights()
    seen: list[dict[str, Tensor]] = []

    def fickle(masks: dict[str, Tensor] | None) -> dict[str, Tensor]:
        seen.append(masks or {})
        generator = torch.Generator().manual_seed(len(seen))
        return {name: torch.rand(one.shape, generator=generator) for name, one in targets.items()}

    last, _ = prune_in_rounds(targets, 0.9, fickle, rounds=5)
    for earlier, later in zip(seen[1:], [*seen[2:], last], strict=True):
        assert not any((later[name] & ~earlier[name]).any() for name in later)
    assert sum(int(mask.sum()) for mask in seen[1].values()) == round(958 * 0.1 ** (1 / 5))


def test_targets_are_trainable_weights_and_not_what_has_one_dimension_in_disguise() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 6))
            self.scale = nn.Parameter(torch.zeros(6, 1, 1))
            self.position = nn.Parameter(torch.zeros(1, 5, 6))
            self.norm, self.table = nn.LayerNorm(6), nn.Embedding(9, 6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.head = nn.Linear(6, 1)

    assert list(pruning_targets(Net())) == ["position", "table.weight", "head.weight"]
    assert list(pruning_targets(Net(), ["*position", "table.*"])) == ["head.weight"]
    with pytest.raises(ValueError, match=r"Net has no trainable weight .* that exclude=\['\*'\] does not name"):
        pruning_targets(Net(), ["*"])


def test_layers_of_torch_prune_are_refused_with_the_way_out() -> None:
    from torch.nn.utils import prune

    model = two_layers(7, 5, 3)
    prune.random_unstructured(model[1], "weight", 0.5)
    with pytest.raises(ValueError, match=r"re-parametrised \['1.weight'\]: .* torch.nn.utils.prune.remove"):
        pruning_targets(model)
    prune.remove(model[1], "weight")
    assert len(pruning_targets(model)) == 2


def test_synflow_tells_of_outputs_that_are_no_numbers() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.inf

    model = Broken(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="SynFlow's sum of outputs is inf, expected a finite number: use another"):
        SynFlow(model, torch.ones(1, 3), dict(model.named_parameters())).scores()
