"""
What packing costs, and what each part of the quantiser gains: the same weights are packed in several ways to the same
size, read back, and compared with the unpacked network on held-out training documents.

./run.sh packing WEIGHTS                 WEIGHTS is a checkpoint, logs/RUN.ckpt
./run.sh packing WEIGHTS --only NAMES    only these ways, comma-separated; --list shows all
./run.sh packing WEIGHTS --artifact A    compare an artifact of the same weights too
./run.sh packing WEIGHTS --on validation only for a final figure: never choose by it

A run removes its checkpoint once its artifact is written: copy it as soon as the log names it. Knobs are environment
variables, as for the entry, or come from logs/RUN.json beside the checkpoint; DATA_PATH and ARTIFACT_BYTES matter here.
TRAIN_ROW_TOKENS and TRAIN_BATCH_TOKENS (by default, the values used in training) and GPTQ_CALIBRATION_BATCHES set the
calibration text; HOLDOUT_TOKENS is always the value used in training. KL is the divergence from the predictions of the
network before packing: it needs no labels, so it is less noisy than the score. Both are in bits per byte, with the
standard error over documents if there are ten or more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import train_gpt as g
from tools.artifact import end_in_a_line, knobs_of_run
from tools.holdout import same_held_out, score_holdout
from tools.results import FEWEST, ratio_and_error
from tools.values import digest

LOGIT_CHUNK = 4096  # tokens whose logits are in memory at a time


# ---- Ways to pack ----


class Way(NamedTuple):
    """How a way differs from the default: knobs, patched names of train_gpt, or changed sensitivities."""

    doc: str
    knobs: dict[str, object] = {}
    patches: dict[str, object] = {}  # {"NAME" or "Class.name": value}
    change: Callable[[str, g.Sensitivity], g.Sensitivity] | None = None
    calibrates_anew: bool = False


def equal_rows(name: str, sensitivity: g.Sensitivity) -> g.Sensitivity:
    return sensitivity._replace(row_weights=torch.ones_like(sensitivity.row_weights), inputs=None)


def equal_rows_of_embedding(name: str, sensitivity: g.Sensitivity) -> g.Sensitivity:
    return equal_rows(name, sensitivity) if name == "embed" else sensitivity


def equal_rows_of_blocks(name: str, sensitivity: g.Sensitivity) -> g.Sensitivity:
    return sensitivity if name == "embed" else equal_rows(name, sensitivity)


def add_unweighted(sums: g.GradientSums, x: Tensor, gradient: Tensor) -> None:
    """`GradientSums.add` with all inputs weighted alike, by the mean squared gradient instead of each token's own."""
    squares = gradient.square()
    sums.row_squares += squares.sum(0)
    sums.hessian.addmm_(x.mT, x, alpha=float(squares.mean()))


def equal_columns(plan: g.MatrixPlan, octave: float) -> g.Grid:
    """`MatrixPlan.grid` with one step for all columns, at the same cost in bits."""
    grid = PLAIN_GRID(plan, octave)
    return grid._replace(column_steps=np.full_like(grid.column_steps, round(grid.column_steps.mean())))


def equal_columns_of_blocks(plan: g.MatrixPlan, octave: float) -> g.Grid:
    """As `equal_columns`, except for the embedding and the output matrices of attention."""
    return PLAIN_GRID(plan, octave) if plan.column_steps.std() > 2 else equal_columns(plan, octave)


def one_table(model: g.ContextModel, row: int) -> np.ndarray:
    """`ContextModel.contexts` with tables chosen by the trellis alone."""
    contexts = PLAIN_CONTEXTS(model, row)
    return np.where(contexts > 1, 2 + (contexts & 1), contexts)


PLAIN_GRID = g.MatrixPlan.grid
PLAIN_CONTEXTS = g.ContextModel.contexts

WAYS = {
    "default": Way("as it is"),
    "nearest": Way("integers rounded to nearest, no trellis", {"trellis_states": "0"}),
    "states-8": Way("a trellis of 8 states", {"trellis_states": "8"}),
    "equal-rows": Way("no row of a matrix counts more than another", change=equal_rows),
    "equal-rows-embed": Way("no row of the embedding counts more", change=equal_rows_of_embedding),
    "equal-rows-blocks": Way("no row counts more, but in the embedding", change=equal_rows_of_blocks),
    "equal-columns": Way("one step for all columns of a matrix", patches={"MatrixPlan.grid": equal_columns}),
    "columns-where-spread": Way(
        "a step for each column only where they differ much", patches={"MatrixPlan.grid": equal_columns_of_blocks}
    ),
    "unweighted": Way(
        "all inputs count alike in Hessians", patches={"GradientSums.add": add_unweighted}, calibrates_anew=True
    ),
    "one-table": Way("no classes of integers in the coder", patches={"ContextModel.contexts": one_table}),
    "rare-0": Way("no bound on the steps of rare tokens", patches={"RARE_TOKEN_CAUTION": 0.0}),
    "rare-1": Way("a looser bound", patches={"RARE_TOKEN_CAUTION": 1.0}),
    "rare-100": Way("a tighter bound", patches={"RARE_TOKEN_CAUTION": 100.0}),
    "looped-1": Way("looped blocks as measured", patches={"LOOPED_FACTOR": 1.0}, calibrates_anew=True),
    "looped-2": Way("looped blocks twice as much", patches={"LOOPED_FACTOR": 2.0}, calibrates_anew=True),
    "looped-3": Way("looped blocks three times as much", patches={"LOOPED_FACTOR": 3.0}, calibrates_anew=True),
    "damping-0.005": Way("less damping", {"gptq_damping": 0.005}),
    "damping-0.01": Way("less damping", {"gptq_damping": 0.01}),
    "damping-0.04": Way("more damping", {"gptq_damping": 0.04}),
    "damping-0.1": Way("more damping", {"gptq_damping": 0.1}),
    "segment-128": Way("paths of 128 rows", patches={"STRIP_ROWS": 128}),
    "segment-2048": Way("paths of 2,048 rows", patches={"STRIP_ROWS": 2048}),
    "text-quarter": Way("a quarter of the text", {"calibration": 0.25}, calibrates_anew=True),
    "text-4": Way("four times the text", {"calibration": 4.0}, calibrates_anew=True),
}

PARTS = {  # part of the quantiser -> the way that leaves it out
    "trellis": "nearest",
    "rows": "equal-rows",
    "columns": "equal-columns",
    "weights": "unweighted",
    "tables": "one-table",
}


def all_without(names: Sequence[str], doc: str) -> Way:
    """One way that combines the changes of all these ways."""
    ways = [WAYS[name] for name in names]
    knobs = {name: value for way in ways for name, value in way.knobs.items()}
    patches = {name: value for way in ways for name, value in way.patches.items()}
    changes = [way.change for way in ways if way.change is not None]

    def change(name: str, sensitivity: g.Sensitivity) -> g.Sensitivity:
        for each in changes:
            sensitivity = each(name, sensitivity)
        return sensitivity

    return Way(doc, knobs, patches, change, any(way.calibrates_anew for way in ways))


WAYS["none"] = all_without(
    list(PARTS.values()), "without any of the parts below: GPTQ, one step for a matrix, one table"
)
for part in PARTS:
    others = [way for name, way in PARTS.items() if name != part]
    WAYS[f"only-{part}"] = all_without(others, f"of these parts only {part}")


@contextlib.contextmanager
def patched(patches: dict[str, object]) -> Iterator[None]:
    """Within the context, these names of train_gpt have other values."""
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            owner, _, attribute = name.rpartition(".")
            stack.enter_context(mock.patch.object(getattr(g, owner) if owner else g, attribute, value))
        yield


# ---- Measuring ----


class Judge:
    """Compares networks with the network before packing, document by document."""

    def __init__(self, model: g.GPT, docs: g.Documents, run: g.RunConfig):
        self.docs = docs
        self.cap = model.config.logit_softcap
        self.embedding = model.embed.detach().clone()
        self.rows = []  # (micro-batch, document index of every target)
        document = np.repeat(np.arange(len(docs)), docs.lengths)  # document index of every target, in stream order
        size = run.train_row_tokens
        for start in range(0, len(document), size):
            end = min(start + size, len(document))
            tokens = docs.tokens[start:end]
            starts = g.segment_starts(tokens, size, run.eval_seq_len)
            batch = g.make_micro_batch(tokens, docs.tokens[start + 1 : end + 1], starts, model.embed.device)
            self.rows.append((batch, document[start:end]))
        with torch.no_grad():
            self.states = [model.hidden(batch.tokens, batch.segments)[0][0] for batch, _ in self.rows]

    @torch.no_grad()
    def compare(self, model: g.GPT) -> tuple[np.ndarray, np.ndarray]:
        """-> for every document, the bits that packing adds to its score, and the KL divergence in bits."""
        penalty = np.zeros(len(self.docs))
        divergence = np.zeros(len(self.docs))
        for (batch, document), exact in zip(self.rows, self.states, strict=True):
            states = model.hidden(batch.tokens, batch.segments)[0][0]
            parts = zip(
                states.split(LOGIT_CHUNK), exact.split(LOGIT_CHUNK), batch.targets[0].split(LOGIT_CHUNK), strict=True
            )
            found = [self.of_tokens(model, *part) for part in parts]
            penalty += np.bincount(document, torch.cat([d for d, _ in found]).cpu().numpy(), len(self.docs))
            divergence += np.bincount(document, torch.cat([kl for _, kl in found]).cpu().numpy(), len(self.docs))
        return penalty / math.log(2), divergence / math.log(2)

    def of_tokens(self, model: g.GPT, states: Tensor, exact: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States (T, D) of both networks, targets (T,) -> score differences and divergences (T,), nats, fp64."""
        log_p = g.softcap(exact @ self.embedding.to(exact.dtype).mT, self.cap).log_softmax(-1)
        log_q = g.softcap(states @ model.embed.to(states.dtype).mT, self.cap).log_softmax(-1)
        added = (log_p - log_q).gather(1, targets[:, None])[:, 0]
        return added.double(), (log_p.exp() * (log_p - log_q)).sum(-1).double()

    def per_byte(self, bits: np.ndarray) -> tuple[float, float]:
        """Bits of every document -> bits per byte and its standard error over documents."""
        return ratio_and_error(bits, self.docs.target_bytes())

    def cell(self, bits: np.ndarray) -> str:
        """The same as a table cell, without the error if there are too few documents to estimate it."""
        figure, error = self.per_byte(bits)
        return f"{figure:.5f}" if len(self.docs) < FEWEST else f"{figure:.5f} ± {error:.5f}"


class Training(NamedTuple):
    """What a checkpoint states about its training."""

    path: str  # of the checkpoint
    batch_tokens: int  # tokens per step
    row_tokens: int
    holdout_tokens: int
    holdout: str  # sha256 of the held-out documents
    tokenizer: str  # sha256


def load_checkpoint(path: str) -> tuple[g.GPT, Training]:
    """The network of a checkpoint, with the weights of its model, and its training. Raises DataError."""
    meta, tensors = g.unpack(g.read_file(path), path)
    config = g.stored_config(meta | {"kind": "artifact"}, path)
    model = g.GPT(config)
    with torch.no_grad(), g.untrusted(path):
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    return model, training_of(meta, path)


def training_of(meta: Mapping[str, Any], path: str) -> Training:
    """The `Training` that a checkpoint's metadata states. Raises DataError if it is missing."""
    numbers = [meta.get(name) for name in ("train_batch_tokens", "train_row_tokens", "holdout_tokens")]
    digests = [meta.get(name) for name in ("holdout", "tokenizer")]
    known = all(type(number) is int and 0 <= number <= g.MAX_KNOB for number in numbers) and all(map(digest, digests))
    g.require(known, f"{path}: it does not say what it was trained on, as a checkpoint does: train again", g.DataError)
    return Training(path, *numbers, *digests)


def calibrate(model: g.GPT, setup: g.Setup, batches: float) -> dict[str, g.Sensitivity]:
    """Sensitivities from this many batches of training text."""
    run = setup.run
    text = []
    for i in range(math.ceil(batches)):
        batch = setup.stream.batch(i)
        keep = math.ceil(len(batch) * min(1.0, batches - i))
        text.append(batch[:keep])
    return g.calibrate(model, text, setup.dist, run)


def measure(way: Way, model: g.GPT, setup: g.Setup, known: dict[str, g.Sensitivity], judge: Judge) -> str:
    """Pack in this way, read back and compare -> the columns of its row."""
    knobs = dict(way.knobs)
    batches = setup.run.gptq_calibration_batches * knobs.pop("calibration", 1.0)
    run = dataclasses.replace(setup.run, **knobs)
    watch = g.Stopwatch(setup.dist)
    with patched(way.patches):
        sensitivities = calibrate(model, setup, batches) if way.calibrates_anew else known
        if way.change is not None:
            sensitivities = {name: way.change(name, found) for name, found in sensitivities.items()}
        artifact = g.make_artifact(model, sensitivities, run, setup.dist, watch, {}, g.Log())
        with watch.phase("unpack"):
            packed = read_back(artifact, "the artifact", model)
    return columns(judge, packed, len(artifact), watch.total("factorise", "quantise", "pack"), watch.total("unpack"))


def read_back(artifact: bytes, what: str, model: g.GPT) -> g.GPT:
    """The network in an artifact, which must have the shape of `model`; it is put on the device of `model`."""
    _, stored = g.unpack(artifact, what)
    return g.restore(g.GPT(model.config).to(model.embed.device), stored, what)


def columns(judge: Judge, packed: g.GPT, size: int, pack_seconds: float, unpack_seconds: float) -> str:
    penalty, divergence = judge.compare(packed)
    return f"{size:,} | {judge.cell(divergence)} | {judge.cell(penalty)} | {pack_seconds:.1f} | {unpack_seconds:.1f} |"


def open_text(on: str, folder: Path, config: g.ModelConfig, training: Training) -> g.Setup:
    """A set-up with the documents to compare on as its validation set, and the calibration text as its stream. Unless
    knobs say otherwise, rows and batches are as large as in the training that made the checkpoint, which may have had
    more GPUs and time. Raises UserError if DATA_PATH is not the data that it was trained on."""
    knobs = {"TRAIN_ROW_TOKENS": str(training.row_tokens)} | knobs_of_run(Path(training.path), os.environ)
    _, run = g.read_env(knobs | os.environ | {"ARTIFACT": "", "RESUME": ""})
    if not run.train_batch_tokens:
        run = dataclasses.replace(run, train_batch_tokens=training.batch_tokens)
    run = dataclasses.replace(run, holdout_tokens=training.holdout_tokens)  # more was trained on
    if on == "holdout":
        run = score_holdout(run, config.vocab_size, folder / "data")
    dist = g.Dist.from_env(run.device)
    g.prepare_torch(run, dist.device)
    setup = g.make_setup(config, run, dist)
    g.require(
        setup.tokenizer.sha256 == training.tokenizer,
        f"{training.path}: made for another tokenizer than {setup.tokenizer.path}; set DATA_PATH or TOKENIZER_PATH",
        g.DataError,
    )
    same_held_out(setup.stream, training.holdout, training.path)
    return setup


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="?", metavar="WEIGHTS")
    parser.add_argument("--only", default=",".join(WAYS), metavar="NAMES", help="ways to pack, with commas [all]")
    parser.add_argument("--artifact", help="an artifact of the same weights, to be compared, too")
    parser.add_argument("--on", choices=["holdout", "validation"], default="holdout", help="the text [holdout]")
    parser.add_argument("--list", action="store_true", help="name all ways, and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, way in WAYS.items():
            print(f"{name:22} {way.doc}")
        return 0
    names = options.only.split(",")
    unknown = sorted(set(names) - set(WAYS))
    g.require(not unknown, f"--only {','.join(unknown)}: no such way; --list names them")
    g.require(options.weights is not None, "name a checkpoint, logs/RUN.ckpt")
    g.require(
        Path(options.weights).exists(),
        f"{options.weights}: there is none; a run removes its checkpoint once its artifact is written: copy it before",
        g.DataError,
    )

    model, training = load_checkpoint(options.weights)
    with tempfile.TemporaryDirectory() as folder:
        setup = open_text(options.on, Path(folder), model.config, training)
        model.to(setup.dist.device)
        judge = Judge(model, setup.validation, setup.run)
        start = time.perf_counter()
        known = calibrate(model, setup, setup.run.gptq_calibration_batches)
        setup.dist.finish_kernels()
        docs = setup.validation
        print(f"{len(docs):,} documents, {docs.lengths.sum():,} targets, {docs.target_bytes().sum():,} bytes; ", end="")
        print(f"calibration took {time.perf_counter() - start:.1f} s", flush=True)
        print("| way | bytes | KL, bpb | penalty, bpb | pack, s | unpack, s |\n|---|---|---|---|---|---|", flush=True)
        if options.artifact:
            data = g.read_file(options.artifact)
            packed = read_back(data, options.artifact, model)
            print(f"| {options.artifact} | {columns(judge, packed, len(data), 0.0, 0.0)}", flush=True)
        for name in names:
            print(f"| {name} | {measure(WAYS[name], model, setup, known, judge)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
