"""Listening to the scorer: what it books, traced to the pass through the output layer that produced it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import train_gpt


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
