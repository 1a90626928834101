"""`./run.sh check`: a record that is true passes, and one with any number falsified does not."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_record

from tools import check
from tools.common import end_in_a_line
from train_gpt import UserError


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
    begin, end = text.index("## What changed"), text.index("## Settings that differ")
    yield from falsified_text(text, 0, begin)
    yield from falsified_text(text, end, len(text))


def falsified_log(text: str) -> Iterator[tuple[str, str]]:
    """Settings, losses, the table of phases and the result."""
    source = text.index("\nVOCAB_SIZE=")
    for pattern in (r"\n[A-Z][A-Z0-9_]*=(.*)", r"\nstep:(\d+ loss:\S+)", r"train_s:(\S+)", r"before quantisation(.*)",
                    r"\nphase (.*)", r"\nresult (.*)", r"\n(devices: .*),", r"\n(validation: .*)",
                    r"\ntraining data: \d+ shards, (\d+) ", r"\n(python:.*) \S+\n"):  # fmt: skip
        for match in re.finditer(pattern, text[source:]):
            yield from falsified_text(text, source + match.start(1), source + match.end(1))


FALSIFIED: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "submission.json": falsified_json,
    "README.md": falsified_readme,
    "requirements.txt": lambda text: falsified_text(text, 0, len(text)),
    "train_seed0.json": falsified_json,
    "train_seed42.log": falsified_log,
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_every_falsified_number_is_caught(copy, name, capsys):
    path, missed, count = copy / name, [], 0
    text = path.read_text()
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


@pytest.mark.parametrize("name", ["loss.png", "audit_seed42.txt", "train_seed42.log", "train_seed42.json", "README.md",
                                  "train_seed42.docs.npz", "train_gpt.py", "requirements.txt"])  # fmt: skip
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
@pytest.mark.parametrize("name", ["submission.json", "README.md", "train_seed0.json", "train_seed0.log",
                                  "train_seed0.docs.npz", "train_gpt.py"])  # fmt: skip
def test_junk_is_told_and_not_believed(copy, name, junk):
    (copy / name).write_bytes(junk)
    assert check.examine(copy)


ANOTHER_KIND = [
    dict(allowed=[["x"]]), dict(allowed=["everything"]), dict(limits={}), dict(limits=3), dict(author=3),
    dict(date="x"), dict(name="../../x"), dict(track=[]), dict(baseline=[1]), dict(baseline={"source": "given"}),
    dict(limits={"train_seconds": "long", "eval_seconds": float("inf")}),
]  # fmt: skip


@pytest.mark.parametrize("change", ANOTHER_KIND)
def test_facts_of_another_kind_are_told(copy, change):
    path = copy / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert check.examine(copy)


def test_a_baseline_at_hand_is_compared(copy, monkeypatch):
    """The record whose scores are to be beaten lies in the repository: its figures are taken from there again."""
    patch, home = monkeypatch, copy.parents[2]
    shutil.copytree(home / "records", home / "older")
    source = next((home / "older").glob("*/*")).relative_to(home)
    actual = check.baseline_of(source)
    facts = check.read_record(copy).facts
    patch.chdir(home)
    true, false = (test_record.dataclasses.replace(facts, baseline=b) for b in (
        actual, test_record.dataclasses.replace(actual, val_bpb=9.0)))  # fmt: skip
    assert check.against_baseline(true) == []
    assert check.against_baseline(false) == [
        f"submission.json: baseline.val_bpb is 9.0, {source} gives {actual.val_bpb}"
    ]


# ---- command line and evaluation --------------------------------------------


def test_a_users_mistakes_are_not_disagreements(copy, tmp_path, capsys):
    here = str(copy)
    for arguments in ([str(tmp_path)], [here, "--artifact", "x"], [here, "--artifact", "7=x"],
                      [here, "--artifact", "0=missing.ptz"], [here, here, "--artifact", "0=x"]):  # fmt: skip
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
    monkeypatch.setattr(check, "run_entry", fake_evaluation(score))
    shutil.copytree(recorded.parents[2] / "logs", copy.parents[2] / "logs")  # found there by their names
    assert check.main([str(copy)]) == status


def test_another_artifact_is_a_disagreement_and_other_validation_a_mistake(recorded, copy, monkeypatch):
    logs = recorded.parents[2] / "logs"
    assert check.main([str(copy), "--artifact", f"0={logs / 'Tiny_seed42.ptz'}"]) == 1
    monkeypatch.setattr(check, "run_entry", fake_evaluation(0.0, "0" * 64))
    with pytest.raises(UserError, match="another validation set"):
        check.main([str(copy), "--artifact", f"0={logs / 'Tiny_seed0.ptz'}"])


def test_what_a_deadline_left_out_is_not_repeated(recorded, copy, monkeypatch, capsys):
    record = check.read_record(copy)
    record.runs[0].result["degraded_documents"] = 1
    monkeypatch.setattr(check, "read_record", lambda _: record)
    monkeypatch.setattr(check, "run_entry", test_record.no_start)
    assert check.evaluate_all(copy, {0: recorded.parents[2] / "logs" / "Tiny_seed0.ptz"}) == []
    assert "cannot be repeated" in capsys.readouterr().out
