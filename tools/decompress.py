"""
Decompress what `compress` wrote, with the artifact that it was written with.

    python -m tools.decompress OUT FILE

OUT names the artifact by its hash and holds the knobs, so the environment's do not count; DATA_PATH or TOKENIZER_PATH
must lead to the tokenizer. The text is written only if it fits its checksum. What is promised across computers, and how
fast this is: python -m tools.compress --help.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import train_gpt
from tools import codec
from tools.artifact import end_in_a_line, find_artifact


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="decompress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the compressed file")
    parser.add_argument("file", type=Path, metavar="FILE", help="where its text goes")
    parser.add_argument("--artifact", help="[ARTIFACT in the environment, else the newest logs/*.ptz]")
    args = parser.parse_args(arguments)
    began, contents = time.monotonic(), codec.unpack_file(train_gpt.read_file(args.out), str(args.out))
    data = codec.decompress(find_artifact(args.artifact), contents)
    train_gpt.write_atomically(args.file, [data])
    print(f"{args.file}: {len(data)} bytes, {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(lambda: main(sys.argv[1:])))
