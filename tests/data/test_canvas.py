"""Scenes with a picture somewhere: what is in them, and that they stay the same where they should."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.data import CanvasDataModule, FashionMNISTDataModule

needs_fashion = pytest.mark.skipif(
    FashionMNISTDataModule()._find() is None, reason="Fashion-MNIST found neither in Debian's place nor in the cache"
)


def make(**options):
    data = CanvasDataModule(**options)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def digits():
    return make()


def cut(scenes, boxes):
    """What lies in the boxes of scenes."""
    return torch.stack([scene[:, y:b, x:r] for scene, (y, x, b, r) in zip(scenes, boxes.int().tolist(), strict=True)])


def test_a_scene_holds_its_picture_in_its_box_and_nothing_else(digits):
    scenes, labels = next(iter(digits.val_dataloader()))
    assert (scenes.shape, scenes.dtype, labels.dtype) == ((64, 1, 96, 96), torch.float32, torch.int64)
    pictures = digits.val_set.pictures.__getitems__(list(range(64)))
    inside = cut(scenes, digits.val_set.boxes[:64])
    assert torch.equal(inside, torch.stack([picture for picture, _ in pictures]))
    assert torch.equal(labels, torch.stack([label for _, label in pictures]))
    torch.testing.assert_close(scenes.sum((1, 2, 3)), inside.sum((1, 2, 3)))


def test_pixels_lie_between_zero_and_one(digits):
    scenes, _ = next(iter(digits.test_dataloader()))
    assert (scenes.min(), scenes.max()) == (0, 1)


def test_digits_are_all_used_once_and_enlarged(digits):
    sets = (digits.train_set, digits.val_set, digits.test_set)
    assert [len(part) for part in sets] == [1097, 200, 500]
    stored = torch.cat([part.pictures.images.flatten(1) for part in sets])
    assert len(stored.unique(dim=0)) == 1797
    assert digits.test_set[0][0].shape == (1, 96, 96)
    # bilinear enlargement keeps the mean of the inner part; a picture of 8 x 8 is not pasted as it is
    assert ((digits.test_set.boxes[:, 2:] - digits.test_set.boxes[:, :2]) == 16).all()


def test_the_test_set_has_every_class_alike(digits):
    assert torch.bincount(digits.test_set.pictures.labels).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]


def test_places_reach_every_corner_and_are_spread_evenly(digits):
    corners = digits.train_set.boxes_of(list(range(20_000)))[:, :2]
    assert (corners.min(), corners.max()) == (0, 80)
    # of 81 places an axis: mean 40, deviation 23.4, of which 20,000 draws know the mean to 0.17
    assert (corners.mean(0) - 40).abs().max() < 0.7
    assert (corners.std(0) - 23.4).abs().max() < 0.5


def test_scenes_may_be_wide():
    data = make(canvas=(32, 80), batch_size=500)
    scenes, _ = next(iter(data.test_dataloader()))
    assert scenes.shape == (500, 1, 32, 80)
    boxes = data.test_set.boxes
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (32, 80)


@needs_fashion
def test_clothes_lie_in_scenes_as_stored():
    data = make(dataset="fashion_mnist", canvas=64, train_size=1000, val_size=100, test_size=100)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [1000, 100, 100]
    scenes, labels = next(iter(data.test_dataloader()))
    plain = FashionMNISTDataModule(val_size=100, train_size=1000, test_size=100, normalize=False)
    plain.setup()
    pictures, expected = next(iter(plain.test_dataloader()))
    assert torch.equal(cut(scenes, data.test_set.boxes[:64]), pictures[:64])
    assert torch.equal(labels, expected[:64])


def test_clutter_is_fragments_of_other_pictures_beside_the_picture():
    data, plain = make(clutter=16), make()
    scenes, without = next(iter(data.val_dataloader()))[0], next(iter(plain.val_dataloader()))[0]
    assert (scenes >= without).all()  # the brighter one is seen
    more = (scenes > without).float().mean()
    # 16 fragments of 64 pixels cover 0.1 of 96 x 96; about half of a digit's pixels are not black
    assert 0.02 < more < 0.11
    assert torch.equal(data.val_set.boxes, plain.val_set.boxes)


def test_scenes_of_validation_and_test_are_always_the_same_and_differ_from_each_other(digits):
    again = make()
    for one, other in ((digits.val_set, again.val_set), (digits.test_set, again.test_set)):
        assert torch.equal(one[7][0], other[7][0])
        assert torch.equal(one.__getitems__([3, 7])[1][0], one[7][0])
    assert not torch.equal(digits.val_set.boxes[:200], digits.test_set.boxes[:200])


def test_another_seed_gives_other_parts_places_and_order(digits):
    other = make(seed=1)
    assert not torch.equal(digits.test_set.pictures.images, other.test_set.pictures.images)
    assert not torch.equal(digits.test_set.boxes, other.test_set.boxes)


def test_a_picture_lies_elsewhere_in_every_epoch(digits):
    loader = digits.train_dataloader()
    seen = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        seen.append(sorted(loader.sampler))
    assert seen[0] == seen[2] == list(range(1097))
    assert seen[1] == list(range(1097, 2 * 1097))
    (first, label), (second, same_label) = digits.train_set[5], digits.train_set[5 + 1097]
    assert label == same_label
    assert not torch.equal(first, second)
    boxes = digits.train_set.boxes_of([5, 5 + 1097])
    assert torch.equal(*cut(torch.stack([first, second]), boxes))


def test_the_global_generators_are_left_alone(digits):
    state = torch.get_rng_state()
    make(clutter=2).train_set.__getitems__([0, 1])
    list(digits.train_dataloader().sampler)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_digits_but_those_of_the_test_may_be_trained_on():
    data = make(val_size=0)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [1297, 0, 500]
    model = Recorder()
    quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(model, datamodule=data)
    assert len(model.seen) == 2


class Recorder(L.LightningModule):
    """Remembers which scenes it saw."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        return self.layer(batch[0].mean((2, 3))).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def quiet_trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False, **options},
    )


def test_a_resumed_run_sees_the_scenes_of_the_uninterrupted_one(tmp_path):
    def fit(ckpt_path=None, **options):
        model = Recorder()
        trainer = quiet_trainer(max_epochs=2, limit_train_batches=5, **options)
        trainer.fit(model, datamodule=CanvasDataModule(canvas=32, batch_size=16), ckpt_path=ckpt_path)
        return model.seen

    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit(callbacks=[every_step], enable_checkpointing=True)
    rest = fit(tmp_path / "step=7.ckpt")
    assert len(straight) == 10
    assert len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(straight[7:], rest, strict=True))


def test_workers_hand_out_the_same_scenes(digits):
    several = make(num_workers=2)
    one, other = next(iter(digits.train_dataloader())), next(iter(several.train_dataloader()))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnist"}, "dataset must be one of digits, fashion_mnist, got 'mnist'"),
        ({"canvas": 12}, "smaller side of canvas must be a whole number >= 16, got 12"),
        ({"canvas": (96, 20), "picture_size": 24}, "smaller side of canvas must be a whole number >= 24, got 20"),
        ({"clutter": -1}, "clutter must be a whole number >= 0, got -1"),
        ({"clutter": 1, "picture_size": 4}, "picture_size must be a whole number >= 8, got 4"),
        ({"val_size": -1}, "val_size must be a whole number >= 0, got -1"),
        ({"dataset": "fashion_mnist", "val_size": 0}, "val_size must be a whole number >= 1, got 0"),
        ({"test_size": 0}, "test_size must be a whole number >= 1, got 0"),
        ({"train_size": 1200}, r"train_size \+ val_size \+ test_size <= 1,797, got 1200 \+ 200 \+ 500"),
        ({"dataset": "fashion_mnist", "test_size": 10_001}, "test_size <= 10,000, got at least 1 .* and 10001"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        CanvasDataModule(**options)
