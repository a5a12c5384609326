"""`fxdbsr train` on one process: what it writes, its options and recipes, resuming, what it refuses."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

import fxdbsr
from fxdbsr.cli import main
from fxdbsr.digits import load_digits
from fxdbsr.layers import blocked_layers
from fxdbsr.scales import block_costs, record_positions
from fxdbsr.training import checkpoint, load_trained
from fxdbsr.training.arguments import read_recipe, recipes

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = Path(__file__).parent / "scripts"
TINY = ("--model", "tiny:net", "--block", "8x8", "--lr", "0.05")


@pytest.fixture(autouse=True)
def in_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `tiny` can be imported."""
    monkeypatch.chdir(SCRIPTS)


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """Runs `fxdbsr train` to `tmp_path / "out"`; the entries that it prints."""

    def run(*options: str) -> list[dict[str, Any]]:
        assert main(["train", "--out", str(tmp_path / "out"), *options]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `fxdbsr train`, which has to fail; its one line on stderr."""

    def run(*options: str) -> str:
        assert main(["train", "--out", str(tmp_path / "out"), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fxdbsr train: ")
        return line

    return run


def weights(path: Path, of: str = "model") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)[of]
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_epoch_is_a_line_and_the_checkpoints_hold_what_it_says(train: Any, tmp_path: Path) -> None:
    entries = train(*TINY, "--epochs", "2")
    assert [entry["epoch"] for entry in entries] == [1, 2]
    assert [entry["step"] for entry in entries] == [21, 42]
    assert entries == [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    digits = load_digits()
    for name in ("best.pt", "last.pt"):
        model = load_trained(tmp_path / "out" / name)
        logits = model(digits.test_images.expand(-1, 3, -1, -1))
        hits = (logits.argmax(1) == digits.test_labels).double().mean()
        assert float(hits) == pytest.approx(entries[-1]["accuracy"], abs=1e-9)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fxdbsr.convert(model, backend="reference")(x), model(x), rtol=1e-4, atol=1e-5)


def test_json_is_what_was_reached_in_place_of_the_words(train: Any, tmp_path: Path, capsys: Any) -> None:
    *entries, figures = train(*TINY, "--epochs", "2", "--json")
    assert figures["best"] == figures["last"] == entries[-1]
    assert all(Path(path).exists() for path in figures["files"].values())
    path = tmp_path / "figures.json"
    assert main(["train", *TINY, "--epochs", "2", "--out", str(tmp_path / "out"), "--resume", "--json", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"best accuracy {entries[-1]['accuracy']:.2%} in epoch 2, {entries[-1]['macs_sparsity']:.1%} of" in shown.err
    assert json.loads(path.read_text()) == figures


def test_the_other_commands_read_what_was_trained(train: Any, tmp_path: Path, capsys: Any) -> None:
    (entry,) = train(*TINY, "--epochs", "1", "--skip", "0")
    source = ("tiny:net", "--checkpoint", str(tmp_path / "out" / "best.pt"), "--shape", "1x3x32x32")
    assert main(["report", *source, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["0"]["block_size"] is None
    assert rows["3"]["sparsity"] == entry["macs_sparsity"]
    assert main(["convert", *source, "-o", str(tmp_path / "out.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_error"] < 1e-5


def test_the_best_is_the_best_of_the_epochs_whose_mask_is_final(train: Any, tmp_path: Path) -> None:
    entries = train(*TINY, "--epochs", "5", "--end", "0.5", "--lr", "0.3")
    final = [entry for entry in entries if entry["frozen"]]
    assert 1 < len(final) < 5
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["history"][-1]["accuracy"] == max(entry["accuracy"] for entry in final)


@pytest.mark.parametrize(
    "options",
    [
        ("--gamma", "20"),
        ("--shrink", "1.5", "--form", "clamp"),
        ("--form", "mask", "--of", "params"),
        ("--amp", "bf16", "--accumulate", "4"),
        ("--amp", "fp16"),
        ("--clip", "0.5"),
        ("--ema", "0.9", "--optimizer", "adamw", "--lr", "0.003"),
        ("--data", "generated", "--difficulty", "0", "--batch-size", "1000", "--image-size", "12"),
    ],
    ids=lambda options: " ".join(options),
)
def test_every_option_trains(train: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    (entry,) = train(*TINY, "--epochs", "1", *options)
    assert entry["frozen"]
    assert entry[f"{'params' if 'params' in options else 'macs'}_sparsity"] > 0.2
    load_trained(tmp_path / "out" / "best.pt")


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradients_clipped_to_almost_nothing_leave_the_weights_alone(train: Any, tmp_path: Path, amp: str) -> None:
    found = []
    for name, options in (("clipped", ("--clip", "1e-9")), ("stopped", ("--lr", "0"))):
        out = tmp_path / name
        train(*TINY, "--epochs", "1", "--weight-decay", "0", "--amp", amp, *options, "--out", str(out))
        found.append(dict(load_trained(out / "last.pt").named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=0)


def test_a_compiled_model_trains_as_the_eager_one(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (compiled,) = train(*TINY, "--epochs", "1", "--compile", "--out", str(tmp_path / "compiled"))
    (eager,) = train(*TINY, "--epochs", "1")
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_a_run_that_was_killed_goes_on_to_the_same_weights(train: Any, tmp_path: Path) -> None:
    options = [*TINY, "--epochs", "4", "--ema", "0.9", "--resume"]
    train(*options)
    command = [sys.executable, "-m", "fxdbsr", "train", *options, "--out", str(tmp_path / "cut")]
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # whatever tests before have set
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=SCRIPTS, env=alike)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    reached = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["epoch"]
    assert 1 <= reached < 4
    entries = train(*options, "--out", str(tmp_path / "cut"))
    assert [entry["epoch"] for entry in entries] == list(range(reached + 1, 5))
    for of in ("model", "net"):
        assert same(weights(tmp_path / "out" / "last.pt", of), weights(tmp_path / "cut" / "last.pt", of))
    assert not same(weights(tmp_path / "out" / "last.pt", "net"), weights(tmp_path / "out" / "last.pt"))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("out", "cut")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_a_run_killed_between_its_checkpoint_and_its_log_gets_the_whole_log(train: Any, tmp_path: Path) -> None:
    train(*TINY, "--epochs", "1")
    log = tmp_path / "out" / "log.jsonl"
    whole = log.read_text()
    log.unlink()
    assert train(*TINY, "--epochs", "1", "--resume") == []
    assert log.read_text() == whole


def test_the_average_has_the_final_mask_where_a_grad_scaler_skipped_steps(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    (entry,) = train(*TINY, "--epochs", "1", "--amp", "fp16", "--ema", "0.9", "--end", "1")
    last = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert entry["frozen"]
    assert last["sparsifier"]["step"] < entry["step"]
    masks = [name for name in last["net"] if name.endswith("mask")]
    assert all(torch.equal(last["model"][name], last["net"][name]) for name in masks)


def test_training_starts_from_the_weights_of_a_dense_net(train: Any, tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPTS))
    import tiny  # type: ignore[import-not-found]

    sys.path.remove(str(SCRIPTS))
    torch.manual_seed(5)
    dense = tiny.net(10)
    torch.save({"model": dense.state_dict()}, tmp_path / "dense.pt")
    train(*TINY, "--epochs", "1", "--weights", str(tmp_path / "dense.pt"), "--lr", "0")
    trained = weights(tmp_path / "out" / "last.pt")
    assert torch.equal(trained["9.weight"], dense.state_dict()["9.weight"])
    train(*TINY, "--epochs", "1", "--weights", str(tmp_path / "out" / "last.pt"), "--out", str(tmp_path / "prepared"))


# Recipes, on small files in the formats of the real data sets.


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train", 160), ("test", 20)):
        images = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [int(label) for label in draw.integers(0, 100, count)]
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    kind = torchvision.datasets.CIFAR100
    for part in ("train_list", "test_list"):  # the checksums are those of the real files
        monkeypatch.setattr(kind, part, [[name, None] for name, _ in getattr(kind, part)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})


def write_folders(root: Path) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for kind in ("cat", "dog"):
            (root / part / kind).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{number}.jpg")


@pytest.mark.parametrize("recipe", ["resnet20-cifar100", "vgg11-cifar100"])
def test_the_recipes_on_cifar_read_its_files(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    write_cifar100(tmp_path, monkeypatch)
    (entry,) = train("--recipe", recipe, "--data-dir", str(tmp_path), "--epochs", "1")
    assert entry["step"] == 1
    model = load_trained(tmp_path / "out" / "best.pt")
    layers = blocked_layers(model)
    record_positions(model, layers, torch.zeros(1, 3, 32, 32))
    costs = torch.cat([cost.flatten() for cost in block_costs(layers, "macs", True)])
    assert entry["macs_sparsity"] == pytest.approx(0.5, abs=max(0.005, float(costs.max() / costs.sum()) / 2))
    assert "conv1" not in fxdbsr.block_scales(model)


@pytest.mark.parametrize("recipe", ["resnet50-imagenet", "resnext50-imagenet"])
def test_the_recipes_on_imagenet_read_folders(train: Any, tmp_path: Path, recipe: str) -> None:
    write_folders(tmp_path)
    small = ("--epochs", "1", "--batch-size", "5", "--image-size", "32", "--workers", "1")
    (entry,) = train("--recipe", recipe, "--data-dir", str(tmp_path), *small)
    assert entry["step"] == 2
    assert entry["macs_sparsity"] == pytest.approx(read_recipe(recipe)["target"], abs=0.005)
    torch.load(tmp_path / "out" / "best.pt", weights_only=True)


def test_there_is_a_recipe_for_each_experiment_of_the_paper() -> None:
    assert recipes() == ("resnet20-cifar100", "resnet50-imagenet", "resnext50-imagenet", "vgg11-cifar100")


def test_what_is_said_later_counts(train: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('model = "tiny:net"\nblock = "8x8"\ntarget = 0.3\nepochs = 1\nlr = 0.05\n')
    train("--config", str(config), "--gamma", "30", "--lr", "0.04")
    options = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["options"]
    assert (options["target"], options["gamma"], options["lr"], options["block"]) == (None, 30.0, 0.04, "8x8")


# Bad input.


def test_nan_stops_with_its_step_and_leaves_the_checkpoint(refused: Any, tmp_path: Path) -> None:
    line = refused(*TINY, "--epochs", "3", "--model", "tiny:Breaking")
    assert "step 25: the loss is NaN or infinite" in line
    found = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert found["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in found["model"].values())


def test_weights_that_the_last_step_of_an_epoch_breaks_are_not_saved(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = torch.optim.SGD.step
    steps: list[int] = []

    def breaking(self: torch.optim.SGD, *args: Any) -> None:
        take(self, *args)
        steps.append(1)
        if len(steps) == 42:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", breaking)
    assert "step 42: a weight is NaN or infinite after it" in refused(*TINY, "--epochs", "3", "--end", "0.5")
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["epoch"] == 1


def test_another_run_is_not_written_over(train: Any, refused: Any, tmp_path: Path) -> None:
    train(*TINY, "--epochs", "1")
    before = (tmp_path / "out" / "last.pt").read_bytes()
    assert "--resume" in refused(*TINY, "--epochs", "1")
    assert "was written with lr = 0.05, now it is 0.1" in refused(*TINY, "--epochs", "1", "--resume", "--lr", "0.1")
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "parts"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_kept(
    train: Any, refused: Any, tmp_path: Path, damage: str
) -> None:
    train(*TINY, "--epochs", "1")
    last = tmp_path / "out" / "last.pt"
    whole = last.read_bytes()
    foreign = io.BytesIO()
    torch.save({"model": {}, "epoch": 3}, foreign)
    parts = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "epoch": 1}, parts)
    broken = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 99}
    broken |= {"foreign": foreign.getvalue(), "parts": parts.getvalue()}
    last.write_bytes(broken[damage])
    line = refused(*TINY, "--epochs", "1", "--resume")
    assert str(last) in line
    expected = {"foreign": "expected a checkpoint of fxdbsr train", "parts": "it lacks ['classes', 'ema_steps',"}
    assert expected.get(damage, "not a checkpoint") in line
    assert last.read_bytes() == broken[damage]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt: File too large; what was there before is untouched"):
            checkpoint.save(path, {"epoch": 2, "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(("good", "name"), [(4, "best.pt"), (5, "last.pt")])
def test_a_disk_that_fills_up_in_training_is_told_in_one_line(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, name: str
) -> None:
    replace, calls = os.replace, []

    def full(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) > good:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    line = refused(*TINY, "--epochs", "3")
    assert f"{name}: No space left on device" in line
    assert ("; what was there before is untouched" in line) == (name == "last.pt")
    found = checkpoint.load(tmp_path / "out" / "last.pt")
    assert found["epoch"] == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "0.99"), r"target: 0.99 of the macs cannot be zero, at most 0."),
        (("--target", "1.5"), "target: expected a fraction"),
        (("--target", "0.5", "--gamma", "1"), "exactly one of target and gamma"),
        (("--model", "resnet21"), "did you mean resnet"),
        (("--model", "tiny:nothing"), "tiny has no 'nothing'"),
        (("--model", "tiny:three"), "expected logits of shape (2, 10) for 2 images, got (2, 3)"),
        (("--block", "8x"), "block: expected OUTxIN"),
        (("--skip", "conv7"), "conv7"),
        (("--batch-size", "2000"), "fewer than 2000 images"),
        (("--batch-size", "64", "--accumulate", "3"), "batch_size: 64 cannot be shared"),
        (("--data", "cifar10"), "data_dir: cifar10 needs the folder"),
        (("--data", "cifar10", "--data-dir", "/nowhere"), "cifar-10-batches-py does not hold cifar10"),
        (("--data", "imagefolder", "--data-dir", "/nowhere"), "there is no folder /nowhere/train"),
        (("--weights", "/nowhere.pt"), "/nowhere.pt"),
        (("--weights", str(SCRIPTS / "tiny.py")), f"--weights: {SCRIPTS / 'tiny.py'}: "),
        (("--epochs", "0"), "epochs: expected at least 1"),
        (("--clip", "0"), "clip: expected a positive finite number, got 0"),
        (("--ema", "1"), "ema: expected a number in [0, 1)"),
        (("--lr", "inf"), "lr: expected a finite number that is not negative"),
        (("--model", ":net"), "expected a name, or package.module:callable, got ':net'"),
        (("--device", "abacus"), "device: 'abacus'"),
        (("--device", "meta"), "device: 'meta'"),
        (("--seed", "99999999999999999999"), "seed: expected a number below 2**64"),
        (("--config", "/bin/sh"), "/bin/sh: not a TOML file"),
        (("--config", "/nowhere.toml"), "/nowhere.toml"),
    ],
)
def test_bad_options_are_refused_before_training(refused: Any, tmp_path: Path, options: Any, text: str) -> None:
    assert text in refused(*TINY, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("epochs = ", "not a TOML file"),
        ("epoch = 3", "unknown option 'epoch'; there are model"),
        ('epochs = "3"', "epochs: expected int, got '3'"),
        ('amp = "fp8"', "amp: expected one of"),
        ("skip = 3", "skip: expected"),
        ("resume = 1", "resume: expected bool"),
    ],
)
def test_a_bad_config_is_named(refused: Any, tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(content)
    line = refused("--config", str(path))
    assert str(path) in line
    assert text in line


def test_an_image_that_cannot_be_read_is_named(refused: Any, tmp_path: Path) -> None:
    write_folders(tmp_path)
    broken = tmp_path / "train" / "cat" / "0.jpg"
    broken.write_bytes(b"no image")
    line = refused(
        *TINY, "--data", "imagefolder", "--data-dir", str(tmp_path), "--image-size", "32", "--batch-size", "10",
        "--workers", "0",
    )  # fmt: skip
    assert f"{broken}: cannot be read as an image" in line


def test_a_terminal_sees_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "epoch 1:" in shown.err
    assert "/21" in shown.err
    assert len(shown.out.splitlines()) == 1


def test_a_penalty_too_weak_is_told_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--epochs", "1", "--gamma", "0.1", "--out", str(tmp_path / "out")]) == 0
    assert "fxdbsr train: the penalty moves scales by 0.52" in capsys.readouterr().err
