"""Races of tokenizers: the same documents are held out for each, and their bytes are those of the text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from stand_in import HELD, sweep_here, training_tokens

import train_gpt
from tools import sweep
from tools.artifact import end_in_a_line
from tools.results import load_run
from tools.texts import find_texts


@pytest.fixture
def other_data(tiny_data, tmp_path, train_tokenizer, write_shard):
    """other_data(name, change=None): the text of tiny_data under a tokenizer of 80 pieces with spaces inside; `change`
    edits the list of documents."""

    def prepare(name: str, change=None) -> Path:
        ours = sentencepiece.SentencePieceProcessor(str(tiny_data / "tokenizer.model"))
        blob = train_tokenizer(vocab_size=80, user_defined_symbols="e▁,s▁")
        theirs = sentencepiece.SentencePieceProcessor(model_proto=blob)
        assert any("▁" in theirs.id_to_piece(i)[1:] for i in range(80))
        documents = np.split(training_tokens(tiny_data), np.flatnonzero(training_tokens(tiny_data) == train_gpt.BOS))
        texts = [ours.decode(document[1:].tolist()) for document in documents if len(document)]
        if change:
            change(texts)
        tokens = [token for text in texts for token in (train_gpt.BOS, *theirs.encode(text))]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(blob)
        (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"path": "tokenizer.model"}}))
        for i, part in enumerate((tokens[:900], tokens[900:])):
            write_shard(folder / f"fineweb_train_{i:06}.bin", part)
        shutil.copy(tiny_data / "fineweb_val_000000.bin", folder)
        return folder

    return prepare


def test_the_same_documents_are_held_out_for_every_tokenizer(tiny_data, other_data, monkeypatch):
    monkeypatch.setenv("HOLDOUT_TOKENS", str(HELD))
    other = other_data("other")
    first, second = find_texts(f"{tiny_data},{other}")
    assert (first.vocab_size, first.held, second.vocab_size) == (64, HELD, 80) and second.held != HELD
    assert second.env()["HOLDOUT_TOKENS"] == str(second.held) and second.knobs() == {"data": str(other)}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda texts: texts.__setitem__(-3, "another text"), "1 of the last"),
        (lambda texts: texts.pop(-3), "of the last"),
        (lambda texts: texts.__delitem__(slice(0, -4)), "it holds fewer than"),
    ],
)
def test_another_text_is_refused(tiny_data, other_data, monkeypatch, change, words):
    monkeypatch.setenv("HOLDOUT_TOKENS", str(HELD))
    with pytest.raises(train_gpt.DataError, match=words):
        find_texts(f"{tiny_data},{other_data('other', change)}")


def test_a_folder_that_is_given_twice_is_told_as_that(tiny_data):
    with pytest.raises(train_gpt.ConfigError, match="is given twice"):
        find_texts(f"{tiny_data},{tiny_data}")


@pytest.mark.parametrize("option", [["--eval", "a.ptz"], ["--on", "validation"], ["--screen"]])
def test_data_goes_with_training_and_held_out_text_alone(capsys, option):
    assert end_in_a_line(lambda: sweep.main(["--data", "a,b", "A=0,1", *option])) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.slow
def test_tokenizers_race_in_bits_per_original_byte(tiny_data, tiny_env, other_data, tmp_path):
    other_data("other")
    env = tiny_env(HOLDOUT_TOKENS=str(2 * HELD), RUN_ID=None, SEED=None, VOCAB_SIZE=None, DATA_PATH=None)
    command = ["--data", "data,other", "--train-only", "--name", "two"]
    out = sweep_here(tmp_path, env, *command)
    runs = [load_run(path, train_only=True) for path in (tmp_path / "logs/sweeps/two").glob("*.json")]
    assert sorted(run.result["knobs"]["VOCAB_SIZE"] for run in runs) == ["64", "80"]
    assert all((run.bytes == runs[0].bytes).all() for run in runs) and len({run.tokens.sum() for run in runs}) == 2
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| data=other")]
    assert [line[1:3] for line in lines] == [["data=data", "1337"], ["data=data", "all 1"]]
    assert all("[" in line[3] for line in lines)
    assert "running" not in sweep_here(tmp_path, env, *command)
