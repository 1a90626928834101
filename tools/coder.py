"""
Arithmetic coding: symbols with predicted probabilities, to bytes and back.

A range coder (Martin 1979) with 64 bits of state that emits whole bytes; a carry is added to the bytes already emitted.
A symbol is an interval of integers within [0, TOTAL). Coding it costs log2(TOTAL / width) bits, and rounding adds less
than 2^-26 of a bit. `intervals` turns logits into such intervals deterministically.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import DataError, UserError

TOTAL_BITS = 28  # 16 bits would cost 1.8 % with 8,192 symbols; with 28 the cost of rounding is negligible
TOTAL = 1 << TOTAL_BITS
STATE_BYTES = 8
TOP = 1 << 8 * STATE_BYTES
RENORMALISE = TOP >> 8  # between two symbols the range lies in (RENORMALISE, TOP]


def intervals(logits: Tensor) -> np.ndarray:
    """Logits of n predictions (n, V) fp32 -> bounds (n, V + 1) int32, each row rising from 0 to TOTAL. Symbol s of a
    row gets bounds[s] to bounds[s + 1]: its share of TOTAL, rounded down, plus 1 so that every symbol can be coded.
    The remainder goes to the likeliest symbol (the first if tied).

    Computed on the device of the logits. On a GPU, a softmax of another shape may round differently, so encoder and
    decoder must batch the same predictions together."""
    probabilities = torch.softmax(logits.double(), 1)  # its own memory, whatever the layout of the logits
    if not torch.isfinite(probabilities).all():
        raise UserError("the model's logits are not finite: adaptation has diverged; lower TTT_LR")
    symbols = probabilities.size(1)
    widths = 1 + (probabilities * (TOTAL - symbols)).floor().long()
    ends = widths.cumsum(1)
    left_over = TOTAL - ends[:, -1:]
    likeliest = probabilities.argmax(1, keepdim=True)
    ends += left_over * (torch.arange(symbols, device=logits.device) >= likeliest)
    return F.pad(ends, (1, 0)).int().cpu().numpy()


class Encoder:
    """Call put() for every symbol, then finish()."""

    def __init__(self):
        self.low = 0  # the range is [low, low + range), below the bytes emitted so far
        self.range = TOP
        self.out = bytearray()

    def put(self, bounds: np.ndarray, symbol: int) -> None:
        begin, end = int(bounds[symbol]), int(bounds[symbol + 1])
        unit = self.range >> TOTAL_BITS
        self._raise_low(unit * begin)
        self.range = unit * (end - begin)
        while self.range <= RENORMALISE:
            self.out.append(self.low // RENORMALISE)
            self.low = self.low % RENORMALISE << 8
            self.range <<= 8

    def _raise_low(self, amount: int) -> None:
        """Add to `low`, and carry into the bytes already emitted."""
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
        """The shortest bytes that encode these symbols; the decoder reads zeros after them."""
        size = 0
        while -self.low % (TOP >> 8 * size) >= self.range:  # no number in the range ends in that many zero bytes
            size += 1
        self._raise_low(-self.low % (TOP >> 8 * size))
        self.out += self.low.to_bytes(STATE_BYTES, "big")[:size]
        return bytes(self.out)


class Decoder:
    """Call get() once per symbol put, with the same bounds."""

    def __init__(self, data: bytes):
        self.data = data
        self.read = STATE_BYTES  # bytes
        self.range = TOP
        self.offset = int.from_bytes(data[:STATE_BYTES].ljust(STATE_BYTES, b"\0"), "big")  # of the code in the range

    def get(self, bounds: np.ndarray) -> int:
        """The next symbol. Raises DataError if no encoder can have written it."""
        unit = self.range >> TOTAL_BITS
        place = self.offset // unit
        if place >= TOTAL or self.read > len(self.data) + STATE_BYTES:
            raise DataError("the coded text makes no sense: this computer does not predict what the encoder's did")

        # In the same dtype, so that numpy need not convert all bounds.
        symbol = int(np.searchsorted(bounds, bounds.dtype.type(place), side="right")) - 1
        begin, end = int(bounds[symbol]), int(bounds[symbol + 1])
        self.offset -= unit * begin
        self.range = unit * (end - begin)
        while self.range <= RENORMALISE:
            next_byte = self.data[self.read] if self.read < len(self.data) else 0
            self.offset = self.offset << 8 | next_byte
            self.range <<= 8
            self.read += 1
        return symbol
