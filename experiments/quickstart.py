"""The quickstart: three ways to spend the same budget on real text, side by side."""

from dataclasses import replace

from metajax.config import Config, Data, Evaluation, Metadata, MetaTokens, Model, Optimizer, Runtime, Training
from metajax.models.presets import gpt2_small
from metajax.registry import Column, Row, table

PAPER = "first look: Learned Meta-Tokens and Beyond URLs against a plain model"


@table(
    "quickstart",
    summary="plain, learned meta-tokens and prepended metadata on the docstrings of installed Python packages",
    paper=PAPER,
    rows=[
        Row("plain", {}),
        Row("meta_tokens", {"meta_tokens": MetaTokens(rate=0.1, attention="gathered")}),
        Row("metadata", {"metadata.position": "prepend"}),
    ],
    columns=[
        Column("bits/byte, no metadata", "eval.none.bpb"),
        Column("empty pair", "eval.empty.bpb"),
        Column("right metadata", "eval.right.bpb"),
        Column("shuffled metadata", "eval.shuffled.bpb"),
    ],
    baseline="plain",
    minutes={"cpu": 2, "gpu": 5, "paper": 105},
    notes=[
        "Bits per byte of body text on validation modules (lower is better); metadata and meta-tokens are context and never counted.",
        "All rows have the same row length, batch and steps, so meta-tokens and metadata are paid for out of the same budget.",
        "Only the row named metadata saw metadata in training, and an empty pair of delimiters before every tenth document; for the "
        "others both are an unknown prefix. Shuffled metadata is another document's: what it gains is not information about the text.",
    ],
)
def quickstart(scale: str) -> Config:
    metadata = Metadata(position="none", template="{topic} {module}")
    evaluation = Evaluation(conditions=("none", "empty", "right", "shuffled"), documents=240)
    if scale == "cpu":  # 0.4M tokens; batch and learning rate were chosen only on the plain row
        return Config(
            name="quickstart",
            data=Data(sources=("pydocs",), tokenizer="bpe:2048", sequence_length=256, batch_size=4),
            model=Model(layers=4, width=128, heads=4, mlp_width=512, position="rope"),
            metadata=metadata,
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20),
            training=Training(steps=400),
            evaluation=evaluation,
            runtime=Runtime(save_every=100, log_every=20),
        )
    if scale == "paper":
        return _paper(evaluation)
    return Config(
        name="quickstart",
        data=Data(sources=("pydocs",), tokenizer="bpe:8192", sequence_length=512, batch_size=64),
        model=Model(layers=8, width=512, heads=8, mlp_width=2048, position="rope", compute_dtype="bfloat16"),
        metadata=metadata,
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50),
        training=Training(steps=400),
        evaluation=evaluation,
        runtime=Runtime(save_every=200, unroll=1),
    )


def _paper(evaluation: Evaluation) -> Config:
    """GPT-2 small on 10B tokens of C4 with its URLs, for a slice of 16 TPU v5e or more.

    Data folder (--data-dir): c4 prepared by TFDS as ArrayRecord, and gpt2/ with vocab.bpe and encoder.json. The minutes
    above are an estimate: 7.9e18 training FLOPs on 16 chips at 40 % of their peak.
    """
    return Config(
        name="quickstart",
        data=Data(sources=("tfds:c4/en",), tokenizer="gpt2:gpt2", sequence_length=1024, batch_size=480, validation_share=0.0005),
        model=gpt2_small(position="rope", compute_dtype="bfloat16"),
        metadata=Metadata(position="none", template="{url}"),
        optimizer=Optimizer(learning_rate=6e-4, warmup_steps=700),
        training=Training(steps=20_000),
        evaluation=replace(evaluation, documents=5_000),
        runtime=Runtime(save_every=500, log_every=20, unroll=1, remat="full"),
    )
