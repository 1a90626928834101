"""
Compare two runs, document by document.

    ./run.sh compare A B [--out PICTURE]

A and B are RUN_IDs, or paths of their .json or artifact. Differences are B - A: if negative, B is better. Intervals are
paired 95 % bootstrap intervals: documents are resampled 10,000 times. They show how much the difference depends on the
choice of documents, not how much another seed would change either run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.artifact import end_in_a_line
from tools.plot import COLOURS, by_length, label_lengths, labels, picture
from tools.results import (
    FEWEST,
    Interval,
    Run,
    bits_per_byte,
    differences,
    length_groups,
    load_run,
    ratio_intervals,
    require_same_documents,
)
from tools.values import printable
from train_gpt import LOGS

SEED = 0  # for the bootstrap


class Group(NamedTuple):
    """Documents of similar length, in both runs."""

    label: str  # tokens, as from-to
    documents: int
    tokens: float  # mean per document
    bpb: tuple[float, float]  # (A, B)
    gap: Interval | None  # B - A; None if there are too few documents
    better: int  # documents that B predicts better
    worse: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help=f"[{LOGS}/compare/A_B.png]")
    options = parser.parse_args(arguments)
    a = load_run(options.a)
    b = load_run(options.b)
    require_same_documents(a, b)
    groups = compare_by_length(a, b)
    print("\n".join(map(printable, describe(a, b, groups))))
    path = options.out or LOGS / "compare" / f"{a.name}_{b.name}.png".replace("/", "-")
    draw(a, b, groups, path)
    print(printable(str(path)))
    return 0


def compare_by_length(a: Run, b: Run) -> list[Group]:
    """Groups of documents by octave of length; documents without text are left out."""
    groups = []
    for label, mask in length_groups(a.tokens):
        size = a.bytes[mask]
        if not size.sum():
            continue
        gap = differences(a, [b], SEED, mask)[0] if len(size) >= FEWEST else None
        bpb = (bits_per_byte(a.nats[mask], size), bits_per_byte(b.nats[mask], size))
        better, worse = better_worse(a, b, mask)
        groups.append(Group(label, len(size), float(a.tokens[mask].mean()), bpb, gap, better, worse))
    return groups


def better_worse(a: Run, b: Run, mask: np.ndarray) -> tuple[int, int]:
    """The number of documents that B predicts better than A, and worse; ties count as neither."""
    return int((b.nats < a.nats)[mask].sum()), int((b.nats > a.nats)[mask].sum())


def describe(a: Run, b: Run, groups: list[Group]) -> list[str]:
    """The comparison in words and tables."""
    gaps = np.stack([b.nats - a.nats, b.static_nats - a.static_nats], 1) / math.log(2)
    overall, static = ratio_intervals(gaps, a.bytes, SEED)
    better, worse = better_worse(a, b, np.ones(len(a.nats), bool))
    same = len(a.nats) - better - worse
    lines = [
        f"A {summary(a)}",
        f"B {summary(b)}",
        f"B - A: {overall} bpb, without adaptation {static}",
        verdict(overall),
        f"of {len(a.nats)} documents B predicts {better} better, {worse} worse, {same} the same",
        "",
        "| tokens of a document | documents | A, bpb | B, bpb | B - A, bpb, 95 % interval | B better | B worse |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for g in groups:
        gap = g.gap or f"{g.bpb[1] - g.bpb[0]:+.5f}, too few documents"
        lines.append(
            f"| {g.label} | {g.documents} | {g.bpb[0]:.5f} | {g.bpb[1]:.5f} | {gap} | {g.better} | {g.worse} |"
        )
    return lines + left_out(len(a.nats), groups)


def summary(run: Run) -> str:
    """A run's name and scores, and how many documents did not adapt for lack of time."""
    text = f"{run.name}: {run.bpb:.5f} bpb, {run.static_bpb:.5f} without adaptation"
    degraded = run.result["degraded_documents"]
    return f"{text}; time was short: {degraded} documents without adaptation" if degraded else text


def left_out(documents: int, groups: list[Group]) -> list[str]:
    """Notes on how many documents the table omits, or gives no interval."""
    without_text = documents - sum(g.documents for g in groups)
    without_interval = sum(g.documents for g in groups if g.gap is None)
    lines = []
    if without_text:
        lines.append(f"not in the table: {without_text} documents of lengths at which none holds any text")
    if without_interval:
        lines.append(f"rows of fewer than {FEWEST} documents have no interval: {without_interval} documents in all")
    return lines


def verdict(gap: Interval) -> str:
    if not math.isfinite(gap.high):
        return "so few documents do not tell the runs apart"
    if gap.low <= 0 <= gap.high:
        return "the interval holds zero: these documents do not tell the runs apart"
    winner = "B" if gap.high < 0 else "A"
    return f"the interval excludes zero: on documents like these {winner} is better"


def draw(a: Run, b: Run, groups: list[Group], path: Path) -> None:
    """Plot both runs' bits per byte against document length, and the gain of B."""
    with picture(path, 420, columns=2) as (both, gain):
        for name, run, label, colour in zip("AB", (a, b), labels((a, b)), COLOURS, strict=False):
            both.plot(*by_length(run, run.nats), "o-", color=colour, label=f"{name} {label}: {run.bpb:.4f}")
        gain.axhline(0, color="#555555", linewidth=1)
        known = [(g.tokens, g.gap) for g in groups if g.gap]
        reach = [[gap.high - gap.value for _, gap in known], [gap.value - gap.low for _, gap in known]]
        gain.errorbar(
            [at for at, _ in known],
            [-gap.value for _, gap in known],
            reach,
            fmt="o-",
            capsize=4,
            color=COLOURS[2],
            label="with 95 % interval",
        )
        few = [g for g in groups if not g.gap]
        gain.plot(
            [g.tokens for g in few],
            [g.bpb[0] - g.bpb[1] for g in few],
            "o",
            color=COLOURS[2],
            markerfacecolor="white",
            label=f"fewer than {FEWEST} documents",
        )
        for axes in (both, gain):
            label_lengths(axes, [a])
        both.set(ylabel="bits per byte")
        gain.set(ylabel="gain of B (bits per byte)")
        both.legend()
        gain.legend()


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
