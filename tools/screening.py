"""
Many ideas in few runs: two-level screening designs, and what they tell about each idea.

A factor is one knob, or several that change together, each from its base to another value. In a Plackett-Burman design
(Biometrika 33, 1946), every factor is changed in half of the runs, with all other factors balanced: N runs measure
N - 1 effects, each from all N runs, and every run but the first changes half of the factors. A full grid of 11 factors
has 2,048 runs; here 12 are enough. The price: the effect of a factor is mixed with parts of the interactions between
others (resolution III), so the outcome is a shortlist that still has to be raced.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tools.grid import require_distinct, split_word
from tools.results import Interval, Run, ratio_intervals, require_same_documents
from tools.welch import two_sided
from train_gpt import ConfigError, DataError, require

SIZES = (8, 12, 16, 20, 24)  # runs
FEWEST_FACTORS = 3  # a full grid of two has four runs
LENTH = 1.5  # x median |effect| estimates the standard deviation of effects that are all noise
CLEAR = 2.5  # estimated standard deviations above which an effect does not count as noise


# -----------------------------------------------------------------------------
# Design


class Factor(NamedTuple):
    """Knobs that change together."""

    word: str  # as on the command line
    base: dict[str, str]
    other: dict[str, str]


class Design(NamedTuple):
    factors: list[Factor]
    levels: np.ndarray  # (runs, runs - 1) of -1: base, and 1: other; the first row is all base
    columns: list[int]  # of `levels`, one per factor

    @property
    def spare(self) -> list[int]:
        """Columns without a factor: their effects are the noise of runs (and interactions)."""
        return [i for i in range(self.levels.shape[1]) if i not in self.columns]

    def combinations(self) -> list[dict[str, str]]:
        """The knobs of every run, in the order of the rows."""
        rows = []
        for levels in self.levels[:, self.columns]:
            knobs = {}
            for factor, level in zip(self.factors, levels, strict=True):
                knobs |= factor.other if level > 0 else factor.base
            rows.append(knobs)
        return rows


def parse_factors(words: Sequence[str]) -> list[Factor]:
    """NAME=base,other ..., knobs that change together joined by a plus. Raises ConfigError."""
    factors = []
    names = []
    for word in words:
        parts = [split_word(part) for part in re.split(r"\+(?=[A-Za-z_]\w*=)", word)]
        for name, pair in parts:
            require(len(pair) == 2, f"{name}: --screen needs two values, the base and another; found {len(pair)}")
            require(pair[0] != pair[1], f"{name}: its two values are the same, {pair[0]!r}")
            require(name != "SEED", "SEED: all runs of --screen have that of the environment")
            names.append(name)
        base = {name: pair[0] for name, pair in parts}
        other = {name: pair[1] for name, pair in parts}
        factors.append(Factor(word, base, other))
    require_distinct(names)
    return factors


def make_design(factors: list[Factor], runs: int = 0) -> Design:
    """A design of `runs` runs, or of as few as possible if 0. Raises ConfigError if there is none, or if it would run
    the same combination twice."""
    count = len(factors)
    require(count >= FEWEST_FACTORS, f"--screen needs {FEWEST_FACTORS} factors or more, found {count}: run the grid")
    require(count < max(SIZES), f"--screen: {count} factors need more than {max(SIZES)} runs: give fewer")
    runs = runs or next(size for size in SIZES if size > count)
    require(runs in SIZES, f"--screen {runs}: expected one of {', '.join(map(str, SIZES))}")
    require(runs > count, f"--screen {runs}: {count} factors need {count + 1} runs or more")

    levels = plackett_burman(runs)
    for columns in itertools.combinations(range(runs - 1), count):
        if len(np.unique(levels[:, columns], axis=0)) == runs:
            return Design(factors, levels, list(columns))
    raise ConfigError(f"--screen {runs}: any such design of {count} factors has a combination twice; give another size")


def plackett_burman(runs: int) -> np.ndarray:
    """(runs, runs - 1) of -1 and 1: columns are balanced and pairwise orthogonal, and the first row is all -1. Derived
    from a Hadamard matrix: Sylvester's for 16 runs, else Paley's, from the squares modulo the prime runs - 1."""
    if runs == 16:
        hadamard = np.array([[1]])
        for _ in range(4):
            hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
        return -hadamard[:, 1:]

    prime = runs - 1
    squares = {i * i % prime for i in range(prime)}  # includes 0
    levels = [[1 if (column - row) % prime in squares else -1 for column in range(prime)] for row in range(prime)]
    return np.array([[-1] * prime, *levels])


# -----------------------------------------------------------------------------
# Effects


def effects(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Main effects of all columns of `levels` (runs, columns) on values (runs, ...) -> (columns, ...): the mean of the
    runs at level 1 minus the mean of the runs at level -1."""
    return np.tensordot(levels.T, values, 1) / (len(levels) / 2)


class Noise(NamedTuple):
    """How large an effect may be by chance alone, from run to run."""

    error: float  # standard error of an effect, or a robust estimate of it
    reach: float  # half-width of the 95 % interval
    told: bool  # whether it is measured on columns without a factor
    freedom: int  # degrees of freedom: number of such columns


def noise_of(all_effects: np.ndarray, spare: Sequence[int]) -> Noise:
    """The noise of `all_effects` (columns,). With spare columns, whose effects have mean zero except for interactions:
    Student's t with one degree of freedom per spare column. Without, from all effects, most of which must be noise:
    Lenth's pseudo standard error and margin of error (Lenth 1989, Technometrics 31, 469-473)."""
    if spare:
        error = math.sqrt(np.mean(all_effects[spare] ** 2))
        return Noise(error, two_sided(0.95, len(spare)) * error, True, len(spare))
    sizes = np.abs(all_effects)
    first = LENTH * np.median(sizes)
    error = LENTH * float(np.median(sizes[sizes < CLEAR * first])) if first else 0.0
    return Noise(error, two_sided(0.95, len(sizes) / 3) * error, False, 0)


def effects_table(design: Design, runs: Sequence[Run]) -> list[str]:
    """Lines with the effect of every factor on the score before quantisation, best first; `runs` are in the order of
    the design's rows. Raises DataError if they have no such scores, or scored different documents."""
    for run in runs:
        if run.prequant_nats is None:
            raise DataError(f"{run.path}: it keeps no scores of documents before quantisation; run it again")
        require_same_documents(runs[0], run)
    bits = np.stack([run.prequant_nats for run in runs]) / math.log(2)  # (runs, documents)
    size = runs[0].bytes
    noise = noise_of(effects(design.levels, bits.sum(1) / size.sum()), design.spare)
    by_document = ratio_intervals(effects(design.levels[:, design.columns], bits).T, size, 0)
    steps = effects(design.levels[:, design.columns], np.array([run.result["steps"] for run in runs], float))

    lines = ["", "Main effects:", "", explanation(noise, len(runs)), ""]
    lines += ["| factor (base, other) | effect on bpb [over documents] | [over runs] | steps | verdict |"]
    lines += ["|---|---|---|---|---|"]
    rows = sorted(zip(design.factors, by_document, steps, strict=True), key=lambda row: row[1].value)
    for factor, effect, more_steps in rows:
        over_runs = f"[{effect.value - noise.reach:+.5f}, {effect.value + noise.reach:+.5f}]"
        lines.append(f"| {factor.word} | {effect} | {over_runs} | {more_steps:+.0f} | {verdict(effect, noise)} |")
    return lines


def explanation(noise: Noise, runs: int) -> str:
    """What the columns of the table mean, and how the noise of runs is estimated."""
    text = (
        f"On bits per byte before quantisation, of {runs} runs with one seed: the mean of the runs with the factor's "
        "second value less that of the runs with its base; below zero, the second value is better. An effect holds "
        "parts of the interactions between other factors, too. In brackets: a paired 95 % interval over documents, and "
        "one for the noise of runs. An effect is unresolved unless both exclude zero. "
    )
    if noise.told:
        return text + (
            f"The noise is told by {noise.freedom} columns of the design that no factor has: the standard error of an "
            f"effect is {noise.error:.5f} (Student's t with as many degrees of freedom)."
        )
    return text + (
        "Every column has a factor, so that no column tells the noise of runs. Its interval is a guess that holds "
        f"where most factors do nothing: Lenth's pseudo standard error (Lenth 1989) is {noise.error:.5f}, its margin "
        f"of error {noise.reach:.5f}."
    )


def verdict(effect: Interval, noise: Noise) -> str:
    within_documents = effect.low <= 0 <= effect.high
    if within_documents or abs(effect.value) <= noise.reach:
        return "**unresolved**"
    return "better" if effect.value < 0 else "worse"
