"""The explorer's pages where it is hard: hostile text, barriers, gaps, missing and damaged files."""

import re

import pytest

from .explorer_browser import VIEWS, LiveServer, address, all_text, click, errors_in, ready, texts_of, theme, visit
from .explorer_site import ASSETS, make_site
from .study_browser import accessible, colours, heading, screen, until
from .study_maker import HOSTILE

pytestmark = pytest.mark.timeout(120)
# What a page shows where something was forgotten.
UNSAID = re.compile(r"\b(null|undefined|NaN|Infinity|\[object)\b")


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site") / "live", live=True)


def test_hostile_text_is_shown_as_text_and_nothing_of_it_runs(driver, tmp_path):
    site = address(make_site(tmp_path / "hostile", hostile=True))
    screen(driver, width=360, height=740)
    seen = ""
    for number in range(len(HOSTILE)):
        visit(driver, site, f"#/t/{number}", f"text:{number}")
        seen += all_text(driver)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    for route, view in [*VIEWS.items(), ("#/r2/c/5", "concept:r2:5")]:
        visit(driver, site, route, view)
        seen += all_text(driver)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360, route
        inside = "return document.querySelectorAll('main img, main script, main b, header img').length"
        assert driver.execute_script(inside) == 0
        assert driver.execute_script("return window.ran ?? null") is None
        assert driver.execute_script(
            "return [...document.querySelectorAll('.piece, .named')]"
            ".every((one) => getComputedStyle(one).unicodeBidi.includes('isolate'))"
        )
    assert errors_in(driver) == []
    for text in HOSTILE:
        shown = text.replace("\x00", "␀").replace("\x07", "␇").replace("\x1b", "␛")
        shown = shown.replace("\u2028", " ").replace("\u2029", " ")
        assert (shown or "(empty)") in seen, text


def test_views_have_no_serious_barrier_in_light_and_dark_and_fit_a_phone(driver, live_folder):
    # As a server shows it, with all that can be switched.
    with LiveServer(live_folder, lambda *_: (404, {"error": "no"})) as server:
        for route, view in {**VIEWS, "#/new": "new"}.items():
            visit(driver, server.address, route, view)
            assert not UNSAID.search(all_text(driver)), route
            # By day at a desk, at night on a phone.
            for scheme, width in (("light", 1280), ("dark", 360)):
                colours(driver, scheme)
                screen(driver, width=width)
                until(lambda wanted=scheme: theme(driver) == wanted)
                assert accessible(driver) == [], (route, scheme)
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width, route
        click(driver, "#help-button")
        assert accessible(driver) == []
        assert errors_in(driver) == []


def test_what_a_site_lacks_makes_its_pages_smaller(driver, tmp_path):
    bare = make_site(tmp_path / "bare", runs=1, texts=0, labels=False, effects=False, predictions=False, overlays=False)
    site = address(bare)
    visit(driver, site, "#/r0", "overview")
    assert texts_of(driver, "#top nav a") == ["Concepts"]
    assert texts_of(driver, "table.concepts thead th") == ["Concept", "Most frequent words", "Uses", "Top word"]
    visit(driver, site, "#/r0/c/3", "concept:r0:3")
    headings = texts_of(driver, "main h2")
    assert headings == ["In its sentences", "Words", "Nearest concepts", "What it decodes to"]
    for route, says in {
        "#/texts": "without texts",
        "#/compare": "one run only",
        "#/flow": "no runs of different layers",
        "#/new": "--serve",
        "#/r0/c/99": "no concept 99",
        "#/r7": "no run “r7”",
        "#/x/y/z": "nothing at this address",
    }.items():
        visit(driver, site, route, "error")
        assert says in driver.find_element("css selector", "[role=alert]").text, route
        assert heading(driver) == "This cannot be shown"
    gaps = address(make_site(tmp_path / "gaps", gaps=True, live=True))
    for route, view in {**VIEWS, "#/r0/c/2": "concept:r0:2", "#/t/4": "text:4", "#/r0?sort=effect": "overview"}.items():
        visit(driver, gaps, route, view)
        assert not UNSAID.search(all_text(driver)), route
        if view == "concept:r0:2":
            assert len(driver.find_elements("css selector", ".sentences a")) == 3
            assert len(driver.find_elements("css selector", ".sentences button")) == 3
            assert "too few texts for an interval" in all_text(driver)
        if view == "text:4":
            assert len(driver.find_elements("css selector", ".reader .unassigned")) == 3
            assert len(driver.find_elements("css selector", ".reader .row")) == 6
    plain = make_site(tmp_path / "plain", labels=False, effects=False, overlays=False, predictions=False)
    for route, view in VIEWS.items():
        visit(driver, address(plain), route, view)
        assert not UNSAID.search(all_text(driver)), route
    assert errors_in(driver) == []


def test_a_data_file_that_is_missing_or_damaged_is_named(driver, tmp_path):
    folder = make_site(tmp_path / "site")
    site = address(folder)
    (folder / "data" / "r0" / "concepts" / "01.js").unlink()
    (folder / "data" / "r0" / "concepts" / "02.js").write_text("clvq.receive('r0/concepts/02', {")
    (folder / "data" / "texts" / "000.js").write_text("")
    (folder / "data" / "texts" / "list.js").write_text('clvq.receive("texts/list", {});')
    for route, says in {
        "#/r0/c/9": "data/r0/concepts/01.js is missing",
        "#/r0/c/17": "data/r0/concepts/02.js is damaged",
        "#/t/2": "data/texts/000.js is damaged",
        "#/texts": "not as expected",
    }.items():
        visit(driver, site, route, "error")
        assert says in driver.find_element("css selector", "[role=alert]").text, route
        assert "clvq explore" in driver.find_element("css selector", "[role=alert]").text
    # The rest is there.
    click(driver, "main a")
    until(lambda: ready(driver) == "overview")
    visit(driver, site, "#/r0/c/25", "concept:r0:25")
    (folder / "data" / "site.js").unlink()
    visit(driver, site, "", "error")
    assert "data/site.js is missing" in driver.find_element("css selector", "[role=alert]").text


def test_the_assets_are_small_licensed_and_without_inline_code():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    page = (ASSETS / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page)
    assert "unsafe" not in page
    for style in ASSETS.glob("*.css"):
        bare = re.sub(r"/\*.*?\*/", "", style.read_text(encoding="utf-8"), flags=re.DOTALL)
        # What stands between blocks makes a browser leave out the next one.
        assert not re.search(r"\}\s*;|;\s*;", bare), style.name
        assert bare.count("{") == bare.count("}"), style.name
    loaded = set(re.findall(r'(?:src|href)="([^"#:]+)"', page))
    assert {str(path.relative_to(ASSETS)) for path in files if path.suffix in (".js", ".css")} == loaded
    assert {path.name for path in (ASSETS / "vendor").glob("LICENSE-*")} == {
        f"LICENSE-{name}.txt" for name in ("d3", "echarts", "tslib", "zrender")
    }
    for path in files:
        if "vendor" not in path.parts:
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source), path.name
            assert path.stat().st_size < 25_600, path.name
