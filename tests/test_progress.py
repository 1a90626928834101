"""Progress of long work: when it is told, and in which words."""

import pytest

from tools import progress


@pytest.mark.parametrize(
    "seconds, done, said",
    [
        (9.0, 500, ""),
        (20.0, 0, ""),
        (20.0, 2_000, ""),
        (20.0, 1_500, "scoring: 1,500 of 2,000 targets, 75.0 a second, 7 s left\n"),
    ],
)
def test_the_time_left_is_told_every_ten_seconds_until_all_is_done(monkeypatch, capsys, seconds, done, said):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    tell = progress.Progress("scoring", 2_000, "targets")
    now += seconds
    tell(done)
    tell(done)
    assert capsys.readouterr().err == said
