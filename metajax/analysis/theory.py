"""The entropy theorem of the paper, its margin condition, and both on real attention rows.

Boosting one score lowers the entropy of an attention row where the key's probability p exceeds exp(-H). Where it does not, the
entropy rises at first. The paper states the theorem without this condition.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), theorem 4.1 (5.1 in a later version): adding Delta > 0 to one
logit lowers the entropy of the softmax by some kappa(Delta) > 0. That needs a condition: dH/dDelta = -p (ln p + H), p being the
probability of the boosted key, so that entropy falls where p > exp(-H) and rises where p < exp(-H). With h(p) the entropy of (p, 1 - p)
and R the entropy of the other keys among themselves, ln p + H = (1 - p) (logit(p) + R): a boost adds Delta to logit(p) and leaves R
alone, so a margin that is positive stays so, and entropy falls from there on for every Delta.

All functions are NumPy on float64 arrays; entropies in nats. Everything about the boosted row follows from (p, H) alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import entr, softmax, xlogy

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import cluster_mean, key_of, rounded, values_of
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, at_last_meta, capture
from metajax.analysis.sharpening import entropy
from metajax.models.lm import LM, with_intervention
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, panels

DELTAS = (0.1, 0.5, 1.0, 2.0, 5.0)
NODES = 64  # nodes of the quadrature
SHOWN = 1500  # rows in the figure
COUNTER_EXAMPLE = ((0.0, 5.0, 0.0, 0.0), 0, 5.0)  # (logits, boosted key, Delta): entropy rises from 0.119 to 0.733 nats
Values = Float[np.ndarray, "*#rows"] | float


def boosted_probability(p: Values, delta: Values) -> Values:
    """The probability of a key after `delta` is added to its logit."""
    return p * np.exp(delta) / (1 + p * np.expm1(delta))


def boosted_entropy(p: Values, entropy: Values, delta: Values) -> Values:
    """Entropy of a row after `delta` is added to the logit of a key of probability p."""
    others = entropy - entr(p)  # -sum p ln p of the other keys
    total = 1 + p * np.expm1(delta)
    after = boosted_probability(p, delta)
    return np.log(total) - delta * after + (others - np.exp(delta) * xlogy(p, p)) / total


def margin(p: Values, entropy: Values) -> Values:
    """ln p + H. The theorem guarantees lower entropy if this is positive."""
    with np.errstate(divide="ignore"):
        return np.log(p) + entropy


def kappa(p: Values, entropy: Values, delta: float) -> Values:
    """The decrease of entropy by the boost, as the integral from 0 to delta of p_t (ln p_t + H_t) dt (Gauss-Legendre)."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    times = (0.5 * delta * (nodes + 1)).reshape(-1, *[1] * np.ndim(p))
    at = boosted_probability(p, times)
    return 0.5 * delta * np.tensordot(weights, xlogy(at, at) + at * boosted_entropy(p, entropy, times), axes=1)


def meta_rows(model: LM, batch: Arrays) -> Arrays:
    """p (probability of the last meta-token's key) and entropy of every causal attention row, float32[B, L, H, T]."""
    probabilities = capture(model, batch, "attention_probabilities")["attention_probabilities"]
    return {"p": at_last_meta(probabilities, batch, 4), "entropy": entropy(probabilities)}


@analysis("theory", title="The entropy theorem", **META_TOKENS)
def theory(study: Study) -> dict[str, Any]:
    """For rows of queries after the last meta-token: share in which the margin condition holds for its key, and effects of
    boosting its logit (`delta_*`). `observed`: entropy drop from the zeroed to the learned embedding, in rows that without it
    meet the condition and in the others. It does not test the theorem: an embedding changes more than one logit.
    """
    whole = study.over_prompts("attention rows", meta_rows)
    without = study.over_prompts("attention rows, embedding zeroed", meta_rows, with_intervention(study.model, embedding="zero"))
    (p, h), (base_p, base_h) = ([rows[name].astype(np.float64) for name in ("p", "entropy")] for rows in (whole, without))
    chosen = np.broadcast_to(study.queries_after(study.last_meta)[:, None, None], p.shape)
    drops, holds = {delta: h - boosted_entropy(p, h, delta) for delta in DELTAS}, margin(p, h) > 0
    share, half = cluster_mean(holds.astype(np.float64), chosen)
    found: dict[str, Any] = {"margin": {"share": share, "half": half, "values": int(chosen.sum()), "prompts": study.count}}
    found |= {key_of("delta", delta): _by_condition(drop, holds, chosen) for delta, drop in drops.items()}
    found["quadrature_error"] = float(np.abs(kappa(p[chosen], h[chosen], 1.0) - drops[1.0][chosen]).max())
    found["counter_example"] = counter_example()
    found["observed"] = _by_condition(base_h - h, margin(base_p, base_h) > 0, chosen)
    shown = np.random.default_rng(0).permutation(int(chosen.sum()))[:SHOWN]
    details = {"margin": margin(p, h), "drop": drops[1.0]}
    return found | {"details": {name: rounded(values[chosen][shown]) for name, values in details.items()} | {"delta": 1.0}}


def _by_condition(drop: np.ndarray, holds: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Number of rows that meet the condition or not, and the share of them in which the entropy fell (None: no such row)."""
    found = {}
    for name, part in (("met", chosen & holds), ("not_met", chosen & ~holds)):
        share, half = cluster_mean((drop > 0).astype(np.float64), part) if part.any() else (None, None)
        found[name] = {"rows": int(part.sum()), "fell": share, "half": half}
    return found


def counter_example() -> dict[str, float]:
    """A row whose entropy rises when a key that does not meet the condition is boosted."""
    logits, key, delta = COUNTER_EXAMPLE
    row = softmax(np.array(logits))
    before = entr(row).sum()
    return {"before": float(before), "after": float(boosted_entropy(row[key], before, delta))}


@theory.headlines
def headlines(numbers: Numbers) -> list[str]:
    n, example = numbers["margin"], numbers["counter_example"]
    return [
        f"the condition holds for the last meta-token's key in {n['share']:.1%} ± {n['half']:.1%} of {n['values']:,} rows of {n['prompts']:,} prompts",
        *(f"a boost of {delta} lowers entropy {_both(found)}" for delta, found in values_of("delta", numbers).items()),
        "from the zeroed to the learned embedding, which changes more scores than one and so does not test the theorem, entropy is lower "
        + _both(numbers["observed"]),
        f"counter-example, scores (0, 5, 0, 0), the first one boosted by 5: {example['before']:.3f} to {example['after']:.3f} nats; greatest error "
        f"of kappa by quadrature: {numbers['quadrature_error']:.1e}",
    ]


def _both(found: dict[str, Any]) -> str:
    parts = {"meet": found["met"], "do not meet": found["not_met"]}
    return " and ".join(f"in {n['fell']:.1%} of the {n['rows']:,} rows that {verb} it" for verb, n in parts.items() if n["rows"])


@theory.figures
def figures(result: Numbers) -> Figures:
    details = result["details"]
    figure, (axes,) = panels(1, 1, 3.0)
    axes.scatter(details["margin"], details["drop"], s=5, color=look(0)[0], alpha=0.35, linewidths=0, rasterized=True)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set(xlabel="margin: ln p + H (nats)", ylabel=f"entropy drop, boost of {details['delta']:g} (nats)")
    caption = (
        f"{len(details['margin']):,} attention rows drawn at random from {result['margin']['values']:,}. Right of 0 the theorem promises a "
        "drop; left of it entropy rises at first and may fall for a large boost."
    )
    return [(figure, caption)]
