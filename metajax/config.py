"""Typed, frozen configuration: sub-configs, validation, dotted overrides, serialisation and the identity hash.

A field is added here once, with its type and its default; the command line, the saved `config.json`, the hash and
the error messages follow from the dataclass. Everything that cannot change a number lives in `Runtime`, which
is the only part outside the identity hash.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

Scale = Literal["cpu", "gpu", "paper"]


class UserError(Exception):
    """A mistake the user can mend: one plain line that names the remedy. The command line exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A '; did you mean X?' clause for an unknown word, or '' when nothing is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


# ------------------------------------------------------------------------------------------------- sub-configs


@dataclass(frozen=True)
class Switch:
    """New mixture weights from one step on (annealing, cooldown)."""

    step: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        require(self.step >= 1, f"data.switch.step = {self.step}: the switch comes at step 1 or later")


@dataclass(frozen=True)
class Data:
    """What is read and how it becomes rows. A source is KIND[:PATH][?text=COLUMN&origin=COLUMN]."""

    sources: tuple[str, ...] = ("pydocs",)
    weights: tuple[float, ...] = ()  # one per source; empty: equal
    switch: Switch | None = None
    tokenizer: str = "bpe:2048"
    row_length: int = 256
    batch_rows: int = 8  # rows of the global batch, whatever the number of hosts
    packing: Literal["concat", "best_fit"] = "concat"
    attend_across_documents: bool = False
    held_out: float = 0.05  # share of origins kept for evaluation
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
        require(self.batch_rows >= 1, f"data.batch_rows = {self.batch_rows}: a batch holds at least 1 row")
        require(0 < self.held_out < 1, f"data.held_out = {self.held_out}: a share between 0 and 1")


@dataclass(frozen=True)
class Model:
    """A decoder language model assembled from parts; the presets in metajax/models/presets.py fill this in."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    mlp_width: int = 512
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu"  # gelu is the exact (erf) form
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    bias: bool = False
    tied: bool = True
    position: Literal["learned", "rope", "ntk", "yarn", "none"] = "rope"
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # context extension, for ntk and yarn
    rope_original_length: int = 0  # length before extension, for ntk and yarn
    window: int | None = None  # a query sees itself and this many keys before it; None: all
    init_std: float = 0.02
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "mlp_width"):
            require(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}: at least 1")
        for name in ("kv_heads", "window", "rope_original_length"):
            require((getattr(self, name) or 0) >= 0, f"model.{name} = {getattr(self, name)}: not negative")
        for name in ("norm_eps", "init_std", "rope_theta", "rope_factor"):
            require(0 < getattr(self, name) < math.inf, f"model.{name} = {getattr(self, name)}: a positive number")
        require(self.width % self.heads == 0, f"model.width = {self.width} does not divide by model.heads = {self.heads}")
        require(
            self.heads % self.num_kv_heads == 0,
            f"model.heads = {self.heads} does not divide by model.kv_heads = {self.kv_heads}",
        )
        rotary = self.position in ("rope", "ntk", "yarn")
        require(
            not rotary or self.head_dim % 2 == 0,
            f"model.position = {self.position!r} needs an even head width, but model.width / model.heads = {self.head_dim}",
        )
        if self.position in ("ntk", "yarn"):
            require(
                self.rope_original_length > 0,
                f"model.position = {self.position!r} needs model.rope_original_length, the length before extension",
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads


@dataclass(frozen=True)
class MetaTokens:
    """Learned meta-tokens inserted in the text (Language Modeling with Learned Meta-Tokens)."""

    inject: Literal["none", "random", "periodic"] = "random"
    rate: float = 0.1  # M = floor(rate * row_length) meta-tokens in every row
    attention: Literal["none", "gathered", "dense"] = "gathered"
    loss: Literal["skip_meta_targets", "real_only"] = "skip_meta_targets"  # not stated in the paper
    length: Literal["within", "added"] = "within"  # M inside row_length, or on top of it; not stated in the paper

    def __post_init__(self) -> None:
        require(0 <= self.rate < 1, f"meta_tokens.rate = {self.rate}: a share of the row, 0 <= rate < 1")
        require(
            (self.inject == "none") == (self.rate == 0),
            f"meta_tokens.inject = {self.inject!r} and meta_tokens.rate = {self.rate} disagree: "
            "no injection means rate 0, and the other way round",
        )

    def count(self, row_length: int) -> int:
        """M, the fixed number of meta-tokens in a row of `row_length` tokens."""
        return math.floor(Fraction(str(self.rate)) * row_length)  # in floating point 0.29 of 100 would be 28


@dataclass(frozen=True)
class Metadata:
    """Document metadata as text beside the body (Beyond URLs, URLs Help / Topics Guide, MeCo)."""

    position: Literal["none", "prepend"] = "prepend"
    template: str = "{url}"  # names of the document's metadata fields in braces
    wrap: Literal["special_tokens", "plain"] = "special_tokens"  # <|context_begin|> ... <|context_end|>, or the bare text
    keep: float = 0.9  # share of documents that keep their metadata
    when_dropped: Literal["empty", "nothing"] = "empty"  # the empty pair of delimiters, or nothing at all
    loss_weight: float = 0.0  # of predicting the metadata itself

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, f"metadata.keep = {self.keep}: a probability")
        require(self.loss_weight >= 0, f"metadata.loss_weight = {self.loss_weight}: not negative")


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
    """Where parameters come from: '' for a fresh start, or a run whose newest checkpoint is read."""

    from_: str = ""


@dataclass(frozen=True)
class Evaluation:
    every: int = 0  # steps between held-out evaluations during training; 0: at the end alone
    documents: int = 400  # held-out documents, in an order fixed by the corpus
    conditions: tuple[str, ...] = ("none",)  # metadata shown at evaluation: none, right, empty, shuffled
    sample_tokens: int = 48  # length of the text sample in the report

    def __post_init__(self) -> None:
        require(self.documents >= 1, f"evaluation.documents = {self.documents}: at least 1")
        for name in ("every", "sample_tokens"):
            require(getattr(self, name) >= 0, f"evaluation.{name} = {getattr(self, name)}: not negative")
        require(len(self.conditions) > 0, "evaluation.conditions is empty; `none` evaluates without metadata")
        known = ("none", "right", "empty", "shuffled")
        for condition in self.conditions:
            require(
                condition in known,
                f"evaluation.conditions: unknown {condition!r}{nearest(condition, known)}; known: {', '.join(known)}",
            )


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out. Nothing here changes what is computed, so it stands outside the identity hash."""

    log_every: int = 10
    save_every: int = 50
    keep: int = 2  # newest checkpoints kept, beside the best
    loggers: tuple[str, ...] = ()  # tensorboard, wandb
    workers: int = 0  # grain reader processes; 0: threads
    mesh: str = "data=1,fsdp=-1"  # axis=size; one -1 takes the devices that are left
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 0  # layers unrolled in one scan step; 0: all (fastest on CPU), 1: fastest to compile
    implementation: Literal["auto", "reference", "xla", "pallas_tpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep"):
            require(getattr(self, name) >= 1, f"runtime.{name} = {getattr(self, name)}: at least 1")
        for name in ("workers", "unroll"):
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
        shown = [c for c in self.evaluation.conditions if c != "none"]
        require(
            not shown or self.metadata is not None,
            f"evaluation.conditions names {', '.join(shown)} but this experiment has no metadata template (metadata is null)",
        )

    @property
    def row_slots(self) -> int:
        """Positions of a row as the model sees it."""
        meta = self.meta_tokens
        return self.data.row_length + (meta.count(self.data.row_length) if meta and meta.length == "added" else 0)


# ------------------------------------------------------------------------------------------------- typed access


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _optional(hint: Any) -> tuple[Any, bool]:
    """(T, True) for `T | None`, else (hint, False)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _describe(hint: Any) -> str:
    inner, optional = _optional(hint)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(map(str, typing.get_args(inner)))
    elif typing.get_origin(inner) is tuple:
        text = "a comma-separated list"
    else:
        text = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
            inner.__name__, inner.__name__
        )
    return text + (" or none" if optional else "")


def _convert(value: Any, hint: Any, path: str) -> Any:
    """A value from JSON, from the command line or from Python, as the field's type; UserError when it is not one."""
    inner, optional = _optional(hint)
    if optional and (value is None or value == "none"):
        return None
    if dataclasses.is_dataclass(inner):
        if isinstance(value, inner):
            return value
        value = _loads(value, path) if isinstance(value, str) else value
        require(isinstance(value, Mapping), f"{path} = {value!r}: expected {_describe(hint)} as a mapping of its fields")
        return from_dict(inner, value, path)
    if typing.get_origin(inner) is tuple:
        items = [item for item in value.split(",") if item] if isinstance(value, str) else list(value)
        args = typing.get_args(inner)
        require(
            args[-1] is Ellipsis or len(items) == len(args), f"{path} = {value!r}: expected {len(args)} comma-separated values"
        )
        hints = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_convert(item, h, path) for item, h in zip(items, hints, strict=True))
    return _convert_scalar(value, inner, hint, path)


def _loads(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} = {text!r}: expected JSON such as '{{\"field\": value}}' ({error.msg})") from None


def _convert_scalar(value: Any, inner: Any, hint: Any, path: str) -> Any:
    wrong = f"{path} = {value!r}: expected {_describe(hint)}"
    if typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        require(value in choices, wrong + nearest(str(value), map(str, choices)))
        return value
    if inner is bool:
        if isinstance(value, bool):
            return value
        require(isinstance(value, str) and value.lower() in ("true", "false"), wrong)
        return value.lower() == "true"
    if inner is str:
        require(isinstance(value, str), wrong)
        return value
    require(isinstance(value, (str, int, float)) and not isinstance(value, bool), wrong)
    try:
        number = float(value)
    except ValueError:
        raise UserError(wrong) from None
    require(number == number, wrong)
    if inner is int:
        require(number.is_integer(), wrong)
        return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
    return number


def from_dict(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Build dataclass `cls` from a nested mapping; unknown keys and wrong types raise UserError with the dotted path."""
    hints = _field_types(cls)
    prefix = f"{path}." if path else ""
    for key in values:
        require(key in hints, f"unknown field {prefix}{key}{nearest(key, hints)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    require(not missing, f"{path or cls.__name__} needs {', '.join(missing)}")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def to_dict(config: Any) -> dict[str, Any]:
    """The nested, JSON-ready form of a config; `from_dict(Config, to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with dotted fields replaced: {"model.layers": "8", "meta_tokens": MetaTokens()}.

    All changes of one sub-config are applied at once, so that two fields which must agree can change together.
    """
    return _override(config, changes, "")


def _override(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    hints = _field_types(type(config))
    whole: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        name = head if head in hints else f"{head}_"  # `from` is a keyword in Python, `from_` the field
        require(name in hints, f"unknown field {path}{head}{nearest(head, hints)}")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            whole[name] = _convert(value, hints[name], path + head)
    for name, inner in nested.items():
        part, hint = whole.get(name, getattr(config, name)), _optional(hints[name])[0]
        require(
            dataclasses.is_dataclass(hint), f"{path}{name} has no fields of its own, but {path}{name}.{next(iter(inner))} was set"
        )
        if part is None:
            whole[name] = _convert({k: v for k, v in inner.items()}, hints[name], path + name)
        else:
            whole[name] = _override(part, inner, f"{path}{name}.")
    return dataclasses.replace(config, **whole)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every reachable field by dotted path; sub-configs that are null count as one."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        else:
            flat[prefix + f.name] = value
    return flat


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, as (value in a, value in b); absent fields read as None."""
    fa, fb = flatten(a), flatten(b)
    return {k: (fa.get(k), fb.get(k)) for k in sorted(fa.keys() | fb.keys()) if fa.get(k) != fb.get(k)}


def config_hash(config: Config) -> str:
    """Eight hex digits over every field that can change a number; name, seed and `runtime` stand outside."""
    identity = {k: v for k, v in to_dict(config).items() if k not in ("name", "scale", "seed", "runtime")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
