"""Damaged and forged files are refused, or change no score; and what would change one is noticed."""

import time

import fuzz
import pytest

import train_gpt

SOME = {  # cases of each kind: a part of what `python tests/fuzz.py` tries
    "artifacts": 60,
    "older": 30,
    "broken": 60,
    "checkpoints": 45,
    "shards": 200,
    "compressed": 30,
    "documents": 500,
    "results": 250,
    "codec": 20,
}


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_files_are_refused_or_change_nothing(tmp_path, name):
    outcome = fuzz.run_cases(name, tmp_path, range(SOME[name]))
    assert outcome.failures == {}
    assert outcome.refused > SOME[name] / 3
    assert outcome.accepted > 0 or name == "broken"


class Harmful(fuzz.Kind):
    """One file is refused, the next five do harm, each in another way, and one only takes its time."""

    def read(self, chance):
        self.number += 1
        match self.number:
            case 1:
                raise train_gpt.DataError("refused")
            case 2:
                raise KeyError("name")
            case 3:
                raise AssertionError("another score")
            case 4:
                self.much = bytearray(b"x" * (64 << 20))
            case 5:
                with train_gpt.untrusted("file"):  # which takes most errors for the file's
                    time.sleep(10)
            case 6:
                while True:
                    pass
            case 7:
                time.sleep(0.2)  # while other programs run, perhaps

    number = 0


def test_what_does_harm_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz.KINDS, "harmful", Harmful)
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "MAX_BYTES", 32 << 20)
    outcome = fuzz.run_cases("harmful", tmp_path, range(8))
    assert (outcome.refused, outcome.accepted) == (1, 2) and list(outcome.failures) == [1, 2, 3, 4, 5]
    assert "KeyError" in outcome.failures[1] and "another score" in outcome.failures[2]
    assert "MiB of memory" in outcome.failures[3]
    assert "TooSlow" in outcome.failures[4] and "TooSlow" in outcome.failures[5]


def test_a_case_is_the_same_again(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(fuzz.BrokenArtifacts, "read_as_it_is", lambda self: written.append(self.path.read_bytes()))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        fuzz.run_cases("broken", tmp_path / name, range(7, 9))
    before, one, two, again_before, same, same_two = written
    assert (before, one, two) == (again_before, same, same_two) and one != two != before
