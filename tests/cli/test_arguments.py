"""Wrong input of users: a number out of range, an impossible path, another encoding. One line, exit code 2, nothing computed."""

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import typing
from itertools import islice
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.cli import main as cli
from metajax.config import Config, Data, MetaTokens, Model, Runtime, Training
from metajax.core.errors import UserError
from metajax.core.fields import Range, field_types, flatten, from_dict, override, to_dict
from metajax.data.tokenizers import vocabulary_of
from metajax.inference.decoding import Sampling
from metajax.runs.loggers import check_loggers
from metajax.vision.clip.config import Clip
from metajax.vision.config import ImageConfig, Images
from tests import fuzz_arguments

BASE = Config(name="x")
MANY = [f"--sweep=model.{field}={','.join(map(str, range(1, 200)))}" for field in ("layers", "heads", "width")]
# Mistakes of --set, and a part of the error.
CHANGES = {
    "runtime.mesh=": "runtime.mesh is empty",
    "runtime.mesh=data=0,fsdp=-1": "data = '0'",
    "runtime.mesh=data=-2": "data = '-2'",
    "runtime.mesh=data=1e12": "data = '1e12'",
    "runtime.mesh=data=-1,fsdp=-1": "only one axis",
    "runtime.mesh=data=1,data=1": "it names data twice",
    "runtime.mesh=dta=1": "did you mean 'data'",
    "training.steps=1e300": "training.steps = '1e300'",
    "model.width=1e12": "model.width = '1e12'",
    "model": "expected FIELD=VALUE",
    "=3": "expected FIELD=VALUE",
    "model.layers=": "model.layers = ''",
    "model.layrs=3": "unknown field model.layrs; did you mean 'layers'?",
    "model.layers=three": "model.layers = 'three': expected a whole number",
    "model.norm=rmsnrm": "did you mean 'rmsnorm'?",
    "model.heads=3": "model.width = 128 does not divide by model.heads = 3",
    "model.layers": "expected FIELD=VALUE",
    "seed=7": "use --seed N",
    "scale=gpu": "use --scale",
}


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """told(WORDS) -> the one error line of a command that exits with 2; nothing is created where it is called."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before and out == ""
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        return line

    return run


def parts(cls):
    """The dataclass of a config and those of all its sub-configs."""
    yield cls
    for hint in field_types(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from parts(part)


# ---------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.fault(11)
def test_no_seed_is_cut_to_32_bits(told):
    assert "from 0 to 4,294,967,295" in told("quickstart/plain", "--seed", "4294967296")
    assert "from 0 to 4,294,967,295" in told("generate", "x", "--prompt", "a", "--seed", "-1")
    assert "the last seed" in told("quickstart", "--seed", "4294967295", "--seeds", "2")
    builders = (
        lambda seed: Config(name="x", seed=seed),
        lambda seed: override(BASE, {"seed": seed}),
        lambda seed: from_dict(Config, {**to_dict(BASE), "seed": seed}),
        lambda seed: ImageConfig(name="x", clip=Clip((1,), 8, 1, 8, 1, 8, patch=8, image_size=8), seed=seed),
    )
    for build in builders:
        assert build(2**32 - 1).seed == 2**32 - 1
        for seed in (2**32, -1, 2**64):
            with pytest.raises(UserError, match=r"^seed = "):
                build(seed)


@pytest.mark.fault(11)
def test_seeds_within_the_range_differ_where_they_are_used():
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    assert len({tuple(np.asarray(jax.random.key_data(jax.random.key(seed)))) for seed in seeds}) == len(seeds)
    orders = {tuple(islice(grain.MapDataset.range(1000).seed(seed).shuffle(), 8)) for seed in seeds}
    assert len(orders) == len(seeds)


# --------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.fault(27)
@pytest.mark.parametrize("cls", [*dict.fromkeys([*parts(Config), *parts(ImageConfig), Sampling])])
def test_every_number_of_a_config_has_a_range(cls):
    def numbers(hint):
        if typing.get_origin(hint) is typing.Annotated:
            inner, *marks = typing.get_args(hint)
            return [] if any(isinstance(mark, Range) for mark in marks) else numbers(inner)
        return [hint] if hint in (int, float) else [n for part in typing.get_args(hint) for n in numbers(part)]

    assert [name for name, hint in field_types(cls).items() if numbers(hint)] == []


@pytest.mark.fault(27)
def test_every_number_of_the_command_line_has_a_range_that_help_tells():
    (sub,) = (action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb, parser in sub.choices.items():
        for action in parser._actions:
            assert action.type not in (int, float), (verb, action.option_strings)
            numeric = isinstance(action.default, (int, float)) and not isinstance(action.default, bool) and action.nargs != 0
            if numeric or action.metavar == "N":
                assert "number" in action.help and any(word in action.help for word in (" from ", " above ")), (verb, action.help)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--prompt", "a", "--tokens", "-1"], "--tokens = '-1': expected a whole number from 1"),
        (["generate", "x", "--prompt", "a", "--tokens", "0"], "from 1"),
        (["generate", "x", "--prompt", "a", "--temperature", "inf"], "--temperature = 'inf'"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "--temperature = 'nan'"),
        (["generate", "x", "--prompt", "a", "--top-k", "-5"], "--top-k"),
        (["generate", "x", "--prompt", "a", "--top-p", "0"], "above 0 and at most 1"),
        (["generate", "x", "--prompt", "a", "--guidance", "1e300"], "--guidance"),
        (["show", "quickstart/plain", "--rows", "-1"], "--rows"),
        (["analyze", "x", "--examples", "0"], "--examples"),
        (["analyze", "x", "--length", "1e300"], "--length"),
        (["eval", "x", "--documents", "-1"], "--documents"),
        (["eval", "x", "--lengths", "64,0"], "--lengths = '0'"),
        (["eval", "x", "--shots", "5,-1"], "--shots = '-1'"),
        (["run", "--all", "--budget", ""], "--budget"),
        (["run", "--all", "--budget", ".m"], "--budget"),
        (["quickstart", "--jobs", "0"], "--jobs"),
        (["quickstart", "--seeds", "1e300"], "--seeds"),
        (["preflight", "--seconds", "nan"], "--seconds"),
        (["cache", "quickstart/plain", "--workers", "0"], "--workers"),
        (["checkpoints", "x", "--prune", "0"], "--prune"),
        (["export", "gpt2", "x", "y", "--shard-gb", "0"], "--shard-gb"),
        (["plan", "quickstart/plain", "--topology", "v5e:4x4", "--vocabulary", "0"], "--vocabulary"),
        (["plan", "quickstart/plain", "--topology", "v5e:0x4"], "--topology"),
        (["plan", "quickstart/plain", "--topology", "v5e:99999x4"], "--topology"),
        (["quickstart/plain", "--processes", "2", "--process-id", "-1", "--coordinator", "a:1"], "--process-id"),
        (["show", "quickstart", "--set", "model.position=ropee"], "did you mean 'rope'"),
        (["quickstart/plain", "--set", "optimizer.momentum=0.5"], "would ignore optimizer.momentum"),
        (["show", "quickstart/plain", "--set", "optimizer.momentum=0.5"], "would ignore optimizer.momentum"),
        (["quickstart/plain", *MANY], "a sweep of"),
    ],
)
def test_numbers_out_of_range(told, words, message):
    assert message in told(*words)


@pytest.mark.fault(27)
@pytest.mark.parametrize(("change", "message"), CHANGES.items())
def test_an_impossible_change_is_refused(told, change, message):
    assert message in told("quickstart/plain", "--set", change)


@pytest.mark.fault(27)
def test_ports_and_process_numbers():
    from metajax.distributed.hosts import Place, find_place

    for port in ("0", "65536", "x", "²"):
        with pytest.raises(UserError, match="from 1 to 65,535"):
            Place(f"host:{port}", 2, 0)
    with pytest.raises(UserError, match="processes = '²'"):
        find_place("host:1", "²", "0")


@pytest.mark.fault(27)
def test_ranges_hold_for_python_and_json_too():
    for build, name in (
        (lambda: Model(layers=0), "model.layers"),
        (lambda: Model(width=10**12), "model.width"),
        (lambda: Model(layers=2.5), "model.layers"),
        (lambda: Training(steps=10**300), "training.steps"),
        (lambda: MetaTokens(rate=1.0), "meta_tokens.rate"),
        (lambda: Data(validation_share=float("nan")), "data.validation_share"),
        (lambda: Data(weights=(-1.0,)), "data.weights"),
        (lambda: Runtime(hang_seconds=float("inf")), "runtime.hang_seconds"),
        (lambda: Images(batch=1), "images.batch"),
        (lambda: from_dict(Config, {"name": "x", "model": {"layers": 0}}), "model.layers"),
        (lambda: override(BASE, {"data.switch": '{"step": 0}'}), "data.switch.step"),
        (lambda: override(BASE, {"tasks": '{"names": 5}'}), "tasks.names"),
        (lambda: override(BASE, {"tasks": '{"train_length": ' + "9" * 5000 + "}"}), "tasks"),
        (lambda: Model(norm="rmsnrm"), "model.norm"),
    ):
        with pytest.raises(UserError, match=f"^{name} = .*expected "):
            build()
    assert Model(layers="4").layers == 4 and Data(sources=["a"]).sources == ("a",)


@pytest.mark.fault(27)
@pytest.mark.parametrize("sampling", [Sampling(1e-38), Sampling(1e-30, top_k=3), Sampling(1e-6, top_p=0.9)])
def test_a_temperature_close_to_0_takes_the_most_likely_token(sampling):
    logits = jnp.array([-jnp.inf, 3.0, 97.5, 97.0, -jnp.inf])
    assert {int(jax.jit(sampling.draw)(logits, jax.random.key(seed))) for seed in range(5)} == {2}


@pytest.mark.fault(27)
def test_a_high_temperature_draws_no_banned_token():
    logits = jnp.array([-jnp.inf, 3.0, 9.0, -jnp.inf])
    drawn = {int(jax.jit(Sampling(1e6).draw)(logits, jax.random.key(seed))) for seed in range(40)}
    assert drawn == {1, 2}
    with pytest.raises(UserError):
        Sampling(float("inf"))


# -------------------------------------------------------------------------------------------- paths, text, streams


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    return str(path)


@pytest.mark.fault(36)
@pytest.mark.parametrize("option", ["--cache-dir", "--runs-dir", "--data-dir", "--workdir"])
def test_a_file_where_a_folder_is_wanted(told, file, option):
    assert file in told("quickstart/plain", option, file)
    assert file in told("quickstart/plain", option, f"{file}/inside")


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart/plain", "--data-dir", "ftp://x"], "gs://BUCKET/PATH"),
        (["quickstart/plain", "--data-dir", "nowhere"], "no such folder"),
        (["quickstart/plain", "--runs-dir", "x" * 300], "File name too long"),
        (["quickstart/plain", "--workdir", ""], "is empty"),
        (["generate", "x", "--prompt", "a\udcff"], r"'a\udcff': expected text in UTF-8"),
        (["show", "a\0b"], "without NUL"),
        (["show", "quickstart/plain", "--set", 'tasks={"names": ["\\u0000"]}'], "without NUL"),
        (["show", "quickstart/plain", "--set", "tasks=" + "[" * 5000], "expected JSON"),
        (["show", "quickstart/plain", "--set", "dpo.beta=0"], "dpo.beta = '0'"),
        (["plan", "quickstart/plain", "--topology", "v5e:4x4", "--html", "nowhere/page.html"], "in an existing folder"),
        (["eval", ""], "is empty"),
        (["analyze", "x", "--what", ""], "is empty"),
    ],
)
def test_an_impossible_value_is_one_line(told, words, message):
    assert message in told(*words)


@pytest.mark.fault(36)
@pytest.mark.parametrize("size", ["64000000000", "9" * 5000, "-64", "1e12", ""])
def test_a_vocabulary_has_a_largest_size(size):
    with pytest.raises(UserError, match="from 320 on, at most 1,048,576"):
        vocabulary_of(f"bpe:{size}")


@pytest.mark.fault(36)
def test_null_is_none():
    config = override(BASE, {"meta_tokens.rate": 0.2})
    for word in ("null", "none", "NULL", "None"):
        changed = override(config, {"meta_tokens": word, "model.window": word})
        assert changed.meta_tokens is None and flatten(changed)["model.window"] is None


@pytest.mark.fault(36)
def test_weights_and_biases_without_a_key(told, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert "WANDB_API_KEY" in told("quickstart/plain", "--set", "runtime.loggers=wandb")
    assert "WANDB_API_KEY" in told("quickstart", "--set", "runtime.loggers=wandb")
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    check_loggers(["wandb"])
    (home / ".netrc").write_text("machine\n")
    with pytest.raises(UserError, match="cannot be read"):
        check_loggers(["wandb"])
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    with pytest.raises(UserError):
        check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"])


@pytest.mark.fault(36)
def test_any_encoding_and_pattern_is_accepted(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["list", "[/x] ünï"]) == 0
    assert rb"[/x] \xfcn\xef" in sys.stdout.buffer.getvalue()
    assert cli.main(["ünï"]) == 2
    assert rb"\xfcn\xef" in sys.stderr.buffer.getvalue()


@pytest.mark.fault(36)
def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    for words in (["list"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "run.py", *words], cwd=Path(__file__).parents[2], stdout=write, stderr=subprocess.PIPE
        )
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)


@pytest.mark.fault(36)
def test_a_field_that_is_set_twice(told, capsys):
    words = ("show", "quickstart/plain", "--set", "model.layers=2", "--set", "model.layers=0")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "--set model.layers is given twice" in err and "model.layers = '0'" in err


# ----------------------------------------------------------------------------------------------------------- fuzz


def test_a_sample_of_generated_arguments(tmp_path):
    cases = list(islice(fuzz_arguments.cases(seed=0), 250))
    assert len({json.dumps(words) for words in cases}) > 240
    with fuzz_arguments.no_work(tmp_path):
        wrong = [(words, found) for words in cases if (found := fuzz_arguments.problem(words))]
    assert wrong == []
