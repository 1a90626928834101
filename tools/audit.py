"""What an audit of the scorer scores, and how closely scores that should be equal must agree."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

import train_gpt
from tools.artifact import Opened
from tools.listening import Heard, LoneRank, ScorerError, hear
from tools.progress import INTERVAL_S

# How much scores that should be equal may differ. On a CPU, finished rows are dropped from the batch, which may change
# the rounding of the rest. On a GPU all shapes are fixed, and scores are equal bit for bit.
TOLERANCE_BPB = 1e-6  # of a document, or of the part of it that is compared
TOLERANCE_NATS = 1e-4  # of a single target
SUM_TOLERANCE = 1e-5  # of probabilities that should add up to one
NUDGE = 1e-6  # a relative change of TTT_LR, about ten times what rounding does to a step
LOWER_RATES = 4.0 ** np.arange(7)  # divisors of TTT_LR, in turn

# {closely: how often the properties score a document of the sample}, as counted in audits of few documents.
SCORINGS = {False: 32, True: 6}
REUSES = 8  # of learners, before new ones are made
LONGEST_PROBE = 256  # tokens of a document scored to measure the speed
FEWEST_TOKENS = 256  # tokens of a longer document that are looked at, however slow that is

Seen = tuple[Sequence[str] | None, str]  # faults (None where the property does not apply), and what was seen


class Text(NamedTuple):
    """A stream of tokens that begins with BOS, and the number of bytes of each."""

    tokens: np.ndarray  # (n,) uint16
    bytes: np.ndarray  # (n,) int64


def joined(texts: Iterable[Text]) -> Text:
    tokens, sizes = zip(*texts, strict=True)
    return Text(np.concatenate(tokens), np.concatenate(sizes))


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """tokens (n,) -> the index of every BOS, then n: (documents + 1,)"""
    return np.append(np.flatnonzero(tokens == train_gpt.BOS), len(tokens))


class Widest:
    """The largest differences between scores that should be equal."""

    def __init__(self):
        self.nats = 0.0
        self.bpb = 0.0
        self.seen = 0
        self.faults = []

    def compare(self, what: str, nats: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
        """Compare two scorings of the same targets, (n,) each; `size` (n,) is the bytes of these targets."""
        apart = np.nan_to_num(nats - expected, nan=np.inf)
        most = float(abs(apart).max(initial=0.0))
        self.nats = max(self.nats, most)
        if most > TOLERANCE_NATS:
            self.faults.append(f"{what}: {most:.2g} nats at target {int(abs(apart).argmax())}")
        self.compare_sums(what, float(apart.sum()), int(size.sum()))

    def compare_sums(self, what: str, apart: float, size: int) -> None:
        """Check the difference `apart` of two sums of nats over the same `size` bytes."""
        bpb = abs(apart) / math.log(2) / max(1, size)
        self.bpb = max(self.bpb, bpb)
        self.seen = self.seen + 1
        if bpb > TOLERANCE_BPB:
            self.faults.append(f"{what}: {bpb:.2g} bpb")

    def __str__(self) -> str:
        return f"max {self.nats:.1e} nats a target, {self.bpb:.1e} bpb a document"


class Audit:
    """An artifact, the sample of documents, and what was heard when they were scored."""

    def __init__(self, opened: Opened, seed: int, seconds: float, tell: Callable[[str], None]):
        self.opened = opened
        self.seconds = seconds
        self.tell = tell
        self.model = opened.model
        self.run = opened.setup.run
        self.dist = opened.setup.dist
        self.chance = np.random.default_rng(seed)
        self.stream = bool(self.run.ttt_enabled) and self.run.ttt_scope == "stream"
        self.chunk = self.run.ttt_chunk_tokens if self.run.ttt_enabled else self.run.eval_stride
        self.learners: dict[train_gpt.RunConfig, train_gpt.Learners] = {}  # see `kept`
        self.reuses = 0
        self.strange = []
        self.misplaced = []  # both collected over all scorings
        self.chaos = ""  # why TTT_LR is lower than the run's; empty if it is not
        self.began = time.monotonic()
        self.told = 0.0
        self.spent = 0.0
        self.planned = math.inf
        self.busy = 0.0  # seconds that `spent` took
        self.limit = LONGEST_PROBE  # tokens of a document that are looked at
        self.closeness = 1.0  # how many times longer a document takes with an ear
        self.starts = document_starts(opened.setup.validation.tokens)
        self.chosen = self.choose(np.diff(self.starts))
        self.texts = [self.text(i) for i in self.chosen]

    def text(self, i: int) -> Text:
        """A validation document without its closing BOS, cut to the first `limit` tokens."""
        docs = self.opened.setup.validation
        end = min(self.starts[i + 1], self.starts[i] + self.limit)
        span = slice(self.starts[i], end)
        return Text(np.array(docs.tokens[span], np.uint16), np.array(docs.bytes[span], np.int64))

    def is_whole(self, i: int) -> bool:
        """Whether document i fits in `limit` uncut."""
        return self.starts[i + 1] - self.starts[i] <= self.limit

    def choose(self, sizes: np.ndarray) -> list[int]:
        """The tokens of every document -> the sample, in shard order; sets `limit`. Each document is scored about
        SCORINGS times; twice as often where documents are scored in pairs."""
        order = np.argsort(sizes, kind="stable")
        order = order[sizes[order] > 2]
        train_gpt.require(
            len(order) > 0,
            f"{self.run.data_path}: the longest of its {len(sizes)} validation documents has {max(sizes, default=0)} "
            "tokens with its BOS, and nothing can be proved of fewer than three; prepare a longer validation text",
            train_gpt.DataError,
        )
        shortest = int(order[0])
        median = int(order[len(order) // 2])
        rates = self.measure(self.text(shortest), self.text(median))
        self.closeness = rates[True] / rates[False]
        times = (2 if self.stream else 1) * (SCORINGS[False] + SCORINGS[True] * self.closeness)
        self.limit = int(sizes.max())
        while times * rates[False] * self.cost(self.limit) > 0.4 * self.seconds and self.limit > FEWEST_TOKENS:
            self.limit = max(FEWEST_TOKENS, self.limit * 4 // 5)
        needed = np.array([times * rates[False] * self.cost(sizes[i]) for i in order])
        fits = order[sizes[order] <= self.limit]
        cheap = order[needed <= 0.08 * self.seconds]
        longest = int(fits[-1]) if len(fits) else shortest
        chosen = {shortest, median, longest, *(self.chance.choice(cheap, 3).tolist() if len(cheap) else ())}
        self.spent = 0.0
        self.busy = 0.0
        self.planned = sum(times * self.cost(min(self.limit, sizes[i])) for i in chosen)
        return sorted(chosen)

    def measure(self, *texts: Text) -> dict[bool, float]:
        """{closely: seconds per token pass}"""
        pair = joined(texts)
        rates = {}
        for closely in (False, False, True, True):  # the first pass is slow
            began = time.monotonic()
            self.score(pair, closely)
            rates[closely] = (time.monotonic() - began) / sum(self.cost(len(text.tokens)) for text in texts)
        return rates

    def cost(self, tokens: int) -> float:
        """The cost of scoring a document once, in token passes."""
        if not self.run.ttt_enabled:
            return float(tokens)
        return train_gpt.batched_cost(np.array([tokens]), self.run, self.dist.device)

    def score(self, text: Text, closely: bool = False, dist: train_gpt.Dist | None = None, **changes: float) -> Heard:
        """Score a stream with the knobs in `changes` overridden."""
        run = dataclasses.replace(self.run, **changes)
        began = time.monotonic()
        learners = self.kept(run) if dist is None and not closely else None
        heard = hear(self.model, run, dist or self.dist, text.tokens, closely, learners)
        self.busy += time.monotonic() - began
        self.strange += heard.strange
        self.misplaced += heard.misplaced
        cost = sum(map(self.cost, np.diff(document_starts(text.tokens)))) / (dist or self.dist).world
        self.spent += cost * (self.closeness if closely else 1.0)
        elapsed = time.monotonic() - self.began
        if elapsed - self.told > INTERVAL_S and self.planned < math.inf:  # not while documents are being chosen
            self.told = elapsed
            left = self.busy * max(0.0, self.planned / self.spent - 1)
            self.tell(f"prove: {elapsed:.0f} s, about {left:.0f} s left")
        return heard

    def kept(self, run: train_gpt.RunConfig) -> train_gpt.Learners | None:
        """Learners to reuse; only on a GPU, where capturing their graphs takes seconds. Every REUSES-th scoring makes
        new ones, so that the audit also covers what a scorer does while it makes them."""
        if self.dist.device.type == "cpu":
            return None
        self.reuses += 1
        if run not in self.learners or self.reuses % REUSES == 0:
            self.learners = {run: train_gpt.Learners(self.model, self.dist.device)}
        return self.learners[run]

    @functools.cached_property
    def early_late(self) -> dict[str, int]:
        """Knobs that make late chunks begin after four others, so that documents of the sample reach them; empty unless
        documents adapt in batches."""
        if not self.run.ttt_enabled or not self.run.batched_ttt:
            return {}
        context = 4 * self.chunk
        knobs = dict(eval_seq_len=context, eval_stride=min(self.run.eval_stride, context))
        return knobs | dict(ttt_late_chunk_tokens=2 * self.chunk)

    def calm(self) -> Audit:
        """This audit at the highest of TTT_LR, TTT_LR / 4, TTT_LR / 16, ... at which rounding does not grow.

        Adaptation can be chaotic, as that of a network that has hardly been trained: every step multiplies what
        rounding has changed, up to whole nats. At such a rate, rounding cannot be told from a score that depends on
        other documents; at a lower one, such a score still shows. Raises ScorerError if no rate helps: then something
        other than rounding grows."""
        chaos = ""
        for divisor in LOWER_RATES:
            calmer = self.at_rate(float(self.run.ttt_lr / divisor))
            calmer.chaos = chaos
            change = calmer.nudged()
            if not change.faults:
                return calmer
            chaos = chaos or f"a millionth more TTT_LR changes scores by {change.nats:.2g} nats"
        raise ScorerError(f"{chaos}, and at {calmer.run.ttt_lr:.2g} by {change.nats:.2g}")

    def at_rate(self, ttt_lr: float) -> Audit:
        """This audit with another TTT_LR, and nothing scored yet."""
        other = copy.copy(self)
        other.run = dataclasses.replace(self.run, ttt_lr=ttt_lr)
        for name, attribute in vars(Audit).items():
            if isinstance(attribute, functools.cached_property):
                vars(other).pop(name, None)
        return other

    def nudged(self) -> Widest:
        """How much a change of rounding size, in TTT_LR, changes the scores of every document alone."""
        widest = Widest()
        for n, text in zip(self.chosen, self.texts, strict=True):
            for knobs in ({}, self.early_late):
                rates = (self.run.ttt_lr, self.run.ttt_lr * (1 + NUDGE))
                nats, expected = (self.score(text, **knobs, ttt_lr=rate).nats for rate in rates)
                widest.compare(f"document {n}", nats, expected, text.bytes[1:])
        return widest

    @functools.cached_property
    def units(self) -> list[Text]:
        """What is scored on its own: one document, or two consecutive ones under TTT_SCOPE=stream."""
        return [joined([self.texts[i - 1], text]) if self.stream else text for i, text in enumerate(self.texts)]

    @functools.cached_property
    def alone(self) -> list[Heard]:
        return [self.score(unit) for unit in self.units]

    @functools.cached_property
    def closely(self) -> list[Heard]:
        """The same with an ear."""
        return [self.score(unit, closely=True) for unit in self.units]

    @functools.cached_property
    def together(self) -> Heard:
        return self.score(joined(self.texts))

    @functools.cached_property
    def by_rank(self) -> list[Heard]:
        """All documents together, as each of eight ranks scores its share: rank 0 gets the longest document only."""
        ranks = [LoneRank(rank, 8, self.dist.device) for rank in range(8)]
        return [self.score(joined(self.texts), dist=rank) for rank in ranks]

    def other(self, tokens: np.ndarray) -> np.ndarray:
        """Random tokens (n,), each different from the token it replaces, and none of them BOS."""
        kinds = self.model.config.vocab_size - 2
        steps = self.chance.integers(1, kinds, len(tokens))
        return ((tokens.astype(np.int64) - 2 + steps) % kinds + 2).astype(np.uint16)
