"""Combinations of knobs: as the words of a command line, as the lines of a file, and as people read them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import train_gpt
from train_gpt import ConfigError, require


def split_word(word: str) -> tuple[str, list[str]]:
    """NAME=v,w -> NAME and its values; semicolons separate values that contain commas. Raises ConfigError."""
    name, equals, values = word.partition("=")
    require(equals == "=" and name.isidentifier(), f"{word!r}: expected NAME=value,value,...", ConfigError)
    return name, values.split(";" if ";" in values else ",")


def require_distinct(names: Sequence[str]) -> None:
    """Refuse names of which one comes twice. Raises ConfigError."""
    for name in names:
        require(names.count(name) == 1, f"{name} is given twice", ConfigError)


def parse_grid(words: Sequence[str]) -> list[dict[str, str]]:
    """NAME=v,w ... -> every combination, the last name varying fastest."""
    split = [split_word(word) for word in words]
    names = [name for name, _ in split]
    require_distinct(names)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(values for _, values in split))]


def parse_file(path: Path) -> list[dict[str, str]]:
    """Lines of NAME=value ..., quoted as in a shell; # begins a comment. All combinations get the same order of names,
    so that lines that differ only in SEED share a row."""
    found = []
    for number, line in enumerate(train_gpt.read_file(path).decode("utf-8", "replace").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            require(all(re.match(r"[A-Za-z_]\w*=", word) for word in words), "expected NAME=value ...", ConfigError)
            require_distinct([word.partition("=")[0] for word in words])
        except ValueError as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path}:{number}: {error}") from None
        if words:
            found.append(dict(word.split("=", 1) for word in words))
    require(bool(found), f"{path}: no combination in it", ConfigError)
    order = knob_names(found)
    return [{name: knobs[name] for name in order if name in knobs} for knobs in found]


def shell_words(knobs: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in knobs.items())


def knob_names(combinations: Iterable[Mapping[str, str]]) -> list[str]:
    """Every knob named in any combination, in order of first appearance."""
    return list(dict.fromkeys(name for knobs in combinations for name in knobs))


def without_seed(knobs: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in knobs.items() if name != "SEED"}
