"""Hymba, mechanisms: the importance of heads, where tokens look, time of a step and of generation."""

from metajax.registry import Column, Published, table

from .hymba import MINUTES, PAPER, base, of_components


def of_text(title: str, path: str, digits: int, better: str = "") -> Column:
    return Column(title, path, digits, better, part="text")


KNOCK_OUT = of_text("mean of layers, nats a token", "analyses.branches.{branch}.knock_out.mean", 4)

table(
    "hymba/head_importance",
    summary="the loss without one branch of one layer",
    paper=f"{PAPER}, the section on the importance of heads",
    paper_rows=2,
    rows=[
        of_components(
            branch,
            "whole",
            fill={"branch": branch},
            published={KNOCK_OUT.key: Published(None, "in points of tasks, not in nats")},
        )
        for branch in ("attention", "ssm")
    ],
    columns=[
        KNOCK_OUT,
        of_text("loss of the whole model", "analyses.branches.nats", 3),
    ],
    baseline="attention",
    minutes=MINUTES,
    parts={"text": {}},
    analyses=["branches"],
    notes=[
        "The paper has points of HellaSwag, which fall by 0.24 without attention and by 1.1 without Mamba; over four tasks by 0.46 and 1.2. Were it so here, "
        "Mamba would be worth more than twice what attention is. Layers one by one, sizes and learned scales are in the run's report.",
    ],
)(base)


table(
    "hymba/maps",
    summary="where tokens look, with meta tokens and without",
    paper=f"{PAPER}, figures 7 and 15, equation 5",
    rows=[
        of_components(f"{row}_{kind}", row, fill={"kind": kind})
        for row, kinds in {"whole": ("attention", "ssm"), "shared": ("attention", "ssm"), "attention": ("attention",)}.items()
        for kind in kinds
    ],
    columns=[
        *(
            Column(f"{name}, %", f"analyses.mixing_maps.{{kind}}.{key}.mean", 1, "", 100, part="text")
            for name, key in {"meta tokens": "meta", "first token": "first", "itself": "self", "others": "cross"}.items()
        ),
        of_text("entropy, nats", "analyses.mixing_maps.{kind}.entropy.mean", 3),
        of_text("receptive field, tokens", "analyses.mixing_maps.{kind}.reach.mean", 1),
    ],
    baseline=None,
    minutes=MINUTES,
    parts={"text": {}},
    analyses=["mixing_maps"],
    notes=[
        "shared is the whole model without meta tokens; attention is attention alone. The paper: more than half of Llama's attention goes to the first token, "
        "and Hymba's to its meta tokens instead, while its attention looks at others and its Mamba at the token itself; meta tokens lower the entropy of attention "
        "in all layers and of Mamba in 10 of 12; attention alone reaches farther than Mamba.",
    ],
)(base)


# Tokens a second in the paper.
TWINS = {
    "block": None,
    "attention": None,
    "ssm": 4720.8,
    "whole": 2695.8,
    "attention_as_large": 721.1,
}
SPEED = of_text("tokens/s", "analyses.overhead.{twin}.generation.tokens_per_second", 0, "higher")

table(
    "hymba/overhead",
    summary="time of a train step and of generation: the block and its branches alone, the whole and attention alone, taking turns in one process",
    paper=f"{PAPER}, three rows of table 10",
    paper_rows=3,
    rows=[
        of_components(
            twin,
            "whole",
            fill={"twin": twin},
            published={SPEED.key: Published(speed, "on an A100, 8,000 tokens, up to 128 rows")} if speed else {},
        )
        for twin, speed in TWINS.items()
    ],
    columns=[
        of_text("parameters", "analyses.overhead.{twin}.parameters", 0),
        of_text("step, x of block", "analyses.overhead.{twin}.step.ratio", 3, "lower"),
        of_text("step, ms", "analyses.overhead.{twin}.step.ms", 2, "lower"),
        SPEED,
        of_text("prompt, ms", "analyses.overhead.{twin}.generation.ttft_ms", 2, "lower"),
    ],
    baseline="block",
    minutes=MINUTES,
    parts={"text": {}},
    analyses=["overhead"],
    notes=[
        "block, attention, ssm: layers without feed-forward networks, with both branches or one; embedding and head are in each, so the sum of the two counts "
        "them twice. attention_as_large: attention alone with feed-forward networks so wide that it has the whole model's parameters.",
        "Were it as in the paper, at 8,000 tokens and a batch that fills the device, the whole generates about four times as many tokens per second as attention alone "
        "(table 10: 2,696 and 721), for its cache is a tenth; in short rows and small batches there is nothing of that to gain.",
    ],
)(base)
