"""MeCo (arXiv 2501.01956): metadata before all documents, then a cooldown without, compared with only text."""

from dataclasses import replace
from typing import Any

from metajax.config import Config, Model, Optimizer, Switch, Training
from metajax.models.presets import llama
from metajax.registry import SCALES, ByScale, Column, Row, table

from . import IN_PRINT
from .metadata import COLUMNS, HOST, MAPPING, MINUTES, SECTION, base, cooldown, questions

MECO = "MeCo (arXiv 2501.01956)"
MECO_TASKS = (
    "mmlu_continuation",
    "arc_easy",
    "arc_challenge",
    "commonsense_qa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_iqa",
    "winogrande",
)


def meco_base(scale: str) -> Config:
    """MeCo's text-only baseline; rows begin with a document. Paper: 1.6B parameters, 40,000 steps of 512 rows of 8,192, DCLM."""
    config = base(scale)
    data = replace(config.data, packing="new_document")
    if scale != "paper":
        return replace(config, data=data)
    return replace(
        config,
        data=replace(
            data,
            sources=("jsonl:dclm/*.jsonl?origin=url",),
            tokenizer="hf:llama3/tokenizer.json",
            sequence_length=8192,
            batch_size=512,
        ),
        model=MECO_MODELS["1.6b"],
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2000, weight_decay=0.033),
        training=Training(steps=40_000),
        evaluation=replace(
            config.evaluation, every=4000, choice=questions(MECO_TASKS, contexts=("none", "task")), labels=("{url|host|top100}",)
        ),
    )


def _meco_model(layers: int, width: int, mlp_width: int, heads: int, kv_heads: int) -> Model:
    return llama(
        layers, heads, width, kv_heads=kv_heads, mlp_width=mlp_width, rope_theta=5e5, init_std=0.02, compute_dtype="bfloat16"
    )


MECO_MODELS = {
    "600m": _meco_model(24, 1024, 4096, 16, 16),
    "1.6b": _meco_model(24, 2048, 5504, 16, 8),
    "3b": _meco_model(28, 3072, 8192, 24, 8),
    "8b": _meco_model(32, 4096, 14336, 32, 8),
}
MECO_AVERAGE = Column("tasks, %", "eval.choice.average", 1, "higher", 100)
CONDITIONAL = Column("with a source, %", "eval.choice.settings.task_5.average", 1, "higher", 100)
MECO_COLUMNS = [
    COLUMNS[0],
    COLUMNS[2],
    COLUMNS[3],
    Column("perplexity, no metadata", "eval.none.perplexity", 2),
    MECO_AVERAGE,
    CONDITIONAL,
]
MECO_NOTES = [
    "The paper's mean is of ten tasks, the better of two forms each, 5-shot; its standard deviation over orders of the data is 0.1. TruthfulQA is not among ours.",
    "With a source: a fitting, invented address before each task (conditional inference).",
    MAPPING,
]


def meco(name: str, template: str | ByScale, value: float, *, share: int = 10, **options: Any) -> Row:
    """An arm of MeCo: all documents with metadata, except in the last part of the steps."""
    changes = HOST | {"metadata.template": template, "data.switch": cooldown(share, meco_base)}
    return Row(name, changes, {MECO_AVERAGE.key: value}, **options)


def of_meco(row: str, name: str, value: float, **options: Any) -> Row:
    return Row(name, of=f"metadata/meco_main/{row}", published={MECO_AVERAGE.key: value}, **options)


PERPLEXITY = MECO_COLUMNS[3].key
EACH_TASK = [
    *(
        Column(
            f"{name.removesuffix('_continuation').replace('_', ' ')}, %",
            f"eval.choice.{name}.acc",
            1,
            "higher",
            100,
            scales=("paper",),
        )
        for name in MECO_TASKS
    ),
    Column("TruthfulQA, %", f"{IN_PRINT}truthfulqa", 1, "higher", 100, scales=("paper",)),
]


def each_task(*percent: float) -> dict[str, float]:
    return {column.key: value for column, value in zip(EACH_TASK, percent, strict=True)}


OF_STANDARD = each_task(36.1, 75.1, 42.7, 64.8, 66.7, 46.0, 74.3, 54.2, 62.0, 35.2)
OF_MECO = each_task(36.3, 75.7, 44.1, 63.8, 67.3, 51.2, 73.4, 52.6, 64.2, 38.5)
LONGER = ByScale(**{scale: meco_base(scale).training.steps * 3 // 2 for scale in SCALES})


table(
    "metadata/meco_main",
    summary="metadata first, then a cooldown without, against text alone",
    paper=f"{MECO}, tables 1 and 2, and on attention across documents",
    paper_rows=6,
    rows=[
        Row("standard", {}, {PERPLEXITY: 13.2, MECO_AVERAGE.key: 55.7, CONDITIONAL.key: 55.8} | OF_STANDARD),
        Row(
            "half_more",
            {"training.steps": LONGER},
            {PERPLEXITY: 12.9, MECO_AVERAGE.key: 56.7},
            note="text alone, half more tokens",
        ),
        Row(
            "meco",
            HOST | {"data.switch": cooldown(10, meco_base)},
            {PERPLEXITY: 13.3, MECO_AVERAGE.key: 56.7, CONDITIONAL.key: 57.2} | OF_MECO,
        ),
        Row(
            "standard_open",
            {"data.attend_across_documents": True},
            {MECO_AVERAGE.key: 55.0},
            core=False,
            note="attention across the documents of a row",
        ),
        Row(
            "meco_open",
            HOST | {"data.switch": cooldown(10, meco_base), "data.attend_across_documents": True},
            {MECO_AVERAGE.key: 56.6},
            core=False,
        ),
        Row(
            "meco_loss",
            HOST | {"data.switch": cooldown(10, meco_base), "metadata.loss_weights": (1.0, 1.0)},
            core=False,
            note="asked for its metadata too: said to be slightly worse",
        ),
        Row("chosen_text", {}, {PERPLEXITY: 13.3, MECO_AVERAGE.key: 56.0}, core=False, lacks="a corpus chosen by a classifier"),
    ],
    columns=[*MECO_COLUMNS, *EACH_TASK],
    baseline="standard",
    minutes=MINUTES,
    notes=MECO_NOTES,
)(meco_base)

SOURCES = {
    "none": (69.6, 43.2, 54.7, 48.4),
    "boards.4chan.org": (66.7, 41.1, 53.6, 47.8),
    "www.factmonster.com": (70.7, 45.7, 60.9, 52.4),
}
BY_SOURCE = [
    Column(f"{name.replace('_', ' ')}, %", f"{IN_PRINT}{name}", 1, "higher", 100)
    for name in ("arc_easy", "arc_challenge", "commonsense_qa", "openbookqa")
]


table(
    "metadata/meco_sources",
    summary="MeCo asked without examples, after addresses of good and of bad repute: what the paper prints",
    paper=f"{MECO}, on conditional inference without examples",
    paper_rows=3,
    rows=[
        Row(
            name,
            {},
            {column.key: value for column, value in zip(BY_SOURCE, values, strict=True)},
            lacks="a column for each address",
        )
        for name, values in SOURCES.items()
    ],
    columns=BY_SOURCE,
    baseline=None,
    minutes={"paper": 0},
    notes=[
        "A run of metadata/meco_main can be asked so: `eval RUN --contexts task --choice 'arc_easy:FILE?source=boards.4chan.org'`."
    ],
)(meco_base)

MIXED = HOST | {"metadata.when_dropped": "nothing"}

table(
    "metadata/meco_cooldown",
    summary="metadata all the time, mixed with text alone, or with a cooldown without it",
    paper=f"{MECO}, the tables on mixing and on the length of the cooldown",
    paper_rows=6,
    rows=[
        of_meco("standard", "standard", 55.7),
        Row("always", HOST, {MECO_AVERAGE.key: 50.3}),
        Row(
            "mixed",
            MIXED | {"metadata.keep": 0.9},
            {MECO_AVERAGE.key: 56.4},
            note="nine documents of ten, from the beginning to the end",
        ),
        of_meco("meco", "cooldown_10", 56.7),
        meco("cooldown_20", HOST["metadata.template"], 56.8, share=20),
        meco("cooldown_30", HOST["metadata.template"], 56.2, share=30),
    ],
    columns=MECO_COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=MECO_NOTES,
)(meco_base)

FEW, MORE = ByScale(cpu=13, gpu=13, paper=20_000), ByScale(cpu=132, gpu=132, paper=200_000)


def most_frequent(count: ByScale) -> ByScale:
    """The host if it is among this many most frequent hosts; else the word unknown."""
    return ByScale(**{scale: f"URL: {{url|host|top{getattr(count, scale)}}}\n\n" for scale in SCALES})


table(
    "metadata/meco_metadata",
    summary="what has to come before the text: host, whole URL, its end, frequent hosts, groups without words, topics",
    paper=f"{MECO}, the table on kinds of metadata",
    paper_rows=8,
    rows=[
        of_meco("standard", "standard", 55.7),
        of_meco("meco", "host", 56.7),
        meco("url", "URL: {url}\n\n", 56.8, core=False),
        meco("tld", "URL: {url|tld}\n\n", 56.2),
        meco(
            "few_hosts",
            most_frequent(FEW),
            56.4,
            core=False,
            note="the 0.2% most frequent; of paper scale their number is a guess",
        ),
        meco("more_hosts", most_frequent(MORE), 56.3, note="the 2% most frequent"),
        meco("hashed", "URL: {url|host|hash}\n\n", 56.7),
        meco(
            "topic",
            ByScale(cpu=f"Topic: {SECTION}\n\n", gpu=f"Topic: {SECTION}\n\n", paper="Topic: {topic_llm}\n\n"),
            56.6,
            note="the paper's are phrases of a language model",
        ),
    ],
    columns=MECO_COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=MECO_NOTES,
)(meco_base)

SIZES = {
    "600m": (51.5, 51.7, {}),
    "3b": (59.2, 59.8, {}),
    "8b": (57.8, 58.4, {"training.steps": 20_000, "optimizer.learning_rate": 5e-4}),
}


def of_size(size: str, is_meco: bool) -> Row:
    standard, conditioned, changes = SIZES[size]
    changes = {"model": MECO_MODELS[size]} | changes
    if is_meco:
        steps = changes.get("training.steps", meco_base("paper").training.steps)
        changes |= HOST | {"data.switch": Switch(steps * 9 // 10, metadata="none", unseen=0.1)}
    return Row(
        f"{'meco' if is_meco else 'standard'}_{size}",
        changes,
        {MECO_AVERAGE.key: conditioned if is_meco else standard},
        group=size,
    )


table(
    "metadata/meco_sizes",
    summary="MeCo by the size of the model, at paper scale alone",
    paper=f"{MECO}, the figure on sizes",
    paper_rows=8,
    rows=[
        *(of_size(size, is_meco) for size in SIZES for is_meco in (False, True)),
        of_meco("standard", "standard_1.6b", 55.7, core=False, group="1.6b"),
        of_meco("meco", "meco_1.6b", 56.7, core=False, group="1.6b"),
    ],
    columns=MECO_COLUMNS,
    baseline=None,
    minutes={"paper": 5800},
    notes=[*MECO_NOTES[:2], "8B: half of the tokens, weight decay 0.1 in the paper. 1.6B is metadata/meco_main."],
)(meco_base)

CORPORA = {"c4": (50.5, 51.6), "refinedweb": (53.2, 54.0)}


table(
    "metadata/meco_corpora",
    summary="MeCo by the corpus, at paper scale alone",
    paper=f"{MECO}, on other corpora",
    paper_rows=6,
    rows=[
        *(
            Row(
                f"{name}_{corpus}",
                changes | {"data.sources": (f"jsonl:{corpus}/*.jsonl?origin=url",)},
                {MECO_AVERAGE.key: value},
                group=corpus,
            )
            for corpus, values in CORPORA.items()
            for (name, changes), value in zip(
                {"standard": {}, "meco": HOST | {"data.switch": cooldown(10, meco_base)}}.items(), values, strict=True
            )
        ),
        of_meco("standard", "standard_dclm", 55.7, group="dclm"),
        of_meco("meco", "meco_dclm", 56.7, group="dclm"),
    ],
    columns=MECO_COLUMNS,
    baseline=None,
    minutes={"paper": 2900},
    notes=[
        *MECO_NOTES[:2],
        "c4 is SlimPajama's, refinedweb DCLM's making of RefinedWeb: folders of jsonl files below --data-dir.",
    ],
)(meco_base)
