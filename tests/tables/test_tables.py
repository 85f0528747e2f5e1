"""Tables with synthetic runs: parents first, failures, interruption, published values, rendering only."""

import csv
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from metajax import registry
from metajax.config import Config, Training, config_hash
from metajax.core.errors import UserError
from metajax.core.fields import override, to_dict
from metajax.core.workers import workers
from metajax.registry import ByScale, Column, Published, Row
from metajax.runs.directory import FAILURE_LOG
from metajax.runs.files import write_json
from metajax.runs.parents import resolve_parents
from metajax.tables.choice import choose_rows, expected_minutes
from metajax.tables.formats import failures, markdown
from metajax.tables.run import plan_table, run_table
from metajax.tables.sweeps import sweep_table, swept

SCORE = "eval.tasks.recall.exact"
COLUMNS = (
    Column("exact match, %", SCORE, digits=1, better="higher", factor=100),
    Column("what the position costs", SCORE, 1, "", 100, minus="eval.tasks.recall.no_position"),
    Column("bits/byte", "eval.right.bpb"),
)
LOSS = f"{SCORE} - eval.tasks.recall.no_position"
IN_PRINT = {SCORE: Published(98.7, "read off figure 1"), LOSS: -11.1}
ROWS = (
    Row("plain", {"init.from": "lab_base/plain"}, {SCORE: 3.6, "eval.right.bpb": None}, group="models"),
    Row("meta", {"init.from": "lab_base/plain", "model.layers": 6}, IN_PRINT, group="models"),
    Row("scratch", {"training.steps": 50}, core=False, group="controls", note="no pre-training"),
)


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def page():
    """For tests that read report.html."""


@pytest.fixture(autouse=True)
def pages_where_they_are_read(request, monkeypatch):
    if "page" not in request.fixturenames:  # drawing figures takes longer than all the rest
        monkeypatch.setattr("metajax.tables.page.write_table_page", lambda folder, result, root: folder)


@pytest.fixture
def table(own_registry):
    registry.experiment("lab_base/plain", summary="pre-training", minutes={"cpu": 5})(base)
    return registry.table(
        "lab_table", summary="recall after pre-training", rows=ROWS, columns=COLUMNS, baseline="plain", minutes={"cpu": 2}
    )(base)


def base(scale):
    return Config(name="lab", training=Training(steps=100))


class Runs:
    """Stands in for training: writes the report of a complete run, counts what it is asked for, and fails where it is told to."""

    def __init__(self, fail=(), stop_after=None):
        self.made, self.analysed, self.fail, self.stop_after = [], [], set(fail), stop_after

    def __call__(self, config, workdir, analyses):
        self.analysed.append((config.name, *analyses))
        if (workdir / "report.json").exists():
            return json.loads((workdir / "report.json").read_text())
        if self.stop_after is not None and len(self.made) == self.stop_after:
            raise KeyboardInterrupt
        if (config.name, config.seed) in self.fail:
            raise FloatingPointError("loss nan\nand more")
        self.made.append((config.name, config.seed))
        write_json(workdir / "config.json", {"hash": config_hash(config), "config": to_dict(config)})
        write_json(workdir / "environment.json", ENVIRONMENT)
        score = {"plain": 0.25, "meta": 0.5, "scratch": 0.125}.get(config.name.split("/")[-1], 0.0) + config.seed / 64
        report = REPORT | {"name": config.name, "seed": config.seed, "steps": config.training.steps, "config": to_dict(config)}
        tasks = {"recall": {"exact": score, "no_position": score + 0.125 + config.seed / 128}}
        report["eval"] = {"none": VALIDATION, "tasks": tasks}
        write_json(workdir / "report.json", report)
        (workdir / "report.html").write_text("a page")
        return report


REPORT = {"parameters": {"total": 1000}, "flops_per_token": {"mlp": 10.0, "attention": 20.0}}
REPORT |= {"sample": None, "corpora": [], "warnings": [], "analyses": {}}
COUNTS = {"positions": 400, "body": 380, "metadata": 0, "meta_tokens": 20, "padding": 0, "loss_tokens": 380}
REPORT["counts"] = COUNTS | {"flops": 1.5e6}
VALIDATION = {"bpb": 2.0, "documents": 9, "body_bytes": 90, "body_tokens": 30}
ENVIRONMENT = {"python": "3.11", "platform": "Linux", "libraries": {"jax": "0"}, "cpu_count": 2, "command": ["run.py"]}
ENVIRONMENT |= {"devices": {"kind": "cpu", "count": 1, "hosts": 1}, "git": {"commit": "a" * 40, "dirty": False}}
ENVIRONMENT["started"] = "2025-06-01T12:00:00+00:00"


def plan_of(table, root, seeds=(0, 1, 2), changes=None, rows=None):
    return plan_table(table, "cpu", seeds, changes or {}, root, rows or table.rows)


def cell(result, row, key=SCORE):
    return next(r for r in result["rows"] if r["name"] == row)["cells"][key]


# ----------------------------------------------------------------------------------------------------- parents


def test_a_parent_runs_first_and_once(table, tmp_path):
    runs = Runs()
    result = run_table(plan_of(table, tmp_path, [0, 1]), runs)
    names = ["lab_base/plain", "lab_table/plain", "lab_table/meta", "lab_table/scratch"]
    assert runs.made == [(name, seed) for seed in (0, 1) for name in names]
    parents = {run["seed"]: run["parent"] for run in result["rows"][1]["runs"]}
    assert parents[0].startswith("lab_base/plain/cpu/") and parents[0].endswith("-s0") and parents[1].endswith("-s1")
    assert all((tmp_path / parent / "report.json").exists() for parent in parents.values())
    assert run_table(plan_of(table, tmp_path, [0, 1]), runs) == result
    assert len(runs.made) == 8, "complete runs are not made again"


def test_the_hash_of_a_child_depends_on_its_parent(table, tmp_path):
    def child_of(steps):
        registry._known["lab_base/plain"] = replace(
            registry._known["lab_base/plain"],
            build=lambda scale: override(replace(base(scale), name="lab_base/plain"), {"training.steps": steps}),
        )
        config, [parent] = resolve_parents(table.config(ROWS[0], "cpu"), {}, tmp_path)
        assert config.init.from_ == f"lab_base/plain/cpu/{config_hash(parent)}-s0"
        return config_hash(config)

    assert child_of(100) == child_of(100) != child_of(200)


def test_changes_apply_to_parents_except_evaluation(table, tmp_path):
    changes = {"training.steps": "70", "evaluation.documents": "9", "meta_tokens.rate": "0.2"}
    parent, child = (run.config for run in plan_of(table, tmp_path, [3], changes, ROWS[:1]).runs())
    assert (parent.name, parent.seed, parent.training.steps, parent.evaluation.documents) == ("lab_base/plain", 3, 70, 400)
    assert (child.training.steps, child.evaluation.documents) == (70, 9)
    assert parent.meta_tokens is None, "a change of a missing sub-config is skipped"


def test_changes_of_a_row_do_not_apply_to_its_parent(table, tmp_path):
    parent, child = (run.config for run in plan_of(table, tmp_path, [0], rows=ROWS[1:2]).runs())
    assert (parent.model.layers, child.model.layers) == (4, 6)


def test_grandparents_come_first(table, tmp_path):
    registry.experiment("lab_long", summary="s", minutes={"cpu": 1})(
        lambda scale: override(base(scale), {"init.from": "lab_table/meta"})
    )
    config, older = resolve_parents(replace(registry.find("lab_long").build("cpu"), seed=4), {}, tmp_path)
    assert [(c.name, c.seed) for c in older] == [("lab_base/plain", 4), ("lab_table/meta", 4)]
    assert older[1].init.from_.startswith("lab_base/plain/cpu/") and config.init.from_.startswith("lab_table/meta/cpu/")


def test_a_cycle_of_parents_is_refused(tmp_path):
    for one, other in (("lab_a", "lab_b"), ("lab_b", "lab_a")):
        registry.experiment(one, summary="s", minutes={"cpu": 1})(
            lambda scale, other=other: override(base(scale), {"init.from": other})
        )
    with pytest.raises(UserError, match="circular: lab_a -> lab_b -> lab_a; one of them has to start afresh"):
        resolve_parents(registry.find("lab_a").build("cpu"), {}, tmp_path)


def test_a_parent_that_is_neither_experiment_nor_run(table, tmp_path):
    config = override(base("cpu"), {"init.from": "lab_base/plane"})
    with pytest.raises(UserError, match="neither an experiment nor a run; did you mean 'lab_base/plain'"):
        resolve_parents(config, {}, tmp_path)
    with pytest.raises(UserError, match="lab_table is a table; name one of its rows, such as lab_table/plain"):
        resolve_parents(override(config, {"init.from": "lab_table"}), {}, tmp_path)


# ------------------------------------------------------------------------------------------ failure, interruption


def test_a_failed_row_is_shown_and_the_others_continue(table, tmp_path, page):
    runs = Runs(fail={("lab_table/meta", 1)})
    plan = plan_of(table, tmp_path)
    result = run_table(plan, runs)
    [failed] = failures(result)
    assert (failed["row"], failed["seed"], failed["reason"]) == ("meta", 1, "FloatingPointError: loss nan")
    log = (tmp_path / failed["folder"] / FAILURE_LOG).read_text()
    assert "Traceback" in log and "and more" in log
    found = cell(result, "meta")
    assert found["values"] == [50.0, None, 53.125] and found["ours"]["n"] == found["difference"]["n"] == 2
    assert found["difference"]["mean"] == pytest.approx(25.0), "paired over the seeds that both have"
    for name in ("table.md", "report.html"):
        text = (plan.folder / name).read_text()
        assert "FloatingPointError: loss nan" in text and "(n=2)" in text
    assert 'failure.log">log</a>' in (plan.folder / "report.html").read_text()
    runs.fail.clear()
    assert not failures(run_table(plan, runs))
    assert runs.made[-1] == ("lab_table/meta", 1), "the same command tries again"


def test_a_failed_parent_fails_its_rows_once_and_no_others(table, tmp_path):
    tried = []

    def run_one(config, workdir, analyses):
        tried.append(config.name)
        return Runs(fail={("lab_base/plain", 0)})(config, workdir, analyses)

    result = run_table(plan_of(table, tmp_path, [0]), run_one)
    assert tried == ["lab_base/plain", "lab_table/scratch"]
    assert [found["row"] for found in failures(result)] == ["plain", "meta"]
    assert "the run it starts from failed (FloatingPointError: loss nan)" in failures(result)[0]["reason"]
    assert cell(result, "scratch")["ours"]["mean"] == 12.5


def test_a_retried_row_that_is_stopped_is_not_failed(table, tmp_path):
    plan = plan_of(table, tmp_path, [0], rows=ROWS[2:])
    run_table(plan, Runs(fail={("lab_table/scratch", 0)}))
    with pytest.raises(KeyboardInterrupt):
        run_table(plan, Runs(stop_after=0))
    assert plan.result()["rows"][0]["runs"][0]["state"] == "not run yet"


def test_a_resumed_table_equals_an_undisturbed_one(table, tmp_path, page):
    whole = run_table(plan_of(table, tmp_path / "whole"), Runs())
    stopped = plan_of(table, tmp_path / "stopped")
    for count in (0, 1, 5):
        with pytest.raises(KeyboardInterrupt):
            run_table(stopped, Runs(stop_after=count))
    partial = json.loads((stopped.folder / "table.json").read_text())
    assert partial == stopped.result(), "finished runs are in the table"
    text = (stopped.folder / "report.html").read_text()
    assert "4 of 9 runs are complete" in text and "not run yet" in (stopped.folder / "table.md").read_text()
    assert run_table(stopped, Runs()) == whole == json.loads((stopped.folder / "table.json").read_text())
    for name in ("table.md", "table.csv", "table.tex", "report.html"):
        assert (stopped.folder / name).read_text() == (tmp_path / "whole/lab_table/cpu" / name).read_text()


def test_parallel_runs_wait_for_their_parents(table, tmp_path):
    guard, here, peak = threading.Lock(), set(), []
    plan, runs = plan_of(table, tmp_path / "pool"), Runs()

    def run_one(config, workdir, analyses):
        assert not config.init.from_ or (plan.root / config.init.from_ / "report.json").exists()
        with guard:
            here.add(workdir)
            peak.append(len(here))
        time.sleep(0.05)
        with guard:
            here.remove(workdir)
            return runs(config, workdir, analyses)

    with ThreadPoolExecutor(4) as pool:
        found = run_table(plan, run_one, pool, at_once=2)
    assert max(peak) == 2 and len(runs.made) == 12
    assert found == run_table(plan_of(table, tmp_path / "inline"), Runs())


@pytest.mark.slow
def test_parallel_processes_make_the_same_runs(tmp_path, tiny_corpus):
    words = f"""run.py quickstart/plain --sweep model.layers=1,2 --set data.sources=jsonl:{tiny_corpus}?origin=module
        --set data.tokenizer=byte --set data.validation_share=0.2 --set training.steps=3 --set optimizer.warmup_steps=1
        --set evaluation.documents=4 --cache-dir {tmp_path / "cache"}""".split()
    for jobs in (1, 2):
        command = [sys.executable, *words, "--jobs", str(jobs), "--runs-dir", str(tmp_path / str(jobs))]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    reports = {path: json.loads(path.read_text()) for path in tmp_path.rglob("report.json")}
    one, two = (
        {p.relative_to(tmp_path / n): r["eval"]["none"]["bpb"] for p, r in reports.items() if p.is_relative_to(tmp_path / n)}
        for n in "12"
    )
    assert two == pytest.approx(one, rel=1e-4) and len(two) == 2  # sums over several cores are in another order
    assert "evaluating quickstart" in next((tmp_path / "2").rglob("run.log")).read_text()


def test_as_many_jobs_as_cores(tmp_path):
    with pytest.raises(UserError, match=r"--jobs 1000: between 1 and the \d+ cores"):
        workers(1000, print)


def test_later_commands_with_fewer_seeds_show_all_complete_seeds(table, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_table(plan_of(table, tmp_path), Runs(stop_after=6))  # all of seed 0, the parent and a row of seed 1
    runs = Runs()
    result = run_table(plan_of(table, tmp_path, [0]), runs)
    assert runs.made == [] and result["seeds"] == [0, 1]
    assert cell(result, "plain")["ours"]["n"] == 2 and cell(result, "meta")["ours"]["n"] == 1


def test_rows_made_by_other_code_are_named(table, tmp_path, monkeypatch):
    text = markdown(run_table(plan_of(table, tmp_path, [0], rows=ROWS[:2]), Runs()))
    assert "same code" not in text and "meta *" not in text
    monkeypatch.setitem(ENVIRONMENT, "git", {"commit": "b" * 40, "dirty": True})
    text = markdown(run_table(plan_of(table, tmp_path, [0]), Runs()))
    assert "| scratch *" in text and "| meta *" not in text, "only the row made by other code has a star"
    text = markdown(run_table(plan_of(table, tmp_path, [0, 1]), Runs()))
    assert "| meta *" in text and "not all made by the same code" in text
    assert "commit aaaaaaaaa: plain (seed 0)" in text and "commit bbbbbbbbb with uncommitted changes: plain (seed 1)" in text


# ------------------------------------------------------------------------------------------------ what is shown


def test_published_values_are_shown_beside_ours(table, tmp_path, page):
    plan = plan_of(table, tmp_path)
    result = run_table(plan, Runs())
    found = cell(result, "meta")
    assert found["published"] == {"value": 98.7, "note": "read off figure 1", "difference": pytest.approx(95.1)}
    assert found["ours"]["mean"] == 51.5625 and found["difference"]["mean"] == 25.0
    assert found["seeds_needed"] == 2
    text = (plan.folder / "table.md").read_text()
    assert "| 98.7 [1] (+95.1) |" in text and "[1] read off figure 1" in text and "| not stated |" in text
    assert "compare directions, not levels" in text and "no pre-training" in text and "| **controls** " in text
    text = (plan.folder / "report.html").read_text()
    assert "not stated" in text and "98.7 [1]" in text and "+95.1" in text
    assert "FLOPs a position" in text and "starts from lab_base/plain<" in text


def test_a_column_may_be_the_difference_of_two_numbers(table, tmp_path):
    found = cell(run_table(plan_of(table, tmp_path), Runs()), "meta", LOSS)
    assert found["values"] == [-12.5, -13.28125, -14.0625] and found["published"]["value"] == -11.1
    assert cell(plan_of(table, tmp_path).result(), "meta", "eval.right.bpb")["values"] == [None] * 3, (
        "the runs have no such number"
    )


def test_rows_may_read_one_run_in_several_ways(table, tmp_path):
    rows = [Row(way, of="lab_table/meta", fill={"way": way}) for way in ("exact", "no_position")]
    columns = [Column("share", "eval.tasks.recall.{way}")]
    made = registry.table("lab_ways", summary="s", rows=rows, columns=columns, baseline=None, minutes={"cpu": 2})(base)
    runs = Runs()
    result = run_table(plan_of(made, tmp_path, [0]), runs)
    assert runs.made == [("lab_base/plain", 0), ("lab_table/meta", 0)], "the run of the other table, made once"
    assert [row["cells"]["eval.tasks.recall.{way}"]["values"] for row in result["rows"]] == [[0.5], [0.625]]
    assert all(row["cells"]["eval.tasks.recall.{way}"]["difference"] is None for row in result["rows"])


def test_analyses_of_a_table_are_made_only_for_its_rows(table, tmp_path):
    rows = [Row("meta", of="lab_table/meta")]
    made = registry.table(
        "lab_look", summary="s", rows=rows, columns=COLUMNS[2:], baseline=None, minutes={"cpu": 2}, analyses=["sharpening"]
    )
    runs = Runs()
    run_table(plan_of(made(base), tmp_path, [0]), runs)
    assert runs.analysed == [("lab_base/plain",), ("lab_table/meta", "sharpening")]
    with pytest.raises(UserError, match="table lab_look: unknown 'sharpning'; did you mean 'sharpening'"):
        plan_of(replace(registry.find("lab_look"), analyses=("sharpning",)), tmp_path, [0])


def test_a_run_whose_analysis_breaks_down_is_shown_as_failed_until_it_is_made(tmp_path):
    shape = {"rows": [Row("plain")], "columns": COLUMNS[2:], "baseline": None, "minutes": {"cpu": 2}}
    made = registry.table("lab_seen", summary="s", analyses=["theory"], **shape)(base)
    trained, broken = Runs(), [True]

    def run_one(config, workdir, analyses):
        report = trained(config, workdir, analyses)
        if broken[0]:
            raise FloatingPointError("no such rows")
        write_json(workdir / "report.json", report | {"analyses": {"theory": {}}})

    plan = plan_of(made, tmp_path, [0])
    assert "FloatingPointError: no such rows" in failures(run_table(plan, run_one))[0]["reason"]
    broken[0] = False
    result = run_table(plan, run_one)
    assert not failures(result) and result["rows"][0]["runs"][0]["state"] == "complete" and len(trained.made) == 1


def test_changes_of_a_row_may_depend_on_the_scale(table):
    rows = [Row("long", {"training.steps": ByScale(cpu=70, gpu=90)})]
    made = registry.table(
        "lab_by", summary="", rows=rows, columns=COLUMNS, baseline=None, minutes=dict.fromkeys(registry.SCALES, 1)
    )
    made(base)
    steps = {scale: registry.find("lab_by/long").build(scale).training.steps for scale in registry.SCALES}
    assert steps == {"cpu": 70, "gpu": 90, "paper": 100}, "a scale without a value keeps the base's"


def test_the_fill_of_a_path_may_depend_on_the_scale(tmp_path):
    fill = {"way": ByScale(cpu="exact", gpu="no_position")}
    columns = [Column("%", "eval.tasks.recall.{way}", 1, "higher", 100)]
    rows = [Row("plain"), Row("meta", fill={"way": "no_position"})]
    made = registry.table(
        "lab_scales", summary="", rows=rows, columns=columns, baseline=None, minutes={"cpu": 1, "gpu": 1}, fill=fill
    )
    result = run_table(plan_of(made(base), tmp_path, seeds=(0,)), Runs())
    assert cell(result, "plain", columns[0].key)["values"] == [25.0]
    assert cell(result, "meta", columns[0].key)["values"] == [62.5]
    less = registry.table(
        "lab_less", summary="", rows=rows, columns=columns, baseline=None, minutes={"cpu": 1, "paper": 1}, fill=fill
    )
    with pytest.raises(UserError, match=r"row plain, scale paper: fill does not say what \{'way'\} stands for"):
        less(base)


def test_a_row_may_have_a_run_for_each_part(tmp_path, page):
    """Columns read the run of their own part. A row that lacks a part has a dash there, and its other runs count."""
    steps = {"short": {"training.steps": 30}, "long": {"training.steps": 70}}
    columns = [Column(part, "steps", 0, "", part=part) for part in steps]
    rows = [Row("plain", published={columns[0].key: 12}), Row("meta", {"model.layers": 6}, parts=("long",))]
    table = registry.table(
        "lab_parts", summary="two lengths", rows=rows, columns=columns, baseline="plain", minutes={"cpu": 2}, parts=steps
    )(base)
    names = [n for n in registry.experiments() if n.startswith("lab_parts")]
    assert names == ["lab_parts/meta/long", "lab_parts/plain/long", "lab_parts/plain/short"]
    plan = plan_of(table, tmp_path)
    plan.write()
    [meta] = [line.split("|") for line in (plan.folder / "table.md").read_text().splitlines() if line.startswith("| meta ")][:1]
    assert meta[2].strip() == "-" and "not run yet" in meta[5], "a missing part is not a run to do"
    result = run_table(plan, Runs())
    assert cell(result, "plain", "short: steps")["values"] == [30, 30, 30]
    assert cell(result, "plain", "long: steps")["values"] == [70, 70, 70]
    assert cell(result, "meta", "short: steps")["values"] == [None] * 3
    assert cell(result, "meta", "long: steps")["difference"]["mean"] == 0
    assert [(run["part"], run["seed"]) for run in result["rows"][1]["runs"]] == [("long", 0), ("long", 1), ("long", 2)]
    assert expected_minutes(table, "cpu") == 6
    text = (plan.folder / "report.html").read_text()
    assert "long seed 2" in text and "12" in (plan.folder / "table.md").read_text()
    wrong = registry.table(
        "x", summary="", rows=[Row("a", parts=("shorter",))], columns=columns, baseline=None, minutes={}, parts=steps
    )
    with pytest.raises(UserError, match="has no part 'shorter'; did you mean 'short'"):
        wrong(base)


def test_csv_and_latex(table, tmp_path):
    plan = plan_of(table, tmp_path)
    run_table(plan, Runs())
    lines = list(csv.DictReader((plan.folder / "table.csv").open()))
    assert len(lines) == len(ROWS) * len(COLUMNS)
    meta = next(line for line in lines if line["row"] == "meta" and line["path"] == SCORE)
    assert (meta["n"], float(meta["seed_2"]), float(meta["paper"])) == ("3", 53.125, 98.7)
    assert float(meta["low"]) < float(meta["mean"]) < float(meta["high"])
    tex = (plan.folder / "table.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 1
    body = [line for line in tex.splitlines() if line.lstrip().startswith(("row", "plain", "meta", "scratch"))]
    assert {line.count("&") for line in body} == {9} and r"exact match, \%" in tex and r"$\pm$" in tex


def test_the_folder_depends_on_rows_and_changes(table, tmp_path):
    folders = [
        plan_of(table, tmp_path).folder,
        plan_of(table, tmp_path, rows=choose_rows(table, "core")).folder,
        plan_of(table, tmp_path, rows=choose_rows(table, "meta,plain")).folder,
        plan_of(table, tmp_path, changes={"training.steps": "50"}).folder,
    ]
    assert [folder.name for folder in folders[:2]] == ["cpu", "cpu-core"] and len(set(folders)) == 4


def test_expected_minutes_count_shared_parents_once(table):
    assert expected_minutes(table, "cpu") == 3 * 2 + 5
    assert expected_minutes(table, "cpu", "core") == 2 * 2 + 5


# ----------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_a_table_over_the_experiments_own_runs(table, tmp_path):
    meta = registry.find("lab_table/meta")
    made = sweep_table(meta, ["model.layers=2,6", "optimizer.weight_decay=0,0.1"], "cpu", {})
    names = [f"model.layers={n} optimizer.weight_decay={w}" for n in (2, 6) for w in ("0", "0.1")]
    assert [row.name for row in made.rows] == names and made.baseline == names[3], "the experiment as it is"
    runs = Runs()
    plan = plan_of(made, tmp_path, [0])
    run_table(plan, runs)
    assert runs.made == [("lab_base/plain", 0)] + [("lab_table/meta", 0)] * 4, "the parent is not swept"
    own = plan_of(table, tmp_path, [0], rows=ROWS[1:2]).runs()[-1]
    assert (own.workdir / "report.json").exists(), "the sweep has made the table's own run"
    assert plan.folder.parent.parent == tmp_path / "lab_table/meta"


def test_a_sweep_with_other_values_has_no_baseline(table):
    base_alone = registry.find("lab_base/plain")
    made = sweep_table(base_alone, ["model.layers=2,3"], "cpu", {})
    assert made.baseline is None and [c.key for c in made.columns] == ["eval.none.bpb"]
    assert sweep_table(base_alone, ["model.layers=2,4"], "cpu", {}).name != made.name
    with pytest.raises(UserError, match="swept twice"):
        sweep_table(base_alone, ["model.layers=2", "model.layers=3"], "cpu", {})


def test_fields_of_one_axis_change_together(table):
    made = sweep_table(
        registry.find("lab_base/plain"), ["model.layers=2,4 model.width=64,128", "optimizer.weight_decay=0,0.1"], "cpu", {}
    )
    assert [row.name for row in made.rows] == [
        f"model.layers={n} model.width={w} optimizer.weight_decay={d}" for n, w in ((2, 64), (4, 128)) for d in ("0", "0.1")
    ]
    rows = swept({"model.layers": (2, 4), "model.width": (64, 128)}, {"data.tokenizer": ("byte", "hf:a/b.json")})
    assert [row.name for row in rows][:2] == ["layers_2_width_64_tokenizer_byte", "layers_2_width_64_tokenizer_hf-a-b.json"]
    assert rows[3].changes == {"model.layers": 4, "model.width": 128, "data.tokenizer": "hf:a/b.json"}
    with pytest.raises(UserError, match=r"model\.layers and model\.width have different numbers of values"):
        swept({"model.layers": (2, 4), "model.width": (64,)})
