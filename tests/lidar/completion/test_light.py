import pytest
import torch
from torch import Tensor

from lightning_eff.lidar.completion.hole_filling import pull_push
from lightning_eff.lidar.completion.light import LightDepthCompletionNet


def batch(size: int = 3, height: int = 21, width: int = 38) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(size, 3, height, width, generator=generator)
    sparse = 2 + 50 * torch.rand(size, 1, height, width, generator=generator)
    return rgb, sparse * (torch.rand(size, 1, height, width, generator=generator) < 0.1)


def busy_net() -> LightDepthCompletionNet:
    """A network whose output is not 0, as it is before training."""
    torch.manual_seed(0)
    net = LightDepthCompletionNet(width=8)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net


def test_width_16_has_180_thousand_parameters():
    assert sum(p.numel() for p in LightDepthCompletionNet().parameters()) == 181_377


def test_training_starts_at_pull_push():
    rgb, sparse = batch()
    assert torch.equal(LightDepthCompletionNet()(rgb, sparse), pull_push(sparse))


def test_encoding_then_decoding_is_the_whole():
    net, (rgb, sparse) = busy_net(), batch()
    assert torch.equal(net.decode(net.encode_image(rgb), sparse), net(rgb, sparse))
    assert not torch.equal(net(rgb, sparse), pull_push(sparse))


def test_features_of_one_image_serve_many_depths():
    net, (rgb, sparse) = busy_net(), batch()
    torch.testing.assert_close(
        net.decode(net.encode_image(rgb[:1]), sparse), net(rgb[:1].expand(3, -1, -1, -1), sparse), rtol=1e-5, atol=1e-4
    )


def test_a_frame_does_not_depend_on_its_batch_nor_on_the_mode():
    net, (rgb, sparse) = busy_net(), batch()
    one_by_one = torch.cat([net(rgb[i : i + 1], sparse[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(rgb, sparse), one_by_one, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(net.eval()(rgb, sparse), one_by_one, rtol=1e-5, atol=1e-4)


def test_an_image_without_depth_gets_one():
    depth = busy_net()(batch()[0], torch.zeros(3, 1, 21, 38))
    assert depth.isfinite().all()
    assert (depth > 0).all()


def test_it_learns_what_pull_push_cannot_know():
    """Depth steps where brightness does, between points that lie too far apart to show the step."""
    torch.manual_seed(0)
    net = LightDepthCompletionNet(width=8)
    column = torch.randint(4, 28, (8, 1, 1, 1))
    near = torch.arange(32).view(1, 1, 1, 32).expand(8, 1, 16, 32) < column
    gt = torch.where(near, 5.0, 20.0)
    rgb = near.float().expand(8, 3, 16, 32)
    sparse = torch.zeros_like(gt)
    sparse[..., ::8, ::31] = gt[..., ::8, ::31]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = (net(rgb, sparse).log() - gt.log()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    filling = (pull_push(sparse).log() - gt.log()).abs().mean()
    assert loss < 0.4 * filling


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="expected width to be a multiple of 4, got 6"):
        LightDepthCompletionNet(6)
    with pytest.raises(ValueError, match="image_channels must be a whole number >= 1, got 0"):
        LightDepthCompletionNet(image_channels=0)
