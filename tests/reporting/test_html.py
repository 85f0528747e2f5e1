"""The pages of a run and of a table: escaping, no external files, figures, and rendering in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from metajax import registry
from metajax.config import Config, Data, Evaluation, Metadata, MetaTokens, Training, config_hash
from metajax.core.fields import override, to_dict
from metajax.registry import Column, Row, Table
from metajax.reporting.facts import against
from metajax.reporting.figures import SpreadColumn, loss_curves, seed_spread
from metajax.reporting.html import _metadata_words, write_run_report
from metajax.runs.files import write_json
from metajax.tables.run import plan_table, run_table

HOSTILE = '<script>alert("x")</script> & naïve café — 元素 🙂 </p>'
CONDITIONS = ("none", "right", "shuffled")
ROWS = (
    Row("plain", {}),
    Row("meta_tokens", {"meta_tokens": MetaTokens(rate=0.1)}),
    Row("metadata", {"metadata.position": "prepend"}),
)
LEVEL = {"plain": 2.31, "meta_tokens": 2.35, "metadata": 2.27}


def base(scale):
    return Config(
        name="lab",
        data=Data(sources=("pydocs",)),
        metadata=Metadata(position="none", template="{topic} {module}"),
        training=Training(steps=200),
        evaluation=Evaluation(conditions=CONDITIONS, documents=240),
    )


def make_table(rows=ROWS):
    columns = tuple(Column(f"bits/byte, {c} metadata", f"eval.{c}.bpb") for c in CONDITIONS)
    notes = ("Bits per byte of body text.", HOSTILE)
    return Table("lab", f"three ways {HOSTILE}", base, rows, columns, "plain", {"cpu": 1}, "a paper <b>", notes)


def fake_run(config, workdir, analyses):
    """Write the files of a complete run, and return its report."""
    row, rng = config.name.split("/")[-1], np.random.default_rng([config.seed, len(config.name)])
    workdir.mkdir(parents=True, exist_ok=True)
    steps = np.arange(1, config.training.steps + 1)
    bpb = LEVEL[row] + 4.2 * np.exp(-steps / 14) + 0.9 * np.exp(-steps / 90) + rng.normal(0, 0.06, len(steps))
    lines = [{"step": int(s), "loss": 3.0, "bpb": float(v), "grad_norm": 1.0} for s, v in zip(steps, bpb, strict=True)]
    lines += [{"step": s, "validation_bpb": LEVEL[row] + 0.9 * float(np.exp(-s / 90))} for s in (50, 100, 150)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "bp')
    write_json(workdir / "environment.json", ENVIRONMENT)
    write_json(workdir / "config.json", {"hash": config_hash(config), "config": to_dict(config)})
    report = {**REPORT, "name": config.name, "seed": config.seed, "hash": config_hash(config), "config": to_dict(config)}
    noise = rng.normal(0, 0.008, 3)
    report["eval"] = {
        c: RESULT | {"bpb": LEVEL[row] + 0.1 * i + float(noise[i]), "metadata_tokens": 0 if c == "none" else 1_900}
        for i, c in enumerate(CONDITIONS)
    }
    if row == "meta_tokens":
        report["parameters"] = REPORT["parameters"] | {"meta_attention": 262_272, "total": 1_311_360}
    meta, metadata = 5_000 * 8 * (row == "meta_tokens"), 39_000 * (row == "metadata")
    counts = {"positions": 409_600, "loss_tokens": 380_000, "padding": 0, "flops": 3.1e12}
    report["counts"] = counts | {"metadata": metadata, "meta_tokens": meta, "body": 403_000 - meta - metadata}
    report["sample"] = REPORT["sample"] | {"context": f"numpy {HOSTILE}" if row == "metadata" else None}
    write_json(workdir / "report.json", report)
    write_run_report(workdir)
    return report


ENVIRONMENT = json.loads((Path(__file__).parent / "environment.json").read_text())
ENVIRONMENT["command"].append(HOSTILE)
REPORT = json.loads((Path(__file__).parent / "report.json").read_text())
REPORT["warnings"][0] += HOSTILE
REPORT["sample"] = {key: text + HOSTILE for key, text in REPORT["sample"].items()}
REPORT["rows"][0][0]["pieces"][0][0] += HOSTILE
RESULT = {"nats_per_token": 4.1, "body_tokens": 40_123, "body_bytes": 160_456, "documents": 240}


class Page(HTMLParser):
    """Tags, addresses and ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self.addresses, self.ids, self.words = [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def write_table(root, seeds):
    table = make_table()
    return run_table(plan_table(table, "cpu", seeds, {}, root, table.rows), fake_run)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(a run's page, the table's page with one seed, with three)."""
    one, three = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("three")
    result = write_table(one, [0])
    write_table(three, [0, 1, 2])
    run = next(row["runs"][0]["folder"] for row in result["rows"] if row["name"] == "metadata")
    return [one / run / "report.html", one / "lab/cpu/report.html", three / "lab/cpu/report.html"]


def test_nothing_of_the_user_becomes_markup(pages):
    for path in pages:
        page = Page(path)
        assert "script" not in page.tags
        assert HOSTILE in page.text, "the text is shown as written"
        assert page.tags.count("p") == len(re.findall(r"<p[ >]", page.source))


def test_pages_fetch_nothing_and_their_links_exist(pages):
    for path in pages:
        page = Page(path)
        assert not re.search(r"url\((?!#)", page.source)
        assert "@import" not in page.source
        for address in page.addresses:
            if address.startswith("#"):
                assert address[1:] in page.ids
            else:
                assert not re.match(r"[a-z]+:|//|/", address), address
                assert (path.parent / unquote(address)).exists(), address


def test_the_page_of_a_run_lists_its_changed_fields():
    registry.load()
    config = registry.find_experiment("quickstart/metadata").build("cpu")
    found = against(override(config, {"model.layers": 3, "seed": 4}))
    assert found["name"] == "quickstart/plain" and ("model.layers", "3", "4") in found["fields"]
    assert {name for name, *_ in found["fields"]} >= {"metadata.position"} and "seed" not in {
        name for name, *_ in found["fields"]
    }
    assert against(registry.find_experiment("quickstart/plain").build("cpu"))["fields"] == []
    assert against(base("cpu")) is None, "it is not registered"


def test_a_page_describes_an_unknown_metadata_position():
    recipe = Metadata(template="{url}", keep=0.9)
    object.__setattr__(recipe, "position", "between")
    assert all(word in _metadata_words(recipe) for word in ("between", "'{url}'", "90%"))


def test_ids_are_unique(pages):
    for path in pages:
        ids = Page(path).ids
        assert ids, "clip paths have ids"
        assert len(ids) == len(set(ids))


def test_run_page_shows_the_run(pages):
    text = Page(pages[0]).text
    assert Page(pages[0]).tags.count("svg") == 1
    for expected in ("2.2", "240 validation documents", "160,456 bytes", "resumed at step 50", "1.3% of training", "0123abc"):
        assert expected in text
    assert "compile" in text
    assert "276 ms" in text  # (41.2 - 0.15) / 149


def test_table_page_with_one_seed_ranks_nothing(pages):
    page = Page(pages[1])
    assert page.tags.count("svg") == len(CONDITIONS) + 1
    assert "One seed makes no ranking" in page.text and "--seeds 3" in page.text
    assert not re.search(r'class="range (better|worse)"', page.source)
    assert "±" not in page.text
    assert "metadata.position: none → prepend" in page.text
    assert "this is the baseline" in page.text
    assert "1,311,360 parameters, +25.0% against plain" in page.text


def test_table_page_marks_differences_whose_interval_excludes_0(pages):
    page = Page(pages[2])
    assert page.source.count('class="range better"') == len(CONDITIONS), "the row named metadata is 0.04 better"
    assert page.source.count('class="range worse"') == len(CONDITIONS)
    assert "3 seeds" in page.text
    assert page.source.count(">seed 2 (1 warning)</a>") == len(ROWS)


def test_equal_rows_are_neither_better_nor_worse(tmp_path, monkeypatch):
    for row in LEVEL:
        monkeypatch.setitem(LEVEL, row, 2.3)
    write_table(tmp_path, [0, 1, 2])
    assert not re.search(r'class="range (better|worse)"', (tmp_path / "lab/cpu/report.html").read_text())


def test_table_without_its_baseline_shows_declared_changes(tmp_path):
    table = make_table()
    plan = plan_table(table, "cpu", [0], {}, tmp_path, table.rows[2:])
    assert run_table(plan, fake_run)["baseline"] is None
    assert "metadata.position = prepend" in Page(plan.folder / "report.html").text


def test_figures_are_the_same_for_the_same_numbers_and_hold_odd_names():
    steps = list(range(1, 40))
    curve = (steps, [float("nan"), *np.linspace(8, 2, len(steps) - 1)])
    names = [f"row {i} <$x^2$> & 元素" for i in range(14)]
    drawn = [loss_curves({name: [curve] for name in names}) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert "row 3 &lt;$x^2$&gt; &amp; 元素" in drawn[0]
    assert "nan" not in drawn[0].lower().replace("<$", "")
    [missing] = seed_spread([SpreadColumn("a", "bpb", {name: [] for name in names}, dict.fromkeys(names))], "absent")
    assert missing.startswith("<svg") and missing.endswith("</svg>")
    assert loss_curves({"not started": [([], [])]}).startswith("<svg")


def test_columns_of_one_quantity_share_an_axis_unless_one_is_too_small():
    own, near, far = (SpreadColumn("a", "bpb", {"row": values}, {"row": None}) for values in ([1.0, 1.2], [1.1, 1.3], [1.0, 9.0]))
    alone = seed_spread([own])[0]
    assert seed_spread([own, far])[0] == alone != seed_spread([own, near])[0]


def test_a_legend_has_one_line_for_each_long_name():
    curve = ([1, 2, 3], [3.0, 2.0, 1.0])
    short, long = (loss_curves({letter * length: [curve] for letter in "abc"}) for length in (20, 40))
    columns = [len(set(re.findall(r'x="([\d.]+)"[^>]*>(?:aa+|bb+|cc+)<', drawn))) for drawn in (short, long)]
    assert columns == [2, 1]
    broken = loss_curves({"a" * 70: [curve], "b": [curve]})
    assert f">{'a' * 56}<" in broken and f">{'a' * 14}<" in broken


# ---------------------------------------------------------------------------------------------------- browser

PROBE = """<!doctype html><title>probe</title><iframe src="{page}" width="{width}" height="900" style="border:0"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const boxes = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height]);
  const type = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
  const root = page.documentElement;
  const found = {{boxes, smallest: Math.min(...type), wide: root.scrollWidth, inner: root.clientWidth, high: root.scrollHeight}};
  document.title = "done"; document.body.textContent = JSON.stringify(found);
}});</script>"""


def browse(chromium, profile, *arguments):
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={profile}"]
    done = subprocess.run([chromium, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
def test_browser_shows_the_pages(pages, tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    for number, path in enumerate(pages):
        # A frame has the width it is given; a window of headless chromium is never narrower than 500 pixels.
        probe = tmp_path / f"probe-{number}.html"
        probe.write_text(PROBE.format(page=path.as_uri(), width=width))
        dom = browse(chromium, tmp_path / "profile", "--dump-dom", f"--window-size={width + 20},950", probe.as_uri())
        found = json.loads(re.search(r"<body>(\{.*?\})</body>", dom, re.DOTALL)[1])
        assert len(found["boxes"]) == (1, 4, 4)[number]
        assert all(w > 250 and h > 90 for w, h in found["boxes"])
        assert found["inner"] == width
        assert found["wide"] <= width, "the page itself does not scroll sideways"
        assert found["smallest"] > 8
        image = tmp_path / f"shot-{number}-{width}.png"
        browse(chromium, tmp_path / "profile", f"--screenshot={image}", f"--window-size={max(width, 500)},1200", path.as_uri())
        assert image.stat().st_size > 20_000
