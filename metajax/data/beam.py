"""Tokenises the parts of a corpus with Apache Beam, for a corpus too large for one machine: `cache NAME --beam OPTIONS`.

Workers run the same code as local processes. They write the parts to the place of the cache, a folder that they all share, or
below Beam's --temp_location, such as a bucket. From there the parts are fetched at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from traceback import format_exception_only

from etils import epath

from metajax.core.atomic import copy_files, whole_folder
from metajax.core.errors import UserError, require
from metajax.data.tokenising import Job


def on_beam(job: Job, parts: Sequence[int], options: Sequence[str]) -> Iterator[int]:
    """`Make` with the runner that Beam's options name. Raises UserError if Beam is not installed, and for `Job.make`'s errors."""
    require(find_spec("apache_beam") is not None, "--beam: Apache Beam is not installed; pip install 'metajax[beam]'")
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    settings = PipelineOptions(list(options))
    away = settings.get_all_options()["temp_location"]
    there = replace(job, home=epath.Path(away) / job.home.name) if away else job
    try:
        with beam.Pipeline(options=settings) as pipeline:
            _ = pipeline | beam.Create(parts) | beam.Reshuffle() | beam.Map(there.make)
    except Exception as error:  # each runner raises another type, with the worker's error as text
        mistake = re.search(
            r"^(?:metajax\S*|OSError): (.*?)( \[while running .*)?$", "".join(format_exception_only(error)), re.MULTILINE
        )
        if mistake is None:
            raise
        raise UserError(mistake[1]) from error
    for number in parts:
        if away:
            with whole_folder(job.folder(number)) as work:
                copy_files(there.folder(number), work)
        yield number
