"""
Decompress a file written by `compress`, with the same artifact.

    ./run.sh decompress OUT FILE

OUT names the artifact by its hash and holds the knobs, so knobs in the environment are ignored. DATA_PATH or
TOKENIZER_PATH must lead to the tokenizer. It runs on the device that OUT was compressed on, and refuses if this machine
lacks that device or DEVICE differs. The text is written only if it matches its checksum. For guarantees across
computers, and speed, see ./run.sh compress --help.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools import codec
from tools.artifact import end_in_a_line, find_artifact


def main(arguments: list[str]) -> int:
    parser = codec.argument_parser("./run.sh decompress", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="the compressed file")
    parser.add_argument("file", type=Path, metavar="FILE", help="where its text goes")
    args = parser.parse_args(arguments)

    def decompressed(blob: bytes) -> tuple[bytes, str]:
        contents = codec.unpack_file(blob, str(args.out))
        text = codec.decompress(find_artifact(args.artifact), contents)
        return text, f"{len(text)} bytes"

    codec.convert_file(args.out, args.file, decompressed)
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(lambda: main(sys.argv[1:])))
