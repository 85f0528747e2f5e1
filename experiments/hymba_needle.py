"""Hymba (arXiv 2411.13676), figure 10: a needle in a haystack, for attention, Mamba-2 and the hybrid, on short and long rows."""

from dataclasses import replace

from metajax.config import Config, Tasks, hymba_ntk_factor
from metajax.core.fields import override
from metajax.registry import SCALES, Base, ByScale, Column, Published, Row, at_scale, table

from .hymba import LLAMA, MAMBA, MAMBA_2, PAPER, base
from .hymba_sizes import LLAMA_1B, MAMBA_2_ALONE, base_1b

# Positions of a row in pre-training. Fine-tuning has four times as many, the final test sixteen times.
SHORT = {"cpu": 32, "gpu": 256, "paper": 1024}


def longer(times: int) -> ByScale:
    return ByScale(**{scale: str(times * length) for scale, length in SHORT.items()})


# Changes of each model at the small scales, and at paper scale.
MODELS = {"hymba": ({}, {}), "llama": (LLAMA, LLAMA_1B), "mamba2": (MAMBA | MAMBA_2, MAMBA_2_ALONE)}


def models(name: str, base: Base) -> dict[str, ByScale]:
    """The model of that name, with a base's sizes and positions."""
    small, large = MODELS[name]
    changes = {scale: at_scale(large if scale == "paper" else small, scale) for scale in SCALES}
    return {"model": ByScale(**{scale: override(base(scale), changed).model for scale, changed in changes.items()})}


def pretrained(scale: str) -> Config:
    """Section 3.3: rows of 1,024 tokens; 1B parameters and their recipe as in hymba/architectures_1b."""
    config = base_1b(scale) if scale == "paper" else base(scale)
    rows = config.data.batch_size * config.data.sequence_length // SHORT[scale]
    tokenizer = config.data.tokenizer if scale == "paper" else f"{config.data.tokenizer}+tasks"
    return replace(config, data=replace(config.data, sequence_length=SHORT[scale], batch_size=rows, tokenizer=tokenizer))


def fine_tuned(scale: str) -> Config:
    """Rows four times as long, with rotary positions stretched to fit."""
    config, short = pretrained(scale), SHORT[scale]
    trained = 4 * short
    return replace(
        config,
        data=replace(config.data, sequence_length=trained, batch_size=config.data.batch_size // 4),
        model=replace(config.model, position="ntk", rope_original_length=short, rope_factor=hymba_ntk_factor(trained, short)),
        tasks=Tasks(
            names=("needle",),
            train_length=trained,
            eval_lengths=(short, trained, 16 * short),
            eval_examples=200 if scale == "cpu" else 1000,
        ),
        training=replace(config.training, steps={"cpu": 300, "gpu": 2000, "paper": 2000}[scale]),
        evaluation=replace(config.evaluation, documents=0, choice=None),
    )


table(
    "hymba/needle_pretrain",
    summary="pre-training in short rows of what looks for needles",
    paper=f"{PAPER}, section 3.3",
    rows=[Row(name, models(name, pretrained)) for name in MODELS],
    columns=[Column("bits/byte", "eval.none.bpb")],
    baseline="hymba",
    minutes={"cpu": 1.5, "gpu": 8, "paper": 9_000},
)(pretrained)


def found(title: str, length: str, depth: int | None = None) -> Column:
    """Column of the share of needles found: at all depths, or in one tenth of the text."""
    where = f"analyses.needle.{{{length}}}" + ("" if depth is None else f".depths.{depth}")
    return Column(f"{title}, %", f"{where}.exact", 1, "higher", 100)


COLUMNS = [
    found("as long as trained", "trained"),
    found("4 times", "beyond"),
    *(found(f"{word} tenth of 4 times", "beyond", depth) for word, depth in {"first": 0, "middle": 5, "last": 9}.items()),
]


table(
    "hymba/needle",
    summary="a needle anywhere in a text, after training on texts a quarter as long",
    paper=f"{PAPER}, figure 10",
    paper_rows=3,
    rows=[
        Row(
            name,
            models(name, fine_tuned) | {"init.from": f"hymba/needle_pretrain/{name}"},
            {COLUMNS[1].key: Published(None, "in a figure alone")},
        )
        for name in MODELS
    ],
    columns=COLUMNS,
    baseline="hymba",
    minutes={"cpu": 2.5, "gpu": 8, "paper": 120},
    fill={"trained": longer(4), "beyond": longer(16)},
    analyses=["needle"],
    notes=[
        "Pre-trained in short rows, fine-tuned on needles in rows four times as long with stretched rotary positions, asked in texts of up to sixteen times the first. "
        "Prompts and steps of fine-tuning are not stated; guessing finds one needle in eight.",
        "Were it as in the paper: Hymba finds most, Mamba-2 beyond its length only what stands at the end, attention alone nothing there and little in the middle.",
    ],
)(fine_tuned)
