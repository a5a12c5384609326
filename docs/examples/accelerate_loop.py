"""The same with Hugging Face Accelerate: `accelerate launch accelerate_loop.py --epochs 10`.

Needs accelerate and scikit-learn. The sparsifier is made after `prepare`, of what that gives back.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxdbsr
from fxdbsr.digits import load_digits


def make_net() -> nn.Module:
    """A small conv net for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def main(epochs: int) -> None:
    """Train with gradients accumulated over two batches, convert, report."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    digits = load_digits()
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), 32, shuffle=True, drop_last=True)

    net = fxdbsr.prepare(make_net(), block_size=(8, 8))
    optimizer = torch.optim.SGD(fxdbsr.param_groups(net, weight_decay=5e-4), lr=0.1, momentum=0.9, nesterov=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    sparsifier = fxdbsr.Sparsifier(
        model, optimizer, target=0.5, of="macs", steps=epochs * (len(loader) // 2),
        example_inputs=torch.zeros(1, 1, 32, 32, device=accelerator.device),
    )  # fmt: skip
    accelerator.register_for_checkpointing(sparsifier)  # save_state and load_state know of it then

    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: {sparsifier.sparsity():.1%} of the MACs are zero")

    fast = fxdbsr.convert(accelerator.unwrap_model(model).cpu())
    with torch.no_grad():
        hits = (fast(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    accelerator.print(fxdbsr.report(fast, digits.test_images[:1]))
    accelerator.print(f"accuracy {hits:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
