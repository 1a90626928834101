"""The rules that no score may break, as audits that see only what is scored and what it was scored with. The program
must pass them, and a program with any known cheat built in must not."""

import functools
import hashlib
import io
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import torch
from masked import attend_seen, chunk_band

import train_gpt

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")
BOS, VOCAB, CONTEXT, STRIDE, CHUNK = 1, 32, 24, 8, 8
MODEL = dict(vocab_size=VOCAB, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2, rope_dims=4,
             attn_gate_width=8, smear_width=8, unet_skips=1, parallel_start_layer=1, num_loops=0)  # fmt: skip
RUN = dict(device="cpu", train_row_tokens=32, train_batch_tokens=32, micro_batch_tokens=48, eval_seq_len=CONTEXT,
           eval_stride=STRIDE, ttt_chunk_tokens=CHUNK, eval_seconds=0)  # fmt: skip
LORA = RUN | dict(ttt_lora_rank=4, ttt_lora_alpha=4.0, ttt_epochs=2, ttt_weight_decay=0.1)
SYSTEMS = {
    "static": RUN | dict(ttt_enabled=0),
    "adamw": LORA | dict(ttt_lr=0.01, ttt_grad_clip=0.5, ttt_entropy_low=2.8, ttt_entropy_high=2.9),
    "sgd": LORA | dict(ttt_optimizer="sgd", ttt_lr=0.1, ttt_cosine=1, ttt_ns_steps=2, ttt_lora_targets="k,o,mlp"),
    "full": RUN | dict(ttt_params="full", ttt_lr=0.01, ttt_epochs=2, ttt_freeze_blocks=1),
}


def changed(changes: Iterable[tuple[str, str]]) -> str:
    """The program with these lines changed."""
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, f"this cheat changes a line that is not there, or not once: {old}"
        source = source.replace(old, new)
    return source


@functools.cache
def compiled(*changes: tuple[str, str]):
    return compile(changed(changes), train_gpt.__file__, "exec")


def build(monkeypatch, *changes: tuple[str, str]) -> ModuleType:
    """train_gpt with these lines changed, as a module of its own."""
    code, module = compiled(*changes), ModuleType("audited_train_gpt")
    module.__file__ = train_gpt.__file__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "triton", None)  # it looks up the source of kernels, whose lines have moved
    exec(code, module.__dict__)
    return module


# ---- what an audit sees -----------------------------------------------------

Texts = Sequence[Sequence[int]]  # documents without their BOS


class Heard(NamedTuple):
    """What was booked to a document, target by target."""

    nats: np.ndarray
    states: list[str]  # digest of everything that had been learnt when the target was scored


def random_model(g: ModuleType) -> torch.nn.Module:
    """Every mechanism away from its neutral start."""
    random, model = torch.Generator().manual_seed(0), g.GPT(g.ModelConfig(**MODEL))
    for name, p in model.named_parameters():
        p.data = (p.detach() if g.param_role(name) == "scalar" else 0.0) + 0.2 * torch.randn(p.shape, generator=random)
    return model


def score(g: ModuleType, texts: Texts, knobs: dict) -> list[Heard]:
    """Evaluate these documents as the program does, and listen."""
    model, adapters, plain_adapter, plain_tally = random_model(g), [], g.Adapter, g.Tally

    class Adapter(plain_adapter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            adapters.append(self)

    def state() -> str:
        learnt = [*model.parameters(), *(t for a in adapters[-1:] for t in a.tensors())]
        return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in learnt)).hexdigest()

    class Tally(plain_tally):
        def __init__(self, docs):
            super().__init__(docs)
            self.heard = [Heard(np.zeros(0), []) for _ in range(len(docs))]

        def add(self, documents, nats):
            for i in np.unique(documents):
                new = nats[documents == i]
                self.heard[i] = Heard(np.append(self.heard[i].nats, new), self.heard[i].states + [state()] * len(new))

        def gathered(self, dist):
            return self  # the audits count for themselves

    tokens = np.array([t for text in texts for t in (BOS, *text)], np.uint16)
    docs = g.split_documents(tokens, np.ones(len(tokens), np.int64))
    try:
        g.Adapter, g.Tally = Adapter, Tally
        return g.Evaluation(model, docs, g.RunConfig(**knobs), g.Dist(), lambda line: None, lambda: 0.0).score().heard
    finally:
        g.Adapter, g.Tally = plain_adapter, plain_tally


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


# ---- the audits -------------------------------------------------------------


def audit_causality(g: ModuleType, knobs: dict) -> None:
    """A score is the same to the last bit whatever follows: other tokens, or the end of the document. `cut` is the
    first token that differs: the first of a chunk, one inside, the last one, and one beyond the context."""
    whole = text(40)
    expected = score(g, [whole], knobs)[0].nats
    for cut in (2 * CHUNK, 2 * CHUNK + 3, 3 * CHUNK - 1, 4 * CHUNK + 1):
        other = [(t - 1) % (VOCAB - 2) + 2 for t in whole[cut:]]
        for name, texts in {
            "other tokens": [whole[:cut] + other],
            "the end of the shard": [whole[:cut]],
            "another document": [whole[:cut], other[1:]],
        }.items():
            nats = score(g, texts, knobs)[0].nats
            same = nats[:cut] == expected[:cut] if name == "other tokens" else abs(nats[:cut] - expected[:cut]) < 1e-5
            assert same.all(), f"{name} from {cut} on changes the scores of {np.flatnonzero(~same)}"
            assert len(nats) == cut or nats[cut] != expected[cut]


def audit_score_before_update(g: ModuleType, knobs: dict) -> None:
    """What a chunk is scored with does not depend on the chunk, and does depend on every chunk before it."""
    whole = text(4 * CHUNK)
    states = score(g, [whole], knobs)[0].states
    for first in range(0, len(whole), CHUNK):
        other = whole[:first] + [(t - 1) % (VOCAB - 2) + 2 for t in whole[first:]]
        assert score(g, [other], knobs)[0].states[first : first + CHUNK] == states[first : first + CHUNK]
    assert knobs.get("ttt_enabled") == 0 or len(set(states)) > 2, "nothing was learnt: the audit is empty"


def audit_independence(g: ModuleType, knobs: dict) -> None:
    """A document scores the same alone, in its batch, in another batch and in another order."""
    texts = [text(n, seed=n) for n in (41, 9, 30)] + [[2, 3] * 8]
    expected = [score(g, [t, [5]], knobs)[0].nats for t in texts]
    batches = [{}] if "ttt_lora_rank" not in knobs else [dict(ttt_batch_docs=64), dict(ttt_batch_docs=2)]
    for batch, order in itertools.product(batches, (range(4), (2, 0, 3, 1))):
        together = score(g, [*(texts[i] for i in order), [5]], knobs | batch)
        for i, heard in zip(order, together, strict=False):
            assert len(heard.nats) == len(texts[i]) + 1
            bits = abs(heard.nats - expected[i]).sum() / np.log(2) / len(texts[i])
            assert bits < 1e-6, f"document {i}: {bits:.2g} bits a token with {batch} in the order {[*order]}"


def audit_single_pass(g: ModuleType, knobs: dict) -> None:
    """Without learning, every target in turn has the score of a plain forward pass: none is skipped, doubled or
    swapped. The BOS that closes a document is a target; nothing closes the last."""
    texts = [text(n, seed=n) for n in (41, 0, 3, 8, 20)]
    heard = score(g, texts, knobs | dict(ttt_lr=0.0))
    model, plain = random_model(g).requires_grad_(False), plain_windows
    if "ttt_lora_rank" in knobs:
        plain = plain_bands
    losses = [plain(g, model, [BOS, *t, BOS][: len(t) + 1 + (i < len(texts) - 1)]) for i, t in enumerate(texts)]
    np.testing.assert_allclose(np.concatenate([h.nats for h in heard]), np.concatenate(losses), rtol=0, atol=3e-5)


def plain_windows(g: ModuleType, model: torch.nn.Module, document: list[int]) -> np.ndarray:
    """Target by target, a forward pass over the window that it is scored in."""
    tokens, losses = torch.tensor([document]), []
    for at in range(len(document) - 1):
        edge = CONTEXT + max(0, -(-(at + 1 - CONTEXT) // CHUNK)) * CHUNK  # STRIDE is the same
        losses.append(model(tokens[:, edge - CONTEXT : at + 1], tokens[:, at + 1 : at + 2]).item())
    return np.array(losses)


def plain_bands(g: ModuleType, model: torch.nn.Module, document: list[int]) -> np.ndarray:
    """One forward pass over the whole document, whose attention reaches back to where the chunk's window begins."""
    tokens, ours, band = torch.tensor([document]), g.attend, chunk_band(len(document) - 1, CHUNK, CONTEXT)
    try:
        g.attend = lambda q, k, v, _place: attend_seen(q, k, v, band)
        return model(tokens[:, :-1], tokens[:, 1:])[0].numpy()
    finally:
        g.attend = ours


def audit_normalised(g: ModuleType, knobs: dict) -> None:
    """The probabilities of all tokens that could come next add up to one, even after learning."""
    start = text(CHUNK + 2)
    nexts = [start, *(start + [t] for t in range(VOCAB) if t != BOS)]  # the end of the document is one of them
    heard = score(g, [*nexts, [5]], knobs)[: len(nexts)]
    assert abs(sum(np.exp(-h.nats[len(start)]) for h in heard) - 1) < 1e-4


def audit_bytes(g: ModuleType, knobs: dict) -> None:
    """The bytes of a shard's targets are those of its text."""
    texts = ["one two  two", "three – ½ ünï", "four\nfive six", "two one"] * 8
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=blob, model_type="bpe", vocab_size=290, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=3)  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    texts.append("☂ two")  # spelt in bytes
    tokens = np.array([t for text in texts for t in (BOS, *processor.encode(text))], np.uint16)
    docs = g.split_documents(tokens, g.contest_bytes(tokens, g.piece_bytes(processor)))
    assert docs.target_bytes().tolist() == [len(text.encode()) for text in texts]


AUDITS = [audit_causality, audit_score_before_update, audit_independence, audit_single_pass, audit_normalised]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("audit", AUDITS, ids=lambda a: a.__name__.removeprefix("audit_"))
def test_the_program_keeps_the_rules(monkeypatch, audit, system):
    audit(build(monkeypatch), SYSTEMS[system])


def test_the_program_counts_the_bytes_of_the_text(monkeypatch):
    audit_bytes(build(monkeypatch), RUN)


# ---- cheats -----------------------------------------------------------------


class Cheat(NamedTuple):
    name: str
    audit: object
    system: str
    changes: list[tuple[str, str]]


SCORE_CHUNK = "        x = self.hidden(tokens)\n        nll = self"
BOOK_CHUNK = "        tally.add(np.repeat(rows, inside.sum(1)), nats.cpu().numpy()[inside])\n"
STEP = "        nats = learners.score("
LEARN_FIRST = """        with torch.enable_grad():
            early = self.model.head(self.hidden(tokens), targets, self.model.embed, self.adapter.head)
            slopes = list(torch.autograd.grad(early.sum(), self.adapter.tensors()))
        self.rule.step(self.adapter.tensors(), slopes, self.run.ttt_lr)
"""
NEW_ADAPTER = "        self.adapter.begin()\n        self.rule.begin()\n"
NEW_RULE = "self.rule = AdaptRule(self.tensors, self.rule.multipliers, self.run)"
SCORE_ALL = '        """Every target of every document -> the tally of all ranks."""\n'
TRAIN_ON_ALL = """        everyone = range(len(self.docs))
        adapt_along(StreamLearner(self.model, self.run, self.dist), self.docs, everyone, Tally(self.docs))
"""

CHEATS = [
    Cheat("train on validation, then score", audit_causality, "full",
          [(SCORE_ALL, SCORE_ALL + TRAIN_ON_ALL), ("    learner.reset()\n    return degraded", "    return degraded")]),
    Cheat("learn from a chunk, then score it", audit_causality, "sgd", [(SCORE_CHUNK, LEARN_FIRST + SCORE_CHUNK)]),
    Cheat("learn first, seen in the state", audit_score_before_update, "adamw",
          [(SCORE_CHUNK, LEARN_FIRST + SCORE_CHUNK)]),
    Cheat("learn first, with the whole model", audit_score_before_update, "full",
          [("        entropy, left = learner.score(",
            "        learner.learn(rows, 8, None)\n        entropy, left = learner.score(")]),
    Cheat("book the better of two scores", audit_normalised, "sgd",
          [("        return nll.detach()\n",
            "        return nll.minimum(self.model(torch.cat([self.last, tokens], 1), targets)).detach()\n")]),
    Cheat("moments kept between documents", audit_independence, "sgd",
          [("        for t in (self.steps_done, *self.first, *self.second):", "        for t in (self.steps_done,):")]),
    Cheat("momentum of the whole model kept", audit_independence, "full", [(NEW_RULE, "pass")]),
    Cheat("weights of the whole model kept", audit_independence, "full",
          [("in zip(self.tensors, self.begin, strict=True):", "in ():")]),
    Cheat("adapter starts where the last one ended", audit_independence, "adamw",
          [(NEW_ADAPTER, "        self.rule.begin()\n")]),
    Cheat("A drawn per batch", audit_independence, "adamw",
          [("generator, bound = torch.Generator().manual_seed(run.seed), c", "generator, bound = None, c")]),
    Cheat("gradient norm of the batch", audit_independence, "adamw",
          [("run.ttt_grad_clip / (norms + 1e-6)", "run.ttt_grad_clip / (norms.norm() + 1e-6)")]),
    Cheat("entropy of the batch", audit_independence, "adamw",
          [("* counted).sum(1) / count if wants", "* counted).mean() if wants")]),
    Cheat("mean over the batch", audit_independence, "sgd",
          [("((nll * counted).sum(1) / count).sum()", "((nll * counted).sum(1) / count).mean()")]),
    Cheat("chunks by the document's length", audit_causality, "sgd",
          [("chunk, lengths, family = run.ttt_chunk_tokens,",
            "chunk, lengths, family = run.ttt_chunk_tokens * (1 + int(docs.lengths[group].max() < 30)),")]),
    Cheat("rate decays over the document", audit_causality, "adamw",
          [(STEP, "        rule = learners.rule\n"
                  "        rule.multipliers = [1 - first / longest] * len(rule.multipliers)\n" + STEP)]),
    Cheat("the cache shows the token ahead", audit_causality, "adamw",
          [("held.new_ones(n, n).tril()", "held.new_ones(n, n).tril(1)")]),
    Cheat("a cache for the whole batch", audit_independence, "adamw",
          [("slots, latest[:, :, -n:])", "slots, (latest + latest.mean(0))[:, :, -n:])")]),
    Cheat("short documents skipped", audit_single_pass, "adamw",
          [("order = np.argsort(-lengths, kind=\"stable\").tolist()",
            "order = [i for i in np.argsort(-lengths).tolist() if lengths[i] > 9]")]),
    Cheat("first token of a chunk dropped", audit_single_pass, "adamw",
          [("inside = np.arange(chunk) < left[:, None]",
            "inside = (np.arange(chunk) < left[:, None]) & (np.arange(chunk) > 0)")]),
    Cheat("first token of a window dropped", audit_single_pass, "full",
          [("counted[at + w.first - w.start:at + n]", "counted[at + w.first - w.start + 1:at + n]")]),
    Cheat("closing BOS not scored", audit_single_pass, "static",
          [("np.minimum(self.starts[1:], len(self.tokens) - 1) - self.starts[:-1]", "np.diff(self.starts) - 1")]),
    Cheat("a chunk counted twice", audit_single_pass, "sgd",
          [(BOOK_CHUNK, BOOK_CHUNK + BOOK_CHUNK.replace("tally", "if first == 8: tally", 1))]),
    Cheat("attention across BOS", audit_independence, "static",
          [("if place is None:\n        return attend_rows", "if not q.is_cuda:\n        return attend_rows")]),
    Cheat("smeared with another document", audit_independence, "static",
          [("e[:, 1:] + gate[:, 1:, None] * e[:, :-1]", "e[:, 1:] + self.smear_gain * e[:, :-1]")]),
    Cheat("attention to the token ahead", audit_causality, "static",
          [("k, v, is_causal=True", "k, v, attn_mask=q.new_ones(q.size(2), q.size(2)).tril(1).bool()")]),
    Cheat("a space has two bytes more", audit_bytes, "static", [('len(piece.removeprefix("▁").', "len(piece.")]),
    Cheat("a byte piece has the bytes of its name", audit_bytes, "static",
          [("plain[i] = 1 if tokenizer.is_byte(i) else len", "plain[i] = len")]),
    Cheat("BOS has bytes", audit_bytes, "static",
          [("        if not control[i]:\n", "        if True:\n")]),
]  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda c: c.name)
def test_a_cheat_is_caught(monkeypatch, cheat):
    program = build(monkeypatch, *cheat.changes)
    with pytest.raises(AssertionError):
        cheat.audit(program, SYSTEMS[cheat.system])
