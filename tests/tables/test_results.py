"""A table's result from synthetic reports: rows whose field a corpus lacks, and steps to match the baseline."""

import pytest

from metajax import registry
from metajax.config import Config, Training
from metajax.core.errors import UserError
from metajax.registry import ByScale, Column, Row
from metajax.runs.files import write_json
from metajax.tables.formats import markdown
from metajax.tables.listing import print_table_plan
from metajax.tables.results import share_to_match
from metajax.tables.run import plan_table

pytestmark = pytest.mark.usefixtures("own_registry")
REPORT = {"parameters": {"total": 1000}, "flops_per_token": {"mlp": 10.0}, "warnings": [], "analyses": {}}
REPORT["counts"] = {"positions": 400, "body": 380, "metadata": 0, "meta_tokens": 20, "flops": 1.5e6}
REPORT["eval"] = {"none": {"bpb": 2.0}}


def plan_of(rows, columns, root):
    base = lambda scale: Config(name="lab", training=Training(steps=100))  # noqa: E731
    made = registry.table("lab", summary="s", rows=rows, columns=columns, baseline="plain", minutes={"cpu": 1, "gpu": 1})(base)
    return plan_table(made, "cpu", [0], {}, root, made.rows)


def test_a_row_without_its_field_is_shown_but_not_run(tmp_path, capsys):
    rows = [Row("plain"), Row("scored", {"training.steps": 50}, lacks=ByScale(cpu="a score"))]
    plan = plan_of(rows, [Column("bits/byte", "eval.none.bpb")], tmp_path)
    [run] = plan.runs()
    write_json(run.workdir / "report.json", REPORT)
    assert "| scored | not here " in markdown(plan.result())
    assert "- Not run here for lack of a score: scored.\n" in markdown(plan.result())
    print_table_plan(plan)
    assert "not run here for lack" in " ".join(capsys.readouterr().out.split())
    assert registry.find_experiment("lab/scored").scales == ("gpu",)
    with pytest.raises(UserError, match="lab/scored cannot be run at scale cpu: it lacks a score"):
        registry.find_experiment("lab/scored").build("cpu")
    assert plan.table.config(plan.table.rows[1], "gpu").training.steps == 50


@pytest.mark.parametrize(
    ("curve", "target", "margin", "share"),
    [
        ([(10, 4.0), (20, 2.0), (40, 1.0)], 3.0, 0.0, 15 / 40),
        ([(10, 4.0), (20, 2.0), (40, 1.0)], 3.0, 0.5, 17.5 / 40),  # has to fall half a bit below
        ([(10, 4.0), (20, 2.0), (40, 1.0)], 0.5, 0.0, None),
        ([(10, 4.0), (20, 2.0), (30, 3.0), (40, 1.0)], 2.0, 0.0, 20 / 40),  # the first time counts
        ([(10, 0.1), (20, 0.3), (40, 0.4)], 0.35, 0.0, 30 / 40),  # an accuracy rises
        ([(40, 1.0)], 2.0, 0.0, None),  # an end alone is no curve
    ],
)
def test_steps_to_match_are_interpolated(curve, target, margin, share):
    assert share_to_match(curve, target, margin) == (share if share is None else pytest.approx(share))


def test_a_column_may_show_the_share_of_steps_to_match_the_baseline(tmp_path):
    columns = [Column("steps, %", "curves.bpb", 1, "lower", 100, match=margin) for margin in (0.0, 0.25)]
    columns += [Column("early", f"curves.bpb.{at}.1", factor=10) for at in (0, 2)]
    plan = plan_of([Row("plain"), Row("fast", {"training.steps": 50}, {columns[0].key: 60.0})], columns, tmp_path)
    curves = [[[50, 3.0], [100, 2.0]], [[25, 2.5], [50, 1.5]]]
    for run, curve in zip(plan.runs(), curves, strict=True):
        write_json(run.workdir / "report.json", REPORT | {"curves": {"bpb": curve}})
    plain, fast = ([row["cells"][c.key]["values"] for c in columns] for row in plan.result()["rows"])
    assert plain == [[100.0], [None], [30.0], [None]] and fast == [[75.0], [87.5], [25.0], [None]]
