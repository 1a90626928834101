"""
Finished runs, read back from disk and checked, and the differences between them.

A run RUN_ID is four files in logs/: RUN_ID.json (the result), RUN_ID.docs.npz (the scores of every document),
RUN_ID.events.jsonl (its reports, for programs) and RUN_ID.txt (the source that ran, then its reports for people). All
are untrusted until checked, and must agree. In a record folder they are train_seedN.json, .docs.npz and .log; the .log
holds the text, a line "events:" and the events.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.events import MAX_BYTES as MAX_EVENT_BYTES
from tools.events import Event, named, read_events
from tools.values import (
    any_text,
    digest,
    missing_or_wrong,
    number,
    optional,
    parse_object,
    share,
    table_of,
    text,
    whole,
)
from tools.welch import two_sided
from train_gpt import LOGS, MAX_RANKS, DataError

MAX_UNPACKED_BYTES = 1 << 28  # of a .docs.npz: six million documents
MAX_LOG_BYTES = 1 << 27  # of a log: source, lines for people and, in a record, events
MAX_RESULT_BYTES = 1 << 24  # of a .json: the losses of 300,000 steps
MAX_ENTRIES = 64  # in a .docs.npz, which has six
MAX_OF_A_DOCUMENT = {"f": 1e15, "i": 1 << 40}  # keeps sums over all documents exact and finite
TOLERANCE = 1e-9  # relative; the order of a sum affects its last bits
RESAMPLES = 10_000
FEWEST = 10  # documents needed for an interval; one from fewer would be spurious
PER_DOCUMENT = {"nats": "f", "static_nats": "f", "tokens": "i", "bytes": "i", "updates": "i"}  # array -> its dtype kind
LATER_PER_DOCUMENT = {"prequant_nats": "f"}  # missing in runs of earlier versions or without training
RUN_AGAIN = "; a run of this version writes it; run it again"
FILES_OF_A_RUN = (".ptz", ".docs.npz", ".events.jsonl", ".txt")  # beside its .json
EVENTS_BELOW = b"\nevents:\n"  # in a record's log, between the text and the events


def is_history(value: Any) -> bool:
    """[[step, seconds, nats a token], ...]: steps rise, and seconds do not fall."""
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 3 for row in value):
        return False
    if not all(whole(step) and number(seconds) and number(loss) for step, seconds, loss in value):
        return False
    return all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(value))


def is_world(value: Any) -> bool:
    """A number of ranks."""
    return whole(value) and 0 < value <= MAX_RANKS


def is_readout(value: Any) -> bool:
    """The share of the average in the weights that are read out; earlier runs name it."""
    return share(value) or (text(value) and value in ("last", "half", "average"))


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
    "world_size": is_world,
    "device": text,
    "versions": text,
    "validation": digest,
    "knobs": table_of(any_text),
}
LATER_FIELDS = {"excess_bytes": whole}  # missing in results of earlier versions
TRAINING_FIELDS = {  # of a run that trained; a run with ARTIFACT has none of them
    "steps": whole,
    "train_tokens": whole,
    "epochs": number,
    "last_bpb": number,
    "prequant_bpb": number,
    "history": is_history,
    "train_seconds": number,
}
TRAIN_ONLY = "train_only"  # marks the result of tools/train_only.py, which is not a final score
TRAIN_ONLY_FIELDS = {  # all the fields of such a result
    name: (FIELDS | LATER_FIELDS | TRAINING_FIELDS)[name]
    for name in (
        *("run_id", "seed", "code_sha256", "code_bytes", "knobs", "world_size", "device", "versions", "phases"),
        *("documents", "tokens", "bytes", "excess_bytes", "validation", "prequant_bpb"),
        *("steps", "train_tokens", "epochs", "history", "train_seconds"),
    )
} | {
    TRAIN_ONLY: lambda value: value is True,
    "readout": is_readout,
    "tokens_per_s": number,
    "train_loss": optional(number),  # null if no step was logged
    "peak_memory_bytes": whole,  # of the GPU; 0 on a CPU
}
TRAIN_ONLY_PER_DOCUMENT = {"prequant_nats": "f", "tokens": "i", "bytes": "i"}


@dataclass(frozen=True)
class Run:
    """A finished run whose files agree with each other. Arrays are over the validation documents, in their order.

    In a train-only run, all scores are those before quantisation."""

    path: Path  # of the .json; log and docs_path lie beside it
    result: dict[str, Any]  # content of the .json, every field of FIELDS checked
    nats: np.ndarray  # (documents,) float64, sum over a document's targets, with adaptation
    static_nats: np.ndarray  # (documents,) float64, without adaptation
    tokens: np.ndarray  # (documents,) int64, targets
    bytes: np.ndarray  # (documents,) int64, bytes of original text
    updates: np.ndarray  # (documents,) int64, adaptation steps
    prequant_nats: np.ndarray | None  # (documents,) float64, before quantisation; None if the run has none
    validation: str  # sha256 over the validation tokens and bytes: equal for runs on the same documents

    @property
    def name(self) -> str:
        return self.result["run_id"]

    @property
    def trained(self) -> bool:
        """Whether the run trained, and so has TRAINING_FIELDS; if not, it scored an artifact."""
        return "steps" in self.result

    @property
    def train_only(self) -> bool:
        """Whether the run only trained: nothing was packed, read back or scored at the end."""
        return TRAIN_ONLY in self.result

    @property
    def recorded(self) -> bool:
        """Whether the run is in a record folder."""
        return self.path.name.startswith("train_seed") and not beside(self.path, ".txt").exists()

    @property
    def log(self) -> Path:
        """logs/RUN.txt, or train_seedN.log in a record folder."""
        return beside(self.path, ".log" if self.recorded else ".txt")

    @property
    def bpb(self) -> float:
        """Bits per byte, computed from the documents' nats and bytes, not taken from the result."""
        return bits_per_byte(self.nats, self.bytes)

    @property
    def static_bpb(self) -> float:
        return bits_per_byte(self.static_nats, self.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def source(self) -> bytes:
        """The train_gpt.py that ran; the log begins with it."""
        return read_part(self.log, MAX_LOG_BYTES)[: self.result["code_bytes"]]

    @functools.cached_property
    def log_text(self) -> str:
        """The log's text for people, which follows the source and an empty line: settings, progress, result."""
        content = read_part(self.log, MAX_LOG_BYTES)[self.result["code_bytes"] :].removeprefix(b"\n")
        if self.recorded:
            content = content.partition(EVENTS_BELOW)[0] + b"\n"
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.log.name}: not text: {error}") from None

    @functools.cached_property
    def events(self) -> list[Event]:
        """What the run reported, in order. Raises DataError if it is missing or damaged."""
        if not self.recorded:
            path = beside(self.path, ".events.jsonl")
            return read_events(read_part(path, MAX_EVENT_BYTES), path.name)

        _, found, content = read_part(self.log, MAX_LOG_BYTES)[self.result["code_bytes"] :].partition(EVENTS_BELOW)
        if not found:
            raise DataError(f"{self.log.name}: no events stand at its end")
        return read_events(content, self.log.name)

    def reported(self, name: str) -> list[dict[str, Any]]:
        """The values of every event of that name."""
        return named(name, self.events)

    def validations(self) -> list[tuple[int, float]]:
        """(step, bits per byte without adaptation) of every validation during training."""
        return [
            (event["step"], event["val_bpb"]) for event in self.reported("validate") if event["val_bpb"] is not None
        ]

    def phases(self) -> dict[str, tuple[float, str]]:
        """{phase: (seconds, clock)}; the clock is "training", "evaluation" or "-"."""
        return {event["name"]: (event["seconds"], event["clock"]) for event in self.reported("phase")}


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    return float(nats.sum() / math.log(2) / size.sum())


def beside(path: Path, suffix: str) -> Path:
    """logs/a.b.json -> logs/a.b<suffix>: a run's name may contain dots."""
    return path.with_name(path.name.removesuffix(".json") + suffix)


def load_run(name: str | Path, folder: Path = LOGS, train_only: bool = False) -> Run:
    """Load a run by its RUN_ID (in `folder`), or by the path of its .json or another of its files. A train-only run is
    refused unless `train_only`. Raises DataError if a file is missing or damaged, if a field is missing or of another
    kind, or if the files contradict each other; the message lists every contradiction."""
    path = result_path(str(name), folder)
    result = read_result(path, train_only)
    documents = read_documents(beside(path, ".docs.npz"), train_only)
    if train_only:
        nats = documents["prequant_nats"]
        documents |= {"nats": nats, "static_nats": nats, "updates": np.zeros(len(nats), np.int64)}
    run = Run(path, result, **documents)
    if wrong := disagreements(run):
        raise DataError(f"{path}: its files contradict each other: {'; '.join(wrong)}")
    return run


def result_path(name: str, folder: Path) -> Path:
    """The path of a run's .json, given its RUN_ID or the path of one of its files."""
    if name.endswith(".json"):
        return Path(name)
    named = folder / f"{name}.json"
    if not named.exists():
        stem = next((name.removesuffix(ending) for ending in FILES_OF_A_RUN if name.endswith(ending)), name)
        beside_it = Path(f"{stem}.json")
        if stem != name or beside_it.exists():
            return beside_it
    return named


def read_result(path: Path, train_only: bool = False) -> dict[str, Any]:
    """The checked content of a run's .json; `train_only` as for `load_run`."""
    result = read_table(path)
    if TRAIN_ONLY in result and not train_only:
        raise DataError(f"{path}: its run only trained (sweep --train-only): nothing was packed, and this is no score")
    if train_only:
        kinds = TRAIN_ONLY_FIELDS
    else:
        kinds = FIELDS | {name: kind for name, kind in LATER_FIELDS.items() if name in result}
        if TRAINING_FIELDS.keys() & result.keys():
            kinds |= TRAINING_FIELDS
    if wrong := missing_or_wrong(result, kinds):
        raise DataError(f"{path}: not the result of a run of this version: {wrong}")
    return result


def read_table(path: Path) -> dict[str, Any]:
    """A .json that may be the result of a run: names and unchecked values."""
    content = read_part(path, MAX_RESULT_BYTES)
    try:
        return parse_object(content)
    except ValueError as error:
        raise DataError(f"{path}: not the result of a run: {error}; remove it, or run again") from None


def read_part(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Pipes and devices, which might never end, are not read.
    Raises DataError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe without a writer must not block
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError(f"{path}: not a regular file")
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: the path has a null byte
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {error.args[-1]}{RUN_AGAIN}") from None
    if len(content) > most:
        raise DataError(f"{path}: more than {most} bytes, which no run writes")
    return content


def read_documents(path: Path, train_only: bool = False) -> dict[str, Any]:
    """The checked arrays of a .docs.npz, and `validation`; with `train_only`, of a train-only run."""
    content = read_part(path, MAX_UNPACKED_BYTES)
    needed = TRAIN_ONLY_PER_DOCUMENT if train_only else PER_DOCUMENT
    try:
        found = read_arrays(content, path, needed)
    except DataError:
        raise
    except Exception as error:  # zip, deflate and array headers each fail in their own ways
        raise DataError(f"{path}: not the scores of a run's documents: {type(error).__name__}: {error}") from None

    check_documents(path, found)
    validation = found.pop("validation")
    if validation.ndim or validation.dtype.kind != "U" or not digest(str(validation)):
        raise DataError(f"{path}: validation is not a sha256")
    return {"prequant_nats": None} | found | {"validation": str(validation)}


def read_arrays(content: bytes, path: Path, needed: Iterable[str]) -> dict[str, np.ndarray]:
    """The `needed` arrays of a .docs.npz by name, and those of LATER_PER_DOCUMENT if present. Sizes are checked before
    anything is unpacked."""
    if content.count(zipfile.stringCentralDir) > MAX_ENTRIES:
        raise DataError(f"{path}: more than {MAX_ENTRIES} entries, a run writes {len(PER_DOCUMENT) + 1}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_UNPACKED_BYTES:
            raise DataError(f"{path}: {size} bytes unpacked, at most {MAX_UNPACKED_BYTES} are expected")
        later = [name for name in LATER_PER_DOCUMENT if f"{name}.npy" in archive.namelist()]
        return {name: read_array(archive.read(f"{name}.npy")) for name in (*needed, *later, "validation")}


def read_array(content: bytes) -> np.ndarray:
    """Parse a .npy. Its header must account for all of its bytes: a shape may claim more than memory holds."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings(action="error"):  # a header that numpy has to repair is not ours
        shape, _, dtype = read_header(file)
    data = content[file.tell() :]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for {dtype} of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)


def check_documents(path: Path, found: dict[str, np.ndarray]) -> None:
    """Require one number per document in every array, of the right kind, finite and not negative."""
    count = found["tokens"].size
    known = PER_DOCUMENT | LATER_PER_DOCUMENT
    kinds = {name: kind for name, kind in known.items() if name in found}
    for name, kind in kinds.items():
        values = found[name]
        dtype = {"f": np.float64, "i": np.int64}[kind]
        if values.dtype != dtype or values.shape != (count,) or count == 0:
            raise DataError(f"{path}: {name} is {values.dtype} of shape {values.shape}, expected one number a document")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"{path}: {name} holds numbers that are negative or not finite")
        if values.max() > MAX_OF_A_DOCUMENT[kind]:
            raise DataError(f"{path}: {name} holds {values.max():g}, which no document has")


def disagreements(run: Run) -> list[str]:
    """Every number in the result that contradicts its documents, its source or other numbers."""
    result = run.result
    recomputed = {
        "documents": len(run.nats),
        "tokens": int(run.tokens.sum()),
        "bytes": int(run.bytes.sum()),
        "validation": run.validation,
    }
    if not run.train_only:
        recomputed |= {
            "code_sha256": hashlib.sha256(run.source).hexdigest(),
            "adaptation_steps": int(run.updates.sum()),
            "artifact_bytes": sum(result["artifact_parts"].values()),
            "total_bytes": result["artifact_bytes"] + result["code_bytes"],
        }
    wrong = [f"{name} is {result[name]}, found {value}" for name, value in recomputed.items() if result[name] != value]
    if not run.bytes.sum() or not run.tokens.sum():
        return [*wrong, "its documents stand for no text at all"]
    figures = {}
    if not run.train_only:
        figures = {"val_bpb": run.bpb, "static_bpb": run.static_bpb, "val_loss": run.loss}
    if run.prequant_nats is not None:
        if not run.trained:
            return [*wrong, "documents have scores before quantisation, but the run trained nothing"]
        figures["prequant_bpb"] = bits_per_byte(run.prequant_nats, run.bytes)
    for name, value in figures.items():
        if not math.isclose(result[name], value, rel_tol=TOLERANCE):
            wrong.append(f"{name} is {result[name]}, the documents give {value}")
    return wrong


# -----------------------------------------------------------------------------
# Two runs on the same documents


class Interval(NamedTuple):
    """A figure and its 95 % bootstrap interval; with too few documents, the interval is (-inf, inf)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.5f} {shown_interval(self.low, self.high)}"


def shown_interval(low: float, high: float) -> str:
    return f"[{low:+.5f}, {high:+.5f}]" if math.isfinite(high - low) else f"(fewer than {FEWEST} documents)"


def require_same_documents(a: Run, b: Run, same_text: bool = False) -> None:
    """Raise DataError unless both scored the same documents and count the same bytes. With `same_text`, both are known
    to have held out the same documents, perhaps with different tokenizers: only each document's bytes must be equal."""
    if same_text and np.array_equal(a.bytes, b.bytes):
        return
    if a.validation != b.validation or not np.array_equal(a.bytes, b.bytes) or not np.array_equal(a.tokens, b.tokens):
        totals = " and ".join(f"{r.name}: {len(r.nats)} documents, {r.bytes.sum()} bytes" for r in (a, b))
        raise DataError(
            f"these runs scored different documents ({totals}): no document pairs with another; score both "
            "artifacts on one DATA_PATH"
        )


def differences(
    base: Run, others: list[Run], seed: int = 0, chosen: np.ndarray | None = None, same_text: bool = False
) -> list[Interval]:
    """bpb of every other run minus bpb of `base`, each with a paired 95 % interval: see `ratio_intervals`. Over all
    documents, or those in the mask `chosen` (documents,). All runs must have scored the same documents."""
    for other in others:
        require_same_documents(base, other, same_text)
    keep = slice(None) if chosen is None else chosen
    gaps = np.stack([other.nats[keep] - base.nats[keep] for other in others], 1) / math.log(2)
    return ratio_intervals(gaps, base.bytes[keep], seed)


class OverSeeds(NamedTuple):
    """The mean of a difference over seeds, and its 95 % interval."""

    value: float
    spread: float  # standard deviation over seeds; nan for a single seed
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        spread = f" ± {self.spread:.5f}" if self.seeds > 1 else ""
        return f"{self.value:+.5f}{spread} {shown_interval(self.low, self.high)}"


def over_seeds(gaps: np.ndarray, size: np.ndarray) -> OverSeeds:
    """The mean difference in bpb over seeds. gaps (documents, seeds) are the bits by which the two runs of each seed
    differ, size (documents,) the bytes.

    Documents and seeds are sampled independently, so their errors add in quadrature: the bootstrap interval over
    documents of the mean over seeds, and Student's t of the seeds' differences. A single seed tells nothing about
    others: the interval is then the one over documents."""
    by_seed = gaps.sum(0) / size.sum()
    seeds = len(by_seed)
    (mean,) = ratio_intervals(gaps.mean(1, keepdims=True), size, 0)
    if seeds == 1:
        return OverSeeds(mean.value, math.nan, mean.low, mean.high, 1)

    spread = float(np.std(by_seed, ddof=1))
    reach = two_sided(0.95, seeds - 1) * spread / math.sqrt(seeds)
    low = mean.value - math.hypot(mean.value - mean.low, reach)
    high = mean.value + math.hypot(mean.high - mean.value, reach)
    return OverSeeds(mean.value, spread, low, high, seeds)


def ratio_intervals(parts: np.ndarray, size: np.ndarray, seed: int, resamples: int = RESAMPLES) -> list[Interval]:
    """sum(parts) / sum(size) for k figures over n documents, parts (n, k) and size (n,), each with its 95 % percentile
    bootstrap interval (Efron & Tibshirani 1993, ch. 13): documents are drawn with replacement, the same draws for every
    figure, and each draw gives a ratio of sums (a draw without any bytes is divided by 1). Fewer than FEWEST documents
    give no interval: all draws of a single document would be equal."""
    if len(size) < FEWEST:
        return [Interval(float(value), -math.inf, math.inf) for value in parts.sum(0) / size.sum()]
    columns = np.column_stack([parts, size]).astype(np.float64)
    generator = np.random.default_rng(seed)
    n, k = parts.shape
    ratios = np.empty((resamples, k))
    rows_at_once = max(1, (1 << 22) // n)  # at most 32 MB of counts

    for start in range(0, resamples, rows_at_once):
        rows = min(rows_at_once, resamples - start)
        drawn = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        sums = counts @ columns  # (rows, k + 1)
        ratios[start : start + rows] = sums[:, :k] / np.maximum(sums[:, k:], 1.0)

    low, high = np.percentile(ratios, (2.5, 97.5), axis=0)
    return [Interval(*map(float, triple)) for triple in zip(parts.sum(0) / size.sum(), low, high, strict=True)]


def ratio_and_error(parts: np.ndarray, size: np.ndarray) -> tuple[float, float]:
    """sum(parts) / sum(size) over n documents, parts (n,) and size (n,), and the standard error of this ratio estimator
    (Cochran 1977, section 2.11), with documents as the sample."""
    ratio = parts.sum() / size.sum()
    return float(ratio), math.sqrt(((parts - ratio * size) ** 2).sum()) / float(size.sum())


def length_groups(tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Group documents by length: tokens (documents,) -> (label, mask) of every octave that is not empty."""
    octaves = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    return [(f"{1 << i}-{(2 << i) - 1}", octaves == i) for i in np.unique(octaves).tolist()]
