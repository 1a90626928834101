"""Screening designs: balanced and orthogonal, and the effects that they find in numbers that are made up."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from stand_in import source
from test_results import fabricate

import train_gpt
from tools import screening, sweep
from tools.artifact import end_in_a_line
from tools.results import load_run
from tools.welch import two_sided

ELEVEN = [f"K{i}=0,1" for i in range(11)]


@pytest.mark.parametrize("runs", screening.SIZES)
def test_columns_are_balanced_and_orthogonal_and_the_first_run_is_the_base(runs):
    levels = screening.plackett_burman(runs)
    assert levels.shape == (runs, runs - 1) and set(levels.ravel().tolist()) == {-1, 1}
    assert (levels.sum(0) == 0).all() and (levels[0] == -1).all()
    assert (levels.T @ levels == runs * np.eye(runs - 1)).all()


@pytest.mark.parametrize("factors", range(3, 24))
def test_the_fewest_runs_that_can_tell_all_factors_are_chosen_and_none_is_twice(factors):
    design = screening.make_design(screening.parse_factors([f"K{i}=0,1" for i in range(factors)]))
    combinations = design.combinations()
    assert len(combinations) == next(size for size in (8, 12, 16, 20, 24) if size > factors)
    assert len({tuple(knobs.items()) for knobs in combinations}) == len(combinations)
    assert set(combinations[0].values()) == {"0"} and len(design.columns) + len(design.spare) == len(combinations) - 1
    for name in combinations[0]:
        assert sum(knobs[name] == "1" for knobs in combinations) == len(combinations) / 2


def test_joined_words_change_together_and_values_may_hold_commas():
    first, second, third = screening.parse_factors(["A=0,2+B_1=8,0", "C=x,y;x", "D=1e+5,2"])
    assert (first.base, first.other) == ({"A": "0", "B_1": "8"}, {"A": "2", "B_1": "0"})
    assert (second.base, second.other) == ({"C": "x,y"}, {"C": "x"}) and third.base == {"D": "1e+5"}
    design = screening.make_design([first, second, third])
    assert {(knobs["A"], knobs["B_1"]) for knobs in design.combinations()} == {("0", "8"), ("2", "0")}


@pytest.mark.parametrize(
    "words, runs, message",
    [
        (["A=1,2", "B=1,2"], 0, "3 factors or more"),
        (["A=1,2,3", "B=1,2", "C=1,2"], 0, "A: --screen needs two values"),
        (["A=1,1", "B=1,2", "C=1,2"], 0, "the same"),
        (["A=1,2+B=1,2", "B=1,3", "C=1,2"], 0, "B is given twice"),
        (["A=1,2", "SEED=1,2", "C=1,2"], 0, "SEED"),
        (["A=1,2", "B", "C=1,2"], 0, "expected NAME=value"),
        (ELEVEN, 8, "need 12 runs or more"),
        (ELEVEN, 10, "expected one of 8, 12"),
        ([f"K{i}=0,1" for i in range(24)], 0, "more than 24 runs"),
        (ELEVEN[:4], 12, "a combination twice"),
    ],
)
def test_a_design_that_cannot_be_is_refused(words, runs, message):
    with pytest.raises(train_gpt.ConfigError, match=message):
        screening.make_design(screening.parse_factors(words), runs)


def made_runs(folder: Path, design: screening.Design, true: np.ndarray, noise: float = 0.0) -> list:
    """Finished runs of a design in which its factors have these effects in bpb, (factors,)."""
    chance = np.random.default_rng(5)
    runs = []
    for i, levels in enumerate(design.levels[:, design.columns]):
        gap = float(true @ levels / 2 + noise * chance.normal())
        runs.append(load_run(fabricate(folder, f"run{i}", gap=gap, own=i, exact=True, steps=100 + 10 * int(levels[0]))))
    return runs


def test_effects_are_recovered_with_the_noise_that_spare_columns_tell(tmp_path):
    design = screening.make_design(screening.parse_factors(ELEVEN[:6]), 12)
    true = np.array([-0.04, 0.03, 0.0, 0.0, 0.0, 0.02])
    runs = made_runs(tmp_path, design, true, noise=0.001)
    lines = screening.effects_table(design, runs)
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines if line.startswith("| K")}
    for word, effect in zip(ELEVEN, 0.99 * true, strict=False):
        assert float(rows[word][1].split()[0]) == pytest.approx(effect, abs=0.003)
    assert rows["K0=0,1"][3] == "+20" and rows["K1=0,1"][3] == "+0"
    assert [rows[word][4] for word in ELEVEN[:3]] == ["better |", "worse |", "**unresolved** |"]
    assert list(rows)[0] == "K0=0,1" and "told by 5 columns" in " ".join(lines)

    bpb = np.array([run.prequant_nats.sum() / run.bytes.sum() / math.log(2) for run in runs])
    spare = screening.effects(design.levels, bpb)[design.spare]
    reach = two_sided(0.95, 5) * math.sqrt((spare**2).mean())
    low, high = map(float, rows["K5=0,1"][2].strip("[]").split(", "))
    value = float(rows["K5=0,1"][1].split()[0])
    assert (low, high) == pytest.approx((value - reach, value + reach), abs=2e-5)


def test_without_spare_columns_the_table_says_that_noise_is_not_told(tmp_path):
    design = screening.make_design(screening.parse_factors(ELEVEN[:7]))
    true = np.array([-0.04, 0, 0, 0, 0, 0, 0])
    text = "\n".join(screening.effects_table(design, made_runs(tmp_path, design, true, noise=0.001)))
    assert design.spare == [] and "no column tells the noise of runs" in text and "Lenth 1989" in text
    assert "| K0=0,1 | -0.0" in text and text.count("**unresolved**") == 6


def test_lenths_pseudo_standard_error_leaves_out_what_is_no_noise():
    noise = screening.noise_of(np.array([1.0, -2.0, 3.0, -1.0, 2.0, 40.0, -50.0]), [])
    assert noise.error == pytest.approx(1.5 * 2.0), "median 2, first guess 3: those of 7.5 and more are left out"
    assert noise.reach == pytest.approx(two_sided(0.95, 7 / 3) * 3.0) and not noise.told
    assert screening.noise_of(np.zeros(7), []).reach == 0.0


# ---- sweeps -----------------------------------------------------------------

FACTORS = ("KNOB_A=0,1", "KNOB_B=0,1+KNOB_C=5,7", "KNOB_D=0,1", "KNOB_E=0,1")
SIX = [f"{name}=0.1,0.2" for name in ("BETA1", "BETA2", "MIN_LR", "EMBED_WD", "SCALAR_WD", "WARMDOWN_FRAC")]
NAMED = '"TTT_LR": "a"'
NAMED_BY_KNOBS = '"TTT_LR": "-".join(os.environ[name] for name in ("KNOB_A", "KNOB_B", "KNOB_D", "KNOB_E"))'


@pytest.fixture
def screened(race):
    """A source whose runs are made/A-B-D-E-1, as the stand-in finds them."""
    content = source(race, "a", ("KNOB_A", "KNOB_B", "KNOB_C", "KNOB_D", "KNOB_E")).decode()
    assert NAMED in content
    (race.folder / "a.py").write_text(content.replace(NAMED, NAMED_BY_KNOBS))
    for a, b, d, e in itertools.product((0, 1), repeat=4):
        race.makes(f"{a}-{b}-{d}-{e}", gap=0.05 * a - 0.02 * b, own=a + 2 * b + 4 * d + 8 * e, exact=True)
    return race


def test_a_screen_runs_its_design_and_tells_effects_once_all_is_done(screened, capsys):
    command = ["--screen", *FACTORS, "--source", "a.py", "--name", "few"]
    chosen = screening.make_design(screening.parse_factors(FACTORS)).combinations()
    lost = screened.folder / f"made/{'-'.join(chosen[-1][f'KNOB_{x}'] for x in 'ABDE')}-1.json"
    content = lost.read_bytes()
    lost.unlink()
    assert sweep.main(command) == 1, "one has failed"
    results = screened.folder / "logs/sweeps/few/results.md"
    assert "No effects yet: 1 of 8 runs are missing" in results.read_text()
    started = screened.started()
    assert len(started) == 8 and started[0][0] == "0-0-0-0", "the base is first"

    lost.write_bytes(content)
    capsys.readouterr()
    assert sweep.main(command) == 0 and len(screened.started()) == 9
    text = capsys.readouterr().out
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines() if line.startswith("| KNOB")}
    assert float(lines["KNOB_A=0,1"][1].split()[0]) == pytest.approx(0.0495, abs=0.002)
    assert float(lines["KNOB_B=0,1+KNOB_C=5,7"][1].split()[0]) == pytest.approx(-0.0198, abs=0.002)
    assert "told by 3 columns" in text and "the best" not in text and "Main effects:" in results.read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--screen", "12"], "give its factors"),
        (["--screen", *FACTORS, "--eval", "a.ptz"], "leave one out"),
        (["--screen", *FACTORS, "--source", "a.py,b.py"], "give one source"),
        (["--screen", "9", *FACTORS], "--screen 9: expected one of"),
        (["--screen", "TTT_EPOCHS=1,2", *FACTORS], "TTT_EPOCHS changes nothing before quantisation"),
        ([*FACTORS, "--screen"], "KNOB_A"),
        (["--screen", *SIX, "MATRIX_LR=0.02,2e-2"], "both values of MATRIX_LR are 0.02 to a run"),
        (["--screen", *SIX, "EMBED_LR=0.01,0.02+MUON_WD=0,-0.0"], "both values of MUON_WD are 0.0 to a run"),
    ],
)
def test_a_screen_that_makes_no_sense_is_refused(screened, capsys, words, message):
    assert end_in_a_line(lambda: sweep.main(words)) == 2
    assert message in capsys.readouterr().err and screened.started() == []
