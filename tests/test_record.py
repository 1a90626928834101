"""`./run.sh record`: what it writes, what it keeps, and what it refuses. Two tiny runs serve all tests here and those
of test_check.py; the audit is played by a few lines, as its own tests are elsewhere."""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_end_to_end import Folder

import train_gpt
from tools import claims, entry, record
from tools.artifact import end_in_a_line
from tools.claims import CONTEST, NON_RECORD, Baseline, Facts
from tools.processes import torchrun
from tools.prove import PROPERTIES, Finding
from tools.results import load_run
from tools.welch import Sample, incomplete_beta, lower_by, upper_tail

WHO = dict(AUTHOR="Ada L.", GITHUB_ID="ada")
WHAT = "Rows of 64.\nIt is smaller.\n\n### Why\n\nTo see whether 3 is 3."
ARGUMENTS = ["Tiny", "--seeds", "42,0", "--non-record", "--what", WHAT, "--baseline", "2.5,0.01,3,2.25"]
AUDIT = f"""
import json, os, sys
result = json.load(open(sys.argv[1].removesuffix(".ptz") + ".json"))
print("audited", sys.argv[1], "with TTT_LR", os.environ["TTT_LR"], *sys.argv[2:])
print(sys.argv[1] + ": TTT_PARAMS=lora TTT_SCOPE=document, CPU, 1 threads")
figures = {{
    "bytes": "{{code_bytes}} of code + {{artifact_bytes}} of artifact; {{bytes}} of text; 9 bytes decoded again",
    "single pass": "5 targets of 2 documents once each; {{tokens}} targets of {{documents}} documents in the shards",
    "reported": "val_bpb {{val_bpb:.5f}} of Tiny_seed0.json: max 0.0e+00 bpb off in 2 documents",
}}
for name in {list(PROPERTIES)}:
    print(f"ok    {{name:20}} " + figures.get(name, "max 0.0e+00").format(**result))
sys.exit(int(os.environ.get("AUDIT_STATUS", "0")))
"""


def enter(patch: pytest.MonkeyPatch, folder: Path, **changes: str) -> None:
    """Go to a folder with prepared data, as a user stands in the repository, with the environment of a tiny run."""
    patch.chdir(folder)
    for name in {f.name.upper() for kind in train_gpt.CONFIGS for f in dataclasses.fields(kind)} & os.environ.keys():
        patch.delenv(name)
    nobody = dict(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", GIT_CEILING_DIRECTORIES=str(folder.parent))
    environment = Folder.environment(SimpleNamespace(), RUN_ID=None, HOLDOUT_TOKENS=0) | nobody | WHO | changes
    for name, value in environment.items():
        patch.setenv(name, value)


@functools.cache
def tiny_record(base: Path) -> Path:
    """A folder with data, a stand-in for the audit, logs/ of two runs and records/ with their record -> the latter."""
    home = base / "recorded"
    Folder(home)
    (home / "tools").mkdir()
    (home / "tools" / "prove.py").write_text(AUDIT)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, home)
        assert record.main(ARGUMENTS) == 0
    (folder,) = (home / "records").glob("*/*")
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return tiny_record(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def runs(recorded) -> list:
    return [load_run(f"Tiny_seed{seed}", recorded.parents[2] / "logs") for seed in (0, 42)]


@pytest.fixture
def home(recorded, tmp_path, monkeypatch) -> Path:
    """A copy of the folder as it was before the record was written; the two runs are finished."""
    home = tmp_path / "recorded"
    shutil.copytree(recorded.parents[2], home)
    shutil.rmtree(home / "records")
    enter(monkeypatch, home)
    return home


@pytest.fixture
def facts() -> Facts:
    return Facts("Ada L.", "ada", "Tiny", "2026-01-02", WHAT, NON_RECORD)


def no_start(*_):
    raise AssertionError("a run was started")


# ---- the folder -------------------------------------------------------------


def test_a_record_holds_its_runs_byte_for_byte(recorded):
    logs = recorded.parents[2] / "logs"
    source = Path(train_gpt.__file__)
    for seed in (0, 42):
        text = (logs / f"Tiny_seed{seed}.txt").read_bytes()
        events = (logs / f"Tiny_seed{seed}.events.jsonl").read_bytes()
        assert (recorded / f"train_seed{seed}.log").read_bytes() == text + b"events:\n" + events
        for ending in (".json", ".docs.npz"):
            kept = recorded / f"train_seed{seed}{ending}"
            assert kept.read_bytes() == (logs / f"Tiny_seed{seed}{ending}").read_bytes()
        assert (
            f"audited {Path('logs', f'Tiny_seed{seed}.ptz')} with TTT_LR 0.01 --seconds 120\n"
            in (recorded / f"audit_seed{seed}.txt").read_text()
        )
        assert (recorded / f"train_seed{seed}.log").read_bytes().startswith((recorded / "train_gpt.py").read_bytes())
    assert (recorded / "train_gpt.py").read_bytes() == source.read_bytes()
    assert not list(recorded.glob("*.ptz"))
    assert recorded.parent.name == NON_RECORD and recorded.name.endswith("_Tiny")


def test_submission_has_the_contests_fields_and_the_runs_figures(recorded, runs):
    stated = json.loads((recorded / "submission.json").read_text())
    named = {
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "val_loss",
        "val_bpb",
        "val_loss_std",
        "val_bpb_std",
        "seeds",
        "seed_results",
        "bytes_total",
        "hardware",
        "versions",
    }
    assert named <= stated.keys()
    assert (stated["author"], stated["github_id"], stated["blurb"]) == ("Ada L.", "ada", "Rows of 64. It is smaller.")
    a, b = (run.result["val_bpb"] for run in runs)
    assert stated["val_bpb"] == pytest.approx((a + b) / 2) and stated["seeds"] == [0, 42]
    assert stated["val_bpb_std"] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-8)
    assert stated["bytes_total"] == max(run.result["total_bytes"] for run in runs)
    assert stated["seed_results"]["42"]["steps"] == 12 and stated["hardware"].startswith("1 x CPU")


def test_readme_says_what_changed_and_every_figure_by_seed(recorded, runs):
    text = (recorded / "README.md").read_text()
    assert f"\n{WHAT}\n" in text and "not a record of the contest's main track" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    for run in runs:
        r = run.result
        row = rows[str(r["seed"])]
        for figure in (
            f"{r['prequant_bpb']:.5f}",
            f"{r['static_bpb']:.5f}",
            f"**{r['val_bpb']:.5f}**",
            f"{r['artifact_bytes']:,}",
            f"{r['total_bytes']:,}",
            f"{r['train_seconds']:.1f}",
        ):
            assert f"| {figure} |" in row
    assert set(runs[0].result["phases"]) <= rows.keys() and "**start to finish**" in rows
    for picture in ("loss.png", "phases.png", "lengths.png", "bytes.png"):
        assert f"]({picture})" in text and (recorded / picture).read_bytes().startswith(b"\x89PNG")


def test_settings_are_those_that_differ_from_the_defaults(recorded, runs):
    changed = claims.changed_settings(runs[0])
    given = Folder.environment(SimpleNamespace(), HOLDOUT_TOKENS=0)
    model, run = train_gpt.read_env({})
    defaults = train_gpt.settings(model, run)
    others = {"SEED", "RUN_ID", "TTT_OPTIMIZER", "TTT_RMS_FLOOR"}  # the last two follow from GRAD_RMS_TOKENS
    assert changed == {n: v for n, v in runs[0].result["knobs"].items() if defaults.get(n) != v and n not in others}
    assert changed.keys() <= given.keys() and float(changed["TTT_LR"]) == 0.01 and "COMPILE" not in changed
    assert "    DATA_PATH='my data'\n" in (recorded / "README.md").read_text()


@pytest.mark.parametrize("system", [{}, {"TTT_OPTIMIZER": "adamw"}, {"TTT_PARAMS": "full"}])
def test_defaults_are_read_from_a_source_without_running_it(system):
    true = train_gpt.settings(*train_gpt.read_env(system))
    read = claims.declared_defaults(train_gpt.code(), claims.default_argument(true))
    assert read.keys() == {f.name.upper() for kind in train_gpt.CONFIGS for f in dataclasses.fields(kind)}
    others = true.keys() - {"TTT_PARAMS", "TTT_OPTIMIZER"}
    assert {name: true[name] for name in others} == {name: read[name] for name in others}


@pytest.mark.parametrize(
    "knobs, changed",
    [({}, False), ({"GRAD_RMS_TOKENS": "0"}, False), ({"TTT_OPTIMIZER": "adamw"}, True), ({"TTT_LR": "1e-4"}, True)],
)
def test_an_optimizer_that_follows_from_the_other_knobs_is_no_changed_setting(runs, knobs, changed):
    configs = train_gpt.read_env(knobs)
    run = dataclasses.replace(runs[0], result=runs[0].result | {"knobs": train_gpt.settings(*configs)})
    assert claims.changed_settings(run).keys() - {"GRAD_RMS_TOKENS"} == (knobs.keys() if changed else set())


def test_a_source_that_cannot_be_read_is_a_users_error():
    for source in (
        b"x = (",
        b"\x00",
        b"x: int = knob(print(1), '')",
        b"x: int = knob(1 << 10**9, '')",
        b"x: int = knob()",
        b"x: float = knob('x')",
        b"x: float = knob(None)",
        b"x: float = knob(2j)",
        b"x: float = knob(0x1" + b"0" * 999 + b")",
        b"x: int = knob(0x1" + b"0" * 9999 + b")",
        b"x = " + b"-" * 9999 + b"1",
        b"x: int = knob(" + b"-" * 199 + b"1)",
    ):
        with pytest.raises(train_gpt.DataError, match="train_gpt.py"):
            claims.declared_defaults(source, "")


# ---- finished runs ----------------------------------------------------------


def test_finished_seeds_are_not_run_again(home, monkeypatch, capsys):
    monkeypatch.setattr(record, "start", no_start)
    assert record.main(ARGUMENTS) == 0
    assert capsys.readouterr().out.count("finished, not run again") == 2
    with pytest.raises(train_gpt.UserError, match="exists"):
        record.main(ARGUMENTS)


def test_how_many_seeds_are_done_and_how_long_the_rest_takes_is_told(runs):
    a, b = (
        dataclasses.replace(run, result=run.result | {"phases": {"train": s, "pack": 1.0}})
        for run, s in zip(runs, (99.0, 199.0), strict=True)
    )
    jobs = [record.Job({}, train_gpt.RunConfig(seed=seed), None) for seed in (0, 42, 43)]
    assert record.progress(jobs, [], 7) == "seed 0 (1 of 3)"
    assert record.progress(jobs, [a], 7) == "seed 42 (2 of 3): 1 done, about 221 s left, audits included"
    assert record.progress(jobs, [a, b], 7) == "seed 43 (3 of 3): 2 done, about 171 s left, audits included"
    jobs[1] = jobs[1]._replace(finished=b)  # before this record was begun
    assert record.progress(jobs, [], 7) == "seed 0 (1 of 3): 1 done, about 421 s left, audits included"


def test_what_is_not_the_same_run_is_run_again(home, facts, monkeypatch, capsys):
    def found() -> object:
        return record.job_for(0, facts, os.environ).finished

    assert found() is not None
    with monkeypatch.context() as patch:
        patch.setenv("MATRIX_LR", "0.5")
        assert found() is None and "MATRIX_LR was 0.026, is 0.5" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setenv("TRAIN_BATCH_TOKENS", "0")
        decided = train_gpt.with_batch(train_gpt.read_env()[1], 1).train_batch_tokens
        assert found() is None and f"TRAIN_BATCH_TOKENS was 256, is {decided}" in capsys.readouterr().out
        damaged = home / "logs/Tiny_seed0.json"
        whole = damaged.read_text()
        damaged.write_text(json.dumps(json.loads(whole) | {"world_size": 0}))
        assert found() is None and "world_size" in capsys.readouterr().out
        damaged.write_text(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "code", lambda: b"another")
        assert found() is None and "train_gpt.py has changed" in capsys.readouterr().out
    for ending, reason in ((".txt", "where its events give 'result "), (".events.jsonl", "do not end with a result")):
        path = home / "logs" / f"Tiny_seed0{ending}"
        whole = path.read_text()
        path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
        assert found() is None and reason in capsys.readouterr().out
        path.unlink()
        assert found() is None and "cannot be read" in capsys.readouterr().out
        path.write_text(whole)
    assert found() is not None


def test_a_run_on_other_validation_is_refused(home, facts):
    shard = home / "my data" / "fineweb_val_000000.bin"
    tokens = train_gpt.read_shard(shard).copy()
    tokens[1:3] = tokens[2], tokens[1]
    shard.write_bytes(shard.read_bytes()[:1024] + tokens.tobytes())
    with pytest.raises(train_gpt.UserError, match="scored another validation set"):
        record.main(ARGUMENTS)


def test_a_seed_that_fails_ends_the_record_and_keeps_the_others(home, monkeypatch):
    (home / "logs" / "Tiny_seed42.json").unlink()
    monkeypatch.setattr(record, "run_entry", lambda *_: 3)
    with pytest.raises(train_gpt.UserError, match="Tiny_seed42 ended with status 3"):
        record.main(ARGUMENTS)
    assert (home / "logs" / "Tiny_seed0.json").exists() and not (home / "records").exists()


def test_a_seed_runs_on_all_gpus_and_is_given_time_to_end(home, facts, monkeypatch):
    """As run.sh starts it; Ctrl-C reaches the run by itself, which then tidies up before we go."""
    commands = []
    waits = []

    class Process:
        def __init__(self, command, cwd, env, preexec_fn):
            commands.append(command)
            assert (env["SEED"], env["RUN_ID"], env["TTT_LR"]) == ("7", "Tiny_seed7", "0.01")

        def wait(self):
            waits.append(1)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 0

    monkeypatch.delenv("DEVICE")
    monkeypatch.setattr(entry.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(entry.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        record.start(record.job_for(7, facts, os.environ))
    assert commands[0][1:-1] == torchrun(8)
    assert commands[0][-1] == train_gpt.__file__ and len(waits) == 2


# ---- refusals ---------------------------------------------------------------


def doctored(runs: list, **changes) -> list:
    """Both runs with other results."""
    return [dataclasses.replace(run, result=run.result | changes) for run in runs]


def of_the_contest(runs: list, **changes) -> list:
    contest = dict(device="NVIDIA H100 80GB HBM3", world_size=8, documents=50_000, tokens=47_853_343, bytes=151_080_000)
    return doctored(runs, **(contest | changes))


def test_the_tiny_runs_are_refused_in_the_contests_track_alone(runs, facts):
    assert claims.objections(runs, facts) == []
    against = "; ".join(claims.objections(runs, dataclasses.replace(facts, track=CONTEST)))
    for reason in (
        "10 validation documents, the contest's are 50,000",
        "validation bytes",
        "validation tokens",
        "1 x CPU",
        "8 x H100",
    ):
        assert reason in against
    assert claims.objections(of_the_contest(runs), dataclasses.replace(facts, track=CONTEST)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(total_bytes=16_000_001), "16,000,001 bytes, at most 16,000,000"),
        (dict(train_seconds=600.1), "train_seconds is 600.1, the limit 600"),
        (dict(eval_seconds=601.0), "eval_seconds is 601.0, the limit 600"),
        (dict(doc_independent=0), "doc_independent:0"),
        (dict(degraded_documents=7), "degraded_documents:7"),
        (dict(excess_bytes=1234), "excess_bytes is 1,234"),
        (dict(world_size=4), "4 x NVIDIA H100 80GB HBM3"),
        (dict(device="NVIDIA H200"), "8 x NVIDIA H200"),
        (dict(documents=49_999), "49,999 validation documents"),
        (dict(bytes=151_000_000), "151,000,000 validation bytes"),
        (dict(tokens=40_000_000), "neither published tokenizer"),
    ],
)
def test_refused_with_the_reason(runs, facts, changes, reason):
    refused = claims.objections(of_the_contest(runs, **changes), dataclasses.replace(facts, track=CONTEST))
    assert refused and all(reason in line for line in refused)


@pytest.mark.parametrize("name", ["code_sha256", "validation", "documents", "tokens", "bytes", "device", "versions"])
def test_seeds_that_differ_are_refused(runs, facts, name):
    other = dataclasses.replace(runs[1], result=runs[1].result | {name: "another"})
    assert [f"differ in {name}" in line for line in claims.objections([runs[0], other], facts)] == [True]


def test_seeds_must_differ_and_their_knobs_must_not(runs, facts):
    assert "a seed comes twice" in claims.objections([runs[0], runs[0]], facts)[0]
    knobs = runs[1].result["knobs"] | {"TTT_LR": "0.02"}
    other = dataclasses.replace(runs[1], result=runs[1].result | {"knobs": knobs})
    assert "TTT_LR=0.02" in "".join(claims.objections([runs[0], other], facts))


def test_what_is_allowed_is_said(runs, facts):
    dependent = dataclasses.replace(facts, allowed=(claims.DEPENDENT,))
    streamed = doctored(runs, doc_independent=0)
    assert claims.objections(streamed, dependent) == []
    assert "may depend on other documents" in claims.readme(streamed, dependent)
    assert "for lack of time" not in claims.readme(streamed, dependent)
    late = doctored(runs, doc_independent=0, degraded_documents=1_007)
    assert "did not adapt for lack of time: 1,007 of seed " in claims.readme(late, dependent)
    contest = dataclasses.replace(facts, track=CONTEST)
    own = dataclasses.replace(contest, allowed=(claims.OWN_TOKENIZER,))
    assert claims.objections(of_the_contest(runs, tokens=40_000_000), own) == []
    assert "with a tokenizer of our own" in claims.readme(of_the_contest(runs), own)


def test_other_limits_are_kept_and_make_it_no_record(runs, facts):
    slow = doctored(runs, train_seconds=900.0)
    assert claims.objections(slow, dataclasses.replace(facts, train_seconds=1000.0)) == []
    assert (
        "allows 600 s"
        in claims.objections(of_the_contest(slow), dataclasses.replace(facts, track=CONTEST, train_seconds=1000.0))[-1]
    )
    options = record.parse(["X", "--seeds", "1", "--what", "w", "--train-seconds", "1000"])
    gathered = record.gather_facts(options, WHO)
    assert (gathered.track, gathered.train_seconds) == (NON_RECORD, 1000.0)
    assert "limits: 1000 s of training, 600 s of evaluation" in claims.readme(slow, gathered)


@pytest.mark.parametrize(
    ("env", "arguments", "reason"),
    [
        ({"ARTIFACT": "logs/Tiny_seed0.ptz"}, [], "unset ARTIFACT"),
        ({"ARTIFACT_BYTES": "16000001"}, [], "ARTIFACT_BYTES=16000001"),
        ({"MAX_WALLCLOCK_SECONDS": "601"}, [], "MAX_WALLCLOCK_SECONDS=601 is over the limit of 600 s"),
        ({"EVAL_SECONDS": "700"}, [], "EVAL_SECONDS=700 is over"),
        ({"TTT_LRR": "1"}, [], "TTT_LRR is not a knob"),
        ({}, ["--seeds", "1,1"], "--seeds 1,1"),
        ({}, ["--seeds", "1,x"], "--seeds 1,x"),
        ({}, ["--seeds", "9" * 5000], "--seeds 999.*: expected different whole numbers"),
        ({}, ["--baseline", "1.2,0.1"], "--baseline 1.2,0.1"),
        ({}, ["--baseline", ""], "--baseline : expected the folder of a record"),
        ({}, ["--baseline", "1.2,0.1,0"], "--baseline 1.2,0.1,0"),
        ({}, ["--what", "# Title"], "headings"),
        ({}, ["--what", " "], "what is"),
        ({}, ["--what", os.fsdecode(b"caf\xe9")], r"what is 'caf.*': not UTF-8"),
        ({"AUTHOR": os.fsdecode(b"Ren\xe9")}, [], r"author is 'Ren.*': not UTF-8"),
    ],
)
def test_what_cannot_become_a_record_is_refused_before_it_is_paid_for(home, monkeypatch, env, arguments, reason):
    monkeypatch.setattr(record, "run_entry", no_start)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train_gpt.UserError, match=reason):
        record.main([*ARGUMENTS, *arguments])


def test_the_contests_hardware_and_validation_are_asked_for_before_anything_runs(home, monkeypatch):
    monkeypatch.setattr(record, "run_entry", no_start)
    shutil.rmtree(home / "logs")
    arguments = [a for a in ARGUMENTS if a != "--non-record"]
    with pytest.raises(train_gpt.UserError, match=r"10 validation documents.*8 x H100; --non-record"):
        record.main(arguments)


def test_an_audit_that_fails_is_no_record(home, monkeypatch):
    monkeypatch.setenv("AUDIT_STATUS", "1")
    with pytest.raises(train_gpt.UserError, match="the audit of .*Tiny_seed0.ptz failed"):
        record.main(ARGUMENTS)
    assert not (home / "records").exists()


def test_the_audit_says_its_lines_as_the_stand_in_does():
    """What is compared of an audit is told by lines of this form."""
    assert f"ok    {'bytes':20} 9" == str(Finding("bytes", True, "9"))


def test_the_audit_takes_the_seconds_that_are_given(home):
    assert record.parse(ARGUMENTS).audit_seconds == 120
    assert record.main([*ARGUMENTS, "--audit-seconds", "7"]) == 0
    said = [path.read_text() for path in (home / "records").rglob("audit_seed*.txt")]
    assert ["--seconds 7\n" in text for text in said] == [True, True]
    with pytest.raises(SystemExit):
        record.parse([*ARGUMENTS, "--audit-seconds", "0"])


def test_an_audit_that_looks_at_too_little_is_no_record(home):
    (home / "tools" / "prove.py").write_text(AUDIT.replace("'normalised', ", ""))
    with pytest.raises(train_gpt.UserError, match="audit_seed0.txt: it has no line for 'normalised'"):
        record.main(ARGUMENTS)
    assert not list((home / "records").rglob("*.txt"))


def test_an_artifact_of_another_run_is_not_audited(home):
    artifact = home / "logs" / "Tiny_seed42.ptz"
    content = artifact.read_bytes()
    for other in (b"x", content[:-1] + bytes([content[-1] ^ 1]), None):
        artifact.unlink() if other is None else artifact.write_bytes(other)
        with pytest.raises(train_gpt.UserError, match="not the artifact of Tiny_seed42"):
            record.main(ARGUMENTS)


def test_a_record_appears_whole_or_not_at_all(home, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "draw_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.main(ARGUMENTS)
    assert [p for p in (home / "records").rglob("*") if p.name != NON_RECORD] == []


# ---- facts ------------------------------------------------------------------


def test_who_and_what_are_asked_for_by_name(home, monkeypatch, capsys):
    for name in WHO:
        monkeypatch.delenv(name)
    assert end_in_a_line(lambda: record.main(["Tiny", "--seeds", "42,0"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "AUTHOR" in error and "GITHUB_ID" in error and "--what" in error
    for i, (name, value) in enumerate({"user.name": "Git Name", "github.user": "gitid"}.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", name)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    with pytest.raises(train_gpt.UserError, match=r"set GITHUB_ID \(or git config github.user\)$"):
        record.main(["Tiny", "--seeds", "42,0", "--what", "w"])
    monkeypatch.setenv("GIT_CONFIG_COUNT", "2")
    gathered = record.gather_facts(record.parse(ARGUMENTS), os.environ)
    assert (gathered.author, gathered.github_id) == ("Git Name", "gitid")


def test_what_changed_may_be_a_file(home):
    (home / "notes.md").write_text("First line\ngoes on.\n\nSecond paragraph.\n")
    found = record.gather_facts(record.parse(["X", "--seeds", "1", "--what", "notes.md"]), WHO)
    assert found.what == "First line\ngoes on.\n\nSecond paragraph." and found.blurb == "First line goes on."
    line = "It is longer than the name of any file. " * 10
    assert record.gather_facts(record.parse(["X", "--seeds", "1", "--what", line]), WHO).what == line.strip()


def test_a_record_can_be_the_baseline(recorded, home, runs, facts):
    shutil.copytree(recorded.parents[1], home / "records")
    source = recorded.relative_to(recorded.parents[2])
    baseline = record.parse_baseline(str(source))
    expected = Sample.of([run.result["val_bpb"] for run in runs])
    assert (baseline.source, baseline.seeds) == (source.as_posix(), 2)
    assert baseline.val_bpb == pytest.approx(expected.mean, abs=1e-8)
    assert baseline.bytes_per_token == runs[0].result["bytes"] / runs[0].result["tokens"]
    assert claims.objections(runs, dataclasses.replace(facts, baseline=baseline)) == []
    for other in (dict(documents=11), dict(bytes=baseline.bytes * 2)):
        text = dataclasses.replace(facts, baseline=dataclasses.replace(baseline, **other))
        assert ["these scores do not compare" in line for line in claims.objections(runs, text)] == [True]
    (home / source / "train_seed0.json").write_text("{}")
    with pytest.raises(train_gpt.UserError):
        record.parse_baseline(str(source))


# ---- statistics -------------------------------------------------------------


def test_the_t_distribution_agrees_with_tables():
    """Upper critical values, e.g. Abramowitz & Stegun table 26.10."""
    table = (
        (1, 0.05, 6.3138),
        (1, 0.005, 63.6567),
        (2, 0.01, 6.9646),
        (3, 0.05, 2.3534),
        (4, 0.025, 2.7764),
        (5, 0.01, 3.3649),
        (10, 0.005, 3.1693),
        (30, 0.05, 1.6973),
        (120, 0.01, 2.3578),
    )
    for df, tail, t in table:
        assert upper_tail(t, df) == pytest.approx(tail, rel=1e-4)
        assert upper_tail(-t, df) == pytest.approx(1 - tail, rel=1e-4)
    for t in (-40.0, -0.3, 0.0, 1e-9, 0.7, 5.0, 1e6):  # closed forms of one and two degrees of freedom
        assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-8, abs=1e-12)
        assert upper_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-8, abs=1e-9)
    assert upper_tail(1.644854, 1e7) == pytest.approx(0.05, rel=1e-5)  # the normal distribution's


def test_the_incomplete_beta_function_agrees_with_sums():
    """For whole a and b it is a binomial sum (Abramowitz & Stegun 26.5.24)."""
    for a, b in ((1, 1), (2, 3), (7, 2), (30, 40)):
        for x in (0.0, 0.01, 0.4, 0.5, 0.93, 1.0):
            n = a + b - 1
            total = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
            assert incomplete_beta(a, b, x) == pytest.approx(total, rel=1e-10, abs=1e-14)


def test_welch_on_a_published_example():
    """The first example of Wikipedia's article on Welch's t-test: t = 2.46, 25.0 degrees of freedom, P = 0.021 of both
    sides."""
    a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    t, df, p = lower_by(0.0, Sample.of(a), Sample.of(b))
    assert (round(t, 2), round(df, 1), round(2 * p, 3)) == (2.46, 25.0, 0.021)
    assert lower_by(0.0, Sample.of(b), Sample.of(a)).p == pytest.approx(1 - p)
    shifted = [x - 1.5 for x in b]  # a margin is a shift of one side
    assert lower_by(1.5, Sample.of(a), Sample.of(b)).p == pytest.approx(
        lower_by(0.0, Sample.of(a), Sample.of(shifted)).p
    )


def with_scores(runs: list, *bpb: float) -> list:
    return [dataclasses.replace(run, result=run.result | {"val_bpb": x}) for run, x in zip(runs, bpb, strict=True)]


def test_the_contests_bar_is_in_nats_of_the_baselines_tokens(runs):
    """0.005 nats of a token of 2.25 bytes are 0.0032 bpb: a gain of 0.002 is better, but not enough."""
    baseline = Baseline("given", 2.0, 0.0001, 5, 2.25)
    v = claims.judge(with_scores(runs, 1.9979, 1.9981), baseline)
    assert v.required == pytest.approx(0.005 / math.log(2) / 2.25)
    assert v.gain == pytest.approx(0.002) and v.gain_nats == pytest.approx(0.002 * math.log(2) * 2.25)
    assert v.p_better < 0.01 < v.p_required and not v.met
    assert "is **not** met" in claims.verdict_in_words(with_scores(runs, 1.9979, 1.9981), baseline)
    assert claims.judge(with_scores(runs, 1.9949, 1.9951), baseline).met
    words = claims.verdict_in_words(with_scores(runs, 1.9949, 1.9951), baseline)
    assert "is met" in words and "0.00500 bpb lower" in words and "the baseline's" in words
    unknown = dataclasses.replace(baseline, bytes_per_token=None)
    assert claims.judge(runs, unknown).bytes_per_token == runs[0].result["bytes"] / runs[0].result["tokens"]
    assert "as the baseline's is not known" in claims.verdict_in_words(runs, unknown)


@pytest.mark.parametrize("few", [lambda r: (r[:1], 3, 0.1), lambda r: (r, 1, 0.0), lambda r: ([r[0], r[0]], 3, 0.0)])
def test_one_seed_or_no_spread_shows_nothing(runs, facts, few: Callable):
    chosen, seeds, std = few(runs)
    facts = dataclasses.replace(facts, baseline=Baseline("given", 9.0, std, seeds, None))
    stated = claims.submission(chosen, facts)
    assert stated["significance"]["p_better"] is None and stated["significance"]["required_met"] is False
    assert "**not** shown to be met" in claims.readme(chosen, facts)
    if len(chosen) == 1:
        assert stated["val_bpb_std"] is None and "deviation" not in claims.readme(chosen, facts)
