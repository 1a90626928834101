"""The log of a run: lines for people, events for programs, from the same values."""

import errno
import json
import math
import os
import shutil
import sys

import pytest
from conftest import read_events

from train_gpt import Log, RunConfig, let_go_of_screen, print_now, report_overruns


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "run.1.txt"


@pytest.fixture
def events_path(path):
    return path.with_name("run.1.events.jsonl")


def test_a_line_is_the_template_filled_with_the_values_of_the_event(path, events_path):
    shown = []
    log = Log(path, screen=shown.append)
    log.event("step", "step:{step} loss:{loss:.4f}", step=3, loss=1.23456789, progress=0.1)
    assert shown == ["step:3 loss:1.2346"] and path.read_text() == "step:3 loss:1.2346\n"
    assert read_events(events_path) == [{"event": "step", "step": 3, "loss": 1.23456789, "progress": 0.1}]
    assert events_path.read_text().startswith('{"event": ')


def test_an_event_without_a_template_has_no_line_and_a_line_is_no_event(path, events_path):
    shown = []
    log = Log(path, screen=shown.append)
    log.event("run", source="{not a template}", seed=1)
    log.line("a line with {braces}")
    log.line("for the file alone", screen=False)
    assert shown == ["a line with {braces}"]
    assert path.read_text() == "a line with {braces}\nfor the file alone\n"
    assert [event["event"] for event in read_events(events_path)] == ["run"]


def test_an_event_may_have_a_field_of_any_name(path):
    Log(path).event("phase", "{template} {self} {name}", template=2, self=3, name=4)
    assert path.read_text() == "2 3 4\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(path, events_path, value):
    Log(path).event("step", "loss:{loss:.4f}", loss=value)
    assert path.read_text() == f"loss:{value:.4f}\n" and read_events(events_path) == [{"event": "step", "loss": None}]


def test_a_value_that_is_no_json_leaves_no_half_line(path, events_path):
    log = Log(path)
    log.event("step", step=1)
    for wrong in (object(), [math.nan]):
        with pytest.raises((TypeError, ValueError)):
            log.event("step", step=wrong)
    assert read_events(events_path) == [{"event": "step", "step": 1}]


def test_every_event_is_on_the_disk_at_once_and_whole(path, events_path):
    """However long it is: a run that is killed leaves whole lines."""
    log = Log(path)
    for n in range(3):
        log.event("result", "n:{n}", n=n, history=[[i, i / 7, "é"] for i in range(10_000)])
        events = [json.loads(line) for line in events_path.read_text().splitlines()]
        assert [event["n"] for event in events] == list(range(n + 1)) and len(events[-1]["history"]) == 10_000
        assert path.read_text().splitlines()[-1] == f"n:{n}"


def test_a_log_without_a_file_writes_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Log().event("step", "step:{step}", step=1)
    Log().line("said")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_a_second_run_of_a_name_begins_both_files_anew(path, events_path):
    Log(path).event("step", "{step}", step=1)
    Log(path).event("step", "{step}", step=2)
    assert path.read_text() == "2\n" and read_events(events_path) == [{"event": "step", "step": 2}]


# ---- a run is worth more than its log ---------------------------------------


def full(text):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Crowded:
    """A file on a disk that has room for some bytes, and then for none, until it is freed."""

    def __init__(self, file, room: int):
        self.file = file
        self.room = room

    def write(self, data: bytes) -> int:
        if not self.room:
            full(data)
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("which", ["lines_file", "events_file"])
def test_a_full_disk_is_one_warning_and_what_waited_is_written_when_there_is_room(path, events_path, which):
    """It ended the run, with status 2."""
    shown = []
    log = Log(path, screen=shown.append)
    file = getattr(log, which)
    file.file = Crowded(file.file, room=10)  # half a line
    for step in range(3):
        log.event("step", "a line for people, of step {step}", step=step)
    assert len(shown) == 4 and shown[0] == "a line for people, of step 0"
    assert (
        shown[1]
        == f"warning: {file.path}: a line cannot be written: [Errno 28] No space left on device; the run goes on"
    )
    file.file.room = 10**6
    log.event("step", "a line for people, of step {step}", step=3)
    assert path.read_text().splitlines() == shown
    assert [event["event"] for event in read_events(events_path)] == ["step", "warning", "step", "step", "step"]


def test_a_folder_that_was_deleted_is_a_warning(path):
    """The system takes lines of a deleted file, and nobody finds them."""
    shown = []
    log = Log(path, screen=shown.append)
    shutil.rmtree(path.parent)
    for step in range(2):
        log.event("step", "step {step}", step=step)
    assert [line for line in shown if not line.startswith("warning: ")] == ["step 0", "step 1"]
    assert len(shown) == 4 and all("No such file" in line for line in shown if line.startswith("warning: "))


def gone(text):
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize("screen", [full, gone, lambda text: text.encode("ascii")], ids=["full", "gone", "ASCII"])
def test_a_screen_that_takes_no_line_is_a_warning_in_the_file(path, screen):
    """Nobody reads the other end of a pipe any more, a redirected output is on a full disk, or has no é."""
    log = Log(path, screen=screen)
    for step in range(2):
        log.line(f"é {step}")
    lines = path.read_text().splitlines()
    assert [lines[0], lines[2:]] == ["é 0", ["é 1"]]
    assert lines[1].startswith("warning: the screen: a line cannot be written: ")


def test_a_run_without_a_screen_ends_well(path, monkeypatch):
    """Started with `>&-`, a run whose files were complete ended with status 1."""
    monkeypatch.setattr(sys, "stdout", None)
    Log(path, screen=print_now).line("unseen")
    let_go_of_screen()
    assert path.read_text() == "unseen\n"


def test_a_warning_is_given_once(path, events_path):
    log = Log(path)
    for text in ("one", "other", "one"):
        log.warn(text)
    assert path.read_text() == "warning: one\nwarning: other\n"
    assert read_events(events_path)[1] == {"event": "warning", "text": "other"}


def test_a_line_with_what_is_no_character_is_written_all_the_same(path):
    """As a path may hold."""
    Log(path).line("a\udcff")
    assert path.read_text() == "a\\udcff\n"


@pytest.mark.parametrize("extra", [0, 1])
def test_an_artifact_over_the_limit_of_bytes_is_told(extra):
    log = Log()
    report_overruns(RunConfig(), {"total_bytes": 16_000_000 + extra}, log)
    told = {"artifact and code are 1 bytes over ARTIFACT_BYTES=16000000"} if extra else set()
    assert log.warnings == told
