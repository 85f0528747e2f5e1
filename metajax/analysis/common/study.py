"""What an analysis measures: a trained model on test prompts of one task, or on the beginnings of validation documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

from metajax.core.errors import nearest, require
from metajax.core.progress import progress
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Corpora, task_examples
from metajax.data.rows import Row, finish, padding_row, stack
from metajax.data.tasks.examples import PAUSES, assemble
from metajax.distributed.mesh import row_shards
from metajax.evaluation.statistics import summarize
from metajax.evaluation.tasks import impossible
from metajax.models.lm import LM
from metajax.training.program import Program
from metajax.training.step import MODEL_INPUTS

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
    def made_on(self) -> dict[str, Any]:
        """Task, length and number of the prompts, for the record."""
        return {"task": self.task, "length": self.rows["tokens"].shape[1], "prompts": self.count}

    @cached_property
    def asked(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's last token, whose target is the first token of the answer."""
        return np.argmax(self.rows["loss_weights"] > 0, axis=1)

    @cached_property
    def first_meta(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's first meta-token."""
        return self.rows["meta_positions"].min(axis=1)

    @cached_property
    def last_meta(self) -> Int[np.ndarray, " N"]:
        """The position of each prompt's last meta-token: "Meta Token #2" in tasks that place two."""
        meta_positions = self.rows["meta_positions"]
        return np.where(meta_positions < self.rows["tokens"].shape[1], meta_positions, -1).max(axis=1)

    @cached_property
    def queries(self) -> Bool[np.ndarray, "N T"]:
        """The tokens of each prompt after its first meta-token."""
        index = np.arange(self.rows["tokens"].shape[1])
        return (index > self.first_meta[:, None]) & (index <= self.asked[:, None])

    def labels(self, prompt: int) -> list[str]:
        """The tokens of one prompt as text."""
        ids = self.rows["tokens"][prompt, : self.asked[prompt] + 1].tolist()
        meta = self.corpora.tokenizer.vocabulary.meta
        return ["_PAUSE_" if i == meta else self.corpora.tokenizer.decode([i]).replace("\n", "\\n") for i in ids]

    def over_prompts(self, title: str, function: Callable[..., dict[str, jax.Array]], *models: LM) -> dict[str, np.ndarray]:
        """`function(*models, batch)`, a dict of arrays with a leading axis of prompts, over all prompts; jitted."""
        cfg, (count, length) = self.model.cfg, self.rows["tokens"].shape
        shards = row_shards(self.program.mesh)
        fits = max(1, BATCH_FLOATS // (cfg.layers * cfg.heads * length**2)) * shards
        size = min(fits, -(-count // shards) * shards)
        padding = padding_row({name: values[0] for name, values in self.rows.items()}, self.corpora.tokenizer.vocabulary.pad)
        fill = stack([padding] * (-count % size)) if count % size else None
        whole = {name: np.concatenate([v, fill[name]]) if fill else v for name, v in self.rows.items()}
        compiled, found = jax.jit(function), []
        with progress(title, total=count) as advance, jax.set_mesh(self.program.mesh):
            for at in range(0, count, size):
                batch = {name: values[at : at + size] for name, values in whole.items()}
                found.append(jax.device_get(compiled(*models, self.program.put(batch))))
                advance(min(size, count - at))
        return {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}


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
    prompts = prompts or PROMPTS
    if task is None:
        task = "list_recall" if "list_recall" in tasks.names else tasks.names[0]
    require(task in tasks.names, f"unknown task {task!r}{nearest(task, tasks.names)}; the run has {', '.join(tasks.names)}")
    within = [n for n in tasks.eval_lengths if n <= tasks.train_length]
    length = length or max(within, default=tasks.train_length)
    reason = impossible(program.config, length)
    require(reason is None, f"prompts of {length} tokens: {reason}")
    examples = task_examples(corpora)
    pauses = PAUSES if model.meta is not None else None
    rows = [assemble([examples.test(task, length, n)], length, corpora.tokenizer, pauses) for n in range(prompts)]
    return Study(program, corpora, model, task, stack(rows))


def _text_rows(corpora: Corpora, length: int | None, count: int) -> Row:
    """BOS and the first `length` - 1 tokens of at most `count` validation documents that are longer."""
    cache, vocabulary, data = corpora.caches[0], corpora.tokenizer.vocabulary, corpora.config.data
    documents = cache.documents("validation", data.validation_share, data.min_bytes)
    if length is None:
        length = min([data.sequence_length, *np.sort(cache.lengths[documents])[-2:].tolist()])
    documents = documents[cache.lengths[documents] >= length]
    require(
        len(documents) >= 2 and length >= 2,
        f"{data.sources[0]} has {len(documents)} validation documents of {length} tokens; analyze fewer with --length",
    )
    rows = []
    for document in documents[uniform_hash(EVALUATION_SEED, documents).argsort()][:count].tolist():
        tokens = np.array([vocabulary.bos, *cache[document][:length]], np.int32)
        whole = np.ones(length, bool)
        row = {"tokens": tokens[:-1], "targets": tokens[1:], "loss_weights": whole.astype(np.float32), "is_body": whole}
        row |= {"is_metadata": ~whole, "segment_ids": whole.astype(np.int32)}
        rows.append(finish(row, attend_across_documents=False))
    return stack(rows)


def capture(model: LM, batch: Arrays, *names: str) -> dict[str, jax.Array]:
    """Intermediates of `metajax.models.lm.capturable` for a batch, stacked over the prompts first: [B, L, ...]; "final" is [B, T, width]."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    _, captured = model(inputs.pop("tokens"), **inputs, capture=names)
    return {name: value if name == "final" else jnp.moveaxis(value, 1, 0) for name, value in captured.items()}


def at_positions(x: Float[jax.Array, "B ..."], meta_positions: Int[jax.Array, " B"], axis: int) -> Float[jax.Array, "B ..."]:
    """x at one index of `axis` for each prompt; the axis is removed."""
    return jax.vmap(partial(jnp.take, axis=axis - 1))(x, meta_positions)


# -------------------------------------------------------------------------------------------------------- statistics


def pooled(values: Float[np.ndarray, "N ..."], chosen: Bool[np.ndarray, "N ..."]) -> dict[str, Any]:
    """Mean, median and share above 0 of the chosen values, pooled over prompts, in the unit of the values.

    half, positive_half: half widths of 95 % intervals. The values of one prompt are not independent, so prompts (N of them) are the
    clusters of a cluster-robust standard error: sqrt(N / (N - 1) sum_i (sum of residuals of prompt i)^2) / number of values.
    """
    flat = values[chosen]
    mean, half = cluster_mean(values, chosen)
    positive, positive_half = cluster_mean((values > 0).astype(np.float64), chosen)
    return {
        "mean": mean, "half": half, "median": float(np.median(flat)), "positive": positive, "positive_half": positive_half,
        "values": int(chosen.sum()), "prompts": len(values),
    }  # fmt: skip


def cluster_mean(values: Float[np.ndarray, "N ..."], chosen: Bool[np.ndarray, "N ..."]) -> tuple[float, float]:
    """(mean of the chosen values, half width of its 95 % interval over prompts)."""
    n, total = len(values), int(chosen.sum())
    mean = float(values[chosen].mean(dtype=np.float64))
    residuals = np.where(chosen, values - mean, 0.0).reshape(n, -1).sum(axis=1, dtype=np.float64)
    error = np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total
    return mean, float(stdtrit(n - 1, 0.975) * error)


def mean_over_rows(values: Float[np.ndarray, " N"]) -> dict[str, float]:
    """{mean, half}: the mean over rows, and the half width of its 95 % interval (Student t)."""
    found = summarize(values.tolist())
    return {"mean": found.mean, "half": found.half}


def meta_tokens_in_prompts(study: Study) -> None:
    """Raise UserError unless the model has meta-tokens and the study's prompts contain them."""
    tasks, said = study.corpora.config.tasks, "needs meta-tokens in prompts of the tasks, but "
    require(study.model.meta is not None, f"{said}this run has none (meta_tokens is null)")
    on_task = tasks is not None and study.task in tasks.names
    require(on_task, f"{said}these rows are text; name a task with --task, such as list_recall")
    require(tasks.placement != "none", f"{said}tasks.placement = 'none'")


def has_meta_tokens(study: Study) -> bool:
    """Whether the model has meta-tokens; if so, only analyses of meta-tokens are made by default."""
    return study.model.meta is not None


def is_parallel(study: Study) -> bool:
    """Whether the model has attention beside Mamba in one block."""
    return study.model.cfg.hybrid is not None and study.model.cfg.hybrid.is_parallel


META_TOKENS = {"fits": has_meta_tokens, "needs": meta_tokens_in_prompts}  # arguments of the analyses of meta-tokens


def rounded(values: np.ndarray, digits: int = 4) -> list[Any]:
    """An array as lists of short numbers, NaN as None, for JSON."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [None if np.isnan(v) else round(v, digits) for v in values.astype(np.float64).tolist()]
