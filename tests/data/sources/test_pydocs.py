import json
import platform
import sys
from importlib import metadata

import pytest

from metajax.core.errors import UserError
from metajax.data.sources import open_source, pydocs
from metajax.data.sources.docstrings import Docstring, public_names, read_module

TWENTY = " ".join(f"word{i}" for i in range(20))
SOURCE = f'''"""Module {TWENTY}"""
from ._inner import helper as renamed
class Outer:
    """Class {TWENTY}"""
    def method(self):
        """Method {TWENTY}"""
        def local():
            """Local {TWENTY}"""
    async def _hidden(self):
        """Hidden {TWENTY}"""
if True:
    def variant():
        """Variant {TWENTY}"""
def short():
    """Too short."""
def twin():
    """Method {TWENTY}"""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a private module, a re-export, tests, and a file that is not Python."""
    root = tmp_path / "tinypack"
    for folder in (root, root / "tests", root / "testing", root / "test_data"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (root / "__init__.py").write_text(SOURCE)
    (root / "_inner.py").write_text(f'def helper():\n    """Helper {TWENTY}"""\n')
    (root / "tests" / "test_a.py").write_text(f'"""Tests {TWENTY}"""')
    (root / "test_data" / "b.py").write_text(f'"""Test data {TWENTY}"""')
    (root / "testing" / "__init__.py").write_text(f'"""Testing {TWENTY}"""')
    (root / "broken.py").write_text("def (:")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_a_package_is_read_by_the_recipe(package, tmp_path):
    source = open_source("pydocs:tinypack", cache_dir=tmp_path / "cache", data_dir=None)
    documents = [source[i] for i in range(len(source))]
    names = [d.metadata["name"] for d in documents]
    assert names == [
        "tinypack",
        "tinypack.Outer",
        "tinypack.Outer.method",
        "tinypack.Outer.method.local",
        "tinypack.Outer._hidden",
        "tinypack._inner.helper",
        "tinypack.testing",
    ]
    assert [d.metadata["kind"] for d in documents] == ["module", "class", *["function"] * 4, "module"]
    assert [d.metadata["visibility"] for d in documents] == [*["public"] * 4, "private", "private", "public"]
    assert documents[5].origin == "tinypack._inner"
    assert documents[5].metadata["topic"] == "tinypack._inner"
    assert "tinypack" not in sys.modules


def test_a_corpus_is_written_once_and_checked(package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = open_source("pydocs:tinypack", cache_dir=cache, data_dir=None)
    monkeypatch.setattr(pydocs, "build_documents", None)  # a second build would fail
    again = open_source("pydocs:tinypack", cache_dir=cache, data_dir=None)
    assert again.fingerprint() == first.fingerprint()
    assert again[2] == first[2]
    (folder,) = (cache / "corpora").iterdir()
    assert folder.name == f"pydocs-{first.fingerprint()[:12]}"
    assert sorted(p.name for p in folder.iterdir()) == ["documents.parquet", "hashes.json", "manifest.json"]
    path = folder / "documents.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"documents\.parquet: changed or damaged.*delete"):
        open_source("pydocs:tinypack", cache_dir=cache, data_dir=None)


@pytest.mark.fault(16)
@pytest.mark.parametrize("version", [None, "1.0"])
def test_an_edited_package_of_the_same_version_is_another_corpus(package, tmp_path, monkeypatch, version):
    """A package installed for development is edited under the same version."""
    if version:
        monkeypatch.setattr(pydocs.metadata, "packages_distributions", lambda: {"tinypack": ["tinypack"]})
        monkeypatch.setattr(pydocs.metadata, "version", lambda _: version)
    before = open_source("pydocs:tinypack", cache_dir=tmp_path / "cache", data_dir=None)
    (package / "_inner.py").write_text(f'def helper():\n    """Changed {TWENTY}"""\n')
    after = open_source("pydocs:tinypack", cache_dir=tmp_path / "cache", data_dir=None)
    assert after.fingerprint() != before.fingerprint()
    assert after[5].text.startswith("Changed")


def test_email_and_json_are_built_the_same_twice(tmp_path):
    manifests = []
    for cache in ("a", "b"):
        source = open_source("pydocs:email+json", cache_dir=tmp_path / cache, data_dir=None)
        manifests.append(json.loads(json.dumps(source.manifest())))
    assert manifests[0] == manifests[1]
    assert manifests[0]["versions"] == {"python": platform.python_version()}
    assert manifests[0]["records"] == len(source) == sum(p["documents"] for p in manifests[0]["parts"].values())
    assert manifests[0]["words"] == sum(p["words"] for p in manifests[0]["parts"].values())
    documents = [source[i] for i in range(len(source))]
    assert {d.metadata["package"] for d in documents} == {"email", "json"}
    assert all(d.origin == d.metadata["module"] and len(d.text.split()) >= 20 for d in documents)
    assert len({d.text for d in documents}) == len(documents)


def test_a_module_in_one_file_and_another_selection_is_another_corpus(tmp_path):
    heap = open_source("pydocs:heapq", cache_dir=tmp_path, data_dir=None)
    both = open_source("pydocs:heapq+bisect", cache_dir=tmp_path, data_dir=None)
    assert heap.fingerprint() != both.fingerprint()
    assert {both[i].origin for i in range(len(both))} == {"heapq", "bisect"}


@pytest.mark.parametrize(("name", "part"), [("nmupy", "did you mean 'numpy'"), ("sys", "compiled"), ("a.b", "top-level")])
def test_an_unreadable_module_is_a_user_error(name, part, tmp_path):
    with pytest.raises(UserError, match=part):
        open_source(f"pydocs:{name}", cache_dir=tmp_path, data_dir=None)


def test_a_package_without_docstrings_is_an_empty_corpus(tmp_path, monkeypatch):
    (tmp_path / "bare.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no documents"):
        open_source("pydocs:bare", cache_dir=tmp_path, data_dir=None)


def test_public_addresses_follow_renames_stars_and_chains(tmp_path):
    files = {
        "p": "from .api import *\n",
        "p.api": "from p._impl.core import norm, _private\nfrom ..p._impl import core\n",
        "p._impl.core": "\n".join(f'def {name}():\n    """Text."""' for name in ("norm", "_private", "alone")),
    }
    modules = []
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        modules.append(read_module(str(path), name, name == "p"))
    assert public_names(modules) == {("p._impl.core", "norm"): "p.norm"}


def test_urls_are_derived_only_for_public_names():
    versions = {"python": "3.11.7", "numpy": "2.4.6", "scipy": "1.17.1", "jax": "0.10.2"}
    addresses = {("numpy.linalg._linalg", "norm"): "numpy.linalg.norm", ("jax._src.numpy.x", "Q"): "jax.numpy.Q"}

    def url(module, name, local=False):
        return pydocs.derived_url(Docstring(module, name, "function", "", local), addresses, versions)

    assert url("numpy.linalg._linalg", "norm") == "https://numpy.org/doc/2.4/reference/generated/numpy.linalg.norm.html"
    assert url("jax._src.numpy.x", "Q.at") == "https://docs.jax.dev/en/latest/_autosummary/jax.numpy.Q.at.html"
    assert (
        url("json.decoder", "JSONDecoder.decode")
        == "https://docs.python.org/3.11/library/json.decoder.html#json.decoder.JSONDecoder.decode"
    )
    assert url("json", "") == "https://docs.python.org/3.11/library/json.html"
    assert url("json", "dumps", local=True) == url("json", "_x") == url("_json", "x") == url("numpy.linalg._linalg", "gone") == ""


PUBLISHED = {
    "versions": {"python": "3.11.7", "numpy": "2.4.6", "scipy": "1.17.1", "jax": "0.10.2"},
    "records": 9638,
    "words": 1_408_697,
}


@pytest.mark.slow
def test_the_whole_corpus_has_the_known_counts(tmp_path):
    parts = [p for p in pydocs.DEFAULT_PARTS if p != pydocs.STDLIB]
    versions = {"python": platform.python_version(), **{p: metadata.version(p) for p in parts}}
    if versions != PUBLISHED["versions"]:
        pytest.skip(f"counts are known for {PUBLISHED['versions']}, installed are {versions}")
    manifest = open_source("pydocs", cache_dir=tmp_path, data_dir=None).manifest()
    assert {key: manifest[key] for key in PUBLISHED} == PUBLISHED
