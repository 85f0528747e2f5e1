"""Prompt learners compared with the code of CoOp, CoCoOp and AAPL: logits, losses, gradients; and further properties."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.vision.clip import prompts as learners
from metajax.vision.clip.config import preset
from metajax.vision.clip.model import unit
from metajax.vision.clip.prompts import Learner, ad_triplet, class_texts, cross_entropy, prompt_logits, triplet
from metajax.vision.config import Prompts

GOLDENS = Path(__file__).parents[1] / "goldens"
BASE, COOP, COCOOP, AAPL = (np.load(GOLDENS / f"{name}_a.npz") for name in ("prompt_clip", "coop", "cocoop", "aapl"))
NAME_LENGTHS = COOP["v0/name_lens"].tolist()
META = {"w1": "linear1.weight", "b1": "linear1.bias", "w2": "linear2.weight", "b2": "linear2.bias"}
KEY = jax.random.key(0)


# One program for all cases of a shape.
@jax.jit
def encode(model, array):
    return unit(model.encode_image(jnp.moveaxis(array, 1, -1)))


def features(model, array):
    return encode(model, jnp.asarray(array.reshape(-1, *array.shape[-3:])))


@jax.jit
def loss_and_grad(learner, model, texts, seen, labels):
    """((loss, logits), gradients) of classification."""

    def loss(learner):
        moved = None if learner.meta_net is None else learner.meta_net(seen)
        logits = prompt_logits(model, texts, seen, learner.contexts(moved))
        return cross_entropy(logits, labels), logits

    return jax.value_and_grad(loss, has_aux=True)(learner)


@jax.jit
def aapl_losses(learner, model, texts, seen, label):
    """Cross-entropy, triplets, deltas; the gradients of the published sum and of the triplets alone."""

    def losses(learner):
        meta = learner.meta_net(seen)
        deltas = meta[2:].reshape(2, 2, 1, -1) - meta[:2, None, None]
        logits = prompt_logits(model, texts, seen[:1], learner.contexts(meta[:1]))
        return cross_entropy(logits, label), ad_triplet(deltas, 0.2, "two"), deltas

    def total(learner):
        ce, triplets, _ = losses(learner)
        return ce + 0.2 * triplets

    return losses(learner), total(learner), jax.grad(total)(learner), jax.grad(lambda learner: losses(learner)[1])(learner)


def filled(cfg, model, classes, state):
    """A learner with the golden's parameters (`state`, under the names of META) and its context."""
    learner = Learner(cfg, model.cfg, classes, KEY)
    learner.context[...] = jnp.asarray(state["context"])
    for ours in META if learner.meta_net is not None else ():
        getattr(learner.meta_net, ours)[...] = jnp.asarray(state[ours])
    return learner


def state_of(z, prefix, context):
    """{our name: array} of a golden's parameters or gradients; linear maps the other way round."""
    return {"context": z[f"{prefix}{context}"]} | {o: z[f"{prefix}meta_net.{theirs}"].T for o, theirs in META.items()}


def same_gradients(grads, state):
    found = {"context": grads.context[...]} | {o: getattr(grads.meta_net, o)[...] for o in META if grads.meta_net is not None}
    for name, ours in found.items():
        np.testing.assert_allclose(ours, state[name], rtol=0, atol=5e-5 * max(np.abs(state[name]).max(), 1e-3), err_msg=name)


@pytest.mark.parametrize("v", range(7))
def test_coop_equals_the_golden(prompt_clip, v):
    z = {name.removeprefix(f"v{v}/"): COOP[name] for name in COOP if name.startswith(f"v{v}/")}
    cfg = Prompts(context=int(z["n_ctx"]), class_specific=bool(z["csc"]), class_position=str(z["class_token_position"]))
    texts = class_texts(prompt_clip, z["tokenized_prompts"], z["name_lens"].tolist(), cfg)
    learner, seen = filled(cfg, prompt_clip, 5, {"context": z["ctx"]}), features(prompt_clip, BASE["images"])
    (value, logits), grads = loss_and_grad(learner, prompt_clip, texts, seen, jnp.asarray(BASE["labels"]))
    np.testing.assert_allclose(logits, z["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(value, z["loss"], rtol=0, atol=2e-5)
    same_gradients(grads, {"context": z["grad_ctx"]})


def test_cocoop_equals_the_golden_in_every_form(prompt_clip, monkeypatch):
    cfg = Prompts(condition="meta", bottleneck=3)
    tokens, seen = COCOOP["tokenized_prompts"], features(prompt_clip, BASE["images"])
    learner = filled(cfg, prompt_clip, 5, state_of(COCOOP, "param/", "ctx"))
    np.testing.assert_allclose(seen, COCOOP["image_features_normalised"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(learner.meta_net(seen), COCOOP["meta_tokens"], rtol=0, atol=2e-5)

    cut = class_texts(prompt_clip, tokens, NAME_LENGTHS, cfg)
    assert cut.embedded.shape[1] == 15 < tokens.shape[1]
    labels = jnp.asarray(BASE["labels"])
    monkeypatch.setattr(learners, "cut_after_end", lambda tokens: tokens)
    whole = class_texts(prompt_clip, tokens, NAME_LENGTHS, cfg)
    assert whole.embedded.shape[1] == 77
    (_, uncut), _ = loss_and_grad(learner, prompt_clip, whole, seen, labels)
    monkeypatch.setattr(learners, "TEXTS_AT_ONCE", 7)  # does not divide the 20 prompts
    (value, logits), grads = loss_and_grad(learner, prompt_clip, cut, seen, labels)
    np.testing.assert_allclose(logits, COCOOP["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(value, COCOOP["loss"], rtol=0, atol=2e-5)
    same_gradients(grads, state_of(COCOOP, "grad/", "ctx"))
    np.testing.assert_allclose(uncut, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", range(4))
def test_aapl_equals_the_golden(prompt_clip, case):
    z = {name.removeprefix(f"case{case}/"): AAPL[name] for name in AAPL if name.startswith(f"case{case}/")}
    cfg = Prompts(
        condition="meta", bottleneck=3, alpha=float(AAPL["alpha"]), beta=float(AAPL["beta"]), margin=float(AAPL["margin"])
    )
    texts = class_texts(prompt_clip, AAPL["tokenized_prompts"], NAME_LENGTHS, cfg)
    learner = filled(cfg, prompt_clip, 5, state_of(AAPL, "param/", "learnable_attr"))
    seen = features(prompt_clip, np.stack([z["image1"], z["image2"], *z["aug_of_image1_AB"], *z["aug_of_image2_AB"]]))
    assert (float(AAPL["alpha"]), float(AAPL["beta"]), float(AAPL["margin"])) == (np.float32(0.2), 1.0, np.float32(0.2))
    (ce, triplets, deltas), total, of_total, of_triplets = aapl_losses(
        learner, prompt_clip, texts, seen, jnp.asarray(z["label1"]).reshape(1)
    )
    for name, at in {"delta_1A": (0, 0), "delta_1B": (0, 1), "delta_2A": (1, 0), "delta_2B": (1, 1)}.items():
        np.testing.assert_allclose(deltas[at][0], z[name], rtol=0, atol=2e-5)
    for ours, name in ((ce, "ce_loss"), (triplets, "adtriplet_loss"), (total, "total_loss")):
        np.testing.assert_allclose(ours, z[name], rtol=0, atol=2e-5)
    same_gradients(of_total, state_of(z, "grad_total/", "learnable_attr"))
    same_gradients(of_triplets, state_of(z, "grad_adtriplet/", "learnable_attr"))
    assert not np.any(of_triplets.context[...]), "triplets give the context no gradient"


def test_the_triplet_loss_equals_the_golden():
    rows = [jnp.asarray(AAPL[f"triplet_{name}"]) for name in ("anchor", "positive", "negative")]
    np.testing.assert_allclose(triplet(*rows, 0.2), AAPL["triplet_row_losses"], rtol=0, atol=2e-5)
    grads = jax.grad(lambda rows: jnp.mean(triplet(*rows, 0.2)))(rows)
    for found, name in zip(grads, ("anchor", "positive", "negative"), strict=True):
        np.testing.assert_allclose(found, AAPL[f"triplet_grad_{name}"], rtol=0, atol=5e-5)


def test_equal_deltas_cost_the_margin_of_every_anchor():
    equal = jnp.ones((2, 2, 3, 8))
    assert float(ad_triplet(equal, 0.2, "two")) == pytest.approx(0.4)
    assert float(ad_triplet(equal, 0.2, "four")) == pytest.approx(0.8)


def test_a_meta_net_of_zeros_is_coop_and_has_the_published_size(prompt_clip):
    learner = Learner(Prompts(condition="meta", bottleneck=3), prompt_clip.cfg, 5, KEY)
    learner.meta_net.w2[...], learner.meta_net.b2[...] = jnp.zeros((3, 48)), jnp.zeros(48)
    np.testing.assert_array_equal(learner.contexts(learner.meta_net(jnp.ones((2, 48))))[1], learner.context[...])
    sizes = jax.eval_shape(lambda: Learner(Prompts(condition="meta"), preset("ViT-B/16"), 100, KEY))
    assert sum(x.size for x in jax.tree.leaves(sizes)) == 35_360


def test_prompts_of_the_golden_are_made_in_place(prompt_clip):
    assert json.loads(str(BASE["classnames_json"]))[0] == "cat"
    cfg = Prompts()
    texts = class_texts(prompt_clip, COOP["v0/tokenized_prompts"], NAME_LENGTHS, cfg)
    made = learners.prompts(texts, jnp.broadcast_to(jnp.asarray(COOP["v0/ctx"]), (5, 4, 48)))
    np.testing.assert_array_equal(made[0], COOP["v0/prompts_first_class"][: made.shape[1]])
    np.testing.assert_array_equal(texts.end, COOP["v0/eot_index"])
