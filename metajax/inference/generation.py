"""Text generation: lays out prompts and meta-tokens in rows, and streams the text as tokens are drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config, Metadata
from metajax.core.errors import require
from metajax.data.encoding import Tokenizer, Vocabulary
from metajax.data.metadata import delimiters
from metajax.inference.decoding import Decoding, Rules, Sampling, advance, start
from metajax.inference.forward import Ready

DEFAULT = Sampling()
Prompt = str | Sequence[int]  # ids without BOS
Context = str | Sequence[Prompt | None] | None  # one for all prompts, or one for each
SMALLEST = 16  # prompts and caches are padded to powers of two, at least this, so that few programs are compiled


def meta_layout(size: int, rate: float) -> np.ndarray:
    """Sorted int32 positions of meta-tokens in a generated row: evenly spaced at `rate`, never position 0."""
    period = round(1 / rate) if rate else size + 1
    return np.arange(period - 1, size, period, dtype=np.int32) if period > 1 else np.arange(1, size, dtype=np.int32)


def _layout(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the meta-tokens, all other positions) of a generated row."""
    size, meta = config.row_positions, config.meta_tokens
    meta_positions = meta_layout(size, 0 if meta is None else meta.rate)
    return meta_positions, np.setdiff1d(np.arange(size), meta_positions)


def opening(config: Config, tokenizer: Tokenizer, context: Prompt | None) -> list[int]:
    """BOS and the metadata, with the delimiters and the order of training.

    Empty if there is no metadata and the tokenizer of an imported checkpoint puts no BOS before a prompt.
    """
    if context is None:
        return [tokenizer.vocabulary.bos] if config.imported is None or config.imported.opens else []
    recipe = config.metadata or Metadata()
    before, after = delimiters(recipe, tokenizer)
    ids = tokenizer.encode(context) if isinstance(context, str) else context
    metadata, bos = [*before, *ids, *after], [tokenizer.vocabulary.bos]
    return bos + metadata if recipe.bos_eos == "outside" else metadata + bos


def room_for_prompt(config: Config, tokenizer: Tokenizer, context: Prompt | None) -> int:
    """Tokens of a row that are left for prompt and continuation after `context`."""
    return len(_layout(config)[1]) - len(opening(config, tokenizer, context))


@dataclass(frozen=True)
class Rows:
    """Prompts in rows with meta-tokens, with room for `count` tokens after each prompt.

    tokens: int32 [B, N], -1 if not drawn yet; is_meta: bool [B, N]; length: int32 [B], positions up to the end of the prompt.
    """

    tokens: np.ndarray
    is_meta: np.ndarray
    length: np.ndarray
    count: int

    @classmethod
    def of(cls, config: Config, prompts: Sequence[Sequence[int]], vocabulary: Vocabulary, count: int) -> Rows:
        """Rows of `config` with the prompt ids at the ordinary positions. UserError if they and `count` more do not fit."""
        meta_positions, real = _layout(config)
        longest = max(map(len, prompts))
        require(
            longest + count <= len(real),
            f"the prompt has {longest} tokens and {count} are to follow, but a row of {config.name} holds {len(real)}; shorten either",
        )
        tokens = np.full((len(prompts), config.row_positions), -1, np.int32)
        tokens[:, meta_positions] = vocabulary.meta
        for row, ids in zip(tokens, prompts, strict=True):
            row[real[: len(ids)]] = ids
        is_meta = np.isin(np.arange(config.row_positions), meta_positions)
        length = np.array([real[len(ids) - 1] + 1 for ids in prompts], np.int32)
        return cls(tokens, np.tile(is_meta, (len(prompts), 1)), length, count)

    def start(self, ready: Ready, rules: Rules) -> Decoding:
        """Read the prompts and draw the first token of each."""
        size = self.tokens.shape[1]
        ordinary = np.cumsum(~self.is_meta, axis=1)
        last = ordinary[np.arange(len(self.length)), self.length - 1] + self.count  # ordinary tokens of a complete row
        used = int((ordinary < last[:, None]).sum(axis=1).max()) + 1
        width = _padded(int(self.length.max()), size)
        prompt_metas = self.is_meta[:, :width] & (np.arange(width) < self.length[:, None])
        widest = int(self.is_meta[:, :width].sum(axis=1).max(initial=0))
        capacity = _padded(used, size)
        meta_capacity = int(self.is_meta[:, :capacity].sum(axis=1).max(initial=0))
        meta_positions = np.full((len(self.tokens), max(widest, 1)), width, np.int32)
        for row, flags in zip(meta_positions, prompt_metas, strict=True):
            row[: flags.sum()] = np.flatnonzero(flags)
        prompt = np.maximum(self.tokens[:, :width], 0)
        sizes = {"capacity": capacity, "meta_capacity": meta_capacity}
        return start(ready, self.tokens, self.is_meta, prompt, self.length, meta_positions, self.count, rules, **sizes)


def _padded(length: int, limit: int) -> int:
    return min(max(SMALLEST, 1 << (length - 1).bit_length()), limit)


def make_rules(config: Config, vocabulary: Vocabulary, sampling: Sampling, seed: int, guidance: float | None = None) -> Rules:
    """The rules of every draw. Reserved ids and ids without a trained row are banned, except those that end a row."""
    imported, size = config.imported, vocabulary.size
    ends, absent = np.array([vocabulary.eos]), np.zeros(size, bool)
    if imported is not None:
        size = imported.table(size)
        ends, absent = np.union1d(ends, imported.ends).astype(int), imported.absent(size)
    banned = absent | (np.arange(size) >= vocabulary.base)
    banned[ends] = absent[ends]
    ask_real = config.meta_tokens is not None and config.meta_tokens.loss == "real_only"
    strength = None if guidance is None else jnp.asarray(guidance, jnp.float32)
    return Rules(jnp.asarray(banned), jnp.asarray(ends), jax.random.key(seed), strength, sampling, ask_real)


def stream(
    ready: Ready,
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    count: int,
    context: Context = None,
    guidance: float | None = None,
    sampling: Sampling = DEFAULT,
    seed: int = 0,
    stride: int = 1,
) -> Iterator[list[str]]:
    """Yield the continuation of each prompt in pieces: at most `count` tokens, ended early by a token that ends a text.

    Prompt and continuation are detokenised together, then the prompt's text is removed, so that the text at the seam is right.

    Args:
      context: metadata text before the prompt, between the context delimiters; one for all prompts, one for each, or None.
      guidance: draw from `guided` logits: 0 ignores the context, 1 uses it, other values interpolate or extrapolate.
      stride: positions of a row between two pieces.

    Raises:
      UserError: prompt and continuation do not fit in a row; guidance without a context or with learned meta-tokens.
    """
    vocabulary = tokenizer.vocabulary
    contexts = [context] * len(prompts) if isinstance(context, str | None) else list(context)
    encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    openings = [opening(config, tokenizer, text) for text in contexts]
    ids = [[*first, *prompt] or [vocabulary.bos] for first, prompt in zip(openings, encoded, strict=True)]
    if guidance is not None:
        require(math.isfinite(guidance), f"guidance = {guidance}: a finite number")
        require(None not in contexts, "guidance is away from text without metadata: it needs a context")
        fitting = "guidance: a row's two readings have their meta-tokens at different tokens; use a model without"
        require(config.meta_tokens is None, fitting)
        ids += [[*opening(config, tokenizer, ""), *prompt] for prompt in encoded]
    rows = Rows.of(config, ids, vocabulary, count)
    rules = make_rules(config, vocabulary, sampling, seed, guidance)
    return _pieces(ready, rows, rows.start(ready, rules), rules, tokenizer, stride, encoded)


def _pieces(
    ready: Ready, rows: Rows, state: Decoding, rules: Rules, tokenizer: Tokenizer, stride: int, prompts: Sequence[Sequence[int]]
) -> Iterator[list[str]]:
    ends, count = set(rules.ends.tolist()), len(prompts)
    shown = [tokenizer.decode(prompt) for prompt in prompts]
    while True:
        tokens, left = jax.device_get((state.tokens[:count], state.left[:count]))
        done, pieces = left == 0, []
        for i, (row, prompt) in enumerate(zip(tokens, prompts, strict=True)):
            new = row[rows.length[i] :]
            new = new[~rows.is_meta[i, rows.length[i] :] & (new >= 0)].tolist()
            text = tokenizer.decode([*prompt, *itertools.takewhile(lambda token: token not in ends, new)])
            pieces.append(_added(text, shown[i], whole=done[i]))
            shown[i] += pieces[-1]
        yield pieces
        if done.all():
            return
        state = advance(ready, state, rules, stride)


def _added(text: str, shown: str, *, whole: bool) -> str:
    """The part of `text` after `shown`. If later bytes changed what is shown, this is empty until the text is `whole`."""
    text = text if whole else text.rstrip("\ufffd")  # later bytes may complete a UTF-8 sequence, which decodes as U+FFFD so far
    if text.startswith(shown):
        return text[len(shown) :]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, shown, strict=False)))
    return text[same:] if whole else ""


def generate(ready: Ready, config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """The complete continuation of each prompt; the options are those of `stream`."""
    pieces = stream(ready, config, tokenizer, prompts, **options, stride=config.row_positions)
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
