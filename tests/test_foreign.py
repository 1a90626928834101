"""Files of others neither run code, nor leave their place, nor speak to the terminal, nor last for ever."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_check import copy, recorded  # noqa: F401  fixtures
from test_results import fabricate

import train_gpt
from tools import check, compare, plot, results
from tools.artifact import CUT_OFF, checked_knobs, end_in_a_line, knobs_of_run
from tools.results import load_run, read_documents, read_result
from tools.values import MOST_SHOWN, printable
from train_gpt import DataError

# ---- environment ------------------------------------------------------------

PROGRAMS = {"PYTHONWARNINGS": "error::x.y", "BROWSER": "./evil", "LD_PRELOAD": "./evil.so", "PATH": "."}


def test_only_knobs_of_a_result_reach_an_environment(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"knobs": {"TTT_LR": "0.01"} | PROGRAMS}))
    assert knobs_of_run(tmp_path / "run.ptz", {}) == {"TTT_LR": "0.01"}


def test_retired_knobs_of_an_older_run_are_passed_over(tmp_path):
    older = {"MATRIX_BITS": "6", "QUANT_CLIP_FLOOR": "6.0", "TTT_LR": "0.01"}
    (tmp_path / "run.json").write_text(json.dumps({"knobs": older}))
    assert knobs_of_run(tmp_path / "run.ptz", {}) == {"TTT_LR": "0.01"}
    with pytest.raises(train_gpt.ConfigError, match="MATRIX_BITS is retired"):
        train_gpt.read_env(older)


@pytest.mark.parametrize(
    "knobs", [{"TTT_LR": "fast"}, {"TTT_EPOCHS": "0"}, {"RUN_ID": "a\0b"}, {"DATA_PATH": "\x1b[2J"}, {"TTT_SCOPE": ""}]
)
def test_a_value_that_no_knob_can_have_is_refused_with_the_file(knobs):
    with pytest.raises(DataError, match="x.json: "):
        checked_knobs(knobs, "x.json")


def test_a_records_code_gets_no_secret_and_is_told_of(recorded, copy, monkeypatch, capfd):  # noqa: F811
    made = recorded.parents[2]
    monkeypatch.setenv("DATA_PATH", str(made / "my data"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = check.read_record(copy).runs[0]
    env = check.evaluation_environment(run, Path("a.ptz"), os.environ)
    known = {name for name in env if name in train_gpt.KNOBS or check.HANDED_ON.fullmatch(name)}
    assert known == set(env) and "AWS_SECRET_ACCESS_KEY" not in env and env["PATH"] == os.environ["PATH"]
    run.result["knobs"]["MATRIX_BITS"] = "6"  # of an older version, for which it trained
    assert check.evaluation_environment(run, Path("a.ptz"), os.environ) == env
    run.result["knobs"]["PYTHONWARNINGS"] = "x"
    with pytest.raises(DataError, match="PYTHONWARNINGS"):
        check.evaluation_environment(run, Path("a.ptz"), os.environ)

    def entry(script, env, folder):
        assert f"with {copy}/train_gpt.py, which is code of the record's author" in capfd.readouterr().out
        return 1

    monkeypatch.setattr(check, "run_foreign_entry", entry)
    with pytest.raises(train_gpt.UserError, match="ended with status 1"):
        check.evaluate_all(copy, {0: made / "logs" / "Tiny_seed0.ptz"})


def test_what_a_records_code_prints_is_marked_and_escaped(tmp_path, capfd):
    (tmp_path / "entry.py").write_text(
        "import sys; print('\\x1b[2Jx: all agrees', file=sys.stderr); print('y' * 10**6)"
    )
    assert check.run_foreign_entry(tmp_path / "entry.py", {"DEVICE": "cpu"}, tmp_path) == 0
    out, err = capfd.readouterr()
    assert "  | \\x1b[2Jx: all agrees\n" in out and "\x1b" not in out + err and len(out) < 20 * MOST_SHOWN


# ---- files of a record ------------------------------------------------------


@pytest.mark.parametrize("name", ["requirements.txt", "README.md", "train_seed0.json", "train_seed0.log", "loss.png"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe", "huge", "folder"])
def test_a_record_is_of_regular_files_of_bounded_size(copy, tmp_path, name, kind):  # noqa: F811
    (tmp_path / "foreign").write_text("a secret line\n")
    path = copy / name
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "foreign")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 30)
    found = check.examine(copy)
    assert found and name in found[0] and "secret" not in "".join(found) and len("".join(found)) < 2_000


def test_a_run_is_read_from_regular_files(tmp_path):
    path = fabricate(tmp_path)
    for part in (path, tmp_path / "run.docs.npz", tmp_path / "run.txt"):
        whole = part.read_bytes()
        part.unlink()
        os.mkfifo(part)
        with pytest.raises(DataError, match="not a regular file"):
            load_run(path)
        part.unlink()
        part.symlink_to("/dev/zero")
        with pytest.raises(DataError, match="not a regular file"):
            load_run(path)
        part.unlink()
        part.write_bytes(whole)
    load_run(path)


def test_long_texts_and_many_findings_are_cut(copy, capsys):  # noqa: F811
    stated = json.loads((copy / "submission.json").read_text())
    (copy / "submission.json").write_text(json.dumps(stated | {"github_id": "x" * 10**7}))
    assert check.main([str(copy), "--no-evaluation"]) == 1
    (copy / "submission.json").write_text(json.dumps(stated | {"more": list(range(100_000))}))
    assert check.main([str(copy), "--no-evaluation"]) == 1
    out = capsys.readouterr().out
    assert len(out) < 100_000 and " more\n" in out and max(map(len, out.splitlines())) < 1_000


def test_texts_of_many_lines_are_not_compared_line_by_line(copy):  # noqa: F811
    (copy / "README.md").write_text((copy / "README.md").read_text() + "x\ny\n" * 200_000)
    began = time.process_time()
    assert check.examine(copy) and time.process_time() - began < 10


# ---- the terminal -----------------------------------------------------------


def test_text_that_is_not_ours_is_shown_in_one_short_line():
    assert printable("a\nb\x1b[2J\u202e\ud800 é") == "a\\nb\\x1b[2J\\u202e\\ud800 é"
    shown = printable("<" + "x" * 10**7 + ">")
    assert len(shown) < MOST_SHOWN + 50 and shown[0] == "<" and shown[-1] == ">" and " characters]" in shown
    assert printable("a\n\tb\r", kept="\n\t") == "a\n\tb\\r"


def test_a_gpu_without_room_ends_a_tool_in_a_line_that_says_what_to_do(capsys):
    def work() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")

    assert end_in_a_line(work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of GPU memory: lower MICRO_BATCH_TOKENS, or TTT_BATCH_DOCS") and "9 GiB" in line


def test_names_and_errors_from_files_are_escaped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "x\x1b[2J\nresult val_bpb:0.9"
    assert end_in_a_line(lambda: compare.main([name, name])) == 2
    folder = tmp_path / name
    folder.mkdir()
    (folder / "submission.json").write_text("{}")
    assert end_in_a_line(lambda: check.main([str(folder)])) == 1
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and not any(l.startswith("result") for l in said.out.splitlines())
    assert said.err.count("\n") == 1


PRINTS = "import sys; from tools.artifact import end_in_a_line; sys.exit(end_in_a_line(lambda: {}))"


def run_tool(what: str, **options) -> subprocess.Popen:
    root = Path(check.__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", PRINTS.format(what)], cwd=root, stderr=subprocess.PIPE, **options)


def test_a_terminal_that_is_not_utf8_shows_escapes():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = run_tool("print('\\u2026\\xb1\\xe9') or 0", stdout=subprocess.PIPE, env=env)
    assert process.communicate() == (b"\\u2026\\xb1\\xe9\n", b"") and process.returncode == 0


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_is_no_error(lines):
    read, write = os.pipe()
    os.close(read)
    process = run_tool(f"print('x\\n' * {lines}) or 0", stdout=write)
    os.close(write)
    assert process.communicate()[1] == b"" and process.returncode == CUT_OFF


# ---- scores and results, damaged --------------------------------------------


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_no_result_holds_a_number_that_is_not_finite(tmp_path, text):
    path = fabricate(tmp_path)
    for old in ('"val_bpb": ', '"later": ', '"history": [['):
        content = path.read_text().replace('{"run_id"', '{"later": 0, "run_id"').replace(old, old + f'{text}, "x": ', 1)
        if "[[" in old:
            content = path.read_text().replace("4.0]", f"{text}]", 1)
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match="no number|no run writes"):
            read_result(tmp_path / "other.json")


def test_scores_whose_sum_is_not_finite_are_refused(tmp_path):
    fabricate(tmp_path)
    scores = tmp_path / "run.docs.npz"
    with np.load(scores) as stored:
        arrays = dict(stored)
    for name, value in (("nats", 1.7e308), ("tokens", 1 << 62)):
        np.savez(scores, **arrays | {name: np.full_like(arrays[name], value)})
        with pytest.raises(DataError, match="which no document has"):
            read_documents(scores)


def test_an_archive_of_many_entries_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for i in range(results.MAX_ENTRIES + 1):
            archive.writestr(str(i), b"")
    with pytest.raises(DataError, match="entries"):
        read_documents(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "changes",
    [
        dict(run_id="$\\frac{$"),
        dict(phases={"$x_$": 1.0, "\ud800": 2.0}),
        dict(phases={str(i): 1.0 for i in range(5_000)}),
        dict(artifact_parts={"x" * 10_000: 10_100}),
        dict(knobs={"ARTIFACT_BYTES": "many"}),
        dict(history=[[1, 1.0, 1e308]]),
        dict(last_bpb=1e308),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_picture_is_drawn_of_hostile_results_or_refused(tmp_path, changes):
    path = fabricate(tmp_path, **changes)
    assert end_in_a_line(lambda: plot.main([str(path), "--out", str(tmp_path / "plots")])) in {0, 2}


# ---- processes --------------------------------------------------------------


def test_an_entry_ends_with_the_process_that_started_it(tmp_path):
    """However that ends; before, a training went on, and wrote under the name that the next one takes."""
    (tmp_path / "entry.py").write_text("import os, time; open('pid', 'w').write(f'{os.getpid()} '); time.sleep(60)")
    start = (
        f"from pathlib import Path; from tools.entry import run_entry; run_entry(Path({str(tmp_path / 'entry.py')!r})"
    )
    root = Path(check.__file__).parents[1]
    command = [sys.executable, "-c", start + f", {{'DEVICE': 'cpu'}}, Path({str(tmp_path)!r}))"]
    with subprocess.Popen(command, cwd=root) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith(" "):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 10
    while child.exists() and " Z " not in (child / "stat").read_text():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)
