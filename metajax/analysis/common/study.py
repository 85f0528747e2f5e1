"""What an analysis measures: a trained model on test prompts of one task, or on the beginnings of validation documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from metajax.core.errors import nearest, require
from metajax.core.progress import progress
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Corpora, task_examples
from metajax.data.rows import Row, finish, stack
from metajax.data.tasks.examples import PAUSES, assemble
from metajax.distributed.mesh import row_shards
from metajax.evaluation.tasks import impossible
from metajax.models.layer import Layer
from metajax.models.lm import LM
from metajax.training.losses import MODEL_INPUTS
from metajax.training.program import Program

PROMPTS = 500  # the papers do not state their numbers of prompts
PIECES = 64  # pieces of text
TEXT = "text"  # in place of a task's name
BATCH_FLOATS = 2**25  # attention probabilities in one batch of prompts
Arrays = dict[str, jax.Array]  # a batch of rows


@dataclass(frozen=True)
class Study:
    """A model, and N prompts of a task or N documents, one in each row of T positions; `rows` holds them stacked, [N, T] each."""

    program: Program
    corpora: Corpora
    model: LM
    task: str
    rows: Row

    @property
    def count(self) -> int:
        return len(self.rows["tokens"])

    @property
    def length(self) -> int:
        return self.rows["tokens"].shape[1]

    @property
    def made_on(self) -> dict[str, Any]:
        """Task, length and number of the prompts, for the record."""
        return {"task": self.task, "length": self.length, "prompts": self.count}

    @cached_property
    def asked(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's last token, whose target is the first token of the answer."""
        return np.argmax(self.rows["loss_weights"] > 0, axis=1)

    @cached_property
    def answers(self) -> Int[np.ndarray, " N"]:
        """The first token of each prompt's answer."""
        return self.rows["targets"][np.arange(self.count), self.asked]

    @cached_property
    def first_meta(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's first meta-token."""
        return self.rows["meta_positions"].min(axis=1)

    @cached_property
    def last_meta(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's last meta-token: "Meta Token #2" in tasks that place two."""
        meta_positions = self.rows["meta_positions"]
        return np.where(meta_positions < self.length, meta_positions, -1).max(axis=1)

    def queries_after(self, start: Int[np.ndarray, " N"]) -> Bool[np.ndarray, "N T"]:
        """The tokens of each prompt after the position `start`."""
        index = np.arange(self.length)
        return (index > start[:, None]) & (index <= self.asked[:, None])

    def labels(self, prompt: int) -> list[str]:
        """The tokens of one prompt as text."""
        ids = self.rows["tokens"][prompt, : self.asked[prompt] + 1].tolist()
        meta = self.corpora.tokenizer.vocabulary.meta
        return ["_PAUSE_" if i == meta else self.corpora.tokenizer.decode([i]).replace("\n", "\\n") for i in ids]

    def over_prompts(self, title: str, function: Callable[..., Arrays], model: LM | None = None) -> dict[str, np.ndarray]:
        """`function(model, batch)`, a dict of arrays with a leading axis of prompts, over all prompts; jitted."""
        cfg, shards = self.model.cfg, row_shards(self.program.mesh)
        fits = max(1, BATCH_FLOATS // (cfg.layers * cfg.heads * self.length**2)) * shards
        size = min(fits, -(-self.count // shards) * shards)
        compiled, found = jax.jit(function), []
        with progress(title, total=self.count) as advance, jax.set_mesh(self.program.mesh):
            for at in range(0, self.count, size):
                chosen = np.minimum(np.arange(at, at + size), self.count - 1)  # the last prompt fills the last batch
                batch = self.program.put({name: values[chosen] for name, values in self.rows.items()})
                found.append(jax.device_get(compiled(model or self.model, batch)))
                advance(min(size, self.count - at))
        return {name: np.concatenate([part[name] for part in found])[: self.count] for name in found[0]}


def open_study(
    program: Program,
    corpora: Corpora,
    model: LM,
    *,
    task: str | None = None,
    length: int | None = None,
    prompts: int | None = None,
) -> Study:
    """The first `prompts` test examples of a task in the bin of `length` tokens; for task "text" the beginnings of validation documents.

    Args:
      task: None: text where the config has no tasks, else list recall, as in the paper, or the first task.
      length: None: the longest bin within the training length, or that length; for text the row length, or the length of the second longest document.
      prompts: None: PROMPTS or PIECES.

    Raises:
      UserError: an unknown task, a length that the model cannot read, fewer than two prompts.
    """
    tasks = corpora.config.tasks
    require(prompts is None or prompts >= 2, f"{prompts} prompts have no spread; at least 2")
    if task == TEXT or tasks is None:
        return Study(program, corpora, model, TEXT, _text_rows(corpora, length, prompts or PIECES))
    if task is None:
        task = "list_recall" if "list_recall" in tasks.names else tasks.names[0]
    require(task in tasks.names, f"unknown task {task!r}{nearest(task, tasks.names)}; the run has {', '.join(tasks.names)}")
    length = length or max((n for n in tasks.eval_lengths if n <= tasks.train_length), default=tasks.train_length)
    reason = impossible(program.config, length)
    require(reason is None, f"prompts of {length} tokens: {reason}")
    examples, pauses = task_examples(corpora), PAUSES if model.meta is not None else None
    drawn = ([examples.test(task, length, n)] for n in range(prompts or PROMPTS))
    return Study(program, corpora, model, task, stack([assemble(one, length, corpora.tokenizer, pauses) for one in drawn]))


def documents_of(corpora: Corpora, split: str, least: int) -> Int[np.ndarray, " N"]:
    """Documents of the first source with at least `least` body tokens, in an order fixed by the corpus."""
    data, cache = corpora.config.data, corpora.caches[0]
    found = cache.documents(split, data.validation_share, data.min_bytes)
    found = found[cache.lengths[found] >= least]
    return found[uniform_hash(EVALUATION_SEED, found).argsort()]


def text_row(ids: list[int], width: int, first_body: int, pad: int) -> Row:
    """The first `width` + 1 of `ids` as a row of `width` positions, whose body begins at `first_body`; only the body has a loss."""
    read = np.array(ids[: width + 1], np.int32)
    empty = [pad] * (width + 1 - len(read))
    index = np.arange(width)
    there, body = index < len(read) - 1, index >= first_body
    row = {"tokens": np.array([*read[:-1], *empty], np.int32), "targets": np.array([*read[1:], *empty], np.int32)}
    row |= {"is_body": there & body, "is_metadata": there & ~body, "segment_ids": there.astype(np.int32)}
    return finish(row | {"loss_weights": (there & body).astype(np.float32)}, attend_across_documents=False)


def _text_rows(corpora: Corpora, length: int | None, count: int) -> Row:
    """BOS and the first `length` - 1 tokens of at most `count` validation documents that are longer."""
    cache, vocabulary, data = corpora.caches[0], corpora.tokenizer.vocabulary, corpora.config.data
    if length is None:
        lengths = np.sort(cache.lengths[documents_of(corpora, "validation", 0)])
        length = min([data.sequence_length, *lengths[-2:].tolist()])
    documents = documents_of(corpora, "validation", length)
    require(
        len(documents) >= 2 and length >= 2,
        f"{data.sources[0]} has {len(documents)} validation documents of {length} tokens; analyze fewer with --length",
    )
    openings = ([vocabulary.bos, *cache[document][:length].tolist()] for document in documents[:count].tolist())
    return stack([text_row(ids, length, 0, vocabulary.pad) for ids in openings])


# ----------------------------------------------------------------------------------------------------- in the model


def capture(model: LM, batch: Arrays, *names: str) -> dict[str, jax.Array]:
    """Intermediates of `metajax.models.lm.capturable` for a batch, stacked over the prompts first: [B, L, ...]; "final" is [B, T, width]."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    _, captured = model(inputs.pop("tokens"), **inputs, capture=names)
    return {name: value if name == "final" else jnp.moveaxis(value, 1, 0) for name, value in captured.items()}


def at_last_meta(x: Float[jax.Array, "B ..."], batch: Arrays, axis: int) -> Float[jax.Array, "B ..."]:
    """x at the last meta-token of each prompt; `axis`, that of the positions, is removed."""
    meta_positions = batch["meta_positions"]
    last = jnp.max(jnp.where(meta_positions < x.shape[axis], meta_positions, 0), axis=1)
    return jax.vmap(partial(jnp.take, axis=axis - 1))(x, last)


def layers_of(model: LM) -> Iterator[tuple[Layer, int]]:
    """Every layer in order, as (the layer with the arrays of its run stacked, its index in them)."""
    for run in model.blocks:
        for index in range(len(jax.tree.leaves(run)[0])):
            for layer in run:
                yield layer, index


def descent(loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation) -> Callable[[Any, Any], tuple[Any, None]]:
    """One update of (parameters, optimizer state) by the gradient of `loss(parameters, *draws)`, for `jax.lax.scan` over draws."""

    def update(carry: tuple[Any, Any], draws: tuple[Any, ...] | None) -> tuple[Any, None]:
        parameters, state = carry
        updates, state = optimizer.update(jax.grad(loss)(parameters, *(draws or ())), state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    return update


# ---------------------------------------------------------------------------------------- which runs an analysis fits


def meta_tokens_in_prompts(study: Study) -> None:
    """Raise UserError unless the model has meta-tokens and the study's prompts contain them."""
    tasks, needs = study.corpora.config.tasks, "needs meta-tokens in prompts of the tasks, but "
    require(study.model.meta is not None, f"{needs}this run has none (meta_tokens is null)")
    on_task = tasks is not None and study.task in tasks.names
    require(on_task, f"{needs}these rows are text; name a task with --task, such as list_recall")
    require(tasks.placement != "none", f"{needs}tasks.placement = 'none'")


def is_parallel(study: Study) -> bool:
    """Whether the model has attention beside Mamba in one block."""
    return study.model.cfg.hybrid is not None and study.model.cfg.hybrid.is_parallel


# Arguments of the analyses of meta-tokens. If a model has meta-tokens, only these are made by default.
META_TOKENS = {"fits": lambda study: study.model.meta is not None, "needs": meta_tokens_in_prompts}
