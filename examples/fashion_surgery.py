"""Cut channels out of any network by a plan of your own: no technique, no callback, an optimizer that goes on.

A small convolutional network learns Fashion-MNIST in a loop of plain PyTorch. A plan keeps the channels of largest L1
norm, half of every layer; `apply_plan` cuts them out of the network and its optimizer in place, and the same loop goes
on. Halfway through fine-tuning everything is saved and read back into new objects, as after a crash, and ends in the
same weights. The cut network is exported as a PyTorch program and to ONNX and run from both files.

Run: python examples/fashion_surgery.py          (three quarters of a minute on one core)
     python examples/fashion_surgery.py --fast   (few images, to see that it works)
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff import FashionMNISTDataModule
from lightning_eff.reporting import Column, Table
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan, export_model, load_pruned, save_pruned

Batch = tuple[Tensor, Tensor]


class Net(nn.Sequential):
    """Three convolutions of 16, 32 and 64 channels, 24,170 parameters."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """One step a batch."""
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in batches]
    return float(torch.cat(right).float().mean())


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=2e-3)


def resumed(out: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Network and optimizer in new objects, as a new process would make them."""
    model = load_pruned(Net(), out / "half_way.pt")  # takes the shapes of the file
    optimizer = adam(model)
    optimizer.load_state_dict(torch.load(out / "half_way_optimizer.pt", weights_only=True))
    return model, optimizer


@torch.no_grad()
def exported(model: nn.Module, images: Tensor, out: Path) -> list[str]:
    """Write the network as programs, run them, and tell how far their outputs are from its own."""
    expected, told = model.eval()(images), []
    program = torch.export.load(export_model(model, images, out / "small.pt2")).module()
    told.append(f"small.pt2 differs by {float((program(images) - expected).abs().max()):.1e}")
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        import onnxruntime

        session = onnxruntime.InferenceSession(export_model(model, images, out / "small.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        told.append(f"small.onnx differs by {float((torch.from_numpy(found) - expected).abs().max()):.1e}")
    else:
        told.append("no ONNX: python -m pip install onnx onnxscript onnxruntime")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little data, few steps: to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion_surgery"), help="folder of results")
    parser.add_argument("--data", default=None, help="folder with the idx files, if not Debian's or a download")
    args = parser.parse_args()
    L.seed_everything(args.seed, verbose=False)
    data = FashionMNISTDataModule(
        root=args.data, train_size=512 if args.fast else 20_000, val_size=1, test_size=256 if args.fast else None
    )
    data.prepare_data()
    data.setup()
    batches, test = ([tuple(batch) for batch in loader] for loader in (data.train_dataloader(), data.test_dataloader()))

    model = Net()
    optimizer = adam(model)
    for _ in range(1 if args.fast else 3):
        train(model, optimizer, batches)
    images = batches[0][0][:8]
    graph = ChannelGraph.from_model(model, images)
    rows = [["whole", round(graph.params().item()), round(graph.macs().item()), accuracy(model, test)]]

    half = {name: graph.groups[name].size // 2 for name in graph.prunable}
    plan = PruningPlan.from_scores(graph, graph.weight_norms(model, p=1), half)
    plan.save(args.out / "plan.json")
    cut = apply_plan(model, plan, images, graph=graph, optimizers=[optimizer])
    rows.append(["cut", cut.params[1], cut.macs[1], accuracy(model, test)])

    middle = len(batches) // 2
    train(model, optimizer, batches[:middle])
    save_pruned(model, args.out / "half_way.pt")
    torch.save(optimizer.state_dict(), args.out / "half_way_optimizer.pt")
    again, its_optimizer = resumed(args.out)
    for network, its in ((model, optimizer), (again, its_optimizer)):
        train(network, its, batches[middle:])
    rows.append(["fine-tuned", cut.params[1], cut.macs[1], accuracy(model, test)])
    same = all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))

    columns = ["network", Column("parameters", ","), Column("MACs", ","), Column("test accuracy", ".3f")]
    table = Table("Half of every layer, by L1 norm", columns, rows, "Fine-tuned: one more pass over the images.")
    table.print()
    table.save(args.out / "accuracy.md")
    print(f"the resumed network has {'the same weights' if same else 'OTHER WEIGHTS'}")
    print("\n".join(exported(model, images, args.out)))
    print(f"plan, table, programs: {args.out}")


if __name__ == "__main__":
    main()
