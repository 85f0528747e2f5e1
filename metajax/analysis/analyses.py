"""The analyses by name; a result is plain data: numbers for tables, and under `details` what only a figure needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metajax.analysis.attention_maps import attention
from metajax.analysis.branches import branches
from metajax.analysis.by_position import by_position
from metajax.analysis.caching import caching
from metajax.analysis.guidance import guidance
from metajax.analysis.interventions import interventions
from metajax.analysis.metadata_attention import metadata_attention
from metajax.analysis.mixing_maps import mixing_maps
from metajax.analysis.needle import needle
from metajax.analysis.overhead import overhead
from metajax.analysis.probes import probes
from metajax.analysis.rate_distortion import rate_distortion
from metajax.analysis.sharpening import sharpening
from metajax.analysis.study import Study
from metajax.analysis.theory import theory
from metajax.core.errors import require
from metajax.runs.files import write_json

FOLDER = "analysis"  # of a run's folder
_OF_META_TOKENS = (interventions, sharpening, caching, attention, theory, rate_distortion)
_OF_MIXERS = (mixing_maps, branches, needle)
_OF_METADATA = (probes, metadata_attention, guidance, by_position)
_FUNCTIONS: dict[str, Callable[[Study], dict[str, Any]]] = {
    function.__name__: function for function in (*_OF_META_TOKENS, overhead, *_OF_MIXERS, *_OF_METADATA)
}


def fitting(study: Study) -> tuple[str, ...]:
    """The analyses that this model and these prompts are meant for."""
    if study.model.meta is not None:
        return (*(function.__name__ for function in _OF_META_TOKENS), "overhead")
    parallel = study.model.cfg.hybrid is not None and study.model.cfg.hybrid.is_parallel
    config = study.corpora.config
    recipe, labelled = config.metadata, bool(config.evaluation.labels)
    in_front = recipe is not None and recipe.prepended
    wanted = {
        "overhead": parallel,
        "mixing_maps": True,
        "branches": parallel,
        "needle": study.task == "needle",
        "probes": labelled and study.model.cfg.hybrid is None,
        "metadata_attention": labelled and in_front,
        "guidance": labelled and in_front and not recipe.tokens,
        "by_position": recipe is not None,
    }
    return tuple(name for name, is_meant in wanted.items() if is_meant)


def check_fits(study: Study, names: Sequence[str]) -> None:
    """UserError where one of the analyses is about meta-tokens in prompts, and the model or the prompts have none."""
    about = [function.__name__ for function in _OF_META_TOKENS if function.__name__ in names]
    if about:
        tasks = study.corpora.config.tasks
        said = f"{', '.join(about)}: about meta-tokens in prompts of the tasks, but "
        require(study.model.meta is not None, f"{said}this run has none (meta_tokens is null)")
        require(
            tasks is not None and study.task in tasks.names,
            f"{said}these rows are text; name a task with --task, such as list_recall",
        )
        require(tasks.placement != "none", f"{said}tasks.placement = 'none'")
    if "overhead" in names:
        hybrid = study.model.cfg.hybrid
        can = study.model.meta is not None or (hybrid is not None and hybrid.is_parallel)
        require(
            can, "overhead: compares models with and without meta-attention or a branch of a hybrid block; this one has neither"
        )


def run_analyses(study: Study, names: Sequence[str], workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the analyses one by one, write each to WORKDIR/analysis/NAME.json, and yield (name, its numbers without `details`)."""
    check_fits(study, names)
    for name in names:
        result = _FUNCTIONS[name](study)
        made_on = {"task": study.task, "length": study.rows["tokens"].shape[1], "prompts": study.count}
        write_json(workdir / FOLDER / f"{name}.json", {"name": name, "made_on": made_on, "result": result})
        yield name, {key: value for key, value in result.items() if key != "details"} | {"made_on": made_on}
