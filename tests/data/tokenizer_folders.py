"""Small tokenizers of every kind of file, each in a folder like that of a published model."""

import json

import sentencepiece
import tokenizers as library
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/|_[]:.,"
ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def added(name, special=False, **options):
    return AddedToken(name, special=special, normalized=options.pop("normalized", False), **options)


def byte_level(*tokens, merges=(), whole_words=False):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    made = library.Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=whole_words))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_tokens(list(tokens))
    return made


def unigram(scheme):
    ordinary = [("▁", -2.0), *((c, -5.0) for c in CHARACTERS), ("▁the", -3.0)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<|user|>", -1.0), *ordinary]
    made = library.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def llama():
    """Byte-pair encoding with byte fallback, as converted from SentencePiece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *CHARACTERS, "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = library.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([added(name, True) for name in ("<unk>", "<s>", "</s>")])
    return made


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), "the", "##fox"])
    made = library.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return made


def word_level():
    words = ["<unk>", "</s>", "<pad>", "the", "fox", "a", "<", "/", "s", ">", "<end>"]
    made = library.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def chat():
    """Turn markers that are not special, then ordinary added tokens, and a marker that only tokenizer_config.json names."""
    turns = [added("<|im_start|>"), added("<|im_end|>", rstrip=True), added("[INST]", lstrip=True), added("<think>")]
    return byte_level(*turns, added("STOP", normalized=True), added("<b>"), added("    "), added("<|endoftext|>", True))


LOSSY = ("word_piece", "word_level")  # white space does not come back as it was
# name: (tokenizer, tokenizer_config.json, other files)
KINDS = {
    "chat": (
        chat,
        {"eos_token": "<|im_end|>", "chat_template": "{{ '<think>' }}"},
        {"generation_config.json": {"eos_token_id": [256, 66]}, "config.json": {"text_config": {"pad_token_id": 260}}},
    ),
    "whole_words": (lambda: byte_level(merges=[("<", "s"), ("<s", ">")], whole_words=True), {"bos_token": "<s>"}, {}),
    "unigram": (lambda: unigram("always"), ROLES, {}),
    "unigram_first": (lambda: unigram("first"), {}, {"special_tokens_map.json": ROLES}),
    "llama": (llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {}),
    "word_piece": (word_piece, {"pad_token": "[PAD]", "cls_token": "[CLS]"}, {}),
    "word_level": (word_level, ROLES, {"generation_config.json": {"eos_token_id": [1, 3, 10]}}),
}


def write(folder, kind):
    """The folder with the files of a kind."""
    make, config, others = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    for name, values in {"tokenizer_config.json": config, **others}.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def write_sentencepiece(folder, kind="bpe"):
    """A SentencePiece model with turn markers as user-defined symbols, one of them without a marker's form."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        f"The {a} {b} runs to the {b}; it's {i} o'clock.\n" for i in range(20) for a in ("red", "old") for b in ("fox", "dog")
    ]
    spaces = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    options = {"vocab_size": 299, "byte_fallback": True, "minloglevel": 2, "model_type": kind, "pad_id": 3} | spaces
    options["user_defined_symbols"] = ["<|im_start|>", "<|im_end|>", "STOP", "  "]
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), **options)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>", "STOP"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **roles}))
    return folder
