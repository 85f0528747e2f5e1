"""A generated corpus with known optimal losses: its documents come from sources with different symbol transitions.

Each source has two favoured successors for every symbol, with probabilities 0.6 and 0.3; the rest is uniform over all symbols.
The first symbol is uniform. A model that knows the source, or its group, saves bits early in a document; without it, the model
infers it. So for a long document, the total gain is the logarithm of the number of sources or groups.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import logsumexp

from metajax.core.errors import require
from metajax.data.documents import Document, Source
from metajax.data.sources import Request, source

RECIPE = 1  # raise when a change below changes the documents
SOURCES, GROUPS, SYMBOLS, LENGTH = 16, 4, 16, 32
DOCUMENTS = 20_000
_FAVOURED, _SEED, _MEASURED = (0.6, 0.3), 7, 2_000


@lru_cache(maxsize=1)
def successors() -> np.ndarray:
    """float64 [SOURCES, SYMBOLS, SYMBOLS]: probability of each symbol after each other one, by source."""
    rng = np.random.default_rng(_SEED)
    table = np.full((SOURCES, SYMBOLS, SYMBOLS), (1 - sum(_FAVOURED)) / SYMBOLS)
    for of_symbol in table.reshape(-1, SYMBOLS):
        of_symbol[rng.choice(SYMBOLS, 2, replace=False)] += _FAVOURED
    return table


def draw(i: int) -> tuple[int, np.ndarray]:
    """(source, symbols int64 [LENGTH]) of document i."""
    rng = np.random.default_rng([_SEED, i])
    source, steps = int(rng.integers(SOURCES)), np.cumsum(successors(), axis=-1)
    symbols = [int(rng.integers(SYMBOLS))]
    for chance in rng.random(LENGTH - 1):
        symbols.append(min(int(np.searchsorted(steps[source, symbols[-1]], chance, side="right")), SYMBOLS - 1))
    return source, np.array(symbols)


def best_nats(sources: np.ndarray, symbols: np.ndarray, known: str) -> np.ndarray:
    """Optimal loss of each symbol, in nats, given the table and "nothing", the "group" or the "source" of the document.

    sources: int [N]; symbols: int [N, LENGTH]; the result is float64 [N, LENGTH], exact by Bayes' rule.
    """
    step = np.log(successors())[:, symbols[:, :-1], symbols[:, 1:]].transpose(1, 0, 2)
    evidence = np.concatenate([np.zeros((*step.shape[:2], 1)), np.cumsum(step, axis=-1)], axis=-1)  # [N, SOURCES, LENGTH]
    every = np.arange(SOURCES)
    possible = {
        "nothing": np.ones((len(sources), SOURCES), bool),
        "group": every % GROUPS == sources[:, None] % GROUPS,
        "source": every == sources[:, None],
    }[known]
    seen = logsumexp(np.where(possible[..., None], evidence, -np.inf), axis=1)
    return np.concatenate([np.full((len(sources), 1), np.log(SYMBOLS)), -np.diff(seen, axis=1)], axis=1)


@source("generated")
class Generated(Source):
    """generated[:DOCUMENTS]. Text: letters a to p; `source` is a capital letter, `group` a digit. With bytes, each is one token.

    Every document is a separate origin, so that validation documents come from the same sources as the others.
    """

    def __init__(self, request: Request):
        request.refuse_options()
        self.spec, count = request.spec, request.path or str(DOCUMENTS)
        require(count.isdecimal() and int(count) > 0, f"data source {self.spec!r}: write a number, such as generated:{DOCUMENTS}")
        self.count = int(count)

    def __len__(self) -> int:
        return self.count

    def read(self, records: range) -> Iterator[Document]:
        for i in records:
            source, symbols = draw(i)
            text = "".join(chr(ord("a") + symbol) for symbol in symbols)
            yield Document(text, {"source": chr(ord("A") + source), "group": str(source % GROUPS)}, f"document {i}")

    def fingerprint(self) -> str:
        """sha256 over recipe, table and number of documents."""
        return hashlib.sha256(json.dumps([RECIPE, self.count]).encode() + successors().tobytes()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Kind, recipe, records, and the optimal nats per symbol given nothing, the group or the source."""
        sources, symbols = (np.array(part) for part in zip(*map(draw, range(_MEASURED)), strict=True))
        best = {known: float(best_nats(sources, symbols, known).mean()) for known in ("nothing", "group", "source")}
        return super().manifest() | {"recipe": RECIPE, f"best_nats_a_symbol_of_{_MEASURED}_documents": best}
