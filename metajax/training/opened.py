"""Opens the newest checkpoint of a run for evaluation, analysis, generation or export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from metajax.config import Config, Runtime, require_text
from metajax.core.errors import require
from metajax.core.fields import override
from metajax.data.encoding import Tokenizer
from metajax.data.pipeline import Corpora, Paths, open_corpora
from metajax.data.tokenizers import load as load_tokenizer
from metajax.runs.directory import ORIGIN, check_data, read_config, require_data
from metajax.training.checkpoints import newest_good, read_parameters, saved_identity
from metajax.training.program import Program


class OpenedRun(NamedTuple):
    """A run's newest checkpoint with the run's tokenizer, ready for evaluation, analysis or export."""

    config: Config
    workdir: Path
    tokenizer: Tokenizer
    program: Program
    model: Any
    saved: Mapping[str, Any] = {}  # identity of the run that saved it, see `RunDirectory.identity`

    def open_corpora(self, config: Config, paths: Paths) -> Corpora:
        """Open the corpora; UserError if the corpus or the tokenizer is not the run's."""
        if config.imported is not None:
            # The run's tokenizer has the ids that begin and end a text; the original tokenizer file may not name them.
            config = override(config, {"data.tokenizer": f"run:{self.workdir.absolute()}"})
        corpora = open_corpora(config, paths)
        now = {"key": corpora.key, "tokenizer": corpora.tokenizer.fingerprint()}
        check_data(self.workdir, **now)
        require_data(self.saved, now, self.workdir)
        return corpora


def open_run(workdir: Path) -> OpenedRun:
    """Open a run without changing its folder. UserError if its tokenizer or a good checkpoint is missing or of another run."""
    config, tokenizer = require_text(read_config(workdir), "this command"), load_tokenizer(workdir)
    lacks_facts = config.imported is None and (workdir / ORIGIN).exists()
    older = "was imported by an older version, which does not say which rows the checkpoint has"
    require(not lacks_facts, f"{workdir} {older}; delete it and import it again")
    config = replace(config, runtime=replace(config.runtime, mesh=Runtime.mesh))  # for the devices at hand, not those of training
    step = newest_good(workdir)
    saved, now = saved_identity(workdir, step), {"tokenizer": tokenizer.fingerprint()}
    check_data(workdir, **now)
    require_data(saved, now, workdir)
    program = Program.build(config, tokenizer.vocabulary.size)
    model = read_parameters(workdir, program.abstract_state().model, step=step)
    return OpenedRun(config, workdir, tokenizer, program, model, saved)
