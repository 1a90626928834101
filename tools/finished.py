"""The finished runs of a sweep: found again, checked against their jobs, and kept in another folder."""

from __future__ import annotations

from pathlib import Path

import train_gpt
from tools.jobs import Job
from tools.results import Run, beside, load_run
from tools.values import printable
from train_gpt import DataError, require

# Suffixes of the files of a run that a comparison reads. The log of a train-only run would add only the source, which
# is kept once for all runs.
KEPT = (".json", ".docs.npz", ".events.jsonl", ".txt")
KEPT_OF_TRAINING = KEPT[:3]
RESULTS = ("results.md", "results.csv", "results.png")


def find_finished(jobs: list[Job], kept: Path | None, train_only: bool = False) -> None:
    """Mark jobs as done whose run exists under its run_id, in logs/ or in the folder `kept`. A run that is damaged or
    belongs to another combination is run again."""
    for job in jobs:
        if kept is not None and not job.file(".json").exists():
            copy_run(kept / Path(job.run_id).name, job.file(""), train_only)
        if not job.file(".json").exists():  # not run yet, or interrupted
            continue
        try:
            run = load_finished(job, train_only)
        except DataError as error:
            print(printable(f"{job.label}: will be run again: {error}"), flush=True)
            continue
        job.finish(run, "before")


def load_finished(job: Job, train_only: bool = False) -> Run:
    """The run of a job whose process has ended. Raises DataError if its files are damaged or belong to another
    combination, if its result is not the one that it reported, or if the source or the artifact has been replaced
    meanwhile."""
    run = load_run(job.run_id, train_only=train_only)
    result = run.result
    same = result["code_sha256"] == job.source.sha256
    require(same, f"{run.path}: its copy of the source was changed meanwhile", DataError)
    swept = {"seed": str(int(job.knobs["SEED"]))} if "SEED" in job.knobs else {}
    expected = {"run_id": Path(job.run_id).name} | swept
    for name, value in expected.items():
        found = str(result[name]).rpartition("/")[2]  # a sweep of another name may have kept it
        require(found == value, f"{run.path}: its {name} is {found}, expected {value}", DataError)
    require_as_started(job, run)
    scored = result.get("artifact_sha256", job.artifact) if job.artifact else ""
    require(scored == job.artifact, f"{run.path}: it scored another artifact than the sweep began with", DataError)
    reported = run.reported("result")[-1:] if beside(run.path, ".events.jsonl").exists() else []
    require(reported in ([], [result]), f"{run.path}: it is not the result that its events report", DataError)
    return run


def require_as_started(job: Job, run: Run) -> None:
    """Raise DataError unless a run had the ranks, the knobs and the documents of its job: a launcher may set others."""
    ranks = run.result["world_size"]
    remedy = "give the GPUs of a job as --gpus, which starts its ranks"
    require(ranks == job.gpus, f"{run.path}: it ran on {ranks} ranks, expected --gpus {job.gpus}: {remedy}", DataError)
    for name, value in job.deciding.items():
        found = run.result["knobs"].get(name, value)
        decided = value == "auto"  # by the run
        require(decided or found == value, f"{run.path}: it ran with {name}={found}, expected {value}", DataError)
    documents = job.documents.get("validation", run.result["validation"])
    require(run.result["validation"] == documents, f"{run.path}: it scored other documents than the sweep's", DataError)


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
