"""The two small networks and the classifier around any network."""

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_eff.data import DigitsDataModule
from lightning_eff.models import ImageClassifier, LeNet, SmallCNN


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "parameters"), [((10, 20, 100, 25), 40_225), ((8, 9, 36, 17), 8_080)])
def test_lenet_has_the_published_number_of_parameters(channels, parameters):
    assert count(LeNet(channels=channels)) == parameters


def test_lenet_follows_convolution_pooling_relu_norm():
    assert [type(layer) for layer in LeNet().c1] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.BatchNorm2d]


def test_lenet_is_linear_after_the_convolutions():
    net = LeNet().double().eval()
    a, b = torch.randn(2, 3, 320, dtype=torch.float64)

    def head(x):
        return net.out(net.f6(net.c5(x)))

    # affine: the mean of two images of the map is the image of the mean
    torch.testing.assert_close(head((a + b) / 2), (head(a) + head(b)) / 2)


@pytest.mark.parametrize("size", [16, 28, 33])
def test_lenet_takes_images_of_its_size(size):
    assert LeNet(in_channels=3, num_classes=7, image_size=size)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_cnn_has_the_widths_and_pools_its_docstring_tells():
    layers = dict(SmallCNN(width=4).layers.named_children())
    assert [layers[f"conv{i}"].out_channels for i in range(1, 6)] == [4, 4, 8, 8, 16]
    names = list(layers)
    assert [names[names.index(pool) - 1] for pool in ("pool2", "pool4")] == ["relu2", "relu4"]


@pytest.mark.parametrize("size", [4, 8, 28])
def test_small_cnn_takes_images_of_any_size(size):
    assert SmallCNN(3, 7, 4)(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNet(channels=(1, 2, 3)), "expected channels to be four widths"),
        (lambda: LeNet(image_size=8), "image_size must be a whole number >= 16, got 8"),
        (lambda: SmallCNN(width=0), "width must be a whole number >= 1, got 0"),
        (lambda: SmallCNN(num_classes=0), "num_classes must be a whole number >= 1, got 0"),
        (lambda: ImageClassifier(SmallCNN(), lr=0), "lr must be > 0, got 0"),
        (
            lambda: ImageClassifier(SmallCNN(), optimizer="lion"),
            "optimizer must be one of adam, adamw, sgd, got 'lion'",
        ),
        (lambda: ImageClassifier(SmallCNN(), weight_decay=-1), "weight_decay must be >= 0, got -1"),
        (lambda: ImageClassifier(SmallCNN(), momentum=1), r"momentum must lie in \[0, 1\), got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimizer_is_the_one_named(name, kind):
    optimizer = ImageClassifier(SmallCNN(), lr=0.5, optimizer=name, weight_decay=0.25).configure_optimizers()
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.25)
    assert optimizer.defaults.get("momentum", 0.9) == 0.9


def test_example_input_has_a_batch_axis():
    assert ImageClassifier(SmallCNN(), example_input_shape=[1, 8, 8]).example_input_array.shape == (1, 1, 8, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    L.seed_everything(0)
    model = ImageClassifier(SmallCNN(width=8), lr=1e-2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=4, default_root_dir=tmp_path_factory.mktemp("runs"), **quiet)
    data = DigitsDataModule()
    trainer.fit(model, datamodule=data)
    return model, trainer, data


def test_digits_are_learnt(trained):
    model, trainer, data = trained
    fitted = dict(trainer.callback_metrics)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(fitted)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    assert set(tested) == {"test/loss", "test/accuracy"}
    assert tested["test/accuracy"] > 0.9  # chance is 0.1


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches(trained):
    model, trainer, data = trained
    (tested,) = trainer.test(model, datamodule=data, verbose=False)  # 360 images: the last batch is smaller
    logits = torch.cat(trainer.predict(model, datamodule=data))
    right = (logits.argmax(1) == data.test_set.labels).float().mean()
    assert tested["test/accuracy"] == pytest.approx(right.item(), abs=1e-6)  # float32 mean


def test_checkpoint_loads_with_a_new_network(trained):
    model, trainer, _ = trained
    path = trainer.checkpoint_callback.best_model_path
    loaded = ImageClassifier.load_from_checkpoint(path, net=SmallCNN(width=8), weights_only=True)
    assert loaded.lr == 1e-2
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_checkpoint_without_a_network_says_what_is_missing(trained):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'net'"):
        ImageClassifier.load_from_checkpoint(trained[1].checkpoint_callback.best_model_path, weights_only=True)
