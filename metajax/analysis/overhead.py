"""What parts of a model cost: train steps and generation of its twins, taking turns in one process. Nothing depends on what it learned.

Meta-tokens (arXiv 2509.16278, the section on overhead): the model with and without meta-attention; there, 130.82 tokens per second without
and 117.86 with meta-tokens and a dense mask, time to first token 7.44 and 7.57 ms. Hymba (arXiv 2411.13676): the hybrid block and each
of its branches alone, and the whole model beside attention alone of as many parameters.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from metajax.analysis.study import Study
from metajax.config import Config, Evaluation, Init, MetaTokens
from metajax.core.fields import override
from metajax.core.progress import progress
from metajax.data.encoding import Vocabulary
from metajax.data.meta_tokens import inject
from metajax.data.metadata import Placement
from metajax.data.packing import pack
from metajax.data.rows import Row, RowSource, finish, stack
from metajax.inference.speed import generation_speed
from metajax.training.program import Program, abstract_model

# Twins of equal row length; the first of each kind is what the others are compared with. Here: meta-tokens, but nothing that attends among them.
OF_META_TOKENS: dict[str, dict[str, Any]] = {
    "none": {"meta_tokens.attention": "none"},
    "gathered": {"meta_tokens.attention": "gathered"},
    "dense": {"meta_tokens.attention": "dense"},
    "causal": {"meta_tokens.attention": "causal"},
    "plain": {"meta_tokens": None},
}
ATTENTION = {"model.hybrid.fusion": "attention"}
MAMBA = {"model.hybrid.fusion": "mamba", "model.window": None, "model.hybrid.full_layers": (), "model.hybrid.kv_groups": ()}
BLOCK = {"model.mlp_width": 0}  # the mixers alone
RATE = 0.1  # of meta-tokens, the paper's
ROUNDS = 40  # of steps, each twin having its turn in each


def twins(config: Config, vocab_size: int) -> dict[str, Config]:
    """The run's config on text under each way to do without something: its meta-attention, or a branch of its hybrid block."""
    text = replace(config, tasks=None, dpo=None, imported=None, init=Init(), evaluation=Evaluation())
    if config.meta_tokens is not None:
        meta = replace(config.meta_tokens, inject="random", rate=RATE, zero_position="none")
        return {name: override(replace(text, meta_tokens=meta), changes) for name, changes in OF_META_TOKENS.items()}
    as_large = as_many_parameters(override(text, ATTENTION), text, vocab_size)
    blocks = {"block": {}, "attention": ATTENTION, "ssm": MAMBA}
    return {name: override(text, changes | BLOCK) for name, changes in blocks.items()} | {
        "whole": text,
        "attention_as_large": as_large,
    }


def as_many_parameters(config: Config, goal: Config, vocab_size: int) -> Config:
    """The config with its feed-forward networks widened until it has the parameters of `goal`, to the nearest width."""
    size = lambda c: sum(x.size for x in jax.tree.leaves(abstract_model(c, vocab_size)))  # noqa: E731
    wider = override(config, {"model.mlp_width": config.model.mlp_width + 1})
    return override(
        config,
        {"model.mlp_width": config.model.mlp_width + round((size(goal) - size(config)) / (size(wider) - size(config)))},
    )


def random_batch(config: Config, vocabulary: Vocabulary) -> Row:
    """A batch of random tokens, one document to a row, with the meta-tokens of the config between them."""
    rng, meta = np.random.default_rng(0), config.meta_tokens or MetaTokens(inject="none", rate=0.0)
    count, documents = meta.count(config.data.row_length), np.arange(config.data.batch_rows)
    length = config.row_slots - count
    bodies = rng.integers(vocabulary.base, size=(len(documents), length - 1), dtype=np.int32)
    index = pack(documents, np.full(len(documents), length), np.zeros(len(documents), int), length, "concat")
    source = RowSource(index, bodies.__getitem__, Placement(), vocabulary, length)
    rows = [source[n] for n in range(len(source))]
    if count:
        rows = [inject(row, rng, meta=meta, count=count, meta_id=vocabulary.meta) for row in rows]
    return stack([finish(row, attend_across_documents=False) for row in rows])


def step_seconds(configs: dict[str, Config], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Seconds of a train step, [ROUNDS] for each config, taken in turns after one step of each that is left out."""
    ready: dict[str, Any] = {}
    with progress("compiling train steps", total=len(configs)) as advance:
        for name, config in configs.items():
            program = Program.build(config, vocabulary.size)
            state, batch = program.create_state(), program.put(random_batch(config, vocabulary))
            ready[name] = (program.mesh, program.compile_step(state, batch), state, batch)
            advance(1)
    taken: dict[str, list[float]] = {name: [] for name in configs}
    with progress("timing train steps", total=ROUNDS + 1) as advance:
        for _ in range(ROUNDS + 1):
            for name, (mesh, step, state, batch) in ready.items():
                with jax.set_mesh(mesh):
                    began = time.perf_counter()
                    state, _ = jax.block_until_ready(step(state, batch))
                    taken[name].append(time.perf_counter() - began)
                ready[name] = (mesh, step, state, batch)
            advance(1)
    return {name: np.array(seconds[1:]) for name, seconds in taken.items()}


def overhead(study: Study) -> dict[str, Any]:
    """For each twin: step {ms, ratio, ratio_low, ratio_high}, medians and quartiles over ROUNDS of its time over the first twin's of the
    same round; generation {ttft_ms, tokens_per_second} as of `generation_speed`; parameters."""
    vocabulary, shape = study.corpora.tokenizer.vocabulary, study.program.config.data
    configs = twins(study.program.config, vocabulary.size)
    seconds = step_seconds(configs, vocabulary)
    count = MetaTokens(rate=RATE).count(shape.row_length) if study.model.meta is not None else 0
    room = min(shape.row_length - count, 2 * (shape.row_length // 3))
    models = {}
    for name, config in configs.items():
        program = Program.build(config, vocabulary.size)
        models[name] = (program.create_state().model, config)
    generated = generation_speed(models, vocabulary, prompt=room // 2, count=room // 2)
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "rounds": ROUNDS, "rows": shape.batch_rows, "row_length": shape.row_length, "prompt": room // 2, "device": device.device_kind
    }  # fmt: skip
    first = next(iter(configs))
    for name in configs:
        low, ratio, high = np.quantile(seconds[name] / seconds[first], (0.25, 0.5, 0.75)).tolist()
        step = {"ms": 1e3 * float(np.median(seconds[name])), "ratio": ratio, "ratio_low": low, "ratio_high": high}
        size = sum(x.size for x in jax.tree.leaves(models[name][0]))
        found[name] = {"step": step, "generation": generated[name], "parameters": size}
    return found
