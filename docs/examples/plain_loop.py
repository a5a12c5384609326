"""A training loop of your own, to a net whose convs multiply half as much: `python plain_loop.py --epochs 10`.

Needs scikit-learn for the images. What fxdbsr adds to the loop is marked by (1) to (4).
"""

import argparse

import torch
import torch.nn.functional as F
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
    """Train, convert, report."""
    torch.manual_seed(0)
    digits = load_digits()
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), 64, shuffle=True, drop_last=True)
    steps = epochs * len(loader)
    example = digits.test_images[:1]

    model = fxdbsr.prepare(make_net(), block_size=(8, 8))  # (1) every conv gets a scale for each block
    groups = fxdbsr.param_groups(model, weight_decay=5e-4)  # (2) weight decay for weights alone
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=False)
    sparsifier = fxdbsr.Sparsifier(  # (3) rides along with the optimizer's steps
        model, optimizer, target=0.5, of="macs", steps=steps, example_inputs=example
    )
    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {sparsifier.sparsity():.1%} of the MACs are zero")

    fast = fxdbsr.convert(model)  # (4) the blocks that are left, packed
    with torch.no_grad():
        hits = (fast(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    print(fxdbsr.report(fast, example))
    print(f"accuracy {hits:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
