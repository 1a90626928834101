"""Test-time training: a system does what its knobs say, lowers the score, and leaves nothing to the next document."""

import functools
import gc
import hashlib
import json
import math
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import start_two_ranks
from graphs import replays_of
from hypothesis import given
from hypothesis import strategies as st
from masked import attend_masked, chunk_mask
from recorder import SMALL_MODEL, Recorder, random_gpt

import train_gpt as g
from tools.listening import LoneRank

CONFIG = SMALL_MODEL
CHUNK, CONTEXT = 8, 24
LORA = dict(ttt_lr=0.02, ttt_weight_decay=0.0)
RMS = dict(ttt_optimizer="rms", ttt_lr=0.05)
FULL = dict(ttt_params="full", ttt_lr=0.02, ttt_epochs=1, ttt_chunk_tokens=CHUNK, ttt_freeze_blocks=1)
SGD = dict(ttt_optimizer="sgd", ttt_lr=0.3, ttt_weight_decay=0.0)
STREAM = dict(ttt_scope="stream")
SYSTEMS = {
    "lora, adamw": LORA,
    "lora, sgd": SGD,
    "lora, sgd, epochs, cosine": SGD | dict(ttt_epochs=2, ttt_cosine=1),
    "lora, adamw, beta1, decay": LORA | dict(ttt_beta1=0.9, ttt_weight_decay=0.5),
    "lora, Newton-Schulz": SGD | dict(ttt_lr=0.02, ttt_ns_steps=5, ttt_momentum=0.0),
    "lora, entropy window": LORA | dict(ttt_entropy_low=1.0, ttt_entropy_high=2.5),
    "lora, clipped": SGD | dict(ttt_grad_clip=0.5),
    "lora, after 20 tokens": LORA | dict(ttt_min_doc_tokens=20),
    "lora, adamw, beta1, late chunks": LORA | dict(ttt_beta1=0.9, ttt_late_chunk_tokens=2 * CHUNK),
    "lora, rms": RMS,
    "lora, rms, late chunks": RMS | dict(ttt_late_chunk_tokens=12),
    "lora, rms, floor, epochs, cosine": RMS | dict(ttt_rms_floor=0.5, ttt_epochs=2, ttt_cosine=1),
    "lora, stream": LORA | STREAM,
    "full, document": FULL,
    "full, document, adamw": FULL | dict(ttt_optimizer="adamw", ttt_lr=0.01),
    "full, document, Newton-Schulz": FULL | dict(ttt_ns_steps=5, ttt_lr=0.005, ttt_momentum=0.5),
    "full, stream": FULL | STREAM | dict(ttt_epochs=2),
}
PER_DOCUMENT = [name for name, knobs in SYSTEMS.items() if "ttt_scope" not in knobs]


def run_config(**knobs) -> g.RunConfig:
    small = dict(
        device="cpu",
        train_row_tokens=32,
        train_batch_tokens=64,
        micro_batch_tokens=64,
        eval_seconds=0,
        eval_seq_len=CONTEXT,
        eval_stride=8,
        ttt_chunk_tokens=CHUNK,
    )
    lora = {}
    if knobs.get("ttt_params") != "full":
        lora = dict(ttt_optimizer="adamw", ttt_lora_rank=4, ttt_lora_alpha=4.0)
    return g.RunConfig(**small | lora | knobs)


def first_of_each_rule() -> list[str]:
    """The first system of every rule, for LoRA and for the weights themselves."""
    found: dict[tuple[str, str], str] = {}
    for name in PER_DOCUMENT:
        run = run_config(**SYSTEMS[name])
        found.setdefault((run.ttt_params, run.ttt_optimizer), name)
    return list(found.values())


def random_model() -> g.GPT:
    """The same each time, with the RMS of its gradients."""
    model = random_gpt(CONFIG)
    model.gradient_rms = gradient_rms()
    return model


def document(length: int, seed: int = 0, period: int = 5) -> list[int]:
    """A phrase that comes again and again: there is something to learn."""
    return (np.random.default_rng(seed).integers(2, 48, period).tolist() * length)[:length]


def documents(*texts: list[int]) -> g.Documents:
    tokens = np.array([t for text in texts for t in (g.BOS, *text)], np.uint16)
    return g.split_documents(tokens, (tokens != g.BOS).astype(np.int64))


@functools.cache
def gradient_rms(**knobs) -> g.GradientRMS:
    """Of the random model, on documents that are like those to be scored."""
    docs = documents(*(document(40, seed=100 + n) for n in range(20)))
    run = run_config(train_seq_len=CONTEXT, **knobs)
    return g.measure_gradient_rms(random_gpt(CONFIG), docs, run, g.Dist())


MIXED = documents(*(document(n, seed=n) for n in (45, 9, 34, 1, 0, 26)))


def evaluation(docs: g.Documents, dist=None, model=None, seconds=lambda: 0.0, **knobs) -> g.Evaluation:
    """An evaluation that records; what it says goes into `said`."""
    said = []
    log = g.Log(screen=said.append)
    made = g.Evaluation(model or random_model(), docs, run_config(**knobs), dist or g.Dist(), log, seconds)
    made.table = Recorder(docs)
    made.said = said
    return made


def score(docs: g.Documents, **knobs) -> Recorder:
    return evaluation(docs, **knobs).score()


@functools.cache
def of_mixed(name: str) -> Recorder:
    return score(MIXED, **SYSTEMS[name])


def bits(table: g.ScoreTable) -> np.ndarray:
    """Bits per byte of every document; a byte a token, and one more so that none divides by zero."""
    return table.nats / math.log(2) / (table.docs.target_bytes() + 1)


@pytest.fixture(scope="module")
def static() -> Recorder:
    return score(MIXED, ttt_enabled=0)


@pytest.fixture
def steps(monkeypatch) -> list[SimpleNamespace]:
    """Every step of adaptation: its learning rates, its gradients, and by how much it changed the tensors."""
    taken = []
    step = g.TTTOptimizer.step

    def watched(optimizer, tensors, grads, lr):
        before = [t.detach().clone() for t in tensors]
        given = [x.clone() for x in grads]
        step(optimizer, tensors, grads, lr)
        change = [t.detach() - b for t, b in zip(tensors, before, strict=True)]
        lr = torch.zeros(len(given[0])) + lr
        taken.append(SimpleNamespace(lr=lr, grads=given, change=change))

    monkeypatch.setattr(g.TTTOptimizer, "step", watched)
    return taken


# ---- every system -----------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_adapting_helps_and_every_target_is_scored_once(static, name):
    table = of_mixed(name)
    assert [len(nats) for nats in table.by_document] == MIXED.lengths.tolist()
    assert table.updates.sum() > 0 and np.isfinite(table.nats).all()
    assert table.bits_per_byte < 0.99 * static.bits_per_byte


@pytest.mark.parametrize("name", PER_DOCUMENT)
def test_the_first_chunk_is_scored_by_the_artifact_alone(static, name):
    for nats, still in zip(of_mixed(name).by_document, static.by_document, strict=True):
        np.testing.assert_allclose(nats[:CHUNK], still[:CHUNK], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in PER_DOCUMENT if n not in ("lora, adamw", "lora, sgd", "full, document")])
def test_a_document_scores_the_same_alone_and_in_any_batch_or_order(name):
    knobs = SYSTEMS[name]
    texts = [[t for t in MIXED.span(i).tolist() if t != g.BOS] for i in range(len(MIXED))]
    alone = [bits(score(documents(texts[i], [7]), **knobs))[0] for i in (0, 2)]
    np.testing.assert_allclose(bits(of_mixed(name))[[0, 2]], alone, rtol=0, atol=1e-6)

    small = {} if "ttt_params" in knobs else dict(ttt_batch_docs=2)
    reordered = documents(*(texts[i] for i in (3, 2, 5, 0, 1, 4)))
    np.testing.assert_allclose(bits(score(reordered, **knobs, **small))[[3, 1]], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora, sgd, epochs, cosine", "lora, adamw, beta1, decay", "lora, rms"])
def test_the_order_of_a_group_changes_nothing(name):
    """Whichever rows end first, what the others have learned stays theirs."""
    table = Recorder(MIXED)
    model = random_model().requires_grad_(False)
    learners = g.Learners(model, torch.device("cpu"))
    g.score_batched(MIXED, [4, 1, 5, 3, 0, 2], run_config(**SYSTEMS[name]), g.Dist(), table, learners)
    np.testing.assert_allclose(bits(table), bits(of_mixed(name)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["full, document", "full, stream", "lora, stream"])
def test_the_artifacts_weights_are_back_after_the_evaluation(name):
    model = random_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    score(MIXED, model=model, **SYSTEMS[name])
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_a_stream_goes_on_learning_from_one_document_to_the_next(static):
    again = documents(document(40), document(40))
    still = score(again, ttt_enabled=0)
    for name in ("lora, stream", "full, stream"):
        table = score(again, **SYSTEMS[name])
        assert table.by_document[1][:CHUNK].sum() < still.by_document[1][:CHUNK].sum()
    first, second = (nats[:40] for nats in score(again, **LORA).by_document)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


# ---- against a reference that is as plain as can be -------------------------


class Kept:
    """Attention over a whole document with the keys and values that earlier chunks had when they were scored."""

    def __init__(self):
        self.passes = [[None, None] for _ in g.layer_plan(CONFIG, looping=True)]
        self.calls = 0

    def __call__(self, q, k, v, _context):
        kept = self.passes[self.calls % len(self.passes)]
        self.calls += 1
        for i, new in enumerate((k, v)):
            old = new[:, :0] if kept[i] is None else kept[i]
            old = old[:, : (new.size(1) - 1) // CHUNK * CHUNK]  # of this chunk, a later epoch's take their place
            kept[i] = torch.cat([old, new[:, old.size(1) :]], 1)
        k, v = kept
        kept[:] = k.detach(), v.detach()
        return attend_masked(q, k, v, chunk_mask(q.size(1), CHUNK, CONTEXT))


def plain_lora(text: list[int], make_optimizer, epochs: int, clip: float) -> np.ndarray:
    """One document, one adapter, torch's own optimizer: what chunked, score-first adaptation means. A pass is over the
    whole document so far, with the keys and values that earlier chunks had in their time (`Kept`)."""
    model = random_model().requires_grad_(False)
    adapter = g.Adapter(CONFIG, run_config(), 1, torch.device("cpu"))
    optimizer = make_optimizer(adapter.tensors())
    tokens = torch.tensor([[g.BOS, *text]])
    nats = []
    for first in range(0, len(text), CHUNK):
        end = min(first + CHUNK, len(text))
        for epoch in range(epochs):
            loss = model(tokens[:, :end], tokens[:, first + 1 : end + 1], None, adapter)
            if epoch == 0:
                nats += loss[0].tolist()
            optimizer.zero_grad()
            loss.mean().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(adapter.tensors(), clip)
            optimizer.step()
    return np.array(nats)


@pytest.mark.parametrize(
    "knobs, make_optimizer",
    [
        (
            dict(ttt_lr=0.01, ttt_weight_decay=0.5, ttt_beta1=0.8, ttt_beta2=0.95),
            lambda t: torch.optim.AdamW(t, lr=0.01, weight_decay=0.5, betas=(0.8, 0.95), eps=1e-10),
        ),
        (
            dict(ttt_lr=0.01, ttt_weight_decay=0.0, ttt_beta1=0.0, ttt_beta2=0.95),
            lambda t: torch.optim.AdamW(t, lr=0.01, weight_decay=0.0, betas=(0.0, 0.95), eps=1e-10),
        ),
        (
            dict(
                ttt_optimizer="sgd", ttt_lr=0.2, ttt_momentum=0.8, ttt_weight_decay=0.0, ttt_grad_clip=0.3, ttt_epochs=2
            ),
            lambda t: torch.optim.SGD(t, lr=0.2, momentum=0.8),
        ),
    ],
    ids=["adamw", "adamw, beta1 0", "sgd, clipped, 2 epochs"],
)
def test_adaptation_is_that_of_torchs_own_optimizer(monkeypatch, knobs, make_optimizer):
    text = document(44, period=7)
    found = score(documents(text), **knobs).by_document[0]
    monkeypatch.setattr(g, "attend", Kept())
    expected = plain_lora(text, make_optimizer, knobs.get("ttt_epochs", 1), knobs.get("ttt_grad_clip", 0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


class DivideByRMS(torch.optim.Optimizer):
    """up -= lr * gradient / (rms + floor): what TTT_OPTIMIZER=rms means."""

    def __init__(self, tensors: list[torch.Tensor], rms: list[torch.Tensor], lr: float):
        super().__init__(tensors, dict(lr=lr))
        self.rms = rms

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for up, rms in zip(group["params"], self.rms, strict=True):
            for column in range(up.size(-1)):
                up[..., column] -= group["lr"] * up.grad[..., column] / rms[column]


def test_steps_are_gradients_divided_by_the_rms_of_their_columns(monkeypatch):
    """`plain_lora` learns `down` as well: with steps of 0 it stays."""
    text = document(44, period=7)
    knobs = SYSTEMS["lora, rms"] | dict(ttt_rms_floor=0.25, ttt_epochs=2)
    found = score(documents(text), **knobs).by_document[0]

    def make_optimizer(tensors: list[torch.Tensor]) -> DivideByRMS:
        return DivideByRMS(tensors[1::2], g.rms_of_gradients(random_model(), run_config(**knobs)), knobs["ttt_lr"])

    monkeypatch.setattr(g, "attend", Kept())
    np.testing.assert_allclose(found, plain_lora(text, make_optimizer, 2, 0.0), rtol=0, atol=2e-4)


def test_only_up_learns_by_rms_and_documents_share_down(steps):
    model = random_model()
    run = run_config(**RMS)
    learner = g.BatchedTTT(model, run, 3, torch.device("cpu"))
    assert learner.optimizer.exp_avg == learner.optimizer.exp_avg_sq == []
    loras = [lora for layer in learner.adapter.passes for lora in layer] + [learner.adapter.head]
    assert [lora.down.shape for lora in loras] == [(CONFIG.model_dim, run.ttt_lora_rank)] * len(loras)
    assert not any(lora.down.requires_grad for lora in loras)
    starts = g.Adapter(CONFIG, run_config(), 1, torch.device("cpu")).tensors()[::2]
    assert all(lora.down.equal(start[0]) for lora, start in zip(loras, starts, strict=True)), "as under other rules"

    score(MIXED, model=model, **RMS)
    ups = [lora.up.shape[1:] for lora in loras]
    assert steps and all([change.shape[1:] for change in step.change] == ups for step in steps)


@pytest.mark.parametrize("chunk", [8, 12, 16, 21, 24])
def test_a_cache_holds_what_a_chunk_may_see_whatever_the_chunks_size(monkeypatch, chunk):
    """Without learning, the score is that of one pass over the document whose attention reaches as far back as the
    context from the end of the chunk; a chunk may be larger than what is kept of those before it, or leave no room."""
    text = document(100, period=7)
    found = score(documents(text), ttt_lr=0.0, ttt_chunk_tokens=chunk).by_document[0]
    mask = chunk_mask(len(text), chunk, CONTEXT)
    monkeypatch.setattr(g, "attend", lambda q, k, v, _context: attend_masked(q, k, v, mask))
    tokens = torch.tensor([[g.BOS, *text]])
    with torch.no_grad():
        expected = random_model()(tokens[:, :-1], tokens[:, 1:])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


def plain_full(text: list[int], chunk: int, epochs: int, lr: float, momentum: float) -> np.ndarray:
    """The same for the whole model, whose chunks are scored in windows."""
    model = random_model()
    nats = []
    end = 0
    kinds = {n: n.split(".")[-2] if n.endswith(".weight") else "" for n, _ in model.named_parameters()}
    factors = {"q": 0.5, "k": 0.5, "v": 0.5, "up": 0.5, "down": 3.0}
    optimizer = torch.optim.SGD(
        [dict(params=[p], lr=lr * factors.get(kinds[n], 1.0)) for n, p in model.named_parameters() if "s.0." not in n],
        momentum=momentum,
    )
    tokens = torch.tensor([[g.BOS, *text]])
    while end < len(text):
        first = end
        end = min(end + chunk, len(text))
        for epoch in range(epochs):
            windows = g.windows(0, first, end, CONTEXT, 8)
            loss = torch.cat(
                [model(tokens[:, w.start : w.end], tokens[:, w.first + 1 : w.end + 1])[0] for w in windows]
            )
            if epoch == 0:
                nats += loss.tolist()
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    return np.array(nats)


@pytest.mark.parametrize("chunk", [8, 40])
def test_full_adaptation_is_that_of_torchs_own_sgd(chunk):
    """Whether a chunk is one window or several rows of windows."""
    text = document(91, period=7)
    knobs = dict(ttt_params="full", ttt_lr=0.003, ttt_momentum=0.7, ttt_epochs=2, ttt_freeze_blocks=1, ttt_cosine=0)
    table = score(documents(text), **knobs, ttt_grad_clip=0.0, ttt_chunk_tokens=chunk, micro_batch_tokens=32)
    np.testing.assert_allclose(table.by_document[0], plain_full(text, chunk, 2, 0.003, 0.7), rtol=0, atol=3e-4)


# ---- score before update, and causality, to the last bit --------------------


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def states(docs: g.Documents, monkeypatch, **knobs) -> tuple[list[np.ndarray], list[str]]:
    """Scores of the first document, alone, and a digest of all that adapts, taken when each chunk has been scored."""
    model = random_model()
    run = run_config(**knobs)
    adapters = []
    plain = g.Adapter

    def remembered(*arguments):
        adapters.append(plain(*arguments))
        return adapters[-1]

    def what_adapts() -> str:
        return digest([t[:1] for t in adapters[-1].tensors()] if adapters else model.parameters())

    learner = g.BatchedTTT if run.batched_ttt else g.SequentialTTT
    score_chunk = learner.score
    seen = []

    def watched(*arguments):
        chunk = score_chunk(*arguments)
        seen.append(what_adapts())
        return chunk

    table = Recorder(docs)
    with monkeypatch.context() as patched:
        patched.setattr(g, "Adapter", remembered)
        patched.setattr(learner, "score", watched)
        if run.batched_ttt:
            g.score_batched(docs, [0], run, g.Dist(), table, g.Learners(model, torch.device("cpu")))
        else:
            g.score_sequentially(g.SequentialTTT(model, run, g.Dist()), docs, [0], table)
    return table.by_document[0], seen


@pytest.mark.parametrize("name", [*first_of_each_rule(), "lora, sgd, epochs, cosine"])
def test_a_chunk_is_scored_with_what_a_replay_that_stops_before_it_has_learned(name, monkeypatch):
    text = document(5 * CHUNK, period=7)
    nats, seen = states(documents(text), monkeypatch, **SYSTEMS[name])
    assert len(seen) == len(set(seen)) == 5, "every chunk but the last is learned from"
    for k in range(5):
        cut, replayed = states(documents(text[: k * CHUNK + 1]), monkeypatch, **SYSTEMS[name])
        assert replayed[k] == seen[k], f"chunk {k}"


@pytest.mark.parametrize(
    "cut",
    [2 * CHUNK, 2 * CHUNK + 3, 3 * CHUNK - 1, 4 * CHUNK + 1],
    ids=["a chunk's first token", "inside", "its last token", "beyond the context"],
)
@pytest.mark.parametrize("name", first_of_each_rule())
def test_earlier_scores_are_the_same_to_the_last_bit(name, cut, monkeypatch):
    """Whether other tokens follow, or the document ends earlier or later."""
    text = document(44, period=7)
    knobs = SYSTEMS[name]
    whole, _ = states(documents(text), monkeypatch, **knobs)
    other = [(t - 1) % 46 + 2 for t in text[cut:]]
    for texts in ([text[:cut] + other], [text[:cut]], [text[:cut], other], [text[:cut] + other * 3]):
        nats, _ = states(documents(*texts), monkeypatch, **knobs)
        exact = cut if "lora" in name or texts[0][cut:] == other else cut // CHUNK * CHUNK
        np.testing.assert_array_equal(nats[:exact], whole[:exact])
        np.testing.assert_allclose(nats[:cut], whole[:cut], rtol=0, atol=1e-6)
        assert len(nats) == cut or nats[cut] != whole[cut]


# ---- knobs ------------------------------------------------------------------


def test_entropy_scales_the_rate_in_proportion_outside_the_window():
    run = run_config(ttt_lr=0.5, ttt_entropy_low=2.0, ttt_entropy_high=4.0)
    rate = g.chunk_learning_rate(run, 0, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0]))
    assert rate.tolist() == pytest.approx([0.0, 0.125, 0.25, 0.5, 0.5, 0.5, 0.25])
    only_high = run_config(ttt_lr=0.5, ttt_entropy_high=4.0)
    assert g.chunk_learning_rate(only_high, 0, torch.tensor([0.1, 8.0])).tolist() == pytest.approx([0.5, 0.25])
    only_low = run_config(ttt_lr=0.5, ttt_entropy_low=2.0)
    assert g.chunk_learning_rate(only_low, 0, torch.tensor([1.0, 80.0])).tolist() == pytest.approx([0.25, 0.5])
    assert not g.uses_entropy(run_config()) and g.uses_entropy(only_high) and g.uses_entropy(only_low)


@pytest.mark.parametrize("system", [LORA, FULL], ids=["lora", "full"])
def test_the_rate_of_a_chunk_follows_the_entropy_of_its_own_document(steps, system):
    model = random_model().requires_grad_(False)
    entropies = []
    for i in (0, 2, 5):  # longest first, as they are adapted
        text = torch.from_numpy(MIXED.span(i).astype(np.int64))[None, :CHUNK]
        log_p = model.head.logits(model.hidden(text)[0], model.embed, None).log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean().item())
    low, high = sorted(entropies)[1] + 0.01, sorted(entropies)[2] - 0.01
    assert low < high
    score(MIXED, **system | dict(ttt_entropy_low=low, ttt_entropy_high=high, ttt_epochs=2, ttt_cosine=0))
    expected = [system["ttt_lr"] * min(1.0, e / low, high / e) for e in entropies]
    for step in steps[:2]:  # the entropy is that of what was scored, in both epochs
        assert step.lr[:3].tolist() == pytest.approx(expected[: len(step.lr)], rel=1e-5)
    assert system["ttt_lr"] not in expected


@pytest.mark.parametrize("least", [0, CHUNK, CHUNK + 1, 1000])
@pytest.mark.parametrize("system", [LORA, FULL], ids=["lora", "full"])
def test_learning_starts_once_enough_tokens_are_scored(static, system, least):
    table = score(MIXED, **system | dict(ttt_min_doc_tokens=least))
    skipped = max(0, -(-least // CHUNK) - 1)  # chunks that end before so many are scored
    for i, length in enumerate(MIXED.lengths.tolist()):
        assert table.updates[i] == max(0, -(-length // CHUNK) - 1 - skipped)
        first = (skipped + 1) * CHUNK  # the first target that can be scored by something learned
        reach = first if system is FULL else min(first, CONTEXT)  # a cache sees more, through what it keeps
        np.testing.assert_allclose(table.by_document[i][:reach], static.by_document[i][:reach], rtol=0, atol=2e-5)
        assert length <= first or abs(table.by_document[i][first:] - static.by_document[i][first:]).max() > 1e-3


@pytest.mark.parametrize("system", [SGD, FULL], ids=["lora", "full"])
def test_the_rate_falls_by_a_cosine_over_the_epochs_of_every_chunk(steps, system):
    score(documents(document(3 * CHUNK)), **system | dict(ttt_epochs=4, ttt_cosine=1))
    cosine = [system["ttt_lr"] * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert [s.lr[0].item() for s in steps] == pytest.approx(cosine * 2)


@pytest.mark.parametrize("system", [LORA, FULL], ids=["lora", "full"])
def test_every_epoch_is_a_step_on_fresh_gradients(steps, system):
    table = score(documents(document(3 * CHUNK)), **system | dict(ttt_epochs=3))
    assert len(steps) == table.updates.sum() == 6  # nothing follows the last chunk
    assert not any(torch.equal(a, b) for a, b in zip(steps[0].grads, steps[1].grads, strict=True) if a.any())


def test_a_large_gradient_is_shortened_document_by_document(steps):
    clip = 0.4
    score(MIXED, **SGD | dict(ttt_momentum=0.0, ttt_grad_clip=clip))
    for s in steps:
        norms = sum(x.flatten(1).square().sum(1) for x in s.grads).sqrt()
        moved = sum(x.flatten(1).square().sum(1) for x in s.change).sqrt() / s.lr
        np.testing.assert_allclose(moved, norms.clamp(max=clip), rtol=1e-3, atol=1e-6)
    assert any((sum(x.flatten(1).square().sum(1) for x in s.grads).sqrt() > clip).any() for s in steps)


def test_newton_schulz_makes_every_documents_update_orthogonal(steps):
    score(MIXED, **SGD | dict(ttt_lr=1.0, ttt_momentum=0.0, ttt_ns_steps=5))
    for x, update in zip(steps[0].grads, steps[0].change, strict=True):
        alive = x.flatten(1).norm(dim=1) > 1e-4
        for before, after in zip(torch.linalg.svdvals(x[alive]), torch.linalg.svdvals(update[alive]), strict=True):
            strong = before > 0.02 * before[0]  # the iteration cannot lift what is almost nothing
            assert ((0.6 < after[strong]) & (after[strong] < 1.4)).all()


def changes_of_full(steps, **knobs) -> dict[str, torch.Tensor]:
    steps.clear()
    run = FULL | dict(ttt_momentum=0.0, ttt_grad_clip=0.0) | knobs
    score(documents(document(2 * CHUNK)), **run)
    names = [n for n, _ in random_model().named_parameters()]
    frozen = tuple(f"blocks.{i}." for i in range(run["ttt_freeze_blocks"]))
    learning = [n for n in names if not n.startswith(frozen)]
    return dict(zip(learning, steps[0].change, strict=True))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_frozen_blocks_keep_their_weights_and_all_else_learns(blocks, monkeypatch):
    model = random_model()
    before = dict(random_model().named_parameters())
    monkeypatch.setattr(g.SequentialTTT, "reset", lambda self: None)
    score(documents(document(3 * CHUNK)), model=model, **FULL | dict(ttt_freeze_blocks=blocks))
    kept = {n for n, p in model.named_parameters() if p.equal(before[n])}
    assert kept == {n for n in before if n.startswith(tuple(f"blocks.{i}." for i in range(blocks)))}


def test_block_1_is_frozen_without_block_10():
    model = g.GPT(g.dataclasses.replace(CONFIG, num_layers=12))
    leaves = g.SequentialTTT(model, run_config(**FULL | dict(ttt_freeze_blocks=2)), g.Dist()).leaves
    adapts = [
        i for i, block in enumerate(model.blocks) if any(p is leaf for p in block.parameters() for leaf in leaves)
    ]
    assert adapts == list(range(2, 12))


def test_multipliers_scale_the_rates_of_their_matrices(steps):
    plain = changes_of_full(steps, ttt_lr_mult_mlp_out=1.0, ttt_lr_mult_in=1.0)
    scaled = changes_of_full(steps, ttt_lr_mult_mlp_out=3.0, ttt_lr_mult_in=0.5)
    for name, change in scaled.items():
        kind = name.split(".")[-2] if name.endswith(".weight") else ""
        factor = {"down": 3.0, "q": 0.5, "k": 0.5, "v": 0.5, "up": 0.5}.get(kind, 1.0)
        torch.testing.assert_close(change, factor * plain[name], rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("targets", ["q", "k", "v", "o", "mlp", "head", "q,v", "k,o,head"])
def test_any_choice_of_targets_adapts_and_helps(static, targets):
    run = run_config(ttt_lora_targets=targets)
    adapter = g.Adapter(CONFIG, run, 2, torch.device("cpu"))
    passes = len(g.layer_plan(CONFIG, looping=True))
    chosen = targets.split(",")
    assert len(adapter.tensors()) == 2 * sum(1 if t == "head" else passes for t in chosen)
    assert {t for t in g.LayerLoRA._fields if getattr(adapter.passes[0], t) is not None} == set(chosen) - {"head"}
    table = score(MIXED, **LORA | dict(ttt_lora_targets=targets, ttt_epochs=2))
    assert table.bits_per_byte < static.bits_per_byte - 1e-4


# ---- the start of an adapter ------------------------------------------------


def test_an_adapter_starts_from_the_seed_alone():
    torch.manual_seed(1)
    one = g.Adapter(CONFIG, run_config(), 1, torch.device("cpu")).tensors()
    torch.manual_seed(2)
    many = g.Adapter(CONFIG, run_config(), 7, torch.device("cpu")).tensors()
    other = g.Adapter(CONFIG, run_config(seed=5), 1, torch.device("cpu")).tensors()
    for a, b in zip(one, many, strict=True):
        assert b.equal(a.expand_as(b))
    assert all(down.any() and not up.any() for down, up in zip(one[::2], one[1::2], strict=True))
    assert not any(a.equal(b) for a, b in zip(one[::2], other[::2], strict=True))
    for i, a in enumerate(one[::2]):
        assert not any(a.equal(b) for b in one[2 * i + 2 :: 2]), "every matrix has a start of its own"


def test_a_new_adapter_changes_nothing_to_the_last_bit():
    model = random_model().requires_grad_(False)
    tokens = torch.tensor([[g.BOS, *document(20)]] * 3)
    adapter = g.Adapter(CONFIG, run_config(), 3, torch.device("cpu"))
    plain, adapted = (model(tokens[:, :-1], tokens[:, 1:], None, a) for a in (None, adapter))
    assert torch.equal(plain, adapted)


# ---- who scores what --------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 500), min_size=1, max_size=40), world=st.integers(1, 9), batch=st.integers(1, 9))
def test_documents_are_dealt_once_each_by_their_lengths_alone(lengths, world, batch):
    rounds = g.deal_documents(np.array(lengths), world, batch)
    assert all(len(groups) == world for groups in rounds)
    assert all(len(group) <= batch for groups in rounds for group in groups)
    planned = [i for groups in rounds for group in groups for i in group]
    assert sorted(planned) == list(range(len(lengths)))
    assert [lengths[i] for i in planned] == sorted(lengths, reverse=True), "longest first, alike side by side"
    assert rounds == g.deal_documents(np.array(lengths), world, batch)


@given(lengths=st.lists(st.integers(0, 500), min_size=1, max_size=40), chunk=st.integers(1, 200))
def test_a_stream_is_cut_into_equal_chunks_that_hold_every_target_once(lengths, chunk):
    docs = documents(*([2] * n for n in lengths))
    chunks = list(g.stream_chunks(docs, range(len(docs)), chunk))
    sizes = [sum(end - begin for _, begin, end in pieces) for pieces in chunks]
    assert all(size == chunk for size in sizes[:-1]) and all(0 < size <= chunk for size in sizes)
    held = [(i, t) for pieces in chunks for i, begin, end in pieces for t in range(begin, end)]
    assert held == [(i, t) for i, n in enumerate(docs.lengths) for t in range(n)]


@torch.no_grad()
def test_a_document_that_went_astray_leaves_nothing_behind():
    """A NaN among the keys and values that are hidden from the next document would reach its scores: 0 times NaN."""
    tokens = torch.tensor([document(CHUNK), document(CHUNK, seed=1)])
    learner = g.BatchedTTT(random_model(), run_config(**LORA), 2, torch.device("cpu"))
    first = learner.score(tokens, tokens, to_learn=False)
    for buffer in learner.cache.buffers:
        buffer.fill_(math.nan)
    learner.reset()
    assert torch.equal(learner.score(tokens, tokens, to_learn=False).nats, first.nats)


@pytest.mark.parametrize("chunk", [3, 4, 11])
def test_a_cache_holds_the_newest_tokens_while_it_grows_and_wraps_round(monkeypatch, chunk):
    monkeypatch.setattr(g.KVCache, "SMALLEST", 4)
    cache = g.KVCache(CONFIG, 2, 10, torch.device("cpu"))
    tokens = torch.zeros(2, chunk, dtype=torch.int64)
    sizes = []
    for first in range(0, 7 * chunk, chunk):
        cache.make_room(chunk)
        sizes.append(cache.size)
        filled = min(first, cache.size)
        assert cache.context(chunk).filled == filled
        for t in range(first - filled, first):
            assert all((buffer[..., t % cache.size, :] == t).all() for buffer in cache.buffers)

        shape = (2, 2, CONFIG.num_kv_heads, chunk, CONFIG.head_dim)
        new_kv = torch.arange(first, first + chunk)[:, None].expand(shape).float()  # every number is its position
        cache.append(tokens, [new_kv] * len(cache.buffers))
        cache.position += chunk
    assert sizes[-1] == 10 and set(sizes) <= {4, 8, 10} and cache.position == cache.position_on_device


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=20),
    late=st.integers(8, 32),
    spare=st.integers(0, 9),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_documents_run_together_until_each_has_ended(lengths, late, spare, device):
    """Every chunk of every document is run once, at the same positions, whatever runs beside it: short chunks up to the
    context, then late ones. On a CPU rows are dropped by halves; on a GPU there always are as many."""
    context = 40
    run = run_config(eval_seq_len=context, ttt_late_chunk_tokens=late, ttt_batch_docs=len(lengths) + spare)
    lengths = np.array(lengths)
    held = [[] for _ in lengths]
    before = None

    def goes_on(rows: np.ndarray, first: int) -> np.ndarray:
        return lengths[rows] > first

    for step in g.chunk_steps(len(lengths), run, torch.device(device), goes_on):
        size = step.run.ttt_chunk_tokens
        assert size == (late if step.wave else CHUNK) and (step.first >= context) == (step.wave > 0)
        if before is not None and step.wave == before.wave:
            rows = before.rows if step.kept is None else before.rows[step.kept]
            assert (step.rows == rows).all() and step.first == before.first + size
            assert step.kept is None or len(step.rows) <= len(before.rows) // 2
        going = np.array([i >= 0 and lengths[i] > step.first for i in step.rows])
        if device == "cuda":
            assert len(step.rows) == (max(1, run.ttt_batch_docs * CHUNK // late) if step.wave else run.ttt_batch_docs)
        else:
            assert len(step.rows) == 1 or going.sum() > len(step.rows) // 2
        for i in step.rows[going]:
            held[i].append(step.first)
        before = step
    last = -(-context // CHUNK) * CHUNK
    assert held == [[*range(0, min(n, last), CHUNK), *range(last, n, late)] for n in lengths]


def test_late_chunks_learn_at_a_rate_that_grows_by_the_root_of_their_length():
    run = run_config(ttt_lr=0.01, ttt_late_chunk_tokens=4 * CHUNK, eval_seq_len=4 * CHUNK)
    late = g.late_run(run)
    assert (late.ttt_chunk_tokens, late.ttt_lr) == (4 * CHUNK, 0.02)
    assert g.late_run(g.RunConfig()).ttt_chunk_tokens == 64
    assert g.late_run(g.RunConfig(ttt_chunk_tokens=100)).ttt_chunk_tokens == 100
    assert g.late_run(run_config()) == run_config(), "a short context has no late chunks"


@pytest.mark.parametrize("rule", [LORA, RMS], ids=["adamw", "rms"])
@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
def test_documents_beyond_the_context_score_the_same_in_any_wave(monkeypatch, rule, device):
    """What they have learned comes with them, and so does the context."""
    lengths = [100, 75, 90, 20, 33, 64, 81]
    docs = documents(*(document(n, seed=n) for n in lengths))
    run = run_config(**rule, ttt_late_chunk_tokens=16, ttt_batch_docs=8, eval_seq_len=32)
    if device != "cpu":  # rows are never dropped, and some hold no document
        plain = g.chunk_steps
        monkeypatch.setattr(g, "chunk_steps", lambda n, run, _, goes_on: plain(n, run, torch.device("cuda"), goes_on))
    model = random_model().requires_grad_(False)

    def scores(group: list[int]) -> Recorder:
        table = Recorder(docs)
        g.score_batched(docs, group, run, g.Dist(), table, g.Learners(model, torch.device("cpu")))
        return table

    together = scores(list(range(len(docs))))
    assert max(together.updates) > 32 // CHUNK
    for i, length in enumerate(docs.lengths):
        alone = scores([i])
        assert len(alone.by_document[i]) == length and alone.updates[i] == together.updates[i]
        atol = 1e-4 if device == "cpu" else 0.0
        np.testing.assert_allclose(alone.by_document[i], together.by_document[i], rtol=0, atol=atol)


def test_late_chunks_follow_from_the_early_ones(monkeypatch):
    """Late chunks of the same length and rate are no other chunks."""
    docs = documents(document(100, seed=1), document(61, seed=2))
    run = run_config(**LORA, eval_seq_len=32, ttt_late_chunk_tokens=CHUNK)
    model = random_model().requires_grad_(False)

    def scores() -> list[np.ndarray]:
        table = Recorder(docs)
        g.score_batched(docs, [0, 1], run, g.Dist(), table, g.Learners(model, torch.device("cpu")))
        return table.by_document

    expected = scores()
    plain = g.chunk_steps

    def one_wave(documents, run, device, goes_on):
        """All chunks are early ones."""
        return plain(documents, SimpleNamespace(**vars(run) | dict(eval_seq_len=1 << 20)), device, goes_on)

    monkeypatch.setattr(g, "late_run", lambda run: run)
    monkeypatch.setattr(
        g, "chunk_steps", lambda n, r, device, on: (s._replace(run=run) for s in one_wave(n, r, device, on))
    )
    for found, wanted in zip(scores(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


# ---- progress ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora, stream", "full, stream"])
@pytest.mark.parametrize("calls", [10_000, 9, 0], ids=["in time", "short of time", "without time"])
def test_a_stream_tells_how_far_it_is(monkeypatch, name, calls):
    monkeypatch.setattr(g, "SECONDS_BETWEEN_REPORTS", 0.0)
    made = evaluation(MIXED, seconds=clock(calls), eval_seconds=10.0, **SYSTEMS[name])
    made.score()
    said = [line for line in made.said if not line.startswith("time is short: ")]
    lines = [re.fullmatch(r"scoring validation as a stream: (\d+)/(\d+) targets eta_s:\d+", line) for line in said]
    done, targets = zip(*(map(int, line.groups()) for line in lines), strict=True)
    assert set(targets) == {MIXED.lengths.sum()}
    assert 0 < done[0] and list(done) == sorted(set(done)) and done[-1] == targets[0]


# ---- the deadline -----------------------------------------------------------


def clock(calls: int):
    """A clock that stands still for so many calls; then the time is up."""
    asked = iter([0.0] * calls)
    return lambda: next(asked, 1e9)


def short_of_time(documents: int) -> str:
    return f"time is short: the remaining {documents} documents are scored without further adaptation"


@pytest.mark.parametrize("name", ["lora, adamw", "full, document"])
def test_documents_that_have_not_begun_in_time_are_scored_as_they_are(static, name):
    knobs = SYSTEMS[name] | dict(eval_seconds=10.0)
    if "lora" in name:
        knobs |= dict(ttt_batch_docs=1)
    adapted = of_mixed(name)
    seen = set()
    for calls in (0, 5, 9, 10_000):
        late = evaluation(MIXED, seconds=clock(calls), **knobs)
        table = late.score()  # refuses a target that is missing or twice
        seen.add(late.degraded)
        for place, i in enumerate(np.argsort(-MIXED.lengths, kind="stable")):
            reference = adapted if place < len(MIXED) - late.degraded else static
            np.testing.assert_allclose(table.by_document[i], reference.by_document[i], rtol=0, atol=1e-4)
            assert table.updates[i] == (adapted.updates[i] if reference is adapted else 0)
        told = [line for line in late.said if line.startswith("time is short: ")]
        assert told == ([short_of_time(late.degraded)] if late.degraded else [])
    assert {0, len(MIXED)} < seen, "none, all, and something between"


def test_a_stream_that_runs_out_of_time_goes_on_scoring(static):
    late = evaluation(MIXED, seconds=clock(0), eval_seconds=10.0, **SYSTEMS["full, stream"])
    np.testing.assert_allclose(late.score().nats, static.nats, rtol=1e-5)
    assert late.degraded == len(MIXED) and late.said[0] == short_of_time(len(MIXED))
    later = evaluation(MIXED, seconds=clock(9), eval_seconds=10.0, **SYSTEMS["full, stream"])
    assert 0 < later.score().updates.sum() and 0 < later.degraded < len(MIXED)
    assert later.said.count(short_of_time(later.degraded)) == 1


@pytest.mark.parametrize("name", ["lora, stream", "full, stream"])
def test_a_stream_keeps_time_for_the_rest_and_scores_it_at_once(static, monkeypatch, name):
    """Chunk by chunk the rest would be read a context a chunk: many times the work of scoring without adaptation."""
    made = evaluation(MIXED, eval_seconds=1.0, **SYSTEMS[name])
    made.static_seconds_per_token = 0.01  # more than the time that there is
    passes = []
    hidden = g.GPT.hidden
    monkeypatch.setattr(g.GPT, "hidden", lambda *given, **named: passes.append(given) or hidden(*given, **named))
    np.testing.assert_allclose(made.score().nats, static.nats, rtol=1e-5)
    assert made.degraded == len(MIXED)
    scored = len(passes)
    score(MIXED, ttt_enabled=0)
    assert scored == len(passes) - scored


def test_the_time_left_reserves_the_score_of_the_rest():
    """At 100 tokens a second, 12 seconds are too few for 61 + 9 + 40 + ... tokens, each at twice its price."""
    made = evaluation(MIXED, eval_seconds=1.0, **LORA)
    made.static_seconds_per_token = 0.01
    made.score()
    assert made.degraded == len(MIXED)
    made = evaluation(MIXED, eval_seconds=1000.0, **LORA)
    made.static_seconds_per_token = 0.01
    made.score()
    assert made.degraded == 0


@pytest.mark.parametrize(
    "spent, ahead, rest, enough",
    [(9.7, 0, 0, True), (9.9, 0, 0, False), (5, 4, 0, True), (5, 5, 0, False), (0, 0, 600, True), (0, 0, 700, False)],
)
def test_what_would_end_just_before_the_limit_or_later_is_not_begun(spent, ahead, rest, enough):
    """With a margin of half the time for the rest, here at 100 tokens a second."""
    made = evaluation(MIXED, seconds=lambda: spent, eval_seconds=10.0, **LORA)
    made.static_seconds_per_token = 0.01
    assert made._has_time(rest, ahead) == enough


def test_a_group_that_would_take_as_long_as_those_before_and_end_too_late_is_not_begun(monkeypatch):
    now = [0.0]
    made = evaluation(
        documents(*[document(2 * CHUNK)] * 5), seconds=lambda: now[0], eval_seconds=10.0, ttt_batch_docs=1, **LORA
    )
    plain = made._score_group

    def take_four_seconds(*given) -> None:
        plain(*given)
        now[0] += 4.0

    monkeypatch.setattr(made, "_score_group", take_four_seconds)
    made.score()
    assert made.degraded == 3


# ---- two ranks --------------------------------------------------------------


class Part(g.Dist):
    """One of two ranks, alone: nothing is added up."""

    def all_reduce(self, x):
        return x

    def all_reduce_max(self, value):
        return value


@pytest.mark.parametrize("name", ["lora, adamw", "full, document"])
def test_the_shares_of_two_ranks_are_the_whole(name):
    shares = []
    for rank in range(2):
        made = evaluation(MIXED, Part(rank, 2), **SYSTEMS[name])
        with pytest.raises(AssertionError, match="not once each"):
            made.score()
        shares.append(made.table)
    assert all(0 < share.targets.sum() < len(MIXED.tokens) - 1 for share in shares)
    assert (sum(share.targets for share in shares) == MIXED.lengths).all()
    assert (sum(share.updates for share in shares) == of_mixed(name).updates).all()
    np.testing.assert_allclose(sum(bits(share) for share in shares), bits(of_mixed(name)), rtol=0, atol=1e-6)


SHARED = dict(ttt_chunk_tokens=24, micro_batch_tokens=32)  # several rows a chunk, so that each rank has some
RANKED = {name: SYSTEMS[name] | SHARED for name in ("lora, stream", "full, stream")}
RANKED["full, stream, entropy window"] = RANKED["full, stream"] | dict(ttt_entropy_low=1.0, ttt_entropy_high=2.5)
RANKED |= {"full, document": FULL, "static": dict(ttt_enabled=0), "lora": LORA | dict(ttt_batch_docs=2)}


def everything(dist: g.Dist) -> dict:
    """What one rank finds: bits, updates and degraded documents of every system, with time and without."""
    found = {}
    for name, knobs in RANKED.items():
        made = evaluation(MIXED, dist, **knobs)
        table = made.score()
        found[name] = [bits(table).tolist(), table.updates.tolist(), made.degraded]
    for name in ("lora", "full, document", "full, stream"):  # one rank runs out of time, the other would not
        made = evaluation(MIXED, dist, seconds=clock(3 + 999 * dist.rank), **RANKED[name] | dict(eval_seconds=10.0))
        made.score()
        found[f"{name}, late"] = made.degraded
    found["start"] = digest(g.Adapter(CONFIG, run_config(), 3 + dist.rank, torch.device("cpu")).tensors()[0][:1])
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = everything(g.Dist(rank, 2))
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    start_two_ranks(one_rank, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "the ranks agree on everything"
    alone = everything(g.Dist())
    assert first["start"] == alone["start"]
    for name in RANKED:
        # the ranks of a stream add up gradients in another order, and learn on
        exact = 1e-5 if "stream" in name else 1e-6
        np.testing.assert_allclose(first[name][0], alone[name][0], rtol=0, atol=exact, err_msg=name)
        assert first[name][1:] == alone[name][1:], name
    assert all(0 < first[f"{name}, late"] < len(MIXED) for name in ("lora", "full, document", "full, stream"))


# ---- replayed as on a GPU ---------------------------------------------------


@pytest.fixture
def replays(monkeypatch):
    """The graphs that were captured, once BatchedTTT believes that it is on a GPU."""
    return replays_of(g.BatchedTTT, monkeypatch)


@pytest.mark.usefixtures("replays")
def test_what_a_step_reads_lies_aligned_from_the_first_chunk_on(monkeypatch):
    """Triton compiles anew for what is not, and cannot while a graph is captured; chunks of one document are slices."""
    found = []
    scored = g.BatchedTTT._score

    @functools.wraps(scored)
    def watched(self, tokens, targets):
        found.extend(t.data_ptr() % 16 for t in (tokens, targets))
        return scored(self, tokens, targets)

    monkeypatch.setattr(g.BatchedTTT, "_score", watched)
    docs = documents(document(90))
    run = run_config(**LORA)
    learners = g.Learners(random_model().requires_grad_(False), torch.device("cpu"))
    g.score_batched(docs, [0], run, g.Dist(), g.ScoreTable(docs), learners)
    assert len(found) >= 4 and not any(found[:-2])  # of the last chunk nothing is learned: it runs as it is


def test_what_is_captured_is_freed_at_once():
    """Not when Python next looks for cycles: a graph that is freed while another is captured ends that capture."""
    docs = documents(document(30), document(20, seed=2), document(10, seed=3))
    model = random_model().requires_grad_(False)
    run = run_config(**LORA)
    learners = g.Learners(model, torch.device("cpu"))
    gc.disable()
    try:
        g.score_batched(docs, [0, 1], run, g.Dist(), g.ScoreTable(docs), learners)
        held = [weakref.ref(learner) for learner in learners.by_size.values()]
        g.score_batched(docs, [0, 1, 2], run, g.Dist(), g.ScoreTable(docs), learners)
        assert len(held) == 2 and not any(learner() for learner in held)
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["static", "lora, adamw", "lora, sgd, epochs, cosine", "lora, rms", "lora, after 20 tokens"]
)
def test_a_documents_score_is_its_own_to_the_last_bit_on_a_gpu(name):
    """Alone, among others, in another order, as one of several ranks scores it, and whatever follows."""
    knobs = dict(ttt_enabled=0) if name == "static" else SYSTEMS[name]
    run = dict(device="cuda", eval_seq_len=128, eval_stride=32, micro_batch_tokens=512, train_batch_tokens=512)
    run |= dict(ttt_late_chunk_tokens=32, ttt_batch_docs=8, compile=1)
    lengths = (900, 410, 300, 129, 128, 127, 64, 17, 5, 1, 77, 600)
    texts = [np.random.default_rng(n).integers(2, 48, n).tolist() for n in lengths]
    model = random_model().cuda()

    def scores(*texts: list[int], world: int = 1) -> list[np.ndarray]:
        parts = []
        for rank in range(world):
            made = evaluation(documents(*texts), LoneRank(rank, world, "cuda"), model, **run | knobs)
            made.table.all_reduced = lambda dist, table=made.table: table
            parts.append(made.score().by_document)
        return [np.concatenate(of_ranks) for of_ranks in zip(*parts, strict=True)]

    together = scores(*texts, [7])  # every text is closed by the BOS of the next
    for i, text in enumerate(texts):
        assert np.array_equal(scores(text, [7])[0], together[i]), lengths[i]
    backward = scores([9] * 333, *texts[::-1], [8] * 50)[-2:0:-1]
    assert all(map(np.array_equal, backward, together))
    by_rank = scores(*texts, [7], world=3)
    assert all(map(np.array_equal, map(np.sort, by_rank), map(np.sort, together)))
    other_end = scores(texts[0][:500] + [11] * 400, *texts[1:])[0]
    assert np.array_equal(other_end[:499], together[0][:499]) and not np.array_equal(other_end, together[0])


@pytest.mark.gpu
def test_adaptation_repeats_to_the_last_bit_on_a_gpu():
    docs = documents(*(document(n, seed=n) for n in (900, 410, 300)))
    run = run_config(**LORA, eval_seq_len=512, micro_batch_tokens=512)

    def go() -> np.ndarray:
        table = g.ScoreTable(docs)
        model = random_model().cuda().requires_grad_(False)
        g.score_batched(docs, [0, 1, 2], run, g.Dist(device="cuda"), table, g.Learners(model, torch.device("cuda")))
        return table.nats

    assert np.array_equal(go(), go())


@pytest.mark.parametrize("name", ["lora, adamw", "lora, after 20 tokens"])
def test_learning_may_be_captured_later_than_scoring(request, name):
    """A document may end, or have yet to reach TTT_MIN_DOC_TOKENS, between the two: the next one must not learn from
    what was captured before it."""
    docs = documents(*(document(n, seed=n) for n in (2 * CHUNK - 1, 45, 7 * CHUNK)))
    run = run_config(**SYSTEMS[name])
    model = random_model().requires_grad_(False)

    def go() -> list[list[float]]:
        learners = g.Learners(model, torch.device("cpu"))
        table = Recorder(docs)
        for i in range(len(docs)):
            g.score_batched(docs, [i], run, g.Dist(), table, learners)
        return [nats.tolist() for nats in table.by_document]

    expected = go()
    assert request.getfixturevalue("replays") == []
    assert go() == expected


@pytest.mark.parametrize("name", ["lora, adamw", "lora, sgd, epochs, cosine", "lora, entropy window", "lora, rms"])
def test_replayed_steps_are_those_that_were_captured(request, name):
    """Whatever changes from chunk to chunk lies in memory that a graph reads again; documents end at different times,
    and a second group reuses the graphs of the first."""
    docs = documents(*(document(n, seed=n) for n in (90, 41, 88, 23)))
    run = run_config(**SYSTEMS[name])
    model = random_model().requires_grad_(False)

    def go() -> list[list[float]]:
        learners = g.Learners(model, torch.device("cpu"))
        table = Recorder(docs)
        for group in ([0, 1], [2, 3]):
            g.score_batched(docs, group, run, g.Dist(), table, learners)
        return [nats.tolist() for nats in table.by_document]

    expected = go()
    replays = request.getfixturevalue("replays")
    assert go() == expected
    assert len(replays) >= 6, "of score, learn and advance, for 2 rows and for 1"
    assert not any(graph.fresh for graph in replays)
