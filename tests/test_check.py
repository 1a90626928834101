"""`./run.sh check`: a record that is true passes, and one with any number falsified does not."""

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_record

from tools import check, events, results
from tools.artifact import end_in_a_line
from tools.events import SHOWN, Event, wordings_of
from tools.results import read_table
from tools.values import printable
from train_gpt import read_shard


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return test_record.tiny_record(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(recorded, tmp_path, monkeypatch) -> Path:
    """A copy of the record, alone under records/, as someone gets it who did not make it."""
    folder = tmp_path / recorded.relative_to(recorded.parents[2])
    shutil.copytree(recorded, folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_record_of_this_repository_is_true():
    found = check.find_records(Path(check.__file__).parents[1] / "records")
    assert {folder.name: check.examine(folder) for folder in found} == {folder.name: [] for folder in found}


def test_records_are_found(copy):
    """Those that are complete: a folder that was still being written when the machine vanished is none."""
    shutil.copytree(copy, copy.with_name(f".{copy.name}.1.partial"))
    assert check.find_records() == [copy.relative_to(Path.cwd())]


def test_a_true_record_passes(copy, capsys):
    assert check.main([str(copy), "--no-evaluation"]) == 0
    assert capsys.readouterr().out == f"{copy}: all agrees\n"


# ---- every number falsified in turn -----------------------------------------


def numbers_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every number of a JSON value."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(part, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def falsified_json(text: str) -> Iterator[tuple[str, str]]:
    """(what, text with one number changed)."""
    for path in numbers_in(json.loads(text)):
        value = json.loads(text)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] += 1 if isinstance(holder[path[-1]], int) else 0.125
        yield ".".join(map(str, path)), json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def falsified_text(text: str, begin: int, end: int) -> Iterator[tuple[str, str]]:
    """(what, text with the last digit of one number between two places changed)."""
    for match in re.finditer(r"\d+(?:[.,]\d+)*", text[begin:end]):
        at = begin + match.end() - 1
        yield match[0], f"{text[:at]}{(int(text[at]) + 5) % 10}{text[at + 1 :]}"


def falsified_readme(text: str) -> Iterator[tuple[str, str]]:
    """All of it but the author's own words of what changed."""
    begin = text.index("## What changed")
    end = text.index("## Settings that differ")
    yield from falsified_text(text, 0, begin)
    yield from falsified_text(text, end, len(text))


def falsified_log(text: str) -> Iterator[tuple[str, str]]:
    """Every number below the source: those that people read, then those of the events."""
    events = text.index("\nevents:\n")
    yield from falsified_text(text, text.index("\nVOCAB_SIZE="), events)
    at = events + len("\nevents:\n")
    for line in text[at:].splitlines(keepends=True):
        for what, falsified in falsified_event(line):
            yield what, text[:at] + falsified + text[at + len(line) :]
        at += len(line)


def falsified_event(line: str) -> Iterator[tuple[str, str]]:
    """One number more by one: what the lines for people do not show of a number is nobody's claim. The settings are
    texts, of which every digit counts."""
    event = json.loads(line)
    if event["event"] == "run":
        yield from falsified_text(line, 0, len(line))
        return
    for path in numbers_in(event):
        changed = json.loads(line)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] += 1
        yield f"{event['event']}: {'.'.join(map(str, path))}", json.dumps(changed) + "\n"


def falsified_audit(text: str) -> Iterator[tuple[str, str]]:
    """What was counted again, and in which way of scoring."""
    counted = (r"\nok +bytes (.*) of text", r"; (\d+ targets of \d+) documents in", r"\nok +reported (.*) of Tiny")
    for pattern in counted:
        match = re.search(pattern, text)
        yield from falsified_text(text, match.start(1), match.end(1))
    for old, new in ((".ptz:", "0.ptz:"), ("=lora", "=full"), ("=document", "=stream")):
        yield f"{old} {new}", text.replace(old, new)


FALSIFIED: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "submission.json": falsified_json,
    "README.md": falsified_readme,
    "requirements.txt": lambda text: falsified_text(text, 0, len(text)),
    "train_seed0.json": falsified_json,
    "train_seed42.log": falsified_log,
    "audit_seed42.txt": falsified_audit,
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_every_falsified_number_is_caught(copy, name, capsys):
    path = copy / name
    text = path.read_text()
    missed = []
    count = 0
    for what, falsified in FALSIFIED[name](text):
        assert falsified != text
        path.write_text(falsified)
        count += 1
        if not check.examine(copy):
            missed.append(what)
    path.write_text(text)
    with capsys.disabled():
        print(f"\n{name}: caught {count - len(missed)} of {count}")
    assert missed == [] and count >= 4 and check.examine(copy) == []


def test_one_byte_of_the_source_is_caught(copy):
    path = copy / "train_gpt.py"
    source = path.read_bytes()
    for at in (0, len(source) // 2, len(source) - 1):
        path.write_bytes(source[:at] + bytes([source[at] ^ 1]) + source[at + 1 :])
        assert any("does not begin with train_gpt.py" in line for line in check.examine(copy))
    for other in (source + b"#\n", source[:-1]):
        path.write_bytes(other)
        assert check.examine(copy)


@pytest.mark.parametrize("name", ["nats", "static_nats", "tokens", "bytes", "updates"])
def test_a_documents_score_is_caught(copy, name):
    path = copy / "train_seed0.docs.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[name][3] += 1
    np.savez(path, **arrays)
    assert any("train_seed0.json: " in line for line in check.examine(copy))


# ---- a log whose events and lines agree with each other, and not with the result ----


def change_events(folder: Path, change: Callable[[list[dict]], Any]) -> list[str]:
    """Other events in a log, and the lines for people that go with them -> what check finds."""
    path = folder / "train_seed0.log"
    source = (folder / "train_gpt.py").read_text()
    log, _, content = path.read_text().removeprefix(source).partition("\nevents:\n")
    events = [json.loads(line) for line in content.splitlines()]
    assert lines_of(events) == log + "\n"
    change(events)
    written = "".join(json.dumps(event) + "\n" for event in events)
    path.write_text(f"{source}{lines_of(events)}events:\n{written}")
    return check.examine(folder)


def lines_of(events: list[dict]) -> str:
    """What train_gpt.py writes for people below the source."""
    found = [Event(event["event"], {n: v for n, v in event.items() if n != "event"}) for event in events]
    return "\n" + "".join(wordings_of(event)[0] for event in found if wordings_of(event))


def named(events: list[dict], name: str) -> list[dict]:
    return [event for event in events if event["event"] == name]


def change_result(folder: Path, **changes: Any) -> list[str]:
    """Other results in a .json and in the event of the result, a value of None taking one out -> what check finds."""
    path = folder / "train_seed0.json"
    result = json.loads(path.read_text()) | changes
    result = {name: value for name, value in result.items() if value is not None}
    path.write_text(json.dumps(result))

    def change(events: list[dict]) -> None:
        events[-1] = {"event": "result"} | result

    return change_events(folder, change)


def test_lines_and_events_that_are_written_again_are_the_same(copy):
    assert change_events(copy, lambda events: None) == []


# The tiny runs hold nothing out, have time and are of this version; see below.
ABSENT = ("readout", "adapted", "time_short", "excess", "pack")


@pytest.mark.parametrize(
    ("event", "field"),
    [
        *((event, field) for event, names in check.STATED.items() if event not in ABSENT for field in names),
        ("training_data", "tokens"),
        ("step", "step"),
        ("step", "loss"),
        ("step", "train_s"),
        ("phase", "name"),
        ("phase", "seconds"),
        ("phase", "clock"),
        *(("result", name) for name in SHOWN),
    ],
)
def test_what_a_log_states_must_be_the_result(copy, event, field):
    """Its events and its lines say the same, and something else than the result."""

    def change(events: list[dict]) -> None:
        (*_, changed) = named(events, event)
        if field == "knobs":
            changed[field]["TTT_LR"] = "0.5"
        elif field == "clock":
            changed[field] = "training"
        elif field == "code_sha256":
            changed[field] = "0" * 64
        elif isinstance(changed[field], str):
            changed[field] += " "
        else:
            changed[field] += 1

    word = {"step": "the losses in the events", "training_data": "epochs is", "phase": "phases"}.get(event, event)
    assert word in "; ".join(change_events(copy, change))


@pytest.mark.parametrize("name", ["val_bpb", "val_loss", "history", "artifact_parts"])
def test_what_is_taken_out_of_the_event_of_the_result_is_missed(copy, name):
    (found,) = change_events(copy, lambda events: events[-1].pop(name))
    assert f"the event result says {name} None, the result " in found


@pytest.mark.parametrize(
    "event", ["run", "device", "validation", "training_data", "before_quantisation", "rounding", "score"]
)
def test_an_event_that_is_taken_out_is_missed(copy, event):
    found = change_events(copy, lambda events: [events.remove(one) for one in named(events, event)])
    assert f"train_seed0.json: it has no event {event}" in found


def test_a_log_ends_with_its_result(copy):
    found = change_events(copy, lambda events: events.pop())
    assert found == ["train_seed0.json: its events do not end with a result"]


def test_both_scores_of_an_adapting_run_are_told(copy):
    (found,) = change_events(copy, lambda events: named(events, "score")[0].update(val_bpb=None))
    assert "gives no val_bpb" in found


def test_documents_that_were_left_are_told(copy):
    left = {"event": "time_short", "degraded_documents": 3}
    assert change_events(copy, lambda events: events.insert(-1, left)) == [
        "train_seed0.json: the event time_short says degraded_documents 3, the result 0"
    ]


@pytest.mark.parametrize("scope", ["document", "stream"])
def test_documents_that_were_left_are_told_of(copy, scope):
    """The other way round."""
    knobs = json.loads((copy / "train_seed0.json").read_text())["knobs"] | {"TTT_SCOPE": scope}
    found = change_result(copy, degraded_documents=4, doc_independent=0, knobs=knobs)
    assert "train_seed0.json: it has no event time_short" in found


def test_a_stream_of_the_first_version_was_silent_about_documents_that_were_left(copy, monkeypatch):
    monkeypatch.setattr(results.Run, "source", b"")
    knobs = json.loads((copy / "train_seed0.json").read_text())["knobs"] | {"TTT_SCOPE": "stream"}
    found = change_result(copy, degraded_documents=4, doc_independent=0, knobs=knobs)
    assert found and "train_seed0.json: it has no event time_short" not in found


def test_bytes_counted_too_many_are_told_of(copy):
    found = change_result(copy, excess_bytes=4)
    assert "train_seed0.json: it has no event excess" in found


@pytest.mark.parametrize("field", ["documents", "readout"])
def test_events_that_not_every_run_has_are_compared_too(copy, field):
    more = {
        "documents": dict(event="adapted", documents_done=1, documents=3, bpb=1.0, eval_s=1.0, eta_s=1.0),
        "readout": dict(event="readout", documents=3, average=2.0, last=3.0, readout="last"),
    }
    (found,) = change_events(copy, lambda events: events.insert(-1, more[field]))
    assert f"says {field} {more[field][field]}, the result " in found


def test_the_last_try_to_pack_counts(copy):
    size = check.read_record(copy).runs[0].result["artifact_bytes"]

    def packed(size: int) -> dict:
        return dict(event="rounding", attempt=9, fineness=9.0, artifact_bytes=size, bits=3.5)

    assert change_events(copy, lambda events: events.insert(1, packed(17_000_000))) == []
    assert change_events(copy, lambda events: events.insert(-1, packed(size - 1))) == [
        f"train_seed0.json: the event rounding says artifact_bytes {size - 1}, the result {size}"
    ]


def test_a_phase_that_comes_twice_is_caught(copy):
    """A table of phases would keep one of them, and people read both."""
    first = dict(event="phase", name="train", seconds=1.0, clock="training")
    assert any("phases" in line for line in change_events(copy, lambda events: events.insert(-13, first)))


def test_events_of_unknown_names_say_no_number(copy):
    """A later version may report more, and a converted log says so; a figure that nothing is compared with may not
    stand among those that are."""
    words = {"event": "converted", "from": "the lines above"}
    assert change_events(copy, lambda events: events.insert(0, words)) == []
    for more in ({"event": "final", "val_bpb": 0.9}, {"event": "final", "x": "val_bpb is 0.9"}, {"event": "val0.9"}):
        (found,) = change_events(copy, lambda events, more=more: events.insert(1, more))
        assert "which no run reports, with numbers" in found
        assert change_events(copy, lambda events: events.pop(1)) == []


# ---- a log whose lines and events contradict each other ---------------------


def change_log(folder: Path, pattern: str, text: str) -> list[str]:
    """Another text for the one place in a log below its source that a pattern finds -> what check finds."""
    path = folder / "train_seed0.log"
    source, begin, said = path.read_text().partition("\nVOCAB_SIZE=")
    changed, count = re.subn(pattern, lambda match: match.expand(text), said, flags=re.MULTILINE)
    assert count == 1
    path.write_text(source + begin + changed)
    return check.examine(folder)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^step:4 .*\n", ""),
        (r"^(step:4 .*\n)", r"\1\1"),
        (r"^(step:4 .*\n)(step:6 .*\n)", r"\2\1"),
        (r"^(artifact .*) ttt_bpb:.*", r"\1"),
        (r"^artifact (.*) static_bpb:(.*) ttt_bpb:(.*)", r"artifact \1 static_bpb:\3 ttt_bpb:\2"),
        (r"^(?=events:)", "val_bpb:0.9\n"),
        (r"^(TTT_LR=.*\n)", r"\1TTT_LR=0.5\n"),
        (r"^(result .*?)\btokens:\S+ ", r"\1"),
        (r"^(result .*)", r"\1 bpb:0.9"),
        (r"^(devices: .*)", r"\1 "),
    ],
)
def test_a_line_that_its_events_do_not_give_is_caught(copy, pattern, text):
    (found,) = change_log(copy, pattern, text)
    assert "train_seed0.log says " in found and "where its events give " in found


def test_one_line_of_a_record_is_one_line_for_people(copy):
    """A text that would end its line, and begin one that no event gives."""
    changes = dict(device="CPU\nresult val_bpb:0.900000")
    change_result(copy, **changes)
    assert change_events(copy, lambda events: named(events, "device")[0].update(changes))
    knobs = read_table(copy / "train_seed0.json")["knobs"] | {"A=1\nval_bpb": "0.9"}
    assert change_events(copy, lambda events: named(events, "run")[0].update(knobs=knobs))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^events:$", "Events:"),
        (r"^events:$", ""),
        (r'^(\{"event": "device".*\})$', r"[\1]"),
        (r'^\{"event": ("device".*)$', r'{"device": \1'),
        (r'^(\{"event": "device".*)\}$', r'\1, "world_size": 8}'),
        (r'^(\{"event": "device".*)\}$', r'\1, "val_bpb": 0.9}'),
        (r'^(\{"event": "device", )"world_size": \d+, ', r"\1"),
        (r'^(\{"event": "device", "world_size": )\d+', r"\g<1>true"),
        (r'^(\{"event": "rounding".*"fineness": )[^,]+', r"\g<1>NaN"),
        (r'^(\{"event": "rounding".*"fineness": )[^,]+', r"\g<1>1e400"),
        (r'^(\{"event": "rounding".*"attempt": )1', rf"\g<1>{'9' * 5000}"),
        (r'^(\{"event": "rounding".*"attempt": )1', rf"\g<1>{'[' * 5000}"),
        (r'^(\{"event": "phase", "name": "load".*"clock": )"-"', r'\1"lunch"'),
        (r'^(\{"event": "device".*\n)', r"\1\n"),
    ],
)
def test_nonsense_among_the_events_is_told_and_not_believed(copy, pattern, text):
    assert change_log(copy, pattern, text)


def test_events_without_end_are_not_read(copy, monkeypatch):
    monkeypatch.setattr(events, "MAX_BYTES", 999)
    assert any("bytes of events, at most 999" in line for line in check.examine(copy))


# ---- results against knobs --------------------------------------------------


@pytest.mark.parametrize(
    ("enabled", "scope", "degraded", "independent"),
    [("1", "document", 0, 1), ("1", "document", 2, 0), ("1", "stream", 0, 0), ("0", None, 0, 1), ("1", None, 0, 0)],
)
def test_independence_follows_from_the_knobs(copy, enabled, scope, degraded, independent):
    """As train_gpt.evaluate has it."""
    result = check.read_record(copy).runs[0].result
    knobs = result["knobs"] | {"TTT_ENABLED": enabled} | ({"TTT_SCOPE": scope} if scope else {})
    if scope is None:
        del knobs["TTT_SCOPE"]
    result |= dict(knobs=knobs, degraded_documents=degraded, static_bpb=result["val_bpb"])
    for stated in (0, 1):
        found = list(check.against_knobs(result | {"doc_independent": stated}))
        assert ["doc_independent is" in line for line in found] == [True] * (stated != independent)


def test_a_stream_that_calls_itself_independent_is_caught(copy):
    """In settings, result and log alike."""
    knobs = check.read_record(copy).runs[0].result["knobs"] | {"TTT_SCOPE": "stream"}
    change_events(copy, lambda events: named(events, "run")[0].update(knobs=knobs))
    assert "doc_independent is 1, its knobs and degraded_documents make it 0" in "; ".join(
        change_result(copy, knobs=knobs)
    )


@pytest.mark.parametrize(
    "changes",
    [dict(seed=1), dict(run_id="another"), *(dict(artifact_sha256=value) for value in (None, "x", 3, "A" * 64))],
)
def test_a_result_that_its_knobs_contradict_is_caught(copy, changes):
    assert any(next(iter(changes)) in line or "of seed 1" in line for line in change_result(copy, **changes))


def test_two_scores_without_adaptation_are_caught(copy):
    result = check.read_record(copy).runs[0].result
    result["knobs"]["TTT_ENABLED"] = "0"
    assert "though nothing adapts" in "; ".join(check.against_knobs(result))


def test_a_run_of_another_name_is_caught(copy):
    """Its name chooses the artifact that is looked for."""
    knobs = check.read_record(copy).runs[0].result["knobs"] | {"RUN_ID": "../../other"}
    change_events(copy, lambda events: named(events, "run")[0].update(knobs=knobs, run_id="../../other"))
    assert "was called ../../other" in "; ".join(change_result(copy, knobs=knobs, run_id="../../other"))


# ---- audits -----------------------------------------------------------------


@pytest.mark.parametrize("name", check.PROPERTIES)
def test_an_audit_has_a_line_for_every_property_and_none_fails(copy, name):
    path = copy / "audit_seed42.txt"
    text = path.read_text()
    line = re.search(rf"\nok +{name} .*", text)[0]
    path.write_text(text.replace(line, ""))
    assert check.examine(copy) == [f"audit_seed42.txt: it has no line for {name!r}"]
    for failing in (text.replace(line, line.replace("ok   ", "FAIL ")), text + f"FAIL  {name:20} "):
        path.write_text(failing)
        assert check.examine(copy) == [f"audit_seed42.txt: it says that {name!r} FAILs"]
    path.write_text(text.replace(line, f"\n-     {name:20} it does not apply"))
    assert check.examine(copy) == []


@pytest.mark.parametrize("junk", [b"", b"\xff", b"fine\n", b"\x00" * 99])
def test_an_audit_that_says_nothing_is_caught(copy, junk):
    (copy / "audit_seed0.txt").write_bytes(junk)
    assert any(line.startswith("audit_seed0.txt: ") for line in check.examine(copy))


def test_an_audit_of_another_seed_is_caught(copy):
    shutil.copyfile(copy / "audit_seed0.txt", copy / "audit_seed42.txt")
    assert "audit_seed42.txt: it is of Tiny_seed0, the run is Tiny_seed42" in check.examine(copy)


# ---- what else may be wrong -------------------------------------------------


def test_a_false_score_is_told_in_words(copy):
    path = copy / "submission.json"
    stated = json.loads(path.read_text())
    claimed = stated["val_bpb"]
    stated["val_bpb"] = 1.0
    path.write_text(json.dumps(stated, indent=1) + "\n")
    assert check.examine(copy) == [f"submission.json: val_bpb is 1.0, the runs give {claimed}"]
    assert end_in_a_line(lambda: check.main([str(copy), "--no-evaluation"])) == 1


def test_a_number_given_twice_is_caught(copy):
    """A parser keeps the last, a reader may see the first."""
    path = copy / "submission.json"
    path.write_text(path.read_text().replace('"val_bpb":', '"val_bpb": 1.0,\n "val_bpb":', 1))
    assert ["written in another way" in line for line in check.examine(copy)] == [True]


def test_the_authors_words_may_be_mended(copy):
    path = copy / "README.md"
    path.write_text(path.read_text().replace("To see whether 3 is 3.", "To see."))
    assert check.examine(copy) == []
    path.write_text(path.read_text().replace("Rows of 64.", "Rows of 128."))
    assert ["blurb" in line for line in check.examine(copy)] == [True]


def test_the_contests_limits_hold_whatever_the_record_says(copy):
    """A record that calls itself one of the contest's track is measured by that track."""
    for name in ("submission.json", "README.md"):
        path = copy / name
        path.write_text(path.read_text().replace("track_non_record_16mb", "track_10min_16mb"))
    found = "; ".join(check.examine(copy))
    assert "asks for 8 x H100" in found and "the contest's are 50,000" in found and "it lies in" in found


@pytest.mark.parametrize(
    "name",
    [
        "loss.png",
        "audit_seed42.txt",
        "train_seed42.log",
        "train_seed42.json",
        "README.md",
        "train_seed42.docs.npz",
        "train_gpt.py",
        "requirements.txt",
    ],
)
def test_a_missing_file_is_caught(copy, name):
    (copy / name).unlink()
    assert any(name in line for line in check.examine(copy))


def test_a_seed_that_was_left_out_is_caught(copy):
    """A record of its best seeds only: all files of one are gone, the claims are not."""
    for path in copy.glob("*_seed42.*"):
        path.unlink()
    assert any("seeds" in line for line in check.examine(copy))


def test_an_artifact_does_not_belong_there(copy):
    (copy / "best.ptz").write_bytes(b"x")
    assert check.examine(copy) == ["best.ptz: artifacts are not kept in a record"]


def test_a_folder_elsewhere_is_caught(copy):
    other = copy.with_name("2020-01-01_Tiny")
    copy.rename(other)
    (found,) = check.examine(other)
    assert "says that it is" in found


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"baseline": {}}', b"[" * 3000, b"7" * 5000]
)
@pytest.mark.parametrize(
    "name",
    ["submission.json", "README.md", "train_seed0.json", "train_seed0.log", "train_seed0.docs.npz", "train_gpt.py"],
)
def test_junk_is_told_and_not_believed(copy, name, junk):
    (copy / name).write_bytes(junk)
    assert check.examine(copy)


ANOTHER_KIND = [
    dict(allowed=[["x"]]),
    dict(allowed=["everything"]),
    dict(limits={}),
    dict(limits=3),
    dict(author=3),
    dict(date="x"),
    dict(name="../../x"),
    dict(track=[]),
    dict(baseline=[1]),
    dict(baseline={"source": "given"}),
    dict(limits={"train_seconds": "long", "eval_seconds": float("inf")}),
]


HUGE = 10**400  # JSON holds it, and no float does


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=HUGE),
        dict(val_bpb=HUGE),
        dict(history=[[2, 0.1, HUGE]]),
        dict(history=[[HUGE, 0.1, 1.0]]),
        dict(epochs=1e308),
        dict(train_tokens=HUGE),
        dict(bytes=HUGE),
        dict(artifact_parts={"x": HUGE}),
        dict(phases={"train": HUGE}),
        dict(seed=HUGE),
        dict(knobs={}),
        dict(device="\ud800"),
        dict(versions="\x1b[2J"),
    ],
)
def test_numbers_without_end_are_told_and_not_believed(copy, changes, capsys):
    assert change_result(copy, **changes)
    assert end_in_a_line(lambda: check.main([str(copy), "--no-evaluation"])) == 1
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400, "1e300", "1e-320", "NaN", "1" + "0" * 5000])
@pytest.mark.parametrize("name", ["val_bpb", "val_bpb_std", "seeds", "bytes_per_token", "documents", "train_seconds"])
def test_endless_numbers_in_a_submission_are_told(copy, name, number):
    path = copy / "submission.json"
    text = path.read_text()
    at = text.index('"limits"')  # and the baseline after it
    path.write_text(text[:at] + re.sub(rf'("{name}": )[^,\n]+', rf"\g<1>{number}", text[at:], count=1))
    assert check.examine(copy)


@pytest.mark.parametrize(
    "source", [b"x: int = knob()", b"x: float = knob('x', '')", b"(" * 999, b"x = 1\n y", b"\x00", b"-" * 99999 + b"1"]
)
def test_a_source_that_is_none_is_told(copy, source):
    """Every file agrees that it ran."""
    (copy / "train_gpt.py").write_bytes(source)
    for path in copy.glob("train_seed*.json"):
        result = json.loads(path.read_text())
        log = path.with_suffix(".log")
        new = dict(code_bytes=len(source), total_bytes=len(source) + result["artifact_bytes"])
        new["code_sha256"] = hashlib.sha256(source).hexdigest()
        said = log.read_bytes()[result["code_bytes"] :].decode()
        for name, value in new.items():
            for wording in ("{}:{}", '"{}": {}', '"{}": "{}"'):
                said = said.replace(wording.format(name, result[name]), wording.format(name, value))
        said = said.replace(f"{result['code_bytes']} bytes of code", f"{len(source)} bytes of code")
        log.write_bytes(source + said.encode())
        path.write_text(json.dumps(result | new))
    (line,) = check.examine(copy)
    assert line.startswith("train_gpt.py")


@pytest.mark.parametrize("error", [ArithmeticError, ValueError, IndexError, RecursionError, SyntaxError, MemoryError])
@pytest.mark.parametrize("where", ["read_record", "misplaced", "against_log", "against_audit", "against_submission"])
def test_whatever_breaks_is_one_line(copy, monkeypatch, where, error, capsys):
    def broken(*_):
        raise error("of a hostile record")

    monkeypatch.setattr(check, where, broken)
    assert end_in_a_line(lambda: check.main([str(copy)])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(f"{error.__name__}: of a hostile record" in line for line in lines)


def test_a_finding_stays_one_line(copy, capsys):
    """A record does not write the line that praises it."""
    assert printable("a\nb\x1b[2J\ud800 é") == "a\\nb\\x1b[2J\\ud800 é"
    change_result(copy, device=f"CPU\n{copy}: all agrees")
    assert check.main([str(copy), "--no-evaluation"]) == 1
    assert f"{copy}: all agrees" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("change", ANOTHER_KIND)
def test_facts_of_another_kind_are_told(copy, change):
    path = copy / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert check.examine(copy)


def test_a_baseline_at_hand_is_compared(copy, monkeypatch):
    """The record whose scores are to be beaten lies in the repository: its figures are taken from there again."""
    home = copy.parents[2]
    shutil.copytree(home / "records", home / "older")
    source = next((home / "older").glob("*/*")).relative_to(home)
    monkeypatch.chdir(home)
    actual = check.baseline_of(source)
    facts = dataclasses.replace(check.read_record(copy).facts, baseline=actual)
    assert check.against_baseline_record(facts) == []

    facts = dataclasses.replace(facts, baseline=dataclasses.replace(actual, val_bpb=9.0))
    assert check.against_baseline_record(facts) == [
        f"submission.json: baseline.val_bpb is 9.0, {source} gives {actual.val_bpb}"
    ]


# ---- command line and evaluation --------------------------------------------


def test_a_users_mistakes_are_not_disagreements(copy, tmp_path, capsys):
    here = str(copy)
    for arguments in (
        [str(tmp_path)],
        [here, "--artifact", "x"],
        [here, "--artifact", "7=x"],
        [here, "--artifact", "0=missing.ptz"],
        [here, here, "--artifact", "0=x"],
    ):
        assert end_in_a_line(lambda given=arguments: check.main(given)) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_without_an_artifact_nothing_is_evaluated(copy, capsys):
    assert check.main([str(copy)]) == 0
    assert capsys.readouterr().out.count("not at hand") == 2


def test_an_artifact_at_hand_is_evaluated_again(recorded, copy, monkeypatch, capfd):
    """By the record's own source, with the record's knobs whatever the environment says of them."""
    made = recorded.parents[2]
    monkeypatch.setenv("DATA_PATH", str(made / "my data"))
    monkeypatch.setenv("TTT_LR", "0.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check.main([str(copy), "--artifact", f"0={made / 'logs' / 'Tiny_seed0.ptz'}"]) == 0
    out = capfd.readouterr().out
    assert out.count("not at hand") == 1 and "seed 0: val_bpb" in out and f"{copy}: all agrees" in out
    assert not (copy.parents[2] / "logs").exists()


def fake_evaluation(score: float, validation: str | None = None) -> Callable:
    def run(script: Path, env: dict[str, str], folder: Path) -> int:
        result = json.loads((script.parent / f"train_seed{env['SEED']}.json").read_text())
        changed = result | {"val_bpb": result["val_bpb"] + score, "validation": validation or result["validation"]}
        (folder / "logs").mkdir()
        (folder / "logs" / f"{env['RUN_ID']}.json").write_text(json.dumps(changed))
        return 0

    return run


@pytest.mark.parametrize(("score", "status"), [(0.00009, 0), (0.00011, 1), (-0.00011, 1)])
def test_another_score_is_a_disagreement(recorded, copy, monkeypatch, score, status):
    monkeypatch.setattr(check, "run_foreign_entry", fake_evaluation(score))
    shutil.copytree(recorded.parents[2] / "logs", copy.parents[2] / "logs")  # found there by their names
    assert check.main([str(copy)]) == status


@pytest.mark.parametrize(("gpu_here", "named", "evaluated"), [(True, False, 2), (False, False, 0), (False, True, 1)])
def test_what_a_gpu_scored_is_not_evaluated_unasked_on_a_cpu(
    recorded, copy, monkeypatch, capsys, gpu_here, named, evaluated
):
    monkeypatch.setattr(check, "run_foreign_entry", fake_evaluation(0.0))
    monkeypatch.setattr(check, "made_on_gpu", lambda run: True)
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: gpu_here)
    logs = shutil.copytree(recorded.parents[2] / "logs", copy.parents[2] / "logs")
    more = ["--artifact", f"0={logs / 'Tiny_seed0.ptz'}"] if named else []
    assert check.main([str(copy), *more]) == 0
    out = capsys.readouterr().out
    assert out.count("evaluating") == evaluated and out.count("would take hours") == 2 - evaluated


def test_another_artifact_is_a_disagreement(recorded, copy, monkeypatch, capsys):
    """Be it of another size or other bytes: it is not evaluated."""
    monkeypatch.setattr(check, "run_foreign_entry", test_record.no_start)
    logs = recorded.parents[2] / "logs"
    other = copy.parents[2] / "other.ptz"
    content = (logs / "Tiny_seed0.ptz").read_bytes()
    for changed, reason in ((content + b"x", "bytes, the run's artifact"), (content[:-1] + b"\0", "its SHA-256 is ")):
        assert changed != content
        other.write_bytes(changed)
        assert check.main([str(copy), "--artifact", f"0={other}"]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "not at hand" not in line]
        assert f"{other} is another one" in line and reason in line


def test_an_artifact_of_that_name_and_size_is_not_taken_for_it(recorded, copy, monkeypatch, capsys):
    monkeypatch.setattr(check, "run_foreign_entry", test_record.no_start)
    (copy.parents[2] / "logs").mkdir()
    for seed in (0, 42):
        content = (recorded.parents[2] / "logs" / f"Tiny_seed{seed}.ptz").read_bytes()
        (copy.parents[2] / "logs" / f"Tiny_seed{seed}.ptz").write_bytes(content[::-1])
    assert check.main([str(copy)]) == 0
    assert capsys.readouterr().out.count("not at hand") == 2


def test_another_validation_set_is_a_disagreement(recorded, copy, monkeypatch, capfd):
    """Of the same tokenizer, so that it can be scored, and would be another text's score."""
    made = recorded.parents[2]
    shutil.copytree(made / "my data", copy.parents[2] / "other")
    shard = copy.parents[2] / "other" / "fineweb_val_000000.bin"
    tokens = read_shard(shard).copy()
    tokens[1:3] = tokens[2], tokens[1]
    shard.write_bytes(shard.read_bytes()[:1024] + tokens.tobytes())
    monkeypatch.setenv("DATA_PATH", "other")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = [str(copy), "--artifact", f"0={made / 'logs' / 'Tiny_seed0.ptz'}"]
    assert end_in_a_line(lambda: check.main(given)) == 1
    out = capfd.readouterr().out.splitlines()
    assert "another validation set" in out[-1] and "set DATA_PATH" in out[-1] and "val_bpb is" not in out[-1]


def test_an_evaluation_that_breaks_us_ends_in_a_line(recorded, copy, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("embedded null byte")

    monkeypatch.setattr(check, "run_foreign_entry", broken)
    given = [str(copy), "--artifact", f"0={recorded.parents[2] / 'logs' / 'Tiny_seed0.ptz'}"]
    assert end_in_a_line(lambda: check.main(given)) == 2
    assert "embedded null byte" in capsys.readouterr().err


def test_what_a_deadline_left_out_is_not_repeated(recorded, copy, monkeypatch, capsys):
    record = check.read_record(copy)
    record.runs[0].result["degraded_documents"] = 1
    monkeypatch.setattr(check, "read_record", lambda _: record)
    monkeypatch.setattr(check, "run_foreign_entry", test_record.no_start)
    assert check.evaluate_all(copy, {0: recorded.parents[2] / "logs" / "Tiny_seed0.ptz"}) == []
    assert "cannot be repeated" in capsys.readouterr().out
