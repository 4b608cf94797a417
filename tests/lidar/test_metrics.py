import math

import pytest
import torch
from torch import Tensor

from lightning_eff.lidar.metrics import METRICS, DepthCompletionMetrics, depth_errors


def some_images(images: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction = 1 + 60 * torch.rand(images, 1, 8, 12, generator=generator)
    target = 1 + 60 * torch.rand(images, 1, 8, 12, generator=generator)
    known = torch.rand(images, 1, 8, 12, generator=generator) < torch.linspace(0.1, 0.9, images).view(-1, 1, 1, 1)
    return prediction, target * known


def test_errors_are_those_of_the_development_kit():
    errors = depth_errors(torch.tensor([[10.0, 20.0]]), torch.tensor([[11.0, 18.0]]))
    assert list(errors) == ["rmse", "mae", "irmse", "imae"]
    # sqrt(5 / 2) m, 3 / 2 m, and 1/10 - 1/11 = 1/110, 1/18 - 1/20 = 1/180 per metre
    assert errors["rmse"].item() == pytest.approx(1581.139, abs=1e-3)
    assert errors["mae"].item() == pytest.approx(1500)
    assert errors["irmse"].item() == pytest.approx(7.53355, abs=1e-5)
    assert errors["imae"].item() == pytest.approx(7.32323, abs=1e-5)


def test_relative_errors_by_hand():
    errors = depth_errors(torch.tensor([[10.0, 20.0, 4.0]]), torch.tensor([[11.0, 18.0, 7.0]]), METRICS)
    logs = [math.log(10 / 11), math.log(20 / 18), math.log(4 / 7)]
    assert errors["mse"].item() == pytest.approx(1e6 * (1 + 4 + 9) / 3)
    assert errors["rel"].item() == pytest.approx((1 / 11 + 2 / 18 + 3 / 7) / 3)
    assert errors["log10"].item() == pytest.approx(sum(abs(x) for x in logs) / 3 / math.log(10))
    # 7 / 4 = 1.75 lies between 1.25 ** 2 and 1.25 ** 3
    assert [errors[f"delta{j}"].item() for j in (1, 2, 3)] == pytest.approx([2 / 3, 2 / 3, 1])
    mean = sum(logs) / 3
    assert errors["silog"].item() == pytest.approx(100 * math.sqrt(sum(x * x for x in logs) / 3 - mean * mean))


def test_scale_invariant_error_ignores_scale():
    _, target = some_images()
    assert depth_errors(1.7 * target, target, ["silog"])["silog"].max().item() < 1e-3


def test_errors_read_valid_pixels_only():
    prediction, target = some_images()
    spoiled = torch.where(target > 0, prediction, torch.nan)
    for name, error in depth_errors(spoiled, target, METRICS).items():
        assert torch.equal(error, depth_errors(prediction, target, METRICS)[name]), name


def test_min_target_leaves_out_what_lies_nearer():
    errors = depth_errors(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.05, 6.0]]), ["mae"], min_target=0.1)
    assert errors["mae"].item() == pytest.approx(1000)


def test_one_target_serves_many_predictions():
    prediction, target = some_images()
    known = target[4] > 0
    errors = depth_errors(prediction[:, known], target[4][known][None], METRICS)
    one_by_one = [depth_errors(image[None], target[4:5], METRICS) for image in prediction]
    for name in METRICS:
        assert torch.equal(errors[name], torch.cat([error[name] for error in one_by_one])), name


def test_data_set_error_is_the_mean_of_images_not_of_pixels():
    prediction, target = some_images()
    values = DepthCompletionMetrics(["rmse"])(prediction, target)
    per_image = [(p - t)[t > 0].square().mean().sqrt() for p, t in zip(prediction, target, strict=True)]
    assert values["rmse"].item() == pytest.approx(1000 * sum(map(float, per_image)) / 6)
    pooled = DepthCompletionMetrics(["rmse"], reduction="pooled")(prediction, target)["rmse"].item()
    assert pooled == pytest.approx(1000 * (prediction - target)[target > 0].square().mean().sqrt().item())
    assert pooled != pytest.approx(values["rmse"].item(), rel=1e-3)


def test_pooled_errors_are_those_of_one_large_image():
    prediction, target = some_images()
    pooled = DepthCompletionMetrics(reduction="pooled")
    pooled.update(prediction[:2], target[:2])
    pooled.update(prediction[2:], target[2:])
    for name, error in depth_errors(prediction[None], target[None], METRICS).items():
        assert pooled.compute()[name].item() == pytest.approx(error.item()), name


def test_images_without_ground_truth_are_skipped_and_counted():
    prediction, target = some_images()
    metric, with_empty = DepthCompletionMetrics(), DepthCompletionMetrics()
    metric.update(prediction[1:], target[1:])
    with_empty.update(prediction, torch.cat([torch.zeros_like(target[:1]), target[1:]]))
    expected, values = metric.compute(), with_empty.compute()
    assert (values["images"], values["skipped"]) == (5, 1)
    assert all(values[name] == expected[name] for name in METRICS)


def test_only_empty_images_give_no_number():
    metric = DepthCompletionMetrics()
    metric.update(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    values = metric.compute()
    assert values["skipped"] == 2
    assert all(values[name].isnan() for name in METRICS)


def test_predictions_without_depth_count_as_the_least_depth_and_are_counted():
    target = torch.tensor([[[[2.0, 2.0, 0.0, 2.0]]]])
    prediction = torch.tensor([[[[0.0, -5.0, -5.0, 2.0]]]])
    values = DepthCompletionMetrics(["mae", "irmse"])(prediction, target)
    assert values["clamped"] == 2
    assert values["mae"].item() == pytest.approx(1000 * 2 * 1.1 / 3)
    assert values["irmse"].item() == pytest.approx(1000 * math.sqrt(2 * (1 / 0.9 - 1 / 2) ** 2 / 3))


def test_a_prediction_that_is_no_number_is_not_hidden():
    prediction, target = some_images()
    prediction[0] = torch.nan
    assert DepthCompletionMetrics(["rmse", "delta1"])(prediction, target)["rmse"].isnan()


@pytest.mark.parametrize("reduction", ["mean", "pooled"])
def test_shards_merge_to_exactly_the_whole(reduction):
    prediction, target = some_images()
    whole = DepthCompletionMetrics(reduction=reduction)
    whole.update(prediction, target)
    shards = [DepthCompletionMetrics(reduction=reduction) for _ in range(3)]
    for i in range(6):
        shards[i % 3].update(prediction[i : i + 1], target[i : i + 1])
    shards[0].merge_state(shards[1])
    shards[0].merge_state(shards[2])
    merged = shards[0].compute()
    for name, value in whole.compute().items():  # the order of summation costs the last digits of float64
        torch.testing.assert_close(merged[name], value, rtol=1e-13, atol=0)


def test_a_metric_goes_on_after_inference_mode():
    prediction, target = some_images()
    metric = DepthCompletionMetrics()
    with torch.inference_mode():
        expected = metric(prediction, target)["rmse"].item()
        metric.reset()
    metric.update(prediction, target)
    assert metric.compute()["rmse"].item() == expected


def test_errors_are_differentiable():
    prediction, target = some_images()
    prediction.requires_grad_()
    depth_errors(prediction, target, ["rmse"])["rmse"].sum().backward()
    assert (prediction.grad[target == 0] == 0).all()
    assert (prediction.grad[target > 0] != 0).all()


def test_mistakes_are_told_before_work():
    with pytest.raises(ValueError, match=r"expected names out of .*'rmse'.*got \['rsme'\]"):
        DepthCompletionMetrics(["rsme"])
    with pytest.raises(ValueError, match="reduction must be one of mean, pooled, got 'sum'"):
        DepthCompletionMetrics(reduction="sum")
    with pytest.raises(ValueError, match="min_depth must be > 0"):
        DepthCompletionMetrics(min_depth=0)
    with pytest.raises(ValueError, match=r"of one shape, got \[1, 1, 4, 4\] and \[1, 1, 4, 5\]"):
        depth_errors(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5))
