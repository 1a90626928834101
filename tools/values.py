"""Checks of values read from files. Files are untrusted until checked, so nothing here trusts its input."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from train_gpt import MOST_SHOWN, printable  # noqa: F401  used by the tools as well as the entry

MOST_NAMES = 1_000  # in a dict
LONGEST_NAME = 200
LARGEST = 1e18  # far above any score, time or size of a run

Kind = Callable[[Any], bool]  # whether a value is of a kind


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def number(value: Any) -> bool:
    """A number of zero or more, small enough that sums stay finite."""
    return type(value) in {int, float} and 0 <= value <= LARGEST


def share(value: Any) -> bool:
    """A part of a whole, 0 to 1."""
    return number(value) and value <= 1


def signed(value: Any) -> bool:
    """A finite number of either sign."""
    return type(value) in {int, float} and abs(value) <= LARGEST


def text(value: Any) -> bool:
    """One line of text, without control characters or invalid characters."""
    return isinstance(value, str) and value != "" and value.isprintable()


def any_text(value: Any) -> bool:
    return isinstance(value, str)


def settings(value: Any) -> bool:
    """{NAME: text} of environment variables, each on one line."""
    if not isinstance(value, dict) or not all(re.fullmatch("[A-Z][A-Z0-9_]*", name) for name in value):
        return False
    return all(entry == "" or text(entry) for entry in value.values())


def digest(value: Any) -> bool:
    """A SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def table_of(kind: Kind) -> Kind:
    """{name: entry of that kind}; names must fit in a line of a report and a label of a plot."""

    def is_table(value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > MOST_NAMES:
            return False
        return all(text(name) and len(name) <= LONGEST_NAME and kind(entry) for name, entry in value.items())

    return is_table


def one_of(*choices: str) -> Kind:
    def is_choice(value: Any) -> bool:
        return isinstance(value, str) and value in choices

    return is_choice


def optional(kind: Kind) -> Kind:
    """That kind, or null."""

    def is_kind_or_null(value: Any) -> bool:
        return value is None or kind(value)

    return is_kind_or_null


def missing_or_wrong(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str:
    """What is wrong with the values of a dict with known fields; empty if nothing is."""
    missing = [name for name in kinds if name not in values]
    if missing:
        return f"it lacks {', '.join(missing)}"
    for name, kind in kinds.items():
        if not kind(values[name]):
            return f"{name} is {str(values[name])[:60]!r}, which no run writes"
    return ""


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object without duplicate names (a parser would keep the last, a reader see the first), and without
    NaN or Infinity. Raises ValueError, also for excessive nesting."""
    try:
        value = json.loads(content, object_pairs_hook=strict_table)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a table of names and values")
    return value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def strict_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in one table")
    for name, value in pairs:
        if not is_finite(value):
            raise ValueError(f"{name} is {str(value)[:60]}, which is no number of JSON")
    return found


def is_finite(value: Any) -> bool:
    """Whether a value, or every item of a list, is neither NaN nor infinite; dicts are checked while parsed."""
    if isinstance(value, list):
        return all(is_finite(entry) for entry in value)
    return not isinstance(value, float) or math.isfinite(value)
