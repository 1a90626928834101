"""Opens an artifact as a scoring run would; and how every tool exits."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt
from tools.results import read_table
from tools.values import any_text, printable, table_of

SYSTEM = ("TTT_PARAMS", "TTT_SCOPE", "TTT_OPTIMIZER")  # knobs that decide which other TTT_ knobs apply


class Opened(NamedTuple):
    """An artifact, ready to score."""

    env: dict[str, str]  # the environment in which `python train_gpt.py` scores it the same way
    setup: train_gpt.Setup  # knobs, device, tokenizer and validation
    model: train_gpt.GPT


def open_artifact(path: Path | str, changes: Mapping[str, str] | None = None) -> Opened:
    """Open an artifact and its validation set. A knob comes from `changes` ({"DEVICE": "cpu", ...}), else from the
    environment, else from the result of the artifact's own run, else from its default. Raises UserError."""
    path = Path(path)
    env = knobs_of_run(path, os.environ) | dict(os.environ) | {"RESUME": ""} | dict(changes or {})
    env["ARTIFACT"] = str(path)
    config, run = train_gpt.read_env(env)
    dist = train_gpt.Dist.from_env(run.device)
    dist.join()
    setup = train_gpt.make_setup(config, run, dist)
    model = train_gpt.load_artifact(path, setup)
    return Opened(env, setup, model)


def result_path(artifact: Path) -> Path:
    """Where the result of the run that wrote an artifact lies: logs/RUN.json for logs/RUN.ptz."""
    return artifact.parent / f"{artifact.stem}.json"


def result_beside(artifact: Path) -> dict[str, Any]:
    """The result of the run that wrote an artifact; empty if there is none. It may be from an older version: nothing in
    it is checked."""
    path = result_path(artifact)
    return read_table(path) if path.exists() else {}


def knobs_of_run(artifact: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The knobs in the result of the artifact's own run; without its TTT_ knobs if `env` chooses another kind of
    adaptation, to which they may not apply."""
    knobs = result_beside(artifact).get("knobs", {})
    is_table = table_of(any_text)
    path = result_path(artifact)
    train_gpt.require(is_table(knobs), f"{path}: its knobs are not texts by name", train_gpt.DataError)
    knobs = checked_knobs(knobs, str(path))
    another_system = any(env.get(name, knobs.get(name)) != knobs.get(name) for name in SYSTEM)
    return {name: value for name, value in knobs.items() if not (another_system and name.startswith("TTT_"))}


def checked_knobs(stored: Mapping[str, str], what: str) -> dict[str, str]:
    """The knobs among the names stored in the file `what`, each with a valid value. Other names are dropped: in a
    process's environment they could make it run a program (PYTHONWARNINGS, LD_PRELOAD). So are retired knobs, from runs
    of older versions. Raises DataError, which names the file."""
    knobs = {name: value for name, value in stored.items() if name in train_gpt.KNOBS}
    try:
        train_gpt.read_knobs({name: value for name, value in stored.items() if name not in train_gpt.RETIRED})
    except train_gpt.ConfigError as error:
        raise train_gpt.DataError(f"{what}: {error}") from None
    return knobs


def find_artifact(given: str | None) -> Path:
    """The artifact given as an argument, else the environment's ARTIFACT, else the newest of logs/*.ptz, which a line
    on stderr names."""
    named = given or os.environ.get("ARTIFACT")
    if named:
        return Path(named)
    found = sorted(train_gpt.LOGS.glob("*.ptz"), key=lambda path: path.stat().st_mtime)
    train_gpt.require(bool(found), f"no artifact is named, and {train_gpt.LOGS}/ holds none", train_gpt.UserError)
    print(printable(f"artifact: {found[-1]}, the newest in {train_gpt.LOGS}/"), file=sys.stderr, flush=True)
    return found[-1]


CUT_OFF = 141  # exit status when the reader of the output has gone, as after SIGPIPE


def end_in_a_line(work: Callable[[], int]) -> int:
    """-> exit status: the one from `work`; 2, with one line, for an error that the user can fix; 130 if interrupted;
    141 if the reader of the output has gone."""
    open_closed_streams()
    escape_what_cannot_be_encoded()
    end_as_by_ctrl_c()
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()  # here, because a failure at interpreter exit prints a traceback
    except BrokenPipeError:
        drop_what_nobody_reads()
        return CUT_OFF
    except train_gpt.FOR_THE_USER as error:
        print(train_gpt.error_line(error), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return train_gpt.INTERRUPTED


def end_as_by_ctrl_c() -> None:
    """From now on, SIGTERM and SIGHUP (the terminal closes) interrupt this process like Ctrl-C, so that it ends what it
    started and removes its temporary files. A signal that is ignored, as under nohup, stays ignored."""
    for number in train_gpt.ending_signals():
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def drop_what_nobody_reads() -> None:
    """Discard unwritten output once its reader has gone: writing it would fail again at interpreter exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed_streams() -> None:
    """Open missing output streams as /dev/null. If a process is started without one (`>&-`), Python sets it to None,
    which cannot be written to, and the next file opened would take its descriptor."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  stays open to the end


def escape_what_cannot_be_encoded() -> None:
    """On a terminal that is not UTF-8, print characters that it lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
