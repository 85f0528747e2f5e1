"""Analytic FLOPs compared with the operations of the program, and mask-exact pairs with a brute-force count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Config, Data, MetaTokens, Model, Runtime
from metajax.models.flops import flops_per_token, matmul_flops, pair_flops, step_flops
from metajax.models.mixers import MIXERS
from metajax.models.specs import layer_specs
from metajax.training.program import build_model
from metajax.vision.clip.config import Clip
from metajax.vision.clip.model import CLIP
from metajax.vision.config import ImageConfig, Images, Prompts
from metajax.vision.flops import image_cost, image_step_flops
from metajax.vision.program import Shapes, image_program

VOCAB, LENGTH, ROWS = 64, 32, 2


def dot_flops(jaxpr):
    """Multiply-adds x 2 of every dot_general and convolution, inner jaxprs included, scans times their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contract, _), _), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([eqn.invars[0].aval.shape[d] for d in contract]))
        elif eqn.primitive.name == "conv_general_dilated":
            taps = eqn.invars[1].aval.shape  # rows, columns, inputs, outputs
            total += 2 * int(np.prod(eqn.outvars[0].aval.shape)) * int(np.prod(taps[:3]))
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        branches = eqn.params.get("branches", ())
        for value in (
            [branches[-1]] if branches else jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


CASES = {
    "gpt2": (Model(layers=3, width=16, heads=2, mlp_width=48, position="learned"), None),
    "llama": (
        Model(layers=2, width=16, heads=4, kv_heads=2, mlp_width=40, activation="swiglu", norm="rmsnorm", tied=False),
        None,
    ),
    "meta_gathered": (Model(layers=2, width=16, heads=2, mlp_width=32), MetaTokens(rate=0.25)),
    "meta_causal": (Model(layers=2, width=16, heads=2, mlp_width=32), MetaTokens(inject="none", rate=0, attention="causal")),
}


@pytest.mark.parametrize("name", CASES)
def test_dense_count_equals_the_programs_own(name):
    model_config, meta = CASES[name]
    data, runtime = Data(sequence_length=LENGTH, batch_size=ROWS), Runtime(implementation="reference")
    config = Config(name=name, data=data, model=model_config, meta_tokens=meta, runtime=runtime)
    model = build_model(config, VOCAB, jax.random.key(0))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    inputs = {"positions": tokens, "segment_ids": tokens + 1}
    metas = meta.count(LENGTH) if meta else 0
    if meta:
        inputs["meta_positions"] = jnp.broadcast_to(jnp.arange(1, metas + 1), (ROWS, metas))
    counted = dot_flops(jax.make_jaxpr(lambda m, t, i: m(t, **i))(model, tokens, inputs).jaxpr)
    parts = matmul_flops(config, VOCAB)
    second = LENGTH if name == "meta_causal" else metas
    dense = sum(v * ROWS * (second if part == "meta_attention" else LENGTH) for part, v in parts.items())
    pairs = ROWS * (LENGTH**2 + second**2)
    assert dense + model_config.layers * MIXERS["attention"].pair_flops(model_config) * pairs == counted


@pytest.mark.parametrize(("window", "form"), [(None, "gathered"), (3, "gathered"), (3, "causal"), (None, "dense_causal")])
def test_pairs_equal_a_brute_force_count(window, form):
    rng = np.random.default_rng(0)
    lengths = [5, 9, 1, 12]
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, 32 - sum(lengths)])[None].repeat(2, 0)
    positions = np.concatenate([np.arange(n) for n in [*lengths, 32 - sum(lengths)]])[None].repeat(2, 0)
    meta_positions = np.stack([np.sort(rng.choice(np.arange(1, 32), 6, replace=False)) for _ in range(2)])
    config = Config(
        name="x", data=Data(sequence_length=32), model=Model(window=window), meta_tokens=MetaTokens(rate=0.19, attention=form)
    )
    batch = {"tokens": segments, "segment_ids": segments, "positions": positions, "meta_positions": meta_positions}
    causal = meta = 0
    for b in range(2):
        for q in range(32):
            for k in range(q + 1):
                if segments[b, q] and segments[b, q] == segments[b, k]:
                    causal += window is None or q - k <= window
                    both = q in meta_positions[b] and k in meta_positions[b]
                    meta += {"gathered": both, "causal": True, "dense_causal": both or q not in meta_positions[b]}[form]
    spec, names = layer_specs(config.model, config.meta_tokens)[0], ("attention", "meta_attention")
    assert tuple(MIXERS[name].pairs(spec, batch, 0) for name in names) == (causal, meta)
    cost = config.model.layers * MIXERS["attention"].pair_flops(config.model)
    assert pair_flops(config, batch) == dict(zip(names, (cost * causal, cost * meta), strict=True))
    unused = np.concatenate(
        [meta_positions, np.full((2, 3), 32)], axis=1
    )  # of a row that has fewer meta-tokens than room for them
    assert MIXERS["meta_attention"].pairs(spec, batch | {"meta_positions": unused}, 0) == meta


def test_a_step_costs_three_forward_passes_and_a_row_of_one_document_costs_flops_per_token():
    meta = MetaTokens(inject="none", rate=0, attention="causal")
    data, model = Data(sequence_length=LENGTH, batch_size=1), Model(layers=2, width=16, heads=2, mlp_width=32)
    config = Config(name="x", data=data, model=model, meta_tokens=meta)
    ones = np.ones((1, LENGTH), np.int32)
    batch = {"tokens": ones, "segment_ids": ones, "positions": np.arange(LENGTH)[None], "meta_positions": ones[:, :0]}
    per_token = flops_per_token(config, VOCAB)
    assert step_flops(config, VOCAB, batch) == pytest.approx(LENGTH * sum(per_token.values()), rel=1e-12)
    assert per_token["head"] == 6 * 16 * VOCAB


def test_gathered_meta_attention_is_cheap():
    """With 10 % meta-tokens, meta-attention costs about 3 % of the matrix products of GPT-2's block."""
    model = Model(layers=12, width=768, heads=12, mlp_width=3072, position="rope")
    plain = Config(name="x", data=Data(sequence_length=1024), model=model)
    with_meta = Config(name="x", data=Data(sequence_length=1024), model=model, meta_tokens=MetaTokens())
    block = {k: v for k, v in flops_per_token(plain, VOCAB).items() if k != "head"}
    assert flops_per_token(with_meta, VOCAB)["meta_attention"] / sum(block.values()) < 0.035


IMAGES = {"vision_layers": (2,), "vision_width": 16, "vision_heads": 2, "patch": 8, "image_size": 32}
VIT = Clip(**IMAGES, text_layers=3, text_width=24, text_heads=2, embed=12, context=16, vocab=64)
RUNS = {
    "clip": (None, {"batch": 6}),
    "coop": (Prompts(batch=3), {}),
    "coop_still": (Prompts(batch=3), {"view": "centre"}),
    "cocoop": (Prompts(condition="meta", bottleneck=5, batch=2), {}),
    "aapl": (Prompts(condition="meta", bottleneck=5, alpha=0.2), {}),
    "aapl_augmented": (Prompts(condition="meta", bottleneck=5, alpha=0.2, augment=1.0, batch=2), {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_count_of_a_step_on_images_equals_the_programs_own(name):
    prompts, images = RUNS[name]
    start = {"clip": VIT} if prompts is None else {"weights": "x"}
    config = ImageConfig(name=name, images=Images(**images), prompts=prompts, **start)
    program, batch = image_program(config, Shapes(VIT, classes=7, length=11))
    traced = jax.make_jaxpr(program.step)(program.abstract_state(), batch, *program.frozen)
    assert image_step_flops(config, VIT, 7, 11, causal=False) == dot_flops(traced.jaxpr)


def test_the_count_of_a_resnet_equals_the_programs_own():
    cfg = Clip(
        vision_layers=(2, 1, 1, 2),
        vision_width=16,
        vision_heads=8,
        text_width=16,
        text_heads=2,
        embed=24,
        image_size=64,
        vocab=64,
    )
    model = jax.eval_shape(lambda key: CLIP(cfg, runtime=Runtime(), key=key), jax.random.key(0))
    program = jax.make_jaxpr(lambda m, x: m.encode_image(x))(model, jnp.zeros((1, 64, 64, 3)))
    assert image_cost(cfg).forward == dot_flops(program.jaxpr)
