"""Typed reading of a checkpoint's settings. One error message lists every setting that is not supported."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from metajax.config import Model
from metajax.core.errors import UserError, require
from metajax.core.progress import warn

MOST = 10**8  # of any size; beyond it array sizes would overflow
MOST_LAYERS = 10_000
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
# Keys of Hugging Face's config.json that do not affect the logits in any family. Neither do keys with a leading underscore.
HARMLESS = {
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "custom_pipelines", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "label2id", "length_penalty", "license", "max_length",
    "max_sequence_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "output_scores", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sampling_rate", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache", "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "vocab_size",
}  # fmt: skip
# Settings that no model here supports, with the values that turn them off.
_NOTHING = {"is_encoder_decoder": False, "add_cross_attention": False, "quantization_config": None, "pruned_heads": {}}
# Names of settings that may affect the logits.
_NUMERIC = re.compile(
    "scal|multipl|factor|cap|logit|norm|bias|window|rope|rotary|theta|head|expert|moe|layer|attention|attn|mlp|ffn|router|dim|"
    "hidden|quant|spars|lora|adapter|alibi|clip|clamp|resid|embed|activation|act_|conv|ssm|mamba|position|size|group|context|kv"
)
# A scale of 1 changes nothing, except for attention scales, which replace 1 / sqrt(head width).
_SCALES, _ATTENTION = re.compile("scal|multipl|factor|pct|percent"), re.compile("attn|attention|query")


def shown(value: Any) -> str:
    """A name or value of a file for a message: one line, of limited length, without control characters."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= 100 else f"{text[:100]}..."


class Settings:
    """One JSON object of settings. Reading collects errors in `problems`; `model` raises them all at once.

    A null setting counts as absent.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str = "config.json", prefix: str = "", problems: list[str] | None = None
    ):
        self.values, self.where, self._prefix, self._known = values, where, prefix, set()
        self.problems: list[str] = [] if problems is None else problems

    def get(self, name: str, default: Any = None) -> Any:
        """The unchecked value."""
        self._known.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`; required if there is no default."""
        return self._checked(
            name, default, lambda x: type(x) is int and least <= x <= most, f"a whole number from {least} to {most}", 1
        )

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        positive = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30  # noqa: E731
        return self._checked(name, default, positive, "a positive number", 1.0)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._checked(name, default, lambda x: isinstance(x, bool), "true or false", default)

    def choice(self, name: str, default: str, known: Collection[str]) -> str:
        """One of the `known` names."""
        value = self.get(name, default)
        fits = isinstance(value, str) and value in known
        return value if fits else self._refuse(name, value, f"only {', '.join(known)} are supported", default)

    def fixed(self, name: str, *allowed: Any) -> None:
        """Note a problem if the value is neither absent nor allowed."""
        value = self.get(name)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            self._refuse(name, value, f"only {' or '.join(map(repr, allowed)) or 'null'} is supported", None)

    def inside(self, name: str) -> Settings:
        """The settings of a nested object, empty if it is absent; it shares this object's `problems`."""
        value = self.get(name, {})
        value = value if isinstance(value, Mapping) else self._refuse(name, value, "an object is needed", {})
        return Settings(value, self.where, f"{self._prefix}{name}.", self.problems)

    def note(self, problem: str) -> None:
        """Note another problem."""
        self.problems.append(problem)

    def refuse_rest(self, harmless: Collection[str] = ()) -> None:
        """Note every setting that was not read and is not known to be harmless."""
        for name, value in self.values.items():
            if name not in self._known and name not in harmless and not _is_neutral(name, value):
                self._refuse(name, value, "it is unknown here", None)

    def model(self, harmless: Collection[str], **fields: Any) -> Model:
        """The model with these fields. Raises UserError with every noted problem; warns about unknown settings.

        harmless: names of settings that do not affect the logits, in addition to those of every family.
        """
        for name, nothing in _NOTHING.items():
            self.fixed(name, nothing)
        for name in TOKEN_IDS:
            ids = self.get(name, [])
            if not all(type(i) is int and -1 <= i < 1 << 31 for i in (ids if isinstance(ids, list) else [ids])):
                self._refuse(name, ids, "a token's number, or a list of them, is needed", None)
        unknown = [
            name for name in self.values if name not in self._known | HARMLESS | set(harmless) and not name.startswith("_")
        ]
        unknown = [name for name in unknown if not _is_neutral(name, self.values[name])]
        numeric = [name for name in unknown if _NUMERIC.search(name.lower())]
        for name in numeric:
            self._refuse(name, self.values[name], "it is unknown here and its name says that numbers depend on it", None)
        if not self.problems:
            try:
                model = Model(**fields)
            except UserError as error:
                self.note(str(error))
        require(not self.problems, f"{self.where}: {'; '.join(self.problems)}")
        told = [shown(name) for name in unknown if name not in numeric]
        if told:
            warn(f"{self.where}: settings that are unknown here and were not followed: {', '.join(told)}")
        return model

    def _checked(self, name: str, default: Any, fits: Any, needed: str, instead: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            self.note(f"lacks {self._prefix}{name}")
            return instead
        if isinstance(value, float) and value.is_integer() and isinstance(instead, int) and not isinstance(instead, bool):
            value = int(value)
        return value if fits(value) else self._refuse(name, value, f"{needed} is needed", instead if default is None else default)

    def _refuse(self, name: str, value: Any, why: str, instead: Any) -> Any:
        self.note(f"{shown(self._prefix + name)} = {shown(repr(value))}, but {why}")
        return instead


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the value turns off the setting."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if _SCALES.search(name.lower()):
            return value == 1 and not _ATTENTION.search(name.lower())
        return value in (0, -1) or (value == 1 and "expert" in name.lower())
    return value in (None, False, "", "none", "None", [], {})
