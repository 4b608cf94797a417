import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.lidar.completion.sparse_to_dense import SparseToDenseResNet


@pytest.mark.parametrize(("layers", "millions", "gflop"), [(18, 16.0, 586), (34, 26.1, 1091)])
def test_size_is_that_of_the_published_network(layers, millions, gflop):
    with torch.device("meta"):
        model = SparseToDenseResNet(layers).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            depth = model(torch.empty(1, 3, 352, 1216), torch.empty(1, 1, 352, 1216))
    assert depth.shape == (1, 1, 352, 1216)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=0.05e6)
    assert counter.get_total_flops() == pytest.approx(gflop * 1e9, abs=0.5e9)


def test_layers_have_the_names_of_the_published_code():
    with torch.device("meta"):
        names = SparseToDenseResNet(18, "rgbd").state_dict()
    assert {name.split(".")[0] for name in names} == {
        "conv1_d",
        "conv1_img",
        *(f"conv{i}" for i in range(2, 7)),
        *(f"convt{i}" for i in range(1, 6)),
        "convtf",
    }
    assert names["conv1_d.0.weight"].shape == (16, 1, 3, 3)
    assert names["conv1_img.0.weight"].shape == (48, 3, 3, 3)
    assert names["conv1_img.1.running_mean"].shape == (48,)
    assert names["convt4.0.weight"].shape == (768, 128, 3, 3)
    assert names["convtf.0.bias"].shape == (1,)


def test_depth_is_signed_in_training_and_out_of_the_blind_range_in_evaluation():
    torch.manual_seed(0)
    model = SparseToDenseResNet(modality="d")
    sparse = 50 * torch.rand(2, 1, 16, 32)
    with torch.no_grad():
        model.convtf[0].bias.zero_()
        model.convtf[0].weight.normal_()
        raw = model.train()(None, sparse)
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0  # evaluation on the statistics of the batch
        model(None, sparse)
        depth = model.eval()(None, sparse)
    assert raw.min() < 0 < raw.max()
    assert depth.min() == pytest.approx(0.9)
    assert depth.max() > 0.9


@pytest.mark.parametrize("modality", ["gd", "rgbd", "d"])
def test_sizes_that_are_no_multiple_of_sixteen_are_taken(modality):
    model = SparseToDenseResNet(modality=modality).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 19, 37), torch.rand(1, 1, 19, 37)).shape == (1, 1, 19, 37)


def test_grey_network_reads_luma_alone():
    torch.manual_seed(0)
    model = SparseToDenseResNet(modality="gd").train()
    sparse, rgb = 50 * torch.rand(2, 1, 16, 16), torch.rand(2, 3, 16, 16)
    luma = (0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]).expand_as(rgb)
    with torch.no_grad():
        torch.testing.assert_close(model(rgb, sparse), model(luma, sparse), rtol=1e-3, atol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="expected layers 18 or 34, got 50"):
        SparseToDenseResNet(50)
    with pytest.raises(ValueError, match="modality must be one of gd, rgbd, d, got 'rgb'"):
        SparseToDenseResNet(modality="rgb")
    with pytest.raises(ValueError, match="expected an image with modality 'gd', got None"):
        SparseToDenseResNet()(None, torch.rand(1, 1, 16, 16))
