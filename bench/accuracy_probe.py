"""What one fixed batch tells of the blocks of a net: the loss, each block's share of the outputs, its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.accuracy_setting import Setting, load
from fxdbsr.layers import blocked_layers

BATCH = 256


class Probe:
    """The first `BATCH` training images of `setting` on `model`, prepared; leaves the model as it is."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model, self.layers = model, blocked_layers(model)
        data = load(setting.data, setting.draw)
        self._images, self._labels = data.train_images[:BATCH], data.train_labels[:BATCH]

    @torch.no_grad()
    def loss(self) -> float:
        """On the fixed batch, with its own statistics in the batch norms, which stay as they are."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        loss = float(F.cross_entropy(self.model(self._images), self._labels))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return loss

    def explained(self) -> list[Tensor]:
        """Energy of each block's part of the output behind the batch norm, over the weights of the block."""
        energy: dict[int, Tensor] = {}

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[id(layer)] = inputs[0].square().mean((0, 2, 3))

        users = [layer.users[0] for layer in self.layers]
        hooks = [user.register_forward_pre_hook(note) for user in users]
        self.loss()
        for hook in hooks:
            hook.remove()
        found = []
        for layer, user in zip(self.layers, users, strict=True):
            norm = self._norm_behind(user)
            assert norm.running_var is not None
            gain = norm.weight.square() / (norm.running_var + norm.eps)
            part = layer.weight.square() * energy[id(user)][None, :, None, None] * gain[:, None, None, None]
            score = layer.scale.square() * layer.grid.block_sum(part) / layer.grid.numel()
            found.append(score.flatten())
        return found

    def _norm_behind(self, layer: nn.Module) -> nn.BatchNorm2d:
        names = {id(module): name for name, module in self.model.named_modules()}
        node = next(n for n in self.model.graph.nodes if n.target == names[id(layer)])  # type: ignore[union-attr]
        norm = self.model.get_submodule(str(next(iter(node.users)).target))
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    @torch.no_grad()
    def gradients(self, off: Sequence[Tensor]) -> list[Tensor]:
        """Mean square of the loss's gradient over each block's weights, blocks of `off` at zero weights."""
        with torch.enable_grad():
            weights = [layer.weight.detach().clone() for layer in self.layers]
            masks = [layer.mask.clone() for layer in self.layers]
            with torch.no_grad():
                for layer, o in zip(self.layers, off, strict=True):
                    layer.weight.mul_(layer.grid.expand_mask(~o.view(layer.grid.shape)))
                    layer.set_mask(torch.ones_like(layer.mask))
            loss = F.cross_entropy(self.model(self._images), self._labels)
            grads = torch.autograd.grad(loss, [layer.weight for layer in self.layers])
        for layer, weight, mask in zip(self.layers, weights, masks, strict=True):
            layer.weight.copy_(weight)
            layer.set_mask(mask)
        return [
            (layer.grid.block_sum(g.square()) / layer.grid.numel()).flatten()
            for layer, g in zip(self.layers, grads, strict=True)
        ]
