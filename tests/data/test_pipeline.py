"""batch = f(step, seed): direct, iterated, resumed, on one host or four, across the switch and across an epoch's boundary."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.config import Metadata, MetaTokens
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data import pipeline
from metajax.data.documents import BadRecord
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Paths, derive_seed, open_corpora, read_batches, training_batches, training_rows
from metajax.data.sources import open_source
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes
from metajax.evaluation.validation import validation

ROOT = Path(__file__).parents[2]
PLAIN = {}
FULL = {
    "metadata": Metadata(template="{topic}", keep=0.7, loss_weights=(0.5, 1.0)),
    "meta_tokens": MetaTokens(rate=0.1),
    "data.weights": (0.75, 0.25),
    "data.switch": {"step": 3, "weights": (0.25, 0.75)},
    "data.sequence_length": 48,
    "data.packing": "best_fit",
}
CONDITIONS = ("none", "right", "empty", "shuffled")


@pytest.fixture(scope="module")
def full(tiny_config, tiny_corpus):
    """full(**changes) -> a config with metadata, meta-tokens and two sources that change weights at step 3."""
    sources = tuple(f"jsonl:{tiny_corpus}?origin={column}" for column in ("module", "topic"))
    return lambda **changes: override(tiny_config(**{**FULL, "data.sources": sources}), changes)


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def differ(first, second):
    return any((first[name] != second[name]).any() for name in first if first[name].shape == second[name].shape)


def batches_of(config, paths, **hosts):
    return training_batches(open_corpora(config, paths), **hosts)


def epoch_rows(corpora):
    """Number of rows in an epoch of a one-source corpus, counted until every body token has been a target."""
    [cache] = corpora.caches
    left = int(cache.lengths[cache.documents("train", corpora.config.data.validation_share)].sum())
    for n in itertools.count(1):
        left -= int(training_rows(corpora)[n - 1]["is_body"].sum())
        assert left >= 0, "a body token was a target twice in an epoch"
        if left == 0:
            return n
    raise AssertionError


# -------------------------------------------------------------------------------------------- a function of the step


def test_shapes_and_types(full, paths):
    for length, positions in (("within", 48), ("added", 52)):
        batch = batches_of(full(**{"meta_tokens.length": length}), paths)[0]
        assert set(batch["loss_weights"].flat) == {0.0, 0.5, 1.0}, "half is metadata.loss_weights"
        assert batch.pop("meta_positions").shape == (4, 4)
        assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(batch, (4, positions))
        types = {name: values.dtype.name for name, values in batch.items()}
        assert types == dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32") | dict.fromkeys(
            ("is_body", "is_metadata", "asks_metadata"), "bool"
        ) | {"loss_weights": "float32"}


def test_step_1000_directly_and_after_999_others(full, paths):
    batches = batches_of(full(), paths)
    step = None
    for step, batch in enumerate(read_batches(batches, 0, 0)):
        if step in (0, 2, 3, 4, 17, 1000):
            same(batch, batches[step])
        if step == 1000:
            break
    assert step == 1000
    assert differ(batches[1000], batches[999])


@pytest.mark.parametrize("start", [1, 2, 3, 5, 10**9])
def test_resume_anywhere_also_across_the_switch(full, paths, start):
    batches = batches_of(full(), paths)
    resumed = read_batches(batches_of(full(), paths), start, 0)
    for step in range(start, start + 5):
        same(next(resumed), batches[step])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_global_batch(full, paths, hosts):
    whole = batches_of(full(), paths)
    shards = [batches_of(full(), paths, host=host, hosts=hosts) for host in range(hosts)]
    same(next(read_batches(shards[-1], 5, 0)), shards[-1][5])  # a host may have a single row
    for step in (0, 2, 3, 4, 500):
        parts = [shard[step] for shard in shards]
        assert all(len(part["tokens"]) == 4 // hosts for part in parts)
        same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, whole[step])


def test_hosts_that_do_not_divide_the_batch(full, paths):
    with pytest.raises(UserError, match=r"data\.batch_size = 4 does not divide by 3 hosts"):
        batches_of(full(), paths, hosts=3)


def test_rows_do_not_depend_on_the_size_of_the_batch(tiny_config, paths):
    small, large = (batches_of(tiny_config(**{"data.batch_size": rows, "meta_tokens": MetaTokens()}), paths) for rows in (2, 6))
    parts = [small[step] for step in (3, 4, 5)]
    same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, large[1])


def test_a_fresh_cache_gives_the_same_batches_and_another_seed_others(full, paths, tmp_path):
    first, again = batches_of(full(), paths), batches_of(full(), Paths(cache=tmp_path))
    other = batches_of(full(seed=1), paths)
    for step in (0, 5, 100):
        same(first[step], again[step])
        assert differ(first[step], other[step])


def test_experiments_that_share_a_cache_do_not_share_rows(tiny_config, tmp_path):
    metadata = [Metadata(template=template, keep=keep) for template in ("{topic}", "{module}") for keep in (0.5, 1.0)]
    changes = [
        {},
        {"data.packing": "best_fit"},
        {"data.sequence_length": 40},
        {"data.validation_share": 0.3},
        {"data.tokenizer": "bpe:320"},
    ]
    changes += [{"metadata": recipe, "data.sequence_length": 48} for recipe in metadata] + [{"seed": 1}]
    configs = [tiny_config(**{"meta_tokens": MetaTokens(), **change}) for change in changes]
    for i, config in enumerate(configs):
        fresh, shared = (batches_of(config, Paths(cache=tmp_path / name)) for name in (f"{i}", "shared"))
        for step in (0, 9):
            same(fresh[step], shared[step])


@pytest.mark.parametrize("use", ["order", "shuffle", "inject"])
def test_the_seed_changes_every_random_choice(tiny_config, paths, monkeypatch, use):
    """If only one choice gets another seed, the batches change."""
    monkeypatch.setattr(pipeline, "derive_seed", lambda name, seed, *rest: derive_seed(name, seed if name == use else 0, *rest))
    first, other = (batches_of(tiny_config(seed=seed, meta_tokens=MetaTokens()), paths) for seed in (0, 1))
    assert all(differ(first[step], other[step]) for step in (0, 5))
    assert (first[0]["meta_positions"] != other[0]["meta_positions"]).any() == (use == "inject")


def test_the_switch_changes_the_counts_of_the_sources(tiny_config, tiny_corpus, paths, tmp_path):
    """Two sources told apart by case; 4 rows a step at 3 : 1, from step 3 on at 1 : 3."""
    table = [json.loads(line) for line in tiny_corpus.read_text().splitlines()]
    (tmp_path / "upper.jsonl").write_text("".join(json.dumps({**r, "text": r["text"].upper()}) + "\n" for r in table))
    sources = (f"jsonl:{tiny_corpus}?origin=module", f"jsonl:{tmp_path / 'upper.jsonl'}?origin=module")
    changes = {"data.sources": sources, "data.weights": (0.75, 0.25), "data.switch": {"step": 3, "weights": (0.25, 0.75)}}
    batches = batches_of(tiny_config(**changes), paths)
    upper = []
    for step in range(8):
        is_lower = (batches[step]["tokens"] >= ord("a")) & (batches[step]["tokens"] <= ord("z"))
        upper.append(int((is_lower.sum(1) == 0).sum()))
    assert upper == [1, 1, 1, 3, 3, 3, 3, 3]


SWITCHES = [{"unseen": 0.4}, {"metadata": "none"}, {"metadata": "none", "unseen": 0.4, "weights": (0.5, 0.5)}]


@settings(max_examples=8, deadline=None)
@given(switch=st.sampled_from(SWITCHES), step=st.integers(1, 6), start=st.integers(0, 8))
def test_a_switch_of_the_phase_keeps_resume_exact(full, paths, switch, step, start):
    config = full(**{"data.switch": {"step": step, **switch}, "training.steps": 9})
    batches = batches_of(config, paths)
    resumed = read_batches(batches_of(config, paths), start, 0)
    for n in range(start, start + 3):
        same(next(resumed), batches[n])


# ------------------------------------------------------------------------------------------------------------ epochs


@pytest.mark.parametrize("changes", [PLAIN, {"meta_tokens": MetaTokens()}, {"metadata": Metadata(template="{topic}", keep=0.5)}])
def test_an_epoch_is_every_row_once_and_the_next_one_shuffles_the_same_rows(tiny_config, paths, changes):
    corpora = open_corpora(tiny_config(**{"data.sequence_length": 40, **changes}), paths)
    rows, meta = training_rows(corpora), corpora.tokenizer.vocabulary.meta
    count = epoch_rows(corpora)
    epochs = [[rows[epoch * count + n] for n in range(count)] for epoch in range(3)]
    texts = [[row["tokens"][row["tokens"] != meta].tobytes() for row in epoch] for epoch in epochs]
    assert Counter(texts[0]) == Counter(texts[1]) == Counter(texts[2])
    assert texts[0] != texts[1] != texts[2] != texts[0]
    if "meta_tokens" in changes:
        positions = [
            {text: row["meta_positions"].tolist() for text, row in zip(*pair, strict=True)}
            for pair in zip(texts, epochs, strict=True)
        ]
        assert positions[0] != positions[1], "meta-tokens are placed anew in every epoch"
    batches = training_batches(corpora)
    boundary = count // 4
    expected = rows[4 * boundary], rows[4 * boundary + 3]
    same({name: values[0] for name, values in batches[boundary].items()}, expected[0])
    same({name: values[3] for name, values in batches[boundary].items()}, expected[1])


WITHIN, ADDED = MetaTokens(), MetaTokens(loss="real_only", length="added")
DROPPED, PLAIN_TEXT = Metadata(template="{topic}", keep=0.6), Metadata(template="{topic} ", wrap="plain")
BEHIND = Metadata(position="append", template="{topic}", assigned="shuffled")
BOTH = Metadata(position="both", appended="{topic}", tokens=5, bos_eos="inside")


@pytest.mark.parametrize(
    ("packing", "meta", "metadata"),
    [
        ("concat", None, None),
        ("best_fit", WITHIN, None),
        ("concat", ADDED, DROPPED),
        ("best_fit", None, DROPPED),
        ("concat", WITHIN, PLAIN_TEXT),
        ("best_fit", ADDED, BEHIND),
        ("concat", None, BEHIND),
        ("best_fit", WITHIN, BOTH),
    ],
)
def test_an_epoch_has_every_body_token_as_a_target(tiny_config, paths, packing, meta, metadata):
    config = tiny_config(**{"data.packing": packing, "meta_tokens": meta, "metadata": metadata, "data.sequence_length": 40})
    corpora = open_corpora(config, paths)
    [cache] = corpora.caches
    train = cache.documents("train", config.data.validation_share)
    expected = Counter(np.concatenate([cache[i] for i in train.tolist()]).tolist())
    rows, asked = training_rows(corpora), Counter()
    for n in range(epoch_rows(corpora)):
        asked.update(rows[n]["targets"][rows[n]["is_body"]].tolist())
    assert asked == expected


def test_documents_that_keep_metadata_differ_between_seeds_and_not_between_epochs(tiny_config, paths):
    shown = []
    for seed in (0, 1):
        corpora = open_corpora(
            tiny_config(seed=seed, metadata=Metadata(template="{topic}", keep=0.5), **{"data.sequence_length": 48}), paths
        )
        rows, count = training_rows(corpora), epoch_rows(corpora)
        shown.append([sum(int(rows[e * count + n]["is_metadata"].sum()) for n in range(count)) for e in range(2)])
    assert shown[0][0] == shown[0][1] and shown[1][0] == shown[1][1] and shown[0] != shown[1]


# -------------------------------------------------------------------------------------------------------- evaluation


def test_validation_and_training_share_no_origin(full, paths):
    config = full()
    for cache, column in zip(open_corpora(config, paths).caches, ("module", "topic"), strict=True):
        names = [fields[column] for fields in cache.metadata()]
        train, held = (
            {names[i] for i in cache.documents(split, config.data.validation_share)} for split in ("train", "validation")
        )
        assert train and held and not train & held and train | held == set(names)


def body_targets(batches):
    return np.concatenate([row["targets"][row["is_body"]] for row in unstack(batches)])


def unstack(batches):
    return [{name: values[i] for name, values in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


@pytest.mark.parametrize(
    ("tokenizer", "meta", "position"),
    [
        ("byte", None, "prepend"),
        ("bpe:320", MetaTokens(), "prepend"),
        ("byte", MetaTokens(loss="real_only"), "append"),
        ("bpe:320", None, "both"),
        ("byte", None, "none"),
    ],
)
def test_every_condition_scores_the_same_text(tiny_config, tiny_corpus, paths, tokenizer, meta, position):
    """Every body token of the chosen documents is a target once, in any order of rows, and their bytes are exact."""
    config = tiny_config(
        **{
            "metadata": Metadata(position=position, template="{topic}"),
            "meta_tokens": meta,
            "data.tokenizer": tokenizer,
            "data.sequence_length": 48,
        }
    )
    corpora = open_corpora(config, paths)
    table = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    available = corpora.caches[0].documents("validation", config.data.validation_share)
    chosen = available[np.argsort(uniform_hash(EVALUATION_SEED, available))][:5]
    text = "".join(table[i] for i in chosen.tolist())
    asked = np.sort(np.concatenate([corpora.caches[0][i] for i in chosen.tolist()]))
    shown = {}
    for condition in CONDITIONS:
        held = validation(corpora, condition)
        assert (held.documents, held.body_bytes) == (5, len(text.encode()))
        np.testing.assert_array_equal(np.sort(body_targets(held.batches)), asked, err_msg=condition)
        assert all(batch["tokens"].shape == (4, 48) for batch in held.batches)
        assert held.metadata_tokens == sum(int(row["is_metadata"].sum()) for row in unstack(held.batches))
        shown[condition] = held.metadata_tokens
    assert shown["none"] == 0 < shown["empty"] < shown["right"]
    assert shown["shuffled"] > shown["empty"]


def test_evaluation_rows_do_not_depend_on_the_seed(full, paths):
    first, other = (validation(open_corpora(full(seed=seed, **{"evaluation.documents": 9}), paths), "right") for seed in (0, 7))
    assert first.documents == 10 and len(first.batches) == len(other.batches)
    for a, b in zip(first.batches, other.batches, strict=True):
        same(a, b)


@pytest.mark.parametrize("position", ["prepend", "append"])
def test_right_metadata_is_the_documents_own_and_shuffled_anothers(tiny_config, tiny_corpus, paths, position):
    recipe = Metadata(position=position, template="{module}")
    config = tiny_config(metadata=recipe, **{"data.sequence_length": 512, "data.packing": "best_fit"})
    corpora = open_corpora(config, paths)
    vocabulary = corpora.tokenizer.vocabulary
    modules = {row["text"][:8]: row["module"] for row in map(json.loads, tiny_corpus.read_text().splitlines())}
    for condition in ("right", "shuffled"):
        seen = Counter()
        for row in unstack(validation(corpora, condition).batches):
            for segment in range(1, row["segment_ids"].max() + 1):
                tokens = row["tokens"][row["segment_ids"] == segment].tolist()
                if tokens[0] == vocabulary.bos:
                    begin, end = (tokens.index(i) for i in (vocabulary.context_begin, vocabulary.context_end))
                    at = end + 1 if position == "prepend" else 1
                    shown, body = (bytes(part).decode() for part in (tokens[begin + 1 : end], tokens[at : at + 8]))
                    seen[shown == modules[body]] += 1
        assert sum(seen.values()) == 5
        assert seen[True] == 5 if condition == "right" else seen[False] >= 1


# ------------------------------------------------------------------------------------------------------- when it fails


def test_a_row_of_eight_tokens_without_metadata(tiny_config, paths):
    batch = batches_of(tiny_config(**{"data.sequence_length": 8}), paths)[3]
    assert batch["tokens"].shape == (4, 8) and batch["is_body"].any()


def test_errors_name_the_remedy(tiny_config, paths):
    corpora = open_corpora(tiny_config(**{"data.validation_share": 0.9999}), paths)
    with pytest.raises(UserError, match=r"no training document; data.validation_share = 0.9999 takes them all"):
        training_batches(corpora)
    corpora = open_corpora(tiny_config(**{"data.validation_share": 0.0001}), paths)
    with pytest.raises(UserError, match=r"no validation document; raise data.validation_share"):
        validation(corpora, "none")
    corpora = open_corpora(tiny_config(metadata=Metadata(template="{topik}")), paths)
    with pytest.raises(UserError, match="did you mean 'topic'"):
        training_batches(corpora)
    corpora = open_corpora(tiny_config(metadata=Metadata(template="{topic} {topic} {topic}")), paths)
    with pytest.raises(UserError, match=r"choose a shorter metadata\.template or a larger data\.sequence_length"):
        training_batches(corpora)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:320"])
def test_a_bad_record_stops_or_is_left_out(tiny_config, tiny_corpus, tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text("{\n" + tiny_corpus.read_text())
    changes = {"data.sources": (f"jsonl:{tmp_path / 'bad.jsonl'}?origin=module",), "data.tokenizer": tokenizer}
    with pytest.raises(BadRecord, match=r"bad\.jsonl, line 1"):
        open_corpora(tiny_config(**changes), Paths(cache=tmp_path / "cache"))
    corpora = open_corpora(tiny_config(**changes, **{"data.on_bad_record": "skip"}), Paths(cache=tmp_path / "cache"))
    assert corpora.caches[0].manifest["bad_records_skipped"] == 1 and len(corpora.caches[0]) == 120


# ------------------------------------------------------------------------------------------------- reader processes

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from absl import flags
from metajax.config import Config
from metajax.core.fields import from_dict
from metajax.data.pipeline import Paths, open_corpora, read_batches, training_batches

if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    config, paths = from_dict(Config, json.loads(sys.argv[1])), Paths(cache=Path(sys.argv[2]))
    batches = training_batches(open_corpora(config, paths))
    iterator = read_batches(batches, 2, 1)
    for step in range(2, 6):
        batch = next(iterator)
        for name, values in batches[step].items():
            np.testing.assert_array_equal(batch[name], values)
    print("equal")
"""


def test_reader_processes_give_the_same_batches(full, paths, tmp_path):
    from metajax.core.fields import to_dict

    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), json.dumps(to_dict(full())), str(paths.cache)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "equal", done.stderr[-2000:]


@pytest.mark.fault(14)
def test_a_run_reports_documents_without_an_origin(tiny_config, tmp_path):
    """For corpora of one part or several, and with an existing cache. Without a note if every document has an origin."""
    rows = [
        {"text": f"words and words {i}", **({"meta": {"url": f"https://s{i % 9}.org/{i}"}} if i % 2 else {})} for i in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, home = tiny_config(**{"data.sources": ("jsonl:a.jsonl",)}), Paths(cache=tmp_path, data=tmp_path)
    for _ in range(2):
        told = []
        training_rows(open_corpora(config, home), told.append)
        assert len(told) == 1 and "30 of 60 documents have no origin" in told[0]
    source = open_source("jsonl:a.jsonl", cache_dir=tmp_path, data_dir=tmp_path)
    parts = build_token_cache(source, Bytes(), cache_dir=tmp_path / "parts", on_bad_record="stop", part=16)
    assert parts.manifest["tally"] == {"no origin": 30}
    told = []
    training_rows(open_corpora(tiny_config(), home), told.append)
    assert not told
