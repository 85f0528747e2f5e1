"""Shared by all tests: a tiny corpus, a tiny experiment on it, and shape checks in all numerical code."""

import itertools
import json
import os
import signal
import threading
from pathlib import Path

if threading.current_thread() is threading.main_thread():  # a background job of a shell ignores Ctrl-C, and so do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Many tests compile the same small programs: keep them between tests, workers and sessions.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jaxtyping
import numpy as np
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # the time of an example depends on the load of the machine
hypothesis.settings.load_profile("untimed")
jaxtyping.install_import_hook(
    [
        "metajax.models",
        "metajax.analysis",
        "metajax.vision.clip",
        "metajax.vision.delta_tokens",
        "metajax.training.losses",
        "metajax.training.objectives",
        "kernels_pallas",
    ],
    "beartype.beartype",
)  # before any of them is imported

from metajax import registry  # noqa: E402
from metajax.config import Config, Data, Evaluation, Model, Optimizer, Runtime, Training  # noqa: E402
from metajax.core.fields import override  # noqa: E402
from metajax.data.pipeline import Paths  # noqa: E402
from metajax.vision.clip.config import Clip  # noqa: E402
from metajax.vision.data.clip_tokens import MERGES, ClipTokenizer  # noqa: E402

WORDS = [
    "array",
    "axis",
    "batch",
    "cache",
    "carry",
    "check",
    "code",
    "copy",
    "dtype",
    "error",
    "file",
    "float",
    "gradient",
    "head",
    "index",
    "key",
    "layer",
    "length",
    "list",
    "loss",
    "mask",
    "matrix",
    "mean",
    "module",
    "name",
    "number",
    "order",
    "path",
    "point",
    "query",
    "random",
    "return",
    "row",
    "scale",
    "segment",
    "shape",
    "slice",
    "sort",
    "source",
    "state",
    "step",
    "string",
    "sum",
    "table",
    "tensor",
    "text",
    "time",
    "token",
    "tree",
    "type",
    "update",
    "value",
    "vector",
    "weight",
    "window",
]
TOPICS = ("arrays", "files", "graphs", "language", "network", "numbers", "parsing", "random", "storage", "text", "time", "tools")


def words(count, rng):
    """`count` words as sentences of four to nine."""
    text, left = [], count
    while left > 0:
        sentence = [WORDS[i] for i in rng.integers(len(WORDS), size=min(left, int(rng.integers(4, 10))))]
        text.append(" ".join(sentence).capitalize() + ".")
        left -= len(sentence)
    return " ".join(text)


def corpus_rows(documents=120, origins=30):
    """Records with text, module, topic and origin; texts from one letter to several rows."""
    rng = np.random.default_rng(20250601)
    rows = []
    for i in range(documents):
        text = "abcdefgh"[i // 15] if i % 15 == 7 else words(int(rng.choice([2, 5, 12, 30, 60])), rng)
        module = f"{WORDS[i % origins]}_{i % origins}"
        rows.append(
            {"text": text, "module": module, "topic": TOPICS[i % origins % len(TOPICS)], "origin": f"package{i % origins}"}
        )
    return rows


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """The path of a JSON lines file of 120 documents from 30 modules; the same in every session."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows()))
    return path


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Folders of this session's caches and runs."""
    home = tmp_path_factory.mktemp("home")
    return Paths(cache=home / "cache", runs=home / "runs")


@pytest.fixture(scope="session")
def tiny_config(tiny_corpus):
    """tiny_config(**changes) -> Config on the tiny corpus; changes are those of `metajax.config.override`, dotted names too."""
    base = Config(
        name="tiny",
        data=Data(
            sources=(f"jsonl:{tiny_corpus}?origin=module",),
            tokenizer="byte",
            sequence_length=32,
            batch_size=4,
            validation_share=0.2,
        ),
        model=Model(layers=2, width=16, heads=2, mlp_width=32),
        optimizer=Optimizer(warmup_steps=1),
        training=Training(steps=6),
        evaluation=Evaluation(documents=5),
        runtime=Runtime(log_every=1),
    )
    return lambda **changes: override(base, changes)


@pytest.fixture(scope="session")
def clip_config():
    """clip_config(z) -> the Clip of a golden file with `config_json`, the arguments of OpenAI's constructor."""

    def made(z):
        c = json.loads(str(z["config_json"]))
        layers = c["vision_layers"]
        return Clip(
            vision_layers=tuple(layers) if isinstance(layers, list) else (layers,),
            vision_width=c["vision_width"],
            vision_heads=c["vision_heads"],
            text_width=c["transformer_width"],
            text_heads=c["transformer_heads"],
            embed=c["embed_dim"],
            patch=c["vision_patch_size"] or 0,
            image_size=c["image_resolution"],
            text_layers=c["transformer_layers"],
            context=c["context_length"],
            vocab=c["vocab_size"],
        )

    return made


@pytest.fixture(scope="session")
def prompt_clip(clip_config):
    """The frozen CLIP of the golden files of zero-shot classification and prompt learners."""
    from metajax.vision.weights import from_state

    z = np.load(Path(__file__).parent / "goldens" / "prompt_clip_a.npz")
    cfg = clip_config(z)
    embedding = np.zeros((cfg.vocab, cfg.text_width), np.float32)
    embedding[z["token_embedding_used_ids"]] = z["token_embedding_used_rows"]
    state = {key.removeprefix("sd/"): value for key, value in z.items() if key.startswith("sd/")}
    return from_state(state | {"token_embedding.weight": embedding}, cfg, "openai")


@pytest.fixture(scope="session")
def clip_tokenizer(clip_merges):
    """CLIP's tokenizer as in OpenAI's code."""
    return ClipTokenizer.open(clip_merges)


@pytest.fixture(scope="session")
def clip_merges(tmp_path_factory):
    """CLIP's tokenizer file, exact for the texts of the golden files. METAJAX_CLIP_VOCABULARY: the published file, for all texts.

    tests/goldens/clip_merges_used.json holds the merges that can apply to these texts, by their places in the published file. The
    other merges are of 39 bytes that no text has, as ByteLevel writes them: control characters, and bytes that UTF-8 never uses.
    """
    if "METAJAX_CLIP_VOCABULARY" in os.environ:
        return Path(os.environ["METAJAX_CLIP_VOCABULARY"])
    used = json.loads((Path(__file__).parent / "goldens" / "clip_merges_used.json").read_text())
    never = [chr(c) for c in (*range(0x100, 0x109), *range(0x10E, 0x121), *range(0xF5, 0x100))]
    pairs = ["".join(pair) for pair in itertools.product(never, never)]
    others = (f"{a} {b}" for b in (*never, *pairs) for a in never)
    lines = ["#version: 0.2", *(used.get(str(n)) or next(others) for n in range(MERGES))]
    path = tmp_path_factory.mktemp("clip") / "merges.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def own_registry(monkeypatch):
    """All experiments of the project; experiments that the test registers are removed after it."""
    registry.load()  # before the test, because a module registers its experiments only at its first import
    for where in ("_known", "_files", "_broken"):
        monkeypatch.setattr(registry, where, dict(getattr(registry, where)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a test that skips for a missing part that the environment requires (METAJAX_REQUIRE=browser,libtpu)."""
    report = (yield).get_result()
    required = [part for part in os.environ.get("METAJAX_REQUIRE", "").split(",") if part and item.get_closest_marker(part)]
    if report.skipped and required:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although {', '.join(required)} must be there: {report.longrepr}"
