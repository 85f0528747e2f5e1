"""From a config to batches: batch = f(step, seed), the same for any number of hosts.

Sources are tokenised once, packed as an index, assembled row by row, shuffled and repeated by grain, mixed, and injected
with meta-tokens. Only then each host takes its slice of the global batch. To resume, the stream is read from `step`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grain
import numpy as np
from absl import flags

from metajax.config import Config
from metajax.core.errors import require
from metajax.core.interrupts import be_deaf, start_tracker
from metajax.core.progress import warn
from metajax.core.sealed import FORMAT, Sealed, save_array, sealed_folder
from metajax.data.cache import TokenCache, build_metadata_table, digest, read_documents
from metajax.data.documents import is_validation
from metajax.data.encoding import Tokenizer
from metajax.data.meta_tokens import inject
from metajax.data.metadata import MetadataIds, Placed, Placement, check_fields, delimiters, dropped_owner, owners, uniform_hash
from metajax.data.mixture import Mixture
from metajax.data.names import check_names
from metajax.data.packing import RowIndex, most_overhead, pack
from metajax.data.pairs import pair_rows
from metajax.data.positions import spots
from metajax.data.questions import QuestionFile
from metajax.data.rows import Row, RowSource, finish, padding_row, stack
from metajax.data.sources import open_source, parse_spec, place_of, source_notes
from metajax.data.sources.files import JOINED
from metajax.data.tasks.examples import PAUSES, Examples, TaskRows, assemble
from metajax.data.tokenising import Make, build_token_cache, in_processes
from metajax.data.tokenizers import open_tokenizer

Note = Callable[[str], None]
EVALUATION_SEED = 20_250_601  # gives every run the same order of validation documents and the same meta-token positions


@dataclass(frozen=True)
class Paths:
    """Folders of this machine; never part of an experiment."""

    cache: Path = Path("cache")
    data: Path | None = None
    runs: Path = Path("runs")


@dataclass(frozen=True)
class Corpora:
    """The tokenised sources of a config and the tokenizer they share."""

    config: Config
    tokenizer: Tokenizer
    caches: tuple[TokenCache, ...]
    paths: Paths

    @property
    def key(self) -> str:
        """Identity of the data: changes when a source or the tokenizer changes."""
        return digest(self.tokenizer.fingerprint(), *(cache.key for cache in self.caches))

    def where(self, cache: TokenCache) -> Callable[[int], str]:
        """A function from a document of a cache to its file and record, for errors."""
        return partial(place_of, cache.manifest, self.config.data.on_bad_record, self.paths.cache, self.paths.data)

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per body token, over all sources."""
        return sum(c.manifest["bytes"] for c in self.caches) / max(1, sum(c.manifest["tokens"] for c in self.caches))


def derive_seed(*parts: object) -> int:
    """A 32-bit seed for one purpose, independent of the seeds of all other purposes."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "little")


def open_corpora(config: Config, paths: Paths, make: Make = in_processes) -> Corpora:
    """Open or build the tokenizer and caches of a config. The first call for a corpus tokenises it, its parts by `make`."""
    check_names(config)
    data = config.data
    sources = [open_source(spec, cache_dir=paths.cache, data_dir=paths.data) for spec in data.sources]

    def training_texts() -> Iterator[str]:
        for source in sources:
            for _, document in read_documents(source, data.on_bad_record):
                if document is not None and not is_validation(document.origin, data.validation_share):
                    yield document.text

    fingerprint = digest([s.fingerprint() for s in sources], data.validation_share, data.on_bad_record)
    tokenizer = open_tokenizer(
        data.tokenizer, cache_dir=paths.cache, data_dir=paths.data, corpus_fingerprint=fingerprint, texts=training_texts
    )
    caches = tuple(
        build_token_cache(
            source,
            tokenizer.marked() if parse_spec(source.spec).columns.markers else tokenizer,
            cache_dir=paths.cache,
            on_bad_record=data.on_bad_record,
            make=make,
        )
        for source in sources
    )
    for cache in caches:
        require("joined" not in cache.manifest["source"] or bool(cache.manifest["tally"].get(JOINED)), " ".join(notes(cache)))
    return Corpora(config, tokenizer, caches, paths)


def notes(cache: TokenCache) -> list[str]:
    """Notes for the user about a tokenised corpus, one line each."""
    manifest, source = cache.manifest, cache.manifest["source"]
    return source_notes(source["spec"], manifest["documents"], manifest.get("tally", {}), source.get("joined", {}).get("ids"))


# ------------------------------------------------------------------------------------------------------ rows


def _ids_of(corpora: Corpora, cache: TokenCache, template: str, condition: str, documents: np.ndarray) -> MetadataIds:
    """The strings of a template. With template "", the learnable tokens are the only string, which all documents share."""
    recipe, tokenizer = corpora.config.metadata, corpora.tokenizer
    if template:
        check_fields(template, set(cache.manifest["metadata_fields"]), cache.manifest["source"]["spec"])
        table = build_metadata_table(cache, tokenizer, template)
        ids, offsets, present = table.ids, table.offsets, table.present
    else:
        ids, offsets = np.array(tokenizer.vocabulary.spare[: recipe.tokens], np.int32), np.array([0, recipe.tokens])
        present = np.ones(len(cache), bool)
    strings = table.strings(documents) if template and condition == "shuffled" else None
    owner = owners(recipe, condition, present, documents, derive_seed("keep", corpora.config.seed, cache.key), strings)
    owner = owner if template else np.minimum(owner, 0)
    return MetadataIds(ids, offsets, owner, *delimiters(recipe, tokenizer))


def _placement(corpora: Corpora, cache: TokenCache, condition: str, documents: np.ndarray, note: Note) -> Placement:
    """The metadata of the documents. With `metadata.too_long == "drop"`, metadata too long for a row is dropped with a note."""
    recipe = corpora.config.metadata
    if recipe is None or condition == "none" or (condition == "training" and recipe.position == "none"):
        return Placement()
    parts = tuple(
        Placed(spot.at, _ids_of(corpora, cache, spot.template, condition, documents), spot.loss_weight) for spot in spots(recipe)
    )
    placement = Placement(parts, recipe.bos_eos == "outside")
    most = most_overhead(row_capacity(corpora.config))
    long = documents[placement.overhead(documents) > most]
    if len(long) and recipe.too_long == "drop":
        for part in parts:
            part.ids.owner[long] = dropped_owner(recipe)
        note(
            f"{cache.manifest['source']['spec']}: the metadata of {len(long)} of {len(documents)} documents ({condition}) takes more than "
            f"the {most} tokens that a row has for it and was dropped, first that of document {long.min()}"
        )
    return placement


def _index(corpora: Corpora, cache: TokenCache, placement: Placement, documents: np.ndarray, style: str) -> RowIndex:
    """The packed row index. It is built once for each recipe, then memory-mapped and checked against its hash."""
    config = corpora.config
    capacity = row_capacity(config)
    overhead = placement.overhead(documents)
    recipe = hashlib.sha256(documents.tobytes() + overhead.tobytes()).hexdigest()
    folder = corpora.paths.cache / "rows" / digest(FORMAT, cache.key, recipe, capacity, style)
    if not folder.exists():
        index = pack(documents, np.asarray(cache.lengths)[documents] + 1, overhead, capacity, style, corpora.where(cache))
        with sealed_folder(folder) as work:
            save_array(work / "pieces.npy", index.pieces)
            save_array(work / "offsets.npy", index.offsets)
    sealed = Sealed(folder)
    return RowIndex(sealed.array("pieces.npy"), sealed.array("offsets.npy"))


def row_capacity(config: Config) -> int:
    """Positions of a row for text and metadata, without those of the meta-tokens."""
    return config.row_positions - meta_count(config)


def meta_count(config: Config) -> int:
    """M, the number of meta-tokens injected into every row."""
    return config.meta_tokens.count(config.data.sequence_length) if config.meta_tokens else 0


def _rows(
    corpora: Corpora, cache: TokenCache, condition: str, documents: np.ndarray, packing: str, note: Note = warn
) -> RowSource:
    placement = _placement(corpora, cache, condition, documents, note)
    if condition == "training" and corpora.config.dpo is not None:
        column, capacity = corpora.config.dpo.rejected, row_capacity(corpora.config)
        return pair_rows(column, corpora.tokenizer, cache, placement, documents, capacity, corpora.where(cache))
    index = _index(corpora, cache, placement, documents, packing)
    inputs = int(cache.lengths[documents].sum(dtype=np.int64)) + len(documents)
    left_out = inputs - int(index.pieces[:, 2].sum(dtype=np.int64))
    if left_out:
        note(
            f"{cache.manifest['source']['spec']}: data.packing={packing} leaves out {left_out:,} of {inputs:,} tokens, the rest of "
            "documents that the end of a row cuts"
        )
    return RowSource(index, cache.__getitem__, placement, corpora.tokenizer.vocabulary, row_capacity(corpora.config))


def complete_row(row: Row, rng: np.random.Generator, *, config: Config, meta_id: int) -> Row:
    """The last two steps of every row: inject meta-tokens, then add positions."""
    if config.meta_tokens is not None:
        row = inject(row, rng, meta=config.meta_tokens, count=meta_count(config), meta_id=meta_id)
    return finish(row, attend_across_documents=config.data.attend_across_documents)


def phase_rows(corpora: Corpora, i: int, phase: int = 0, note: Note = warn) -> RowSource:
    """The training rows of source i, each once, for phase 0 (before the data switch) or phase 1 (after it)."""
    data, seed, cache = corpora.config.data, corpora.config.seed, corpora.caches[i]
    documents = cache.documents("train", data.validation_share, data.min_bytes)
    require(
        len(documents) > 0,
        f"{data.sources[i]} has no training document; data.validation_share = {data.validation_share} takes them all, or data.min_bytes = "
        f"{data.min_bytes} does",
    )
    require(
        bool(np.asarray(cache.lengths)[documents].any()),
        f"the training documents of {data.sources[i]} have no text; its column of text is named with ?text=COLUMN",
    )
    if data.switch is not None and data.switch.unseen:
        is_later = uniform_hash(derive_seed("unseen", seed, i), documents) < data.switch.unseen
        documents = documents[is_later == bool(phase)]
        require(
            len(documents) > 0, f"{data.sources[i]}: data.switch.unseen = {data.switch.unseen} leaves no document on one side"
        )
    order = documents[np.argsort(uniform_hash(_phase_seed("order", seed, i, phase), documents), kind="stable")]
    condition = "none" if phase and data.switch.metadata == "none" else "training"
    return _rows(corpora, cache, condition, order, data.packing, note)


def _phase_seed(use: str, seed: int, i: int, phase: int) -> int:
    return derive_seed(use, seed, i, phase) if phase else derive_seed(use, seed, i)


def training_rows(corpora: Corpora, note: Note = warn) -> grain.MapDataset:
    """Row n of the run, for every n: an endless random-access dataset that depends only on the config and the seed.

    `note` is called with a line for each kind of data that the rows leave out.
    """
    config, data = corpora.config, corpora.config.data
    if config.tasks is not None:
        return grain.MapDataset.range(sys.maxsize).map(
            TaskRows(config, task_examples(corpora, derive_seed("tasks", config.seed)))
        )
    switch, sources = data.switch, len(corpora.caches)
    for line in itertools.chain.from_iterable(map(notes, corpora.caches)):
        note(line)
    streams = []
    for phase in (0, 1) if switch is not None and switch.fresh else (0,):
        for i in range(sources):
            rows = grain.MapDataset.source(phase_rows(corpora, i, phase, note))
            streams.append(rows.shuffle(seed=_phase_seed("shuffle", config.seed, i, phase)).repeat())
    weights = data.weights or (1.0,) * sources
    mixture = Mixture(weights)
    if switch is not None:
        mixture = Mixture(weights, switch.step * data.batch_size, switch.weights or weights, switch.fresh)
    mixed = grain.MapDataset.select_from_datasets(streams, mixture)
    complete = partial(complete_row, config=config, meta_id=corpora.tokenizer.vocabulary.meta)
    return mixed.random_map(complete, seed=derive_seed("inject", config.seed))


def training_batches(corpora: Corpora, *, host: int = 0, hosts: int = 1, note: Note = warn) -> grain.MapDataset:
    """Batch of step s at index s: this host's contiguous slice of the global batch, arrays [rows, positions]; `note` as above."""
    global_rows = corpora.config.data.batch_size
    require(global_rows % hosts == 0, f"data.batch_size = {global_rows} does not divide by {hosts} hosts")
    local = global_rows // hosts
    rows = training_rows(corpora, note)

    def local_row(n: int) -> Row:
        step, i = divmod(n, local)
        return rows[step * global_rows + host * local + i]

    return grain.MapDataset.range(sys.maxsize // 2).map(local_row).batch(local, batch_fn=stack)  # grain divides it as a float


def read_batches(batches: grain.MapDataset, start: int, workers: int) -> grain.DatasetIterator:
    """An iterator over batches from step `start` on. It reads ahead in threads, or in processes if workers > 0."""
    stream = batches[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers > 0:
        if not flags.FLAGS.is_parsed():  # grain's reader processes need parsed absl flags
            flags.FLAGS(sys.argv[:1])
        start_tracker()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=be_deaf)
    return iter(stream)


# ------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Validation:
    """Validation documents under one condition: batches, and the counts that bits per byte needs."""

    batches: list[Row]
    documents: int
    body_bytes: int
    metadata_tokens: int


def _evaluation_rows(corpora: Corpora, i: int, condition: str) -> tuple[np.ndarray, RowSource]:
    """(validation documents of source i that were chosen, their rows under a condition)."""
    data, cache = corpora.config.data, corpora.caches[i]
    available = cache.documents("validation", data.validation_share, data.min_bytes)
    require(
        len(available) > 0,
        f"{data.sources[i]} has no validation document; raise data.validation_share = {data.validation_share}, lower data.min_bytes = {data.min_bytes}, or use "
        "a corpus of more origins",
    )
    order = available[np.argsort(uniform_hash(EVALUATION_SEED, available), kind="stable")]
    chosen = order[: -(-corpora.config.evaluation.documents // len(corpora.caches))]
    return chosen, _rows(corpora, cache, condition, chosen, "best_fit")  # best_fit cuts only documents longer than a row


def check_evaluation(corpora: Corpora) -> None:
    """Raise UserError now, not after training, if validation documents cannot be shown under all `evaluation.conditions`, or a
    file of questions cannot be read."""
    choice = corpora.config.evaluation.choice
    for task in map(QuestionFile.of, choice.tasks if choice is not None else ()):
        for path in {task.path, task.shots_from}:
            task.read(path, corpora.paths.data)
    if corpora.config.evaluation.documents:
        pairs = ("training",) if corpora.config.dpo is not None else ()
        for condition in (*corpora.config.evaluation.conditions, *pairs):
            _body_bytes(corpora, [_evaluation_rows(corpora, i, condition)[0] for i in range(len(corpora.caches))])


def _body_bytes(corpora: Corpora, chosen: list[np.ndarray]) -> int:
    """UTF-8 bytes of the chosen documents of all sources; raises UserError if they have no text."""
    found = list(zip(corpora.caches, chosen, strict=True))
    tokens = sum(int(np.asarray(cache.lengths)[documents].sum()) for cache, documents in found)
    size = sum(int(np.asarray(cache.bytes)[documents].sum()) for cache, documents in found)
    require(
        min(tokens, size) > 0,
        f"the validation documents of {', '.join(corpora.config.data.sources)} have no text; set data.min_bytes=1, which leaves empty ones out",
    )
    return size


def validation(corpora: Corpora, condition: str) -> Validation:
    """The validation rows with metadata "none", "right", "empty", "shuffled", or as in "training". All use the same documents."""
    config, data = corpora.config, corpora.config.data
    rows, every = [], []
    for i in range(len(corpora.caches)):
        chosen, source = _evaluation_rows(corpora, i, condition)
        complete = partial(complete_row, config=config, meta_id=corpora.tokenizer.vocabulary.meta)
        rows += [complete(source[n], np.random.default_rng([EVALUATION_SEED, i, n])) for n in range(len(source))]
        every.append(chosen)
    rows += [padding_row(rows[0], corpora.tokenizer.vocabulary.pad)] * (-len(rows) % data.batch_size)
    batches = [stack(rows[n : n + data.batch_size]) for n in range(0, len(rows), data.batch_size)]
    metadata_tokens = sum(int(b["is_metadata"].sum()) for b in batches)
    return Validation(batches, sum(map(len, every)), _body_bytes(corpora, every), metadata_tokens)


def task_examples(corpora: Corpora, seed: int = EVALUATION_SEED) -> Examples:
    """The examples of the config's tasks; raises UserError if a requested length has none."""
    examples = Examples(corpora.config.tasks, corpora.tokenizer, seed)
    examples.check()
    return examples


def task_batches(corpora: Corpora, task: str, length: int, shards: int) -> list[Row]:
    """The test examples of one bin, one per row of `length` positions, in batches of equal shape; the same for every run.

    A batch is no larger than a training micro-batch, but a multiple of `shards` rows. Padding rows fill the last one.
    """
    config, examples = corpora.config, task_examples(corpora)
    positions = config.data.batch_size * config.row_positions // config.training.accumulation_steps
    size = max(1, positions // length // shards) * shards
    meta_positions = PAUSES if config.meta_tokens is not None else None
    rows = [
        assemble([examples.test(task, length, n)], length, corpora.tokenizer, meta_positions)
        for n in range(config.tasks.eval_examples)
    ]
    rows += [padding_row(rows[0], corpora.tokenizer.vocabulary.pad)] * (-len(rows) % size)
    return [stack(rows[n : n + size]) for n in range(0, len(rows), size)]
