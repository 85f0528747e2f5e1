"""A prompt begins with BOS if and only if the checkpoint's tokenizer adds it."""

import json

import pytest
import tokenizers
from sound_checkpoints import write_folder
from tokenizers import processors

from metajax.inference.generation import opening
from metajax.interop.imports import import_directory
from metajax.training.opened import open_run

END = "<|endoftext|>"


def imported(folder, runs, puts_bos, said):
    """A Llama whose tokenizer.json adds BOS or not, and whose tokenizer_config.json confirms it, contradicts it or is silent."""
    write_folder(folder, "llama")
    words = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if puts_bos:
        words.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, words.token_to_id(END))])
        words.save(str(folder / "tokenizer.json"))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | ({} if said is None else {"add_bos_token": said})))
    return open_run(import_directory("llama", folder, runs, ""))


@pytest.mark.fault(6)
@pytest.mark.parametrize("puts_bos, said", [(False, None), (True, None), (True, False), (False, True), (False, False)])
def test_a_prompt_begins_with_bos_if_the_tokenizer_adds_it(tmp_path, puts_bos, said):
    opened = imported(tmp_path / "made", tmp_path / "runs", puts_bos, said)
    expected = puts_bos if said is None else said
    assert opening(opened.config, opened.tokenizer, None) == [opened.tokenizer.vocabulary.bos] * expected
