"""Races of sources: where a source comes from, what it is asked, and how it is compared with the first."""

import csv
import hashlib
import subprocess

import pytest
from stand_in import source

import train_gpt
from tools import ask_source, sources, sweep
from tools.artifact import end_in_a_line
from tools.results import load_run


def test_sources_race_in_turns_from_copies_and_over_seeds(race, capsys):
    contents = {name: source(race, name) for name in "ab"}
    for seed in (0, 1, 2):
        race.makes("a", seed=seed, own=seed)
        race.makes("b", seed=seed, own=10 + seed, gap=-0.05)
    command = ["--source", "a.py,b.py", "SEED=0,1,2"]
    assert sweep.main(command) == 0
    assert [" ".join(words[:2]) for words in race.started()] == ["a 0", "b 0", "b 1", "a 1", "a 2", "b 2"]

    folder = race.folder / "logs/sweeps/race-seed"
    for content in contents.values():
        digest = hashlib.sha256(content).hexdigest()
        assert (folder / f"sources/{digest[:12]}.py").read_bytes() == content
        assert len(list(folder.glob(f"{digest[:8]}-*.json"))) == 3
        assert digest in (folder / "results.md").read_text()
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["source"], row["SEED"]) for row in rows] == [(f"{name}.py", seed) for seed in "012" for name in "ab"]

    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| source=")]
    assert [line[:3] for line in lines] == [["| source=b.py", "source=a.py", seed] for seed in ("0", "1", "2", "all 3")]
    a, b = (load_run(row["run_id"]) for row in rows[:2])
    assert lines[0][5].startswith(f"{b.bpb - a.bpb:+.5f} [-0.0") and lines[0][3] == "+0.00000"
    assert lines[3][3] == "+0.00000 ± 0.00000", "of a number for all documents there is no interval"
    assert lines[3][4].endswith("]: better") and lines[3][5].endswith("]: better |")

    (race.folder / "a.py").write_bytes(contents["a"] + b"# changed\n")
    assert sweep.main(command) == 0
    assert [words[0] for words in race.started()[6:]] == ["a", "a", "a"], "what is finished is kept"


def test_scores_before_quantisation_are_compared_by_document_where_both_keep_them(race, capsys):
    for name, gap in (("a", 0.0), ("b", -0.05)):
        source(race, name)
        race.makes(name, gap=gap, exact=True)
    assert sweep.main(["--source", "a.py,b.py", "TTT_LR=1"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| source=b.py")]
    assert lines[0][3].startswith("-0.0") and lines[0][3].endswith("]")
    assert lines[1][2] == "all 1" and lines[1][3] == f"{lines[0][3]}: better with this seed"


def test_what_seeds_contradict_is_unresolved_and_a_failed_one_is_left_out(race, capsys):
    for name in "ab":
        source(race, name)
        for seed in (0, 1):
            race.makes(name, seed=seed, own=seed, gap=0.05 * seed * (name == "b") - 0.02 * (name == "b"))
    race.makes("a", seed=2)  # and b fails
    assert sweep.main(["--source", "a.py,b.py", "SEED=0,1,2"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| source=b")]
    assert [line.split(" | ")[2] for line in lines] == ["0", "1", "all 2"]
    assert lines[2].endswith("]: **unresolved** |")


def test_knobs_make_a_grid_with_sources_and_each_is_compared_with_the_first_source(race, capsys):
    for name in "ab":
        source(race, name, ("KNOB_X",))
        race.makes(name)
    assert sweep.main(["KNOB_X=1,2", "--source", "a.py,b.py"]) == 0
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| source=")]
    assert lines[::2] == [
        ["| source=b.py KNOB_X=1", "source=a.py KNOB_X=1"],
        ["| source=a.py KNOB_X=2", "source=a.py KNOB_X=1"],
        ["| source=b.py KNOB_X=2", "source=a.py KNOB_X=2"],
    ]


@pytest.mark.parametrize(
    "command, words",
    [
        ("NEW=1,2 --source a.py,new.py", "a.py: it has no knob NEW, which another source has"),
        ("OTHER=1,2 --source a.py,new.py", "OTHER is not a knob"),
        ("PATH=1,2 --source a.py", "PATH is not a knob of this train_gpt.py, but in the environment"),
        ("TTT_LR=1,9 --source a.py", "source=a.py TTT_LR=9: TTT_LR=9: expected at most 1"),
        ("DATA_PATH=1,2 --source a.py", "DATA_PATH cannot be swept"),
        ("--source a.py,a.py", "are the same combination"),
        ("--source a.py,held.py", "HOLDOUT_TOKENS is 300 for source=a.py, 200 for source=held.py"),
        ("--source a.py,absent.py", "'absent.py': neither a file nor a git revision"),
        ("--source=a.py,--output=x", "neither a file nor a git revision"),
        ("--source broken.py", "it cannot be asked for its knobs: ZeroDivisionError"),
        ("--source other.py", "it has no CONFIGS, read_env, settings"),
        ("--source a.py --jobs 0", "--jobs 0: at least 1"),
        ("--source a.py --launcher absent-program", "--launcher 'absent-program'"),
    ],
)
def test_sources_that_cannot_race_are_refused_before_anything_ran(race, monkeypatch, capsys, command, words):
    monkeypatch.delenv("HOLDOUT_TOKENS")
    source(race, "a")
    source(race, "new", ("NEW",))
    source(race, "held", held=200)
    (race.folder / "broken.py").write_text("1 / 0\n")
    (race.folder / "other.py").write_text("print('hello')\n")
    assert end_in_a_line(lambda: sweep.main(command.split())) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert race.started() == []


def test_a_knob_of_the_environment_must_be_one_of_every_source(race, monkeypatch, capsys):
    source(race, "a")
    source(race, "new", ("NEW",))
    monkeypatch.setenv("NEW", "1")
    assert end_in_a_line(lambda: sweep.main(["--source", "a.py,new.py"])) == 2
    assert "a.py: it has no knob NEW" in capsys.readouterr().err


def test_a_source_may_be_a_git_revision(race, monkeypatch):
    repository = race.folder / "repository"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    contents = [source(race, name) for name in "ab"]
    for content in contents:
        (repository / "train_gpt.py").write_bytes(content)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    monkeypatch.setattr(sources, "REPOSITORY", repository)
    found = sources.find_sources("HEAD~1,HEAD,a.py")
    assert [(one.name, one.content) for one in found] == [
        ("HEAD~1", contents[0]),
        ("HEAD", contents[1]),
        ("a.py", contents[0]),
    ]


def test_the_sources_of_this_repository_can_be_asked(tiny_env):
    asked = sources.Source("now", train_gpt.code())
    env = tiny_env(RUN_ID=None)
    question = {"environments": [env, env | {"TTT_LR": "fast"}], "gpus": 1, "trains": True}
    said = sources.ask(asked, question)
    assert said == ask_source.answer(train_gpt, **question)
    assert said["settings"][0]["ITERATIONS"] == "3" and "TTT_LR='fast'" in said["settings"][1]
