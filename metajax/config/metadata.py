"""Meta-tokens in the text, and metadata beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from metajax.core.errors import require
from metajax.core.fields import NotNegative, OnlyWith, Part, Range, Share

Injected = OnlyWith("rate")
Trained = OnlyWith("in_training", why="training shows no metadata with metadata.position=none")


@dataclass(frozen=True)
class MetaTokens(Part, path="meta_tokens"):
    """Learned meta-tokens inserted in the text (Language Modeling with Learned Meta-Tokens)."""

    inject: Literal["none", "random", "periodic"] = "random"
    rate: Annotated[float, Range(0, below=1)] = 0.1  # M = floor(rate * row_length) meta-tokens in every row
    # gathered: meta-tokens attend among themselves. dense: its twin over the whole row, as the paper writes the mask. What a row of
    # an ordinary token then adds is not stated in the paper: nothing (dense), or what finite masks make of it, the mean of its past
    # (dense_uniform) or attention to it (dense_causal). causal: every token attends to every one before, the control of equal parameters.
    attention: Literal["none", "gathered", "dense", "dense_uniform", "dense_causal", "causal"] = "gathered"
    embedding: Literal["learned", "frozen", "zero"] = "learned"  # of a meta-token; frozen: one random vector, never trained
    # Meta-tokens without a position: nothing added to the embedding or rotary angle 0, where in both attentions or in one alone.
    zero_position: Literal["none", "both", "causal", "meta"] = "none"
    loss: Annotated[Literal["skip_meta_targets", "real_only"], Injected] = "skip_meta_targets"  # not stated in the paper
    # M inside row_length, or on top of it; not stated in the paper
    length: Annotated[Literal["within", "added"], Injected] = "within"

    def __post_init__(self) -> None:
        require(
            (self.inject == "none") == (self.rate == 0),
            f"meta_tokens.inject = {self.inject!r} and meta_tokens.rate = {self.rate} disagree: "
            "no injection means rate 0, and the other way round",
        )
        require(
            self.zero_position != "meta" or self.attention != "none",
            "meta_tokens.zero_position = 'meta' needs meta-attention, but meta_tokens.attention = 'none'",
        )

    @property
    def writes_everywhere(self) -> bool:
        """Whether meta-attention changes ordinary tokens too."""
        return self.attention in ("dense_uniform", "dense_causal", "causal")

    def check_position(self, scheme: str) -> None:
        """UserError when `zero_position` means nothing under this position scheme."""
        known = {"none": ("none",), "learned": ("none", "both")}.get(scheme, ("none", "both", "causal", "meta"))
        require(
            self.zero_position in known,
            f"meta_tokens.zero_position = {self.zero_position!r} means nothing with model.position = {scheme!r}; "
            f"choose {' or '.join(known)}",
        )

    def count(self, row_length: int) -> int:
        """M, the fixed number of meta-tokens in a row of `row_length` tokens."""
        return math.floor(Fraction(str(self.rate)) * row_length)  # in floating point 0.29 of 100 would be 28


@dataclass(frozen=True)
class Metadata(Part, path="metadata"):
    """Document metadata as text beside the body (Beyond URLs, URLs Help / Topics Guide, MeCo)."""

    # none, prepend, append, both, or a position of your own (metajax/data/positions); repeated at every piece of a cut document.
    position: str = "prepend"
    # metadata fields in braces, with filters after a bar: {url|host}; metajax/data/annotators.py
    template: Annotated[str, OnlyWith("tokens", 0)] = "{url}"
    appended: str = ""  # position "both": the template after the body; "": the same as before it
    # This many learnable tokens, the same for all documents, in place of the template (5 in Beyond URLs). A vocabulary keeps 11 for them.
    tokens: Annotated[int, Range(0, 11)] = 0
    wrap: Literal["special_tokens", "plain"] = "special_tokens"  # <|context_begin|> ... <|context_end|>, or the bare text
    # shuffled: another document's, at random (the control in training)
    assigned: Annotated[Literal["own", "shuffled"], Trained] = "own"
    keep: Annotated[Share, Trained] = 0.9  # share of documents that keep their metadata
    when_dropped: Literal["empty", "nothing"] = "empty"  # the empty pair of delimiters, or nothing at all
    # Of predicting the metadata itself, before the body and after it.
    loss_weights: tuple[NotNegative, NotNegative] = (0.0, 1.0)
    bos_eos: Literal["outside", "inside"] = "outside"  # BOS metadata body metadata EOS, or metadata BOS body EOS metadata
    too_long: Literal["stop", "drop"] = "stop"  # metadata that no row takes: an error, or dropped and counted; never cut

    def __post_init__(self) -> None:
        require(
            not self.appended or self.position == "both",
            f"metadata.appended = {self.appended!r} needs metadata.position = 'both'; with 'append' metadata.template itself comes after the body",
        )

    @property
    def prepended(self) -> bool:
        """Whether metadata comes before the body."""
        return self.position in ("prepend", "both")

    @property
    def in_training(self) -> bool:
        """Whether training shows metadata."""
        return self.position != "none"
