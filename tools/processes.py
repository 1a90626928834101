"""How to start processes: several ranks, and children that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # of prctl(2)


def ends_with_its_parent(by: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """A function for a child process to call first, so that it gets the signal `by` when its parent ends for any
    reason: the `preexec_fn` of subprocess.Popen, or the initializer of forked workers. None if the system is not Linux;
    there, a process that must not run twice also needs a lock."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: little is safe between fork and exec
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:  # the parent ended before prctl was called
            os._exit(1)

    return ask


def python_command(ranks: int) -> list[str]:
    """The command that runs a script as this many ranks; the path of the script comes next."""
    return [sys.executable, *(torchrun(ranks) if ranks > 1 else [])]


def torchrun(ranks: int) -> list[str]:
    """The arguments between Python and a script that run it as this many ranks. If SIGHUP is ignored, as under nohup,
    torchrun is told to ignore it too: it would end the run when the terminal closes."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        words.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    return words
