"""Names of sources, tasks and positions of metadata: the nearest one of an unknown name, and one module for each name."""

import pytest

from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.data.sources import source


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"tasks.names": "copyin", "tasks.train_length": 32}, "copying"),
        ({"metadata.position": "prepned"}, "prepend"),
        ({"data.sources": "jsonll:a"}, "jsonl"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(changes, nearest, tiny_config, paths):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        open_corpora(tiny_config(**changes), paths)


def test_a_name_belongs_to_one_module():
    with pytest.raises(UserError, match="registered twice"):
        source("jsonl")(open_corpora)
