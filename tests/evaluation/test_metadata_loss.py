"""When a model's loss and logits depend on metadata, and when they must not: labels without weight, causality, segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Metadata
from metajax.data.pipeline import open_corpora, training_batches
from metajax.models import cross_entropy
from metajax.training.losses import apply_model, weighted_loss
from metajax.training.program import Program


@pytest.fixture(scope="module")
def prepared(tiny_config, paths):
    """prepared(position) -> (model, batch on the host) with metadata beside every document."""

    def build(position):
        config = tiny_config(metadata=Metadata(position=position, template="{topic}", keep=1.0), **{"data.sequence_length": 96})
        corpora = open_corpora(config, paths)
        program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
        return program.create_state().model, training_batches(corpora)[0]

    return build


def on_device(batch):
    return {name: jnp.asarray(values) for name, values in batch.items()}


logits = jax.jit(apply_model)


@jax.jit
def loss_of(model, batch):
    return weighted_loss(model, batch, 0.0)[0]


def test_a_label_without_weight_changes_nothing(prepared):
    model, batch = prepared("prepend")
    silent = batch["loss_weights"] == 0
    assert batch["asks_metadata"].any() and silent[batch["asks_metadata"]].all()
    loss = loss_of(model, on_device(batch))
    other = dict(batch, targets=np.where(silent, 7, batch["targets"]))
    assert float(loss_of(model, on_device(other))) == float(loss)
    heard = dict(batch, targets=np.where(silent, batch["targets"], 7))
    assert float(loss_of(model, on_device(heard))) != float(loss)


@pytest.mark.parametrize(("position", "wanted"), [("prepend", False), ("append", True)])
def test_metadata_is_a_target_only_after_the_text(prepared, position, wanted):
    """The gradient by a position's logits is its probabilities, less one at its label: negative only where a label has weight."""
    model, batch = prepared(position)
    placed = on_device(batch)
    found = logits(model, placed)
    labels = placed["targets"], placed["loss_weights"]
    by_logits = jax.grad(lambda z: cross_entropy.weighted_loss(z, jnp.eye(z.shape[-1]), *labels, None, 0.0)[0])
    gradient = np.asarray(by_logits(found))
    delimiters = np.unique(batch["targets"][batch["asks_metadata"] & (batch["targets"] >= 256)])
    assert len(delimiters) == 2
    assert (gradient[..., delimiters] < 0).any() == wanted


@pytest.mark.parametrize("position", ["append", "prepend"])
def test_text_does_not_depend_on_later_metadata(prepared, position):
    """Bit for bit: other ids at the metadata change the logits of no text before it, and of all text after it."""
    model, batch = prepared(position)
    other = dict(batch, tokens=np.where(batch["is_metadata"], 9, batch["tokens"]))
    first, second = (np.asarray(logits(model, on_device(b))) for b in (batch, other))
    asks_body = batch["is_body"] & ~batch["is_metadata"]
    changed = (first != second).any(-1)[asks_body]
    assert changed.all() if position == "prepend" else not changed.any()


def test_metadata_of_one_document_never_reaches_another(prepared):
    model, batch = prepared("prepend")
    row = int(np.argmax(batch["segment_ids"].max(1)))
    segments = batch["segment_ids"][row]
    assert segments.max() >= 2
    edited = (segments == 1) & batch["is_metadata"][row]
    other = dict(batch, tokens=batch["tokens"].copy())
    other["tokens"][row, edited] = 9
    first, second = (np.asarray(logits(model, on_device(b)))[row] for b in (batch, other))
    changed = (first != second).any(-1)
    assert changed[edited].any() and not changed[segments != 1].any()
