"""Plans of all experiments: the distinct programs, the slice of each, and a failing program that does not stop the others."""

import json

from metajax import registry
from metajax.cli import plans as command
from metajax.cli.main import main
from metajax.cli.plans import programs
from metajax.planning import topology


def names_by_program(*names):
    registry.load()
    return [[config.name for config in group] for group in programs(registry.experiments()[n].build("paper") for n in names)]


def test_a_program_depends_on_model_and_rows_not_on_data_and_rates():
    standard, hashed, meco = "metadata/positions/standard", "metadata/url_parts/hashed", "metadata/meco_main/standard"
    assert names_by_program(standard, meco, hashed) == [[standard, hashed], [meco]]
    tuned, pretrained = "learned_meta_tokens/main_tasks/meta_rope/parity", "learned_meta_tokens/pretrain/meta_rope"
    assert names_by_program(tuned, pretrained) == [[tuned], [pretrained]]


def test_the_learner_with_most_classes_stands_for_the_others_and_zero_shot_trains_nothing():
    aapl, heavier, rgb = (
        "prompt_learning/base_to_new/aapl/",
        "prompt_learning/ablations/alpha_1.0/dtd",
        "prompt_learning/ablations/rgb/dtd",
    )
    found = names_by_program(heavier, f"{aapl}dtd", f"{aapl}imagenet", rgb, "prompt_learning/base_to_new/clip/dtd")
    assert found == [[f"{aapl}imagenet", heavier, f"{aapl}dtd"], [rgb]]


def survey_with(monkeypatch, root, plan, *words):
    """(exit code, written plans) of `plan --all` with this function in place of the planner."""
    monkeypatch.setattr(topology, "allow_compiler", lambda dump: None)
    monkeypatch.setattr(command, "plan", lambda config, step, topology, dump: plan(config.name, topology))
    code = main(["plan", "hymba/1", "--all", "--scale", "paper", "--runs-dir", str(root), *words])
    return code, json.loads((root / "plans" / "paper.json").read_text())


def planned(name, topology, fits):
    more = {"memory": {"total": 2**30, "limit": 2**34}, "bound": {"step": 0.5, "mfu": 0.4}} if fits else {"reason": "too large"}
    return {"name": name, "topology": topology, "fits": fits, "compile_seconds": 3.0} | more


def test_a_failing_plan_is_reported_and_the_others_continue(tmp_path, monkeypatch, capsys):
    def plan(name, topology):
        if name == "hymba/125m":
            raise ValueError("breaks down\nat length")
        return planned(name, topology, fits=topology == "v5p:2x2x2" and name != "hymba/1.5b_8k")

    code, made = survey_with(monkeypatch, tmp_path, plan, "--topology", "v5p:2x2x1,v5p:2x2x2")
    assert code == 1
    found = {one["name"].removeprefix("hymba/"): (one["topology"], one["fits"]) for one in made}
    large = "v5p:2x2x2"
    assert found == {"1.5b": (large, True), "1.5b_8k": (large, False), "125m": (large, False), "125m_8k": (large, True)}
    assert made[2]["reason"] == "ValueError: breaks down" and made[3]["stands_for"] == ["hymba/125m_8k"]
    assert "2 of 4 programs fit" in capsys.readouterr().out


def test_the_smallest_slice_is_tried_first_and_nothing_is_wrong_when_all_fit(tmp_path, monkeypatch, capsys):
    code, made = survey_with(monkeypatch, tmp_path, lambda name, topology: planned(name, topology, fits=True))
    assert code == 0 and {found["topology"] for found in made} == {"v5p:2x2x1"}
    assert main(["plan", "--all", "--set", "seed=1"]) == 2 and "--set does not go with --all" in capsys.readouterr().err
    assert main(["plan", "hymba/125m"]) == 2 and "--topology" in capsys.readouterr().err
