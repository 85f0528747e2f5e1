"""Probes, attention to metadata, guidance and loss by position: numbers compared with those by hand, and pages."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.analysis import analysis
from metajax.analysis import guidance as guidance_module
from metajax.analysis import probes as probes_module
from metajax.analysis.by_position import best_possible, places
from metajax.analysis.common.labels import classes_of, matched, opening, with_rows
from metajax.analysis.common.study import capture, open_study
from metajax.analysis.guidance import counts_of, train_classifier
from metajax.analysis.metadata_attention import parts_of, shares
from metajax.analysis.probes import accuracies, states
from metajax.config import Metadata
from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.data.sources.generated import best_nats
from metajax.evaluation.validation import validation
from metajax.training.program import Program


@pytest.fixture
def study(tiny_config, paths):
    def build(**changes):
        generated = {"data.sources": ("generated:300",), "data.sequence_length": 48}
        generated |= {"data.validation_share": 0.4, "evaluation.documents": 8}
        labels = {"evaluation.labels": ("{group}", "{source}"), "metadata": Metadata(template="{source}")}
        config = tiny_config(**generated | labels | changes)
        corpora = open_corpora(config, paths)
        program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
        return open_study(program, corpora, jax.tree.map(lambda x: 6 * x, program.create_state().model), prompts=4)

    return build


def test_a_probe_finds_a_label_and_guesses_without_one():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=240)
    x = rng.normal(size=(2, 240, 6)).astype(np.float32)
    x[0, :, 0] += 6 * (y == 1)
    x[0, :, 1] += 6 * (y == 2)
    separable, noise = accuracies(x, y, np.arange(240) % 2 == 0, "linear").mean(0)
    assert separable > 0.95 and noise < 0.5


def test_documents_of_equal_lengths_in_every_class():
    rng = np.random.default_rng(0)
    classes = rng.integers(-1, 3, size=600)
    lengths = rng.normal(size=600) + classes  # length alone would reveal the class
    chosen = matched(classes, lengths, 6, rng)
    edges = np.quantile(lengths[classes >= 0], np.linspace(0, 1, 7)[1:-1])
    counts = Counter(zip(np.searchsorted(edges, lengths[chosen]).tolist(), classes[chosen].tolist(), strict=True))
    for at in range(6):
        assert len({counts[at, c] for c in range(3)}) == 1
    assert chosen.sum() > 100 and not chosen[classes < 0].any()
    assert classes_of(["a", None, "b", "b", "c"], 1)[1] == ["b", "a", "c"]
    assert classes_of(["a", None, "b", "b"], 2)[0].tolist() == [-1, -1, 0, 0]


def test_states_and_attention_shares_cover_only_the_body(study, monkeypatch):
    monkeypatch.setattr("metajax.analysis.metadata_attention.FIRST", 5)
    made = study()
    documents = made.corpora.caches[0].documents("validation", 0.4)[:3]
    head, parts = opening(made.corpora, [65])
    assert parts == ["bos", "begin", "metadata", "end"] and head[2] == 65
    rows = with_rows(made, [head, head, head[:1]], documents, 40)
    batch = {name: jnp.asarray(v) for name, v in rows.rows.items()}
    body = rows.rows["is_body"]
    assert body.sum(1).tolist() == [31, 31, 31] and not body[:2, :4].any()  # the last symbol is asked for, not read

    @jax.jit
    def both(model, batch):
        captured = capture(model, batch, "residual", "attention_probabilities")
        return states(model, batch), shares(model, batch), captured

    averaged, shared, captured = jax.device_get(both(made.model, batch))
    by_hand = np.stack([captured["residual"][i][:, body[i]].mean(1) for i in range(3)])
    np.testing.assert_allclose(averaged["states"][:, :-1], by_hand, rtol=2e-4, atol=1e-5)
    attention = captured["attention_probabilities"]  # [B, L, H, T, T]
    np.testing.assert_allclose(shared["heads"][0], attention[0][:, :, body[0]].mean(2), rtol=1e-4, atol=1e-6)
    first = np.flatnonzero(body[0])[:5]
    np.testing.assert_allclose(shared["early"][0], attention[0, -1][:, first].mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shared["heads"].sum(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(shared["uniform"].sum(-1), 1, rtol=1e-4)


def test_tokens_of_a_url_belong_to_its_parts(study):
    made = study(metadata=Metadata(template="{url}"))
    url = "https://www.example.org/a/b?c"
    assert Counter(parts_of(made, list(url.encode()), True)) == {"scheme": 8, "host": 15, "path": 6}
    assert set(parts_of(made, [1, 2], False)) == {"metadata"}
    assert parts_of(study(metadata=Metadata(tokens=2)), [300, 301], False) == ["token_1", "token_2"]


def test_places_in_a_document(study):
    batch = validation(study().corpora, "right").batches[0]
    found = places(batch)
    assert ((found >= 0) == batch["is_body"]).all()
    whole = found[0][batch["segment_ids"][0] == 1]
    assert Counter(whole[whole >= 0].tolist()) == {0: 8, 1: 14, 2: 10}, (
        "of 32 symbols the first 8, then the last third from symbol 22"
    )


def test_the_best_possible_loss_is_that_of_the_evaluated_documents(study):
    made = study(metadata=Metadata(position="append", template="{source}", keep=0.5))
    batches = validation(made.corpora, "right").batches
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    symbols = rows["targets"][rows["is_body"]].reshape(-1, 32) - ord("a")
    sources = rows["tokens"][rows["is_metadata"]].reshape(-1, 3)[:, 1] - ord("A")
    found, nats = best_possible(made.corpora), best_nats(sources, symbols, "source")
    assert len(symbols) == len(sources) == 8
    assert [found["source"][part] for part in ("mean", "first", "last")] == pytest.approx(
        [nats.mean(), nats[:, :8].mean(), nats[:, -10:].mean()]
    )
    assert found["source"]["metadata"] == pytest.approx(np.log(2), abs=0.01), (
        "the text reveals its source, but not whether its metadata is kept"
    )
    assert "metadata" not in found["nothing"] and "metadata" not in best_possible(study().corpora)["source"]


def test_the_classifier_tells_texts_of_different_words():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    bodies = [rng.integers(50, size=20) + 25 * c for c in y]
    weights = train_classifier(counts_of(bodies), y, 2)
    other = [rng.integers(50, size=20) + 25 * c for c in y]
    assert np.mean((counts_of(other) @ weights).argmax(1) == y) > 0.9


@pytest.mark.slow
def test_every_analysis_is_on_the_page(study, monkeypatch, tmp_path):
    for name, value in {"TEXTS": 8, "TOKENS": 6, "STRENGTHS": (0.0, 1.5)}.items():
        monkeypatch.setattr(guidance_module, name, value)
    monkeypatch.setattr(probes_module, "LEAST", 10)
    monkeypatch.setattr(probes_module, "STEPS", 20)
    made = study(**{"evaluation.labels": ("{group}",)})
    names = ("probes", "metadata_attention", "guidance", "by_position")
    assert set(names) < set(analysis.fitting(made))
    found = dict(analysis.run(made, names, tmp_path))
    assert found["probes"]["layers"] == 3 and 0 <= found["probes"]["label_0"]["balanced"]["mlp"]["middle"] <= 1
    parts = found["metadata_attention"]["parts"]
    assert sum(part["mean"] for part in parts.values()) == pytest.approx(1, abs=1e-3) and parts["metadata"]["tokens"] == 1
    assert {"g_0", "g_1_5", "real", "topics"} < found["guidance"].keys() and found["guidance"]["texts"] == 8
    shown = analysis.sections(tmp_path)
    assert [section["name"] for section in shown] == sorted(names)
    assert all(section["lines"] and section["figures"] for section in shown)


def test_a_missing_input_of_an_analysis_is_named(study, tmp_path):
    appended = study(metadata=Metadata(position="append", template="{source}"))
    for name, message in (("metadata_attention", "no metadata before"), ("guidance", "needs metadata with text")):
        with pytest.raises(UserError, match=message):
            list(analysis.run(appended, [name], tmp_path))
    with pytest.raises(UserError, match=r"evaluation\.labels names no template"):
        list(analysis.run(study(**{"evaluation.labels": None}), ["probes"], tmp_path))
