"""Hybrid layers: counts, the meta prefix as meta tokens before each document, isolation of documents, every fusion, refusals."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Config, Hybrid, MetaTokens, Model, Runtime
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.models import presets
from metajax.models.lm import LM, decay_mask, named_params, param_count
from metajax.models.masks import Mask
from metajax.models.specs import layer_runs

T, VOCAB, M = 24, 32, 7
HYBRID = Hybrid(prefix_tokens=M, full_layers=(0,), kv_groups=(1, 2), state=4)
SIZES = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "activation": "swiglu", "norm": "rmsnorm"}
CFG = Model(window=4, init_std=0.15, layers=3, hybrid=HYBRID, **SIZES)
LENGTHS = [[9, 11, 4], [2, 14, 5]]  # the second row ends in padding
SEGMENTS = jnp.array([np.repeat([1, 2, 3, 0], [*n, T - sum(n)]) for n in LENGTHS])
POSITIONS = jnp.array([np.concatenate([np.arange(k) for k in [*n, T - sum(n)]]) for n in LENGTHS])
X = jax.random.normal(jax.random.key(3), (2, T, CFG.width))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # programs that run once


def build(cfg=CFG, implementation="reference", **runtime):
    """A model with all parameters away from their special initial values."""
    runtime = Runtime(implementation=implementation, **{"unroll": 1, **runtime})

    def make(key):
        model = LM(cfg, vocab_size=VOCAB, max_length=T, meta=None, runtime=runtime, key=key)
        return jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(w.size), w.shape), model)

    return jit(make)(jax.random.key(0))


def abstract(cfg, vocab=VOCAB):
    return jax.eval_shape(lambda: LM(cfg, vocab_size=vocab, max_length=1, meta=None, runtime=Runtime(), key=jax.random.key(0)))


def decode(model, x=X, positions=POSITIONS, segment_ids=SEGMENTS, capture=()):
    return model.decode(x, positions=positions, segment_ids=segment_ids, capture=capture)


def changed(**hybrid):
    return override(CFG, {f"hybrid.{name}": value for name, value in hybrid.items()})


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol * max(1.0, float(np.abs(y).max()))), a, b)


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "vocab", "total"),
    [
        (presets.hymba_1_5b, 32001, 1_522_797_824),
        (presets.hymba_350m, 32001, 353_701_888),
        (presets.hymba_125m, 32001, 129_944_064),
        (presets.hymba_300m, 50257, 300_747_904),
        (presets.hymba_cpu, 512, 278_965),
    ],
)
def test_parameter_counts(preset, vocab, total):
    parts = param_count(abstract(preset(), vocab))
    assert parts["total"] == total == sum(n for part, n in parts.items() if part != "total")


def test_the_released_grouping():
    """17 layers of the 1.5B own keys and values; first, middle and last attend to all; one triple."""
    cfg = presets.hymba_1_5b()
    assert (cfg.hybrid.full_layers, cfg.rope_factor, cfg.dt_rank, cfg.value_dim) == ((0, 15, 31), 7.0, 100, 128)
    runs = [(len(group), count, group[0].window) for group, count in layer_runs(cfg)]
    assert runs == [(1, 1, None), (2, 7, 1024), (1, 1, None), (3, 1, 1024), (2, 6, 1024), (1, 1, None)]
    assert sum(layer.owns_kv * count for group, count in layer_runs(cfg) for layer in group) == 17


def test_rows_of_the_component_ablation_have_the_printed_attention_share():
    """Table 10: attention to Mamba parameters, attention without an output map of its own."""
    for heads, kv_heads, value_dim, ratio in ((4, 4, 64, 8.48), (8, 8, 64, 4.24), (16, 16, 64, 2.12), (16, 4, 0, 3.64)):
        fields = {
            "hybrid.head_dim": 64,
            "hybrid.value_dim": value_dim,
            "hybrid.kv_groups": (),
            "heads": heads,
            "kv_heads": kv_heads,
        }
        cfg = presets.hymba_300m(**fields)
        model = jax.eval_shape(
            lambda c=cfg: LM(c, vocab_size=8, max_length=1, meta=None, runtime=Runtime(), key=jax.random.key(0))
        )
        parts = param_count(model)
        mamba = sum(parts[name] for name in ("mamba", "dt_norm", "b_norm", "c_norm", "output"))
        assert mamba / parts["attention"] == pytest.approx(ratio, abs=0.01)


# ------------------------------------------------------------------------------------------------- the meta prefix


@dataclass(frozen=True)
class Prefixed(Mask):
    """The first M keys of a row stay visible to all later tokens, the others for `reach` tokens. A `window` would hide the first."""

    reach: int | None = None

    def expiry(self, segment_ids):
        index, real = jnp.arange(segment_ids.shape[1]), segment_ids != 0
        others = Mask(window=self.reach).expiry(segment_ids)
        return jnp.where((index < M) & real, jnp.sum(real, axis=1, keepdims=True), others)


def prepended(model, x):
    """Outputs of the same parameters with the meta tokens inserted before each document, one document per row."""
    literal = jax.tree.map(lambda leaf: leaf, model)
    literal.cfg, literal.prefix = override(CFG, {"hybrid.prefix_tokens": 0}), None
    for run in literal.blocks:
        for layer in run:
            attention = layer.mixer.attention
            attention.mask = Prefixed(reach=attention.mask.window)
    out = jnp.zeros_like(x)
    longest = M + max(map(max, LENGTHS))
    places = [(row, sum(n[:i]), length) for row, n in enumerate(LENGTHS) for i, length in enumerate(n)]
    texts = [x[row, start : start + length] for row, start, length in places]
    rows = [jnp.concatenate([model.prefix[...], text]) for text in texts]
    batch = jnp.stack([jnp.pad(row, ((0, longest - len(row)), (0, 0))) for row in rows])
    segments = jnp.array([[i < M + length for i in range(longest)] for *_, length in places], jnp.int32)
    y, _ = decode(literal, batch, jnp.broadcast_to(jnp.arange(longest), segments.shape), segments)
    for (row, start, length), document in zip(places, y, strict=True):
        out = out.at[row, start : start + length].set(document[M : M + length])
    return out


def test_the_prefix_equals_meta_tokens_before_each_document():
    """Values, and gradients with respect to every parameter (the meta tokens' too) and to the input."""
    real = (SEGMENTS > 0)[..., None]

    def objective(forward):
        def total(model, x):
            y = forward(model, x)
            return jnp.sum(jnp.where(real, jnp.sin(y), 0.0)), jnp.where(real, y, 0.0)

        return jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    # In float64, for the two sum in another order, which float32 rounds by more than the tolerance on some processors.
    with jax.enable_x64(True):
        model, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (build(), X))
        (_, packed), packed_grads = objective(lambda m, x: decode(m, x)[0])(model, x)
        (_, literal), literal_grads = objective(prepended)(model, x)
    assert_close(packed, literal)
    assert_close(packed_grads, literal_grads)
    assert np.abs(packed_grads[0].prefix[...]).min() > 0


@pytest.mark.parametrize(
    "hybrid",
    [{"fusion": "attention"}, {"fusion": "mamba", "kv_groups": ()}, {}, {"prefix_tokens": 0}],
    ids=["attention", "mamba", "both", "without_prefix"],
)
def test_no_document_sees_another(hybrid):
    """Input gradients between documents are exactly zero: attention, shared keys, convolution and scan, alone and together."""

    @jit
    def sensitivities(model):
        y, pull = jax.vjp(lambda x: decode(model, x)[0], X)
        return jax.vmap(lambda s: pull(y * (s == SEGMENTS)[..., None])[0])(jnp.arange(1, 4))

    found = np.asarray(jnp.abs(sensitivities(build(changed(**hybrid)))).sum(-1))  # [document of the output, row, input position]
    own = np.asarray(SEGMENTS)[None] == np.arange(1, 4)[:, None, None]
    assert np.all(found[~own] == 0)
    assert np.all(found[own] > 0)


# ------------------------------------------------------------------------------------------------- forms


FORMS = {
    "concat": {"fusion": "concat"},
    "sequential": {"fusion": "sequential"},
    "attention": {"fusion": "attention"},
    "mamba": {"fusion": "mamba"},
    "mamba2": {"fusion": "mamba", "ssm": "mamba2", "expand": 8},
    "plain": {"branch_norm": "plain", "inner_norms": False, "dt_init": "mamba"},
    "narrow": {"head_dim": 6, "value_dim": 4, "branch_norm": "none"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_builds_and_every_parameter_has_a_gradient(form):
    fields = FORMS[form] | {"kv_groups": (), "full_layers": ()}
    model = build(override(CFG, {"layers": 2, "window": None, **{f"hybrid.{name}": value for name, value in fields.items()}}))
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, VOCAB)
    gradient = jit(jax.grad(lambda m: jnp.sum(jnp.sin(m(tokens, positions=POSITIONS, segment_ids=SEGMENTS)))))(model)
    for name, g in named_params(gradient).items():
        assert np.all(np.isfinite(g[...])) and np.any(g[...]), name
    assert len(model.blocks) == 1, "equal layers are one stack"


def test_layers_without_a_feed_forward_network():
    cfg = override(changed(fusion="mamba", kv_groups=()), {"mlp_width": 0})
    names = named_params(abstract(cfg))
    assert any("mamba" in name for name in names)
    assert not any("mlp" in name for name in names)


def test_decay_is_for_matrices_embeddings_and_meta_tokens():
    undecayed = {name.split(".")[-1] for name, m in named_params(decay_mask(build())).items() if not m.get_raw_value()}
    assert undecayed == {"scale", "conv_bias", "dt_bias", "A_log", "D"}


def test_step_bias_of_mamba_is_a_step_size_in_its_range():
    fresh = LM(changed(dt_init="mamba"), vocab_size=8, max_length=1, meta=None, runtime=Runtime(), key=jax.random.key(0))
    bias = fresh.blocks[0][0].mixer.mamba.dt_bias[...]
    steps = jax.nn.softplus(bias)
    assert float(steps.min()) >= 0.99e-3 and float(steps.max()) <= 0.101 and float(steps.max() / steps.min()) > 5


def test_implementations_unrolling_and_rematerialisation_agree():
    def value_and_grad(model):
        return jit(jax.value_and_grad(lambda m: jnp.sum(jnp.sin(decode(m)[0]))))(model)

    cfg = override(CFG, {"layers": 2, "hybrid.full_layers": (), "hybrid.kv_groups": (2,)})
    value, grads = value_and_grad(build(cfg))
    for options in ({"implementation": "xla"}, {"remat": "full"}):
        other = value_and_grad(build(cfg, **options))
        assert_close(other[0], value)
        assert_close(jax.tree.leaves(other[1]), jax.tree.leaves(grads), atol=2e-5)


def test_captures_equal_the_layers_outputs():
    names = ("residual", "mixer_out", "mlp_out", "attention_probabilities", "keys", "values", "prefix_ssm_state", "ssm_branch")
    _, captured = jit(lambda m: decode(m, capture=names))(build())
    assert captured["keys"].shape == (2, 2, T, 2, 4) and captured["values"].shape == (2, 2, T, 2, 8), (
        "two layers own keys and values"
    )
    assert captured["prefix_ssm_state"].shape == (3, 1, 32, 4) and captured["ssm_branch"].shape == (3, 2, T, 32)
    sums = captured["residual"] + captured["mixer_out"] + captured["mlp_out"]
    assert_close(sums[:-1], captured["residual"][1:])
    probabilities = np.asarray(captured["attention_probabilities"])
    assert probabilities.shape == (3, 2, 4, T, M + T)
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-5)
    assert np.all(probabilities[..., :M] > 0), "every token sees the meta tokens"
    far = probabilities[1:, 0, :, 8, M : M + 4]
    assert np.all(far == 0) and np.all(probabilities[0, 0, :, 8, M : M + 4] > 0), "only layers 1 and 2 have a window"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid.kv_groups": (1, 1)}, "has 2 layers, model.layers = 3"),
        ({"hybrid.kv_groups": (2, 1)}, "the group from layer 0 on mixes full and window layers"),
        ({"hybrid.full_layers": (3,)}, "layers go from 0 to 2"),
        ({"window": None}, "without model.window all attend to everything"),
        ({"hybrid.fusion": "mamba"}, "no attention in neighbouring layers"),
        ({"hybrid.fusion": "sequential", "hybrid.kv_groups": ()}, "come in pairs"),
        ({"position": "learned"}, "such as rope, or none"),
        ({"norm_position": "post"}, "a hybrid model has 'pre'"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        override(CFG, changes)


def test_meta_attention_is_refused_in_hybrids():
    with pytest.raises(UserError, match="a hybrid model has no meta-attention"):
        Config(name="x", model=CFG, meta_tokens=MetaTokens())


def test_unknown_captures_are_refused():
    with pytest.raises(UserError, match="prefix_keys"):
        decode(build(), capture=("prefix_key",))
