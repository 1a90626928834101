"""One property of an audit: bytes are counted right, those of the files and those of every document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

import train_gpt
from data import prepare
from tools.artifact import result_beside
from tools.audit import Audit, Seen
from tools.claims import MOST_BYTES


def has_sidecar(audit: Audit) -> bool:
    """Whether any validation shard has a side-car. Looks for itself: the program is what is being audited."""
    folder = Path(audit.run.data_path)
    names = (path.name for path in folder.glob("fineweb_val_[0-9]*.bin"))
    return any((folder / name.replace("_val_", "_val_bytes_")).exists() for name in names)


def bytes_counted(audit: Audit) -> Seen:
    """Reported sizes of code and artifact match the files, and each document's byte count matches its decoded text."""
    setup = audit.opened.setup
    faults = []
    program = Path(train_gpt.__file__).read_bytes()
    artifact = Path(setup.run.artifact).stat().st_size
    most = min(setup.run.artifact_bytes, MOST_BYTES)
    if len(program) + artifact > most:
        faults.append(f"code and artifact are {len(program) + artifact} bytes, the limit is {most}")
    result = result_beside(Path(setup.run.artifact))
    sizes = {"artifact_bytes": artifact}
    if result.get("code_sha256") == hashlib.sha256(program).hexdigest():
        sizes |= {"code_bytes": len(program), "total_bytes": len(program) + artifact}
    faults += [f"{name} is {result[name]}, the file has {n}" for name, n in sizes.items() if result.get(name, n) != n]
    excess = excess_bytes(audit)
    if result.get("validation") == setup.validation.sha256() and result.get("excess_bytes", excess) != excess:
        faults.append(f"excess_bytes is {result['excess_bytes']}, the spaces inside pieces have {excess}")
    counted = setup.validation.target_bytes()
    recount = recounter(audit)
    # A side-car may be wrong about any one document; without it, one formula counts them all, so that a sample will do.
    recounted = list(range(len(setup.validation))) if has_sidecar(audit) else audit.chosen
    spans = [setup.validation.tokens[audit.starts[i] : audit.starts[i + 1]] for i in recounted]
    decoded = [recount(span.tolist()) for span in spans]
    for i, size in zip(recounted, decoded, strict=True):
        if size is not None and size != counted[i]:
            faults.append(f"document {i}: {counted[i]} bytes are counted, its tokens decode to {size}")
    if counted.sum() != setup.validation.bytes[1:].sum():
        faults.append(f"documents have {counted.sum()} bytes, their tokens {setup.validation.bytes[1:].sum()}")
    how = f"{sum(counted[recounted])} bytes of {len(decoded)} documents decoded again"
    if None in decoded:
        how = "its tokenizer is lossy: original bytes cannot be recounted from tokens"
    if excess > 0:
        how += f"; by the contest's formula, which counts {excess} bytes too many: there are spaces inside pieces"
    return faults, f"{len(program)} of code + {artifact} of artifact; {counted.sum()} of text; {how}"


def recounter(audit: Audit) -> Callable[[list[int]], int | None]:
    """A function that counts the bytes of a document from its tokens: by the contest's formula if there is no side-car.
    It returns None where the tokenizer is lossy."""
    setup = audit.opened.setup
    if not has_sidecar(audit):
        return lambda tokens: contest_size(setup.tokenizer.processor, tokens)
    caseops = train_gpt.transform_of(Path(setup.run.data_path), setup.tokenizer) == "caseops"
    encoder = prepare.load_encoder(setup.tokenizer.path.read_bytes(), caseops, str(setup.tokenizer.path))
    original = prepare.decode_caseops if caseops else str
    return lambda tokens: len(original(encoder.processor.decode(tokens)).encode()) if encoder.exact else None


def contest_size(processor: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> int:
    """Bytes of the text that the tokens spell, by the contest's formula. A leading space after a control token does not
    count; a space mark inside a piece counts with its own three UTF-8 bytes."""
    spelt = b""
    bare = True  # no text precedes the next piece
    for token in tokens:
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            bare = True
            continue
        piece = processor.id_to_piece(token)
        space = piece.startswith("\u2581")
        if processor.is_byte(token):
            spelt += bytes([int(piece[3:5], 16)])
        else:
            if space and not bare:
                spelt += b" "
            spelt += piece.removeprefix("\u2581").encode()
        bare = False
    return len(spelt)


def excess_bytes(audit: Audit) -> int:
    """Bytes that the contest's formula counts in excess of the text of all documents: two for every space mark inside
    a piece, which counts three bytes but spells one space."""
    docs = audit.opened.setup.validation
    if has_sidecar(audit):
        return 0
    processor = audit.opened.setup.tokenizer.processor
    marks = np.zeros(processor.get_piece_size(), np.int64)
    for piece in np.unique(docs.tokens).tolist():
        if not (processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece)):
            marks[piece] = processor.id_to_piece(piece)[1:].count("\u2581")
    return 2 * int(marks[docs.tokens].sum())
