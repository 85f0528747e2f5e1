"""Typed reading of a checkpoint's settings. One error message lists every setting that is not supported."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from metajax.config import Model
from metajax.core.errors import UserError, require
from metajax.core.progress import warn

Made = TypeVar("Made")
MOST = 10**8  # of any size; beyond it array sizes would overflow
MOST_LAYERS = 10_000
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
# Keys of Hugging Face's config.json that do not affect the logits in any family. Neither do keys with a leading underscore.
HARMLESS = frozenset(
    """
    architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    custom_pipelines diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_range is_decoder label2id length_penalty license max_length max_sequence_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_past output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sampling_rate suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention use_flash_attention_2 use_flash_attn
    vocab_size
    """.split()
)
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


def few(names: Collection[str]) -> str:
    """The first five names of a file for a message."""
    return ", ".join(map(shown, sorted(names)[:5])) + " ..." * (len(names) > 5)


class Settings:
    """One JSON object of settings. Reading collects errors in `problems`; `build` raises them all at once.

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
        needed = f"a whole number from {least} to {most}"
        return self._checked(name, default, lambda x: type(x) is int and least <= x <= most, needed, 1)

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
        return value if fits else self.refuse(name, value, f"only {', '.join(known)} are supported", default)

    def fixed(self, name: str, *allowed: Any) -> None:
        """Note a problem if the value is neither absent nor allowed."""
        value = self.get(name)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            self.refuse(name, value, f"only {' or '.join(map(repr, allowed)) or 'null'} is supported")

    def inside(self, name: str) -> Settings:
        """The settings of a nested object, empty if it is absent; it shares this object's `problems`."""
        value = self.get(name, {})
        value = value if isinstance(value, Mapping) else self.refuse(name, value, "an object is needed", {})
        return Settings(value, self.where, f"{self._prefix}{name}.", self.problems)

    def refuse(self, name: str, value: Any, why: str, instead: Any = None) -> Any:
        """Note that a value is not supported; returns `instead`."""
        self.problems.append(f"{shown(self._prefix + name)} = {shown(repr(value))}, but {why}")
        return instead

    def refuse_rest(self, harmless: Collection[str] = (), *, neutral: bool = True) -> None:
        """Note every setting that was not read and is not harmless. neutral: a value such as 0 or null turns a setting off."""
        for name in self._unknown(harmless) if neutral else self.values.keys() - self._known:
            self.refuse(name, self.values[name], "it is unknown here")

    def check_rest(self, harmless: Collection[str] = ()) -> None:
        """Note every setting that was not read and may affect the logits; warn about other unknown ones.

        harmless: names of settings that do not affect the logits, in addition to those of every family.
        """
        for name, nothing in _NOTHING.items():
            self.fixed(name, nothing)
        for name in TOKEN_IDS:
            ids = self.get(name, [])
            if not all(type(i) is int and -1 <= i < 1 << 31 for i in (ids if isinstance(ids, list) else [ids])):
                self.refuse(name, ids, "a token's number, or a list of them, is needed")
        unknown = [name for name in self._unknown(HARMLESS.union(harmless)) if not name.startswith("_")]
        numeric = [name for name in unknown if _NUMERIC.search(name.lower())]
        for name in numeric:
            self.refuse(name, self.values[name], "it is unknown here and its name says that numbers depend on it")
        others = [shown(self._prefix + name) for name in unknown if name not in numeric]
        if others and not self.problems:
            warn(f"{self.where}: settings that are unknown here and were not followed: {', '.join(others)}")

    def build(self, make: Callable[..., Made], **fields: Any) -> Made:
        """make(**fields). Raises UserError with every noted problem, or with the one that `make` finds."""
        require(not self.problems, f"{self.where}: {'; '.join(self.problems)}")
        try:
            return make(**fields)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def _unknown(self, harmless: Collection[str]) -> list[str]:
        return [name for name in self.values if name not in self._known and name not in harmless and not self._is_neutral(name)]

    def _checked(self, name: str, default: Any, fits: Callable[[Any], bool], needed: str, instead: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            self.problems.append(f"lacks {self._prefix}{name}")
            return instead
        if isinstance(value, float) and value.is_integer() and isinstance(instead, int) and not isinstance(instead, bool):
            value = int(value)
        return value if fits(value) else self.refuse(name, value, f"{needed} is needed", instead if default is None else default)

    def _is_neutral(self, name: str) -> bool:
        """Whether the value turns off the setting."""
        value, word = self.values[name], name.lower()
        if isinstance(value, int | float) and not isinstance(value, bool):
            if _SCALES.search(word):
                return value == 1 and not _ATTENTION.search(word)
            return value in (0, -1) or (value == 1 and "expert" in word)
        return value in (None, False, "", "none", "None", [], {})


# config.json's names of fields that Llama and Hymba share, and ours.
_SHARED = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}
_SHARED |= {"num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps", "initializer_range": "init_std"}
_SHARED |= {"tie_word_embeddings": "tied"}


def shared_fields(read: Settings) -> dict[str, Any]:
    """The fields of a model whose settings Llama and Hymba share."""
    heads = read.size("num_attention_heads")
    return {
        "layers": read.size("num_hidden_layers", most=MOST_LAYERS),
        "width": read.size("hidden_size"),
        "heads": heads,
        "kv_heads": read.size("num_key_value_heads", heads),
        "mlp_width": read.size("intermediate_size"),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "init_std": read.number("initializer_range", 0.02),
        "tied": read.flag("tie_word_embeddings", False),
        "activation": "swiglu",
        "norm": "rmsnorm",
    }


def shared_values(cfg: Model) -> dict[str, Any]:
    """The settings of a model that Llama and Hymba share."""
    return {name: getattr(cfg, ours) for name, ours in _SHARED.items()}
