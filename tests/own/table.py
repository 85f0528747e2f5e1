"""A table whose rows use every other file of this folder."""

from metajax.config import Config, Data, Evaluation, Hybrid, Metadata, Model, Optimizer, Tasks, Training
from metajax.registry import Column, Row, table

rows = [
    Row(
        "text",
        {"metadata": Metadata(template="{parity}", position="middle", keep=1.0), "evaluation.conditions": ("right", "none")},
    ),
    Row("task", {"tasks": Tasks(("first_word",), 96, eval_lengths=(96,), eval_examples=4), "evaluation.documents": 0}),
]


@table("own", summary="", rows=rows, columns=[Column("bits/byte", "eval.none.bpb")], baseline=None, minutes={"cpu": 1})
def own(scale):
    return Config(
        name="own",
        data=Data(sources=("counting:60",), tokenizer="byte", sequence_length=96, batch_size=2, validation_share=0.2),
        model=Model(2, 16, 2, mlp_width=16, bias=False, position="slow", hybrid=Hybrid(ssm="shift", prefix_tokens=3)),
        optimizer=Optimizer("signs", warmup_steps=1),
        training=Training(steps=2, objective="doubled"),
        evaluation=Evaluation(documents=4, sample_tokens=0),
    )
