"""The whole config of one experiment on text.

A field is declared once, with its type, range and default. The command line, the saved `config.json`, the hash and the error
messages are derived from the dataclass (metajax/core/fields.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from metajax.config.data import Data, Tasks
from metajax.config.dpo import Dpo
from metajax.config.evaluation import Evaluation
from metajax.config.metadata import Metadata, MetaTokens
from metajax.config.model import Imported, Model
from metajax.config.runtime import Runtime
from metajax.config.training import Init, Optimizer, Training
from metajax.core.errors import require
from metajax.core.fields import Part, Seed, unread

Scale = Literal["cpu", "gpu", "paper"]


@dataclass(frozen=True)
class Config(Part):
    """One whole experiment, identified by `name` and `scale`. `--seed` sets the seed; `--set` sets all other fields."""

    name: str
    scale: Scale = "cpu"
    seed: Seed = 0
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
        data, training, optimizer = self.data, self.training, self.optimizer
        require(
            data.batch_size % training.accumulation_steps == 0,
            f"data.batch_size = {data.batch_size} does not divide by training.accumulation_steps = {training.accumulation_steps}",
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
            self._check_pairs()
        self._check_lengths()
        if self.meta_tokens is not None:
            self.meta_tokens.check_position(self.model.position)
        shown = [c for c in self.evaluation.conditions if c != "none"]
        require(
            not shown or self.metadata is not None,
            f"evaluation.conditions names {', '.join(shown)} but this experiment has no metadata template (metadata is null)",
        )

    def _check_pairs(self) -> None:
        """Raise UserError if the rest of the config does not give pairs of whole answers, each after its prompt."""
        recipe, switch = self.metadata, self.data.switch
        wanted = {
            "init.from": (bool(self.init.run) and not self.init.parts, "a whole run, which is the reference, too"),
            "metadata": (
                recipe is not None
                and (recipe.position, recipe.keep, recipe.tokens, recipe.assigned) == ("prepend", 1, 0, "own")
                and recipe.loss_weights[0] == 0,
                "the prompt, with position prepend, keep 1, tokens 0, its own, and no loss on it",
            ),
            "data.switch.metadata": (switch is None or switch.metadata == "same", "same"),
            "data.attend_across_documents": (not self.data.attend_across_documents, "false"),
            "tasks": (self.tasks is None, "none"),
            "optimizer.z_loss": (self.optimizer.z_loss == 0, "0"),
        }
        for name, (holds, value) in wanted.items():
            require(holds, f"dpo learns from pairs of answers: {name} has to be {value}")

    def _check_lengths(self) -> None:
        meta = self.meta_tokens
        require(
            self.model.hybrid is None or meta is None or meta.attention == "none",
            "meta_tokens.attention: a hybrid model has no meta-attention; set meta_tokens.attention=none",
        )
        model, tasks, length = self.model, self.tasks, self.row_positions
        require(
            model.max_positions == 0 or model.max_positions >= length,
            f"model.max_positions = {model.max_positions} is less than the {length} positions of a row",
        )
        require(
            self.evaluation.documents > 0 or tasks is not None,
            "evaluation.documents = 0: at least 1, or there is nothing to evaluate",
        )
        require(
            tasks is None or 16 <= tasks.train_length <= self.data.sequence_length,
            f"tasks.train_length = {tasks and tasks.train_length}: between 16 and data.sequence_length = {self.data.sequence_length}",
        )

    def unread(self) -> dict[str, str]:
        """{field: why nothing reads it} in this experiment."""
        return unread(self)

    @property
    def row_positions(self) -> int:
        """Number of positions in a row as the model reads it."""
        meta = self.meta_tokens
        added = meta is not None and meta.length == "added" and self.tasks is None  # prompts of tasks contain their own
        return self.data.sequence_length + (meta.count(self.data.sequence_length) if added else 0)

    @property
    def row_meta_tokens(self) -> int:
        """M, the largest number of meta-tokens in a training row; rows of documents use all M, rows of tasks may use fewer."""
        if self.meta_tokens is None:
            return 0
        return (self.tasks.pauses if self.tasks is not None else self.meta_tokens.count)(self.data.sequence_length)
