"""A sample of training rows of each family compared with goldens/frozen_rows.npz: an unchanged config gives the same rows.

`python -m tests.data.test_frozen_rows` writes the file again; rows may only change together with the config version.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metajax.config import Config, Data, Dpo, Metadata, MetaTokens, Tasks, Training
from metajax.core.fields import override
from metajax.data.pipeline import Paths, open_corpora, training_rows
from metajax.evaluation.tasks import task_batches
from metajax.evaluation.validation import validation
from tests.conftest import corpus_rows
from tests.training.test_dpo import pairs_fields, records

GOLDENS = Path(__file__).parents[1] / "goldens" / "frozen_rows.npz"
TASKS = Tasks(train_length=160, eval_lengths=(160,), eval_examples=2)
TOPIC = Metadata(template="{topic}", keep=0.7)
FAMILIES = {
    "plain": {},
    "plain, attending across documents": {"data.packing": "best_fit", "data.attend_across_documents": True},
    "switch": {"data.switch": {"step": 1, "metadata": "none", "unseen": 0.3}, "metadata": TOPIC},
    "meta-tokens": {"meta_tokens": MetaTokens(rate=0.2)},
    "meta-tokens added": {"meta_tokens": MetaTokens(rate=0.2, length="added", inject="periodic", loss="real_only")},
    "prepend": {"metadata": TOPIC},
    "prepend, inside": {"metadata": Metadata(template="{topic}", keep=1.0, bos_eos="inside", loss_weights=(0.5, 1.0))},
    "append": {"metadata": Metadata(template="{topic}", keep=0.7, position="append")},
    "append, inside, shuffled": {
        "metadata": Metadata(template="{topic}", position="append", bos_eos="inside", assigned="shuffled")
    },
    "both": {"metadata": Metadata(template="{topic}", position="both", appended="{module}"), "data.packing": "new_document"},
    "both, learnable": {"metadata": Metadata(tokens=3, position="both"), "meta_tokens": MetaTokens()},
    "tasks": {"tasks": replace(TASKS, names=(*TASKS.names, "needle", "mqar")), "data.sequence_length": 192},
    "tasks, random pauses": {
        "tasks": replace(TASKS, placement="random"),
        "data.sequence_length": 192,
        "meta_tokens": MetaTokens(),
    },
}


def sample(family, home):
    """{array: values} of four training rows, and of validation rows or test examples."""
    corpus, pairs = home / "corpus.jsonl", home / "pairs.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows()))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in records()))
    data = Data(
        sources=(f"jsonl:{corpus}?origin=module",), tokenizer="byte", sequence_length=64, batch_size=4, validation_share=0.2
    )
    if family == "pairs":
        config = override(Config(name="frozen", data=data), pairs_fields(pairs) | {"dpo": Dpo(), "init.from": "parent"})
    else:
        config = override(Config(name="frozen", data=data, training=Training(steps=40)), FAMILIES[family])
    corpora = open_corpora(config, Paths(cache=home / "cache"))
    rows = [training_rows(corpora)[n] for n in (0, 1, 5, 77)]
    if config.tasks is not None:
        rows += [
            {f"test {name}": value[0] for name, value in task_batches(corpora, task, 160, 1)[0].items()}
            for task in config.tasks.names
        ]
    else:
        condition = "none" if config.metadata is None else "shuffled" if config.metadata.tokens == 0 else "right"
        rows += [{f"evaluation {name}": value[0] for name, value in validation(corpora, condition).batches[0].items()}]
    return {f"{n} {name}": value for n, row in enumerate(rows) for name, value in row.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "pairs"])
def test_rows_equal_the_frozen_ones(family, tmp_path):
    with np.load(GOLDENS) as golden:
        known = {name.split(": ")[1]: golden[name] for name in golden.files if name.startswith(f"{family}: ")}
    now = sample(family, tmp_path)
    assert now.keys() == known.keys()
    for name, values in known.items():
        assert now[name].dtype == values.dtype, name
        np.testing.assert_array_equal(now[name], values, err_msg=name)


if __name__ == "__main__":
    found = {}
    for each in (*FAMILIES, "pairs"):
        with tempfile.TemporaryDirectory() as folder:
            found |= {f"{each}: {name}": values for name, values in sample(each, Path(folder)).items()}
    np.savez_compressed(GOLDENS, **found)
    sys.stdout.write(f"{len(found)} arrays in {GOLDENS}\n")
