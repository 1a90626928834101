"""
What a record claims, and the reasons to reject it.

README.md, submission.json and requirements.txt of a record are pure functions of its runs and of the few facts that no
run knows (`Facts`). `python -m tools.record` writes them; `python -m tools.check` regenerates and compares them, so no
number in them is ever copied by hand.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tools.results import Run
from tools.values import number, whole
from tools.welch import Sample, lower_by
from train_gpt import DataError, UserError, require

CONTEST, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
MOST_BYTES = 16_000_000  # code and weights; the contest's limit, whatever ARTIFACT_BYTES is
CONTEST_SECONDS = 600.0  # for training, and as many for evaluation
CONTEST_GPUS, CONTEST_GPU = 8, "H100"
REQUIRED_NATS, REQUIRED_P = 0.005, 0.01  # a record must beat the last by this many nats per token, at this p
# The contest's validation set. Published totals (151,074,498 bytes of 47,851,520 CaseOps tokens, 151,078,222 bytes of
# 40,540,160 SP8192 tokens) omit the tail of up to 2,047 tokens, which is scored here. All CaseOps tokens: published.
TAIL_TOKENS, TAIL_TOKEN_BYTES = 2_047, 8
SAME_TEXT = 1e-3  # tolerance, relative, between the bytes that two tokenizers count in one text
CONTEST_DOCUMENTS = 50_000
CONTEST_BYTES = range(151_074_498, 151_078_222 + TAIL_TOKENS * TAIL_TOKEN_BYTES + 1)
CONTEST_TOKENS = {
    "CaseOps": range(47_853_343, 47_853_344),
    "SP8192": range(40_540_160, 40_540_160 + TAIL_TOKENS + 1),
}
DEPENDENT, OWN_TOKENIZER = "dependent_documents", "own_tokenizer"
ALLOWANCES = {  # what a record may do if it declares it -> the declaration
    DEPENDENT: "the score of a document may depend on other documents or on the time that was left",
    OWN_TOKENIZER: "the validation text is the contest's, its tokens are not",
}
NOT_SETTINGS = {"SEED", "RUN_ID"}  # these differ between the runs of a record
PLOTS = ("loss.png", "phases.png", "lengths.png", "bytes.png")  # as tools.plot.draw_all names them


@dataclass(frozen=True)
class Baseline:
    """The scores to beat."""

    source: str  # the folder of a record, or "given"
    val_bpb: float
    val_bpb_std: float
    seeds: int
    bytes_per_token: float | None = None  # None if not given: then this record's own
    documents: int | None = None  # in its validation set; None if not given
    bytes: int | None = None

    def __post_init__(self):
        """Raises UserError if these cannot be scores."""
        fit = number(self.val_bpb) and number(self.val_bpb_std) and whole(self.seeds) and self.seeds > 0
        fit = fit and all(x is None or (whole(x) and x > 0) for x in (self.documents, self.bytes))
        width = self.bytes_per_token
        require(
            fit and isinstance(self.source, str) and (width is None or (number(width) and width > 0)),
            f"{self}: a baseline is a mean and a deviation in bpb, a number of seeds, perhaps bytes a token",
            UserError,
        )


@dataclass(frozen=True)
class Facts:
    """What a record states beyond its runs."""

    author: str
    github_id: str
    name: str
    date: str  # YYYY-MM-DD
    what: str  # what changed: Markdown without headings of levels 1 and 2
    track: str
    train_seconds: float = CONTEST_SECONDS  # limits
    eval_seconds: float = CONTEST_SECONDS
    allowed: tuple[str, ...] = ()  # of ALLOWANCES, sorted
    baseline: Baseline | None = None

    def __post_init__(self):
        """Raises UserError if a fact is invalid."""
        for name in ("author", "github_id", "name", "date", "what", "track"):
            value = getattr(self, name)
            require(isinstance(value, str) and value.strip() != "", f"{name} is {value!r}: say it", UserError)
            require(re.search("[\ud800-\udfff]", value) is None, f"{name} is {value!r}: not UTF-8", UserError)
        require(number(self.train_seconds) and number(self.eval_seconds), "the limits are not in seconds", UserError)
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            f"{self.name!r}: a record's name is of letters, digits and ._- and begins with one of the former",
            UserError,
        )
        require(re.fullmatch(r"\d{4}-\d\d-\d\d", self.date) is not None, f"{self.date!r} is not a date", UserError)
        require(self.track in (CONTEST, NON_RECORD), f"{self.track!r} is no track", UserError)
        require(set(self.allowed) <= set(ALLOWANCES), f"{self.allowed}: not what can be allowed", UserError)
        require(
            re.search(r"^##? ", self.what, re.MULTILINE) is None,
            "what changed: headings of the first two levels (#, ##) are the record's own; use ###",
            UserError,
        )

    @property
    def folder(self) -> str:
        """The path of the record under records/."""
        return f"{self.track}/{self.date}_{self.name}"

    @property
    def blurb(self) -> str:
        """The first paragraph of what changed, in one line."""
        return " ".join(re.split(r"\n\s*\n", self.what.strip())[0].split())


# -----------------------------------------------------------------------------
# Reasons to reject a record


def objections(runs: Sequence[Run], facts: Facts) -> list[str]:
    """Every reason to refuse these runs, one per seed, as a record; empty if there is none."""
    return [
        *(f"seed {run.result['seed']}: {reason}" for run in runs for reason in against_run(run, facts)),
        *against_set(runs),
        *against_validation(runs[0], facts),
        *against_track(runs[0].result["world_size"], runs[0].result["device"], facts),
        *against_baseline(runs[0].result["documents"], runs[0].result["bytes"], facts.baseline),
    ]


def against_run(run: Run, facts: Facts) -> Iterator[str]:
    """Reasons to refuse one run, independent of the others."""
    result = run.result
    knobs = result["knobs"]
    if not run.trained or knobs.get("ARTIFACT") or knobs.get("RESUME"):
        yield "it did not train from the start to the end (ARTIFACT and RESUME must be unset)"
        return
    for name in ("val_bpb", "val_loss", "static_bpb", "prequant_bpb"):
        if not number(result[name]):
            yield f"{name} is {result[name]}, which is no score"
    if result["total_bytes"] > MOST_BYTES:
        yield f"code and weights take {result['total_bytes']:,} bytes, at most {MOST_BYTES:,} are allowed"
    if result.get("excess_bytes"):
        yield (
            f"excess_bytes is {result['excess_bytes']:,}: its tokenizer has spaces inside pieces, which count as more "
            "bytes than the text has; prepare the data with side-cars, or with another tokenizer"
        )
    for clock, limit in (("train_seconds", facts.train_seconds), ("eval_seconds", facts.eval_seconds)):
        if result[clock] > limit:
            yield f"{clock} is {result[clock]:.1f}, the limit {limit:g}"
    if DEPENDENT not in facts.allowed and (result["doc_independent"] != 1 or result["degraded_documents"]):
        yield (
            f"doc_independent:{result['doc_independent']}, degraded_documents:{result['degraded_documents']}: its "
            "scores depend on other documents or on the clock; --allow-dependent accepts and says it"
        )


def against_set(runs: Sequence[Run]) -> Iterator[str]:
    """Differences between seeds that are not allowed."""
    seeds = [run.result["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        yield f"a seed comes twice: {seeds}"
    first = runs[0]
    equal = ("code_sha256", "validation", "documents", "tokens", "bytes", "world_size", "device", "versions")
    for run in runs[1:]:
        pair = f"seeds {first.result['seed']} and {run.result['seed']}"
        for name in equal:
            if run.result[name] != first.result[name]:
                yield f"{pair} differ in {name}: {first.result[name]} and {run.result[name]}"
        for name in sorted(common_knobs(first).items() ^ common_knobs(run).items()):
            yield f"{pair} differ in the knob {name[0]}={name[1]}"


def common_knobs(run: Run) -> dict[str, str]:
    """The knobs that all runs of a record share."""
    return {name: value for name, value in run.result["knobs"].items() if name not in NOT_SETTINGS}


def against_validation(run: Run, facts: Facts) -> Iterator[str]:
    """Totals that are not the contest's. Other tracks may score any validation set."""
    return against_totals(*(run.result[name] for name in ("documents", "tokens", "bytes")), facts)


def against_totals(documents: int, tokens: int, size: int, facts: Facts) -> Iterator[str]:
    """Totals that differ from the contest's validation set, if the track requires it."""
    if facts.track != CONTEST:
        return
    if documents != CONTEST_DOCUMENTS:
        yield f"{documents:,} validation documents, the contest's are {CONTEST_DOCUMENTS:,}"
    if size not in CONTEST_BYTES:
        yield f"{size:,} validation bytes, the contest's are {CONTEST_BYTES[0]:,} to {CONTEST_BYTES[-1]:,}"
    known = ", ".join(f"{name} {span[0]:,}" for name, span in CONTEST_TOKENS.items())
    if OWN_TOKENIZER not in facts.allowed and not any(tokens in span for span in CONTEST_TOKENS.values()):
        yield (
            f"{tokens:,} validation tokens are those of neither published tokenizer ({known}); --own-tokenizer "
            "accepts that, and says so"
        )


def against_track(gpus: int, device: str, facts: Facts) -> Iterator[str]:
    """Hardware and limits that differ from the contest's, if the track requires them."""
    if facts.track != CONTEST:
        return
    if gpus != CONTEST_GPUS or CONTEST_GPU not in device:
        yield (
            f"it ran on {gpus} x {device}, {CONTEST} asks for {CONTEST_GPUS} x {CONTEST_GPU}; --non-record makes it "
            f"a record of {NON_RECORD}"
        )
    if max(facts.train_seconds, facts.eval_seconds) > CONTEST_SECONDS:
        yield f"{CONTEST} allows {CONTEST_SECONDS:g} s of training and as many of evaluation, and no others"


def against_baseline(documents: int, size: int, baseline: Baseline | None) -> Iterator[str]:
    """Objections if the texts differ: bits per byte compare only on the same text."""
    if baseline is None or baseline.documents is None or baseline.bytes is None:
        return
    if documents != baseline.documents or not math.isclose(size, baseline.bytes, rel_tol=SAME_TEXT):
        yield (
            f"{documents:,} documents of {size:,} bytes are scored here, {baseline.documents:,} of "
            f"{baseline.bytes:,} in the baseline {baseline.source}: these scores do not compare"
        )


# -----------------------------------------------------------------------------
# Statistics


class Verdict(NamedTuple):
    """How the scores compare with a baseline."""

    gain: float  # bpb by which our mean is lower
    gain_nats: float  # the same in nats per token, by `bytes_per_token`
    bytes_per_token: float
    required: float  # REQUIRED_NATS in bpb
    p_better: float | None  # Welch's one-sided p of "lower at all"; None without a spread
    p_required: float | None  # the p of "lower by more than `required`"

    @property
    def met(self) -> bool:
        return self.p_required is not None and self.p_required < REQUIRED_P


def judge(runs: Sequence[Run], baseline: Baseline) -> Verdict:
    """Compare our scores with the baseline's. In bpb, since nats per token depend on the tokenizer; the contest's
    threshold in nats per token is converted by the bytes per token: bpb = nats / ln 2 / bytes."""
    ours = scores(runs)
    theirs = Sample(baseline.val_bpb, baseline.val_bpb_std, baseline.seeds)
    gain = theirs.mean - ours.mean
    bytes_per_token = baseline.bytes_per_token or runs[0].result["bytes"] / runs[0].result["tokens"]
    required = REQUIRED_NATS / math.log(2) / bytes_per_token

    p_better = None
    p_required = None
    if min(ours.n, theirs.n) > 1 and (ours.std > 0 or theirs.std > 0):
        p_better = lower_by(0.0, ours, theirs).p
        p_required = lower_by(required, ours, theirs).p
    return Verdict(gain, gain * math.log(2) * bytes_per_token, bytes_per_token, required, p_better, p_required)


def scores(runs: Sequence[Run], name: str = "val_bpb") -> Sample:
    return Sample.of([run.result[name] for run in runs])


def verdict_in_words(runs: Sequence[Run], baseline: Baseline) -> str:
    """The verdict as a paragraph."""
    v = judge(runs, baseline)
    origin = "as given" if baseline.source == "given" else f"`{baseline.source}`"
    whose = "this record's, as the baseline's is not known" if baseline.bytes_per_token is None else "the baseline's"
    spread = f" ± {baseline.val_bpb_std:.5f}" if baseline.seeds > 1 else ""
    direction = "away"
    if v.gain:
        direction = "lower" if v.gain > 0 else "higher"
    text = (
        f"The baseline, {origin}: {baseline.val_bpb:.5f}{spread} bpb ({plural(baseline.seeds, 'seed')}). "
        f"The mean here is {abs(v.gain):.5f} bpb {direction}, "
        f"{abs(v.gain_nats):.5f} nats a token of {v.bytes_per_token:.4f} bytes ({whose}).\n"
    )
    if v.p_better is None or v.p_required is None:
        missing = "Welch's test needs two seeds on both sides, and a spread"
        return f"{text}No p: {missing}. The contest's bar is **not** shown to be met."
    verdict = "met" if v.met else "**not** met"
    return text + (
        f"Welch's one-sided t-test: better at all, p = {v.p_better:.2g}; better by {REQUIRED_NATS} nats a token "
        f"({v.required:.5f} bpb), p = {v.p_required:.2g}.\n"
        f"The contest's bar, {REQUIRED_NATS} nats a token at p < {REQUIRED_P}, is {verdict}."
    )


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# -----------------------------------------------------------------------------
# Settings: the defaults are read from the record's own train_gpt.py, which is parsed and never run


def changed_settings(run: Run) -> dict[str, str]:
    """The knobs that differ from the defaults of the source that ran."""
    knobs = common_knobs(run)
    defaults = dict(declared_defaults(run.source, default_argument(knobs)))
    if defaults.get("TTT_OPTIMIZER") == "auto":
        has_rms = knobs.get("GRAD_RMS_TOKENS") != "0" and knobs.get("TTT_SCOPE") == "document"
        defaults["TTT_OPTIMIZER"] = "rms" if has_rms else "adamw"
    return {name: value for name, value in knobs.items() if value != defaults.get(name)}


def default_argument(knobs: Mapping[str, str]) -> str:
    """The argument of `knob` that holds the default under these knobs, for knobs that have that argument."""
    if knobs.get("TTT_PARAMS") == "full":
        return "full"
    return "rms" if knobs.get("TTT_OPTIMIZER") == "rms" else ""


@functools.lru_cache(maxsize=4)
def declared_defaults(source: bytes, argument: str) -> dict[str, str]:
    """NAME -> default, as text, of every line `name: type = knob(default, ..., full=..., rms=...)` in a train_gpt.py.
    If a line has the keyword `argument`, that is the default. Raises DataError if one cannot be read."""
    try:
        return dict(defaults_in(parsed(source), argument))
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise DataError(f"train_gpt.py: a default is missing, or no plain number or text: {error}") from None


def defaults_in(tree: ast.Module, argument: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=ast.Name(name), annotation=kind, value=ast.Call(func=ast.Name("knob")) as call):
                given = {word.arg: word.value for word in call.keywords}
                value = constant(given.get(argument, call.args[0]))
                is_float = isinstance(kind, ast.Name) and kind.id == "float"
                yield name.upper(), str(float(value) if is_float else value)


def parsed(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"train_gpt.py is not Python: {error}") from None


def constant(node: ast.expr) -> Any:
    """The value of a literal, possibly with a sign or shifted, as in 1 << 20."""
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.BinOp(ast.Constant(int() as value), ast.LShift(), ast.Constant(int() as shift)) if 0 <= shift < 64:
            return value << shift
    raise DataError(f"train_gpt.py: the default {ast.unparse(node)[:60]} is no plain number or text")


# -----------------------------------------------------------------------------
# submission.json and requirements.txt


def submission(runs: Sequence[Run], facts: Facts) -> dict[str, Any]:
    """submission.json: the contest's fields, and what is needed to verify them."""
    first = runs[0].result
    bpb = scores(runs)
    loss = scores(runs, "val_loss")
    return {
        "author": facts.author,
        "github_id": facts.github_id,
        "name": facts.name,
        "blurb": facts.blurb,
        "date": facts.date,
        "track": facts.track,
        "val_loss": rounded(loss.mean),
        "val_bpb": rounded(bpb.mean),
        "val_loss_std": rounded(loss.std),
        "val_bpb_std": rounded(bpb.std),
        "seeds": [run.result["seed"] for run in runs],
        "seed_results": {str(run.result["seed"]): seed_result(run) for run in runs},
        "bytes_total": max(run.result["total_bytes"] for run in runs),
        "bytes_code": first["code_bytes"],
        "hardware": hardware(runs[0]),
        "versions": first["versions"],
        "code_sha256": first["code_sha256"],
        "validation": {n: first[n] for n in ("documents", "tokens", "bytes")} | {"sha256": first["validation"]},
        "limits": {"train_seconds": facts.train_seconds, "eval_seconds": facts.eval_seconds},
        "allowed": list(facts.allowed),
        "baseline": asdict(facts.baseline) if facts.baseline else None,
        "significance": significance(judge(runs, facts.baseline)) if facts.baseline else None,
    }


def as_json(stated: dict[str, Any]) -> str:
    return json.dumps(stated, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def seed_result(run: Run) -> dict[str, Any]:
    result = run.result
    exact = ("val_loss", "val_bpb", "static_bpb", "prequant_bpb", "train_seconds", "eval_seconds")
    counts = ("steps", "train_tokens", "artifact_bytes", "total_bytes", "doc_independent", "degraded_documents")
    return {
        **{name: rounded(result[name]) for name in exact},
        **{name: result[name] for name in counts},
        "step_ms": round(step_ms(run), 3),
    }


def step_ms(run: Run) -> float:
    return 1000 * run.result["phases"].get("train", 0.0) / max(run.result["steps"], 1)


def rounded(value: float) -> float | None:
    """Round to 8 decimals; None if unknown, such as the deviation of a single seed."""
    return round(value, 8) if math.isfinite(value) else None


def significance(v: Verdict) -> dict[str, Any]:
    return {
        "gain_bpb": rounded(v.gain),
        "gain_nats_per_token": rounded(v.gain_nats),
        "bytes_per_token": rounded(v.bytes_per_token),
        "required_bpb": rounded(v.required),
        "p_better": short(v.p_better),
        "p_required": short(v.p_required),
        "required_met": v.met,
    }


def short(p: float | None) -> float | None:
    """Round to four digits."""
    return None if p is None or not math.isfinite(p) else float(f"{p:.4g}")


def hardware(run: Run) -> str:
    return f"{run.result['world_size']} x {run.result['device']}"


def requirements(run: Run) -> str:
    """requirements.txt: the packages used. A local build (torch 2.13.0+cpu) is listed by its public version."""
    found = re.findall(r"(torch|numpy|sentencepiece|zstandard):([^\s+]+)", run.result["versions"])
    return "".join(f"{name}=={version}\n" for name, version in found)


# -----------------------------------------------------------------------------
# README.md

WHAT, SETTINGS = "## What changed", "## Settings that differ from the defaults"


def readme(runs: Sequence[Run], facts: Facts) -> str:
    """README.md: what changed, the settings, and every figure by seed."""
    against = verdict_in_words(runs, facts.baseline) if facts.baseline else "No baseline was given."
    sections = [
        headline(runs, facts),
        f"{WHAT}\n\n{facts.what.strip()}",
        f"{SETTINGS}\n\n{settings_section(runs[0])}",
        f"## Results\n\n{results_section(runs)}",
        f"## Seconds, every phase counted\n\n{phases_section(runs, facts)}",
        f"## Against the baseline\n\n{against}",
        f"## What was scored\n\n{validation_section(runs[0], facts)}",
        f"## Pictures\n\n{pictures(PLOTS)}",
        f"## Check it\n\n{CHECK_IT.format(folder=facts.folder)}",
    ]
    return "\n\n".join(sections) + "\n"


def what_of(text: str) -> str:
    """Recover `Facts.what` from a README."""
    _, start, rest = text.partition(f"\n{WHAT}\n\n")
    what, end, _ = rest.partition(f"\n\n{SETTINGS}\n")
    require(bool(start and end), f"README.md: no text between {WHAT!r} and {SETTINGS!r}", DataError)
    return what


def headline(runs: Sequence[Run], facts: Facts) -> str:
    bpb = scores(runs)
    loss = scores(runs, "val_loss")
    largest = max(run.result["total_bytes"] for run in runs)
    spread = f" ± {bpb.std:.5f}" if bpb.n > 1 else ""
    lines = [
        f"# {facts.name}",
        "",
        f"**{bpb.mean:.5f}{spread} bits per byte**, {loss.mean:.5f} nats a token ({plural(bpb.n, 'seed')}); at most "
        f"{largest:,} bytes of code and weights; {hardware(runs[0])}.",
        f"By {facts.author} ({facts.github_id}), {facts.date}. {track_in_words(facts)}",
    ]
    return "\n".join(lines + [f"Allowed here: {ALLOWANCES[name]}." for name in facts.allowed])


def track_in_words(facts: Facts) -> str:
    limits = f"{facts.train_seconds:g} s of training, {facts.eval_seconds:g} s of evaluation, {MOST_BYTES:,} bytes"
    if facts.track == CONTEST:
        return f"Track `{CONTEST}`: {CONTEST_GPUS} x {CONTEST_GPU}, {limits}."
    return f"Track `{NON_RECORD}`: **not a record of the contest's main track**; its limits: {limits}."


def settings_section(run: Run) -> str:
    """Indented lines, ready to paste."""
    changed = [f"    {name}={shell_word(value)}" for name, value in changed_settings(run).items()]
    return "\n".join(changed) or "None."


def shell_word(value: str) -> str:
    """As shlex.quote, except for an empty value, which needs no quotes after `=`."""
    return shlex.quote(value) if value else ""


RESULT_COLUMNS = (  # header, field of a result (or step_ms), how it is shown
    ("seed", "seed", "{}"),
    ("steps", "steps", "{:,}"),
    ("ms/step", "step_ms", "{:.1f}"),
    ("before quantisation, bpb", "prequant_bpb", "{:.5f}"),
    ("quantised, bpb", "static_bpb", "{:.5f}"),
    ("final, bpb", "val_bpb", "**{:.5f}**"),
    ("nats a token", "val_loss", "{:.5f}"),
    ("artifact, bytes", "artifact_bytes", "{:,}"),
    ("with code, bytes", "total_bytes", "{:,}"),
    ("training, s", "train_seconds", "{:.1f}"),
    ("evaluation, s", "eval_seconds", "{:.1f}"),
)
AVERAGED = ("prequant_bpb", "static_bpb", "val_bpb", "val_loss")  # fields with a mean and a deviation over seeds


def results_section(runs: Sequence[Run]) -> str:
    """The table of RESULT_COLUMNS by seed, and what its scores are."""
    rows = []
    for run in runs:
        values = run.result | {"step_ms": step_ms(run)}
        rows.append([shown.format(values[field]) for _, field, shown in RESULT_COLUMNS])
    samples = {name: scores(runs, name) for name in AVERAGED}
    others = [field for _, field, _ in RESULT_COLUMNS[1:]]
    rows.append(["mean", *(f"{samples[name].mean:.5f}" if name in samples else "" for name in others)])
    if len(runs) > 1:
        rows.append(["deviation", *(f"{samples[name].std:.5f}" if name in samples else "" for name in others)])
    return f"{table([header for header, _, _ in RESULT_COLUMNS], rows)}\n\n{about_scores(runs)}"


def about_scores(runs: Sequence[Run]) -> str:
    """Which of the scores are with adaptation, and which documents did not adapt."""
    results = [run.result for run in runs]
    text = "The first two scores are without adaptation, the final one is what is claimed."
    if not any(r["adaptation_steps"] for r in results):
        text = "Nothing adapts at test time: the final score is that of the quantised model."
    late = [f"{r['degraded_documents']:,} of seed {r['seed']}" for r in results if r["degraded_documents"]]
    if late:
        text += f" Documents that did not adapt for lack of time: {', '.join(late)}."
    return text


def phases_section(runs: Sequence[Run], facts: Facts) -> str:
    """Seconds of every phase of every run, of both clocks, and from start to finish."""
    clocks = {name: clock for run in runs for name, (_, clock) in run.phases().items()}
    rows = []
    for name, clock in clocks.items():
        seconds = [run.result["phases"].get(name, 0.0) for run in runs]
        rows.append([name, clock, *(f"{s:.1f}" for s in seconds)])
    totals = {
        f"**all of training**, limit {facts.train_seconds:g}": lambda r: r.result["train_seconds"],
        f"**all of evaluation**, limit {facts.eval_seconds:g}": lambda r: r.result["eval_seconds"],
        "**start to finish**": lambda r: sum(r.result["phases"].values()),
    }
    rows += [[name, "", *(f"{total(r):.1f}" for r in runs)] for name, total in totals.items()]
    return table(["phase", "clock", *(f"seed {r.result['seed']}, s" for r in runs)], rows)


def validation_section(run: Run, facts: Facts) -> str:
    r = run.result
    own = " with a tokenizer of our own" if OWN_TOKENIZER in facts.allowed else ""
    whose = f"The contest's validation set{own}: " if facts.track == CONTEST else ""
    return (
        f"{whose}{r['documents']:,} documents, {r['tokens']:,} targets, {r['bytes']:,} bytes "
        f"({r['bytes'] / r['tokens']:.4f} bytes a token), sha256 `{r['validation']}`.\n"
        f"Code: `train_gpt.py`, {r['code_bytes']:,} bytes, sha256 `{r['code_sha256']}`. Ran with: {r['versions']}."
    )


def pictures(names: Sequence[str]) -> str:
    return "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in names)


CHECK_IT = """    ./run.sh check records/{folder}

derives every number above again from the logs, results and documents' scores of this folder; where the artifact of a
seed is at hand (`--artifact SEED=FILE`), it is evaluated once more. `audit_seed*.txt` is what `./run.sh prove` said of
every artifact. The artifacts themselves are not kept here."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others are right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
