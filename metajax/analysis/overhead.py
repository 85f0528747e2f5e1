"""Cost of parts of a model: train steps and generation of its twins. What the model learned has no effect.

Train steps and generation of this model's twins, in turns in one process. For meta-tokens with a dense mask the paper reports 117.86 tokens
per second against 130.82 without (0.90x), and 7.57 against 7.44 ms to the first token.

Sources: meta-tokens (arXiv 2509.16278, the section on overhead), the model with and without meta-attention; Hymba (arXiv 2411.13676), the
hybrid block and each of its branches alone, and the whole model beside attention alone of as many parameters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import Study, is_parallel
from metajax.analysis.common.timing import against_first, ratio_panel, step_seconds, step_words
from metajax.config import Config, Evaluation, Init, MetaTokens
from metajax.core.errors import require
from metajax.core.fields import override
from metajax.core.progress import progress
from metajax.data.encoding import Vocabulary
from metajax.data.meta_tokens import inject
from metajax.data.metadata import Placement
from metajax.data.packing import pack
from metajax.data.rows import Row, RowSource, finish, stack
from metajax.inference.speed import generation_speed
from metajax.reporting.figures import look
from metajax.reporting.panels import name_rows, panels
from metajax.training.program import Program, abstract_model

# Twins of equal row length. The others are compared with the first, which has meta-tokens but no meta-attention.
OF_META_TOKENS: dict[str, dict[str, Any]] = {
    "none": {"meta_tokens.attention": "none"},
    "gathered": {"meta_tokens.attention": "gathered"},
    "dense": {"meta_tokens.attention": "dense"},
    "causal": {"meta_tokens.attention": "causal"},
    "plain": {"meta_tokens": None},
}
ATTENTION = {"model.hybrid.fusion": "attention"}
MAMBA = {"model.hybrid.fusion": "mamba", "model.window": None, "model.hybrid.full_layers": (), "model.hybrid.kv_groups": ()}
BLOCK = {"model.mlp_width": 0}  # only the mixers
RATE = 0.1  # the paper's rate of meta-tokens
ROUNDS = 40  # each has one step of every twin
WORDS = {
    "none": "meta-tokens without meta-attention",
    "gathered": "gathered meta-attention",
    "dense": "its dense twin",
    "causal": "a second causal attention",
    "plain": "no meta-tokens",
    "block": "hybrid blocks without feed-forward networks",
    "attention": "their attention alone",
    "ssm": "their Mamba alone",
    "whole": "the whole model",
    "attention_as_large": "attention alone, as many parameters",
}


def twins(config: Config, vocab_size: int) -> dict[str, Config]:
    """The run's config on text, and the same without its meta-attention or without a branch of its hybrid block."""
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
    """The config with feed-forward networks widened to the number of parameters of `goal`, to the nearest width."""
    size = lambda c: sum(x.size for x in jax.tree.leaves(abstract_model(c, vocab_size)))  # noqa: E731
    wider = override(config, {"model.mlp_width": config.model.mlp_width + 1})
    return override(
        config, {"model.mlp_width": config.model.mlp_width + round((size(goal) - size(config)) / (size(wider) - size(config)))}
    )


def random_batch(config: Config, vocabulary: Vocabulary) -> Row:
    """A batch of random tokens, one document to a row, with the meta-tokens of the config between them."""
    rng, meta = np.random.default_rng(0), config.meta_tokens or MetaTokens(inject="none", rate=0.0)
    count, documents = meta.count(config.data.sequence_length), np.arange(config.data.batch_size)
    length = config.row_positions - count
    bodies = rng.integers(vocabulary.base, size=(len(documents), length - 1), dtype=np.int32)
    index = pack(documents, np.full(len(documents), length), np.zeros(len(documents), int), length, "concat")
    source = RowSource(index, bodies.__getitem__, Placement(), vocabulary, length)
    rows = [source[n] for n in range(len(source))]
    if count:
        rows = [inject(row, rng, meta=meta, count=count, meta_id=vocabulary.meta) for row in rows]
    return stack([finish(row, attend_across_documents=False) for row in rows])


def compiled_steps(configs: dict[str, Config], vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """({twin: its train step, state -> state}, {twin: its first state}) on a batch of random tokens."""
    steps, states = {}, {}
    with progress("compiling train steps", total=len(configs)) as advance:
        for name, config in configs.items():
            program = Program.build(config, vocabulary.size)
            states[name], batch = program.create_state(), program.put(random_batch(config, vocabulary))
            steps[name] = partial(_step, program.mesh, program.compile_step(states[name], batch), batch)
            advance(1)
    return steps, states


def _step(mesh: Any, step: Any, batch: Any, state: Any) -> Any:
    with jax.set_mesh(mesh):
        return step(state, batch)[0]


def _needs(study: Study) -> None:
    can = study.model.meta is not None or is_parallel(study)
    require(can, "compares models with and without meta-attention or a branch of a hybrid block; this one has neither")


@analysis("overhead", title="Overhead", fits=lambda study: study.model.meta is not None or is_parallel(study), needs=_needs)
def overhead(study: Study) -> dict[str, Any]:
    """For each twin: step, as from `against_first`; generation {ttft_ms, tokens_per_second}, as from `generation_speed`; parameters."""
    vocabulary, shape = study.corpora.tokenizer.vocabulary, study.program.config.data
    configs = twins(study.program.config, vocabulary.size)
    steps = against_first(step_seconds(*compiled_steps(configs, vocabulary), ROUNDS))
    count = MetaTokens(rate=RATE).count(shape.sequence_length) if study.model.meta is not None else 0
    room = min(shape.sequence_length - count, 2 * (shape.sequence_length // 3))
    models = {}
    for name, config in configs.items():
        program = Program.build(config, vocabulary.size)
        models[name] = (program.create_state().model, config)
    generated = generation_speed(models, vocabulary, prompt=room // 2, count=room // 2)
    found: dict[str, Any] = {
        "rounds": ROUNDS, "rows": shape.batch_size, "sequence_length": shape.sequence_length, "prompt": room // 2,
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    for name in configs:
        size = sum(x.size for x in jax.tree.leaves(models[name][0]))
        found[name] = {"step": steps[name], "generation": generated[name], "parameters": size}
    return found


def _twins_in(numbers: dict[str, Any]) -> dict[str, str]:
    """Names of the twins and what they are; the others are compared with the first."""
    return {name: words for name, words in WORDS.items() if name in numbers}


@overhead.headlines
def headlines(numbers: Numbers) -> list[str]:
    names = _twins_in(numbers)
    base = numbers[next(iter(names))]["generation"]["tokens_per_second"]
    lines = [
        f"rows of {numbers['sequence_length']}, {numbers['rows']} a step, on {numbers['device']}; medians of {numbers['rounds']} rounds"
    ]
    for name, words in names.items():
        generated = numbers[name]["generation"]
        speed = f"{generated['tokens_per_second']:,.0f} tokens per second ({generated['tokens_per_second'] / base:.2f}x)"
        lines.append(f"{words}: {step_words(numbers[name]['step'])}; first token {generated['ttft_ms']:.2f} ms, {speed}")
    if "ssm" in numbers:
        both = numbers["attention"]["step"]["ms"] + numbers["ssm"]["step"]["ms"]
        lines.append(f"hybrid blocks take {numbers['block']['step']['ms'] / both:.2f}x of the sum of their branches")
    return lines


@overhead.figures
def figures(result: Numbers) -> Figures:
    figure, (steps, speed) = panels(2, 1, 2.1)
    names = _twins_in(result)
    ratio_panel(steps, result, names, "time of a train step, x of the first")
    for y, name in enumerate(names):
        speed.barh(y, result[name]["generation"]["tokens_per_second"], color=look(y)[0], alpha=0.75)
    name_rows(speed, list(names.values()), "tokens generated per second")
    caption = f"Medians of {result['rounds']} rounds with one step of every twin; whiskers are quartiles."
    return [(figure, caption)]
