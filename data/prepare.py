"""
Turn text into the contest's shards: documents -> (CaseOps ->) SentencePiece -> uint16 tokens, BOS before every document.

    python data/prepare.py installed                          the documentation on this machine: small, nothing to download
    python data/prepare.py jsonl FILES... --val FILES...      your own text: one JSON string, or object with "text", a line
    python data/prepare.py contest --variant caseops          the contest's published shards
    python data/prepare.py contest --documents                the contest's published documents, with a tokenizer of ours
    python data/prepare.py SOURCE --help                      every option

Leaves <out>/datasets/<name>/{fineweb_train_NNNNNN.bin, fineweb_val_NNNNNN.bin, fineweb_val_bytes_NNNNNN.bin, manifest.json}
and <out>/tokenizers/<name>.model. The side-car fineweb_val_bytes holds the bytes of original text behind every validation
token; those of a document add up to its UTF-8 length. A dataset appears whole or not at all.

Sections, in the order of a run: CaseOps, Tokenizer, Documents, Installed text, Encoding, Shards, Hub, Preparing, Command line.
"""
from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import fcntl
import functools
import glob
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
import sys
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is a script: its neighbour is the entry

from train_gpt import (  # noqa: E402
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

FORMAT = 1  # of manifest.json and of what is prepared; a change makes older preparations anew
SPLITS = ("train", "val")
MAX_SIDECAR_BYTES = np.iinfo(np.uint16).max

# -----------------------------------------------------------------------------
# CaseOps: a bijection that spells capitals as markers before lower-case letters, so that word, Word and WORD share a piece.

TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001\ue002\ue003\ue004"
CASED = re.compile("(?<![A-Za-z])(?P<word>[A-Z][A-Za-z]*)|(?P<inner>[A-Z])|(?P<marker>[\ue001-\ue004])")
MARKED = re.compile("\ue004(?P<literal>.)|\ue002(?P<word>[a-z]+)|[\ue001\ue003](?P<letter>[a-z])", re.DOTALL)


@functools.lru_cache(1 << 16)
def mark_case(kind: str, text: str) -> str:
    """One match of CASED in its marked spelling. `inner` is a capital in a run of ASCII letters that began in lower case."""
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
    for match in MARKED.finditer(text) if ESCAPE in text else ():
        if match.lastgroup == "literal":
            sizes[match.start("literal")] = len(match["literal"].encode())
    return sizes


# -----------------------------------------------------------------------------
# Tokenizer: a SentencePiece model, ours or given, hostile until checked.

SPACE = "\u2581"  # SentencePiece writes a space so, and cannot tell a real U+2581 from one
PROBE = f"  A b\t\r\n\u00bd \ufb01\u2026 e\u0301 \u00a0\u2003x\u200b\uff21 a{SPACE}b  "  # what normalisation would change
TRAINING_TEXT_BYTES = 100_000_000  # enough for stable merges; SentencePiece wants about ten times this in memory


class Encoder(NamedTuple):
    """A checked tokenizer and what is derived from it."""
    processor: sentencepiece.SentencePieceProcessor
    exact: bool              # decoding gives back the very text
    caseops: bool            # text is transformed first
    pieces: PieceBytes       # the contest's formula
    piece_sizes: np.ndarray  # (V,) int64, UTF-8 bytes of normalised text that a piece covers
    byte_ids: list[int]      # (256,) the byte-fallback pieces


@functools.lru_cache(2)
def load_encoder(model: bytes, caseops: bool, name: str) -> Encoder:
    """Check a serialised model; cached, because a worker meets the same one with every batch."""
    processor, found = sentencepiece.SentencePieceProcessor(), "something else"
    with contextlib.suppress(RuntimeError):
        if model and processor.LoadFromSerializedProto(model):
            found = "a model"
    if found != "a model":
        raise DataError(f"{name}: not a SentencePiece model; give one with --tokenizer, or train one with --vocab-size")
    size = processor.get_piece_size()
    if not 0 < size <= 1 << 16:
        raise DataError(f"{name}: {size} pieces; tokens are uint16, so at most 65,536; use a smaller tokenizer")
    if processor.bos_id() != BOS or not processor.is_control(BOS):
        raise DataError(f"{name}: its BOS is {processor.bos_id()}, expected a control piece {BOS}; train it with bos_id={BOS}")
    byte_ids = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    if not all(processor.is_byte(i) for i in byte_ids):
        raise DataError(f"{name}: it lacks byte pieces, so some text has no tokens; train it with byte_fallback=true")
    special = [processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in range(size)]
    sizes = [1 if processor.is_byte(i) else len(processor.id_to_piece(i).encode()) for i in range(size)]
    encoder = Encoder(processor, True, caseops, piece_bytes(processor), np.where(special, 0, sizes), byte_ids)
    return encoder._replace(exact=processor.decode(text_tokens(encoder, PROBE)) == PROBE)


def text_tokens(encoder: Encoder, text: str) -> list[int]:
    """Tokens of one transformed document. Exact tokenizers spell a real U+2581 in bytes, as it would decode to a space."""
    first, *others = text.split(SPACE) if encoder.exact else [text]
    tokens = encoder.processor.encode(first)
    for part in others:
        tokens += [encoder.byte_ids[value] for value in SPACE.encode()] + encoder.processor.encode(part)
    return tokens


def token_bytes(encoder: Encoder, text: str, text_bytes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Original bytes behind every token of a document, (n,) int64, adding up to those of the document.

    text is the transformed document, text_bytes (len(text),) what its characters stand for, tokens (n,) its tokens, n > 0.
    SentencePiece tells where every normalised character came from. Bytes of a character that became several tokens go
    to them in order, as evenly as they can; text that normalisation removed goes to the token after it, or to the last.
    """
    normal, origins = encoder.processor.normalize(text, with_offsets=True)
    behind = np.concatenate([[0], np.cumsum(text_bytes)])[origins]  # (len(normal) + 1,) original bytes before a character
    sizes = utf8_sizes(normal)
    inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of a byte in its character
    share = np.repeat(np.diff(behind), sizes) * inside // np.repeat(sizes, sizes)
    before = np.append(np.repeat(behind[:-1], sizes) + share, behind[-1])  # original bytes before every normalised byte
    ends = np.cumsum(encoder.piece_sizes[tokens])
    if ends[-1] != len(before) - 1:
        raise DataError(f"the tokenizer's pieces cover {ends[-1]} bytes of {len(before) - 1}: it cannot be aligned with its text")
    bounds = before[ends]
    bounds[-1] = text_bytes.sum()
    return np.diff(bounds, prepend=0)


def train_tokenizer(parts: list[Part], vocab_size: int, caseops: bool) -> bytes:
    """Train BPE on the training documents, the same share of every part. The same text gives the same model."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sample(parts, caseops), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, pad_id=0, bos_id=BOS, eos_id=2, unk_id=3,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,  # text kept exactly
            split_by_unicode_script=not caseops,  # or the markers could not merge with the letters beside them
            split_digits=True, character_coverage=0.9999, max_sentence_length=1 << 30,
            num_threads=4, minloglevel=3)  # threads change nothing but the model's own record of them: fixed
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip() or "no text that SentencePiece can learn from"
        raise DataError(f"--vocab-size {vocab_size}: SentencePiece cannot train on this text: {reason}") from None
    return model.getvalue()


def training_sample(parts: list[Part], caseops: bool) -> Iterator[str]:
    """Training documents (transformed) for the tokenizer; never one of validation."""
    training = [p for p in parts if not p.all_validation]
    for part in training:
        room = TRAINING_TEXT_BYTES // len(training)
        for batch in read_batches([part]):
            for where, number, line in batch.documents():
                text = parse_document(line, where)
                if room > 0 and text and not batch.part.is_validation(number, text_hash(text)):
                    room -= len(text.encode())
                    yield encode_caseops(text) if caseops else text
            if room <= 0:
                break


# -----------------------------------------------------------------------------
# Documents: lines of JSON from files or from memory, in batches; each line says for itself which split it belongs to.

BATCH_BYTES = 1 << 20
READ_BYTES = 1 << 16
DECOMPRESSORS = {".gz": lambda: zlib.decompressobj(wbits=31), ".bz2": bz2.BZ2Decompressor,
                 ".zst": lambda: zstandard.ZstdDecompressor().decompressobj()}


class Part(NamedTuple):
    """A file of documents, or a list of them, and its rule for the split."""
    name: str
    lines: tuple[bytes, ...] | None = None  # None: they are in the file `name`
    all_validation: bool = False
    first_validation: int = 0  # leading documents for validation
    hash_validation: int = 0   # documents whose hash lies below this are for validation; 0 .. 2**64

    def is_validation(self, number: int, digest: int) -> bool:
        return self.all_validation or number < self.first_validation or digest < self.hash_validation

    @property
    def size(self) -> int:
        """Bytes as they lie there, compressed or not."""
        return sum(map(len, self.lines)) if self.lines is not None else Path(self.name).stat().st_size


class Batch(NamedTuple):
    """About BATCH_BYTES of consecutive lines."""
    part: Part  # without its lines
    first: int  # number of the first line, from 0
    lines: list[bytes]
    consumed: int  # bytes of all parts read so far

    def documents(self) -> Iterator[tuple[str, int, bytes]]:
        for number, line in enumerate(self.lines, self.first):
            yield f"{self.part.name}:{number + 1}", number, line


def text_hash(text: str) -> int:
    """64 bits that tell documents apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parse_document(line: bytes, where: str) -> str:
    """The text of one line of JSON."""
    want = 'expected a JSON string, or an object with a string "text"'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {want}") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{where}: {line[:60]!r}; {want}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text cannot be UTF-8 ({error.reason} at character {error.start}); mend or remove it") from None
    return text


def file_chunks(source: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Unpacked chunks of an open file; a compressed one may hold several members one after another."""
    fresh = DECOMPRESSORS.get(suffix)
    member = fresh() if fresh else None
    while packed := source.read(READ_BYTES):
        if member is None:
            yield packed
        while member is not None and packed:
            member = fresh() if member.eof else member
            yield member.decompress(packed)
            packed = member.unused_data
    if member is not None and not member.eof:
        raise EOFError("it ends in the middle")


def file_lines(path: str) -> Iterator[tuple[list[bytes], int]]:
    """Whole lines of a file in lists, with the bytes of the file that were read for them."""
    held: list[bytes] = []  # pieces of a line that is not yet whole
    seen = 0
    try:
        with open(path, "rb") as source:
            for chunk in file_chunks(source, Path(path).suffix):
                first, *others = chunk.split(b"\n")
                held.append(first)
                if others:
                    yield [b"".join(held), *others[:-1]], source.tell() - seen
                    held, seen = [others[-1]], source.tell()
            if last := b"".join(held):
                yield [last], source.tell() - seen
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; unpack it by hand, or fetch it again") from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}; fetch it again") from None


def read_batches(parts: Iterable[Part]) -> Iterator[Batch]:
    """All parts in order. A batch never spans two parts."""
    consumed = 0
    for part in parts:
        source = file_lines(part.name) if part.lines is None else (([line], len(line)) for line in part.lines)
        bare, first, lines, size = part._replace(lines=None), 0, [], 0
        for more, read in source:
            lines += more
            size += sum(map(len, more))
            consumed += read
            if size >= BATCH_BYTES:
                yield Batch(bare, first, lines, consumed)
                first, lines, size = first + len(lines), [], 0
        if lines:
            yield Batch(bare, first, lines, consumed)


def file_parts(patterns: list[str], **rule: Any) -> list[Part]:
    """Files by name or glob, in sorted order of every pattern."""
    names = [name for pattern in patterns for name in (sorted(glob.glob(pattern, recursive=True)) or [pattern])]
    for name, count in Counter(names).items():
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file; give .jsonl files or globs, plain, .gz, .bz2 or .zst")
        if count > 1:
            raise DataError(f"{name}: given {count} times; once is enough")
    return [Part(name, **rule) for name in names]


# -----------------------------------------------------------------------------
# Installed text: documentation that lies on every machine which runs this. Sources are parsed, not imported, so nothing
# in them is run; only compiled functions, whose documentation lies in no source, are asked in this process.

MIN_CHARACTERS = 200  # shorter docstrings are labels rather than text
APART = {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "this", "tkinter", "turtle",
         "turtledemo"}  # tests, jokes, and what some systems package apart from Python
COMPILED = ("builtins", "array", "binascii", "cmath", "itertools", "math", "time", "zlib", "numpy", "numpy.linalg",
            "numpy.random", "torch", "torch.fft", "torch.linalg", "torch.nn.functional", "torch.special")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


def public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def parsed_docstrings(root: Path, prefix: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the public modules, classes and functions in the sources under a folder."""
    for path in sorted(root.rglob("*.py")):
        names = [*prefix, *path.relative_to(root).with_suffix("").parts]
        names = names[:-1] if names[-1] == "__init__" else names
        if not all(map(public, names)) or APART & set(names) or (not prefix and names[0] not in sys.stdlib_module_names):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            found = [(tuple(names), ast.parse(path.read_bytes(), str(path)))]
        while found:
            name, node = found.pop()
            if text := ast.get_docstring(node):
                yield ".".join(name), text
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = (n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
                found += [((*name, n.name), n) for n in inner if public(n.name)]


def compiled_docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module's public functions, classes and their members, as they are in memory."""
    module = importlib.import_module(module_name)
    for name in filter(public, dir(module)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # asking for a deprecated name is no use of it
            value = getattr(module, name)
            owner = getattr(value, "__module__", None) or module_name
        if inspect.ismodule(value) or not callable(value) or str(owner).split(".")[0] != module_name.split(".")[0]:
            continue
        members = [((f"{name}.{m}"), v) for m, v in vars(value).items() if public(m)] if inspect.isclass(value) else []
        for qualified, item in [(name, value), *members]:
            if isinstance(text := getattr(item, "__doc__", None), str):
                yield f"{module_name}.{qualified}", inspect.cleandoc(text)


def installed_documents() -> list[str]:
    """Every text once, in the order of its first name; the same for the same versions of Python, NumPy and torch."""
    if sys.flags.optimize >= 2:
        raise UserError("installed text: Python runs under -OO, which drops docstrings; run it without -OO")
    topics = importlib.import_module("pydoc_data.topics").topics
    found = {f"pydoc_data.topics.{name}": text.strip() for name, text in topics.items()}
    for name in ("", "numpy", "torch"):
        where = importlib.import_module(name or "os").__file__
        found |= dict(parsed_docstrings(Path(where).resolve().parent, (name,) if name else ()))
    for name in COMPILED:
        found |= dict(compiled_docstrings(name))
    texts = (ADDRESS.sub("0x0", found[name]) for name in sorted(found))
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_CHARACTERS))


def installed_parts(val_documents: int) -> list[Part]:
    """Validation: the documents with the smallest hashes. Each split keeps the order of names."""
    texts = installed_documents()
    if not 0 < val_documents < len(texts):
        raise UserError(f"--val-docs {val_documents}: there are {len(texts)} documents; some must be left for training")
    chosen = set(sorted(texts, key=text_hash)[:val_documents])
    lines = {split: tuple(json.dumps(t).encode() for t in texts if (t in chosen) == (split == "val")) for split in SPLITS}
    return [Part("installed validation", lines["val"], all_validation=True), Part("installed training", lines["train"])]


# -----------------------------------------------------------------------------
# Encoding: batches of lines become tokens in worker processes; what a document was is checked before it is let go.

MEASURES = ("original_bytes", "decoded_bytes", "smaller_bytes", "contest_bytes")  # of every document; smaller of the first two


class Encoded(NamedTuple):
    """The d documents of a batch that belong to one split, n tokens in all."""
    source: str                # name of the part
    split: str
    tokens: np.ndarray         # (n,) uint16, BOS before every document
    sidecar: np.ndarray | None  # (n,) uint16, validation only
    lengths: np.ndarray        # (d,) tokens of every document, BOS included
    measures: np.ndarray       # (d, 4) int64, see MEASURES
    digests: np.ndarray        # (d,) uint64, hashes of the texts
    numbers: np.ndarray        # (d,) line of every document, from 0
    empty: int                 # documents left out because they have no tokens

    def without(self, documents: np.ndarray) -> Encoded:
        """All but some documents, (d,) bool."""
        keep = ~documents
        return self._replace(tokens=self.tokens[np.repeat(keep, self.lengths)], lengths=self.lengths[keep],
                             measures=self.measures[keep], digests=self.digests[keep], numbers=self.numbers[keep])


def encode_document(encoder: Encoder, text: str, validation: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A text -> tokens (n,) with BOS, side-car (n,) (zeros in training), measures (4,). Raises where text would be lost."""
    inner = encode_caseops(text) if encoder.caseops else text
    if encoder.caseops and decode_caseops(inner) != text:
        raise DataError("CaseOps does not give the text back; please report this text")
    ids = text_tokens(encoder, inner)
    back = encoder.processor.decode(ids)
    if encoder.exact and back != inner:
        raise DataError("the tokenizer does not give the text back, though it keeps text exactly; please report this text")
    tokens, original = np.array([BOS, *ids], np.uint16), len(text.encode())
    sidecar = np.zeros(len(tokens), np.uint16)
    if validation and ids:
        counts = token_bytes(encoder, inner, caseops_bytes(inner) if encoder.caseops else utf8_sizes(inner), tokens[1:])
        if counts.sum() != original or counts.min() < 0:
            raise DataError(f"the side-car adds up to {counts.sum()} bytes of {original}; please report this text")
        if counts.max() > MAX_SIDECAR_BYTES:
            raise DataError(f"one token stands for {counts.max()} bytes, a side-car holds {MAX_SIDECAR_BYTES}; remove this text")
        sidecar[1:] = counts
    decoded = len((decode_caseops(back) if encoder.caseops else back).encode())
    return tokens, sidecar, [original, decoded, min(original, decoded), int(contest_bytes(tokens, encoder.pieces).sum())]


def encode_batch(model: bytes, caseops: bool, batch: Batch) -> list[Encoded]:
    """One batch, in a worker -> its documents of validation, then of training."""
    encoder = load_encoder(model, caseops, "the tokenizer")
    rows: dict[bool, list] = {True: [], False: []}  # for validation?
    empty = Counter()
    for where, number, line in batch.documents():
        text = parse_document(line, where)
        digest = text_hash(text)
        validation = batch.part.is_validation(number, digest)
        try:
            tokens, sidecar, measures = encode_document(encoder, text, validation)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        empty[validation] += len(tokens) == 1
        if len(tokens) > 1:
            rows[validation].append((tokens, sidecar, len(tokens), measures, digest, number))
    result = []
    for validation, documents in rows.items():
        tokens, sidecars, lengths, measures, digests, numbers = zip(*documents, strict=True) if documents else [()] * 6
        flat = [np.concatenate([np.zeros(0, np.uint16), *arrays]) for arrays in (tokens, sidecars)]
        result.append(Encoded(batch.part.name, "val" if validation else "train", flat[0], flat[1] if validation else None,
                              np.array(lengths, np.int64), np.array(measures, np.int64).reshape(-1, len(MEASURES)),
                              np.array(digests, np.uint64), np.array(numbers, np.int64), empty[validation]))
    return result


def calm_signals() -> None:
    """A worker leaves Ctrl-C to its parent, which ends it by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that do not outlive this block, however it ends."""
    context = multiprocessing.get_context("fork")  # they share this process's pages: imports cost neither time nor memory
    pool = ProcessPoolExecutor(count, context, initializer=calm_signals)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process died, most likely for lack of memory; use fewer --workers") from None
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """How far, how fast, how long still: on a terminal one line that is rewritten, elsewhere a plain line now and then."""

    def __init__(self, what: str, total: int = 0):
        self.what, self.total, self.terminal = what, total, sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()

    def __call__(self, done: int = 0, before: int = 0) -> None:
        """`done` bytes of the total, of which `before` were there when the clock started."""
        now = time.monotonic()
        if now - self.shown < (1 if self.terminal else 10):
            return
        self.shown, spent, message = now, now - self.begun, f"{self.what}: {now - self.begun:.0f} s"
        if done > before:
            message = f"{self.what}: {done / 1e6:,.0f} MB, {(done - before) / 1e6 / spent:.1f} MB/s"
            if self.total:
                message += f", {done / self.total:.0%}, {(self.total - done) * spent / (done - before):.0f} s left"
        print(f"\r\x1b[K{message}" if self.terminal else message, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def wait(self, future: Future) -> Any:
        """The future's result, with a sign of life while it is awaited."""
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=1)
            self()

    def close(self) -> None:
        if self.terminal and self.shown > self.begun:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def encode_all(pool: ProcessPoolExecutor, workers: int, parts: list[Part], model: bytes, caseops: bool) -> Iterator[Encoded]:
    """All parts in order. Only a few batches are under way at a time, so memory does not grow with the text."""
    progress, batches = Progress("encoding", sum(part.size for part in parts)), read_batches(parts)
    pending: deque[tuple[Future, int]] = deque()
    while True:
        while len(pending) < 2 * workers and (batch := next(batches, None)):
            pending.append((pool.submit(encode_batch, model, caseops, batch), batch.consumed))
        if not pending:
            return progress.close()
        future, consumed = pending.popleft()
        yield from future.result()
        progress(consumed)


class SplitGuard:
    """Keeps texts of validation out of training, and counts copies. Validation must come first, unless the hash of a text
    decides, which sends all its copies to one split."""

    def __init__(self, leave_out: bool):
        self.leave_out = leave_out  # or refuse
        self.validation: dict[int, str] = {}  # hash -> where
        self.training: list[np.ndarray] = []
        self.copies = Counter()

    def __call__(self, encoded: Encoded) -> Encoded:
        digests, where = encoded.digests.tolist(), [f"{encoded.source}:{n + 1}" for n in encoded.numbers.tolist()]
        if encoded.split == "val":
            known = len(self.validation)
            self.validation |= dict(zip(digests, where, strict=True))
            self.copies["val"] += len(digests) - (len(self.validation) - known)
            return encoded
        leaked = np.array([digest in self.validation for digest in digests], bool)
        if leaked.any() and not self.leave_out:
            first = int(leaked.argmax())
            raise DataError(f"{where[first]}: this training document is in validation too ({self.validation[digests[first]]}); "
                            "a score on it would mean nothing: remove one of the two")
        self.copies["left out"] += int(leaked.sum())
        self.training.append(encoded.digests[~leaked])
        return encoded.without(leaked)

    def training_copies(self) -> int:
        seen = np.concatenate([np.zeros(0, np.uint64), *self.training])
        return len(seen) - len(np.unique(seen))


# -----------------------------------------------------------------------------
# Shards: the contest's files, and the manifest that says what they are. A finished folder appears by renaming.


def shard_chunks(values: list[np.ndarray], digest: Any) -> Iterator[bytes]:
    """A shard's bytes, hashed on their way."""
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, sum(map(len, values))
    for array in (header, *(v.astype("<u2", copy=False) for v in values)):
        digest.update(chunk := array.tobytes())
        yield chunk


def write_shard(path: Path, values: list[np.ndarray]) -> dict:
    """Write one shard -> its line in the manifest."""
    digest = hashlib.sha256()
    write_atomically(path, shard_chunks(values, digest))
    return {"file": path.name, "tokens": sum(map(len, values)), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


class ShardWriter:
    """Collects one split's documents, and writes a shard when the next one would not fit: every shard begins with BOS, and
    no document lies in two."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.limit = folder, split, shard_tokens
        self.tokens: list[np.ndarray] = []
        self.sidecar: list[np.ndarray] = []
        self.held = 0
        self.totals = Counter()
        self.written: dict[str, list[dict]] = {"shards": [], "sidecars": []}

    def add(self, encoded: Encoded) -> None:
        self.totals += Counter(documents=len(encoded.lengths), tokens=len(encoded.tokens), empty_documents=encoded.empty,
                               **dict(zip(MEASURES, encoded.measures.sum(0).tolist(), strict=True)))
        ends, begin, document = np.cumsum(encoded.lengths), 0, 0
        while document < len(ends):
            fitting = int(np.searchsorted(ends, begin + self.limit - self.held, side="right"))
            if fitting == document and self.held:
                self.flush()
                continue
            document = max(fitting, document + 1)  # one document may be longer than a shard
            end = int(ends[document - 1])
            self.tokens.append(encoded.tokens[begin:end])
            if encoded.sidecar is not None:
                self.sidecar.append(encoded.sidecar[begin:end])
            self.held += end - begin
            begin = end

    def flush(self) -> None:
        number = f"{len(self.written['shards']):06d}.bin"
        if self.held:
            self.written["shards"].append(write_shard(self.folder / f"fineweb_{self.split}_{number}", self.tokens))
        if self.held and self.sidecar:
            self.written["sidecars"].append(write_shard(self.folder / f"fineweb_{self.split}_bytes_{number}", self.sidecar))
        self.tokens, self.sidecar, self.held = [], [], 0


@contextlib.contextmanager
def workspace(final: Path, resumable: bool) -> Iterator[Path]:
    """A hidden folder beside `final`, which it replaces when the block has succeeded. Otherwise it goes, or stays to be
    resumed; `final` is as it was."""
    if final.exists() and not (final / "manifest.json").is_file():
        raise UserError(f"{final}: is there and was not made by prepare (it has no manifest.json); choose another --name or --out")
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{final}: another process is preparing it; wait for it, or choose another --name") from None
    try:
        for leftover in () if resumable else partial.iterdir():
            leftover.unlink()
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def prepared(final: Path, parameters: dict) -> dict | None:
    """The manifest of a finished preparation with these parameters whose files are all there, if there is one."""
    try:
        manifest = json.loads((final / "manifest.json").read_text(encoding="utf-8"))
        same = manifest["parameters"] == parameters
        files = [shard for split in manifest["splits"].values() for kind in ("shards", "sidecars") for shard in split[kind]]
        whole = all((final / shard["file"]).stat().st_size == shard["bytes"] for shard in files)
        named = hashlib.sha256((final / manifest["tokenizer"]["path"]).read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if same and whole and named else None


def write_manifest(folder: Path, final: Path, model: bytes, encoder: Encoder, facts: dict) -> dict:
    """Put the tokenizer in its place and the manifest, last of all files, into the folder that will be `final`."""
    tokenizer = final.parent.parent / "tokenizers" / f"{final.name}.model"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(tokenizer, [model])
    manifest = {"format": FORMAT, **facts, "versions": versions("numpy", "torch"), "platform": platform.platform(), "tokenizer": {
        "path": f"../../tokenizers/{tokenizer.name}", "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": encoder.processor.get_piece_size(), "transform": "caseops" if encoder.caseops else "none",
        "exact": encoder.exact}}
    write_atomically(folder / "manifest.json", [json.dumps(manifest, indent=1).encode() + b"\n"])
    return manifest


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), "sentencepiece": sentencepiece.__version__,
            **{name: str(importlib.import_module(name).__version__) for name in packages}}


def report(final: Path, manifest: dict, note: str = "") -> None:
    """What was prepared, a line for each split, and a warning where the contest's formula counts bytes that are not there."""
    for name, split in manifest["splits"].items():
        size = split["original_bytes"] or split["contest_bytes"]
        text = f", {size:,} bytes of text, {size / split['tokens']:.3f} a token" if size else ""
        print(f"{name:5} {split['documents']:,} documents, {split['tokens']:,} tokens{text}, {len(split['shards'])} shards")
        for what in ("empty_documents", "duplicate_documents", "left_out_documents"):
            if split.get(what):
                print(f"      {split[what]:,} {what.replace('_', ' ')}")
        counted, smaller = split["contest_bytes"], split["smaller_bytes"]
        if counted and smaller and counted > smaller:
            print(f"warning: {name}: the contest's formula counts {counted:,} bytes, {counted / smaller - 1:.4%} more than the "
                  f"smaller of original and decoded ({smaller:,}): its bpb flatters by as much")
    print(f"{final}{note}")


# -----------------------------------------------------------------------------
# Hub: files over HTTPS, resumed where they stopped, and checked.

HUB = "https://huggingface.co"
PLAIN_REPOSITORY = "willdepueoai/parameter-golf"
REPOSITORIES = {"caseops": "romeerp/parameter-golf-caseops-v1", "sp8192": "kevclark/parameter-golf"}
DATASETS = {"caseops": "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"}
MAX_ATTEMPTS = 6       # in a row without a byte
FIRST_PAUSE_S = 1.0    # doubled at every further attempt
LONGEST_PAUSE_S = 60.0
TIMEOUT_S = 60
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP states worth another attempt


class LinkedDigest(urllib.request.HTTPRedirectHandler):
    """The hub redirects a large file to where it lies, and names its SHA-256 in doing so."""
    digest = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.digest = headers.get("X-Linked-Etag", "").strip('"')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Hub(NamedTuple):
    """A dataset repository and the folder in it where the contest's files lie."""
    base_url: str
    repository: str

    def url(self, name: str) -> str:
        return f"{self.base_url.rstrip('/')}/datasets/{self.repository}/resolve/main/datasets/{name}"

    def fetch(self, name: str, path: Path, label: str = "") -> Path:
        """Download a file, going on from what an earlier attempt left beside it. It gets its name when it is whole."""
        beside, attempts = path.with_name(f".{path.name}.part"), 0
        progress = Progress(label or path.name)
        while True:
            before = beside.stat().st_size if beside.exists() else 0
            wait = 0.0
            try:
                total, digest = self.transfer(name, beside, before, progress)
                if beside.stat().st_size == total:
                    break
                reason = f"{beside.stat().st_size:,} of {total:,} bytes came"
            except urllib.error.HTTPError as error:
                reason, wait = self.state(name, error, beside), retry_after(error)
            except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and cut connections among them
                if isinstance(error, OSError) and error.filename:  # the disk's fault, not the network's
                    raise
                reason = str(error) or type(error).__name__
            attempts = 1 if beside.exists() and beside.stat().st_size > before else attempts + 1
            if attempts == MAX_ATTEMPTS:
                raise UserError(f"{self.url(name)}: {reason}; gave up after {attempts} attempts; run it again to go on from here")
            time.sleep(min(max(wait, FIRST_PAUSE_S * 2 ** (attempts - 1)), LONGEST_PAUSE_S))
        progress.close()
        if len(digest) == 64 and digest != file_sha256(beside):
            beside.unlink()
            raise DataError(f"{self.url(name)}: what came has not the SHA-256 that the hub names; run it again")
        beside.rename(path)
        return path

    def transfer(self, name: str, beside: Path, begin: int, progress: Progress) -> tuple[int, str]:
        """One request, appended to `beside` -> the file's size, its SHA-256 or ''."""
        memory = LinkedDigest()
        request = urllib.request.Request(self.url(name), headers={"User-Agent": "prepare.py"})
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        with urllib.request.build_opener(memory).open(request, timeout=TIMEOUT_S) as answer:
            resumed = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status == 206 and (not resumed or int(resumed[1]) != begin):
                raise DataError(f"{self.url(name)}: asked to go on at byte {begin:,}, the server answered "
                                f"{answer.headers.get('Content-Range')!r}; remove {beside} and run it again")
            begin = begin if answer.status == 206 else 0  # a server may send all of it again
            total = int(resumed[2]) if answer.status == 206 else int(answer.headers.get("Content-Length", -1))
            progress.total = total
            with open(beside, "ab" if begin else "wb") as out:
                while chunk := answer.read(1 << 20):
                    try:
                        out.write(chunk)
                    except OSError as error:
                        raise UserError(f"{beside}: cannot be written: {error.strerror}; free some space") from None
                    progress(out.tell(), begin)
                size = out.tell()
        return (total if total >= 0 else size), memory.digest

    def state(self, name: str, error: urllib.error.HTTPError, beside: Path) -> str:
        """The reason to try again after an HTTP error state, or a UserError."""
        if error.code == 416:  # what lies there is no beginning of this file
            beside.unlink()
        elif error.code not in PASSING:
            hint = {404: "no such file there; see --variant and --repo", 401: "the repository is not public",
                    403: "the repository is not public"}.get(error.code, "see --repo and --base-url")
            raise UserError(f"{self.url(name)}: HTTP {error.code} {error.reason}: {hint}") from None
        return f"HTTP {error.code} {error.reason}"


def retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks us to wait."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


def file_sha256(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# Preparing: one way for text, one for the shards that others published.

NO_MEASURES = dict.fromkeys((*MEASURES, "empty_documents", "duplicate_documents", "left_out_documents"))


def prepare_text(args: argparse.Namespace, source: dict, rule: str, find_parts: Callable[[], list[Part]], leave_out: bool) -> None:
    """Documents -> a prepared dataset. `source` must name all that decides what `find_parts` finds."""
    final, given, caseops = args.out / "datasets" / args.name, None, args.caseops is not False
    if args.tokenizer:
        given = args.tokenizer.read_bytes()
        processor = load_encoder(given, False, str(args.tokenizer)).processor
        made_for_caseops = processor.piece_to_id(TITLE) != processor.unk_id()
        caseops = made_for_caseops if args.caseops is None else args.caseops
    parameters = {"format": FORMAT, "source": source, "shard_tokens": args.shard_tokens, "caseops": caseops,
                  "tokenizer": hashlib.sha256(given).hexdigest() if given else {"vocab_size": args.vocab_size},
                  "sentencepiece": sentencepiece.__version__}
    if manifest := prepared(final, parameters):
        return report(final, manifest, ": already prepared")
    with workspace(final, resumable=False) as folder, worker_pool(args.workers) as pool:
        parts = Progress("looking for documents").wait(pool.submit(find_parts))
        training = Progress("training the tokenizer")
        model = given or training.wait(pool.submit(train_tokenizer, parts, args.vocab_size, caseops))
        training.close()
        encoder = load_encoder(model, caseops, "the tokenizer")
        writers, guard = {split: ShardWriter(folder, split, args.shard_tokens) for split in SPLITS}, SplitGuard(leave_out)
        for encoded in encode_all(pool, args.workers, parts, model, caseops):
            writers[encoded.split].add(guard(encoded))
        guard.copies["train"] = guard.training_copies()
        for split, writer in writers.items():
            writer.flush()
            if not writer.totals["documents"]:
                raise DataError(f"no document is left for {split}; the split is: {rule}")
        splits = {split: {**{key: writer.totals[key] for key in ("documents", "tokens", *MEASURES, "empty_documents")},
                          "duplicate_documents": guard.copies[split],
                          "left_out_documents": guard.copies["left out"] if split == "train" else 0, **writer.written}
                  for split, writer in writers.items()}
        for split in splits.values() if caseops else ():
            split["contest_bytes"] = None  # the formula knows no markers
        manifest = write_manifest(folder, final, model, encoder, {"parameters": parameters, "split_rule": rule, "splits": splits})
    report(final, manifest)


def prepare_installed(args: argparse.Namespace) -> None:
    source = {"kind": "installed", "val_docs": args.val_docs, "versions": versions("numpy", "torch")}
    rule = f"validation = the {args.val_docs} documents with the smallest hashes"
    prepare_text(args, source, rule, functools.partial(installed_parts, args.val_docs), leave_out=False)


def prepare_jsonl(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: expected a number between 0 and 1")
    if args.val:
        rule, parts = "validation = its own files", file_parts(args.val, all_validation=True)
        parts += file_parts(args.files)
    else:
        rule = f"validation = documents whose hash lies in the lowest {args.val_fraction:g} of all hashes"
        parts = file_parts(args.files, hash_validation=int(args.val_fraction * 2**64))
    files = [[p.name, p.all_validation, p.size, Path(p.name).stat().st_mtime_ns] for p in parts]
    prepare_text(args, {"kind": "jsonl", "files": files, "split": rule}, rule, functools.partial(list, parts), leave_out=False)


def prepare_contest(args: argparse.Namespace) -> None:
    dataset = DATASETS.get(args.variant, f"fineweb10B_{args.variant}")
    args.name = args.name or ("contest_documents" if args.documents else dataset)
    repository = PLAIN_REPOSITORY if args.documents else REPOSITORIES.get(args.variant, PLAIN_REPOSITORY)
    hub = Hub(args.base_url, args.repo or repository)
    if not args.documents:
        return prepare_published(args, hub, dataset)
    if args.val_docs < 1:
        raise UserError(f"--val-docs {args.val_docs}: expected at least 1; the contest's validation is the first 50,000")
    source = {"kind": "contest documents", "base_url": hub.base_url, "repository": hub.repository, "val_docs": args.val_docs}
    rule = f"validation = the first {args.val_docs} documents"
    prepare_text(args, source, rule, functools.partial(contest_parts, hub, args.out, args.val_docs), leave_out=True)


def contest_parts(hub: Hub, out: Path, val_documents: int) -> list[Part]:
    """The published documents, downloaded once and checked against the hash that was published with them."""
    path, facts = out / "docs_selected.jsonl", out / "docs_selected.source_manifest.json"
    if not path.exists():
        want = json.loads(hub.fetch(facts.name, facts).read_bytes()).get("docs_sha256")
        hub.fetch(path.name, path)
        if want and file_sha256(path) != want:
            path.unlink()
            raise DataError(f"{hub.url(path.name)}: what came has not the published SHA-256 {want}; run it again")
    return [Part(str(path), first_validation=val_documents)]


def published_entry(hub: Hub, folder: Path, dataset: str) -> tuple[dict, dict, int, int]:
    """The published manifest's words on a dataset and its tokenizer, and how many shards it has: training, validation."""
    path = hub.fetch("manifest.json", folder / "published.json")
    try:
        published = json.loads(path.read_bytes())
        names = [entry["name"] for entry in published["datasets"]]
        if dataset not in names:
            raise UserError(f"{hub.url('manifest.json')}: no dataset {dataset}; there are {', '.join(sorted(names))}; choose a "
                            "--variant, or another --repo")
        entry = published["datasets"][names.index(dataset)]
        tokenizer = next(t for t in published["tokenizers"] if t["name"] == entry["tokenizer_name"])
        if not isinstance(tokenizer.get("model_path"), str):
            raise UserError(f"{hub.url('manifest.json')}: {dataset} has no SentencePiece tokenizer; choose another --variant")
        return entry, tokenizer, int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{hub.url('manifest.json')}: not a manifest of datasets ({error!r}); see --repo") from None
    finally:
        path.unlink()


def prepare_published(args: argparse.Namespace, hub: Hub, dataset: str) -> None:
    """Download shards as they were published, check every one, and say in our manifest what they are."""
    final = args.out / "datasets" / args.name
    source = {"kind": "contest", "base_url": hub.base_url, "repository": hub.repository, "dataset": dataset}
    parameters = {"format": FORMAT, "source": source, "train_shards": args.train_shards}
    if manifest := prepared(final, parameters):
        return report(final, manifest, ": already prepared")
    with workspace(final, resumable=True) as folder:
        reuse_files(folder, final, source)
        entry, tokenizer, train_shards, val_shards = published_entry(hub, folder, dataset)
        if not 0 < args.train_shards <= train_shards:
            raise UserError(f"--train-shards {args.train_shards}: {dataset} has {train_shards} in {hub.repository}")
        caseops = "caseops" in dataset
        counts = {"val": val_shards, "val_bytes": val_shards if caseops or entry.get("val_bytes_glob") else 0,
                  "train": args.train_shards}
        names = {kind: [f"fineweb_{kind}_{i:06d}.bin" for i in range(count)] for kind, count in counts.items()}
        missing = [name for kind in names for name in names[kind] if not (folder / name).exists()]
        if shutil.disk_usage(folder).free < len(missing) * SHARD_BYTES:
            raise UserError(f"{folder}: {len(missing)} files of about {SHARD_BYTES / 1e6:.0f} MB do not fit; free some space, "
                            "or ask for fewer --train-shards")
        model = hub.fetch(tokenizer["model_path"], folder / "tokenizer.model").read_bytes()
        encoder = load_encoder(model, caseops, hub.url(tokenizer["model_path"]))
        for number, name in enumerate(missing, 1):
            hub.fetch(f"datasets/{dataset}/{name}", folder / name, f"{name} ({number} of {len(missing)})")
        splits = check_published(folder, names, encoder)
        for name in ("tokenizer.model", "source.json"):
            (folder / name).unlink()
        facts = {"parameters": parameters, "split_rule": "as published", "splits": splits}
        manifest = write_manifest(folder, final, model, encoder, facts)
    report(final, manifest)


def reuse_files(folder: Path, final: Path, source: dict) -> None:
    """Keep what an interrupted or an earlier, shorter download of the same source left; drop what another one left."""
    mark, wanted = folder / "source.json", json.dumps(source).encode()
    if not mark.exists() or mark.read_bytes() != wanted:
        for leftover in folder.iterdir():
            leftover.unlink()
        write_atomically(mark, [wanted])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((final / "manifest.json").read_bytes())["parameters"]["source"] == source:
            for shard in final.glob("fineweb_*.bin"):
                if not (folder / shard.name).exists():
                    os.link(shard, folder / shard.name)


def document_digests(tokens: np.ndarray) -> list[bytes]:
    """Hashes of the documents that begin and end in a shard."""
    starts = np.flatnonzero(tokens == BOS)
    return [hashlib.blake2b(tokens[a:b].tobytes(), digest_size=8).digest()
            for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def check_published(folder: Path, names: dict[str, list[str]], encoder: Encoder) -> dict:
    """Check every downloaded shard whole -> the manifest's splits. A bad one is removed, so that another run fetches it."""
    vocab, validation, leaked = encoder.processor.get_piece_size(), set(), set()
    splits = {split: {"documents": 0, "tokens": 0, **NO_MEASURES, "shards": [], "sidecars": []} for split in SPLITS}
    progress = Progress("checking shards")
    for split in ("val", "train"):
        facts = splits[split]
        for i, name in enumerate(names[split]):
            progress()
            tokens = checked_shard(folder / name, vocab, begins=split == "val" and i == 0)
            facts["documents"] += int((tokens == BOS).sum())
            facts["tokens"] += len(tokens)
            facts["shards"].append(shard_facts(folder / name, tokens))
            digests = document_digests(tokens)
            validation.update(digests if split == "val" else ())
            leaked.update(validation.intersection(digests) if split == "train" else ())
    if len(leaked) > 0.05 * len(validation):  # a few copies are the web's; preparations that split twice leaked four in five
        raise DataError(f"{len(leaked):,} of {len(validation):,} validation documents are in training too: this dataset was "
                        "split wrongly, and a score on it would mean nothing; use another --repo")
    splits["train"]["duplicate_documents"] = len(leaked)
    stream = np.concatenate([read_shard(folder / name) for name in names["val"]])
    sidecars = [read_shard(folder / name) for name in names["val_bytes"]]
    for name, shard, sidecar in zip(names["val_bytes"], splits["val"]["shards"], sidecars, strict=False):
        if len(sidecar) != shard["tokens"]:
            (folder / name).unlink()
            raise DataError(f"{folder / name}: {len(sidecar)} entries for {shard['tokens']} tokens; run it again to fetch it again")
        splits["val"]["sidecars"].append(shard_facts(folder / name, sidecar))
    splits["val"] |= published_bytes(stream, np.concatenate(sidecars) if sidecars else None, encoder)
    progress.close()
    return splits


def checked_shard(path: Path, vocab_size: int, begins: bool) -> np.ndarray:
    try:
        tokens = read_shard(path)
        if not len(tokens) or int(tokens.max()) >= vocab_size:
            raise DataError(f"{path}: tokens up to {tokens.max(initial=0)} for a vocabulary of {vocab_size}; see --variant")
        if begins and tokens[0] != BOS or not (tokens == BOS).any():
            raise DataError(f"{path}: no BOS ({BOS}) where a document must begin; see --repo")
    except DataError:
        path.unlink()
        raise
    return tokens


def shard_facts(path: Path, values: np.ndarray) -> dict:
    return {"file": path.name, "tokens": len(values), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def published_bytes(stream: np.ndarray, sidecar: np.ndarray | None, encoder: Encoder) -> dict:
    """What validation weighs, as far as it can be known without its text: original bytes only where there is a side-car."""
    starts = np.flatnonzero(stream == BOS)
    decoded = np.zeros(len(starts), np.int64)
    for i, (a, b) in enumerate(zip(starts.tolist(), [*starts[1:].tolist(), len(stream)], strict=True)):
        text = encoder.processor.decode(stream[a:b].tolist())
        decoded[i] = len((decode_caseops(text) if encoder.caseops else text).encode())
    facts = {"decoded_bytes": int(decoded.sum())}
    if not encoder.caseops:
        facts["contest_bytes"] = int(contest_bytes(stream, encoder.pieces).sum())
    if sidecar is not None:
        original = np.add.reduceat(sidecar.astype(np.int64), starts)
        facts |= {"original_bytes": int(original.sum()), "smaller_bytes": int(np.minimum(original, decoded).sum())}
    return facts


# -----------------------------------------------------------------------------
# Command line


def count(text: str) -> int:
    """An option that counts something."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 2^31 - 1")
    return int(text)


def folder_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, dots, dashes and underscores")
    return text


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    made = {}
    for name, run, vocab, doc in (
            ("installed", prepare_installed, 2048, "documentation of Python, NumPy and torch, as it lies on this machine"),
            ("jsonl", prepare_jsonl, 8192, "files with one document a line: a JSON string, or an object with \"text\""),
            ("contest", prepare_contest, 8192, "the contest's published shards, or documents, from the hub")):
        made[name] = p = sources.add_parser(name, help=doc, description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder for datasets/ and tokenizers/")
        p.add_argument("--name", type=folder_name, default=None if name == "contest" else name, help="name of the dataset")
        p.add_argument("--tokenizer", type=Path, help="SentencePiece model to use; without it one is trained")
        p.add_argument("--vocab-size", type=count, default=vocab, help="pieces of a tokenizer that is trained")
        p.add_argument("--caseops", action=argparse.BooleanOptionalAction, default=None,
                       help="spell capitals as markers (None: yes when training, else if the tokenizer has the markers)")
        p.add_argument("--workers", type=count, default=len(os.sched_getaffinity(0)), help="processes")
        p.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens a shard at most")
    made["installed"].add_argument("--val-docs", type=count, default=64, help="documents for validation, by hash")
    made["jsonl"].add_argument("files", nargs="+", help="files or quoted globs: .jsonl, also .gz, .bz2, .zst")
    made["jsonl"].add_argument("--val", nargs="+", help="files of their own for validation")
    made["jsonl"].add_argument("--val-fraction", type=float, default=0.02, help="without --val: share for validation, by hash")
    contest = made["contest"]
    contest.add_argument("--variant", type=folder_name, default="caseops", help="sp1024, sp8192, caseops, or what follows fineweb10B_")
    contest.add_argument("--train-shards", type=count, default=80, help="training shards of 100 million tokens, 200 MB each")
    contest.add_argument("--documents", action="store_true", help="the text (48 GB), to be encoded here, instead of shards")
    contest.add_argument("--val-docs", type=count, default=50_000, help="with --documents: the first so many are validation")
    contest.add_argument("--repo", help="OWNER/NAME on the hub, instead of the one that publishes the variant")
    contest.add_argument("--base-url", default=HUB, help="the hub")
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
        print(f"prepare: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: interrupted; nothing half-made was left. A download goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as cleanly as after Ctrl-C
    sys.exit(main())
