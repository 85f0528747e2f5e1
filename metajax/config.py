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
from typing import Annotated, Any, Literal

from metajax.fields import (
    Count,
    CountOrZero,
    NotNegative,
    Part,
    Positive,
    Range,
    Seed,
    Share,
    Size,
    UserError,
    convert,
    flatten,
    from_dict,
    nearest,
    override,
    require,
    to_dict,
)
from metajax.model_config import Hybrid, Imported, Model
from metajax.preferences.config import Dpo

# every sub-config and the access to them, from one place
__all__ = ["Dpo", "Hybrid", "Imported", "Model", "UserError", "flatten", "from_dict", "nearest", "override", "require", "to_dict"]

Scale = Literal["cpu", "gpu", "paper"]
ANALYSES = (
    "interventions", "sharpening", "caching", "attention", "theory", "rate_distortion", "overhead", "mixing_maps", "branches", "needle",
    "probes", "metadata_attention", "guidance", "by_position",
)  # fmt: skip  # in metajax/analysis
# Of the device mesh. Rows of a batch are spread over data and fsdp, parameters and optimiser over fsdp, long rows over context, and heads,
# channels and the hidden units of feed-forward networks over tensor. Neighbours in the last axes are neighbours in the hardware.
AXES = ("data", "fsdp", "context", "tensor")
Beta = Annotated[float, Range(0, below=1)]
Length = Annotated[int, Range(2, 2**20)]
Seconds = Annotated[float, Range(0, 10**9)]
Processes = Annotated[int, Range(1, 10**6)]
# Of drawing tokens.
Temperature = Annotated[float, Range(0, 10**6)]
TopK = CountOrZero
TopP = Annotated[float, Range(above=0, most=1)]
Guidance = Annotated[float, Range(-1000, 1000)]
TASKS = ("list_recall", "segment_counting", "parity", "copying", "needle", "mqar")  # in metajax/data/tasks


# ------------------------------------------------------------------------------------------------- sub-configs


@dataclass(frozen=True)
class Switch(Part, path="data.switch"):
    """What changes in the data from one step on (annealing, cooldown); parameters, optimiser state and schedule go on."""

    step: Count
    weights: tuple[NotNegative, ...] = ()  # of the sources; empty: as before
    metadata: Literal["same", "none"] = "same"  # none: documents without metadata from here on (MeCo)
    # Share of the training documents kept for the time from here on, and read only there; 0: all go on.
    unseen: Annotated[float, Range(0, below=1)] = 0.0

    @property
    def anew(self) -> bool:
        """Whether rows from the step on are others than before it: other documents, or the same without their metadata."""
        return self.unseen > 0 or self.metadata == "none"


@dataclass(frozen=True)
class Data(Part, path="data"):
    """What is read and how it becomes rows. A source is `KIND[:PATH][?text=COLUMN&origin=COLUMN]`."""

    sources: tuple[str, ...] = ("pydocs",)
    weights: tuple[NotNegative, ...] = ()  # one per source; empty: equal
    switch: Switch | None = None
    tokenizer: str = "bpe:2048"
    row_length: Annotated[int, Range(8, 2**20)] = 256
    batch_rows: Size = 8  # rows of the global batch, whatever the number of hosts
    packing: Literal["concat", "best_fit", "new_document"] = "concat"  # metajax/data/packing.py
    attend_across_documents: bool = False
    held_out: Annotated[float, Range(above=0, below=1)] = 0.05  # share of origins kept for evaluation
    min_bytes: CountOrZero = 0  # shorter documents are left out, of training and of evaluation
    on_bad_record: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; name at least one, such as pydocs")
        for name, weights in (("data.weights", self.weights), ("data.switch.weights", self.switch and self.switch.weights)):
            if weights:
                require(
                    len(weights) == len(self.sources),
                    f"data.sources has {len(self.sources)} entries but {name} has {len(weights)}; they must agree",
                )
                require(sum(weights) > 0, f"{name} = {weights}: one of them has to be above 0")


@dataclass(frozen=True)
class MetaTokens(Part, path="meta_tokens"):
    """Learned meta-tokens inserted in the text (Language Modeling with Learned Meta-Tokens)."""

    inject: Literal["none", "random", "periodic"] = "random"
    rate: Annotated[float, Range(0, below=1)] = 0.1  # M = floor(rate * row_length) meta-tokens in every row
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
class Tasks(Part, path="tasks"):
    """Synthetic tasks instead of documents as training text (Language Modeling with Learned Meta-Tokens, section 4, appendix D;
    needle and mqar for Hymba).

    A length counts every slot that an example takes: BOS, prompt, answer. List names, prompts and the meaning of the sizes are in
    metajax/data/tasks/prompts.py; what does not fill a length is filled with neutral text.
    """

    names: tuple[str, ...] = TASKS[:4]  # a run may have one or several of TASKS
    train_length: Size = 128  # longest training example; the paper has 128, 256, 512 and more
    # Curriculum: equal parts of the training steps, each with the share of train_length that its longest examples have. Five
    # phases in the paper; their bounds are not stated, halving is inferred from its split names.
    phases: tuple[Share, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    train_examples: Count = 90_000  # of each task, spread over the phases
    eval_lengths: tuple[Length, ...] = (64, 128, 256)  # upper ends of the bins; a bin reaches down to half of it
    eval_examples: Count = 1_000  # in every bin; the paper has 10,000 test examples a task over all of them
    # Where the meta-tokens of an example stand: at the spots that its question speaks of, at as many random spots, or nowhere;
    # without "deliberate" an ordinary token marks the spots. The paper's is "deliberate".
    placement: Literal["deliberate", "random", "none"] = "deliberate"
    lists: Size = 6  # named lists in an example, at most; this and the sizes below are not stated in the paper
    items: Size = 8  # items of a list, at most
    classes: Annotated[int, Range(2, 2**20)] = 4  # answers of segment counting: 0 .. classes - 1, equally likely
    bits: Size = 6  # bits before the pause, at most (parity)
    span: Size = 6  # words to copy, at most
    pairs: Size = 64  # of a key and its value, at most, and at most a quarter of a row's slots (mqar)

    def __post_init__(self) -> None:
        known = TASKS
        require(len(self.names) > 0, f"tasks.names is empty; known: {', '.join(known)}")
        for name in self.names:
            require(name in known, f"tasks.names: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        require(len(self.phases) > 0, "tasks.phases is empty: a share of tasks.train_length for each phase")
        lengths = self.eval_lengths
        require(len(set(lengths)) == len(lengths), f"tasks.eval_lengths = {lengths}: different lengths")
        least = max(2, self.classes - 1)
        require(self.items >= least, f"tasks.items = {self.items}: at least {least}, so that a list holds what is asked for")

    def pauses(self, row_length: int) -> int:
        """Meta-tokens that a training row has room for, with or without meta-attention."""
        return row_length // 8


@dataclass(frozen=True)
class Metadata(Part, path="metadata"):
    """Document metadata as text beside the body (Beyond URLs, URLs Help / Topics Guide, MeCo)."""

    position: Literal["none", "prepend", "append", "both"] = "prepend"  # of the body; repeated at every piece of a cut document
    template: str = "{url}"  # metadata fields in braces, with filters behind a bar: {url|host}; metajax/data/annotators.py
    appended: str = ""  # position "both": the template behind the body; "": the same as in front
    # This many learnable tokens, the same for all documents, in place of the template (5 in Beyond URLs). A vocabulary keeps 11 for them.
    tokens: Annotated[int, Range(0, 11)] = 0
    wrap: Literal["special_tokens", "plain"] = "special_tokens"  # <|context_begin|> ... <|context_end|>, or the bare text
    assigned: Literal["own", "shuffled"] = "own"  # shuffled: another document's, at random (the control in training)
    keep: Share = 0.9  # share of documents that keep their metadata
    when_dropped: Literal["empty", "nothing"] = "empty"  # the empty pair of delimiters, or nothing at all
    # Of predicting the metadata itself, before the body and after it.
    loss_weights: tuple[NotNegative, NotNegative] = (0.0, 1.0)
    bos_eos: Literal["outside", "inside"] = "outside"  # BOS metadata body metadata EOS, or metadata BOS body EOS metadata
    too_long: Literal["stop", "drop"] = "stop"  # metadata that no row takes: an error, or dropped and counted; never cut

    def __post_init__(self) -> None:
        require(
            not self.appended or self.position == "both",
            f"metadata.appended = {self.appended!r} needs metadata.position = 'both'; with 'append' the template itself stands behind",
        )

    @property
    def in_front(self) -> bool:
        """Whether metadata stands in front of the body."""
        return self.position in ("prepend", "both")


@dataclass(frozen=True)
class Optimizer(Part, path="optimizer"):
    """AdamW, its schedule and its clipping."""

    learning_rate: Positive = 3e-3
    final_fraction: Share = 0.1  # of the peak, at the end of the schedule
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: CountOrZero = 20
    horizon: CountOrZero = 0  # step where cosine, linear or wsd end; 0: training.steps
    decay_share: Annotated[float, Range(above=0, most=1)] = 0.2  # wsd: the last share of the horizon decays
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NotNegative = 0.1
    clip_norm: NotNegative = 1.0  # 0: no clipping
    z_loss: NotNegative = 0.0


@dataclass(frozen=True)
class Training(Part, path="training"):
    steps: Count = 200
    accumulate: Size = 1  # micro-batches a step; the gradient equals that of the whole batch


@dataclass(frozen=True)
class Init(Part, path="init"):
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
class Choice(Part, path="evaluation.choice"):
    """Multiple-choice questions from local files, scored by log-likelihood as the lm-evaluation-harness does (metajax/evaluation/choice.py)."""

    tasks: tuple[str, ...]  # KIND:FILE[?shots_from=FILE], such as arc_easy:arc_easy/test.jsonl
    # Solved questions in front of each; every number is evaluated, the first one is the task's result.
    shots: tuple[Annotated[int, Range(0, 10_000)], ...] = (5,)
    # What stands in front of it all: nothing, the empty pair of metadata, or the source that a task has (MeCo's conditional inference).
    contexts: tuple[str, ...] = ("none",)
    examples: Count = 1000  # of a task, at most

    def __post_init__(self) -> None:
        require(
            len(self.tasks) > 0,
            "evaluation.choice.tasks is empty; name one, such as arc_easy:FILE, or leave evaluation.choice out",
        )
        require(len(self.shots) > 0, "evaluation.choice.shots is empty; 0 shows no solved question first")
        known = ("none", "empty", "task")
        for context in self.contexts:
            require(
                context in known,
                f"evaluation.choice.contexts: unknown {context!r}{nearest(context, known)}; known: {', '.join(known)}",
            )
        require(len(self.contexts) > 0, "evaluation.choice.contexts is empty; `none` puts nothing in front")


@dataclass(frozen=True)
class Evaluation(Part, path="evaluation"):
    every: CountOrZero = 0  # steps between held-out evaluations during training; 0: at the end alone
    documents: CountOrZero = 400  # held-out documents, in an order fixed by the corpus; with tasks 0 leaves them out
    conditions: tuple[str, ...] = ("none",)  # metadata shown at evaluation: none, right, empty, shuffled
    sample_tokens: CountOrZero = 48  # length of the text sample in the report
    choice: Choice | None = None
    # Templates of metadata that probes tell from hidden states; the first is a document's topic.
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(len(self.conditions) > 0, "evaluation.conditions is empty; `none` evaluates without metadata")
        known = ("none", "right", "empty", "shuffled")
        for condition in self.conditions:
            require(
                condition in known,
                f"evaluation.conditions: unknown {condition!r}{nearest(condition, known)}; known: {', '.join(known)}",
            )


def mesh_axes(text: str) -> dict[str, int]:
    """{axis: size} that `runtime.mesh` names, such as "data=2,fsdp=-1", where -1 takes the devices that are left.

    Raises:
      UserError: another form, an unknown axis or one that is named twice, or two sizes of -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        require(name in AXES, f"runtime.mesh = {text!r}: unknown axis {name!r}{nearest(name, AXES)}; axes: {', '.join(AXES)}")
        require(name not in sizes, f"runtime.mesh = {text!r}: {name} is there twice")
        sizes[name] = -1 if size == "-1" else convert(size, Size, f"runtime.mesh = {text!r}: {name}")
    require(list(sizes.values()).count(-1) < 2, f"runtime.mesh = {text!r}: only one axis can be -1")
    return sizes


def check_analyses(what: str, names: tuple[str, ...]) -> None:
    """UserError for an analysis that does not exist; `what` is where it is named."""
    for name in names:
        require(name in ANALYSES, f"{what}: unknown {name!r}{nearest(name, ANALYSES)}; known: {', '.join(ANALYSES)}")


@dataclass(frozen=True)
class Runtime(Part, path="runtime"):
    """How a run is carried out. Nothing here changes what is computed, so it stands outside the identity hash."""

    log_every: Count = 10
    save_every: Count = 50
    keep: Count = 2  # newest checkpoints kept, beside the best
    # A step that is not finite, or whose gradient norm is above the limit: stop with a replay bundle, or leave it out and say so in the
    # report. Outside the hash, for a run that meets no such step is the same.
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_grad_norm: NotNegative = 0.0  # before clipping; 0: no limit
    max_skipped: Count = 10  # steps left out in a row, at which a run stops after all
    profile: tuple[Count, ...] = ()  # first and last step of a profile for xprof
    # Without a step, save or evaluation the process ends with its stacks; 0: never. The second is for restoring, compiling and the first step.
    hang_seconds: Seconds = 1800.0
    startup_seconds: Seconds = 7200.0
    loggers: tuple[str, ...] = ()  # tensorboard, wandb
    workers: Annotated[int, Range(0, 1024)] = 0  # grain reader processes; 0: threads
    mesh: str = "data=1,fsdp=-1"  # axis=size; one -1 takes the devices that are left
    remat: Literal["none", "full", "dots"] = "none"
    unroll: CountOrZero = 0  # layers unrolled in one scan step; 0: all (fastest on CPU), 1: fastest to compile
    implementation: Literal["auto", "reference", "xla", "pallas_tpu"] = "auto"

    def __post_init__(self) -> None:
        profile = self.profile
        require(
            not profile or (len(profile) == 2 and profile[0] <= profile[1]),
            f"runtime.profile = {profile}: the first and the last step of the profile, such as 20,25",
        )
        require(mesh_axes(self.mesh) != {}, "runtime.mesh is empty; name an axis and its size, such as data=1,fsdp=-1")
        for logger in self.loggers:
            known = ("tensorboard", "wandb")
            require(logger in known, f"runtime.loggers: unknown {logger!r}{nearest(logger, known)}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Config(Part):
    """One experiment, whole. `name` and `scale` say which; `--seed` sets the seed; the rest is reachable with --set."""

    name: str
    scale: Scale = "cpu"
    seed: Seed = 0
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
    if ((identity.get("model") or {}).get("hybrid") or {}).get("d_conv") == Hybrid.d_conv:
        del identity["model"]["hybrid"]["d_conv"]
    for part in ("evaluation", "prompts", "clip"):
        if identity.get(part):
            identity[part] = {k: v for k, v in identity[part].items() if v is not None}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
