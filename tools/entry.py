"""Runs of a train_gpt.py, started as run.sh starts them: our own, or that of a record, which is not trusted."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from tools.processes import ends_with_its_parent, python_command
from tools.values import printable

LONGEST_LINE = 1 << 16  # bytes of output taken for one line


def ranks(env: Mapping[str, str]) -> int:
    """The number of processes of a run: one per GPU, or one on a CPU."""
    return 1 if env.get("DEVICE") == "cpu" else max(1, torch.cuda.device_count())


def run_entry(script: Path, env: Mapping[str, str], folder: Path) -> int:
    """Run a train_gpt.py on all GPUs, as run.sh does, with its output on the screen -> its exit status. If interrupted,
    wait for the run to end by itself."""
    command = [*python_command(ranks(env)), str(script)]
    process = subprocess.Popen(command, cwd=folder, env=dict(env), preexec_fn=ends_with_its_parent())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def run_foreign_entry(script: Path, env: Mapping[str, str], folder: Path) -> int:
    """As `run_entry`, for a train_gpt.py that is not ours: its output is marked, and cannot control the terminal."""
    process = subprocess.Popen(
        [*python_command(ranks(env)), str(script)],
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=ends_with_its_parent(),
    )
    with process:
        try:
            while line := process.stdout.readline(LONGEST_LINE):
                print(f"  | {printable(line.decode(errors='replace').rstrip())}", flush=True)
        except KeyboardInterrupt:
            process.wait()
            raise
    return process.returncode
