"""Config of preference learning."""

from __future__ import annotations

from dataclasses import dataclass

from metajax.core.fields import Part, Positive


@dataclass(frozen=True)
class Dpo(Part, path="dpo"):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of pairs of answers.

    The document is the chosen answer, and its metadata is the prompt. The column `rejected` holds the rejected answer.
    The reference is the model that training starts from, `init.from`.
    """

    beta: Positive = 0.1  # strength of the KL penalty towards the reference model; not stated for Hymba, 0.1 in Rafailov et al.
    rejected: str = "rejected"  # a column of the sources
