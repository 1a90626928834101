"""The benchmarks that train: the same path twice learns the same, and a race ends in time with a score of both."""

import re

import pytest

import train_gpt as g
from tools import bench


@pytest.fixture
def one_path_twice(monkeypatch):
    monkeypatch.setattr(bench, "two_paths", lambda run, dist: iter(["one", "two"]))


def test_a_path_agrees_with_itself(one_path_twice, tiny_run, tiny_config, tiny_data, capsys):
    run = tiny_run(iterations=21, holdout_tokens=600)
    bench.agreement(run, tiny_config, g.Dist())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("agreement")]
    assert [re.search(r"difference:(\S+)", line)[1] for line in lines] == ["+0.00000"] * 2
    assert [line.split()[-1] for line in lines] == ["one", "two"]


def test_agreement_wants_steps_and_held_out_text(one_path_twice, tiny_run, tiny_config, tiny_data):
    wanting = {"ITERATIONS": tiny_run(iterations=0, max_wallclock_seconds=1.0), "HOLDOUT_TOKENS": tiny_run()}
    for knob, run in wanting.items():
        with pytest.raises(g.ConfigError, match=knob):
            bench.agreement(run, tiny_config, g.Dist())


def test_a_race_ends_in_time_and_scores_both_read_outs(one_path_twice, tiny_run, tiny_config, tiny_data, capsys):
    bench.race(tiny_run(iterations=0, max_wallclock_seconds=0.3, holdout_tokens=600), tiny_config, g.Dist())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("race")]
    for line in lines:
        found = {key: float(value) for key, value in re.findall(r"(\w+):([\d.]+)", line)}
        assert found["seconds"] >= 0.3 and found["steps"] >= 1
        assert 0 < found["last"] < 2 * 4.2 and 0 < found["average"] < 2 * 4.2  # log(64) = 4.16
    assert len(lines) == 2


def test_torchs_kernels_know_where_segments_begin(tiny_run, tiny_data):
    run, dist = tiny_run(), g.Dist()
    with bench.torch_kernels(run.train_seq_len):
        segments = g.random_batch(run, 64, dist)[0].segments
        assert not g.use_kernels(segments.positions)
    begins = (segments.positions == 0).nonzero()[:, 0].tolist()
    assert segments.bounds[: len(begins)].tolist() == begins
    assert set(segments.bounds[len(begins) :].tolist()) == {len(segments.positions)}
    assert not hasattr(g.random_batch(run, 64, dist)[0].segments, "bounds")
