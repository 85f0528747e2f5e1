"""Multiple choice by log-likelihood, scored as the lm-evaluation-harness does.

The chosen answer has the largest sum of log-probabilities after the question (acc), or the largest sum per character of the
answer (acc_norm). Passages (SQuAD completion, SWDE, FDA) are completed instead: acc is the share of greedy continuations that
contain the value.

Questions and their answers are packed as documents of rows. A context that is too long loses its beginning. BOS and metadata
before it are kept, while the harness would cut them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from metajax.config import Config, Metadata
from metajax.core.errors import require
from metajax.core.progress import progress
from metajax.data.encoding import Tokenizer
from metajax.data.metadata import fill, template_fields
from metajax.data.pipeline import EVALUATION_SEED, Corpora, complete_row, row_capacity
from metajax.data.rows import Row, joined, padding_row, stack
from metajax.distributed.mesh import row_shards
from metajax.evaluation.questions import BETWEEN, COMPLETED, Question, QuestionFile, encode_pair
from metajax.evaluation.validation import require_finite, require_rows
from metajax.inference.decoding import Sampling
from metajax.inference.forward import prepare
from metajax.inference.generation import generate, opening, room_for_prompt
from metajax.training import losses
from metajax.training.program import Program

COMPLETION = 48  # most tokens of a completion, as in the harness
Piece = tuple[list[int], int]  # ids, and the number of the answer's ids at their end


def evaluate_choice(program: Program, corpora: Corpora, model: Any) -> dict[str, Any]:
    """{task: {acc, acc_norm, n}, "average": mean acc} for the first context and number of shots.

    "settings" has the same for every setting, CONTEXT_SHOTS. "questions" and "passages" are the mean acc of each sort, if the run
    has tasks of that sort.
    """
    choice, config = corpora.config.evaluation.choice, corpora.config
    tasks = [QuestionFile.of(spec) for spec in choice.tasks]
    names = [task.name for task in tasks]
    found: dict[str, dict[str, Any]] = {f"{context}_{shots}": {} for context in choice.contexts for shots in choice.shots}
    with progress(f"choices of {config.name}", total=len(tasks) * len(found)) as advance:
        for task, setting, shown, metadata in _asked(corpora):
            if task.kind in COMPLETED:
                right = contains(program, corpora, model, shown, metadata)
                found[setting][task.name] = shares(right, right)
            else:
                answers = score(program, corpora, model, shown, opening(config, corpora.tokenizer, metadata))
                found[setting][task.name] = summarise(shown, answers)
            advance(1)
    sorts: dict[str, list[str]] = {"average": names}
    for task in tasks:
        sorts.setdefault("passages" if task.kind in COMPLETED else "questions", []).append(task.name)
    for of_setting in found.values():
        of_setting |= {sort: float(np.mean([of_setting[name]["acc"] for name in members])) for sort, members in sorts.items()}
    return next(iter(found.values())) | {"settings": found}


def check_choice(corpora: Corpora) -> None:
    """UserError before training if the questions cannot be asked as `evaluation.choice` says."""
    if corpora.config.evaluation.choice is not None:
        for _ in _asked(corpora):
            pass


def _asked(corpora: Corpora) -> Iterator[tuple[QuestionFile, str, list[Question], str | None]]:
    """(task, setting, questions with their solved examples, metadata before everything) of every task and setting."""
    choice, config = corpora.config.evaluation.choice, corpora.config
    tasks = [QuestionFile.of(spec) for spec in choice.tasks]
    names = [task.name for task in tasks]
    twice = f"evaluation.choice.tasks: two tasks have the same name in {', '.join(names)}; name them with ?name="
    require(len(set(names)) == len(names), twice)
    for task in tasks:
        questions = task.read(task.path, corpora.paths.data)[: choice.examples]
        for number, question in enumerate(questions, 1):
            require(all(question.weighed), f"{task.path}: question {number} of {task.name} has an answer without text")
        examples = questions if task.shots_from == task.path else task.read(task.shots_from, corpora.paths.data)
        for context in choice.contexts:
            metadata = metadata_before(config, context, task)
            if task.kind in COMPLETED:
                room_for_passage(config, corpora.tokenizer, metadata)
            for shots in choice.shots:
                shown = [with_shots(q, n, examples, shots, examples is questions) for n, q in enumerate(questions)]
                yield task, f"{context}_{shots}", shown, metadata


def with_shots(question: Question, number: int, examples: Sequence[Question], shots: int, same_file: bool) -> Question:
    """The question after its description and `shots` solved examples, drawn by its number and never the question itself."""
    drawn = np.random.default_rng([EVALUATION_SEED, number]).permutation(len(examples))
    fitting = [examples[i] for i in drawn if examples[i].description == question.description and not (same_file and i == number)]
    too_many = f"{shots} shots, but there are {len(fitting)} examples to draw from; lower evaluation.choice.shots"
    require(shots <= len(fitting), too_many)
    before = question.description + "".join(example.solved + BETWEEN for example in fitting[:shots])
    return replace(question, contexts=tuple(before + context for context in question.contexts))


def metadata_before(config: Config, context: str, task: QuestionFile) -> str | None:
    """The metadata before everything: none, the empty pair, or the task's source."""
    if context != "task":
        return None if context == "none" else ""
    require(task.source is not None, f"evaluation.choice: {task.name} has no source to name; give it one with ?source=TEXT")
    template = (config.metadata or Metadata()).template
    return fill(template, dict.fromkeys(template_fields(template), task.source))


def room_for_passage(config: Config, tokenizer: Tokenizer, metadata: str | None) -> int:
    """Tokens of a passage that fit before its completion; UserError if none fits."""
    room = room_for_prompt(config, tokenizer, metadata) - COMPLETION
    no_room = f"a row holds no passage and the {COMPLETION} tokens that complete it"
    require(room > 0, f"{no_room}; evaluate with a greater data.sequence_length")
    return room


def contains(program: Program, corpora: Corpora, model: Any, questions: Sequence[Question], metadata: str | None) -> list[bool]:
    """Whether the first line of each greedy continuation contains the answer, ignoring case."""
    config, tokenizer = corpora.config, corpora.tokenizer
    room = room_for_passage(config, tokenizer, metadata)
    prompts = [tokenizer.encode(question.contexts[0])[-room:] for question in questions]
    ready, size, texts = prepare(program.whole(model)), config.data.batch_size, []
    options = {"count": COMPLETION, "context": metadata, "sampling": Sampling(temperature=0)}
    for n in range(0, len(prompts), size):
        texts += generate(ready, config, tokenizer, prompts[n : n + size], **options)
    lines = [text.partition("\n")[0].lower() for text in texts]
    return [question.weighed[0].lower() in line for question, line in zip(questions, lines, strict=True)]


def score(program: Program, corpora: Corpora, model: Any, questions: Sequence[Question], head: list[int]) -> np.ndarray:
    """float64 [N, 2] of every answer of every question, in order: log-likelihood, and whether it is the greedy continuation."""
    encode, room = corpora.tokenizer.encode, row_capacity(corpora.config) + 1 - max(1, len(head))
    pieces = []
    for question in questions:
        for context, answer in zip(question.contexts, question.answers, strict=True):
            before, after = encode_pair(encode, context, answer)
            too_long = f"the answer {answer!r} has {len(after)} tokens, and a row holds {room - 1} after its beginning"
            require(0 < len(after) < room, too_long)
            start = head if head or before else [corpora.tokenizer.vocabulary.bos]  # something has to predict the first token
            pieces.append((start + (before + after)[-room:], len(after)))
    found = np.stack([np.zeros(len(pieces)), np.ones(len(pieces))], axis=1)
    shards = row_shards(program.mesh)
    size = max(1, corpora.config.data.batch_size // corpora.config.training.accumulation_steps // shards) * shards
    of_tokens = token_scores(program)
    with jax.set_mesh(program.mesh):
        for batch in _batches(corpora, pieces, size):
            nll, greedy = jax.device_get(of_tokens(model, program.put(program.local_rows(batch))))
            piece, asked = batch["piece"], batch["is_body"]
            np.add.at(found[:, 0], piece[asked], -nll[asked].astype(np.float64))
            np.minimum.at(found[:, 1], piece[asked], greedy[asked])
    require_rows(program.config, -found[:, 0].min(initial=0), "questions and their answers have")
    require_finite(float(found[:, 0].sum()), "questions and their answers")
    return found


def token_scores(program: Program) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """Jitted (model, batch) -> nats of every target and whether it is the most likely token, [B, T] each, replicated."""

    def scores(model: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = losses.token_scores(model, batch)
        return found.nll, found.is_top

    return jax.jit(scores, out_shardings=NamedSharding(program.mesh, PartitionSpec()))


def _batches(corpora: Corpora, pieces: Sequence[Piece], size: int) -> Iterator[Row]:
    """Pieces packed in order as the documents of rows; `piece` is the piece of each position, 0 on padding."""
    config, vocabulary, capacity = corpora.config, corpora.tokenizer.vocabulary, row_capacity(corpora.config)
    groups, room = [[]], capacity
    for number, (ids, _) in enumerate(pieces):
        if len(ids) - 1 > room:
            groups.append([])
            room = capacity
        groups[-1].append(number)
        room -= len(ids) - 1
    rows = []
    for n, group in enumerate(groups):
        row = joined([_document(*pieces[number]) for number in group], capacity, vocabulary.pad)
        row["piece"] = np.array([0, *group], np.int32)[row["segment_ids"]]
        rows.append(complete_row(row, np.random.default_rng([EVALUATION_SEED, n]), config=config, meta_id=vocabulary.meta))
    rows += [padding_row(rows[0], vocabulary.pad)] * (-len(rows) % size)
    for n in range(0, len(rows), size):
        yield stack(rows[n : n + size])


def _document(ids: list[int], answer: int) -> Row:
    """A piece of a row with a loss on its answer alone, which is the last `answer` ids."""
    asked = np.arange(len(ids) - 1) >= len(ids) - 1 - answer
    return {"tokens": np.array(ids[:-1]), "targets": np.array(ids[1:]), "is_body": asked, "loss_weights": asked}


def summarise(questions: Sequence[Question], found: np.ndarray) -> dict[str, float]:
    """acc and acc_norm in [0, 1] and their standard errors over n questions, from the scores of all answers in order."""
    right, right_norm = [], []
    ends = np.cumsum([len(question.answers) for question in questions])
    for question, scores in zip(questions, np.split(found, ends[:-1]), strict=True):
        likely, greedy = scores.T
        if question.greedy:
            right.append(greedy[question.gold] > 0)
            right_norm.append(right[-1])
        else:
            right.append(np.argmax(likely) == question.gold)
            right_norm.append(np.argmax(likely / [len(text) for text in question.weighed]) == question.gold)
    return shares(right, right_norm)


def shares(right: Sequence[bool], right_norm: Sequence[bool]) -> dict[str, float]:
    """acc and acc_norm with their standard errors, and n."""
    n, out = len(right), {}
    for name, values in (("acc", right), ("acc_norm", right_norm)):
        share = float(np.mean(values))
        out |= {name: share, f"{name}_stderr": float(np.sqrt(share * (1 - share) / max(1, n - 1)))}
    return out | {"n": n}
