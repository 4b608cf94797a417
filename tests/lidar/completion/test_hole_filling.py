import pytest
import torch
from torch.nn import functional as F

from lightning_eff.lidar.completion.hole_filling import PullPushCompletion, pull_push


def scattered(images: int = 3, height: int = 13, width: int = 21, share: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    depth = 2 + 60 * torch.rand(images, 1, height, width, generator=generator)
    return depth * (torch.rand(images, 1, height, width, generator=generator) < share)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (16, 16), (13, 21), (88, 304)])
def test_constant_scene_is_completed_exactly(size):
    sparse = torch.zeros(1, 1, *size)
    sparse[..., -1, size[1] // 2] = 16.0
    sparse[..., 0, 0] = 16.0
    assert torch.equal(pull_push(sparse), torch.full_like(sparse, 16.0))


def test_measured_points_are_kept():
    sparse = scattered()
    dense = pull_push(sparse)
    assert torch.equal(dense[sparse > 0], sparse[sparse > 0])
    assert (dense >= sparse[sparse > 0].min() * (1 - 1e-5)).all()
    assert (dense <= sparse.max() * (1 + 1e-5)).all()


def test_an_empty_image_takes_the_depth_it_is_told():
    sparse = scattered()
    sparse[1] = 0
    dense = PullPushCompletion(empty_depth=20.0)(None, sparse)
    torch.testing.assert_close(dense[1], torch.full_like(dense[1], 20.0))
    assert torch.equal(dense[0], pull_push(sparse[:1])[0])


def test_images_of_a_batch_do_not_touch():
    sparse = scattered(4)
    one_by_one = torch.cat([pull_push(image[None]) for image in sparse])
    assert torch.equal(pull_push(sparse), one_by_one)


def test_a_two_by_two_hole_by_hand():
    # inverse depths 1/2 and 1/4 average to 3/8, which is all that the level above has
    sparse = torch.tensor([[2.0, 0.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    torch.testing.assert_close(pull_push(sparse).view(2, 2), torch.tensor([[2.0, 8 / 3], [8 / 3, 4.0]]))


def test_a_hole_between_two_depths_is_pushed_bilinearly():
    # the level above holds the inverse depths 1, 1/4; a quarter of the way between its centres lies the second pixel
    sparse = torch.tensor([1.0, 0.0, 0.0, 4.0]).view(1, 1, 1, 4)
    expected = [1.0, 1 / (0.75 * 1 + 0.25 / 4), 1 / (0.25 * 1 + 0.75 / 4), 4.0]
    torch.testing.assert_close(pull_push(sparse).flatten(), torch.tensor(expected))


def test_gradients_are_right():
    sparse = scattered(2, 5, 6, share=0.4).double()
    known = sparse > 0

    def filled(depth):
        return pull_push(torch.where(known, depth, 0))

    assert torch.autograd.gradcheck(filled, sparse.requires_grad_())


def test_half_precision_and_channels_last_are_taken():
    sparse = scattered()
    dense = pull_push(sparse)
    torch.testing.assert_close(pull_push(sparse.to(memory_format=torch.channels_last)), dense)
    half = pull_push(sparse.bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.l1_loss(half.float().reciprocal(), dense.reciprocal()) < 0.01


def test_empty_depth_must_be_positive():
    with pytest.raises(ValueError, match="empty_depth must be > 0, got 0"):
        PullPushCompletion(0)
