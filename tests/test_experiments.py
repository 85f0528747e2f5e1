"""Every registered experiment, as far as it can be checked without running it."""

import ast
from pathlib import Path

import pytest

from metajax import registry
from metajax.data.tokenizers import vocabulary_of
from metajax.models.lm import param_count
from metajax.runs.parents import resolve_parents
from metajax.tables.choice import choose_rows, expected_minutes
from metajax.tables.run import TablePlan, plan_table
from metajax.training.program import abstract_model

registry.load()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_experiments_import_each_other_as_in_the_wheel(path):
    """In a wheel the package has another name, and `experiments` is the user's own."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    found += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert found or path.stem == "__init__"
    assert not any(name.split(".")[0] == "experiments" for name in found)


@pytest.mark.parametrize("name", registry.experiments())
def test_every_config_is_valid_at_every_scale_and_its_parents_are_known(name):
    experiment = registry.experiments()[name]
    assert experiment.scales
    for scale in experiment.scales:
        config, parents = resolve_parents(experiment.build(scale), {}, Path("runs"))
        assert (config.name, config.scale) == (name, scale)
        assert [p.scale for p in parents] == [scale] * len(parents)


@pytest.mark.parametrize("name", registry.tables())
def test_every_table_plans_its_core_at_every_scale(name):
    table = registry.tables()[name]
    core = choose_rows(table, "core")
    assert 1 <= len(core) <= 6
    for scale in table.scales:
        plan = plan_table(table, scale, (0, 1), {}, Path("runs"), core)
        assert plan.runs() or all(table.lacks(row, scale) for row in core)


@pytest.mark.parametrize("name", registry.tables())
def test_the_minutes_of_a_table_are_those_of_its_planned_runs(name):
    table, known = registry.tables()[name], registry.experiments()
    for scale in table.scales:
        for words in (None, "core"):
            plan = TablePlan(table, scale, choose_rows(table, words), (0,), {}, Path("runs"))
            minutes = sum(known.get(run.config.name, table).minutes.get(scale, 0.0) for run in plan.runs())
            assert expected_minutes(table, scale, words) == pytest.approx(minutes)


@pytest.mark.parametrize("name", registry.tables())
def test_every_table_with_values_of_a_paper_says_how_many_rows_the_paper_has(name):
    table = registry.tables()[name]
    if any(row.published for row in table.rows) or table.paper_rows:
        assert "arXiv" in table.paper and table.paper_rows_here + table.paper_rows_in_print == table.paper_rows


@pytest.mark.parametrize("name", ["learned_meta_tokens/pretrain/meta_rope", "learned_meta_tokens/pretrain/second_causal"])
def test_cpu_bases_are_small_and_controls_match_in_parameters(name):
    config = registry.experiments()[name].build("cpu")
    count = param_count(abstract_model(config, vocabulary_of(config.data.tokenizer).size))["total"]
    assert 100_000 <= count <= 500_000
    other = registry.experiments()["learned_meta_tokens/pretrain/meta_rope"].build("cpu")
    assert count == param_count(abstract_model(other, vocabulary_of(other.data.tokenizer).size))["total"]
