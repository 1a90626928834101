"""
Does the scorer keep the rules on this artifact? Prints one line per property; exits with status 1 if any fails.

    ./run.sh prove [ARTIFACT] [--seed N] [--seconds S]

ARTIFACT is logs/RUN.ptz (default: the environment's ARTIFACT, else the newest). It is scored with the settings of its
own run, unless the environment overrides them: TTT_ENABLED=0 proves the score without adaptation. The audit samples the
shortest and the median validation document, the longest that fits in the time, and a few chosen by the seed. The
findings are also written to logs/RUN.prove.json.

The scorer is treated as a black box: it is fed streams of tokens and observed at three places: the scores it books to
each document (ScoreTable), the output of its last layer (OutputHead), and what it had learned by then (the weights and
every Adapter). The last two need eager kernels. A GPU's usual kernels, compiled or replayed, are observed only by what
they book, and must book the same.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt
from data import prepare
from tools.alone import artifact_alone
from tools.artifact import Opened, end_in_a_line, find_artifact, open_artifact
from tools.audit import SUM_TOLERANCE, TOLERANCE_NATS, Audit, Seen, Text, Widest, document_starts, joined
from tools.listening import ScorerError
from tools.recount import bytes_counted
from tools.results import load_run
from tools.values import printable

SCORING = ("TTT_", "EVAL_SEQ_LEN", "EVAL_STRIDE", "SEED", "MICRO_BATCH_TOKENS")  # prefixes of knobs that affect scores

# -----------------------------------------------------------------------------
# Properties: each looks for faults and reports what it saw.


class Future(NamedTuple):
    """A stream that shares its beginning with the original."""

    what: str
    tokens: np.ndarray
    same: int  # number of leading targets whose scores must be equal


def cuts(audit: Audit, size: int) -> list[int]:
    """Positions from which to change the tokens of a stream: its start; the first, an inner and the last token of a
    chunk; its end; and beyond the context."""
    chunk = audit.chunk
    context = audit.run.eval_seq_len
    last = size - 1
    inside = audit.chance.integers(1, max(2, chunk - 1), 4).tolist()
    places = {2, last, context + 1, context + 1 + inside[3]}
    for n, k in enumerate((0, 1, last // chunk // 2)):
        places |= {k * chunk + 1, k * chunk + 1 + inside[n], (k + 1) * chunk}
    return sorted(t for t in places if 2 <= t <= last)


def futures(audit: Audit, tokens: np.ndarray) -> Iterator[Future]:
    """Futures with other tokens, with earlier ends, with a BOS planted in the middle, and with a later end."""
    for t in cuts(audit, len(tokens)):
        yield Future(f"other tokens from {t} on", np.append(tokens[:t], audit.other(tokens[t:])), t - 1)
    end = audit.chunk + max(2, min(8, audit.chunk // 2))
    while end < len(tokens) - 1:
        yield Future(f"the text ends at {end}", tokens[: end + 1], end)
        end *= 2
    planted = tokens.copy()
    planted[len(tokens) // 2] = train_gpt.BOS
    yield Future(f"BOS planted at {len(tokens) // 2}", planted, len(tokens) // 2 - 1)
    longer = np.append(tokens, audit.other(np.resize(tokens, audit.chunk + 1)))
    yield Future(f"no end before {len(longer)}", longer, len(tokens) - 1)


def causality(audit: Audit) -> Seen:
    """A score depends on nothing after its target: neither on the tokens there, nor on where the document ends."""
    widest = Widest()
    for n, unit, heard in zip(audit.chosen, audit.units, audit.alone, strict=True):
        for what, tokens, same in futures(audit, unit.tokens):
            nats = audit.score(Text(tokens, unit.bytes)).nats
            widest.compare(f"document {n}, {what}", nats[:same], heard.nats[:same], unit.bytes[1 : same + 1])
    for n, unit in zip(audit.chosen, audit.units, strict=True) if audit.early_late else ():
        cut = len(unit.tokens) * 3 // 4  # other tokens from there on
        if cut > audit.early_late["eval_seq_len"]:
            changed = np.append(unit.tokens[:cut], audit.other(unit.tokens[cut:]))
            nats, expected = (
                audit.score(Text(tokens, unit.bytes), **audit.early_late).nats[: cut - 1]
                for tokens in (changed, unit.tokens)
            )
            what = f"document {n} in late chunks, other tokens from {cut} on"
            widest.compare(what, nats, expected, unit.bytes[1:cut])
    first = min(audit.texts, key=lambda text: len(text.tokens))
    next_one = audit.texts[-1]
    same = len(first.tokens)
    pair = joined([first, next_one])
    changed = np.concatenate([pair.tokens[: same + 1], audit.other(next_one.tokens[1:])])
    nats, expected = (audit.score(Text(tokens, pair.bytes)).nats[:same] for tokens in (changed, pair.tokens))
    widest.compare("the next document is another", nats, expected, pair.bytes[1 : same + 1])
    cut = "" if all(map(audit.is_whole, audit.chosen)) else f", at most {audit.limit} tokens of each in the time"
    return widest.faults, f"{widest}; {widest.seen} other futures of {len(audit.texts)} documents{cut}"


def score_before_update(audit: Audit) -> Seen:
    """A chunk is scored with exactly what a replay that stops just before it has learned."""
    faults = []
    seen = 0
    updates = 0
    for n, unit, heard in zip(audit.chosen, audit.units, audit.closely, strict=True):
        last = (len(unit.tokens) - 2) // audit.chunk
        for k in sorted({0, 1, 2, last // 2, last} & set(range(last + 1))):
            begin = k * audit.chunk
            tokens = np.append(unit.tokens[: begin + 1], audit.other(unit.tokens[:2]))
            replay = audit.score(Text(tokens, unit.bytes), closely=True)
            seen += 1
            states = replay.states[begin], heard.states[begin]
            if None in states or states[0] != states[1]:
                faults.append(f"document {n}: what scores chunk {k} is not what the chunks before it left")
        updates += len({state for state in heard.states if state}) - 1
    faults += hidden_learning(audit) if updates == 0 else []
    return (
        faults,
        f"{seen} chunks scored bit for bit by what a replay left that stops before them; {updates} updates seen",
    )


def hidden_learning(audit: Audit) -> list[str]:
    """A fault if adaptation changes scores although none of the tensors observed has changed."""
    if not audit.run.ttt_enabled:
        return []
    unit, heard = max(zip(audit.units, audit.closely, strict=True), key=lambda pair: len(pair[0].tokens))
    reach = min(audit.run.eval_seq_len, int(document_starts(unit.tokens)[1]) - 1)  # contexts may differ beyond it
    apart = abs(audit.score(unit, ttt_enabled=0).nats - heard.nats)[:reach].max(initial=0.0)
    text = f"adaptation changes scores by {apart:.2g} nats, and nothing that could have learned is in sight"
    return [text] if apart > TOLERANCE_NATS else []


def independence(audit: Audit) -> Seen:
    """A document scores the same alone, in its batch, in another batch and order, and on another rank; if adaptation
    amplifies rounding, at a rate at which it does not (see `Audit.calm`)."""
    if audit.stream:
        return None, "TTT_SCOPE=stream: a score depends on the documents before it; results say doc_independent:0"
    widest, figures = settings_compared(audit)
    if not widest.faults or not audit.run.ttt_enabled or audit.dist.device.type == "cuda":
        return widest.faults, figures
    calm = audit.calm()
    if not calm.chaos:
        return widest.faults, figures
    widest, figures = settings_compared(calm)
    return widest.faults, f"{figures}, at TTT_LR={calm.run.ttt_lr:g}: at {audit.run.ttt_lr:g}, {calm.chaos}"


def settings_compared(audit: Audit) -> tuple[Widest, str]:
    """Differences between the scores of each document in several settings, and how many were compared."""
    changes = {}
    if audit.run.batched_ttt and audit.dist.device.type == "cpu":  # on a GPU it sets the shapes, which affect the bits
        changes["ttt_batch_docs"] = 2 if audit.run.ttt_batch_docs > 2 else 64
    wild = audit.texts[-1]._replace(tokens=np.append(train_gpt.BOS, audit.other(audit.texts[-1].tokens[1:])))
    dull = audit.texts[0]._replace(tokens=np.append(train_gpt.BOS, np.full(len(audit.texts[0].tokens) - 1, 2)))
    backward = [wild, *audit.texts[::-1], dull]
    elsewhere = by_document(backward, audit.score(joined(backward), **changes).nats)[-2:0:-1]
    batch = by_document(audit.texts, audit.together.nats)
    ranks = sum(heard.sums for heard in audit.by_rank)
    widest = Widest()
    if audit.early_late:
        late = by_document(audit.texts, audit.score(joined(audit.texts), **audit.early_late).nats)
        for n, text, nats in zip(audit.chosen, audit.texts, late, strict=True):
            alone = audit.score(text, **audit.early_late).nats
            widest.compare(f"document {n} with late chunks in its batch, and alone", nats, alone, text.bytes[1:])
    total = 0.0
    for i, (text, alone) in enumerate(zip(audit.texts, audit.alone, strict=True)):
        for way, nats in {"in its batch": batch[i], "in another batch": elsewhere[i]}.items():
            widest.compare(f"document {audit.chosen[i]} {way}, and alone", nats, alone.nats, text.bytes[1:])
        what = f"document {audit.chosen[i]} by eight ranks and by one"
        size = int(text.bytes.sum())
        widest.compare_sums(what, ranks[i] - audit.together.sums[i], size)
        total += float((elsewhere[i] - alone.nats).sum())
    bpb = abs(total) / math.log(2) / int(joined(audit.texts).bytes.sum())
    return widest, f"{widest}, {bpb:.1e} in all; {len(audit.texts)} documents, each in 4 settings"


def by_document(texts: Sequence[Text], nats: np.ndarray) -> list[np.ndarray]:
    """Split the scores of joined texts into one array per text, without the closing BOS."""
    ends = np.cumsum([len(text.tokens) for text in texts])
    return [nats[end - len(text.tokens) : end - 1] for end, text in zip(ends, texts, strict=True)]


def normalised(audit: Audit) -> Seen:
    """The probabilities over the whole vocabulary sum to one, and the score booked is that of the target."""
    looked = [call for heard in audit.closely for call in heard.calls if call.sums]
    fresh = {heard.calls[0].state for heard in audit.closely if heard.calls}
    adapted = sum(len(call.sums) for call in looked if call.state not in fresh)
    off = np.array([total for call in looked for total in call.sums]) - 1
    strays = np.array([stray for call in looked for stray in call.strays])
    faults = list(dict.fromkeys(audit.strange))
    most = max(abs(off), default=math.inf)
    if not most <= SUM_TOLERANCE:
        faults.append(f"probabilities add up to one {most:+.2g}" if len(off) else "no score was traced")
    if not (abs(strays) <= TOLERANCE_NATS).all():
        faults.append(f"a target's nats are {abs(strays).max():.2g} off those that it has among the vocabulary's")
    widest = Widest()
    for n, unit, ear, plain in zip(audit.chosen, audit.units, audit.closely, audit.alone, strict=True):
        widest.compare(f"document {n}, heard closely or not", ear.nats, plain.nats, unit.bytes[1:])
    how = f"max {most:.1e} off one at {len(off)} positions, {adapted} of them after adaptation"
    return faults + widest.faults, f"{how}; every score booked is the output layer's, +-{widest.nats:.1e} nats"


def single_pass(audit: Audit) -> Seen:
    """Every target of every document is booked exactly once, in order, with the score of the output layer."""
    docs = audit.opened.setup.validation
    audit.score(joined(audit.texts), closely=True)
    faults = list(dict.fromkeys(audit.misplaced + audit.strange))
    sizes = np.array([len(text.tokens) for text in audit.texts])
    sizes[-1] -= 1  # no BOS closes the last document
    counts = {"together": audit.together.counts}
    if not audit.stream:
        counts["by eight ranks"] = sum(heard.counts for heard in audit.by_rank)
    for how, booked in counts.items():
        wrong = np.flatnonzero(booked != sizes)
        faults += [f"document {audit.chosen[i]} {how}: {booked[i]} bookings of {sizes[i]} targets" for i in wrong]
    shards = sum(len(train_gpt.read_shard(path)) for path in train_gpt.find_shards(audit.run.data_path, "val"))
    if int(docs.lengths.sum()) != shards - 1:
        faults.append(f"the scorer sees {docs.lengths.sum()} targets, the shards hold {shards - 1}")
    return faults, (
        f"{len(audit.together.nats)} targets of {len(audit.texts)} documents once each, in order; "
        f"{shards - 1} targets of {len(audit.starts) - 1} documents in the shards"
    )


def reported(audit: Audit) -> Seen:
    """The files of the artifact's own run agree with each other, and the sampled documents score the same again."""
    setup = audit.opened.setup
    path = Path(audit.run.artifact).with_suffix(".json")
    if not path.with_suffix(".docs.npz").exists():
        return None, f"no {path.with_suffix('.docs.npz').name} beside the artifact"
    try:
        run = load_run(path)
    except train_gpt.UserError as error:
        return [str(error)], ""
    knobs = {name: value for name, value in train_gpt.settings(audit.run).items() if name.startswith(SCORING)}
    here = train_gpt.device_name(audit.dist.device)
    same_device = here == run.result["device"] or here.startswith("CPU") and run.result["device"].startswith("CPU")
    reasons = {
        "it was scored by another train_gpt.py": run.result["code_sha256"] != file_sha256(train_gpt.__file__),
        "it is of other validation documents": run.validation != setup.validation.sha256(),
        "it was scored with other knobs": any(run.result["knobs"].get(name) != value for name, value in knobs.items()),
        f"it was scored on {run.result['device']}": not same_device,
        f"it was scored by {run.result['versions']}": run.result["versions"] != train_gpt.versions(),
        "it was short of time": run.result["degraded_documents"] > 0,
        "its scores depend on their order": audit.stream,
    }
    for reason in (reason for reason, true in reasons.items() if true):
        return None, f"{path.name} agrees with its files, but {reason}, so that its scores are not compared"
    widest = Widest()
    whole = len(audit.chosen) - (audit.chosen[-1] < len(audit.starts) - 2)  # the last of the sample has no closing BOS
    for i, text, nats in zip(audit.chosen[:whole], audit.texts, audit.together.sums, strict=False):
        if not audit.is_whole(i):
            continue
        size = int(text.bytes.sum())
        widest.compare_sums(f"document {i}, as reported", nats - run.nats[i], size)
    if not widest.seen:
        reason = "none of the sampled documents fits into the time as a whole"
        return None, f"{path.name} agrees with its files, but {reason}"
    return (
        widest.faults,
        f"val_bpb {run.bpb:.5f} of {path.name}: max {widest.bpb:.1e} bpb off in {widest.seen} documents",
    )


PROPERTIES = {
    "causality": causality,
    "score before update": score_before_update,
    "independence": independence,
    "normalised": normalised,
    "single pass": single_pass,
    "artifact alone": artifact_alone,
    "bytes": bytes_counted,
    "reported": reported,
}


# -----------------------------------------------------------------------------
# The command


class Finding(NamedTuple):
    """The verdict on one property."""

    name: str
    ok: bool | None  # None where it does not apply
    figures: str

    def __str__(self) -> str:
        return printable(f"{ {True: 'ok', False: 'FAIL', None: '-'}[self.ok]:5} {self.name:20} {self.figures}")


def prove(opened: Opened, seed: int, seconds: float, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Check every property in turn; progress messages go to `tell`."""
    try:
        audit = Audit(opened, seed, seconds, tell)
    except ScorerError as error:
        yield from (Finding(name, False, str(error)) for name in PROPERTIES)
        return
    for name, look in PROPERTIES.items():
        try:
            faults, figures = look(audit)
        except ScorerError as error:
            faults = [str(error)]
            figures = ""
        more = f" (and {len(faults) - 1} more)" if faults and len(faults) > 1 else ""
        yield Finding(name, None if faults is None else not faults, f"{faults[0]}{more}" if faults else figures)


def file_sha256(path: Path | str) -> str:
    return hashlib.sha256(train_gpt.read_file(path)).hexdigest()


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh prove", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifact", nargs="?", help="logs/RUN.ptz; default: ARTIFACT, else the newest in logs/")
    parser.add_argument("--seed", type=prepare.whole_number, default=1, help="chooses documents and cuts [%(default)s]")
    parser.add_argument(
        "--seconds", type=prepare.whole_number, default=120, help="about how long to look [%(default)s]"
    )
    return parser


def run_prove(arguments: argparse.Namespace) -> int:
    artifact = find_artifact(arguments.artifact)
    opened = open_artifact(artifact, {"EVAL_SECONDS": "0"})
    run = opened.setup.run
    dist = opened.setup.dist
    train_gpt.prepare_torch(run, dist.device)
    how = f"TTT_PARAMS={run.ttt_params} TTT_SCOPE={run.ttt_scope}" if run.ttt_enabled else "TTT_ENABLED=0"
    print(printable(f"{artifact}: {how}, {train_gpt.device_name(dist.device)}"), flush=True)
    findings = []
    tell = functools.partial(print, file=sys.stderr, flush=True)
    for finding in prove(opened, arguments.seed, arguments.seconds, tell):
        print(finding, flush=True)
        findings.append(finding)
    ok = all(finding.ok is not False for finding in findings)
    facts = {
        "artifact_sha256": file_sha256(artifact),
        "code_sha256": file_sha256(train_gpt.__file__),
        "ok": ok,
        "seed": arguments.seed,
        "system": how,
        "device": train_gpt.device_name(dist.device),
        "properties": [finding._asdict() for finding in findings],
    }
    train_gpt.write_atomically(
        artifact.with_suffix(".prove.json"), [json.dumps(facts, indent=1, allow_nan=False).encode()]
    )
    return 0 if ok else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 if a property fails; 2 for an error that the user can fix; 130 if interrupted."""
    return end_in_a_line(lambda: run_prove(command_line().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
