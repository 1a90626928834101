"""
Plots of finished runs, one question per plot.

    ./run.sh plot logs/A.json logs/B.json ... [--out FOLDER]

loss.png     training and validation loss against time and against tokens (if any run trained)
phases.png   where the time went
lengths.png  bits per byte against document length, with and without test-time training
bytes.png    what the artifact's bytes are spent on
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.artifact import end_in_a_line
from tools.results import Run, bits_per_byte, length_groups, load_run
from tools.values import printable
from train_gpt import EVALUATION_CLOCK, LOGS, TRAINING_CLOCK, UserError, require, write_atomically

WIDTH, DPI = 900, 100  # pixels of every picture, as wide as a README
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#000000")  # Okabe & Ito 2008
HATCHES = ("", "///", "...", "xxx")  # distinguish parts once the colours run out
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "legend.fontsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "hatch.color": "white",
    "text.parse_math": False,  # a run's name may contain dollar signs
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}
MOST_RUNS = len(COLOURS)


@contextlib.contextmanager
def picture(path: Path, height: int, columns: int = 1) -> Iterator[list[Axes]]:
    """Axes side by side on WIDTH x `height` pixels, in STYLE; saved as a PNG unless the block raises."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained")
        yield figure.subplots(1, columns, squeeze=False)[0].tolist()
        out = io.BytesIO()
        figure.savefig(out, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [out.getvalue()])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run.sh plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="logs/RUN_ID.json, or RUN_ID alone")
    parser.add_argument("--out", type=Path, default=LOGS / "plots", metavar="FOLDER", help="[%(default)s]")
    options = parser.parse_args(arguments)
    for path in draw_all([load_run(name) for name in options.runs], options.out):
        print(printable(str(path)))
    return 0


def draw_all(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw every plot of these runs -> their paths; no loss.png if no run trained."""
    require(
        len(runs) <= MOST_RUNS, f"{len(runs)} runs: more than {MOST_RUNS} cannot be told apart; give fewer", UserError
    )
    paths = []

    def draw(draw_runs: Callable[[Sequence[Run], Path], None], chosen: Sequence[Run], name: str) -> None:
        draw_runs(chosen, folder / name)
        paths.append(folder / name)

    trained = [run for run in runs if run.trained]
    if trained:
        draw(draw_loss, trained, "loss.png")
    draw(draw_phases, runs, "phases.png")
    draw(draw_lengths, runs, "lengths.png")
    draw(draw_bytes, runs, "bytes.png")
    return paths


def labels(runs: Sequence[Run]) -> list[str]:
    """What to call each run: its name without its folder, such as a sweep's; the whole name where several runs would
    be called the same; and the path of its .json where even names are the same, as those of a copy."""
    short = [run.name.rpartition("/")[2] for run in runs]
    for found in (short, [run.name for run in runs]):
        if len(set(found)) == len(runs):
            return found
    return [str(run.path) for run in runs]


def warn_of_other_text(axes: Axes, runs: Sequence[Run], in_bytes: bool) -> None:
    """Warn above the plot if its curves are not comparable: nats per token if the tokens differ, or bits per byte
    (`in_bytes`) if the documents' bytes differ."""
    first = runs[0]
    if all(run.validation == first.validation for run in runs):
        return
    if in_bytes and all(np.array_equal(run.bytes, first.bytes) for run in runs):
        return  # the same text with different tokenizers
    what = "documents" if in_bytes else "documents or tokens"
    axes.figure.suptitle(f"These runs scored different {what}: their curves do not compare", fontsize=12)


def draw_loss(runs: Sequence[Run], path: Path) -> None:
    """Nats per token against the training clock and against tokens: lines for training, dots for validation."""
    with picture(path, 400 + 24 * len(runs), columns=2) as (by_time, by_tokens):
        shown = 0.0
        for run, label, colour in zip(runs, labels(runs), COLOURS, strict=False):
            steps, seconds, losses = np.array(run.result["history"], float).reshape(-1, 3).T
            tested_steps, nats = validation_losses(run)
            tested_seconds = np.interp(tested_steps, *clock_by_step(run))
            step_tokens = run.result["train_tokens"] / max(run.result["steps"], 1) / 1e6
            for axes, x, at in (
                (by_time, seconds, tested_seconds),
                (by_tokens, steps * step_tokens, tested_steps * step_tokens),
            ):
                axes.plot(x, losses, color=colour, alpha=0.6, label=f"{label}: training")
                axes.plot(at, nats, "o", color=colour, markersize=6, label=f"{label}: validation, not adapted")
            shown = max(shown, *losses[len(losses) // 20 :], *nats)
        by_time.set(xlabel="training clock (s)", ylabel="loss (nats a token)")
        by_time.set_ylim(top=1.02 * shown)  # the high losses of the first steps would flatten the rest
        by_tokens.set(xlabel="tokens (millions)", ylim=by_time.get_ylim())
        by_tokens.locator_params(axis="x", nbins=5)
        warn_of_other_text(by_time, runs, in_bytes=False)
        by_time.figure.legend(*by_time.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def validation_losses(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and nats per token (n,) of every validation without adaptation, including the last iterate's."""
    measured = [*run.validations(), (run.result["steps"], run.result["last_bpb"])]
    steps, bpb = np.array(measured, float).T
    return steps, bpb * math.log(2) * run.result["bytes"] / run.result["tokens"]


def clock_by_step(run: Run) -> tuple[list[float], list[float]]:
    """Steps, and the seconds on the training clock after each: of the first step's start, every logged step and the
    last step, which need not be logged."""
    history = [(0, 0.0)] + [(step, seconds) for step, seconds, _ in run.result["history"]]
    steps = run.result["steps"]
    if steps > history[-1][0]:
        packing = [name for name in TRAINING_CLOCK if name not in ("train", "checkpoint")]
        trained = run.result["train_seconds"] - sum(run.result["phases"].get(name, 0.0) for name in packing)
        history.append((steps, max(trained, history[-1][1])))
    return tuple(map(list, zip(*history, strict=True)))


def draw_phases(runs: Sequence[Run], path: Path) -> None:
    """Three bars per run: the training clock, the evaluation clock, and time on neither."""
    bars = []
    for run, label in zip(runs, labels(runs), strict=True):
        phases = run.result["phases"]
        other = [name for name in phases if name not in TRAINING_CLOCK + EVALUATION_CLOCK]
        for clock, names in (("training", TRAINING_CLOCK), ("evaluation", EVALUATION_CLOCK), ("neither", other)):
            parts = {name: phases[name] for name in names if name in phases}
            if parts:
                bars.append((f"{label}, {clock}\n{sum(parts.values()):,.1f} s", parts))
    draw_bars(bars, path, "seconds, by the clock that counts them", 1.0)


def draw_bytes(runs: Sequence[Run], path: Path) -> None:
    """Sizes of the artifact's parts and of the source, within the bytes allowed."""
    bars = []
    for run, label in zip(runs, labels(runs), strict=True):
        allowed = run.result["knobs"].get("ARTIFACT_BYTES")
        label += f"\n{run.result['total_bytes']:,}"
        if allowed and allowed.isdecimal():
            label += f" of {int(allowed):,}"
        bars.append((label, run.result["artifact_parts"] | {"code": run.result["code_bytes"]}))
    draw_bars(bars, path, "bytes (MB)", 1e-6)


def draw_bars(bars: list[tuple[str, dict[str, float]]], path: Path, unit: str, factor: float) -> None:
    """Stacked bars of (label, parts by name); parts of one name look the same in every bar."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    legend_rows = math.ceil(len(names) / 4)
    with picture(path, 170 + 25 * legend_rows + 48 * len(bars)) as (axes,):
        left = np.zeros(len(bars))
        for i, name in enumerate(names):
            width = np.array([parts.get(name, 0.0) for _, parts in bars]) * factor
            colour = COLOURS[i % len(COLOURS)]
            hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
            axes.barh(range(len(bars)), width, left=left, height=0.65, label=name, color=colour, hatch=hatch)
            left += width
        axes.set(xlabel=unit, ylim=(len(bars) - 0.5, -0.5))
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.grid(axis="y", visible=False)
        axes.figure.legend(loc="outside lower center", ncols=4)


def draw_lengths(runs: Sequence[Run], path: Path) -> None:
    """Bits per byte by document length: a solid line with adaptation, a dashed one without."""
    with picture(path, 460) as (axes,):
        for run, label, colour in zip(runs, labels(runs), COLOURS, strict=False):
            at, bpb = by_length(run, run.nats)
            axes.plot(at, bpb, "o-", color=colour, label=f"{label}: {run.bpb:.4f}")
            if run.result["adaptation_steps"]:
                axes.plot(
                    at,
                    by_length(run, run.static_nats)[1],
                    "s--",
                    color=colour,
                    markerfacecolor="white",
                    label=f"{label}, not adapted: {run.static_bpb:.4f}",
                )
        label_lengths(axes, runs)
        warn_of_other_text(axes, runs, in_bytes=True)
        axes.set(ylabel="bits per byte")
        axes.legend()


def by_length(run: Run, nats: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean length in tokens, and bits per byte, of every group of documents; groups without text are left out."""
    groups = [mask for _, mask in length_groups(run.tokens) if run.bytes[mask].sum()]
    return [float(run.tokens[m].mean()) for m in groups], [bits_per_byte(nats[m], run.bytes[m]) for m in groups]


def label_lengths(axes: Axes, runs: Sequence[Run]) -> None:
    """A logarithmic axis of tokens, marked at the powers of two that the documents span."""
    tokens = np.concatenate([run.tokens for run in runs])
    first = int(math.log2(max(1, tokens.min())))
    last = int(math.log2(max(1, tokens.max())))
    ticks = [1 << i for i in range(first, last + 2)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    axes.set_xlabel("document length (tokens)")


if __name__ == "__main__":
    sys.exit(end_in_a_line(main))
