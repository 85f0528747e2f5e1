"""Whole image runs: a small CLIP, learners on it, their reports, and a killed run compared with an undisturbed one."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from metajax import registry
from metajax.config import Init, Optimizer, Training, config_hash
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.experiment import open_task, run_experiment
from metajax.runs.directory import default_workdir, read_config
from metajax.runs.files import read_lines
from metajax.runs.parents import resolve_parents
from metajax.training.opened import open_run
from metajax.vision import prompt_learning, study
from metajax.vision.config import ImageConfig, Images, Prompts
from metajax.vision.program import image_program, shapes_of
from tests import small_images
from tests.small_images import CLIP

ROOT = Path(__file__).parents[2]
SMALL = override(CLIP, {"training.steps": 3})


@pytest.fixture(scope="module")
def clip(paths):
    workdir = default_workdir(SMALL, paths.runs)
    return workdir, run_experiment(SMALL, workdir, paths)


@pytest.fixture(scope="module")
def learner(clip):
    """learner(**changes) -> the config of a learner on that CLIP."""
    changes = {"prompts.context_init": "a photo of a", "runtime.save_every": 4, "runtime.log_every": 5}
    return lambda **more: small_images.learner(clip[0], **changes | more)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Few images, so that silhouettes and t-SNE take less than a second."""
    monkeypatch.setattr(prompt_learning, "PROFILED", 6)


def test_a_clip_is_a_run_like_any_other(clip):
    workdir, report = clip
    assert report["steps"] == 3 and report["eval"]["digits"]["images"] > 500
    assert read_config(workdir) == SMALL and "Where the class token looks" in (workdir / "report.html").read_text()
    maps = json.loads((workdir / "analysis" / "attention.json").read_text())["result"]["details"]
    for found in (np.array(maps["last"]), np.array(maps["rollout"])):
        assert found.shape == (study.SHOWN, 2, 2) and np.all(found > 0) and np.all(found.sum(axis=(1, 2)) < 1)
    with pytest.raises(UserError, match="is a run on images"):
        open_run(workdir)


OF_ANY = "runtime.implementation=xla training.objective=dpo"
OF_A_CLIP = f"""
    {OF_ANY} training.accumulation_steps=2 images.targets=emoji images.classes=base images.shots=3 images.template=a_{{}}
    images.ensemble=true init.from=some/run optimizer.z_loss=0.1
""".split()
OF_A_LEARNER = f"""
    {OF_ANY} training.steps=7 images.batch=8 images.ensemble=true images.template=a_{{}} optimizer.learning_rate=0.1
    optimizer.schedule=linear optimizer.betas=0.1,0.2 optimizer.z_loss=0.1 prompts.margin=1 prompts.constraints=four
    prompts.triplet_of=meta prompts.sampling=weighted prompts.space=rgb prompts.augmentations=sobel_filter,crop
""".split()
PLAIN = ImageConfig(name="coop", images=Images(sources=("digits",)), prompts=Prompts(), init=Init("some/run"))


@pytest.mark.parametrize(
    ("config", "change"),
    [*((SMALL, change) for change in OF_A_CLIP), *((PLAIN, change) for change in OF_A_LEARNER)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_ignored_fields_are_refused_by_name(config, change, paths, tmp_path):
    field, value = change.split("=")
    with pytest.raises(UserError, match=f"would ignore {re.escape(field)}: "):
        resolve_parents(override(config, {field: value}), {field: value}, tmp_path)
    with pytest.raises(UserError, match=f"would ignore {re.escape(field)}: "):
        run_experiment(override(config, {field: value}), tmp_path, paths)


def test_fields_only_for_the_clip_are_not_passed_to_the_learner(own_registry, tmp_path):
    registry.experiment("some/clip", summary="", minutes={"cpu": 1})(lambda scale: SMALL)
    config = override(PLAIN, {"init.from": "some/clip"})
    changes = {"training.steps": 7, "optimizer.learning_rate": 0.5}
    learner, [parent] = resolve_parents(override(config, changes), changes, tmp_path)
    assert parent.training.steps == 7 and parent.optimizer.learning_rate == 0.5
    assert learner.training == Training() and learner.optimizer == Optimizer()
    for changes in ({"runtime.implementation": "xla"}, {"prompts.margin": 1}):
        with pytest.raises(UserError, match="would ignore"):
            resolve_parents(override(config, changes), changes, tmp_path)


AAPL = {
    "images.sources": "digits",
    "images.classes": "all",
    "training.steps": 3,
    "prompts.epochs": 1,
    "prompts.warmup_rate": 0.01,
    "runtime.log_every": 1,
}


def command(folder, **changes):
    """The command of a learner with its CLIP, below `folder`."""
    words = [word for field, value in (AAPL | changes).items() for word in ("--set", f"{field}={value}")]
    return [sys.executable, "run.py", "prompt_learning/base_to_new/aapl/digits", "--runs-dir", folder, *words]


def curves(folder):
    """Loss and gradient norm of every step of the CLIP, then of the learner."""
    files = sorted(folder.rglob("metrics.jsonl"))
    return [[line["loss"], line["grad_norm"]] for file in files for line in read_lines(file)]


@pytest.mark.slow
@pytest.mark.parametrize("images", [4, 3])
def test_two_processes_equal_one_process(clip, paths, tmp_path, images):
    """Four images are spread over two devices; three are not, so each process reads all of them. Both families in one command."""
    changes = {"images.shots": 1, "images.batch": 2 * images, "prompts.batch": images}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for count in (1, 2):
        words = [*command(tmp_path / str(count), **changes), "--cache-dir", paths.cache]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}
        places = [place | {"JAX_PROCESS_ID": str(i)} if count > 1 else {} for i in range(count)]
        started = [subprocess.Popen(words, env=os.environ | place, **options) for place in places]
        said = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, said
    one, two = (curves(tmp_path / str(count)) for count in (1, 2))
    assert len(one) == 3 + 10 // images
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.slow
def test_a_learner_reports_its_deltas_and_is_analysed(learner, paths, monkeypatch):
    config = learner()
    straight = paths.runs / "straight"
    monkeypatch.setattr("metajax.vision.analyses.overhead.ROUNDS", 3)
    report = run_experiment(config, straight, paths, analyses=["overhead"])
    timed = report["analyses"]["overhead"]
    assert timed["cocoop"]["step"]["ratio"] == 1 and timed["aapl"]["step"]["ms"] > 0 and timed["classes"] == 5
    assert report["steps"] == 15 and set(report["eval"]) == {"base", "new", "harmonic", "delta"}
    assert report["training"]["ad_triplet"]["first"] > 0 and -1 <= report["eval"]["delta"]["silhouette"] <= 1
    assert report["parameters"] == {"context": 64, "meta_net": 16 * 16 + 16 + 16 * 16 + 16, "total": 64 + 544}
    page = (straight / "report.html").read_text()
    assert "t-SNE" in page and "silhouette of deltas by augmentation" in page and "Time of a step" in page
    with pytest.raises(UserError, match="unknown analysis 'sharpening'"):
        run_experiment(config, straight, paths, analyses=["sharpening"])


@pytest.mark.slow
def test_four_devices_equal_one_device(tmp_path):
    changes = {"images.shots": 2, "images.batch": 8, "prompts.batch": 4}
    for devices in (1, 4):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        subprocess.run(command(tmp_path / str(devices), **changes), cwd=ROOT, env=os.environ | flags, check=True)
    one, four = (curves(tmp_path / str(devices)) for devices in (1, 4))
    assert len(one) == 3 + 5, "of the CLIP, and of the learner"
    np.testing.assert_allclose(one, four, rtol=1e-4)


def test_a_frozen_clip_computes_in_bfloat16_on_request(learner, paths):
    def loss(dtype):
        config = learner(**{"prompts.compute_dtype": dtype})
        task = open_task(config, paths)
        shapes = shapes_of(config, [read_config(Path(config.init.from_))], paths)
        assert task.model.cfg.compute_dtype == image_program(config, shapes)[0].frozen[0].model.cfg.compute_dtype == dtype
        state = task.program.create_state()
        _, frozen = task.start(state.model, None)
        return float(jax.jit(task.program.step)(state, task.program.put(task.batches[0]), *frozen)[1]["loss"])

    exact, rounded = loss("float32"), loss("bfloat16")
    assert exact != rounded and abs(exact - rounded) < 0.05 * exact
    assert config_hash(learner()) != config_hash(learner(**{"prompts.compute_dtype": "bfloat16"}))


def test_zero_shot_and_coop_need_no_meta_net(learner, paths):
    bare = {"prompts.condition": "none", "prompts.alpha": 0.0, "prompts.sampling": "uniform"}
    report = run_experiment(
        learner(**bare, **{"prompts.context": 0, "prompts.context_init": "", "images.ensemble": True}), paths.runs / "zero", paths
    )
    assert report["steps"] == 0 and report["parameters"] == {"total": 0} and set(report["eval"]) == {"base", "new", "harmonic"}
    plain = {"images.view": "centre", "images.classes": "all", "images.targets": ("digits",), "prompts.batch": 4}
    coop = learner(**bare, **plain, **{"prompts.epochs": 1})
    report = run_experiment(coop, paths.runs / "coop", paths)
    assert report["eval"]["digits"] == report["eval"]["all"] and report["eval"]["targets"] == report["eval"]["all"]["accuracy"]
    assert "ad_triplet" not in report["training"] and report["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts.condition": "none"}, "set prompts.condition=meta"),
        ({"prompts.context": 3}, "prompts.context_init has 4 words but prompts.context = 3"),
        ({"prompts.augmentations": "crop"}, "at least two different ones"),
        ({"prompts.augmentations": "crop,cut"}, "did you mean 'cutout'"),
        ({"images.sources": "digits,emoji"}, "a prompt learner has one"),
        ({"init.from": ""}, "needs a CLIP"),
        ({"prompts.class_position": "front"}, "the name comes last"),
    ],
)
def test_mistakes_name_the_fields(learner, changes, message):
    with pytest.raises(UserError, match=message):
        learner(**changes)


def test_the_tables_agree_with_the_papers_averages():
    registry.load()
    table = registry.tables()["prompt_learning/base_to_new"]
    for row in table.rows:
        for key in ("eval.base.accuracy", "eval.new.accuracy"):
            values = [row.paper(f"{part}: {key}") for part in table.parts_at("paper")]
            if any(values):
                assert len(values) == 11
                assert np.mean([v.value for v in values]) == pytest.approx(row.paper(f"*: {key}").value, abs=0.012), (
                    row.name,
                    key,
                )
        both = [row.paper(f"*: {key}").value for key in ("eval.base.accuracy", "eval.new.accuracy")]
        h, said = 2 * both[0] * both[1] / sum(both), row.paper("*: eval.base.accuracy | eval.new.accuracy")
        assert h == pytest.approx(said.value, abs=0.5 if "two means" in said.note else 0.012), row.name
