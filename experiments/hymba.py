"""Hymba: A Hybrid-head Architecture for Small Language Models (arXiv 2411.13676): the model and its ablations.

The base of every table is the full model, and each row removes something. Widths of the 300M model are inferred from the paper's
cache sizes and branch ratios; the paper does not state its tokenizer, batch and optimiser.
"""

from metajax.config import Choice, Config, Data, Evaluation, Hybrid, Model, Optimizer, Runtime, Tasks, Training
from metajax.models.presets import hymba, hymba_300m
from metajax.registry import ByScale, Column, Row, table, vocabularies

from . import IN_PRINT

PAPER = "Hymba (arXiv 2411.13676)"
vocabularies["sentencepiece:llama2/tokenizer.model"] = 32_000

NO_META = {"model.hybrid.prefix_tokens": 0}
UNSHARED = {"model.hybrid.kv_groups": ()}
FULL = {"model.window": None, "model.hybrid.full_layers": ()}
WINDOWS = {"model.hybrid.full_layers": ()}
# The cache sizes imply 24 Mamba layers; other models have 12 with a feed-forward network each. Below, layers equalise sizes.
MAMBA = {
    **FULL,
    **UNSHARED,
    **NO_META,
    "model.hybrid.fusion": "mamba",
    "model.mlp_width": 0,
    "model.layers": ByScale(cpu=8, gpu=22, paper=24),
}
# The paper's attention-only model has keys of 1,080 numbers, the one with compressed caches 288; mlp_width equalises the sizes.
ATTENTION = {
    **NO_META,
    "model.hybrid.fusion": "attention",
    "model.hybrid.state": Hybrid.state,
    "model.width": ByScale(cpu=72, gpu=540, paper=1080),
    "model.heads": ByScale(cpu=4, gpu=10, paper=15),
    "model.mlp_width": ByScale(cpu=192, gpu=1824, paper=4928),
}
COMPRESSED = ATTENTION | {"model.heads": ByScale(cpu=4, gpu=10, paper=16), "model.hybrid.head_dim": ByScale(paper=72)}
LLAMA = {**ATTENTION, **FULL, **UNSHARED, "model.kv_heads": 0}
SAMBA = {
    **UNSHARED,
    **NO_META,
    **WINDOWS,
    "model.hybrid.fusion": "sequential",
    "model.kv_heads": 0,
}


def few_heads(cpu: int, gpu: int, paper: int) -> dict:
    """Full attention with that many heads of 64 + 64 beside Mamba, each with its own keys and values."""
    heads = ByScale(cpu, gpu, paper)
    narrow = {"model.hybrid.head_dim": ByScale(16, 64, 64), "model.hybrid.value_dim": ByScale(16, 64, 64)}
    return {"model.heads": heads, "model.kv_heads": 0} | narrow | FULL | UNSHARED | NO_META


def _model(scale: str) -> Model:
    if scale == "paper":
        return hymba_300m()
    if scale == "gpu":
        return hymba(9, 8, 512, kv_heads=2, mlp_width=1344, window=128)
    parts = Hybrid(prefix_tokens=8, full_layers=(0, 3), kv_groups=(1, 2, 1), state=8)
    return Model(
        layers=4,
        heads=4,
        kv_heads=2,
        width=64,
        mlp_width=128,
        window=16,
        hybrid=parts,
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=1e-6,
        init_std=0.1,
    )


# The paper's tasks except TruthfulQA, which metajax does not have.
COMMONSENSE_TASKS = ("lambada", "piqa", "arc_challenge", "arc_easy", "hellaswag", "winogrande", "social_iqa")
PASSAGE_TASKS = ("swde", "squad_completion")


def questions(*names: str, **options: tuple) -> Choice:
    """Tasks from files of the data folder: tasks/NAME/test.jsonl."""
    return Choice(tuple(f"{name}:tasks/{name}/test.jsonl" for name in names), **options)


def base(scale: str) -> Config:
    """Appendix A.3 at paper scale: 100B tokens of FineWeb in rows of 1,024, peak rate 5e-4 with warm-up and cosine.

    Data folder (--data-dir): fineweb/*.parquet, llama2/tokenizer.model, and tasks/NAME as in `questions`.
    """
    if scale == "paper":
        return Config(
            name="hymba",
            data=Data(
                sources=("parquet:fineweb/*.parquet?origin=url",),
                tokenizer="sentencepiece:llama2/tokenizer.model",
                sequence_length=1024,
                batch_size=512,
                validation_share=0.0005,
            ),
            model=_model(scale),
            optimizer=Optimizer(learning_rate=5e-4, warmup_steps=2000),
            training=Training(steps=190_000),
            evaluation=Evaluation(documents=5_000, choice=questions(*COMMONSENSE_TASKS, *PASSAGE_TASKS)),
            runtime=Runtime(save_every=1000, log_every=20, unroll=1, remat="full"),
        )
    cpu = scale == "cpu"
    return Config(
        name="hymba",
        data=Data(
            sources=("pydocs",),
            tokenizer="bpe:512" if cpu else "bpe:8192",
            sequence_length=128 if cpu else 512,
            batch_size=8 if cpu else 32,
        ),
        model=_model(scale),
        optimizer=Optimizer(learning_rate=2e-3 if cpu else 1e-3, warmup_steps=50),
        training=Training(steps=300 if cpu else 2000),
        evaluation=Evaluation(documents=120 if cpu else 240, sample_tokens=0 if cpu else 48),
        runtime=Runtime(save_every=400, log_every=50, unroll=1),
    )


LENGTHS = {"trained": ByScale("64", "256", "256"), "beyond": ByScale("128", "512", "1024")}
# The cpu sizes were chosen with rows of only Mamba or only attention, never both (docs/hymba.md, "Recall at cpu scale").
RECALL = {
    "tasks": ByScale(
        cpu=Tasks(names=("mqar",), train_length=64, phases=(1.0,), eval_lengths=(64, 128), pairs=4, eval_examples=500),
        gpu=Tasks(names=("mqar",), train_length=256, eval_lengths=(256, 512), pairs=64, eval_examples=1000),
        paper=Tasks(names=("mqar",), train_length=256, eval_lengths=(256, 1024), pairs=64, eval_examples=3000),
    ),
    "evaluation.documents": 0,
    "evaluation.choice": ByScale(paper=None),
    "training.steps": ByScale(cpu=600, gpu=4000, paper=25_000),
    "data.sequence_length": ByScale(cpu=64),
    "data.tokenizer": ByScale(cpu="byte"),
    "optimizer.learning_rate": ByScale(cpu=5e-3),
}
PARTS = {"text": {}, "mqar": RECALL}
COMMONSENSE = Column("commonsense, %", "eval.choice.questions", 2, "higher", 100, part="text")
PASSAGES = Column("recall, %", "eval.choice.passages", 2, "higher", 100, part="text")
CACHE = Column("cache of 8k, MB", "cache_mb.published", 2, part="text")
COLUMNS = [
    Column("bits/byte", "eval.none.bpb", part="text"),
    Column("MQAR, %", "eval.tasks.mqar.{trained}.token", 1, "higher", 100, part="mqar"),
    Column("MQAR, longer, %", "eval.tasks.mqar.{beyond}.token", 1, "higher", 100, part="mqar"),
    CACHE,
    COMMONSENSE,
    PASSAGES,
]
MINUTES = {"cpu": 2.5, "gpu": 8, "paper": 2900}
NOTES = [
    "MQAR: multi-query associative recall, the share of values that are right; trained up to one length, and at a longer one. The paper has no such "
    "column: it stands for its recall (SQuAD completion and SWDE) where models are small. Cache: the paper's count, 16 bits, 8,000 tokens.",
    "The paper's commonsense is the mean of eight tasks, its recall that of SQuAD completion and SWDE: ours are asked at paper scale, commonsense without "
    "TruthfulQA; elsewhere they have a value where evaluation.choice names files.",
]


def printed(commonsense: float, passages: float, megabytes: float) -> dict[str, float]:
    return {COMMONSENSE.key: commonsense, PASSAGES.key: passages, CACHE.key: megabytes}


table(
    "hymba/components",
    summary="from Mamba alone to the whole model, one change at a time",
    paper=f"{PAPER}, table 10",
    paper_rows=13,
    rows=[
        Row("mamba", MAMBA, printed(42.98, 19.23, 1.87)),
        Row("heads_4", few_heads(1, 2, 4), printed(44.20, 44.65, 99.09), core=False, note="a quarter of the whole model's heads"),
        Row("heads_8", few_heads(2, 4, 8), printed(44.95, 52.53, 197.39), core=False),
        Row("heads_16", few_heads(4, 8, 16), printed(45.08, 56.46, 394.00), core=False),
        Row("grouped", FULL | UNSHARED | NO_META, printed(45.19, 49.90, 148.24), core=False),
        Row("attention", LLAMA, printed(44.08, 39.98, 414.72), note="attention alone (Llama)"),
        Row("windows", WINDOWS | UNSHARED | NO_META, printed(44.42, 29.78, 5.51)),
        Row("windows_and_full", UNSHARED | NO_META, printed(44.56, 48.79, 41.19)),
        Row("shared", NO_META, printed(45.16, 48.04, 39.42)),
        Row(
            "attention_compressed",
            COMPRESSED,
            printed(43.60, 28.18, 28.98),
            core=False,
            note="attention alone, its cache made as small",
        ),
        Row("concat", NO_META | {"model.hybrid.fusion": "concat"}, printed(44.56, 48.94, 39.42), core=False),
        Row("mamba_meta", MAMBA | {"model.hybrid.prefix_tokens": ByScale(8, 64, 128)}, printed(44.01, 19.34, 1.87), core=False),
        Row("whole", {}, printed(45.53, 51.79, 40.01)),
    ],
    columns=COLUMNS,
    baseline="whole",
    minutes=MINUTES,
    parts=PARTS,
    fill=LENGTHS,
    notes=[
        *NOTES,
        "Were it as in the paper: heads beside Mamba raise recall, the first ones most; windows in all layers take most of it away and a few full layers "
        "bring it back; sharing costs nothing and saves cache; compressing the cache hurts attention alone far more; concat is no better than the mean; "
        "meta tokens help the whole model's recall and Mamba's commonsense.",
        "Seen at cpu scale with seeds 0 to 2 (core rows, commit d058baa; docs/hymba.md): Mamba alone falls short and windows lose recall in longer rows, as in the paper; meta tokens lean towards "
        "better text; but attention alone recalls more than the whole.",
    ],
)(base)


def of_components(name: str, row: str, **options) -> Row:
    return Row(name, of=f"hymba/components/{row}", **options)


def large(name: str, published: dict[str, float], **options) -> Row:
    """A model of 1.5B parameters, of experiments/hymba_sizes.py."""
    missing = "a model of its size"
    return Row(
        name,
        of=f"hymba/{name}",
        published=published,
        lacks=ByScale(cpu=missing, gpu=missing),
        parts=("text",),
        core=False,
        **options,
    )


table(
    "hymba/roadmap",
    summary="the steps from Llama and Mamba to Hymba",
    paper=f"{PAPER}, table 1",
    paper_rows=9,
    rows=[
        of_components("transformer", "attention", published=printed(44.08, 39.98, 414.7)),
        of_components("mamba", "mamba", published=printed(42.98, 19.23, 1.9)),
        Row(
            "sequential",
            SAMBA | FULL | {"model.layers": ByScale(cpu=6, gpu=12, paper=16)},
            printed(44.07, 45.16, 156.3),
            note="layers of Mamba and of attention in turn; their number is not stated",
        ),
        of_components("parallel", "grouped", published=printed(45.19, 49.90, 148.2)),
        of_components("windows_and_full", "windows_and_full", published=printed(44.56, 48.79, 41.2), core=False),
        of_components("shared", "shared", published=printed(45.16, 48.04, 39.4)),
        of_components("meta_tokens", "whole", published=printed(45.59, 51.79, 40.0)),
        large("1.5b", printed(60.56, 64.15, 78.6)),
        large("1.5b_8k", printed(60.64, 68.79, 78.6), note="the same, its last 100B tokens in rows of 8,192"),
    ],
    columns=COLUMNS,
    baseline="parallel",
    minutes=MINUTES,
    parts=PARTS,
    fill=LENGTHS,
    notes=[
        *NOTES,
        "Were it as in the paper: side by side is better than in turn on both, and better than either alone.",
        "The paper's last two rows are the 1.5B model after 1.5T tokens; here after the public ones of its data alone.",
    ],
)(base)


table(
    "hymba/meta_tokens",
    summary="how many meta tokens",
    paper=f"{PAPER}, section 2.4 and table 10",
    rows=[
        of_components("none", "shared"),
        Row("few", {"model.hybrid.prefix_tokens": ByScale(2, 16, 32)}, core=False),
        of_components("whole", "whole"),
        Row("many", {"model.hybrid.prefix_tokens": ByScale(32, 256, 256)}),
        of_components("mamba", "mamba"),
        of_components("mamba_meta", "mamba_meta"),
    ],
    columns=COLUMNS[:4],
    baseline="none",
    minutes=MINUTES,
    parts=PARTS,
    fill=LENGTHS,
    notes=[
        "Were it as in the paper: meta tokens raise the whole model's recall (48.04 to 51.79) more than its commonsense (45.16 to 45.53), and with Mamba alone "
        "commonsense (42.98 to 44.01) but not recall (19.23 to 19.34). How many of them is not varied there.",
        "Seen at cpu scale with seeds 0 to 2 (commit 2b840e4; docs/hymba.md): the more meta tokens, the better the text, clear of zero from 8 on; recall does not rise, "
        "and Mamba alone gains nothing.",
    ],
)(base)


table(
    "hymba/branch_norms",
    summary="norms of the two branches before they are added",
    paper=f"{PAPER}, section 2.1 and figure 12",
    rows=[
        of_components("scaled", "whole"),
        Row("plain", {"model.hybrid.branch_norm": "plain"}, note="normalised, without the learned scales"),
        Row("none", {"model.hybrid.branch_norm": "none"}),
        Row("no_inner_norms", {"model.hybrid.inner_norms": False}, core=False, note="of step size, B and C"),
        Row("mamba_steps", {"model.hybrid.dt_init": "mamba"}, core=False, note="initial step sizes of Mamba's own code"),
    ],
    columns=COLUMNS[:4],
    baseline="scaled",
    minutes=MINUTES,
    parts=PARTS,
    fill=LENGTHS,
    notes=[
        "The paper has no such table. What it says would predict: Mamba's output is the larger one in every layer, so that without norms it drowns attention "
        "and recall suffers; the learned scales differ between layers, so that plain norms lose a little.",
    ],
)(base)


def of_task(title: str, path: str, better: str = "higher") -> Column:
    return Column(title, path, 2, better, 100 if better == "higher" else 1, part="text", scales=("paper",))


EACH_TASK = [
    of_task("WikiText, perplexity", f"{IN_PRINT}wikitext", "lower"),
    of_task("LAMBADA, perplexity", f"{IN_PRINT}lambada", "lower"),
    *(
        of_task(f"{title}, %", f"eval.choice.{name}.{score}")
        for title, name, score in (
            ("SWDE", "swde", "acc"),
            ("SQuAD-C", "squad_completion", "acc"),
            ("LAMBADA", "lambada", "acc"),
            ("PIQA", "piqa", "acc"),
            ("ARC-C", "arc_challenge", "acc"),
            ("ARC-E", "arc_easy", "acc"),
            ("HellaSwag", "hellaswag", "acc_norm"),
            ("WinoGrande", "winogrande", "acc"),
        )
    ),
    of_task("TruthfulQA, %", f"{IN_PRINT}truthfulqa"),
    of_task("SIQA, %", "eval.choice.social_iqa.acc"),
]


def printed_tasks(*values: float) -> dict[str, float]:
    """Columns for the mean of the commonsense tasks, the mean of the passages, and each task."""
    return {column.key: value for column, value in zip([COMMONSENSE, PASSAGES, *EACH_TASK], values, strict=True)}


FEED_FORWARD = {"model.mlp_width": ByScale(cpu=128, gpu=1344, paper=4096), "model.layers": ByScale(cpu=4, gpu=9, paper=12)}
MAMBA_2 = {"model.hybrid.ssm": "mamba2", "model.hybrid.state": ByScale(cpu=16, gpu=64, paper=128)}


table(
    "hymba/architectures",
    summary="the same recipe for seven architectures",
    paper=f"{PAPER}, table 9 (300M, FineWeb)",
    paper_rows=5,
    rows=[
        of_components(
            "mamba",
            "mamba",
            published=printed_tasks(
                42.98, 19.23, 30.78, 19.95, 17.14, 21.31, 38.95, 69.64, 24.91, 50.67, 44.95, 51.70, 23.86, 39.20
            ),
        ),
        Row(
            "mamba_ffn",
            MAMBA | FEED_FORWARD,
            printed_tasks(42.82, 15.33, 33.41, 23.64, 13.10, 17.56, 36.37, 69.26, 25.00, 50.34, 44.08, 51.78, 26.23, 39.53),
            core=False,
        ),
        Row("mamba2", MAMBA | MAMBA_2),
        Row("mamba2_ffn", MAMBA | MAMBA_2 | FEED_FORWARD, core=False),
        of_components(
            "llama",
            "attention",
            published=printed_tasks(
                44.08, 39.98, 30.04, 20.53, 57.86, 22.10, 40.15, 70.29, 24.83, 50.24, 45.69, 52.64, 28.97, 39.66
            ),
        ),
        Row(
            "samba",
            SAMBA | {"model.layers": ByScale(cpu=6, gpu=12, paper=16)},
            printed_tasks(44.02, 31.01, 31.41, 19.75, 22.14, 39.88, 40.59, 69.86, 25.76, 49.79, 46.45, 52.49, 27.27, 39.92),
            note="Mamba and attention in a window, each followed by a feed-forward network",
        ),
        of_components(
            "hymba",
            "whole",
            published=printed_tasks(
                45.53, 51.79, 28.53, 15.45, 58.33, 45.24, 44.67, 70.73, 26.28, 53.20, 48.23, 53.35, 27.87, 39.92
            ),
        ),
    ],
    columns=[*COLUMNS, *EACH_TASK],
    baseline="hymba",
    minutes=MINUTES,
    parts=PARTS,
    fill=LENGTHS,
    notes=[
        *NOTES,
        "Were it as in the paper: Hymba has the best loss, commonsense and recall; attention alone recalls next best at 300M; feed-forward networks in Mamba's place "
        "cost it recall.",
        "Mamba-2 is in the paper at 1B alone, beside four others: hymba/architectures_1b.",
    ],
)(base)


# ---------------------------------------------------------------------------------------------------- longer rows

LONGER = {
    "data.sequence_length": ByScale(256, 2048, 8192),
    "data.batch_size": ByScale(4, 8, 64),
    "training.steps": ByScale(100, 1000, 10_000),
}
LONGER_RECALL = {
    "tasks.train_length": ByScale(128, 1024, 4096),
    "tasks.eval_lengths": ByScale((128, 256), (1024, 4096), (4096, 16_384)),
    "tasks.pairs": ByScale(8, 256, 1024),
    "data.sequence_length": ByScale(cpu=128),
    "training.steps": ByScale(cpu=200),
}


table(
    "hymba/long_context",
    summary="training continues in longer rows, with rotary positions unchanged and stretched",
    paper=f"{PAPER}, section 2.5 (a changed rotary base for the last 100B tokens, in rows of 8,192)",
    rows=[
        Row("rope", LONGER),
        Row(
            "ntk",
            LONGER
            | {
                "model.position": "ntk",
                "model.rope_factor": ByScale(3.0, 7.0, 15.0),
                "model.rope_original_length": ByScale(128, 512, 1024),
            },
            note="NTK, as in the released checkpoint: factor 2 x growth of the row - 1",
        ),
    ],
    columns=[column for column in COLUMNS[:3]],
    baseline="rope",
    minutes=MINUTES,
    parts={
        "text": {"init.from": "hymba/components/whole/text"},
        "mqar": RECALL | {"init.from": "hymba/components/whole/mqar"} | LONGER_RECALL,
    },
    fill={"trained": ByScale("128", "1024", "4096"), "beyond": ByScale("256", "4096", "16384")},
    notes=[
        "Each starts from the whole model of hymba/components. The paper's table 1: recall 64.15 before and 68.79 after, general tasks 60.56 and 60.64.",
        "Were it as in the paper, which has no row without the change: stretched positions are no worse at the new length, and better beyond it.",
    ],
)(base)
