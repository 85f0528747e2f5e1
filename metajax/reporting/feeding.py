"""Speed of the input pipeline on one core, compared with only reading token records.

Time is CPU seconds of this process over all threads, so that other work on the machine does not count. The transfer of a batch
from a reader process to the training process is not included.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from metajax.data.pipeline import Corpora, training_batches

SECONDS, CHUNK = 3.0, 512  # seconds of each measurement; documents tokenised at once, as in metajax/data/tokenising.py


def feeding(corpora: Corpora, seconds: float = SECONDS) -> dict[str, float]:
    """Tokens per second of one core.

    reading: bodies of the first source's training documents from its cache, in random order. rows: positions of whole batches,
    as a run reads them. tokenising: tokens made from text, as `cache` does once.
    """
    cache, data, tokenizer = corpora.caches[0], corpora.config.data, corpora.tokenizer
    documents = np.random.default_rng(0).permutation(cache.documents("train", data.validation_share, data.min_bytes))
    batches = training_batches(corpora)
    texts = [tokenizer.decode(cache[d].tolist()) for d in documents[:CHUNK].tolist()]
    return {
        "reading": rate(lambda n: len(cache[int(documents[n % len(documents)])]), seconds),
        "rows": rate(lambda n: batches[n]["tokens"].size, seconds),
        "tokenising": rate(lambda n: sum(map(len, tokenizer.encode_batch(texts))), seconds),
    }


def rate(read: Callable[[int], int], seconds: float) -> float:
    """The sum of `read(1)`, `read(2)` ... per CPU second, measured over `seconds`; `read(0)` comes first and is not timed."""
    read(0)
    begun, tokens, n = time.process_time(), 0, 0
    while (spent := time.process_time() - begun) < seconds:
        n += 1
        tokens += read(n)
    return tokens / spent
