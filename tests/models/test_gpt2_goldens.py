"""The LM compared with nanoGPT and Hugging Face GPT-2: logits, loss, gradients, greedy text; round trips of weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Runtime
from metajax.core.errors import UserError
from metajax.models.lm import LM
from metajax.models.presets import gpt2, gpt2_small
from tests.gpt2_weights import from_gpt2, to_gpt2

GOLDENS = Path(__file__).parents[1] / "goldens"
LAYOUTS = {"nanogpt_a": "nanogpt", "nanogpt_b": "nanogpt", "hfgpt2_a": "huggingface"}
FILES = {name: np.load(GOLDENS / f"{name}.npz") for name in LAYOUTS}


def tensors(name, prefix):
    return {k.removeprefix(prefix): v for k, v in FILES[name].items() if k.startswith(prefix)}


def config(name):
    c = json.loads(str(FILES[name]["config_json"]))
    if LAYOUTS[name] == "huggingface":
        return gpt2(c["n_layer"], c["n_head"], c["n_embd"], bias=True, activation="gelu_tanh", norm_eps=c["layer_norm_epsilon"])
    return gpt2(c["n_layer"], c["n_head"], c["n_embd"], bias=c["bias"])


def load(name, implementation="auto"):
    return from_gpt2(tensors(name, "sd/"), config(name), LAYOUTS[name], runtime=Runtime(implementation=implementation))


@jax.jit
def logits_of(model, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model(ids, positions=positions, segment_ids=jnp.ones_like(ids))


def targets_of(name):
    """Next-token targets, -1 where there is no loss."""
    z = FILES[name]
    if LAYOUTS[name] == "nanogpt":
        return z["targets"]
    shifted = np.pad(z["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    return np.where(shifted == -100, -1, shifted)


@jax.jit
def loss_of(model, ids, targets):
    log_p = jax.nn.log_softmax(logits_of(model, ids))
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets >= 0, picked, 0.0)) / jnp.sum(targets >= 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_loss(name, implementation):
    z, model = FILES[name], load(name, implementation)
    ids = jnp.asarray(z["ids"])
    np.testing.assert_allclose(logits_of(model, ids), z["logits"], atol=3e-5, rtol=0)
    assert abs(loss_of(model, ids, jnp.asarray(targets_of(name))) - z["loss"]) < 3e-6
    if "logits_last_only" in z:
        np.testing.assert_allclose(logits_of(model, ids)[:, -1:], z["logits_last_only"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["nanogpt_a", "nanogpt_b"])
def test_gradients(name):
    z = FILES[name]
    gradient = jax.grad(loss_of)(load(name), jnp.asarray(z["ids"]), jnp.asarray(targets_of(name)))
    ours, expected = to_gpt2(gradient, "nanogpt"), tensors(name, "grad/")
    assert expected
    for tensor, value in expected.items():
        assert np.abs(ours[tensor] - value).max() <= 2e-5 * np.abs(value).max(), tensor


def test_greedy_continuation_of_hugging_face():
    z, model = FILES["hfgpt2_a"], load("hfgpt2_a")
    expected = z["greedy_ids"]
    ids = np.zeros_like(expected)  # fixed width: later positions cannot reach earlier logits
    start = z["greedy_prompt"].shape[1]
    ids[:, :start] = z["greedy_prompt"]
    for i in range(start, expected.shape[1]):
        ids[:, i] = np.argmax(logits_of(model, jnp.asarray(ids))[:, i - 1], axis=-1)
    assert np.array_equal(ids, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(name):
    state, layout = tensors(name, "sd/"), LAYOUTS[name]
    back = to_gpt2(load(name), layout)
    assert back.keys() == state.keys()
    for tensor, value in state.items():
        assert np.array_equal(back[tensor], value), tensor


def test_names_of_other_savers_are_understood():
    state = tensors("hfgpt2_a", "sd/")
    hub = {k.removeprefix("transformer."): v for k, v in state.items()}
    hub |= {"h.0.attn.bias": np.ones((1, 1, 4, 4)), "lm_head.weight": state["transformer.wte.weight"]}
    model = from_gpt2({f"_orig_mod.{k}": v for k, v in hub.items()}, config("hfgpt2_a"), "huggingface")
    assert np.array_equal(to_gpt2(model, "huggingface")["transformer.wpe.weight"], state["transformer.wpe.weight"])


def changed(**changes):
    state = tensors("nanogpt_a", "sd/")
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer__h__1__mlp__c_fc__weight": None}, r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"),
        ({"transformer__wte__weight": None}, r"lacks transformer\.wte\.weight"),
        ({"transformer__h__2__ln_1__weight": np.ones(32)}, r"does not: transformer\.h\.2\.ln_1\.weight"),
        ({"transformer__h__0__attn__c_attn__weight": np.ones((32, 96))}, r"c_attn\.weight has shape \(32, 96\), but \(96, 32\)"),
        ({"lm_head__weight": np.ones((64, 32))}, "lm_head.weight differs"),
    ],
)
def test_a_wrong_tensor_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_gpt2(changed(**changes), config("nanogpt_a"), "nanogpt")


def test_a_configuration_that_is_not_gpt2_is_named():
    with pytest.raises(UserError, match="activation"):
        from_gpt2(changed(), gpt2(2, 4, 32, bias=True, activation="gelu_tanh"), "nanogpt")
    with pytest.raises(UserError, match="layout"):
        to_gpt2(load("nanogpt_a"), "jax")


def test_published_shapes_of_gpt2_small():
    """Names and shapes of the 124M state dicts, as the official classes list them."""
    manifests = json.loads((GOLDENS / "gpt2_manifests.json").read_text())
    for name, layout, activation in (("nanogpt_124m", "nanogpt", "gelu"), ("hf_gpt2_124m", "huggingface", "gelu_tanh")):
        cfg = gpt2_small(bias=True, activation=activation)
        make = lambda cfg=cfg: LM(cfg, vocab_size=50257, max_length=1024, meta=None, runtime=Runtime(), key=jax.random.key(0))  # noqa: E731
        model = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), jax.eval_shape(make))
        ours = {tensor: list(value.shape) for tensor, value in to_gpt2(model, layout).items()}
        assert ours == {k: shape for k, (_, shape) in manifests[name]["tensors"].items() if k != "lm_head.weight"}
        assert sum(int(np.prod(shape)) for shape in ours.values()) == manifests[name]["parameters"] == 124_439_808
