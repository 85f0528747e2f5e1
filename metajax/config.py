"""Typed, frozen configuration: sub-configs, validation and the identity hash.

A field is added here once, with its type and its default; the command line, the saved `config.json`, the hash and
the error messages follow from the dataclass (metajax/fields.py). Everything that cannot change a number lives in `Runtime`,
which is the only part outside the identity hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from metajax.fields import UserError, flatten, from_dict, nearest, override, require, to_dict
from metajax.model_config import Hybrid, Imported, Model
from metajax.preferences.config import Dpo

# every sub-config and the access to them, from one place
__all__ = ["Dpo", "Hybrid", "Imported", "Model", "UserError", "flatten", "from_dict", "nearest", "override", "require", "to_dict"]

Scale = Literal["cpu", "gpu", "paper"]
ANALYSES = (
    "interventions", "sharpening", "caching", "attention", "theory", "rate_distortion", "overhead", "mixing_maps", "branches", "needle",
    "probes", "metadata_attention", "guidance", "by_position",
)  # fmt: skip  # in metajax/analysis
TASKS = ("list_recall", "segment_counting", "parity", "copying", "needle", "mqar")  # in metajax/data/tasks


# ------------------------------------------------------------------------------------------------- sub-configs


@dataclass(frozen=True)
class Switch:
    """What changes in the data from one step on (annealing, cooldown); parameters, optimiser state and schedule go on."""

    step: int
    weights: tuple[float, ...] = ()  # of the sources; empty: as before
    metadata: Literal["same", "none"] = "same"  # none: documents without metadata from here on (MeCo)
    unseen: float = 0.0  # share of the training documents kept for the time from here on, and read only there; 0: all go on

    def __post_init__(self) -> None:
        require(self.step >= 1, f"data.switch.step = {self.step}: the switch comes at step 1 or later")
        require(0 <= self.unseen < 1, f"data.switch.unseen = {self.unseen}: a share of the training documents below 1")

    @property
    def anew(self) -> bool:
        """Whether rows from the step on are others than before it: other documents, or the same without their metadata."""
        return self.unseen > 0 or self.metadata == "none"


@dataclass(frozen=True)
class Data:
    """What is read and how it becomes rows. A source is `KIND[:PATH][?text=COLUMN&origin=COLUMN]`."""

    sources: tuple[str, ...] = ("pydocs",)
    weights: tuple[float, ...] = ()  # one per source; empty: equal
    switch: Switch | None = None
    tokenizer: str = "bpe:2048"
    row_length: int = 256
    batch_rows: int = 8  # rows of the global batch, whatever the number of hosts
    packing: Literal["concat", "best_fit", "new_document"] = "concat"  # metajax/data/packing.py
    attend_across_documents: bool = False
    held_out: float = 0.05  # share of origins kept for evaluation
    min_bytes: int = 0  # shorter documents are left out, of training and of evaluation
    on_bad_record: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; name at least one, such as pydocs")
        for name, weights in (("data.weights", self.weights), ("data.switch.weights", self.switch and self.switch.weights)):
            if weights:
                require(
                    len(weights) == len(self.sources),
                    f"data.sources has {len(self.sources)} entries but {name} has {len(weights)}; they must agree",
                )
                usable = min(weights) >= 0 and 0 < sum(weights) < math.inf
                require(usable, f"{name} = {weights}: weights are finite, >= 0 and not all 0")
        require(self.row_length >= 8, f"data.row_length = {self.row_length}: a row holds at least 8 tokens")
        require(self.min_bytes >= 0, f"data.min_bytes = {self.min_bytes}: not negative")
        require(self.batch_rows >= 1, f"data.batch_rows = {self.batch_rows}: a batch holds at least 1 row")
        require(0 < self.held_out < 1, f"data.held_out = {self.held_out}: a share between 0 and 1")


@dataclass(frozen=True)
class MetaTokens:
    """Learned meta-tokens inserted in the text (Language Modeling with Learned Meta-Tokens)."""

    inject: Literal["none", "random", "periodic"] = "random"
    rate: float = 0.1  # M = floor(rate * row_length) meta-tokens in every row
    # gathered: meta-tokens attend among themselves. dense: its twin over the whole row, as the paper writes the mask. What a row of
    # an ordinary token then adds is not stated in the paper: nothing (dense), or what finite masks make of it, the mean of its past
    # (dense_uniform) or attention to it (dense_causal). causal: every token attends to every one before, the control of equal parameters.
    attention: Literal["none", "gathered", "dense", "dense_uniform", "dense_causal", "causal"] = "gathered"
    embedding: Literal["learned", "frozen", "zero"] = "learned"  # of a meta-token; frozen: one random vector, never trained
    # Meta-tokens without a position: nothing added to the embedding or rotary angle 0, where in both attentions or in one alone.
    zero_position: Literal["none", "both", "causal", "meta"] = "none"
    loss: Literal["skip_meta_targets", "real_only"] = "skip_meta_targets"  # not stated in the paper
    length: Literal["within", "added"] = "within"  # M inside row_length, or on top of it; not stated in the paper

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, f"meta_tokens.rate = {self.rate}: a share of the row, 0 <= rate < 1")
        require(
            (self.inject == "none") == (self.rate == 0),
            f"meta_tokens.inject = {self.inject!r} and meta_tokens.rate = {self.rate} disagree: "
            "no injection means rate 0, and the other way round",
        )
        require(
            self.zero_position != "meta" or self.attention != "none",
            "meta_tokens.zero_position = 'meta' needs meta-attention, but meta_tokens.attention = 'none'",
        )

    @property
    def writes_everywhere(self) -> bool:
        """Whether meta-attention changes ordinary tokens too."""
        return self.attention in ("dense_uniform", "dense_causal", "causal")

    def check_position(self, scheme: str) -> None:
        """UserError when `zero_position` means nothing under this position scheme."""
        known = {"none": ("none",), "learned": ("none", "both")}.get(scheme, ("none", "both", "causal", "meta"))
        require(
            self.zero_position in known,
            f"meta_tokens.zero_position = {self.zero_position!r} means nothing with model.position = {scheme!r}; "
            f"choose {' or '.join(known)}",
        )

    def count(self, row_length: int) -> int:
        """M, the fixed number of meta-tokens in a row of `row_length` tokens."""
        return math.floor(Fraction(str(self.rate)) * row_length)  # in floating point 0.29 of 100 would be 28


@dataclass(frozen=True)
class Tasks:
    """Synthetic tasks instead of documents as training text (Language Modeling with Learned Meta-Tokens, section 4, appendix D;
    needle and mqar for Hymba).

    A length counts every slot that an example takes: BOS, prompt, answer. List names, prompts and the meaning of the sizes are in
    metajax/data/tasks/prompts.py; what does not fill a length is filled with neutral text.
    """

    names: tuple[str, ...] = TASKS[:4]  # a run may have one or several of TASKS
    train_length: int = 128  # longest training example; the paper has 128, 256, 512 and more
    # Curriculum: equal parts of the training steps, each with the share of train_length that its longest examples have. Five
    # phases in the paper; their bounds are not stated, halving is inferred from its split names.
    phases: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    train_examples: int = 90_000  # of each task, spread over the phases
    eval_lengths: tuple[int, ...] = (64, 128, 256)  # upper ends of the bins; a bin reaches down to half of it
    eval_examples: int = 1_000  # in every bin; the paper has 10,000 test examples a task over all of them
    # Where the meta-tokens of an example stand: at the spots that its question speaks of, at as many random spots, or nowhere;
    # without "deliberate" an ordinary token marks the spots. The paper's is "deliberate".
    placement: Literal["deliberate", "random", "none"] = "deliberate"
    lists: int = 6  # named lists in an example, at most; this and the sizes below are not stated in the paper
    items: int = 8  # items of a list, at most
    classes: int = 4  # answers of segment counting: 0 .. classes - 1, equally likely
    bits: int = 6  # bits before the pause, at most (parity)
    span: int = 6  # words to copy, at most
    pairs: int = 64  # of a key and its value, at most, and at most a quarter of a row's slots (mqar)

    def __post_init__(self) -> None:
        known = TASKS
        require(len(self.names) > 0, f"tasks.names is empty; known: {', '.join(known)}")
        for name in self.names:
            require(name in known, f"tasks.names: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        require(
            len(self.phases) > 0 and all(0 <= p <= 1 for p in self.phases),
            f"tasks.phases = {self.phases}: a share of tasks.train_length from 0 to 1 for each phase",
        )
        for name in ("train_length", "train_examples", "eval_examples", "lists", "bits", "span", "pairs"):
            require(getattr(self, name) >= 1, f"tasks.{name} = {getattr(self, name)}: at least 1")
        lengths = self.eval_lengths
        require(
            len(set(lengths)) == len(lengths) and min(lengths, default=2) >= 2,
            f"tasks.eval_lengths = {lengths}: different lengths",
        )
        require(self.classes >= 2, f"tasks.classes = {self.classes}: at least 2 answers")
        least = max(2, self.classes - 1)
        require(self.items >= least, f"tasks.items = {self.items}: at least {least}, so that a list holds what is asked for")

    def pauses(self, row_length: int) -> int:
        """Meta-tokens that a training row has room for, with or without meta-attention."""
        return row_length // 8


@dataclass(frozen=True)
class Metadata:
    """Document metadata as text beside the body (Beyond URLs, URLs Help / Topics Guide, MeCo)."""

    position: Literal["none", "prepend", "append", "both"] = "prepend"  # of the body; repeated at every piece of a cut document
    template: str = "{url}"  # metadata fields in braces, with filters behind a bar: {url|host}; metajax/data/annotators.py
    appended: str = ""  # position "both": the template behind the body; "": the same as in front
    tokens: int = 0  # this many learnable tokens, the same for all documents, in place of the template (5 in Beyond URLs)
    wrap: Literal["special_tokens", "plain"] = "special_tokens"  # <|context_begin|> ... <|context_end|>, or the bare text
    assigned: Literal["own", "shuffled"] = "own"  # shuffled: another document's, at random (the control in training)
    keep: float = 0.9  # share of documents that keep their metadata
    when_dropped: Literal["empty", "nothing"] = "empty"  # the empty pair of delimiters, or nothing at all
    loss_weights: tuple[float, float] = (0.0, 1.0)  # of predicting the metadata itself, in front of the body and behind it
    bos_eos: Literal["outside", "inside"] = "outside"  # BOS metadata body metadata EOS, or metadata BOS body EOS metadata
    too_long: Literal["stop", "drop"] = "stop"  # metadata that no row takes: an error, or dropped and counted; never cut

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, f"metadata.keep = {self.keep}: a probability")
        require(min(self.loss_weights) >= 0, f"metadata.loss_weights = {self.loss_weights}: not negative")
        require(0 <= self.tokens <= 11, f"metadata.tokens = {self.tokens}: a vocabulary keeps 11 for them")
        require(
            not self.appended or self.position == "both",
            f"metadata.appended = {self.appended!r} needs metadata.position = 'both'; with 'append' the template itself stands behind",
        )

    @property
    def in_front(self) -> bool:
        """Whether metadata stands in front of the body."""
        return self.position in ("prepend", "both")


@dataclass(frozen=True)
class Optimizer:
    """AdamW, its schedule and its clipping."""

    learning_rate: float = 3e-3
    final_fraction: float = 0.1  # of the peak, at the end of the schedule
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 20
    horizon: int = 0  # step where cosine, linear or wsd end; 0: training.steps
    decay_share: float = 0.2  # wsd: the last share of the horizon decays
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0: no clipping
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < math.inf, f"optimizer.learning_rate = {self.learning_rate}: a positive number")
        for name in ("warmup_steps", "horizon", "weight_decay", "clip_norm", "z_loss"):
            require(0 <= getattr(self, name) < math.inf, f"optimizer.{name} = {getattr(self, name)}: not negative")
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction = {self.final_fraction}: a share of the peak")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas = {self.betas}: both 0 <= beta < 1")
        require(0 < self.decay_share <= 1, f"optimizer.decay_share = {self.decay_share}: a share of the horizon")


@dataclass(frozen=True)
class Training:
    steps: int = 200
    accumulate: int = 1  # micro-batches a step; the gradient equals that of the whole batch

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"training.steps = {self.steps}: at least 1")
        require(self.accumulate >= 1, f"training.accumulate = {self.accumulate}: at least 1")


@dataclass(frozen=True)
class Init:
    """Where parameters come from: '' for a fresh start, or a run whose newest checkpoint is read. RUN?PART&PART=NAME reads these parts
    alone, the second under the NAME that it has there; a part is the beginning of a parameter's path, such as blocks/attention."""

    from_: str = ""

    @property
    def run(self) -> str:
        """The run without the parts."""
        return self.from_.partition("?")[0]

    @property
    def parts(self) -> dict[str, str]:
        """{part of this model: its name in the run}; empty: all of it, under the same names."""
        pairs = (item.partition("=") for item in self.from_.partition("?")[2].split("&") if item)
        return {ours: theirs or ours for ours, _, theirs in pairs}


@dataclass(frozen=True)
class Choice:
    """Multiple-choice questions from local files, scored by log-likelihood as the lm-evaluation-harness does (metajax/evaluation/choice.py)."""

    tasks: tuple[str, ...]  # KIND:FILE[?shots_from=FILE], such as arc_easy:arc_easy/test.jsonl
    # Solved questions in front of each; every number is evaluated, the first one is the task's result.
    shots: tuple[int, ...] = (5,)
    # What stands in front of it all: nothing, the empty pair of metadata, or the source that a task has (MeCo's conditional inference).
    contexts: tuple[str, ...] = ("none",)
    examples: int = 1000  # of a task, at most

    def __post_init__(self) -> None:
        require(
            len(self.tasks) > 0,
            "evaluation.choice.tasks is empty; name one, such as arc_easy:FILE, or leave evaluation.choice out",
        )
        require(
            len(self.shots) > 0 and min(self.shots) >= 0,
            f"evaluation.choice.shots = {self.shots}: numbers of questions, 0 for none",
        )
        known = ("none", "empty", "task")
        for context in self.contexts:
            require(
                context in known,
                f"evaluation.choice.contexts: unknown {context!r}{nearest(context, known)}; known: {', '.join(known)}",
            )
        require(len(self.contexts) > 0, "evaluation.choice.contexts is empty; `none` puts nothing in front")
        require(self.examples >= 1, f"evaluation.choice.examples = {self.examples}: at least 1")


@dataclass(frozen=True)
class Evaluation:
    every: int = 0  # steps between held-out evaluations during training; 0: at the end alone
    documents: int = 400  # held-out documents, in an order fixed by the corpus; with tasks 0 leaves them out
    conditions: tuple[str, ...] = ("none",)  # metadata shown at evaluation: none, right, empty, shuffled
    sample_tokens: int = 48  # length of the text sample in the report
    choice: Choice | None = None
    # Templates of metadata that probes tell from hidden states; the first is a document's topic.
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "documents", "sample_tokens"):
            require(getattr(self, name) >= 0, f"evaluation.{name} = {getattr(self, name)}: not negative")
        require(len(self.conditions) > 0, "evaluation.conditions is empty; `none` evaluates without metadata")
        known = ("none", "right", "empty", "shuffled")
        for condition in self.conditions:
            require(
                condition in known,
                f"evaluation.conditions: unknown {condition!r}{nearest(condition, known)}; known: {', '.join(known)}",
            )


def check_analyses(what: str, names: tuple[str, ...]) -> None:
    """UserError for an analysis that does not exist; `what` is where it is named."""
    for name in names:
        require(name in ANALYSES, f"{what}: unknown {name!r}{nearest(name, ANALYSES)}; known: {', '.join(ANALYSES)}")


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out. Nothing here changes what is computed, so it stands outside the identity hash."""

    log_every: int = 10
    save_every: int = 50
    keep: int = 2  # newest checkpoints kept, beside the best
    # A step that is not finite, or whose gradient norm is above the limit: stop with a replay bundle, or leave it out and say so in the
    # report. Outside the hash, for a run that meets no such step is the same.
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_grad_norm: float = 0.0  # before clipping; 0: no limit
    profile: tuple[int, ...] = ()  # first and last step of a profile for xprof
    hang_seconds: float = 1800.0  # without a step, save or evaluation the process ends with its stacks; 0: never
    loggers: tuple[str, ...] = ()  # tensorboard, wandb
    workers: int = 0  # grain reader processes; 0: threads
    mesh: str = "data=1,fsdp=-1"  # axis=size; one -1 takes the devices that are left
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 0  # layers unrolled in one scan step; 0: all (fastest on CPU), 1: fastest to compile
    implementation: Literal["auto", "reference", "xla", "pallas_tpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep"):
            require(getattr(self, name) >= 1, f"runtime.{name} = {getattr(self, name)}: at least 1")
        profile = self.profile
        require(
            not profile or (len(profile) == 2 and 1 <= profile[0] <= profile[1]),
            f"runtime.profile = {profile}: the first and the last step of the profile, such as 20,25",
        )
        for name in ("workers", "unroll", "max_grad_norm", "hang_seconds"):
            require(getattr(self, name) >= 0, f"runtime.{name} = {getattr(self, name)}: not negative")
        for logger in self.loggers:
            known = ("tensorboard", "wandb")
            require(logger in known, f"runtime.loggers: unknown {logger!r}{nearest(logger, known)}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Config:
    """One experiment, whole. `name` and `scale` say which; `--seed` sets the seed; the rest is reachable with --set."""

    name: str
    scale: Scale = "cpu"
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    meta_tokens: MetaTokens | None = None
    metadata: Metadata | None = None
    tasks: Tasks | None = None
    dpo: Dpo | None = None
    imported: Imported | None = field(default=None, metadata={"filled_in": True})  # by `import` and `init.from`; nobody sets it
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    init: Init = field(default_factory=Init)
    evaluation: Evaluation = field(default_factory=Evaluation)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        data, training, optimizer = self.data, self.training, self.optimizer
        require(self.seed >= 0, f"seed = {self.seed}: not negative")
        require(
            data.batch_rows % training.accumulate == 0,
            f"data.batch_rows = {data.batch_rows} does not divide by training.accumulate = {training.accumulate}",
        )
        horizon = optimizer.horizon or training.steps
        require(
            optimizer.schedule == "constant" or optimizer.warmup_steps <= horizon,
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is longer than the schedule of {horizon} steps "
            "(optimizer.horizon, or training.steps where that is 0)",
        )
        if data.switch is not None:
            require(
                data.switch.step < training.steps,
                f"data.switch.step = {data.switch.step} is not before training.steps = {training.steps}",
            )
            require(
                data.switch.metadata == "same" or (self.metadata is not None and self.metadata.position != "none"),
                "data.switch.metadata = 'none' takes metadata away, but this experiment trains without (metadata.position)",
            )
        if self.dpo is not None:
            self.dpo.check(self)
        self._check_lengths()
        if self.meta_tokens is not None:
            self.meta_tokens.check_position(self.model.position)
        shown = [c for c in self.evaluation.conditions if c != "none"]
        require(
            not shown or self.metadata is not None,
            f"evaluation.conditions names {', '.join(shown)} but this experiment has no metadata template (metadata is null)",
        )

    def _check_lengths(self) -> None:
        meta = self.meta_tokens
        require(
            self.model.hybrid is None or meta is None or meta.attention == "none",
            "meta_tokens.attention: a hybrid model has no meta-attention; set meta_tokens.attention=none",
        )
        model, tasks, slots = self.model, self.tasks, self.row_slots
        require(
            model.max_positions == 0 or model.max_positions >= slots,
            f"model.max_positions = {model.max_positions} is less than the {slots} slots of a row",
        )
        require(
            self.evaluation.documents > 0 or tasks is not None,
            "evaluation.documents = 0: at least 1, or there is nothing to evaluate",
        )
        require(
            tasks is None or 16 <= tasks.train_length <= self.data.row_length,
            f"tasks.train_length = {tasks and tasks.train_length}: between 16 and data.row_length = {self.data.row_length}",
        )

    @property
    def row_slots(self) -> int:
        """Positions of a row as the model sees it."""
        meta = self.meta_tokens
        added = meta is not None and meta.length == "added" and self.tasks is None  # tasks bring theirs in their prompts
        return self.data.row_length + (meta.count(self.data.row_length) if added else 0)

    @property
    def row_meta_tokens(self) -> int:
        """M, the slots that a training row has for meta-tokens; rows of documents fill all of them, rows of tasks some."""
        if self.meta_tokens is None:
            return 0
        return (self.tasks.pauses if self.tasks is not None else self.meta_tokens.count)(self.data.row_length)


# ------------------------------------------------------------------------------------------------- identity


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, as (value in a, value in b); absent fields read as None."""
    fa, fb = flatten(a), flatten(b)
    return {k: (fa.get(k), fb.get(k)) for k in sorted(fa.keys() | fb.keys()) if fa.get(k) != fb.get(k)}


def config_hash(config: Config) -> str:
    """Eight hex digits over every field that can change a number; name, seed and `runtime` stand outside."""
    identity = {k: v for k, v in to_dict(config).items() if k not in ("name", "scale", "seed", "runtime")}
    # What a run does without is no part of it here: a new kind of evaluation, say, leaves the names of the runs there are.
    for part in ("dpo", "imported"):
        if identity.get(part, 0) is None:
            del identity[part]
    for part in ("evaluation", "prompts"):
        if identity.get(part):
            identity[part] = {k: v for k, v in identity[part].items() if v is not None}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
