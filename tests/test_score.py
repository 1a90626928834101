"""Every target is scored once, in its own context, and counted for its document, however the work is packed."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder, random_gpt

import train_gpt as g
from tools.events import read_events

CONFIG = TINY_MODEL
CONTEXT, STRIDE = 32, 8


def run_config(**knobs) -> g.RunConfig:
    small = dict(device="cpu", train_row_tokens=32, train_batch_tokens=64, micro_batch_tokens=128, ttt_chunk_tokens=8)
    return g.RunConfig(**small | dict(eval_seq_len=CONTEXT, eval_stride=STRIDE) | knobs)


@pytest.fixture(scope="module")
def model() -> g.GPT:
    return random_gpt(CONFIG).requires_grad_(False)


def documents(*lengths: int, seed: int = 0) -> g.Documents:
    """Random documents of so many tokens after BOS; a byte for every token but BOS."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([np.append(g.BOS, random.integers(2, 64, n)) for n in lengths]).astype(np.uint16)
    return g.split_documents(tokens, (tokens != g.BOS).astype(np.int64))


def static(model, docs, chosen=None, dist=None, **knobs) -> list[np.ndarray]:
    """The nats of every document's targets; of all documents, unless some are chosen."""
    table = Recorder(docs)
    if chosen is None:
        chosen = range(len(docs))
    g.score_static(model, docs, chosen, run_config(**knobs), dist or g.Dist(), table)
    return table.by_document


# ---- progress ---------------------------------------------------------------


def test_a_long_pass_tells_how_far_it_is_and_a_short_one_does_not(model, monkeypatch, tmp_path):
    """With a row every 4 seconds: a report after the third and after the sixth."""
    docs = documents(*[30] * 16)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(g.time, "perf_counter", lambda: float(next(clock)))

    def events(name: str, rows: int) -> list[dict]:
        log = g.Log(tmp_path / f"{name}.txt")
        table = g.ScoreTable(docs)
        chosen = range(2 * rows)  # a row of 128 tokens holds two documents
        g.score_static(
            model, docs, chosen, run_config(), g.Dist(), table, progress=g.ScoringProgress(log, "held-out text")
        )
        return [event.values for event in read_events((tmp_path / f"{name}.events.jsonl").read_bytes(), name)]

    assert events("short", rows=2) == []
    first, second = events("long", rows=8)
    assert first["what"] == "held-out text" and first["targets"] == docs.lengths.sum()
    assert (first["targets_done"], second["targets_done"]) == (docs.lengths[:6].sum(), docs.lengths[:12].sum())
    assert (first["eta_s"], second["eta_s"]) == pytest.approx((20.0, 8.0), abs=0.5)
    line = f"scoring held-out text: {first['targets_done']}/{first['targets']} targets eta_s:{first['eta_s']:.0f}\n"
    assert (tmp_path / "long.txt").read_text().startswith(line)


# ---- windows ----------------------------------------------------------------

places = st.integers(0, 200)
context_and_stride = st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c)))


@given(length=places, cuts=st.lists(places), shape=context_and_stride)
def test_every_input_is_scored_once_whatever_the_pieces(length, cuts, shape):
    edges = sorted({0, length, *(c for c in cuts if c < length)})
    wanted = [w for a, b in zip(edges, edges[1:], strict=False) for w in g.windows(7, a, b, *shape)]
    assert [i for w in wanted for i in range(w.first, w.end)] == list(range(length))
    assert all(w.document == 7 and 0 <= w.start <= w.first < w.end <= w.start + shape[0] for w in wanted)


@given(length=places, longer=places, begin=places, shape=context_and_stride)
def test_a_window_depends_on_the_place_and_not_on_the_length(length, longer, begin, shape):
    def start_of(begin, length):
        return {i: w.start for w in g.windows(0, begin, length, *shape) for i in range(w.first, w.end)}

    whole = start_of(0, length + longer)
    assert start_of(0, length).items() <= whole.items()
    assert start_of(begin, length + longer).items() <= whole.items()


@given(length=places, shape=context_and_stride)
def test_no_input_loses_more_context_than_a_stride(length, shape):
    context, stride = shape
    for w in g.windows(0, 0, length, context, stride):
        assert w.start == 0 or w.first - w.start == context - stride
        assert w.end <= context or w.first - w.start >= context - stride


# ---- rows -------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12), room=st.integers(CONTEXT, 150))
def test_rows_hold_all_windows_in_order_and_waste_no_room(lengths, room):
    wanted = [w for i, n in enumerate(lengths) for w in g.windows(i, 0, n, CONTEXT, STRIDE)]
    rows = g.fill_rows(wanted, room)
    sizes = [[w.end - w.start for w in row] for row in rows]
    assert [w for row in rows for w in row] == wanted
    used = [sum(map(g.aligned, row[:-1])) + row[-1] for row in sizes]
    assert all(tokens <= room for tokens in used)
    assert all(g.aligned(tokens) + after[0] > room for tokens, after in zip(used, sizes[1:], strict=False))


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), tokens=st.integers(CONTEXT, 150))
def test_a_row_holds_its_windows_and_counts_their_targets_alone(lengths, tokens):
    docs = documents(*lengths)
    run = run_config(micro_batch_tokens=tokens)
    wanted = [w for i, n in enumerate(docs.lengths) for w in g.windows(i, 0, int(n), CONTEXT, STRIDE)]
    rows = g.fill_rows(wanted, tokens)
    seen = []
    for row, (batch, owner, counted) in zip(rows, g.local_rows(docs, wanted, run, g.Dist()), strict=True):
        size = len(counted)
        bounds = [0, *batch.segments.ends.unique().tolist()]
        assert batch.tokens.shape == batch.targets.shape == (1, size) and bounds[0] == 0 and bounds[-1] == size
        assert size <= tokens and max(np.diff(bounds)) <= CONTEXT
        at = 0
        for w in row:
            here = slice(at, at + w.end - w.start)
            at = g.aligned(here.stop)
            text = docs.span(w.document).tolist()
            assert batch.tokens[0, here].tolist() == text[w.start : w.end]
            assert batch.targets[0, here].tolist() == text[w.start + 1 : w.end + 1]
            assert batch.segments.positions[here].tolist() == list(range(w.end - w.start))
            assert counted[here].tolist() == [i >= w.first for i in range(w.start, w.end)]
            assert (owner[here] == w.document).all()
            seen += [(w.document, i) for i in range(w.first, w.end)]
        assert counted.sum() == sum(w.end - w.first for w in row), "padding does not count"
    assert seen == [(i, t) for i, n in enumerate(docs.lengths) for t in range(n)]


# ---- the static score -------------------------------------------------------

LENGTHS = (45, 1, 0, 33, 64, 31, 32, 8)


@pytest.mark.parametrize("stride", [1, STRIDE])
def test_static_scores_equal_a_direct_forward_of_every_window(model, stride):
    docs = documents(*LENGTHS)
    for i, nats in enumerate(static(model, docs, eval_stride=stride)):
        text = torch.from_numpy(docs.span(i).astype(np.int64))
        expected = []
        for t in range(len(text) - 1):  # token t + 1 from the tokens start..t
            edge = CONTEXT + max(0, math.ceil((t + 1 - CONTEXT) / stride)) * stride
            start = edge - CONTEXT
            expected.append(model(text[None, start : t + 1], text[None, t + 1 : t + 2]).item())
        np.testing.assert_allclose(nats, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [CONTEXT, 64, 128, 999])
def test_a_document_scores_the_same_alone_and_packed_among_others(model, tokens):
    docs = documents(*LENGTHS)
    together = static(model, docs, micro_batch_tokens=tokens)
    for i, nats in enumerate(together):
        alone = static(model, docs, [i])[i]
        assert len(alone) == len(nats) == docs.lengths[i]
        assert abs(alone.sum() - nats.sum()) / math.log(2) / max(1, len(nats)) < 1e-6


def test_ranks_share_the_rows_and_their_sums_are_the_whole(model):
    docs = documents(*LENGTHS)
    whole = static(model, docs)
    shares = [static(model, docs, dist=g.Dist(rank, 3)) for rank in range(3)]
    assert all(sum(map(len, share)) < sum(map(len, whole)) for share in shares)
    for i, nats in enumerate(whole):
        np.testing.assert_array_equal(np.sort(np.concatenate([share[i] for share in shares])), np.sort(nats))


def test_only_the_chosen_documents_are_scored(model):
    docs = documents(20, 30, 40)
    assert [len(nats) for nats in static(model, docs, [2, 0])] == [21, 0, 40]


# ---- the table --------------------------------------------------------------


def test_a_complete_table_is_accepted():
    docs = documents(3, 2)
    table = g.ScoreTable(docs)
    table.add(np.array([0, 1, 0, 0, 1, 0]), np.ones(6, np.float32))
    assert table.all_reduced(g.Dist()).nats.tolist() == [4, 2]


@pytest.mark.parametrize(
    "scored",
    [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], []],
    ids=["twice", "never", "one too many for one too few", "nothing"],
)
def test_a_target_counted_twice_or_never_is_refused(scored):
    table = g.ScoreTable(documents(3, 2))
    table.add(np.array(scored, np.int64), np.ones(len(scored), np.float32))
    with pytest.raises(AssertionError, match="not once each"):
        table.all_reduced(g.Dist())


def test_bits_per_byte_by_hand():
    docs = g.split_documents(np.array([1, 5, 6, 1, 7], np.uint16), np.array([9, 3, 2, 0, 1]))  # the first has no target
    table = g.ScoreTable(docs)
    table.add(np.array([0, 0, 0, 1]), np.log(np.array([2.0, 4.0, 2.0, 16.0])))
    assert table.bits_per_byte == pytest.approx((1 + 2 + 1 + 4) / (3 + 2 + 0 + 1), rel=1e-12)


def test_sums_are_kept_in_double_precision():
    docs = documents(2)
    table = g.ScoreTable(docs)
    table.add(np.zeros(1, np.int64), np.array([2.0**24], np.float32))
    table.add(np.zeros(1, np.int64), np.array([1.0], np.float32))
    assert table.nats[0] == 2**24 + 1


# ---- totals are the shard's -------------------------------------------------


@given(st.lists(st.lists(st.tuples(st.integers(2, 63), st.integers(0, 20)), max_size=6), min_size=1, max_size=8))
def test_targets_and_bytes_add_up_to_those_of_the_shard(texts):
    pairs = [pair for text in texts for pair in [(g.BOS, 0), *text]]
    docs = g.split_documents(np.array([t for t, _ in pairs], np.uint16), np.array([b for _, b in pairs], np.int64))
    assert len(docs) == len(texts)
    assert docs.lengths.sum() == len(pairs) - 1
    assert docs.target_bytes().sum() == sum(b for _, b in pairs)
    assert docs.target_bytes().tolist() == [sum(b for _, b in text) for text in texts]
    for i, text in enumerate(texts):
        closing = [g.BOS] if i < len(texts) - 1 else []  # the last document's end is not known
        assert docs.span(i).tolist() == [g.BOS, *(t for t, _ in text), *closing]
        assert docs.lengths[i] == len(text) + len(closing)


def test_the_closing_bos_costs_nats_and_brings_no_bytes(model):
    one, two = documents(20), documents(20, 5)
    assert one.tokens.tolist() == two.tokens[:21].tolist()
    assert (one.lengths[0], two.lengths[0]) == (20, 21) and one.target_bytes()[0] == two.target_bytes()[0] == 20
    alone, closed = static(model, one)[0], static(model, two)[0]
    np.testing.assert_allclose(closed[:20], alone, rtol=0, atol=1e-5)
    text = torch.from_numpy(two.span(0).astype(np.int64))
    assert closed[20] == pytest.approx(model(text[None, :-1], torch.tensor([[g.BOS]])).item(), abs=1e-5)
    assert closed[20] > 0


def test_one_of_several_ranks_tells_how_far_all_of_them_are(model, monkeypatch, tmp_path):
    docs = documents(*[30] * 14)  # seven rows: four for this rank, three for the other
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(g.time, "perf_counter", lambda: float(next(clock)))
    progress = g.ScoringProgress(g.Log(tmp_path / "run.txt"), "validation")
    g.score_static(model, docs, range(14), run_config(), g.Dist(0, 2), g.ScoreTable(docs), progress=progress)
    events = [event.values for event in read_events((tmp_path / "run.events.jsonl").read_bytes(), "run")]
    assert [event["targets_done"] for event in events] == [docs.lengths[:n].sum() for n in (4, 8, 12, 14)]
    assert events[-1]["eta_s"] == 0.0
