"""The same with Lightning: `python lightning_module.py --epochs 10`. Needs lightning and scikit-learn.

The sparsifier is made where the optimizer is; its state goes into Lightning's checkpoints.
"""

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxdbsr
from fxdbsr.digits import load_digits


class SparseNet(lightning.LightningModule):
    """A classifier of digits half of whose MACs go in training."""

    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
        self.net = fxdbsr.prepare(net, block_size=(8, 8))
        self.sparsifier_state: dict[str, Any] | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        """The optimizer, the schedule, and the sparsifier that rides along."""
        groups = fxdbsr.param_groups(self.net, weight_decay=5e-4)
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, cycle_momentum=False)
        self.sparsifier = fxdbsr.Sparsifier(
            self.net, optimizer, target=0.5, of="macs", steps=steps,
            example_inputs=torch.zeros(1, 1, 32, 32, device=self.device),
        )  # fmt: skip
        if self.sparsifier_state is not None:
            self.sparsifier.load_state_dict(self.sparsifier_state)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The sparsifier's state belongs to the run's."""
        checkpoint["sparsifier"] = self.sparsifier.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Kept until there is a sparsifier."""
        self.sparsifier_state = checkpoint["sparsifier"]


def main(epochs: int, folder: str, resume: str | None) -> None:
    """Train, convert, report."""
    lightning.seed_everything(0)
    digits = load_digits()
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), 64, shuffle=True, drop_last=True)
    model = SparseNet()
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, logger=False, enable_progress_bar=False)
    trainer.fit(model, loader, ckpt_path=resume)

    fast = fxdbsr.convert(model.net.cpu())
    with torch.no_grad():
        hits = (fast(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    print(fxdbsr.report(fast, digits.test_images[:1]))
    print(f"{model.sparsifier.sparsity():.1%} of the MACs are zero, accuracy {hits:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--resume")
    args = parser.parse_args()
    main(args.epochs, args.folder, args.resume)
