"""Where the options of `fxdbsr train` come from: a recipe, then the file of `--config`, then the command line."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fxdbsr.training.options import WAYS, Options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare every option, `--recipe` and `--config`; what is not given stays out of the namespace."""
    parser.add_argument("--recipe", metavar="NAME", choices=recipes(), help=f"one of: {', '.join(recipes())}")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with options")
    kinds = get_type_hints(Options)
    for f in fields(Options):
        name, help_, choices = f"--{f.name.replace('_', '-')}", f.metadata["help"], f.metadata["choices"]
        shown = "" if f.default in (None, False, ()) or "(" in help_ else f" (default {f.default})"
        if kinds[f.name] is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_)
        elif f.default == ():
            parser.add_argument(name, nargs="*", metavar="LAYER", default=argparse.SUPPRESS, help=help_)
        else:
            kind = next(iter(get_args(kinds[f.name])), kinds[f.name])
            metavar = None if choices else {int: "N", float: "X"}.get(kind, f.name.upper())
            parser.add_argument(
                name, type=kind, choices=choices, metavar=metavar, default=argparse.SUPPRESS, help=help_ + shown
            )


def options_of(args: argparse.Namespace) -> Options:
    """The options of a command line that `add_options` declared.

    Raises:
        ValueError, TypeError: a file that is no TOML, or a value that `Options` refuses.
        OSError: a file that cannot be read.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Options) if hasattr(args, f.name)}
    values: dict[str, Any] = {}
    if args.recipe is not None:
        values |= read_recipe(args.recipe)
    if args.config is not None:
        values = _over(values, _parse(args.config.read_bytes(), str(args.config)))
    where = "options" if args.config is None else str(args.config)
    return Options.of_dict(_over(values, given), where)


def _over(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`values` with what `later` says; a way to sparsity replaces the earlier one."""
    if any(way in later for way in WAYS):
        values = {key: value for key, value in values.items() if key not in WAYS}
    return values | later


def recipes() -> tuple[str, ...]:
    """The names of the recipes."""
    found = files("fxdbsr.training").joinpath("recipes").iterdir()
    return tuple(sorted(path.name.removesuffix(".toml") for path in found if path.name.endswith(".toml")))


def read_recipe(name: str) -> dict[str, Any]:
    """The options that the recipe `name` sets.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in recipes():
        raise ValueError(f"recipe: expected one of {recipes()}, got {name!r}")
    data = files("fxdbsr.training").joinpath("recipes", f"{name}.toml").read_bytes()
    return _parse(data, f"recipe {name}")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a TOML file: {error}") from error
