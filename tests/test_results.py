"""Finished runs read back from the disk: what is refused, and what the bootstrap says of two of them."""

import dataclasses
import hashlib
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tools import compare, ranking, results, screening
from tools.results import bits_per_byte, differences, length_groups, load_run, over_seeds, ratio_intervals
from tools.welch import two_sided
from train_gpt import DataError

SOURCE = b"print('the entry')\n"
EVENTS = ({"event": "validate", "step": 2, "val_bpb": 1.9}, {"event": "later", "val_bpb": "unknown"})


def fabricate(
    folder: Path,
    run_id: str = "run",
    *,
    gap: float = 0.0,
    own: int = 1,
    count: int = 300,
    texts: int = 0,
    trained: bool = True,
    exact: bool = False,
    **changes,
) -> Path:
    """The four files of a run on `count` documents that `texts` decides, whose bits per byte lie `gap` above 1.2 and
    have noise of their own that `own` decides; `exact`: with scores of every document before quantisation, 0.99 of the
    final ones; `changes` go into the result. Returns the path of the .json."""
    shared = np.random.default_rng(texts)
    mine = np.random.default_rng(1000 + own)
    tokens = np.maximum(shared.lognormal(6, 1, count), 2).astype(np.int64)
    size = 3 * tokens
    bpb = 1.2 + shared.normal(0, 0.1, count) + gap + mine.normal(0, 0.01, count)
    nats = bpb * size * math.log(2)
    updates = tokens // 48
    validation = hashlib.sha256(tokens.tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    before_quantisation = {"prequant_nats": 0.99 * nats} if exact else {}
    np.savez_compressed(
        folder / f"{run_id}.docs.npz",
        **before_quantisation,
        nats=nats,
        static_nats=nats * 1.02,
        tokens=tokens,
        bytes=size,
        updates=updates,
        validation=np.array(validation),
    )
    parts = {"embedding": 3000, "attention": 2000, "mlp": 5000, "header": 100}
    result = dict(
        run_id=run_id,
        seed=1,
        code_sha256=hashlib.sha256(SOURCE).hexdigest(),
        knobs={"TTT_LR": "0.01"},
        val_bpb=float(nats.sum() / math.log(2) / size.sum()),
        val_loss=float(nats.sum() / tokens.sum()),
        static_bpb=float(1.02 * nats.sum() / math.log(2) / size.sum()),
        documents=count,
        tokens=int(tokens.sum()),
        bytes=int(size.sum()),
        adaptation_steps=int(updates.sum()),
        doc_independent=1,
        degraded_documents=0,
        eval_seconds=4.0,
        phases={"load": 1.0, "train": 9.0, "pack": 1.0, "evaluate: score": 4.0},
        artifact_bytes=sum(parts.values()),
        code_bytes=len(SOURCE),
        total_bytes=sum(parts.values()) + len(SOURCE),
        artifact_parts=parts,
        world_size=1,
        device="CPU",
        versions="torch:2",
        validation=validation,
    )
    if trained:
        result |= dict(
            steps=4,
            train_tokens=400,
            epochs=0.5,
            last_bpb=1.4,
            prequant_bpb=float(0.99 * nats.sum() / math.log(2) / size.sum()) if exact else 1.3,
            train_seconds=10.0,
            history=[[1, 2.0, 4.0], [2, 4.0, 3.0], [4, 8.0, 2.5]],
        )
    (folder / f"{run_id}.json").write_text(json.dumps(result | changes))
    (folder / f"{run_id}.events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    (folder / f"{run_id}.txt").write_bytes(SOURCE + b"\nTTT_LR=0.01\n")
    return folder / f"{run_id}.json"


def change(path: Path, **arrays) -> None:
    """Other arrays in a .docs.npz; None takes one out."""
    with np.load(path) as stored:
        kept = dict(stored) | arrays
    np.savez(path, **{name: value for name, value in kept.items() if value is not None})


def test_a_run_is_found_by_its_id_or_its_path_and_says_what_its_documents_say(tmp_path, monkeypatch):
    path = fabricate(tmp_path / "logs", "a.b")
    monkeypatch.chdir(tmp_path)
    run = load_run("a.b")
    assert run.name == "a.b" and run.trained and run.source == SOURCE
    assert load_run(path).result == run.result == json.loads(path.read_text())
    assert run.bpb == pytest.approx(run.nats.sum() / math.log(2) / run.bytes.sum(), rel=1e-12)
    assert run.static_bpb == pytest.approx(1.02 * run.bpb) and run.loss == pytest.approx(run.result["val_loss"])
    assert run.validations() == [(2, 1.9)] and run.log_text == "TTT_LR=0.01\n"


@pytest.mark.parametrize(
    "name, value",
    [
        ("val_bpb", 1.0),
        ("static_bpb", 1.0),
        ("val_loss", 2.0),
        ("documents", 299),
        ("tokens", 5),
        ("bytes", 5),
        ("adaptation_steps", 0),
        ("validation", "0" * 64),
        ("artifact_bytes", 1),
        ("total_bytes", 16),
        ("artifact_parts", {"x": 0.5}),
        ("code_sha256", "0" * 64),
        ("val_bpb", math.nan),
        ("seed", "1"),
        ("seed", True),
        ("phases", {"train": -1}),
        *(pytest.param(name, 10**400, id=f"{name}-huge") for name in ("val_bpb", "eval_seconds", "seed", "tokens")),
        ("knobs", {"TTT_LR": 1}),
        ("history", [[2, 1.0, 3.0], [1, 2.0, 3.0]]),
        ("history", None),
        ("run_id", ""),
    ],
)
def test_a_number_that_is_false_or_no_number_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(DataError, match=name):
        load_run(fabricate(tmp_path, **{name: value}))


def test_a_field_that_is_missing_is_named(tmp_path):
    path = fabricate(tmp_path)
    result = json.loads(path.read_text())
    for name in result:
        path.write_text(json.dumps({key: value for key, value in result.items() if key != name}))
        with pytest.raises(DataError, match=name):
            load_run(path)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(nats=None),
        dict(nats=np.zeros(0)),
        dict(nats=np.full(300, np.nan)),
        dict(nats=np.zeros(299)),
        dict(tokens=np.full(300, -1)),
        dict(bytes=np.ones(300)),
        dict(updates=np.array(3)),
        dict(validation=np.array("x")),
        dict(validation=np.array(["0" * 64])),
        dict(nats=np.array([None] * 300)),
        dict(bytes=np.zeros(300, np.int64)),
        dict(prequant_nats=np.ones(300)),
        dict(prequant_nats=np.ones(299)),
    ],
    ids=lambda arrays: "-".join(arrays),
)
def test_damaged_scores_are_refused(tmp_path, arrays):
    path = fabricate(tmp_path)
    change(tmp_path / "run.docs.npz", **arrays)
    with pytest.raises(DataError):
        load_run(path)


def test_scores_before_quantisation_are_read_where_a_run_keeps_them(tmp_path):
    run = load_run(fabricate(tmp_path, exact=True))
    assert bits_per_byte(run.prequant_nats, run.bytes) == pytest.approx(run.result["prequant_bpb"])
    assert load_run(fabricate(tmp_path, "older")).prequant_nats is None
    with pytest.raises(DataError, match="trained nothing"):
        load_run(fabricate(tmp_path, "scored", exact=True, trained=False))


def test_files_that_are_missing_cut_short_or_too_large_are_refused(tmp_path, monkeypatch):
    path = fabricate(tmp_path)
    scores = tmp_path / "run.docs.npz"
    whole = scores.read_bytes()
    scores.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not the scores"):
        load_run(path)
    monkeypatch.setattr(results, "MAX_UNPACKED_BYTES", 1 << 20)
    with zipfile.ZipFile(scores, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("nats.npy", bytes(1 << 21))
    with pytest.raises(DataError, match="bytes unpacked"):
        load_run(path)
    scores.unlink()
    with pytest.raises(DataError, match="run it again"):
        load_run(path)
    scores.write_bytes(whole)
    (tmp_path / "run.txt").write_bytes(b"#" + SOURCE)
    with pytest.raises(DataError, match="code_sha256"):
        load_run(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="not the result"):
        load_run(path)


def test_the_interval_covers_a_planted_difference_and_not_zero(tmp_path):
    base = load_run(fabricate(tmp_path, "base"))
    better = load_run(fabricate(tmp_path, "better", gap=-0.005, own=2))
    (gap,) = differences(base, [better])
    assert gap.value == pytest.approx(better.bpb - base.bpb)
    assert gap.low < -0.005 < gap.high < 0
    assert differences(base, [better]) == [gap], "the same seed, the same interval"


def coverage(gap: float, make: Callable) -> float:
    """Part of 200 pairs of runs whose interval covers the planted difference."""
    covered = 0
    for i in range(200):
        draw = np.random.default_rng(i)
        size = draw.integers(50, 2000, 250)
        parts = (gap + make(draw, 250)) * size
        (interval,) = ratio_intervals(parts[:, None], size, seed=i, resamples=400)
        covered += interval.low <= gap <= interval.high
    return covered / 200


@pytest.mark.parametrize("gap", [0.0, -0.01])
def test_about_95_of_100_intervals_cover_the_truth(gap):
    """Zero for runs equal in distribution, else what was planted."""
    assert 0.90 <= coverage(gap, lambda draw, n: draw.normal(0, 0.05, n)) <= 0.99


def test_the_interval_is_what_the_textbook_does_one_draw_at_a_time():
    draw = np.random.default_rng(3)
    parts = draw.normal(1, 1, (40, 2))
    size = draw.integers(1, 9, 40)
    slow = []
    chosen = np.random.default_rng(7)
    for _ in range(500):
        drawn = chosen.integers(0, 40, 40)
        slow.append(parts[drawn].sum(0) / size[drawn].sum())
    low, high = np.percentile(slow, (2.5, 97.5), axis=0)
    for k, interval in enumerate(ratio_intervals(parts, size, seed=7, resamples=500)):
        assert interval == pytest.approx((parts[:, k].sum() / size.sum(), low[k], high[k]))


@pytest.mark.parametrize("seeds", [2, 5])
def test_an_interval_over_seeds_covers_the_truth_and_one_over_documents_alone_does_not(seeds):
    """Seeds move every document alike by 0.003, which no choice of documents shows."""
    covered = {"seeds and documents": 0, "documents": 0}
    for i in range(200):
        draw = np.random.default_rng(i)
        size = draw.integers(50, 2000, 100)
        by_seed = draw.normal(0, 0.003, seeds)
        gaps = (by_seed + draw.normal(0, 0.02, (100, 1)) + draw.normal(0, 0.005, (100, seeds))) * size[:, None]
        total = over_seeds(gaps, size)
        (documents,) = ratio_intervals(gaps.mean(1, keepdims=True), size, 0, resamples=400)
        covered["seeds and documents"] += total.low <= 0 <= total.high
        covered["documents"] += documents.low <= 0 <= documents.high
        assert total.value == pytest.approx(gaps.sum() / size.sum() / seeds) and total.seeds == seeds
    assert covered["seeds and documents"] >= 188 and covered["documents"] < 186


def test_of_one_seed_the_interval_is_that_over_documents():
    draw = np.random.default_rng(0)
    gaps, size = draw.normal(1, 1, (40, 1)), draw.integers(1, 9, 40)
    total = over_seeds(gaps, size)
    assert (total.value, total.low, total.high) == ratio_intervals(gaps, size, 0)[0] and math.isnan(total.spread)


@pytest.mark.parametrize("df, t", [(1, 12.7062), (2, 4.30265), (9, 2.26216), (1000, 1.96234)])
def test_student_s_t_is_that_of_tables(df, t):
    assert two_sided(0.95, df) == pytest.approx(t, rel=1e-5)


def test_runs_on_other_documents_or_other_bytes_are_not_compared(tmp_path):
    base = load_run(fabricate(tmp_path, "a"))
    other = load_run(fabricate(tmp_path, "b", texts=1))
    with pytest.raises(DataError, match="different documents"):
        differences(base, [other])
    with pytest.raises(DataError, match="different documents"):
        differences(base, [dataclasses.replace(base, bytes=base.bytes + 1)])


def test_groups_of_length_hold_every_document_once():
    tokens = np.array([1, 2, 3, 4, 7, 8, 300, 0])
    groups = length_groups(tokens)
    assert [label for label, _ in groups] == ["1-1", "2-3", "4-7", "8-15", "256-511"]
    assert (np.sum([mask for _, mask in groups], axis=0) == 1).all()


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_documents_give_no_interval_and_no_verdict(tmp_path, count):
    """Draws of a single document are all the same: their interval would be a point."""
    base, other = (load_run(fabricate(tmp_path, name, count=count, gap=gap)) for name, gap in (("a", 0.0), ("b", 0.1)))
    (gap,) = differences(base, [other])
    assert gap.low == -math.inf and gap.high == math.inf and str(gap).endswith(" (fewer than 10 documents)")
    bits = np.stack([other.nats - base.nats] * 3, 1) / math.log(2)
    assert ranking.verdict(over_seeds(bits, base.bytes)) == "**unresolved**"
    assert compare.verdict(gap) == "so few documents do not tell the runs apart"
    assert screening.verdict(gap, screening.Noise(0.0, 0.0, True, 3)) == "**unresolved**"
