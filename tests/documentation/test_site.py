"""The documentation builds strictly, loads nothing from another host, and works in a browser of any width, light and dark."""

import functools
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "reference/quantize.html", "notebooks/01_ptq_in_ten_lines.html")
# Opens a page in a frame, searches where asked to, and tells what the browser made of it.
HARNESS = """<!doctype html><iframe width="{width}" height="844" style="border:0" src="{page}"></iframe><script>
const frame = document.querySelector("iframe"), dark = {dark}, query = "{query}"
frame.onload = async () => {{
  const page = frame.contentDocument, root = page.documentElement
  if (dark) page.body.setAttribute("data-md-color-scheme", "slate")
  const wait = time => new Promise(done => setTimeout(done, time))
  await wait(500)
  const input = page.querySelector("input[data-md-component=search-query]")
  if (query) {{
    input.focus()
    input.value = query
    for (let tries = 0; tries < 80 && !page.querySelector(".md-search-result__item"); tries++) {{
      input.dispatchEvent(new frame.contentWindow.KeyboardEvent("keyup"))
      await wait(250)
    }}
  }}
  const told = JSON.stringify({{
    title: page.title, heading: page.querySelector("h1").textContent,
    scroll: root.scrollWidth, client: root.clientWidth,
    page: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    ink: frame.contentWindow.getComputedStyle(page.body).color,
    pictures: [...page.querySelectorAll("article img, article svg")].filter(i => i.getBoundingClientRect().width > 100).length,
    found: [...page.querySelectorAll(".md-search-result__item a")].map(a => a.getAttribute("href")),
  }})
  await fetch("/told", {{method: "POST", body: told}})
}}</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='pip install "quantflow[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def browser(site):
    """What a browser makes of a page, as the script above tells it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")

    told: queue.Queue = queue.Queue()

    class Site(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def seen(page, width=1200, dark=False, query=""):
            name = f"frame-{width}-{dark}-{bool(query)}.html"
            (site / name).write_text(HARNESS.format(page=page, width=width, dark=json.dumps(dark), query=query))
            options = [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=1300,900",
                "--remote-debugging-port=0",
            ]
            command = [found, *options, f"--user-data-dir={site.parent / 'profile'}"]
            process = subprocess.Popen(
                [*command, f"http://127.0.0.1:{server.server_port}/{name}"], stderr=subprocess.DEVNULL
            )
            try:
                return told.get(timeout=120)
            finally:
                process.terminate()
                process.wait(30)

        yield seen
        server.shutdown()


def brightness(color):
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3


def test_nothing_comes_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in pages:
        elsewhere = [tag for tag in loads.findall(page.read_text()) if "canonical" not in tag]
        assert not elsewhere, (page.name, elsewhere)


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("page", PAGES)
def test_no_page_scrolls_sideways(browser, page, width):
    found = browser(page, width)
    assert "quantflow" in found["title"]
    assert found["heading"]
    assert found["scroll"] <= found["client"] <= width


@pytest.mark.parametrize("page", PAGES)
def test_text_stands_out_in_light_and_dark(browser, page):
    light, dark = browser(page), browser(page, dark=True)
    assert brightness(light["page"]) - brightness(light["ink"]) > 100
    assert brightness(dark["ink"]) - brightness(dark["page"]) > 100


def test_a_notebook_shows_its_pictures(browser):
    assert browser("notebooks/03_where_did_my_accuracy_go.html")["pictures"] > 0


def test_the_search_finds_a_verb(browser):
    assert any("reference" in href for href in browser("index.html", query="calibrate")["found"])
