"""The page in a browser: what its scripts do with clicks and keys, in light and dark, without the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

import sepc
from tests.browser import opened, requests

HOSTILE = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def page(explanation: sepc.Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with a name that a careless page would run."""
    return replace(explanation, model=HOSTILE).to_html(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Chrome]:
    with opened(page) as driver:
        yield driver
        # After all that the tests did.
        assert not driver.get_log("browser")
        asked = requests(driver)
        assert asked == [page.as_uri()]


def find(browser: Chrome, css: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, css)


def text(browser: Chrome, css: str) -> str:
    return find(browser, css).text


def titles(explanation: sepc.Explanation) -> list[str]:
    return [one.title for one in explanation.graphs]


def test_the_last_graph_is_shown_first(browser: Chrome, explanation: sepc.Explanation) -> None:
    assert text(browser, "#pass-name").startswith(f"after {titles(explanation)[-1]}:")
    shown = [one.get_attribute("data-name") for one in browser.find_elements(By.CSS_SELECTOR, ".region")]
    assert shown == [one.name for one in explanation.regions]


def test_the_slider_moves_by_keys_and_shows_the_graph_after_each_pass(
    browser: Chrome, explanation: sepc.Explanation
) -> None:
    slider = find(browser, "#pass")
    slider.send_keys(Keys.HOME)
    assert text(browser, "#pass-name").startswith("input:")
    assert not browser.find_elements(By.CSS_SELECTOR, ".region")
    for title, graph in list(zip(titles(explanation), explanation.graphs, strict=True))[1:]:
        slider.send_keys(Keys.ARROW_RIGHT)
        assert text(browser, "#pass-name").startswith(f"after {title}:")
        assert len(browser.find_elements(By.CSS_SELECTOR, ".node")) == len(graph.nodes)
        if title == "fold-batch-norm":
            assert browser.find_elements(By.CSS_SELECTOR, ".node.m-new")
            assert "removed" in text(browser, "#pass-name")


def test_the_graph_stays_in_the_middle_from_pass_to_pass(browser: Chrome) -> None:
    def off_centre() -> float:
        boxes = [find(browser, css).rect for css in ("#picture", "#picture > g")]
        middles = [box["x"] + box["width"] / 2 for box in boxes]
        return abs(middles[0] - middles[1]) / boxes[0]["width"]

    find(browser, "#top").click()
    for key in (Keys.HOME, Keys.END):
        find(browser, "#pass").send_keys(key)
        assert off_centre() < 0.1


def test_arrows_left_and_right_on_the_picture_go_from_pass_to_pass(
    browser: Chrome, explanation: sepc.Explanation
) -> None:
    find(browser, "#pass").send_keys(Keys.END)
    picture = find(browser, "#picture")
    picture.send_keys(Keys.ARROW_LEFT)
    assert text(browser, "#pass-name").startswith(f"after {titles(explanation)[-2]}:")
    picture.send_keys(Keys.ARROW_RIGHT)
    assert text(browser, "#pass-name").startswith(f"after {titles(explanation)[-1]}:")


def test_what_a_pass_changed_is_shown_as_text(browser: Chrome, explanation: sepc.Explanation) -> None:
    slider = find(browser, "#pass")
    slider.send_keys(Keys.HOME)
    for _ in range(titles(explanation).index("fold-batch-norm")):
        slider.send_keys(Keys.ARROW_RIGHT)
    find(browser, "[data-view=diff]").click()
    gone = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#text .gone")]
    assert any("batch_norm" in line for line in gone)
    find(browser, "[data-view=text]").click()
    assert "def forward(" in text(browser, "#text")
    find(browser, "[data-view=graph]").click()
    assert not find(browser, "#text").is_displayed()
    slider.send_keys(Keys.END)


def test_a_click_on_a_region_shows_its_operators_lines_tiling_cost_and_kernel(
    browser: Chrome, explanation: sepc.Explanation
) -> None:
    first = next(one for one in explanation.regions if one.kind == "convolution")
    label = find(browser, f".region[data-name={first.name}] text")
    ActionChains(browser).move_to_element(label).click().perform()
    shown = text(browser, "#details")
    for expected in (first.name, first.tiling, f"bound by {first.bottleneck}", "conv2d", "report/mixed.py:"):
        assert expected in shown
    find(browser, "#details summary").click()
    kernel = find(browser, "#details pre").get_property("textContent")
    assert kernel == explanation.source(first.name)


def test_a_click_on_an_operator_shows_where_it_comes_from(browser: Chrome) -> None:
    ActionChains(browser).move_to_element(find(browser, ".node.operator")).click().perform()
    shown = text(browser, "#details")
    assert "made by" in shown
    assert find(browser, "#details a").get_attribute("href").startswith("file:///")


def test_regions_are_reached_and_opened_by_keys(browser: Chrome, explanation: sepc.Explanation) -> None:
    find(browser, "#picture").send_keys(Keys.ARROW_DOWN)
    for one in explanation.regions:
        focused = browser.switch_to.active_element
        assert focused.get_attribute("data-name") == one.name
        focused.send_keys(Keys.ENTER)
        assert text(browser, "#details h3") == one.name
        focused.send_keys(Keys.ARROW_DOWN)


def test_search_finds_marks_and_goes_from_one_to_the_next(browser: Chrome, explanation: sepc.Explanation) -> None:
    search, everything = find(browser, "#search"), (Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
    find(browser, "body").send_keys("/")
    assert browser.switch_to.active_element == search
    search.send_keys("conv2d 1×8×16")
    expected = sum(node.title == "conv2d" for node in explanation.graph.nodes)
    assert expected == 2
    assert text(browser, "#found").startswith("2 found")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".node.hit")) == 2
    search.send_keys(Keys.ENTER, Keys.ENTER)
    assert text(browser, "#found") == "2 of 2"
    assert text(browser, "#details h3") == "conv2d"
    search.send_keys(*everything, "nothing is called so")
    assert text(browser, "#found") == "0 found"
    search.send_keys(Keys.ENTER, *everything)
    assert not browser.find_elements(By.CSS_SELECTOR, ".searching")


def test_zooming_changes_the_size_and_the_wheel_moves(browser: Chrome) -> None:
    def width() -> float:
        return float(find(browser, ".region rect").rect["width"])

    find(browser, "#top").click()
    before = width()
    find(browser, "#zoom-in").click()
    assert width() == pytest.approx(before * 1.25, rel=0.05)
    find(browser, "#picture").send_keys("-")
    assert width() == pytest.approx(before, rel=0.05)
    find(browser, "#fit").click()
    scene = browser.execute_script("return document.querySelector('#picture > g').getBoundingClientRect().height")
    assert scene <= find(browser, "#picture").rect["height"] + 1


@pytest.mark.parametrize(("table", "column"), [("regions", "FLOPs"), ("regions", "region"), ("decisions", "gain µs")])
def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(browser: Chrome, table: str, column: str) -> None:
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{table} th")
    index = [one.text.rstrip(" ▲▼") for one in heads].index(column)
    numeric = "number" in (heads[index].get_attribute("class") or "")

    def values() -> list[float] | list[str]:
        cells = browser.find_elements(By.CSS_SELECTOR, f"#{table} tbody td:nth-child({index + 1})")
        if numeric:
            return [float(one.get_attribute("data-value") or "-inf") for one in cells]
        return [one.text for one in cells]

    button = heads[index].find_element(By.TAG_NAME, "button")
    button.send_keys(Keys.ENTER)
    first = values()
    assert len(set(first)) > 1
    assert first == sorted(first, reverse=numeric)
    assert heads[index].get_attribute("aria-sort") == ("descending" if numeric else "ascending")
    button.send_keys(Keys.ENTER)
    assert values() == sorted(first, reverse=not numeric)


def test_only_what_was_rejected_is_shown_on_demand(browser: Chrome, explanation: sepc.Explanation) -> None:
    def shown() -> int:
        return sum(one.is_displayed() for one in browser.find_elements(By.CSS_SELECTOR, "#decisions tbody tr"))

    assert shown() == len(explanation.decisions)
    find(browser, "#rejected-only").send_keys(Keys.SPACE)
    assert shown() == sum(not one.taken for one in explanation.decisions) > 0
    find(browser, "#rejected-only").send_keys(Keys.SPACE)


def test_a_region_of_the_table_is_shown_in_the_graph(browser: Chrome, explanation: sepc.Explanation) -> None:
    find(browser, "#pass").send_keys(Keys.HOME)
    name = explanation.regions[-1].name
    find(browser, f"[data-region={name}]").send_keys(Keys.ENTER)
    assert text(browser, "#details h3") == name
    assert browser.switch_to.active_element.get_attribute("data-name") == name
    assert text(browser, "#pass-name").startswith(f"after {titles(explanation)[-1]}:")


def test_text_of_the_user_is_text(browser: Chrome) -> None:
    assert text(browser, "h1") == f"{HOSTILE} by sepc"
    assert browser.title == f"{HOSTILE} by sepc"
    assert not browser.find_elements(By.TAG_NAME, "img")


def test_dark_and_light_have_readable_contrast(page: Path) -> None:
    for dark in (False, True):
        with opened(page, dark=dark) as driver:
            colours = driver.execute_script(
                "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
            )
            ink, paper = (sum(map(int, one.strip("rgb()").split(",")[:3])) for one in colours)
            assert (ink > paper) == dark
            assert abs(ink - paper) > 400
