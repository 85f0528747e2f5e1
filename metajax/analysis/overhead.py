"""Cost of parts of a model: train steps and generation of its twins. What the model learned has no effect.

Train steps and generation of this model's twins, in turns in one process. For meta-tokens with a dense mask the paper reports 117.86 tokens
per second against 130.82 without (0.90x), and 7.57 against 7.44 ms to the first token.

Sources: meta-tokens (arXiv 2509.16278, the section on overhead), the model with and without meta-attention; Hymba (arXiv 2411.13676), the
hybrid block and each of its branches alone, and the whole model beside attention alone of as many parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import Study, is_parallel, text_row
from metajax.analysis.common.timing import ratio_panel, step_words, time_steps
from metajax.config import Config, Evaluation, Init, MetaTokens
from metajax.core.errors import require
from metajax.core.fields import override
from metajax.core.progress import progress
from metajax.data.encoding import Vocabulary
from metajax.data.meta_tokens import inject
from metajax.data.rows import Row, finish, stack
from metajax.inference.speed import generation_speed
from metajax.reporting.figures import look
from metajax.reporting.panels import name_rows, panels
from metajax.training.program import Program, abstract_model

# name: (words, changes). Twins of equal row length; the others are compared with the first, which has no meta-attention.
OF_META_TOKENS = {
    "none": ("meta-tokens without meta-attention", {"meta_tokens.attention": "none"}),
    "gathered": ("gathered meta-attention", {"meta_tokens.attention": "gathered"}),
    "dense": ("its dense twin", {"meta_tokens.attention": "dense"}),
    "causal": ("a second causal attention", {"meta_tokens.attention": "causal"}),
    "plain": ("no meta-tokens", {"meta_tokens": None}),
}
ATTENTION = {"model.hybrid.fusion": "attention"}
MAMBA = {"model.hybrid.fusion": "mamba", "model.window": None, "model.hybrid.full_layers": (), "model.hybrid.kv_groups": ()}
BLOCK = {"model.mlp_width": 0}  # only the mixers
OF_HYBRIDS = {
    "block": ("hybrid blocks without feed-forward networks", BLOCK),
    "attention": ("their attention alone", ATTENTION | BLOCK),
    "ssm": ("their Mamba alone", MAMBA | BLOCK),
    "whole": ("the whole model", {}),
    "attention_as_large": ("attention alone, as many parameters", ATTENTION),
}
RATE = 0.1  # the paper's rate of meta-tokens
ROUNDS = 40  # each has one step of every twin


def twins(config: Config, vocab_size: int) -> dict[str, Config]:
    """The run's config on text, and the same without its meta-attention or without a branch of its hybrid block."""
    text = replace(config, tasks=None, dpo=None, imported=None, init=Init(), evaluation=Evaluation())
    if config.meta_tokens is not None:
        text = replace(text, meta_tokens=replace(config.meta_tokens, inject="random", rate=RATE, zero_position="none"))
        return {name: override(text, changes) for name, (_, changes) in OF_META_TOKENS.items()}
    found = {name: override(text, changes) for name, (_, changes) in OF_HYBRIDS.items()}
    return found | {"attention_as_large": as_many_parameters(found["attention_as_large"], text, vocab_size)}


def as_many_parameters(config: Config, goal: Config, vocab_size: int) -> Config:
    """The config with feed-forward networks widened to the number of parameters of `goal`, to the nearest width."""
    width = config.model.mlp_width
    wider = override(config, {"model.mlp_width": width + 1})
    size, larger, wanted = (_size(abstract_model(c, vocab_size)) for c in (config, wider, goal))
    return override(config, {"model.mlp_width": width + round((wanted - size) / (larger - size))})


def _size(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(model))


def random_batch(config: Config, vocabulary: Vocabulary) -> Row:
    """A batch of random tokens, one document to a row, with the meta-tokens of the config between them."""
    rng, meta = np.random.default_rng(0), config.meta_tokens
    count = meta.count(config.data.sequence_length) if meta else 0
    length = config.row_positions - count
    rows = []
    for ids in rng.integers(vocabulary.base, size=(config.data.batch_size, length + 1)).tolist():
        row = text_row(ids, length, 0, vocabulary.pad) | {"asks_metadata": np.zeros(length, bool)}
        row = inject(row, rng, meta=meta, count=count, meta_id=vocabulary.meta) if meta else row
        rows.append(finish(row, attend_across_documents=False))
    return stack(rows)


def compiled_steps(programs: dict[str, Program], vocabulary: Vocabulary) -> dict[str, tuple[Any, ...]]:
    """{twin: (its train step, its first state, a batch of random tokens)}."""
    steps = {}
    with progress("compiling train steps", total=len(programs)) as advance:
        for name, program in programs.items():
            state, batch = program.create_state(), program.put(random_batch(program.config, vocabulary))
            steps[name] = (program.compile_step(state, batch), state, batch)
            advance(1)
    return steps


def _has_parts(study: Study) -> bool:
    return study.model.meta is not None or is_parallel(study)


def _needs(study: Study) -> None:
    compared = "models with and without meta-attention or a branch of a hybrid block"
    require(_has_parts(study), f"compares {compared}; this one has neither")


@analysis("overhead", title="Overhead", fits=_has_parts, needs=_needs)
def overhead(study: Study) -> dict[str, Any]:
    """For each twin: step, as from `time_steps`; generation {ttft_ms, tokens_per_second}, as from `generation_speed`; parameters."""
    vocabulary, shape = study.corpora.tokenizer.vocabulary, study.program.config.data
    configs = twins(study.program.config, vocabulary.size)
    programs = {name: Program.build(config, vocabulary.size) for name, config in configs.items()}
    steps = compiled_steps(programs, vocabulary)
    with jax.set_mesh(next(iter(programs.values())).mesh):
        times = time_steps(steps, ROUNDS)
    count = MetaTokens(rate=RATE).count(shape.sequence_length) if study.model.meta is not None else 0
    room = min(shape.sequence_length - count, 2 * (shape.sequence_length // 3))
    models = {name: (program.create_state().model, program.config) for name, program in programs.items()}
    generated = generation_speed(models, vocabulary, prompt=room // 2, count=room // 2)
    sizes = {"rows": shape.batch_size, "sequence_length": shape.sequence_length, "prompt": room // 2}
    found: dict[str, Any] = {"rounds": ROUNDS, **sizes, "device": jax.devices()[0].device_kind}
    for name, (model, _) in models.items():
        found[name] = {"step": times[name], "generation": generated[name], "parameters": _size(model)}
    return found


def _twins_in(numbers: Numbers) -> dict[str, str]:
    """Names of the twins and what they are; the others are compared with the first."""
    return {name: words for name, (words, _) in (OF_META_TOKENS | OF_HYBRIDS).items() if name in numbers}


@overhead.headlines
def headlines(numbers: Numbers) -> list[str]:
    names = _twins_in(numbers)
    base = numbers[next(iter(names))]["generation"]["tokens_per_second"]
    rows = f"rows of {numbers['sequence_length']}, {numbers['rows']} a step"
    lines = [f"{rows}, on {numbers['device']}; medians of {numbers['rounds']} rounds"]
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
    return [(figure, f"Medians of {result['rounds']} rounds with one step of every twin; whiskers are quartiles.")]
