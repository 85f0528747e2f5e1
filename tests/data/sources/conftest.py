"""A folder with a cache for the tests of sources."""

import pytest

from metajax.data.sources import open_source


@pytest.fixture
def opened(tmp_path):
    """opened(spec): the source of a spec whose paths are below the test's folder."""
    return lambda spec: open_source(spec, cache_dir=tmp_path / "cache", data_dir=tmp_path)
