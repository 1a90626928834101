"""Held-out training documents: which they are, and what cannot be held out."""

import json
import random

import numpy as np
import pytest
from stand_in import HELD, tokenizer_of, training_tokens

import train_gpt
from data import prepare
from tools.holdout import caseops_sidecar, make_holdout


def test_the_documents_are_the_held_out_ones_and_training_never_reads_them(tiny_data, tiny_run, tmp_path):
    facts = make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")
    whole = training_tokens(tiny_data)
    run = tiny_run(data_path=str(tmp_path / "held"), holdout_tokens=HELD)
    docs = train_gpt.load_validation(run.data_path, 64, tokenizer_of(tmp_path / "held"))
    starts = np.flatnonzero(whole == train_gpt.BOS)
    inside = starts[starts >= len(whole) - HELD]
    assert docs.tokens.tolist() == whole[inside[0] : inside[-1]].tolist()
    assert len(docs) == facts["documents"] == len(inside) - 1 > 3
    stream = train_gpt.TrainingStream(run, 64, train_gpt.Dist())
    assert stream.read(0, 3 * len(whole)).tolist() == np.resize(whole[:-HELD], 3 * len(whole)).tolist()
    text = tokenizer_of(tiny_data).processor.decode(docs.tokens[1 : docs.starts[1]].tolist())
    assert docs.target_bytes()[0] == len(text.encode())
    assert [p for p in (tmp_path / "held").iterdir() if "bytes" in p.name] == []


def test_a_finished_folder_is_kept_and_another_hold_out_replaces_it(tiny_data, tmp_path):
    held = tmp_path / "held"
    tokenizer = tokenizer_of(tiny_data)
    make_holdout(tiny_data, tokenizer, HELD, held)
    before = (held / "manifest.json").stat()
    make_holdout(tiny_data, tokenizer, HELD, held)
    assert (held / "manifest.json").stat() == before
    tokens = len(train_gpt.read_shard(held / "fineweb_val_000000.bin"))
    make_holdout(tiny_data, tokenizer, 2 * HELD, held)
    assert len(train_gpt.read_shard(held / "fineweb_val_000000.bin")) > tokens + HELD / 2
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_with_caseops_a_document_weighs_its_original_bytes(tmp_path):
    chance = random.Random(0)
    words = ["Word", "wORD", "NASA", "\ue001x", "naïve", "\u2581", "one\n two"]
    texts = [f"{i} " + " ".join(chance.choices(words, k=chance.randint(1, 60))) for i in range(120)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "val.jsonl").write_text(json.dumps("A text FOR Validation") + "\n")
    command = ["jsonl", str(tmp_path / "texts.jsonl"), "--val", str(tmp_path / "val.jsonl"), "--vocab-size", "320"]
    assert prepare.main([*command, "--out", str(tmp_path), "--workers", "1"]) == 0
    data = tmp_path / "datasets" / "jsonl"
    held = tmp_path / "held"
    tokenizer = tokenizer_of(data, 320)
    tokens = train_gpt.read_shard(data / "fineweb_val_000000.bin")
    written = train_gpt.read_shard(data / "fineweb_val_bytes_000000.bin")
    assert caseops_sidecar(np.asarray(tokens), tokenizer).tolist() == written.tolist()
    make_holdout(data, tokenizer, 2000, held)
    docs = train_gpt.load_validation(str(held), 320, tokenizer_of(held, 320))
    last = texts[-len(docs) - 1 : -1]
    assert len(docs) > 5 and docs.target_bytes().tolist() == [len(text.encode()) for text in last]


@pytest.mark.parametrize("held, words", [(0, "HOLDOUT_TOKENS=0"), (1501, "holds 1500"), (2, "no whole document")])
def test_a_hold_out_that_cannot_be_made_is_refused(tiny_data, tmp_path, held, words):
    with pytest.raises(train_gpt.UserError, match=words):
        make_holdout(tiny_data, tokenizer_of(tiny_data), held, tmp_path / "held")
    assert not (tmp_path / "held").exists()


def test_a_held_out_token_of_another_tokenizer_is_named_with_its_shard(tiny_data, tmp_path, write_shard):
    path = tiny_data / "fineweb_train_000002.bin"
    write_shard(path, [*train_gpt.read_shard(path)[:-5].tolist(), 64, 3, 3, 3, 3])
    with pytest.raises(train_gpt.DataError, match=f"{path}: token 64 at position 695"):
        make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")


def test_bytes_of_transformed_text_are_not_guessed(tiny_data, tmp_path, write_shard):
    write_shard(tiny_data / "fineweb_val_bytes_000000.bin", [1])
    with pytest.raises(train_gpt.DataError, match="how its text was transformed"):
        make_holdout(tiny_data, tokenizer_of(tiny_data), HELD, tmp_path / "held")
