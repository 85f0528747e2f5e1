"""Config of meta-tokens in the text and of document metadata."""

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
    rate: Annotated[float, Range(0, below=1)] = 0.1  # M = floor(rate * sequence_length) meta-tokens in every row
    # gathered: meta-tokens attend to each other. dense: the same over the whole row, as the paper writes the mask. The paper does
    # not state what ordinary tokens then add: nothing (dense) or, with finite masks, the mean of their past (dense_uniform) or
    # attention to it (dense_causal). causal: every token attends to all earlier tokens, a control with equal parameters.
    attention: Literal["none", "gathered", "dense", "dense_uniform", "dense_causal", "causal"] = "gathered"
    embedding: Literal["learned", "frozen", "zero"] = "learned"  # of a meta-token; frozen: one random vector, never trained
    # Meta-tokens without a position (nothing added to the embedding, or rotary angle 0), in both attentions or in only one.
    zero_position: Literal["none", "both", "causal", "meta"] = "none"
    loss: Annotated[Literal["skip_meta_targets", "real_only"], Injected] = "skip_meta_targets"  # not stated in the paper
    # M inside sequence_length, or on top of it; not stated in the paper
    length: Annotated[Literal["within", "added"], Injected] = "within"

    def __post_init__(self) -> None:
        fields = f"meta_tokens.inject = {self.inject!r} and meta_tokens.rate = {self.rate}"
        agree = (self.inject == "none") == (self.rate == 0)
        require(agree, f"{fields} disagree: no injection means rate 0, and the other way round")
        without = self.zero_position == "meta" and self.attention == "none"
        require(not without, "meta_tokens.zero_position = 'meta' needs meta-attention, but meta_tokens.attention = 'none'")

    @property
    def writes_everywhere(self) -> bool:
        """Whether meta-attention changes ordinary tokens too."""
        return self.attention in ("dense_uniform", "dense_causal", "causal")

    def check_position(self, scheme: str) -> None:
        """Raise UserError if `zero_position` has no meaning with this position scheme."""
        known = {"none": ("none",), "learned": ("none", "both")}.get(scheme, ("none", "both", "causal", "meta"))
        nothing = f"means nothing with model.position = {scheme!r}; choose {' or '.join(known)}"
        require(self.zero_position in known, f"meta_tokens.zero_position = {self.zero_position!r} {nothing}")

    def count(self, sequence_length: int) -> int:
        """M, the fixed number of meta-tokens in a row of `sequence_length` tokens."""
        return math.floor(Fraction(str(self.rate)) * sequence_length)  # floating point would give 28 for 0.29 * 100


@dataclass(frozen=True)
class Metadata(Part, path="metadata"):
    """Document metadata as text before or after the body (Beyond URLs, URLs Help / Topics Guide, MeCo)."""

    # none, prepend, append, both, or your own position (metajax/data/positions); repeated at every piece of a cut document.
    position: str = "prepend"
    # metadata fields in braces, with filters after a bar, such as {url|host}; see metajax/data/annotators.py
    template: Annotated[str, OnlyWith("tokens", 0)] = "{url}"
    appended: str = ""  # position "both": the template after the body; "": the same as before it
    # Number of learnable tokens in place of the template, the same for all documents (5 in Beyond URLs). A vocabulary has 11.
    tokens: Annotated[int, Range(0, 11)] = 0
    wrap: Literal["special_tokens", "plain"] = "special_tokens"  # <|context_begin|> ... <|context_end|>, or the bare text
    # shuffled: metadata of a random other document (a control in training)
    assigned: Annotated[Literal["own", "shuffled"], Trained] = "own"
    keep: Annotated[Share, Trained] = 0.9  # share of documents that keep their metadata
    when_dropped: Literal["empty", "nothing"] = "empty"  # the empty pair of delimiters, or nothing at all
    # Loss weights of the metadata tokens before and after the body.
    loss_weights: tuple[NotNegative, NotNegative] = (0.0, 1.0)
    bos_eos: Literal["outside", "inside"] = "outside"  # BOS metadata body metadata EOS, or metadata BOS body EOS metadata
    too_long: Literal["stop", "drop"] = "stop"  # metadata too long for a row: an error, or dropped and counted; never cut

    def __post_init__(self) -> None:
        both = "needs metadata.position = 'both'; with 'append' metadata.template itself comes after the body"
        require(not self.appended or self.position == "both", f"metadata.appended = {self.appended!r} {both}")

    @property
    def prepended(self) -> bool:
        """Whether metadata comes before the body."""
        return self.position in ("prepend", "both")

    @property
    def in_training(self) -> bool:
        """Whether training shows metadata."""
        return self.position != "none"
