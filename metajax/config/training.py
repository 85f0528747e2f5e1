"""Config of training: steps, objective, optimizer and initial parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from metajax.core.fields import Count, CountOrZero, NotNegative, OnlyWith, Part, Positive, Range, Share, Size

Falling = OnlyWith("schedule", "cosine", "wsd", "linear")
Beta = Annotated[float, Range(0, below=1)]
DecayShare = Annotated[float, Range(above=0, most=1), OnlyWith("schedule", "wsd")]


REMOVED = {"ns_steps": (5, "Muon has 5 Newton-Schulz iterations"), "nesterov": (True, "Muon has Nesterov's momentum")}


@dataclass(frozen=True)
class Optimizer(Part, path="optimizer", removed=REMOVED):
    """The optimizer, its schedule and its clipping. `@optimizer` names the fields that an optimizer ignores."""

    name: str = "adamw"  # adamw, muon, or another registered with `@optimizer` (metajax/training/optimizers)
    learning_rate: Positive = 3e-3
    final_fraction: Annotated[Share, Falling] = 0.1  # learning rate at the end of the schedule as a share of the peak
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: CountOrZero = 20
    horizon: Annotated[CountOrZero, Falling] = 0  # step at which cosine, linear or wsd ends; 0: training.steps
    decay_share: DecayShare = 0.2  # wsd: share of the horizon, at its end, in which the rate decays
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # of AdamW; Muon uses AdamW for embeddings, heads, norms and biases
    momentum: Beta = 0.95  # of Muon
    weight_decay: NotNegative = 0.1
    clip_norm: NotNegative = 1.0  # 0: no clipping
    z_loss: NotNegative = 0.0


@dataclass(frozen=True)
class Training(Part, path="training", renamed={"accumulate": "accumulation_steps"}):
    steps: Count = 200
    accumulation_steps: Size = 1  # micro-batches a step; the gradient equals that of the whole batch
    objective: str = "language_model"  # registered in metajax/training/objectives; a `dpo` sub-config replaces it


@dataclass(frozen=True)
class Dpo(Part, path="dpo"):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of pairs of answers.

    The document is the chosen answer, and its metadata is the prompt. The column `rejected` holds the rejected answer.
    The reference is the model that training starts from, `init.from`.
    """

    beta: Positive = 0.1  # strength of the KL penalty towards the reference model; not stated for Hymba, 0.1 in Rafailov et al.
    rejected: str = "rejected"  # a column of the sources


@dataclass(frozen=True)
class Init(Part, path="init"):
    """Source of the initial parameters: '' for a fresh start, or a run whose newest checkpoint is read. RUN?PART&PART=NAME reads
    only these parts, the second from NAME in the run. A part is the beginning of a parameter's path, such as blocks/0/0/mlp."""

    from_: str = ""

    @property
    def run(self) -> str:
        """The run without the parts."""
        return self.from_.partition("?")[0]

    @property
    def parts(self) -> dict[str, str]:
        """{part of this model: its name in the run}; empty: all parts, under the same names."""
        pairs = (item.partition("=") for item in self.from_.partition("?")[2].split("&") if item)
        return {ours: theirs or ours for ours, _, theirs in pairs}
