"""Fashion-MNIST from the three places it may be in."""

import gzip
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_eff.data import FashionMNISTDataModule, fashion_mnist
from lightning_eff.data.fashion_mnist import DEBIAN, FILES, read_idx


def find():
    return FashionMNISTDataModule()._find()


needs_data = pytest.mark.skipif(
    find() is None, reason="Fashion-MNIST found neither in Debian's place (dataset-fashion-mnist) nor in the cache"
)


@pytest.fixture(scope="module")
def data():
    data = FashionMNISTDataModule(download=False)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without Debian's package and with an empty cache."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no-debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@needs_data
def test_parts_have_the_sizes_asked_for(data):
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [55_000, 5_000, 10_000]


@needs_data
def test_classes_are_balanced_in_the_test_set(data):
    assert torch.bincount(data.test_set.labels).tolist() == [1000] * 10


@needs_data
def test_batches_are_normalized_grey_images(data):
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (128, 1, 28, 28)
    assert labels.dtype == torch.int64
    images, _ = next(iter(DataLoader(data.train_set, batch_size=55_000)))
    # 55,000 of the 60,000 images the constants (four digits) come from
    assert images.mean().abs() < 2e-3
    assert (images.std() - 1).abs() < 2e-3


@needs_data
def test_images_fit_a_network_that_takes_colour_and_a_larger_size():
    data = FashionMNISTDataModule(channels=3, image_size=64, train_size=100, test_size=10, batch_size=8)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 64, 64)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (len(data.train_set), len(data.test_set)) == (100, 10)


@needs_data
def test_smaller_training_set_is_part_of_the_larger_one_and_spares_validation(data):
    small = FashionMNISTDataModule(train_size=500)
    small.setup()
    assert torch.equal(small.train_set.images, data.train_set.images[:500])
    assert torch.equal(small.val_set.images, data.val_set.images)


@needs_data
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "raw"])
def test_root_comes_before_all_other_places(tmp_path, data, folder, zipped):
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = fashion_mnist._existing(data.source, name)
        if zipped and path.suffix == ".gz":
            shutil.copy(path, place)
        else:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            (place / name).write_bytes(content)
    copied = FashionMNISTDataModule(root=tmp_path)
    copied.prepare_data()
    copied.setup()
    assert copied.source == place
    assert torch.equal(copied.test_set.images, data.test_set.images)


@needs_data
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debian_package_is_used_and_named_when_root_lacks_the_files(tmp_path, caplog):
    data = FashionMNISTDataModule(root=tmp_path)
    with caplog.at_level("INFO"):
        data.prepare_data()
        data.setup()
    assert data.source == DEBIAN
    assert f"Fashion-MNIST is read from {DEBIAN}" in caplog.text


@pytest.mark.usefixtures("nowhere")
def test_three_ways_are_named_when_none_works(tmp_path):
    data = FashionMNISTDataModule(root=tmp_path, download=False)
    for step in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=r"root=.*dataset-fashion-mnist.*download=True"):
            step()


@pytest.mark.usefixtures("nowhere")
def test_failed_download_names_the_three_ways_and_its_cause(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", refuse)
    with pytest.raises(FileNotFoundError, match=r"the download failed.*root=.*dataset-fashion-mnist") as caught:
        FashionMNISTDataModule().prepare_data()
    assert isinstance(caught.value.__cause__, RuntimeError)


@needs_data
def test_download_goes_to_the_cache_and_is_read_from_there(monkeypatch, tmp_path, data):
    source = data.source
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no-debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def download(root, *, download):
        shutil.copytree(source, f"{root}/FashionMNIST/raw")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    fresh = FashionMNISTDataModule()
    fresh.prepare_data()
    fresh.setup()
    assert fresh.source == tmp_path / "cache/lightning_eff/FashionMNIST/raw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 2}, "expected channels to be 1 or 3, got 2"),
        ({"image_size": 0}, "image_size must be a whole number >= 1, got 0"),
        ({"val_size": 0}, "val_size must be a whole number >= 1, got 0"),
        ({"val_size": 30_000, "train_size": 40_000}, r"expected val_size \+ train_size <= 60,000, got 30000 \+ 40000"),
        ({"test_size": 10_001}, "expected test_size <= 10,000, got 10001"),
        ({"train_size": 1.5}, "train_size must be a whole number >= 1, got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_data_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        FashionMNISTDataModule(**arguments)


def test_file_that_is_no_idx_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(ValueError, match="expected an idx file of unsigned bytes"):
        read_idx(tmp_path / "x")


def test_cut_idx_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x05abc")
    with pytest.raises(ValueError, match=r"expected 5 bytes for shape \[5\] .* got 3"):
        read_idx(tmp_path / "x")
