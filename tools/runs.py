"""
Finished runs, read back from the disk and checked, and what two of them differ by.

A run RUN_ID is three files in logs/: RUN_ID.json (the result), RUN_ID.docs.npz (scores of every document) and
RUN_ID.txt (the log, which begins with the source that ran). All are hostile until checked, and must agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train_gpt import LOGS, DataError, read_file

MAX_UNPACKED_BYTES = 1 << 28  # of a .docs.npz: six million documents
TOLERANCE = 1e-9  # relative; sums in another order differ in their last bits
RESAMPLES = 10_000
PER_DOCUMENT = {"nats": "f", "static_nats": "f", "tokens": "i", "bytes": "i", "updates": "i"}  # and their kinds


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def number(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value <= sys.float_info.max


def text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def table_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def is_history(value: Any) -> bool:
    """[[step, seconds, nats a token], ...], steps and seconds rising."""
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 3 for row in value):
        return False
    if not all(whole(row[0]) and number(row[1]) and number(row[2]) for row in value):
        return False
    return all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(value[:-1], value[1:], strict=True))


FIELDS = {
    "run_id": text,
    "seed": whole,
    "code_sha256": digest,
    "val_bpb": number,
    "val_loss": number,
    "static_bpb": number,
    "documents": whole,
    "tokens": whole,
    "bytes": whole,
    "adaptation_steps": whole,
    "doc_independent": whole,
    "degraded_documents": whole,
    "eval_seconds": number,
    "phases": table_of(number),
    "artifact_bytes": whole,
    "code_bytes": whole,
    "total_bytes": whole,
    "artifact_parts": table_of(whole),
    "world_size": whole,
    "device": text,
    "versions": text,
    "validation": digest,
    "knobs": table_of(lambda value: isinstance(value, str)),
}
TRAINING_FIELDS = {  # of a run that trained; one with ARTIFACT has none of them
    "steps": whole,
    "train_tokens": whole,
    "epochs": number,
    "last_bpb": number,
    "prequant_bpb": number,
    "history": is_history,
    "train_seconds": number,
}


@dataclass(frozen=True)
class Run:
    """A finished run whose files agree with each other. Arrays are over the validation documents, in their order."""

    path: Path  # of the .json; log and docs_path lie beside it
    result: dict[str, Any]  # what the .json holds, every field of FIELDS checked
    nats: np.ndarray  # (documents,) float64, sum over a document's targets, with adaptation
    static_nats: np.ndarray  # (documents,) float64, without adaptation
    tokens: np.ndarray  # (documents,) int64, targets
    bytes: np.ndarray  # (documents,) int64, bytes of original text
    updates: np.ndarray  # (documents,) int64, adaptation steps
    validation: str  # sha256 over the validation tokens and bytes: equal for runs on the same documents

    @property
    def name(self) -> str:
        return self.result["run_id"]

    @property
    def trained(self) -> bool:
        """Whether the run trained, and has TRAINING_FIELDS; or else scored an artifact."""
        return "steps" in self.result

    @property
    def log(self) -> Path:
        """logs/RUN.txt, or in a record folder train_seedN.log."""
        text = beside(self.path, ".txt")
        recorded = self.path.name.startswith("train_seed") and not text.exists()
        return beside(self.path, ".log") if recorded else text

    @property
    def bpb(self) -> float:
        """Bits per byte from the documents' nats and bytes, not from what the result claims."""
        return bits_per_byte(self.nats, self.bytes)

    @property
    def static_bpb(self) -> float:
        return bits_per_byte(self.static_nats, self.bytes)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def source(self) -> bytes:
        """The train_gpt.py that ran, as the log begins with it."""
        return read_file(self.log)[: self.result["code_bytes"]]

    @functools.cached_property
    def log_lines(self) -> list[str]:
        """The log after the source: settings, progress, result."""
        return read_file(self.log)[self.result["code_bytes"] :].decode("utf-8", "replace").splitlines()

    def validations(self) -> list[tuple[int, float]]:
        """(step, bits per byte without adaptation) of every validation during training."""
        found = (re.match(r"step:(\d+) val_bpb:(\d+\.\d+) ", line) for line in self.log_lines)
        return [(int(match[1]), float(match[2])) for match in found if match]


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    return float(nats.sum() / math.log(2) / size.sum())


def beside(path: Path, suffix: str) -> Path:
    """logs/a.b.json -> logs/a.b<suffix>: a run's name may hold dots."""
    return path.with_name(path.name.removesuffix(".json") + suffix)


def load_run(name: str | Path, folder: Path = LOGS) -> Run:
    """A run by its RUN_ID (in `folder`) or the path of its .json. Raises DataError where a file is missing or damaged,
    a field is missing or of another kind, or the files contradict each other; the message lists every contradiction."""
    path = Path(name) if str(name).endswith(".json") else folder / f"{name}.json"
    result = read_result(path)
    run = Run(path, result, **read_documents(beside(path, ".docs.npz")))
    if wrong := disagreements(run):
        raise DataError(f"{path}: its files contradict each other: {'; '.join(wrong)}")
    return run


def read_result(path: Path) -> dict[str, Any]:
    """The checked content of a .json."""
    content = read_file(path)
    try:
        result = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the result of a run: {error}") from None
    if not isinstance(result, dict):
        raise DataError(f"{path}: not the result of a run: expected a table of its figures")
    expected = FIELDS | (TRAINING_FIELDS if TRAINING_FIELDS.keys() & result.keys() else {})
    if missing := [name for name in expected if name not in result]:
        raise DataError(f"{path}: not the whole result of a run of this version: it lacks {', '.join(missing)}")
    for name, valid in expected.items():
        if not valid(result[name]):
            raise DataError(f"{path}: {name} is {str(result[name])[:60]!r}, which no run writes")
    return result


def read_documents(path: Path) -> dict[str, Any]:
    """The checked arrays of a .docs.npz, and `validation`."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_UNPACKED_BYTES:
            raise DataError(f"{path}: {size} bytes unpacked, at most {MAX_UNPACKED_BYTES} are expected")
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in (*PER_DOCUMENT, "validation")}
    except OSError as error:
        hint = "a run of this version writes it; run it again"
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; {hint}") from None
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not the scores of a run's documents: {error}") from None
    count = len(found["nats"]) if found["nats"].ndim else 0
    for name, kind in PER_DOCUMENT.items():
        values = found[name]
        if values.dtype != {"f": np.float64, "i": np.int64}[kind] or values.shape != (count,) or not count:
            raise DataError(f"{path}: {name} is {values.dtype} of shape {values.shape}, expected one number a document")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"{path}: {name} holds numbers that are negative or not finite")
    validation = found["validation"]
    if validation.ndim or validation.dtype.kind != "U" or not digest(str(validation)):
        raise DataError(f"{path}: validation is not a sha256")
    return found | {"validation": str(validation)}


def disagreements(run: Run) -> list[str]:
    """Every number of the result that its documents, its log or its other numbers contradict."""
    result = run.result
    recomputed = {
        "documents": len(run.nats),
        "tokens": int(run.tokens.sum()),
        "bytes": int(run.bytes.sum()),
        "adaptation_steps": int(run.updates.sum()),
        "validation": run.validation,
        "artifact_bytes": sum(result["artifact_parts"].values()),
        "total_bytes": result["artifact_bytes"] + result["code_bytes"],
        "code_sha256": hashlib.sha256(run.source).hexdigest(),
    }
    wrong = [f"{name} is {result[name]}, found {value}" for name, value in recomputed.items() if result[name] != value]
    if not run.bytes.sum() or not run.tokens.sum():
        return [*wrong, "its documents stand for no text at all"]
    for name, value in (("val_bpb", run.bpb), ("static_bpb", run.static_bpb), ("val_loss", run.loss)):
        if not math.isclose(result[name], value, rel_tol=TOLERANCE):
            wrong.append(f"{name} is {result[name]}, the documents give {value}")
    return wrong


# -----------------------------------------------------------------------------
# Two runs on the same documents


class Interval(NamedTuple):
    """A figure and the 95 % interval that the bootstrap gives it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.5f} [{self.low:+.5f}, {self.high:+.5f}]"


def require_same_documents(a: Run, b: Run) -> None:
    """Raise DataError unless both scored the same documents and count the same bytes."""
    if a.validation != b.validation or not np.array_equal(a.bytes, b.bytes) or not np.array_equal(a.tokens, b.tokens):
        totals = " and ".join(f"{r.name}: {len(r.nats)} documents, {r.bytes.sum()} bytes" for r in (a, b))
        raise DataError(
            f"these runs scored different documents ({totals}): no document pairs with another; score both "
            "artifacts on one DATA_PATH"
        )


def differences(base: Run, others: list[Run], seed: int = 0, chosen: np.ndarray | None = None) -> list[Interval]:
    """bpb of every other run minus that of `base`, in all documents or those of the mask `chosen` (documents,), with a
    paired 95 % interval: see `ratio_intervals`. All must have scored the same documents."""
    for other in others:
        require_same_documents(base, other)
    keep = slice(None) if chosen is None else chosen
    gaps = np.stack([other.nats[keep] - base.nats[keep] for other in others], 1) / math.log(2)
    return ratio_intervals(gaps, base.bytes[keep], seed)


def ratio_intervals(parts: np.ndarray, size: np.ndarray, seed: int, resamples: int = RESAMPLES) -> list[Interval]:
    """sum(parts) / sum(size) of k figures over n documents, parts (n, k) and size (n,), each with the percentile
    bootstrap's 95 % interval (Efron & Tibshirani 1993, ch. 13): documents are drawn with replacement, the same draws
    for every figure, and the ratio of sums is taken anew (a draw of no bytes at all is divided by 1)."""
    columns, draws = np.column_stack([parts, size]).astype(np.float64), np.random.default_rng(seed)
    n, k = parts.shape
    ratios, at_once = np.empty((resamples, k)), max(1, (1 << 22) // n)  # 32 MB of counts at a time
    for begin in range(0, resamples, at_once):
        rows = min(at_once, resamples - begin)
        drawn = draws.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        sums = counts @ columns  # (rows, k + 1)
        ratios[begin : begin + rows] = sums[:, :k] / np.maximum(sums[:, k:], 1.0)
    low, high = np.percentile(ratios, (2.5, 97.5), axis=0)
    return [Interval(*map(float, triple)) for triple in zip(parts.sum(0) / size.sum(), low, high, strict=True)]


def length_groups(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Documents by length, (documents,) targets -> (label, mask) of every octave that holds any."""
    octaves = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    return [(f"{1 << i}-{(2 << i) - 1}", octaves == i) for i in np.unique(octaves).tolist()]
