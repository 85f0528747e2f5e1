"""Results of the analyses of metadata in sentences, as in metajax/reporting/analysis_words.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, Any]

SECTIONS = {
    "probes": (
        "What hidden states tell",
        "Probes on frozen states of every layer, averaged over a held-out text that is shown without metadata: a linear one and a perceptron of three "
        "layers. Classes are balanced, and in the second choice of documents equally long too; half of the origins train a probe, the others test it. "
        "Layer 0 is the embedding.",
    ),
    "metadata_attention": (
        "Attention to metadata",
        "Where body tokens of held-out texts look in what stands in front of them, over layers and heads, beside what equal attention to all earlier "
        "tokens would give. Beyond URLs reports that the scheme of a URL draws most, though it says nothing.",
    ),
    "guidance": (
        "Guided generation",
        "Texts drawn from z_empty + g (z_context - z_empty) behind the metadata of held-out documents, and how many a classifier of real texts gives "
        "the topic of that metadata. Nats a token are the model's own for these texts without metadata.",
    ),
    "by_position": (
        "Where in a document",
        "Nats a body token of held-out documents at their first 8 tokens, in the middle and in the last third, with the metadata of training and "
        "without any. What metadata says is found out from the text itself further on.",
    ),
}  # fmt: skip
CHOICES = {"balanced": "classes balanced", "matched": "lengths matched too"}
KINDS = {"linear": "linear", "mlp": "three layers"}
PLACES = {"first": "first 8 tokens", "middle": "middle", "last": "last third"}


def strengths(numbers: Numbers) -> dict[str, Numbers]:
    """The strengths of guidance in words, with what was found at each."""
    return {name.removeprefix("g_").replace("_", "."): found for name, found in numbers.items() if name.startswith("g_")}


def _probes(numbers: Numbers) -> list[str]:
    lines = []
    for number in range(len(numbers["templates"])):
        label = numbers[f"label_{number}"]
        for choice, words in CHOICES.items():
            found = label[choice]
            if "reason" in found:
                lines.append(f"{label['template']}, {words}: not probed, {found['reason']}")
                continue
            shown = ", ".join(
                f"{kind} {found[name]['middle']:.1%} (mean of layers {found[name]['mean']:.1%})" for name, kind in KINDS.items()
            )
            lines.append(
                f"{label['template']} of {len(label['names'])} classes, {words}, {found['documents']:,} documents: {shown}; length alone "
                f"{found['length']:.1%}, chance {found['chance']:.1%}"
            )
    return lines


def _metadata_attention(numbers: Numbers) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {part['mean']:.1%} ± {part['half']:.1%} of attention, equal shares {part['uniform']:.1%} "
        f"({part['tokens']:.1f} tokens)"
        for name, part in numbers["parts"].items()
    ]
    for found in numbers.get("clusters", {}).values():
        if "reason" in found:
            lines.append(f"distances by {found['template']}: {found['reason']}")
        else:
            lines.append(
                f"distances of attention to the learnable tokens by {found['template']}, {found['documents']:,} documents: {found['within']:.4f} "
                f"within classes, {found['between']:.4f} between them"
            )
    return lines


def _guidance(numbers: Numbers) -> list[str]:
    lines = [
        f"g = {g}: {found['accuracy']:.1%} ± {found['half']:.1%} of {numbers['texts']} texts have the topic of their metadata, "
        f"{found['nats']:.2f} nats a token"
        for g, found in strengths(numbers).items()
    ]
    real = numbers["real"]
    lines.append(f"the classifier on {real['documents']:,} real texts: {real['accuracy']:.1%}; chance {numbers['chance']:.1%}")
    return lines + [
        f"g = {g}, behind {f['example']['context']!r}: {f['example']['text']!r}" for g, f in strengths(numbers).items()
    ]


def _by_position(numbers: Numbers) -> list[str]:
    lines = [
        f"{words}: {numbers['own'][place]:.3f} nats a token with the metadata of training, {numbers['none'][place]:.3f} without"
        for place, words in PLACES.items()
    ]
    return lines + [
        f"best possible for who is told {known}: {best['first']:.3f} at the first 8 tokens, {best['last']:.3f} in the last third"
        for known, best in numbers.get("best", {}).items()
    ]


SENTENCES = {"probes": _probes, "metadata_attention": _metadata_attention, "guidance": _guidance, "by_position": _by_position}
