"""Multiple-choice questions and passages to complete, from local JSON lines files with the fields of lm-evaluation-harness tasks.

A kind defines how a record becomes a question. The prompts are those of the harness, so that scores are comparable with
published ones. The kind `jsonl` is for custom files, with the fields query, choices and gold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from metajax.core import json_lines
from metajax.core.errors import UserError, nearest, require
from metajax.data.sources.files import find_files

Record = Mapping[str, Any]
DELIMITER = " "  # between a prompt and its answer
BETWEEN = "\n\n"  # between solved examples


@dataclass(frozen=True)
class Question:
    """A question: each context is scored with its answer. acc_norm divides by the lengths of `weighed`; `gold` is right.

    greedy: there is one answer, which is right if it is the most likely text, token by token. description: text before the
    question and its solved examples, which then come from questions with the same description.
    """

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    weighed: tuple[str, ...]
    gold: int
    greedy: bool = False
    description: str = ""

    @property
    def solved(self) -> str:
        """The question with its answer, as a solved example. For LAMBADA the harness has two spaces before the last word."""
        return self.contexts[self.gold] + DELIMITER * self.greedy + self.answers[self.gold]


# ------------------------------------------------------------------------------------------------------- kinds

KINDS: dict[str, Callable[[Record], Question]] = {}
COMPLETED = ("fda", "squad_completion", "swde")  # kinds whose value the model generates; other kinds score given answers
# {kind: an invented address that fits it}; MeCo puts these before a prompt for conditional inference.
SITES: dict[str, str] = {}


def kind(*names: str, site: str = "") -> Callable[[Callable[[Record], Question]], Callable[[Record], Question]]:
    """Register a function from a record to its question under some names."""

    def register(read: Callable[[Record], Question]) -> Callable[[Record], Question]:
        KINDS.update(dict.fromkeys(names, read))
        SITES.update(dict.fromkeys(names, f"www.{site}.com") if site else {})
        return read

    return register


def _ask(context: str, choices: Sequence[str], gold: int) -> Question:
    """A question with one context and several answers."""
    return Question((context,) * len(choices), tuple(DELIMITER + choice for choice in choices), tuple(choices), int(gold))


@kind("arc_easy", "arc_challenge", site="sciencestudyquiz")
def _arc(record: Record) -> Question:
    choices = record["choices"]
    return _ask(f"Question: {record['question']}\nAnswer:", choices["text"], choices["label"].index(record["answerKey"]))


@kind("commonsense_qa", site="quizsmart")
def _commonsense_qa(record: Record) -> Question:
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDE", record["choices"]["text"], strict=True)]
    context = "\n".join([f"Question: {record['question'].strip()}", *lines, "Answer:"])
    return _ask(context, "ABCDE", "ABCDE".index(record["answerKey"]))


@kind("hellaswag", site="wikihowquiz")
def _hellaswag(record: Record) -> Question:
    texts = [f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}", *record["endings"]]
    texts = [re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ") for text in texts]
    return _ask(texts[0], texts[1:], record["label"])


@kind("lambada")
def _lambada(record: Record) -> Question:
    before, _, last = record["text"].rpartition(" ")
    return Question((before,), (DELIMITER + last,), (last,), 0, greedy=True)


@kind("mmlu_continuation", site="testprepportal")
def _mmlu(record: Record) -> Question:
    question = _ask(f"Question: {record['question'].strip()}\nAnswer:", record["choices"], record["answer"])
    about = record["subject"].replace("_", " ")
    return replace(question, description=f"The following are questions (with answers) about {about}.{BETWEEN}")


@kind("openbookqa", site="factquizmaster")
def _openbookqa(record: Record) -> Question:
    choices = record["choices"]
    return _ask(record["question_stem"], choices["text"], choices["label"].index(record["answerKey"].strip()))


@kind(*COMPLETED)
def _passage(record: Record) -> Question:
    """A passage that ends before the value, which occurs somewhere in it (Arora et al., arXiv 2407.05483)."""
    return Question((record["text"],), (DELIMITER + record["value"],), (record["value"],), 0)


@kind("piqa", site="basicknowledgequiz")
def _piqa(record: Record) -> Question:
    return _ask(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], record["label"])


@kind("social_iqa", site="socialskillsassessment")
def _social_iqa(record: Record) -> Question:
    answers = [record[f"answer{letter}"] for letter in "ABC"]
    return _ask(f"Q: {record['context']} {record['question']}\nA:", answers, int(record["label"]) - 1)


@kind("winogrande", site="testpreppractice")
def _winogrande(record: Record) -> Question:
    """Each name is put into the blank, and the text after the blank is scored."""
    before, _, after = record["sentence"].partition("_")
    contexts = (before + record["option1"], before + record["option2"])
    return Question(contexts, (DELIMITER + after.strip(),) * 2, contexts, int(record["answer"]) - 1)


@kind("jsonl")
def _jsonl(record: Record) -> Question:
    return _ask(record["query"], record["choices"], record["gold"])


# ------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class QuestionFile:
    """A file of questions. spec: KIND:FILE[?shots_from=FILE&name=NAME&source=TEXT].

    shots_from: the file of the solved examples, by default the same file. name: of the results, by default the kind. source: the
    metadata for conditional inference, by default MeCo's address for the kind if it has one.
    """

    kind: str
    path: str
    name: str
    source: str | None
    shots_from: str

    @classmethod
    def of(cls, spec: str) -> QuestionFile:
        """Parse a spec; raises UserError for an unknown kind or option."""
        head, _, query = spec.partition("?")
        kind, _, path = head.partition(":")
        of_spec = f"evaluation.choice.tasks {spec!r}: "
        require(kind in KINDS, f"{of_spec}unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
        require(bool(path), f"{of_spec}a file is missing; write {kind}:FILE")
        options, known = dict(parse_qsl(query)), ("shots_from", "name", "source")
        for option in options:
            require(option in known, f"{of_spec}unknown option {option!r}{nearest(option, known)}; known: {', '.join(known)}")
        source = options.get("source", SITES.get(kind))
        return cls(kind, path, options.get("name", kind), source, options.get("shots_from", path))

    def read(self, path: str, data_dir: Path | None) -> list[Question]:
        """The questions of a file, in order; raises UserError for a record that lacks a field or has another form."""
        found = []
        for file in find_files(f"{self.kind}:{path}", path, os.fspath(data_dir or os.getcwd())):
            for number, record in json_lines.records(file):
                where = f"{file}, line {number}: "
                try:
                    question = KINDS[self.kind](record)
                except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                    problem = f"no question of {self.kind} ({type(error).__name__}: {error})"
                    fields = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
                    raise UserError(f"{where}{problem}; a record has {fields}") from None
                require(0 <= question.gold < len(question.answers), f"{where}the right answer is number {question.gold}")
                found.append(question)
        require(len(found) > 0, f"{path} has no question")
        return found


def encode_pair(encode: Callable[[str], list[int]], context: str, answer: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the answer) as in the harness. Spaces at the context's end belong to the answer. Both are
    encoded together, and the answer is the ids after those of the context."""
    before = encode(context.rstrip())
    return before, encode(context + answer)[len(before) :]
