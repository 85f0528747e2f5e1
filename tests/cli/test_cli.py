"""The command line as users see it: names, verbs, and one clear line with exit code 2 for every mistake."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metajax.cli.main import build_parser, main
from metajax.cli.verb import verbs
from metajax.runs.files import write_json

ROOT = Path(__file__).parents[2]
CHANGES = (
    "data.tokenizer=byte data.sequence_length=64 data.batch_size=4 data.validation_share=0.2 model.layers=2 model.width=16 "
    "model.heads=2 model.mlp_width=32 training.steps=4 optimizer.warmup_steps=1 evaluation.documents=5 "
    "evaluation.sample_tokens=4 runtime.log_every=2 runtime.save_every=2"
)
SMALL = [f"--set={change}" for change in CHANGES.split()]


@pytest.fixture
def command(tiny_corpus, paths, tmp_path, capsys):
    """Run one command line on the tiny corpus; returns (exit code, standard output, standard error)."""

    def run(*words, small=False, corpus=tiny_corpus):
        source = ["--set", f"data.sources=jsonl:{corpus}?origin=module"]
        places = (
            ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(paths.cache)] if words and words[0] not in ("list",) else []
        )
        changes = [*SMALL, *source] if small else []
        code = main(
            [*words[:2], *changes, *words[2:], *places] if words[0] == "table" else [*words[:1], *changes, *words[1:], *places]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_error_line(result):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


# ------------------------------------------------------------------------------------------------- what there is


def test_bare_command_lists_tables_and_experiments(command):
    code, out, _ = command("list")
    assert code == 0 and "rows quickstart/plain  meta_tokens  metadata" in out and "three seeds: cpu" in out
    quick = (
        "import sys; from metajax.cli.main import main; main([]); "
        "assert not {'jax', 'numpy', 'PIL', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "quickstart/plain" in done.stdout, done.stderr


def test_every_verb_has_help_with_two_examples_that_parse(capsys):
    for name, verb in {"": None, **verbs()}.items():
        with pytest.raises(SystemExit) as stop:
            main([*filter(None, [name]), "--help"])
        assert stop.value.code == 0
        shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("python run.py ")]
        assert len(shown) >= 2
        for line in shown if verb else ():
            words = shlex.split(line.removeprefix("python run.py ").partition("   ")[0].partition("  ")[0])
            assert words[0] in (name, *verbs()) or words[0].startswith("quickstart"), line
            build_parser().parse_args(words if words[0] in verbs() else ["run", *words])


def test_show_resolves_an_experiment(command):
    code, out, _ = command("show", "quickstart/meta_tokens", "--set", "model.layers=8")
    assert code == 0
    for text in ("meta_tokens.rate", "model.layers", "parameters", "training FLOPs", "about 2 minutes"):
        assert text in out


def test_show_decodes_rows(command):
    code, out, _ = command("show", "quickstart/metadata", "--rows", "2", small=True)
    assert code == 0 and "row 0: " in out and "<|context_begin|>" in out


def test_show_decodes_rows_of_tasks_with_their_curriculum(command):
    tasks = ["--set", 'tasks={"train_length": 64, "eval_lengths": [32]}', "--set", "data.tokenizer=bpe:512+tasks"]
    code, out, err = command("show", "quickstart/plain", "--rows", "1", *tasks, small=True)
    assert code == 0, err
    for text in ("phase 5", "11-64", "Q: xor before pause? A:", "_PAUSE_", "<|meta|>", "with loss"):
        assert text in out


def test_show_a_corpus(command, tiny_corpus):
    code, out, _ = command("show", f"jsonl:{tiny_corpus}?origin=module", "--rows", "1", "--field", "{topic|hash|top2}")
    assert code == 0 and "entropy" in out and "module" in out and "topic|hash|top2" in out and "bits in common" in out


# ---------------------------------------------------------------------------------------------------- a whole run


def test_run_eval_generate_compare(command, tmp_path):
    code, out, err = command("quickstart/metadata", small=True)
    assert code == 0 and "validation bits/byte, right metadata" in out, err
    [workdir] = (tmp_path / "runs/quickstart/metadata/cpu").iterdir()
    for name in ("config.json", "environment.json", "data.json", "metrics.jsonl", "report.json", "report.html", "tokenizer.json"):
        assert (workdir / name).exists(), name
    report = json.loads((workdir / "report.json").read_text())
    assert report["counts"]["metadata"] > 0 and report["counts"]["meta_tokens"] == 0
    assert set(report["startup"]) == {"imports", "data", "init", "compile", "first_step", "other", "total"}

    code, out, _ = command("eval", "quickstart/metadata")
    assert code == 0
    for condition, values in report["eval"].items():
        shown = "no" if condition == "none" else condition
        assert f"{shown} metadata: {values['bpb']:.4f}" in out, "evaluating again gives the same number"

    code, out, _ = command("eval", "quickstart/metadata", "--task", "parity", "--lengths", "64")
    assert code == 0 and "parity" in out and "1,000" in out and "no metadata" in out
    code, out, _ = command("generate", workdir.name[:6], "--prompt", "abc", "--tokens", "3", "--context", "x")
    assert code == 0 and out.startswith("abc")
    assert command("quickstart/plain", small=True)[0] == 0
    code, out, _ = command("compare", "quickstart/plain", "quickstart/metadata")
    assert code == 0 and "metadata.position" in out and "prepend" in out
    code, out, _ = command("runs")
    assert code == 0 and out.count("complete") == 2

    code, _, err = command("quickstart/plain", small=True)
    assert code == 0 and "is complete" in err
    assert command("show", "quickstart/metadata", "--set", "metadata.template={module}[/x]")[0] == 0, "brackets are no markup"


def test_a_table_from_one_command(command, tmp_path):
    code, out, _ = command("quickstart", "--seeds", "2", "--rows", "plain,metadata", small=True)
    assert code == 0 and "| plain " in out and "2 seeds" in out
    [folder] = (tmp_path / "runs/quickstart").glob("cpu-*")  # changed fields and fewer rows: not the table's own place
    result = json.loads((folder / "table.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["plain", "metadata"]
    assert all(
        len(cell["values"]) == 2 and None not in cell["values"] for row in result["rows"] for cell in row["cells"].values()
    )
    assert (folder / "report.html").exists() and (folder / "table.md").exists()
    before = json.loads((folder / "table.json").read_text())
    assert command("quickstart", "--rows", "plain,metadata", small=True)[0] == 0, "one seed again: the second is still shown"
    assert json.loads((folder / "table.json").read_text())["seeds"] == [0, 1]
    code, _, err = command("table", "quickstart", "--seeds", "2", "--rows", "plain,metadata", small=True)
    assert code == 0 and err.count("is complete") == 4
    assert json.loads((folder / "table.json").read_text()) == before


def test_init_from_a_run(command, tmp_path):
    assert command("quickstart/plain", small=True)[0] == 0
    code, _, err = command(
        "quickstart/plain", "--set", "init.from=quickstart/plain", "--set", "optimizer.learning_rate=1e-9", small=True
    )
    assert code == 0, err
    again = ("--set", "init.from=quickstart/plain", "--set", "optimizer.learning_rate=1e-9")
    assert "is complete" in command("quickstart/plain", *again, small=True)[2], "the same command names the same parent"
    parent, child = sorted((tmp_path / "runs/quickstart/plain/cpu").iterdir(), key=lambda p: p.stat().st_mtime)
    reports = [json.loads((run / "report.json").read_text()) for run in (parent, child)]
    assert reports[1]["parent"] == str(parent.relative_to(tmp_path / "runs"))
    assert abs(reports[0]["eval"]["none"]["bpb"] - reports[1]["eval"]["none"]["bpb"]) < 1e-5


@pytest.fixture
def pair(own_registry):
    """pair: a table whose rows start from pair_base; its second row fails."""
    from experiments.quickstart import quickstart
    from metajax import registry
    from metajax.core.fields import override
    from metajax.registry import Row

    registry.experiment("pair_base", summary="s", minutes={"cpu": 1})(quickstart.base)
    rows = [Row("short"), Row("broken", {"optimizer.learning_rate": 1e30})]
    start = lambda scale: override(quickstart.base(scale), {"init.from": "pair_base", "evaluation.conditions": "none"})  # noqa: E731
    registry.table("pair", summary="s", rows=rows, columns=quickstart.columns[:1], baseline="short", minutes={"cpu": 1})(start)


def test_an_experiment_that_starts_from_another_runs_it_first(command, pair, tmp_path):
    code, out, _ = command("show", "pair/short", small=True)
    assert code == 0 and "pair_base/cpu/" in out and not (tmp_path / "runs").exists(), "show makes no run"
    code, _, err = command("pair/short", "--seed", "1", small=True)
    assert code == 0 and "pair/short starts from pair_base (seed 1), which runs first" in err
    [parent], [child] = ((tmp_path / f"runs/{name}/cpu").iterdir() for name in ("pair_base", "pair/short"))
    assert parent.name.endswith("-s1") and json.loads((parent / "report.json").read_text())["steps"] == 4
    assert json.loads((child / "report.json").read_text())["parent"] == f"pair_base/cpu/{parent.name}"
    assert command("pair/short", "--seed", "1", small=True)[2].count("is complete") == 2


def test_a_table_with_a_failed_row_exits_with_1_and_can_be_rendered_again(command, pair, tmp_path):
    assert "no row of pair has been run" in one_error_line(command("pair", "--render", small=True))
    code, out, err = command("pair", small=True)
    assert code == 1 and "failed: NonFinite: step" in err and re.search(r"\| broken +\| failed ", out)
    assert err.count("pair_base, seed 0, from which rows start") == 1
    [folder] = (tmp_path / "runs/pair").glob("cpu-*")
    before = {name: (folder / name).read_text() for name in ("table.json", "table.md", "report.html")}
    for name in before:
        if name != "table.json":
            (folder / name).unlink()
    code, _, err = command("pair", "--render", small=True)
    assert code == 1 and "seed 0:" not in err, "nothing is run"
    assert {name: (folder / name).read_text() for name in before} == before


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quikstart"], "unknown command or experiment 'quikstart'; did you mean 'quickstart'?"),
        (["quickstart/plain", "--scale", "gpuu"], "unknown scale 'gpuu'; did you mean 'gpu'?"),
        (["quickstart", "--set", "model.layrs=3"], "unknown field model.layrs; did you mean 'layers'?"),
        (["quickstart/plain", "--seeds", "3"], "--seeds, --rows, --jobs and --render are for tables"),
        (["quickstart", "--sweep", "model.layers=1,2"], "--sweep is for one experiment, such as quickstart/plain"),
        (["quickstart/plain", "--sweep", "model.layers"], "expected FIELD=VALUE,VALUE"),
        (["quickstart/plain", "--sweep", "model.layrs=1,2"], "unknown field model.layrs; did you mean 'layers'?"),
        (["quickstart/plain", "--sweep", "model.layers=1,2", "--set", "model.layers=3"], "leave one of them out"),
        (["quickstart", "--rows", "plane"], "no row 'plane'"),
        (["quickstart/plain", "--seeed", "3"], "unrecognized arguments: --seeed"),
        (["quickstart/plain", "--set", "data.sources=pydoc"], "'pydoc'; did you mean 'pydocs'?"),
        (["quickstart/plain", "--set", "data.sources=jsonl:/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
        (["quickstart/plain", "--set", "runtime.loggers=wand"], "did you mean 'wandb'?"),
        (["show", "pydoc"], "did you mean 'pydocs'?"),
        (["eval", "quickstart/plain"], "no run 'quickstart/plain'"),
        (["compare", "quickstart/plain"], "at least two runs"),
        (["quickstart/plain", "--set", "init.from=nothing"], "no run 'nothing'"),
        (["import", "llama", "nowhere"], "nowhere/config.json: no such file"),
        (["import", "gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["export", "gpt", "quickstart/plain", "out"], "invalid choice: 'gpt'"),
        (["export", "gpt2", "quickstart/plain", "out"], "no run 'quickstart/plain'"),
        (["lits"], "did you mean 'list'?"),
        (["evl", "quickstart/plain"], "did you mean 'eval'?"),
        (["quickstart", "--rows", "metadta"], "did you mean 'metadata'?"),
        (["show", "quickstart", "--set", "model.layrs=3"], "unknown field model.layrs"),
        (["quickstart/plain", "--runs-dir", "gs://bucket/runs"], "local folder"),
        (["quickstart", "--workdir", "gs://bucket/run"], "a bucket is for one experiment"),
        (["quickstart/plain", "--set", "runtime.mesh=data=3"], "but there are 1 devices"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, words, message):
    assert message in one_error_line(command(*words))


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_corrupt_record_is_named_and_can_be_skipped(command, tiny_corpus, tmp_path):
    lines = tiny_corpus.read_text().splitlines()
    corpus = write(tmp_path / "bad.jsonl", *lines[:60], '{"text": "cut off', *lines[60:])
    error = one_error_line(command("quickstart/plain", small=True, corpus=corpus))
    assert "bad.jsonl" in error and "61" in error and "data.on_bad_record=skip" in error
    code, _, err = command("quickstart/plain", "--set", "data.on_bad_record=skip", small=True, corpus=corpus)
    assert code == 0, err
    [run] = [p.parent for p in (tmp_path / "runs").rglob("report.json")]
    assert json.loads((run / "report.json").read_text())["corpora"][0]["bad_records_skipped"] == 1


def test_an_empty_corpus(command, tmp_path):
    assert "empty.jsonl" in one_error_line(command("quickstart/plain", small=True, corpus=write(tmp_path / "empty.jsonl")))


def test_a_missing_template_field_is_named(command):
    error = one_error_line(command("quickstart/metadata", "--set", "metadata.template={modul}", small=True))
    assert "no field 'modul'; did you mean 'module'?" in error


def test_a_workdir_of_another_experiment_is_refused(command, tmp_path):
    workdir = tmp_path / "here"
    assert command("quickstart/plain", "--workdir", str(workdir), small=True)[0] == 0
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    error = one_error_line(command("quickstart/metadata", "--workdir", str(workdir), small=True))
    assert "holds quickstart/plain" in error
    error = one_error_line(
        command("quickstart/plain", "--workdir", str(workdir), "--set", "optimizer.learning_rate=0.1", small=True)
    )
    assert "first optimizer.learning_rate: 0.002 there, 0.1 now" in error
    assert "with seed 0" in one_error_line(command("quickstart/plain", "--workdir", str(workdir), "--seed", "1", small=True))
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before, "nothing was overwritten"
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "thesis.txt", "precious")
    assert "thesis.txt" in one_error_line(command("quickstart/plain", "--workdir", str(tmp_path / "other"), small=True))


def test_another_tokenizer_or_corpus_is_refused(command, tiny_corpus, tmp_path):
    corpus = tmp_path / "mine.jsonl"
    shutil.copy(tiny_corpus, corpus)
    train = ("quickstart/plain", "--set", "data.tokenizer=bpe:320")
    assert command(*train, small=True, corpus=corpus)[0] == 0
    write(corpus, *tiny_corpus.read_text().splitlines()[:-30])
    error = one_error_line(command("eval", "quickstart/plain"))
    assert "the tokenizer is not the one" in error


def test_a_checkpoint_from_another_config(command, tmp_path):
    assert command("quickstart/plain", "--workdir", str(tmp_path / "a"), small=True)[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "report.json").unlink()
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    saved["config"]["optimizer"]["learning_rate"] = 0.1
    write_json(tmp_path / "b" / "config.json", saved)
    changed = ("--set", "optimizer.learning_rate=0.1")
    error = one_error_line(command("quickstart/plain", "--workdir", str(tmp_path / "b"), *changed, small=True))
    assert "belongs to another configuration" in error


def test_a_damaged_checkpoint_is_survived_and_reported(command, tmp_path):
    workdir = tmp_path / "here"
    assert command("quickstart/plain", "--workdir", str(workdir), small=True)[0] == 0
    undisturbed = json.loads((workdir / "report.json").read_text())
    (workdir / "report.json").unlink()
    file = max((p for p in (workdir / "checkpoints" / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, _, err = command("quickstart/plain", "--workdir", str(workdir), small=True)
    assert code == 0 and "step 4 is damaged" in err and "resuming at step 2" in err
    report = json.loads((workdir / "report.json").read_text())
    assert len(report["warnings"]) == 1 and report["eval"] == undisturbed["eval"]


def test_no_good_checkpoint_left_exits_with_2(command, tmp_path):
    workdir = tmp_path / "here"
    assert command("quickstart/plain", "--workdir", str(workdir), small=True)[0] == 0
    (workdir / "report.json").unlink()
    for file in (workdir / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:-1])
    assert "no good checkpoint is left" in one_error_line(command("quickstart/plain", "--workdir", str(workdir), small=True))


def test_init_from_another_tokenizer_is_refused(command, tiny_corpus, tmp_path):
    assert command("quickstart/plain", "--set", "data.tokenizer=bpe:320", small=True)[0] == 0
    corpus = write(tmp_path / "other.jsonl", *tiny_corpus.read_text().splitlines()[:-40])
    words = ("quickstart/plain", "--set", "data.tokenizer=bpe:320", "--set", "init.from=quickstart/plain")
    assert "its tokenizer" in one_error_line(command(*words, small=True, corpus=corpus))
    code, _, err = command(*words[:-1], f"{words[-1]}?blocks/0/0/mixer&blocks/0/0/mlp", small=True, corpus=corpus)
    assert code == 0 and "starting from the parameters of" in err, "parts without a vocabulary table"


def test_a_mistake_leaves_the_workdir_usable(command, tmp_path):
    workdir = ("--workdir", str(tmp_path / "here"))
    one_error_line(command("quickstart/plain", *workdir, "--set", "data.sources=jsonl:nowhere.jsonl", small=True))
    assert command("quickstart/plain", *workdir, small=True)[0] == 0
    assert "cannot be a run directory" in one_error_line(
        command("quickstart/plain", "--workdir", str(tmp_path / "here" / "config.json"), small=True)
    )


def test_a_kill_during_the_first_write_leaves_the_workdir_usable(command, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".config.json.77").write_text("{")
    assert command("quickstart/plain", "--workdir", str(tmp_path / "here"), small=True)[0] == 0


def test_a_change_of_all_rows_skips_rows_without_that_field(command, tmp_path):
    code, _, err = command("quickstart", "--rows", "plain,meta_tokens", "--set", "meta_tokens.rate=0.2", small=True)
    assert code == 0 and "quickstart/plain does not read meta_tokens.rate" in err
    [plain] = (tmp_path / "runs/quickstart/plain/cpu").iterdir()
    assert json.loads((plain / "report.json").read_text())["config"]["meta_tokens"] is None


def test_reader_processes(command, tmp_path):
    """In a separate process, like a user's run: reader processes import the main module again."""
    changes = ("data.sources=pydocs:email+json", "evaluation.conditions=none", "runtime.workers=1")
    places = ("--runs-dir", str(tmp_path / "r"), "--cache-dir", str(tmp_path / "c"))
    words = [sys.executable, "run.py", "quickstart/plain", *SMALL, *(f"--set={change}" for change in changes), *places]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any((tmp_path / "c" / "jax").iterdir()), "compiled programs are kept by default"


def test_the_readmes_example_registers_a_table(own_registry):
    from metajax import registry

    text = (ROOT / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert 0 < len(code.strip().splitlines()) <= 6
    exec(code, {})
    table = registry.tables()["rates"]
    assert [table.config(row, "cpu").meta_tokens.rate for row in table.rows] == [0.05, 0.1, 0.2]


def test_missing_packages_are_named_with_the_install_command():
    bare = [sys.executable, "-S", "-E", "run.py", "list"]  # -S: no site-packages
    done = subprocess.run(bare, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "make quickstart" in done.stderr and "Traceback" not in done.stderr
