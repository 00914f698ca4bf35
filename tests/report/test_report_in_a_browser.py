"""A real browser opens the pages: nothing fails or scrolls sideways, colours follow the reader, axe finds no fault."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from folders import eventful, simulated
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from decentral.report.page import page, read_runs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return files of a page on one run, and of one that compares it with a run that was stopped."""
    home = tmp_path_factory.mktemp("pages")
    folders = [simulated(eventful(), home / "first"), simulated(eventful(12), home / "second")]
    written = {"one": home / "one.html", "two": home / "two.html"}
    written["one"].write_text(page(read_runs(folders[:1])), encoding="utf-8")
    (folders[1] / "summary.json").write_text('{"stopped": "interrupted by Ctrl-C"}', encoding="utf-8")
    written["two"].write_text(page(read_runs(folders)), encoding="utf-8")
    return written


def opened(browser: webdriver.Chrome, path: Path, width: int = 1280, scheme: str = "light") -> webdriver.Chrome:
    """Open the page on a screen of that width, before a reader who prefers that scheme."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    prefers = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", prefers)
    browser.get(path.as_uri())
    return browser


def luminance(colour: str) -> float:
    """Return the relative luminance of "rgb(r, g, b)", 0 to 1, as WCAG 2 defines it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", ["one", "two"])
def test_it_opens_at_once_and_without_a_complaint(
    browser: webdriver.Chrome, pages: dict[str, Path], which: str
) -> None:
    opened(browser, pages[which])
    paints = browser.execute_async_script(
        "const done = arguments[0];"
        "new PerformanceObserver(list => done(list.getEntries().map(each => each.startTime)))"
        ".observe({type: 'paint', buffered: true});"
    )
    assert max(paints) <= 1000
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_phone_need_not_scroll_sideways(browser: webdriver.Chrome, pages: dict[str, Path], which: str) -> None:
    opened(browser, pages[which], width=360)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_colours_follow_the_reader(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    looks = {}
    for scheme in ("light", "dark"):
        opened(browser, pages["one"], scheme=scheme)
        body = browser.find_element(By.TAG_NAME, "body")
        words = browser.find_element(By.CSS_SELECTOR, "figure svg text")
        line = browser.find_element(By.CSS_SELECTOR, "figure.training-loss path[stroke='var(--one)']")
        paper = body.value_of_css_property("background-color")
        looks[scheme] = paper, words.value_of_css_property("fill"), line.value_of_css_property("stroke")
        assert contrast(paper, looks[scheme][1]) >= 4.5
        assert contrast(paper, looks[scheme][2]) >= 3
    assert luminance(looks["light"][0]) > 0.8
    assert luminance(looks["dark"][0]) < 0.1
    assert all(light != dark for light, dark in zip(looks["light"], looks["dark"], strict=True))


def test_the_switch_shows_one_axis_and_keys_move_it(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    opened(browser, pages["one"])

    def shown() -> set[str]:
        drawn = browser.find_elements(By.CSS_SELECTOR, "figure.held-out .drawn")
        return {each.get_attribute("class").split()[-1] for each in drawn if each.is_displayed()}

    assert shown() == {"by-samples"}
    browser.find_element(By.ID, "axis-samples").send_keys(Keys.ARROW_RIGHT)
    assert shown() == {"by-time"}
    focused = browser.switch_to.active_element
    assert focused.get_attribute("id") == "axis-time"
    assert focused.value_of_css_property("outline-style") == "solid"


@pytest.mark.parametrize(("which", "scheme"), [("one", "dark"), ("two", "light")])
def test_axe_finds_no_fault(browser: webdriver.Chrome, pages: dict[str, Path], which: str, scheme: str) -> None:
    opened(browser, pages[which], scheme=scheme)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    browser.execute_script(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found: dict[str, Any] = browser.execute_async_script("axe.run({resultTypes: ['violations']}).then(arguments[0])")
    assert len(found["passes"]) > 20
    assert [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found["violations"]] == []
