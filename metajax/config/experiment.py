"""The whole config of one experiment: what all families have, and that of a run on text.

A field is declared once, with its type, range and default. The command line, the saved `config.json`, the hash and the error
messages are derived from the dataclass (metajax/core/fields.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from metajax.config.data import Data, Tasks
from metajax.config.evaluation import Evaluation
from metajax.config.metadata import Metadata, MetaTokens
from metajax.config.model import Imported, Model
from metajax.config.runtime import Runtime
from metajax.config.training import Dpo, Init, Optimizer, Training
from metajax.core.errors import require
from metajax.core.fields import Part, Seed, unread

Scale = Literal["cpu", "gpu", "paper"]


class _Shared(Part):
    """Sub-configs that every family has. Each family declares them after those of its own."""

    optimizer: Optimizer
    training: Training
    init: Init
    runtime: Runtime


@dataclass(frozen=True)
class AnyConfig(_Shared):
    """The config of a family of runs; a subclass adds what the family has of its own.

    `name` and `scale` identify an experiment; `--seed` sets the seed, `--set` all other fields.
    """

    family: ClassVar[str]  # such as "text"; what its runs are on
    unavailable: ClassVar[tuple[str, ...]] = ()  # fields that no run of the family reads

    name: str
    scale: Scale = "cpu"
    seed: Seed = 0

    def unread(self) -> dict[str, str]:
        """{field: why nothing reads it} in this experiment."""
        missing = f"runs on {self.family} have no such choice"
        return unread(self) | dict.fromkeys(self.unavailable, missing)

    @property
    def batch(self) -> tuple[str, int, int]:
        """(field of the batch size, batch size, number of micro-batches)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Config(AnyConfig):
    """One whole experiment on text."""

    family = "text"

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    meta_tokens: MetaTokens | None = None
    metadata: Metadata | None = None
    tasks: Tasks | None = None
    dpo: Dpo | None = None
    imported: Imported | None = field(default=None, metadata={"filled_in": True})  # set by `import` and `init.from`, not the user
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    init: Init = field(default_factory=Init)
    evaluation: Evaluation = field(default_factory=Evaluation)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        optimizer, steps = self.optimizer, self.training.steps
        field, batch, pieces = self.batch
        require(batch % pieces == 0, f"{field} = {batch} does not divide by training.accumulation_steps = {pieces}")
        warmup, horizon = optimizer.warmup_steps, optimizer.horizon or steps
        schedule = f"the schedule of {horizon} steps (optimizer.horizon, or training.steps where that is 0)"
        fits = optimizer.schedule == "constant" or warmup <= horizon
        require(fits, f"optimizer.warmup_steps = {warmup} is longer than {schedule}")
        if (switch := self.data.switch) is not None:
            require(switch.step < steps, f"data.switch.step = {switch.step} is not before training.steps = {steps}")
            taken = "takes metadata away, but this experiment trains without (metadata.position)"
            shows = self.metadata is not None and self.metadata.in_training
            require(switch.metadata == "same" or shows, f"data.switch.metadata = 'none' {taken}")
        if self.dpo is not None:
            self._check_pairs()
        self._check_rows()
        if self.meta_tokens is not None:
            self.meta_tokens.check_position(self.model.position)
        shown = ", ".join(condition for condition in self.evaluation.conditions if condition != "none")
        lacks = "but this experiment has no metadata template (metadata is null)"
        require(not shown or self.metadata is not None, f"evaluation.conditions names {shown} {lacks}")

    def _check_pairs(self) -> None:
        """Raise UserError if the rest of the config does not give pairs of whole answers, each after its prompt."""
        recipe, switch = self.metadata, self.data.switch
        is_prompt = (
            recipe is not None
            and (recipe.position, recipe.keep, recipe.tokens, recipe.assigned) == ("prepend", 1, 0, "own")
            and recipe.loss_weights[0] == 0
        )
        prompt = "the prompt, with position prepend, keep 1, tokens 0, its own, and no loss on it"
        whole = "a whole run, which is the reference, too"
        for holds, field_and_value in (
            (bool(self.init.run) and not self.init.parts, f"init.from has to be {whole}"),
            (is_prompt, f"metadata has to be {prompt}"),
            (switch is None or switch.metadata == "same", "data.switch.metadata has to be same"),
            (not self.data.attend_across_documents, "data.attend_across_documents has to be false"),
            (self.tasks is None, "tasks has to be none"),
            (self.optimizer.z_loss == 0, "optimizer.z_loss has to be 0"),
        ):
            require(holds, f"dpo learns from pairs of answers: {field_and_value}")

    def _check_rows(self) -> None:
        model, tasks, meta, length = self.model, self.tasks, self.meta_tokens, self.data.sequence_length
        fits = model.hybrid is None or meta is None or meta.attention == "none"
        require(fits, "meta_tokens.attention: a hybrid model has no meta-attention; set meta_tokens.attention=none")
        most, positions = model.max_positions, self.row_positions
        require(most == 0 or most >= positions, f"model.max_positions = {most} is less than the {positions} positions of a row")
        evaluated = self.evaluation.documents > 0 or tasks is not None
        require(evaluated, "evaluation.documents = 0: at least 1, or there is nothing to evaluate")
        if tasks is not None:
            bounds = f"between 16 and data.sequence_length = {length}"
            require(16 <= tasks.train_length <= length, f"tasks.train_length = {tasks.train_length}: {bounds}")

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.tasks is not None:
            found |= dict.fromkeys(("data.weights", "data.packing", "data.switch"), "rows of tasks hold no documents")
        if self.dpo is not None:
            found |= {"training.objective": "dpo is the objective", "data.packing": "rows hold whole pairs of answers"}
        if self.metadata is None:
            found["evaluation.conditions"] = "without metadata there is nothing to show"
        return found

    @property
    def batch(self) -> tuple[str, int, int]:
        return "data.batch_size", self.data.batch_size, self.training.accumulation_steps

    @property
    def row_positions(self) -> int:
        """Number of positions in a row as the model reads it."""
        meta = self.meta_tokens
        added = meta is not None and meta.length == "added" and self.tasks is None  # prompts of tasks contain their own
        return self.data.sequence_length + (self.row_meta_tokens if added else 0)

    @property
    def row_meta_tokens(self) -> int:
        """M, the largest number of meta-tokens in a training row; rows of documents use all M, rows of tasks may use fewer."""
        if self.meta_tokens is None:
            return 0
        return (self.tasks.pauses if self.tasks is not None else self.meta_tokens.count)(self.data.sequence_length)
