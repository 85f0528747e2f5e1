"""Parts of a table that only some scales have, and columns over all parts."""

from dataclasses import replace

import pytest

from metajax import registry
from metajax.config import Config, Training
from metajax.core.errors import UserError
from metajax.registry import ByScale, Column, Row
from metajax.tables.run import plan_table

pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def table(own_registry):
    rows = [Row("a"), Row("b", {"training.steps": 60}), Row("seen", of="lab_parts/a")]
    columns = [
        Column("average base", "eval.base", 1, "higher", 100, part="*"),
        Column("average H", "eval.base", 1, "higher", 100, harmonic="eval.new", part="*"),
        Column("small H", "eval.base", 1, "higher", 100, harmonic="eval.new", part="small"),
        Column("large base", "eval.base", part="large"),
        Column("in print", "in_print.mean", part="*", scales=("paper",)),
    ]
    small, mid, large = ({"training.steps": steps} for steps in (50, 51, 52))
    parts = {"small": small, "mid": ByScale(cpu=mid), "large": ByScale(paper=large)}
    made = {"summary": "by data set", "rows": rows, "columns": columns, "baseline": None, "parts": parts}
    registered = registry.table("lab_parts", minutes={"cpu": 1, "paper": 60}, **made)
    return registered(lambda scale: Config(name="lab", training=Training(steps=100)))


def test_a_part_exists_at_the_stated_scales(table, tmp_path):
    assert [run.part for run in plan_table(table, "cpu", (0,), {}, tmp_path, table.rows[:1]).runs()] == ["small", "mid"]
    assert [run.part for run in plan_table(table, "paper", (0,), {}, tmp_path, table.rows[:1]).runs()] == ["small", "large"]
    assert [c.title for c in table.columns_at("cpu")] == ["average base", "average H", "small H"]
    assert registry.experiments()["lab_parts/a/mid"].scales == ("cpu",)
    with pytest.raises(UserError, match="lab_parts has no mid at scale paper; it has small, large"):
        registry.experiments()["lab_parts/a/mid"].build("paper")
    with pytest.raises(UserError, match="has no 'gpu' scale"):
        table.parts_at("gpu")


def test_columns_over_parts_are_means(table, tmp_path):
    from metajax.runs.files import write_json

    numbers = {"small": (0.8, 0.4), "mid": (0.6, 0.2)}
    plan = plan_table(table, "cpu", (0,), {}, tmp_path, table.rows)
    for run in plan.runs():
        base, new = numbers[run.part]
        report = {"analyses": {}, "warnings": [], "counts": {}, "flops_per_token": {}, "parameters": {"total": 1}}
        write_json(run.workdir / "report.json", report | {"eval": {"base": base, "new": new}})
    cells = plan.result()["rows"][2]["cells"]
    found = {key: cell["ours"]["mean"] for key, cell in cells.items()}
    assert found["*: eval.base"] == pytest.approx(70)
    assert found["*: eval.base | eval.new"] == pytest.approx(2 * 70 * 30 / 100), (
        "the harmonic mean of the averages, not the average of harmonic means"
    )
    assert found["small: eval.base | eval.new"] == pytest.approx(2 * 80 * 40 / 120)
    missing = next(run for run in plan.runs() if run.part == "mid" and run.config.name == "lab_parts/a/mid")
    (missing.workdir / "report.json").unlink()
    assert plan.result()["rows"][0]["cells"]["*: eval.base"]["ours"] is None, (
        "a mean over some of the parts would be another number"
    )


def test_a_difference_and_a_harmonic_mean_are_not_one_column():
    with pytest.raises(UserError, match="not both"):
        Column("x", "eval.a", minus="eval.b", harmonic="eval.c")


def test_a_row_of_an_experiment_without_parts_has_one(table, tmp_path):
    registry.experiment("lab_large", summary="s", minutes={"cpu": 1})(lambda scale: Config(name="x", training=Training(steps=70)))
    row = Row("large", of="lab_large", parts=("small",))
    plan = plan_table(replace(table, rows=(row,)), "cpu", (0,), {}, tmp_path, [row])
    [run] = plan.runs()
    assert (run.config.name, run.config.training.steps, run.part) == ("lab_large", 70, "small")
