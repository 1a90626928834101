"""
Does the scorer keep the rules on this artifact? One line a property; exit status 1 if one fails.

    python -m tools.prove [ARTIFACT] [--seed N] [--seconds S]

ARTIFACT is logs/RUN.ptz (default: the environment's ARTIFACT, else the newest). It is scored as the run beside it was,
unless the environment says otherwise: TTT_ENABLED=0 proves the score without adaptation. The documents looked at are
the shortest, the median and the longest validation document that fits the time, and some chosen by the seed. The lines
are also left in logs/RUN.prove.json.

The scorer is a black box: it is given streams of tokens, and heard at three places: what it books to a document
(ScoreTable), what its output layer gave (OutputHead), and what had been learned by then (the weights, and every
Adapter). The last two need eager kernels; a GPU's usual ones, compiled or replayed, are heard by what they book, and
must book the same.
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
# Listening: what the scorer books, traced to the pass through the output layer that gave it.


class Call(NamedTuple):
    """One pass through the output layer, whose targets are here in its order."""

    nats: list[float]
    targets: list[int]
    state: str  # a digest of what had been learned by then
    sums: list[float]  # of the probabilities of the whole vocabulary, at sampled places
    strays: list[float]  # there: the target's nats less those that it has among the whole vocabulary's


@functools.cache
def odd_factors(size: int, device: torch.device) -> Tensor:
    """Fixed odd numbers of 64 bits (size,): an odd factor lets no difference of 32 bits vanish modulo 2**64."""
    random = torch.Generator().manual_seed(size)
    return (torch.randint(-(1 << 62), 1 << 62, (size,), generator=random) * 2 + 1).to(device)


def state_of(tensors: Iterable[Tensor]) -> str:
    """A digest of every bit of these tensors (any shape, fp32), computed where they are: to copy them at every chunk
    would take most of the time."""
    sums = []
    for t in tensors:
        flat = t.detach().flatten()
        sums.append((flat.view(torch.int32) * odd_factors(len(flat), flat.device)).sum())
    return str(torch.stack(sums).tolist())


def lora_of_document(lora: train_gpt.LoRA, i: int) -> train_gpt.LoRA:
    """The correction of document i alone, B = 1."""
    down = lora.down if lora.down.ndim == 2 else lora.down[i : i + 1]
    return lora._replace(down=down, up=lora.up[i : i + 1])


class Ear(nn.Module):
    """Stands before the output layer and notes what passes, what had been learned by then, and, in some calls, what
    every entry of the vocabulary would have scored."""

    def __init__(self, head: nn.Module, vocab: int, learned: Callable[[], list[Tensor]], seed: int):
        super().__init__()
        self.head = head
        self.vocab = vocab
        self.learned = learned
        self.chance = np.random.default_rng(seed)
        self.passes = 0
        self.calls = []

    def __getattr__(self, name: str):
        """The rest of the layer is as it was."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)

    def forward(self, x: Tensor, targets: Tensor, embedding: Tensor, delta=None) -> Tensor:
        nats = self.head(x, targets, embedding, delta)
        looks = []
        state = state_of(self.learned())
        if self.passes & (self.passes - 1) == 0:  # the first and every power of two: more often at the start
            looks = [self.look(x, targets, nats, embedding, delta) for _ in range(2)]
        self.passes += 1
        sums = [total for total, _ in looks]
        strays = [stray for _, stray in looks]
        self.calls.append(Call(nats.detach().flatten().tolist(), targets.flatten().tolist(), state, sums, strays))
        return nats

    @torch.no_grad()
    def look(self, x: Tensor, targets: Tensor, nats: Tensor, embedding: Tensor, delta) -> tuple[float, float]:
        """One hidden state of (B, T, D) with every entry of the vocabulary as its target -> Call.sums, Call.strays."""
        row, place = (int(self.chance.integers(size)) for size in targets.shape)
        own = None if delta is None else lora_of_document(delta, row)
        every = [
            self.head(x[row, place].expand(1, len(part), -1), part[None], embedding, own)[0]
            for part in torch.arange(self.vocab, device=x.device).split(1024)
        ]
        every = torch.cat(every).double()
        return every.neg().exp().sum().item(), (nats[row, place] - every[targets[row, place]]).item()


class Heard(NamedTuple):
    """What was booked for a stream of n tokens: [j] is of the target tokens[j + 1]. One of several ranks is booked
    parts of documents, of which only the sums are known."""

    sums: np.ndarray  # (documents,) float64, nats
    counts: np.ndarray  # (documents,) int64, bookings
    nats: np.ndarray  # (n - 1,) float64, NaN where nothing was booked
    states: list[str | None]  # (n - 1,) what had been learned when the target was scored, if there was an ear
    calls: list[Call]  # those that the bookings came from, in order, if there was an ear
    strange: list[str]  # bookings that the output layer did not give
    misplaced: list[str]  # bookings of targets that are not there, or not in order


class Ledger:
    """Finds the targets that a booking is of, and the call that it came from."""

    def __init__(self, tokens: np.ndarray, ear: Ear | None, whole: bool):
        starts = np.flatnonzero(tokens == train_gpt.BOS)
        targets = len(tokens) - 1
        self.next = starts.tolist()
        self.end = [*starts[1:].tolist(), targets]  # of every document's targets
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
    """Whether all of `few` come in `many`, in this order."""
    rest = iter(many)
    return all(any(one == other for other in rest) for one in few)


class ScorerError(Exception):
    """The scorer broke down on a stream that it should score."""


class LoneRank(train_gpt.Dist):
    """One of several ranks, played alone: ranks that score documents apart from each other exchange nothing."""

    def all_reduce(self, x: Tensor) -> Tensor:
        raise ScorerError("ranks exchange tensors while they score documents apart from each other")

    reduce_scatter = all_gather = all_reduce

    def broadcast(self, *values: float) -> list[float]:
        return list(values)

    def all_reduce_max(self, value: float) -> float:
        return value


@contextlib.contextmanager
def listening(model: nn.Module, seed: int) -> Iterator[Ear]:
    """An ear before the model's output layer, which also knows every adapter."""
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
    """Score a stream of tokens (n,) that begins with BOS, and listen; `closely` with an ear. `learners` of an earlier
    stream save the time to make them. Raises ScorerError."""
    docs = train_gpt.split_documents(tokens, np.ones(len(tokens), np.int64))
    run = dataclasses.replace(run, compile=0) if closely else run  # nothing passes an ear in a replayed graph
    with listening(model, run.seed) if closely else contextlib.nullcontext() as ear:
        ledger = Ledger(tokens, ear, dist.world == 1)

        class Table(train_gpt.ScoreTable):
            def add(self, documents: np.ndarray, nats: np.ndarray) -> None:
                ledger.book(documents.tolist(), nats.tolist())

            def all_reduced(self, dist: train_gpt.Dist) -> Table:
                return self  # the audit counts for itself

        try:
            evaluation = train_gpt.Evaluation(model, docs, run, dist, train_gpt.Log(), lambda: 0.0)
            evaluation.table = Table(docs)
            evaluation.learners = learners or evaluation.learners
            evaluation.score()
        except ScorerError:
            raise
        except Exception as error:  # whatever a scorer does wrong is a finding
            raise ScorerError(f"the scorer breaks on {len(tokens)} tokens: {type(error).__name__}: {error}") from error
    return ledger.heard


# -----------------------------------------------------------------------------
# The audit: what is scored, and how equal scores must be.


class Text(NamedTuple):
    """A stream of tokens that begins with BOS, and the bytes that they stand for."""

    tokens: np.ndarray  # (n,) uint16
    bytes: np.ndarray  # (n,) int64


def joined(texts: Iterable[Text]) -> Text:
    tokens, sizes = zip(*texts, strict=True)
    return Text(np.concatenate(tokens), np.concatenate(sizes))


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """(n,) -> (documents + 1,), the last one n"""
    return np.append(np.flatnonzero(tokens == train_gpt.BOS), len(tokens))


# How far the same score may be from itself: on a CPU rows that have ended are dropped, and what is left may be rounded
# otherwise. On a GPU all shapes are fixed, and not a bit differs.
TOLERANCE_BPB = 1e-6  # of a document, or of that part of it which is compared
TOLERANCE_NATS = 1e-4  # of a single target
SUM_TOLERANCE = 1e-5  # of probabilities that should add up to one


class Widest:
    """The largest differences between scores that should be the same."""

    def __init__(self):
        self.nats = 0.0
        self.bpb = 0.0
        self.seen = 0
        self.faults = []

    def compare(self, what: str, nats: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
        """Scores of the same targets (n,) twice, and the bytes of these (n,)."""
        apart = np.nan_to_num(nats - expected, nan=np.inf)
        most = float(abs(apart).max(initial=0.0))
        self.nats = max(self.nats, most)
        if most > TOLERANCE_NATS:
            self.faults.append(f"{what}: {most:.2g} nats at target {int(abs(apart).argmax())}")
        self.compare_sums(what, float(apart.sum()), int(size.sum()))

    def compare_sums(self, what: str, apart: float, size: int) -> None:
        """The difference of two sums of nats, and the bytes that both are of."""
        bpb = abs(apart) / math.log(2) / max(1, size)
        self.bpb = max(self.bpb, bpb)
        self.seen = self.seen + 1
        if bpb > TOLERANCE_BPB:
            self.faults.append(f"{what}: {bpb:.2g} bpb")

    def __str__(self) -> str:
        return f"max {self.nats:.1e} nats a target, {self.bpb:.1e} bpb a document"


# How often the properties score a document of the sample, closely or not, as counted in audits of few documents.
SCORINGS = {False: 32, True: 6}
REUSES = 8  # of learners
LONGEST_PROBE = 256  # tokens of a document that are scored to measure the speed
FEWEST_TOKENS = 256  # of a longer document that are looked at, however slow that is


class Audit:
    """An artifact, the sample of its documents, and what was heard of them."""

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
        self.misplaced = []  # of all that was heard
        self.began = time.monotonic()
        self.told = 0.0
        self.spent = 0.0
        self.planned = math.inf
        self.busy = 0.0  # seconds that went into `spent`
        self.limit = LONGEST_PROBE  # tokens of a document that are looked at
        self.closeness = 1.0  # how many times as long a document takes when an ear hears it
        self.starts = document_starts(opened.setup.validation.tokens)
        self.chosen = self.choose(np.diff(self.starts))
        self.texts = [self.text(i) for i in self.chosen]

    def text(self, i: int) -> Text:
        """A validation document without the BOS that closes it, as far as the time lets it be looked at."""
        docs = self.opened.setup.validation
        end = min(self.starts[i + 1], self.starts[i] + self.limit)
        span = slice(self.starts[i], end)
        return Text(np.array(docs.tokens[span], np.uint16), np.array(docs.bytes[span], np.int64))

    def is_whole(self, i: int) -> bool:
        """Whether all of a document is looked at."""
        return self.starts[i + 1] - self.starts[i] <= self.limit

    def choose(self, sizes: np.ndarray) -> list[int]:
        """Tokens of every document -> the sample, in the order of the shard, and `limit`. Each is scored some SCORINGS
        times, in pairs twice as often."""
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
        """Seconds per token pass, heard closely or not."""
        pair = joined(texts)
        rates = {}
        for closely in (False, False, True, True):  # the first pass is slow
            began = time.monotonic()
            self.score(pair, closely)
            rates[closely] = (time.monotonic() - began) / sum(self.cost(len(text.tokens)) for text in texts)
        return rates

    def cost(self, tokens: int) -> float:
        """Of scoring a document once, in token passes."""
        if not self.run.ttt_enabled:
            return float(tokens)
        return train_gpt.batched_cost(np.array([tokens]), self.run, self.dist.device)

    def score(self, text: Text, closely: bool = False, dist: train_gpt.Dist | None = None, **changes: int) -> Heard:
        """Score a stream, with these knobs changed."""
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
        """Learners of the scorings before this one, on a GPU, where it takes seconds to capture their graphs. Some
        scorings make their own all the same, which shows what a scorer does while it makes them."""
        if self.dist.device.type == "cpu":
            return None
        self.reuses += 1
        if run not in self.learners or self.reuses % REUSES == 0:
            self.learners = {run: train_gpt.Learners(self.model, self.dist.device)}
        return self.learners[run]

    @functools.cached_property
    def early_late(self) -> dict[str, int]:
        """Knobs under which late chunks begin after four others, so that documents of the sample reach them; none where
        they are not those of a document that adapts."""
        if not self.run.ttt_enabled or not self.run.batched_ttt:
            return {}
        context = 4 * self.chunk
        knobs = dict(eval_seq_len=context, eval_stride=min(self.run.eval_stride, context))
        return knobs | dict(ttt_late_chunk_tokens=2 * self.chunk)

    @functools.cached_property
    def units(self) -> list[Text]:
        """What is scored by itself: a document, or, of a stream, two in a row."""
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
        """The documents together, as each of eight ranks scores its share: none but the longest comes to rank 0."""
        ranks = [LoneRank(rank, 8, self.dist.device) for rank in range(8)]
        return [self.score(joined(self.texts), dist=rank) for rank in ranks]

    def other(self, tokens: np.ndarray) -> np.ndarray:
        """Random tokens, none of them that in its place, none BOS."""
        kinds = self.model.config.vocab_size - 2
        steps = self.chance.integers(1, kinds, len(tokens))
        return ((tokens.astype(np.int64) - 2 + steps) % kinds + 2).astype(np.uint16)


# -----------------------------------------------------------------------------
# Properties: each looks for faults, and says what it saw.


class Finding(NamedTuple):
    """What is known of a property."""

    name: str
    ok: bool | None  # None where it does not apply
    figures: str

    def __str__(self) -> str:
        return printable(f"{ {True: 'ok', False: 'FAIL', None: '-'}[self.ok]:5} {self.name:20} {self.figures}")


Seen = tuple[Sequence[str] | None, str]  # faults, or None where the property does not apply; and what was seen


class Future(NamedTuple):
    """A stream that begins as another does."""

    what: str
    tokens: np.ndarray
    same: int  # its first targets, whose scores must be the same


def cuts(audit: Audit, size: int) -> list[int]:
    """Where the tokens of a stream may begin to differ: at its start, at the first token of a chunk, inside it, at its
    last token, and beyond the context."""
    chunk = audit.chunk
    context = audit.run.eval_seq_len
    last = size - 1
    inside = audit.chance.integers(1, max(2, chunk - 1), 4).tolist()
    places = {2, last, context + 1, context + 1 + inside[3]}
    for n, k in enumerate((0, 1, last // chunk // 2)):
        places |= {k * chunk + 1, k * chunk + 1 + inside[n], (k + 1) * chunk}
    return sorted(t for t in places if 2 <= t <= last)


def futures(audit: Audit, tokens: np.ndarray) -> Iterator[Future]:
    """Other tokens, ends that come earlier, and one that comes later."""
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
    """A score depends on no token after its target: neither on which they are, nor on where the document ends."""
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
    """A chunk is scored by what a replay has learned that stops before it."""
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
    """Adaptation that changes scores, while nothing in sight has learned."""
    if not audit.run.ttt_enabled:
        return []
    unit, heard = max(zip(audit.units, audit.closely, strict=True), key=lambda pair: len(pair[0].tokens))
    reach = min(audit.run.eval_seq_len, int(document_starts(unit.tokens)[1]) - 1)  # beyond it, contexts may differ
    apart = abs(audit.score(unit, ttt_enabled=0).nats - heard.nats)[:reach].max(initial=0.0)
    text = f"adaptation changes scores by {apart:.2g} nats, and nothing that could have learned is in sight"
    return [text] if apart > TOLERANCE_NATS else []


def independence(audit: Audit) -> Seen:
    """A document scores the same alone, in its batch, in another batch and order, and on another rank."""
    if audit.stream:
        return None, "TTT_SCOPE=stream: a score depends on the documents before it; results say doc_independent:0"
    changes = {}
    if audit.run.batched_ttt and audit.dist.device.type == "cpu":  # on a GPU it fixes the shapes, on which bits depend
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
    """Scores of joined texts -> those of each, its closing BOS left out."""
    ends = np.cumsum([len(text.tokens) for text in texts])
    return [nats[end - len(text.tokens) : end - 1] for end, text in zip(ends, texts, strict=True)]


def normalised(audit: Audit) -> Seen:
    """The probabilities of the whole vocabulary add up to one, and what is booked is the target's among them."""
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
    """Every target of every document is booked once, as the output layer scored it, in order."""
    docs = audit.opened.setup.validation
    audit.score(joined(audit.texts), closely=True)
    faults = list(dict.fromkeys(audit.misplaced + audit.strange))
    sizes = np.array([len(text.tokens) for text in audit.texts])
    sizes[-1] -= 1  # nothing closes the last
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
COMPILERS = ("cc", "gcc", "clang", "ptxas", "ldconfig", "file")  # what Triton starts
HANDED_DOWN = r"/proc/[^/]+/(task/[^/]+/)?(fd|fdinfo|map_files|mem|root|cwd)(/.*)?"  # what another process has open


def lay_out(audit: Audit, folder: Path) -> dict[str, str]:
    """Put into a folder all that an evaluation of the sample may need -> the environment to run it in."""
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
    """A PYTHONPATH without this repository, whose code is not all counted."""
    here = Path(audit_hook.__file__).resolve().parent.parent
    found = [Path(folder).resolve() for folder in folders.split(os.pathsep) if folder]
    return os.pathsep.join(str(folder) for folder in found if folder != here)


def artifact_alone(audit: Audit) -> Seen:
    """A process that finds program, artifact, tokenizer and validation alone scores the same and opens no more."""
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
    """Whether an evaluation may open this: its folder, or what is installed. Python asks uname for the platform's name;
    a GPU's compilers are started, which ask `file` what Python is; and torch looks for plug-ins among all packages."""
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
    """Whether this belongs to one of the entry's packages that PYTHONPATH has, or is the file in which any package
    there says what it plugs in."""
    for folder in PYTHONPATH:
        if Path(path).is_relative_to(folder):
            top, *rest = Path(path).relative_to(folder).parts
            return top in PACKAGES or (top.endswith(".dist-info") and rest == ["entry_points.txt"])
    return False


def wrong_result(audit: Audit, result: dict) -> list[str]:
    """What the result of an evaluation of the sample gets wrong."""
    whole = joined(audit.texts)
    size = int(whole.bytes[1:].sum())
    truth = {"documents": len(audit.texts), "tokens": len(whole.tokens) - 1, "bytes": size, "degraded_documents": 0}
    faults = [f"{name} is {result[name]}, counted {value}" for name, value in truth.items() if result[name] != value]
    bpb = float(audit.together.nats.sum()) / math.log(2) / size
    if not abs(result["val_bpb"] - bpb) <= TOLERANCE_BPB:
        faults.append(f"val_bpb is {result['val_bpb']:.7f}, what is booked adds up to {bpb:.7f}")
    return faults


def has_sidecar(audit: Audit) -> bool:
    """Whether one of the validation shards has a side-car; whatever the program says of that, which is on trial."""
    folder = Path(audit.run.data_path)
    names = (path.name for path in folder.glob("fineweb_val_[0-9]*.bin"))
    return any((folder / name.replace("_val_", "_val_bytes_")).exists() for name in names)


def bytes_counted(audit: Audit) -> Seen:
    """Code and weights are as large as their files, and documents have the bytes that their tokens decode to."""
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
    """How to count the bytes of a document from its tokens; by the contest's formula, where there is no side-car."""
    setup = audit.opened.setup
    if not has_sidecar(audit):
        return lambda tokens: contest_size(setup.tokenizer.processor, tokens)
    caseops = train_gpt.transform_of(Path(setup.run.data_path), setup.tokenizer) == "caseops"
    encoder = prepare.load_encoder(setup.tokenizer.path.read_bytes(), caseops, str(setup.tokenizer.path))
    original = prepare.decode_caseops if caseops else str
    return lambda tokens: len(original(encoder.processor.decode(tokens)).encode()) if encoder.exact else None


def contest_size(processor: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> int:
    """Bytes of the text that tokens spell. A space that follows a control token is not spelt; a space mark inside a
    piece has its own three bytes."""
    spelt = b""
    bare = True  # bare: no text before
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
    """Bytes that the contest's formula counts and the text of all documents lacks: two of three for every space mark
    inside a piece, which spells one space."""
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
    """The files of the run beside the artifact agree, and its documents of the sample score the same again."""
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
    whole = len(audit.chosen) - (audit.chosen[-1] < len(audit.starts) - 2)  # the last of the sample lacks its BOS
    for i, text, nats in zip(audit.chosen[:whole], audit.texts, audit.together.sums, strict=False):
        if not audit.is_whole(i):
            continue
        size = int(text.bytes.sum())
        widest.compare_sums(f"document {i}, as reported", nats - run.nats[i], size)
    return (
        widest.faults,
        f"val_bpb {run.bpb:.5f} of {path.name}: max {widest.bpb:.1e} bpb off in {widest.seen} documents",
    )


SCORING = ("TTT_", "EVAL_SEQ_LEN", "EVAL_STRIDE", "SEED", "MICRO_BATCH_TOKENS")  # knobs that change a score's bits
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
    """Every property in turn; `tell` hears of progress."""
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
    """-> exit status: 0, 1 where a property fails, 2 for what a user can mend, 130 when interrupted."""
    return end_in_a_line(lambda: run_prove(command_line().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
