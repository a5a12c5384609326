"""`Run`: one training, epoch by epoch, from the options or from a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fxdbsr.training.average import Average
from fxdbsr.training.batches import Batch, seed_of
from fxdbsr.training.checkpoint import check_same_run, load, save, write
from fxdbsr.training.data import load_data
from fxdbsr.training.evaluate import evaluate
from fxdbsr.training.nets import make_net
from fxdbsr.training.options import Options
from fxdbsr.training.parts import autocast, is_sharded, make_optimizer, make_sparsifier, rate, wrapped
from fxdbsr.training.processes import Processes
from fxdbsr.training.states import load_states, states_of
from fxdbsr.training.watch import Watch


class Run:
    """A training that `options` ask for, in `processes`; goes on from the checkpoint where they say so.

    Attributes:
        net: the prepared model; `model` is what is called: `net`, or its wrapper.
        epoch: epochs done.
        steps: of the optimizer in the whole training.
        history: an entry for every epoch done.

    Raises:
        ValueError, TypeError, OSError: the options, the data or the checkpoint are wrong.
    """

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.out = options, processes, Path(options.out).expanduser()
        found = processes.of_first(self._checkpoint() if processes.is_first else None)  # its machine may alone hold it
        self.data = load_data(options, processes)
        self.steps = options.epochs * len(self.data.train)
        self.net = make_net(options, self.data.classes, self.data.size).to(processes.device)
        self.model = wrapped(self.net, options, processes)
        self.optimizer = make_optimizer(self.net, options)
        self.average = None if options.ema is None else Average(self.net, options.ema)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        self.epoch, self.history = 0, list[dict[str, Any]]()
        if found is not None:
            load_states(self.net, self.optimizer, found, is_sharded(options, processes))
        example = torch.zeros(1, 3, self.data.size, self.data.size, device=processes.device)
        self.sparsifier = make_sparsifier(self.model, self.optimizer, options, self.steps, example)
        if found is not None:
            self._continue(found)

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
            self.average.model.load_state_dict(found["model"])
            self.average.steps = found["ema_steps"]
        self.epoch, self.history = found["epoch"], found["history"]
        self._log()  # a run killed after it wrote its checkpoint has not

    def train_epoch(self, on_step: Callable[[], None]) -> dict[str, Any]:
        """Train for an epoch, evaluate, and write the checkpoint; what the log says of it.

        Raises:
            ValueError: the loss or a weight is NaN or infinite; the checkpoint is that of the epoch before.
            OSError: the checkpoint cannot be written; the one before is untouched.
        """
        start, options, each = time.perf_counter(), self.options, len(self.data.train)
        loss = self._train(on_step)
        trained = time.perf_counter() - start
        self.epoch += 1
        if self.epoch == options.epochs and not self.sparsifier.frozen:  # a GradScaler has skipped steps
            self.sparsifier.finalize()
            if self.average is not None:
                self.average.update(self.net)
        model = self.net if self.average is None else self.average.model
        top1, top5 = evaluate(model, self.data.test, self.data.size, options, self.processes)
        if self.average is not None:
            self.processes.average_(self.net.buffers())
        entry = {
            "epoch": self.epoch,
            "step": self.epoch * each,
            "lr": rate(options, self.epoch * each - 1, self.steps),
            "loss": loss,
            "accuracy": top1,
            "top5_accuracy": top5,
            f"{options.of}_sparsity": self.sparsifier.sparsity(),
            "frozen": self.sparsifier.frozen,
            "seconds": round(time.perf_counter() - start, 3),
            "images_per_second": round(each * options.batch_size / trained, 1),
        }
        self.history.append(entry)
        self._save()
        return entry

    def _train(self, on_step: Callable[[], None]) -> float:
        """The steps of an epoch; the mean loss. Raises ValueError where one, or a weight in the end, is NaN."""
        first = self.epoch * len(self.data.train)
        torch.manual_seed(seed_of(self.options.seed, self.epoch, self.processes.rank))
        self.model.train()
        watch = Watch(self.processes, first)
        for step, batch in enumerate(self.data.train.epoch(self.epoch), first):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.options, step, self.steps)
            try:
                self._step(batch, watch)
            except ValueError:  # of the sparsifier; an earlier loss that nobody has looked at tells more
                watch.check()
                raise
            on_step()
        watch.check_weights(self.net)
        return watch.mean()

    def _step(self, batch: Batch, watch: Watch) -> None:
        """A step of the optimizer on this process's part of a batch; `watch` sees the loss before it is taken."""
        options, device = self.options, self.processes.device
        self.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        for x, y in zip(images.chunk(options.accumulate), labels.chunk(options.accumulate), strict=True):
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(options, device):
                loss = F.cross_entropy(self.model(x), y, label_smoothing=options.label_smoothing)
            loss = loss / options.accumulate
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        watch.see(total)
        if options.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.net)

    def _save(self) -> None:
        states = states_of(self.net, self.optimizer, is_sharded(self.options, self.processes))
        if not self.processes.is_first:
            return
        content = states | {
            "model": states["net"] if self.average is None else self.average.model.state_dict(),  # what was evaluated
            "options": self.options.to_dict(),
            "classes": self.data.classes,
            "size": self.data.size,
            "epoch": self.epoch,
            "history": self.history,
            "sparsifier": self.sparsifier.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_steps": 0 if self.average is None else self.average.steps,
        }
        final = [entry["accuracy"] for entry in self.history if entry["frozen"]]
        if final and final[-1] > max(final[:-1], default=-1.0):
            save(self.out / "best.pt", content)  # first: a run killed between the two repeats this epoch
        save(self.out / "last.pt", content)
        self._log()

    def _log(self) -> None:
        if self.processes.is_first:
            write(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history).encode())
