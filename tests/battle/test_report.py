"""The page holds every number, nothing runs or loads that should not, and a browser draws it without complaint."""

import copy
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from vertebra.battle.charts import apart
from vertebra.battle.report import digest, render, write_report
from vertebra.battle.wording import duration, figure, label, limit, probability, quantity, stretch

EXAMPLE = Path(__file__).with_name("example_report.json")
HOSTILE = (
    "</script><script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=`pwned`">',
    "<a href='javascript:document.title=1'>click</a> & <b>bold</b>",
    "{{ 7 * 7 }} {% raw %} %{x} $x$",
    "photo\u202egpj.exe",
    "🦴 naïve 'quote' `tick`",
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.silent = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def every(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(EXAMPLE.read_text())


def hostile(report: dict) -> dict:
    """The report with every contender, class, file, note and error under a hostile name."""
    text = json.dumps(report)
    names = [c["name"] for c in report["contenders"]] + report["data"]["classes"]
    for i, name in enumerate(names):
        text = text.replace(json.dumps(name), json.dumps(f"{HOSTILE[i % len(HOSTILE)]}{i}"))
    worse = json.loads(text)
    for i, mistake in enumerate(worse["mistakes"]):
        mistake["name"] = HOSTILE[i % len(HOSTILE)]
    worse["data"] |= {"path": HOSTILE[0], "notes": list(HOSTILE)}
    worse["failed"] = [{"contender": HOSTILE[1], "probe": HOSTILE[2], "error": HOSTILE[0]}]
    worse["pick"]["reasons"] = list(HOSTILE)
    worse["probes"][0]["title"] = HOSTILE[0]
    worse["scores"][0]["unit"] = worse["scores"][8]["unit"] = HOSTILE[2]
    worse["settings"]["constraints"] = {HOSTILE[0]: HOSTILE[1]}
    return worse


def title(html: str) -> str:
    return unescape(re.findall(r"<title>(.*?)</title>", html)[0])


def assert_inert(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    for name in HOSTILE[:4]:
        assert name in page.text


def noise(split: str, index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (140, 180, 3), dtype=np.uint8))


def test_the_page_says_the_pick_its_reasons_and_what_to_type_next(report):
    page = Page(render(report))
    assert "convnext_tiny" in page.text
    assert "94.1\N{NO-BREAK SPACE}%" in page.text
    assert "A tie: the data cannot tell it from vit_small_dinov3." in page.text
    assert "Constraints, all met:" in page.text
    assert "vertebra train ./waste --backbone timm/convnext_tiny.fb_in22k_ft_in1k" in page.text
    for reason in report["pick"]["reasons"]:
        assert reason in page.text


def test_the_next_command_trains_the_pick_as_it_was_judged(report):
    contender = {**report["contenders"][0], "options": {"weights": "pretrained", "image_size": 160, "act": "relu x"}}
    page = Page(render({**report, "contenders": [contender]}))
    assert (
        f"--backbone {contender['address']} --pretrained --img-size 160 --set 'backbone.options.act=relu x'"
        in page.text
    )
    contender["options"] = {"weights": "a1_in1k"}
    page = Page(render({**report, "contenders": [contender]}))
    assert "--set backbone.options.weights=a1_in1k --recipe finetune" in page.text


def test_every_score_of_every_contender_stands_in_a_table(report):
    page = Page(render(report))
    values = [float(cell["data-value"]) for cell in page.every("td") if "data-value" in cell]
    expected = [cell["value"] for row in report["table"].values() for cell in row.values()]
    assert sorted(values) == sorted(expected)
    assert sum("best" in (cell.get("class") or "") for cell in page.every("td")) == len(report["scores"])
    assert "unstable" in page.text
    assert all(head.get("scope") for head in page.every("th"))


def test_contenders_keep_one_number_and_colour_on_the_whole_page(report):
    html = render(report)
    badges = re.findall(r'class="badge hue(\d)"[^>]*>(\d+)</b><bdi>(.*?)</bdi>', html)
    looks = {name.replace("<wbr>", ""): set() for _, _, name in badges}
    for hue, number, name in badges:
        looks[name.replace("<wbr>", "")].add((hue, number))
    assert set(looks) == {c["name"] for c in report["contenders"]}
    assert {len(look) for look in looks.values()} == {1}
    assert looks["vit_small_dinov3"] == {("0", "1")}


def test_charts_are_valid_plotly_figures_with_the_reports_numbers(report):
    html = render(report)
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', html, re.DOTALL)
    figures = {name: go.Figure(json.loads(text)) for name, text in found}
    assert set(figures) == {"pareto", "robustness-curves", *(f"reliability-{i}" for i in range(1, 9))}
    badges = [trace for trace in figures["pareto"].data if trace.text]
    assert sorted(trace.x[0] for trace in badges) == sorted(p["x"] for p in report["pareto"]["points"])
    best = next(trace for trace in badges if trace.text[0] == "1")
    assert best.y[0] == pytest.approx(100 - 94.6)
    assert best.y[0] - best.error_y.arrayminus[0] == pytest.approx(
        100 - report["table"]["vit_small_dinov3"]["linear_top1"]["high"]
    )
    front = figures["pareto"].data[0]
    assert list(front.x) == sorted(p["x"] for p in report["pareto"]["points"] if p["front"])


def test_nothing_in_the_page_comes_from_or_goes_to_the_network(report):
    html = render(report)
    assert "http:" not in html
    assert "https:" not in html
    policy = Page(html).every("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = html[html.rindex("<script>") + len("<script>") : html.rindex("</script>")]
    assert f"script-src '{digest(script)}' 'sha256-" in policy


def test_hostile_names_stay_text(report):
    page = Page(render(hostile(report)))
    assert_inert(page)
    assert len(page.every("script")) == len(Page(render(report)).every("script"))
    assert "photo\\u202egpj.exe" in page.text
    assert "\u202e" not in page.text


def test_charts_escape_what_plotly_would_read_as_tags(report):
    html = render(hostile(report))
    found = re.findall(r'<script type="application/json" id="[\w-]+">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 10
    for text in found:
        assert "<" not in text
        shown = json.dumps(json.loads(text), ensure_ascii=False)
        assert not re.search(r"<(?!/?b>|br>)", shown)


def test_a_run_directory_gets_both_files_and_bad_numbers_become_dashes(report, tmp_path):
    worse = copy.deepcopy(report)
    worse["table"]["resnet50"]["linear_top1"]["value"] = float("nan")
    worse["mistakes"][0]["name"] = "caf\udce9.jpg"  # a file name that is no UTF-8
    path = write_report(worse, tmp_path)
    assert path == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    again = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert again["table"]["resnet50"]["linear_top1"]["value"] is None
    assert again["mistakes"][0]["name"] == "caf\udce9.jpg"
    assert again["per_class"] == report["per_class"]
    assert "caf\\udce9.jpg" in path.read_text("utf-8").replace("<wbr>", "")


def test_sixty_pictures_of_noise_fit_under_three_megabytes(report, tmp_path):
    many = copy.deepcopy(report)
    many["mistakes"] = [{**report["mistakes"][0], "index": i, "name": f"test/noise-{i}.jpg"} for i in range(70)]
    path = write_report(many, tmp_path, noise)
    pictures = [image["src"] for image in Page(path.read_text()).every("img")]
    assert len(pictures) == 60
    assert all(source.startswith("data:image/") for source in pictures)
    assert path.stat().st_size < 3_000_000


def test_a_picture_that_is_gone_leaves_its_card(report, tmp_path):
    def gone(split: str, index: int) -> Image.Image:
        raise FileNotFoundError("test/glass/IMG_0001.jpg")

    page = Page(write_report(report, tmp_path, gone).read_text())
    assert not page.every("img")
    assert page.text.count("no picture") == len({m["index"] for m in report["mistakes"]})


@pytest.mark.parametrize(
    "section",
    ["pick", "pareto", "table", "comparisons", "aggregate", "per_class", "mistakes", "robustness", "calibration"],
)
@pytest.mark.parametrize("empty", ["absent", None, "same kind"])
def test_a_section_may_be_missing(report, section, empty):
    less = {**report, section: type(report[section])() if empty == "same kind" else None}
    if empty == "absent":
        del less[section]
    assert "How it was done" in render(less)


def test_an_empty_report_still_renders():
    page = Page(render({}))
    assert "Which backbone" in page.text
    assert not [script for script in page.every("script") if script.get("id") == "plotly"]


def test_without_a_pick_the_page_says_so(report):
    none = {**report, "pick": {"name": None, "best": "swin/tiny", "reasons": ["nothing is below 1 ms"]}}
    page = Page(render(none))
    assert "No contender meets the constraints" in page.text
    assert "nothing is below 1 ms" in page.text
    assert "vertebra train" not in page.text


def test_numbers_read_well():
    assert quantity(85.123, "%") == "85.1\N{NO-BREAK SPACE}%"
    assert quantity(12.3456, "ms") == "12.3\N{NO-BREAK SPACE}ms"
    assert figure(0.04567) == "0.0457"
    assert figure(12345.6, "img/s") == "12\N{NARROW NO-BREAK SPACE}346"
    assert figure(-1.25, "%") == "−1.2"
    assert figure(None, "%") == quantity(None, "%") == "–"
    assert [probability(p) for p in (0.0004, 0.0312, None)] == ["< 0.001", "0.031", "–"]
    assert [duration(s).replace("\N{NO-BREAK SPACE}", " ") for s in (48, 1384, 4320)] == [
        "48 s",
        "23 min",
        "1 h 12 min",
    ]
    names = {
        "p50_ms": "latency p50",
        "linear_top1": "top-1",
        "fewshot_5": "5-shot",
        "img_per_s": "throughput",
        "params_m": "parameters",
    }
    assert {name: label({"name": name, "probe": "linear"}) for name in names} == names
    assert limit("max_latency_ms", 20.0) == "max latency 20 ms"
    assert limit("licence", "commercial") == "licence commercial"
    assert stretch(99) - stretch(90) == pytest.approx(1)


def test_labels_are_moved_apart_as_little_as_needed():
    assert apart([3.0, 1.0, 1.0], 1.0) == pytest.approx([3.0, 0.5, 1.5])
    assert apart([5.0], 1.0) == [5.0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_real_browser_draws_the_hostile_page_without_a_complaint(report, tmp_path):
    path = write_report(hostile(report), tmp_path, noise)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=10000"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    page = Page(done.stdout)
    assert_inert(page)
    drawn = [attributes for attributes in page.every("svg") if "main-svg" in (attributes.get("class") or "")]
    assert len(drawn) >= 2 * len([div for div in page.every("div") if div.get("data-figure")]) == 20
    assert title(done.stdout) == title(path.read_text("utf-8"))
