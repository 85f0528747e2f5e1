"""Makes tests/goldens/choice_harness.json again with the lm-evaluation-harness, from the records in it:
python tests/evaluation/harness.py (pip install lm_eval==0.4.13; no download, no model).

The records are ours, with the fields of the published data sets. Model replies are synthetic.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens" / "choice_harness.json"
RECORDS = {kind: sample["records"] for kind, sample in json.loads(GOLDENS.read_text())["tasks"].items()}
FILES = {kind: f"{kind}/{kind}.yaml" for kind in ("openbookqa", "hellaswag", "piqa")}  # where the harness keeps its tasks
FILES |= {kind: f"{kind}/default.yaml" for kind in ("commonsense_qa", "winogrande")}
FILES |= {"arc_easy": "arc/arc_easy.yaml", "lambada": "lambada/lambada_openai.yaml", "social_iqa": "siqa/siqa.yaml"}
FILES["mmlu_continuation"] = "mmlu/continuation/mmlu_anatomy.yaml"
WORDS = ["a", "b", " ", " a", " b", "ab", "\n", "a "]
PAIRS = [("ab", " a"), ("a ", "b"), ("b\n", " ab"), ("a b", " b")]


def harness_task(kind, records, shots, folder):
    """The harness' own task on local files: all records to be scored, the first two to be shown."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / FILES[kind], resolve_func=True)
    paths = {"test": folder / f"{kind}.jsonl", "train": folder / f"{kind}.train.jsonl"}
    for path, part in zip(paths.values(), (records, records[:2]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    for name in ("dataset_name", "training_split", "validation_split", "should_decontaminate", "doc_to_decontamination_query"):
        config.pop(name, None)
    files = {split: str(path) for split, path in paths.items()}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    config |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": shots}
    task = ConfigurableTask(config=config)
    task.build_all_requests(rank=0, world_size=1)
    return task


def sample(kind, rng, folder):
    records = RECORDS[kind]
    task, shown = (harness_task(kind, records, shots, folder) for shots in (0, 2))
    asked, two = ([[] for _ in records] for _ in range(2))
    for made, of in ((task, asked), (shown, two)):
        for request in made.instances:
            of[request.doc_id].append(list(request.args))
    replies = [
        [[float(x), bool(g)] for x, g in zip(-rng.uniform(2, 9, len(of)), rng.integers(2, size=len(of)), strict=True)]
        for of in asked
    ]
    found = [
        task.process_results(doc, [tuple(r) for r in reply] if len(reply) > 1 else [tuple(reply[0])])
        for doc, reply in zip(task.eval_docs, replies, strict=True)
    ]
    metrics = {name: float(np.mean([of[name] for of in found])) for name in ("acc", "acc_norm") if name in found[0]}
    return {
        "records": records,
        "requests": asked,
        "replies": replies,
        "metrics": metrics,
        "two_shots": [context for context, _ in two[2]],
    }


def pairs():
    from lm_eval.api.model import TemplateLM

    class Encoder:
        backend = "causal"

        def tok_encode(self, text, **_):
            ids = []
            while text:
                word = max((w for w in WORDS if text.startswith(w)), key=len)
                ids.append(WORDS.index(word))
                text = text[len(word) :]
            return ids

    return [[context, answer, *TemplateLM._encode_pair(Encoder(), context, answer)] for context, answer in PAIRS]


def frozen_sample(folder):
    """What the golden file holds, JSON-ready; `folder` takes the files of records."""
    import lm_eval

    rng = np.random.default_rng(0)
    tasks = {kind: sample(kind, rng, folder) for kind in RECORDS}
    return {"lm_eval": lm_eval.__version__, "tasks": tasks, "pairs": {"words": WORDS, "cases": pairs()}}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = frozen_sample(Path(folder))
    GOLDENS.write_text(json.dumps(made, indent=1) + "\n")
