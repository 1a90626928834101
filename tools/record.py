"""
Train and evaluate every seed, audit the artifacts, and write a record that has been checked.

    MATRIX_LR=0.028 ./run.sh record NAME --seeds 42,0,1234 --what "one line, or a file with more" [--baseline ...]

Knobs come from the environment, as in any run. Seed S runs with SEED=S and RUN_ID=NAME_seedS, and is skipped if logs/
has a finished run of it with the same code, knobs and validation set. The record is records/<track>/<date>_NAME/. It is
refused, with the reason, if a seed exceeds a limit, if the seeds differ in more than the seed, if the track requires
other hardware or another validation set, or if the audit (./run.sh prove) of an artifact fails. An audit takes about
--audit-seconds. AUTHOR and GITHUB_ID name the submitter; the defaults are git's user.name and github.user.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt
from data.prepare import whole_number
from tools import claims
from tools.artifact import checked_knobs, end_in_a_line
from tools.check import (
    RECORDS,
    against_log,
    baseline_of,
    contradictions,
    guarded,
    how_it_differs,
    read_record,
)
from tools.claims import CONTEST, CONTEST_SECONDS, DEPENDENT, MOST_BYTES, NON_RECORD, OWN_TOKENIZER, Baseline, Facts
from tools.entry import ranks, run_entry
from tools.plot import MOST_RUNS, draw_all
from tools.processes import ends_with_its_parent
from tools.results import EVENTS_BELOW, Run, beside, load_run
from tools.values import printable
from train_gpt import LOGS, DataError, RunConfig, UserError, read_env, read_file, require, write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    facts = gather_facts(options, os.environ)
    jobs = [job_for(seed, facts, os.environ) for seed in options.seeds]
    check_before(jobs, facts)
    runs: list[Run] = []
    for job in jobs:
        print(progress(jobs, runs, options.audit_seconds), flush=True)
        runs.append(job.finished or start(job))
        refuse(claims.objections(runs, facts))  # as soon as one seed rules it out, not after the last
    audits = {run.result["seed"]: audit(run, options.audit_seconds) for run in runs}
    print(write_record(runs, audits, facts))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run.sh record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # run.sh looks for some options itself
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="of letters, digits and ._-")
    add("--seeds", required=True, metavar="S,S,...", help="such as 42,0,1234")
    add("--what", metavar="TEXT|FILE", help="what changed; its first paragraph is the blurb")
    add(
        "--baseline",
        metavar="FOLDER|MEAN,STD,N[,BYTES]",
        help="the scores to beat: a record, or bpb, deviation, the number of seeds (and bytes a token)",
    )
    add("--non-record", action="store_true", help=f"for the track {NON_RECORD}: any hardware, any validation")
    for clock, name in (("train", "training"), ("eval", "evaluation")):
        add(
            f"--{clock}-seconds",
            type=float,
            default=CONTEST_SECONDS,
            metavar="S",
            help=f"limit of {name} [%(default)g]; another one makes it --non-record",
        )
    add(
        "--allow-dependent",
        action="store_true",
        help="accept TTT_SCOPE=stream, or documents that a deadline left unadapted; the record says so",
    )
    add(
        "--own-tokenizer",
        action="store_true",
        help="accept the contest's validation text in tokens of our own; the record says so",
    )
    add(
        "--audit-seconds",
        type=whole_number,
        default=120,
        metavar="S",
        help="about how long the audit looks at each artifact [%(default)s]",
    )
    options = parser.parse_args(arguments)
    options.seeds = seed_list(options.seeds)
    return options


def seed_list(text: str) -> list[int]:
    """Parse seeds, and sort them as the record lists them."""
    parts = text.split(",")
    require(
        all(part.isdecimal() and len(part) < 20 for part in parts) and len(set(map(int, parts))) == len(parts),
        f"--seeds {text}: expected different whole numbers, such as 42,0,1234",
        UserError,
    )
    return sorted(map(int, parts))


# -----------------------------------------------------------------------------
# Facts


def gather_facts(options: argparse.Namespace, env: Mapping[str, str]) -> Facts:
    """The facts in the record that no run knows. Raises UserError, naming everything that is missing."""
    author = env.get("AUTHOR") or git("user.name")
    github_id = env.get("GITHUB_ID") or git("github.user")
    ways = {
        "AUTHOR (or git config user.name)": author,
        "GITHUB_ID (or git config github.user)": github_id,
        "--what TEXT or FILE: what changed": options.what,
    }
    missing = [way for way, value in ways.items() if not value]
    require(not missing, f"a record must say who and what; set {'; '.join(missing)}", UserError)
    contest_limits = options.train_seconds == options.eval_seconds == CONTEST_SECONDS
    allowed = {DEPENDENT: options.allow_dependent, OWN_TOKENIZER: options.own_tokenizer}
    return Facts(
        author=author,
        github_id=github_id,
        name=options.name,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        what=text_of(options.what),
        track=CONTEST if contest_limits and not options.non_record else NON_RECORD,
        train_seconds=options.train_seconds,
        eval_seconds=options.eval_seconds,
        allowed=tuple(sorted(name for name, given in allowed.items() if given)),
        baseline=None if options.baseline is None else parse_baseline(options.baseline),
    )


def git(name: str) -> str:
    """A value of git's configuration; empty if it is not set or there is no git."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "config", name], capture_output=True, text=True).stdout.strip()


def text_of(what: str) -> str:
    """`what` itself, or the text of the file that it names."""
    if not os.path.isfile(what):  # unlike Path.is_file, it takes a long text for no file rather than for an error
        return what.strip()
    try:
        return Path(what).read_text(encoding="utf-8").strip()
    except ValueError as error:
        raise DataError(f"--what {what}: not a text: {error}") from None


def parse_baseline(text: str) -> Baseline:
    if os.path.isdir(text):
        return baseline_of(Path(text))
    try:
        mean, std, seeds, *bytes_per_token = text.split(",")
        require(len(bytes_per_token) <= 1, "", UserError)
        width = float(bytes_per_token[0]) if bytes_per_token else None
        return Baseline("given", float(mean), float(std), int(seeds), width)
    except ValueError as error:
        hint = "expected the folder of a record, or MEAN,STD,N in bpb, such as 1.0563,0.0003,3; a fourth: bytes a token"
        raise UserError(f"--baseline {text}: {hint} {error}".strip()) from None


# -----------------------------------------------------------------------------
# Runs


class Job(NamedTuple):
    """One seed: what to run, and the run if it has already finished."""

    env: dict[str, str]
    run: RunConfig
    finished: Run | None


def job_for(seed: int, facts: Facts, env: Mapping[str, str]) -> Job:
    env = dict(env) | {"SEED": str(seed), "RUN_ID": f"{facts.name}_seed{seed}"}
    model, run = read_env(env)
    return Job(env, run, find_finished(model, run))


def find_finished(model: train_gpt.ModelConfig, run: RunConfig) -> Run | None:
    """The finished run of that name, if it has this code and these knobs; otherwise says why it will be run again."""
    path = LOGS / f"{run.run_id}.json"
    if not path.exists():
        return None
    try:
        found = load_run(path)
    except DataError as error:
        reasons = [str(error)]
    else:
        reasons = reasons_to_repeat(found, model, run)
    if not reasons:
        print(f"{path}: finished, not run again")
        return found
    print(printable(f"{path}: will be run again: {'; '.join(reasons)}"))
    return None


def reasons_to_repeat(found: Run, model: train_gpt.ModelConfig, run: RunConfig) -> list[str]:
    """How a finished run differs from one with these knobs and this code, and what its log contradicts."""
    had = found.result["knobs"]
    knobs = train_gpt.settings(model, train_gpt.with_batch(run, found.result["world_size"]))
    reasons = [
        f"{name} was {had.get(name)}, is {knobs.get(name)}" for name in knobs | had if had.get(name) != knobs.get(name)
    ]
    if found.source != train_gpt.code():
        reasons.append("train_gpt.py has changed")
    return [*reasons, *guarded(against_log(found))]


def progress(jobs: Sequence[Job], runs: Sequence[Run], audit_seconds: int) -> str:
    """Which seed comes after `runs`; once one is done, also how many are, and about how many seconds are left for all
    seeds and their audits. A seed takes as long as those that are done."""
    line = f"seed {jobs[len(runs)].run.seed} ({len(runs) + 1} of {len(jobs)})"
    rest = [job.finished for job in jobs[len(runs) :]]
    done = [*runs, *filter(None, rest)]
    if not done:
        return line
    each = sum(sum(run.result["phases"].values()) for run in done) / len(done)
    left = each * rest.count(None) + audit_seconds * len(jobs)
    return f"{line}: {len(done)} done, about {left:.0f} s left, audits included"


def check_before(jobs: Sequence[Job], facts: Facts) -> None:
    """Refuse what could never become a record before any compute is spent."""
    check_knobs(jobs[0].run, facts)
    if (RECORDS / facts.folder).exists():
        raise UserError(f"{RECORDS / facts.folder} exists: remove it, or take another name")
    reasons = list(against_validation(jobs, facts))
    if not all(job.finished for job in jobs):
        reasons += claims.against_track(ranks(jobs[0].env), device_here(jobs[0].env), facts)
    refuse(reasons)


def check_knobs(run: RunConfig, facts: Facts) -> None:
    """Refuse knobs with which no run is one of a record, or that set a limit above the record's. A run without a limit
    in seconds may still keep to it. Raises UserError."""
    require(not run.artifact and not run.resume, "a record trains from the start: unset ARTIFACT and RESUME", UserError)
    require(
        run.artifact_bytes <= MOST_BYTES,
        f"ARTIFACT_BYTES={run.artifact_bytes}: a record has {MOST_BYTES} bytes; unset it",
        UserError,
    )
    for knob, limit, option in (
        ("max_wallclock_seconds", facts.train_seconds, "--train-seconds"),
        ("eval_seconds", facts.eval_seconds, "--eval-seconds"),
    ):
        require(
            getattr(run, knob) <= limit,
            f"{knob.upper()}={getattr(run, knob):g} is over the limit of {limit:g} s; "
            f"lower it, or raise {option} (then the track is {NON_RECORD})",
            UserError,
        )


def against_validation(jobs: Sequence[Job], facts: Facts) -> Iterator[str]:
    """Reasons to refuse the validation set in DATA_PATH: for its track, beside the baseline, or beside a finished
    run."""
    model, run = read_env(jobs[0].env)
    docs = train_gpt.load_validation(run.data_path, model.vocab_size, train_gpt.load_tokenizer(run, model.vocab_size))
    size = int(docs.target_bytes().sum())
    yield from claims.against_totals(len(docs), int(docs.lengths.sum()), size, facts)
    yield from claims.against_baseline(len(docs), size, facts.baseline)
    for job in jobs:
        if job.finished and job.finished.validation != docs.sha256():
            yield f"{job.finished.path}: scored another validation set than {run.data_path} holds; remove it"


def device_here(env: Mapping[str, str]) -> str:
    """The name of the device that a run would use. Asks in another process, because asking initialises the GPU."""
    if env.get("DEVICE") == "cpu" or not torch.cuda.device_count():
        return train_gpt.device_name(torch.device("cpu"))
    ask = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def start(job: Job) -> Run:
    """Train and evaluate a seed -> its run."""
    status = run_entry(Path(train_gpt.__file__).resolve(), job.env, Path.cwd())
    require(status == 0, f"{job.run.run_id} ended with status {status}: see above; finished seeds are kept", UserError)
    return load_run(LOGS / f"{job.run.run_id}.json")


def refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise UserError("no record: " + "; ".join(reasons))


def audit(run: Run, seconds: int) -> str:
    """The output of `python -m tools.prove` on a run's artifact, also printed. Raises UserError if it fails."""
    artifact = beside(run.path, ".ptz")
    difference = how_it_differs(artifact, run) if artifact.is_file() else "it is missing"
    require(
        not difference,
        f"{artifact}: not the artifact of {run.name}: {difference}; remove {run.path}, and it is made again",
        UserError,
    )
    print(f"auditing {artifact}", flush=True)
    env = dict(os.environ) | checked_knobs(run.result["knobs"], str(run.path))
    lines = []
    command = [sys.executable, "-m", "tools.prove", str(artifact), "--seconds", str(seconds)]
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=ends_with_its_parent(),
    )
    with process:
        for line in process.stdout or ():
            print(printable(line.rstrip("\n")), flush=True)
            lines.append(line)
    require(process.returncode == 0, f"no record: the audit of {artifact} failed: see above", UserError)
    return "".join(lines)


# -----------------------------------------------------------------------------
# The folder


def write_record(runs: Sequence[Run], audits: Mapping[int, str], facts: Facts) -> Path:
    """Build the folder next to its final place, check it, and move it there as a whole -> its path."""
    folder = RECORDS / facts.folder
    beside_it = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    beside_it.mkdir(parents=True)
    try:
        for name, content in content_of(runs, audits, facts).items():
            write_atomically(beside_it / name, [content])
        draw_all(runs[:MOST_RUNS], beside_it)
        refuse(contradictions(read_record(beside_it)))
        require(not folder.exists(), f"{folder} exists: remove it, or take another name", UserError)
        os.replace(beside_it, folder)
    finally:
        shutil.rmtree(beside_it, ignore_errors=True)
    return folder


def content_of(runs: Sequence[Run], audits: Mapping[int, str], facts: Facts) -> dict[str, bytes]:
    """Every file of a record but its plots: {name: bytes}. Files of the runs are kept byte for byte, with the events
    of a run at the end of its log."""
    files = {
        "README.md": claims.readme(runs, facts).encode(),
        "submission.json": claims.as_json(claims.submission(runs, facts)).encode(),
        "requirements.txt": claims.requirements(runs[0]).encode(),
        "train_gpt.py": runs[0].source,
    }
    for run in runs:
        seed = run.result["seed"]
        events = read_file(beside(run.path, ".events.jsonl"))
        files[f"train_seed{seed}.log"] = read_file(run.log).removesuffix(b"\n") + EVENTS_BELOW + events
        files[f"train_seed{seed}.json"] = read_file(run.path)
        files[f"train_seed{seed}.docs.npz"] = read_file(beside(run.path, ".docs.npz"))
        files[f"audit_seed{seed}.txt"] = audits[seed].encode()
    return files


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
