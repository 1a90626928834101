"""
The same text prepared with several tokenizers, as one more dimension of a sweep. The same whole documents at its end
are held out of training for every tokenizer, so that scores in bits per byte are comparable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt
from tools.grid import require_distinct
from tools.holdout import exact_sidecar, known_transform, last_tokens, whole_documents
from train_gpt import BOS, DataError, RunConfig, find_shards, read_shard, require


class Text(NamedTuple):
    """A folder of prepared data."""

    name: str  # as given to --data; empty for DATA_PATH, without --data
    vocab_size: int = 0
    held: int = 0  # tokens held out at its end

    def knobs(self) -> dict[str, str]:
        """Its entry in a combination: `data` is lower case, as no knob is."""
        return {"data": self.name} if self.name else {}

    def env(self) -> dict[str, str]:
        """The variables that it sets in a run's environment."""
        if not self.name:
            return {}
        sizes = {"VOCAB_SIZE": str(self.vocab_size), "HOLDOUT_TOKENS": str(self.held)}
        return {"DATA_PATH": self.name, "TOKENIZER_PATH": ""} | sizes


def find_texts(words: str | None) -> list[Text]:
    """The comma-separated folders of --data. In the first, the last HOLDOUT_TOKENS are held out; in the others, as many
    whole documents. Raises ConfigError if a folder is given twice, DataError if they do not hold the same text."""
    if words is None:
        return [Text("")]
    knobs = {name: os.environ[name] for name in ("HOLDOUT_TOKENS",) if os.environ.get(name)}
    held = train_gpt.read_env(knobs)[1].holdout_tokens
    names = words.split(",")
    require_distinct(names)
    texts = []
    expected = None
    for name in names:
        size = pieces_of(name)
        paths = find_shards(name, "train")
        if expected is not None:
            held = tokens_of(paths, len(expected))
        found = document_bytes(name, size, held)
        if expected is None:
            expected = found
        require_same_text(names[0], expected, name, found)
        texts.append(Text(name, size, held))
    return texts


def pieces_of(folder: str) -> int:
    """The vocabulary size of a folder's tokenizer. Raises DataError."""
    named = train_gpt.manifest_value(Path(folder), "tokenizer", "path")
    require(isinstance(named, str), f"--data {folder}: no manifest.json in it names a tokenizer", DataError)
    processor = train_gpt.sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(train_gpt.read_file(Path(folder) / named))
        return processor.get_piece_size()
    except RuntimeError:
        raise DataError(f"{folder}/{named}: not a SentencePiece model") from None


def tokens_of(paths: list[Path], documents: int) -> int:
    """The number of tokens in this many whole documents at the end, plus the last document, which may be incomplete.
    Raises DataError if there are fewer documents."""
    missing = documents + 1  # document beginnings still to find
    tokens = 0
    for path in reversed(paths):
        shard = read_shard(path)
        starts = np.flatnonzero(shard == BOS)
        if len(starts) >= missing:
            return tokens + len(shard) - int(starts[-missing])
        missing -= len(starts)
        tokens += len(shard)
    raise DataError(f"--data {paths[0].parent}: it holds fewer than {documents + 1} documents; lower HOLDOUT_TOKENS")


def document_bytes(folder: str, vocab_size: int, held: int) -> np.ndarray:
    """Bytes of original text of every held-out document, (documents,)."""
    tokenizer = train_gpt.load_tokenizer(RunConfig(data_path=folder), vocab_size)
    documents = whole_documents(last_tokens(find_shards(folder, "train"), held, vocab_size), held)
    sizes = exact_sidecar(documents, tokenizer, known_transform(Path(folder), tokenizer))
    return train_gpt.split_documents(documents, sizes.astype(np.int64)).target_bytes()


def require_same_text(first: str, expected: np.ndarray, name: str, found: np.ndarray) -> None:
    """Raise DataError unless the documents (n,) of two folders have the same bytes."""
    if np.array_equal(expected, found):
        return
    differ = np.flatnonzero(expected != found)
    i = int(differ[0])
    raise DataError(
        f"--data {first},{name}: {len(differ)} of the last {len(found)} whole documents have other bytes, the first "
        f"{expected[i]} and {found[i]}: prepare the same text, with tokenizers that keep it"
    )
