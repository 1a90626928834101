"""The sources of a sweep: each a train_gpt.py, from a file or a git revision, that can be asked for its knobs."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_gpt
from tools import ask_source
from tools.values import any_text, missing_or_wrong, parse_object, table_of
from train_gpt import ConfigError, require

REPOSITORY = Path(__file__).resolve().parent.parent
ASK_SECONDS = 300.0  # to import a source on a busy machine


@dataclass(frozen=True)
class Source:
    """A train_gpt.py as it was when the sweep began."""

    name: str  # as given to --source; empty for this repository's own, without --source
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def file(self, folder: Path) -> Path:
        """Where it runs from: a copy in the sweep's folder, safe from edits of the original."""
        return folder / "sources" / f"{self.sha256[:12]}.py"

    def knobs(self) -> dict[str, str]:
        """Its entry in a combination: one more dimension of the grid. `source` is lower case, as no knob is."""
        return {"source": self.name} if self.name else {}


def find_sources(words: str | None) -> list[Source]:
    """The comma-separated sources of --source; without it, the train_gpt.py of this repository."""
    if words is None:
        return [Source("", train_gpt.code())]
    return [Source(word, read_source(word)) for word in words.split(",")]


def read_source(word: str) -> bytes:
    """The content of a file, or train_gpt.py as it is in a git revision of this repository."""
    if Path(word).is_file():
        return train_gpt.read_file(word)
    message = f"--source {word!r}: neither a file nor a git revision that has a train_gpt.py"
    require(bool(re.match(r"\w", word)), message)  # git would parse a leading dash as an option
    try:
        done = subprocess.run(["git", "-C", REPOSITORY, "show", f"{word}:train_gpt.py"], capture_output=True)
    except FileNotFoundError:
        raise ConfigError(f"{message} (there is no git)") from None
    require(done.returncode == 0, message)
    return done.stdout


def ask(source: Source, question: Mapping[str, Any]) -> dict[str, Any]:
    """A source's answer to tools/ask_source.py, run in a separate process: a source is never imported into this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_gpt.py")
        path.write_bytes(source.content)
        command = [sys.executable, "-P", ask_source.__file__, str(path)]
        try:
            asked = json.dumps(question).encode()
            done = subprocess.run(command, input=asked, capture_output=True, timeout=ASK_SECONDS)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"--source {source.name}: its import takes more than {ASK_SECONDS:.0f} s") from None
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    require(done.returncode == 0, f"--source {source.name}: it cannot be asked for its knobs: {''.join(last)}")
    said = parse_object(done.stdout)
    kinds = {"knobs": table_of(any_text), "settings": is_list, "lacking": is_list}
    wrong = missing_or_wrong(said, kinds)
    require(not wrong, f"--source {source.name}: its answer is none: {wrong}")
    return said


def is_list(value: Any) -> bool:
    return isinstance(value, list)
