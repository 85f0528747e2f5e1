"""Rows that a checkpoint lacks are in no softmax and never sampled. Ids that end a text come from every file that has them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from metajax.cli.main import main
from metajax.config import Choice, Metadata
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data.documents import is_validation
from metajax.data.pipeline import Paths
from metajax.evaluation.multiple_choice import score
from metajax.evaluation.questions import Question
from metajax.experiment import evaluate_run
from metajax.inference.decoding import Sampling
from metajax.inference.forward import prepare
from metajax.inference.generation import generate, make_rules
from metajax.interop import gpt2
from metajax.interop.exports import export_run
from metajax.interop.files import open_directory
from metajax.interop.imports import import_directory
from metajax.interop.layouts import load_model
from metajax.models.cross_entropy import token_scores, weighted_loss
from metajax.models.lm import named_params
from metajax.runs.files import read_json, read_lines, write_json
from metajax.runs.parents import resolve_parents
from metajax.training.objectives.dpo import preference_sums
from metajax.training.opened import open_run

ROWS, WIDTH, LENGTH, END = 257, 32, 64, "[END]"
TEXTS = [
    f"the {word} of a {thing}" for word in ("sum", "row", "end", "mask") for thing in ("list", "text", "graph", "table", "file")
]


def byte_tokenizer():
    """256 bytes and END, a special token, as id 256."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END, normalized=False)])
    return library


def write_gpt2(folder, config=(), generation=None):
    """A GPT-2 with logits near -32, like the published one, so that added zero logits would dominate the softmax."""
    rng = np.random.default_rng(0)
    small = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    state = {"wte.weight": 0.5 + small(ROWS, WIDTH), "wpe.weight": small(LENGTH, WIDTH)}
    state |= {"ln_f.weight": np.ones(WIDTH, np.float32), "ln_f.bias": np.full(WIDTH, -2.0, np.float32)}
    for norm in ("ln_1", "ln_2"):
        state |= {f"h.0.{norm}.weight": np.ones(WIDTH, np.float32), f"h.0.{norm}.bias": np.zeros(WIDTH, np.float32)}
    for part, i, o in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
        state |= {f"h.0.{part}.weight": small(i * WIDTH, o * WIDTH), f"h.0.{part}.bias": np.zeros(o * WIDTH, np.float32)}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    values = {"model_type": "gpt2", "n_layer": 1, "n_embd": WIDTH, "n_head": 2, "n_positions": LENGTH, "vocab_size": ROWS}
    (folder / "config.json").write_text(json.dumps(values | dict(config)))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def exact(folder):
    """ids -> float64 log-probabilities [T, ROWS], over only the checkpoint's own rows."""
    values, tensors = open_directory(folder, "gpt2")
    model = load_model(gpt2.names(tensors), gpt2.model_config(values), gpt2.LAYOUT, max_length=LENGTH)

    def logs(ids):
        ids = jnp.asarray(ids, jnp.int32)[None]
        logits = model(ids, positions=jnp.arange(ids.shape[1])[None], segment_ids=jnp.ones_like(ids))
        return np.asarray(jax.nn.log_softmax(logits[0]), np.float64)

    return logs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(scope="module")
def corpus(home):
    path = home / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "topic": text[4:7], "origin": str(n)}) + "\n" for n, text in enumerate(TEXTS))
    )
    return path


@pytest.fixture(scope="module")
def negative(home):
    """(opened run, expected log-probabilities) of the checkpoint with logits near -32."""
    folder = write_gpt2(home / "negative", {"eos_token_id": 256})
    return open_run(import_directory("gpt2", folder, home / "runs", "")), exact(folder)


def nats(logs, ids):
    """Nats of each id except the first."""
    return -logs(ids[:-1])[np.arange(len(ids) - 1), ids[1:]]


def of_documents(opened, logs, validation):
    """(nats, tokens, bytes) over the bodies of the validation documents, END before each."""
    texts = [text for n, text in enumerate(TEXTS) if is_validation(str(n), validation)]
    each = [nats(logs, [256, *opened.tokenizer.encode(text)]) for text in texts]
    return sum(x.sum() for x in each), sum(map(len, each)), sum(map(len, texts))


def text_changes(corpus, **changes):
    return {"data.sources": f"jsonl:{corpus}?origin=origin", "data.validation_share": 0.4, "evaluation.documents": 99} | changes


@pytest.mark.fault(1)
def test_likelihoods_use_only_the_checkpoints_rows(negative, corpus, home):
    opened, logs = negative
    ids = [256, *opened.tokenizer.encode("the row")]
    tokens = jnp.asarray(ids)[None]
    logits = np.asarray(opened.model(tokens, positions=jnp.arange(len(ids))[None], segment_ids=jnp.ones_like(tokens)))[0]
    assert logits.shape[1] == 320 and np.all(logits[:, ROWS:] == -np.inf) and logits[:, :ROWS].max() < -20
    np.testing.assert_allclose(jax.nn.log_softmax(logits)[:, :ROWS], logs(ids), atol=2e-5)
    config = override(opened.config, text_changes(corpus))
    found = evaluate_run(opened, config, Paths(cache=home / "cache", runs=home / "runs"))["none"]
    total, count, size = of_documents(opened, logs, 0.4)
    assert (found["body_tokens"], found["body_bytes"]) == (count, size)
    np.testing.assert_allclose(found["bpb"], total / math.log(2) / size, rtol=1e-5)
    assert total / count < 7, "about the log of the rows"


@pytest.mark.fault(1)
def test_choices_use_only_the_checkpoints_rows(negative, corpus, home):
    opened, logs = negative
    question = Question(("the sum",) * 2, (" of a list", " x"), ("of a list", "x"), 0)
    config = override(opened.config, text_changes(corpus, **{"evaluation.choice": Choice(("jsonl:none",))}))
    corpora = opened.open_corpora(config, Paths(cache=home / "cache"))
    found = score(opened.program, corpora, opened.model, [question], [256])
    encode = opened.tokenizer.encode
    expected = [-nats(logs, [256, *encode("the sum" + answer)])[-len(answer) :].sum() for answer in question.answers]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)


@pytest.mark.fault(1)
@pytest.mark.parametrize("recipe", [None, Metadata(template="{topic}", position="append")], ids=["text", "metadata"])
def test_training_starts_at_the_checkpoints_own_loss(negative, corpus, home, recipe):
    """The first step of fine-tuning has the checkpoint's loss; metadata ids without a row add almost nothing."""
    opened, logs = negative
    places = ["--runs-dir", str(home / "runs"), "--cache-dir", str(home / "cache")]
    workdir = home / f"tuned-{recipe is None}"
    changes = text_changes(corpus, **{"init.from": str(opened.workdir), "data.tokenizer": f"run:{opened.workdir}"})
    changes |= {f"model.{name}": value for name, value in vars(opened.config.model).items() if name != "hybrid"}
    changes |= {
        "model.window": "none",
        "data.sequence_length": LENGTH,
        "data.batch_size": 16,
        "training.steps": 1,
        "optimizer.warmup_steps": 0,
    }
    changes |= {"optimizer.z_loss": 1e-4, "evaluation.conditions": "none", "evaluation.sample_tokens": 4}
    changes |= {} if recipe is None else {f"metadata.{k}": getattr(recipe, k) for k in ("template", "position")}
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    assert main(["quickstart/plain", *words, "--workdir", str(workdir), *places]) == 0
    tuned = open_run(workdir)
    vocabulary = tuned.tokenizer.vocabulary
    added = () if recipe is None else (vocabulary.context_begin, vocabulary.context_end)
    assert tuned.config.imported == override(opened.config, {"imported.added": added, "imported.opens": True}).imported
    (line,) = read_lines(workdir / "metrics.jsonl")
    assert math.isfinite(line["loss"]) and line["loss"] > line["nll"]
    rest = [n for n in range(len(TEXTS)) if not is_validation(str(n), 0.4)]
    each = [nats(logs, [256, *opened.tokenizer.encode(TEXTS[n])]) for n in rest]
    own = np.concatenate(each).mean()
    assert own - 0.05 < line["body_nll"] < own + 0.05 + math.log1p(len(added) / ROWS), "rows repeat and mix documents"
    rows = named_params(tuned.model)["embedding"][...]
    assert math.isfinite(json.loads((workdir / "report.json").read_text())["eval"]["none"]["bpb"])
    assert jnp.isfinite(rows).all()
    export_run(tuned, "gpt2", home / f"export-{recipe is None}")
    values = json.loads((home / f"export-{recipe is None}" / "config.json").read_text())
    assert values["vocab_size"] == (ROWS if recipe is None else max(added) + 1)


@pytest.mark.fault(1)
def test_a_run_adds_the_ids_of_its_training_targets(negative, home):
    opened, _ = negative
    words = opened.tokenizer.vocabulary
    base = {"imported": None, "init.from": str(opened.workdir), "data.tokenizer": f"run:{opened.workdir}"}

    def resolved(**changes):
        return resolve_parents(override(opened.config, {**base, **changes}), {}, home / "runs")[0].imported

    delimiters = (words.context_begin, words.context_end)
    assert resolved().added == () and resolved().ends == (256,)
    assert resolved(metadata=Metadata(position="append")).added == delimiters
    assert resolved(metadata=Metadata()).added == (), "before the text they are inputs, not targets"
    assert resolved(metadata=Metadata(loss_weights=(1.0, 1.0))).added == delimiters
    assert resolved(metadata=Metadata(position="append", tokens=2)).added == (*delimiters, *words.spare[:2])
    assert resolved(metadata=Metadata(position="append", wrap="plain")).added == ()
    assert resolved(**{"init.from": f"{opened.workdir}?blocks"}) is None, "the run has its own table"
    with pytest.raises(UserError, match=r"init\.from fills it in"):
        resolved(imported=opened.config.imported)


@pytest.mark.fault(1)
def test_what_no_one_asks_for_has_no_loss():
    """Padding is such a target: its logit is -inf, and neither loss nor gradient knows of it."""
    logits, targets = jnp.array([[[0.0, 1.0, 2.0]] * 4]), jnp.array([[0, 1, 2, 2]])
    weights, absent, matrix = jnp.array([[1.0, 1.0, 0.0, 0.0]]), jnp.array([False, False, True]), jnp.eye(3)

    def loss(logits, size=4):
        return weighted_loss(logits[:, :size], matrix, targets[:, :size], weights[:, :size], absent, 1e-3)[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == loss(logits, 2) and jnp.isfinite(gradient).all()
    nll = token_scores(logits, matrix, targets, absent).nll
    assert jnp.isinf(nll[0, 2:]).all()
    rewards = lambda nll: preference_sums(nll, nll, weights, jnp.array([[1, 2, 2, 0]]), 0.1)[0]  # noqa: E731
    assert jnp.isfinite(rewards(nll)) and jnp.isfinite(jax.grad(rewards)(nll)).all()


@pytest.mark.fault(1)
def test_text_that_the_checkpoint_has_no_rows_for_is_refused(home, corpus, capsys):
    """A tokenizer with more tokens than the checkpoint is imported with a warning, and such text is never scored."""
    folder = write_gpt2(home / "short")
    library = byte_tokenizer()
    library.add_tokens(["graph"])
    library.save(str(folder / "tokenizer.json"))
    opened = open_run(import_directory("gpt2", folder, home / "runs", ""))
    assert "has 258 tokens, the checkpoint 257" in capsys.readouterr().err
    with pytest.raises(UserError, match="tokens without a row in the checkpoint, which has 257"):
        evaluate_run(
            opened, override(opened.config, text_changes(corpus, **{"data.validation_share": 0.9})), Paths(cache=home / "cache")
        )


# ---------------------------------------------------------------------------------------------------------- draws


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(50.0), Sampling(50.0, top_k=300), Sampling(50.0, top_p=0.9999)], ids=str
)
def test_only_tokens_with_a_row_are_sampled(negative, sampling):
    opened, _ = negative
    rules = make_rules(opened.config, opened.tokenizer.vocabulary, sampling, 0)
    allowed = np.flatnonzero(~np.asarray(rules.banned))
    assert np.array_equal(allowed, np.arange(ROWS)) and rules.ends.tolist() == [256]
    logits = jnp.where(rules.banned, -jnp.inf, jnp.linspace(-130.0, 200.0, 320))
    drawn = jax.vmap(sampling.draw, (None, 0))(logits, jax.random.split(jax.random.key(0), 500))
    assert drawn.max() < ROWS and (sampling.temperature == 0 or len(set(drawn.tolist())) > 100)


@pytest.mark.fault(27)
def test_temperatures_of_all_sizes(negative):
    logits, keys = jnp.linspace(-130.0, -30.0, 64), jax.random.split(jax.random.key(0), 50)
    for temperature in (1e-320, 1e-38, 1e-6):
        assert (jax.vmap(Sampling(temperature).draw, (None, 0))(logits, keys) == 63).all()
    hot = jax.vmap(Sampling(1e6).draw, (None, 0))(jnp.where(jnp.arange(64) < 32, logits, -jnp.inf), keys)
    assert hot.max() < 32
    for temperature in (math.inf, math.nan, -1.0):
        with pytest.raises(UserError, match="temperature"):
            Sampling(temperature)


class Spelled:
    """A tokenizer that writes every id as a character of its own."""

    def __init__(self, own):
        self.vocabulary, self.encode = own.vocabulary, own.encode

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


def greedy(opened):
    """The ids that follow a prompt."""
    options, prompt = {"count": 24, "sampling": Sampling(0.0)}, [256, *opened.tokenizer.encode("the")]
    (text,) = generate(prepare(opened.model), opened.config, Spelled(opened.tokenizer), [prompt], **options)
    return [ord(c) - 0x4E00 for c in text]


@pytest.mark.fault(2)
@pytest.mark.parametrize("where", ["config", "config list", "generation", "generation list"])
def test_ends_are_read_from_every_file(negative, home, where):
    """Generated text stops before the first end token, whichever file names its id."""
    ids = greedy(negative[0])
    end = next(i for i in ids[2:] if i not in ids[:2])
    said = {"eos_token_id": [256, end] if "list" in where else end}
    config, generation = (said, None) if where.startswith("config") else ({"eos_token_id": 256}, said)
    folder = write_gpt2(home / where.replace(" ", "_"), config, generation)
    workdir = import_directory("gpt2", folder, home / "runs", "")
    opened = open_run(workdir)
    assert end in opened.config.imported.ends
    assert json.loads((workdir / "imported.json").read_text())["ends"] == list(opened.config.imported.ends)
    assert opened.tokenizer.vocabulary.bos == opened.tokenizer.vocabulary.eos == opened.config.imported.ends[0]
    if opened.tokenizer.vocabulary.bos == 256:
        assert greedy(opened) == ids[: ids.index(end)]


@pytest.mark.fault(2)
def test_ends_without_a_row_are_ignored(home, capsys):
    folder = write_gpt2(home / "null", {"eos_token_id": None}, {"eos_token_id": [50256, -1]})
    workdir = import_directory("gpt2", folder, home / "runs", "")
    opened = open_run(workdir)
    assert opened.config.imported.ends == (), "no end id has a row"
    assert "name no token that begins or ends a text" in capsys.readouterr().err
    assert max(greedy(opened)) < ROWS
    saved = read_json(workdir / "config.json")
    del saved["config"]["imported"]
    write_json(workdir / "config.json", saved)
    with pytest.raises(UserError, match="imported by an older version"):
        open_run(workdir)
    (folder / "generation_config.json").write_text('{"eos_token_id": "256"}')
    places = ["--runs-dir", str(home / "other"), "--cache-dir", str(home / "cache")]
    assert main(["import", "gpt2", str(folder), *places]) == 2
    assert "eos_token_id = '256'" in capsys.readouterr().err
