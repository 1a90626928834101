"""
Try combinations of knobs, each in its own run, and rank them on held-out training documents.

    ./run.sh sweep TTT_LR=5e-5,1e-4,2e-4 TTT_CHUNK_TOKENS=16,48 --eval logs/RUN.ptz     score one artifact with each
    ./run.sh sweep MATRIX_LR=0.02,0.026,0.03 SEED=0,1,2                                 train and score each
    ./run.sh sweep --file combinations.txt                                              one combination per line
    ./run.sh sweep --source train_gpt.py,B.py,HEAD~3 SEED=0,1,2                         race sources against the first
    ./run.sh sweep --train-only MATRIX_LR=0.02,0.03 SEED=0,1                            only train, pack nothing
    ./run.sh sweep --train-only --screen 12 MATRIX_LR=0.02,0.03 A=0,2+B=8,0 ...         many ideas in few runs

Values are separated by commas, or by semicolons where values contain commas: 'TTT_LORA_TARGETS=q,v;q,k,v,o'.
Combinations that differ only in SEED share a row of the results. All other knobs come from the environment; with
--eval, knobs that the environment does not set come from the artifact's run, and HOLDOUT_TOKENS always does.

A source is the path of a train_gpt.py, or a git revision that contains one. Each source is copied into the sweep's
folder and runs from there. Every combination runs under every source, and each source is compared with the first, both
before quantisation and in the final score: per seed, with a paired interval over documents, and over all seeds. The
order alternates from seed to seed (A B, B A, A B, ...), so that a machine that slows down favours neither. Sources race
over equal seconds with MAX_WALLCLOCK_SECONDS, and over equal steps with ITERATIONS=n MAX_WALLCLOCK_SECONDS=0.

With --train-only, every job trains for all of MAX_WALLCLOCK_SECONDS and scores its weights before quantisation; nothing
is packed, read back or adapted. Use it for changes that affect only training. While a job trains or scores on a GPU,
the next one is imported and its data opened. The results are not final scores: `record` and `check` refuse them.

With --screen, every word is a factor: NAME=base,other, or several knobs that change together, A=0,2+B=8,0. A few runs
measure the effect of every factor: 12 runs for up to 11 factors (a Plackett-Burman design), all with the SEED of the
environment, the base first. Columns of the design without a factor measure the noise between runs; to have more of
them, --screen 12 takes 12 runs for fewer factors too. results.md lists the effects once all runs are done.

With --data A,B, folders with the same text prepared with different tokenizers are one more dimension. The last
HOLDOUT_TOKENS of the first folder are held out, and from the others as many whole documents; their bytes must match.

On a cluster, --launcher 'srun -N1 --gpus=1' --jobs 8 runs eight jobs at once, each started with that prefix. The same
folders must be visible to all of them.

Writes logs/sweeps/<name>/: results.md, results.csv, results.png, and the files of every run. A finished combination
(same knobs, source, data and artifact) is not run again, so repeating the command resumes an interrupted sweep. With
--keep FOLDER, the results, the sources and the files of every run (result, log, events and document scores, but no
weights) are also copied into FOLDER and found there: a race can be kept in a repository and resumed on another machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt
from tools import ask_source
from tools import train_only as train_only_job
from tools.artifact import end_in_a_line, knobs_of_run
from tools.events import Event, read_events
from tools.holdout import held_out_by, score_holdout
from tools.processes import ends_with_its_parent, torchrun
from tools.ranking import knob_names, rank, shell_words, without_seed, write_results
from tools.results import Run, beside, load_run
from tools.screening import Design, make_design, parse_factors, split_word
from tools.texts import Text, find_texts
from tools.values import any_text, missing_or_wrong, parse_object, printable, table_of
from train_gpt import LOGS, ConfigError, DataError, UserError, require

SWEEPS = LOGS / "sweeps"
RUN_SH = Path(__file__).resolve().parent.parent / "run.sh"
SAME_DOCUMENTS = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "HOLDOUT_TOKENS")  # what determines the documents
APART = {  # knobs that no sweep may vary, and why
    "RUN_ID": "every combination gets one of its own",
    "ARTIFACT": "give it as --eval ARTIFACT",
    "RESUME": "every combination starts anew",
} | dict.fromkeys(SAME_DOCUMENTS, "all combinations must score the same documents; set it in the environment")
ONLY_TRAINING = ("Model", "Budget", "Data", "Optimizer", "Quantisation")  # groups of knobs
NOT_TRAINING = ("Quantisation", "Test-time training")
ASK_SECONDS = 300.0  # to import a source on a busy machine
STOP_SECONDS = 10.0  # how long a run has to end after it is told to
# Suffixes of the files of a run that a comparison reads. The log of a train-only run would add only the source, which
# is kept once for all runs.
KEPT = (".json", ".docs.npz", ".events.jsonl", ".txt")
KEPT_OF_TRAINING = KEPT[:3]
RESULTS = ("results.md", "results.csv", "results.png")
LONGEST_NAME = 200  # of a sweep's name, in characters: file systems allow 255


# -----------------------------------------------------------------------------
# What to run


@dataclass(frozen=True)
class Source:
    """A train_gpt.py as it was when the sweep began."""

    name: str  # as given to --source; empty for this repository's own, without --source
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def file(self, folder: Path) -> Path:
        """Where it runs from: a copy in the sweep's folder, safe from edits of the original."""
        return folder / "sources" / f"{self.sha256[:12]}.py"

    def knobs(self) -> dict[str, str]:
        """Its entry in a combination: one more dimension of the grid. `source` is lower case, as no knob is."""
        return {"source": self.name} if self.name else {}


@dataclass
class Job:
    """One combination, its run and its progress."""

    knobs: dict[str, str]  # what the sweep sets, including the name of the source
    env: dict[str, str]
    source: Source
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # all knobs of its run
    documents: dict = dataclasses.field(default_factory=dict)  # identifies documents, tokenizer and training data
    artifact: str = ""  # sha256 of the artifact to score; empty if the job trains
    run_id: str = ""
    state: str = "waiting"  # waiting | running | done | failed
    at: str = ""  # progress, in words
    bpb: float | None = None  # the latest that the run has reported
    eta: float | None = None  # seconds left in the current phase
    run: Run | None = None  # once it is done

    @property
    def label(self) -> str:
        return shell_words(self.knobs)

    def file(self, suffix: str) -> Path:
        return LOGS / f"{self.run_id}{suffix}"


def parse_grid(words: Sequence[str]) -> list[dict[str, str]]:
    """NAME=v,w ... -> every combination, the last name varying fastest."""
    names = []
    choices = []
    for word in words:
        name, values = split_word(word)
        require(name not in names, f"{name} is given twice", ConfigError)
        names.append(name)
        choices.append(values)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]


def parse_file(path: Path) -> list[dict[str, str]]:
    """Lines of NAME=value ..., quoted as in a shell; # begins a comment. All combinations get the same order of names,
    so that lines that differ only in SEED share a row."""
    found = []
    for number, line in enumerate(train_gpt.read_file(path).decode("utf-8", "replace").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            require(all(re.match(r"[A-Za-z_]\w*=", word) for word in words), "expected NAME=value ...", ConfigError)
            names = [word.partition("=")[0] for word in words]
            for name in names:
                require(names.count(name) == 1, f"{name} is given twice", ConfigError)
        except ValueError as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path}:{number}: {error}") from None
        if words:
            found.append(dict(word.split("=", 1) for word in words))
    require(bool(found), f"{path}: no combination in it", ConfigError)
    order = knob_names(found)
    return [{name: knobs[name] for name in order if name in knobs} for knobs in found]


def find_sources(words: str | None) -> list[Source]:
    """The comma-separated sources of --source; without it, the train_gpt.py of this repository."""
    if words is None:
        return [Source("", train_gpt.code())]
    return [Source(word, read_source(word)) for word in words.split(",")]


def read_source(word: str) -> bytes:
    """The content of a file, or train_gpt.py as it is in a git revision of this repository."""
    if Path(word).is_file():
        return train_gpt.read_file(word)
    message = f"--source {word!r}: neither a file nor a git revision that has a train_gpt.py"
    require(bool(re.match(r"\w", word)), message)  # git would parse a leading dash as an option
    try:
        done = subprocess.run(["git", "-C", RUN_SH.parent, "show", f"{word}:train_gpt.py"], capture_output=True)
    except FileNotFoundError:
        raise ConfigError(f"{message} (there is no git)") from None
    require(done.returncode == 0, message)
    return done.stdout


def training_knobs(groups: Mapping[str, str]) -> set[str]:
    """Those knobs of a source, {NAME: its group}, that have no effect when an artifact is scored."""
    names = {name for name, group in groups.items() if group in ONLY_TRAINING}
    return (names | {"ARTIFACT_BYTES", "CHECKPOINT_SECONDS"}) - {"MICRO_BATCH_TOKENS", "EVAL_SECONDS"}


def check_names(names: Iterable[str], groups: Mapping[str, str], artifact: str | None, train_only: bool) -> None:
    """Refuse names that cannot be swept: not knobs of the source, fixed for all sweeps, or without effect on what is
    measured (with --eval or --train-only)."""
    train_gpt.refuse_unknown(names, groups)
    useless = training_knobs(groups) if artifact else set()
    if train_only:
        require_training_knobs(names, groups)
    for name in names:
        require(name in groups, f"{name} is not a knob (./run.sh help lists all)")
        require(name not in APART, f"{name} cannot be swept: {APART.get(name)}")
        require(name not in useless, f"{name} is for training, and --eval trains nothing")


def require_training_knobs(names: Iterable[str], groups: Mapping[str, str]) -> None:
    """Refuse knobs that have no effect on the score before quantisation. Raises ConfigError."""
    for name in names:
        late = groups.get(name) in NOT_TRAINING or name in {"ARTIFACT_BYTES", "EVAL_SECONDS"}
        require(not late, f"{name} changes nothing before quantisation, where --train-only and --screen measure")


def given() -> dict[str, str]:
    """The environment without the defaults that run.sh sets for a small run."""
    defaults = os.environ.get("RUN_SH_DEFAULTS", "").split()
    return {name: value for name, value in os.environ.items() if name not in defaults}


def environment(knobs: Mapping[str, str]) -> dict[str, str]:
    """This environment with the knobs of a combination. If run.sh has set the defaults of a small run, it is asked for
    them again with these knobs: a default for TTT_PARAMS=lora has no effect under full."""
    env = given() | knobs
    if os.environ.get("RUN_SH_DEFAULTS"):
        defaults = subprocess.check_output([RUN_SH, "small-job-defaults"], env=env, text=True)
        env |= dict(line.split("=", 1) for line in defaults.splitlines())
    return env


def make_jobs(
    combinations: list[dict[str, str]],
    artifact: str | None,
    gpus: int,
    sources: Sequence[Source],
    train_only: bool = False,
    texts: Sequence[Text] = (Text(""),),
) -> list[Job]:
    """One job per combination, source and text; reads and checks its environment as its run will."""
    for name in ("ARTIFACT", "RESUME"):
        require(not os.environ.get(name), f"{name} is set in the environment: {APART[name]}")
    names = knob_names(combinations)
    for name in names:
        foreign = name in os.environ and name not in train_gpt.KNOBS  # PATH, for example, which every process needs
        require(not foreign, f"{name} is not a knob of this train_gpt.py, but in the environment: unset it to sweep it")

    jobs = []
    for knobs, text, source in itertools.product(combinations, texts, sources):
        env = environment(knobs) | text.env()
        if artifact:
            env = knobs_of_run(Path(artifact), env) | env | {"ARTIFACT": artifact, "RESUME": ""}
        jobs.append(Job(source.knobs() | text.knobs() | knobs, env, source))
    by_source = [[job for job in jobs if job.source is source] for source in sources]
    needs = train_only_job.NEEDED if train_only else ()
    answers = [ask_settings(theirs, gpus, artifact, needs) for theirs in by_source]
    check_sources(sources, answers, names, artifact, train_only)
    for theirs, answer in zip(by_source, answers, strict=True):
        for job, settings in zip(theirs, answer["settings"], strict=True):
            require(not isinstance(settings, str), f"{job.label}: {settings}")
            job.settings = settings
    require_equal_documents(jobs)
    return jobs


def ask_settings(jobs: list[Job], gpus: int, artifact: str | None, needs: Sequence[str]) -> dict[str, Any]:
    """Ask these jobs' source for its knobs, the settings in each job's environment, and which `needs` it lacks."""
    source = jobs[0].source
    question = {"environments": [job.env for job in jobs], "gpus": gpus, "trains": not artifact, "needs": needs}
    return ask(source, question) if source.name else ask_source.answer(train_gpt, **question)


def ask(source: Source, question: Mapping[str, Any]) -> dict[str, Any]:
    """A source's answer to tools/ask_source.py, run in a separate process: a source is never imported into this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_gpt.py")
        path.write_bytes(source.content)
        command = [sys.executable, "-P", ask_source.__file__, str(path)]
        try:
            asked = json.dumps(question).encode()
            done = subprocess.run(command, input=asked, capture_output=True, timeout=ASK_SECONDS)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"--source {source.name}: its import takes more than {ASK_SECONDS:.0f} s") from None
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    require(done.returncode == 0, f"--source {source.name}: it cannot be asked for its knobs: {''.join(last)}")
    said = parse_object(done.stdout)
    kinds = {"knobs": table_of(any_text), "settings": is_list, "lacking": is_list}
    wrong = missing_or_wrong(said, kinds)
    require(not wrong, f"--source {source.name}: its answer is none: {wrong}")
    return said


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def check_sources(
    sources: Sequence[Source], answers: list[dict[str, Any]], names: list[str], artifact: str | None, train_only: bool
) -> None:
    """Refuse a source that lacks what --train-only needs, and any knob, set or swept, that some source does not know;
    `answers` are those of all sources."""
    for source, answer in zip(sources, answers, strict=True):
        lacking = ", ".join(map(str, answer["lacking"]))
        name = source.name or "train_gpt.py"
        require(not lacking, f"--source {name}: it has no {lacking}, without which it cannot be trained alone")
    groups = [answer["knobs"] for answer in answers]
    known = {name for theirs in groups for name in theirs}
    said = {*names, *given()} & known
    for source, theirs in zip(sources, groups, strict=True):
        lacking = sorted(said - theirs.keys())
        require(not lacking, f"--source {source.name}: it has no knob {', '.join(lacking)}, which another source has")
        check_names(names, theirs, artifact, train_only)


def require_equal_documents(jobs: list[Job]) -> None:
    """Refuse sources whose defaults choose different data: their scores could not be compared."""
    firsts: dict[str | None, Job] = {}
    for job in jobs:
        first = firsts.setdefault(job.knobs.get("data"), job)
        for name in SAME_DOCUMENTS:
            values = (first.settings.get(name), job.settings.get(name))
            message = f"{name} is {values[0]} for {first.label}, {values[1]} for {job.label}"
            require(values[0] == values[1], f"{message}: set it in the environment")


class ScoredText(NamedTuple):
    """The documents of a sweep."""

    description: str  # for people
    is_validation: bool


def choose_documents(jobs: list[Job], on: str, folder: Path, world: int) -> ScoredText:
    """Point every job at the documents to score, and open everything that the first run of each text will open.
    Returns the documents of the first text."""
    by_text: dict[str | None, list[Job]] = {}
    for job in jobs:
        by_text.setdefault(job.knobs.get("data"), []).append(job)
    found = [
        choose_documents_of(theirs, on, folder / (f"data-{i}" if i else "data"), world)
        for i, theirs in enumerate(by_text.values())
    ]
    return found[0]


def choose_documents_of(jobs: list[Job], on: str, folder: Path, world: int) -> ScoredText:
    """Do so for the jobs of one text, whose held-out documents go into `folder`."""
    config, run = config_to_open(jobs[0], world)
    held = run.holdout_tokens
    if on == "training":
        if run.artifact:
            config, held, _ = held_out_by(run.artifact)
        score_holdout(run, config.vocab_size, folder, exact="data" in jobs[0].knobs)
        for job in jobs:
            job.env |= {"DATA_PATH": str(folder)}
            job.settings |= {"DATA_PATH": str(folder)}
    else:
        require(
            train_gpt.manifest_value(Path(run.data_path), "holdout") is None,
            f"DATA_PATH={run.data_path} is a sweep's own: it holds no validation; set DATA_PATH to the prepared data",
        )
    config, run = config_to_open(jobs[0], world)
    setup = train_gpt.make_setup(config, run, train_gpt.Dist(world=world))
    count = f"{len(setup.validation):,} documents ({setup.validation.target_bytes().sum():,} bytes)"
    shards = train_gpt.shards_digest(setup.stream)
    identity = {"validation": setup.validation.sha256(), "tokenizer": setup.tokenizer.sha256, "train": shards}
    for job in jobs:
        job.documents = identity
    if on == "training":
        return ScoredText(f"{count} of the last {held:,} training tokens, held out of training", False)
    return ScoredText(f"validation, {count}: not for choosing", True)


def config_to_open(job: Job, world: int) -> tuple[train_gpt.ModelConfig, train_gpt.RunConfig]:
    """The configuration with which this train_gpt.py opens the files that a job's run will open. Other sources may have
    knobs and values that this one lacks: for them, only the knobs that choose the files are used, and a tiny batch."""
    if not job.source.name:
        return train_gpt.read_env(job.env)
    files = {name: job.settings[name] for name in (*SAME_DOCUMENTS, "ARTIFACT") if name in job.settings}
    return train_gpt.read_env(files | {"TRAIN_ROW_TOKENS": "8", "TRAIN_BATCH_TOKENS": str(8 * world)})


def name_runs(jobs: list[Job], folder: Path, gpus: int, artifact: str | None, train_only: bool = False) -> None:
    """Give every job a run_id: a hash of the knobs that have an effect, the source, the data and the artifact, preceded
    by the source's hash if sources are raced. It contains no path, so it is the same on every machine."""
    ineffective = {*APART} - {"VOCAB_SIZE", "HOLDOUT_TOKENS"}
    digest = ""
    kind = ["train only"] if train_only else []
    if artifact:
        ineffective |= training_knobs(ask_source.knob_groups(train_gpt))
        digest = hashlib.sha256(train_gpt.read_file(artifact)).hexdigest()
    seen: dict[str, Job] = {}
    for job in jobs:
        knobs = {name: value for name, value in job.settings.items() if name not in ineffective}
        facts = [knobs, job.source.sha256, job.documents, digest, gpus, *kind]
        identity = json.dumps(facts, sort_keys=True, allow_nan=False)
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        if job.source.name:
            name = f"{job.source.sha256[:8]}-{name}"
        job.run_id = f"{folder.relative_to(LOGS)}/{name}"
        job.artifact = digest
        job.env |= {"RUN_ID": job.run_id}
        first = seen.setdefault(job.run_id, job)
        require(first is job, f"{first.label} and {job.label} are the same combination")


def find_finished(jobs: list[Job], kept: Path | None, train_only: bool = False) -> None:
    """Mark jobs as done whose run exists under its run_id, in logs/ or in the folder `kept`. A run that is damaged or
    belongs to another combination is run again."""
    for job in jobs:
        if kept is not None and not job.file(".json").exists():
            copy_run(kept / Path(job.run_id).name, job.file(""), train_only)
        if not job.file(".json").exists():  # not run yet, or interrupted
            continue
        try:
            run = load_run(job.run_id, train_only=train_only)
            require_run_of(job, run)
        except DataError as error:
            print(printable(f"{job.label}: will be run again: {error}"), flush=True)
            continue
        job.run = run
        job.state = "done"
        job.at = "before"
        job.bpb = run.bpb


def require_run_of(job: Job, run: Run) -> None:
    """Raise DataError if the run's files belong to another combination, if its result is not the one that it reported,
    or if the artifact has been replaced since it was scored."""
    result = run.result
    swept = {"seed": str(int(job.knobs["SEED"]))} if "SEED" in job.knobs else {}
    expected = {"run_id": Path(job.run_id).name, "code_sha256": job.source.sha256} | swept
    for name, value in expected.items():
        found = str(result[name]).rpartition("/")[2]  # a sweep of another name may have kept it
        require(found == value, f"{run.path}: its {name} is {found}, expected {value}", DataError)
    scored = result.get("artifact_sha256", job.artifact) if job.artifact else ""
    require(scored == job.artifact, f"{run.path}: it scored another artifact than the sweep began with", DataError)
    reported = run.reported("result")[-1:] if beside(run.path, ".events.jsonl").exists() else []
    require(reported in ([], [result]), f"{run.path}: it is not the result that its events report", DataError)


def copy_run(source: Path, target: Path, train_only: bool) -> None:
    """Copy the files of a run that are kept, the result last, so that an interrupted copy is not taken for a run. Paths
    are without suffixes. Does nothing if the source has no result."""
    kept = KEPT_OF_TRAINING if train_only else KEPT
    found = [suffix for suffix in reversed(kept) if Path(f"{source}{suffix}").exists()]
    for suffix in found if KEPT[0] in found else ():
        train_gpt.write_atomically(Path(f"{target}{suffix}"), [train_gpt.read_file(f"{source}{suffix}")], parents=True)


def keep_results(folder: Path, kept: Path, jobs: list[Job]) -> None:
    """Copy a sweep's tables, and the sources that ran, to the folder `kept`."""
    for name in RESULTS:
        train_gpt.write_atomically(kept / name, [train_gpt.read_file(folder / name)], parents=True)
    for source in {job.source for job in jobs if job.source.name}:
        train_gpt.write_atomically(source.file(kept), [source.content], parents=True)


# -----------------------------------------------------------------------------
# Running


def device_slots(device: str, gpus: int, env: Mapping[str, str] = os.environ) -> list[str | None]:
    """One slot per job that can run at the same time: its CUDA_VISIBLE_DEVICES, or None for the CPU."""
    found = 0 if device == "cpu" else torch.cuda.device_count()
    if not found:
        require(gpus == 1, f"--gpus {gpus}: there is no GPU here, or DEVICE=cpu")
        return [None]
    require(gpus <= found, f"--gpus {gpus}: there are {found} here")
    visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    names = visible.split(",")[:found]
    return [",".join(names[i : i + gpus]) for i in range(0, found - gpus + 1, gpus)]


def places(options: argparse.Namespace, device: str) -> list[str | None]:
    """As `device_slots`, but --jobs of them. A launcher chooses GPUs itself."""
    require(options.jobs is None or options.jobs > 0, f"--jobs {options.jobs}: at least 1")
    if options.launcher:
        return [None] * (options.jobs or 1)
    slots = device_slots(device, options.gpus)
    if options.jobs is None:
        return slots
    if slots == [None]:
        return slots * options.jobs  # all share the CPU
    require(options.jobs <= len(slots), f"--jobs {options.jobs}: there are GPUs for {len(slots)} at once")
    return slots[: options.jobs]


def launcher_words(text: str) -> list[str]:
    """The words before every job's command. Raises ConfigError if they cannot be started."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--launcher {text!r}: {error}") from None
    found = not text or (words and shutil.which(words[0]))
    require(bool(found), f"--launcher {text!r}: its first word is no program that can be found")
    return words


def take_turns(jobs: list[Job]) -> list[Job]:
    """The order of the runs: seed by seed, every second seed's combinations in reverse (A B, B A, A B, ...), so that
    drift over time, such as a machine that warms up, affects A and B equally."""
    by_seed: dict[str, list[Job]] = {}
    for job in jobs:
        by_seed.setdefault(job.knobs.get("SEED", ""), []).append(job)
    order = []
    for turn, group in enumerate(by_seed.values()):
        order += reversed(group) if turn % 2 else group
    return order


@dataclass(eq=False)
class Running:
    """The process of a job, and the one that takes its slot next."""

    job: Job
    process: subprocess.Popen
    slot: str | None
    started_at: float
    events: GrowingEvents
    trains: bool = False  # its set-up is done
    successor: Running | None = None  # imported and waiting for its signal to begin


class Command(NamedTuple):
    """How the sweep's jobs are started."""

    words: Sequence[str]  # before the path of a source
    train_only: bool = False
    ahead: bool = False  # whether a job may start before its slot is free, and wait


class GrowingEvents:
    """The events of a run in progress, as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.position = 0
        self.rest = b""  # beginning of a line that is not complete yet

    def new(self) -> list[Event]:
        """The events since the last call. A damaged line is skipped; it is an error when the finished run is read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                content = file.read()
        except FileNotFoundError:
            return []
        self.position += len(content)
        *lines, self.rest = (self.rest + content).split(b"\n")

        events = []
        for line in lines:
            with contextlib.suppress(DataError):
                events += read_events(line, self.path.name)
        return events


def note_progress(job: Job, event: Event) -> None:
    """Update a job's progress from one event of its run."""
    values = event.values
    match event.name:
        case "set_up":
            job.at = "training"
        case "readout":
            job.at = "scoring"
            job.eta = None
        case "step" | "validate":
            job.at = f"step {values['step']}"
            job.bpb = values.get("val_bpb", job.bpb)
        case "before_quantisation":
            job.at = "packing"
            job.eta = None
            job.bpb = values["prequant_bpb"]
        case "adapted":
            job.at = f"{values['documents_done']}/{values['documents']} documents"
            job.bpb = values["bpb"]
        case "score":
            job.at = "scored"
            job.eta = None
            job.bpb = values["static_bpb"] if values["val_bpb"] is None else values["val_bpb"]
    if event.known:
        job.eta = values.get("eta_s", job.eta)


class Sweep:
    """Runs jobs, one per slot at a time, and shows their progress."""

    def __init__(
        self, jobs: list[Job], slots: list[str | None], command: Command, folder: Path, kept: Path | None = None
    ):
        self.jobs = take_turns(jobs)
        self.command = command
        self.folder = folder
        self.kept = kept  # folder that finished runs are copied to
        self.screen = Screen(jobs)
        self.free = list(slots)
        self.slots = len(slots)
        self.running: list[Running] = []
        self.took: list[float] = []  # seconds that each ended job took

    def run_all(self) -> None:
        """Return once every job is done or has failed. A KeyboardInterrupt first ends all runs."""
        try:
            while self.running or any(job.state == "waiting" for job in self.jobs):
                for job in self.jobs:
                    if self.free and job.state == "waiting":
                        self.running.append(self.start(job, self.free.pop(0)))
                for one in list(self.running):
                    self.look_after(one)
                    self.prepare_successor(one)
                self.screen.show(self.seconds_left())
                time.sleep(0.1)
        finally:
            self.stop()
        self.screen.show(0.0, last=True)

    def start(self, job: Job, slot: str | None, wait: bool = False) -> Running:
        """Start a job's process; with `wait`, it begins only when told to."""
        remove_leftovers(job)
        source = job.source.file(self.folder)
        train_gpt.write_atomically(source, [job.source.content], parents=True)
        env = job.env if slot is None else job.env | {"CUDA_VISIBLE_DEVICES": slot}
        if self.command.train_only:
            env = env | {"PYTHONSAFEPATH": "1"}  # like -P, but also for the ranks that torchrun starts
        with open(job.file(".err"), "wb") as errors:
            process = subprocess.Popen(
                [*self.command.words, str(source.resolve()), *(["--wait"] if wait else [])],
                env=env,
                stdin=subprocess.PIPE if wait else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=ends_with_its_parent(),
            )
        job.state = "ready" if wait else "running"
        job.at = "waits for its place" if wait else "starting"
        events = GrowingEvents(job.file(".events.jsonl"))
        return Running(job, process, slot, time.monotonic(), events)

    def prepare_successor(self, one: Running) -> None:
        """Start the next job while one trains or scores, so that work that needs no GPU is done before its turn."""
        if not self.command.ahead or one not in self.running or not one.trains or one.successor is not None:
            return
        waiting = next((job for job in self.jobs if job.state == "waiting"), None)
        if waiting is not None and not loses_steps(one):
            one.successor = self.start(waiting, one.slot, wait=True)

    def give_place(self, one: Running) -> None:
        """Give a finished job's slot to the job waiting for it, or else free it for any."""
        if one.successor is None:
            self.free.append(one.slot)
            return
        successor = one.successor
        with contextlib.suppress(BrokenPipeError):  # it has failed already; look_after() will notice
            successor.process.stdin.write(b"\n")
            successor.process.stdin.close()
        successor.job.state = "running"
        successor.job.at = "starting"
        successor.started_at = time.monotonic()
        self.running.append(successor)

    def look_after(self, one: Running) -> None:
        """Read a job's events; once its process has ended, settle the job and pass on its slot."""
        status = one.process.poll()
        for event in one.events.new():
            note_progress(one.job, event)
            one.trains = one.trains or event.name == "set_up"
        if status is None:
            return
        self.running.remove(one)
        self.give_place(one)
        self.took.append(time.monotonic() - one.started_at)
        conclude(one.job, status, self.command.train_only)
        if self.kept is not None and one.job.state == "done":
            copy_run(one.job.file(""), self.kept / Path(one.job.run_id).name, self.command.train_only)

    def seconds_left(self) -> float | None:
        """Estimated seconds until the sweep is done, from the jobs so far; None until one has ended."""
        if not self.took:
            return None
        each = sum(self.took) / len(self.took)
        now = time.monotonic()
        waiting = sum(job.state in {"waiting", "ready"} for job in self.jobs)
        running = sum(max(0.0, each - (now - one.started_at)) for one in self.running)
        return (running + waiting * each) / self.slots

    def stop(self) -> None:
        """End all running processes. After Ctrl-C they have received the signal too, and get one second; then they are
        terminated, and finally killed."""
        started = self.running + [one.successor for one in self.running if one.successor is not None]
        processes = [one.process for one in started]
        for seconds, end in ((1.0, subprocess.Popen.terminate), (STOP_SECONDS, subprocess.Popen.kill)):
            deadline = time.monotonic() + seconds
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                time.sleep(0.05)
            for process in processes:
                if process.poll() is None:
                    end(process)
        for one in started:
            one.process.wait()
            one.job.file(".err").unlink(missing_ok=True)
            for partial in one.job.file("").parent.glob(".*.partial"):
                if partial.is_file():  # a folder is data whose preparation was interrupted
                    partial.unlink()


def loses_steps(one: Running) -> bool:
    """Whether an import beside this run would cost it training steps: on a CPU, with a limit in seconds. If all runs
    but the last had an import beside them, the last would seem to learn faster."""
    return one.slot is None and float(one.job.settings.get("MAX_WALLCLOCK_SECONDS", "0")) > 0


def job_command(options: argparse.Namespace, launcher: Sequence[str]) -> Command:
    """How the jobs of a sweep are started. A waiting job is told to begin through its standard input; a launcher or
    torchrun may not pass that on, so with these no job starts ahead."""
    words = command_of(options.gpus, launcher)
    if not options.train_only:
        return Command(words)
    return Command([*words, train_only_job.__file__], train_only=True, ahead=options.gpus == 1 and not launcher)


def command_of(gpus: int, launcher: Sequence[str]) -> list[str]:
    """The command that starts a source; the path of the source comes next."""
    command = [*launcher, sys.executable]
    if gpus > 1:
        command += torchrun(gpus)
    return command


def remove_leftovers(job: Job) -> None:
    """Remove what an interrupted attempt has left. Its run may outlive a sweep that was killed, so wait for it to end.
    Raises UserError if it still runs after STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            with train_gpt.reserve_run_id(job.run_id):
                for suffix in (".json", ".docs.npz", ".events.jsonl", ".txt"):
                    job.file(suffix).unlink(missing_ok=True)
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def conclude(job: Job, status: int, train_only: bool = False) -> None:
    """Settle a job whose process has ended: done if its run can be read; else failed, with the reason in `at`."""
    job.eta = None
    try:
        require(status == 0, reason_of(job.file(".err"), status), UserError)
        run = load_run(job.run_id, train_only=train_only)
        same = run.result["code_sha256"] == job.source.sha256
        require(same, "its copy of the source was changed meanwhile; start the sweep again")
        require_run_of(job, run)
        job.run = run
        job.state = "done"
        result = run.result
        job.at = f"{result['steps']} steps" if train_only else f"{result['eval_seconds']:.0f} s of evaluation"
        job.bpb = run.bpb
        job.file(".err").unlink()
    except UserError as error:
        job.state = "failed"
        job.at = str(error)


def reason_of(path: Path, status: int) -> str:
    """The first line of the error output that begins with `error: `, else its last line. When a rank fails, the other
    ranks report that later, so the first such line is the cause."""
    lines = [line for line in train_gpt.read_file(path).decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0]
    return lines[-1] if lines else f"exit status {status}, no message"


class Screen:
    """The live table: redrawn on a terminal; elsewhere one line per change (progress at most every ten seconds per
    job)."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.terminal = sys.stdout.isatty()
        self.lines_drawn = 0
        self.drawn_at = 0.0
        self.printed: dict[str, tuple[str, str, float]] = {}  # run_id -> state, progress, when

    def show(self, seconds_left: float | None, last: bool = False) -> None:
        if not self.terminal:
            self.print_changes(seconds_left)
        elif last or time.monotonic() - self.drawn_at > 0.5:
            self.redraw(seconds_left)

    def print_changes(self, seconds_left: float | None) -> None:
        for job in self.jobs:
            state, at, when = self.printed.get(job.run_id, ("waiting", "", 0.0))
            now = time.monotonic()
            if job.state != state or (job.at != at and now - when > 10):
                self.printed[job.run_id] = job.state, job.at, now
                print(self.line(job), flush=True)
                if job.state in {"done", "failed"}:
                    print(self.summary(seconds_left), flush=True)

    def summary(self, seconds_left: float | None) -> str:
        ended = sum(job.state in {"done", "failed"} for job in self.jobs)
        text = f"{ended} of {len(self.jobs)} combinations"
        return f"{text}, {seconds_left:.0f} s left" if seconds_left else text

    def line(self, job: Job) -> str:
        parts = [job.label, job.state]
        if job.bpb is not None:
            parts.append(f"bpb {job.bpb:.5f}")
        if job.eta is not None:
            parts.append(f"ETA {job.eta:.0f} s")
        return "  ".join(map(printable, [*parts, job.at]))

    def redraw(self, seconds_left: float | None) -> None:
        """Draw the whole table. If not all lines fit, running and failed jobs come first."""
        width, height = shutil.get_terminal_size()
        room = max(1, height - 3)
        shown = self.jobs
        if len(shown) > room:
            order = ("running", "failed", "done", "ready", "waiting")
            shown = sorted(shown, key=lambda job: order.index(job.state))[:room]
        lines = [self.summary(seconds_left), *map(self.line, shown)]
        if len(shown) < len(self.jobs):
            lines.append(f"... and {len(self.jobs) - len(shown)} more")
        up = f"\x1b[{self.lines_drawn}A" if self.lines_drawn else ""
        print(up + "".join(f"\x1b[2K{line[: width - 1]}\n" for line in lines) + "\x1b[J", end="", flush=True)
        self.lines_drawn = len(lines)
        self.drawn_at = time.monotonic()


# -----------------------------------------------------------------------------
# Command line


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder, so that no second process sweeps into it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another sweep runs there; wait for it, or give another --name") from None
        yield
    finally:
        os.close(handle)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", nargs="*", metavar="NAME=value,value")
    parser.add_argument("--file", type=Path, help="combinations, one a line, instead of a grid")
    parser.add_argument("--eval", metavar="ARTIFACT", help="train nothing; score this artifact with every combination")
    documents = "score held-out training documents, or validation, which marks the table [%(default)s]"
    screen = "a word is a factor of two values, and few runs tell the effect of each (N of them: 8, 12, 16, 20 or 24)"
    parser.add_argument("--screen", type=int, nargs="?", const=0, metavar="N", help=screen)
    data = "folders of one text, prepared with several tokenizers, the first of which the others are compared with"
    parser.add_argument("--data", metavar="A,B", help=data)
    alone = "train to the last second and score the weights before quantisation: nothing is packed"
    parser.add_argument("--train-only", action="store_true", help=alone)
    parser.add_argument("--on", choices=("training", "validation"), default="training", help=documents)
    parser.add_argument("--name", help="folder in logs/sweeps [the names of the knobs, or the file's]")
    sources = "train_gpt.py files or git revisions, the first of which the others are compared with"
    parser.add_argument("--source", metavar="A.py,B.py", help=sources)
    parser.add_argument("--jobs", type=int, metavar="N", help="at once [as many as fit; with --launcher 1]")
    parser.add_argument("--launcher", default="", metavar="WORDS", help="what stands before every job's command")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs are looked for and left, too")
    parser.add_argument("--gpus", type=int, default=1, help="of one job [%(default)s]")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    require(options.gpus > 0, f"--gpus {options.gpus}: at least 1")
    if options.data is not None:
        require(not options.eval, "--data trains on each, and --eval does not: give one of them")
        require(options.on == "training", "--data scores held-out training documents: leave --on out")
        require(options.screen is None, "--data and --screen: give one of them")
    if options.screen is not None:
        require(bool(options.grid), "--screen: give its factors, NAME=base,other ...")
        require(
            not options.eval, "--screen tells effects before quantisation, where --eval has no score: leave one out"
        )
        require("," not in (options.source or ""), "--screen: give one source; two are a race")
    if options.train_only:
        require(not options.eval, "--train-only trains, and --eval does not: give one of them")
        require(options.on == "training", "--train-only scores held-out training documents: leave --on out")


def sweep_name(options: argparse.Namespace, combinations: list[dict[str, str]]) -> str:
    name = options.name
    if not name:
        words = [options.file.stem] if options.file else [knob.lower() for knob in combinations[0]]
        if options.screen is not None:
            words = ["screen", *words]
        if options.data:
            words = ["data", *words]
        if options.source:
            words = ["race", *words]
        name = "-".join(words)
        if options.eval:
            name += "-eval"
        if options.train_only:
            name += "-train"
        if options.on == "validation":
            name += "-validation"
    require(bool(re.fullmatch(r"\w[\w.-]*", name, re.ASCII)), f"--name {name!r}: expected letters, digits, _ . -")
    require(len(name) <= LONGEST_NAME, f"the knobs give a name of {len(name)} characters: give a --name")
    return name


def read_combinations(options: argparse.Namespace) -> tuple[list[dict[str, str]], Design | None]:
    """The combinations of the file, grid or design, and the design if any; with sources alone, one without knobs."""
    some = bool(options.grid) or bool(options.file) or bool(options.source or options.data)
    require(some and not (options.grid and options.file), "give a grid, NAME=value,value ..., or --file FILE")
    if options.screen is not None:
        design = make_design(parse_factors(options.grid), options.screen)
        combinations = design.combinations()
        require_training_knobs(knob_names(combinations), ask_source.knob_groups(train_gpt))
        return combinations, design
    return (parse_file(options.file) if options.file else parse_grid(options.grid)), None


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. A grid word after --screen is not taken for its number."""
    words = list(arguments)
    for i, word in enumerate(words):
        number_follows = i + 1 < len(words) and words[i + 1].isdigit()
        if word == "--screen" and not number_follows:
            words[i] = "--screen=0"
    options = command_line().parse_intermixed_args(words)
    check_options(options)
    return options


def command_given(jobs: list[Job], arguments: Sequence[str]) -> str:
    """The shell command that repeats this sweep, including the knobs set in the environment."""
    knobs = train_gpt.KNOBS.keys() | {name for job in jobs for name in job.settings}
    said = shell_words({name: value for name, value in given().items() if name in knobs})
    return f"{said} {shlex.join(['./run.sh', 'sweep', *arguments])}".strip()


def require_effects(design: Design, jobs: Sequence[Job]) -> None:
    """Refuse a factor whose two values are one, such as 0.02 and 2e-2: its effect would be that of noise."""
    for factor in design.factors:
        for name in factor.base:
            values = {job.settings.get(name) for job in jobs}
            require(len(values) > 1, f"{factor.word}: both values of {name} are {values.pop()} to a run", ConfigError)


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 1 if a combination failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = read_options(arguments)
    combinations, design = read_combinations(options)
    launcher = launcher_words(options.launcher)
    sources = find_sources(options.source)
    jobs = make_jobs(combinations, options.eval, options.gpus, sources, options.train_only, find_texts(options.data))
    if design is not None:
        require_effects(design, jobs)
    slots = places(options, jobs[0].settings["DEVICE"])
    folder = SWEEPS / sweep_name(options, combinations)

    with locked(folder):
        scored = choose_documents(jobs, options.on, folder, options.gpus)
        name_runs(jobs, folder, options.gpus, options.eval, options.train_only)
        find_finished(jobs, options.keep, options.train_only)
        print(f"{len(jobs)} combinations, {len(slots)} at a time, scored on {scored.description}", flush=True)
        try:
            Sweep(jobs, slots, job_command(options, launcher), folder, options.keep).run_all()
        except KeyboardInterrupt:
            done = sum(job.state == "done" for job in jobs)
            print(f"{done} of {len(jobs)} combinations are done; the same command goes on with the rest", flush=True)
            raise
        rows = rank(jobs)
        require(bool(rows), f"every combination failed, the first: {jobs[0].at}", UserError)
        print("\n" + write_results(folder, jobs, rows, scored, command_given(jobs, arguments), design))
        if options.keep is not None:
            keep_results(folder, options.keep, jobs)

    print(f"{folder}/results.md, results.csv, results.png")
    chosen = without_seed(rows[0].knobs)  # if only seeds vary, there is nothing to choose
    says_more = options.source or options.data or design  # verdicts and effects say more than the order
    if chosen and not says_more and not scored.is_validation:
        print(f"the best:\n{shell_words(chosen)}")
    return int(any(job.state == "failed" for job in jobs))


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
