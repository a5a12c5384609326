"""Leads: what might beat gradual block pruning, each an option of the arm `lead`, alone or together.

Options of `Setting.options` (defaults in brackets):

* scales [True]: trainable block scales; False applies a lead to the baseline.
* early [False]: scales learn from the first step, not from `begin`.
* scale_lr [1], scale_decay [0]: factor on the scales' learning rate, weight decay on the scales.
* scale_rate [0]: where not 0, the factor is this over the mean squared norm of the layer's blocks at the start.
* own_norms, clip [0]: what is done to gradients (`bench/accuracy_steps.py`).
* score ["start"]: mean squares of weights by scales of the start; "effective" by the scales as they are;
  "explained" is the block's share of the energy behind the batch norm, `S^2 sum(W_oi^2 E[x_i^2])
  gamma_o^2 / var_o`; "fisher" the running mean of `(S dL/dS)^2`, "fisher_l2" the root of its product with "effective";
  "share", "row", "column" and "both" look at the layer, too (`bench/accuracy_scores.py`).
* feedback [0]: weights of masked blocks learn as if they were on, at this part of the rate (Lin et al., Dynamic Model
  Pruning with Feedback, ICLR 2020).
* clean [False]: blocks whose inputs are all constant, or whose outputs nobody reads, go first.
* retrain [False]: the masks found are given to a new net with scales, which trains for as many epochs again.
* measured [False]: how much each layer gives is decided by the loss that it costs, measured on a batch (NetAdapt,
  Yang et al., ECCV 2018); the score ranks within layers only.
* shrink [0]: how far a penalty moves every scale towards 0 before the first ranking.
* growth [0]: at each ranking this share of the kept blocks is chosen by the gradient of the weight that they would
  have instead (RigL, Evci et al., ICML 2020).
* cycles [0]: between `begin` and `end` phases without and with masks take turns, this many of each (AC/DC, Peste et
  al., NeurIPS 2021), at the whole sparsity, or rising to it where `ramp` [False]; masked blocks go on from zero weights
  where `restart` [True].
* order [0]: how often the channels are reordered between `begin` and `end` (`bench/accuracy_order.py`).
* dense [0]: the share of the epochs in which a dense net is trained first, over a learning-rate cycle of its own.
* distill [0]: weight of the distillation from that net (Hinton et al., 2015; temperature 2).
* source [False]: the net starts from one trained for 12 epochs on the pairs of shapes and textures, but for its last
  layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.accuracy_live import LivePaths
from bench.accuracy_nets import make_net, make_prepared, without_scales
from bench.accuracy_order import ChannelOrder
from bench.accuracy_probe import Probe
from bench.accuracy_schedule import BlockSchedule
from bench.accuracy_scores import SCORES
from bench.accuracy_setting import Setting
from bench.accuracy_steps import let_masked_blocks_learn
from bench.accuracy_teacher import distilled, start_from, trained_dense, trained_on_pairs
from bench.accuracy_training import Training, learning_rate
from fxdbsr.layers import blocked_layers
from fxdbsr.ranking import block_scores, lowest


def lead(setting: Setting) -> nn.Module:
    """Scaled gradual with the setting's options."""
    first = round(setting.option("dense", 0.0) * setting.epochs)
    net, teacher = make_net(setting), None
    if first:
        teacher = trained_dense(replace(setting, arm="dense", sparsity=None, epochs=first, options=()))
        net.load_state_dict(teacher.state_dict())
    if setting.option("source", False):
        start_from(net, trained_on_pairs(setting))
    model = make_prepared(setting, net=net)
    if not setting.option("scales", True):
        without_scales(model)
    if setting.option("retrain", False):
        return _retrained(setting)
    if part := setting.option("feedback", 0.0):
        let_masked_blocks_learn(model, part)
    training = Training(model, setting, setting.epochs - first, distilled(setting, teacher))
    if not setting.option("early", False):
        training.hold_scales()
    schedule = LeadSchedule(model, setting, training)
    return training.run(after_step=schedule)


def _retrained(setting: Setting) -> nn.Module:
    found = lead(replace(setting, options=tuple(o for o in setting.options if o[0] != "retrain")))
    model = make_prepared(setting)
    for mine, theirs in zip(blocked_layers(model), blocked_layers(found), strict=True):
        mine.set_mask(theirs.mask)
    return Training(model, setting).run()


class LeadSchedule(BlockSchedule):
    """`BlockSchedule` with the options of the leads."""

    def __init__(self, model: nn.Module, setting: Setting, training: Training) -> None:
        steps = training.steps
        super().__init__(model, setting, steps)
        self._order = ChannelOrder(model, training.optimizer, [float(p[0]) ** -setting.power for p in self.positions])
        self._probe = Probe(model, setting)
        self._fisher = [torch.zeros(layer.grid.shape) for layer in self.layers]
        self._live = LivePaths(model) if setting.option("clean", False) else None
        self._kept = [float(cost.sum()) for cost in self.costs]
        if setting.option("measured", False) or setting.option("growth", 0.0):
            self.interval = max(1, round((setting.end - setting.begin) * steps / 40))

    def __call__(self, step: int) -> None:
        if step < self.setting.begin * self.steps:
            self._shrink(step)
        if "fisher" in self.setting.option("score", "start"):
            self._observe()
        self._reorder(step)
        if self.setting.option("cycles", 0):
            self._alternate(step)
        else:
            super().__call__(step)

    @torch.no_grad()
    def _alternate(self, step: int) -> None:
        """Masks off in the first half of each cycle, on in the second, and on for good from `end`."""
        assert self.setting.sparsity is not None
        first, last = round(self.setting.begin * self.steps), round(self.setting.end * self.steps)
        half = (last - first) / self.setting.option("cycles", 0) / 2
        boundaries = {
            first + round(half * number): number for number in range(2 * self.setting.option("cycles", 0) + 1)
        }
        if step not in boundaries:
            return
        number = boundaries[step]
        if number % 2 and step < last:
            u = (step - first) / (last - first)
            ramp = 1 - (1 - u) ** 3 if self.setting.option("ramp", False) else 1.0
            self.mask_lowest(self.setting.sparsity * ramp)
        elif step >= last:
            self.mask_lowest(self.setting.sparsity)
        else:
            for layer in self.layers:
                if self.setting.option("restart", True):
                    layer.weight.mul_(layer.grid.expand_mask(layer.mask))
                layer.set_mask(torch.ones_like(layer.mask))

    def _reorder(self, step: int) -> None:
        """At the begin of pruning, and at equal distances until its end."""
        events = self.setting.option("order", 0)
        first, last = round(self.setting.begin * self.steps), round(self.setting.end * self.steps)
        if not events or not first <= step < last or (step - first) % max(1, round((last - first) / events)):
            return
        assert self.setting.sparsity is not None
        due = self.setting.sparsity * (1 - (1 - (step - first) / (last - first)) ** 3)
        costs, sizes = torch.cat(self.costs), [len(cost) for cost in self.costs]
        gone_in_end = self.setting.sparsity * float(costs.sum())

        def keep(scores: list[Tensor]) -> list[Tensor]:
            off = lowest(torch.cat(scores), costs, sizes, gone_in_end, self.survives)
            return list((~off).split_with_sizes(sizes))

        self._order.improve_(keep)
        self.mask_lowest(due)

    @torch.no_grad()
    def _shrink(self, step: int) -> None:
        """The part of the way that is due at this step, in proportion to the learning rate."""
        if shrink := self.setting.option("shrink", 0.0):
            before = range(1, round(self.setting.begin * self.steps))
            total = sum(learning_rate(t / self.steps) for t in before)
            for layer in self.layers:
                layer.scale.sub_(shrink * learning_rate(step / self.steps) / total).clamp_(min=0)

    @torch.no_grad()
    def _observe(self) -> None:
        for layer, seen in zip(self.layers, self._fisher, strict=True):
            grad = layer.scale.grad
            if grad is not None:
                seen.mul_(0.98).add_((grad * layer.scale).square().cpu(), alpha=0.02)

    def scores(self) -> list[Tensor]:
        kind = self.setting.option("score", "start")
        if kind == "fisher":
            return [
                f.flatten() / layer.grid.numel().flatten() for f, layer in zip(self._fisher, self.layers, strict=True)
            ]
        if kind == "fisher_l2":
            plain = block_scores(self.layers)
            return [
                (f.flatten() / layer.grid.numel().flatten() * w).sqrt()
                for f, layer, w in zip(self._fisher, self.layers, plain, strict=True)
            ]
        if kind == "explained":
            return self._probe.explained()
        if kind == "effective":
            return block_scores(self.layers)
        if kind in SCORES:
            plain = block_scores(self.layers, scales=self.start)
            grids = [e.view(layer.grid.shape) for e, layer in zip(plain, self.layers, strict=True)]
            return [SCORES[kind](e).flatten() for e in grids]
        return super().scores()

    def lowest(self, sparsity: float) -> list[Tensor]:
        if self.setting.option("measured", False):
            return self._measured(sparsity)
        off = super().lowest(sparsity)
        if self.setting.option("growth", 0.0) and not self.frozen:
            return self._grown(off, sparsity)
        return off if self._live is None else self._cleaned(off, sparsity)

    def _cleaned(self, off: list[Tensor], sparsity: float) -> list[Tensor]:
        """Blocks on no live path go first, which lets others stay; until none is left."""
        assert self._live is not None
        scores = self.scores()
        for _ in range(64):
            useless = [~o & ~u for o, u in zip(off, self._live.useful([~o for o in off]), strict=True)]
            if not any(bool(u.any()) for u in useless):
                break
            scores = [s.masked_fill(u, -1.0) for s, u in zip(scores, useless, strict=True)]
            off = self.ranked_lowest(scores, sparsity)
        return off

    def _measured(self, sparsity: float) -> list[Tensor]:
        """Rounds in which the layer whose loss rises least for the MACs gives what is too many."""
        scores = self.scores()
        excess = sum(self._kept) - (1 - sparsity) * sum(float(cost.sum()) for cost in self.costs)
        if excess > 0:
            best: tuple[float, int, float] | None = None
            now = self._probe.loss()
            for number, layer in enumerate(self.layers):
                mask = layer.mask.clone()
                off = self._lowest_of(number, scores[number], self._kept[number] - excess)
                kept = float(self.costs[number][~off].sum())
                gone = self._kept[number] - kept
                if gone > 0 and self._may_go(number, off):
                    layer.set_mask(~off.view(mask.shape))
                    rise = (self._probe.loss() - now) / gone
                    best = min(best or (rise, number, kept), (rise, number, kept))
                    layer.set_mask(mask)
            if best is not None:
                self._kept[best[1]] = best[2]
        return [self._lowest_of(n, scores[n], kept) for n, kept in enumerate(self._kept)]

    def _may_go(self, number: int, off: Tensor) -> bool:
        dead = {n for n, layer in enumerate(self.layers) if not layer.mask.any()}
        return not bool(off.all()) or self.survives(dead | {number})

    def _lowest_of(self, number: int, score: Tensor, keep: float) -> Tensor:
        cost = self.costs[number]
        return lowest(score, cost, [len(score)], float(cost.sum()) - max(0.0, keep))

    def _grown(self, off: list[Tensor], sparsity: float) -> list[Tensor]:
        """A share of the blocks that would stay gives way to those whose weights have the largest gradients."""
        share = self.setting.option("growth", 0.0) * (1 - sparsity)
        fewer = super().lowest(min(1.0, sparsity + share))
        gradients = self._probe.gradients(fewer)
        scores = [g.masked_fill(~o, float("inf")) for g, o in zip(gradients, fewer, strict=True)]
        return self.ranked_lowest(scores, sparsity)
