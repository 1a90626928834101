"""
Check a record folder as an organiser would: every number against its logs, and the logs against each other.
(Not to be confused with ./run.sh check-setup, which checks this machine and set-up before a run.)

    ./run.sh check records/TRACK/DATE_NAME ... [--artifact SEED=FILE ...] [--no-evaluation]

README.md, submission.json and requirements.txt are regenerated from the runs (train_seed*.log, .json, .docs.npz) and
compared. Results are compared with the events at the end of the logs, the knobs, the audits and the document scores;
the lines of each log with its events; train_gpt.py with the source at the start of the logs; sizes and times with the
limits. None of this runs any code of the record.

Then, if the artifact of a seed is available (named, or logs/<RUN_ID>.ptz with its SHA-256), the record's own
train_gpt.py evaluates it again without a time limit, on DATA_PATH from the environment or else from the record. The
score must agree within 1e-4 bpb. If a GPU scored an artifact and this machine has none, only a named artifact is
evaluated.
This runs code of the record's author as your user: it is announced, and gets the record's knobs but none of your
variables except those that a machine needs (PATH, CUDA_VISIBLE_DEVICES, ...). --no-evaluation skips it.
Exit status: 0 if everything agrees, 1 if something does not (it is listed), 2 for an error that you can fix.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools import claims
from tools.artifact import checked_knobs, end_in_a_line
from tools.claims import Baseline, Facts
from tools.entry import run_foreign_entry
from tools.events import TEMPLATES, Event, first_difference
from tools.prove import PROPERTIES
from tools.results import MAX_LOG_BYTES, Run, beside, disagreements, read_documents, read_result
from tools.values import digest, printable, refuse_constant
from train_gpt import LOGS, RETIRED, DataError, UserError, read_file, require

RECORDS = Path("records")
SAME_SCORE = 1e-4  # bpb, tolerance between two machines
MOST_FILES = 1_000  # in a record
MOST_BYTES_OF = {".py": 1 << 24, ".log": MAX_LOG_BYTES, ".npz": 1 << 28, ".json": 1 << 24, ".png": 1 << 24}  # a file
MOST_BYTES_OF_TEXT = 1 << 20  # of any other file: README.md, requirements.txt, audits
MOST_LINES_COMPARED = 5_000  # of a text; the time to compare grows with their square
MOST_FINDINGS = 200  # shown per record
HANDED_ON = re.compile(  # variables of the caller passed to a record's code: what a machine needs, no secrets
    "PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR|VIRTUAL_ENV|LD_LIBRARY_PATH|(OMP|MKL)_NUM_THREADS|"
    "OMP_WAIT_POLICY|CUDA_VISIBLE_DEVICES|CUDA_HOME|CUDA_PATH|CC|CXX|TRITON_INTERPRET|TRITON_CACHE_DIR|"
    "TORCHINDUCTOR_CACHE_DIR|NCCL_[A-Z0-9_]+"
)
OF_THE_MACHINE = ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "COMPILE")  # knobs that depend on the machine that checks


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    wrong = 0
    for folder in options.folders:
        found = examine(folder)
        if not found and not options.no_evaluation:
            with untrusted(str(folder)):
                found = evaluate_all(folder, options.artifact)
        for line in found[:MOST_FINDINGS]:
            say(folder, line)
        if len(found) > MOST_FINDINGS:
            say(folder, f"and {len(found) - MOST_FINDINGS} more")
        if not found:
            say(folder, "all agrees")
        wrong += bool(found)
    return 1 if wrong else 0


def say(folder: Path, line: str) -> None:
    """Print one line of the report, escaped so that no name or text in a record can pass for output of ours."""
    print(printable(f"{folder}: {line}"), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run.sh check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a record")
    parser.add_argument("--artifact", action="append", default=[], metavar="SEED=FILE", help="evaluate this one")
    parser.add_argument("--no-evaluation", action="store_true", help="compare what is written, and evaluate nothing")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        require((folder / "submission.json").is_file(), f"{folder}: no record: it has no submission.json", UserError)
    require(
        not options.artifact or (len(options.folders) == 1 and not options.no_evaluation),
        "--artifact is for the evaluation of one record",
        UserError,
    )
    options.artifact = dict(seed_and_path(text) for text in options.artifact)
    return options


def seed_and_path(text: str) -> tuple[int, Path]:
    seed, _, path = text.partition("=")
    require(seed.isdecimal() and path != "", f"--artifact {text}: expected SEED=FILE", UserError)
    return int(seed), Path(path)


def find_records(root: Path = RECORDS) -> list[Path]:
    """Every record under a folder, except names that begin with a dot: those are still being written."""
    return sorted(p.parent for p in root.glob("*/*/submission.json") if not p.parent.name.startswith("."))


# -----------------------------------------------------------------------------
# Reading a record: all of it is untrusted until checked


@contextlib.contextmanager
def untrusted(what: str) -> Iterator[None]:
    """Blame any error inside on the file that is being read: every exception becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # huge numbers, deep nesting, and anything else that no run writes
        raise DataError(printable(f"{what} cannot be examined: {type(error).__name__}: {error}")) from error


def guarded(findings: Iterable[str]) -> Iterator[str]:
    """Findings, each as one line that is safe to print; an error in the search itself is one more finding."""
    try:
        with untrusted("it"):
            yield from map(printable, findings)
    except UserError as error:
        yield printable(str(error))


class Record(NamedTuple):
    folder: Path
    stated: dict[str, Any]  # content of submission.json
    facts: Facts
    runs: list[Run]  # by seed; their files may still contradict each other


def read_record(folder: Path) -> Record:
    """Open all parts of a record. Raises UserError if one is missing or malformed."""
    require_plain_files(folder)
    try:
        stated = json.loads(read_file(folder / "submission.json"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"submission.json is not JSON: {error}") from None
    return Record(folder, stated, read_facts(stated, read_text(folder / "README.md")), read_runs(folder))


def require_plain_files(folder: Path) -> None:
    """Refuse a record with anything but folders and regular files, or with too many of them: a link could expose files
    elsewhere, reading a pipe could block, and a device might never end. Raises DataError."""
    entries = itertools.islice(folder.rglob("*"), MOST_FILES + 1)  # rglob does not follow links
    for count, path in enumerate(entries, 1):
        require(count <= MOST_FILES, f"it holds more than {MOST_FILES} files", DataError)
        status = path.lstat()
        name = path.relative_to(folder)
        if stat.S_ISDIR(status.st_mode):
            continue
        require(
            stat.S_ISREG(status.st_mode), f"{name}: not a regular file; a record holds no links or devices", DataError
        )
        most = MOST_BYTES_OF.get(path.suffix, MOST_BYTES_OF_TEXT)
        artifact = path.suffix == ".ptz"  # not read; only its name is reported
        require(artifact or status.st_size <= most, f"{name}: {status.st_size} bytes, at most {most}", DataError)


def read_text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not text: {error}") from None


def read_facts(stated: Any, readme: str) -> Facts:
    """The facts in submission.json, with the text of what changed from the README."""
    try:
        baseline = None if stated["baseline"] is None else Baseline(**stated["baseline"])
        plain = {name: stated[name] for name in ("author", "github_id", "name", "date", "track")}
        limits = {name: stated["limits"][name] for name in ("train_seconds", "eval_seconds")}
        allowed = tuple(stated["allowed"])
        return Facts(**plain, **limits, what=claims.what_of(readme), allowed=allowed, baseline=baseline)
    except (KeyError, TypeError) as error:
        raise DataError(f"submission.json is not one of ours: {type(error).__name__} {error}") from None


def read_runs(folder: Path) -> list[Run]:
    """The runs in a record, sorted by seed."""
    names = [re.fullmatch(r"train_seed(\d{1,10})\..*", path.name) for path in folder.iterdir()]
    seeds = {int(match[1]) for match in names if match}
    require(bool(seeds), "no train_seed*.json: no run is here", DataError)
    paths = [folder / f"train_seed{seed}.json" for seed in sorted(seeds)]
    return [Run(path, read_result(path), **read_documents(beside(path, ".docs.npz"))) for path in paths]


# -----------------------------------------------------------------------------
# What contradicts what


def examine(folder: Path) -> list[str]:
    """Everything in a record that does not follow from its runs, and every objection to the runs. Runs no code of the
    record."""
    return list(guarded(findings_in(folder)))


def findings_in(folder: Path) -> Iterator[str]:
    record = read_record(folder)
    yield from misplaced(record)
    yield from contradictions(record)


def misplaced(record: Record) -> Iterator[str]:
    if record.folder.resolve().parts[-2:] != tuple(record.facts.folder.split("/")):
        yield f"it lies in {record.folder}, and says that it is {record.facts.folder}"
    for run in record.runs:
        if run.name != f"{record.facts.name}_seed{run.result['seed']}":
            yield f"{run.path.name}: its run was called {run.name}, which is none of {record.facts.name}"


def contradictions(record: Record) -> list[str]:
    """Everything that is wrong in a record."""
    folder = record.folder
    facts = record.facts
    runs = record.runs
    wrong = against_runs(record)
    if wrong:  # no point in checking what follows from wrong runs
        return wrong

    return [
        *claims.objections(runs, facts),
        *against_submission(record),
        *differing_lines("README.md", read_text(folder / "README.md"), claims.readme(runs, facts)),
        *differing_lines("requirements.txt", read_text(folder / "requirements.txt"), claims.requirements(runs[0])),
        *against_baseline_record(facts),
        *(f"{name} is missing" for name in needed_files(runs) if not (folder / name).is_file()),
        *against_audits(record),
        *(f"{path.name}: artifacts are not kept in a record" for path in sorted(folder.rglob("*.ptz"))),
    ]


def against_runs(record: Record) -> list[str]:
    """What is wrong with individual runs, whatever the record claims."""
    return [f"{r.path.name}: {line}" for r in record.runs for line in guarded(against_files(r, record.folder))]


def against_files(run: Run, folder: Path) -> Iterator[str]:
    """Compare a run's files with each other, and with the train_gpt.py of the record."""
    if run.path.name != f"train_seed{run.result['seed']}.json":
        yield f"it is of seed {run.result['seed']}"
    if run.source != read_file(folder / "train_gpt.py"):
        yield f"{run.log.name} does not begin with train_gpt.py as it lies here"
    yield from disagreements(run)
    yield from against_knobs(run.result)
    yield from against_log(run)


def needed_files(runs: Sequence[Run]) -> list[str]:
    return [*claims.PLOTS, *map(audit_name, runs)]


def audit_name(run: Run) -> str:
    return f"audit_seed{run.result['seed']}.txt"


def against_knobs(result: Mapping[str, Any]) -> Iterator[str]:
    """Compare with the knobs what a result states about its scoring; also check the form of the artifact's digest."""
    knobs = result["knobs"]
    each_alone = knobs.get("TTT_SCOPE") == "document" and result["degraded_documents"] == 0
    independent = int(knobs.get("TTT_ENABLED") == "0" or each_alone)
    if result["doc_independent"] != independent:
        yield f"doc_independent is {result['doc_independent']}, its knobs and degraded_documents make it {independent}"
    for name in ("seed", "run_id"):
        if str(result[name]) != knobs.get(name.upper()):
            yield f"{name} is {result[name]}, its knob {name.upper()} {knobs.get(name.upper())}"
    if knobs.get("TTT_ENABLED") == "0" and result["val_bpb"] != result["static_bpb"]:
        yield f"val_bpb is {result['val_bpb']}, static_bpb {result['static_bpb']}, though nothing adapts"
    if not digest(result.get("artifact_sha256")):
        yield f"artifact_sha256 is {str(result.get('artifact_sha256'))[:60]!r}, which no run writes"


# -----------------------------------------------------------------------------
# A result against the events of its run, and the events against the log for people

STATED = {  # event -> {field that the result also states: its name in the result}
    "run": {
        "run_id": "run_id",
        "seed": "seed",
        "code_sha256": "code_sha256",
        "code_bytes": "code_bytes",
        "versions": "versions",
        "knobs": "knobs",
    },
    "device": {"world_size": "world_size", "device": "device"},
    "validation": {"documents": "documents", "tokens": "tokens", "bytes": "bytes"},
    "predicted_size": {"code_bytes": "code_bytes"},
    "readout": {"readout": "readout"},
    "before_quantisation": {"prequant_bpb": "prequant_bpb", "last_bpb": "last_bpb"},
    "rounding": {"artifact_bytes": "artifact_bytes"},  # from the last attempt
    "pack": {"artifact_bytes": "artifact_bytes"},  # the same, in older runs, whose matrices had clip ranges
    "time_short": {"degraded_documents": "degraded_documents"},
    "adapted": {"documents": "documents"},
    "excess": {"excess_bytes": "excess_bytes"},
    "score": {"static_bpb": "static_bpb", "val_bpb": "val_bpb"},
}


def against_log(run: Run) -> Iterator[str]:
    """Contradictions between a run's log and its result: first the events, then the lines for people."""
    yield from against_events(run)
    yield from against_phases(run)
    yield from against_training(run)
    yield from against_lines(run)


def against_events(run: Run) -> Iterator[str]:
    """Compare the result with every event that states part of it; report missing and unknown events."""
    if not run.events or run.events[-1].name != "result":
        yield "its events do not end with a result"
    for values in run.reported("result"):
        yield from contradicted("result", values, run.result, {name: name for name in values | run.result})
    for event, names in STATED.items():
        reported = run.reported(event)
        for values in reported[-1:] if event in ("rounding", "pack") else reported:
            yield from contradicted(event, values, run.result, names)

    if adapts(run) and any(values["val_bpb"] is None for values in run.reported("score")):
        yield "the event score gives no val_bpb, although the run adapts"
    for event in expected_events(run):
        if not run.reported(event):
            yield f"it has no event {event}"
    yield from unknown_numbers(run.events)


def contradicted(
    event: str, values: Mapping[str, Any], result: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """Fields of an event that differ from the result; `names` maps fields to their names in the result."""
    for field, name in names.items():
        silent = event == "score" and values[field] is None  # without adaptation, the event has no val_bpb
        if not silent and values.get(field) != result.get(name):
            yield f"the event {event} says {field} {values.get(field)}, the result {result.get(name)}"


def adapts(run: Run) -> bool:
    return run.result["knobs"].get("TTT_ENABLED") != "0"


def expected_events(run: Run) -> list[str]:
    """The events of STATED that a run like this one must report."""
    events = ["run", "device", "validation", "score"]
    if run.trained:
        events += ["training_data", "before_quantisation", "pack" if run.reported("pack") else "rounding"]
    if run.result["degraded_documents"] and adapts(run) and tells_short_time(run):
        events.append("time_short")
    if run.result.get("excess_bytes"):
        events.append("excess")
    return events


def tells_short_time(run: Run) -> bool:
    """Whether a run like this one reports that time was short: in the first version, a stream did not."""
    *later, _ = TEMPLATES["time_short"]
    is_later = any(wording.encode() in run.source for wording in later)
    return is_later or run.result["knobs"].get("TTT_SCOPE") == "document"


def unknown_numbers(events: Iterable[Event]) -> Iterator[str]:
    """Refuse numbers in unknown events: nothing would check them. Words are allowed."""
    for event in events:
        if not event.known and any(character.isdigit() for character in event.name + json.dumps(event.values)):
            yield f"it has an event {event.name!r}, which no run reports, with numbers"


def against_phases(run: Run) -> Iterator[str]:
    result = run.result
    phases = [(event["name"], round(event["seconds"], 3)) for event in run.reported("phase")]
    if phases != list(result["phases"].items()):
        yield f"the events' phases are {dict(phases)}, the result's {result['phases']}"

    for clock, name in (("training", "train_seconds"), ("evaluation", "eval_seconds")):
        counted = [phase for phase, (_, its_clock) in run.phases().items() if its_clock == clock]
        total = sum(result["phases"].get(phase, 0.0) for phase in counted)
        if abs(total - result.get(name, 0.0)) > 0.01:
            yield f"{name} is {result.get(name)}, the phases of that clock take {total:.3f} s"


def against_training(run: Run) -> Iterator[str]:
    result = run.result
    sizes = [event["tokens"] for event in run.reported("training_data")]
    if "epochs" in result and [result["train_tokens"] / max(size, 1) for size in sizes] != [result["epochs"]]:
        yield (
            f"epochs is {result['epochs']}, train_tokens {result['train_tokens']}, and by the events there are "
            f"{' and '.join(map(str, sizes)) or 'no'} tokens to train on"
        )
    history = [[event["step"], event["train_s"], event["loss"]] for event in run.reported("step")]
    if history != result.get("history", []):
        yield "the losses in the events are not its history"


def against_lines(run: Run) -> Iterator[str]:
    """The first line for people that does not follow from the events, so that what people read is what was checked."""
    difference = first_difference(run.log_text, run.events)
    if difference is not None:
        stated, expected = difference
        yield f"{run.log.name} says {stated[:200]!r}, where its events give {expected[:200]!r}"


# -----------------------------------------------------------------------------
# Results against audits, which are plain text

AUDITED = {  # a line of an audit -> the result fields that it recounts
    r"ok +bytes +(\d+) of code \+ (\d+) of artifact; (\d+) of text; .*": ("code_bytes", "artifact_bytes", "bytes"),
    r"ok +single pass .*; (\d+) targets of (\d+) documents in the shards": ("tokens", "documents"),
    r"ok +reported +val_bpb ([\d.]+) of .*": ("val_bpb",),
}


def against_audits(record: Record) -> Iterator[str]:
    for run in record.runs:
        path = record.folder / audit_name(run)
        if path.is_file():
            yield from (f"{path.name}: {line}" for line in guarded(against_audit(run, path)))


def against_audit(run: Run, path: Path) -> Iterator[str]:
    """What an audit leaves out or finds wrong, and signs that it audits another artifact."""
    lines = read_text(path).splitlines()
    for name in PROPERTIES:
        matches = [re.fullmatch(rf"(ok|FAIL|-) +{re.escape(name)}( .*)?", line) for line in lines]
        verdicts = [match[1] for match in matches if match]
        if not verdicts:
            yield f"it has no line for {name!r}"
        elif "FAIL" in verdicts:
            yield f"it says that {name!r} FAILs"

    heads = list(filter(None, (re.fullmatch(r"(?:.*/)?([^/]+)\.ptz: (.*)", line) for line in lines)))
    if [m[1] for m in heads] != [run.name]:
        yield f"it is of {' and '.join(m[1] for m in heads) or 'no artifact'}, the run is {run.name}"
    for name, value in re.findall(r"\b(TTT_[A-Z_]+)=(\w+)", " ".join(m[2] for m in heads)):
        if run.result["knobs"].get(name) != value:
            yield f"it audits {name}={value}, the run had {name}={run.result['knobs'].get(name)}"
    yield from against_counts(run, lines)


def against_counts(run: Run, lines: Sequence[str]) -> Iterator[str]:
    """The audit's own counts that differ from the result."""
    for pattern, names in AUDITED.items():
        for match in filter(None, (re.fullmatch(pattern, line) for line in lines)):
            for name, counted in zip(names, match.groups(), strict=True):
                if not says(counted, run.result[name]):
                    yield f"it says {name}:{counted}, the result {run.result[name]}"


def says(text: str, value: Any) -> bool:
    """Whether a text states this value, to the decimals that it shows."""
    if not isinstance(value, float):
        return text == str(value)
    decimals = len(text.partition(".")[2])
    return text == f"{value:.{decimals}f}"


# -----------------------------------------------------------------------------
# Claims against results


def against_submission(record: Record) -> Iterator[str]:
    derived = claims.submission(record.runs, record.facts)
    stated = dict(flat(record.stated))
    expected = dict(flat(derived))
    for name in [*expected, *(stated.keys() - expected.keys())]:
        if stated.get(name) != expected.get(name):
            yield f"submission.json: {name} is {stated.get(name)}, the runs give {expected.get(name)}"
    if stated == expected and read_text(record.folder / "submission.json") != claims.as_json(derived):
        yield "submission.json is written in another way (a name twice, another order) than its content would be"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """("seed_results.42.steps", "1500") for every leaf; an empty dict or list is a leaf too."""
    if isinstance(value, dict | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value)


def differing_lines(name: str, stated: str, expected: str) -> Iterator[str]:
    if stated.count("\n") > MOST_LINES_COMPARED:
        yield f"{name} has {stated.count(chr(10))} lines"
        return
    lines = difflib.unified_diff(stated.split("\n"), expected.split("\n"), n=0, lineterm="")
    for line in itertools.islice(lines, 2, None):  # skip the two file names
        if line.startswith("-"):
            yield f"{name} says {line[1:]!r}"
        elif line.startswith("+"):
            yield f"{name} should say {line[1:]!r}"


def against_baseline_record(facts: Facts) -> list[str]:
    """Compare the baseline with the record that it was taken from, if that is available."""
    if facts.baseline is None:
        return []
    source = Path(facts.baseline.source)
    if not (source / "submission.json").is_file():
        return []
    stated = asdict(facts.baseline)
    actual = asdict(baseline_of(source))
    return [
        f"submission.json: baseline.{name} is {stated[name]}, {source} gives {actual[name]}"
        for name in stated
        if stated[name] != actual[name]
    ]


def baseline_of(folder: Path) -> Baseline:
    """The scores of a record, from its runs. Raises UserError if that record contradicts itself."""
    with untrusted(f"the baseline {folder}"):
        record = read_record(folder)
        wrong = list(guarded(itertools.chain(misplaced(record), against_runs(record))))
        require(not wrong, f"the baseline {folder} disagrees with itself: {'; '.join(wrong)}", DataError)
        stated = claims.submission(record.runs, record.facts)
        first = record.runs[0].result
        return Baseline(
            source=folder.as_posix(),
            val_bpb=stated["val_bpb"],
            val_bpb_std=stated["val_bpb_std"] or 0.0,
            seeds=len(record.runs),
            bytes_per_token=first["bytes"] / first["tokens"],
            documents=first["documents"],
            bytes=first["bytes"],
        )


# -----------------------------------------------------------------------------
# Evaluating again


def evaluate_all(folder: Path, named: Mapping[int, Path]) -> list[str]:
    """Score every available artifact again -> the differences."""
    runs = read_record(folder).runs
    wrong = []
    unknown = named.keys() - {run.result["seed"] for run in runs}
    require(not unknown, f"--artifact: the record has no seed {sorted(unknown)}", UserError)
    for run in runs:
        seed = run.result["seed"]
        artifact = named.get(seed) or LOGS / f"{run.name}.ptz"
        if obstacle := why_not_evaluated(run, artifact, seed in named):
            say(folder, f"seed {seed}: {obstacle}")
        else:
            wrong += [f"seed {seed}: {line}" for line in evaluate_again(folder, run, artifact)]
    return wrong


def why_not_evaluated(run: Run, artifact: Path, named: bool) -> str:
    """Why the artifact of a run is not evaluated again; empty if it is. One that the user has named need not be at
    hand: evaluate_again() then says how it differs."""
    if not named and (not artifact.is_file() or how_it_differs(artifact, run)):
        return f"its artifact is not at hand ({artifact}); not evaluated again"
    if not named and made_on_gpu(run) and not torch.cuda.is_available():
        seed = run.result["seed"]
        return f"a GPU scored {artifact}, a CPU would take hours: not evaluated without --artifact {seed}={artifact}"
    if run.result["degraded_documents"]:
        return "what a deadline left out cannot be repeated; not evaluated again"
    return ""


def made_on_gpu(run: Run) -> bool:
    return not run.result["device"].startswith("CPU")


def evaluate_again(folder: Path, run: Run, artifact: Path) -> Iterator[str]:
    """Score an artifact with the record's train_gpt.py -> how its scores differ from those of the record."""
    if difference := how_it_differs(artifact, run):
        yield f"{artifact} is another one: {difference}"
        return
    seed = run.result["seed"]
    script = (folder / "train_gpt.py").resolve()
    say(folder, f"seed {seed}: evaluating {artifact} again with {script}, which is code of the record's author")
    env = evaluation_environment(run, artifact, os.environ)
    again = foreign_result(script, env, run.name)
    if again["validation"] != run.result["validation"]:
        yield (
            f"{env['DATA_PATH']} holds another validation set ({validation_of(again)}) than the record's "
            f"({validation_of(run.result)}): set DATA_PATH"
        )
        return
    for name in ("val_bpb", "static_bpb"):
        say(folder, f"seed {seed}: {name} {again[name]:.6f}, in the record {run.result[name]:.6f}")
        if abs(again[name] - run.result[name]) > SAME_SCORE:
            yield f"{name} is {again[name]:.6f} when evaluated again, {run.result[name]:.6f} in the record"


def foreign_result(script: Path, env: Mapping[str, str], name: str) -> dict[str, Any]:
    """The result of an evaluation by a record's train_gpt.py, run as RUN_ID=name in a folder of its own. Raises
    UserError if it fails."""
    with tempfile.TemporaryDirectory() as work:
        status = run_foreign_entry(script, env, Path(work))
        require(status == 0, f"the evaluation of {env['ARTIFACT']} ended with status {status}: see above", UserError)
        return read_result(Path(work) / "logs" / f"{name}.json")


def how_it_differs(artifact: Path, run: Run) -> str:
    """How a file differs from the artifact of a run; empty if it is that artifact."""
    content = read_file(artifact)
    size = run.result["artifact_bytes"]
    if len(content) != size:
        return f"it holds {len(content)} bytes, the run's artifact {size}"

    sha256 = run.result.get("artifact_sha256")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        return f"its SHA-256 is {found}, that of the run's artifact {sha256}"
    return ""


def validation_of(result: Mapping[str, Any]) -> str:
    """A short name of the validation set that was scored."""
    return f"{result['documents']} documents, {result['tokens']} targets, sha256 {result['validation'][:12]}…"


def evaluation_environment(run: Run, artifact: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of the run on this machine: the knobs of the result, except that OF_THE_MACHINE come from the
    caller, and of the caller's other variables those in HANDED_ON. Raises DataError if this version lacks a knob of the
    result: without it, the score would differ."""
    knobs = checked_knobs(run.result["knobs"], run.path.name)
    unknown = sorted(run.result["knobs"].keys() - knobs.keys() - RETIRED.keys())
    require(not unknown, f"{run.path.name}: {', '.join(unknown)}: no knob of this version; not evaluated", DataError)
    for name in OF_THE_MACHINE:
        if name in env:
            knobs[name] = env[name]
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        if knobs.get(name):
            knobs[name] = str(Path(knobs[name]).resolve())
    knobs |= {"ARTIFACT": str(artifact.resolve()), "RESUME": "", "EVAL_SECONDS": "0"}

    return {name: value for name, value in env.items() if HANDED_ON.fullmatch(name)} | knobs


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
