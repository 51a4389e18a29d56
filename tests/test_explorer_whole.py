"""The explorer as a person has it: a site built from a cache and runs, in a real browser, with the model behind it."""

import re

import pytest
from clvq.explorer.data_files import read_script

from .explorer_browser import address, all_text, click, texts_of, visit
from .explorer_maker import Served, serving
from .study_browser import browser, need_browser, screen, until

pytestmark = pytest.mark.timeout(120)
pytest.importorskip("starlette", reason="the server needs starlette")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    need_browser()
    with browser(tmp_path_factory.mktemp("whole") / "person") as opened:
        screen(opened, width=1280)
        yield opened


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Three runs of two lower sites, with saliency, rationales and hostile texts; not all texts can be opened."""
    return Served(tmp_path_factory.mktemp("built"), most=40, saliency="gradient", saliency_site="hidden.1")


def silent(driver) -> bool:
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []


def a_concept_of(one: Served, *, text: int) -> int:
    return next(code for code in one.texts[text]["codes"]["r0"][1:] if code is not None)


def test_every_view_of_a_built_site_is_drawn_from_the_folder_alone(driver, one):
    page = address(one.folder)
    code = a_concept_of(one, text=0)
    for route, view in {
        "#/r0": "overview", "#/r1": "overview", f"#/r0/c/{code}": f"concept:r0:{code}", "#/texts": "texts",
        "#/compare?a=r0&b=r1": "compare", "#/flow": "flow",
    }.items():  # fmt: skip
        visit(driver, page, route, view)
    for text in range(0, len(one.texts), 3):
        visit(driver, page, f"#/t/{text}?run=r0", f"text:{text}")
        shown = "".join(texts_of(driver, ".reader .row:not(.special)"))
        assert shown
    assert driver.execute_script("return window.ran ?? null") is None
    assert silent(driver)


def test_a_sentence_of_a_text_that_cannot_be_opened_has_no_link(driver, one):
    code = next(
        code
        for code, concept in read_script(one.folder, "r0/concepts/00").items()
        if any(sentence["text"] is None for sentence in concept["sentences"] if sentence["kind"] == "typical")
    )
    visit(driver, address(one.folder), f"#/r0/c/{code}", f"concept:r0:{code}")
    assert "Text null" not in all_text(driver)
    assert driver.find_elements("css selector", "a[href*='null']") == []


def test_a_concept_is_switched_off_and_the_prediction_is_the_models(driver, one):
    code = a_concept_of(one, text=0)
    told = one.live.remove("r0", 0, [code], "centred", None)
    with serving(one):
        visit(driver, f"http://127.0.0.1:{one.port}/index.html", "#/t/0?run=r0", "text:0")
        click(driver, f".text-legend li[data-code='{code}'] input")
        until(lambda: len(texts_of(driver, ".change .bar-value")) == 2)
        shown = texts_of(driver, ".change .bar-value")
        for place, said in enumerate(shown):
            before, after = map(float, re.findall(r"([\d.]+)%", said))
            assert before == pytest.approx(100 * told["before"][place], abs=0.6)
            assert after == pytest.approx(100 * told["after"][place], abs=0.6)
        visit(driver, f"http://127.0.0.1:{one.port}/index.html", "#/new", "new")
        driver.find_element("id", "typed").send_keys("the cat sat on <b>")
        click(driver, "form button")
        until(lambda: texts_of(driver, ".reader .row:not(.special)") != [])
        assert "".join(texts_of(driver, ".reader .row:not(.special)")) == "thecatsaton<b>"
    assert silent(driver)
