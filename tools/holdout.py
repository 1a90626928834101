"""
Held-out training documents as a validation set, so that no choice is made on the real validation set.

HOLDOUT_TOKENS keeps the end of the training shards out of training. Here the whole documents in it become the
validation shard of a folder, with links to the training shards, on which the entry runs unchanged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare import caseops_bytes, decode_caseops, load_encoder, token_bytes, workspace, write_shard
from train_gpt import (
    BOS,
    ConfigError,
    DataError,
    Documents,
    ModelConfig,
    RunConfig,
    Tokenizer,
    TrainingStream,
    brief,
    check_vocabulary,
    contest_bytes,
    find_shards,
    load_tokenizer,
    manifest_value,
    read_file,
    read_header,
    read_shard,
    require,
    stored_config,
    transform_of,
)

NAMES = ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin")


def score_holdout(run: RunConfig, vocab_size: int, folder: Path, exact: bool = False) -> RunConfig:
    """The run with held-out training documents as its validation set, in `folder`: those that its artifact held out, or
    without an artifact the last HOLDOUT_TOKENS; `exact` as for `make_holdout`. Raises UserError, also if DATA_PATH is
    not the data that the artifact was trained on."""
    held = run.holdout_tokens
    digest = ""
    if run.artifact:
        _, held, digest = held_out_by(run.artifact)
    facts = make_holdout(Path(run.data_path), load_tokenizer(run, vocab_size), held, folder, exact)
    require(
        not run.artifact or facts["sha256"] == digest,
        f"DATA_PATH={run.data_path}: its last {held} training "
        f"tokens are not those that {run.artifact} did not learn from: name the data that it was trained on, "
        "or use --on validation",
        DataError,
    )
    return dataclasses.replace(run, data_path=str(folder), tokenizer_path="")


def held_out_by(artifact: str) -> tuple[ModelConfig, int, str]:
    """The network of an artifact, the number of tokens at the end of its training data that were held out, and the
    SHA-256 of those documents."""
    header, _ = read_header(read_file(artifact), artifact)
    held = header["meta"].get("holdout_tokens", 0)
    require(
        type(held) is int and held > 0,
        f"{artifact}: held no training documents back (holdout_tokens is {brief(held)}): it may have learned "
        "them; train again with HOLDOUT_TOKENS, or use --on validation",
        DataError,
    )
    return stored_config(header["meta"], artifact), held, header["meta"].get("holdout")


def same_held_out(stream: TrainingStream, digest: Any, what: str) -> Documents:
    """The documents that these training shards hold out. Raises DataError unless they are those that were held out in
    the training of the file `what`; `digest` is the one that the file states for them."""
    held_out = stream.held_out()
    require(
        held_out.tokens_sha256() == digest,
        f"DATA_PATH: its last {stream.run.holdout_tokens} training tokens are not those that {what} held out: name the "
        "data that it was trained on",
        DataError,
    )
    return held_out


def make_holdout(
    source: Path, tokenizer: Tokenizer, holdout_tokens: int, folder: Path, exact: bool = False
) -> dict[str, Any]:
    """Make `folder` from the prepared data in `source` unless it exists -> the "holdout" entry of its manifest. With
    `exact`, a side-car holds the true bytes of the text, since the contest's formula may count too many.

    The folder is created atomically. Raises ConfigError if nothing is held out, DataError if the held-out stretch
    contains no whole document or the bytes of its text cannot be determined."""
    require(
        holdout_tokens > 0,
        "HOLDOUT_TOKENS=0 keeps no training document to choose on; set it, or choose with --on validation",
        ConfigError,
    )
    paths = find_shards(str(source), "train")
    transform = known_transform(source, tokenizer)
    stretch = last_tokens(paths, holdout_tokens, tokenizer.processor.get_piece_size())
    documents = whole_documents(stretch, holdout_tokens)
    facts = {
        "holdout_tokens": holdout_tokens,
        "documents": int((documents == BOS).sum()),
        "tokens": len(documents),
        "sha256": hashlib.sha256(documents.tobytes()).hexdigest(),
        "tokenizer": tokenizer.sha256,
        "transform": transform,
        "train": [[str(path.resolve()), path.stat().st_size] for path in paths],
    }
    if exact:
        facts["exact"] = True
    if manifest_value(folder, "holdout") == facts:
        return facts
    with workspace(folder, parameters={}, replace=True) as partial:
        write_shard(partial / NAMES[0], [documents])
        if transform == "caseops" or exact:
            write_shard(partial / NAMES[1], [exact_sidecar(documents, tokenizer, transform)])
        for path in paths:
            (partial / path.name).symlink_to(path.resolve())
        (partial / "tokenizer.model").write_bytes(read_file(tokenizer.path))
        named = {"path": "tokenizer.model", "sha256": tokenizer.sha256, "transform": transform}
        manifest = {"tokenizer": named, "holdout": facts}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    return facts


def known_transform(source: Path, tokenizer: Tokenizer) -> str:
    """`transform_of`, but a folder with side-cars must state its transform: they may count the bytes of text under a
    transform that is unknown here."""
    transform = transform_of(source, tokenizer)
    told = manifest_value(source, "tokenizer", "transform") is not None or transform == "caseops"
    require(
        told or not (source / NAMES[1]).exists(),
        f"{source}: it has side-cars, but no manifest.json of data/prepare.py says how its text was transformed, so "
        "the bytes of a training document cannot be told; prepare the data again, or choose with --on validation",
        DataError,
    )
    return transform


def last_tokens(paths: list[Path], count: int, vocab_size: int) -> np.ndarray:
    """The last `count` tokens of consecutive shards, (count,) uint16. Raises DataError if there are fewer, or if one is
    outside the vocabulary."""
    parts = []
    missing = count
    for path in reversed(paths):
        shard = read_shard(path)
        start = max(0, len(shard) - missing)
        check_vocabulary(path, shard[start:], vocab_size, start)
        parts.append(shard[start:])
        missing -= len(parts[-1])
        if not missing:
            return np.concatenate(parts[::-1])
    raise DataError(f"HOLDOUT_TOKENS={count}: {paths[0].parent} holds {count - missing} training tokens; lower it")


def whole_documents(stretch: np.ndarray, holdout_tokens: int) -> np.ndarray:
    """Cut from the first BOS to just before the last, whose document may continue beyond the stretch."""
    starts = np.flatnonzero(stretch == BOS)
    require(
        len(starts) > 1,
        f"HOLDOUT_TOKENS={holdout_tokens}: the last {holdout_tokens} training tokens hold no whole document; raise it",
        DataError,
    )
    return stretch[starts[0] : starts[-1]]


def exact_sidecar(documents: np.ndarray, tokenizer: Tokenizer, transform: str) -> np.ndarray:
    """Bytes of original text of every token, (n,) uint16; what a lossy tokenizer drops cannot be known here."""
    if transform == "caseops":
        return caseops_sidecar(documents, tokenizer)
    pieces = tokenizer.pieces
    return (contest_bytes(documents, pieces) - pieces.excess[documents]).astype(np.uint16)


def caseops_sidecar(documents: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of original text of every token, (n,) uint16, found by decoding the tokens and undoing the transform: equal
    to the side-car that data/prepare.py writes for validation."""
    encoder = load_encoder(read_file(tokenizer.path), True, str(tokenizer.path))
    sidecar = np.zeros(len(documents), np.uint16)
    starts = np.flatnonzero(documents == BOS)
    for begin, end in zip(starts, [*starts[1:], len(documents)], strict=True):
        tokens = documents[begin + 1 : end]
        if not len(tokens):
            continue
        inner = encoder.processor.decode(tokens.tolist())
        counts = token_bytes(encoder, inner, caseops_bytes(inner), tokens)
        original = len(decode_caseops(inner).encode())
        if counts.sum() != original or counts.min() < 0 or counts.max() > np.iinfo(np.uint16).max:
            raise DataError(
                f"training document at token {begin} of the held-out ones: its tokens add up to "
                f"{counts.sum()} bytes of {original}; choose with --on validation"
            )
        sidecar[begin + 1 : end] = counts
    return sidecar
