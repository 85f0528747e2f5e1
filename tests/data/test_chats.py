"""Fine-tuning and preferences on chats: the target ids in rows are those of the model's tokenizer, with its control tokens."""

import json

import numpy as np
import pytest

from metajax.cli.main import main
from metajax.config import Dpo, Metadata
from metajax.data.pipeline import open_corpora, training_rows
from metajax.experiment import run_experiment
from metajax.inference.generation import Rows
from tests.data.tokenizer_folders import write

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
pytestmark = pytest.mark.fault(4)


def records():
    return [
        {
            "prompt": TURN.format(f"say {n}"),
            "chosen": f"<think>{n}</think> {n}!<|im_end|>\n{TURN.format('more')}{n + 1}!",
            "rejected": f"{n}?<|im_end|>\n",
            "id": f"o{n}",
        }
        for n in range(12)
    ]


@pytest.fixture
def chat_config(tiny_config, tmp_path):
    """chat_config(markers, **changes) -> Config of chats after their prompts."""
    write(tmp_path / "model", "chat")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records()))

    def made(markers, **changes):
        base = {
            "data.sources": (f"jsonl:{tmp_path}/chat.jsonl?text=chosen&origin=id{'&markers=true' * markers}",),
            "data.tokenizer": f"hf:{tmp_path}/model/tokenizer.json",
            "data.sequence_length": 192,
            "data.packing": "best_fit",
            "evaluation.conditions": ("right",),
            "metadata": Metadata(template="{prompt}", wrap="plain", keep=1.0),
            "evaluation.sample_tokens": 4,
        }
        return tiny_config(**(base | changes))

    return made


def segments(corpora):
    """(inputs, targets with a loss) of every segment of the training rows of one epoch."""
    rows, found = training_rows(corpora, note=lambda _: None), []
    for n in range(12):
        row = rows[n]
        for segment in range(1, row["segment_ids"].max() + 1):
            there = row["segment_ids"] == segment
            asked = there & (row["loss_weights"] > 0)
            found.append((row["tokens"][there].tolist(), row["targets"][asked].tolist()))
    return found


@pytest.mark.parametrize("dpo", [None, Dpo()])
def test_target_ids_are_those_of_the_models_tokenizer(chat_config, paths, tmp_path, dpo):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    config = chat_config(True, **({"dpo": dpo, "init.from": "parent"} if dpo else {}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    corpora = open_corpora(config, paths)
    vocabulary, wanted = corpora.tokenizer.vocabulary, []
    for row in records():
        for side in ("chosen", "rejected") if dpo else ("chosen",):
            prompt, answer = (theirs.encode(row[name], add_special_tokens=False) for name in ("prompt", side))
            assert prompt + answer == theirs.encode(row["prompt"] + row[side], add_special_tokens=False)
            wanted.append(([vocabulary.bos, *prompt, *answer], [*answer, vocabulary.eos]))
    found = segments(corpora)
    assert found
    assert all(segment in wanted for segment in found)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == vocabulary.eos == 257


def test_without_markers_no_control_token_is_a_target(chat_config, paths):
    corpora = open_corpora(chat_config(False), paths)
    control = {*corpora.tokenizer.control.values()}
    for inputs, targets in segments(corpora):
        assert not control & {*inputs[1:]}, "after bos"
        assert not control & {*targets[:-1]}, "before eos"


def test_generate_reads_markers_only_on_request(tiny_config, paths, tmp_path, monkeypatch, capsys):
    spec = f"hf:{write(tmp_path, 'chat')}/tokenizer.json"
    config = tiny_config(
        **{"data.tokenizer": spec, "training.steps": 1, "evaluation.documents": 1, "evaluation.sample_tokens": 0}
    )
    run_experiment(config, paths.runs / "chat", paths)
    given, of = [], Rows.of
    monkeypatch.setattr(Rows, "of", lambda config, prompts, *more: given.append(prompts) or of(config, prompts, *more))
    words = ["generate", str(paths.runs / "chat"), "--prompt", "hi<|im_end|>", "--context", "<|im_start|>", "--tokens", "2"]
    for more in ([], ["--markers"]):
        assert main([*words, *more, "--runs-dir", str(paths.runs), "--cache-dir", str(paths.cache)]) == 0
        assert capsys.readouterr().out.startswith("hi<|im_end|>")
    (plain,), (marked,) = given
    assert [*map(int, np.array(marked)[-3:])] == [71, 72, 257]
    assert 256 in marked
    assert not {256, 257} & {*plain}
