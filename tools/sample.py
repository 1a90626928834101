"""
Generate text from an artifact: it continues a prompt, without adaptation.

    ./run.sh sample                     from the beginning of a document
    ./run.sh sample "def main("         from a prompt; `-` reads it from standard input

The text ends where the model ends the document, or after --tokens. On one computer, the same seed gives the same text.
Runs on the CPU.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import train_gpt
from data.prepare import ALLCAPS, CAPNEXT, ESCAPE, TITLE
from tools import codec
from tools.artifact import end_in_a_line, find_artifact
from tools.values import printable
from train_gpt import BOS

UNFINISHED = TITLE + ALLCAPS + CAPNEXT + ESCAPE + "\ufffd"  # at the end, they may read differently with the next token
CHUNK = 16  # most tokens of the prompt that are read at a time


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Logits (V,) -> a token sampled from the likeliest tokens, whose probabilities add up to top_p (nucleus sampling,
    arXiv:1904.09751); at temperature 0, the likeliest token."""
    if temperature == 0:
        return int(logits.argmax())
    gaps = (logits - logits.max()).double()  # at most 0, and in double precision no temperature rounds to 0
    probabilities, order = (gaps / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def continued(
    predictor: codec.Predictor, tokens: list[int], temperature: float, top_p: float, seed: int
) -> Iterator[int]:
    """Sample the continuation of these first tokens of a document, without end. Each pass runs only the new tokens,
    which attend to the cached keys and values of the tokens before: EVAL_SEQ_LEN of them, minus a chunk."""
    model = predictor.model
    context = predictor.run.eval_seq_len
    chunk = min(CHUNK, context // 2)
    generator = torch.Generator().manual_seed(seed)
    cache = train_gpt.KVCache(model.config, 1, context - chunk, torch.device("cpu"))
    new = [BOS, *tokens]
    while True:
        for first in range(0, len(new), chunk):
            inputs = torch.tensor([new[first : first + chunk]])
            states = read(model, cache, inputs)
        logits = model.head.logits(states[:, -1:], model.embed, None)[0, 0]
        token = pick(logits, temperature, top_p, generator)
        yield token
        new = [token]


def read(model: train_gpt.GPT, cache: train_gpt.KVCache, inputs: Tensor) -> Tensor:
    """Inputs (1, C) -> states (1, C, D); their keys and values are cached."""
    cache.make_room(inputs.size(1))
    tokens = torch.cat([cache.last_token, inputs], 1)
    states, new_kvs = model.hidden(tokens, cache.context(inputs.size(1)))
    cache.append(inputs, new_kvs)
    cache.position += inputs.size(1)
    return states


def print_text(predictor: codec.Predictor, prompt: list[int], tokens: Iterator[int]) -> None:
    """Print the prompt, then the continuation as it is generated."""
    caseops = codec.uses_caseops(predictor)
    seen = list(prompt)
    shown = 0  # characters printed

    def text_so_far() -> str:
        return codec.to_bytes(predictor, caseops, [*seen, BOS]).decode()

    for token in tokens:
        seen.append(token)
        ready = text_so_far().rstrip(UNFINISHED)
        show(ready[shown:])
        shown = max(shown, len(ready))
    show(text_so_far()[shown:] + "\n")


def show(text: str) -> None:
    """Print part of a text; on a terminal, control characters are shown as escapes."""
    if sys.stdout.isatty():
        text = printable(text, most=len(text), kept="\n\t")
    print(text, end="", flush=True)


def within(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """An argparse type that refuses values outside these bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = f"number from {low} to {high}"  # argparse says "invalid <name> value"
    return parse


def main(arguments: list[str]) -> int:
    parser = codec.argument_parser("./run.sh sample", __doc__)
    add = parser.add_argument
    add("prompt", nargs="?", default="", metavar="PROMPT")
    add("--tokens", type=within(0, 1 << 20, int), default=200, metavar="N", help="tokens to add at most [%(default)s]")
    add(
        "--temperature",
        type=within(0, 100),
        default=0.8,
        metavar="T",
        help="0: always the likeliest; 1: as predicted [%(default)s]",
    )
    add(
        "--top-p",
        type=within(0, 1),
        default=0.95,
        metavar="P",
        help="choose among the likeliest tokens that have this share of the probability [%(default)s]",
    )
    add("--seed", type=within(0, 1 << 31, int), default=0, metavar="S", help="of the choices [%(default)s]")
    args = parser.parse_args(arguments)

    predictor = codec.open_predictor(find_artifact(args.artifact))
    text = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    prompt = codec.to_tokens(predictor, codec.uses_caseops(predictor), text.decode(errors="replace"))[:-1]
    tokens = continued(predictor, prompt[-predictor.run.eval_seq_len :], args.temperature, args.top_p, args.seed)
    until_the_end = itertools.takewhile(lambda token: token != BOS, itertools.islice(tokens, args.tokens))
    print_text(predictor, prompt, until_the_end)
    return 0


if __name__ == "__main__":
    sys.exit(end_in_a_line(lambda: main(sys.argv[1:])))
