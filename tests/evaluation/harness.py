"""Makes tests/goldens/choice_harness.json with the lm-evaluation-harness (pip install lm_eval==0.4.13; no download, no model):
python tests/evaluation/harness.py. Questions are ours, with the fields of the published data sets; model replies are synthetic.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

LETTERS = "ABCDE"
ARC = [("Which of these melts in the sun?", ["ice", "a stone", "sand"], "A"), ("What do plants need?", ["salt", "light and water"], "B"),
       ("Which one is a planet?", ["the Moon", "Sirius", "Mars", "a comet"], "C")]  # fmt: skip


def multiple(question):
    return [
        {question: text, "choices": {"text": choices, "label": list(LETTERS[: len(choices)])}, "answerKey": key}
        for text, choices, key in ARC
    ]


FIVE = ["under a bed", "a shelf", "the sea", "on a tree", "nowhere"]
RECORDS = {
    "arc_easy": multiple("question"),
    "openbookqa": multiple("question_stem"),
    "commonsense_qa": [
        {"question": f" Where does one put {what}? ", "choices": {"text": FIVE, "label": list(LETTERS)}, "answerKey": key}
        for what, key in (("a book", "B"), ("a fish", "C"), ("a nest", "D"))
    ],
    "hellaswag": [
        {"activity_label": "Baking", "ctx_a": "A man opens an oven.", "ctx_b": "he", "label": "1",
         "endings": ["swims [substeps] away.", "takes out a  loaf.", "sings.", "is a loaf."]},
        {"activity_label": "Rowing", "ctx_a": "Two boats lie [title] in the harbour.", "ctx_b": "", "label": "0",
         "endings": ["They are tied to the wall.", "They fly.", "They [x] read.", "One eats the other."]},
        {"activity_label": "Typing", "ctx_a": "A woman sits at a desk.", "ctx_b": "she", "label": "3",
         "endings": ["dives.", "melts.", "barks at it.", "begins to type a long letter."]},
    ],
    "lambada": [{"text": "they sat down and opened the old book"}, {"text": "one day the rain stopped"}, {"text": "he gave her the letter"}],
    "mmlu_continuation": [
        {"question": "What is two and two? ", "choices": ["three", "four", "five", "twenty-two"], "answer": 1, "subject": "anatomy"},
        {"question": "Which is even?", "choices": ["1", "3", "8", "9"], "answer": 2, "subject": "anatomy"},
        {"question": "Which is a prime?", "choices": ["4", "6", "8", "13"], "answer": 3, "subject": "anatomy"},
    ],
    "piqa": [
        {"goal": "To dry a shirt,", "sol1": "hang it in the wind.", "sol2": "hang it in the lake.", "label": 0},
        {"goal": "To cut bread,", "sol1": "use a spoon.", "sol2": "use a knife with teeth.", "label": 1},
        {"goal": "To keep soup warm,", "sol1": "put a lid on the pot.", "sol2": "pour it out.", "label": 0},
    ],
    "social_iqa": [
        {"context": "Ana lent Bo her bike.", "question": "How does Bo feel?", "answerA": "angry", "answerB": "thankful", "answerC": "cold", "label": "2"},
        {"context": "Cy lost a game.", "question": "What will Cy do next?", "answerA": "practise", "answerB": "melt", "answerC": "fly", "label": "1"},
        {"context": "Di told a joke.", "question": "Why?", "answerA": "to sleep", "answerB": "to eat", "answerC": "to make them laugh", "label": "3"},
    ],
    "winogrande": [
        {"sentence": "The cup did not fit the box because _ was too large.", "option1": "the cup", "option2": "the box", "answer": "1"},
        {"sentence": "Eva thanked Flo, for _ had helped her.", "option1": "Eva", "option2": "Flo", "answer": "2"},
        {"sentence": "The rope broke under the load since _ was heavy.", "option1": "the rope", "option2": "the load", "answer": "2"},
    ],
}  # fmt: skip
FILES = {  # where the harness keeps its tasks
    "arc_easy": "arc/arc_easy.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "commonsense_qa": "commonsense_qa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml", "lambada": "lambada/lambada_openai.yaml",
    "mmlu_continuation": "mmlu/continuation/mmlu_anatomy.yaml", "piqa": "piqa/piqa.yaml", "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
}  # fmt: skip
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
    config |= {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {k: str(v) for k, v in paths.items()}}, "test_split": "test",
        "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": shots,
    }  # fmt: skip
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
    path = Path(__file__).parents[1] / "goldens" / "choice_harness.json"
    path.write_text(json.dumps(made, indent=1) + "\n")
