"""The sub-config of learning from preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from metajax.fields import Part, Positive, require

if TYPE_CHECKING:
    from metajax.config import Config


@dataclass(frozen=True)
class Dpo(Part, path="dpo"):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of pairs of answers.

    A document is the answer that was chosen, its metadata the prompt in front of both answers, another column of its record the rejected
    one. The reference is the model that training starts from, `init.from`.
    """

    beta: Positive = 0.1  # strength of the KL penalty towards the reference model; not stated for Hymba, 0.1 in Rafailov et al.
    rejected: str = "rejected"  # a column of the sources

    def check(self, config: Config) -> None:
        """UserError where the rest of a config does not make pairs of answers, each whole and behind its prompt."""
        recipe, switch = config.metadata, config.data.switch
        wanted = {
            "init.from": (bool(config.init.run) and not config.init.parts, "a whole run, which is the reference, too"),
            "metadata": (
                recipe is not None
                and (recipe.position, recipe.keep, recipe.tokens, recipe.assigned) == ("prepend", 1, 0, "own")
                and recipe.loss_weights[0] == 0,
                "the prompt, with position prepend, keep 1, tokens 0, its own, and no loss on it",
            ),
            "data.switch.metadata": (switch is None or switch.metadata == "same", "same"),
            "data.attend_across_documents": (not config.data.attend_across_documents, "false"),
            "tasks": (config.tasks is None, "none"),
            "optimizer.z_loss": (config.optimizer.z_loss == 0, "0"),
        }
        for field, (holds, value) in wanted.items():
            require(holds, f"dpo learns from pairs of answers: {field} has to be {value}")
