"""
Arithmetic coding: symbols and the probabilities they were given, to bytes and back.

A range coder with a state of 64 bits that puts out whole bytes; a carry is added to what has been put out. A symbol is
an interval of whole numbers within [0, TOTAL); coding it costs log2(TOTAL / its width) bits, and rounding adds less
than 2^-26 of a bit. `intervals` makes such numbers from logits, always the same from the same logits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from train_gpt import DataError, UserError

TOTAL_BITS = 28  # 2^16 would cost 1.8 % at 8,192 symbols; here what rounding costs is beyond notice
TOTAL = 1 << TOTAL_BITS
STATE_BYTES = 8
TOP, RENEW = 1 << 8 * STATE_BYTES, 1 << 8 * (STATE_BYTES - 1)  # the range lies in (RENEW, TOP] between two symbols


def intervals(logits: Tensor) -> np.ndarray:
    """Logits of one prediction (V,) fp32 on the CPU -> bounds (V + 1,) int64, rising from 0 to TOTAL. Symbol s gets
    bounds[s] to bounds[s + 1]: its probability in parts of TOTAL, rounded down, and 1 so that all can be coded.
    What is left over goes to the likeliest symbol, the first of equals.

    One prediction at a time, in memory of its own: a vector kernel may treat the end of an array, or an array that lies
    elsewhere, in another way, and encoder and decoder hold this prediction in different arrays."""
    odds = torch.softmax(logits.double(), 0).numpy()
    if not np.isfinite(odds).all():
        raise UserError("the model's scores are no numbers any more: adaptation diverged, lower TTT_LR")
    widths = 1 + np.floor(odds * (TOTAL - len(odds))).astype(np.int64)
    widths[np.argmax(odds)] += TOTAL - widths.sum()
    return np.concatenate([[0], np.cumsum(widths)])


class Encoder:
    """put() every symbol, then finish()."""

    def __init__(self):
        self.low, self.range, self.out = 0, TOP, bytearray()

    def put(self, bounds: np.ndarray, symbol: int) -> None:
        begin, end = int(bounds[symbol]), int(bounds[symbol + 1])
        part = self.range >> TOTAL_BITS
        self._raise(part * begin)
        self.range = part * (end - begin)
        while self.range <= RENEW:
            self.out.append(self.low // RENEW)
            self.low = self.low % RENEW << 8
            self.range <<= 8

    def _raise(self, amount: int) -> None:
        """Add to the number that is put out, the part that is out already included."""
        self.low += amount
        if self.low < TOP:
            return
        self.low -= TOP
        at = len(self.out) - 1
        while self.out[at] == 255:
            self.out[at] = 0
            at -= 1
        self.out[at] += 1

    def finish(self) -> bytes:
        """The shortest bytes that stand for these symbols; the decoder reads zeros after them."""
        size = 0
        while -self.low % (TOP >> 8 * size) >= self.range:
            size += 1
        self._raise(-self.low % (TOP >> 8 * size))
        self.out += self.low.to_bytes(STATE_BYTES, "big")[:size]
        return bytes(self.out)


class Decoder:
    """get() as many symbols as were put, with the same bounds."""

    def __init__(self, data: bytes):
        self.data, self.read, self.range = data, STATE_BYTES, TOP
        self.offset = int.from_bytes(data[:STATE_BYTES].ljust(STATE_BYTES, b"\0"), "big")  # of the number in the range

    def get(self, bounds: np.ndarray) -> int:
        """The next symbol. Raises DataError where no encoder can have put one."""
        part = self.range >> TOTAL_BITS
        place = self.offset // part
        if place >= TOTAL or self.read > len(self.data) + STATE_BYTES:
            raise DataError("the coded text makes no sense: this computer does not predict what the encoder's did")
        symbol = int(np.searchsorted(bounds, place, side="right")) - 1
        begin, end = int(bounds[symbol]), int(bounds[symbol + 1])
        self.offset -= part * begin
        self.range = part * (end - begin)
        while self.range <= RENEW:
            following = self.data[self.read] if self.read < len(self.data) else 0
            self.offset = self.offset << 8 | following
            self.range <<= 8
            self.read += 1
        return symbol
