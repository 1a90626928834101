"""Two runs, document by document."""

import math

import numpy as np
import pytest
from test_plot import png_size
from test_results import fabricate

from tools import compare
from tools.artifact import end_in_a_line
from tools.results import load_run


def test_a_planted_difference_is_found_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fabricate(tmp_path / "logs", "base")
    fabricate(tmp_path / "logs", "better", gap=-0.005, own=2)
    assert compare.main(["base", "better"]) == 0
    out = capsys.readouterr().out
    assert "the interval excludes zero: on documents like these B is better" in out
    a = load_run("base")
    b = load_run("better")
    assert f"B - A: {b.bpb - a.bpb:+.5f} [" in out
    assert "| A, bpb | B, bpb | B - A, bpb, 95 % interval | B better | B worse |" in out
    better = int((b.nats < a.nats).sum())
    worse = int((b.nats > a.nats).sum())
    assert better > worse and f"of 300 documents B predicts {better} better, {worse} worse, 0 the same" in out
    assert out.splitlines()[-1] == "logs/compare/base_better.png"
    assert png_size(tmp_path / "logs/compare/base_better.png") == (900, 420)
    assert compare.main(["better", "logs/base.json", "--out", "other.png"]) == 0
    assert "A is better" in capsys.readouterr().out and png_size(tmp_path / "other.png")


def test_runs_equal_in_distribution_are_not_told_apart(tmp_path, capsys):
    paths = [str(fabricate(tmp_path, f"run{own}", own=own)) for own in (1, 2)]
    assert compare.main([*paths, "--out", str(tmp_path / "same.png")]) == 0
    assert "the interval holds zero" in capsys.readouterr().out
    assert compare.main([paths[0], paths[0], "--out", str(tmp_path / "same.png")]) == 0
    out = capsys.readouterr().out
    assert "B - A: +0.00000 [+0.00000, +0.00000]" in out and "0 better, 0 worse, 300 the same" in out


def test_the_split_by_length_adds_up(tmp_path):
    a, b = (load_run(fabricate(tmp_path, f"run{own}", own=own, gap=0.01 * own)) for own in (1, 2))
    groups = compare.compare_by_length(a, b)
    assert sum(g.documents for g in groups) == sum(g.better + g.worse for g in groups) == 300
    edges = [tuple(map(int, g.label.split("-"))) for g in groups]
    assert all(low <= g.tokens <= high for (low, high), g in zip(edges, groups, strict=True))
    size = [a.bytes[(low <= a.tokens) & (a.tokens <= high)].sum() for low, high in edges]
    whole = np.dot([g.bpb[0] for g in groups], size) / a.bytes.sum()
    assert whole == pytest.approx(a.nats.sum() / math.log(2) / a.bytes.sum())
    for g in groups:
        assert (g.gap is None) == (g.documents < 10)
        assert g.gap is None or g.gap.value == pytest.approx(g.bpb[1] - g.bpb[0])
    assert {g.gap is None for g in groups} == {True, False}


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(texts=1), "scored different documents"),
        (dict(validation="0" * 64), "contradict"),
        (dict(val_bpb=1.0), "val_bpb is 1.0"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line_and_status_2(tmp_path, capsys, other, words):
    a = fabricate(tmp_path, "a")
    b = fabricate(tmp_path, "b", **other)
    picture = tmp_path / "no.png"
    assert end_in_a_line(lambda: compare.main([str(a), str(b), "--out", str(picture)])) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert said.out == "" and not picture.exists()


def test_a_run_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert end_in_a_line(lambda: compare.main(["absent", "absent"])) == 2
    assert "logs/absent.json: cannot be read" in capsys.readouterr().err


def test_a_run_is_named_by_any_of_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fabricate(tmp_path / "logs", "x.y")
    (tmp_path / "logs" / "x.y.ptz").touch()
    for name in ("logs/x.y.ptz", "logs/x.y.json", "logs/x.y", "logs/x.y.docs.npz", "x.y"):
        assert compare.main([name, "x.y", "--out", "same.png"]) == 0
    assert end_in_a_line(lambda: compare.main(["logs/z.ptz", "x.y"])) == 2
    assert "error: logs/z.json: cannot be read" in capsys.readouterr().err


def test_documents_that_did_not_adapt_for_lack_of_time_are_told(tmp_path):
    """Otherwise a slow machine would pass for a worse run."""
    a = load_run(fabricate(tmp_path, "a"))
    b = load_run(fabricate(tmp_path, "b", degraded_documents=7, doc_independent=0))
    line_a, line_b, *_ = compare.describe(a, b, [])
    assert "time" not in line_a and line_b.endswith("; time was short: 7 documents without adaptation")


def test_documents_that_the_table_leaves_out_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = fabricate(tmp_path / "logs", "a")
    run = load_run(path)
    few = sum(g.documents for g in compare.compare_by_length(run, run) if g.gap is None)
    assert compare.main(["a", "a"]) == 0
    assert f"have no interval: {few} documents" in capsys.readouterr().out
    groups = compare.compare_by_length(run, run)[1:]
    missing = len(run.nats) - sum(g.documents for g in groups)
    assert f"not in the table: {missing} documents" in compare.left_out(len(run.nats), groups)[0]
