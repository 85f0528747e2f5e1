"""Metadata-conditioned pre-training, mechanisms: steps saved, probes, attention, guidance, a corpus with known optimal losses."""

import math

from metajax.config import Config, Data, Evaluation, Metadata, Model, Optimizer, Runtime, Training
from metajax.registry import Column, Published, Row, table

from .metadata import BEYOND, HELP, MAPPING, MINUTES, NOT_READ, base, cooldown, of_positions

MARGINS = {"bpb": 0.01, "choice": 0.002}  # noise margin of a comparison: bits/byte; share of right answers
CURVES = {"bpb": "bits/byte", "choice": "tasks"}
SAVED = [
    Column(
        f"{words}{'' if not sign else f', {sign * MARGINS[curve]:+g}'}, %",
        f"curves.{curve}",
        0,
        "lower",
        100,
        match=sign * MARGINS[curve],
    )
    for curve, words in CURVES.items()
    for sign in (0, 1, -1)
]
TASKS_MATCHED = next(column.key for column in SAVED if column.path == "curves.choice" and not column.match)


SAVED_IN_PAPER = {TASKS_MATCHED: NOT_READ}


table(
    "metadata/speedup",
    summary="the share of the steps after which a model is as good as text alone is at the end",
    paper=f"{BEYOND}, the figure on training tokens",
    paper_rows=4,
    rows=[
        of_positions("standard"),
        of_positions("shuffled_url"),
        of_positions("prepend_url", published=SAVED_IN_PAPER),
        of_positions("prepend_quality_fine", published=SAVED_IN_PAPER, core=False),
        of_positions("prepend_domain_fine", published=SAVED_IN_PAPER),
        of_positions("prepend_domain_coarse"),
        of_positions(
            "append_domain_fine",
            published=SAVED_IN_PAPER,
            core=False,
            note="stated for the best model with metadata after the text",
        ),
        of_positions("append_url"),
    ],
    columns=SAVED,
    baseline="standard",
    minutes=MINUTES,
    notes=[
        "Without metadata at evaluation. Straight lines between evaluations; the columns beside ask for as much more, or let off as much, as noise may "
        "explain. All rows have the same tokens a step, metadata counted. `-`: not reached.",
        MAPPING,
    ],
)(base)


def probed(title: str, label: int, path: str, digits: int = 1) -> Column:
    return Column(title, f"analyses.probes.label_{label}.{path}", digits, "higher", 100)


table(
    "metadata/probes",
    summary="topic, popularity or quality, and author, told from frozen states",
    paper=f"{BEYOND}, the section on probing",
    rows=[
        of_positions("standard"),
        of_positions("prepend_url"),
        of_positions("prepend_domain_fine"),
        of_positions("prepend_domain_coarse"),
        of_positions("prepend_popularity_fine", core=False),
        of_positions("prepend_quality_fine", core=False),
        of_positions("append_url"),
        of_positions("append_domain_coarse", core=False),
        of_positions("append_popularity_fine", core=False),
        of_positions("append_popularity_coarse", core=False),
        of_positions("append_quality_fine", core=False),
        of_positions("append_quality_coarse", core=False),
        of_positions("shuffled_url"),
    ],
    columns=[
        probed("topic, %", 0, "balanced.mlp.middle"),
        probed("lengths matched", 0, "matched.mlp.middle"),
        probed("linear", 0, "matched.linear.middle"),
        probed("mean of layers", 0, "matched.mlp.mean"),
        probed("length alone", 0, "matched.length"),
        probed("quality or popularity, %", 1, "balanced.mlp.middle"),
        probed("lengths matched ", 1, "matched.mlp.middle"),
        probed("length alone ", 1, "matched.length"),
        probed("author, %", 2, "balanced.mlp.middle"),
        probed("lengths matched  ", 2, "matched.mlp.middle"),
    ],
    baseline="standard",
    minutes=MINUTES,
    analyses=["probes"],
    notes=[
        "A perceptron of three layers on the layer at 6/16 of the model, on texts without metadata; classes balanced, origins apart. At cpu and gpu scale "
        "topic is the Section, popularity three ranges, author the Maintainer. Every layer is in a run's report.",
        "A summary of the paper says: text alone is lowest everywhere, URL best for author and quality, fine better than coarse for topic, and fine "
        "quality after the text better for quality and worse for topic than coarse. Its values are in figures.",
    ],
)(base)


def looked(part: str, title: str = "", value: str = "mean") -> Column:
    return Column(title or f"{part}, %", f"analyses.metadata_attention.parts.{part}.{value}", 1, "", 100)


CLUSTERS = Column("distances by quality or popularity", "analyses.metadata_attention.clusters.label_1.ratio", 3, "")
IN_A_FIGURE = Published(None, "in a figure")

table(
    "metadata/attention",
    summary="where text looks in its URL, and in learnable tokens",
    paper=f"{BEYOND}, figures on attention",
    paper_rows=2,
    rows=[
        of_positions("prepend_url", published={looked("scheme").key: IN_A_FIGURE}),
        of_positions("meta_tokens", published={CLUSTERS.key: IN_A_FIGURE}),
        of_positions("shuffled_url"),
    ],
    columns=[
        *(
            column
            for part in ("scheme", "host", "path")
            for column in (looked(part), looked(part, f"equal shares, {part}", "uniform"))
        ),
        looked("bos"),
        looked("begin", "delimiter before, %"),
        looked("end", "delimiter after, %"),
        CLUSTERS,
        Column("by topic", "analyses.metadata_attention.clusters.label_0.ratio", 3, ""),
    ],
    baseline=None,
    minutes=MINUTES,
    analyses=["metadata_attention"],
    notes=[
        "Shares of attention from text, all layers and heads. Distances: between classes over within classes, of attention to the learnable tokens. The "
        "paper: the scheme draws most, though it says nothing, and distances between classes of quality are the larger ones.",
        MAPPING,
    ],
)(base)


def drawn(strength: str, value: str, title: str, digits: int = 1, factor: float = 100) -> Column:
    return Column(title, f"analyses.guidance.g_{strength}.{value}", digits, "higher" if value == "accuracy" else "lower", factor)


STEERED = {drawn("2", "accuracy", "").key: Published(None, "told in words")}

table(
    "metadata/guidance",
    summary="texts drawn with less and more of the difference that metadata makes, and whether they have its topic",
    paper=f"{HELP}, the section on guidance",
    paper_rows=4,
    rows=[
        of_positions("standard", published=STEERED),
        of_positions("prepend_url", published=STEERED),
        of_positions("prepend_domain_coarse", published=STEERED),
        of_positions("prepend_domain_fine"),
        of_positions("prepend_popularity_coarse", core=False),
        of_positions("prepend_quality_coarse", core=False, published=STEERED),
    ],
    columns=[
        *(drawn(strength.replace(".", "_"), "accuracy", f"topic, g = {strength}, %") for strength in ("0", "1", "1.5", "2", "3")),
        *(drawn(strength, "nats", f"nats a token, g = {strength}", 2, 1) for strength in ("1", "3")),
        Column("real texts, %", "analyses.guidance.real.accuracy", 1, "", 100),
    ],
    baseline="standard",
    minutes=MINUTES,
    analyses=["guidance"],
    notes=[
        "Share of drawn texts that a classifier of real texts gives the topic of their metadata; its accuracy on real texts stands last. Nats a token: of "
        "the drawn texts, by the model itself without metadata. 0 is drawing without metadata, 1 after it.",
        "A summary of the paper says: topics steer best, URLs towards a site's style, quality hardly, and a model of text alone not at all.",
        MAPPING,
    ],
)(base)


# --------------------------------------------------------------------------------------- a corpus whose answers are known

KNOWN = {"metadata.position": "prepend"}
FINE, COARSE = KNOWN | {"metadata.template": "{source}"}, KNOWN | {"metadata.template": "{group}"}
AFTER = {"metadata.position": "append"}
ALWAYS = FINE | {"metadata.keep": 1.0}


def known(scale: str) -> Config:
    """16 generated sources in 4 groups, 30 documents a step; only at cpu scale."""
    return Config(
        name="metadata",
        data=Data(sources=("generated",), tokenizer="byte", sequence_length=112, batch_size=10, packing="best_fit"),
        model=Model(layers=2, heads=4, width=48, mlp_width=192, position="rope", init_std=0.1),
        metadata=Metadata(position="none", template="{source}"),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50),
        training=Training(steps=1500),
        evaluation=Evaluation(
            every=125,
            documents=400,
            conditions=("right", "empty", "none", "shuffled"),
            labels=("{source}", "{group}"),
            sample_tokens=0,
        ),
        runtime=Runtime(save_every=500, log_every=250),
    )


ALONE = {"evaluation.conditions": ("none", "empty", "right", "shuffled")}  # the curve is of only text
PAIR = {"evaluation.conditions": ("empty", "none", "right", "shuffled")}  # the curve is of text after an empty pair
EARLY = 3  # evaluations before the early look
ASKED = {"asked": "metadata_nats_per_token"}  # metadata before the text is not trained as a target
OF_SOURCE, OF_GROUP = {"told": "source"}, {"told": "group"}  # what the row's metadata reveals about a document


def best(title: str, value: str, known: str = "{told}") -> Column:
    """Column of the best possible value on the same documents, by Bayes' rule, for a reader who knows this about them."""
    return Column(title, f"analyses.by_position.best.{known}.{value}", better="")


table(
    "metadata/known",
    summary="fine and coarse metadata of generated documents, before and after the text, shuffled, dropped and taken away",
    paper="ours: directions that must hold where what metadata is worth is known exactly",
    rows=[
        Row("none", ALONE, fill={"own": "none"}),
        Row("empty_pair", FINE | PAIR | {"metadata.keep": 0.0}, core=False, fill={"own": "empty"}),
        Row("fine", FINE, fill=OF_SOURCE),
        Row("coarse", COARSE, fill=OF_GROUP),
        Row("shuffled", FINE | {"metadata.assigned": "shuffled"}),
        Row("tokens", KNOWN | {"metadata.template": Metadata.template, "metadata.tokens": 5}, core=False),
        Row("fine_half", FINE | {"metadata.keep": 0.5}, core=False, fill=OF_SOURCE, note="half of the documents without"),
        Row("append_fine", FINE | AFTER, fill={"after": "source"} | ASKED),
        Row("append_coarse", COARSE | AFTER, core=False, fill={"after": "group"} | ASKED),
        Row("always", ALWAYS, core=False, fill=OF_SOURCE, note="never without"),
        Row("cooldown_10", ALWAYS | {"data.switch": cooldown(10, known)}, fill=OF_SOURCE),
        Row("cooldown_20", ALWAYS | {"data.switch": cooldown(20, known)}, core=False, fill=OF_SOURCE),
    ],
    columns=[
        Column("nats a symbol, own metadata", "eval.{own}.nats_per_token"),
        best("best possible", "mean"),
        Column(f"after {EARLY * known('cpu').evaluation.every} steps", f"curves.bpb.{EARLY - 1}.1", factor=math.log(2)),
        Column("steps to match, %", "curves.bpb", 0, "lower", 100, match=0.0),
        Column("empty pair", "eval.empty.nats_per_token"),
        Column("no metadata", "eval.none.nats_per_token"),
        best("best possible, told nothing", "mean", "nothing"),
        Column("first 8 symbols, own", "analyses.by_position.own.first"),
        best("best possible, first 8", "first"),
        Column("last third, own", "analyses.by_position.own.last"),
        best("best possible, last third", "last"),
        Column("nats a document's metadata", "eval.right.{asked}", better="", factor=3),  # two delimiters and itself
        best("best possible, metadata", "metadata", "{after}"),
        Column("source probe, %", "analyses.probes.label_0.balanced.linear.mean", 1, "higher", 100),
    ],
    baseline="none",
    minutes={"cpu": 1.5},
    fill={"own": "right", "told": "nothing", "after": "nothing", "asked": "nothing"},
    analyses=["by_position", "probes"],
    notes=[
        "Best possible: by Bayes' rule, on the same documents, for who is told what the row's own metadata before the text says, and nothing where it says nothing "
        "or follows the text. `python run.py show generated` gives it for others.",
        "Expected with own metadata, early and at the end: fine, coarse, none in this order, which reach none's last value sooner in the same order; "
        "nothing from shuffled metadata, learnable tokens, and metadata after the text.",
        "Expected: own metadata helps at a document's beginning and no longer in its last third. What predicts metadata after the text pays -ln 0.9 = 0.105 nats a "
        "document at least, for every tenth has the empty pair there.",
        "Expected without metadata, or with the empty pair: a model that was always told the source is worse than one that never was, less so the more often it was "
        "not told (fine, fine_half), or with a time without at the end (cooldown).",
        "Seen with seeds 0 to 2 (commit 2b840e4; docs/metadata.md): all of it, but that own metadata still helps a little in the last third, and learnable tokens cost "
        "0.024 +- 0.017 nats.",
    ],
)(known)
