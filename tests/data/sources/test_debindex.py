import hashlib
import json

import pytest

from metajax.core.errors import UserError
from metajax.data.sources import debindex, open_source
from metajax.data.sources.debindex import (
    PINNED,
    build_documents,
    describe,
    description,
    package_names,
    reverse_dependencies,
    stanzas,
)

LONG = " ".join(f"word{i}" for i in range(25))

PACKAGES = """\
Package: zoo-dev
Source: zoo (1.2)
Maintainer: Zoo Keepers <zoo@example.org>
Depends: zoo (>= 1.0), libc6 | libc7
Description-md5: bbb

Package: zoo
Maintainer: Zoo Keepers <zoo@example.org>
Homepage: https://zoo.example.org/
Section: science
Provides: menagerie
Tag: role::program, interface::text-mode,
 use::viewing
Description-md5: aaa

Package: reader
Maintainer: R <r@example.org>
Pre-Depends: menagerie
Recommends: zoo:any, absent
Description-md5: ccc

Package: orphan
Maintainer: O
Description-md5: nowhere
"""

TRANSLATION = f"""\
Package: zoo
Description-md5: aaa
Description-en: animals in a row
 {LONG}
 and more.
 .
 List:
  * one
  * two
 tail

Package: zoo-dev
Description-md5: bbb
Description-en: animals, headers
 {LONG}
 and   more.
 .
 This package is for developers.

Package: reader
Description-md5: ccc
Description-en: reads animals
 {LONG} anew
"""


def test_stanzas_keep_continuation_lines():
    first, second, *_ = stanzas(PACKAGES)
    assert first["Package"] == "zoo-dev"
    assert second["Tag"] == "role::program, interface::text-mode,\n use::viewing"
    assert len(list(stanzas(PACKAGES + "\n\n"))) == 4


def test_descriptions_join_prose_and_keep_verbatim_lines():
    synopsis, paragraphs = description("short\n one\n two\n .\n List:\n  * a\n    b\n tail\n .\n .\n")
    assert synopsis == "short"
    assert paragraphs == ["one two", "List:\n * a\n   b\ntail"]
    assert description("alone") == ("alone", [])


def test_dependency_fields_give_names():
    assert package_names("a (>= 1), b | c:any, d [amd64] , e<!nocheck>".replace("<!nocheck>", " <!nocheck>")) == set("abcde")
    assert package_names("") == set()


def test_reverse_dependencies_count_packages_through_provides_once():
    counts = reverse_dependencies(stanzas(PACKAGES))
    assert counts["zoo"] == 2  # zoo-dev, and reader through both its name and menagerie
    assert counts["libc6"] == counts["libc7"] == counts["absent"] == 1
    assert counts["reader"] == 0


def test_documents_are_joined_deduplicated_and_in_name_order():
    documents = build_documents(PACKAGES, TRANSLATION)
    assert [d.metadata["package"] for d in documents] == ["reader", "zoo"]  # zoo-dev has too few new words, orphan no text
    zoo = documents[1]
    assert zoo.text == f"animals in a row\n\n{LONG} and more.\n\nList:\n * one\n * two\ntail"
    assert zoo.origin == "zoo"
    assert zoo.metadata == {
        "package": "zoo",
        "url": "https://zoo.example.org/",
        "section": "science",
        "tags": "role::program, interface::text-mode, use::viewing",
        "role": "program",
        "maintainer": "Zoo Keepers",
        "popularity": "1.584",  # two packages need it: log2(3)
    }
    assert documents[0].metadata["popularity"] == "0.000"


def test_the_origin_is_the_source_package():
    text = TRANSLATION.replace("This package is for developers.", f"Developers: {LONG} once more")
    documents = build_documents(PACKAGES, text)
    assert [(d.metadata["package"], d.origin) for d in documents][-1] == ("zoo-dev", "zoo")
    assert documents[-1].text.startswith("animals, headers\n\nDevelopers: ")


def test_a_difference_from_the_pinned_index_is_reported():
    raw = {"packages": b"p", "translation": b"t"}
    with pytest.warns(UserWarning, match="packages is .*, pinned 515e692f2c41"):
        manifest = describe("bookworm", "amd64", raw)
    assert len(manifest["differences_from_pinned"]) == 2
    assert manifest["raw_files"]["packages"] == {"bytes": 1, "sha256": hashlib.sha256(b"p").hexdigest()}
    with pytest.warns(UserWarning, match="release is trixie"):
        assert describe("trixie", "amd64", raw)["fingerprint"] != manifest["fingerprint"]


@pytest.fixture
def local_debian(monkeypatch):
    raw = (PACKAGES.encode(), TRANSLATION.encode())
    monkeypatch.setattr(debindex, "debian_release", lambda: ("bookworm", "amd64"))
    monkeypatch.setattr(debindex, "fetch", lambda folder, release, architecture: raw)
    pins = {name: hashlib.sha256(text).hexdigest() for name, text in zip(("packages", "translation"), raw, strict=True)}
    monkeypatch.setattr(debindex, "PINNED", {**PINNED, **pins})


def test_the_corpus_opens_from_its_cache(local_debian, tmp_path, monkeypatch):
    source = open_source("debindex", cache_dir=tmp_path, data_dir=None)
    monkeypatch.setattr(debindex, "fetch", None)  # a second fetch would fail
    again = open_source("debindex", cache_dir=tmp_path, data_dir=None)
    assert [again[i] for i in range(2)] == [source[i] for i in range(2)]
    for release in (None, ("trixie", "arm64")):  # a copied cache needs no Debian, or another
        monkeypatch.setattr(debindex, "debian_release", lambda release=release: release)
        elsewhere = open_source("debindex", cache_dir=tmp_path, data_dir=None)
        assert [elsewhere[i] for i in range(2)] == [again[i] for i in range(2)]
        assert elsewhere.fingerprint() == again.fingerprint()
    manifest = json.loads(json.dumps(again.manifest()))
    assert manifest["differences_from_pinned"] == []
    assert manifest["records"] == 2


@pytest.mark.parametrize(("release", "path"), [("fedora", None), ("debian", "no apt here")])
def test_no_debian_or_no_apt_is_a_user_error(release, path, tmp_path, monkeypatch):
    monkeypatch.setattr(debindex.platform, "freedesktop_os_release", lambda: {"ID": release, "VERSION_CODENAME": "x"})
    if path:
        monkeypatch.setenv("PATH", str(tmp_path / path))
    with pytest.raises(UserError, match="does not run a Debian release with apt; use another source, such as pydocs"):
        open_source("debindex", cache_dir=tmp_path, data_dir=None)


def test_a_failed_fetch_is_a_user_error_that_names_the_program(tmp_path, monkeypatch):
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'E: mirror is away' >&2\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match=r"apt-get failed \(E: mirror is away\); check the network"):
        debindex.fetch(tmp_path / "d", "bookworm", "amd64")
