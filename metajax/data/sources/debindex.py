"""Debian's package descriptions as a corpus: the package index joined with its English long descriptions.

The system's index has only one-line synopses if translations are switched off. So apt fetches both files into a private
list directory, and they are joined by Description-md5. Upstream paragraphs repeat in -dev, -doc and lib packages, so each
paragraph is used once, in the order of package names. The index has no dates. `popularity` is log2(1 + number of packages
that depend on this one): it measures use, not the quality of the prose.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metajax.core.errors import UserError, require
from metajax.core.progress import say
from metajax.core.sealed import FORMAT
from metajax.data.documents import Document
from metajax.data.sources import Request, source
from metajax.data.sources.built import BuiltCorpus, folder_of, open_or_build

RECIPE = 2  # raise when a change below changes the documents
MIN_WORDS = 20
_APT_HELPER = "/usr/lib/apt/apt-helper"
_REMEDY = "use another source, such as pydocs, or build the corpus on Debian 12 for amd64 and copy the cache's corpora folder"

# Debian 12 main for amd64: the index has not changed since its last point release.
PINNED = {
    "release": "bookworm",
    "architecture": "amd64",
    "packages": "515e692f2c4121c6fcec444ef100cc18f79a991910615f3a88c8b7becfc94d2f",
    "translation": "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f",
}

Stanza = dict[str, str]


@source("debindex")
def open_debindex(request: Request) -> BuiltCorpus:
    """The pinned release's corpus if it is cached, otherwise that of this machine's release. The first use fetches 16 MB.

    Raises UserError if it has to be built but there is no Debian, no apt, or no mirror that answers.
    """
    request.refuse_options()
    require(not request.path, f"data source {request.spec!r}: debindex takes no path; write just debindex")
    here, cache_dir, release = debian_release(), Path(request.cache_dir), (PINNED["release"], PINNED["architecture"])
    if here is not None and not folder_of("debindex", _key(release), cache_dir).exists():
        release = here

    def build() -> tuple[list[Document], dict[str, Any]]:
        require(here is not None, f"debindex: this machine does not run a Debian release with apt; {_REMEDY}")
        packages, translation = fetch(cache_dir / "debindex", *release)
        documents = build_documents(packages.decode(), translation.decode())
        return documents, describe(*release, {"packages": packages, "translation": translation})

    return open_or_build(request.spec, "debindex", _key(release), cache_dir, build)


def _key(release: tuple[str, str]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, RECIPE, *release]).encode()).hexdigest()


def describe(release: str, architecture: str, raw: Mapping[str, bytes]) -> dict[str, Any]:
    """Manifest entries: release, raw files with sha256, and differences from the pinned index. Warns about differences.

    The fingerprint covers the recipe and the raw files, so another point release is another corpus.
    """
    versions = {"release": release, "architecture": architecture}
    found = versions | {name: hashlib.sha256(content).hexdigest() for name, content in raw.items()}
    differences = [f"{name} is {found[name]}, pinned {pinned}" for name, pinned in PINNED.items() if found[name] != pinned]
    if differences:
        warnings.warn(f"debindex is not the pinned index, so counts and losses differ: {'; '.join(differences)}", stacklevel=2)
    return {
        "recipe": RECIPE,
        "versions": versions,
        "raw_files": {name: {"bytes": len(content), "sha256": found[name]} for name, content in raw.items()},
        "pinned": PINNED,
        "differences_from_pinned": differences,
        "fingerprint": hashlib.sha256(json.dumps([RECIPE, *sorted(found.items())]).encode()).hexdigest(),
    }


# ------------------------------------------------------------------------------------------------------ fetching


def debian_release() -> tuple[str, str] | None:
    """(code name, architecture) of this machine; None if it does not run Debian or has no apt."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not codename or not shutil.which("apt-get") or not os.path.exists(_APT_HELPER):
        return None
    return codename, _run(["dpkg", "--print-architecture"]).decode().strip()


def fetch(folder: Path, release: str, architecture: str) -> tuple[bytes, bytes]:
    """(Packages, Translation-en) of `main`, decompressed. apt fetches them into `folder`; the system's lists do not change."""
    folder = folder.absolute()
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    say("debindex: fetching Debian's package index and descriptions (16 MB, once)")
    options = {
        "Acquire::Languages": "en",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",  # the unprivileged apt user cannot write below the cache directory
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _run(["apt-get", *flags, "update", "-q", "--error-on=any"])
    patterns = (f"*_dists_{release}_main_{name}*" for name in (f"binary-{architecture}_Packages", "i18n_Translation-en"))
    packages, translation = (_list_file(folder / "lists", pattern) for pattern in patterns)
    return packages, translation


def _list_file(lists: Path, pattern: str) -> bytes:
    found = sorted(lists.glob(pattern))
    require(bool(found), f"debindex: apt fetched no {pattern} into {lists}; add Debian's main component to apt's sources")
    return _run([_APT_HELPER, "cat-file", str(found[0])])


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, check=False, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"debindex: {command[0]} failed ({lines[0]}); check the network and apt's sources, or {_REMEDY}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------- parsing


def stanzas(text: str) -> Iterator[Stanza]:
    """Stanzas of a Debian control file; continuation lines keep their leading space after a line feed."""
    for filled, lines in itertools.groupby(text.split("\n"), bool):
        stanza: Stanza = {}
        field = ""
        for line in lines if filled else ():
            if line[0] in " \t":
                stanza[field] += "\n" + line
            else:
                field, _, value = line.partition(":")
                stanza[field] = value.strip()
        if stanza:
            yield stanza


def description(field: str) -> tuple[str, list[str]]:
    """(synopsis, paragraphs) of a Description field.

    ` .` separates paragraphs. Lines with two or more leading spaces are verbatim (lists, code); the others are joined.
    """
    synopsis, *lines = field.split("\n")
    paragraphs, verbatim = [""], False
    for line in (line[1:] for line in lines):
        if line.strip() == ".":
            paragraphs.append("")
            continue
        was_verbatim, verbatim = verbatim, line.startswith(" ")
        if paragraphs[-1]:
            paragraphs[-1] += "\n" if verbatim or was_verbatim else " "
        paragraphs[-1] += line.rstrip() if verbatim else line.strip()
    return synopsis.strip(), [paragraph for paragraph in paragraphs if paragraph.strip()]


def package_names(field: str) -> set[str]:
    """Names in a dependency field, without versions, architectures and qualifiers. All alternatives count."""
    return {re.split(r"[\s(:\[]", item.strip(), maxsplit=1)[0] for item in re.split(r"[,|]", field) if item.strip()}


def reverse_dependencies(packages: Iterable[Stanza]) -> Counter[str]:
    """How many packages depend on, pre-depend on or recommend each package, by its name or by a name that it provides."""
    packages = list(packages)
    providers: dict[str, set[str]] = defaultdict(set)
    for package in packages:
        for virtual in package_names(package.get("Provides", "")):
            providers[virtual].add(package["Package"])
    counts: Counter[str] = Counter()
    for package in packages:
        names = package_names(",".join(package.get(name, "") for name in ("Depends", "Pre-Depends", "Recommends")))
        counts.update(names.union(*(providers.get(name, ()) for name in names)) - {package["Package"]})
    return counts


def build_documents(packages: str, translation: str) -> list[Document]:
    """Documents in the order of package names: synopsis, then paragraphs that no earlier package had, if these have 20 words."""
    texts = {stanza["Description-md5"]: stanza["Description-en"] for stanza in stanzas(translation)}
    index = sorted(stanzas(packages), key=lambda stanza: stanza["Package"])
    users = reverse_dependencies(index)
    documents, seen = [], set()
    for stanza in index:
        synopsis, paragraphs = description(texts.get(stanza.get("Description-md5", ""), ""))
        fresh = []
        for paragraph in paragraphs:
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if sum(len(paragraph.split()) for paragraph in fresh) >= MIN_WORDS:
            documents.append(_document(stanza, "\n\n".join([synopsis, *fresh]), users[stanza["Package"]]))
    return documents


def _document(stanza: Stanza, text: str, users: int) -> Document:
    tags = [tag.strip() for tag in stanza.get("Tag", "").replace("\n", " ").split(",") if tag.strip()]
    fields = {
        "package": stanza["Package"],
        "url": stanza.get("Homepage", ""),
        "section": stanza.get("Section", ""),
        "tags": ", ".join(tags),
        "role": ", ".join(tag.removeprefix("role::") for tag in tags if tag.startswith("role::")),
        "maintainer": re.sub(r"\s*<[^>]*>", "", stanza.get("Maintainer", "")).strip(),
        "popularity": f"{math.floor(1000 * math.log2(1 + users)) / 1000:.3f}",  # cut, so that its whole part and tenths are exact
    }
    source = stanza.get("Source", stanza["Package"]).split()[0]
    return Document(text, {k: v for k, v in fields.items() if v}, source)
