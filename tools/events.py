"""
The events of a run: its reports for programs.

logs/RUN.events.jsonl holds one JSON object per line, which begins with the event's name: {"event": "step", ...}.
train_gpt.py writes it, and from the same values the lines for people in logs/RUN.txt. Here the events are read and
checked (`read_events`), and the log is compared with the lines that follow from them (`first_difference`).
"""

from __future__ import annotations

import itertools
import math
import shlex
import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tools.values import (
    digest,
    missing_or_wrong,
    number,
    one_of,
    optional,
    parse_object,
    settings,
    share,
    signed,
    text,
    whole,
)
from train_gpt import DataError

MAX_BYTES = 1 << 26  # of all events of a run: half a million steps

FIELDS = {  # event -> its fields and their kinds; a non-finite value is stored as null
    "run": {
        "run_id": text,
        "seed": whole,
        "code_sha256": digest,
        "code_bytes": whole,
        "versions": text,
        "platform": text,
        "knobs": settings,
    },
    "kernels": {"triton": optional(text), "mlp": one_of("triton", "cublas")},
    "device": {"world_size": whole, "device": text},
    "validation": {"documents": whole, "tokens": whole, "bytes": whole},
    "training_data": {
        "shards": whole,
        "tokens": whole,
        "holdout_tokens": whole,
        "batch_tokens": whole,
        "grad_accum_steps": whole,
        "micro_batch_rows": whole,
    },
    "predicted_size": {"artifact_bytes": number, "code_bytes": whole, "limit_bytes": whole},
    "limits": {"steps": whole, "train_seconds": number, "eval_seconds": number},
    "setting_up": {"stage": text},
    "dry_run": {
        "checkpoint": number,
        "choose": number,
        "gradients": number,
        "calibrate": number,
        "factorise": number,
        "quantise": number,
        "pack": number,
    },
    "set_up": {"seconds": number, "reserve_seconds": number},
    "step": {
        "step": whole,
        "loss": optional(number),
        "progress": number,
        "loop": whole,
        "tokens_per_s": number,
        "epoch": number,
        "train_s": number,
        "eta_s": signed,
    },
    "trained": {"step": whole, "file": text, "bytes": whole},
    "scoring": {"what": text, "targets_done": whole, "targets": whole, "eta_s": signed},
    "validate": {"step": whole, "val_bpb": optional(number)},
    "readout": {
        "documents": whole,
        "last": number,
        "half": number,
        "average": number,
        "readout": share,
        "best": number,
    },
    "before_quantisation": {"prequant_bpb": number, "last_bpb": number},
    "gradients": {"documents": whole, "tokens": whole, "chunk": whole, "longer_chunk": whole},
    "damping": {"damping": number},
    "rounding": {"attempt": whole, "fineness": signed, "artifact_bytes": whole, "bits": signed},
    # From older runs:
    "pack": {"attempt": whole, "clip_scale": number, "artifact_bytes": whole, "entropy_bytes": number},
    "time_short": {"degraded_documents": whole},
    "adapted": {
        "documents_done": whole,
        "documents": whole,
        "bpb": optional(number),
        "eval_s": number,
        "eta_s": signed,
    },
    "lossy": {"bytes_kept": whole, "val_bpb_kept": number},
    "excess": {"excess_bytes": whole, "val_bpb_exact": number},
    "score": {"artifact": text, "static_bpb": number, "val_bpb": optional(number)},
    "over_limit": {"clock": one_of("training", "evaluation"), "over_seconds": number, "limit_seconds": number},
    "warning": {"text": text},
    "phase": {"name": text, "seconds": number, "clock": one_of("training", "evaluation", "-")},
    "result": {},  # the whole result, whose kinds are in tools/results.py
}
EARLIER_FIELDS = {  # event -> its earlier fields, in existing logs
    "limits": ({"train_seconds": number, "eval_seconds": number},),
    "readout": (
        {
            "documents": whole,
            "last": number,
            "half": number,
            "average": number,
            "readout": one_of("last", "half", "average"),
        },
        {"documents": whole, "average": number, "last": number, "readout": one_of("average", "last")},
    ),
}


class Event(NamedTuple):
    name: str
    values: dict[str, Any]  # checked for an event in FIELDS, unchecked for any other

    @property
    def known(self) -> bool:
        return self.name in FIELDS


def read_events(content: bytes, source: str) -> list[Event]:
    """The events of a file, or of the complete lines of a growing one. Events with unknown names are kept, and their
    values are not checked. Raises DataError, naming `source` and the line, if a line is not an event, or if an event
    has a missing field, an extra one, or one of the wrong kind."""
    if len(content) > MAX_BYTES:
        raise DataError(f"{source}: {len(content)} bytes of events, at most {MAX_BYTES} are expected")

    events = []
    for i, line in enumerate(content.splitlines(), 1):
        try:
            events.append(parse_event(line))
        except ValueError as error:  # DataError is a ValueError
            raise DataError(f"{source}: line {i} of the events: {error}") from None
    return events


def parse_event(line: bytes) -> Event:
    values = parse_object(line)
    if next(iter(values), None) != "event" or not text(values["event"]):
        raise ValueError("it does not begin with the name of an event")

    event = Event(values.pop("event"), values)
    fields = FIELDS.get(event.name)
    for earlier in EARLIER_FIELDS.get(event.name, ()):
        if values.keys() == earlier.keys():
            fields = earlier
    if fields:
        wrong = missing_or_wrong(values, fields)
        unknown = [name for name in values if name not in fields]
        if wrong or unknown:
            raise ValueError(f"{event.name}: {wrong or f'it has {unknown[0]!r}, which no run writes'}")
    return event


def named(name: str, events: Iterable[Event]) -> list[dict[str, Any]]:
    """The values of every event of that name."""
    return [event.values for event in events if event.name == name]


# -----------------------------------------------------------------------------
# The lines for people, from the events. The templates of train_gpt.py are repeated here, so that a record is checked
# against these and not against whatever its own source prints.

TEMPLATES = {  # event -> all wordings of its line in train_gpt.py, the latest first
    "gradients": (
        "gradients: measured on {documents} documents of {tokens} tokens, in chunks of {chunk} and {longer_chunk}",
    ),
    "damping": (
        "damping: a Hessian is not positive definite with GPTQ_DAMPING, which was raised to {damping:g} for it",
    ),
    "over_limit": ("over the limit: {clock} took {over_seconds:.3f} s more than its {limit_seconds:g} s",),
    "device": ("devices: {world_size} x {device}",),
    "validation": ("validation: {documents} documents, {tokens} targets, {bytes} bytes",),
    "training_data": (
        "training data: {shards} shards, {tokens} tokens, {holdout_tokens} held out; "
        "{batch_tokens} a step, {grad_accum_steps} passes of {micro_batch_rows} rows per rank",
        "training data: {shards} shards, {tokens} tokens, {holdout_tokens} held out; "
        "{batch_tokens} a step, in {grad_accum_steps} passes of {micro_batch_rows} rows per rank",
    ),
    "predicted_size": (
        "predicted artifact: about {artifact_bytes:.0f} bytes, {code_bytes} bytes of code, limit {limit_bytes}",
        "predicted artifact: about {artifact_bytes:.0f} bytes before its ranges are fitted, "
        "{code_bytes} bytes of code, limit {limit_bytes}",
    ),
    "limits": (
        "limits: {steps} steps, {train_seconds:g} s of training, {eval_seconds:g} s of evaluation (0: none)",
        "limits: {train_seconds:g} s of training, {eval_seconds:g} s of evaluation (0: none)",
    ),
    "setting_up": ("set-up: {stage}",),
    "dry_run": (
        "set-up: what follows training takes, in seconds: checkpoint {checkpoint:.1f}, choose {choose:.1f}, "
        "gradients {gradients:.1f}, calibrate {calibrate:.1f}, factorise {factorise:.1f}, quantise {quantise:.1f}, "
        "pack {pack:.1f}",
    ),
    "set_up": (
        "set-up took {seconds:.1f} s; {reserve_seconds:.1f} s are reserved for what follows training",
        "set-up took {seconds:.1f} s; {reserve_seconds:.1f} s are reserved for quantisation and packing",
    ),
    "step": (
        "step:{step} loss:{loss:.4f} progress:{progress:.3f} loop:{loop} "
        "tokens_per_s:{tokens_per_s:.0f} epoch:{epoch:.2f} train_s:{train_s:.1f} eta_s:{eta_s:.0f}",
    ),
    "trained": ("step {step}: the trained weights are in {file} ({bytes} bytes); RESUME={file} goes on from here",),
    "scoring": ("scoring {what}: {targets_done}/{targets} targets eta_s:{eta_s:.0f}",),
    "validate": ("step:{step} val_bpb:{val_bpb:.5f} (last iterate, without adaptation)",),
    "readout": (
        "{documents} held-out documents: last {last:.5f}, half {half:.5f}, average {average:.5f} nats a token; "
        "{readout:.3f} of the average: {best:.5f}",
        "{documents} held-out documents: last {last:.5f}, half {half:.5f}, average {average:.5f} nats a token",
        "{documents} held-out documents: average {average:.5f}, last {last:.5f} nats a token",
    ),
    "before_quantisation": (
        "before quantisation, without adaptation: val_bpb:{prequant_bpb:.5f}, last iterate {last_bpb:.5f}",
    ),
    "rounding": (
        "pack {attempt}: {artifact_bytes} bytes, {bits:.4f} bits a weight, steps finer by {fineness:.4f} octaves",
    ),
    "pack": (
        "pack {attempt}: ranges x{clip_scale:.4f}, {artifact_bytes} bytes, entropy of rounded "
        "weights {entropy_bytes:.0f} bytes",
    ),
    "time_short": (
        "time is short: the remaining {degraded_documents} documents are scored without further adaptation",
        "time is short: {degraded_documents} documents that have not begun are scored without adaptation",
    ),
    "adapted": (
        "adapted documents:{documents_done}/{documents} bpb:{bpb:.4f} (of this rank's) "
        "eval_s:{eval_s:.0f} eta_s:{eta_s:.0f}",
    ),
    "lossy": ("this tokenizer is lossy: over the {bytes_kept} bytes that survive it, val_bpb is {val_bpb_kept:.5f}",),
    "excess": (
        "this tokenizer has spaces inside pieces, for which the contest's formula counts {excess_bytes} bytes too "
        "many: without these, val_bpb is {val_bpb_exact:.5f}",
    ),
    "warning": ("warning: {text}",),
    "phase": ("phase {name:26} {seconds:9.2f} s   clock: {clock}",),
}
SHOWN = (  # fields of a result shown in its line, if present
    "val_bpb",
    "static_bpb",
    "prequant_bpb",
    "artifact_bytes",
    "code_bytes",
    "total_bytes",
    "steps",
    "train_tokens",
    "train_seconds",
    "eval_seconds",
    "documents",
    "tokens",
    "bytes",
    "doc_independent",
    "degraded_documents",
    "seed",
)


def first_difference(log: str, events: Iterable[Event]) -> tuple[str, str] | None:
    """Compare a run's log, after the source, with the lines that follow from its events: settings, versions, progress,
    result. -> None if they agree; else the first line that differs, and what it should be. Either is empty if there
    are no more lines."""
    at = 0
    for event in events:
        wordings = wordings_of(event)
        found = [lines for lines in wordings if log.startswith(lines, at)]
        if wordings and not found:
            pairs = itertools.zip_longest(log[at:].split("\n"), wordings[0].split("\n"), fillvalue="")
            return next((pair for pair in pairs if pair[0] != pair[1]), ("", wordings[0]))
        if found:
            at += len(found[0])
    return (log[at:].partition("\n")[0], "") if at < len(log) else None


def wordings_of(event: Event) -> list[str]:
    """The possible lines of an event in the log, each with its newline; empty if it has no line."""
    if event.name in SPECIAL:
        return [SPECIAL[event.name](event.values) + "\n"]
    shown = {name: math.nan if value is None else value for name, value in event.values.items()}
    return [
        template.format(**shown) + "\n"
        for template in TEMPLATES.get(event.name, ())
        if names_in(template) <= shown.keys()
    ]


def names_in(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def settings_and_versions(values: Mapping[str, Any]) -> str:
    knobs = [f"{name}={shlex.quote(value) if value else ''}" for name, value in values["knobs"].items()]
    return "\n".join([*knobs, f"{values['versions']} {values['platform']}"])


def kernels_line(values: Mapping[str, Any]) -> str:
    if values["triton"] is None:
        return "no Triton: all runs in plain torch"
    if values["mlp"] == "cublas":
        return f"kernels: Triton {values['triton']}, but cuBLAS for the MLP: no TMA"
    return f"kernels: Triton {values['triton']}"


def score_line(values: Mapping[str, Any]) -> str:
    line = f"artifact {values['artifact']}: static_bpb:{values['static_bpb']:.5f}"
    if values["val_bpb"] is not None:
        line += f" ttt_bpb:{values['val_bpb']:.5f}"
    return line


def result_line(values: Mapping[str, Any]) -> str:
    words = ["result"]
    for name in SHOWN:
        value = values.get(name)
        if isinstance(value, float):
            words.append(f"{name}:{value:.6f}")
        elif name in values:
            words.append(f"{name}:{value}")
    return " ".join(words)


SPECIAL = {"run": settings_and_versions, "kernels": kernels_line, "score": score_line, "result": result_line}
