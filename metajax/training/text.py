"""The `Task` of runs on text: a language model on rows of documents, tasks or pairs of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Config
from metajax.core.errors import require
from metajax.core.progress import say
from metajax.data.pipeline import Paths, open_corpora, training_batches
from metajax.data.tokenizers import load as load_tokenizer
from metajax.models.flops import step_flops
from metajax.runs.directory import check_data, find_run
from metajax.training.checkpoints import newest_good, read_parameters, saved_identity
from metajax.training.program import Program
from metajax.training.task import Task


class TextTask(Task):
    """Training of a language model. A subclass evaluates and reports it, because evaluation imports training."""

    config: Config
    unit, counted = "tokens", "positions"

    def __init__(self, config: Config, paths: Paths, devices: list[Any] | None = None):
        self.config, self.steps = config, config.training.steps
        self.corpora, self.evaluates_every = open_corpora(config, paths), config.evaluation.every
        self.data, self.tokenizer = self.corpora.key, self.corpora.tokenizer
        self.program = Program.build(config, self.tokenizer.vocabulary.size, devices)
        if len(self.program.meshes) > 1:
            say(f"runtime.mesh=auto chose {self.program.meshes[0].mesh}")
        notes: list[str] = []
        rows = self.program.rows
        self.batches = training_batches(self.corpora, host=rows.index, hosts=rows.count, note=notes.append)
        self.batches[0]
        self.notes = tuple(notes)

    def start(self, model: Any, meta: Mapping[str, Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """With `init.from`, the parent's parameters. With `dpo` they are also the frozen reference and must not change later."""
        init, is_frozen = self.config.init, self.config.dpo is not None
        if not init.from_ or (meta is not None and not is_frozen):
            return model, ()
        parent = self._parent_parameters(model)
        if not is_frozen:
            return parent, ()
        if meta is None:  # a copy, because the step overwrites its state and the reference must stay
            return jax.tree.map(jnp.copy, parent), (parent,)
        now, then, remedy = self._parent_step, meta["parent_step"], "start a new run with another --workdir"
        steps = f"step {now} now, {then} when this run began"
        require(now == then, f"init.from = {init.run} has trained further, and the reference with it: {steps}; {remedy}")
        first = meta.get("parent", self._parent)
        other = f"is another run ({self._parent}) than when this run began ({first}); put that one back"
        require(first == self._parent, f"init.from = {init.run} {other}, or {remedy}")
        return model, (parent,)

    def meta(self) -> dict[str, Any]:
        return {"parent_step": self._parent_step, "parent": self._parent} if self.config.dpo is not None else {}

    def _parent_parameters(self, fresh: Any) -> Any:
        init = self.config.init
        parent = find_run(init.run, self.corpora.paths.runs)
        self._parent_step = newest_good(parent)
        self._parent = dict(saved_identity(parent, self._parent_step))
        theirs, ours = load_tokenizer(parent).fingerprint(), self.tokenizer.fingerprint()
        check_data(parent, tokenizer=theirs)
        remedy = f"use data.tokenizer=run:{parent}, or name the parts to take, such as RUN?blocks"
        differ = f"its tokenizer ({theirs[:12]}) is not this run's ({ours[:12]}), so its parameters mean other tokens"
        require(theirs == ours or bool(init.parts), f"init.from = {init.run}: {differ}; {remedy}")
        return read_parameters(parent, self.program.abstract_state().model, init.parts, fresh, self._parent_step)

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {**positions_of(batch), "flops": step_flops(self.config, self.program.vocab_size, batch)}

    def record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        if self.config.tasks is not None:  # an answer's body is not corpus text
            return values
        return {**values, "bpb": values["body_nll"] / math.log(2.0) / self.corpora.bytes_per_token}

    def line(self, record: Mapping[str, float]) -> list[str]:
        return [
            f"loss {record['loss']:.4f}",
            f"bits/byte {record['bpb']:.4f}" if "bpb" in record else f"nats/answer token {record['body_nll']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"grad {record['grad_norm']:.3f}",
            *(f"{name} {record[name]:.3f}" for name in ("margin", "accuracy") if name in record),
        ]


def positions_of(batch: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The number of positions of a batch by content; `loss_tokens` are those on which the loss is taken."""
    positions = batch["tokens"].size
    return {
        "positions": positions,
        "loss_tokens": int((batch["loss_weights"] > 0).sum()),
        "body": int(batch["is_body"].sum()),
        "metadata": int(batch["is_metadata"].sum()),
        "meta_tokens": int((batch["meta_positions"] < batch["tokens"].shape[1]).sum()) if "meta_positions" in batch else 0,
        "padding": int((batch["segment_ids"] == 0).sum()),
    }
