"""The events that tools read are those that train_gpt.py reports, and so are the lines for people."""

import ast
from pathlib import Path

import pytest

import train_gpt
from tools import events
from tools.events import Event, names_in, read_events, wordings_of
from train_gpt import DataError

TREE = ast.parse(Path(train_gpt.__file__).read_text(encoding="utf-8"))
TEXTS = {node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


OF_OLDER_RUNS = {"pack"}  # events that this source does not report


def reported() -> list[tuple[str, set[str]]]:
    """(event, its fields) of every call of Log.event."""
    found = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
            found.append((node.args[0].value, fields_of(node)))
    return found


def fields_of(call: ast.Call) -> set[str]:
    """By its keywords, or where it passes a table, by its template; the result's is not a constant."""
    if all(word.arg for word in call.keywords):
        return {word.arg for word in call.keywords}
    template = call.args[1]
    return names_in(template.value) if isinstance(template, ast.Constant) else set()


def test_every_event_is_known_with_its_fields():
    assert {name for name, _ in reported()} == set(events.FIELDS) - OF_OLDER_RUNS
    for name, fields in reported():
        assert fields == set(events.FIELDS[name]), name


def test_a_dry_run_reports_every_phase_that_follows_training():
    assert set(events.FIELDS["dry_run"]) == set(train_gpt.TRAINING_CLOCK) - {"train"}


@pytest.mark.parametrize("event", sorted(set(events.TEMPLATES) - OF_OLDER_RUNS))
def test_the_latest_wording_is_the_one_of_the_source(event):
    assert events.TEMPLATES[event][0] in TEXTS


@pytest.mark.parametrize(
    "values", [dict(triton=None, mlp="cublas"), dict(triton="3.6", mlp="cublas"), dict(triton="3.6", mlp="triton")]
)
def test_the_line_of_kernels_is_one_of_the_source(values):
    (line,) = wordings_of(Event("kernels", values))
    assert line.removesuffix("\n").replace("3.6", "{triton}") in TEXTS


def test_the_line_of_a_score_is_the_one_of_the_source():
    values = dict(artifact="a.ptz", static_bpb=1.25, val_bpb=1.125)
    parts = "artifact {artifact}: static_bpb:{static_bpb:.5f}", " ttt_bpb:{val_bpb:.5f}"
    assert set(parts) <= TEXTS
    assert wordings_of(Event("score", values)) == ["".join(parts).format(**values) + "\n"]
    assert wordings_of(Event("score", values | {"val_bpb": None})) == [parts[0].format(**values) + "\n"]


def test_the_line_of_the_result_shows_what_a_run_shows():
    assert events.SHOWN == tuple(train_gpt.SHOWN_IN_RESULT_LINE)


def test_a_number_that_is_not_finite_is_null_and_reads_nan():
    content = b'{"event": "validate", "step": 3, "val_bpb": null}\n'
    (event,) = read_events(content, "a run")
    assert wordings_of(event) == ["step:3 val_bpb:nan (last iterate, without adaptation)\n"]


@pytest.mark.parametrize("line", [b"", b"3", b"{}", b'{"event": 3}', b'{"step": 1, "event": "later"}', b"\xff"])
def test_a_line_that_is_no_event_is_refused_with_its_number(line):
    with pytest.raises(DataError, match="a run: line 2 of the events: "):
        read_events(b'{"event": "later", "x": [1]}\n' + line + b"\n", "a run")


def test_an_event_may_have_the_fields_that_it_had_in_logs_that_are_kept():
    """Before other blends were scored, and before half of the average was; each with its line."""
    values = b'"documents": 3, "last": 2.75, "half": 2.25, "average": 2.5, "readout": '
    (event,) = read_events(b'{"event": "readout", ' + values + b'"half"}\n', "a run")
    assert "3 held-out documents: last 2.75000, half 2.25000, average 2.50000 nats a token\n" in wordings_of(event)
    values = b'"documents": 3, "average": 2.5, "last": 2.75, "readout": '
    (event,) = read_events(b'{"event": "readout", ' + values + b'"average"}\n', "a run")
    assert wordings_of(event) == ["3 held-out documents: average 2.50000, last 2.75000 nats a token\n"]
    with pytest.raises(DataError, match="readout is 'half', which no run writes"):
        read_events(b'{"event": "readout", ' + values + b'"half"}\n', "a run")
