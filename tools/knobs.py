"""
The knobs of train_gpt.py on a machine that may have none of its packages yet; ./run.sh asks before it installs them.

    python -m tools.knobs           refuses a knob of the environment that is misspelt or has a bad value
    python -m tools.knobs --help    lists the knobs
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from unittest import mock

# What train_gpt.py imports from elsewhere.
PACKAGES = (
    *("numpy", "sentencepiece", "zstandard"),
    *("torch", "torch.distributed", "torch.distributed.nn", "torch.nn", "torch.nn.functional"),
)


def import_entry() -> ModuleType:
    """train_gpt with stand-ins for its packages, of which its section on knobs uses none. Only for a process that needs
    nothing else: the stand-ins stay."""
    sys.modules |= {name: mock.MagicMock() for name in PACKAGES} | {"triton": None}
    return importlib.import_module("train_gpt")


def main(arguments: Sequence[str]) -> int:
    """-> exit status: 2 if a knob is refused. Values that do not go together are left to the run, which knows all."""
    entry = import_entry()
    if arguments:
        return entry.main(arguments)
    try:
        entry.read_knobs(os.environ)
    except entry.UserError as error:
        print(f"error: {entry.printable(str(error), entry.MOST_OF_AN_ERROR)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
