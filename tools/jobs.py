"""The jobs of a sweep: one per combination, source and text, each with its settings, documents and run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt
from tools import ask_source
from tools import train_only as train_only_job
from tools.artifact import knobs_of_run
from tools.grid import knob_names, shell_words
from tools.holdout import held_out_by, score_holdout
from tools.results import Run
from tools.sources import REPOSITORY, Source, ask
from tools.texts import Text
from train_gpt import LOGS, require

RUN_SH = REPOSITORY / "run.sh"
SAME_DOCUMENTS = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "HOLDOUT_TOKENS")  # what determines the documents
APART = {  # knobs that no sweep may vary, and why
    "RUN_ID": "every combination gets one of its own",
    "ARTIFACT": "give it as --eval ARTIFACT",
    "RESUME": "every combination starts anew",
} | dict.fromkeys(SAME_DOCUMENTS, "all combinations must score the same documents; set it in the environment")
ONLY_TRAINING = ("Model", "Budget", "Data", "Optimizer", "Quantisation")  # groups of knobs
NOT_TRAINING = ("Quantisation", "Test-time training")


@dataclass
class Job:
    """One combination, its run and its progress."""

    knobs: dict[str, str]  # what the sweep sets, including the name of the source
    env: dict[str, str]
    source: Source
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # all knobs of its run
    deciding: dict[str, str] = dataclasses.field(default_factory=dict)  # those of them that its result depends on
    documents: dict = dataclasses.field(default_factory=dict)  # identifies documents, tokenizer and training data
    gpus: int = 1
    artifact: str = ""  # sha256 of the artifact to score; empty if the job trains
    run_id: str = ""
    state: str = "waiting"  # waiting | running | done | failed
    at: str = ""  # progress, in words
    bpb: float | None = None  # the latest that the run has reported
    phase_ends: float | None = None  # when the current phase is expected to end, by time.monotonic()
    run: Run | None = None  # once it is done

    @property
    def label(self) -> str:
        return shell_words(self.knobs)

    @property
    def eta(self) -> float | None:
        """Seconds left in the current phase, as far as the run has said."""
        return None if self.phase_ends is None else max(0.0, self.phase_ends - time.monotonic())

    def file(self, suffix: str) -> Path:
        return LOGS / f"{self.run_id}{suffix}"

    def finish(self, run: Run, at: str) -> None:
        self.run = run
        self.state = "done"
        self.at = at
        self.bpb = run.bpb


# -----------------------------------------------------------------------------
# Settings


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
        jobs.append(Job(source.knobs() | text.knobs() | knobs, env, source, gpus=gpus))
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


# -----------------------------------------------------------------------------
# Documents and names


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
    if on == "holdout":
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
    if on == "holdout":
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
        job.deciding = {name: value for name, value in job.settings.items() if name not in ineffective}
        facts = [job.deciding, job.source.sha256, job.documents, digest, gpus, *kind]
        identity = json.dumps(facts, sort_keys=True, allow_nan=False)
        name = hashlib.sha256(identity.encode()).hexdigest()[:12]
        if job.source.name:
            name = f"{job.source.sha256[:8]}-{name}"
        job.run_id = f"{folder.relative_to(LOGS)}/{name}"
        job.artifact = digest
        job.env |= {"RUN_ID": job.run_id}
        first = seen.setdefault(job.run_id, job)
        require(first is job, f"{first.label} and {job.label} are the same combination")
