"""
Turn text into the contest's shards: documents, (CaseOps,) SentencePiece, uint16 tokens with BOS before every document.

    python data/prepare.py installed                      the documentation on this machine: nothing to download
    python data/prepare.py jsonl FILES... --val FILES...  your own: a JSON string, or an object with "text", a line
    python data/prepare.py contest --variant caseops      the contest's published shards
    python data/prepare.py contest --documents            the contest's published text, with a tokenizer of ours
    python data/prepare.py SOURCE --help                  every option [and its default]

Leaves <out>/datasets/<name>/ with fineweb_train_NNNNNN.bin, fineweb_val_NNNNNN.bin, fineweb_val_bytes_NNNNNN.bin and
manifest.json, and <out>/tokenizers/<name>.model. The side-car fineweb_val_bytes holds the bytes of original text behind
every validation token; those of a document add up to its UTF-8 length. A dataset appears whole or not at all.

Sections: CaseOps, Tokenizer, Documents, Installed text, Encoding, Shards, Text, Hub, Published shards, Command line.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import importlib
import inspect
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the entry lies
try:
    import numpy as np
    import sentencepiece
    import torch
    import zstandard

    from train_gpt import (
        BOS,
        SHARD_HEADER_INTS,
        SHARD_MAGIC,
        SHARD_VERSION,
        DataError,
        PieceBytes,
        UserError,
        contest_bytes,
        piece_bytes,
        read_shard,
        write_atomically,
    )
except ModuleNotFoundError as error:
    print(f"prepare: {error}; install requirements.txt, or start it as ./run.sh data", file=sys.stderr)
    sys.exit(2)

# -----------------------------------------------------------------------------
# CaseOps: a bijection that writes capitals as a marker and lower case, so that word, Word and WORD share their pieces.

TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001\ue002\ue003\ue004"
CASED = re.compile("(?<![A-Za-z])(?P<word>[A-Z][A-Za-z]*)|(?P<inner>[A-Z])|(?P<marker>[\ue001-\ue004])")
MARKED = re.compile("\ue004(?P<literal>.)|\ue002(?P<word>[a-z]+)|[\ue001\ue003](?P<letter>[a-z])", re.DOTALL)


@functools.lru_cache(1 << 16)
def mark_case(kind: str, text: str) -> str:
    """The marked spelling of a match of CASED; `inner` is a capital in a run of letters that began in lower case."""
    if kind == "marker":
        return ESCAPE + text
    if kind == "inner":
        return CAPNEXT + text.lower()
    if len(text) > 1 and text.isupper():
        return ALLCAPS + text.lower()
    return TITLE + text[0].lower() + re.sub("[A-Z]", lambda m: CAPNEXT + m[0].lower(), text[1:])


def encode_caseops(text: str) -> str:
    """Runs of ASCII letters in lower case behind their markers; a marker that stood in the text is escaped."""
    return CASED.sub(lambda m: mark_case(m.lastgroup, m[0]), text)


def decode_caseops(text: str) -> str:
    """The inverse: decode_caseops(encode_caseops(text)) == text."""
    return MARKED.sub(lambda m: m[m.lastgroup] if m.lastgroup == "literal" else m[m.lastgroup].upper(), text)


def utf8_sizes(text: str) -> np.ndarray:
    """UTF-8 bytes of every character, (len(text),) int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def caseops_bytes(text: str) -> np.ndarray:
    """Bytes of original text behind every character of encoded text, (len(text),) int64: a marker stands for none."""
    sizes = utf8_sizes(text)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes[(codes >= ord(TITLE)) & (codes <= ord(ESCAPE))] = 0
    if ESCAPE in text:
        literals = [m.start("literal") for m in MARKED.finditer(text) if m.lastgroup == "literal"]
        sizes[literals] = len(ESCAPE.encode())
    return sizes


# -----------------------------------------------------------------------------
# Tokenizer: a SentencePiece model, ours or given, hostile until checked.

SPACE = "\u2581"  # how SentencePiece writes a space; in text it could not be told from one
PROBE = f"  A b\t\r\n\u00bd \ufb01\u2026 e\u0301 \u00a0\u2003x\u200b\uff21 a{SPACE}b  "  # normalisation would change it
TOKENIZER_TEXT_BYTES = 100_000_000  # enough for stable merges; training holds about ten times this in memory


class Encoder(NamedTuple):
    """A checked tokenizer and what follows from it."""

    processor: sentencepiece.SentencePieceProcessor
    caseops: bool  # text is transformed first
    exact: bool  # decoding gives the very text back
    pieces: PieceBytes  # the contest's formula
    piece_sizes: np.ndarray  # (V,) int64, UTF-8 bytes of normalised text that a piece covers
    byte_ids: list[int]  # (256,) the byte pieces


@functools.lru_cache(2)
def load_encoder(model: bytes, caseops: bool, name: str = "the tokenizer") -> Encoder:
    """Check a serialised model; cached, because a worker meets the same one with every batch."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise DataError(f"{name}: not a SentencePiece model; give one with --tokenizer, or train one with --vocab-size")
    size = processor.get_piece_size()
    if not 0 < size <= 1 << 16:
        raise DataError(f"{name}: {size} pieces, but tokens are uint16: at most 65,536; use a smaller tokenizer")
    if processor.bos_id() != BOS:
        raise DataError(f"{name}: its BOS is {processor.bos_id()}, expected {BOS}; train it with bos_id={BOS}")
    byte_ids = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    if not all(map(processor.is_byte, byte_ids)):
        raise DataError(f"{name}: without byte pieces some text has no tokens; train it with byte_fallback=true")
    sizes = np.array([1 if processor.is_byte(i) else len(processor.id_to_piece(i).encode()) for i in range(size)])
    pieces = piece_bytes(processor)
    encoder = Encoder(processor, caseops, True, pieces, np.where(pieces.control, 0, sizes), byte_ids)
    return encoder._replace(exact=processor.decode(text_tokens(encoder, PROBE)) == PROBE)


def text_tokens(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a transformed document. A real U+2581 is spelt in bytes if that is exact: else it becomes a space."""
    first, *others = text.split(SPACE) if encoder.exact else [text]
    tokens = encoder.processor.encode(first)
    for part in others:
        tokens += [encoder.byte_ids[value] for value in SPACE.encode()] + encoder.processor.encode(part)
    return tokens


def token_bytes(encoder: Encoder, text: str, text_bytes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Original bytes behind every token of a document, (n,) int64, adding up to those of the document.

    text is the transformed document, text_bytes (len(text),) what its characters stand for, tokens (n,) its tokens.
    SentencePiece tells where every normalised character came from. Bytes of a character that became several tokens go
    to these in order; text that normalisation removed goes to the token after it, or to the last.
    """
    normal, origins = encoder.processor.normalize(text, with_offsets=True)
    behind = np.concatenate([[0], np.cumsum(text_bytes)])[origins]  # (len(normal) + 1,) original bytes before each
    sizes = utf8_sizes(normal)
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of a byte in its character
    share = np.repeat(np.diff(behind), sizes) * inside // np.repeat(sizes, sizes)
    before = np.append(np.repeat(behind[:-1], sizes) + share, behind[-1])  # original bytes before each normalised byte
    ends = np.cumsum(encoder.piece_sizes[tokens])
    if ends[-1] != len(before) - 1:
        raise DataError(f"pieces cover {ends[-1]} bytes of {len(before) - 1}: the tokenizer does not fit its own text")
    bounds = before[ends]
    bounds[-1] = text_bytes.sum()
    return np.diff(bounds, prepend=0)


def train_tokenizer(parts: list[Part], vocab_size: int, caseops: bool) -> bytes:
    """Train BPE on training documents, the same share of every file. The same text gives the same model."""
    model, texts = io.BytesIO(), list(tokenizer_text(parts, caseops))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,  # exact
            split_by_unicode_script=not caseops,  # or the markers could not merge with the letters beside them
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            minloglevel=3,
            num_threads=4,
        )  # fixed, because the model records it
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip() or "there is too little of it"
        raise DataError(f"--vocab-size {vocab_size}: no tokenizer can be trained on this text: {reason}") from None
    return model.getvalue()


def tokenizer_text(parts: list[Part], caseops: bool) -> Iterator[str]:
    """Training documents, transformed; never one of validation."""
    training = [part for part in parts if not part.all_validation]
    for part in training:
        room = TOKENIZER_TEXT_BYTES // len(training)
        documents = (document for batch in read_batches([part]) for document in batch.documents())
        while room > 0 and (document := next(documents, None)):
            if document.text and not part.is_validation(document):
                room -= len(document.text.encode())
                yield encode_caseops(document.text) if caseops else document.text


# -----------------------------------------------------------------------------
# Documents: lines of JSON, read in batches; every document says for itself which split it belongs to.

BATCH_BYTES = 1 << 20
OPENERS = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".zst": lambda raw: io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)),
}


class Document(NamedTuple):
    where: str  # file:line
    number: int  # of its line, from 0
    text: str
    digest: int  # 64 bits that tell texts apart


class Part(NamedTuple):
    """A file of documents and its rule for the split."""

    path: str
    all_validation: bool = False
    first_validation: int = 0  # leading documents for validation
    hash_validation: int = 0  # documents whose digest lies below this are for validation

    def is_validation(self, document: Document) -> bool:
        return self.all_validation or document.number < self.first_validation or document.digest < self.hash_validation


class Batch(NamedTuple):
    """About BATCH_BYTES of consecutive lines."""

    part: Part
    first: int  # number of the first line, from 0
    lines: list[bytes]
    consumed: int  # bytes read of all files so far, as they lie there

    def documents(self) -> Iterator[Document]:
        for number, line in enumerate(self.lines, self.first):
            where = f"{self.part.path}:{number + 1}"
            text = parse_line(line, where)
            yield Document(where, number, text, text_digest(text))


def text_digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parse_line(line: bytes, where: str) -> str:
    want = 'expected a JSON string, or an object with a string "text"'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {want}") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{where}: {line.strip()[:60]!r}; {want}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: no UTF-8 for character {error.start} ({error.reason}); mend or remove it") from None
    return text


def read_batches(parts: Iterable[Part]) -> Iterator[Batch]:
    """All files in order; a batch never spans two."""
    before = 0
    for part in parts:
        first, name = 0, part.path
        try:
            with open(name, "rb") as raw, OPENERS.get(Path(name).suffix, contextlib.nullcontext)(raw) as source:
                while lines := source.readlines(BATCH_BYTES):
                    yield Batch(part, first, lines, before + raw.tell())
                    first += len(lines)
                before += raw.tell()
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{name}: after {first} lines: {error}; a damaged file must be fetched again") from None


def file_parts(patterns: list[str], **rule: Any) -> list[Part]:
    """Files by name or glob."""
    names = [name for pattern in patterns for name in (sorted(glob.glob(pattern, recursive=True)) or [pattern])]
    for name, times in Counter(names).items():
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file; give files or globs: .jsonl, .gz, .bz2, .zst")
        if times > 1:
            raise DataError(f"{name}: given {times} times; give it once")
    return [Part(name, **rule) for name in names]


# -----------------------------------------------------------------------------
# Installed text: documentation that lies on every machine which runs this. Sources are parsed, not imported, so nothing
# in them runs; only compiled things, which have no source, are asked in this process.

MIN_CHARACTERS = 200  # shorter docstrings are labels rather than text
APART = {
    "antigravity",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "test",
    "tests",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
}  # tests, jokes, and what some systems package apart from Python
COMPILED = (
    "builtins",
    "array",
    "binascii",
    "cmath",
    "itertools",
    "math",
    "time",
    "zlib",
    "numpy",
    "numpy.linalg",
    "numpy.random",
    "torch",
    "torch.fft",
    "torch.linalg",
    "torch.nn.functional",
    "torch.special",
)
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


def public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def parsed_docstrings(root: Path, package: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public modules, classes and functions in the sources of a package, or, without
    one, of the standard library."""
    for path in sorted(root.rglob("*.py")):
        names = [*filter(None, [package]), *path.relative_to(root).with_suffix("").parts]
        names = names[:-1] if names[-1] == "__init__" else names
        foreign = not package and not sys.stdlib_module_names.issuperset(names[:1] or [""])
        if foreign or APART & set(names) or not all(map(public, names)):
            continue
        found = []
        with warnings.catch_warnings(), contextlib.suppress(SyntaxError):  # some files are for other Pythons
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            found.append((".".join(names), ast.parse(path.read_bytes(), path.name)))
        while found:
            name, node = found.pop()
            if text := ast.get_docstring(node):
                yield name, text
            for inner in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
                if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and public(inner.name):
                    found.append((f"{name}.{inner.name}", inner))


def compiled_docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module's own functions, classes and their members, as they are in memory."""
    module, package = importlib.import_module(module_name), module_name.split(".")[0]
    for name in filter(public, dir(module)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking for a deprecated name is no use of it
            value = getattr(module, name)
        owner = str(getattr(value, "__module__", None) or package).split(".")[0]
        if inspect.ismodule(value) or not callable(value) or owner != package:
            continue
        members = vars(value).items() if inspect.isclass(value) else ()
        for qualified, item in [(name, value), *((f"{name}.{m}", v) for m, v in members if public(m))]:
            if isinstance(text := getattr(item, "__doc__", None), str):
                yield f"{module_name}.{qualified}", inspect.cleandoc(text)


def installed_documents() -> list[str]:
    """Every text once, in the order of names; the same for the same versions of Python, NumPy and torch."""
    if sys.flags.optimize >= 2:
        raise UserError("installed text: Python runs under -OO, which drops docstrings; run it without -OO")
    progress = Progress("reading installed documentation")
    topics = importlib.import_module("pydoc_data.topics").topics
    found = {f"pydoc_data.topics.{name}": text.strip() for name, text in topics.items()}
    for package, module in (("", os), ("numpy", np), ("torch", torch)):
        for name, text in parsed_docstrings(Path(module.__file__).resolve().parent, package):
            found[name] = text
            progress()
    for name in COMPILED:
        found |= dict(compiled_docstrings(name))
    texts = (ADDRESS.sub("0x0", found[name]) for name in sorted(found))
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARACTERS))


def installed_parts(val_documents: int, folder: Path) -> list[Part]:
    """Write the documents beside the shards, to be looked at: those with the smallest digests are for validation."""
    texts = sorted(installed_documents(), key=text_digest)  # by name, neighbours would be alike, and batches one-sided
    if val_documents >= len(texts):
        raise UserError(f"--val-docs {val_documents}: there are {len(texts)} documents, some of them to train on")
    for split, part in (("val", texts[:val_documents]), ("train", texts[val_documents:])):
        write_atomically(folder / f"{split}.jsonl", (json.dumps(text).encode() + b"\n" for text in part))
    return [Part(str(folder / "val.jsonl"), all_validation=True), Part(str(folder / "train.jsonl"))]


# -----------------------------------------------------------------------------
# Encoding: worker processes turn batches into tokens, and check every document before it is let go.

SPLITS = ("train", "val")
MEASURES = ("original_bytes", "decoded_bytes", "smaller_bytes", "contest_bytes")  # of a document; smaller of the two


class Encoded(NamedTuple):
    """The d documents of a batch that belong to one split, n tokens in all."""

    split: str
    tokens: np.ndarray  # (n,) uint16, BOS before every document
    sidecar: np.ndarray  # (n,) uint16; (0,) in training
    lengths: np.ndarray  # (d,) tokens of every document
    measures: np.ndarray  # (d, 4) int64, see MEASURES
    digests: list[int]  # (d,)
    where: list[str]  # (d,)
    empty: int  # documents left out because they have no tokens


def encode_document(encoder: Encoder, text: str, validation: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A text -> tokens (n,) with BOS, side-car (n,), measures (4,). Raises where text would be lost."""
    inner = encode_caseops(text) if encoder.caseops else text
    if encoder.caseops and decode_caseops(inner) != text:
        raise DataError("CaseOps does not give this text back; please report it")
    ids = text_tokens(encoder, inner)
    back = encoder.processor.decode(ids)
    if encoder.exact and back != inner:
        raise DataError("the tokenizer does not give this text back, though it keeps text exactly; please report it")
    tokens, original = np.array([BOS, *ids], np.uint16), len(text.encode())
    sidecar = np.zeros(len(tokens), np.uint16)
    if validation and ids:
        text_bytes = caseops_bytes(inner) if encoder.caseops else utf8_sizes(inner)
        counts = token_bytes(encoder, inner, text_bytes, tokens[1:])
        if counts.sum() != original or counts.min() < 0:
            raise DataError(f"its tokens add up to {counts.sum()} bytes of {original}; please report this text")
        if counts.max() > np.iinfo(np.uint16).max:
            raise DataError(f"a token stands for {counts.max()} bytes, the side-car holds 65,535; remove this text")
        sidecar[1:] = counts
    decoded = len((decode_caseops(back) if encoder.caseops else back).encode())
    contest = int(contest_bytes(tokens, encoder.pieces).sum())
    return tokens, sidecar, [original, decoded, min(original, decoded), contest]


def encode_batch(model: bytes, caseops: bool, batch: Batch) -> list[Encoded]:
    """One batch, in a worker -> its documents of validation, then of training."""
    encoder, empty = load_encoder(model, caseops), Counter()
    rows: dict[bool, list] = {True: [], False: []}  # for validation?
    for document in batch.documents():
        validation = batch.part.is_validation(document)
        try:
            tokens, sidecar, measures = encode_document(encoder, document.text, validation)
        except DataError as error:
            raise DataError(f"{document.where}: {error}") from None
        if len(tokens) == 1:
            empty[validation] += 1
        else:
            rows[validation].append((tokens, sidecar, measures, document.digest, document.where))
    results = []
    for validation, documents in rows.items():
        tokens, sidecars, measures, digests, where = zip(*documents, strict=True) if documents else [()] * 5
        none = np.zeros(0, np.uint16)
        results.append(
            Encoded(
                "val" if validation else "train",
                np.concatenate([none, *tokens]),
                np.concatenate([none, *sidecars]) if validation else none,
                np.array([len(t) for t in tokens], np.int64),
                np.array(measures, np.int64).reshape(-1, len(MEASURES)),
                list(digests),
                list(where),
                empty[validation],
            )
        )
    return results


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM come after this block instead of within it. Processes that it starts never hear them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def worker_pool(workers: int, patient: bool = True) -> Iterator[ProcessPoolExecutor]:
    """Processes that do not outlive this block, however it ends. When it fails they first finish what they are at: were
    one killed in the middle of sending a long result, the pool would wait for the rest of it for ever. Only work with
    short results may do without that patience."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))  # they share the imports of this process
    kill = True
    try:
        with signals_held():  # Python drops what a signal raises in the hooks of a fork
            pool.submit(os.getpid)  # forks them all
        kill = not patient
        yield pool
        kill = False
    except BrokenProcessPool:
        kill = True
        hint = "; use fewer --workers" if workers > 1 else ""
        raise UserError(f"a worker process died, most likely for lack of memory{hint}") from None
    finally:
        with signals_held():
            for child in multiprocessing.active_children() if kill else ():
                child.kill()
            pool.shutdown(cancel_futures=True)


class Progress:
    """How far, how fast, how long still: one rewritten line on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.terminal = what, total, sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()

    def __call__(self, done: int = 0, before: int = 0) -> None:
        """`done` bytes of the total, of which `before` were there when the clock started."""
        now = time.monotonic()
        if now - self.shown < (1 if self.terminal else 10):
            return
        self.shown, spent = now, now - self.begun
        message = f"{self.what}: {spent:.0f} s"
        if done > before:
            message += f", {done / 1e6:,.0f} MB, {(done - before) / 1e6 / spent:.1f} MB/s"
        if done > before and self.total > 0:
            message += f", {done / self.total:.0%}, {(self.total - done) * spent / (done - before):.0f} s left"
        print(
            f"\r\x1b[K{message}" if self.terminal else message,
            end="\r" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def wait(self, future: Future) -> Any:
        """The future's result, with a sign of life while it is awaited."""
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                self()


def train_apart(path: Path, *given: Any) -> bytes:
    """`train_tokenizer` in a process that can be killed: Ctrl-C reaches Python only between its own instructions, and
    SentencePiece may take minutes for one. The model comes back as a file."""
    with worker_pool(1, patient=False) as pool:
        Progress("training the tokenizer").wait(pool.submit(save_tokenizer, path, *given))
    model = path.read_bytes()
    path.unlink()
    return model


def save_tokenizer(path: Path, *given: Any) -> None:
    path.write_bytes(train_tokenizer(*given))


def encode_all(
    pool: ProcessPoolExecutor, workers: int, parts: list[Part], model: bytes, caseops: bool
) -> Iterator[Encoded]:
    """All files in order. Only a few batches are under way at a time, so memory does not grow with the text."""
    progress = Progress("encoding", sum(Path(part.path).stat().st_size for part in parts))
    pending: deque[tuple[Future, int]] = deque()
    batches = read_batches(parts)
    while True:
        while len(pending) < 2 * workers and (batch := next(batches, None)):
            pending.append((pool.submit(encode_batch, model, caseops, batch), batch.consumed))
        if not pending:
            return
        future, consumed = pending.popleft()
        yield from future.result()
        progress(consumed)


class SplitGuard:
    """Keeps texts of validation out of training, and counts copies. Validation must come first, unless the digest of a
    text decides, which sends all its copies to one split."""

    def __init__(self, leave_out: bool):
        self.leave_out = leave_out  # or refuse
        self.validation: dict[int, str] = {}  # digest -> where
        self.training: list[np.ndarray] = []
        self.copies = Counter()

    def __call__(self, encoded: Encoded) -> Encoded:
        if encoded.split == "val":
            known = len(self.validation)
            self.validation |= dict(zip(encoded.digests, encoded.where, strict=True))
            self.copies["val"] += len(encoded.digests) - (len(self.validation) - known)
            return encoded
        keep = np.array([digest not in self.validation for digest in encoded.digests], bool)
        self.training.append(np.array(encoded.digests, np.uint64)[keep])
        if keep.all():
            return encoded
        if not self.leave_out:
            i = int(keep.argmin())
            raise DataError(
                f"{encoded.where[i]}: this training document is in validation too "
                f"({self.validation[encoded.digests[i]]}): a score would mean nothing; remove one of them"
            )
        self.copies["left out"] += int((~keep).sum())
        return encoded._replace(
            tokens=encoded.tokens[np.repeat(keep, encoded.lengths)],
            lengths=encoded.lengths[keep],
            measures=encoded.measures[keep],
        )

    def training_copies(self) -> int:
        seen = np.concatenate([np.zeros(0, np.uint64), *self.training])
        return len(seen) - len(np.unique(seen))


# -----------------------------------------------------------------------------
# Shards: the contest's files, and the manifest that says what they are. A finished folder appears by renaming.

FORMAT = 1  # of a preparation; a change makes older ones anew


def write_shard(path: Path, values: list[np.ndarray]) -> dict:
    """Write one shard -> its line in the manifest."""
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, sum(map(len, values))
    write_atomically(path, (array.tobytes() for array in (header, *(v.astype("<u2") for v in values))))
    return shard_facts(path)


def shard_facts(path: Path) -> dict:
    tokens, size = len(read_shard(path)), path.stat().st_size
    return {"file": path.name, "tokens": tokens, "bytes": size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    digest, progress = hashlib.sha256(), Progress(f"checking {path.name}", path.stat().st_size)
    with open(path, "rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            progress(source.tell())
    return digest.hexdigest()


class ShardWriter:
    """Collects one split's documents, and writes a shard when the next one would not fit: every shard begins with BOS,
    and no document lies in two."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.limit = folder, split, shard_tokens
        self.tokens: list[np.ndarray] = []
        self.sidecar: list[np.ndarray] = []
        self.held = 0
        self.totals = Counter()
        self.shards: list[dict] = []
        self.sidecars: list[dict] = []

    def add(self, encoded: Encoded) -> None:
        self.totals += Counter(
            documents=len(encoded.lengths),
            tokens=len(encoded.tokens),
            empty_documents=encoded.empty,
            **dict(zip(MEASURES, encoded.measures.sum(0).tolist(), strict=True)),
        )
        ends, begin, document = np.cumsum(encoded.lengths), 0, 0
        while document < len(ends):
            fitting = int(np.searchsorted(ends, begin + self.limit - self.held, side="right"))
            if fitting == document and self.held:
                self.flush()
                continue
            document = max(fitting, document + 1)  # one document may be longer than a shard
            end = int(ends[document - 1])
            self.tokens.append(encoded.tokens[begin:end])
            self.sidecar.append(encoded.sidecar[begin:end])
            self.held += end - begin
            begin = end

    def flush(self) -> None:
        number = f"{len(self.shards):06d}.bin"
        if self.held:
            self.shards.append(write_shard(self.folder / f"fineweb_{self.split}_{number}", self.tokens))
        if self.held and self.split == "val":
            self.sidecars.append(write_shard(self.folder / f"fineweb_val_bytes_{number}", self.sidecar))
        self.tokens, self.sidecar, self.held = [], [], 0


@contextlib.contextmanager
def workspace(final: Path, key: str = "") -> Iterator[Path]:
    """A hidden folder that replaces `final` once the block has succeeded. Else `final` stays as it was, and the folder
    goes; with a key it stays, to be gone on with."""
    if final.exists() and not (final / "manifest.json").is_file():
        raise UserError(f"{final}: was not made by prepare (no manifest.json in it); choose another --name or --out")
    partial, old = final.with_name(f".{final.name}.partial{key}"), final.with_name(f".{final.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{final}: another process is preparing it; wait for it, or choose another --name") from None
    try:
        for leftover in () if key else partial.iterdir():
            leftover.unlink()
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if not key:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }


def write_manifest(folder: Path, final: Path, model: bytes, encoder: Encoder, facts: dict) -> dict:
    """Write the manifest into the folder that will be `final`, and the tokenizer to its place."""
    path = final.parent.parent / "tokenizers" / f"{final.name}.model"
    tokenizer = {
        "path": f"../../tokenizers/{path.name}",
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": encoder.processor.get_piece_size(),
        "exact": encoder.exact,
        "transform": "caseops" if encoder.caseops else "none",
    }
    manifest = {"format": FORMAT, **facts, "tokenizer": tokenizer, "versions": versions()}
    write_atomically(folder / "manifest.json", [json.dumps(manifest, indent=1).encode() + b"\n"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [model])
    return manifest


def find_prepared(final: Path, parameters: dict) -> dict | None:
    """The manifest of a finished preparation with these parameters, if all its files are there."""
    try:
        manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
        files = [f for split in manifest["splits"].values() for f in split["shards"] + split["sidecars"]]
        tokenizer = manifest["tokenizer"]
        same = (
            manifest["parameters"] == parameters
            and all((final / f["file"]).stat().st_size == f["bytes"] for f in files)
            and file_sha256(final / tokenizer["path"]) == tokenizer["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if same else None


def report(final: Path, manifest: dict, note: str = "") -> None:
    """What was prepared, and a warning where the contest's formula counts bytes that are not there."""
    for name, split in manifest["splits"].items():
        size, shards = split["original_bytes"] or split["contest_bytes"], len(split["shards"])
        weight = f"{size:,} bytes, {size / split['tokens']:.3f} a token, " if size else ""
        print(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {weight}shards: {shards}")
        for what in ("empty", "duplicate", "left_out", "in_training"):
            if split.get(f"{what}_documents"):
                print(f"{name}: {split[f'{what}_documents']:,} documents {what.replace('_', ' ')}")
    counted, smaller = (manifest["splits"]["val"][f"{what}_bytes"] for what in ("contest", "smaller"))
    if counted and smaller and counted > smaller:
        print(
            f"warning: val: the contest's formula counts {counted:,} bytes, {counted - smaller:,} more than the "
            "smaller of original and decoded text: its bits per byte flatter by as much"
        )
    print(f"{final}{note}")


# -----------------------------------------------------------------------------
# Text: one way from documents to a dataset, whatever their source.


def prepare_text(
    args: argparse.Namespace, source: dict, rule: str, find_parts: Callable[[Path], list[Part]], leave_out: bool = False
) -> None:
    """Documents -> a dataset. `source` must name all that decides what `find_parts` finds; `rule` tells the split."""
    final, model, caseops = args.out / "datasets" / args.name, b"", args.caseops is not False
    if args.tokenizer:
        model = args.tokenizer.read_bytes()
        processor = load_encoder(model, False, str(args.tokenizer)).processor
        has_markers = processor.piece_to_id(TITLE) != processor.unk_id()
        caseops = has_markers if args.caseops is None else args.caseops
    parameters = {
        "format": FORMAT,
        "source": source,
        "shard_tokens": args.shard_tokens,
        "caseops": caseops,
        "tokenizer": hashlib.sha256(model).hexdigest() if model else f"{args.vocab_size} pieces, trained",
        "sentencepiece": sentencepiece.__version__,
    }
    if manifest := find_prepared(final, parameters):
        return report(final, manifest, ": already prepared")
    with workspace(final) as folder:
        parts = find_parts(folder)
        if not model:
            model = train_apart(folder / "tokenizer.model", parts, args.vocab_size, caseops)
        encoder, guard = load_encoder(model, caseops), SplitGuard(leave_out)
        writers = {split: ShardWriter(folder, split, args.shard_tokens) for split in SPLITS}
        with worker_pool(args.workers) as pool:
            for encoded in encode_all(pool, args.workers, parts, model, caseops):
                writers[encoded.split].add(guard(encoded))
        splits = {split: split_facts(writer, guard, caseops, rule) for split, writer in writers.items()}
        facts = {"parameters": parameters, "split_rule": rule, "splits": splits}
        manifest = write_manifest(folder, final, model, encoder, facts)
    report(final, manifest)


def split_facts(writer: ShardWriter, guard: SplitGuard, caseops: bool, rule: str) -> dict:
    """Finish a split -> its entry in the manifest."""
    writer.flush()
    if not writer.shards:
        raise DataError(f"no document is for {writer.split}: {rule}; give more text or another split")
    facts = {name: writer.totals[name] for name in ("documents", "tokens", *MEASURES, "empty_documents")}
    training = writer.split == "train"
    return {
        **facts,
        "contest_bytes": None if caseops else facts["contest_bytes"],  # the formula knows no markers
        "duplicate_documents": guard.training_copies() if training else guard.copies["val"],
        "left_out_documents": guard.copies["left out"] if training else 0,
        "shards": writer.shards,
        "sidecars": writer.sidecars,
    }


def prepare_installed(args: argparse.Namespace) -> None:
    source = {"kind": "installed", "val_docs": args.val_docs, "versions": versions()}
    rule = f"validation is the {args.val_docs} documents with the smallest digests"
    prepare_text(args, source, rule, functools.partial(installed_parts, args.val_docs))


def prepare_jsonl(args: argparse.Namespace) -> None:
    if args.val:
        rule = "validation has files of its own"
        parts = file_parts(args.val, all_validation=True) + file_parts(args.files)
    else:
        if not 0 < args.val_fraction < 1:
            raise UserError(f"--val-fraction {args.val_fraction}: expected a number between 0 and 1")
        rule = f"validation is the texts whose digests are among the lowest {args.val_fraction:g} of all digests"
        parts = file_parts(args.files, hash_validation=int(args.val_fraction * 2**64))
    stats = [Path(part.path).stat() for part in parts]
    files = [[part.path, part.all_validation, s.st_size, s.st_mtime_ns] for part, s in zip(parts, stats, strict=True)]
    prepare_text(args, {"kind": "jsonl", "files": files, "split": rule}, rule, lambda folder: parts)


def prepare_contest(args: argparse.Namespace) -> None:
    """Published shards, or the published documents with a tokenizer of ours. Web text holds copies: such of validation
    are left out of training."""
    if not args.documents:
        return prepare_published(args)
    if args.val_docs < CONTEST_VAL_DOCS:
        print(
            f"warning: --val-docs {args.val_docs}: documents up to the {CONTEST_VAL_DOCS:,}th are the contest's "
            "validation, and here you train on them: no score of this is one of the contest",
            file=sys.stderr,
        )
    args.name = args.name or "contest_documents"
    hub = Hub(args.base_url, args.repo or PLAIN_REPOSITORY)
    source = {"kind": "contest documents", "hub": hub.base_url, "repo": hub.repo, "val_docs": args.val_docs}
    rule = f"validation is the first {args.val_docs} documents"
    prepare_text(args, source, rule, functools.partial(contest_parts, hub, args.out, args.val_docs), leave_out=True)


def contest_parts(hub: Hub, out: Path, val_documents: int, _: Path) -> list[Part]:
    """The published documents, downloaded once and compared with the hash that was published with them."""
    path, facts = out / "docs_selected.jsonl", "docs_selected.source_manifest.json"
    if not path.exists():
        try:
            wanted = json.loads(fetch_bytes(hub, facts, out))["docs_sha256"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{hub.url(facts)}: names no docs_sha256; see --repo") from None
        if file_sha256(hub.fetch(path.name, path)) != wanted:
            path.unlink()
            raise DataError(f"{hub.url(path.name)}: what came has not the published SHA-256 {wanted}; run it again")
    return [Part(str(path), first_validation=val_documents)]


# -----------------------------------------------------------------------------
# Hub: files over HTTPS, gone on with where they stopped.

HUB = "https://huggingface.co"
CONTEST_VAL_DOCS = 50_000
PLAIN_REPOSITORY = "willdepueoai/parameter-golf"
REPOSITORIES = {"caseops": "romeerp/parameter-golf-caseops-v1", "sp8192": "kevclark/parameter-golf"}
MAX_ATTEMPTS = 6  # in a row that come no further
FIRST_PAUSE_S = 1.0  # doubled at every further attempt
LONGEST_PAUSE_S = 60.0
TIMEOUT_S = 60
PASSING_STATES = {408, 425, 429, 500, 502, 503, 504}
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class LinkedDigest(urllib.request.HTTPRedirectHandler):
    """The hub redirects to where a large file lies, and names its SHA-256 in doing so."""

    digest = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.digest = headers.get("X-Linked-Etag", "").strip('"')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Hub(NamedTuple):
    """A repository of datasets that has the contest's layout."""

    base_url: str
    repo: str

    def url(self, name: str) -> str:
        path = urllib.parse.quote(f"datasets/{self.repo}/resolve/main/datasets/{name}")
        return f"{self.base_url.rstrip('/')}/{path}"

    def fetch(self, name: str, path: Path, label: str = "") -> Path:
        """Download a file to `path`, which appears when it is whole; what came of it before is gone on with."""
        part, attempts, progress = path.with_name(f".{path.name}.part"), 0, Progress(label or path.name)
        part.touch()
        furthest = part.stat().st_size
        while True:
            pause = FIRST_PAUSE_S * 2**attempts
            try:
                total, digest = self.transfer(name, part, progress)
                if part.stat().st_size == total:
                    break
                reason = f"{part.stat().st_size:,} of {total:,} bytes came"
            except urllib.error.HTTPError as error:
                reason, pause = f"HTTP {error.code} {error.reason}", max(pause, retry_after(error))
                if error.code == 416:  # what lies there is longer than the file: not its beginning
                    part.write_bytes(b"")
                elif error.code not in PASSING_STATES:
                    raise UserError(f"{self.url(name)}: {reason}; see --variant, --repo and --base-url") from None
            except NETWORK_ERRORS as error:
                reason = str(error) or type(error).__name__
            attempts = 0 if part.stat().st_size > furthest else attempts + 1
            furthest = max(furthest, part.stat().st_size)
            if attempts == MAX_ATTEMPTS:
                raise UserError(f"{self.url(name)}: {reason}; gave up after {attempts} attempts; run it again to go on")
            time.sleep(min(pause, LONGEST_PAUSE_S))
        if len(digest) == 64 and file_sha256(part) != digest:
            part.unlink()
            raise DataError(f"{self.url(name)}: what came has not the SHA-256 that the hub names; run it again")
        part.rename(path)
        return path

    def transfer(self, name: str, part: Path, progress: Progress) -> tuple[int, str]:
        """One request for the rest of `part` -> size of the whole file, its SHA-256 or ""."""
        begin, linked = part.stat().st_size, LinkedDigest()
        headers = {"User-Agent": "prepare.py", **({"Range": f"bytes={begin}-"} if begin else {})}
        request = urllib.request.Request(self.url(name), headers=headers)
        with urllib.request.build_opener(linked).open(request, timeout=TIMEOUT_S) as answer:
            if answer.status == 206:
                match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
                if not match or int(match[1]) != begin:
                    raise http.client.HTTPException(f"Content-Range is {answer.headers.get('Content-Range')!r}")
                total = int(match[2])
            else:  # a server may send all of it again
                begin, total = 0, int(answer.headers.get("Content-Length", -1))
            progress.total = total
            if shutil.disk_usage(part.parent).free < total - begin:
                raise UserError(f"{part.parent}: no space for {name}, {total:,} bytes; free some space")
            with open(part, "ab" if begin else "wb") as out:
                while chunk := answer.read(1 << 20):
                    out.write(chunk)
                    progress(out.tell(), begin)
                return (total if total >= 0 else out.tell()), linked.digest


def retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks us to wait."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


# -----------------------------------------------------------------------------
# Published shards: downloaded as they are, and checked whole before anything is trained on them.

DATASETS = {"caseops": "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"}
SHARD_BYTES = 200_001_024
MAX_LEAK = 0.05  # web text holds a few copies; wrong splits put four validation documents of five into training


def prepare_published(args: argparse.Namespace) -> None:
    """Download a dataset's shards, and say in our manifest what they are."""
    if args.tokenizer or args.caseops is not None:
        raise UserError("--tokenizer and --caseops go with --documents: published shards are encoded already")
    hub = Hub(args.base_url, args.repo or REPOSITORIES.get(args.variant, PLAIN_REPOSITORY))
    dataset = DATASETS.get(args.variant, f"fineweb10B_{args.variant}")
    final, caseops = args.out / "datasets" / (args.name or dataset), "caseops" in dataset
    source = {"kind": "contest", "hub": hub.base_url, "repo": hub.repo, "dataset": dataset}
    parameters = {"format": FORMAT, "source": source, "train_shards": args.train_shards}
    if manifest := find_prepared(final, parameters):
        return report(final, manifest, ": already prepared")
    with workspace(final, hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]) as folder:
        link_earlier(final, folder, source)
        train_shards, val_shards, model_path = published_entry(hub, folder, dataset)
        if args.train_shards > train_shards:
            raise UserError(f"--train-shards {args.train_shards}: {hub.repo} has {train_shards} of {dataset}")
        counts = {"val": val_shards, "val_bytes": val_shards * caseops, "train": args.train_shards}
        names = {kind: [f"fineweb_{kind}_{i:06d}.bin" for i in range(n)] for kind, n in counts.items()}
        missing = [name for kind in names.values() for name in kind if not (folder / name).exists()]
        if shutil.disk_usage(folder).free < len(missing) * SHARD_BYTES:
            raise UserError(f"{folder}: no space for {len(missing)} files of 200 MB; ask for fewer --train-shards")
        model = fetch_bytes(hub, model_path, folder)
        encoder = load_encoder(model, caseops, hub.url(model_path))
        for i, name in enumerate(missing, 1):
            hub.fetch(f"datasets/{dataset}/{name}", folder / name, f"{name}, {i} of {len(missing)}")
        splits = check_shards(folder, names, encoder)
        facts = {"parameters": parameters, "split_rule": "as published", "splits": splits}
        manifest = write_manifest(folder, final, model, encoder, facts)
    report(final, manifest)


def link_earlier(final: Path, folder: Path, source: dict) -> None:
    """Take over the files of an earlier, shorter download of the same dataset."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((final / "manifest.json").read_bytes())["parameters"]["source"] == source:
            for shard in final.glob("fineweb_*.bin"):
                (folder / shard.name).unlink(missing_ok=True)
                os.link(shard, folder / shard.name)


def fetch_bytes(hub: Hub, name: str, folder: Path) -> bytes:
    """A small file's content."""
    path = hub.fetch(name, folder / "fetched")
    content = path.read_bytes()
    path.unlink()
    return content


def published_entry(hub: Hub, folder: Path, dataset: str) -> tuple[int, int, str]:
    """What the published manifest says of a dataset: shards of training, of validation, path of the tokenizer."""
    where = hub.url("manifest.json")
    try:
        published = json.loads(fetch_bytes(hub, "manifest.json", folder))
        datasets = {entry["name"]: entry for entry in published["datasets"]}
        tokenizers = {entry["name"]: entry for entry in published["tokenizers"]}
        if dataset in datasets:
            stats, tokenizer = datasets[dataset]["stats"], tokenizers[datasets[dataset]["tokenizer_name"]]
            train_shards, val_shards = int(stats["files_train"]), int(stats["files_val"])
            if min(train_shards, val_shards) < 1:
                raise ValueError(f"{train_shards} shards of training, {val_shards} of validation")
            return train_shards, val_shards, tokenizer["model_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: does not describe {dataset} and its SentencePiece model ({error!r}); "
            "choose another --variant or --repo"
        ) from None
    raise UserError(f"{where}: no {dataset}; it has {', '.join(sorted(datasets))}; choose another --variant or --repo")


def check_shards(folder: Path, names: dict[str, list[str]], encoder: Encoder) -> dict:
    """Check all shards -> the manifest's splits. A bad file is removed, so that another run fetches it again."""
    progress, validation, leaked = Progress("checking shards"), set(), set()
    nothing = dict.fromkeys((*MEASURES, "empty_documents", "duplicate_documents", "left_out_documents"))
    splits = {}
    for split in ("val", "train"):
        splits[split] = {"documents": 0, "tokens": 0, **nothing, "shards": [], "sidecars": []}
        for name in names[split]:
            tokens = checked_shard(folder / name, encoder.processor.get_piece_size())
            splits[split]["documents"] += int((tokens == BOS).sum())
            splits[split]["tokens"] += len(tokens)
            splits[split]["shards"].append(shard_facts(folder / name))
            digests = document_digests(tokens)
            if split == "val":
                validation |= digests
            leaked |= digests & validation if split == "train" else set()
            progress()
    if len(leaked) > MAX_LEAK * len(validation):
        raise DataError(
            f"{folder}: {len(leaked):,} of {len(validation):,} validation documents are in training too: a "
            "score would mean nothing; choose another --repo"
        )
    splits["val"] |= {"in_training_documents": len(leaked), **weigh_validation(folder, names, encoder)}
    return {split: splits[split] for split in SPLITS}


def checked_shard(path: Path, vocab_size: int) -> np.ndarray:
    try:
        tokens = read_shard(path)
        if not len(tokens) or int(tokens.max()) >= vocab_size:
            raise DataError(f"{path}: its largest token is {tokens.max(initial=0)}, the vocabulary has {vocab_size}")
        if BOS not in tokens or ("_val_" in path.name and tokens[0] != BOS):
            raise DataError(f"{path}: no BOS ({BOS}) where a document must begin; see --repo")
    except DataError:
        path.unlink()
        raise
    return tokens


def document_digests(tokens: np.ndarray) -> set[bytes]:
    """Hashes of the documents that both begin and end in a shard."""
    starts = np.flatnonzero(tokens == BOS).tolist()
    return {
        hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest()
        for a, b in zip(starts[:-1], starts[1:], strict=True)
    }


def weigh_validation(folder: Path, names: dict[str, list[str]], encoder: Encoder) -> dict:
    """Bytes of validation as far as its tokens tell: those of the original text only where there is a side-car."""
    shards, sidecars = ([read_shard(folder / name) for name in names[kind]] for kind in ("val", "val_bytes"))
    for name, shard, sidecar in zip(names["val_bytes"], shards, sidecars, strict=False):
        if len(sidecar) != len(shard):
            (folder / name).unlink()
            raise DataError(f"{folder / name}: {len(sidecar)} entries for {len(shard)} tokens; run it again")
    stream = np.concatenate(shards)
    starts = np.flatnonzero(stream == BOS)
    texts = (encoder.processor.decode(document.tolist()) for document in np.split(stream, starts[1:]))
    decoded = np.array([len((decode_caseops(text) if encoder.caseops else text).encode()) for text in texts])
    facts: dict[str, Any] = {"decoded_bytes": int(decoded.sum())}
    facts["sidecars"] = [shard_facts(folder / name) for name in names["val_bytes"]]
    if not encoder.caseops:
        facts["contest_bytes"] = int(contest_bytes(stream, encoder.pieces).sum())
    if sidecars:
        original = np.add.reduceat(np.concatenate(sidecars).astype(np.int64), starts)
        facts |= {"original_bytes": int(original.sum()), "smaller_bytes": int(np.minimum(original, decoded).sum())}
    return facts


# -----------------------------------------------------------------------------
# Command line


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def web_address(text: str) -> str:
    if not re.match(r"https?://\S+$", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected https://HOST, or http://HOST")
    return text


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, underscores, dots and dashes")
    return text


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    commands = {}
    for name, run, vocab_size, doc in (
        ("installed", prepare_installed, 2048, "the documentation of Python, NumPy and torch on this machine"),
        ("jsonl", prepare_jsonl, 8192, 'files with one document a line: a JSON string, or an object with "text"'),
        ("contest", prepare_contest, 8192, "the contest's published shards, or its documents, from the hub"),
    ):
        commands[name] = command = sources.add_parser(name, help=doc, description=doc)
        command.set_defaults(run=run)
        add = command.add_argument
        add(
            "--out",
            type=Path,
            default=Path(__file__).resolve().parent,
            help="folder for datasets/ and tokenizers/ [that of this file]",
        )
        add(
            "--name",
            type=folder_name,
            default=None if name == "contest" else name,
            help=f"name of the dataset [{'the published one' if name == 'contest' else name}]",
        )
        add("--tokenizer", type=Path, help="SentencePiece model to use [one is trained]")
        add("--vocab-size", type=whole_number, default=vocab_size, help="pieces of a trained one [%(default)s]")
        add(
            "--caseops",
            action=argparse.BooleanOptionalAction,
            help="spell capitals as markers [yes, or if the given tokenizer has the markers]",
        )
        add("--workers", type=whole_number, default=len(os.sched_getaffinity(0)), help="processes [one a core]")
        add("--shard-tokens", type=whole_number, default=100_000_000, help="tokens of a shard, at most [%(default)s]")
    add = commands["installed"].add_argument
    add("--val-docs", type=whole_number, default=64, help="documents for validation [%(default)s]")
    add = commands["jsonl"].add_argument
    add("files", nargs="+", help="files or quoted globs: .jsonl, .gz, .bz2, .zst")
    add("--val", nargs="+", help="files for validation [--val-fraction decides]")
    add("--val-fraction", type=float, default=0.02, help="share of the texts for validation, by hash [%(default)s]")
    add = commands["contest"].add_argument
    add(
        "--variant",
        type=folder_name,
        default="caseops",
        help="sp1024, sp8192, caseops, or what follows fineweb10B_ in a name [%(default)s]",
    )
    add("--train-shards", type=whole_number, default=80, help="of 100 million tokens and 200 MB [%(default)s]")
    add("--documents", action="store_true", help="the text, 48 GB, to be encoded here, instead of shards")
    add(
        "--val-docs",
        type=whole_number,
        default=CONTEST_VAL_DOCS,
        help="with --documents: how many come first, for validation [%(default)s]",
    )
    add("--repo", help="OWNER/NAME on the hub [the one that publishes the variant]")
    add("--base-url", type=web_address, default=HUB, help="the hub [%(default)s]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what a user can mend, 130 when interrupted."""
    args = command_line().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        hint = "; free some space, or choose another --out" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"prepare: {error.filename or args.out}: {error.strerror or error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; a download can be gone on with, nothing else is left of it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as clean an end as after Ctrl-C
    sys.exit(main())
