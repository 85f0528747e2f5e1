"""The documentation: its commands are valid, its experiments and fields exist, and the site builds without a dead link."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metajax import registry
from metajax.cli import main as cli
from metajax.core.errors import UserError
from metajax.core.fields import override

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PLACEHOLDERS = {"RUN", "NAME", "DIR", "FILE", "PATH"}
EXAMPLES = {"rates"}  # what a page tells the reader to write
LOOKS = ("list", "show")  # verbs that run nothing and are quick


def commands():
    """(page, words) of every `python run.py ...` in a fenced block or between backticks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
        inline = re.findall(r"`(python run\.py [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("python run.py")]
        for line in (*lines, *inline):
            for call in re.split(r"\s+(?:;|#)\s+", line.replace("$'", "'")):
                if call.startswith("python run.py"):
                    yield page.name, tuple(shlex.split(call, comments=True)[2:])


FOUND = sorted(set(commands()))


def names_nothing(words):
    return any(word in PLACEHOLDERS | EXAMPLES or "/NAME" in word or "|" in word or word == "..." for word in words)


@pytest.mark.parametrize(
    ("page", "words"), [f for f in FOUND if not names_nothing(f[1])], ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_commands_are_commands(page, words):
    registry.load()
    options = cli._parse(list(words))
    named = options.verb in ("run", "table", "plan") and options.name and not options.all
    if named or (options.verb == "show" and "/" in options.name):
        target = registry.find(options.name)
        example = registry.find_experiment(target.example) if isinstance(target, registry.Table) else target
        fields = dict(pair.split("=", 1) for pair in options.changes)
        override(example.build(options.scale), fields)


def test_most_commands_are_checked():
    checked = [words for _, words in FOUND if not names_nothing(words)]
    assert len(checked) > 25 and len(checked) > len(FOUND) / 2


@pytest.mark.parametrize(
    "words",
    sorted({words for _, words in FOUND if words and words[0] in LOOKS and "--rows" not in words and "/" in words[-1]}),
    ids=" ".join,
)
def test_commands_that_only_read_are_run(words, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(list(words)) == 0 and capsys.readouterr().out


BLOCKS = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(BLOCKS)])
def test_python_in_the_pages_names_existing_objects(page, block):
    imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec("\n".join(map(ast.unparse, imports)), {})


def test_a_misspelt_command_is_refused():
    with pytest.raises(UserError, match="did you mean"):
        cli._parse(["tabel", "quickstart"])


def test_the_site_builds_without_a_dead_link(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {page.stem for page in PAGES[1:]} <= {path.parent.name for path in (tmp_path / "site").rglob("index.html")} | {"index"}
