"""The combinations of a sweep: as the lines of a file, and in which rows of the table they come."""

import numpy as np
import pytest

from tools import sweep
from tools.artifact import end_in_a_line
from tools.results import load_run


def test_seeds_share_a_row_and_values_may_hold_commas(stand_in, monkeypatch, capsys):
    for seed in (0, 2):
        stand_in.makes("0.1", seed=seed, own=seed)
        stand_in.makes("0.2", seed=seed, own=seed, gap=0.1)
    assert sweep.main(["TTT_LR=0.2,0.1", "SEED=0,2", "TTT_LORA_TARGETS=q,v;head"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "TTT_LR=0.1 TTT_LORA_TARGETS=q,v"
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| 0.")]
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("| 0.1", "q,v", "0 2"),
        ("| 0.1", "head", "0 2"),
        ("| 0.2", "q,v", "0 2"),
        ("| 0.2", "head", "0 2"),
    ]
    done = [
        load_run(path)
        for path in (stand_in.folder / "logs/sweeps").rglob("*.json")
        if path.name[0] in "0123456789abcdef"
    ]
    mean = np.mean(sorted(run.bpb for run in done)[:4])
    assert rows[0][2].startswith(f"{mean:.5f} ± ") and rows[1][3].startswith("+0.00000 [")
    monkeypatch.setenv("TTT_LR", "0.1")
    assert sweep.main(["SEED=0,2"]) == 0
    assert "the best" not in capsys.readouterr().out


def test_a_file_gives_one_combination_a_line(stand_in, capsys):
    stand_in.makes("0.1")
    stand_in.makes("0.2", gap=-0.1)
    (stand_in.folder / "two.txt").write_text("TTT_LR=0.1 TTT_EPOCHS=3\n# none\n\nTTT_LR=0.2 TTT_COSINE=1\n")
    assert sweep.main(["--file", "two.txt"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "TTT_LR=0.2 TTT_COSINE=1"
    assert (
        "| TTT_LR | TTT_EPOCHS | TTT_COSINE | bpb" in out and "| 0.2 |  | 1 | 1." in out and "| 0.1 | 3 |  | 1." in out
    )
    assert (stand_in.folder / "logs/sweeps/two/results.md").exists()


def test_lines_of_a_file_share_a_row_whatever_the_order_of_their_words(stand_in, capsys):
    for seed in (0, 2):
        stand_in.makes("0.1", seed=seed)
    (stand_in.folder / "two.txt").write_text("TTT_LR=0.1 TTT_EPOCHS=3 SEED=0\nSEED=2 TTT_EPOCHS=3 TTT_LR=0.1\n")
    assert sweep.main(["--file", "two.txt"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.1")]
    assert row.split(" | ")[5] == "0 2"


@pytest.mark.parametrize(
    "lines, words",
    [
        ("TTT_LR=0.1\nfast\n", ":2: expected NAME=value"),
        ("TTT_LR='0.1\n", ":1: No closing quotation"),
        ("TTT_LR=0.1 SEED=1 TTT_LR=0.2\n", ":1: TTT_LR is given twice"),
        ("TTT_LR=0.1\nTTT_LRR=2\n", "did you mean TTT_LR?"),
        ("# none\n", "no combination"),
    ],
)
def test_a_file_that_is_no_list_of_combinations_is_refused(stand_in, capsys, lines, words):
    (stand_in.folder / "bad.txt").write_text(lines)
    assert end_in_a_line(lambda: sweep.main(["--file", "bad.txt"])) == 2
    assert words in capsys.readouterr().err and stand_in.started() == []
