"""The entropy coder: what was put is taken, at the price that the frequencies name; what is damaged is refused."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    FREQUENCY_SUM,
    MAX_LANES,
    SYMBOLS_PER_LANE,
    DataError,
    FrequencyTables,
    RansDecoder,
    RansEncoder,
    nearest_frequencies,
)

Calls = list[tuple[np.ndarray, np.ndarray]]  # symbols and contexts of each call


@contextlib.contextmanager
def many_lanes() -> Iterator[None]:
    """Makes short streams, too, have many lanes; decorates a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "SYMBOLS_PER_LANE", 16)
        yield


def lanes_of(data: bytes) -> int:
    return int.from_bytes(data[:2], "little")


def encoded(tables: FrequencyTables, calls: Calls) -> bytes:
    encoder = RansEncoder(tables)
    for symbols, contexts in calls:
        encoder.put(symbols, contexts)
    return encoder.finish()


def decoded(tables: FrequencyTables, data: bytes, contexts: list[np.ndarray]) -> list[np.ndarray]:
    decoder = RansDecoder(data, tables)
    symbols = [decoder.take(c) for c in contexts]
    decoder.finish()
    return symbols


def assert_round_trip(tables: FrequencyTables, calls: Calls) -> bytes:
    data = encoded(tables, calls)
    got = decoded(tables, data, [contexts for _, contexts in calls])
    assert [g.tolist() for g in got] == [symbols.tolist() for symbols, _ in calls]
    return data


def counts_of(calls: Calls, tables: int, alphabet: int) -> np.ndarray:
    counts = np.zeros((tables, alphabet), np.int64)
    for symbols, contexts in calls:
        np.add.at(counts, (contexts, symbols), 1)
    return counts


def bell_calls(*sizes: int, tables: int = 6, alphabet: int = 41, seed: int = 0) -> Calls:
    """Calls of these sizes; the symbols of context c are Gaussian, 2^(c/2) / 2 wide, around the middle."""
    chance = np.random.default_rng(seed)
    calls = []
    for n in sizes:
        contexts = chance.integers(0, tables, n)
        symbols = np.rint(chance.standard_normal(n) * 2 ** (contexts / 2) / 2).astype(np.int64) + alphabet // 2
        calls.append((symbols.clip(0, alphabet - 1), contexts))
    return calls


def entropy_bits(counts: np.ndarray) -> float:
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    return -float((counts * np.log2(np.where(shares > 0, shares, 1))).sum())


# ---- frequencies ----


def bits(counts: np.ndarray, frequencies: np.ndarray) -> float:
    return -float((counts * np.log2(frequencies.clip(1) / FREQUENCY_SUM)).sum())


@given(st.lists(st.integers(0, 10**6) | st.integers(0, 3), min_size=1, max_size=40))
def test_frequencies_have_the_sum_and_a_slot_for_every_symbol(counts):
    counts = np.array(counts)
    frequencies = nearest_frequencies(counts)
    assert frequencies.sum() == (FREQUENCY_SUM if counts.any() else 0)
    assert ((frequencies > 0) == (counts > 0)).all()


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40))
@settings(max_examples=50)
def test_frequencies_are_nearly_proportional(counts):
    """What rounding costs is little beside the entropy."""
    counts = np.array(counts)
    if counts.any():
        share = counts / counts.sum()
        entropy = -(share * np.log2(np.where(counts > 0, share, 1))).sum()
        assert bits(counts, nearest_frequencies(counts)) <= counts.sum() * (entropy + 0.01)


@pytest.mark.parametrize("rare", [1, 3])
def test_many_rare_symbols_leave_a_slot_to_each(rare):
    """Together they ask for more slots than there would be without taking some from the frequent ones."""
    counts = np.r_[np.full(8000, rare), np.full(192, 100 * rare)]
    frequencies = nearest_frequencies(counts)
    assert frequencies.sum() == FREQUENCY_SUM and frequencies.min() == 1


def test_frequencies_of_the_largest_alphabet_and_of_large_counts():
    ones = np.ones(1024, np.int64)
    assert (nearest_frequencies(ones) == FREQUENCY_SUM // 1024).all()

    one_is_frequent = ones.copy()
    one_is_frequent[500] = 2**31 - 2000
    frequencies = nearest_frequencies(one_is_frequent)
    assert frequencies[500] == FREQUENCY_SUM - 1023 and frequencies.min() == 1


# ---- round trips ----


@st.composite
def any_calls(draw) -> tuple[np.ndarray, Calls]:
    """Counts of any kind, and calls of any sizes with symbols that these counts allow."""
    tables = draw(st.integers(1, 4))
    alphabet = draw(st.integers(1, 30))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([1, 2, 1000, 10**7]))
    counts = chance.integers(0, largest, (tables, alphabet), endpoint=True)
    counts[:, draw(st.integers(0, alphabet - 1))] += 1
    calls = []
    for n in draw(st.lists(st.integers(0, 40) | st.just(500), max_size=6)):
        contexts = chance.integers(0, tables, n)
        symbols = np.array([chance.choice(np.flatnonzero(counts[c])) for c in contexts], np.int64)
        calls.append((symbols, contexts))
    return counts, calls


@given(any_calls())
@settings(max_examples=100)
def test_what_was_put_is_taken_from_one_lane(drawn):
    counts, calls = drawn
    assert lanes_of(assert_round_trip(FrequencyTables.from_counts(counts), calls)) == 1


@given(any_calls())
@settings(max_examples=100)
@many_lanes()
def test_what_was_put_is_taken_from_many_lanes(drawn):
    counts, calls = drawn
    assert_round_trip(FrequencyTables.from_counts(counts), calls)


@many_lanes()
@pytest.mark.parametrize("size", [0, 1, MAX_LANES - 1, MAX_LANES, MAX_LANES + 1, 3 * MAX_LANES + 7])
def test_calls_around_the_number_of_lanes(size):
    calls = bell_calls(5, 16 * MAX_LANES, size, 3)
    tables = FrequencyTables.from_counts(counts_of(calls, 6, 41))
    data = assert_round_trip(tables, calls)
    assert lanes_of(data) == MAX_LANES


def test_no_symbols():
    tables = FrequencyTables.from_counts(np.ones((1, 3), np.int64))
    for calls in ([], bell_calls(0), bell_calls(0, 0)):
        assert len(assert_round_trip(tables, calls)) == 6


def test_a_symbol_that_is_certain_costs_nothing():
    tables = FrequencyTables.from_counts(np.array([[0, 7, 0], [0, 0, 0]]))
    assert tables.frequencies.tolist() == [[0, FREQUENCY_SUM, 0], [0, 0, 0]]
    calls = [(np.ones(n, np.int64), np.zeros(n, np.int64)) for n in (3, 10_000, 1)]
    data = assert_round_trip(tables, calls)
    assert len(data) == 2 + 4 * lanes_of(data)


def test_rare_symbols_in_a_row():
    tables = FrequencyTables.from_counts(np.array([[1, 10**9, 1]]))
    symbols = np.resize([0, 2, 2, 1], 20_000)
    assert_round_trip(tables, [(symbols, np.zeros_like(symbols))])


def test_symbols_and_contexts_may_be_of_any_integer_type():
    (call,) = bell_calls(3000)
    tables = FrequencyTables.from_counts(counts_of([call], 6, 41))
    data = assert_round_trip(tables, [call])
    for kind in (np.uint8, np.int8, np.int16, np.uint32, np.uint64):
        assert assert_round_trip(tables, [tuple(a.astype(kind) for a in call)]) == data


def test_contexts_may_depend_on_symbols_of_earlier_calls():
    """As in a trellis, where the parities of symbols choose the next table."""
    chance = np.random.default_rng(0)
    tables = FrequencyTables.from_counts(chance.integers(0, 50, (4, 16)) + 1)
    symbols = chance.integers(0, 16, (30, 500))
    encoder = RansEncoder(tables)
    state = np.zeros(500, np.int64)
    for row in symbols:
        encoder.put(row, state)
        state = 2 * (state & 1) + (row & 1)

    decoder = RansDecoder(encoder.finish(), tables)
    state = np.zeros(500, np.int64)
    for row in symbols:
        got = decoder.take(state)
        assert (got == row).all()
        state = 2 * (state & 1) + (got & 1)
    decoder.finish()


# ---- size ----


@pytest.mark.parametrize("size", [300, 5000, 200_000, 1_000_000])
def test_the_size_is_the_entropy_and_what_lanes_cost(size):
    calls = bell_calls(*[5000] * (size // 5000), size % 5000)
    counts = counts_of(calls, 6, 41)
    data = encoded(FrequencyTables.from_counts(counts), calls)
    ideal = entropy_bits(counts) / 8
    assert ideal < len(data) < 1.0003 * ideal + 6 * lanes_of(data)
    assert lanes_of(data) <= max(1, size / SYMBOLS_PER_LANE)


def test_lanes_follow_the_number_of_symbols_and_the_largest_call():
    tables = FrequencyTables.from_counts(np.ones((1, 4), np.int64))

    def lanes(*sizes: int) -> int:
        calls = [(np.zeros(n, np.int64), np.zeros(n, np.int64)) for n in sizes]
        return lanes_of(encoded(tables, calls))

    assert lanes(100) == 1
    assert lanes(10 * SYMBOLS_PER_LANE) == 10
    assert lanes(*[4] * 10 * SYMBOLS_PER_LANE) == 4
    assert lanes((MAX_LANES + 5) * SYMBOLS_PER_LANE) == MAX_LANES


def test_the_stream_is_the_same_on_every_machine():
    counts = np.array([[(13 * s * s + 7 * c) % 101 for s in range(33)] for c in range(5)])
    contexts = np.arange(20_000) % 5
    allowed = [np.flatnonzero(row) for row in counts]
    symbols = np.array([allowed[c][(i * i + 3 * i) % len(allowed[c])] for i, c in enumerate(contexts)])
    tables = FrequencyTables.from_counts(counts)
    data = assert_round_trip(tables, [(symbols[:7], contexts[:7]), (symbols[7:], contexts[7:])])
    digest = hashlib.sha256(tables.frequencies.astype("<u2").tobytes() + data).hexdigest()
    assert digest[:16] == "029b5c124f3c6328"


# ---- what the encoder refuses ----


@pytest.mark.parametrize(
    "symbols, contexts, message",
    [
        ([3], [0], "symbol 3 has no frequency in the table of context 0"),
        ([0], [1], "symbol 0 has no frequency in the table of context 1"),
        ([4], [0], "out of range: there are 2 tables of 4 symbols"),
        ([-1], [0], "out of range"),
        ([0], [2], "out of range"),
        ([0], [-1], "out of range"),
        ([0, 1], [0], "expected one dimension and one length"),
        ([[0]], [[0]], "expected one dimension and one length"),
    ],
)
def test_the_encoder_refuses_what_no_table_holds(symbols, contexts, message):
    tables = FrequencyTables.from_counts(np.array([[5, 1, 1, 0], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=message):
        RansEncoder(tables).put(np.array(symbols), np.array(contexts))


def test_numbers_that_are_no_integers_are_refused():
    tables = FrequencyTables.from_counts(np.ones((1, 4), np.int64))
    data = encoded(tables, [(np.array([1]), np.array([0]))])
    with pytest.raises(TypeError, match="float64"):
        RansEncoder(tables).put(np.array([1.5]), np.array([0]))
    with pytest.raises(TypeError, match="float64"):
        RansDecoder(data, tables).take(np.array([0.5]))


# ---- damage ----


def small_stream() -> tuple[FrequencyTables, bytes, list[np.ndarray]]:
    """With many_lanes: 33 of them, for 540 symbols."""
    calls = bell_calls(60, 0, 400, 80)
    tables = FrequencyTables.from_counts(counts_of(calls, 6, 41))
    return tables, encoded(tables, calls), [contexts for _, contexts in calls]


@many_lanes()
def test_a_flipped_byte_is_noticed_or_makes_the_stream_of_other_symbols():
    """This holds without the checksum of the container, which notices every one."""
    tables, data, contexts = small_stream()
    assert lanes_of(data) > 30
    noticed = 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        try:
            symbols = decoded(tables, bytes(damaged), contexts)
        except DataError as error:
            noticed += 1
            assert str(error).startswith("coded symbols: ")
        else:
            assert encoded(tables, list(zip(symbols, contexts, strict=True))) == bytes(damaged)
    assert noticed > 0.9 * len(data)


@many_lanes()
def test_every_truncation_and_addition_is_noticed():
    tables, data, contexts = small_stream()
    longer = [data + more for more in (b"\0", b"\0\0", data)]
    for wrong in [*longer, *(data[:end] for end in range(len(data)))]:
        with pytest.raises(DataError, match="coded symbols: "):
            decoded(tables, wrong, contexts)


@many_lanes()
def test_too_few_or_too_many_symbols_are_noticed():
    tables, data, contexts = small_stream()
    with pytest.raises(DataError, match="left over"):
        decoded(tables, data, contexts[:-2])
    with pytest.raises(DataError, match="ends early"):
        decoded(tables, data, contexts + contexts)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "0 lanes, expected 1 to"),
        (bytes(6), "0 lanes"),
        (b"\xff\xff" + bytes(4 * 0xFFFF), "65535 lanes"),
        (b"\x02\0" + b"\xff" * 4, "cut short, 6 bytes"),
        (b"\x01\0" + b"\xff" * 5, "cut short, 7 bytes"),
        (b"\x01\0" + b"\xff\xff\0\0", "a state is too small"),
    ],
)
def test_a_forged_beginning_is_refused(data, message):
    tables = FrequencyTables.from_counts(np.ones((1, 4), np.int64))
    with pytest.raises(DataError, match=f"coded symbols: {message}"):
        RansDecoder(data, tables)


@given(st.binary(max_size=400), st.integers(1, 20))
@settings(max_examples=200)
def test_any_bytes_decode_to_symbols_of_the_tables_or_are_refused(body, lanes):
    tables = FrequencyTables.from_counts(np.array([[0, 9, 100, 0], [0, 0, 0, 0], [3, 0, 0, 1]]))
    contexts = np.resize([0, 2, 2], 500)
    try:
        decoder = RansDecoder(lanes.to_bytes(2, "little") + body, tables)
        symbols = decoder.take(contexts)
    except DataError:
        return
    assert tables.frequencies[contexts, symbols].all()
    assert (decoder.states >= 1 << 16).all()


@pytest.mark.parametrize("context", [-1, 1, 2])
def test_the_decoder_refuses_contexts_without_a_table(context):
    tables = FrequencyTables.from_counts(np.array([[5, 1], [0, 0]]))
    data = encoded(tables, [(np.array([0]), np.array([0]))])
    with pytest.raises(DataError, match="a context for which there is no table"):
        RansDecoder(data, tables).take(np.array([0, context]))


# ---- tables as bytes ----


@given(any_calls())
def test_tables_are_read_back(drawn):
    counts, _ = drawn
    tables = FrequencyTables.from_counts(counts)
    got = FrequencyTables.from_bytes(tables.to_bytes(), *counts.shape)
    assert (got.frequencies == tables.frequencies).all() and (got.in_use == tables.in_use).all()


def test_80_tables_of_40_symbols_take_5_kilobytes():
    widths = np.geomspace(1, 10, 80)[np.random.default_rng(0).permutation(80), None]
    counts = (1e6 * np.exp(-(((np.arange(600) - 300) / widths) ** 2) / 2)).astype(np.int64)
    assert 40 <= (counts > 0).sum(1).mean() < 50
    assert len(FrequencyTables.from_counts(counts).to_bytes()) < 5000


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def planes(*rows: list[int]) -> bytes:
    numbers = np.array(rows, "<u2")
    return (numbers & 255).astype(np.uint8).tobytes() + (numbers >> 8).astype(np.uint8).tobytes()


HOSTILE = {
    "no frame": b"",
    "another file": b"PGOLF" * 9,
    "cut short": frame(planes([FREQUENCY_SUM, 0], [0, 0]))[:-2],
    "too small": frame(planes([FREQUENCY_SUM, 0])),
    "too large": frame(planes([FREQUENCY_SUM, 0], [0, 0], [0, 0])),
    "of no known size": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8)),
    "a bomb": frame(bytes(1 << 24)),
    "a sum too low": frame(planes([FREQUENCY_SUM, 0], [FREQUENCY_SUM - 1, 0])),
    "a sum too high": frame(planes([FREQUENCY_SUM, 1], [0, 0])),
    "a sum that would be right in 16 bits": frame(planes([65535, FREQUENCY_SUM + 1], [0, 0])),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tables_are_refused(data):
    with pytest.raises(DataError, match="frequency tables: "):
        FrequencyTables.from_bytes(data, tables=2, alphabet=2)
