"""The arithmetic coder: what was put is got, at the price that the probabilities name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.coder import TOTAL, Decoder, Encoder, intervals
from train_gpt import DataError, UserError


def coded(bounds: list[np.ndarray], symbols: list[int]) -> bytes:
    encoder = Encoder()
    for b, s in zip(bounds, symbols, strict=True):
        encoder.put(b, s)
    return encoder.finish()


def decoded(bounds: list[np.ndarray], data: bytes) -> list[int]:
    decoder = Decoder(data)
    return [decoder.get(b) for b in bounds]


def cut_at(*places: int) -> np.ndarray:
    return np.array([0, *places, TOTAL])


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_length_is_the_sum_of_bits(sharpness):
    logits = sharpness * torch.randn(300, 1000)
    bounds = list(intervals(logits))
    symbols = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
    data = coded(bounds, symbols)
    bits = -logits.double().log_softmax(-1)[range(300), symbols].sum().item() / math.log(2)
    assert decoded(bounds, data) == symbols
    assert bits - 1 <= 8 * len(data) <= bits * 1.0002 + 16  # a symbol's 1 of TOTAL parts takes 1,000 / 2^28 of the rest


@given(st.lists(st.tuples(st.integers(1, TOTAL - 2), st.integers(0, 2)), max_size=60))
@settings(max_examples=200)
def test_any_intervals_round_trip(steps):
    """Intervals of 1 part in 2^28 among them, at either end and in the middle."""
    bounds = [cut_at(place, place + 1) for place, _ in steps]
    symbols = [symbol for _, symbol in steps]
    assert decoded(bounds, coded(bounds, symbols)) == symbols


def test_carry_runs_through_a_row_of_full_bytes():
    middle = cut_at(TOTAL // 2 - 1, TOTAL // 2 + 1)  # symbol 1 straddles the middle: 0x7fff... or 0x8000...
    for ending in (0, 2):
        symbols = [1] * 40 + [ending]
        assert decoded([middle] * 41, coded([middle] * 41, symbols)) == symbols


def test_no_symbol_no_bytes():
    assert coded([], []) == b""
    assert coded([cut_at()], [0]) == b""  # what is certain costs nothing


def test_every_symbol_has_a_part_and_all_have_the_total():
    logits = torch.tensor([0.0, 500.0, -500.0, -math.inf, 500.0])
    (bounds,) = intervals(logits[None])
    assert np.diff(bounds).min() == 1 and bounds[0] == 0 and bounds[-1] == TOTAL
    assert np.diff(bounds)[1] >= np.diff(bounds)[4] > TOTAL // 3


ODD = [
    torch.zeros(301),
    torch.full((301,), -math.inf).index_fill(0, torch.tensor([4, 77]), 0.0),
    torch.linspace(-800, 800, 301),
    torch.tensor([1e-30, 1.0] * 150 + [1.0]),
]


def intervals_of_one(logits: torch.Tensor) -> np.ndarray:
    """The formula, in numpy, for (V,): files compressed on a CPU depend on it."""
    probabilities = torch.softmax(logits.double(), 0).numpy()
    widths = 1 + np.floor(probabilities * (TOTAL - len(probabilities))).astype(np.int64)
    widths[np.argmax(probabilities)] += TOTAL - widths.sum()
    return np.concatenate([[0], np.cumsum(widths)])


def test_intervals_depend_on_the_values_alone():
    """Not on what is asked for beside them, nor on where the logits lie."""
    rows = torch.cat([torch.randn(7, 301) * 5, torch.stack(ODD)])
    together = intervals(rows)
    assert together.shape == (11, 302)
    for row, bounds in zip(rows, together, strict=True):
        assert (bounds == intervals_of_one(row)).all()
        assert (bounds == intervals(row[None])).all()
    places = torch.randn(11, 4, 301).index_copy(1, torch.tensor([2]), rows[:, None])
    assert (intervals(places[:, 2]) == together).all()
    assert (intervals(places[np.array([1, 9]), 2]) == together[[1, 9]]).all()


@pytest.mark.gpu
def test_intervals_on_a_gpu_have_a_part_for_every_symbol_and_repeat():
    rows = torch.cat([torch.randn(124, 301) * 5, torch.stack(ODD)]).cuda()
    bounds = intervals(rows)
    assert np.diff(bounds).min() >= 1 and (bounds[:, 0] == 0).all() and (bounds[:, -1] == TOTAL).all()
    assert (intervals(rows.clone()) == bounds).all()
    expected = np.stack([intervals_of_one(row) for row in rows.cpu()])
    assert np.abs(bounds - expected).max() < 700  # a row's widths may each be rounded the other way


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="TTT_LR"):
        intervals(torch.tensor([[0.0, 1.0], [0.0, math.nan]]))


def test_data_that_ends_early_is_noticed():
    bounds = [cut_at(1)] * 40  # symbol 0 costs 28 bits
    data = coded(bounds, [0, 1] * 20)
    with pytest.raises(DataError):
        decoded(bounds * 40, data)
