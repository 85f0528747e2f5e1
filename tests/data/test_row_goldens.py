"""Decoded rows with their masks, compared with fixtures checked by hand: every metadata position and packing style.

goldens/metadata_rows.txt has a section for each case and a line for each span of positions: document in the row, content,
targets (with the loss weight if it is not 1), text. <|eot|> is both BOS and EOS.
"""

from pathlib import Path

import numpy as np
import pytest

from metajax.config import Metadata
from metajax.data.metadata import MetadataIds, Placement, delimiters
from metajax.data.packing import pack
from metajax.data.positions import spots
from metajax.data.rows import RowSource, finish
from metajax.data.tokenizers import Bytes
from metajax.reporting.rows import spans

GOLDENS = Path(__file__).parents[1] / "goldens" / "metadata_rows.txt"
TEXTS = ("The quick brown fox jumps over it.", "Tiny.", "A lazy dog sleeps on.")
METADATA = ("en", "fr", "")
OWN, NONE = (0, 1, 2), (MetadataIds.NOTHING,) * 3
CASES = {
    "none, concat": ({"owner": NONE}, {}),
    "none, new_document": ({"owner": NONE, "style": "new_document", "capacity": 20}, {}),
    "prepend, concat": ({}, {}),
    "prepend, best_fit": ({"style": "best_fit"}, {}),
    "prepend, new_document": ({"style": "new_document"}, {}),
    "append, concat": ({}, {"position": "append"}),
    "append, best_fit": ({"style": "best_fit"}, {"position": "append"}),
    "append, new_document": ({"style": "new_document"}, {"position": "append"}),
    "both, concat": ({"capacity": 40}, {"position": "both"}),
    "both, new_document": ({"style": "new_document", "capacity": 40}, {"position": "both"}),
    "prepend, BOS inside": ({}, {"bos_eos": "inside"}),
    "append, EOS inside": ({}, {"position": "append", "bos_eos": "inside"}),
    "plain text, nothing and another's": ({"owner": (0, MetadataIds.NOTHING, 1)}, {"wrap": "plain"}),
    "empty pair and another's, half weight": ({"owner": (MetadataIds.EMPTY, 0, 1)}, {"loss_weights": (0.5, 1.0)}),
}


def decoded(packing, recipe):
    """The rows of a case as the golden file has them."""
    style, capacity, owner = (packing.get(k, v) for k, v in (("style", "concat"), ("capacity", 36), ("owner", OWN)))
    tokenizer, recipe = Bytes(), Metadata(**recipe)
    ids = np.array(list("".join(METADATA).encode()), np.int32)
    side = MetadataIds(ids, np.cumsum([0, *map(len, METADATA)]), np.array(owner), *delimiters(recipe, tokenizer))
    placement = Placement(tuple((spot, side) for spot in spots(recipe)), recipe.bos_eos == "outside")
    documents = np.arange(3)
    index = pack(documents, np.array([len(text) + 1 for text in TEXTS]), placement.overhead(documents), capacity, style)
    rows = RowSource(index, lambda i: np.array(list(TEXTS[i].encode()), np.int32), placement, tokenizer.vocabulary, capacity)
    lines = []
    for n in range(len(rows)):
        lines += [f"row {n}", *map(str, spans(finish(rows[n], attend_across_documents=False), tokenizer))]
    return lines


def sections():
    """{case: lines} of the golden file; a bar ends each line, so that spaces at the end of a text can be seen."""
    parts = GOLDENS.read_text().split("== ")[1:]
    return {part.splitlines()[0]: [line.removesuffix("|") for line in part.splitlines()[1:] if line] for part in parts}


def test_every_case_has_its_section():
    assert list(sections()) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_decoded_rows(case):
    assert decoded(*CASES[case]) == sections()[case]
