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
import fcntl
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import train_gpt
from tools import ask_source
from tools import train_only as train_only_job
from tools.artifact import end_in_a_line
from tools.finished import find_finished, keep_results
from tools.grid import knob_names, parse_file, parse_grid, shell_words, without_seed
from tools.jobs import Job, choose_documents, given, make_jobs, name_runs, require_training_knobs
from tools.processes import python_command
from tools.ranking import rank, write_results
from tools.scheduler import Command, Sweep, device_slots
from tools.screening import Design, make_design, parse_factors
from tools.sources import find_sources
from tools.texts import find_texts
from train_gpt import LOGS, ConfigError, UserError, require

SWEEPS = LOGS / "sweeps"
LONGEST_NAME = 200  # of a sweep's name, in characters: file systems allow 255


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # run.sh looks for some options itself
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
    parser.add_argument("--on", choices=("holdout", "validation"), default="holdout", help=documents)
    parser.add_argument("--name", help="folder in logs/sweeps [the names of the knobs, or the file's]")
    sources = "train_gpt.py files or git revisions, the first of which the others are compared with"
    parser.add_argument("--source", metavar="A.py,B.py", help=sources)
    parser.add_argument("--jobs", type=int, metavar="N", help="at once [as many as fit; with --launcher 1]")
    parser.add_argument("--launcher", default="", metavar="WORDS", help="what stands before every job's command")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs are looked for and left, too")
    parser.add_argument("--gpus", type=int, default=1, help="of one job, whose ranks are started here [%(default)s]")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    require(options.gpus > 0, f"--gpus {options.gpus}: at least 1")
    if options.data is not None:
        require(not options.eval, "--data trains on each, and --eval does not: give one of them")
        require(options.on == "holdout", "--data scores held-out training documents: leave --on out")
        require(options.screen is None, "--data and --screen: give one of them")
    if options.screen is not None:
        require(bool(options.grid), "--screen: give its factors, NAME=base,other ...")
        require(
            not options.eval, "--screen tells effects before quantisation, where --eval has no score: leave one out"
        )
        require("," not in (options.source or ""), "--screen: give one source; two are a race")
    if options.train_only:
        require(not options.eval, "--train-only trains, and --eval does not: give one of them")
        require(options.on == "holdout", "--train-only scores held-out training documents: leave --on out")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. A grid word after --screen is not taken for its number."""
    words = list(arguments)
    empty = any(word == "" or re.fullmatch("--[a-z-]+=", word) for word in words)
    require(not empty, "an argument is empty: is a variable in it unset?")
    for i, word in enumerate(words):
        number_follows = i + 1 < len(words) and words[i + 1].isdigit()
        if word == "--screen" and not number_follows:
            words[i] = "--screen=0"
    options = command_line().parse_intermixed_args(words)
    check_options(options)
    return options


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


def launcher_words(text: str) -> list[str]:
    """The words before every job's command. Raises ConfigError if they cannot be started."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--launcher {text!r}: {error}") from None
    found = not text or (words and shutil.which(words[0]))
    require(bool(found), f"--launcher {text!r}: its first word is no program that can be found")
    return words


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


def job_command(options: argparse.Namespace, launcher: Sequence[str]) -> Command:
    """How the jobs of a sweep are started. A waiting job is told to begin through its standard input; a launcher or
    torchrun may not pass that on, so with these no job starts ahead."""
    words = [*launcher, *python_command(options.gpus)]
    if not options.train_only:
        return Command(words)
    return Command([*words, train_only_job.__file__], train_only=True, ahead=options.gpus == 1 and not launcher)


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


def command_given(jobs: list[Job], arguments: Sequence[str]) -> str:
    """The shell command that repeats this sweep, including the knobs set in the environment."""
    knobs = train_gpt.KNOBS.keys() | {name for job in jobs for name in job.settings}
    said = shell_words({name: value for name, value in given().items() if name in knobs})
    return f"{said} {shlex.join(['./run.sh', 'sweep', *arguments])}".strip()


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
