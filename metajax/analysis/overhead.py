"""What meta-attention costs: train steps and generation of the model and of its twins, taking turns in one process.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), the section on overhead: 130.82 tokens per second without and 117.86
with meta-tokens and a dense mask, time to first token 7.44 and 7.57 ms. Nothing here depends on what a model has learned.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from metajax.analysis.study import Study
from metajax.config import Config, Evaluation, Init, MetaTokens, override
from metajax.data.meta_tokens import inject
from metajax.data.metadata import Sides
from metajax.data.packing import pack
from metajax.data.rows import Row, RowSource, finish, stack
from metajax.data.tokenizers import Vocabulary
from metajax.inference.speed import generation_speed
from metajax.progress import progress
from metajax.training.program import Program

# Twins of equal row length; the first is what the others are compared with: meta-tokens, but nothing that attends among them.
TWINS: dict[str, dict[str, Any]] = {
    "none": {"meta_tokens.attention": "none"},
    "gathered": {"meta_tokens.attention": "gathered"},
    "dense": {"meta_tokens.attention": "dense"},
    "causal": {"meta_tokens.attention": "causal"},
    "plain": {"meta_tokens": None},
}
RATE = 0.1  # of meta-tokens, the paper's
ROUNDS = 40  # of steps, each twin having its turn in each


def twins(config: Config) -> dict[str, Config]:
    """The run's config on text, with the paper's share of meta-tokens, under each way to attend among them."""
    meta = replace(config.meta_tokens, inject="random", rate=RATE, zero_position="none")
    text = replace(config, tasks=None, init=Init(), evaluation=Evaluation(), meta_tokens=meta)
    return {name: override(text, changes) for name, changes in TWINS.items()}


def random_batch(config: Config, vocabulary: Vocabulary) -> Row:
    """A batch of random tokens, one document to a row, with the meta-tokens of the config between them."""
    rng, meta = np.random.default_rng(0), config.meta_tokens or MetaTokens(inject="none", rate=0.0)
    count, documents = meta.count(config.data.row_length), np.arange(config.data.batch_rows)
    length = config.row_slots - count
    bodies = rng.integers(vocabulary.base, size=(len(documents), length - 1), dtype=np.int32)
    index = pack(documents, np.full(len(documents), length), np.zeros(len(documents), int), length, "concat")
    source = RowSource(index, bodies.__getitem__, Sides(), vocabulary, length)
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
    """For each twin: step {ms, ratio, ratio_low, ratio_high}, medians and quartiles over ROUNDS of its time over `none`'s of the
    same round; generation {ttft_ms, tokens_per_second} as of `generation_speed`."""
    configs, vocabulary = twins(study.program.config), study.corpora.tokenizer.vocabulary
    seconds = step_seconds(configs, vocabulary)
    shape = study.program.config.data
    room = min(shape.row_length - MetaTokens(rate=RATE).count(shape.row_length), 2 * (shape.row_length // 3))
    models = {}
    for name, config in configs.items():
        program = Program.build(config, vocabulary.size)
        models[name] = (program.create_state().model, config)
    generated = generation_speed(models, vocabulary, prompt=room // 2, count=room // 2)
    device = jax.devices()[0]
    found: dict[str, Any] = {
        "rounds": ROUNDS,
        "rows": shape.batch_rows,
        "row_length": shape.row_length,
        "device": device.device_kind,
    }
    for name in configs:
        low, ratio, high = np.quantile(seconds[name] / seconds["none"], (0.25, 0.5, 0.75)).tolist()
        step = {"ms": 1e3 * float(np.median(seconds[name])), "ratio": ratio, "ratio_low": low, "ratio_high": high}
        found[name] = {"step": step, "generation": generated[name]}
    return found
