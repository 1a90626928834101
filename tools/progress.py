"""Progress of long work, for people who wait for it."""

from __future__ import annotations

import sys
import time

from train_gpt import SECONDS_BETWEEN_REPORTS, printable

INTERVAL_S = SECONDS_BETWEEN_REPORTS  # between two lines


class Progress:
    """Reports progress and the estimated time left to stderr, every INTERVAL_S seconds."""

    def __init__(self, what: str, total: int, unit: str = "tokens"):
        self.what = what
        self.total = total  # in `unit`
        self.unit = unit
        self.started = time.monotonic()
        self.reported = self.started

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.reported < INTERVAL_S or done in (0, self.total):
            return
        self.reported = now
        spent = now - self.started
        left = (self.total - done) * spent / done
        speed = f"{done / spent:,.1f} a second, {left:.0f} s left"
        print(printable(f"{self.what}: {done:,} of {self.total:,} {self.unit}, {speed}"), file=sys.stderr, flush=True)
