"""`fxdbsr demo` in one epoch: its figures, its picture, its errors."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxdbsr import demo, digits
from fxdbsr.cli import main
from fxdbsr.images import ImageSet

KEYS = [
    "dense_accuracy", "accuracy", "sparsity", "macs_dense", "macs", "layers_packed", "max_abs_error",
    "seconds",
]  # fmt: skip


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small batches to train on, and 60 images to test."""
    monkeypatch.setattr(demo, "BATCH", 16)
    whole = digits.load_digits()

    def load() -> ImageSet:
        n = 3 * demo.BATCH
        return ImageSet(whole.train_images[:n], whole.train_labels[:n], whole.test_images[:60], whole.test_labels[:60])

    monkeypatch.setattr(demo, "load_digits", load)


@pytest.mark.parametrize("mode", [("--target", "0.5"), ("--gamma", "1.0")])
@pytest.mark.usefixtures("few_digits")
def test_one_epoch_writes_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: tuple[str, str]
) -> None:
    out = tmp_path / "new" / "folder"
    path = tmp_path / "figures.json"
    assert demo.run(parsed("--epochs", "1", "--out", str(out), "--json", str(path), *mode)) == 0
    figures = json.loads(path.read_text())
    assert list(figures) == KEYS
    assert 0 <= figures["accuracy"] <= 1
    assert 0 <= figures["dense_accuracy"] <= 1
    assert figures["layers_packed"] == 21 or (mode[0] == "--gamma" and figures["layers_packed"] < 21)  # branches die
    assert 0 < figures["max_abs_error"] < 1e-3
    if mode[0] == "--target":
        assert figures["macs"] <= 0.52 * figures["macs_dense"]
    assert (out / "masks.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert ("layer1.0.conv1" if mode[0] == "--target" else "conv1") in printed.out
    assert "MACs" in printed.out
    assert "epoch  1 of 1" in printed.err


@pytest.mark.usefixtures("few_digits")
def test_a_seed_gives_the_same_figures_again(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        path = tmp_path / name
        assert demo.run(parsed("--epochs", "1", "--seed", "3", "--out", str(tmp_path), "--json", str(path))) == 0
        found.append(json.loads(path.read_text()) | {"seconds": 0})
    assert found[0] == found[1]


def test_the_images_are_real_and_the_parts_are_apart() -> None:
    data = digits.load_digits()
    assert data.train_images.shape == (1347, 1, 32, 32)
    assert data.test_images.shape == (450, 1, 32, 32)
    assert data.train_images.mean().abs() < 1e-4
    assert torch.bincount(data.test_labels).min() >= 43
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in train for image in data.test_images)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target", "1.5"), "target"),
        (("--gamma", "-1"), "gamma"),
        (("--gamma", "nan"), "gamma"),
        (("--epochs", "0"), "--epochs"),
    ],
)
def test_bad_options_fail_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], text: str
) -> None:
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fxdbsr demo: ")
    assert text in printed.err
    assert "loss" not in printed.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "sub")]) == 2
    assert "file" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path), "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn", "tqdm", "matplotlib"])
def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == module else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "pip install 'fxdbsr[demo]'" in capsys.readouterr().err


def test_target_and_gamma_together_are_refused() -> None:
    with pytest.raises(SystemExit):
        parsed("--target", "0.5", "--gamma", "0.1")
