"""
Turn text into the shards that train_gpt.py reads: documents, (CaseOps,) SentencePiece, uint16 tokens with BOS before
every document.

    python data/prepare.py installed                      the documentation on this machine: nothing to download
    python data/prepare.py jsonl FILES... --val FILES...  your own: a JSON string, or an object with "text", a line
    python data/prepare.py contest --variant caseops      the contest's published shards
    python data/prepare.py contest --documents            the contest's published text, with a tokenizer of your own
    python data/prepare.py SOURCE --help                  every option [and its default]

Writes <out>/datasets/<name>/ with fineweb_train_NNNNNN.bin, fineweb_val_NNNNNN.bin, fineweb_val_bytes_NNNNNN.bin and
manifest.json, and <out>/tokenizers/<name>.model. The side-car fineweb_val_bytes holds the bytes of original text behind
every validation token; those of a document add up to its UTF-8 length. A dataset appears whole or not at all.

Sections: Command line, Commands, Documents, Installed documentation, Tokenizers, CaseOps, Encoding, Worker processes,
Splits, Shards, Manifest, Published shards, Hub.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import errno
import functools
import gc
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
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

try:
    import lzma
except ImportError:  # some builds of Python lack it
    lzma = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of train_gpt.py
try:
    import numpy as np
    import sentencepiece
    import torch
    import zstandard

    from tools.artifact import end_in_a_line
    from tools.processes import ends_with_its_parent
    from train_gpt import (
        BOS,
        MARKERS,
        MOST_OF_AN_ERROR,
        SHARD_HEADER_INTS,
        SHARD_MAGIC,
        SHARD_VERSION,
        DataError,
        PieceBytes,
        UserError,
        contest_bytes,
        has_markers,
        lock_file,
        piece_bytes,
        printable,
        read_shard,
        write_atomically,
    )
except ModuleNotFoundError as error:
    print(f"prepare: {error}; install requirements.txt, or start it as ./run.sh data", file=sys.stderr)
    sys.exit(2)


# ======================================================================================================================
# Command line


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for an error that the user can fix, 130 if interrupted. Raises BrokenPipeError if
    nobody reads the output any more."""
    args = command_line().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        tell(f"prepare: {printable(str(error), MOST_OF_AN_ERROR)}", sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space, or choose another --out" if disk_is_full else ""
        message = f"prepare: {error.filename or args.out}: {error.strerror or error}{hint}"
        tell(printable(message, MOST_OF_AN_ERROR), sys.stderr)
        return 2
    except KeyboardInterrupt:
        tell("prepare: interrupted; a download can be resumed, nothing else is left behind", sys.stderr)
        return 130
    return 0


def tell(line: str, screen: TextIO, end: str = "\n") -> None:
    """Print a line for people. A dataset does not depend on it: a screen that cannot be written to, such as a file on a
    full disk, is then left alone; stderr is told of stdout. Raises BrokenPipeError if nobody reads any more."""
    try:
        print(line, end=end, file=screen, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())  # what is still unwritten would fail again
        if screen is sys.stdout:
            tell(f"warning: stdout: a line cannot be written: {error.strerror}; the data is not affected", sys.stderr)


class CommandParser(argparse.ArgumentParser):
    """Explains why FILES are missing when --val has taken all of them."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: files"):
            message += "; --val takes every name that follows it: give the training files before it, or -- before them"
        super().error(message)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE", parser_class=CommandParser)
    add_installed_command(sources)
    add_jsonl_command(sources)
    add_contest_command(sources)
    return parser


def add_installed_command(sources: argparse._SubParsersAction) -> None:
    summary = "the documentation of Python, NumPy and torch on this machine"
    command = sources.add_parser("installed", help=summary, description=summary)
    command.set_defaults(run=prepare_installed)
    add_common_options(command, name="installed", vocab_size=2048)
    command.add_argument("--val-docs", type=whole_number, default=64, help="documents for validation [%(default)s]")


def add_jsonl_command(sources: argparse._SubParsersAction) -> None:
    summary = 'files with one document a line: a JSON string, or an object with "text"'
    command = sources.add_parser("jsonl", help=summary, description=summary)
    command.set_defaults(run=prepare_jsonl)
    add_common_options(command, name="jsonl", vocab_size=8192)
    command.add_argument("files", nargs="+", help="files or quoted globs: JSONL, also as .gz, .bz2, .zst or .xz")
    command.add_argument("--val", nargs="+", help="files for validation [--val-fraction decides]")
    command.add_argument(
        "--val-fraction",
        type=float,
        default=0.02,
        help="share of the texts for validation, by hash [%(default)s]",
    )
    command.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out lines that hold no usable text, count them and name the first [they are an error]",
    )


def add_contest_command(sources: argparse._SubParsersAction) -> None:
    summary = "the contest's published shards, or its documents, from the hub"
    command = sources.add_parser("contest", help=summary, description=summary)
    command.set_defaults(run=prepare_contest)
    add_common_options(command, name=None, vocab_size=8192)
    command.add_argument(
        "--variant",
        type=folder_name,
        default="caseops",
        help="sp1024, sp8192, caseops, or what follows fineweb10B_ in a name [%(default)s]",
    )
    command.add_argument(
        "--train-shards",
        type=whole_number,
        default=80,
        help="training shards of 100 million tokens and 200 MB each [%(default)s]",
    )
    command.add_argument(
        "--documents",
        action="store_true",
        help="download the text, 48 GB, and encode it here, instead of shards",
    )
    command.add_argument(
        "--val-docs",
        type=whole_number,
        default=CONTEST_VAL_DOCS,
        help="with --documents: how many of the first documents are for validation [%(default)s]",
    )
    command.add_argument("--repo", help="OWNER/NAME on the hub [the one that publishes the variant]")
    command.add_argument("--base-url", type=web_address, default=HUB_URL, help="address of the hub [%(default)s]")


def add_common_options(command: argparse.ArgumentParser, name: str | None, vocab_size: int) -> None:
    """Options of every command; `name` is the default of --name, None for the name of the published dataset."""
    command.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder for datasets/ and tokenizers/ [the folder of this file]",
    )
    command.add_argument(
        "--name",
        type=folder_name,
        default=name,
        help=f"name of the dataset [{name or 'the published one'}]",
    )
    command.add_argument("--tokenizer", type=Path, help="SentencePiece model to use [one is trained]")
    command.add_argument(
        "--vocab-size",
        type=vocabulary_size,
        default=vocab_size,
        help="pieces of a tokenizer that is trained [%(default)s]",
    )
    command.add_argument(
        "--caseops",
        action=argparse.BooleanOptionalAction,
        help="spell capitals as markers [yes; with --tokenizer, if it has the markers]",
    )
    command.add_argument(
        "--workers",
        type=whole_number,
        default=len(os.sched_getaffinity(0)),
        help="worker processes [one a core]",
    )
    command.add_argument(
        "--shard-tokens",
        type=whole_number,
        default=100_000_000,
        help="most tokens of a shard [%(default)s]",
    )
    command.add_argument(
        "--replace",
        action="store_true",
        help="replace an earlier dataset of the same name [it is left alone]",
    )


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def vocabulary_size(text: str) -> int:
    size = whole_number(text)
    if size <= FIXED_PIECES:
        least = f"at least {FIXED_PIECES + 1}: 256 bytes, 4 special pieces, and the characters of the text"
        raise argparse.ArgumentTypeError(f"{text}: expected {least}")
    if size > MOST_PIECES:
        raise argparse.ArgumentTypeError(f"{text}: expected at most {MOST_PIECES:,}: tokens are uint16")
    return size


def web_address(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number, or an incomplete IPv6 address
        good = False
    if not good or not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected https://HOST, or http://HOST")
    return text


def folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, underscores, dots and dashes")
    return text


# ======================================================================================================================
# Commands: each finds documents and says which of them are for validation; one function does the rest.


def prepare_installed(args: argparse.Namespace) -> None:
    def find_sources(folder: Path) -> list[SourceFile]:
        return write_installed_documents(folder, args.val_docs)

    source = {"kind": "installed", "val_docs": args.val_docs, "versions": versions()}
    split_rule = f"validation is the {args.val_docs} documents with the smallest digests"
    prepare_text(args, source, split_rule, find_sources)


def prepare_jsonl(args: argparse.Namespace) -> None:
    if args.val:
        split_rule = "validation has files of its own"
        validation = source_files(args.val, all_validation=True, skip_bad_lines=args.skip_bad_lines)
        sources = validation + source_files(args.files, skip_bad_lines=args.skip_bad_lines)
        if len(args.val) > 1:  # shows a training file that was given after --val
            names = ", ".join(file.path for file in validation)
            message = f"validation: {len(validation)} files: {names}"
            tell(printable(message, MOST_OF_AN_ERROR), sys.stderr)
    else:
        if not 0 < args.val_fraction < 1:
            raise UserError(f"--val-fraction {args.val_fraction}: expected a number between 0 and 1")
        split_rule = f"validation is the texts whose digests are among the lowest {args.val_fraction} of all digests"
        sources = source_files(
            args.files, validation_digests=int(args.val_fraction * 2**64), skip_bad_lines=args.skip_bad_lines
        )

    files = []
    for file in sources:
        stat = Path(file.path).stat()
        files.append([file.path, file.all_validation, stat.st_size, stat.st_mtime_ns])

    def find_sources(_: Path) -> list[SourceFile]:
        return sources

    source: dict[str, Any] = {"kind": "jsonl", "files": files, "split": split_rule}
    if args.skip_bad_lines:
        source["skip_bad_lines"] = True
    prepare_text(args, source, split_rule, find_sources)


def prepare_contest(args: argparse.Namespace) -> None:
    if args.documents:
        prepare_contest_documents(args)
    else:
        prepare_published_shards(args)


def prepare_contest_documents(args: argparse.Namespace) -> None:
    """The published text, with your own tokenizer. Web text holds duplicates: copies of validation documents are left
    out of training."""
    if args.val_docs < CONTEST_VAL_DOCS:
        tell(
            f"warning: --val-docs {args.val_docs}: documents up to the {CONTEST_VAL_DOCS:,}th are the contest's "
            "validation, and here you train on them: a score on this data is not a score in the contest",
            sys.stderr,
        )
    args.name = args.name or "contest_documents"
    hub = Hub(args.base_url, args.repo or PLAIN_REPOSITORY)

    def find_sources(_: Path) -> list[SourceFile]:
        path = fetch_contest_documents(hub, args.out)
        return [SourceFile(str(path), first_validation=args.val_docs)]

    source = {"kind": "contest documents", "hub": hub.base_url, "repo": hub.repo, "val_docs": args.val_docs}
    split_rule = f"validation is the first {args.val_docs} documents"
    prepare_text(args, source, split_rule, find_sources, drop_leaked=True)


def prepare_text(
    args: argparse.Namespace,
    source: dict,
    split_rule: str,
    find_sources: Callable[[Path], list[SourceFile]],
    drop_leaked: bool = False,
) -> None:
    """Documents -> a dataset, the same way whatever their source.

    args:          the common options
    source:        everything that determines what find_sources finds; if it is unchanged, nothing is prepared again
    split_rule:    the rule for validation, in words, for the manifest
    find_sources:  returns the files of documents; may write some into the folder it is given
    drop_leaked:   whether training documents that are also in validation are left out; otherwise they are refused
    """
    final = args.out / "datasets" / args.name
    model, caseops = choose_tokenizer(args)
    parameters = {
        "format": FORMAT,
        "source": source,
        "shard_tokens": args.shard_tokens,
        "caseops": caseops,
        "tokenizer": hashlib.sha256(model).hexdigest() if model else trained_as(args.vocab_size, caseops),
        "sentencepiece": sentencepiece.__version__,
    }
    prepared = find_prepared(final, parameters)
    if prepared:
        print_summary(final, prepared, ": already prepared")
        return

    with workspace(final, parameters, args.replace) as folder:
        sources = find_sources(folder)
        if not model:
            model = train_tokenizer_in_worker(folder / "tokenizer.model", sources, args.vocab_size, caseops)
        encoder = load_encoder(model, caseops)

        guard = SplitGuard(drop_leaked)
        skipped = SkippedLines()
        writers = {split: ShardWriter(folder, split, args.shard_tokens) for split in SPLITS}
        with worker_pool(args.workers) as pool:
            for encoded in encode_all(pool, args.workers, sources, model, caseops, skipped):
                writers[encoded.split].add(guard.admit(encoded))

        splits = {split: finish_split(writer, guard, caseops, split_rule) for split, writer in writers.items()}
        facts = {"parameters": parameters, "split_rule": split_rule, "splits": splits}
        if skipped.blank or skipped.bad:
            facts["skipped_lines"] = {"blank": skipped.blank, "bad": skipped.bad}
        if any(writer.changed_documents for writer in writers.values()):
            encoder = encoder._replace(exact=False)  # exact by its rules, but the documents show otherwise
        manifest = write_manifest(folder, final, model, encoder, facts)
    skipped.report()
    print_summary(final, manifest)


def choose_tokenizer(args: argparse.Namespace) -> tuple[bytes, bool]:
    """(the model that --tokenizer names, b"" if one must be trained; whether CaseOps is applied)."""
    if not args.tokenizer:
        return b"", args.caseops is not False
    model = args.tokenizer.read_bytes()
    name = str(args.tokenizer)
    caseops = args.caseops
    if caseops is None:
        caseops = has_markers(load_encoder(model, True, name).processor)
    load_encoder(model, caseops, name)  # refuses an unsuitable one before any text is read
    return model, caseops


def trained_as(vocab_size: int, caseops: bool) -> str:
    """Distinguishes the tokenizers that `train_tokenizer` makes from one text. If the wording changes, datasets are
    made again."""
    return f"{vocab_size} pieces, trained{', markers at their end' if caseops else ''}"


def finish_split(writer: ShardWriter, guard: SplitGuard, caseops: bool, split_rule: str) -> dict:
    """Write the last shard of a split -> the split's entry in the manifest."""
    writer.flush()
    if not writer.shards:
        raise DataError(f"no document is for {writer.split}: {split_rule}; give more text or another split")
    facts = {name: writer.totals[name] for name in ("documents", "tokens", *BYTE_COUNTS, "empty_documents")}
    if caseops:
        facts["contest_bytes"] = None  # the formula would count the markers
    if writer.split == "train":
        facts["duplicate_documents"] = guard.training_copies()
        facts["left_out_documents"] = guard.left_out
    else:
        facts["duplicate_documents"] = guard.validation_copies
        facts["left_out_documents"] = 0
    return facts | {"shards": writer.shards, "sidecars": writer.sidecars}


# ======================================================================================================================
# Documents: lines of JSON, read in batches. The document and its file decide whether it is for validation.

BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 32 << 20  # of a document: about ten long books; memory holds several times this
NAMED_BAD_LINES = 5


class Document(NamedTuple):
    where: str  # file:line
    number: int  # of its line, from 0
    text: str
    digest: int  # 64 bits that identify the text


class SourceFile(NamedTuple):
    """A file of documents, and which of them are for validation: those that meet any of the three rules."""

    path: str
    all_validation: bool = False
    first_validation: int = 0  # this many documents at the beginning
    validation_digests: int = 0  # documents whose digest is below this
    skip_bad_lines: bool = False  # otherwise a bad line is an error

    def is_validation(self, document: Document) -> bool:
        return (
            self.all_validation or document.number < self.first_validation or document.digest < self.validation_digests
        )


class LineBatch(NamedTuple):
    """About BATCH_BYTES of consecutive lines of one file."""

    source: SourceFile
    first: int  # number of the first line, from 0
    lines: list[bytes]
    consumed: int  # bytes read so far from all files, before decompression

    def documents(self, skipped: SkippedLines) -> Iterator[Document]:
        """Raises DataError for a bad line, unless such lines are skipped."""
        for number, line in enumerate(self.lines, self.first):
            if not line.strip():
                skipped.blank += 1
                continue
            where = f"{self.source.path}:{number + 1}"
            try:
                text = parse_line(line, where)
            except DataError as error:
                if not self.source.skip_bad_lines:
                    raise
                skipped.add(str(error))
                continue
            yield Document(where, number, text, text_digest(text))


class SkippedLines:
    """Lines that were left out: how many, and what was wrong with the first bad ones."""

    def __init__(self):
        self.blank = 0
        self.bad = 0
        self.reasons: list[str] = []

    def add(self, reason: str) -> None:
        self.bad += 1
        if self.bad <= NAMED_BAD_LINES:
            self.reasons.append(reason)

    def include(self, later: SkippedLines) -> None:
        self.blank += later.blank
        self.bad += later.bad
        self.reasons = (self.reasons + later.reasons)[:NAMED_BAD_LINES]

    def report(self) -> None:
        if self.blank:
            tell(f"{self.blank:,} blank lines skipped", sys.stdout)
        if self.bad:
            tell(f"warning: {self.bad:,} bad lines skipped, the first of them:", sys.stderr)
        for reason in self.reasons:
            tell(f"  {printable(reason, MOST_OF_AN_ERROR)}", sys.stderr)


def text_digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def parse_line(line: bytes, where: str) -> str:
    """The text of a document. Raises DataError if the line holds none, or text that UTF-8 cannot encode."""
    expected = 'expected a JSON string, or an object with a string "text"'
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes; {expected}, one document a line")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {expected}") from None

    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{where}: {line.strip()[:60]!r}; {expected}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: no UTF-8 for character {error.start} ({error.reason}); mend or remove it") from None
    return text


class FramesFile(io.RawIOBase):
    """Decompresses frames one after another, to the end of the file.

    The libraries' own readers lose text silently: zstandard's accepts a file that ends within a frame as complete, and
    those of bz2 and lzma ignore unreadable data after the first frame.
    """

    INPUT_BYTES = 4096  # at a time: four bytes of a zstd frame may expand to 128 KB

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]):
        """`new_frame` returns an object with decompress(bytes), eof and unused_data."""
        super().__init__()
        self.raw = raw
        self.new_frame = new_frame
        self.frame: Any = None
        self.input = b""
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.output:
            self.input = self.input or self.raw.read(self.INPUT_BYTES)
            if not self.input:
                if self.frame:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self.frame = self.frame or self.new_frame()
            self.output = memoryview(self.frame.decompress(self.input))
            self.input = b""
            if self.frame.eof:
                self.input = self.frame.unused_data
                self.frame = None
        count = min(len(buffer), len(self.output))
        buffer[:count] = self.output[:count]
        self.output = self.output[count:]
        return count


MAX_WINDOW_BYTES = 1 << 31  # how far back a frame may refer, as zstd --long=31 writes it


def open_zstandard(raw: BinaryIO) -> io.BufferedReader:
    library = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return io.BufferedReader(FramesFile(raw, library.decompressobj), BATCH_BYTES)


def open_bz2(raw: BinaryIO) -> io.BufferedReader:
    return io.BufferedReader(FramesFile(raw, bz2.BZ2Decompressor), BATCH_BYTES)


def open_xz(raw: BinaryIO) -> io.BufferedReader:
    if lzma is None:
        raise ImportError("this Python was built without lzma")
    new_frame = functools.partial(lzma.LZMADecompressor, memlimit=MAX_WINDOW_BYTES)
    return io.BufferedReader(FramesFile(raw, new_frame), BATCH_BYTES)


Decompressor = Callable[[BinaryIO], Any]
DECOMPRESSORS: dict[str, Decompressor] = {".gz": gzip.open, ".bz2": open_bz2, ".zst": open_zstandard, ".xz": open_xz}
COMPRESSED = {  # by a file's first bytes, whatever its name
    b"\x1f\x8b": gzip.open,
    b"BZh": open_bz2,
    b"\x28\xb5\x2f\xfd": open_zstandard,
    b"\xfd7zXZ\0": open_xz,
}
NOT_READ = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
MAX_LAYERS = 3  # of nested compression
READ_ERRORS = (OSError, EOFError, MemoryError, ImportError, zlib.error, zstandard.ZstdError)
if lzma:
    READ_ERRORS += (lzma.LZMAError,)


@contextlib.contextmanager
def open_layers(path: str, layers: list[Decompressor]) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file itself, its content with these layers of compression removed)."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open(path, "rb"))
        file = raw
        for decompress in layers:
            file = stack.enter_context(decompress(file))
        yield raw, file


def find_layers(path: str) -> list[Decompressor]:
    """How a file is compressed: by its first bytes, because names are often wrong, or by its suffix if the bytes say
    nothing.

    Raises DataError if the file cannot be JSONL, decompressed or not.
    """
    layers: list[Decompressor] = []
    while True:
        with open_layers(path, layers) as (_, file):
            head = file.read(512)
        for start, kind in NOT_READ.items():
            if head.startswith(start):
                raise DataError(f"{path}: {kind}; give JSONL in UTF-8, plain or as .gz, .bz2, .zst or .xz")
        if not head and not layers and Path(path).suffix.lower() in DECOMPRESSORS:
            raise DataError(f"{path}: empty, which no compressed file is; fetch or write it again")
        if head[257:262] == b"ustar":
            raise DataError(f"{path}: a tar archive; unpack it and give the files in it")

        found = next((open_layer for start, open_layer in COMPRESSED.items() if head.startswith(start)), None)
        is_text = head.lstrip()[:1] in (b'"', b"{")
        if found is None and not layers and not is_text:
            found = DECOMPRESSORS.get(Path(path).suffix.lower())
        if found is None:
            return layers
        if len(layers) == MAX_LAYERS:
            raise DataError(f"{path}: compressed more than {MAX_LAYERS} times over; unpack it first")
        layers.append(found)


def read_batches(sources: Iterable[SourceFile]) -> Iterator[LineBatch]:
    """All files in order; a batch never spans two. Raises DataError for a file that cannot be read or decompressed."""
    bytes_before = 0
    for source in sources:
        first = 0
        try:
            with open_layers(source.path, find_layers(source.path)) as (raw, file):
                for lines in read_lines(file, source):
                    yield LineBatch(source, first, lines, bytes_before + raw.tell())
                    first += len(lines)
                bytes_before += raw.tell()
        except READ_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise DataError(f"{source.path}: after {first} lines: {reason}; fetch or write the file again") from None


def read_lines(file: BinaryIO, source: SourceFile) -> Iterator[list[bytes]]:
    """Lines without line ends, about BATCH_BYTES at a time.

    A line longer than MAX_LINE_BYTES is cut off there, so that memory is bounded whatever the file holds. It is not
    read to its end unless bad lines are skipped: a small compressed file may hold an endless line.
    """
    rest = b""  # the unfinished last line
    while chunk := file.read(BATCH_BYTES):
        if len(rest) > MAX_LINE_BYTES and b"\n" not in chunk:
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES and not source.skip_bad_lines:
            yield [*lines, rest]
            return
        if lines:
            yield lines
    if rest:
        yield [rest]


def source_files(patterns: list[str], **rule: Any) -> list[SourceFile]:
    """Files by name or glob, with one rule for validation (a field of SourceFile). The name of an existing file is not
    a glob, even with brackets in it."""
    names = []
    for pattern in patterns:
        matches = [] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        names += matches or [pattern]

    for name, times in Counter(names).items():
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file; give files or globs: JSONL, also as .gz, .bz2, .zst or .xz")
        if times > 1:
            raise DataError(f"{name}: given {times} times; give it once")
    return [SourceFile(name, **rule) for name in names]


# ======================================================================================================================
# Installed documentation: text that every machine able to run this has. Python sources are parsed, not imported, so
# nothing in them runs; only compiled modules, which have no source, are imported and inspected.

MIN_CHARACTERS = 200  # shorter docstrings are labels rather than text
SKIPPED_MODULES = {  # tests, jokes, and what some systems package separately from Python
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
}
COMPILED_MODULES = (
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
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")  # of an object in memory: differs from process to process


def write_installed_documents(folder: Path, val_documents: int) -> list[SourceFile]:
    """Write the documents beside the shards, where people can look at them. They are sorted by digest, because
    neighbours in the order of names are alike and make batches one-sided; those with the smallest digests are for
    validation."""
    texts = sorted(installed_documents(), key=text_digest)
    if val_documents >= len(texts):
        raise UserError(f"--val-docs {val_documents}: there are {len(texts)} documents, some of them to train on")

    for split, documents in (("val", texts[:val_documents]), ("train", texts[val_documents:])):
        lines = (json.dumps(text).encode() + b"\n" for text in documents)
        write_atomically(folder / f"{split}.jsonl", lines)
    return [SourceFile(str(folder / "val.jsonl"), all_validation=True), SourceFile(str(folder / "train.jsonl"))]


def installed_documents() -> list[str]:
    """Every text once, sorted by name; the same for the same versions of Python, NumPy and torch."""
    if sys.flags.optimize >= 2:
        raise UserError("installed text: Python runs under -OO, which drops docstrings; run it without -OO")
    progress = Progress("reading installed documentation")

    topics = importlib.import_module("pydoc_data.topics").topics
    found = {f"pydoc_data.topics.{name}": text.strip() for name, text in topics.items()}
    with garbage_collection_off():  # it would take half the time: syntax trees are many objects, without cycles
        for package, module in (("", os), ("numpy", np), ("torch", torch)):
            root = Path(module.__file__).resolve().parent
            for name, text in parsed_docstrings(root, package):
                found[name] = text
                progress()
    for module_name in COMPILED_MODULES:
        found.update(compiled_docstrings(module_name))

    texts = (ADDRESS.sub("0x0", found[name]) for name in sorted(found))
    long_texts = (text for text in texts if len(text) >= MIN_CHARACTERS)
    return list(dict.fromkeys(long_texts))


def parsed_docstrings(root: Path, package: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public modules, classes and functions in the sources of a package.

    root is the package's folder. An empty `package` means the standard library: only its own
    modules below root count.
    """
    for path in sorted(root.rglob("*.py")):
        names = [package] if package else []
        names += path.relative_to(root).with_suffix("").parts
        if names[-1] == "__init__":
            names.pop()

        is_foreign = not package and (not names or names[0] not in sys.stdlib_module_names)
        if is_foreign or SKIPPED_MODULES & set(names) or not all(map(is_public, names)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            try:
                module = ast.parse(path.read_bytes(), path.name)
            except SyntaxError:  # written for another version of Python
                continue
        yield from docstrings_within(".".join(names), module)


def docstrings_within(name: str, node: ast.Module) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a parsed module and of its public classes, methods and functions."""
    unvisited: list[tuple[str, ast.AST]] = [(name, node)]
    while unvisited:
        name, node = unvisited.pop()
        text = ast.get_docstring(node)
        if text:
            yield name, text
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        for member in node.body:
            if isinstance(member, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and is_public(member.name):
                unvisited.append((f"{name}.{member.name}", member))


def compiled_docstrings(module_name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module's own functions, classes and their members, as found in memory."""
    module = importlib.import_module(module_name)
    package = module_name.split(".")[0]

    for name in filter(is_public, dir(module)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecated name is looked at, not used
            value = getattr(module, name)
        owner = str(getattr(value, "__module__", None) or package).split(".")[0]
        if inspect.ismodule(value) or not callable(value) or owner != package:
            continue

        documented = [(name, value)]
        if inspect.isclass(value):
            documented += [(f"{name}.{member}", item) for member, item in vars(value).items() if is_public(member)]
        for qualified_name, item in documented:
            text = getattr(item, "__doc__", None)
            if isinstance(text, str):
                yield f"{module_name}.{qualified_name}", inspect.cleandoc(text)


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


# ======================================================================================================================
# Tokenizers: SentencePiece models, trained here or given; a given one is checked before it is used.

MOST_PIECES = 1 << 16  # of a tokenizer: a shard's tokens are uint16
FIXED_PIECES = 260  # of a tokenizer that is trained here: 256 bytes, and pad, BOS, EOS and unknown
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, and cannot tell the two apart in text
NORMALISED_TEXT = (  # any normalisation changes some of it
    f"  A b\t\r\n\u00bd \ufb01\u2026 e\u0301 \u00a0\u2003x\u200b\uff21 a{SPACE_MARK}b  "
)
TOKENIZER_TEXT_BYTES = 100_000_000  # enough for stable merges; training holds about ten times this in memory


class Encoder(NamedTuple):
    """A checked tokenizer of V pieces, and what follows from it."""

    processor: sentencepiece.SentencePieceProcessor
    caseops: bool  # text is transformed before it is tokenized
    exact: bool  # decoding gives exactly the same text back
    pieces: PieceBytes  # for the contest's formula
    piece_sizes: np.ndarray  # (V,) int64, UTF-8 bytes of normalised text that a piece covers
    byte_ids: list[int]  # (256,) the piece of every byte


@functools.lru_cache(2)  # workers ask for the same one with every batch
def load_encoder(model: bytes, caseops: bool, name: str = "the tokenizer") -> Encoder:
    """Check a serialised model. Raises DataError if it cannot encode every text into the contest's tokens, or if it was
    made for CaseOps text but is to encode other text."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise DataError(f"{name}: not a SentencePiece model; give one with --tokenizer, or train one with --vocab-size")

    vocab_size = processor.get_piece_size()
    if not 0 < vocab_size <= MOST_PIECES:
        most = f"at most {MOST_PIECES:,}"
        raise DataError(f"{name}: {vocab_size} pieces, but tokens are uint16: {most}; use a smaller tokenizer")
    if processor.bos_id() != BOS:
        raise DataError(f"{name}: its BOS is {processor.bos_id()}, expected {BOS}; train it with bos_id={BOS}")
    byte_ids = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    if not all(map(processor.is_byte, byte_ids)):
        raise DataError(f"{name}: without byte pieces some text has no tokens; train it with byte_fallback=true")
    if has_markers(processor) and not caseops:
        raise DataError(
            f"{name}: its pieces hold the markers of CaseOps, so that no training would take text that CaseOps did not "
            "transform; use another tokenizer (or --variant), or leave out --no-caseops"
        )

    pieces = piece_bytes(processor)
    piece_sizes = np.zeros(vocab_size, np.int64)
    for i in np.flatnonzero(~pieces.control).tolist():
        piece_sizes[i] = 1 if processor.is_byte(i) else len(processor.id_to_piece(i).encode())

    encoder = Encoder(processor, caseops, True, pieces, piece_sizes, byte_ids)
    decoded = processor.decode(text_tokens(encoder, NORMALISED_TEXT))
    return encoder._replace(exact=decoded == NORMALISED_TEXT and not has_normalisation_rules(model))


def has_normalisation_rules(model: bytes) -> bool:
    """Whether a serialised model replaces characters before splitting text into pieces or after joining them, that is,
    whether its normalizer_spec or denormalizer_spec has a precompiled_charsmap (sentencepiece_model.proto)."""
    specs = [body for field, body in proto_fields(model) if field in (3, 5)]
    return any(field == 2 and body for spec in specs for field, body in proto_fields(spec))


def proto_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the length-delimited fields of a protocol buffer that is known to be valid."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
        return value

    while at < len(message):
        field, kind = divmod(varint(), 8)
        if kind == 2:
            size = varint()
            yield field, message[at : at + size]
            at += size
        elif kind == 0:
            varint()
        else:
            at += {1: 8, 5: 4}[kind]


def text_tokens(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a document, which has already been transformed if the encoder uses CaseOps.

    An exact encoder spells a literal space mark in bytes; with other encoders, it decodes to a space.
    """
    if not encoder.exact:
        return encoder.processor.encode(text)
    first, *others = text.split(SPACE_MARK)
    tokens = encoder.processor.encode(first)
    for part in others:
        tokens += [encoder.byte_ids[value] for value in SPACE_MARK.encode()]
        tokens += encoder.processor.encode(part)
    return tokens


def token_bytes(encoder: Encoder, text: str, text_bytes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Bytes of original text behind every token of a document, (n,) int64; they add up to the document's bytes.

    text is the transformed document, text_bytes (len(text),) the original bytes behind its characters, tokens (n,) its
    tokens. SentencePiece normalises text before splitting it into pieces, and reports which character each normalised
    one came from. The bytes of a character that became several tokens are spread over them in order; the bytes of text
    that normalisation removed go to the next token, or to the last one.
    """
    normalised, origins = encoder.processor.normalize(text, with_offsets=True)

    # Original bytes before every normalised character and after the last, (len(normalised) + 1,).
    before_character = np.concatenate([[0], np.cumsum(text_bytes)])[origins]

    # The same for every byte of the normalised text: a character's original bytes are spread evenly over these bytes.
    sizes = utf8_sizes(normalised)
    byte_in_character = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    original_size = np.repeat(np.diff(before_character), sizes)
    share = original_size * byte_in_character // np.repeat(sizes, sizes)
    before_byte = np.append(np.repeat(before_character[:-1], sizes) + share, before_character[-1])

    # Pieces cover the normalised text without gaps, so their sizes say where every token ends.
    ends = np.cumsum(encoder.piece_sizes[tokens])
    normalised_bytes = len(before_byte) - 1
    if ends[-1] != normalised_bytes:
        raise DataError(f"pieces cover {ends[-1]} bytes of {normalised_bytes}: the tokenizer does not fit its own text")
    bounds = before_byte[ends]
    bounds[-1] = text_bytes.sum()
    return np.diff(bounds, prepend=0)


def train_tokenizer(sources: list[SourceFile], vocab_size: int, caseops: bool) -> bytes:
    """Train BPE on training documents, the same amount from every file. The same text gives the same model.

    Raises DataError if there is too little text for `vocab_size` pieces, or if it has more characters.
    """
    texts = list(tokenizer_text(sources, caseops))  # read first: an error in a file is not a training error
    model = io.BytesIO()
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
            # Nothing is normalised, so decoding is exact.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Markers and letters count as different scripts. So a marker may end a piece, after a space or punctuation,
            # but no letter follows it within a piece: Word and WORD share the pieces of their letters.
            split_by_unicode_script=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            minloglevel=3,
            num_threads=4,  # on every machine, because the model records it
        )
    except RuntimeError as error:
        reason = why_not_trained(str(error))
        raise DataError(f"--vocab-size {vocab_size}: no tokenizer can be trained on this text: {reason}") from None
    return model.getvalue()


def why_not_trained(message: str) -> str:
    """What SentencePiece's message means, without its advice to change options that are not ours."""
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        characters = int(least[1]) - FIXED_PIECES
        return f"it needs {least[1]} pieces or more: 256 bytes, 4 special pieces and {characters:,} characters"
    if most := re.search(r"size too high .* <= (\d+)", message):
        return f"it has {most[1]} pieces at most"
    return message.split("] ")[-1].strip() or "there is too little of it"


def tokenizer_text(sources: list[SourceFile], caseops: bool) -> Iterator[str]:
    """Training documents, transformed; never a validation document. Without CaseOps, any markers in the text are left
    out: a tokenizer with markers in its pieces is taken for one made for CaseOps."""
    no_markers = str.maketrans("", "", "".join(MARKERS))
    training = [source for source in sources if not source.all_validation]
    for source in training:
        remaining_bytes = TOKENIZER_TEXT_BYTES // len(training)
        documents = (document for batch in read_batches([source]) for document in batch.documents(SkippedLines()))
        for document in documents:
            if not document.text or source.is_validation(document):
                continue
            yield encode_caseops(document.text) if caseops else document.text.translate(no_markers)
            remaining_bytes -= len(document.text.encode())
            if remaining_bytes <= 0:
                break


# ======================================================================================================================
# CaseOps: a bijection that writes capitals as a marker and lower case, so that word, Word and WORD share their pieces.

TITLE = "\ue001"  # the next letter is a capital, and begins a word
ALLCAPS = "\ue002"  # all letters of the next word are capitals
CAPNEXT = "\ue003"  # the next letter is a capital within a word
ESCAPE = "\ue004"  # the next character is a literal marker from the text
CASED = re.compile("(?<![A-Za-z])(?P<word>[A-Z][A-Za-z]*)|(?P<inner>[A-Z])|(?P<marker>[\ue001-\ue004])")
MARKED = re.compile("\ue004(?P<literal>.)|\ue002(?P<word>[a-z]+)|[\ue001\ue003](?P<letter>[a-z])", re.DOTALL)


def encode_caseops(text: str) -> str:
    """Write ASCII capitals as markers and lower case; a literal marker in the text is escaped."""

    def encode_match(match: re.Match) -> str:
        return mark_case(match.lastgroup, match[0])

    return CASED.sub(encode_match, text)


@functools.lru_cache(1 << 16)
def mark_case(kind: str, text: str) -> str:
    """The spelling of a match of CASED; `inner` is a capital in a run of letters that begins in lower case."""
    if kind == "marker":
        return ESCAPE + text
    if kind == "inner":
        return CAPNEXT + text.lower()
    if len(text) > 1 and text.isupper():
        return ALLCAPS + text.lower()
    return TITLE + text[0].lower() + re.sub("[A-Z]", lambda match: CAPNEXT + match[0].lower(), text[1:])


def decode_caseops(text: str) -> str:
    """The inverse: decode_caseops(encode_caseops(text)) == text."""

    def decode_match(match: re.Match) -> str:
        marked = match[match.lastgroup]
        return marked if match.lastgroup == "literal" else marked.upper()

    return MARKED.sub(decode_match, text)


def caseops_bytes(text: str) -> np.ndarray:
    """Bytes of original text behind every character of encoded text, (len(text),) int64. A marker stands for none."""
    sizes = utf8_sizes(text)
    codes = code_points(text)
    is_marker = (codes >= ord(TITLE)) & (codes <= ord(ESCAPE))
    sizes[is_marker] = 0
    if ESCAPE in text:
        escaped = [match.start("literal") for match in MARKED.finditer(text) if match.lastgroup == "literal"]
        sizes[escaped] = len(ESCAPE.encode())
    return sizes


def utf8_sizes(text: str) -> np.ndarray:
    """UTF-8 bytes of every character, (len(text),) int64."""
    codes = code_points(text)
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)


def code_points(text: str) -> np.ndarray:
    """Unicode code point of every character, (len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


# ======================================================================================================================
# Encoding: documents become tokens, and each is checked for losses.

BYTE_COUNTS = ("original_bytes", "decoded_bytes", "smaller_bytes", "contest_bytes")  # smaller: of the first two


class NotExactError(DataError):
    """A text shows that a tokenizer is not exact, though its rules suggest it."""


class EncodedDocument(NamedTuple):
    tokens: np.ndarray  # (n,) uint16, BOS first
    sidecar: np.ndarray  # (n,) uint16, bytes of original text behind every token; zeros in training
    byte_counts: list[int]  # (4,) see BYTE_COUNTS


class EncodedDocuments(NamedTuple):
    """The d documents of a batch that belong to one split, n tokens in all."""

    split: str
    tokens: np.ndarray  # (n,) uint16, BOS before every document
    sidecar: np.ndarray  # (n,) uint16; (0,) in training
    lengths: np.ndarray  # (d,) int64, tokens of every document
    byte_counts: np.ndarray  # (d, 4) int64, see BYTE_COUNTS
    digests: list[int]  # (d,)
    where: list[str]  # (d,) file:line
    empty: int  # further documents, left out because they have no tokens
    changed: int  # documents that decoding does not give back, though the tokenizer seemed exact


def encode_document(encoder: Encoder, text: str, validation: bool) -> EncodedDocument:
    """Tokens of a text, with a side-car for validation. Raises DataError if text would be lost or miscounted. After a
    NotExactError, the text can be encoded with the same encoder marked as not exact."""
    transformed = encode_caseops(text) if encoder.caseops else text
    if encoder.caseops and decode_caseops(transformed) != text:
        raise DataError("CaseOps does not give this text back; please report it")

    ids = text_tokens(encoder, transformed)
    decoded = encoder.processor.decode(ids)
    if encoder.exact and decoded != transformed:
        raise NotExactError("the tokenizer does not give this text back")

    tokens = np.array([BOS, *ids], np.uint16)
    sidecar = np.zeros(len(tokens), np.uint16)
    if validation and ids:
        sidecar[1:] = document_sidecar(encoder, text, transformed, tokens[1:])

    original_bytes = len(text.encode())
    decoded_text = decode_caseops(decoded) if encoder.caseops else decoded
    decoded_bytes = len(decoded_text.encode())
    formula_bytes = int(contest_bytes(tokens, encoder.pieces).sum())
    byte_counts = [original_bytes, decoded_bytes, min(original_bytes, decoded_bytes), formula_bytes]
    return EncodedDocument(tokens, sidecar, byte_counts)


def document_sidecar(encoder: Encoder, text: str, transformed: str, tokens: np.ndarray) -> np.ndarray:
    """Bytes of original text behind every token, (n,) int64, checked. The tokens (n,) do not include BOS."""
    text_bytes = caseops_bytes(transformed) if encoder.caseops else utf8_sizes(transformed)
    counts = token_bytes(encoder, transformed, text_bytes, tokens)
    original_bytes = len(text.encode())
    if counts.sum() != original_bytes or counts.min() < 0:
        raise DataError(f"its tokens add up to {counts.sum()} bytes of {original_bytes}; please report this text")
    if counts.max() > np.iinfo(np.uint16).max:
        raise DataError(f"a token stands for {counts.max()} bytes, the side-car holds 65,535; remove this text")
    return counts


def encode_batch(model: bytes, caseops: bool, batch: LineBatch) -> tuple[list[EncodedDocuments], SkippedLines]:
    """The work of a worker process: one batch -> its validation documents, then its training documents; the skipped
    lines."""
    encoder = load_encoder(model, caseops)
    encoded: dict[str, list[tuple[Document, EncodedDocument]]] = {"val": [], "train": []}
    empty = Counter()
    changed = Counter()
    skipped = SkippedLines()

    for document in batch.documents(skipped):
        split = "val" if batch.source.is_validation(document) else "train"
        try:
            try:
                result = encode_document(encoder, document.text, split == "val")
            except NotExactError:
                result = encode_document(encoder._replace(exact=False), document.text, split == "val")
                changed[split] += 1
        except DataError as error:
            if not batch.source.skip_bad_lines:
                raise DataError(f"{document.where}: {error}") from None
            skipped.add(f"{document.where}: {error}")
            continue
        if len(result.tokens) == 1:  # BOS alone
            empty[split] += 1
        else:
            encoded[split].append((document, result))
    joined = [join_documents(split, encoded[split], empty[split], changed[split]) for split in encoded]
    return joined, skipped


def join_documents(
    split: str, documents: list[tuple[Document, EncodedDocument]], empty: int, changed: int
) -> EncodedDocuments:
    """Documents of one split, end to end; `empty` more were left out, `changed` of them do not decode to themselves."""
    nothing = np.zeros(0, np.uint16)
    tokens = [result.tokens for _, result in documents]
    sidecars = [result.sidecar for _, result in documents] if split == "val" else []
    byte_counts = [result.byte_counts for _, result in documents]
    return EncodedDocuments(
        split=split,
        tokens=np.concatenate([nothing, *tokens]),
        sidecar=np.concatenate([nothing, *sidecars]),
        lengths=np.array([len(array) for array in tokens], np.int64),
        byte_counts=np.array(byte_counts, np.int64).reshape(-1, len(BYTE_COUNTS)),
        digests=[document.digest for document, _ in documents],
        where=[document.where for document, _ in documents],
        empty=empty,
        changed=changed,
    )


def encode_all(
    pool: ProcessPoolExecutor,
    workers: int,
    sources: list[SourceFile],
    model: bytes,
    caseops: bool,
    skipped: SkippedLines,
) -> Iterator[EncodedDocuments]:
    """All files in order; adds to `skipped`. Only a few batches are in flight at a time, so memory does not grow with
    the text."""
    progress = Progress("encoding", sum(Path(source.path).stat().st_size for source in sources))
    in_flight: deque[tuple[Future, int]] = deque()  # pending results, and bytes read up to each
    batches = read_batches(sources)
    while True:
        while len(in_flight) < 2 * workers and (batch := next(batches, None)):
            in_flight.append((pool.submit(encode_batch, model, caseops, batch), batch.consumed))
        if not in_flight:
            return
        future, consumed = in_flight.popleft()
        encoded, skipped_here = future.result()
        skipped.include(skipped_here)
        yield from encoded
        progress(consumed)


# ======================================================================================================================
# Worker processes, which end with the work even if it fails or is interrupted; and progress meanwhile.


@contextlib.contextmanager
def worker_pool(workers: int, kill_on_failure: bool = False) -> Iterator[ProcessPoolExecutor]:
    """Processes that do not outlive this block, however it ends.

    If the block fails, they first finish their current work: if one were killed while sending a long result, the pool
    would wait for the rest forever. Workers with short results may be killed at once (`kill_on_failure`). Raises
    UserError if a worker dies.
    """
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),  # so workers need not import anything
        initializer=begin_worker,
        initargs=(ends_with_its_parent(signal.SIGKILL),),  # other signals are blocked in workers
    )
    kill = True  # the workers already started, if others cannot be
    try:
        with signals_blocked():  # Python drops an exception that a signal handler raises during a fork
            pool.submit(os.getpid)  # starts all workers
        kill = kill_on_failure
        yield pool
        kill = False
    except BrokenProcessPool:
        kill = True
        hint = "; use fewer --workers" if workers > 1 else ""
        raise UserError(f"a worker process died, most likely for lack of memory{hint}") from None
    finally:
        with signals_blocked():
            if kill:
                for child in multiprocessing.active_children():
                    child.kill()
            pool.shutdown(cancel_futures=True)


HELD_LOCKS: set[int] = set()  # file descriptors of this process that hold a lock


def begin_worker(tie_to_parent: Callable[[], None] | None) -> None:
    """Called first in every worker. Makes the worker end when its parent does, even by kill -9, and closes inherited
    locks, which would otherwise last until the last worker ends."""
    for lock in HELD_LOCKS:
        os.close(lock)
    HELD_LOCKS.clear()
    if tie_to_parent:
        tie_to_parent()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Ctrl-C, SIGTERM and the closing of the terminal take effect after this block, not within it, and never on
    processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def train_tokenizer_in_worker(path: Path, sources: list[SourceFile], vocab_size: int, caseops: bool) -> bytes:
    """`train_tokenizer` in a process that can be killed. Python handles Ctrl-C only between its own instructions, and
    one call of SentencePiece may take minutes. The model is passed back in the file `path`, so that the worker's result
    is short."""
    with worker_pool(1, kill_on_failure=True) as pool:
        training = pool.submit(save_tokenizer, path, sources, vocab_size, caseops)
        Progress("training the tokenizer").wait(training)
    model = path.read_bytes()
    path.unlink()
    return model


def save_tokenizer(path: Path, sources: list[SourceFile], vocab_size: int, caseops: bool) -> None:
    path.write_bytes(train_tokenizer(sources, vocab_size, caseops))


class Progress:
    """Prints progress, speed and time left: on a terminal one line, overwritten; elsewhere a line every 10 s."""

    def __init__(self, what: str, total: int = 0):
        """`total`: bytes to process, 0 if unknown."""
        self.what = printable(what)
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.last_shown = self.start

    def __call__(self, done: int = 0, before: int = 0) -> None:
        """`done`: bytes processed so far, `before` of them before the clock started."""
        now = time.monotonic()
        if now - self.last_shown < (1 if self.terminal else 10):
            return
        self.last_shown = now
        seconds = now - self.start

        message = f"{self.what}: {seconds:.0f} s"
        if done > before:
            message += f", {done / 1e6:,.0f} MB, {(done - before) / 1e6 / seconds:.1f} MB/s"
            if self.total > 0:
                seconds_left = (self.total - done) * seconds / (done - before)
                message += f", {done / self.total:.0%}, {seconds_left:.0f} s left"
        if self.terminal:
            tell(f"\r\x1b[K{message}", sys.stderr, end="\r")
        else:
            tell(message, sys.stderr)

    def wait(self, future: Future) -> Any:
        """The future's result; shows progress until it is there."""
        while True:
            try:
                return future.result(timeout=1)
            except TimeoutError:
                self()


# ======================================================================================================================
# Splits: no validation text is trained on.

SPLITS = ("train", "val")


class SplitGuard:
    """Keeps validation texts out of training, and counts copies within each split.

    All validation documents must pass before any training document, unless the digest of a text decides its split: then
    all copies are in the same split anyway.
    """

    def __init__(self, drop_leaked: bool):
        self.drop_leaked = drop_leaked  # otherwise they are refused
        self.validation: dict[int, str] = {}  # digest -> where
        self.validation_copies = 0
        self.training: list[np.ndarray] = []  # digests, batch by batch
        self.left_out = 0

    def admit(self, encoded: EncodedDocuments) -> EncodedDocuments:
        """The documents, without training documents that are also in validation. Raises DataError if there are any and
        they may not be dropped."""
        if encoded.split == "val":
            known = len(self.validation)
            self.validation |= dict(zip(encoded.digests, encoded.where, strict=True))
            new = len(self.validation) - known
            self.validation_copies += len(encoded.digests) - new
            return encoded

        keep = np.array([digest not in self.validation for digest in encoded.digests], bool)
        self.training.append(np.array(encoded.digests, np.uint64)[keep])
        if keep.all():
            return encoded
        if not self.drop_leaked:
            i = int(keep.argmin())
            raise DataError(
                f"{encoded.where[i]}: this training document is in validation too "
                f"({self.validation[encoded.digests[i]]}): a score would mean nothing; remove one of them"
            )
        self.left_out += int((~keep).sum())
        return encoded._replace(
            tokens=encoded.tokens[np.repeat(keep, encoded.lengths)],
            lengths=encoded.lengths[keep],
            byte_counts=encoded.byte_counts[keep],
        )

    def training_copies(self) -> int:
        digests = np.concatenate([np.zeros(0, np.uint64), *self.training])
        return len(digests) - len(np.unique(digests))


# ======================================================================================================================
# Shards: files in the contest's format.


class ShardWriter:
    """Collects the documents of one split, and writes a shard whenever the next document would not fit. So every shard
    begins with BOS, and no document spans two shards."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens

        # The shard that is being filled.
        self.tokens: list[np.ndarray] = []
        self.sidecar: list[np.ndarray] = []
        self.held = 0  # tokens

        # What the manifest says about the split.
        self.totals = Counter()
        self.changed_documents = 0
        self.shards: list[dict] = []
        self.sidecars: list[dict] = []

    def add(self, encoded: EncodedDocuments) -> None:
        self.totals += Counter(
            documents=len(encoded.lengths),
            tokens=len(encoded.tokens),
            empty_documents=encoded.empty,
            **dict(zip(BYTE_COUNTS, encoded.byte_counts.sum(0).tolist(), strict=True)),
        )
        self.changed_documents += encoded.changed
        ends = np.cumsum(encoded.lengths)
        document = 0  # the next one to add
        begin = 0  # its first token
        while document < len(ends):
            room = self.shard_tokens - self.held
            fitting = int(np.searchsorted(ends, begin + room, side="right"))
            if fitting == document and self.held > 0:
                self.flush()
                continue
            document = max(fitting, document + 1)  # a document longer than a shard gets its own shard
            end = int(ends[document - 1])
            self.tokens.append(encoded.tokens[begin:end])
            self.sidecar.append(encoded.sidecar[begin:end])
            self.held += end - begin
            begin = end

    def flush(self) -> None:
        """Write what is held, if anything."""
        if self.held == 0:
            return
        number = f"{len(self.shards):06d}.bin"
        self.shards.append(write_shard(self.folder / f"fineweb_{self.split}_{number}", self.tokens))
        if self.split == "val":
            self.sidecars.append(write_shard(self.folder / f"fineweb_val_bytes_{number}", self.sidecar))
        self.tokens = []
        self.sidecar = []
        self.held = 0


def write_shard(path: Path, values: list[np.ndarray]) -> dict:
    """Write consecutive arrays of tokens, or of a side-car's entries, as one shard -> its entry in the manifest."""
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, sum(map(len, values))

    def chunks() -> Iterator[bytes]:
        yield header.tobytes()
        for array in values:
            yield array.astype("<u2").tobytes()

    write_atomically(path, chunks())
    return shard_facts(path)


def shard_facts(path: Path) -> dict:
    return {
        "file": path.name,
        "tokens": len(read_shard(path)),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    progress = Progress(f"checking {path.name}", path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(file.tell())
    return digest.hexdigest()


# ======================================================================================================================
# Manifest: what a dataset is and what it was made from. A finished folder is renamed into place.

FORMAT = 1  # of a dataset; when it changes, older ones are made again


@contextlib.contextmanager
def workspace(final: Path, parameters: dict, replace: bool, resume_key: str = "") -> Iterator[Path]:
    """A hidden folder that replaces `final` once the block has succeeded. Otherwise `final` stays as it was.

    After a failure the hidden folder is removed; with a key it stays, and the next workspace with this key resumes it.
    Raises UserError if `final` may not be replaced (see `check_replaceable`), or if another process is preparing it.
    """
    partial = final.with_name(f".{final.name}.partial{resume_key}")
    old = final.with_name(f".{final.name}.old")
    lock = final.with_name(f".{final.name}.lock")

    with locked(lock, f"{final}: another process is preparing it; wait for it, or choose another --name"):
        check_replaceable(final, parameters, replace)  # while no other process can change what is there
        partial.mkdir(exist_ok=True)
        try:
            if not resume_key:
                for leftover in partial.iterdir():  # from a process that was killed
                    leftover.unlink()
            yield partial
            remove_folder(old)
            if final.exists():
                final.rename(old)
            partial.rename(final)
            remove_folder(old)
        except BaseException:
            if not resume_key:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there. Of a link, remove the link alone: its folder is not ours to delete."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, if_busy: str) -> Iterator[None]:
    """Only one process at a time holds the lock, a file that exists meanwhile; others get a UserError with the text
    `if_busy`. The lock ends with the process, however the process ends: a file that it leaves behind does no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def without_locks(reason: str) -> None:
        tell(f"warning: {path} cannot be locked: {reason}; do not start this twice at once", sys.stderr)

    lock = lock_file(path, lambda _: UserError(if_busy), without_locks)
    HELD_LOCKS.add(lock)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released: afterwards the file may be another process's
        HELD_LOCKS.discard(lock)
        os.close(lock)


def write_manifest(folder: Path, final: Path, model: bytes, encoder: Encoder, facts: dict) -> dict:
    """Write the manifest into the folder that will be `final`, and the tokenizer beside the datasets."""
    model_path = final.parent.parent / "tokenizers" / f"{final.name}.model"
    tokenizer = {
        "path": f"../../tokenizers/{model_path.name}",  # relative to `final`
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": encoder.processor.get_piece_size(),
        "exact": encoder.exact,
        "transform": "caseops" if encoder.caseops else "none",
    }
    manifest = {"format": FORMAT, **facts, "tokenizer": tokenizer, "versions": versions()}
    write_atomically(folder / "manifest.json", [json.dumps(manifest, indent=1).encode() + b"\n"])

    model_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(model_path, [model])
    return manifest


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "sentencepiece": sentencepiece.__version__,
        "numpy": np.__version__,
        "torch": str(torch.__version__),
    }


def find_prepared(final: Path, parameters: dict) -> dict | None:
    """The manifest of a finished dataset with these parameters, if all its files are there, no other shard is, and it
    can be summarised; else None."""
    try:
        manifest = parse_json((final / "manifest.json").read_text(encoding="utf-8"))
        files = [file for split in manifest["splits"].values() for file in split["shards"] + split["sidecars"]]
        tokenizer = manifest["tokenizer"]
        is_same = (
            manifest["parameters"] == parameters
            and all((final / file["file"]).stat().st_size == file["bytes"] for file in files)
            and {path.name for path in final.glob("fineweb_*.bin")} == {file["file"] for file in files}
            and (final / tokenizer["path"]).is_file()  # reading a device might never end
            and file_sha256(final / tokenizer["path"]) == tokenizer["sha256"]
            and summary(manifest) != []
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        return None
    return manifest if is_same else None


def check_replaceable(final: Path, parameters: dict, replace: bool) -> None:
    """Refuse to replace a dataset other than the requested one, unless the user says so, and anything not made here.

    Not refused: the same dataset, which is made again if its files are damaged; a download with another number of
    shards, which takes over the files of the earlier one; and documentation of this machine, which is collected again
    in half a minute.
    """
    if not os.path.lexists(final):
        return
    if not (final / "manifest.json").is_file():
        raise UserError(f"{final}: was not made by prepare (no manifest.json in it); choose another --name or --out")
    if replace:
        return
    earlier = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        earlier = parse_json((final / "manifest.json").read_bytes())["parameters"]
        if earlier == parameters:
            return
        kinds = {earlier["source"]["kind"], parameters["source"]["kind"]}
        if kinds == {"installed"} or (kinds == {"contest"} and earlier["source"] == parameters["source"]):
            return

    what = "something unreadable" if not isinstance(earlier, dict) else "another dataset"
    differing = [name for name in parameters if isinstance(earlier, dict) and earlier.get(name) != parameters[name]]
    differs = f" (other {', '.join(differing)})" if differing else ""
    raise UserError(f"{final}: holds {what}{differs}; choose another --name, or say --replace")


def parse_json(content: bytes | str) -> Any:
    """Strict JSON. Raises ValueError for anything else, including Infinity, NaN and JSON that is nested too deeply."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def print_summary(final: Path, manifest: dict, note: str = "") -> None:
    for line in summary(manifest):
        tell(printable(line), sys.stdout)
    tell(printable(f"{final}{note}", MOST_OF_AN_ERROR), sys.stdout)


def summary(manifest: dict) -> list[str]:
    """What was prepared, and warnings if the contest's formula counts bytes that the text does not have. Raises
    KeyError, TypeError, ValueError or AttributeError for a manifest that was not written here."""
    lines = []
    for name, split in manifest["splits"].items():
        size = split["original_bytes"] or split["contest_bytes"]
        weight = f"{size:,} bytes, {size / split['tokens']:.3f} a token, " if size else ""
        shards = len(split["shards"])
        lines.append(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {weight}shards: {shards}")
        for kind in ("empty", "duplicate", "left_out", "in_training"):
            count = split.get(f"{kind}_documents")
            if count:
                lines.append(f"{name}: {count:,} documents {kind.replace('_', ' ')}")

    counted = manifest["splits"]["val"]["contest_bytes"]
    smaller = manifest["splits"]["val"]["smaller_bytes"]
    if counted and smaller and counted > smaller:
        lines.append(
            f"warning: val: the contest's formula counts {counted:,} bytes, {counted - smaller:,} more than the "
            "smaller of original and decoded text: bits per byte look better than they are by as much"
        )
    excess = manifest["splits"]["val"].get("excess_bytes")
    if excess:
        lines.append(
            f"warning: val: this tokenizer has spaces inside pieces, for which the contest's formula counts {excess:,} "
            "bytes too many: bits per byte will look better than they are by as much, and a run's result says so"
        )
    return lines


# ======================================================================================================================
# Published shards: downloaded as they are, and checked completely before anything is trained on them.

CONTEST_VAL_DOCS = 50_000
PLAIN_REPOSITORY = "willdepueoai/parameter-golf"
REPOSITORIES = {"caseops": "romeerp/parameter-golf-caseops-v1", "sp8192": "kevclark/parameter-golf"}
DATASETS = {"caseops": "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"}  # others: fineweb10B_<variant>
SHARD_BYTES = 200_001_024
MAX_SHARDS = 10_000  # a trillion tokens; the names have six digits
MAX_LEAK = 0.05  # web text holds a few copies; a wrong split puts four of five validation documents into training


class PublishedDataset(NamedTuple):
    """What the hub's manifest says about a dataset."""

    train_shards: int
    val_shards: int
    model_path: str  # of its tokenizer


def prepare_published_shards(args: argparse.Namespace) -> None:
    """Download a dataset's shards, and describe them in our own manifest."""
    if args.tokenizer or args.caseops is not None:
        raise UserError("--tokenizer and --caseops go with --documents: published shards are encoded already")
    hub = Hub(args.base_url, args.repo or REPOSITORIES.get(args.variant, PLAIN_REPOSITORY))
    dataset = DATASETS.get(args.variant, f"fineweb10B_{args.variant}")
    caseops = "caseops" in dataset
    final = args.out / "datasets" / (args.name or dataset)

    source = {"kind": "contest", "hub": hub.base_url, "repo": hub.repo, "dataset": dataset}
    parameters = {"format": FORMAT, "source": source, "train_shards": args.train_shards}
    prepared = find_prepared(final, parameters)
    if prepared:
        print_summary(final, prepared, ": already prepared")
        return

    resume_key = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    with workspace(final, parameters, args.replace, resume_key) as folder:
        published = find_published(hub, folder, dataset)
        if args.train_shards > published.train_shards:
            raise UserError(f"--train-shards {args.train_shards}: {hub.repo} has {published.train_shards} of {dataset}")
        names = {
            "val": shard_names("val", published.val_shards),
            "val_bytes": shard_names("val_bytes", published.val_shards if caseops else 0),
            "train": shard_names("train", args.train_shards),
        }
        wanted = [name for kind in names.values() for name in kind]
        link_earlier_download(final, folder, source, wanted)
        missing = [name for name in wanted if not (folder / name).exists()]
        if shutil.disk_usage(folder).free < len(missing) * SHARD_BYTES:
            raise UserError(f"{folder}: no space for {len(missing)} files of 200 MB; ask for fewer --train-shards")

        model = fetch_bytes(hub, published.model_path, folder)
        encoder = load_encoder(model, caseops, hub.url(published.model_path))
        for i, name in enumerate(missing, 1):
            label = f"{name}, {i} of {len(missing)}"
            hub.fetch(f"datasets/{dataset}/{name}", folder / name, label, most=MAX_SHARD_BYTES)

        splits = check_shards(folder, names, encoder)
        remove_others(folder, wanted)
        facts = {"parameters": parameters, "split_rule": "as published", "splits": splits}
        manifest = write_manifest(folder, final, model, encoder, facts)
    print_summary(final, manifest)


def shard_names(kind: str, count: int) -> list[str]:
    return [f"fineweb_{kind}_{i:06d}.bin" for i in range(count)]


def link_earlier_download(final: Path, folder: Path, source: dict, wanted: list[str]) -> None:
    """Link the wanted, undamaged files of an earlier download of the same dataset, if there is one."""
    try:
        manifest = parse_json((final / "manifest.json").read_bytes())
        if manifest["parameters"]["source"] != source:
            return
        shards = [file for split in manifest["splits"].values() for file in split["shards"] + split["sidecars"]]
        digests = {shard["file"]: shard["sha256"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return

    for name in wanted:
        if name in digests and (final / name).is_file() and file_sha256(final / name) == digests[name]:
            (folder / name).unlink(missing_ok=True)
            os.link(final / name, folder / name)
    unwanted = digests.keys() - set(wanted)
    if unwanted:
        message = f"{final}: {len(unwanted)} of its files are not asked for; they go once this preparation is complete"
        tell(printable(message, MOST_OF_AN_ERROR), sys.stderr)


def remove_others(folder: Path, wanted: list[str]) -> None:
    """Remove unwanted files: training reads all shards of its folder, and one that resumes a longer download may hold
    more."""
    for path in set(folder.iterdir()) - {folder / name for name in wanted}:
        path.unlink()


def find_published(hub: Hub, folder: Path, dataset: str) -> PublishedDataset:
    """Look a dataset up in the hub's manifest. Raises UserError if it is not there, DataError if its entry is bad."""
    where = hub.url("manifest.json")
    remedy = "choose another --variant or --repo"
    content = fetch_bytes(hub, "manifest.json", folder)  # its errors are not the manifest's
    try:
        manifest = parse_json(content)
        datasets = {entry["name"]: entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        if dataset in datasets:
            stats = datasets[dataset]["stats"]
            model_path = tokenizers[datasets[dataset]["tokenizer_name"]]["model_path"]
            published = PublishedDataset(stats["files_train"], stats["files_val"], model_path)
            for count in (published.train_shards, published.val_shards):
                if type(count) is not int or not 1 <= count <= MAX_SHARDS:
                    raise ValueError(f"number of shards: {str(count)[:20]}, expected 1 to {MAX_SHARDS:,}")
            if not isinstance(model_path, str) or len(model_path) > 1000:
                raise ValueError("the path of its tokenizer is no path")
            return published
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: does not describe {dataset} and its SentencePiece model ({error!r}); {remedy}"
        ) from None
    names = ", ".join(sorted(map(str, datasets)))
    raise UserError(f"{where}: no {dataset}; it has {names[:1000]}; {remedy}")


def check_shards(folder: Path, names: dict[str, list[str]], encoder: Encoder) -> dict:
    """Check all shards -> the manifest's splits. A bad file is removed, so that another run fetches it again.

    names: files by kind ("val", "val_bytes", "train"). Raises DataError for a shard that is damaged or was made with
    another tokenizer, and if training holds too many of the validation documents.
    """
    vocab_size = encoder.processor.get_piece_size()
    progress = Progress("checking shards")
    splits = {}
    validation: set[bytes] = set()  # digests of documents
    leaked: set[bytes] = set()  # those that are also in training

    for split in ("val", "train"):
        facts: dict[str, Any] = {"documents": 0, "tokens": 0}
        unknown = (*BYTE_COUNTS, "empty_documents", "duplicate_documents", "left_out_documents")
        facts |= dict.fromkeys(unknown)
        facts |= {"shards": [], "sidecars": []}
        for name in names[split]:
            tokens = read_published_shard(folder / name, vocab_size)
            facts["documents"] += int((tokens == BOS).sum())
            facts["tokens"] += len(tokens)
            facts["shards"].append(shard_facts(folder / name))
            if split == "val" and len(tokens) and facts["tokens"] == len(tokens) and tokens[0] != BOS:
                raise DataError(
                    f"{folder / name}: no BOS ({BOS}) where validation must begin; see --repo, or remove this file to "
                    "fetch it again"
                )
            digests = document_digests(tokens)
            if split == "val":
                validation |= digests
            else:
                leaked |= digests & validation
            progress()
        splits[split] = facts
    if not validation and not splits["val"]["documents"]:
        raise DataError(f"{folder}: its validation shards are empty; see --repo")

    if len(leaked) > MAX_LEAK * len(validation):
        raise DataError(
            f"{folder}: {len(leaked):,} of {len(validation):,} validation documents are in training too: a "
            "score would mean nothing; choose another --repo"
        )
    splits["val"] |= {"in_training_documents": len(leaked), **count_validation_bytes(folder, names, encoder)}
    return {split: splits[split] for split in SPLITS}


def read_published_shard(path: Path, vocab_size: int) -> np.ndarray:
    """A shard's tokens, (n,) uint16. Raises DataError for a bad shard and removes it.

    Validation shards may begin inside a document or be empty: `check_shards` looks at all of them as one stream.
    """
    is_validation = "_val_" in path.name
    try:
        tokens = read_shard(path)
        if (not len(tokens) and not is_validation) or int(tokens.max(initial=0)) >= vocab_size:
            raise DataError(
                f"{path}: its largest token is {tokens.max(initial=0)}, the vocabulary has {vocab_size}; see --repo"
            )
        if BOS not in tokens and not is_validation:
            raise DataError(f"{path}: no BOS ({BOS}) where a document must begin; see --repo")
    except DataError:
        path.unlink()
        raise
    return tokens


def document_digests(tokens: np.ndarray) -> set[bytes]:
    """Digests of the documents that both begin and end in a shard."""
    starts = np.flatnonzero(tokens == BOS).tolist()
    digests = set()
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        digests.add(hashlib.blake2b(tokens[begin:end].tobytes(), digest_size=8).digest())
    return digests


def count_validation_bytes(folder: Path, names: dict[str, list[str]], encoder: Encoder) -> dict:
    """BYTE_COUNTS of validation, as far as its tokens tell; counts of the original text only if there is a side-car.
    Without CaseOps also `excess_bytes`, the bytes that the formula counts in excess of the text.

    Raises DataError for a side-car whose length differs from its shard's, and removes it.
    """
    shards = [read_shard(folder / name) for name in names["val"]]
    sidecars = [read_shard(folder / name) for name in names["val_bytes"]]
    for name, shard, sidecar in zip(names["val_bytes"], shards, sidecars, strict=False):
        if len(sidecar) != len(shard):
            (folder / name).unlink()
            raise DataError(f"{folder / name}: {len(sidecar)} entries for {len(shard)} tokens; run it again")

    stream = np.concatenate(shards)
    starts = np.flatnonzero(stream == BOS)
    sizes = []
    for document in np.split(stream, starts[1:]):
        text = encoder.processor.decode(document.tolist())
        if encoder.caseops:
            text = decode_caseops(text)
        sizes.append(len(text.encode()))
    decoded = np.array(sizes)

    facts: dict[str, Any] = {"decoded_bytes": int(decoded.sum())}
    facts["sidecars"] = [shard_facts(folder / name) for name in names["val_bytes"]]
    if not encoder.caseops:
        facts["contest_bytes"] = int(contest_bytes(stream, encoder.pieces).sum())
        facts["excess_bytes"] = int(encoder.pieces.excess[stream].sum())
    if sidecars:
        original = np.add.reduceat(np.concatenate(sidecars).astype(np.int64), starts)
        facts["original_bytes"] = int(original.sum())
        facts["smaller_bytes"] = int(np.minimum(original, decoded).sum())
    return facts


def fetch_contest_documents(hub: Hub, out: Path) -> Path:
    """The published documents, downloaded once and checked against the digest published with them. All datasets in
    `out` use the same download."""
    path = out / "docs_selected.jsonl"
    with locked(
        out / ".docs_selected.lock",
        f"{path}: another process is downloading it; wait until it is there, then run this again",
    ):
        if path.exists():
            return path
        facts_name = "docs_selected.source_manifest.json"
        content = fetch_bytes(hub, facts_name, out)
        try:
            expected = parse_json(content)["docs_sha256"]
            if not re.fullmatch("[0-9a-f]{64}", expected):
                raise ValueError("not a SHA-256")
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{hub.url(facts_name)}: names no docs_sha256; see --repo") from None
        return hub.fetch(path.name, path, most=MAX_DOCUMENTS_BYTES, sha256=expected)


# ======================================================================================================================
# Hub: files over HTTPS; an interrupted download resumes where it stopped.

HUB_URL = "https://huggingface.co"
MAX_ATTEMPTS = 6  # in a row without progress
FIRST_PAUSE_S = 1.0  # doubled with every further attempt
LONGEST_PAUSE_S = 60.0
TIMEOUT_S = 60
RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}
MAX_SMALL_BYTES = 64 << 20  # manifests and tokenizers
MAX_SHARD_BYTES = 1 << 30  # five times the usual size
MAX_DOCUMENTS_BYTES = 1 << 38  # five times the text
SPARE_BYTES = 1 << 28  # kept free on the disk if the server does not say the size of a download
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class Hub(NamedTuple):
    """A repository with the contest's layout."""

    base_url: str
    repo: str

    def url(self, name: str) -> str:
        path = f"datasets/{self.repo}/resolve/main/datasets/{name}"
        path = urllib.parse.quote(path, errors="surrogatepass")  # a name in a manifest may have lone surrogates
        return f"{self.base_url.rstrip('/')}/{path}"

    def fetch(
        self, name: str, path: Path, label: str = "", most: int = MAX_SMALL_BYTES, sha256: str | None = None
    ) -> Path:
        """Download a file to `path`, where it appears once it is complete and verified; a partial download is resumed.
        Only one process at a time may download to a path.

        Raises UserError if the file does not exist or the server does not deliver it; DataError if the file has more
        than `most` bytes or a SHA-256 other than `sha256` (default: the one that the hub sends).
        """
        part = path.with_name(f".{path.name}.part")
        part.touch()
        named = self._complete(name, part, Progress(label or path.name), most)
        expected = sha256 or named
        if len(expected) == 64 and file_sha256(part) != expected:
            part.unlink()
            raise DataError(
                f"{self.url(name)}: the download does not have the published SHA-256 {expected}; run it again"
            )
        part.rename(path)
        return path

    def _complete(self, name: str, part: Path, progress: Progress, most: int) -> str:
        """Request the rest of `part` until it is complete -> its SHA-256, if the hub sends it. Gives up after
        MAX_ATTEMPTS in a row without progress."""
        attempts = 0
        furthest = part.stat().st_size
        while True:
            pause = FIRST_PAUSE_S * 2**attempts
            try:
                total, sha256 = self._transfer(name, part, progress, most)
                if part.stat().st_size == total:
                    return sha256
                reason = f"{part.stat().st_size:,} of {total:,} bytes came"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                pause = max(pause, retry_after(error))
                if error.code == 416:  # range not satisfiable: the partial download is longer than the file
                    part.write_bytes(b"")
                elif error.code not in RETRIED_STATUSES:
                    raise UserError(f"{self.url(name)}: {reason}; see --variant, --repo and --base-url") from None
            except NETWORK_ERRORS as error:
                reason = str(error) or type(error).__name__

            size = part.stat().st_size
            attempts = 0 if size > furthest else attempts + 1
            furthest = max(furthest, size)
            if attempts == MAX_ATTEMPTS:
                raise UserError(f"{self.url(name)}: {reason}; gave up after {attempts} attempts; run it again to go on")
            time.sleep(min(pause, LONGEST_PAUSE_S))

    def _transfer(self, name: str, part: Path, progress: Progress, most: int) -> tuple[int, str]:
        """One request for the rest of `part` -> (size of the whole file, its SHA-256 or "")."""
        begin = part.stat().st_size
        headers = {"User-Agent": "prepare.py"}
        if begin > 0:
            headers["Range"] = f"bytes={begin}-"
        request = urllib.request.Request(self.url(name), headers=headers)
        linked = LinkedDigest()
        try:
            opened = urllib.request.build_opener(linked).open(request, timeout=TIMEOUT_S)
        except ValueError as error:
            raise http.client.HTTPException(f"redirects to what is no address: {error}") from None
        with opened as answer:
            if answer.status == 206:
                total = whole_size(answer.headers.get("Content-Range", ""), begin)
            else:  # the whole file, from a server that does not send parts
                begin = 0
                total = promised_size(answer.headers.get("Content-Length"))
            progress.total = total
            if total > most:
                raise DataError(f"{self.url(name)}: {total:,} bytes, expected at most {most:,}; see --repo")
            if shutil.disk_usage(part.parent).free < total - begin:
                raise UserError(f"{part.parent}: no space for {name}, {total:,} bytes; free some space")

            with open(part, "ab" if begin else "wb") as file:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    progress(file.tell(), begin)
                    self._check_growth(name, file, total, most)
                if total < 0:  # the server did not say
                    total = file.tell()
        return total, linked.sha256

    def _check_growth(self, name: str, file: BinaryIO, total: int, most: int) -> None:
        """Stop a server that sends more than it promised, or that promised no size and does not stop."""
        if 0 <= total < file.tell():
            file.truncate(0)
            raise http.client.HTTPException(f"more than the promised {total:,} bytes came")
        if total >= 0:
            return
        if file.tell() > most:
            file.truncate(0)
            raise DataError(f"{self.url(name)}: does not end after {most:,} bytes; see --repo")
        if shutil.disk_usage(Path(file.name).parent).free < SPARE_BYTES:
            file.truncate(0)
            raise UserError(f"{Path(file.name).parent}: no space for {name}, whose size is unknown; free some space")


def promised_size(content_length: str | None) -> int:
    """Bytes of a complete response, -1 if the server does not say. Raises HTTPException for anything but a number."""
    if content_length is None:
        return -1
    if not re.fullmatch("[0-9]{1,18}", content_length.strip()):
        raise http.client.HTTPException(f"Content-Length is {content_length[:40]!r}")
    return int(content_length)


class LinkedDigest(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub sends when it redirects to a large file. Follows redirects to HTTP and HTTPS only,
    and none from HTTPS to HTTP."""

    sha256 = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            message = f"redirects from {req.type} to {scheme}, which is not followed: {newurl}"
            raise urllib.error.HTTPError(req.full_url, code, message, headers, fp)
        self.sha256 = self.sha256 or headers.get("X-Linked-Etag", "").strip('"')  # the first: the hub's own
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def whole_size(content_range: str, begin: int) -> int:
    """The size of the whole file, from a partial response. Raises HTTPException if the part does not start at
    `begin`."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", content_range)
    if not match or int(match[1]) != begin:
        raise http.client.HTTPException(f"Content-Range is {content_range!r}")
    return int(match[2])


def retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks us to wait, 0 if it does not say."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


def fetch_bytes(hub: Hub, name: str, folder: Path) -> bytes:
    """The content of a small file."""
    path = hub.fetch(name, folder / "fetched")
    content = path.read_bytes()
    path.unlink()
    return content


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
