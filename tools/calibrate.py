"""
Add to an artifact the RMS of gradients on training text, which TTT_OPTIMIZER=rms divides by; for an artifact trained
without it, or with chunks of another length.

    ./run.sh calibrate ARTIFACT --out NEW

This is training: its time counts on the training clock. The text is the last GRAD_RMS_TOKENS training tokens before
those that ARTIFACT held out, in DATA_PATH, which must hold the text that ARTIFACT was trained on. Gradients are
measured on chunks of TTT_CHUNK_TOKENS in the first 512 tokens of each document (TRAIN_SEQ_LEN if shorter). These knobs
come from the environment, else from the artifact's own run; GRAD_RMS_TOKENS from the environment, else its default. The
weights are not changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import train_gpt as g
from tools.artifact import end_in_a_line, knobs_of_run
from tools.holdout import same_held_out
from tools.values import printable


def calibrate(path: Path, out: Path, over_limit: bool) -> list[str]:
    """Write the artifact `path`, with its gradients measured again, to `out` -> lines that report what was done. Raises
    UserError, also if the result is too large, unless `over_limit`."""
    data = g.read_file(path)
    meta, stored = g.unpack(data, str(path))
    setup = open_training_text(path, meta)
    run = setup.run
    docs = g.gradient_documents(setup)
    model = g.load_artifact(path, setup)

    began = time.perf_counter()
    log = g.Log(screen=functools.partial(print, file=sys.stderr, flush=True))
    model.gradient_rms = g.measure_gradient_rms(model, docs, run, setup.dist, log)
    setup.dist.finish_kernels()
    seconds = time.perf_counter() - began

    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(g.GRADIENT_PREFIX)}
    artifact = g.pack(meta, weights | g.encode_gradient_rms(model), level=22)
    total = len(artifact) + len(g.code())
    g.require(
        over_limit or total <= run.artifact_bytes,
        f"{out} would be {len(artifact)} bytes, {total} with the code: {total - run.artifact_bytes} over "
        f"ARTIFACT_BYTES={run.artifact_bytes}; to write it all the same, add --over-limit",
        g.UserError,
    )
    g.write_atomically(out, [artifact])
    statistics = g.part_bytes(out)["statistics"]
    return [
        f"{out}: {len(artifact)} bytes, {total} with the code; {path} had {len(data)}; gradients take {statistics}",
        f"measured on {len(docs.tokens)} training tokens of {len(docs)} documents, in chunks of "
        f"{model.gradient_rms.chunk_tokens}, in {seconds:.1f} s: this is training, and counts as such",
    ]


def open_training_text(path: Path, meta: dict[str, Any]) -> g.Setup:
    """The set-up for measuring, for the artifact `path` with the metadata `meta`. Its validation set is what the
    artifact held out, and is not used. Raises UserError, also if DATA_PATH is not the text that it was trained on."""
    inherited = {name: value for name, value in knobs_of_run(path, os.environ).items() if name != "GRAD_RMS_TOKENS"}
    config = g.stored_config(meta, str(path))
    _, run = g.read_env(inherited | dict(os.environ) | {"ARTIFACT": "", "RESUME": ""})
    g.require(run.grad_rms_tokens > 0, "GRAD_RMS_TOKENS=0: there is nothing to measure gradients on; raise it")
    held = meta.get("holdout_tokens")
    g.require(type(held) is int and held >= 0, f"{path}: holdout_tokens is {held!r}, which no run writes", g.DataError)
    run = dataclasses.replace(run, holdout_tokens=held, ttt_enabled=0)

    dist = g.Dist.from_env(run.device)
    g.require(dist.world == 1, f"WORLD_SIZE={dist.world}: this runs alone, without torchrun")
    run = g.with_batch(run, dist.world)
    g.prepare_torch(run, dist.device)
    tokenizer = g.load_tokenizer(run, config.vocab_size)
    stream = g.TrainingStream(run, config.vocab_size, dist)
    held_out = same_held_out(stream, meta.get("holdout"), str(path))
    return g.Setup(config, run, dist, tokenizer, held_out, stream)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW", help="the artifact to write")
    parser.add_argument("--over-limit", action="store_true", help="write it even if it is over ARTIFACT_BYTES")
    options = parser.parse_args(arguments)
    for line in calibrate(options.artifact, options.out, options.over_limit):
        print(printable(line))
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
