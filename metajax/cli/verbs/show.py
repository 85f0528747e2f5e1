"""`show`: an experiment before it runs, a table, or a corpus."""

from __future__ import annotations

import argparse

from metajax import registry
from metajax.cli import arguments as checked
from metajax.cli import common
from metajax.cli.arguments import add_config, add_number, add_place
from metajax.cli.verb import verb
from metajax.core.errors import UserError, nearest, require
from metajax.core.fields import CountOrZero
from metajax.vision.config import ImageConfig


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|CORPUS", help="experiment, table row, or a source such as pydocs or jsonl:FILE")
    add_number(parser, "--rows", CountOrZero, 0, "decode so many training rows, with their masks in colour", dest="count")
    text = "a corpus: show this beside its columns, such as '{url|host|top100}' or '{section}, {role|or_unknown}'"
    parser.add_argument("--field", type=checked.word, action="append", default=[], metavar="TEMPLATE", dest="fields", help=text)
    add_config(parser)
    add_place(parser)


@verb("show", add_show)
def show(options: argparse.Namespace, started: float) -> int:
    """An experiment or a table before it runs, or a corpus.

    python run.py show quickstart/meta_tokens --rows 2       config, parameters, FLOPs, and two rows with their loss mask
    python run.py show pydocs                                a corpus: documents, fields, sizes
    """
    from metajax.data.sources import source
    from metajax.reporting import terminal

    corpora = source.names()
    if options.name.partition(":")[0].partition("?")[0] in corpora:
        terminal.print_corpus(options.name, common.paths_of(options), options.count, options.fields)
        return 0
    try:
        target = registry.find(options.name)
    except UserError as error:
        raise UserError(f"{error}; corpora: {', '.join(corpora)}{nearest(options.name, corpora)}") from None
    if isinstance(target, registry.Table):
        require(not options.count, f"{target.name} is a table; --rows shows rows of one experiment, such as {target.example}")
        from metajax.runs.parents import parse_changes
        from metajax.tables.listing import print_table_plan
        from metajax.tables.run import plan_table

        target.parts_at(options.scale)  # an unknown scale stops here, before a parent is looked for
        changes = parse_changes(options.changes, options.runs_dir)
        print_table_plan(plan_table(target, options.scale, [options.seed], changes, options.runs_dir, target.rows))
        return 0
    config, _ = common.config_of(target, options)
    terminal.print_experiment(target, config)
    if isinstance(config, ImageConfig):
        require(not options.count, f"{config.name} is a run on images; --rows shows rows of text")
        return 0
    if config.tasks is not None:
        terminal.print_curriculum(config, common.paths_of(options))
    if options.count:
        terminal.print_rows(config, common.paths_of(options), options.count)
    return 0
