"""Where in a document metadata helps: nats a body token at its beginning, in its middle and at its end."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from metajax.analysis.study import Study
from metajax.config import require
from metajax.data.pipeline import held_out
from metajax.data.rows import Row
from metajax.evaluation.choice import token_scores

FIRST = 8  # tokens that count as the beginning; the end is the last third


def places(batch: Row) -> np.ndarray:
    """int [B, T]: 0, 1, 2 where a slot asks for a body token of the beginning, the middle or the last third of its document's piece; else -1."""
    out = np.full(batch["tokens"].shape, -1)
    for row, asked, segments in zip(out, batch["is_body"], batch["segment_ids"], strict=True):
        for segment in np.unique(segments[asked]):
            slots = np.flatnonzero(asked & (segments == segment))
            at = np.arange(len(slots))
            row[slots] = np.where(at < FIRST, 0, np.where(3 * at >= 2 * len(slots), 2, 1))
    return out


def by_position(study: Study) -> dict[str, Any]:
    """Nats a body token of the held-out documents at the beginning, middle and end, with the metadata of training ("own") and with none."""
    recipe, out = study.corpora.config.metadata, {}
    require(recipe is not None, "by_position: this run has no metadata (metadata is null)")
    own = "none" if recipe.position == "none" else "right"
    for name, condition in {"own": own, "none": "none"}.items():
        sums, counts = np.zeros(3), np.zeros(3)
        scores = token_scores(study.program)
        with jax.set_mesh(study.program.mesh):
            for batch in held_out(study.corpora, condition).batches:
                nll, _ = jax.device_get(scores(study.model, study.program.put(study.program.local_rows(batch))))
                for part, at in enumerate(places(batch) == i for i in range(3)):
                    sums[part] += nll[at].sum(dtype=np.float64)
                    counts[part] += at.sum()
        out[name] = {
            part: float(total / max(n, 1)) for part, total, n in zip(("first", "middle", "last"), sums, counts, strict=True)
        }
    return out
