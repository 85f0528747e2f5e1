"""From a config to batches: batch = f(step, seed), the same for any number of hosts.

Sources are tokenised once, packed as an index, assembled row by row, shuffled and repeated by grain, mixed, and injected
with meta-tokens. Only then each host takes its slice of the global batch. To resume, the stream is read from `step`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from metajax.config import Config, Metadata
from metajax.core.errors import UserError, require
from metajax.core.interrupts import be_deaf, start_tracker
from metajax.core.progress import warn
from metajax.core.sealed import FORMAT, Sealed, save_array, sealed_folder
from metajax.data.cache import TokenCache, build_metadata_table, digest, read_documents
from metajax.data.documents import is_validation
from metajax.data.encoding import Tokenizer
from metajax.data.meta_tokens import inject
from metajax.data.metadata import MetadataIds, Placement, delimiters, dropped_owner, owners, uniform_hash
from metajax.data.mixture import Mixture
from metajax.data.packing import RowIndex, most_overhead, pack
from metajax.data.pairs import pair_rows
from metajax.data.positions import spots
from metajax.data.rows import Row, RowSource, finish, stack
from metajax.data.sources import open_source, parse_spec, place_of, source_notes
from metajax.data.sources.files import JOINED
from metajax.data.tasks import check_tasks
from metajax.data.tasks.examples import Examples, TaskRows
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

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes per body token, over all sources."""
        return sum(c.manifest["bytes"] for c in self.caches) / max(1, sum(c.manifest["tokens"] for c in self.caches))


def derive_seed(*parts: object) -> int:
    """A 32-bit seed for one purpose, independent of the seeds of all other purposes."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "little")


def open_corpora(config: Config, paths: Paths, make: Make = in_processes) -> Corpora:
    """Open or build the tokenizer and caches of a config. The first call for a corpus tokenises it, its parts by `make`."""
    check_tasks(config.tasks)
    if config.metadata is not None:
        spots(config.metadata)  # raises UserError for an unknown position
    data, folders = config.data, {"cache_dir": paths.cache, "data_dir": paths.data}
    sources = [open_source(spec, **folders) for spec in data.sources]

    def training_texts() -> Iterator[str]:
        for source in sources:
            for _, document in read_documents(source, data.on_bad_record):
                if document is not None and not is_validation(document.origin, data.validation_share):
                    yield document.text

    fingerprint = digest([s.fingerprint() for s in sources], data.validation_share, data.on_bad_record)
    tokenizer = open_tokenizer(data.tokenizer, **folders, corpus_fingerprint=fingerprint, texts=training_texts)
    caches = []
    for source in sources:
        reader = tokenizer.marked() if parse_spec(source.spec).columns.markers else tokenizer
        cache = build_token_cache(source, reader, cache_dir=paths.cache, on_bad_record=data.on_bad_record, make=make)
        require("joined" not in cache.manifest["source"] or bool(cache.manifest["tally"].get(JOINED)), " ".join(notes(cache)))
        caches.append(cache)
    return Corpora(config, tokenizer, tuple(caches), paths)


def notes(cache: TokenCache) -> list[str]:
    """Notes for the user about a tokenised corpus, one line each."""
    manifest, source = cache.manifest, cache.manifest["source"]
    return source_notes(source["spec"], manifest["documents"], manifest.get("tally", {}), source.get("joined", {}).get("ids"))


def _ids_of(
    corpora: Corpora, cache: TokenCache, recipe: Metadata, template: str, condition: str, documents: np.ndarray
) -> MetadataIds:
    """The strings of a template. With template "", the learnable tokens are the only string, which all documents share."""
    seed, ends = derive_seed("keep", corpora.config.seed, cache.key), delimiters(recipe, corpora.tokenizer)
    if not template:
        ids = np.array(corpora.tokenizer.vocabulary.spare[: recipe.tokens], np.int32)
        shared = np.minimum(owners(recipe, condition, np.ones(len(cache), bool), documents, seed), 0)
        return MetadataIds(ids, np.array([0, len(ids)]), shared, *ends)
    table = build_metadata_table(cache, corpora.tokenizer, template)
    strings = table.strings(documents) if condition == "shuffled" else None
    return MetadataIds(table.ids, table.offsets, owners(recipe, condition, table.present, documents, seed, strings), *ends)


def _placement(corpora: Corpora, cache: TokenCache, condition: str, documents: np.ndarray, note: Note) -> Placement:
    """The metadata of the documents. With `metadata.too_long == "drop"`, metadata too long for a row is dropped with a note."""
    recipe = corpora.config.metadata
    if recipe is None or condition == "none" or (condition == "training" and recipe.position == "none"):
        return Placement()
    parts = tuple((spot, _ids_of(corpora, cache, recipe, spot.template, condition, documents)) for spot in spots(recipe))
    placement = Placement(parts, recipe.bos_eos == "outside")
    most = most_overhead(row_capacity(corpora.config))
    long = documents[placement.overhead(documents) > most]
    if len(long) and recipe.too_long == "drop":
        for _, ids in parts:
            ids.owner[long] = dropped_owner(recipe)
        note(
            f"{cache.manifest['source']['spec']}: the metadata of {len(long)} of {len(documents)} documents ({condition}) takes more than "
            f"the {most} tokens that a row has for it and was dropped, first that of document {long.min()}"
        )
    return placement


def row_capacity(config: Config) -> int:
    """Positions of a row for text and metadata, without those of the meta-tokens."""
    meta = config.meta_tokens
    return config.row_positions - (meta.count(config.data.sequence_length) if meta else 0)


def packed_rows(
    corpora: Corpora, cache: TokenCache, condition: str, documents: np.ndarray, packing: str, note: Note = warn
) -> RowSource:
    """The rows of documents. Their packed index is built once for each recipe, then memory-mapped and checked against its hash."""
    config, paths, vocabulary = corpora.config, corpora.paths, corpora.tokenizer.vocabulary
    placement, capacity = _placement(corpora, cache, condition, documents, note), row_capacity(config)
    where = partial(place_of, cache.manifest, config.data.on_bad_record, paths.cache, paths.data)
    if condition == "training" and config.dpo is not None:
        return pair_rows(config.dpo.rejected, corpora.tokenizer, cache, placement, documents, capacity, where)
    inputs, overhead = np.asarray(cache.lengths)[documents] + 1, placement.overhead(documents)
    recipe = hashlib.sha256(documents.tobytes() + overhead.tobytes()).hexdigest()
    folder = paths.cache / "rows" / digest(FORMAT, cache.key, recipe, capacity, packing)
    if not folder.exists():
        made = pack(documents, inputs, overhead, capacity, packing, where)
        with sealed_folder(folder) as work:
            save_array(work / "pieces.npy", made.pieces)
            save_array(work / "offsets.npy", made.offsets)
    index = RowIndex(*(Sealed(folder).array(f"{name}.npy") for name in ("pieces", "offsets")))
    total = int(inputs.sum(dtype=np.int64))
    left_out = total - int(index.pieces[:, 2].sum(dtype=np.int64))
    if left_out:
        note(
            f"{cache.manifest['source']['spec']}: data.packing={packing} leaves out {left_out:,} of {total:,} tokens, the rest of "
            "documents that the end of a row cuts"
        )
    return RowSource(index, cache.__getitem__, placement, vocabulary, capacity)


def complete_row(row: Row, rng: np.random.Generator, *, config: Config, meta_id: int) -> Row:
    """The last two steps of every row: inject meta-tokens, then add positions."""
    meta = config.meta_tokens
    if meta is not None:
        row = inject(row, rng, meta=meta, count=meta.count(config.data.sequence_length), meta_id=meta_id)
    return finish(row, attend_across_documents=config.data.attend_across_documents)


def phase_rows(corpora: Corpora, i: int, phase: int = 0, note: Note = warn) -> RowSource:
    """The training rows of source i, each once, for phase 0 (before the data switch) or phase 1 (after it)."""
    data, seed, cache = corpora.config.data, corpora.config.seed, corpora.caches[i]
    documents = cache.documents("train", data.validation_share, data.min_bytes)
    cause = f"data.validation_share = {data.validation_share} takes them all, or data.min_bytes = {data.min_bytes} does"
    require(len(documents) > 0, f"{data.sources[i]} has no training document; {cause}")
    problem = f"the training documents of {data.sources[i]} have no text; its column of text is named with ?text=COLUMN"
    require(bool(np.asarray(cache.lengths)[documents].any()), problem)
    condition = "training"
    if data.switch is not None:
        if data.switch.unseen:
            is_later = uniform_hash(derive_seed("unseen", seed, i), documents) < data.switch.unseen
            documents = documents[is_later == bool(phase)]
            problem = f"data.switch.unseen = {data.switch.unseen} leaves no document on one side"
            require(len(documents) > 0, f"{data.sources[i]}: {problem}")
        if phase and data.switch.metadata == "none":
            condition = "none"
    order = np.argsort(uniform_hash(derive_seed("order", seed, i, *([phase] if phase else [])), documents), kind="stable")
    return packed_rows(corpora, cache, condition, documents[order], data.packing, note)


def training_rows(corpora: Corpora, note: Note = warn) -> grain.MapDataset:
    """Row n of the run, for every n: an endless random-access dataset that depends only on the config and the seed.

    `note` is called with a line for each kind of data that the rows leave out.
    """
    config, data, switch = corpora.config, corpora.config.data, corpora.config.data.switch
    if config.tasks is not None:
        examples = task_examples(corpora, derive_seed("tasks", config.seed))
        return grain.MapDataset.range(sys.maxsize).map(TaskRows(config, examples))
    for line in [line for cache in corpora.caches for line in notes(cache)]:
        note(line)
    streams = []
    for phase in (0, 1) if switch is not None and switch.fresh else (0,):
        for i in range(len(corpora.caches)):
            rows = grain.MapDataset.source(phase_rows(corpora, i, phase, note))
            seed = derive_seed("shuffle", config.seed, i, *([phase] if phase else []))
            streams.append(rows.shuffle(seed=seed).repeat())
    weights = data.weights or (1.0,) * len(corpora.caches)
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

    def local_row(n: int) -> Any:
        step, i = divmod(n, local)
        return rows[step * global_rows + host * local + i]

    return grain.MapDataset.range(sys.maxsize // 2).map(local_row).batch(local, batch_fn=stack)  # grain divides it as a float


def read_batches(stream: grain.MapDataset, start: int, workers: int) -> grain.DatasetIterator:
    """An iterator over batches from step `start` on. It reads ahead in threads, or in processes if workers > 0."""
    read = stream[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers > 0:
        if not flags.FLAGS.is_parsed():  # grain's reader processes need parsed absl flags
            flags.FLAGS(sys.argv[:1])
        start_tracker()
        read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=be_deaf)
    return iter(read)


def task_examples(corpora: Corpora, seed: int = EVALUATION_SEED) -> Examples:
    """The examples of the config's tasks; raises UserError if a requested length has none."""
    tasks = corpora.config.tasks
    if tasks is None:
        raise UserError(f"{corpora.config.name} has no synthetic tasks (tasks)")
    examples = Examples(tasks, corpora.tokenizer, seed)
    examples.check()
    return examples
