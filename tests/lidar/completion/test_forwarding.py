import pytest
import torch
from torch import Tensor, nn

from lightning_eff.lidar.completion.forwarding import DepthForward

RGB = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
SPARSE = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))


class Positional(nn.Module):
    def forward(self, rgb: Tensor, sparse: Tensor, scale: float = 2.0) -> Tensor:
        return scale * sparse + rgb.mean(1, keepdim=True)


class SparseToDenseStyle(nn.Module):
    def forward(self, x: dict) -> Tensor:
        return x["d"] + x["g"] + 0 * x["rgb"][:, :1]


class NLSPNStyle(nn.Module):
    def forward(self, sample: dict) -> dict:
        return {"pred": sample["dep"] + sample["rgb"][:, :1], "confidence": sample["dep"]}


class Cached(nn.Module):
    images = 0

    def encode_image(self, rgb: Tensor) -> dict:
        self.images += len(rgb)
        return {"mean": rgb.mean(1, keepdim=True), "levels": [rgb]}

    def decode(self, features: dict, sparse: Tensor) -> Tensor:
        assert len(features["levels"][0]) == len(sparse)
        return features["mean"] + sparse

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        return self.decode(self.encode_image(rgb), sparse)


def test_two_arguments_are_image_and_depth():
    assert torch.equal(DepthForward(Positional())(RGB, SPARSE), Positional()(RGB, SPARSE))


def test_one_argument_is_a_dict_in_the_words_of_either_family():
    grey = 0.299 * RGB[:, :1] + 0.587 * RGB[:, 1:2] + 0.114 * RGB[:, 2:]
    torch.testing.assert_close(DepthForward(SparseToDenseStyle())(RGB, SPARSE), SPARSE + grey)
    assert torch.equal(DepthForward(NLSPNStyle())(RGB, SPARSE), SPARSE + RGB[:, :1])


def test_wrapped_models_are_called_as_what_they_wrap():
    assert DepthForward(torch.compile(SparseToDenseStyle())).forward == "dict"
    assert DepthForward(torch.compile(Positional())).forward == "positional"


def test_a_callable_wins():
    depth = DepthForward(Positional(), lambda model, rgb, sparse: model(rgb, sparse, scale=3.0))(RGB, SPARSE)
    assert torch.equal(depth, Positional()(RGB, SPARSE, scale=3.0))


def test_a_style_can_be_told():
    class Free(nn.Module):
        def forward(self, *args):
            return args[0]["d"]

    assert torch.equal(DepthForward(Free(), "dict")(RGB, SPARSE), SPARSE)


def test_an_unknown_signature_is_told_at_once():
    class Three(nn.Module):
        def forward(self, rgb, sparse, intrinsics):
            return sparse

    with pytest.raises(ValueError, match=r"got Three.forward\(rgb, sparse, intrinsics\); pass forward="):
        DepthForward(Three())
    with pytest.raises(ValueError, match=r"expected forward 'auto', .* got 'keyword'"):
        DepthForward(Positional(), "keyword")


def test_another_shape_is_told_with_what_came():
    class Small(nn.Module):
        def forward(self, rgb, sparse):
            return sparse[..., ::2, ::2]

    with pytest.raises(ValueError, match=r"Small.* shape \[2, 1, 2, 3\] for sparse \[2, 1, 4, 6\]; pass forward="):
        DepthForward(Small())(RGB, SPARSE)


def test_another_answer_is_told_with_what_came():
    class Pyramid(nn.Module):
        def forward(self, rgb, sparse):
            return sparse, sparse[..., ::2, ::2]

    class Named(nn.Module):
        def forward(self, batch):
            return {"depth": batch["d"]}

    with pytest.raises(TypeError, match=r"gave a tuple of \[2, 1, 4, 6\], \[2, 1, 2, 3\] where depth was expected"):
        DepthForward(Pyramid())(RGB, SPARSE)
    with pytest.raises(TypeError, match=r"gave a dict with keys \['depth'\]"):
        DepthForward(Named())(RGB, SPARSE)


def test_an_error_of_the_model_says_how_it_was_called():
    class Strict(nn.Module):
        def forward(self, batch):
            return batch["lidar"]

    with pytest.raises(KeyError, match="lidar") as raised:
        DepthForward(Strict())(RGB, SPARSE)
    assert raised.value.__notes__ == [
        "while calling Strict({'rgb', 'g', 'd', 'dep'}) with rgb [2, 3, 4, 6] and sparse [2, 1, 4, 6]; pass forward=, "
        "a callable (model, rgb, sparse) -> depth [B, 1, H, W] in metres"
    ]


def test_one_image_is_encoded_once_for_many_depths():
    model = Cached()
    complete = DepthForward(model).of_image(RGB[:1])
    assert torch.equal(complete(SPARSE), Positional()(RGB[:1].expand(2, -1, -1, -1), SPARSE, scale=1.0))
    complete(SPARSE[:1])
    assert model.images == 1


def test_one_image_is_repeated_where_it_cannot_be_encoded_alone():
    for forward in (DepthForward(Positional()), DepthForward(Cached(), lambda model, rgb, sparse: model(rgb, sparse))):
        expected = forward(RGB[:1].expand(2, -1, -1, -1), SPARSE)
        assert torch.equal(forward.of_image(RGB[:1])(SPARSE), expected)


def test_a_model_without_an_image_takes_none():
    class DepthOnly(nn.Module):
        def forward(self, rgb, sparse):
            assert rgb is None
            return 2 * sparse

    assert torch.equal(DepthForward(DepthOnly()).of_image(None)(SPARSE), 2 * SPARSE)
