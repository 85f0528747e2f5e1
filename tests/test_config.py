"""The typed config: overrides, validation, serialisation and identity."""

import dataclasses
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax import registry
from metajax.config import Config, MetaTokens, Runtime, Switch, config_from, config_hash, difference
from metajax.core.errors import UserError
from metajax.core.fields import flatten, from_dict, override, to_dict
from metajax.training.optimizers import unread_by_optimizer
from metajax.vision.config import ImageConfig, Prompts

BASE = Config(name="x")


def test_round_trip_through_json():
    config = override(
        BASE, {"meta_tokens": MetaTokens(rate=0.2), "data.sources": "pydocs,debindex", "data.switch": Switch(5, (1.0, 2.0))}
    )
    assert from_dict(Config, to_dict(config)) == config


def test_a_saved_config_is_of_the_family_with_its_fields():
    text, images = Config(name="x"), ImageConfig(name="x", weights="clip", prompts=Prompts())
    assert config_from(to_dict(text)) == text and config_from(to_dict(images)) == images
    with pytest.raises(UserError, match="unknown field prompt; did you mean 'prompts'"):
        config_from({**to_dict(images), "prompt": {}})
    with pytest.raises(UserError, match="unknown field datas; did you mean 'data'"):
        config_from({**to_dict(text), "datas": {}})


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.layers", "8", 8),
        ("training.steps", "1e3", 1000),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("model.bias", "true", True),
        ("model.window", "none", None),
        ("model.window", "64", 64),
        ("optimizer.betas", "0.8,0.99", (0.8, 0.99)),
        ("evaluation.conditions", "none", ("none",)),
        ("init.from", "there", "there"),
        ("model.norm", "rmsnorm", "rmsnorm"),
    ],
)
def test_overrides_are_typed(path, text, value):
    changed = override(BASE, {path: text})
    assert flatten(changed)[path.replace("from", "from_")] == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modl.layers": "8"}, "unknown field modl; did you mean 'model'"),
        ({"model.layer": "8"}, "unknown field model.layer; did you mean 'layers'"),
        ({"model.layers.deep": "8"}, "model.layers has no fields of its own"),
        ({"model.layers": "8.5"}, "expected a whole number"),
        ({"model.bias": "yes"}, "expected true or false"),
        ({"model.window": "wide"}, "expected a whole number from 0 to 1,000,000,000 or none"),
        ({"optimizer.betas": "0.9"}, "expected 2 comma-separated values"),
        ({"optimizer.learning_rate": "nan"}, "expected a number"),
        ({"training.accumulation_steps": "3"}, "data.batch_size = 8 does not divide by training.accumulation_steps = 3"),
        ({"training.steps": "10"}, "optimizer.warmup_steps = 20 is longer than the schedule of 10 steps"),
        ({"data.weights": "1,2"}, "data.sources has 1 entries but data.weights has 2"),
        ({"meta_tokens.rate": "0"}, "meta_tokens.inject = 'random' and meta_tokens.rate = 0.0 disagree"),
        ({"meta_tokens.attention": "none", "meta_tokens.zero_position": "meta"}, "needs meta-attention"),
        ({"model.position": "learned", "meta_tokens.zero_position": "causal"}, "choose none or both"),
        ({"model.position": "none", "meta_tokens.zero_position": "both"}, "means nothing with model.position = 'none'"),
        ({"evaluation.conditions": "right"}, "has no metadata template"),
        ({"evaluation.conditions": "write"}, "did you mean 'right'"),
        ({"model.position": "yarn"}, "needs model.rope_original_length"),
        ({"data.switch.step": "500", "data.switch.weights": "1"}, "is not before training.steps = 200"),
        ({"data.sources": "a,b", "data.weights": "1,inf"}, "expected a number from 0 to 1e+30"),
        ({"data.switch.step": "5", "data.switch.metadata": "none"}, "trains without"),
        ({"data.switch.step": "5", "data.switch.unseen": "1"}, "below 1"),
        ({"metadata.appended": "{url}"}, "needs metadata.position = 'both'"),
        ({"metadata.tokens": "12"}, "expected a whole number from 0 to 11"),
        ({"evaluation.documents": "0"}, "at least 1"),
        ({"evaluation.conditions": ""}, "evaluation.conditions is empty"),
        ({"seed": "-1"}, "seed = '-1': expected a whole number from 0 to 4,294,967,295"),
        ({"model.kv_heads": "-1"}, "model.kv_heads = '-1': expected a whole number from 0"),
        ({"optimizer.betas": "2,3"}, "expected a number at least 0 and below 1"),
        ({"optimizer.learning_rate": "inf"}, "expected a number from 1e-30 to 1e+30"),
        ({"runtime.unroll": "-2"}, "from 0 to"),
        ({"runtime.loggers": "tensorbord"}, "did you mean 'tensorboard'"),
    ],
)
def test_mistakes_name_the_fields(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        override(BASE, changes)


def test_fields_that_must_agree_can_change_together():
    assert override(BASE, {"model.width": "96", "model.heads": "3"}).model.head_dim == 32
    assert override(BASE, {"meta_tokens.inject": "none", "meta_tokens.rate": "0"}).meta_tokens.rate == 0


def test_a_sub_config_that_is_null_can_be_switched_on_by_a_field():
    assert override(BASE, {"meta_tokens.rate": "0.2"}).meta_tokens == MetaTokens(rate=0.2)


def every_field(cls, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        inner = next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), hint)
        yield from every_field(inner, f"{prefix}{name}.") if dataclasses.is_dataclass(inner) else [prefix + name]


def test_hash_covers_exactly_the_fields_that_change_a_number():
    same = [{"runtime.log_every": 3}, {"runtime.mesh": "data=1"}, {"runtime.implementation": "xla"}, {"runtime.loggers": "wandb"}]
    other = [
        {"model.layers": 5},
        {"optimizer.learning_rate": 1e-4},
        {"data.tokenizer": "byte"},
        {"init.from": "a"},
        {"metadata.keep": 0.5},
    ]
    assert {config_hash(override(BASE, c)) for c in same} == {config_hash(BASE)}
    assert len({config_hash(override(BASE, c)) for c in other} | {config_hash(BASE)}) == len(other) + 1
    assert config_hash(dataclasses.replace(BASE, seed=7)) == config_hash(BASE)
    assert len(config_hash(BASE)) == 8


@given(st.sampled_from(sorted(f for f in every_field(Runtime))))
def test_no_runtime_field_is_in_the_hash(name):
    changed = {
        "log_every": 3,
        "save_every": 7,
        "keep": 5,
        "loggers": "wandb",
        "workers": 2,
        "mesh": "data=1",
        "remat": "full",
        "unroll": 1,
        "on_bad_step": "skip",
        "max_grad_norm": 9.0,
        "profile": "2,3",
        "hang_seconds": 60.0,
        "startup_seconds": 60.0,
        "max_skipped": 5,
    }
    value = changed.get(name, "xla")
    assert config_hash(override(BASE, {f"runtime.{name}": value})) == config_hash(BASE)


def test_the_number_of_meta_tokens_is_an_exact_floor():
    assert [MetaTokens(rate=r).count(100) for r in (0.29, 0.57, 0.1)] == [29, 57, 10]
    assert MetaTokens(rate=0.1).count(1024) == 102, "the paper's M"


def test_difference_names_the_fields():
    assert difference(BASE, override(BASE, {"model.layers": 5})) == {"model.layers": (4, 5)}


def test_reachable_fields_are_bounded():
    registry.load()
    for name, experiment in registry.experiments().items():
        config = experiment.build(experiment.scales[0])
        unread = {*config.unread(), *unread_by_optimizer(config)}
        read = [field for field in flatten(config).keys() - unread if not field.startswith("runtime.")]
        assert len(read) <= 76, f"{name}: {len(read)} fields that a run reads, besides `runtime`, which changes no number"


def test_experiments_resolve_at_all_their_scales():
    registry.load()
    hashes = {}
    for name, experiment in registry.experiments().items():
        for scale in experiment.scales:
            config = experiment.build(scale)
            assert (config.name, config.scale) == (name, scale)
            hashes.setdefault((scale, config_hash(config)), []).append(name)
    assert all(len(names) == 1 for names in hashes.values()), f"rows that are the same run: {hashes}"
