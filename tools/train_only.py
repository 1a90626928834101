"""
One job of `./run.sh sweep --train-only`: train, and score the weights as they are before quantisation.

    python -P tools/train_only.py SOURCE           under the environment of a run: knobs, RUN_ID
    python -P tools/train_only.py SOURCE --wait    imports, opens its data, prints "waits", and begins when it
                                                   reads a line on standard input; no GPU is touched before

SOURCE is a train_gpt.py. Its own main runs, with `experiment` below in place of its do_experiment. All of
MAX_WALLCLOCK_SECONDS goes to training: nothing is packed or read back, and there is no test-time training. DATA_PATH is
a folder made by tools/holdout.py, whose validation set is held-out training documents.

Writes the run's log, events, result and document scores. The result has the field "train_only", unlike that of a full
run. Imports only the standard library, numpy and torch, so that the tools' own train_gpt.py cannot mix with SOURCE.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch

NEEDED = (  # names that a source must define to be trained alone
    "Dist",
    "DivergenceCheck",
    "LOGS",
    "READOUTS",
    "Stopwatch",
    "UserError",
    "check_ranks_agree",
    "check_setup",
    "choose_weights",
    "code",
    "describe_run",
    "describe_setup",
    "device_name",
    "do_experiment",
    "main",
    "make_setup",
    "make_trainer",
    "open_log",
    "random_batch",
    "read_env",
    "remove",
    "report",
    "score_all_static",
    "settings",
    "train",
    "versions",
    "warm_up",
)
LAST_LOSSES = 3  # number of logged steps averaged into the final training loss


def lacking(entry: ModuleType) -> list[str]:
    """The names of NEEDED that a source lacks."""
    return [name for name in NEEDED if not hasattr(entry, name)]


def experiment(entry: ModuleType, model_config: Any, run: Any, dist: Any, run_id: str, check_only: bool) -> None:
    """Replaces a source's do_experiment: train, score before quantisation and report. Raises UserError."""
    for name, value in {"ARTIFACT": run.artifact, "RESUME": run.resume}.items():
        if value:
            raise entry.UserError(f"{name}={value}: this trains from the start: unset it")
    watch = entry.Stopwatch(dist)
    with watch.phase("load"):
        setup = entry.make_setup(model_config, run, dist)
        entry.check_ranks_agree(setup)
        entry.check_setup(setup)
    log = entry.open_log(run_id, dist, write_files=not check_only)
    entry.describe_run(setup, run_id, log)
    entry.describe_setup(setup, log)
    if check_only:
        return

    checkpoint = entry.LOGS / f"{run_id}.ckpt"
    held_out, trainer = set_up(entry, setup, log, watch)
    with watch.phase("train"):
        history = entry.train(trainer, setup.stream, log, watch, 0.0, validation(entry, trainer, setup), checkpoint)
    trainer.cuda_graphs = None  # frees the memory of captured steps for scoring

    with watch.phase("choose"):
        readout = entry.choose_weights(trainer, setup, held_out, log)
    share = entry.READOUTS.get(readout, readout)  # of the average; earlier sources name it
    with watch.phase("validate"), trainer.average.applied(share):
        table = entry.score_all_static(trainer.model, setup)
    check = entry.DivergenceCheck(setup.model.vocab_size)
    check.at_the_end(table.nats_per_token, "the score of the trained weights")

    result = {"run_id": run_id, "seed": setup.run.seed, "code_sha256": hashlib.sha256(entry.code()).hexdigest()}
    result |= {"train_only": True, "knobs": entry.settings(setup.model, setup.run), "readout": readout}
    result |= training_facts(trainer, setup, history, watch) | scores(setup, table)
    if dist.main:
        result |= {"code_bytes": len(entry.code()), "versions": entry.versions()}
        result |= {"world_size": dist.world, "device": entry.device_name(dist.device)}
        result["phases"] = {name: round(seconds, 3) for name, seconds in watch.seconds.items()}
        entry.report(result, documents_file(table), watch, log, entry.LOGS / f"{run_id}.json")
        entry.remove(checkpoint, log)


def set_up(entry: ModuleType, setup: Any, log: Any, watch: Any) -> tuple[Any, Any]:
    """-> the held-out documents, and a trainer with its step compiled and its initial weights."""
    with watch.phase("set-up"):
        held_out = setup.stream.held_out()
        trainer = entry.make_trainer(setup, held_out)
        state = trainer.copy_state()
        entry.warm_up(trainer, entry.random_batch(setup.run, setup.model.vocab_size, setup.dist))
        trainer.load_state(state, 0)
        setup.dist.finish_kernels()
        setup.dist.barrier()
    line = "set-up took {seconds:.1f} s; {reserve_seconds:.1f} s are reserved for what follows training"
    log.event("set_up", line, seconds=watch.total("set-up"), reserve_seconds=0.0)
    return held_out, trainer


def validation(entry: ModuleType, trainer: Any, setup: Any) -> Any:
    """The validation that runs every VAL_LOSS_EVERY steps: bits per byte of the last iterate."""

    def validate() -> float:
        looping = trainer.looping(trainer.progress)
        return entry.score_all_static(trainer.model, setup, looping).bits_per_byte

    return validate


def training_facts(trainer: Any, setup: Any, history: list, watch: Any) -> dict[str, Any]:
    """The result's fields about training: seconds, nats per token, and bytes of GPU memory (0 on a CPU)."""
    seconds = watch.total("train")
    tokens = trainer.step * setup.run.train_batch_tokens
    losses = [loss for _, _, loss in history[-LAST_LOSSES:]]
    on_gpu = setup.dist.device.type == "cuda"
    return {
        "steps": trainer.step,
        "train_tokens": tokens,
        "epochs": tokens / setup.stream.total,
        "history": history,
        "train_seconds": seconds,
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "train_loss": float(np.mean(losses)) if losses else None,  # None if TRAIN_LOG_EVERY logged no step
        "peak_memory_bytes": torch.cuda.max_memory_allocated(setup.dist.device) if on_gpu else 0,
    }


def scores(setup: Any, table: Any) -> dict[str, Any]:
    """The result's fields about the documents and their score."""
    docs = table.docs
    return {
        "prequant_bpb": table.bits_per_byte,
        "documents": len(docs),
        "tokens": int(docs.lengths.sum()),
        "bytes": int(docs.target_bytes().sum()),
        "excess_bytes": docs.excess_bytes(setup.tokenizer.pieces),
        "validation": docs.sha256(),
    }


def documents_file(table: Any) -> bytes:
    """The scores of all documents, in order, as the bytes of an .npz."""
    docs = table.docs
    out = io.BytesIO()
    np.savez_compressed(
        out,
        prequant_nats=table.nats,
        tokens=docs.lengths,
        bytes=docs.target_bytes(),
        validation=np.array(docs.sha256()),
    )
    return out.getvalue()


def load(path: str) -> ModuleType:
    """Import a source as the module `train_gpt`."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def open_data(entry: ModuleType) -> None:
    """Read the run's data into the page cache, as a rank on a CPU: the GPU belongs to another job."""
    with contextlib.suppress(entry.UserError):  # the run itself will hit the error and report it
        setup = entry.make_setup(*entry.read_env(), entry.Dist())
        setup.stream.held_out()
        setup.stream.read(0, setup.run.train_batch_tokens)
        if setup.run.device != "cpu" and setup.run.compile:
            importlib.import_module("torch._inductor.compile_fx")  # spares the first compilation seconds


def wait_until_told() -> None:
    """Return once a line arrives on the standard input; exit if the input ends without one."""
    print("waits", flush=True)
    if not os.read(0, 1):
        sys.exit("error: it was never told to begin")


def main(path: str, *options: str) -> int:
    """-> exit status, as from the source."""
    entry = load(path)
    if missing := lacking(entry):
        print(f"error: {path}: it has no {', '.join(missing)}: it cannot be trained alone", file=sys.stderr)
        return 2
    if options == ("--wait",):
        open_data(entry)
        wait_until_told()
    entry.do_experiment = functools.partial(experiment, entry)
    return entry.main([])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
