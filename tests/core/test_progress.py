"""Printed text: no control sequence from data reaches the terminal."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest

import metajax
from metajax.cli import main as cli
from metajax.core import progress
from metajax.core.progress import Terminal, echo, fail, plain, say, shown, warn
from metajax.reporting import terminal
from metajax.reporting.lines import grid_of

pytestmark = pytest.mark.fault(28)
NASTY = "a\x1b]0;title\x07b\x1b[2Jc\rd\x08\x7f\x9b31m\u202ereversed\u2066\u200b\ufeff\u2028\U000e0041\ud800"


def is_harmless(text):
    return shown(text) == text


def test_control_characters_are_shown_as_escapes():
    assert shown("plain\ttext\nünï 漢字 🙂\u00a0") == "plain\ttext\nünï 漢字 🙂\u00a0"
    assert shown("\x1b[31m\x9b\x7f\u202e\u2066\u200b") == r"\x1b[31m\x9b\x7f\u202e\u2066\u200b"
    assert shown("a\nb\tc", keep="") == r"a\nb\tc"
    assert is_harmless(shown(NASTY))


@pytest.mark.parametrize("line", [say, warn, fail])
def test_a_line_stays_one_line(line, capfd):
    line(f"{NASTY}\nerror: forged [/x] :bug:")
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and is_harmless(err) and r"\x1b]0;title\x07" in err and "[/x] :bug:" in err


def test_text_on_standard_output(capfd):
    echo(NASTY, end="")
    out = capfd.readouterr().out
    assert out == shown(NASTY)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_tables_texts_and_bars(is_terminal, monkeypatch):
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=is_terminal, width=200, color_system=None, legacy_windows=False)
    console.print(grid_of(("name\x1b[2J", "value"), [(f"{NASTY}\nnext [bold]", "[/x]")]))
    console.print(NASTY)
    console.print(plain(NASTY))
    monkeypatch.setattr(progress, "console", console)
    with progress.progress(f"[/x] {NASTY}", total=1) as advance:
        advance(1)
    found = file.getvalue()
    assert r"\x1b]0;title\x07" in found and "\x1b]0" not in found and "\x1b[2Jc" not in found
    assert not {"\x07", "\x08", "\x9b", "\u202e", "\u2066", "\u200b"} & set(found)
    assert is_terminal or is_harmless(found)
    assert r"\nnext [bold]" in found


def test_a_corpus_with_escapes_is_shown(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = NASTY.replace("\ud800", "") + " and words that make a document of it"
    rows = [{"text": f"{text} {i}", "module": f"m\x1b[2J{i}", "na\x1bme": "v\u202e"} for i in range(20)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["show", "jsonl:c.jsonl?origin=module", "--rows", "2"]) == 0
    out, err = capfd.readouterr()
    assert is_harmless(out + err) and r"\x1b]0;title" in out


def test_tracebacks_are_shown(capfd):
    cli.main(["lits"])
    capfd.readouterr()
    try:
        raise RuntimeError(NASTY)
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capfd.readouterr().err
    assert "RuntimeError" in err and is_harmless(err)


def test_all_output_goes_through_one_module():
    home = Path(metajax.__file__).parent
    for path in home.rglob("*.py"):
        if path == home / "core" / "progress.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func if isinstance(node, ast.Call) else None
            called = name.id if isinstance(name, ast.Name) else ast.unparse(name) if isinstance(name, ast.Attribute) else ""
            assert called not in ("print", "Console", "sys.stdout.write", "sys.stderr.write"), f"{path}:{node.lineno}"
            if called == "console.print":
                assert "markup" not in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
    assert isinstance(terminal.console, Terminal) and isinstance(progress.console, Terminal)
