"""A cut network can be exported and gives the same outputs without its Python class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import build
from test_cut import half_plan

from lightning_eff.surgery import ChannelGraph, apply_plan, export_model


@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2"])
def test_exported_program_gives_the_cut_models_outputs_at_any_batch(name: str, tmp_path: Path) -> None:
    model, x = build(name)
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)
    path = export_model(model, x, tmp_path / "net.pt2")
    program = torch.export.load(path).module()
    many = torch.cat([x, x + 1])
    assert model.training
    model.eval()
    assert torch.allclose(program(many), model(many), rtol=1e-4, atol=1e-5)


def test_onnx_file_gives_the_cut_models_outputs_and_is_smaller(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build("ResNet-18")
    dense = export_model(model, x, tmp_path / "dense.onnx")
    apply_plan(model, half_plan(ChannelGraph.from_model(model, x)), x)
    path = export_model(model, x, tmp_path / "cut.onnx")
    assert path.stat().st_size < 0.3 * dense.stat().st_size
    session = onnxruntime.InferenceSession(path)
    many = torch.cat([x, x + 1])
    (got,) = session.run(None, {session.get_inputs()[0].name: many.numpy()})
    assert torch.allclose(torch.from_numpy(got), model.eval()(many), rtol=1e-3, atol=1e-4)


def test_model_with_named_inputs_is_exported(tmp_path: Path) -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.b(torch.relu(self.a(x)) + shift)}

    model, inputs = Named(), {"x": torch.randn(4, 3), "shift": torch.randn(4, 1)}
    apply_plan(model, half_plan(ChannelGraph.from_model(model, inputs)), inputs)
    program = torch.export.load(export_model(model, inputs, tmp_path / "net.pt2")).module()
    one = {key: value[:1] for key, value in inputs.items()}
    assert torch.allclose(program(**one)["y"], model(**one)["y"])


def test_unknown_ending_is_refused(tmp_path: Path) -> None:
    model, x = build("SmallCNN")
    with pytest.raises(ValueError, match=r"\.pt2 or \.onnx"):
        export_model(model, x, tmp_path / "net.tflite")
