"""
The results of a sweep: its combinations ranked, their differences, and the files that report them.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt
from tools.grid import knob_names, shell_words, without_seed
from tools.jobs import Job, ScoredText
from tools.plot import COLOURS, picture
from tools.results import Interval, OverSeeds, Run, differences, over_seeds, ratio_intervals, require_same_documents
from tools.screening import Design, effects_table
from tools.values import printable

LONGEST_LABEL = 60  # characters; a longer one would leave no room for the plot


class Row(NamedTuple):
    """A combination without its seed; the nats of a document are the mean over seeds."""

    knobs: dict[str, str]
    run: Run  # of the first seed, with the mean nats
    runs: list[Run]
    gap: Interval | None  # bpb minus the first row's; None in the first
    failed: int = 0  # number of seeds without a run: the mean of the others may be too good


def rank(jobs: list[Job]) -> list[Row]:
    """Combinations whose seeds all finished, best first; then those with a failed seed. Raises DataError if runs scored
    different documents."""
    by_knobs: dict[str, list[Job]] = {}
    for job in jobs:
        by_knobs.setdefault(shell_words(without_seed(job.knobs)), []).append(job)
    rows = []
    for group in by_knobs.values():
        runs = [job.run for job in group if job.run is not None]
        if not runs:
            continue
        for run in runs:
            require_same_documents(runs[0], run)
        mean = dataclasses.replace(
            runs[0],
            nats=np.mean([run.nats for run in runs], axis=0),
            static_nats=np.mean([run.static_nats for run in runs], axis=0),
        )
        rows.append(Row(without_seed(group[0].knobs), mean, runs, None, len(group) - len(runs)))
    rows.sort(key=lambda row: (row.failed > 0, row.run.bpb))
    others = [row.run for row in rows[1:]]
    gaps = differences(rows[0].run, others, same_text="data" in rows[0].knobs) if others else []
    return rows[:1] + [row._replace(gap=gap) for row, gap in zip(rows[1:], gaps, strict=True)]


def write_results(
    folder: Path, jobs: list[Job], rows: list[Row], scored: ScoredText, command: str, design: Design | None = None
) -> str:
    """Write results.csv, results.md and results.png -> the text of results.md."""
    text = "\n".join(results_table(folder.name, jobs, rows, scored, command, design)) + "\n"
    train_gpt.write_atomically(folder / "results.csv", [results_csv(jobs).encode()])
    train_gpt.write_atomically(folder / "results.md", [text.encode()])
    draw(rows, scored, folder / "results.png")
    return text


IN_CSV = (  # results
    "val_bpb",
    "static_bpb",
    "prequant_bpb",
    "val_loss",
    "steps",
    "train_seconds",
    "eval_seconds",
    "degraded_documents",
    "doc_independent",
    "total_bytes",
)


TRAIN_ONLY_IN_CSV = (
    "prequant_bpb",
    "readout",
    "steps",
    "tokens_per_s",
    "train_loss",
    "train_seconds",
    "peak_memory_bytes",
)


def results_csv(jobs: list[Job]) -> str:
    """One line per run, including failed ones."""
    train_only = any(job.run.train_only for job in jobs if job.run)
    columns = TRAIN_ONLY_IN_CSV if train_only else IN_CSV
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    names = knob_names(job.knobs for job in jobs)
    table.writerow([*names, "state", *columns, "run_id"])
    for job in jobs:
        result = job.run.result if job.run else {}
        knobs = [job.knobs.get(name, "") for name in names]
        figures = [result.get(name, "") for name in columns]
        table.writerow([*knobs, job.state, *figures, job.run_id])
    return out.getvalue()


def results_table(
    name: str, jobs: list[Job], rows: list[Row], scored: ScoredText, command: str, design: Design | None
) -> list[str]:
    """The lines of results.md. Effects of a design appear only if all of its runs finished."""
    lines = ranking(name, jobs, rows, scored, command)
    raced = {job.source.name: job.source for job in jobs if job.source.name}
    if raced:
        lines += ["", "Sources:", ""]
        lines += [f"- `{printable(name)}`: sha256 {source.sha256}" for name, source in raced.items()]
    missing = sum(job.run is None for job in jobs)
    if design is not None and missing:
        lines += ["", f"No effects yet: {missing} of {len(jobs)} runs are missing; the same command goes on with them."]
    elif design is not None:
        lines += effects_table(design, [job.run for job in jobs])
    elif raced or "data" in jobs[0].knobs or any(len(row.runs) > 1 for row in rows):
        measures = ["before quantisation"] if rows[0].run.train_only else list(MEASURES)
        lines += differences_table(pairs_of(jobs, rows), measures)
    failed = [f"- `{job.label}`: {printable(job.at)}" for job in jobs if job.state == "failed"]
    return [*lines, "", "Failed:", "", *failed] if failed else lines


def ranking(name: str, jobs: list[Job], rows: list[Row], scored: ScoredText, command: str) -> list[str]:
    """What was scored, and one line per combination, best first."""
    knobs = knob_names(without_seed(job.knobs) for job in jobs)
    mark = "**VALIDATION. Nothing may be chosen from this table.** " if scored.is_validation else ""
    about = (
        "Scores are in bits per byte. Differences are those to the first row, with paired 95 % bootstrap intervals "
        "over documents; ± is the standard deviation over seeds."
    )
    cells_of = cells_of_training if rows[0].run.train_only else cells_of_score
    head = [*knobs, *cells_of(rows[0])]
    lines = [f"# Sweep {name}", "", f"    {command}", "", f"{mark}Scored on {scored.description}. {about}", ""]
    lines += several_machines(jobs)
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [*(row.knobs.get(name, "") for name in knobs), *cells_of(row).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def several_machines(jobs: list[Job]) -> list[str]:
    """Paragraphs that warn of runs on different devices, or by other versions of packages, as when a race is resumed on
    another machine."""
    lines = []
    for field, name in (("device", "devices"), ("versions", "versions")):
        found = Counter(job.run.result[field] for job in jobs if job.run is not None)
        if len(found) > 1:
            counts = "; ".join(f"{printable(value)}: {count}" for value, count in found.items())
            lines.append(
                f"**These runs are of different {name} ({counts}).** Over equal seconds they do not compare, and over "
                "equal steps they round differently."
            )
            lines.append("")
    return lines


def cells_of_score(row: Row) -> dict[str, str]:
    """{column: cell} of a row whose runs scored an artifact."""
    return {
        "bpb": bpb_of(row),
        "difference": str(row.gap or ""),
        "without adaptation": f"{row.run.static_bpb:.5f}",
        "seeds": seeds_of(row),
        "before quantisation": mean_of(row, "prequant_bpb", ".5f"),
        "steps": mean_of(row, "steps", ".0f"),
        "evaluation, s": mean_of(row, "eval_seconds", ".1f"),
        "notes": notes(row),
    }


def cells_of_training(row: Row) -> dict[str, str]:
    """{column: cell} of a row whose runs only trained."""
    memory = max(run.result["peak_memory_bytes"] for run in row.runs)
    return {
        "before quantisation": bpb_of(row),
        "difference": str(row.gap or ""),
        "seeds": seeds_of(row),
        "read-out": " ".join(readout_of(run) for run in row.runs),
        "steps": mean_of(row, "steps", ".0f"),
        "tokens/s": mean_of(row, "tokens_per_s", ".0f"),
        "last training loss, nats a token": mean_of(row, "train_loss", ".4f"),
        "training, s": mean_of(row, "train_seconds", ".1f"),
        "peak memory, GiB": f"{memory / 2**30:.1f}" if memory else "",
    }


def readout_of(run: Run) -> str:
    """The share of the average in the weights that are read out; earlier runs name it."""
    readout = run.result["readout"]
    return readout if isinstance(readout, str) else f"{readout:.3f}"


def seeds_of(row: Row) -> str:
    seeds = " ".join(str(run.result["seed"]) for run in row.runs)
    return f"{seeds} ({row.failed} failed)" if row.failed else seeds


def mean_of(row: Row, name: str, form: str) -> str:
    """The mean over seeds of a number in the results; empty if a run lacks it, as one that trained nothing does."""
    values = [run.result.get(name) for run in row.runs]
    return "" if None in values else format(np.mean(values), form)


class Pair(NamedTuple):
    """A combination and its base for comparison, with the runs of the seeds that both have."""

    name: str
    base: str
    runs: list[tuple[Run, Run]]  # (base, combination)
    same_text: bool  # both are known to score the same text, perhaps with different tokenizers


def pairs_of(jobs: list[Job], rows: list[Row]) -> list[Pair]:
    """Every combination with its base, in the order of the sweep. The base is the same knobs under the first source; if
    the combination is under it already, the same knobs on the first data; else the first combination."""
    by_name = {shell_words(row.knobs): row for row in rows}
    first = without_seed(jobs[0].knobs)
    pairs = []
    for name in dict.fromkeys(shell_words(without_seed(job.knobs)) for job in jobs):
        row = by_name.get(name)
        if row is None:  # all of its runs failed
            continue
        base_knobs = first
        for dimension in ("data", "source"):
            if row.knobs.get(dimension) != first.get(dimension):
                base_knobs = row.knobs | {dimension: first[dimension]}
        base = shell_words(base_knobs)
        if base != name and base in by_name:
            theirs = {run.result["seed"]: run for run in by_name[base].runs}
            runs = [(theirs[run.result["seed"]], run) for run in row.runs if run.result["seed"] in theirs]
            pairs.append(Pair(name, base, runs, "data" in row.knobs))
    return pairs


MEASURES = {  # column -> a run's nats per document, or None if it has none
    "before quantisation": lambda run: run.prequant_nats,
    "artifact, without adaptation": lambda run: run.static_nats,
    "final": lambda run: run.nats,
}


def differences_table(pairs: list[Pair], measures: Sequence[str]) -> list[str]:
    """Each pair seed by seed, then over its seeds with a verdict; `measures`: the keys of MEASURES that runs have."""
    if not pairs:
        return []
    lines = [
        "",
        "Differences in bpb: below zero, the combination is better than what it is compared with. Of a seed: with a "
        "paired 95 % interval over documents. Over seeds: mean ± standard deviation, with a 95 % interval for the "
        "choice of documents and, from two seeds on, for that of seeds (Student's t). Where that holds zero, the "
        "difference is unresolved. Runs behind a figure without an interval keep no score per document for it.",
        "",
        f"| combination | compared with | seed | {' | '.join(measures)} |",
        "|" + "---|" * (3 + len(measures)),
    ]
    for pair in pairs:
        if not pair.runs:
            lines.append(f"| {pair.name} | {pair.base} | none in common |" + " |" * len(measures))
            continue
        columns = [column_of(pair, name) for name in measures]
        seeds = [str(run.result["seed"]) for _, run in pair.runs]
        for label, *cells in zip([*seeds, f"all {len(seeds)}"], *columns, strict=True):
            lines.append(f"| {pair.name} | {pair.base} | {label} | {' | '.join(cells)} |")
    return lines


def column_of(pair: Pair, measure: str) -> list[str]:
    """The cells of a pair in one column: one per seed, and one over seeds."""
    nats = [(MEASURES[measure](base), MEASURES[measure](run)) for base, run in pair.runs]
    if any(base is None or run is None for base, run in nats):
        return numbers_alone(pair)
    for base, run in pair.runs:
        require_same_documents(base, run, pair.same_text)
    size = pair.runs[0][0].bytes
    gaps = np.stack([run - base for base, run in nats], 1) / math.log(2)
    each = ratio_intervals(gaps, size, 0)
    total = over_seeds(gaps, size)
    return [*map(str, each), f"{total}: {verdict(total)}"]


def numbers_alone(pair: Pair) -> list[str]:
    """As `column_of`, before quantisation, if only the overall score is known; empty for runs that trained nothing."""
    scores = [(base.result.get("prequant_bpb"), run.result.get("prequant_bpb")) for base, run in pair.runs]
    if any(None in both for both in scores):
        return [""] * (len(scores) + 1)
    gaps = [run - base for base, run in scores]
    spread = f" ± {np.std(gaps, ddof=1):.5f}" if len(gaps) > 1 else ""
    return [*(f"{gap:+.5f}" for gap in gaps), f"{np.mean(gaps):+.5f}{spread}"]


def verdict(gap: OverSeeds) -> str:
    if gap.low <= 0 <= gap.high:
        return "**unresolved**"
    word = "better" if gap.high < 0 else "worse"
    return word if gap.seeds > 1 else f"{word} with this seed"


def bpb_of(row: Row) -> str:
    """The mean over seeds, and the standard deviation if there are several."""
    by_seed = [run.bpb for run in row.runs]
    if len(by_seed) == 1:
        return f"{row.run.bpb:.5f}"
    return f"{row.run.bpb:.5f} ± {np.std(by_seed, ddof=1):.5f}"


def notes(row: Row) -> str:
    """Reasons why a row may not be comparable."""
    degraded = sum(run.result["degraded_documents"] for run in row.runs)
    if degraded:
        return f"time was short: {degraded} documents without adaptation"
    if not all(run.result["doc_independent"] for run in row.runs):
        return "depends on the order of documents"
    return ""


def draw(rows: list[Row], scored: ScoredText, path: Path, most: int = 40) -> None:
    """Plot the best combinations and their differences from the first."""
    shown = rows[:most]
    gaps = [row.gap or Interval(0.0, 0.0, 0.0) for row in shown]
    with picture(path, 130 + 26 * len(shown)) as (axes,):
        reach = np.array([[gap.value - gap.low, gap.high - gap.value] for gap in gaps]).T
        reach[~np.isfinite(reach)] = 0  # too few documents
        axes.errorbar([gap.value for gap in gaps], range(len(shown)), xerr=reach, fmt="o", capsize=4, color=COLOURS[0])
        names = [shell_words(row.knobs) for row in shown]
        if max(map(len, names)) > LONGEST_LABEL:
            names = [f"row {i}" for i in range(1, len(shown) + 1)]
        labels = [f"{name}  {row.run.bpb:.5f}" for name, row in zip(names, shown, strict=True)]
        axes.set_yticks(range(len(shown)), labels, fontsize=10)
        axes.figure.supxlabel("bits per byte above the first row, with 95 % intervals", fontsize=12)
        axes.set_title("VALIDATION: not for choosing" if scored.is_validation else "held-out training documents")
        axes.set_ylim(len(shown) - 0.5, -0.5)
