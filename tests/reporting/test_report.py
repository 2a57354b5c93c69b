"""The report: one page that needs no network, with the figures of its parts, and that reads on a phone and in the dark."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.reporting.operator_plans import graph, grouped
from quantflow.reporting.report import _command
from quantizers import XNNPACKQuantizer
from quantizers.operator_plan import OperatorPlan

HOSTILE = '<script>alert("1")</script>&$x_1$'
LAYER = HOSTILE.replace('"', "'")  # torch.fx takes no other quotes
VOID = {"meta", "br"}


class Page(HTMLParser):
    """What a page holds; a tag that is not closed, or closed out of order, is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def cells(self):
        return {text.strip() for text in self.text}


@pytest.fixture(scope="module")
def parts():
    """All that can be reported on one small network, with a stage and a layer of hostile names."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(LAYER, randomize_statistics(ConvNet()))
    model.eval()
    x = 3 * torch.randn(8, 3, 1, 1) + torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        data = [(x, model(x).argmax(1))]
    quantizer = XNNPACKQuantizer(skip=["*depthwise"])
    result = qf.quantize(model, (x[:1],), data, quantizer=quantizer, max_drop=0.5, progress=False)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, quantizer), data, progress=False)
    stages = {"float": model, HOSTILE: result.program}
    return {
        "result": result,
        "verification": qf.verify(stages, data, latency_runs=5, progress=False),
        "diagnosis": qf.diagnose(graph, prepared, data, progress=False),
        "sensitivities": qf.sensitivity(prepared, data, progress=False),
    }


@pytest.fixture(scope="module")
def written(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert qf.report(path, title=HOSTILE, **parts) == path
    return path


def test_one_page_without_a_network(written):
    page = Page(written.read_text())
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
        assert not name.startswith("on")
    style = "".join(re.findall(r"<style.*?</style>", written.read_text(), re.DOTALL))
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", written.read_text())
    assert "http" not in written.read_text()


def test_ids_are_unique_and_all_references_lead_somewhere(written):
    page = Page(written.read_text())
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    found = written.read_text()
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', found)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_hostile_names_are_text(written, parts):
    assert any(LAYER in found.layer for found in parts["diagnosis"].layers)
    page = Page(written.read_text())
    assert {HOSTILE, f"{LAYER}.head"} <= page.cells()
    assert "<script" not in written.read_text()


def test_figures_are_those_of_the_parts(written, parts):
    told = json.loads(written.with_suffix(".json").read_text())
    for name in ("verification", "diagnosis", "sensitivities"):
        assert told[name] == json.loads(parts[name].to_json())
    report = parts["result"].report
    assert told["quantization"] == json.loads(report.to_json())
    assert told["quantization"]["accuracy-control"]["drop"] == report.accuracy_control.drop
    assert told["quantization"]["plan"]["calls"] == report.plan.calls
    assert told["program"]["bytes"] == len(parts["result"].program.buffer)
    assert told["program"]["delegation"]["calls"] == parts["result"].program.delegation.calls
    cells = Page(written.read_text()).cells()
    for name in ("verification", "diagnosis", "sensitivities"):
        for row in parts[name].table():
            assert {cell for cell in row if cell} <= cells, name
    for operator in report.plan.operators:
        assert {operator.node, operator.becomes, " + ".join(operator.operators)} <= cells


def test_the_summary_says_whether_it_holds(written, parts, tmp_path):
    assert "The budget holds" in written.read_text()
    lost = dataclasses.replace(parts["result"].report.accuracy_control, drop=0.75)
    report = dataclasses.replace(parts["result"].report, accuracy_control=lost)
    path = qf.report(tmp_path / "r.html", result=dataclasses.replace(parts["result"], report=report))
    assert "The budget does not hold: accuracy drops by 75.00%" in path.read_text()
    path = qf.report(tmp_path / "r.html", plan=report.plan)
    assert "Not verified" in path.read_text()


def test_a_drop_beyond_its_interval_is_a_loss(parts, tmp_path):
    def page(drop, interval):
        first, last = parts["verification"].stages
        output = dataclasses.replace(last.output, top1=0.5, drop=drop, drop_interval=interval)
        stages = (first, dataclasses.replace(last, outputs=(output,)))
        verification = dataclasses.replace(parts["verification"], stages=stages)
        return qf.report(tmp_path / "r.html", verification=verification).read_text()

    assert "Accuracy is lost: 2.00 ± 1.00 points" in page(2.0, 1.0)
    assert "No loss that so many examples can show: 2.00 ± 3.00 points" in page(2.0, 3.0)


def test_each_part_stands_alone(parts, tmp_path):
    history = qf.History(loss=[1.0, 0.5], metric=[0.8, 0.9], best_epoch=1)
    alone = {**parts, "plan": parts["result"].report.plan, "program": parts["result"].program, "history": history}
    for name, part in alone.items():
        Page(qf.report(tmp_path / "r.html", **{name: part}).read_text())
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["training"]["loss"] == [1.0, 0.5]


def test_infinite_figures_can_be_drawn_and_told(parts, tmp_path):
    first = dataclasses.replace(parts["sensitivities"].layers[0], to_integers=float("inf"))
    rest = parts["sensitivities"].layers[1:]
    path = qf.report(
        tmp_path / "r.html", sensitivities=dataclasses.replace(parts["sensitivities"], layers=(first, *rest))
    )
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert "inf" in path.read_text()


def test_large_groups_are_parted():
    operators = [OperatorPlan(f"features.{i // 10}.conv", f"n{i}", ("conv2d",), "int8", False, "") for i in range(100)]
    small = [
        OperatorPlan("head.fc", "fc", ("linear",), None, False, "no"),
        OperatorPlan("", "add", ("add",), None, True, "no"),
    ]
    groups = grouped(operators + small)
    assert HOSTILE in Page(graph([dataclasses.replace(small[0], layer=HOSTILE)])).cells()
    assert list(groups) == [*(f"features.{i}" for i in range(10)), "head", "the model itself"]
    assert sum(len(members) for members in groups.values()) == 102


def test_a_command_tells_no_folders():
    given = ["/home/someone/.venv/bin/quantflow", "ptq", "--data=/mnt/secret/photos", "/tmp/model.pte", "runs/x"]
    assert _command(given) == "quantflow ptq --data=photos model.pte runs/x"


def test_what_is_no_part_is_named(parts, tmp_path):
    with pytest.raises(qf.QuantflowError, match="nothing to report on"):
        qf.report(tmp_path / "r.html")
    with pytest.raises(qf.QuantflowError, match="verification: Result is none"):
        qf.report(tmp_path / "r.html", verification=parts["result"])
    with pytest.raises(qf.QuantflowError, match="plan: Result is none"):
        qf.report(tmp_path / "r.html", plan=parts["result"])
    with pytest.raises(qf.QuantflowError, match="a report is a page"):
        qf.report(tmp_path / "r.json", **parts)
    with pytest.raises(qf.QuantflowError, match="can't write"):
        qf.report(tmp_path / "none" / "r.html", **parts)


def test_without_matplotlib_the_error_says_what_to_install(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(qf.QuantflowError, match=r"quantflow\[plots\]"):
        qf.report(tmp_path / "r.html", **parts)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")

    def measured(path, width, *options):
        """What a browser makes of the page in a frame ``width`` pixels wide, as the script below tells it."""
        frame = path.with_name(f"frame-{width}.html")
        frame.write_text(
            f'<!doctype html><iframe width="{width}" height="844" style="border:0" srcdoc="{html.escape(path.read_text())}">'
            """</iframe><pre></pre><script>
            onload = () => {
              const page = document.querySelector("iframe").contentDocument, root = page.documentElement
              for (const part of page.querySelectorAll("details")) part.open = true
              const colours = name => getComputedStyle(page.querySelector(name))
              document.querySelector("pre").textContent = JSON.stringify({
                mode: page.compatMode, scroll: root.scrollWidth, client: root.clientWidth,
                page: colours("body").backgroundColor, ink: colours("body").color, drawn: colours("svg text").fill,
                smallest: Math.min(...[...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
                wide: [...page.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth).length,
              })
            }</script>"""
        )
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *options]
        folder = f"--user-data-dir={path.with_name('profile')}"
        command = [found, *quiet, folder, "--dump-dom", frame.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", shown, re.DOTALL)[1]))

    return measured


def _brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_a_phone_never_scrolls_sideways(written, browser):
    found = browser(written, 390)
    assert found["mode"] == "CSS1Compat"
    assert found["scroll"] == found["client"] <= 390
    assert found["wide"] > 0  # tables are wider, and scroll within themselves
    assert found["smallest"] > 10  # pixels: text in pictures can be read


@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_a_dark_theme_is_dark_with_light_ink(written, browser, scheme, dark):
    found = browser(written, 1200, f"--blink-settings=preferredColorScheme={scheme}")
    assert found["scroll"] == found["client"]
    assert (_brightness(found["page"]) < 60) == dark
    for ink in (found["ink"], found["drawn"]):
        assert (_brightness(ink) > 150) == dark
