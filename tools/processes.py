"""How processes are started: those of several ranks, and those that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # of prctl(2)


def ends_with_its_parent(by: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """What a process that this one starts must call first, so that it gets the signal `by` once this one is gone,
    however that was ended: `preexec_fn` of subprocess.Popen, or the initializer of forked workers. None where the
    system is not Linux; there, what must not run twice needs a lock, too."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: little may be done between fork and exec
    parent = os.getpid()

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:  # it was gone before it could be asked
            os._exit(1)

    return ask


def torchrun(ranks: int) -> list[str]:
    """What stands between Python and a script that is to run as so many ranks. Where SIGHUP is ignored, as under nohup,
    torchrun is told to leave it so: it would end the run when the terminal closes."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        words.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    return words
