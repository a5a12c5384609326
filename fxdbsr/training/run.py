"""`Run`: one training, epoch by epoch, from the options or from a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from fxdbsr.digits import learning_rate
from fxdbsr.scales import evaluation, param_groups
from fxdbsr.sparsifier import Sparsifier
from fxdbsr.training.average import Average
from fxdbsr.training.batches import Batch, Batches, seed_of
from fxdbsr.training.checkpoint import check_same_run, load, save, write
from fxdbsr.training.data import load_data
from fxdbsr.training.nets import make_net
from fxdbsr.training.options import Options
from fxdbsr.training.processes import Processes
from fxdbsr.training.states import load_states, states_of
from fxdbsr.training.watch import Watch

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """A training that `options` ask for, in `processes`.

    Attributes:
        net: the prepared model; `model` is what is called: `net`, or its wrapper.
        epoch: epochs done.
        steps: of the optimizer in the whole training.
        history: an entry for every epoch.

    Raises:
        ValueError, TypeError, OSError: the options, the data or the checkpoint are wrong.
    """

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.out = options, processes, Path(options.out)
        self.data = load_data(options, processes)
        self.steps = options.epochs * len(self.data.train)
        self.net = make_net(options, self.data.classes, self.data.size).to(processes.device)
        self.sharded = options.parallel == "fsdp" and processes.count > 1
        self.model = self._wrapped()
        self.optimizer = self._optimizer()
        self.average = None if options.ema is None else Average(self.net, options.ema)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        self.epoch, self.history = 0, list[dict[str, Any]]()
        found = self._checkpoint()
        if found is not None:
            load_states(self.net, self.optimizer, found, self.sharded)
        self.sparsifier = self._sparsifier()
        if found is not None:
            self._continue(found)

    def _wrapped(self) -> nn.Module:
        model: Any = self.net
        if self.sharded:
            fully_shard(model.to(memory_format=torch.contiguous_format))  # shards have to be contiguous
        if self.options.compile:
            model = torch.compile(model)
        if self.processes.count > 1 and not self.sharded:
            model = nn.parallel.DistributedDataParallel(model)
        return model  # type: ignore[no-any-return]

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        groups = param_groups(self.net, options.weight_decay)
        if options.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=options.lr)
        momentum = options.momentum
        return torch.optim.SGD(groups, lr=options.lr, momentum=momentum, nesterov=momentum > 0)

    def _rate(self, step: int) -> float:
        return self.options.lr * learning_rate(step, self.steps, self.options.warmup)

    def _sparsifier(self) -> Sparsifier:
        options, size = self.options, self.data.size
        return Sparsifier(
            self.model,
            self.optimizer,
            target=options.target,
            gamma=options.gamma,
            shrink=options.shrink,
            of=options.of,
            steps=self.steps,
            begin=options.begin,
            end=options.end,
            example_inputs=torch.zeros(1, 3, size, size, device=self.processes.device),
            lr_schedule=None if options.gamma is None else [self._rate(step) for step in range(self.steps)],
        )

    def _checkpoint(self) -> dict[str, Any] | None:
        path = self.out / "last.pt"
        if not path.exists():
            return None
        if not self.options.resume:
            raise ValueError(f"out: {path} is there from another run: go on with --resume, or choose another folder")
        found = load(path)
        check_same_run(path, found, self.options)
        return found

    def _continue(self, found: dict[str, Any]) -> None:
        self.sparsifier.load_state_dict(found["sparsifier"])
        self.scaler.load_state_dict(found["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(found["ema"])
            self.average.steps = found["ema_steps"]
        self.epoch, self.history = found["epoch"], found["history"]

    def train_epoch(self, on_step: Callable[[], None]) -> dict[str, Any]:
        """Train for an epoch, evaluate, and write the checkpoint; what the log says of it.

        Raises:
            ValueError: the loss is NaN or infinite; the checkpoint is that of the epoch before.
            OSError: the checkpoint cannot be written; the one before is untouched.
        """
        start, options, first = time.perf_counter(), self.options, self.epoch * len(self.data.train)
        torch.manual_seed(seed_of(options.seed, self.epoch, self.processes.rank))
        self.model.train()
        watch = Watch(self.processes, first)
        for step, batch in enumerate(self.data.train.epoch(self.epoch), first):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            try:
                self._step(batch, watch)
            except ValueError:
                watch.check()
                raise
            on_step()
        loss = watch.mean()
        trained = time.perf_counter() - start
        self.epoch += 1
        if self.epoch == options.epochs:
            self.sparsifier.finalize()
        for model in (self.net, self.average.model) if self.average is not None else (self.net,):
            self.processes.average_(model.buffers())  # statistics of norms are each process's own
        top1, top5 = self.evaluate(self.data.test)
        images = len(self.data.train) * options.batch_size
        entry = {
            "epoch": self.epoch,
            "step": first + len(self.data.train),
            "lr": self._rate(first + len(self.data.train) - 1),
            "loss": loss,
            "accuracy": top1,
            "top5_accuracy": top5,
            f"{options.of}_sparsity": self.sparsifier.sparsity(),
            "frozen": self.sparsifier.frozen,
            "seconds": round(time.perf_counter() - start, 3),
            "images_per_second": round(images / trained, 1),
        }
        self.history.append(entry)
        self._save()
        return entry

    def _step(self, batch: Batch, watch: Watch) -> None:
        """A step of the optimizer on this process's part of a batch; `watch` sees the loss before it is taken."""
        options, device = self.options, self.processes.device
        self.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        for x, y in zip(images.chunk(options.accumulate), labels.chunk(options.accumulate), strict=True):
            x = x.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                loss = F.cross_entropy(self.model(x), y, label_smoothing=options.label_smoothing)
            loss = loss / options.accumulate
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        watch.see(total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.net)

    def _autocast(self) -> Any:
        amp = self.options.amp
        return torch.autocast(self.processes.device.type, dtype=DTYPES[amp], enabled=amp != "off")

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """Fractions of the images whose class is the most likely, and among the five most likely."""
        device = self.processes.device
        model = self.net if self.average is None else self.average.model
        hits = torch.zeros(3, device=device, dtype=torch.float64)
        with evaluation(model):
            for images, labels in _padded(batches, self.data.size):
                with self._autocast():
                    logits = model(images.to(device).contiguous(memory_format=torch.channels_last))
                best = logits[: len(labels)].topk(min(5, logits.shape[1])).indices.eq(labels.to(device).unsqueeze(1))
                hits += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=device)])
        top1, top5, count = self.processes.sum(hits).tolist()
        return top1 / count, top5 / count

    def _save(self) -> None:
        states = states_of(self.net, self.optimizer, self.sharded)
        if not self.processes.is_first:
            return
        content = states | {
            "options": self.options.to_dict(),
            "classes": self.data.classes,
            "size": self.data.size,
            "epoch": self.epoch,
            "history": self.history,
            "sparsifier": self.sparsifier.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.average is None else self.average.model.state_dict(),
            "ema_steps": 0 if self.average is None else self.average.steps,
        }
        save(self.out / "last.pt", content)
        final = [entry["accuracy"] for entry in self.history if entry["frozen"]]
        if final and final[-1] == max(final) and final.count(final[-1]) == 1:
            save(self.out / "best.pt", content)
        write(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history).encode())


def _padded(batches: Batches, size: int) -> Iterator[Batch]:
    """As many batches on every process: where this one has no images left, an image that no label goes with."""
    nothing = torch.zeros(1, 3, size, size), torch.zeros(0, dtype=torch.int64)
    own = batches.epoch(0)
    for _ in range(len(batches)):
        images, labels = next(own, nothing)
        yield (images, labels) if len(labels) else nothing
