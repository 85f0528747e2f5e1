"""The GPU bench, as far as a CPU without PyTorch can test it: our side at tiny sizes, failures, files and tables."""

import json

import jax
import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, clock, report, scan, step
from kernels_pallas.bench.attention import Shape
from metajax import registry
from metajax.training.program import abstract_model


def side(name, value):
    return clock.Side(name, lambda: value, lambda made: None, lambda made: [np.full(4, made)], {"temporary_bytes": 10**9})


def broken():
    raise RuntimeError("no `kernel`\nfor this chip")


def test_a_failure_is_recorded_beside_the_other_times(tmp_path, capsys):
    case = clock.Case("attention", "one", {"flops": 10**9})
    makers = {"ours": lambda: side("ours", 1.0), "near": lambda: side("near", 1.001), "far": lambda: side("far", 1.1)}
    case.race(makers | {"broken": broken}, turn_seconds=1e-5)
    assert set(case.found["near"]) == {"calls", "temporary_bytes", "distance", "median_ms", "least_ms", "most_ms"}
    assert case.found["near"]["least_ms"] <= case.found["near"]["median_ms"] <= case.found["near"]["most_ms"]
    assert case.found["near"]["distance"] == pytest.approx(1e-3)
    assert "median_ms" not in case.found["far"] and "0.1 of its norm" in case.found["far"]["failed"]
    assert "FAILED attention, one, broken: RuntimeError: no `kernel`" in capsys.readouterr().err
    report.start(tmp_path / "gpu.json", {"device": "here"}, ["attention"])
    found = report.add(tmp_path / "gpu.json", case)
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    report.write_page(tmp_path / "gpu.md", found)
    page = (tmp_path / "gpu.md").read_text()
    assert "| near | 0.0" in page and "| 1.0e-03 | 1.00 |" in page and "| far | failed | - | - | - | - |" in page
    assert "- **failed**, broken: `RuntimeError: no 'kernel'`" in page

    for device, section, left in (("here", "scan", ["one"]), ("here", "attention", []), ("another", "scan", [])):
        report.start(tmp_path / "gpu.json", {"device": device}, [section])
        assert [c["name"] for c in json.loads((tmp_path / "gpu.json").read_text())["cases"]] == left
        report.start(tmp_path / "gpu.json", {"device": "here"}, ["attention"])
        report.add(tmp_path / "gpu.json", case)


def test_a_broken_section_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(command.scan, "measure", lambda tiny: (broken() for _ in range(1)))
    (case,) = command.cases(["scan"], True, False)
    assert report.failures(case.as_json()) == [("bench", "RuntimeError: no 'kernel'")]


def test_our_attention_runs_and_its_work_is_counted(monkeypatch):
    setting = attention.Setting(Shape(24, 5, 3, 2, 1, 8, 16), 2, among=24)  # which no other implementation of ours takes
    index = np.arange(24)
    reach = index[:, None] - index[None]
    pairs = np.count_nonzero((reach >= 0) & (reach <= 5)) + 24 * 3
    assert setting.flops("forward") == 2 * 2 * 2 * pairs * (8 + 16)
    assert setting.flops("both") - setting.flops("forward") == 2 * 2 * 2 * pairs * (3 * 8 + 2 * 16)
    monkeypatch.setattr(attention, "settings", lambda tiny: {"one": setting})
    monkeypatch.setattr(attention, "PASSES", ("forward",))
    (case,) = attention.measure(tiny=True, rivals=None)
    assert case.name == "one; forward" and list(case.found) == ["ours (auto)"]
    assert case.found["ours (auto)"]["distance"] == 0 and case.found["ours (auto)"]["median_ms"] > 0


def test_the_steps_have_the_papers_sizes():
    registry.load()
    sizes = {}
    for arm in step.ARMS:
        config = step.config_of(arm, tiny=False)
        batch = step.random_batch(config, step.VOCABULARY)
        assert batch["tokens"].shape == (step.ROWS, 1024) and config.model.compute_dtype == "bfloat16"
        sizes[arm] = sum(x.size for x in jax.tree.leaves(abstract_model(config, step.VOCABULARY)))
    matrices, norms = 12 * 12 * 768**2 + step.VOCABULARY * 768, 25 * 768
    meta = 12 * (4 * 768**2 + 768)
    assert sizes == {"plain": matrices + norms, **dict.fromkeys(("meta, gathered", "meta, dense"), matrices + norms + meta)}
    assert np.all(np.diff(batch["meta_positions"], axis=1) > 0) and batch["meta_positions"].shape == (step.ROWS, 102)


def test_the_command_writes_after_each_section(tmp_path, monkeypatch, capsys):
    assert command.main([]) == 2
    assert "requirements-gpu.txt" in capsys.readouterr().err
    monkeypatch.setattr(scan, "PASSES", ("forward",))
    assert command.main(["--tiny", "--only", "scan", "--output", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert case["sides"]["ours (auto)"]["median_ms"] > 0 and case["facts"]["necessary_bytes"] == 2 * (4 * 64 * 16 + 2 * 64 * 4)
    assert "GB/s of necessary bytes" in (tmp_path / "gpu.md").read_text()
