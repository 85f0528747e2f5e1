"""`analyze`: the papers' analyses of a run's newest checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any

from metajax.analysis import analysis
from metajax.cli import arguments as checked
from metajax.cli import common
from metajax.cli.arguments import add_number, add_place, add_run_word
from metajax.cli.verb import verb
from metajax.core.errors import require
from metajax.core.fields import Range, override
from metajax.core.progress import echo, say
from metajax.core.storage import publish
from metajax.vision.config import ImageConfig


def add_analyze(parser: argparse.ArgumentParser) -> None:
    add_run_word(parser)
    known = ",".join(analysis.names())
    parser.add_argument("--what", type=checked.word, metavar="LIST", help=f"some of {known} (all that fit the run)")
    text = "whose prompts are read (list_recall, or the run's first task)"
    parser.add_argument("--task", type=checked.word, metavar="TASK", help=text)
    longest = "the run's longest bin within training"
    add_number(parser, "--length", Annotated[int, Range(2, 2**20)], None, "positions of a prompt's row", longest)
    text = "prompts, and examples in a bin of the interventions"
    add_number(parser, "--examples", Annotated[int, Range(2, 10**6)], None, text, "500, and as in the run")
    add_place(parser)


@verb("analyze", add_analyze)
def analyze(options: argparse.Namespace, started: float) -> int:
    """Analyses of a run's newest checkpoint, as numbers and figures.

    python run.py analyze RUN                                all that fit the run
    python run.py analyze RUN --what sharpening,caching      some of them
    """
    names = tuple(options.what.split(",")) if options.what else ()
    from metajax.vision.analyses import check_analyses, image_analysis

    check_analyses("--what", names)
    from metajax.runs.directory import find_run, read_config

    workdir = find_run(options.run, options.runs_dir)
    config = read_config(workdir)
    if isinstance(config, ImageConfig):
        analyses, study = image_analysis, _image_study(workdir, config, options)
    else:
        analyses, study = analysis, _text_study(options)
    from metajax.experiment import write_report
    from metajax.reporting.html import write_analysis_page

    for name, numbers in analyses.run(study, names or analyses.fitting(study), workdir):
        echo("\n  ".join((name.replace("_", " "), *analyses[name].lines(numbers))))
    if (workdir / "report.json").exists():
        write_report(workdir)
    say(f"figures: {write_analysis_page(workdir, analyses.sections(workdir))}")
    publish(workdir)
    return 0


def _text_study(options: argparse.Namespace) -> Any:
    """The run's model on the prompts that the command asks for."""
    config, changes, choice = common.config_of_run(options), {}, {"task": options.task, "length": options.length}
    task = options.task or ("list_recall" if config.tasks is None and config.meta_tokens is not None else None)
    if task not in (None, "text"):
        changes["tasks.names"] = choice["task"] = task
        if config.tasks is None:
            changes["tasks.train_length"] = config.data.sequence_length  # what it was trained on is text
    if options.examples is not None:
        choice["prompts"] = options.examples
        changes |= {"tasks.eval_examples": options.examples} if config.tasks is not None or changes else {}
    config = override(config, changes)
    opened = common.open_run(options)
    from metajax.analysis.common.study import open_study

    study = open_study(opened.program, opened.open_corpora(config, common.paths_of(options)), opened.model, **choice)
    say(f"{study.count} prompts of {study.task}, at most {study.rows['tokens'].shape[1]} tokens each")
    return study


def _image_study(workdir: Path, config: ImageConfig, options: argparse.Namespace) -> Any:
    """The run's CLIP and some test images."""
    given = [value for value in (options.task, options.length, options.examples) if value is not None]
    require(not given, f"{workdir} is a run on images; --task, --length and --examples choose prompts of text")
    common.start_jax(options.cache_dir)
    from metajax.vision.study import open_image_study

    return open_image_study(workdir, config, common.paths_of(options))
