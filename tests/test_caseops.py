"""CaseOps loses nothing, and knows for how many bytes of the original each of its characters stands."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.prepare import caseops_bytes, decode_caseops, encode_caseops, utf8_sizes

T, A, C, E = TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001\ue002\ue003\ue004"
TEXT = st.text(
    st.one_of(st.sampled_from(f"aAbBzZ {T}{A}{C}{E}\u2581éÉ0_'\n\0"), st.characters(exclude_categories=["Cs"]))
)


@pytest.mark.parametrize(
    "text, encoded",
    [
        ("", ""),
        ("word", "word"),
        ("Word", f"{T}word"),
        ("WORD", f"{A}word"),
        ("A", f"{T}a"),
        ("AB", f"{A}ab"),
        ("iPhone", f"i{C}phone"),
        ("McDonald", f"{T}mc{C}donald"),
        ("ABc", f"{T}a{C}bc"),
        ("aBC", f"a{C}b{C}c"),
        ("U.S.A.", f"{T}u.{T}s.{T}a."),
        ("X1Y", f"{T}x1{T}y"),
        ("Élan ÉLAN", f"É{'lan'} É{A}lan"),
        ("naïveTest", f"naïve{C}test"),
        (f"a{T}B", f"a{E}{T}{T}b"),
        (f"{E}{E}", f"{E}{E}{E}{E}"),
    ],
)
def test_spelling(text, encoded):
    assert encode_caseops(text) == encoded
    assert decode_caseops(encoded) == text


@given(TEXT)
@example(f"{A}{E}A{E}Ab{T}{T}AB{C}")
def test_decoding_gives_the_text_back(text):
    encoded = encode_caseops(text)
    assert decode_caseops(encoded) == text
    assert not re.search("[A-Z]", encoded)


@given(TEXT)
def test_bytes_are_those_of_the_original(text):
    assert utf8_sizes(text).tolist() == [len(c.encode()) for c in text]
    encoded = encode_caseops(text)
    weights = caseops_bytes(encoded).tolist()
    assert sum(weights) == len(text.encode())
    visible = [w for w in weights if w]
    assert visible == [len(c.encode()) for c in text]  # a marker stands for nothing, every other character for itself


@pytest.mark.parametrize("text", ["a" * 300_000 + "B", "A" * 300_000 + "b", f"{E}" * 300_000, "aB" * 150_000])
def test_long_runs_take_no_longer_than_other_text(text):
    begin = time.process_time()
    assert decode_caseops(encode_caseops(text)) == text
    assert time.process_time() - begin < 5
