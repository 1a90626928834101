"""
What each rule of test-time training gains: one artifact, scored in several ways on the same documents by one process.

./run.sh rules ARTIFACT [SETTING ...]    the gain of every setting over the static score
./run.sh rules ARTIFACT --published      the artifact's default and every published system
./run.sh rules --list                    the published systems, their sources and their knobs

SETTING is a list of knobs, separated by spaces (in quotes) or commas: "TTT_OPTIMIZER=adamw TTT_LR=1e-4"; "" or default
is the artifact's own setting. The name of a published system stands for its knobs; knobs after it override them. Other
knobs come from the environment, else from the artifact's own run, else from their defaults; for a published system,
their TTT_ knobs are ignored. DATA_PATH must name the text that the artifact was trained on: its held-out documents are
scored; with --on validation, a validation set.

The yardstick is the score without adaptation at EVAL_SEQ_LEN=2048 (--context). A setting's gain over it has two parts:
the gain from its EVAL_SEQ_LEN and EVAL_STRIDE without adaptation ("context"), and the further gain from adaptation
("rule"). All are in bits per byte; positive is better. ± is half the 95 % interval of the paired difference over
documents, omitted for fewer than 10 documents. A column such as "up to 256 (37)" is the gain on documents of that many
targets (up to 256), and their number (37). Tokens per second exclude the warm-up.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_gpt as g
from data.prepare import whole_number
from tools import ask_source
from tools.artifact import end_in_a_line, knobs_of_run
from tools.grid import require_distinct
from tools.holdout import score_holdout
from tools.progress import Progress
from tools.results import FEWEST, bits_per_byte, ratio_and_error
from tools.values import printable

CONTEXT = 2048  # of the yardstick
CLASSES = (256, 512, 1024, 2048)  # most targets of a document, for each class but the last
SEED = 0  # for sampling documents
GROUPS = ("Evaluation", "Test-time training")  # groups of knobs that a setting may have,
ALSO = ("MICRO_BATCH_TOKENS", "SEED")  # and other knobs that change how an artifact is scored


# ---- Published systems ----


class System(NamedTuple):
    source: str
    knobs: str


# All knobs of a rule are explicit, so that a new default of the program does not change a published system. Where a
# source is silent: SGD's momentum is 0.9, AdamW has the betas of #1855, there is no weight decay, LoRA is not scaled
# (alpha is the rank), and the context is 2,048 tokens.
FULL = (
    "TTT_PARAMS=full TTT_OPTIMIZER=sgd TTT_MOMENTUM=0.9 TTT_CHUNK_TOKENS=32768 TTT_COSINE=1 TTT_GRAD_CLIP=1 "
    "TTT_FREEZE_BLOCKS=2 TTT_LR_MULT_MLP_OUT=3 TTT_LR_MULT_IN=0.5 TTT_WEIGHT_DECAY=0 EVAL_SEQ_LEN=2048"
)
THREE_EPOCHS = "TTT_LR=0.005 TTT_EPOCHS=3"
LORA_8 = (
    "TTT_LORA_RANK=8 TTT_LORA_ALPHA=8 TTT_LORA_TARGETS=q,v TTT_CHUNK_TOKENS=256 TTT_EPOCHS=3 TTT_LR=0.01 "
    "TTT_WEIGHT_DECAY=0 EVAL_SEQ_LEN=2048"
)
LORA_8_SGD = f"TTT_OPTIMIZER=sgd TTT_MOMENTUM=0.9 {LORA_8}"
LORA_80 = (
    "TTT_OPTIMIZER=adamw TTT_BETA1=0 TTT_BETA2=0.99 TTT_LORA_RANK=80 TTT_LORA_ALPHA=144 TTT_CHUNK_TOKENS=48 "
    "TTT_LATE_CHUNK_TOKENS=48 TTT_EPOCHS=1"
)
RECORD = f"{LORA_80} TTT_LORA_TARGETS=q,k,v,o,mlp,head TTT_LR=1e-4 TTT_WEIGHT_DECAY=0.5 EVAL_SEQ_LEN=2048"

PUBLISHED = {
    "full-stream": System(
        "the whole model along the stream: SGD, 3 epochs on chunks of 32,768 tokens (#549, #1413)",
        f"{FULL} TTT_SCOPE=stream {THREE_EPOCHS}",
    ),
    "full-document": System(
        "the same, afresh for every document; one shorter than a chunk does not adapt",
        f"{FULL} TTT_SCOPE=document {THREE_EPOCHS}",
    ),
    "full-30-epochs": System(
        "the same along the stream with 30 epochs, the far end of the published sweep of epochs, at 0.002",
        f"{FULL} TTT_SCOPE=stream TTT_LR=0.002 TTT_EPOCHS=30",
    ),
    "lora-8-sgd": System("LoRA for each document, of rank 8 on q and v as first published, by SGD", LORA_8_SGD),
    "lora-8-adamw": System("the same by AdamW", f"TTT_OPTIMIZER=adamw TTT_BETA1=0 TTT_BETA2=0.99 {LORA_8}"),
    "lora-80": System(
        "LoRA of rank 80 on q, k, v, o, mlp and head, by AdamW (#1855), without what survives a document there: the "
        "start of A, and epochs of SGD on all documents so far",
        RECORD,
    ),
    "lora-80-context": System(
        "the same without k, at another rate and decay and with a context of 2,560 tokens (#2135), without what "
        "survives a document there",
        f"{LORA_80} TTT_LORA_TARGETS=q,v,o,mlp,head TTT_LR=8e-5 TTT_WEIGHT_DECAY=2 EVAL_SEQ_LEN=2560",
    ),
    "newton-schulz": System(
        "lora-8-sgd, whose updates 5 Newton-Schulz steps make orthogonal; the number of steps is ours",
        f"{LORA_8_SGD} TTT_NS_STEPS=5",
    ),
    "entropy-window": System(
        "lora-80, whose rate falls where a chunk's mean entropy is outside 2 to 4 nats; the window is ours",
        f"{RECORD} TTT_ENTROPY_LOW=2 TTT_ENTROPY_HIGH=4",
    ),
    "minimum": System(
        "lora-80, which begins once 512 tokens of a document are scored; the number is ours",
        f"{RECORD} TTT_MIN_DOC_TOKENS=512",
    ),
}


# ---- Settings ----


class Setting(NamedTuple):
    """One way to score the artifact."""

    label: str
    knobs: dict[str, str]
    published: str = ""  # the system that it is or builds on; then the environment's TTT_ knobs are ignored


DEFAULT = Setting("default", {})


def parse_setting(text: str) -> Setting:
    """Parse knobs, or a published system's name with optional knobs, into a setting. Raises ConfigError for anything
    else, and for knobs that do not change how an artifact is scored."""
    words = [word for word in re.split(r"\s+|,(?=[A-Z0-9_]+=)", text) if word]
    if words in ([], ["default"]):
        return DEFAULT
    published = words.pop(0) if words[0] in PUBLISHED else ""
    knobs = split_knobs(PUBLISHED[published].knobs.split()) if published else {}
    return Setting(" ".join([published, *words]).strip(), knobs | split_knobs(words), published)


def split_knobs(words: Sequence[str]) -> dict[str, str]:
    groups = ask_source.knob_groups(g)
    names = []
    values = []
    for word in words:
        name, equals, value = word.partition("=")
        g.require(equals != "", f"{word!r}: expected NAME=value, default, or a name that --list shows")
        g.refuse_unknown([name], groups)
        g.require(name in groups, f"{name} is not a knob (./run.sh help lists all)")
        g.require(groups[name] in GROUPS or name in ALSO, f"{name} does not tell rules apart: set it for all, outside")
        names.append(name)
        values.append(value)
    require_distinct(names)
    return dict(zip(names, values, strict=True))


def choose_settings(texts: Sequence[str], published: bool) -> list[Setting]:
    """The settings to compare, in order. Raises ConfigError for duplicates."""
    settings = [parse_setting(text) for text in texts]
    if published:
        named = [parse_setting(name) for name in PUBLISHED]
        settings = [DEFAULT, *named, *(s for s in settings if s not in (DEFAULT, *named))]
    require_distinct([setting.label for setting in settings])
    return settings or [DEFAULT]


def environment(artifact: str, knobs: Mapping[str, str], with_ttt: bool = True) -> dict[str, str]:
    """The environment to score in: `knobs` override this environment, which overrides the artifact's own run. There is
    no time limit: documents short of time would not adapt. Without `with_ttt`, TTT_ knobs come from `knobs` only."""
    others = knobs_of_run(Path(artifact), os.environ | knobs) | os.environ
    env = {name: value for name, value in others.items() if with_ttt or not name.startswith("TTT_")}
    env |= knobs
    env |= {"ARTIFACT": artifact, "RESUME": "", "EVAL_SECONDS": "0"}
    if "MICRO_BATCH_TOKENS" not in env:
        env["MICRO_BATCH_TOKENS"] = str(smallest_row(env))
    return env


def smallest_row(env: Mapping[str, str]) -> int:
    """MICRO_BATCH_TOKENS if it is not set: the default, or the context length if that is larger."""
    field, kind = g.KNOBS["EVAL_SEQ_LEN"]
    context = field.metadata["default"]
    if "EVAL_SEQ_LEN" in env:
        context = g.parse_knob("EVAL_SEQ_LEN", env["EVAL_SEQ_LEN"], kind, field.metadata)
    return max(g.KNOBS["MICRO_BATCH_TOKENS"][0].metadata["default"], context)


# ---- Documents ----


def choose_documents(docs: g.Documents, lengths: str, count: int | None) -> np.ndarray:
    """Indices of the documents to score, ascending: all with LOW to HIGH targets, or a fixed random sample of `count`
    of them. Raises UserError if there are none."""
    low, high = 0, int(docs.lengths.max())
    if lengths:
        parts = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", lengths)
        g.require(parts is not None, f"--lengths {lengths!r}: expected LOW-HIGH, numbers of targets, such as 200-4000")
        low, high = map(int, parts.groups())
    chosen = np.flatnonzero((docs.lengths >= low) & (docs.lengths <= high))
    g.require(len(chosen) > 0, f"--lengths {lengths}: none of {len(docs)} documents has so many targets", g.UserError)
    return np.sort(np.random.default_rng(SEED).permutation(chosen)[:count])


def pick(docs: g.Documents, chosen: np.ndarray) -> g.Documents:
    """Only these documents, each with all of its targets: if a BOS follows the last one, it is kept as a target,
    although no document begins with it."""
    begins = docs.starts[chosen]
    ends = docs.starts[chosen + 1]
    positions = np.concatenate([np.arange(*span) for span in zip(begins, ends, strict=True)])
    starts = np.concatenate([[0], np.cumsum(ends - begins)])
    closing = np.arange(ends[-1], min(ends[-1] + 1, len(docs.tokens)))
    positions = np.concatenate([positions, closing])
    return g.Documents(docs.tokens[positions], docs.bytes[positions], starts, docs.by_formula)


def length_classes(lengths: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Label and mask (documents,) of every class that is not empty."""
    least = 0
    for most in (*CLASSES, math.inf):
        mask = (lengths >= least) & (lengths <= most)
        label = f"up to {most:,}" if most < math.inf else f"over {CLASSES[-1]:,}"
        if mask.any():
            yield f"{label} ({mask.sum()})", mask
        least = most + 1


# ---- Scoring ----


class WatchedTable(g.ScoreTable):
    """A score table that prints progress when scoring takes long."""

    def __init__(self, docs: g.Documents, label: str):
        super().__init__(docs)
        self.progress = Progress(label, int(docs.lengths.sum()), "targets")

    def add(self, documents: np.ndarray, nats: np.ndarray) -> None:
        super().add(documents, nats)
        self.progress(int(self.targets.sum()))


class Scored(NamedTuple):
    nats: np.ndarray  # (documents,)
    warm_up: float  # seconds
    seconds: float
    peak: float  # GiB on the GPU, including weights; NaN without a GPU


class Comparison:
    """An artifact and the documents on which settings are compared."""

    def __init__(self, setup: g.Setup, docs: g.Documents, context: int):
        self.setup = setup
        self.docs = docs
        self.artifact = setup.run.artifact
        self.header, _ = g.read_header(g.read_file(self.artifact), self.artifact)
        self.model = g.load_artifact(Path(self.artifact), setup)
        self.weights = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        self.static_scores: dict[tuple[int, int], Scored] = {}  # by EVAL_SEQ_LEN and EVAL_STRIDE
        try:
            self.plain = self.plain_run({"EVAL_SEQ_LEN": str(context)})
        except g.ConfigError as error:
            raise g.ConfigError(f"--context {context}: {error}") from None

    @functools.cached_property
    def yardstick(self) -> Scored:
        """What gains are measured from: the score without adaptation at the context of the command line."""
        return self.static(self.plain)

    def run_of(self, knobs: Mapping[str, str], with_ttt: bool = True) -> g.RunConfig:
        """The run's config. Raises UserError for knobs that are invalid, for any run or for this artifact."""
        _, run = g.read_env(environment(self.artifact, knobs, with_ttt))
        return g.decide_optimizer(run, self.header, self.artifact)

    def plain_run(self, knobs: Mapping[str, str]) -> g.RunConfig:
        """The config of a run without adaptation."""
        return self.run_of({**knobs, "TTT_ENABLED": "0"}, with_ttt=False)

    def static(self, run: g.RunConfig) -> Scored:
        """The score of a run without adaptation, cached."""
        key = (run.eval_seq_len, run.eval_stride)
        if key not in self.static_scores:
            scored = self.score(run, f"static, EVAL_SEQ_LEN={run.eval_seq_len}")
            table = g.ScoreTable(self.docs)
            table.nats = scored.nats
            table.require_finite(f"the network of {self.artifact} gives none; nothing can be compared")
            self.static_scores[key] = scored
        return self.static_scores[key]

    def context_of(self, run: g.RunConfig) -> Scored:
        """The score without adaptation at the context and stride of a run."""
        names = ("eval_seq_len", "eval_stride", "micro_batch_tokens")
        return self.static(self.plain_run({name.upper(): str(getattr(run, name)) for name in names}))

    def score(self, run: g.RunConfig, label: str) -> Scored:
        """Score all documents; the model is restored even after an error."""
        dist = self.setup.dist
        on_gpu = dist.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        log = g.Log()
        watch = g.Stopwatch(dist)
        try:
            evaluation = g.Evaluation(self.model, self.docs, run, dist, log, lambda: watch.total("warm-up", "score"))
            with watch.phase("warm-up"):
                evaluation.warm_up()
            with watch.phase("score"):
                evaluation.table = WatchedTable(self.docs, label)
                nats = evaluation.score().nats
            assert evaluation.degraded == 0, "without a limit of time every document adapts"
        finally:
            self.put_weights_back()
        for warning in sorted(log.warnings):
            print(printable(f"{label}: {warning}"), file=sys.stderr, flush=True)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan
        return Scored(nats, watch.total("warm-up"), watch.total("score"), peak)

    @torch.no_grad()
    def put_weights_back(self) -> None:
        """TTT_PARAMS=full changes the weights in place, and does not restore them after an error."""
        for name, p in self.model.named_parameters():
            p.copy_(self.weights[name])


# ---- The table ----


class Table:
    """A Markdown table, printed row by row."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        self.sizes = comparison.docs.target_bytes()
        self.classes = list(length_classes(comparison.docs.lengths))
        labels = [label for label, _ in self.classes]
        head = ["setting", "bpb", "gain", "context", "rule", *labels]
        head += ["warm-up, s", "score, s", "tokens/s", "peak, GiB", "doc_independent"]
        self.width = len(head)
        self.print_row(*head)
        print("|---" * len(head) + "|", flush=True)

    def print_row(self, *cells: str) -> None:
        print("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |", flush=True)

    def gain(self, before: np.ndarray, after: np.ndarray, mask: np.ndarray | None = None) -> str:
        """Bits per byte that `after` saves over `before`, both (documents,) nats, on all documents or a mask."""
        chosen = slice(None) if mask is None else mask
        size = self.sizes[chosen]
        if not size.sum():
            return "-"  # no text
        ratio, error = ratio_and_error((before - after)[chosen] / math.log(2), size)
        return f"{ratio:+.5f}" if len(size) < FEWEST else f"{ratio:+.5f} ± {1.96 * error:.5f}"

    def scored(self, label: str, run: g.RunConfig, scored: Scored, context: Scored) -> None:
        start = self.comparison.yardstick.nats
        independent = not run.ttt_enabled or run.ttt_scope == "document"
        self.print_row(
            label,
            f"{bits_per_byte(scored.nats, self.sizes):.5f}",
            self.gain(start, scored.nats),
            self.gain(start, context.nats),
            self.gain(context.nats, scored.nats),
            *(self.gain(start, scored.nats, mask) for _, mask in self.classes),
            f"{scored.warm_up:.1f}",
            f"{scored.seconds:.1f}",
            f"{self.comparison.docs.lengths.sum() / scored.seconds:,.0f}",
            "-" if math.isnan(scored.peak) else f"{scored.peak:.1f}",
            str(int(independent)),
        )

    def failed(self, label: str, reason: str) -> None:
        self.print_row(label, reason, *[""] * (self.width - 2))


def compare(comparison: Comparison, settings: Sequence[Setting], out: Path | None, numbers: np.ndarray) -> bool:
    """Score every setting and print its row -> whether none was refused. A setting that diverges gets a row too."""
    table = Table(comparison)
    yardstick = comparison.yardstick
    static_run = comparison.setup.run
    found = {"static": yardstick.nats}
    table.scored("static", static_run, yardstick, yardstick)
    save(out, comparison, found, numbers)
    fine = True
    for number, setting in enumerate(settings, 1):
        try:
            run = comparison.run_of(setting.knobs, with_ttt=not setting.published)
            context = comparison.context_of(run)
            scored = comparison.score(run, f"{setting.label} ({number} of {len(settings)})")
        except g.UserError as error:
            table.failed(setting.label, f"refused: {error}")
            fine = False
            continue
        except torch.OutOfMemoryError:
            table.failed(setting.label, f"refused: {g.LESS_MEMORY}")
            fine = False
            continue
        wrong = int((~np.isfinite(scored.nats)).sum())
        if wrong:
            table.failed(setting.label, f"diverged: {wrong} of {len(scored.nats)} documents have no finite score")
            continue
        table.scored(setting.label, run, scored, context)
        found[setting.label] = scored.nats
        save(out, comparison, found, numbers)
    return fine


def save(path: Path | None, comparison: Comparison, found: Mapping[str, np.ndarray], numbers: np.ndarray) -> None:
    """Write the results so far: `settings` (k,) and their `nats` (k, documents), static first, and each document's
    `number` in the text, `tokens` (targets) and `bytes`."""
    if path is None:
        return
    content = io.BytesIO()
    np.savez_compressed(
        content,
        settings=np.array(list(found)),
        nats=np.stack(list(found.values())),
        number=numbers,
        tokens=comparison.docs.lengths,
        bytes=comparison.docs.target_bytes(),
    )
    g.write_atomically(path, [content.getvalue()], parents=True)


# ---- The command ----


def open_text(artifact: str, on: str, folder: Path) -> g.Setup:
    """A set-up that scores the artifact without adaptation; its validation set is the documents to compare on."""
    header, _ = g.read_header(g.read_file(artifact), artifact)
    config = g.stored_config(header["meta"], artifact)
    _, run = g.read_env(environment(artifact, {"TTT_ENABLED": "0"}, with_ttt=False))
    if on == "holdout":
        run = score_holdout(run, config.vocab_size, folder / "data")
    dist = g.Dist.from_env(run.device)
    g.require(dist.world == 1, f"WORLD_SIZE={dist.world}: this compares in one process; start it without torchrun")
    g.prepare_torch(run, dist.device)
    return g.make_setup(config, run, dist)


def describe_published(names: Sequence[str]) -> list[str]:
    return [f"- {name}: {PUBLISHED[name].source}: {PUBLISHED[name].knobs}" for name in names]


def describe_text(docs: g.Documents, on: str, asked: int | None) -> str:
    text = "held-out training documents" if on == "holdout" else "validation documents (not for choosing)"
    few = f" ({asked:,} were asked for)" if asked and asked > len(docs) else ""
    return f"{len(docs):,} {text}{few}, {docs.lengths.sum():,} targets, {docs.target_bytes().sum():,} bytes"


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh rules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", nargs="?", metavar="ARTIFACT")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="[default]")
    parser.add_argument("--published", action="store_true", help="every published system, beside the default")
    parser.add_argument("--list", action="store_true", help="describe the published systems, and stop")
    parser.add_argument("--on", choices=["holdout", "validation"], default="holdout", help="the text [holdout]")
    parser.add_argument("--documents", type=whole_number, metavar="N", help="a sample, the same each time [all]")
    parser.add_argument("--lengths", default="", metavar="LOW-HIGH", help="only documents with so many targets [all]")
    parser.add_argument("--context", type=whole_number, default=CONTEXT, help="of the yardstick [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="nats of every document under every setting")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_intermixed_args(arguments)
    if options.list:
        print("\n".join(describe_published(list(PUBLISHED))))
        return 0
    g.require(options.artifact is not None, "name an artifact, logs/RUN.ptz")
    settings = choose_settings(options.settings, options.published)
    g.refuse_unknown(os.environ, g.KNOBS)

    with tempfile.TemporaryDirectory() as folder:
        setup = open_text(options.artifact, options.on, Path(folder))
        numbers = choose_documents(setup.validation, options.lengths, options.documents)
        docs = pick(setup.validation, numbers)
        comparison = Comparison(setup, docs, options.context)
        print(describe_text(docs, options.on, options.documents))
        print(f"yardstick: static, EVAL_SEQ_LEN={options.context}")
        named = dict.fromkeys(setting.published for setting in settings if setting.published)
        lines = describe_published(list(named))
        print("\n".join([*lines, ""]), flush=True)
        fine = compare(comparison, settings, options.out, numbers)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
