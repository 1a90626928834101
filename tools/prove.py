"""
Does the scorer keep the rules on this artifact? Prints one line per property; exits with status 1 if any fails.

    python -m tools.prove [ARTIFACT] [--seed N] [--seconds S]

ARTIFACT is logs/RUN.ptz (default: the environment's ARTIFACT, else the newest). It is scored with the settings of its
own run, unless the environment overrides them: TTT_ENABLED=0 proves the score without adaptation. The audit samples the
shortest and the median validation document, the longest that fits in the time, and a few chosen by the seed. The
findings are also written to logs/RUN.prove.json.

The scorer is treated as a black box: it is fed streams of tokens and observed at three places: the scores it books to
each document (ScoreTable), the output of its last layer (OutputHead), and what it had learned by then (the weights and
every Adapter). The last two need eager kernels. A GPU's usual kernels, compiled or replayed, are observed only by what
they book, and must book the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

import train_gpt
from data import prepare
from tools import audit_hook
from tools.artifact import Opened, end_in_a_line, find_artifact, open_artifact, result_beside
from tools.claims import MOST_BYTES
from tools.processes import ends_with_its_parent
from tools.results import load_run
from tools.values import printable

# -----------------------------------------------------------------------------
# Listening: what the scorer books, traced to the pass through the output layer that produced it.


class Call(NamedTuple):
    """One pass through the output layer; nats and targets are in its order."""

    nats: list[float]
    targets: list[int]
    state: str  # digest of what had been learned by then
    sums: list[float]  # sum of the probabilities over the whole vocabulary, at sampled positions
    strays: list[float]  # there: the target's nats minus its nats in the pass over the whole vocabulary


@functools.cache
def odd_factors(size: int, device: torch.device) -> Tensor:
    """Fixed odd 64-bit integers (size,). Multiplied by an odd factor, no 32-bit difference vanishes modulo 2**64."""
    random = torch.Generator().manual_seed(size)
    return (torch.randint(-(1 << 62), 1 << 62, (size,), generator=random) * 2 + 1).to(device)


def state_of(tensors: Iterable[Tensor]) -> str:
    """A digest of every bit of these tensors (any shape, fp32), computed on their device: copying them to the host at
    every chunk would take most of the time."""
    sums = []
    for t in tensors:
        flat = t.detach().flatten()
        sums.append((flat.view(torch.int32) * odd_factors(len(flat), flat.device)).sum())
    return str(torch.stack(sums).tolist())


def lora_of_document(lora: train_gpt.LoRA, i: int) -> train_gpt.LoRA:
    """The LoRA of document i alone, B = 1."""
    down = lora.down if lora.down.ndim == 2 else lora.down[i : i + 1]
    return lora._replace(down=down, up=lora.up[i : i + 1])


class Ear(nn.Module):
    """Wraps the output layer. Records every call, what had been learned by then and, in some calls, the score of every
    entry of the vocabulary."""

    def __init__(self, head: nn.Module, vocab: int, learned: Callable[[], list[Tensor]], seed: int):
        super().__init__()
        self.head = head
        self.vocab = vocab
        self.learned = learned
        self.chance = np.random.default_rng(seed)
        self.passes = 0
        self.calls = []

    def __getattr__(self, name: str):
        """Forward all other attributes to the wrapped layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)

    def forward(self, x: Tensor, targets: Tensor, embedding: Tensor, delta=None) -> Tensor:
        nats = self.head(x, targets, embedding, delta)
        looks = []
        state = state_of(self.learned())
        if self.passes & (self.passes - 1) == 0:  # passes 0, 1, 2, 4, 8, ...: more often at the start
            looks = [self.look(x, targets, nats, embedding, delta) for _ in range(2)]
        self.passes += 1
        sums = [total for total, _ in looks]
        strays = [stray for _, stray in looks]
        self.calls.append(Call(nats.detach().flatten().tolist(), targets.flatten().tolist(), state, sums, strays))
        return nats

    @torch.no_grad()
    def look(self, x: Tensor, targets: Tensor, nats: Tensor, embedding: Tensor, delta) -> tuple[float, float]:
        """Score every entry of the vocabulary at one position of x (B, T, D) -> entries of Call.sums, Call.strays."""
        row, place = (int(self.chance.integers(size)) for size in targets.shape)
        own = None if delta is None else lora_of_document(delta, row)
        every = [
            self.head(x[row, place].expand(1, len(part), -1), part[None], embedding, own)[0]
            for part in torch.arange(self.vocab, device=x.device).split(1024)
        ]
        every = torch.cat(every).double()
        return every.neg().exp().sum().item(), (nats[row, place] - every[targets[row, place]]).item()


class Heard(NamedTuple):
    """What was booked for a stream of n tokens; entry j belongs to the target tokens[j + 1]. Where several ranks score,
    each books only parts of documents, so only `sums` and `counts` are known."""

    sums: np.ndarray  # (documents,) float64, nats
    counts: np.ndarray  # (documents,) int64, bookings
    nats: np.ndarray  # (n - 1,) float64, NaN where nothing was booked
    states: list[str | None]  # (n - 1,) Call.state when the target was scored; None without an ear
    calls: list[Call]  # the calls that the bookings came from, in order; empty without an ear
    strange: list[str]  # bookings that the output layer did not produce
    misplaced: list[str]  # bookings of targets that do not exist or are out of order


class Ledger:
    """Matches each booking with its targets and with the call that produced it."""

    def __init__(self, tokens: np.ndarray, ear: Ear | None, whole: bool):
        starts = np.flatnonzero(tokens == train_gpt.BOS)
        targets = len(tokens) - 1
        self.next = starts.tolist()
        self.end = [*starts[1:].tolist(), targets]  # of each document's targets
        self.tokens = tokens.tolist()
        self.ear = ear
        self.whole = whole
        sums = np.zeros(len(starts))
        counts = np.zeros(len(starts), np.int64)
        self.heard = Heard(sums, counts, np.full(targets, np.nan), [None] * targets, [], [], [])

    def book(self, documents: Sequence[int], nats: Sequence[float]) -> None:
        np.add.at(self.heard.sums, documents, nats)
        np.add.at(self.heard.counts, documents, 1)
        if not self.whole:
            return
        places = []
        for i in documents:
            places.append(self.next[i])
            self.next[i] += 1
        if any(at >= self.end[i] for i, at in zip(documents, places, strict=True)):
            self.heard.misplaced.append(f"a document of {len(self.tokens)} tokens is booked more targets than it has")
            return
        self.heard.nats[places] = nats
        if self.ear is not None:
            self.trace(places, nats)

    def trace(self, places: list[int], nats: Sequence[float]) -> None:
        pairs = [(value, self.tokens[at + 1]) for value, at in zip(nats, places, strict=True)]
        calls = self.ear.calls
        self.ear.calls = []
        for n, call in enumerate(calls):
            if in_order(pairs, zip(call.nats, call.targets, strict=True)):
                self.ear.calls = calls[n + 1 :]  # several rows may be scored before the first of them is booked
                self.heard.calls.append(call)
                for at in places:
                    self.heard.states[at] = call.state
                return
        if any(in_order(nats, call.nats) for call in calls):
            self.heard.misplaced.append(f"what is booked for target {places[0]} and on is the score of other targets")
        else:
            self.heard.strange.append(f"the output layer never gave what is booked for target {places[0]} and on")


def in_order(few: Iterable, many: Iterable) -> bool:
    """Whether `few` is a subsequence of `many`."""
    rest = iter(many)
    return all(any(one == other for other in rest) for one in few)


class ScorerError(Exception):
    """The scorer failed on a stream that it should be able to score."""


class LoneRank(train_gpt.Dist):
    """Simulates one of several ranks: ranks that score documents independently exchange no tensors."""

    def all_reduce(self, x: Tensor) -> Tensor:
        raise ScorerError("ranks exchange tensors while they score documents apart from each other")

    reduce_scatter = all_gather = all_reduce

    def broadcast(self, *values: float) -> list[float]:
        return list(values)

    def all_reduce_max(self, value: float) -> float:
        return value


@contextlib.contextmanager
def listening(model: nn.Module, seed: int) -> Iterator[Ear]:
    """Put an Ear around the model's output layer; it also sees every adapter made meanwhile."""
    plain = train_gpt.Adapter
    head = model.head
    adapters = []

    class Adapter(plain):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            adapters.append(self)

    def learned() -> list[Tensor]:
        return [*model.parameters(), *(t for adapter in adapters for t in adapter.tensors())]

    try:
        train_gpt.Adapter = Adapter
        model.head = Ear(head, model.config.vocab_size, learned, seed)
        yield model.head
    finally:
        train_gpt.Adapter = plain
        model.head = head


def hear(
    model: nn.Module,
    run: train_gpt.RunConfig,
    dist: train_gpt.Dist,
    tokens: np.ndarray,
    closely: bool = False,
    learners: train_gpt.Learners | None = None,
) -> Heard:
    """Score a stream of tokens (n,) that begins with BOS, and listen; `closely` adds an ear. Reusing the `learners` of
    an earlier stream saves the time to make new ones. Raises ScorerError."""
    docs = train_gpt.split_documents(tokens, np.ones(len(tokens), np.int64))
    run = dataclasses.replace(run, compile=0) if closely else run  # a replayed graph never calls the ear
    with listening(model, run.seed) if closely else contextlib.nullcontext() as ear:
        ledger = Ledger(tokens, ear, dist.world == 1)

        class Table(train_gpt.ScoreTable):
            def add(self, documents: np.ndarray, nats: np.ndarray) -> None:
                ledger.book(documents.tolist(), nats.tolist())

            def all_reduced(self, dist: train_gpt.Dist) -> Table:
                return self  # the ledger does the counting

        try:
            evaluation = train_gpt.Evaluation(model, docs, run, dist, train_gpt.Log(), lambda: 0.0)
            evaluation.table = Table(docs)
            evaluation.learners = learners or evaluation.learners
            evaluation.score()
        except ScorerError:
            raise
        except Exception as error:  # any failure of the scorer is a finding
            raise ScorerError(f"the scorer breaks on {len(tokens)} tokens: {type(error).__name__}: {error}") from error
    return ledger.heard


# -----------------------------------------------------------------------------
# The audit: what is scored, and how closely scores must agree.


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


# How much scores that should be equal may differ. On a CPU, finished rows are dropped from the batch, which may change
# the rounding of the rest. On a GPU all shapes are fixed, and scores are equal bit for bit.
TOLERANCE_BPB = 1e-6  # of a document, or of the part of it that is compared
TOLERANCE_NATS = 1e-4  # of a single target
SUM_TOLERANCE = 1e-5  # of probabilities that should add up to one


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


# {closely: how often the properties score a document of the sample}, as counted in audits of few documents.
SCORINGS = {False: 32, True: 6}
REUSES = 8  # of learners, before new ones are made
LONGEST_PROBE = 256  # tokens of a document scored to measure the speed
FEWEST_TOKENS = 256  # tokens of a longer document that are looked at, however slow that is


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

    def score(self, text: Text, closely: bool = False, dist: train_gpt.Dist | None = None, **changes: int) -> Heard:
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
        if elapsed - self.told > 10 and self.planned < math.inf:  # not while documents are being chosen
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


# -----------------------------------------------------------------------------
# Properties: each looks for faults and reports what it saw.


class Finding(NamedTuple):
    """The verdict on one property."""

    name: str
    ok: bool | None  # None where it does not apply
    figures: str

    def __str__(self) -> str:
        return printable(f"{ {True: 'ok', False: 'FAIL', None: '-'}[self.ok]:5} {self.name:20} {self.figures}")


Seen = tuple[Sequence[str] | None, str]  # faults (None where the property does not apply), and what was seen


class Future(NamedTuple):
    """A stream that shares its beginning with the original."""

    what: str
    tokens: np.ndarray
    same: int  # number of leading targets whose scores must be equal


def cuts(audit: Audit, size: int) -> list[int]:
    """Positions from which to change the tokens of a stream: its start; the first, an inner and the last token of a
    chunk; its end; and beyond the context."""
    chunk = audit.chunk
    context = audit.run.eval_seq_len
    last = size - 1
    inside = audit.chance.integers(1, max(2, chunk - 1), 4).tolist()
    places = {2, last, context + 1, context + 1 + inside[3]}
    for n, k in enumerate((0, 1, last // chunk // 2)):
        places |= {k * chunk + 1, k * chunk + 1 + inside[n], (k + 1) * chunk}
    return sorted(t for t in places if 2 <= t <= last)


def futures(audit: Audit, tokens: np.ndarray) -> Iterator[Future]:
    """Futures with other tokens, with earlier ends, with a BOS planted in the middle, and with a later end."""
    for t in cuts(audit, len(tokens)):
        yield Future(f"other tokens from {t} on", np.append(tokens[:t], audit.other(tokens[t:])), t - 1)
    end = audit.chunk + max(2, min(8, audit.chunk // 2))
    while end < len(tokens) - 1:
        yield Future(f"the text ends at {end}", tokens[: end + 1], end)
        end *= 2
    planted = tokens.copy()
    planted[len(tokens) // 2] = train_gpt.BOS
    yield Future(f"BOS planted at {len(tokens) // 2}", planted, len(tokens) // 2 - 1)
    longer = np.append(tokens, audit.other(np.resize(tokens, audit.chunk + 1)))
    yield Future(f"no end before {len(longer)}", longer, len(tokens) - 1)


def causality(audit: Audit) -> Seen:
    """A score depends on nothing after its target: neither on the tokens there, nor on where the document ends."""
    widest = Widest()
    for n, unit, heard in zip(audit.chosen, audit.units, audit.alone, strict=True):
        for what, tokens, same in futures(audit, unit.tokens):
            nats = audit.score(Text(tokens, unit.bytes)).nats
            widest.compare(f"document {n}, {what}", nats[:same], heard.nats[:same], unit.bytes[1 : same + 1])
    for n, unit in zip(audit.chosen, audit.units, strict=True) if audit.early_late else ():
        cut = len(unit.tokens) * 3 // 4  # other tokens from there on
        if cut > audit.early_late["eval_seq_len"]:
            changed = np.append(unit.tokens[:cut], audit.other(unit.tokens[cut:]))
            nats, expected = (
                audit.score(Text(tokens, unit.bytes), **audit.early_late).nats[: cut - 1]
                for tokens in (changed, unit.tokens)
            )
            what = f"document {n} in late chunks, other tokens from {cut} on"
            widest.compare(what, nats, expected, unit.bytes[1:cut])
    first = min(audit.texts, key=lambda text: len(text.tokens))
    next_one = audit.texts[-1]
    same = len(first.tokens)
    pair = joined([first, next_one])
    changed = np.concatenate([pair.tokens[: same + 1], audit.other(next_one.tokens[1:])])
    nats, expected = (audit.score(Text(tokens, pair.bytes)).nats[:same] for tokens in (changed, pair.tokens))
    widest.compare("the next document is another", nats, expected, pair.bytes[1 : same + 1])
    cut = "" if all(map(audit.is_whole, audit.chosen)) else f", at most {audit.limit} tokens of each in the time"
    return widest.faults, f"{widest}; {widest.seen} other futures of {len(audit.texts)} documents{cut}"


def score_before_update(audit: Audit) -> Seen:
    """A chunk is scored with exactly what a replay that stops just before it has learned."""
    faults = []
    seen = 0
    updates = 0
    for n, unit, heard in zip(audit.chosen, audit.units, audit.closely, strict=True):
        last = (len(unit.tokens) - 2) // audit.chunk
        for k in sorted({0, 1, 2, last // 2, last} & set(range(last + 1))):
            begin = k * audit.chunk
            tokens = np.append(unit.tokens[: begin + 1], audit.other(unit.tokens[:2]))
            replay = audit.score(Text(tokens, unit.bytes), closely=True)
            seen += 1
            states = replay.states[begin], heard.states[begin]
            if None in states or states[0] != states[1]:
                faults.append(f"document {n}: what scores chunk {k} is not what the chunks before it left")
        updates += len({state for state in heard.states if state}) - 1
    faults += hidden_learning(audit) if updates == 0 else []
    return (
        faults,
        f"{seen} chunks scored bit for bit by what a replay left that stops before them; {updates} updates seen",
    )


def hidden_learning(audit: Audit) -> list[str]:
    """A fault if adaptation changes scores although none of the tensors observed has changed."""
    if not audit.run.ttt_enabled:
        return []
    unit, heard = max(zip(audit.units, audit.closely, strict=True), key=lambda pair: len(pair[0].tokens))
    reach = min(audit.run.eval_seq_len, int(document_starts(unit.tokens)[1]) - 1)  # contexts may differ beyond it
    apart = abs(audit.score(unit, ttt_enabled=0).nats - heard.nats)[:reach].max(initial=0.0)
    text = f"adaptation changes scores by {apart:.2g} nats, and nothing that could have learned is in sight"
    return [text] if apart > TOLERANCE_NATS else []


def independence(audit: Audit) -> Seen:
    """A document scores the same alone, in its batch, in another batch and order, and on another rank."""
    if audit.stream:
        return None, "TTT_SCOPE=stream: a score depends on the documents before it; results say doc_independent:0"
    changes = {}
    if audit.run.batched_ttt and audit.dist.device.type == "cpu":  # on a GPU it sets the shapes, which affect the bits
        changes["ttt_batch_docs"] = 2 if audit.run.ttt_batch_docs > 2 else 64
    wild = audit.texts[-1]._replace(tokens=np.append(train_gpt.BOS, audit.other(audit.texts[-1].tokens[1:])))
    dull = audit.texts[0]._replace(tokens=np.append(train_gpt.BOS, np.full(len(audit.texts[0].tokens) - 1, 2)))
    backward = [wild, *audit.texts[::-1], dull]
    elsewhere = by_document(backward, audit.score(joined(backward), **changes).nats)[-2:0:-1]
    batch = by_document(audit.texts, audit.together.nats)
    ranks = sum(heard.sums for heard in audit.by_rank)
    widest = Widest()
    if audit.early_late:
        late = by_document(audit.texts, audit.score(joined(audit.texts), **audit.early_late).nats)
        for n, text, nats in zip(audit.chosen, audit.texts, late, strict=True):
            alone = audit.score(text, **audit.early_late).nats
            widest.compare(f"document {n} with late chunks in its batch, and alone", nats, alone, text.bytes[1:])
    total = 0.0
    for i, (text, alone) in enumerate(zip(audit.texts, audit.alone, strict=True)):
        for way, nats in {"in its batch": batch[i], "in another batch": elsewhere[i]}.items():
            widest.compare(f"document {audit.chosen[i]} {way}, and alone", nats, alone.nats, text.bytes[1:])
        what = f"document {audit.chosen[i]} by eight ranks and by one"
        size = int(text.bytes.sum())
        widest.compare_sums(what, ranks[i] - audit.together.sums[i], size)
        total += float((elsewhere[i] - alone.nats).sum())
    bpb = abs(total) / math.log(2) / int(joined(audit.texts).bytes.sum())
    return widest.faults, f"{widest}, {bpb:.1e} in all; {len(audit.texts)} documents, each in 4 settings"


def by_document(texts: Sequence[Text], nats: np.ndarray) -> list[np.ndarray]:
    """Split the scores of joined texts into one array per text, without the closing BOS."""
    ends = np.cumsum([len(text.tokens) for text in texts])
    return [nats[end - len(text.tokens) : end - 1] for end, text in zip(ends, texts, strict=True)]


def normalised(audit: Audit) -> Seen:
    """The probabilities over the whole vocabulary sum to one, and the score booked is that of the target."""
    looked = [call for heard in audit.closely for call in heard.calls if call.sums]
    fresh = {heard.calls[0].state for heard in audit.closely if heard.calls}
    adapted = sum(len(call.sums) for call in looked if call.state not in fresh)
    off = np.array([total for call in looked for total in call.sums]) - 1
    strays = np.array([stray for call in looked for stray in call.strays])
    faults = list(dict.fromkeys(audit.strange))
    most = max(abs(off), default=math.inf)
    if not most <= SUM_TOLERANCE:
        faults.append(f"probabilities add up to one {most:+.2g}" if len(off) else "no score was traced")
    if not (abs(strays) <= TOLERANCE_NATS).all():
        faults.append(f"a target's nats are {abs(strays).max():.2g} off those that it has among the vocabulary's")
    widest = Widest()
    for n, unit, ear, plain in zip(audit.chosen, audit.units, audit.closely, audit.alone, strict=True):
        widest.compare(f"document {n}, heard closely or not", ear.nats, plain.nats, unit.bytes[1:])
    how = f"max {most:.1e} off one at {len(off)} positions, {adapted} of them after adaptation"
    return faults + widest.faults, f"{how}; every score booked is the output layer's, +-{widest.nats:.1e} nats"


def single_pass(audit: Audit) -> Seen:
    """Every target of every document is booked exactly once, in order, with the score of the output layer."""
    docs = audit.opened.setup.validation
    audit.score(joined(audit.texts), closely=True)
    faults = list(dict.fromkeys(audit.misplaced + audit.strange))
    sizes = np.array([len(text.tokens) for text in audit.texts])
    sizes[-1] -= 1  # no BOS closes the last document
    counts = {"together": audit.together.counts}
    if not audit.stream:
        counts["by eight ranks"] = sum(heard.counts for heard in audit.by_rank)
    for how, booked in counts.items():
        wrong = np.flatnonzero(booked != sizes)
        faults += [f"document {audit.chosen[i]} {how}: {booked[i]} bookings of {sizes[i]} targets" for i in wrong]
    shards = sum(len(train_gpt.read_shard(path)) for path in train_gpt.find_shards(audit.run.data_path, "val"))
    if int(docs.lengths.sum()) != shards - 1:
        faults.append(f"the scorer sees {docs.lengths.sum()} targets, the shards hold {shards - 1}")
    return faults, (
        f"{len(audit.together.nats)} targets of {len(audit.texts)} documents once each, in order; "
        f"{shards - 1} targets of {len(audit.starts) - 1} documents in the shards"
    )


INSTALLED = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/sys", sys.prefix, sys.base_prefix)
LIBRARIES = [os.path.realpath(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if name]
PYTHONPATH = [os.path.realpath(name) for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "zstandard")  # that the entry may import
DEVICES = r"/dev/(null|zero|u?random|shm/.*%s)"
STARTS = ("subprocess.Popen", "os.posix_spawn")
COMPILERS = ("cc", "gcc", "clang", "ptxas", "ldconfig", "file")  # programs that Triton starts
HANDED_DOWN = r"/proc/[^/]+/(task/[^/]+/)?(fd|fdinfo|map_files|mem|root|cwd)(/.*)?"  # what another process has open


def lay_out(audit: Audit, folder: Path) -> dict[str, str]:
    """Copy everything an evaluation of the sample may need into a folder; returns the environment to run it in."""
    whole = joined(audit.texts)
    setup = audit.opened.setup
    shutil.copyfile(train_gpt.__file__, folder / "train_gpt.py")
    shutil.copyfile(setup.run.artifact, folder / "artifact.ptz")
    shutil.copyfile(setup.tokenizer.path, folder / "tokenizer.model")
    prepare.write_shard(folder / "fineweb_val_000000.bin", [whole.tokens])
    if has_sidecar(audit):
        prepare.write_shard(folder / "fineweb_val_bytes_000000.bin", [whole.bytes])
    return audit.opened.env | {
        "ARTIFACT": str(folder / "artifact.ptz"),
        "DATA_PATH": str(folder),
        "TOKENIZER_PATH": "tokenizer.model",
        "RUN_ID": "prove",
        "PYTHONPATH": elsewhere(audit.opened.env.get("PYTHONPATH", "")),
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def elsewhere(folders: str) -> str:
    """PYTHONPATH without this repository: not all of its code counts towards the size limit."""
    here = Path(audit_hook.__file__).resolve().parent.parent
    found = [Path(folder).resolve() for folder in folders.split(os.pathsep) if folder]
    return os.pathsep.join(str(folder) for folder in found if folder != here)


def artifact_alone(audit: Audit) -> Seen:
    """A process given only program, artifact, tokenizer and validation data scores the same and opens nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        env = lay_out(audit, folder)
        report = folder / "opened.json"
        there = sorted(path.name for path in folder.iterdir())
        source = Path(audit_hook.__file__).read_text(encoding="utf-8")
        script = [sys.executable, "-c", source, str(folder / "train_gpt.py"), str(report)]
        done = subprocess.run(
            script,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=ends_with_its_parent(),
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [f"the evaluation ends with status {done.returncode}: {last}"], ""
        opened = json.loads(report.read_text())
        result = json.loads((folder / "logs" / "prove.json").read_text())
    compiles = audit.dist.device.type == "cuda"
    used = [name for name in there if str(folder / name) in opened]
    faults = [f"it opened {path}" for path in opened if not expected(path, folder, compiles)]
    return faults + wrong_result(audit, result), f"val_bpb {result['val_bpb']:.5f} again, from {', '.join(used)}"


def expected(path: str, folder: Path, compiles: bool) -> bool:
    """Whether an evaluation may open this path: it is in its folder, or belongs to what is installed. Three exceptions:
    Python runs `uname` to name the platform; on a GPU, compilers run, and they call `file` on Python; and torch looks
    for plug-ins in all packages."""
    if path.startswith(audit_hook.GOES_OUTSIDE):
        event, _, arguments = path.partition(": ")
        program = Path((arguments.split("'") + [""])[1]).name
        return event in STARTS and (program == "uname" or (compiles and program in COMPILERS))
    if Path(path).name.startswith("fineweb_train_"):
        return False
    if re.fullmatch(HANDED_DOWN, path):
        return False
    torch_folder = Path(torch.__file__).resolve().parent.parent
    installed = any(Path(path).is_relative_to(os.path.realpath(root)) for root in (folder, torch_folder, *INSTALLED))
    library = ".so" in Path(path).suffixes and str(Path(path).parent) in LIBRARIES
    devices = DEVICES % ("|nvidia.*" if compiles else "")
    return installed or library or of_package(path) or bool(re.fullmatch(devices, path))


def of_package(path: str) -> bool:
    """Whether this path is on PYTHONPATH and belongs to one of PACKAGES, or is the entry_points.txt of any package."""
    for folder in PYTHONPATH:
        if Path(path).is_relative_to(folder):
            top, *rest = Path(path).relative_to(folder).parts
            return top in PACKAGES or (top.endswith(".dist-info") and rest == ["entry_points.txt"])
    return False


def wrong_result(audit: Audit, result: dict) -> list[str]:
    """Faults in the result of an evaluation of the sample."""
    whole = joined(audit.texts)
    size = int(whole.bytes[1:].sum())
    truth = {"documents": len(audit.texts), "tokens": len(whole.tokens) - 1, "bytes": size, "degraded_documents": 0}
    faults = [f"{name} is {result[name]}, counted {value}" for name, value in truth.items() if result[name] != value]
    bpb = float(audit.together.nats.sum()) / math.log(2) / size
    if not abs(result["val_bpb"] - bpb) <= TOLERANCE_BPB:
        faults.append(f"val_bpb is {result['val_bpb']:.7f}, what is booked adds up to {bpb:.7f}")
    return faults


def has_sidecar(audit: Audit) -> bool:
    """Whether any validation shard has a side-car. Looks for itself: the program is what is being audited."""
    folder = Path(audit.run.data_path)
    names = (path.name for path in folder.glob("fineweb_val_[0-9]*.bin"))
    return any((folder / name.replace("_val_", "_val_bytes_")).exists() for name in names)


def bytes_counted(audit: Audit) -> Seen:
    """Reported sizes of code and artifact match the files, and each document's byte count matches its decoded text."""
    setup = audit.opened.setup
    faults = []
    program = Path(train_gpt.__file__).read_bytes()
    artifact = Path(setup.run.artifact).stat().st_size
    most = min(setup.run.artifact_bytes, MOST_BYTES)
    if len(program) + artifact > most:
        faults.append(f"code and artifact are {len(program) + artifact} bytes, the limit is {most}")
    result = result_beside(Path(setup.run.artifact))
    sizes = {"artifact_bytes": artifact}
    if result.get("code_sha256") == hashlib.sha256(program).hexdigest():
        sizes |= {"code_bytes": len(program), "total_bytes": len(program) + artifact}
    faults += [f"{name} is {result[name]}, the file has {n}" for name, n in sizes.items() if result.get(name, n) != n]
    excess = excess_bytes(audit)
    if result.get("validation") == setup.validation.sha256() and result.get("excess_bytes", excess) != excess:
        faults.append(f"excess_bytes is {result['excess_bytes']}, the spaces inside pieces have {excess}")
    counted = setup.validation.target_bytes()
    recount = recounter(audit)
    spans = [setup.validation.tokens[audit.starts[i] : audit.starts[i + 1]] for i in audit.chosen]
    decoded = [recount(span.tolist()) for span in spans]
    for i, size in zip(audit.chosen, decoded, strict=True):
        if size is not None and size != counted[i]:
            faults.append(f"document {i}: {counted[i]} bytes are counted, its tokens decode to {size}")
    if counted.sum() != setup.validation.bytes[1:].sum():
        faults.append(f"documents have {counted.sum()} bytes, their tokens {setup.validation.bytes[1:].sum()}")
    how = f"{sum(counted[audit.chosen])} bytes of {len(decoded)} documents decoded again"
    if None in decoded:
        how = "its tokenizer is lossy: original bytes cannot be recounted from tokens"
    if excess > 0:
        how += f"; by the contest's formula, which counts {excess} bytes too many: there are spaces inside pieces"
    return faults, f"{len(program)} of code + {artifact} of artifact; {counted.sum()} of text; {how}"


def recounter(audit: Audit) -> Callable[[list[int]], int | None]:
    """A function that counts the bytes of a document from its tokens: by the contest's formula if there is no side-car.
    It returns None where the tokenizer is lossy."""
    setup = audit.opened.setup
    if not has_sidecar(audit):
        return lambda tokens: contest_size(setup.tokenizer.processor, tokens)
    caseops = train_gpt.transform_of(Path(setup.run.data_path), setup.tokenizer) == "caseops"
    encoder = prepare.load_encoder(setup.tokenizer.path.read_bytes(), caseops, str(setup.tokenizer.path))
    original = prepare.decode_caseops if caseops else str
    return lambda tokens: len(original(encoder.processor.decode(tokens)).encode()) if encoder.exact else None


def contest_size(processor: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> int:
    """Bytes of the text that the tokens spell, by the contest's formula. A leading space after a control token does not
    count; a space mark inside a piece counts with its own three UTF-8 bytes."""
    spelt = b""
    bare = True  # no text precedes the next piece
    for token in tokens:
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            bare = True
            continue
        piece = processor.id_to_piece(token)
        space = piece.startswith("\u2581")
        if processor.is_byte(token):
            spelt += bytes([int(piece[3:5], 16)])
        else:
            if space and not bare:
                spelt += b" "
            spelt += piece.removeprefix("\u2581").encode()
        bare = False
    return len(spelt)


def excess_bytes(audit: Audit) -> int:
    """Bytes that the contest's formula counts in excess of the text of all documents: two for every space mark inside
    a piece, which counts three bytes but spells one space."""
    docs = audit.opened.setup.validation
    if has_sidecar(audit):
        return 0
    processor = audit.opened.setup.tokenizer.processor
    marks = np.zeros(processor.get_piece_size(), np.int64)
    for piece in np.unique(docs.tokens).tolist():
        if not (processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece)):
            marks[piece] = processor.id_to_piece(piece)[1:].count("\u2581")
    return 2 * int(marks[docs.tokens].sum())


def reported(audit: Audit) -> Seen:
    """The files of the artifact's own run agree with each other, and the sampled documents score the same again."""
    setup = audit.opened.setup
    path = Path(audit.run.artifact).with_suffix(".json")
    if not path.with_suffix(".docs.npz").exists():
        return None, f"no {path.with_suffix('.docs.npz').name} beside the artifact"
    try:
        run = load_run(path)
    except train_gpt.UserError as error:
        return [str(error)], ""
    knobs = {name: value for name, value in train_gpt.settings(audit.run).items() if name.startswith(SCORING)}
    here = train_gpt.device_name(audit.dist.device)
    same_device = here == run.result["device"] or here.startswith("CPU") and run.result["device"].startswith("CPU")
    reasons = {
        "it was scored by another train_gpt.py": run.result["code_sha256"] != file_sha256(train_gpt.__file__),
        "it is of other validation documents": run.validation != setup.validation.sha256(),
        "it was scored with other knobs": any(run.result["knobs"].get(name) != value for name, value in knobs.items()),
        f"it was scored on {run.result['device']}": not same_device,
        f"it was scored by {run.result['versions']}": run.result["versions"] != train_gpt.versions(),
        "it was short of time": run.result["degraded_documents"] > 0,
        "its scores depend on their order": audit.stream,
    }
    for reason in (reason for reason, true in reasons.items() if true):
        return None, f"{path.name} agrees with its files, but {reason}, so that its scores are not compared"
    widest = Widest()
    whole = len(audit.chosen) - (audit.chosen[-1] < len(audit.starts) - 2)  # the last of the sample has no closing BOS
    for i, text, nats in zip(audit.chosen[:whole], audit.texts, audit.together.sums, strict=False):
        if not audit.is_whole(i):
            continue
        size = int(text.bytes.sum())
        widest.compare_sums(f"document {i}, as reported", nats - run.nats[i], size)
    return (
        widest.faults,
        f"val_bpb {run.bpb:.5f} of {path.name}: max {widest.bpb:.1e} bpb off in {widest.seen} documents",
    )


SCORING = ("TTT_", "EVAL_SEQ_LEN", "EVAL_STRIDE", "SEED", "MICRO_BATCH_TOKENS")  # prefixes of knobs that affect scores
PROPERTIES = {
    "causality": causality,
    "score before update": score_before_update,
    "independence": independence,
    "normalised": normalised,
    "single pass": single_pass,
    "artifact alone": artifact_alone,
    "bytes": bytes_counted,
    "reported": reported,
}


def file_sha256(path: Path | str) -> str:
    return hashlib.sha256(train_gpt.read_file(path)).hexdigest()


def prove(opened: Opened, seed: int, seconds: float, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Check every property in turn; progress messages go to `tell`."""
    try:
        audit = Audit(opened, seed, seconds, tell)
    except ScorerError as error:
        yield from (Finding(name, False, str(error)) for name in PROPERTIES)
        return
    for name, look in PROPERTIES.items():
        try:
            faults, figures = look(audit)
        except ScorerError as error:
            faults = [str(error)]
            figures = ""
        more = f" (and {len(faults) - 1} more)" if faults and len(faults) > 1 else ""
        yield Finding(name, None if faults is None else not faults, f"{faults[0]}{more}" if faults else figures)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prove", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("artifact", nargs="?", help="logs/RUN.ptz; default: ARTIFACT, else the newest in logs/")
    parser.add_argument("--seed", type=prepare.whole_number, default=1, help="chooses documents and cuts [%(default)s]")
    parser.add_argument(
        "--seconds", type=prepare.whole_number, default=120, help="about how long to look [%(default)s]"
    )
    return parser


def run_prove(arguments: argparse.Namespace) -> int:
    artifact = find_artifact(arguments.artifact)
    opened = open_artifact(artifact, {"EVAL_SECONDS": "0"})
    run = opened.setup.run
    dist = opened.setup.dist
    train_gpt.prepare_torch(run, dist.device)
    how = f"TTT_PARAMS={run.ttt_params} TTT_SCOPE={run.ttt_scope}" if run.ttt_enabled else "TTT_ENABLED=0"
    print(printable(f"{artifact}: {how}, {train_gpt.device_name(dist.device)}"), flush=True)
    findings = []
    tell = functools.partial(print, file=sys.stderr, flush=True)
    for finding in prove(opened, arguments.seed, arguments.seconds, tell):
        print(finding, flush=True)
        findings.append(finding)
    ok = all(finding.ok is not False for finding in findings)
    facts = {
        "artifact_sha256": file_sha256(artifact),
        "code_sha256": file_sha256(train_gpt.__file__),
        "ok": ok,
        "seed": arguments.seed,
        "system": how,
        "device": train_gpt.device_name(dist.device),
        "properties": [finding._asdict() for finding in findings],
    }
    train_gpt.write_atomically(
        artifact.with_suffix(".prove.json"), [json.dumps(facts, indent=1, allow_nan=False).encode()]
    )
    return 0 if ok else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 if a property fails; 2 for an error that the user can fix; 130 if interrupted."""
    return end_in_a_line(lambda: run_prove(command_line().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
