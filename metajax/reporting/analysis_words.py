"""Results of the analyses in sentences: titles, what the paper says, and the headline numbers with their spread and n."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metajax.reporting import metadata_words
from metajax.reporting.tasks import title

Numbers = Mapping[str, Any]  # as metajax.analysis.analyses.run_analyses yields them

SECTIONS = {  # title, what is looked at and what the paper says of it
    "interventions": (
        "Zeroing at the meta-tokens",
        "The trained model with the positions or the token embedding of its meta-tokens set to zero. The paper reports that without positions "
        "accuracy stays or rises, and that without the embedding it falls. Where a prompt has one meta-token (list recall, parity), meta-attention "
        "has one key and no use for its position.",
    ),
    "sharpening": (
        "Sharpening",
        "Causal attention of the tokens behind the first meta-token, with the meta-token's embedding and with zeros in its place. The paper's "
        "means are 1.26 (greatest score) and 1.40 nats (entropy), at 152M parameters; how it pools layers, heads and prompts is not stated.",
    ),
    "caching": (
        "Caching",
        "Cosine of the last meta-token's residual vector with the tokens in front of it. In the paper it is strongest close to the meta-token, "
        "within about 0.04 of zero; whether it means residual vectors or embeddings is not stated, so both are here.",
    ),
    "attention": ("Attention maps", "The first prompt alone: an illustration, no measurement."),
    "theory": (
        "The entropy theorem",
        "A boost of one score lowers the entropy of an attention row where the key's probability p exceeds exp(-H), and raises it at first where it "
        "does not; the paper states the theorem without this condition.",
    ),
    "rate_distortion": (
        "Rate and distortion",
        "Variational bottlenecks trained on frozen final states to tell the answer's first token: the meta-token's, the prompt's last token's, and "
        "the meta-token's without its position. In the paper the meta-token's curve lies lower. Its budget leaves the heads far from trained; "
        "the converged one is ours. Intervals are over seeds of the heads.",
    ),
    "overhead": (
        "Overhead",
        "Train steps and generation of this model's twins, taking turns in one process. Of meta-tokens the paper reports 117.86 tokens per second "
        "against 130.82 without (0.90x), for a dense mask, and 7.57 against 7.44 ms to the first token.",
    ),
    "mixing_maps": (
        "Where tokens look",
        "Attention maps and the maps that Mamba amounts to, from every token behind the first. The paper reports that attention to the first token "
        "moves to the meta tokens, that Mamba's maps lean to the token itself and attention's to the others, and that meta tokens lower the entropy.",
    ),
    "branches": (
        "Attention beside Mamba",
        "Size of both branches before their norms, their learned scales, and the loss without one branch of one layer. In the paper Mamba's output "
        "is larger in every layer, and losing it costs more (1.1 against 0.24 points of HellaSwag), most of all in the first layer.",
    ),
    "needle": ("The needle", "Exact match by the length of the text and the depth of what is asked for. The paper has its values in a figure alone."),
    **metadata_words.SECTIONS,
}  # fmt: skip
TWINS = {
    "none": "meta-tokens without meta-attention",
    "gathered": "gathered meta-attention",
    "dense": "its dense twin",
    "causal": "a second causal attention",
    "plain": "no meta-tokens",
    "block": "hybrid blocks without feed-forward networks",
    "attention": "their attention alone",
    "ssm": "their Mamba alone",
    "whole": "the whole model",
    "attention_as_large": "attention alone, as many parameters",
}
MIXERS = {"attention": "attention", "ssm": "Mamba"}
CATEGORIES = {"meta": "meta tokens", "first": "first token", "self": "itself", "cross": "others"}
INTERVENTIONS = {
    "none": "as trained",
    "zero_position": "no position",
    "zero_position_causal": "no position in causal attention",
    "zero_position_meta": "no position in meta-attention",
    "zero_token": "no token embedding",
}
SOURCES = {"meta": "meta-token", "last": "last token", "meta_zero_position": "meta-token, no position"}
READINGS = {"same_layer": "residual vectors of the same layer", "embedding": "token embeddings"}
QUANTITIES = {"boost": "greatest score before the softmax", "drop": "attention entropy (nats), lower by"}


def headlines(name: str, numbers: Numbers) -> list[str]:
    """The sentences of one analysis."""
    return _SENTENCES[name](numbers)


def _interventions(numbers: Numbers) -> list[str]:
    lines = []
    for task, bins in numbers["none"].items():
        for length, whole in bins.items():
            if whole["exact"] is None:
                continue
            found = {name: numbers[name][task][length] for name in INTERVENTIONS if name in numbers}
            shown = ", ".join(
                f"{INTERVENTIONS[k]} {v['exact']:.1%} ({v['exact_low']:.1%} to {v['exact_high']:.1%})" for k, v in found.items()
            )
            lines.append(f"{title(task)}, {length} tokens, n = {whole['n']:,}: exact match {shown}")
    return lines


def _sharpening(numbers: Numbers) -> list[str]:
    return [
        f"{words}: mean {n['mean']:+.3f} ± {n['half']:.3f}, median {n['median']:+.3f}, above 0 in {n['positive']:.1%} ± {n['positive_half']:.1%} "
        f"of {n['values']:,} rows of {n['prompts']:,} prompts"
        for words, n in ((words, numbers[name]) for name, words in QUANTITIES.items())
    ]


def _caching(numbers: Numbers) -> list[str]:
    return [
        f"{READINGS[name]}, {place}: mean cosine {n['mean']:+.3f} ± {n['half']:.3f} over {numbers[name]['prompts']:,} prompts"
        for name in READINGS
        for part, place in (("near", "at most 4 tokens in front"), ("far", "more than 16 tokens in front"))
        if (n := numbers[name].get(part))
    ]


def _attention(numbers: Numbers) -> list[str]:
    n = numbers["to_meta"]
    return [
        f"the last token of this prompt gives meta-tokens {n['mean']:.1%} of its causal attention ({n['least']:.1%} to {n['most']:.1%} "
        f"over {n['heads']} heads)"
    ]


def _theory(numbers: Numbers) -> list[str]:
    margin, example = numbers["margin"], numbers["counter_example"]
    lines = [
        f"the condition holds for the last meta-token's key in {margin['share']:.1%} ± {margin['half']:.1%} of {margin['values']:,} rows of "
        f"{margin['prompts']:,} prompts",
        *(
            f"a boost of {key.removeprefix('delta_').replace('_', '.')} lowers entropy {_both(numbers[key])}"
            for key in numbers
            if key.startswith("delta_")
        ),
        f"seen from the zeroed to the learned embedding (more than one score changes, so the theorem does not speak of it), entropy is lower "
        f"{_both(numbers['observed'])}",
        f"counter-example, scores (0, 5, 0, 0), the first one boosted by 5: {example['before']:.3f} to {example['after']:.3f} nats; greatest error "
        f"of kappa by quadrature: {numbers['quadrature_error']:.1e}",
    ]
    return lines


def _both(part: Numbers) -> str:
    words = [
        f"in {n['fell']:.1%} of the {n['rows']:,} rows that {verb} it"
        for verb, n in (("meet", part["met"]), ("do not meet", part["not_met"]))
        if n["rows"]
    ]
    return " and ".join(words)


def _rate_distortion(numbers: Numbers) -> list[str]:
    lines = [
        f"a uniform guess has {numbers['uniform']:.2f} nats; guessing by the frequency of each answer {numbers['label_entropy']:.2f}"
    ]
    for budget, sizes in numbers["examples"].items():
        for source, curve in numbers[budget].items():
            n = curve["beta_0_1"]
            lines.append(
                f"{budget} budget, {SOURCES[source]}, beta 0.1: rate {n['rate']:.1f} ± {n['rate_half']:.1f} nats, distortion {n['distortion']:.2f} ± "
                f"{n['distortion_half']:.2f} nats on the {sizes['training']} training examples and {n['held_out_distortion']:.2f} ± "
                f"{n['held_out_distortion_half']:.2f} on {sizes['held_out']} others ({n['seeds']} seeds)"
            )
    return lines


def _mixing_maps(numbers: Numbers) -> list[str]:
    lines = []
    for kind, title_of_kind in MIXERS.items():
        if kind in numbers:
            shares = ", ".join(
                f"{words} {numbers[kind][k]['mean']:.1%} ± {numbers[kind][k]['half']:.1%}" for k, words in CATEGORIES.items()
            )
            entropy, reach = numbers[kind]["entropy"], numbers[kind]["reach"]
            lines.append(
                f"{title_of_kind}: {shares}; entropy {entropy['mean']:.3f} ± {entropy['half']:.3f} nats; effective receptive field "
                f"{reach['mean']:.1f} ± {reach['half']:.1f} tokens"
            )
    return lines


def _branches(numbers: Numbers) -> list[str]:
    return [
        f"without {words} in one layer: {n['mean']:+.4f} ± {n['half']:.4f} nats a token on the average of the layers, {max(n['layers']):+.4f} in "
        f"layer {1 + n['layers'].index(max(n['layers']))}"
        for branch, words in MIXERS.items()
        for n in (numbers[branch]["knock_out"],)
    ]


def _needle(numbers: Numbers) -> list[str]:
    found = {length: n for length, n in numbers.items() if length.isdigit()}
    return [f"{length} tokens: {n['exact']:.1%} of {n['n']:,} needles found" for length, n in found.items()]


def twins_in(numbers: Numbers) -> dict[str, str]:
    """The twins of an overhead analysis and what they are, the one that others are compared with first."""
    return {name: words for name, words in TWINS.items() if name in numbers}


def _overhead(numbers: Numbers) -> list[str]:
    names = twins_in(numbers)
    base = numbers[next(iter(names))]["generation"]["tokens_per_second"]
    lines = [
        f"rows of {numbers['row_length']}, {numbers['rows']} a step, on {numbers['device']}; medians of {numbers['rounds']} rounds"
    ]
    for name, words in names.items():
        step, generated = numbers[name]["step"], numbers[name]["generation"]
        lines.append(
            f"{words}: step {step['ms']:.2f} ms, {step['ratio']:.3f}x ({step['ratio_low']:.3f} to {step['ratio_high']:.3f}); first token "
            f"{generated['ttft_ms']:.2f} ms, {generated['tokens_per_second']:,.0f} tokens per second "
            f"({generated['tokens_per_second'] / base:.2f}x)"
        )
    if "ssm" in numbers:
        both = numbers["attention"]["step"]["ms"] + numbers["ssm"]["step"]["ms"]
        lines.append(f"hybrid blocks take {numbers['block']['step']['ms'] / both:.2f}x of the sum of their branches")
    return lines


_SENTENCES = {
    "interventions": _interventions, "sharpening": _sharpening, "caching": _caching, "attention": _attention, "theory": _theory,
    "rate_distortion": _rate_distortion, "overhead": _overhead, "mixing_maps": _mixing_maps, "branches": _branches, "needle": _needle,
    **metadata_words.SENTENCES,
}  # fmt: skip
