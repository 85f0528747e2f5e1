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
from metajax.core.errors import nearest, require
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


def asked(context: str, choices: Sequence[str], gold: int) -> Question:
    """A question with one context and several answers."""
    return Question((context,) * len(choices), tuple(DELIMITER + choice for choice in choices), tuple(choices), int(gold))


def _arc(record: Record) -> Question:
    choices = record["choices"]
    return asked(f"Question: {record['question']}\nAnswer:", choices["text"], choices["label"].index(record["answerKey"]))


def _commonsense_qa(record: Record) -> Question:
    texts = record["choices"]["text"]
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDE", texts, strict=True)]
    return asked(
        "\n".join([f"Question: {record['question'].strip()}", *lines, "Answer:"]), "ABCDE", "ABCDE".index(record["answerKey"])
    )


def _hellaswag(record: Record) -> Question:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    return asked(
        clean(f"{record['activity_label']}: {context}"), [clean(ending) for ending in record["endings"]], record["label"]
    )


def _lambada(record: Record) -> Question:
    before, _, last = record["text"].rpartition(" ")
    return Question((before,), (DELIMITER + last,), (last,), 0, greedy=True)


def _mmlu(record: Record) -> Question:
    question = asked(f"Question: {record['question'].strip()}\nAnswer:", record["choices"], record["answer"])
    about = record["subject"].replace("_", " ")
    return replace(question, description=f"The following are questions (with answers) about {about}.{BETWEEN}")


def _openbookqa(record: Record) -> Question:
    choices = record["choices"]
    return asked(record["question_stem"], choices["text"], choices["label"].index(record["answerKey"].strip()))


def _passage(record: Record) -> Question:
    """A passage that ends before the value, which occurs somewhere in it (Arora et al., arXiv 2407.05483)."""
    return Question((record["text"],), (DELIMITER + record["value"],), (record["value"],), 0)


def _piqa(record: Record) -> Question:
    return asked(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], record["label"])


def _social_iqa(record: Record) -> Question:
    answers = [record[f"answer{letter}"] for letter in "ABC"]
    return asked(f"Q: {record['context']} {record['question']}\nA:", answers, int(record["label"]) - 1)


def _winogrande(record: Record) -> Question:
    """Each name is put into the blank, and the text after the blank is scored."""
    before, _, after = record["sentence"].partition("_")
    contexts = (before + record["option1"], before + record["option2"])
    return Question(contexts, (DELIMITER + after.strip(),) * 2, contexts, int(record["answer"]) - 1)


KINDS: dict[str, Callable[[Record], Question]] = {
    "arc_easy": _arc, "arc_challenge": _arc, "commonsense_qa": _commonsense_qa, "hellaswag": _hellaswag, "lambada": _lambada,
    "fda": _passage, "squad_completion": _passage, "swde": _passage, "mmlu_continuation": _mmlu, "openbookqa": _openbookqa, "piqa": _piqa, "social_iqa": _social_iqa, "winogrande": _winogrande,
    "jsonl": lambda record: asked(record["query"], record["choices"], record["gold"]),
}  # fmt: skip
COMPLETED = ("fda", "squad_completion", "swde")  # kinds whose value the model generates; other kinds score given answers
# Invented addresses that fit a task; MeCo puts them before a prompt for conditional inference.
SITES = {
    "mmlu_continuation": "testprepportal", "arc_easy": "sciencestudyquiz", "arc_challenge": "sciencestudyquiz", "commonsense_qa": "quizsmart",
    "hellaswag": "wikihowquiz", "openbookqa": "factquizmaster", "piqa": "basicknowledgequiz", "social_iqa": "socialskillsassessment",
    "winogrande": "testpreppractice",
}  # fmt: skip


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
        said = f"evaluation.choice.tasks {spec!r}: "
        require(kind in KINDS, f"{said}unknown kind {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
        require(bool(path), f"{said}a file is missing; write {kind}:FILE")
        options, known = dict(parse_qsl(query)), ("shots_from", "name", "source")
        for option in options:
            require(option in known, f"{said}unknown option {option!r}{nearest(option, known)}; known: {', '.join(known)}")
        site = f"www.{SITES[kind]}.com" if kind in SITES else None
        return cls(kind, path, options.get("name", kind), options.get("source", site), options.get("shots_from", path))

    def read(self, path: str, data_dir: Path | None) -> list[Question]:
        """The questions of a file, in order; raises UserError for a record that lacks a field or has another form."""
        root = os.fspath(data_dir) if data_dir is not None else os.getcwd()
        found = []
        for file in find_files(f"{self.kind}:{path}", path, root):
            for number, record in json_lines.records(file):
                where = f"{file}, line {number}: "
                try:
                    question = KINDS[self.kind](record)
                except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                    require(
                        False,
                        f"{where}no question of {self.kind} ({type(error).__name__}: {error}); a record has {_fields(record)}",
                    )
                require(0 <= question.gold < len(question.answers), f"{where}the right answer is number {question.gold}")
                found.append(question)
        require(len(found) > 0, f"{path} has no question")
        return found


def _fields(record: Any) -> str:
    return ", ".join(record) if isinstance(record, Mapping) else type(record).__name__


def encode_pair(encode: Callable[[str], list[int]], context: str, answer: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the answer) as in the harness. Spaces at the context's end belong to the answer. Both are
    encoded together, and the answer is the ids after those of the context."""
    kept = context.rstrip()
    before = encode(kept)
    return before, encode(context + answer)[len(before) :]
