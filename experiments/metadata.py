"""Metadata-conditioned pre-training: where metadata stands and what it says (Beyond URLs, arXiv 2511.21613; URLs Help, Topics Guide, arXiv
2505.16570), and MeCo (arXiv 2501.01956).

Every row says what differs from a model that sees text alone. Optimiser and batch of the first two papers are not stated there; what stands
here at paper scale is that of the same authors' public training scripts.
"""

from dataclasses import replace
from typing import Any

from metajax.config import Choice, Config, Data, Evaluation, Metadata, Model, Optimizer, Runtime, Switch, Training
from metajax.models.presets import llama
from metajax.registry import SCALES, Base, ByScale, Column, Published, Row, table, vocabularies

BEYOND, HELP, MECO = "Beyond URLs (arXiv 2511.21613)", "URLs Help, Topics Guide (arXiv 2505.16570)", "MeCo (arXiv 2501.01956)"
vocabularies |= {"hf:tokenizer.json": 131_072, "hf:llama3/tokenizer.json": 128_256}
NOTES = "as told in notes on the paper"  # of the first two papers no full text was at hand
TASKS = (
    "arc_challenge",
    "arc_easy",
    "commonsense_qa",
    "mmlu_continuation",
    "piqa",
    "social_iqa",
    "hellaswag",
    "lambada",
    "winogrande",
)
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


def questions(tasks: tuple[str, ...], **options: Any) -> Choice:
    """Tasks from files of the data folder: tasks/NAME/test.jsonl, solved examples from tasks/NAME/train.jsonl."""
    return Choice(tuple(f"{name}:tasks/{name}/test.jsonl?shots_from=tasks/{name}/train.jsonl" for name in tasks), **options)


def _model(scale: str) -> Model:
    if scale == "cpu":
        return Model(
            layers=3, heads=4, width=80, mlp_width=216, activation="swiglu", norm="rmsnorm", position="rope", bias=False, tied=True, init_std=0.05
        )  # fmt: skip
    if scale == "gpu":
        return llama(8, 8, 512, mlp_width=1408, compute_dtype="bfloat16")
    return llama(16, 32, 2048, kv_heads=8, mlp_width=8192, rope_theta=5e5, init_std=0.008944, compute_dtype="bfloat16")


def base(scale: str) -> Config:
    """Text alone. Paper scale: 1.5B parameters, 48,441 steps of 504 rows of 4,096 tokens of FineWeb-Edu (100B).

    Data folder (--data-dir) there: fineweb-edu/*.parquet with the columns of FineWeb-Edu; labels/*.parquet, by id, with topic and format of
    WebOrganizer, and for the fine domains topic_fine and format_fine; a tokenizer of 131,072 tokens; tasks/NAME as `questions` says.
    """
    common = {"metadata": Metadata(position="none"), "model": _model(scale)}
    conditions = ("none", "empty", "right", "shuffled")
    if scale == "paper":
        return Config(
            name="metadata",
            data=Data(
                sources=("parquet:fineweb-edu/*.parquet?origin=url&join=labels",), tokenizer="hf:tokenizer.json", row_length=4096, batch_rows=504, held_out=0.0005,
            ),
            optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
            training=Training(steps=48_441),
            evaluation=Evaluation(
                every=2422, conditions=conditions, documents=5_000, choice=questions(TASKS, shots=(5, 0)), labels=("{topic}", "{int_score}", "{url|host|top100}"),
            ),
            runtime=Runtime(save_every=500, log_every=20, unroll=1, remat="full"), **common,
        )  # fmt: skip
    # cpu: of rates and batches that read the same 614,400 slots, text alone came out best with these (seed 0, held-out bits/byte of the body):
    # 4 rows x 600 steps: 2.141 (3e-3), 2.105 (6e-3), 2.130 (1.2e-2); 2 rows x 1200: 2.084 (4e-3), 2.085 (6e-3);
    # 1 row x 2400: 2.123 (4e-3). Rows with metadata were not looked at.
    cpu = scale == "cpu"
    return Config(
        name="metadata",
        data=Data(
            sources=("debindex",), tokenizer="bpe:2048" if cpu else "bpe:8192", row_length=256 if cpu else 512, batch_rows=2 if cpu else 32,
        ),
        optimizer=Optimizer(learning_rate=4e-3 if cpu else 1e-3, warmup_steps=60 if cpu else 50),
        training=Training(steps=1200 if cpu else 1000),
        evaluation=Evaluation(
            every=120 if cpu else 100, conditions=conditions, documents=240 if cpu else 800,
            labels=("{section|top6}", "{popularity|floor|cap2}", "{maintainer|top6}"),
        ),
        runtime=Runtime(save_every=400 if cpu else 500, log_every=50, unroll=0 if cpu else 1), **common,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- what metadata says

URL = {"metadata.template": "{url}"}
SCORE = {"quality_fine": "{score|tenths}", "quality_coarse": "{int_score}"}
POPULARITY = {"popularity_fine": "{popularity|tenths}", "popularity_coarse": "{popularity|floor|cap2}"}
SECTION = "{section}, {role|or_unknown}"
TAGS = "{tags|or_unknown}"
DOMAIN = {
    "domain_fine": ByScale(TAGS, TAGS, "{topic_fine}, {format_fine}"),
    "domain_coarse": ByScale(SECTION, SECTION, "{topic}, {format}"),
}
# FineWeb-Edu has scores of quality and no popularity, Debian's index the other way round.
WITHOUT_SCORE, WITHOUT_POPULARITY = ByScale(cpu="score", gpu="score"), ByScale(paper="popularity")
KINDS = {
    "url": ("{url}", ""),
    **{name: (template, WITHOUT_SCORE) for name, template in SCORE.items()},
    **{name: (template, WITHOUT_POPULARITY) for name, template in POPULARITY.items()},
    **{name: (template, "") for name, template in DOMAIN.items()},
}
# A few packages have more debtags than a row holds: their text goes without.
LONG = {"domain_fine": {"metadata.too_long": ByScale(cpu="drop", gpu="drop")}}
AVERAGE = Column("tasks, 5-shot, %", "eval.choice.average", 1, "higher", 100)
COLUMNS = [
    Column("bits/byte, no metadata", "eval.none.bpb"),
    Column("empty pair", "eval.empty.bpb"),
    Column("right metadata", "eval.right.bpb"),
    Column("shuffled metadata", "eval.shuffled.bpb"),
    Column("nats a metadata token", "eval.right.metadata_nats_per_token", 2, ""),
    AVERAGE,
]
MINUTES = {"cpu": 1.5, "gpu": 6, "paper": 2900}
MAPPING = (
    "On Debian's index (cpu and gpu scale) URL is the package's Homepage; coarse domain is its Section and role tag; fine domain is all its debtags, "
    "`unknown` for the half without; there is no score of quality, and popularity stands beside it under its own name: log2(1 + packages that need "
    "this one), which is use, not quality of prose."
)
READ = [
    "Bits per byte of held-out packages' text alone, with the metadata that a model is shown at evaluation; metadata is never counted there. Rows "
    "without metadata in training see it as an unknown prefix. All rows have the same steps and row length, so metadata is paid for out of the budget.",
    MAPPING,
]


def said(value: float | None) -> dict[str, Published]:
    """A paper's mean of nine tasks after 100B tokens, 5-shot."""
    return {AVERAGE.key: Published(value, NOTES)}


def arm(position: str, kind: str, value: float | None = None, **options: Any) -> Row:
    template, lacks = KINDS[kind]
    changes = {"metadata.position": position, "metadata.template": template} | LONG.get(kind, {})
    return Row(
        f"{position}_{kind}",
        changes,
        said(value),
        lacks=lacks,
        group=f"metadata {'in front' if position == 'prepend' else 'behind'}",
        **options,
    )


def side(name: str, note: str = "", core: bool = True, published: float | None = None, **changes: Any) -> Row:
    """A control, or an arm that tells nothing of the document."""
    fields = {f"metadata.{field}": value for field, value in changes.items()}
    return Row(name, fields, said(published) if published else {}, core=core, note=note, group="controls")


table(
    "metadata/positions",
    summary="metadata in front of the text or behind it, coarse and fine, with controls that tell nothing",
    paper=f"{BEYOND}, table 1",
    paper_rows=13,
    rows=[
        Row("standard", {}, said(46.7)),
        side("empty_pair", "delimiters alone", False, 46.7, position="prepend", keep=0.0),
        side("shuffled_url", "another package's URL in training too: ours", position="prepend", assigned="shuffled"),
        side("meta_tokens", "five learnable tokens, the same for all documents", False, 47.1, position="prepend", tokens=5),
        side("append_url_silent", "behind, and never asked for: ours", False, position="append", loss_weights=(0.0, 0.0)),
        arm("prepend", "url", 47.7),
        arm("prepend", "quality_fine", 47.3, core=False),
        arm("prepend", "quality_coarse", 46.6, core=False),
        arm("prepend", "popularity_fine", core=False),
        arm("prepend", "popularity_coarse", core=False),
        arm("prepend", "domain_fine", 47.3),
        arm("prepend", "domain_coarse", 46.7),
        arm("append", "url", note="said to help, without a number"),
        arm("append", "quality_fine", core=False, note="said to lie below append_quality_coarse"),
        arm("append", "quality_coarse", 47.1, core=False),
        arm("append", "popularity_fine", core=False),
        arm("append", "popularity_coarse", core=False),
        arm("append", "domain_fine", 47.3, core=False),
        arm("append", "domain_coarse", core=False),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=READ,
)(base)  # fmt: skip


def of_positions(row: str, name: str = "", **options: Any) -> Row:
    """A row of the first table under this name, its field missing where it is there."""
    kind = row.partition("_")[2]
    lacks = KINDS[kind][1] if kind in KINDS else ""
    return Row(name or row, of=f"metadata/positions/{row}", lacks=lacks, **options)


table(
    "metadata/url_parts",
    summary="the whole URL in front of the text, or a part of it",
    paper=f"{BEYOND}, table 2",
    paper_rows=5,
    rows=[
        of_positions("standard", published=said(46.7)),
        of_positions("prepend_url", "whole", published=said(47.7)),
        *(
            Row(part, {"metadata.position": "prepend", "metadata.template": f"{{url|{part}}}"}, said(value))
            for part, value in {"scheme": 46.6, "host": 47.2, "path": 46.9}.items()
        ),
        Row("hashed", {"metadata.position": "prepend", "metadata.template": "{url|hash}"}, note="groups without words: ours"),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=READ,
)(base)


def joined(name: str, cpu: str, paper: str, value: float | None = None, **options: Any) -> Row:
    changes = {"metadata.position": "prepend", "metadata.template": ByScale(cpu, cpu, paper)}
    return Row(name, changes, {AVERAGE.key: Published(value, f"{HELP}, {NOTES}")}, **options)


table(
    "metadata/combinations",
    summary="two kinds of metadata together, in front or on both sides",
    paper=f"{BEYOND}, figure 3; {HELP}",
    paper_rows=5,
    rows=[
        of_positions("standard", published=said(46.7)),
        of_positions("prepend_url", "url", published=said(47.7)),
        of_positions("prepend_domain_coarse", "domain", published=said(46.7)),
        joined("url_domain", f"{{url}} {SECTION}", "{url} {topic}, {format}", note="order and what stands between them are not stated"),
        joined("url_quality", "", "{url} {int_score}", 46.1, lacks=WITHOUT_SCORE, core=False),
        joined("url_popularity", "{url} {popularity|floor|cap2}", "", lacks=WITHOUT_POPULARITY, core=False),
        Row("url_and_domain_behind", {
            "metadata.position": "both", "metadata.template": "{url}", "metadata.appended": DOMAIN["domain_coarse"],
        }, note="URL in front and domain behind: asked for by reviewers, ours"),
        Row("url_both_sides", {"metadata.position": "both"}, note="ours", core=False),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=[*READ, "The papers' finding is that signals do not add up; of the figure only that is known here."],
)(base)  # fmt: skip


# ---------------------------------------------------------------------------------------- URLs Help, Topics Guide


def cooldown(share: int, base: Base) -> ByScale:
    """The last `share` per cent of a base's steps on documents without metadata that only they read."""
    steps = {scale: base(scale).training.steps for scale in SCALES}
    return ByScale(**{scale: Switch(n - n * share // 100, metadata="none", unseen=share / 100) for scale, n in steps.items()})


HOST = {
    "metadata.position": "prepend",
    "metadata.template": "URL: {url|host}\n\n",
    "metadata.wrap": "plain",
    "metadata.keep": 1.0,
}
ZERO_SHOT = Column("tasks, 0-shot, %", "eval.choice.settings.none_0.average", 1, "higher", 100)


def shots(zero: float | None, five: float) -> dict[str, Published]:
    return {ZERO_SHOT.key: Published(zero, NOTES), AVERAGE.key: Published(five, NOTES)}


table(
    "metadata/urls_help",
    summary="which metadata helps, asked without and with solved examples",
    paper=HELP,
    paper_rows=6,
    rows=[
        of_positions("standard", published=shots(46.7, 46.7)),
        of_positions("prepend_url", "url", published=shots(46.9, 47.8)),
        of_positions("prepend_quality_coarse", "quality", published=shots(45.8, 46.6)),
        of_positions("prepend_popularity_coarse", "popularity"),
        of_positions("prepend_domain_coarse", "domain", published=shots(46.3, 46.7)),
        Row("meco", HOST | {"data.switch": cooldown(10, base)}, shots(46.2, 46.7)),
        Row("url_quality", of="metadata/combinations/url_quality", published=shots(None, 46.1), lacks=WITHOUT_SCORE, core=False),
    ],
    columns=[*COLUMNS[:-1], ZERO_SHOT, AVERAGE],
    baseline="standard",
    minutes=MINUTES,
    notes=[
        *READ,
        "That the standard model has the same value without and with examples may be a slip in the notes on the paper.",
    ],
)(base)


# ------------------------------------------------------------------------------------------------------------ MeCo


def meco_base(scale: str) -> Config:
    """MeCo's text alone: every row begins with a document. Paper scale: 1.6B parameters, 40,000 steps of 512 rows of 8,192 tokens of DCLM."""
    config = base(scale)
    data = replace(config.data, packing="new_document")
    if scale != "paper":
        return replace(config, data=data)
    return replace(
        config,
        data=replace(data, sources=("jsonl:dclm/*.jsonl?origin=url",), tokenizer="hf:llama3/tokenizer.json", row_length=8192, batch_rows=512),
        model=MECO_MODELS["1.6b"],
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2000, weight_decay=0.033),
        training=Training(steps=40_000),
        evaluation=replace(
            config.evaluation, every=4000, choice=questions(MECO_TASKS, contexts=("none", "task")), labels=("{url|host|top100}",)
        ),
    )  # fmt: skip


def _meco_model(layers: int, width: int, mlp_width: int, heads: int, kv_heads: int) -> Model:
    return llama(
        layers, heads, width, kv_heads=kv_heads, mlp_width=mlp_width, rope_theta=5e5, init_std=0.02, compute_dtype="bfloat16"
    )


MECO_MODELS = {
    "600m": _meco_model(24, 1024, 4096, 16, 16), "1.6b": _meco_model(24, 2048, 5504, 16, 8), "3b": _meco_model(28, 3072, 8192, 24, 8),
    "8b": _meco_model(32, 4096, 14336, 32, 8),
}  # fmt: skip
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
    "With a source: a fitting, invented address in front of each task (conditional inference).",
    MAPPING,
]


def meco(name: str, template: str | ByScale, value: float, *, share: int = 10, **options: Any) -> Row:
    """An arm of MeCo: all documents with metadata, then the last part of the steps without."""
    changes = HOST | {"metadata.template": template, "data.switch": cooldown(share, meco_base)}
    return Row(name, changes, {MECO_AVERAGE.key: value}, **options)


def of_meco(row: str, name: str, value: float, **options: Any) -> Row:
    return Row(name, of=f"metadata/meco_main/{row}", published={MECO_AVERAGE.key: value}, **options)


PERPLEXITY = MECO_COLUMNS[3].key
LONGER = ByScale(**{scale: meco_base(scale).training.steps * 3 // 2 for scale in SCALES})


table(
    "metadata/meco_main",
    summary="metadata first, then a cooldown without, against text alone",
    paper=f"{MECO}, tables 1 and 2, and on attention across documents",
    paper_rows=6,
    rows=[
        Row("standard", {}, {PERPLEXITY: 13.2, MECO_AVERAGE.key: 55.7, CONDITIONAL.key: 55.8}),
        Row("half_more", {"training.steps": LONGER}, {PERPLEXITY: 12.9, MECO_AVERAGE.key: 56.7}, note="text alone, half more tokens"),
        Row("meco", HOST | {"data.switch": cooldown(10, meco_base)}, {PERPLEXITY: 13.3, MECO_AVERAGE.key: 56.7, CONDITIONAL.key: 57.2}),
        Row("standard_open", {"data.attend_across_documents": True}, {MECO_AVERAGE.key: 55.0}, core=False,
            note="attention across the documents of a row"),
        Row("meco_open", HOST | {"data.switch": cooldown(10, meco_base), "data.attend_across_documents": True}, {MECO_AVERAGE.key: 56.6}, core=False),
        Row("meco_loss", HOST | {"data.switch": cooldown(10, meco_base), "metadata.loss_weights": (1.0, 1.0)}, core=False,
            note="asked for its metadata too: said to be slightly worse"),
    ],
    columns=MECO_COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=[*MECO_NOTES, "The paper's row that trains on text chosen by a classifier (13.3, 56.0) needs another corpus and is not here."],
)(meco_base)  # fmt: skip

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
    """The host where it is one of so many; else the word unknown."""
    return ByScale(**{scale: f"URL: {{url|host|top{getattr(count, scale)}}}\n\n" for scale in SCALES})


table(
    "metadata/meco_metadata",
    summary="what has to be said in front of the text: host, whole URL, its end, frequent hosts, groups without words, topics",
    paper=f"{MECO}, the table on kinds of metadata",
    paper_rows=8,
    rows=[
        of_meco("standard", "standard", 55.7),
        of_meco("meco", "host", 56.7),
        meco("url", "URL: {url}\n\n", 56.8, core=False),
        meco("tld", "URL: {url|tld}\n\n", 56.2),
        meco("few_hosts", most_frequent(FEW), 56.4, core=False, note="the 0.2% most frequent; of paper scale their number is a guess"),
        meco("more_hosts", most_frequent(MORE), 56.3, note="the 2% most frequent"),
        meco("hashed", "URL: {url|host|hash}\n\n", 56.7),
        meco("topic", ByScale(cpu=f"Topic: {SECTION}\n\n", gpu=f"Topic: {SECTION}\n\n", paper="Topic: {topic_llm}\n\n"), 56.6,
             note="the paper's are phrases of a language model"),
    ],
    columns=MECO_COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=MECO_NOTES,
)(meco_base)  # fmt: skip

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
            Row(f"{name}_{corpus}", changes | {"data.sources": (f"jsonl:{corpus}/*.jsonl?origin=url",)}, {MECO_AVERAGE.key: value}, group=corpus)
            for corpus, values in CORPORA.items()
            for (name, changes), value in zip({"standard": {}, "meco": HOST | {"data.switch": cooldown(10, meco_base)}}.items(), values, strict=True)
        ),
        of_meco("standard", "standard_dclm", 55.7, group="dclm"),
        of_meco("meco", "meco_dclm", 56.7, group="dclm"),
    ],
    columns=MECO_COLUMNS,
    baseline=None,
    minutes={"paper": 2900},
    notes=[*MECO_NOTES[:2], "c4 is SlimPajama's, refinedweb DCLM's making of RefinedWeb: folders of jsonl files below --data-dir."],
)(meco_base)  # fmt: skip
