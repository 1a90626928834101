"""Pictures of runs: PNGs of the stated size, and what they show."""

import contextlib
import dataclasses

import pytest
from test_results import fabricate

from tools import plot
from tools.results import load_run
from train_gpt import UserError


def png_size(path) -> tuple[int, int]:
    """Width and height of a whole PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture
def shown(monkeypatch) -> dict:
    """The axes of every picture as they were when it was done, by the name of its file."""
    seen = {}
    original = plot.picture

    @contextlib.contextmanager
    def watched(path, height, columns=1):
        with original(path, height, columns) as axes:
            yield axes
        seen[path.stem] = axes

    monkeypatch.setattr(plot, "picture", watched)
    return seen


def test_one_picture_a_question_of_the_stated_width(tmp_path, capsys):
    paths = [fabricate(tmp_path, name, own=i) for i, name in enumerate(("one", "two"))]
    assert plot.main([*map(str, paths), "--out", str(tmp_path / "plots")]) == 0
    names = ["loss.png", "phases.png", "lengths.png", "bytes.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "plots" / name) for name in names]
    sizes = [png_size(tmp_path / "plots" / name) for name in names]
    assert [width for width, _ in sizes] == [900] * 4
    assert all(200 <= height <= 900 for _, height in sizes)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(names)


def test_runs_that_only_scored_have_no_loss(tmp_path):
    run = load_run(fabricate(tmp_path, "scored", trained=False))
    assert [path.name for path in plot.draw_all([run], tmp_path)] == ["phases.png", "lengths.png", "bytes.png"]


def test_the_pictures_show_the_numbers_of_the_runs(tmp_path, shown):
    run = load_run(fabricate(tmp_path, knobs={"ARTIFACT_BYTES": "16000000"}))
    plot.draw_all([run], tmp_path)
    by_time, by_tokens = shown["loss"]
    assert by_time.lines[0].get_xydata().tolist() == [[2, 4], [4, 3], [8, 2.5]]
    assert by_tokens.lines[0].get_xdata().tolist() == [1e-4, 2e-4, 4e-4]
    (seconds, nats), (end, _) = by_time.lines[1].get_xydata().tolist()
    assert (seconds, end) == (4, 8)  # of the validation at step 2, and of the last
    assert nats == pytest.approx(1.9 * 0.6931 * run.result["bytes"] / run.result["tokens"], rel=1e-3)
    assert sum(bar.get_width() for bar in shown["phases"][0].patches) == pytest.approx(
        sum(run.result["phases"].values())
    )
    widths = sum(bar.get_width() for bar in shown["bytes"][0].patches)
    assert widths == pytest.approx(run.result["total_bytes"] / 1e6)
    (label,) = shown["bytes"][0].get_yticklabels()
    assert label.get_text() == f"run\n{run.result['total_bytes']:,} of 16,000,000"
    adapted, static = shown["lengths"][0].lines
    assert static.get_ydata() == pytest.approx(1.02 * adapted.get_ydata())
    for axes in (by_time, by_tokens, shown["lengths"][0]):
        assert axes.get_xlabel().endswith(")"), "units"


def test_a_validation_is_shown_at_its_own_time_between_and_beyond_the_logged_steps(tmp_path, shown):
    trained = {"steps": 8, "train_tokens": 800, "train_seconds": 17.0}
    trained["phases"] = {"train": 15.0, "checkpoint": 1.0, "pack": 1.0}
    for name, history, seconds in [("sparse", [[4, 6.0, 4.0]], 3.0), ("none", [], 4.0)]:
        run = load_run(fabricate(tmp_path, name, history=history, **trained))
        plot.draw_all([run], tmp_path)
        by_time, by_tokens = shown["loss"]
        assert by_time.lines[1].get_xdata().tolist() == [seconds, 16.0]  # of steps 2 and 8
        assert by_tokens.lines[1].get_xdata().tolist() == [2e-4, 8e-4]


def test_runs_of_one_name_are_told_apart(tmp_path, shown):
    """Runs of two sweeps may differ in the folder alone, and a copy has the name of its original."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, same, other = (load_run(fabricate(tmp_path, name)) for name in ("a/run", "b/run", "a/other"))
    assert plot.labels([one, other]) == ["run", "other"]
    assert plot.labels([one, same]) == ["a/run", "b/run"]

    copies = [load_run(fabricate(tmp_path / folder)) for folder in ("a", "b")]
    plot.draw_all(copies, tmp_path)
    for path in [str(copy.path) for copy in copies]:
        for name in ("phases", "bytes"):
            assert any(label.get_text().startswith(path) for label in shown[name][0].get_yticklabels())
        for name in ("loss", "lengths"):
            assert any(line.get_label().startswith(path) for line in shown[name][0].lines)


@pytest.mark.parametrize(
    "changed, marked", [({}, []), ({"texts": 1}, ["loss", "lengths"]), ({"tokenizer": 2}, ["loss"])]
)
def test_runs_of_other_text_are_marked(tmp_path, shown, changed, marked):
    """bpb compares between tokenizers of the same documents, nats a token do not."""
    runs = [load_run(fabricate(tmp_path, "one")), load_run(fabricate(tmp_path, "two", texts=changed.get("texts", 0)))]
    if "tokenizer" in changed:
        runs[1] = dataclasses.replace(runs[1], tokens=runs[1].tokens // 2, validation="0" * 64)
    plot.draw_all(runs, tmp_path)
    titles = {name: axes[0].figure.get_suptitle() for name, axes in shown.items()}
    assert [name for name in ("loss", "lengths") if "do not compare" in titles[name]] == marked


def test_more_runs_than_colours_are_refused(tmp_path):
    run = load_run(fabricate(tmp_path))
    with pytest.raises(UserError, match="9 runs"):
        plot.draw_all([run] * 9, tmp_path)
