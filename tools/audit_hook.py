"""
Run a Python program and report what it opened: `python -c SOURCE PROGRAM REPORT`, with this file's text as SOURCE.

This file is self-contained, so that the program cannot import any other code of this repository.
"""

import json
import os
import runpy
import sys
from pathlib import Path

GOES_OUTSIDE = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def mapped() -> set[str]:
    """Files mapped into this process: libraries open them without Python noticing."""
    maps = Path("/proc/self/maps")
    lines = os.fsdecode(maps.read_bytes()).split("\n") if maps.exists() else []
    names = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {os.path.realpath(name) for name in names if os.path.isfile(name)}


def watched(script: str, report: str) -> None:
    """Run a Python script as __main__; write to `report` the paths that it opened and its other outside accesses."""
    opened = set()

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))
        elif event in GOES_OUTSIDE:
            opened.add(f"{event}: {str(arguments[:2])[:200]}")

    sys.argv = [script]
    sys.addaudithook(hook)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(report).write_text(json.dumps(sorted(opened | mapped())))


if __name__ == "__main__":
    watched(*sys.argv[1:])
