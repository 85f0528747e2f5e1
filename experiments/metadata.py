"""Metadata-conditioned pre-training: position and content of metadata (Beyond URLs, arXiv 2511.21613; URLs Help, Topics Guide,
arXiv 2505.16570). MeCo is in experiments/metadata_meco.py.

Every row names its differences from a model of only text. The first two papers do not state optimiser and batch; the values at
paper scale come from the same authors' public training scripts.
"""

from typing import Any

from metajax.config import Choice, Config, Data, Evaluation, Metadata, Model, Optimizer, Runtime, Switch, Training
from metajax.models.presets import llama
from metajax.registry import SCALES, Base, ByScale, Column, Published, Row, table, vocabularies

BEYOND, HELP = "Beyond URLs (arXiv 2511.21613)", "URLs Help, Topics Guide (arXiv 2505.16570)"
vocabularies |= {"hf:tokenizer.json": 131_072, "hf:llama3/tokenizer.json": 128_256}
NOT_READ = Published(None, "the paper's number was not read")  # the full text of the first two papers was not available
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


def questions(tasks: tuple[str, ...], **options: Any) -> Choice:
    """Tasks from files of the data folder: tasks/NAME/test.jsonl, solved examples from tasks/NAME/train.jsonl."""
    return Choice(tuple(f"{name}:tasks/{name}/test.jsonl?shots_from=tasks/{name}/train.jsonl" for name in tasks), **options)


def _model(scale: str) -> Model:
    if scale == "cpu":
        return Model(
            layers=3,
            heads=4,
            width=80,
            mlp_width=216,
            activation="swiglu",
            norm="rmsnorm",
            position="rope",
            bias=False,
            tied=True,
            init_std=0.05,
        )
    if scale == "gpu":
        return llama(8, 8, 512, mlp_width=1408, compute_dtype="bfloat16")
    return llama(16, 32, 2048, kv_heads=8, mlp_width=8192, rope_theta=5e5, init_std=0.008944, compute_dtype="bfloat16")


def base(scale: str) -> Config:
    """Only text. Paper scale: 1.5B parameters, 48,441 steps of 504 rows of 4,096 tokens of FineWeb-Edu (100B).

    Data folder (--data-dir): fineweb-edu/*.parquet with the columns of FineWeb-Edu; labels/*.parquet, by id, with WebOrganizer's
    topic and format, for fine domains topic_fine and format_fine; a tokenizer of 131,072 tokens; tasks/NAME as in `questions`.
    """
    common = {"metadata": Metadata(position="none"), "model": _model(scale)}
    conditions = ("none", "empty", "right", "shuffled")
    if scale == "paper":
        return Config(
            name="metadata",
            data=Data(
                sources=("parquet:fineweb-edu/*.parquet?origin=url&join=labels",),
                tokenizer="hf:tokenizer.json",
                sequence_length=4096,
                batch_size=504,
                validation_share=0.0005,
            ),
            optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2000),
            training=Training(steps=48_441),
            evaluation=Evaluation(
                every=2422,
                conditions=conditions,
                documents=5_000,
                choice=questions(TASKS, shots=(5, 0)),
                labels=("{topic}", "{int_score}", "{url|host|top100}"),
            ),
            runtime=Runtime(save_every=500, log_every=20, unroll=1, remat="full"),
            **common,
        )
    # cpu: of rates and batches over 614,400 positions, these are best for only text (seed 0, validation bits/byte of the body):
    # 4 rows x 600 steps: 2.141 (3e-3), 2.105 (6e-3), 2.130 (1.2e-2); 2 rows x 1200: 2.084 (4e-3), 2.085 (6e-3);
    # 1 row x 2400: 2.123 (4e-3). Rows with metadata were not considered.
    cpu = scale == "cpu"
    return Config(
        name="metadata",
        data=Data(
            sources=("debindex",),
            tokenizer="bpe:2048" if cpu else "bpe:8192",
            sequence_length=256 if cpu else 512,
            batch_size=2 if cpu else 32,
        ),
        optimizer=Optimizer(learning_rate=4e-3 if cpu else 1e-3, warmup_steps=60 if cpu else 50),
        training=Training(steps=1200 if cpu else 1000),
        evaluation=Evaluation(
            every=120 if cpu else 100,
            conditions=conditions,
            documents=240 if cpu else 800,
            labels=("{section|top6}", "{popularity|floor|cap2}", "{maintainer|top6}"),
        ),
        runtime=Runtime(save_every=400 if cpu else 500, log_every=50, unroll=0 if cpu else 1),
        **common,
    )


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
# FineWeb-Edu has quality scores but no popularity; Debian's index has popularity but no quality scores.
WITHOUT_SCORE, WITHOUT_POPULARITY = (
    ByScale(cpu="a score of quality", gpu="a score of quality"),
    ByScale(paper="a column of popularity"),
)
KINDS = {
    "url": ("{url}", ""),
    **{name: (template, WITHOUT_SCORE) for name, template in SCORE.items()},
    **{name: (template, WITHOUT_POPULARITY) for name, template in POPULARITY.items()},
    **{name: (template, "") for name, template in DOMAIN.items()},
}
# A few packages have more debtags than fit in a row; their text has no metadata.
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
    "Bits per byte of validation packages' text alone, with the metadata that a model is shown at evaluation; metadata is never counted there. Rows "
    "without metadata in training see it as an unknown prefix. All rows have the same steps and row length, so metadata is paid for out of the budget.",
    MAPPING,
]


SAID = {AVERAGE.key: NOT_READ}  # a paper's mean of nine tasks after 100B tokens, 5-shot


def arm(position: str, kind: str, **options: Any) -> Row:
    template, lacks = KINDS[kind]
    changes = {"metadata.position": position, "metadata.template": template} | LONG.get(kind, {})
    return Row(
        f"{position}_{kind}",
        changes,
        {} if kind in POPULARITY else SAID,
        lacks=lacks,
        group=f"metadata {'before' if position == 'prepend' else 'after'} the text",
        **options,
    )


def side(name: str, note: str = "", core: bool = True, published: bool = False, **changes: Any) -> Row:
    """A control, or an arm without information about the document."""
    fields = {f"metadata.{field}": value for field, value in changes.items()}
    return Row(name, fields, SAID if published else {}, core=core, note=note, group="controls")


table(
    "metadata/positions",
    summary="metadata before or after the text, coarse and fine, with uninformative controls",
    paper=f"{BEYOND}, table 1",
    paper_rows=13,
    rows=[
        Row("standard", {}, SAID),
        side("empty_pair", "delimiters alone", False, True, position="prepend", keep=0.0),
        side("shuffled_url", "another package's URL in training too: ours", position="prepend", assigned="shuffled"),
        side("meta_tokens", "five learnable tokens, the same for all documents", False, True, position="prepend", tokens=5),
        side("append_url_silent", "after the text, and never predicted: ours", False, position="append", loss_weights=(0.0, 0.0)),
        arm("prepend", "url"),
        arm("prepend", "quality_fine", core=False),
        arm("prepend", "quality_coarse", core=False),
        arm("prepend", "popularity_fine", core=False),
        arm("prepend", "popularity_coarse", core=False),
        arm("prepend", "domain_fine"),
        arm("prepend", "domain_coarse"),
        arm("append", "url", note="said to help, without a number"),
        arm("append", "quality_fine", core=False, note="said to lie below append_quality_coarse"),
        arm("append", "quality_coarse", core=False),
        arm("append", "popularity_fine", core=False),
        arm("append", "popularity_coarse", core=False),
        arm("append", "domain_fine", core=False),
        arm("append", "domain_coarse", core=False),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=READ,
)(base)


def of_positions(row: str, name: str = "", **options: Any) -> Row:
    """A row of the first table under this name, with the scales at which that row lacks its field."""
    kind = row.partition("_")[2]
    lacks = KINDS[kind][1] if kind in KINDS else ""
    return Row(name or row, of=f"metadata/positions/{row}", lacks=lacks, **options)


table(
    "metadata/url_parts",
    summary="the whole URL before the text, or a part of it",
    paper=f"{BEYOND}, table 2",
    paper_rows=5,
    rows=[
        of_positions("standard", published=SAID),
        of_positions("prepend_url", "whole", published=SAID),
        *(
            Row(part, {"metadata.position": "prepend", "metadata.template": f"{{url|{part}}}"}, SAID)
            for part in ("scheme", "host", "path")
        ),
        Row("hashed", {"metadata.position": "prepend", "metadata.template": "{url|hash}"}, note="groups without words: ours"),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=READ,
)(base)


def joined(name: str, cpu: str, paper: str, **options: Any) -> Row:
    changes = {"metadata.position": "prepend", "metadata.template": ByScale(cpu, cpu, paper)}
    return Row(name, changes, SAID, **options)


table(
    "metadata/combinations",
    summary="two kinds of metadata together, before the text or on both sides",
    paper=f"{BEYOND}, figure 3; {HELP}",
    paper_rows=5,
    rows=[
        of_positions("standard", published=SAID),
        of_positions("prepend_url", "url", published=SAID),
        of_positions("prepend_domain_coarse", "domain", published=SAID),
        joined(
            "url_domain",
            f"{{url}} {SECTION}",
            "{url} {topic}, {format}",
            note="order and what stands between them are not stated",
        ),
        joined("url_quality", "", "{url} {int_score}", lacks=WITHOUT_SCORE, core=False),
        Row(
            "url_popularity",
            {"metadata.position": "prepend", "metadata.template": "{url} {popularity|floor|cap2}"},
            lacks=WITHOUT_POPULARITY,
            core=False,
        ),
        Row(
            "url_and_domain_behind",
            {
                "metadata.position": "both",
                "metadata.template": "{url}",
                "metadata.appended": DOMAIN["domain_coarse"],
            },
            note="URL before and domain after the text: asked for by reviewers, ours",
        ),
        Row("url_both_sides", {"metadata.position": "both"}, note="ours", core=False),
    ],
    columns=COLUMNS,
    baseline="standard",
    minutes=MINUTES,
    notes=[*READ, "The papers' finding is that signals do not add up; of the figure only that is known here."],
)(base)


# ---------------------------------------------------------------------------------------- URLs Help, Topics Guide


def cooldown(share: int, base: Base) -> ByScale:
    """The switch at which a base's last `share` per cent of steps begin to read separate documents, without metadata."""
    steps = {scale: base(scale).training.steps for scale in SCALES}
    return ByScale(**{scale: Switch(n - n * share // 100, metadata="none", unseen=share / 100) for scale, n in steps.items()})


HOST = {
    "metadata.position": "prepend",
    "metadata.template": "URL: {url|host}\n\n",
    "metadata.wrap": "plain",
    "metadata.keep": 1.0,
}
ZERO_SHOT = Column("tasks, 0-shot, %", "eval.choice.settings.none_0.average", 1, "higher", 100)


SHOTS = {ZERO_SHOT.key: NOT_READ, AVERAGE.key: NOT_READ}


table(
    "metadata/urls_help",
    summary="which metadata helps, asked without and with solved examples",
    paper=HELP,
    paper_rows=6,
    rows=[
        of_positions("standard", published=SHOTS),
        of_positions("prepend_url", "url", published=SHOTS),
        of_positions("prepend_quality_coarse", "quality", published=SHOTS),
        of_positions("prepend_popularity_coarse", "popularity"),
        of_positions("prepend_domain_coarse", "domain", published=SHOTS),
        Row("meco", HOST | {"data.switch": cooldown(10, base)}, SHOTS),
        Row("url_quality", of="metadata/combinations/url_quality", published=SHOTS, lacks=WITHOUT_SCORE, core=False),
    ],
    columns=[*COLUMNS[:-1], ZERO_SHOT, AVERAGE],
    baseline="standard",
    minutes=MINUTES,
    notes=READ,
)(base)
