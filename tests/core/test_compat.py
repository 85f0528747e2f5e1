"""The cache of compiled programs: a damaged one is compiled again, and a full disk gives a one-line error."""

import resource
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from metajax.core.compat import keep_programs


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs() compiles and runs a function, with the folder of compiled programs beside it; returns the result."""
    monkeypatch.setattr(compilation_cache, "LRUCache", compilation_cache.LRUCache)
    old = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def run():
        compilation_cache.reset_cache()
        jax.clear_caches()
        keep_programs(tmp_path / "jax")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return float(jax.jit(lambda x: (jnp.sin(x) * 3.75).sum())(jnp.arange(12.0)))

    yield run
    for name, value in zip(("compilation_cache_dir", "persistent_cache_min_compile_time_secs"), old, strict=True):
        jax.config.update(f"jax_{name}", value)
    compilation_cache.reset_cache()


def of_function(folder):
    [path] = folder.glob("jit__lambda*-cache")
    return path


@pytest.mark.fault(8)
def test_a_damaged_program_is_compiled_again(programs, tmp_path):
    right = programs()
    path = of_function(tmp_path / "jax")
    good, inode = path.read_bytes(), path.stat().st_ino
    assert programs() == right and path.stat().st_ino == inode, "taken from the folder"
    damaged = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), len(good) // 9)]
    for content in [*damaged, good[: len(good) // 2], b"", b"x" * len(good)]:
        path.write_bytes(content)
        assert programs() == right
        assert path.read_bytes() != content, "made again"


@pytest.mark.fault(35)
def test_a_full_disk_is_one_line_and_leaves_nothing(programs, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        found = programs()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "jax").iterdir())
    said = capsys.readouterr()
    assert (said.out + said.err).count("File too large; compiled programs are not kept") == 1
    assert programs() == found and of_function(tmp_path / "jax")
