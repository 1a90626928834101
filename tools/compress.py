"""
Compress a text with an artifact: its score, including test-time training, turned into bits.

    ./run.sh compress FILE OUT          one document
    ./run.sh compress --table N         N held-out documents, against gzip, xz and zstd

Any input is restored byte for byte (./run.sh decompress): what the tokenizer cannot restore is stored too.
The knobs TTT_..., EVAL_SEQ_LEN and SEED come from the environment, else from the run that made the artifact, and are
stored in OUT. DATA_PATH or TOKENIZER_PATH must lead to the tokenizer.

It runs on the GPU if there is one, else on the CPU; set DEVICE=cpu or cuda to choose. Only a GPU decompresses what a
GPU compressed, and only a CPU what a CPU compressed; `decompress` uses the one that OUT names.

Guarantee: OUT decompresses on the same computer with the same torch, artifact and train_gpt.py, all of which it names.
Elsewhere the last bit of a sum may differ, and with it everything after. A GPU of another name or with another build is
refused. Another CPU is tried, and fails with a message if the text's checksum is wrong. So this proves that the score
is a code length; it is not an archiver. A CPU uses OMP_NUM_THREADS threads, or one per core; the decoder then uses the
same number.

Speed: decompressing costs one forward pass over a chunk (TTT_CHUNK_TOKENS) per token, compressing about five per chunk.
On one CPU core, decompressing took 0.14 s per token with the default network and 0.015 s with the small one;
compressing took 0.02 s and 0.002 s. Progress and the time left are reported. Documents in one file (--split) are coded
side by side, TTT_BATCH_DOCS at a time, which is faster, especially on a GPU; memory grows with their number. A file
holds at most 64 MiB of text.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import torch
import zstandard

import train_gpt
from tools import codec
from tools.artifact import end_in_a_line, find_artifact

MAX_SEPARATOR_BYTES = 255


def separator(text: str) -> bytes:
    """'\\n\\n' as typed in a shell -> bytes."""
    try:
        raw = text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; expected text, with escapes as in Python") from None
    if not 0 < len(raw) <= MAX_SEPARATOR_BYTES:
        raise argparse.ArgumentTypeError(f"{len(raw)} bytes, expected 1 to {MAX_SEPARATOR_BYTES}")
    return raw


def compressed(predictor: codec.Predictor, data: bytes, between: bytes) -> tuple[bytes, str]:
    """-> the compressed file, and a message about it."""
    made = codec.compress(predictor, data, between)
    size = len(made.blob)
    documents = "1 document" if made.documents == 1 else f"{made.documents} documents"
    return made.blob, (
        f"{len(data)} -> {size} bytes, {8 * size / max(1, len(data)):.3f} bits per byte; "
        f"of these, header {made.header}, edits {made.edits}, tokens {made.coded} ({made.tokens} of {documents})"
    )


def held_out(predictor: codec.Predictor, count: int) -> list[bytes]:
    """`count` validation documents, evenly spaced in the ranking by length, shortest first."""
    run = predictor.run
    docs = train_gpt.load_validation(run.data_path, predictor.model.config.vocab_size, predictor.tokenizer)
    order = np.argsort(docs.lengths[:-1], kind="stable")  # the last document has no closing BOS
    train_gpt.require(0 < count <= len(order), f"--table {count}: there are {len(order)} documents to choose from")
    chosen = order[np.linspace(0, len(order) - 1, count + 2).astype(int)[1:-1]]
    caseops = codec.uses_caseops(predictor)
    return [codec.to_bytes(predictor, caseops, docs.span(i)[1:].tolist()) for i in chosen]


def sizes_of_others(data: bytes) -> list[int]:
    return [
        len(gzip.compress(data, 9, mtime=0)),
        len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
        len(zstandard.ZstdCompressor(level=19).compress(data)),
    ]


def print_table(predictor: codec.Predictor, count: int) -> None:
    """Print sizes in bytes: one line per document, and one for all of them in one file."""
    texts = held_out(predictor, count)
    print("| document | bytes | gzip -9 | xz -9e | zstd -19 | artifact | header | its tokens | score | bits per byte |")
    print("|" + "---|" * 10)
    for number, text in enumerate(texts, 1):
        print_row(predictor, str(number), [text])
    print_row(predictor, "all", texts)


def print_row(predictor: codec.Predictor, name: str, texts: list[bytes]) -> None:
    """Print the sizes of these documents in one file. "artifact" is the whole file, with "header" and "its tokens";
    "score" is what the scorer reports for these tokens, in bytes."""
    text = b"\0".join(texts)
    made = codec.compress(predictor, text, b"\0" if len(texts) > 1 else b"")
    score = round(codec.reported_bits(predictor, texts) / 8)
    sizes = [len(text), *sizes_of_others(text), len(made.blob), made.header, made.coded, score]
    bits = 8 * len(made.blob) / max(1, len(text))
    print(f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + f" | {bits:.3f} |", flush=True)


def main(arguments: list[str]) -> int:
    parser = codec.argument_parser("./run.sh compress", __doc__)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument(
        "--split",
        type=separator,
        default=b"",
        metavar="TEXT",
        help="what separates documents, such as '\\n\\n' or '<s>' [the file is one document: all of the text read so "
        "far helps to predict what follows]",
    )
    parser.add_argument("--table", type=int, metavar="N", help="compare on N documents of the validation shards")
    args = parser.parse_args(arguments)
    if (args.out is None) == (args.table is None) or (args.file is not None and args.table is not None):
        parser.error("give FILE and OUT, or --table N")

    codec.make_deterministic(torch.get_num_threads())
    predictor = codec.open_predictor(find_artifact(args.artifact), device=os.environ.get("DEVICE", "auto"))
    if args.table is not None:
        print_table(predictor, args.table)
    else:
        codec.convert_file(args.file, args.out, lambda data: compressed(predictor, data, args.split))
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(lambda: main(sys.argv[1:])))
