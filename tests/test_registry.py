"""Tables as data: rows derive from a base, and unknown names get the nearest match."""

from dataclasses import replace
from pathlib import Path

import pytest

from metajax import registry
from metajax.config import Config
from metajax.core.errors import UserError
from metajax.registry import Column, Row, Table

ROWS = (Row("a", {}), Row("b", {"model.layers": 8, "meta_tokens.rate": 0.2}, published={"eval.none.bpb": 1.0}))
COLUMNS = (Column("x", "eval.none.bpb"),)
TABLE = Table("demo", "s", lambda scale: Config(name="demo"), ROWS, COLUMNS, baseline="a", minutes={"cpu": 1}, paper="p")


def test_a_row_is_the_base_with_its_changes():
    config = TABLE.config(TABLE.rows[1], "cpu")
    assert (config.name, config.scale, config.model.layers, config.meta_tokens.rate) == ("demo/b", "cpu", 8, 0.2)
    assert TABLE.config(TABLE.rows[0], "cpu").model.layers == 4


def test_coverage_counts_rows_that_run_and_rows_in_print():
    printed = {"eval.none.bpb": 1.0}
    rows = (Row("a", published=printed), Row("b", published=printed, lacks="weights"), Row("ours"))
    table = replace(TABLE, rows=rows, minutes={"cpu": 1, "paper": 1}, paper_rows=2)
    assert table.coverage == "1 of 2 rows (1 more in print alone)"
    assert replace(table, rows=rows[:1], paper_rows=1).coverage == "1 of 1 rows" and TABLE.coverage == ""


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="demo has no 'paper' scale; it has cpu"):
        TABLE.config(TABLE.rows[0], "paper")
    with pytest.raises(UserError, match="unknown scale 'papr'; did you mean 'paper'"):
        TABLE.config(TABLE.rows[0], "papr")


def test_names_are_unique_and_found_with_the_nearest_match():
    registry.load()
    assert registry.find("quickstart").baseline == "plain"
    assert registry.find("quickstart/plain").row.name == "plain"
    with pytest.raises(UserError, match="did you mean 'quickstart/plain'"):
        registry.find("quickstart/plan")
    with pytest.raises(UserError, match="registered twice"):
        registry.experiment("quickstart", summary="again", minutes={"cpu": 1})(lambda scale: Config(name="x"))


FILES = {
    "aaa": (Path(__file__).parents[1] / "README.md").read_text().partition("```python\n")[2].partition("```")[0],
    "closed": "rows = [\n",
    "lacks": "import math\nimport nothing_of_this_name\n",
    "divides": "def f():\n    return 1 / 0\n\n\nf()\n",
    "ends": "import sys\nsys.exit('a\\x1b[2J')\n",
    "relative": "from . import closed\n",
    "twice": 'from metajax.registry import base, experiment\nexperiment("only_here", summary="s", minutes={"cpu": 1})(base("quickstart"))\n'
    'experiment("quickstart", summary="s", minutes={"cpu": 1})(base("quickstart"))\n',
    "after": 'from metajax.registry import base, experiment\nexperiment("after", summary="s", minutes={"cpu": 1})(base("rates"))\n',
}


def test_files_that_cannot_be_imported_are_named_and_left_out(own_registry, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "own_experiments"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "not_utf8.py").write_bytes(b"a = 1\n\xff\n")
    (folder / "nul.py").write_bytes(b"a = 1\0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    registry.load("own_experiments")
    lines = capfd.readouterr().err.splitlines()
    reasons = ["closed.py, line 1: SyntaxError: '[' was never closed", "divides.py, line 2: ZeroDivisionError"]
    reasons += ["ends.py, line 2: SystemExit: a\\x1b[2J", "lacks.py, line 2: ModuleNotFoundError", "not_utf8.py", "nul.py"]
    reasons += ["relative.py, line 1: SyntaxError", "twice.py, line 3: 'quickstart' is"]
    assert len(lines) == len(reasons)
    for reason in reasons:
        assert any(line.startswith(f"warning: left out own_experiments/{reason}") for line in lines), (reason, lines)
    assert registry.find("quickstart").baseline == "plain", "the first one stays"
    assert registry.find("rates").config(registry.find("rates").rows[0], "cpu").meta_tokens.rate == 0.05
    assert registry.find("after").build("cpu").model.layers == 4
    with pytest.raises(UserError, match=r"unknown experiment 'only_here'.*twice.py, line 3") as said:
        registry.find("only_here")
    assert "closed.py" not in str(said.value)


def test_a_base_may_be_registered_later(own_registry):
    made = registry.experiment("early", summary="s", minutes={"cpu": 1})(registry.base("late"))
    with pytest.raises(UserError, match="unknown experiment 'late'"):
        made.build("cpu")
    registry.experiment("late", summary="s", minutes={"cpu": 1})(lambda scale: Config(name="x", seed=7))
    assert (made.build("cpu").name, made.build("cpu").seed) == ("early", 7)


def test_mistakes_in_a_table_are_named():
    column = Column("x", "eval.{way}.bpb")
    for rows, message in (
        ([Row("a"), Row("a")], "two of its rows have the same name"),
        ([Row("a", published={"eval.none.bbp": 1.0})], "belongs to no column; did you mean 'eval.none.bpb'"),
        ([Row("a", fill={"wey": "x"})], "fill does not say what {'way'} stands for"),
    ):
        columns = (column,) if "fill" in message else (Column("x", "eval.none.bpb"),)
        with pytest.raises(UserError, match=message):
            replace(TABLE, rows=tuple(rows), columns=columns, baseline=None)
    with pytest.raises(UserError, match=r"a blank in eval.{4}.bpb is a word, such as {length}"):
        replace(TABLE, columns=(Column("x", "eval.{4}.bpb"),), fill={"4": "x"}, baseline=None)
    with pytest.raises(UserError, match="better is 'lower'"):
        Column("x", "y", better="highr")


def test_a_table_needs_its_baseline():
    with pytest.raises(UserError, match="the baseline 'z' is not one of its rows"):
        registry.table("demo2", summary="s", rows=[Row("a", {})], columns=[], baseline="z", minutes={"cpu": 1})(TABLE.base)


@pytest.mark.parametrize(("bases", "gone"), [({"a": "a"}, "a"), ({"a": "b/plain", "b": "a"}, "ab"), ({"a": "b", "b": "c"}, "ab")])
def test_a_table_without_a_base_is_named_and_left_out(own_registry, tmp_path, monkeypatch, capfd, bases, gone):
    """The base is the table itself, leads back to it, or does not exist; the file's other table stays."""
    made = 'table("{0}", summary="", rows=[Row("plain")], columns=[Column("b", "eval.none.bpb")], baseline="plain", minutes={{"cpu": 1}})({1})'
    lines = [made.format(name, f'base("{of}")') for name, of in bases.items()]
    lines += ["from metajax.config import Config", made.format("good", 'lambda scale: Config(name="")')]
    package = f"rounds_{'_'.join(bases)}_{gone}_{'_'.join(bases.values()).replace('/', '_')}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "tables.py").write_text("\n".join(["from metajax.registry import Column, Row, base, table", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    registry.load(package)
    assert "good" in registry.tables() and not {*gone} & registry.tables().keys()
    assert "good/plain" in registry.experiments() and not {f"{name}/plain" for name in gone} & registry.experiments().keys()
    said = capfd.readouterr().err
    assert all(f"left out table {name}" in said for name in gone)
