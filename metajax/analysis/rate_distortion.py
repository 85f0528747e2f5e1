"""Rate and distortion of what a token's final hidden state says about the answer: a variational information bottleneck.

Variational bottlenecks trained on frozen final states to predict the answer's first token: states of the meta-token, of the
prompt's last token, and of the meta-token without its position. In the paper the meta-token's curve is lower. The paper's budget
leaves the heads far from trained; the converged budget is ours. Intervals are over seeds of the heads.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), section 5.2: with the model frozen, an encoder
q(z | h) = N(mu(h), diag sigma(h)^2), a decoder softmax(W z + b) and the prior N(0, I) are trained on
E[-ln q(y | z)] + beta KL(q(z | h) || N(0, I)), 50 list-recall examples, batch 1, 5 epochs, beta from 0.01 to 1.
Not stated in the paper and chosen here: linear mu and ln sigma, the width of z, Adam's rate, the grid of beta, the label (the answer's
first token), the layer (the last, after the final norm), the number of seeds, how the heads begin (as PyTorch's linear maps do).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import entr

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import key_of, mean_over_rows, values_of
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, capture, descent
from metajax.analysis.interventions import intervene
from metajax.core.progress import progress
from metajax.models.lm import LM
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, panels

BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WIDTH = 64  # of z
PARTS = 5  # parts of a head's training; it is measured after each to check convergence
SEEDS = 5
SAMPLES = 16  # samples of z for each example when a head is measured
SOURCES = {"meta": "meta-token", "last": "last token", "meta_zero_position": "meta-token, no position"}
BUDGETS = {"stated": "The paper's budget: batch 1, 5 epochs.", "converged": "A longer training of the same heads, ours."}
KEYS = ("rate", "distortion", "validation_rate", "validation_distortion")  # nats, on training and on other examples
TICKS = (0, 5, 10, 15, 20, 50, 100, 200, 500, 1000, 2000)  # ticks of the rate's axis, which is linear up to 20
Head = dict[str, Array]


class Budget(NamedTuple):
    """Training of a head by Adam: the first `examples` prompts in a new order each epoch, `updates` (a multiple of PARTS) of `batch`."""

    examples: int
    batch: int
    updates: int
    learning_rate: float = 1e-3


class Chance(NamedTuple):
    """All random numbers of the training of one head, drawn in advance so that the loop is small and compiles fast."""

    head: Head  # initial head
    chosen: Int[Array, "updates batch"]  # examples of each update
    noise: Float[Array, "updates batch z"]  # of z
    measured: Float[Array, "samples N z"]  # of z, when the head is measured


def draw(seed: int, budget: Budget, count: int, width: int, vocab_size: int) -> Chance:
    """The random numbers of a seed: weights and biases uniform within 1 / sqrt(inputs), examples in a new order each epoch."""
    rng, head = np.random.default_rng(seed), {}
    for name, inputs, outputs in (("encoder", width, 2 * WIDTH), ("decoder", WIDTH, vocab_size)):
        for key, shape in ((name, (inputs, outputs)), (f"{name}_bias", (outputs,))):
            head[key] = ((2 * rng.random(shape, np.float32) - 1) / np.sqrt(inputs)).astype(np.float32)
    epochs = -(-budget.updates * budget.batch // budget.examples)
    order = np.concatenate([rng.permutation(budget.examples) for _ in range(epochs)])[: budget.updates * budget.batch]
    chosen = order.reshape(budget.updates, budget.batch)
    noise, measured = (rng.standard_normal((*shape, WIDTH), np.float32) for shape in (chosen.shape, (SAMPLES, count)))
    return jax.tree.map(jnp.asarray, Chance(head, chosen, noise, measured))


def draws_of(seeds: int, *shape: Any) -> Chance:
    """`draw` for the seeds 0 .. seeds - 1, stacked."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(draw(seed, *shape) for seed in range(seeds)))


def rate_and_distortion(
    head: Head, h: Float[Array, "N width"], labels: Int[Array, " N"], noise: Float[Array, "N z"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(KL(q(z | h) || N(0, I)), -ln q(y | z)), nats, both averaged over the examples; z = mu + sigma noise."""
    mu, log_sigma = jnp.split(h @ head["encoder"] + head["encoder_bias"], 2, axis=-1)
    rate = 0.5 * jnp.sum(mu**2 + jnp.exp(2 * log_sigma) - 1 - 2 * log_sigma, axis=-1)
    logits = (mu + jnp.exp(log_sigma) * noise) @ head["decoder"] + head["decoder_bias"]
    return jnp.mean(rate), jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train_head(
    beta: Float[Array, ""], chance: Chance, h: Float[Array, "N width"], labels: Int[Array, " N"], *, budget: Budget
) -> Float[Array, "parts 2 2"]:
    """[training, other examples][rate, distortion] in nats after each of PARTS equal parts of the training."""
    optimizer, sides = optax.adam(budget.learning_rate), (slice(None, budget.examples), slice(budget.examples, None))

    def loss(head: Head, chosen: Array, noise: Array) -> Array:
        rate, distortion = rate_and_distortion(head, h[chosen], labels[chosen], noise)
        return distortion + beta * rate

    def measure(head: Head, side: slice) -> Array:
        one = lambda noise: jnp.stack(rate_and_distortion(head, h[side], labels[side], noise))  # noqa: E731
        return jnp.mean(jax.lax.map(one, chance.measured[:, side]), axis=0)

    def train_part(carry: tuple[Head, Any], draws: tuple[Array, Array]) -> tuple[tuple[Head, Any], Array]:
        carry, _ = jax.lax.scan(descent(loss, optimizer), carry, draws)
        return carry, jnp.stack([measure(carry[0], side) for side in sides])

    draws = tuple(x.reshape(PARTS, -1, *x.shape[1:]) for x in (chance.chosen, chance.noise))
    return jax.lax.scan(train_part, (chance.head, optimizer.init(chance.head)), draws)[1]


@partial(jax.jit, static_argnames="budget")
def train_heads(
    betas: Float[Array, " betas"], chances: Chance, h: Float[Array, "N width"], labels: Int[Array, " N"], *, budget: Budget
) -> Float[Array, "betas seeds parts 2 2"]:
    """`train_head` for every beta and seed at once; the draws are stacked over the seeds."""
    one = partial(train_head, budget=budget)
    return jax.vmap(jax.vmap(one, (None, 0, None, None)), (0, None, None, None))(betas, chances, h, labels)


# ------------------------------------------------------------------------------------------------- on a trained model


def final_states(study: Study) -> dict[str, Float[np.ndarray, "N width"]]:
    """Encoded states: of the last meta-token, of the prompt's last token (control), of the meta-token with position zeroed."""

    def final(model: LM, batch: Arrays) -> Arrays:
        return {"final": capture(model, batch, "final")["final"].astype(jnp.float32)}

    rows, whole = np.arange(study.count), study.over_prompts("hidden states", final)["final"]
    found = {"meta": whole[rows, study.last_meta], "last": whole[rows, study.asked]}
    zeroed = intervene(study.model).get("zero_position")
    if zeroed is not None:
        states = study.over_prompts("hidden states, position zeroed", final, zeroed)["final"]
        found["meta_zero_position"] = states[rows, study.last_meta]
    return found


@analysis("rate_distortion", title="Rate and distortion", **META_TOKENS)
def rate_distortion(study: Study) -> dict[str, Any]:
    """{stated | converged: {source: {beta_*: rate, distortion (nats, training examples), validation_*, *_half, seeds}}}, means over seeds.

    The intervals (*_half) are over seeds of the heads; the examples and the model are the same. `gap` is by how much the objective still
    fell in the last fifth of training, averaged over betas and seeds.
    """
    labels, half, vocab_size = study.answers, study.count // 2, study.program.vocab_size
    few = min(50, half)
    budgets = {"stated": Budget(few, 1, 5 * few), "converged": Budget(half, min(25, half), 1000, 5e-3)}
    entropy = float(np.sum(entr(np.bincount(labels) / len(labels))))
    sizes = {name: {"training": b.examples, "validation": study.count - b.examples} for name, b in budgets.items()}
    found: dict[str, Any] = {"uniform": float(np.log(vocab_size)), "label_entropy": entropy, "examples": sizes}
    states = final_states(study)
    with progress("information bottlenecks", total=len(budgets) * len(states)) as advance:
        for name, budget in budgets.items():
            found[name] = {}
            for source, h in states.items():
                chances = draws_of(SEEDS, budget, study.count, h.shape[1], vocab_size)
                heads = train_heads(jnp.array(BETAS), chances, jnp.asarray(h), jnp.asarray(labels), budget=budget)
                found[name][source] = _curve(np.asarray(heads, np.float64))
                advance(1)
    return found


def _curve(heads: np.ndarray) -> dict[str, Any]:
    """The numbers of `rate_distortion` for one source, from [betas, seeds, parts, 2, 2]."""
    objective = heads[..., 0, 1] + np.array(BETAS)[:, None, None] * heads[..., 0, 0]
    found: dict[str, Any] = {"gap": float(np.mean(objective[..., -2] - objective[..., -1]))}
    for beta, of_beta in zip(BETAS, heads[:, :, -1], strict=True):
        point: dict[str, Any] = {"seeds": heads.shape[1]}
        for key, values in zip(KEYS, of_beta.reshape(heads.shape[1], -1).T, strict=True):
            summary = mean_over_rows(values)
            point |= {key: summary["mean"], f"{key}_half": summary["half"]}
        found[key_of("beta", beta)] = point
    return found


@rate_distortion.headlines
def headlines(numbers: Numbers) -> list[str]:
    frequency = f"guessing by the frequency of each answer {numbers['label_entropy']:.2f}"
    lines = [f"a uniform guess has {numbers['uniform']:.2f} nats; {frequency}"]
    for budget, sizes in numbers["examples"].items():
        for source, curve in numbers[budget].items():
            n = curve["beta_0_1"]
            rate = f"{n['rate']:.1f} ± {n['rate_half']:.1f} nats"
            training, validation = (f"{n[key]:.2f} ± {n[f'{key}_half']:.2f}" for key in KEYS[1::2])
            distortion = (
                f"{training} nats on the {sizes['training']} training examples and {validation} on {sizes['validation']} others"
            )
            start = f"{budget} budget, {SOURCES[source]}, beta 0.1"
            lines.append(f"{start}: rate {rate}, distortion {distortion} ({n['seeds']} seeds)")
    return lines


@rate_distortion.figures
def figures(result: Numbers) -> Figures:
    drawn = []
    for budget, sizes in result["examples"].items():
        curves = {source: list(values_of("beta", of).values()) for source, of in result[budget].items()}
        right = max(20.0, 1.1 * max(n["validation_rate"] for points in curves.values() for n in points))
        ticks = [n for n in TICKS if n <= right]
        figure, axes_of = panels(2, 1, 2.5)
        for axes, words, (rate, distortion) in zip(axes_of, sizes, (KEYS[:2], KEYS[2:]), strict=True):
            for number, (source, points) in enumerate(curves.items()):
                x, y, xerr, yerr = ([n[key] for n in points] for key in (rate, distortion, f"{rate}_half", f"{distortion}_half"))
                style = {"color": look(number)[0], "linestyle": look(number)[1], "marker": "o", "markersize": 4, "linewidth": 1.5}
                axes.errorbar(x, y, xerr=xerr, yerr=yerr, capsize=2, label=SOURCES[source], **style)
            axes.axhline(result["uniform"], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xscale("symlog", linthresh=20)
            axes.set_xlim(0, right)
            axes.set_xticks(ticks, map(str, ticks))
            axes.xaxis.minorticks_off()
            axes.set_title(f"{sizes[words]} {words} examples", fontweight="bold")
            axes.set_ylabel("distortion (nats)")
        axes_of[1].set_xlabel("rate (nats), linear below 20")
        figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        gaps = ", ".join(f"{SOURCES[source]} {of['gap']:.3f}" for source, of in result[budget].items())
        caption = (
            f"{BUDGETS[budget]} A point for each beta from 0.01 to 1, mean over {curves['meta'][-1]['seeds']} seeds of the head with 95 % "
            f"intervals; dashed: a uniform guess. In the last fifth of training the objective still fell by (nats): {gaps}."
        )
        drawn.append((figure, caption))
    return drawn
