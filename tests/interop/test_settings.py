"""Settings of checkpoints: supported ones give transformers' numbers, unsupported ones are refused by name, others reported."""

import json

import numpy as np
import pytest
from sound_checkpoints import (
    CONFIGS,
    IDS,
    LLAMA3,
    PLAIN,
    ROWS,
    gguf_bytes,
    gguf_fields,
    gguf_tensors,
    llama_config,
    ours,
    run,
    sound,
    tensors,
    theirs,
    write_folder,
)

from metajax.core.errors import UserError
from metajax.interop.families import FAMILIES
from metajax.interop.gguf_files import open_gguf
from metajax.interop.layouts import load_model
from metajax.interop.settings import Settings

FOLLOWED = {
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama3, new form": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}),
    "yarn, factor from lengths": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8}},
    ),
    "yarn, length outside": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 16},
    ),
    "theta outside": ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000.0}),
    "theta inside": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_theta": None}),
    "older form counts": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}}),
    "attention_bias alone": ("llama", {"attention_bias": True}),
    "mlp_bias alone": ("llama", {"mlp_bias": True, "attention_bias": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "null is absent": ("llama", {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "sliding_window": None}),
    "eps": ("llama", {"rms_norm_eps": 0.1}),
    "gpt2": ("gpt2", {"n_inner": 24, "activation_function": "relu", "layer_norm_epsilon": 0.1}),
    "gpt2, own head": ("gpt2", {"tie_word_embeddings": False, "reorder_and_upcast_attn": True}),
    "gpt2, other names": ("gpt2", {"n_embd": None, "hidden_size": 16, "activation_function": "gelu_fast"}),
}


def without_nulls(config):
    return {name: value for name, value in config.items() if value is not None}


def log_likelihood(logits):
    wide = logits[:, :-1].astype(np.float64)
    log_p = wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    return np.take_along_axis(log_p, IDS[:, 1:, None], -1).sum((1, 2))


@pytest.mark.fault(6)
@pytest.mark.fault(33)
@pytest.mark.peers
@pytest.mark.parametrize("name", FOLLOWED)
def test_supported_settings_equal_transformers(tmp_path, name):
    family, changes = FOLLOWED[name]
    config, state = sound(family, changes)
    config = config if name == "null is absent" else without_nulls(config)
    folder = write_folder(tmp_path / "model", family, config, state)
    expected, found = theirs(folder), ours(folder, family)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()), rtol=0)
    np.testing.assert_allclose(log_likelihood(found), log_likelihood(expected), rtol=1e-5)


REFUSED = [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type = 'dynamic'"]),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ["rope_type = 'longrope'"],
    ),
    ("llama", {"rope_scaling": {"factor": 4.0}}, ["rope_scaling.factor = 4.0"]),
    ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, ["rope_scaling.high_freq_factor = 8.0"]),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, ["rope_scaling.beta_fast = 16"]),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}}, ["mscale = 0.7"]),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["rope_scaling.factor = 0"]),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, ["rope_parameters.full_attention"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_parameters.partial_rotary_factor = 0.5"]),
    ("llama", {"sliding_window": 8}, ["sliding_window = 8"]),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types"]),
    ("llama", {"logit_scale": 0.5}, ["logit_scale = 0.5"]),
    (
        "llama",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
        ["logits_scaling", "embedding_multiplier", "residual_mul"],
    ),
    (
        "llama",
        {"attention_multiplier": 0.1, "final_logit_softcapping": 30.0},
        ["attention_multiplier", "final_logit_softcapping"],
    ),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ("llama", {"num_local_experts": 8, "use_qk_norm": True, "clip_qkv": 8.0}, ["num_local_experts", "use_qk_norm", "clip_qkv"]),
    ("llama", {"hidden_act": "gelu", "head_dim": 8}, ["hidden_act = 'gelu'", "head_dim = 8, but only 4"]),
    ("llama", {"num_attention_heads": 5}, ["width", "heads"]),
    (
        "llama",
        {"hidden_size": True, "num_hidden_layers": 10**9, "rms_norm_eps": float("nan"), "rope_theta": "1e4"},
        ["hidden_size = True", "num_hidden_layers", "rms_norm_eps = nan", "rope_theta = '1e4'"],
    ),
    ("llama", {"pruned_heads": {"0": [1]}, "eos_token_id": "</s>"}, ["pruned_heads", "eos_token_id = '</s>'"]),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}}, ["mscale = 1.0"]),
    (
        "llama",
        {"attention_multiplier": 1.0, "query_pre_attn_scalar": 1, "layer_types": 3},
        ["attention_multiplier", "query_pre_attn_scalar", "layer_types = 3"],
    ),
    ("llama", {"bos_token_id": 2**60, "pad_token_id": -7}, ["bos_token_id", "pad_token_id = -7"]),
    (
        "gpt2",
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        ["scale_attn_weights = False", "scale_attn_by_inverse_layer_idx"],
    ),
    ("gpt2", {"activation_function": "silu", "n_inner": 0}, ["activation_function = 'silu'", "n_inner = 0"]),
    ("gpt2", {"hidden_size": 32, "rope_theta": 10000.0}, ["hidden_size = 32", "rope_theta"]),
    (
        "hymba",
        {"mamba_d_conv": 5, "kq_norm": "rms", "num_experts": 4, "rope_type": "dynamic_ntk", "kv_reuse_group": [[0, 2]]},
        ["mamba_d_conv = 5", "kq_norm = 'rms'", "num_experts = 4", "rope_type = 'dynamic_ntk'", "kv_reuse_group"],
    ),
    (
        "hymba",
        {"layer_type": ["h", "a", "h"], "global_attn_idx": [7], "mamba_conv_bias": False},
        ["layer_type", "global_attn_idx = [7]", "mamba_conv_bias"],
    ),
    (
        "hymba",
        {"attention_bias": True, "logit_scale": 2.0, "kv_reuse_group": [[0, 1], [1, 2]]},
        ["attention_bias", "logit_scale", "two groups"],
    ),
]


@pytest.mark.fault(6)
@pytest.mark.fault(33)
@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_unsupported_settings_are_refused_in_one_message(family, changes, named):
    config = CONFIGS[family](**changes)
    with pytest.raises(UserError) as caught:
        FAMILIES[family].model_config(config)
    message = str(caught.value)
    assert message.isprintable() and all(name in message for name in named), message


PUBLISHED = [  # as published folders say them: nothing to tell
    (
        "llama",
        {
            "_name_or_path": "x",
            "pretraining_tp": 1,
            "use_cache": True,
            "attention_dropout": 0.0,
            "transformers_version": "4.40",
            "torch_dtype": "bfloat16",
            "architectures": ["LlamaForCausalLM"],
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "pad_token_id": -1,
            "hidden_act": "silu",
            "head_dim": 4,
            "max_sequence_length": 32,
        },
    ),
    (
        "llama",
        {
            "rope_interleaved": False,
            "is_llama_config": True,
            "partial_rotary_factor": 1.0,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "num_experts": 0,
            "logit_scale": 1.0,
            "embedding_multiplier": 1,
        },
    ),
    (
        "gpt2",
        {
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "n_ctx": 32,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "n_inner": None,
            "gradient_checkpointing": False,
        },
    ),
]


@pytest.mark.parametrize(("family", "changes"), PUBLISHED)
def test_published_settings_are_known(family, changes, capsys):
    config = CONFIGS[family](**changes)
    FAMILIES[family].model_config(config)
    assert "settings that are unknown" not in capsys.readouterr().err


@pytest.mark.fault(6)
def test_unknown_settings_are_reported(capsys):
    FAMILIES["llama"].model_config(llama_config(colour="red", tag={"a": 1}, empty=None))
    assert "colour, tag" in capsys.readouterr().err


def test_settings_are_read_with_their_types():
    read = Settings({"a": 3.0, "b": True, "c": None, "d": -1, "e\n": 1, "f": {"g": "x"}})
    assert (read.size("a"), read.flag("b", False), read.size("c", 5), read.number("h", 2.0)) == (
        3,
        True,
        5,
        2.0,
    ) and not read.problems
    read.size("b")
    read.size("d")
    read.size("i")
    read.inside("f").number("g")
    read.inside("a").get("g")
    read.refuse_rest()
    told = "; ".join(read.problems)
    for part in (
        "b = True, but a whole number",
        "d = -1",
        "lacks i",
        "f.g = 'x', but a positive number",
        "a = 3.0, but an object",
        "'e\\n' = 1",
    ):
        assert part in told


# ---------------------------------------------------------------------------------------------------------------- GGUF


def gguf_logits(path, **fields):
    path.write_bytes(gguf_bytes(gguf_fields(**fields)))
    values, found, _ = open_gguf(path)
    return run(load_model(found, FAMILIES["llama"].model_config(values), FAMILIES["llama"].layout, runtime=PLAIN))


@pytest.mark.fault(6)
def test_rotary_scaling_of_a_gguf_is_linear(tmp_path):
    """As in llama.cpp: a factor without a type, or under the older name, is linear; "none" disables the factor."""
    config = llama_config(rope_scaling={"type": "linear", "factor": 4.0})
    scaled = ours(write_folder(tmp_path / "model", "llama", config, tensors("llama", config)), "llama")
    plain, four, one = gguf_logits(tmp_path / "0.gguf"), ("f32", 4.0), ("f32", 0.0)
    for n, fields in enumerate(
        (
            {"llama.rope.scale_linear": four},
            {"llama.rope.scaling.factor": four},
            {"llama.rope.scaling.factor": four, "llama.rope.scaling.type": ("text", "linear")},
            {"llama.rope.scaling.factor": four, "llama.rope.scale_linear": ("f32", 2.0)},
        )
    ):
        np.testing.assert_array_equal(gguf_logits(tmp_path / f"{n}.gguf", **fields), scaled)
    for fields in (
        {"llama.rope.scaling.factor": four, "llama.rope.scaling.type": ("text", "none")},
        {"llama.rope.scaling.factor": one},
    ):
        np.testing.assert_array_equal(gguf_logits(tmp_path / "1.gguf", **fields), plain)
    assert np.abs(plain - scaled).max() > 0.1


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"llama.rope.scaling.type": ("text", "yarn")}, "llama.rope.scaling.type = 'yarn'"),
        ({"llama.rope.dimension_count": ("u32", 2)}, "llama.rope.dimension_count = 2"),
        ({"llama.attention.key_length": ("u32", 8)}, "llama.attention.key_length = 8"),
        ({"llama.attention.sliding_window": ("u32", 8)}, "llama.attention.sliding_window = 8"),
        ({"llama.logit_scale": ("f32", 0.5)}, "llama.logit_scale = 0.5"),
        ({"llama.attention.scale": ("f32", 0.5), "llama.expert_count": ("u32", 2)}, "llama.expert_count = 2"),
        ({"llama.attention.head_count_kv": ("list of u32", [2, 1])}, "llama.attention.head_count_kv = [2, 1]"),
        ({"llama.feed_forward_length": ("list of u32", [24, 12])}, "llama.feed_forward_length = [24, 12]"),
        ({"llama.anything_new": ("u32", 3)}, "llama.anything_new = 3"),
        ({"llama.block_count": ("u64", 2**60)}, "llama.block_count = "),
        ({"llama.block_count": ("text", "two")}, "llama.block_count = 'two'"),
        ({"general.architecture": None}, "general.architecture"),
    ],
)
def test_unsupported_fields_are_refused_by_name(tmp_path, fields, named):
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(gguf_fields(**fields)))
    with pytest.raises(UserError) as caught:
        open_gguf(tmp_path / "model.gguf")
    assert named in str(caught.value)


@pytest.mark.fault(6)
def test_lists_of_equal_numbers_ends_of_text_and_templates(tmp_path):
    from metajax.interop.gguf_files import write_gguf_tokenizer

    fields = {"llama.attention.head_count_kv": ("list of u32", [2, 2]), "tokenizer.ggml.eot_token_id": ("u32", 66)}
    fields |= {"tokenizer.ggml.padding_token_id": ("u32", 65), "tokenizer.chat_template": ("text", "{{ messages }}")}
    fields |= {"tokenizer.ggml.add_bos_token": ("bool", False), "llama.vocab_size": ("u32", ROWS)}
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(gguf_fields(**fields)))
    values, _, found = open_gguf(tmp_path / "model.gguf")
    assert (values["num_key_value_heads"], values["eos_token_id"], values["pad_token_id"], values["vocab_size"]) == (
        2,
        [259, 66],
        65,
        ROWS,
    )
    write_gguf_tokenizer(found, tmp_path / "words")
    config = json.loads((tmp_path / "words/tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["add_bos_token"] is False and len(config["pad_token"]) == 1


@pytest.mark.fault(6)
def test_all_parts_of_a_split_file_are_read(tmp_path):
    arrays = gguf_tensors()
    first = {name: value for name, value in arrays.items() if not name.startswith("blk.1")}
    second = {name: value for name, value in arrays.items() if name not in first}
    counts = {"split.count": ("u16", 2)}
    one, two = (tmp_path / f"model-0000{n}-of-00002.gguf" for n in (1, 2))
    one.write_bytes(gguf_bytes(gguf_fields(**counts, **{"split.no": ("u16", 0)}), first))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.gguf"):
        open_gguf(one)
    two.write_bytes(gguf_bytes(counts | {"split.no": ("u16", 1)}, second))
    assert {name: value.shape for name, value in open_gguf(one)[1].items()}.keys() == tensors("llama", llama_config()).keys()
    with pytest.raises(UserError, match="name the first part"):
        open_gguf(two)
    two.write_bytes(gguf_bytes(counts | {"split.no": ("u16", 1)}, second | {"output_norm.weight": arrays["output_norm.weight"]}))
    with pytest.raises(UserError, match=r"output_norm\.weight, which another part has too"):
        open_gguf(one)
