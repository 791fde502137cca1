"""The report in a real browser: nothing in its console, no overflow, every picture there, every text legible.

Skipped, with the reason, where there is no Chromium with its driver.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayprune.engine.train.driver import train
from rayprune.experiments.compare.runner import compare
from rayprune.report.collect import collect
from rayprune.report.page import render
from tests.support.runs import run_config

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing: make setup")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Elements that reach beyond the page, and are not inside something that scrolls.
OVERFLOWING = """
const wide = document.documentElement.clientWidth;
const inside = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true; return false; };
return [document.documentElement.scrollWidth - wide, [...document.body.querySelectorAll('*')]
    .filter(e => !inside(e) && e.getBoundingClientRect().right > wide + 1).map(e => e.tagName + '.' + e.className)];
"""
IMAGES = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])"
# Each text's contrast to what is behind it (WCAG 2.1), in HTML and in SVG.
CONTRAST = """
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { for (let p = e; p; p = p.parentElement) {
    const c = parse(getComputedStyle(p).backgroundColor); if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) { const node = walker.currentNode, e = node.parentElement;
    if (!node.data.trim() || ['STYLE', 'SCRIPT'].includes(e.tagName)) continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const ink = light(parse(svg ? style.fill : style.color)), paper = light(behind(svg || e));
    found.push([(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), node.data.trim().slice(0, 40)]); }
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison and its runs on one page, with long names and names of HTML."""
    storage = tmp_path_factory.mktemp("pages")
    section: dict[str, Any] = {"baselines": ["full"], "seeds": 2, "parallel": 1}
    compared = compare(run_config(storage, "compared", train={"epochs": 3}, compare=section))
    method = {"name": "infobatch", "prune_ratio": 0.6}
    names = ("<b onclick='alert(1)'>bold", "a_name_without_any_break_" + "x" * 120)
    runs = [train(run_config(storage, name.replace("/", ""), method=method)).folder for name in names]
    file = storage / "report.html"
    file.write_text(render(collect([compared, *runs])), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_report_is_legible(page: Path, browser: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first page asked for
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.get_log("browser") == []
    assert requested(browser) <= {page.as_uri()}
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.execute_script(OVERFLOWING) == [0, []]
    images = browser.execute_script(IMAGES)
    assert len(images) >= 12
    assert all(complete and natural and alt for complete, natural, alt in images)
    texts = browser.execute_script(CONTRAST)
    assert len(texts) > 300
    assert [(round(contrast, 2), text) for contrast, text in texts if contrast < 4.5] == []


def test_the_intervals_fit_a_phone(page: Path, browser: Any) -> None:
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    sides = (
        "const box = document.querySelector('figure.single svg').getBoundingClientRect(); return [box.left, box.right]"
    )
    left, right = browser.execute_script(sides)
    assert left >= 0
    assert right <= 390
    letters = "return Math.min(...[...document.querySelectorAll('figure.single svg text')].map(t => t.getBBox().height"
    scale = "document.querySelector('figure.single svg').getScreenCTM().a"
    assert browser.execute_script(f"{letters} * {scale}))") > 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_is_too_wide_shows_that_it_scrolls(page: Path, browser: Any, scheme: str) -> None:
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
    browser.get(page.as_uri())
    table = browser.find_element("css selector", ".scroll")
    assert browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", table) > 100
    assert shades(table) == (False, True)
    browser.execute_script("arguments[0].scrollLeft = 60", table)
    assert shades(table) == (True, True)
    browser.execute_script("arguments[0].scrollLeft = 1e6", table)
    assert shades(table) == (True, False)


def shades(element: Any) -> tuple[bool, bool]:
    """Return whether the left and the right edge of an element are darker or lighter than what is next to them."""
    pixels = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("L"), dtype=np.int64)
    row = np.median(pixels[8:-24], axis=0)  # without the border, the scroll bar and most of the text
    return abs(row[3] - row[30]) > 20, abs(row[-4] - row[-31]) > 20


def test_the_page_has_its_parts_in_order(page: Path, browser: Any) -> None:
    browser.get(page.as_uri())
    heads = browser.execute_script("return [...document.querySelectorAll('h1, h2')].map(h => h.textContent)")
    assert heads[1].startswith("Comparison")
    assert heads[2:] == ["Runs", "Loss and accuracy", "Pruning and its cost", "Samples", "Notable samples", "Details"]
    drawn = "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    assert min(browser.execute_script(drawn)) > 60
    assert browser.execute_script("return document.querySelectorAll('[onclick], script').length") == 0


def requested(browser: Any) -> set[str]:
    """Return what the browser has asked for over any protocol but data."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {params["request"]["url"] for params in sent} - {"data:,"} - _pictures(sent)


def _pictures(sent: list[dict[str, Any]]) -> set[str]:
    return {params["request"]["url"] for params in sent if params["request"]["url"].startswith("data:")}
