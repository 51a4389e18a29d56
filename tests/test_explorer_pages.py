"""The explorer's pages in a real browser: what a person finds, opens, compares, copies and switches off."""

import re

import pytest

from .explorer_browser import (
    LiveServer,
    address,
    all_text,
    click,
    errors_in,
    fragment,
    ready,
    texts_of,
    theme,
    type_into,
    visit,
)
from .explorer_site import make_site, read_data
from .study_browser import heading, press, until

pytestmark = pytest.mark.timeout(120)
ENTER, TAB, ESCAPE, RIGHT, DOWN = "\ue007", "\ue004", "\ue00c", "\ue014", "\ue015"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site") / "plain")


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site") / "live", live=True)


@pytest.fixture
def site(folder):
    return address(folder)


def test_the_overview_finds_sorts_and_opens_concepts(driver, site, folder):
    overview = read_data(folder, "r0/overview")
    visit(driver, site, "", "overview")
    assert heading(driver) == "Concepts of run 0"
    assert driver.title == "run 0 – Films"
    uses = [int(text.replace(",", "")) for text in texts_of(driver, "table.concepts tbody td:nth-child(3)")]
    assert uses == sorted(overview["uses"], reverse=True)
    # Dots and swatches take room and have colours.
    seen = driver.execute_script(
        "return ['.dot', '.swatch', '.fill'].map((one) => document.querySelector(`table ${one}, main ${one}`))"
        ".filter(Boolean).map((one) => [one.offsetWidth > 4, getComputedStyle(one).backgroundColor])"
    )
    assert len(seen) == 2
    assert all(wide and colour != "rgba(0, 0, 0, 0)" for wide, colour in seen)
    # By effect, from large to small and back; the address keeps it.
    click(driver, "th.col-effect button")
    shown = texts_of(driver, "table.concepts tbody th")
    by_effect = sorted(overview["code"], key=lambda code: (-overview["effect"][code], -overview["uses"][code]))
    assert shown == [str(code) for code in by_effect]
    assert fragment(driver) == "#/r0?sort=-effect"
    assert driver.find_element("css selector", "th.col-effect").get_attribute("aria-sort") == "descending"
    assert len(driver.find_elements("css selector", "th[aria-sort]")) == 1
    click(driver, "th.col-effect button")
    assert texts_of(driver, "table.concepts tbody th")[0] == shown[-1]
    # By a word: the table, the map and the address follow.
    type_into(driver, "#search", "boring")
    found = [str(code) for code in overview["code"] if "boring" in overview["words"][code]]
    until(lambda: sorted(texts_of(driver, "table.concepts tbody th")) == sorted(found))
    assert 0 < len(found) < len(overview["code"])
    assert texts_of(driver, ".found") == [f"{len(found)} concepts of 30"]
    until(lambda: "q=boring" in fragment(driver))
    type_into(driver, "#search", "17")
    until(lambda: texts_of(driver, "table.concepts tbody th") == ["17"])
    # Opened from the row, back to the same search.
    click(driver, "table.concepts tbody td")
    until(lambda: ready(driver) == "concept:r0:17")
    driver.back()
    until(lambda: ready(driver) == "overview")
    assert driver.find_element("id", "search").get_attribute("value") == "17"
    assert texts_of(driver, "table.concepts tbody th") == ["17"]
    assert errors_in(driver) == []


def test_the_map_shows_and_opens_what_the_pointer_is_at(driver, tmp_path):
    from selenium.webdriver import ActionChains

    site = address(make_site(tmp_path / "one", runs=1, codes=1))
    visit(driver, site, "#/r0?colour=effect", "overview")
    at = read_data(tmp_path / "one", "r0/overview")
    canvas = driver.find_element("css selector", ".map canvas")
    # What scrolls takes the pointer's box away.
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    place = {name: at[name][0] / 2.12 for name in "xy"}
    width, height = canvas.size["width"] - 8, canvas.size["height"] - 8

    def at_dot():
        offset = round(place["x"] * width), round(-place["y"] * height)
        return ActionChains(driver).move_to_element_with_offset(canvas, *offset)

    def leave():
        ActionChains(driver).move_to_element(driver.find_element("id", "map-heading")).perform()
        until(lambda: not driver.find_element("id", "tip").is_displayed())

    at_dot().perform()
    until(lambda: driver.find_element("id", "tip").is_displayed())
    assert driver.find_element("id", "tip").text.startswith("Concept 0")
    # What the search leaves out is faint, and neither shown nor opened.
    leave()
    type_into(driver, "#search", "none of these words")
    until(lambda: texts_of(driver, ".found") == ["0 concepts of 1"])
    at_dot().click().perform()
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert not driver.find_element("id", "tip").is_displayed()
    assert ready(driver) == "overview"
    type_into(driver, "#search", "")
    until(lambda: texts_of(driver, ".found") == ["1 concept"])
    leave()
    for name in ("Nearer", "Farther", "Whole map"):
        click(driver, f"button[aria-label='{name}']")
    at_dot().click().perform()
    until(lambda: ready(driver) == "concept:r0:0")
    # The only one has neither a next nor a previous, and there is nothing to compare.
    assert driver.find_elements("css selector", ".steps a") == []
    assert texts_of(driver, "#top nav a") == ["Concepts", "Texts"]
    assert errors_in(driver) == []


def test_a_concept_has_all_that_is_known_of_it_and_its_address_can_be_kept(driver, site, folder):
    visit(driver, site, "#/r0/c/17", "concept:r0:17")
    concept = read_data(folder, "r0/concepts/02")["17"]
    assert heading(driver).startswith("Concept 17")
    assert driver.title.startswith("Concept 17: ")
    assert driver.switch_to.active_element.tag_name == "h1"
    shown = all_text(driver)
    for word, count in concept["words"]:
        assert word in shown
        assert str(count) in shown
    assert texts_of(driver, ".sentence mark") == [one["word"] for one in concept["sentences"][:6]]
    assert "after typical" in shown
    assert "after random" not in shown
    click(driver, "input[value=random]")
    assert all("after random" in text for text in texts_of(driver, ".sentence"))
    assert texts_of(driver, "#labels-heading, #predictions-heading, #nearest-heading, #effect-heading") != []
    nearest = texts_of(driver, "section.nearest .code")
    assert nearest == [str(code) for code, _ in concept["nearest"]]
    value, low, high = (100 * one for one in concept["effect"]["lost"])
    effect = driver.find_element("css selector", "section.effect").text.replace("−", "-")
    assert [float(one) for one in re.findall(r"[+-]\d+\.\d+", effect)[:3]] == pytest.approx(
        [value, low, high], abs=0.006
    )
    # Its sentence leads to the text, where its word is shown; back and reload keep the place.
    click(driver, ".sentences a")
    until(lambda: ready(driver).startswith("text:"))
    assert all(
        "same" in one
        for one in driver.execute_script(
            "return [...document.querySelectorAll('.reader [data-code=\"17\"]')].map((one) => one.className)"
        )
    )
    driver.back()
    until(lambda: ready(driver) == "concept:r0:17")
    driver.refresh()
    until(lambda: ready(driver) == "concept:r0:17")
    click(driver, "section.nearest a")
    until(lambda: ready(driver) == f"concept:r0:{nearest[0]}")
    assert errors_in(driver) == []


def test_a_concept_is_copied_as_text(driver, folder):
    with LiveServer(folder, lambda *_: (404, {})) as server:
        visit(driver, server.address, "#/r0/c/3", "concept:r0:3")
        driver.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        click(driver, ".buttons button")
        until(lambda: "clipboard" in driver.find_element("css selector", ".buttons .note").text)
        text = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    concept = read_data(folder, "r0/concepts/00")["3"]
    assert text.startswith("Concept 3 of run 0 (clvq-vae, hidden.2 to hidden.9, small)\nhttp://127.0.0.1:")
    assert ", ".join(f"{word} ({count})" for word, count in concept["words"]) in text
    for one in concept["sentences"]:
        assert f"{one['before']}[[{one['word']}]]{one['after']}" in text


def test_texts_are_found_by_beginning_split_label_and_rightness(driver, site, folder):
    listed = read_data(folder, "texts/list")
    visit(driver, site, "#/texts?right=no", "texts")
    wrong = [n for n in range(25) if listed["label"][n] != listed["prediction"][n]]
    assert texts_of(driver, ".texts .code") == [str(n) for n in wrong]
    driver.execute_script("const box = document.getElementById('label'); box.value = '1';")
    driver.execute_script("document.getElementById('label').dispatchEvent(new Event('change'))")
    assert texts_of(driver, ".texts .code") == [str(n) for n in wrong if listed["label"][n] == 1]
    assert fragment(driver) == "#/texts?right=no&label=1"
    visit(driver, site, "#/texts", "texts")
    type_into(driver, "#search", "\U0001f3ac dull great")
    found = texts_of(driver, ".texts .code")
    assert found == [str(n) for n in range(25) if listed["first"][n].startswith("\U0001f3ac dull great")]
    click(driver, ".texts a")
    until(lambda: ready(driver) == f"text:{found[0]}")


def test_a_text_shows_its_rows_concepts_and_overlays(driver, site, folder):
    visit(driver, site, "#/t/12?run=r1", "text:12")
    text = read_data(folder, "texts/001")[2]
    words = [text["text"][start:end] for start, end, special in text["rows"] if not special]
    assert texts_of(driver, ".reader .row:not(.special)") == words
    codes = driver.execute_script(
        "return [...document.querySelectorAll('.reader .row')].map((one) => +one.dataset.code)"
    )
    assert codes == text["codes"]["r1"]
    marked = [text["text"][start:end] for start, end in text["rationale"]]
    assert texts_of(driver, ".reader .rationale") == marked
    thickness = driver.execute_script(
        "return [...document.querySelectorAll('.reader .row')]"
        ".map((one) => parseFloat(one.style.getPropertyValue('--salient')))"
    )
    most = max(abs(one) for one in text["saliency"])
    assert thickness == pytest.approx([6 * abs(one) / most for one in text["saliency"]], rel=1e-3)
    for name in ("colours", "saliency", "rationale"):
        assert driver.find_elements("css selector", f".reader.with-{name}")
        click(driver, f"#show-{name}")
        assert not driver.find_elements("css selector", f".reader.with-{name}")
    assert "The model predicts negative." in driver.find_element("css selector", ".outcome").text
    # The keyboard goes from row to row and says which concept each has.
    driver.execute_script("document.querySelector('.reader .row').focus()")
    press(driver, RIGHT)
    until(lambda: driver.find_element("id", "tip").is_displayed())
    assert driver.find_element("id", "tip").text.startswith(f"Concept {text['codes']['r1'][1]}")
    assert driver.find_element("css selector", ".text-legend li.same").get_attribute("data-code") == str(
        text["codes"]["r1"][1]
    )
    press(driver, ENTER)
    until(lambda: ready(driver) == f"concept:r1:{text['codes']['r1'][1]}")
    assert errors_in(driver) == []


def test_a_concept_is_switched_off_and_a_new_text_is_read(driver, live_folder):
    def answer(path, question):
        if path == "/api/text":
            return 200, {
                "text": question["text"],
                "rows": [[0, 4, False], [5, 9, False]],
                "codes": {"r0": [3, 4], "r1": [5, 6], "r2": [7, 8]},
                "prediction": 1,
                "probabilities": [0.1, 0.9],
                "saliency": None,
                "truncated": 2,
            }
        if len(question["codes"]) == 2:
            return 409, {"error": "one <b>at</b> a time"}
        return 200, {"before": [0.8, 0.2], "after": [0.31, 0.69], "rows": [2, 3]}

    with LiveServer(live_folder, answer) as server:
        visit(driver, server.address, "#/t/12?run=r0", "text:12")
        verdict = driver.find_element("css selector", ".verdict")
        click(driver, ".text-legend input")
        until(lambda: verdict.text == "From negative to positive without 2 rows.")
        assert texts_of(driver, ".change .bar-value") == ["80% → 31% (−49)", "20% → 69% (+49)"]
        code = int(driver.find_element("css selector", ".text-legend li").get_attribute("data-code"))
        question = {"run": "r0", "text": 12, "typed": None, "codes": [code], "removal": "centred", "rows": "all"}
        assert server.asked == [("/api/remove", question)]
        assert driver.find_elements("css selector", f".reader .row.off[data-code='{code}']")
        # A refusal is said in its own words.
        click(driver, ".text-legend li + li input")
        until(lambda: verdict.text == "one <b>at</b> a time")
        driver.find_element("xpath", "//button[. = 'All on again']").click()
        until(lambda: verdict.text == "The model predicts negative.")
        assert driver.find_elements("css selector", ".reader .row.off") == []
        # From a concept's sentence.
        visit(driver, server.address, "#/r0/c/17", "concept:r0:17")
        driver.find_element("xpath", "//button[. = 'Remove it here']").click()
        until(lambda: texts_of(driver, ".answer .bar-value") == ["80% → 31% (−49)", "20% → 69% (+49)"])
        # A text of one's own.
        visit(driver, server.address, "#/new", "new")
        driver.find_element("id", "typed").send_keys("good film")
        click(driver, "form button")
        until(lambda: texts_of(driver, ".reader .row") == ["good", "film"])
        assert "2 tokens were cut off" in all_text(driver)
        click(driver, ".text-legend input")
        until(lambda: driver.find_element("css selector", ".verdict").text.startswith("From negative to positive"))
        assert server.asked[-1][1] == {**question, "text": None, "typed": "good film", "codes": [3]}
    # The server's refusals are logged by the browser, and nothing else.
    assert all("409" in message for message in errors_in(driver))
    type_into(driver, "#typed", "another")
    click(driver, "form button")
    until(lambda: "server cannot be reached" in texts_of(driver, "form .warning")[0])


def test_two_runs_are_compared(driver, site, folder):
    visit(driver, site, "#/compare?a=r0&b=r1&text=3", "compare")
    flow = read_data(folder, "flow")[0]
    assert flow["same_site"]
    assert "17.3" in all_text(driver)
    assert "18.3" in all_text(driver)
    largest = sorted((rows for _, _, rows in flow["links"]), reverse=True)
    assert texts_of(driver, ".pairs tbody td.numeric")[:9] == [str(rows) for rows in largest[:9]]
    first = texts_of(driver, ".pairs tbody .code")
    assert [int(first[0]), int(first[1]), largest[0]] in flow["links"]
    text = read_data(folder, "texts/000")[3]
    for place, run in enumerate(("r0", "r1")):
        codes = driver.execute_script(
            "return [...document.querySelectorAll('.reader')[arguments[0]].querySelectorAll('.row')]"
            ".map((one) => +one.dataset.code)",
            place,
        )
        assert codes == text["codes"][run]
    type_into(driver, "#text-number", "99")
    until(lambda: "numbers 0 to 24" in all_text(driver))
    # Turned round, the pairs are turned too; runs of different sites have none.
    driver.execute_script(
        "const box = document.getElementById('a'); box.value = 'r1'; box.dispatchEvent(new Event('change'))"
    )
    until(lambda: ready(driver) == "compare" and "a=r1" in fragment(driver))
    visit(driver, site, "#/compare?a=r1&b=r0", "compare")
    assert texts_of(driver, ".pairs tbody .code")[:2] == first[:2][::-1]
    visit(driver, site, "#/compare?a=r0&b=r2", "compare")
    assert driver.find_elements("css selector", ".pairs") == []
    assert errors_in(driver) == []


def test_the_flow_across_layers_is_drawn_and_listed(driver, site, folder):
    visit(driver, site, "#/flow?links=20", "flow")
    flow = read_data(folder, "flow")[1]
    largest = sorted(flow["links"], key=lambda link: -link[2])[:20]
    assert texts_of(driver, ".pairs tbody td.numeric:nth-child(3)") == [str(rows) for _, _, rows in largest]
    links = driver.execute_script(
        "return [...document.querySelectorAll('.pairs tbody a')].slice(0, 2).map((one) => one.getAttribute('href'))"
    )
    assert links == [f"#/r1/c/{largest[0][0]}", f"#/r2/c/{largest[0][1]}"]
    assert driver.find_elements("css selector", ".sankey canvas")
    assert errors_in(driver) == []


def test_all_of_it_is_reached_without_a_pointer(driver, site):
    visit(driver, site, "#/r0", "overview")
    press(driver, "/", "film")
    until(lambda: "q=film" in fragment(driver))
    press(driver, ENTER)
    first = driver.switch_to.active_element
    assert first.get_attribute("href").endswith(f"/c/{first.text.strip()}")
    press(driver, "j", "j", "k", DOWN)
    third = driver.switch_to.active_element.text.strip()
    assert third == texts_of(driver, "table.concepts tbody th")[2]
    press(driver, ENTER)
    until(lambda: ready(driver) == f"concept:r0:{third}")
    press(driver, "n")
    until(lambda: ready(driver) not in ("", f"concept:r0:{third}"))
    press(driver, "p")
    until(lambda: ready(driver) == f"concept:r0:{third}")
    press(driver, "?")
    assert driver.find_element("id", "help").is_displayed()
    assert "back" in driver.find_element("id", "help").text
    press(driver, ESCAPE)
    until(lambda: not driver.find_element("id", "help").is_displayed())
    press(driver, ESCAPE)
    until(lambda: ready(driver) not in ("", f"concept:r0:{third}"))
    # By Tab alone: past the header into the page, onto everything that can be used.
    visit(driver, site, "#/r0", "overview")
    reached = set()
    driver.execute_script("document.activeElement.blur(); document.getElementById('skip').focus()")
    for _ in range(40):
        reached.add(
            driver.execute_script("const one = document.activeElement; return one.id || one.className || one.type")
        )
        press(driver, TAB)
    assert {"skip", "brand", "switch-run", "theme", "help-button", "search", "tool", "scroll", "sort"} <= reached
    # Keys can be turned off.
    press(driver, "?")
    click(driver, "#use-keys")
    press(driver, ESCAPE, "/")
    assert driver.switch_to.active_element.get_attribute("id") != "search"
    driver.execute_script("localStorage.clear()")


def test_the_theme_is_chosen_and_kept(driver, site):
    visit(driver, site, "#/r0", "overview")
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = driver.execute_script(ground)
    for _ in range(2):
        click(driver, "#theme")
    assert theme(driver) == "dark"
    assert driver.execute_script(ground) != before
    visit(driver, site, "#/texts", "texts")
    assert theme(driver) == "dark"
    driver.execute_script("localStorage.clear()")
