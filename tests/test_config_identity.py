"""The identity of a run: the hash covers what differs from the defaults, and a field that nothing reads is refused.

`python -m tests.test_config_identity` writes goldens/config_defaults.json again.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from metajax import registry
from metajax.config import CONFIG_VERSION, Config, Metadata, MetaTokens, config_hash
from metajax.core.errors import UserError
from metajax.core.fields import changed, defaults, from_dict, ignored, override, require_all_read
from metajax.runs.directory import RunDirectory, identity_of
from metajax.runs.files import read_json, write_json
from metajax.vision.config import ImageConfig, Prompts

GOLDENS = Path(__file__).parent / "goldens" / "config_defaults.json"
BASE = Config(name="x")


def dump():
    """{version, family: {path: default}} of both families, as JSON has it."""
    found = {"version": CONFIG_VERSION, "text": defaults(Config), "images": defaults(ImageConfig)}
    return json.loads(json.dumps(found))


def with_a_new_field(config, cls):
    """The config rebuilt with a sub-config class that has one more field, at its default."""
    wider = dataclasses.make_dataclass("Wider", [("added", int, 7)], bases=(cls,), frozen=True)
    names = [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), cls)]
    parts = {name: getattr(config, name) for name in names}
    wide = {name: wider(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part)}) for name, part in parts.items()}
    changed_config = dataclasses.replace(config)
    for name, part in wide.items():
        object.__setattr__(changed_config, name, part)
    return changed_config, wide


@pytest.mark.parametrize(
    "cls", [type(BASE.data), type(BASE.model), type(BASE.optimizer), type(BASE.evaluation), Metadata, MetaTokens]
)
def test_a_new_field_renames_no_run(cls):
    registry.load()
    seen = 0
    for name, experiment in list(registry.experiments().items())[::9]:
        config = experiment.build(experiment.scales[0])
        wider, parts = with_a_new_field(config, cls)
        assert config_hash(wider) == config_hash(config), name
        for part in parts.values():
            object.__setattr__(part, "added", 8)
            assert config_hash(wider) != config_hash(config), name
            seen += 1
    assert seen > 0


def test_a_new_sub_config_that_is_null_renames_no_run():
    wider = dataclasses.make_dataclass("Wider", [("added", Metadata | None, None)], bases=(Config,), frozen=True)(name="x")
    assert config_hash(wider) == config_hash(BASE)
    object.__setattr__(wider, "added", Metadata())
    assert config_hash(wider) != config_hash(BASE)


def test_a_sub_config_of_defaults_is_not_the_same_as_none():
    given = override(BASE, {"metadata": Metadata()})
    assert changed(given) == {"name": "x", "metadata": True} and config_hash(given) != config_hash(BASE)
    assert changed(override(given, {"metadata.keep": 0.5})) == {"name": "x", "metadata": True, "metadata.keep": 0.5}


def test_no_default_changes_without_a_new_config_version():
    known, now = json.loads(GOLDENS.read_text()), dump()
    for family in ("text", "images"):
        moved = {
            path: (known[family][path], now[family].get(path))
            for path in known[family]
            if now[family].get(path) != known[family][path]
        }
        assert not moved or known["version"] < CONFIG_VERSION, (
            f"the defaults of {moved} changed (old, new): hashes of older runs would now stand for other runs. "
            "Raise CONFIG_VERSION in metajax/config/families.py, then run `python -m tests.test_config_identity`"
        )
    assert known == now, (
        "new defaults or a new version: run `python -m tests.test_config_identity` and commit tests/goldens/config_defaults.json"
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer.decay_share": 0.3}, "optimizer.decay_share"),
        ({"runtime.max_skipped": 3}, "runtime.max_skipped"),
        ({"tasks.train_length": 64, "data.packing": "best_fit"}, "data.packing"),
        ({"tasks.train_length": 64, "data.switch.step": 9}, "data.switch"),
        ({"optimizer.schedule": "constant", "optimizer.final_fraction": 0.5}, "optimizer.final_fraction"),
        ({"model.rope_factor": 2.0}, "model.rope_factor"),
        ({"model.position": "none", "model.rope_theta": 5e5}, "model.rope_theta"),
        ({"model.max_positions": 512}, "model.max_positions"),
        ({"model.hybrid.fusion": "attention", "model.hybrid.state": 8}, "model.hybrid.state"),
        ({"model.hybrid.fusion": "mamba", "model.hybrid.head_dim": 8}, "model.hybrid.head_dim"),
        ({"model.hybrid.ssm": "mamba2", "model.hybrid.dt_rank": 8}, "model.hybrid.dt_rank"),
        ({"model.hybrid.fusion": "sequential", "model.hybrid.branch_norm": "none"}, "model.hybrid.branch_norm"),
        ({"metadata.tokens": 5, "metadata.template": "{topic}"}, "metadata.template"),
        ({"metadata.position": "none", "metadata.keep": 0.5}, "metadata.keep"),
        ({"meta_tokens.inject": "none", "meta_tokens.rate": 0, "meta_tokens.loss": "real_only"}, "meta_tokens.loss"),
    ],
)
def test_a_field_that_nothing_reads_is_refused_by_name(changes, field, tmp_path):
    config = override(BASE, changes)
    assert list(ignored(config)) == [field] and ignored(config)[field]
    with pytest.raises(UserError, match=field):
        require_all_read(config)
    with pytest.raises(UserError, match=field):
        RunDirectory.open(tmp_path / "run", config)
    require_all_read(override(config, {field: defaults(Config)[field]}))


def test_prompts_declare_what_they_read():
    learner = ImageConfig(name="x", weights="clip", prompts=Prompts(margin=0.5, space="rgb"))
    assert set(ignored(learner)) == {"prompts.margin", "prompts.space"}
    assert not ignored(override(learner, {"prompts.condition": "meta", "prompts.alpha": 1}))


def test_no_experiment_sets_a_field_that_nothing_reads():
    registry.load()
    for name, experiment in registry.experiments().items():
        for scale in experiment.scales:
            assert not ignored(experiment.build(scale)), (name, scale)


def test_a_run_of_an_older_version_keeps_the_hash_that_it_was_made_under(tmp_path):
    run = RunDirectory.open(tmp_path / "run", BASE)
    run.begin("key", "tokenizer")
    run.close()
    saved = read_json(tmp_path / "run" / "config.json")
    assert saved["hash"] == config_hash(BASE)
    older = {key: value for key, value in saved.items() if key != "version"} | {"hash": "0ld0ld00"}
    write_json(tmp_path / "run" / "config.json", older)
    again = RunDirectory.open(tmp_path / "run", BASE)
    again.begin("key", "tokenizer")
    again.close()
    assert identity_of(tmp_path / "run")["hash"] == again.identity["hash"] == "0ld0ld00"


@pytest.mark.parametrize("field", ["data.row_length", "training.accumulate", "model.hybrid.meta_tokens"])
def test_an_earlier_name_is_read_from_saved_configs_and_answered_on_the_command_line(field):
    *path, old = field.split(".")
    saved = part = {"name": "x", "model": {"hybrid": {}}}
    for name in path:
        part = part.setdefault(name, {})
    part[old] = 8
    (changed_field,) = (name for name in changed(from_dict(Config, saved)) if name.startswith(field.rpartition(".")[0] + "."))
    with pytest.raises(UserError, match=rf"{field} is {changed_field} now"):
        override(Config(name="x"), {field: 8})


@pytest.mark.parametrize(("field", "default", "other"), [("tasks.classes", 4, 5), ("optimizer.nesterov", True, False)])
def test_a_removed_field_is_read_from_saved_configs_at_its_default_and_answered_elsewhere(field, default, other):
    part, _, name = field.partition(".")
    plain, saved = from_dict(Config, {"name": "x", part: {}}), {"name": "x", part: {name: default}}
    assert from_dict(Config, saved) == plain and config_hash(from_dict(Config, saved)) == config_hash(plain)
    with pytest.raises(UserError, match=f"{field} can only be {default}"):
        from_dict(Config, {"name": "x", part: {name: other}})
    for value in (default, other):
        with pytest.raises(UserError, match=f"{field} was removed"):
            override(plain, {field: value})


if __name__ == "__main__":
    GOLDENS.write_text(json.dumps(dump(), indent=1) + "\n")
    sys.stdout.write(f"{GOLDENS}\n")
