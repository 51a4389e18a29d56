"""The pages of a study in a real browser: what a person sees, sends and keeps."""

import json
import time
from collections import Counter
from contextlib import ExitStack
from threading import Thread

import pytest
from clvq.evaluation.study.answer_files import read_answer_files
from clvq.evaluation.study.build import build
from clvq.evaluation.study.database_file import read_answers
from clvq.evaluation.study.folder import read_study
from clvq.evaluation.study.settings import StudySettings

from .study_browser import (
    accessible,
    answer_question,
    begin,
    browser,
    click_main,
    colours,
    heading,
    need_browser,
    press,
    screen,
    status_text,
    until,
)
from .study_maker import HOSTILE, make_items
from .study_processes import Server

pytestmark = pytest.mark.timeout(120)
CONTACT = "Questions? Write to study@example.org."


@pytest.fixture(autouse=True)
def _browser():
    need_browser()


@pytest.fixture
def driver(opened):
    """With no message of an earlier test."""
    opened.get_log("browser")
    return opened


@pytest.fixture
def phone(driver):
    """The same, as wide as a phone."""
    screen(driver, width=360, height=740)
    yield driver
    colours(driver, "light")
    screen(driver)


def built(folder, *, annotators: int = 3, settings: dict | None = None, **items):
    make_items(folder / "items.json", **{"items": 4, "methods": 2, "training": 1, "attention": 1, **items})
    build(
        folder / "items.json",
        folder / "study",
        StudySettings(annotators=annotators, contact=CONTACT, completion="Your code is HAZEL.", **(settings or {})),
    )
    return folder / "study"


def answers_of(folder, number: int) -> list:
    return [one for one in read_answers(folder / "answers.sqlite") if one.annotator == str(number)]


def errors_in(driver) -> list[str]:
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def test_three_people_at_once_click_through_a_whole_study(tmp_path):
    folder = built(tmp_path)
    study = read_study(folder)
    failed: list[BaseException] = []

    def take_part(driver, link) -> None:
        try:
            begin(driver, link)
            while not heading(driver).startswith("Thank"):
                practice = heading(driver).startswith("Practice")
                answer_question(driver, 1, 4)
                if practice:
                    until(lambda: heading(driver) in ("That is right", "Not this one"))
                    click_main(driver)
        except BaseException as error:
            failed.append(error)

    with Server(folder) as server, ExitStack() as stack:
        drivers = [stack.enter_context(browser(tmp_path / f"person{number}")) for number in range(3)]
        people = [Thread(target=take_part, args=pair) for pair in zip(drivers, server.links, strict=True)]
        for person in people:
            person.start()
        for person in people:
            person.join()
        assert failed == []
        for driver in drivers:
            page = driver.find_element("tag name", "main").text
            assert "all answers are saved" in page
            assert "Your code is HAZEL." in page
            assert CONTACT in page
            assert errors_in(driver) == []
    found = read_answers(folder / "answers.sqlite")
    assert Counter(one.annotator for one in found) == {"1": 6, "2": 6, "3": 6}
    assert {(one.answer, one.confidence) for one in found} == {(1, 4)}
    assert all(0 < one.milliseconds < 60_000 for one in found)
    cells = Counter((one.item, one.method) for one in found if one.kind == "main")
    assert set(cells.values()) == {1, 2}
    assert len(cells) == 4 * len(study.pool.methods)


def test_answers_come_once_from_double_clicks_reloads_tabs_and_returning(tmp_path, driver):
    folder = built(tmp_path, training=0)
    with Server(folder) as server:
        link = server.links[0]
        begin(driver, link)
        # Clicked twice.
        driver.execute_script(
            "document.getElementById('answer-0').click(); document.getElementById('confidence-2').click();"
            "const button = document.querySelector('button.main'); button.click(); button.click();"
        )
        until(lambda: heading(driver) == "Question 2 of 5")
        # Reloaded, and left and entered again: the same question.
        shown = driver.find_element("css selector", ".group").text
        for again in (driver.refresh, lambda: (driver.get("about:blank"), driver.get(link))):
            again()
            until(lambda: heading(driver) == "Question 2 of 5")
            assert driver.find_element("css selector", ".group").text == shown
        # A second tab has the same question; the first answer stays, and both go on.
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        driver.get(link)
        until(lambda: heading(driver) == "Question 2 of 5")
        answer_question(driver, 1, 2)
        until(lambda: heading(driver) == "Question 3 of 5")
        driver.close()
        driver.switch_to.window(first)
        answer_question(driver, 0, 1)
        until(lambda: heading(driver) == "Question 3 of 5")
        assert [(one.place, one.answer, one.confidence) for one in answers_of(folder, 1)] == [(0, 0, 2), (1, 1, 2)]
        assert errors_in(driver) == []


def test_an_answer_waits_for_a_server_that_was_killed_and_is_saved_once(tmp_path, driver):
    folder = built(tmp_path, training=0)
    with Server(folder) as server:
        begin(driver, server.links[0])
        server.kill()
        answer_question(driver, 1, 3, wait=False)
        until(lambda: status_text(driver) == "Not saved yet – trying again")
        assert heading(driver) == "Question 1 of 5"
        # It is kept, also where the page is closed meanwhile.
        assert (
            driver.execute_script("return Object.keys(localStorage).filter((key) => key.includes('waiting')).length")
            == 1
        )
        time.sleep(1.5)
        server.start()
        until(lambda: heading(driver) == "Question 2 of 5", seconds=15)
        assert status_text(driver) == "Saved"
        assert (
            driver.execute_script("return Object.keys(localStorage).filter((key) => key.includes('waiting')).length")
            == 0
        )
        # Once more, and the page is loaded again before the answer got through.
        server.kill()
        answer_question(driver, 0, 1, wait=False)
        until(lambda: status_text(driver) == "Not saved yet – trying again")
        server.start()
        driver.get(server.links[0])
        until(lambda: heading(driver) == "Question 3 of 5", seconds=15)
        assert [(one.place, one.answer, one.confidence) for one in answers_of(folder, 1)] == [(0, 1, 3), (1, 0, 1)]


def test_everything_can_be_done_with_the_keyboard(tmp_path, driver):
    folder = built(tmp_path)
    with Server(folder) as server:
        driver.get(server.links[0])
        until(lambda: heading(driver) == "Before you begin")
        # Without agreeing it does not go on, and the field that is missing has the focus.
        press(driver, "\ue007")
        until(lambda: driver.find_element("css selector", "[role=alert]").text != "")
        assert driver.switch_to.active_element.get_attribute("id") == "agree"
        press(driver, " ", "\ue007")
        until(lambda: heading(driver) == "Instructions")
        press(driver, "\ue007")
        until(lambda: heading(driver) == "Practice 1 of 1")
        # The heading has the focus, so that it is read out.
        assert driver.switch_to.active_element.tag_name == "h1"
        press(driver, "1", "\ue007")
        until(lambda: "how sure" in driver.find_element("css selector", "[role=alert]").text)
        press(driver, "c", "\ue007")
        until(lambda: heading(driver) in ("That is right", "Not this one"))
        press(driver, "\ue007")
        until(lambda: heading(driver) == "Question 1 of 5")
        press(driver, "2", "f", "\ue007")
        until(lambda: heading(driver) == "Question 2 of 5")
        # By Tab and the arrows alone.
        driver.execute_script("document.querySelector('#keys').click()")
        press(driver, "1", "c")
        assert driver.execute_script("return document.querySelectorAll('form :checked').length") == 0
        press(driver, "\ue004", " ", "\ue015", "\ue004", " ", "\ue015", "\ue015")
        press(driver, "\ue004", "\ue007")
        until(lambda: heading(driver) == "Question 3 of 5")
    given = [(one.answer, one.confidence) for one in answers_of(folder, 1)]
    assert given == [(0, 4), (1, 3), (1, 3)]


def test_the_form_without_a_server_saves_a_file_that_can_be_read(tmp_path, driver):
    folder = built(tmp_path, annotators=3)
    study = read_study(folder)
    page = (folder / "pages" / "index.html").as_uri()
    driver.get(page)
    until(lambda: heading(driver) == "Which booklet?")
    field = driver.find_element("id", "booklet")
    field.send_keys("4")
    click_main(driver)
    until(lambda: "from 1 to 3" in driver.find_element("css selector", "[role=alert]").text)
    begin(driver, f"{page}?booklet=2")
    for place in range(6):
        if place == 3:
            # Left and entered again.
            driver.get("about:blank")
            driver.get(f"{page}?booklet=2")
            until(lambda: heading(driver) == "Question 3 of 5")
        answer_question(driver, place % 2, 1 + place % 4)
        if place == 0:
            until(lambda: heading(driver) in ("That is right", "Not this one"))
            click_main(driver)
    until(lambda: heading(driver) == "Thank you")
    click_main(driver)
    saved = driver.saved
    until(lambda: [path for path in saved.iterdir() if path.suffix == ".json"], seconds=15)
    assert errors_in(driver) == []
    driver.find_element("xpath", "//button[contains(., 'Remove')]").click()
    assert driver.execute_script("return Object.keys(localStorage).filter((key) => key.includes('study')).length") == 0
    (path,) = saved.iterdir()
    found = read_answer_files([path], study)
    assert [(one.item, one.method, one.kind) for one in found] == [
        (one.item, one.method, one.kind) for one in study.booklets[1]
    ]
    assert [(one.answer, one.confidence) for one in found] == [(place % 2, 1 + place % 4) for place in range(6)]
    assert json.loads(path.read_text())["booklet"] == 2


@pytest.mark.parametrize("words", ["cloud", "list"])
def test_hostile_text_is_shown_as_text_and_nothing_of_it_runs(tmp_path, phone, words):
    everything = {"words": words, "show": ("words", "sentences", "labels")}
    folder = built(tmp_path, classes=4, hostile=True, attention=0, settings=everything)
    begin(phone, f"{(folder / 'pages' / 'index.html').as_uri()}?booklet=1")
    seen = ""
    while not heading(phone).startswith("Thank"):
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 360, heading(phone)
        for button in phone.find_elements("css selector", "button.fold"):
            phone.execute_script("arguments[0].click()", button)
            assert button.get_attribute("aria-expanded") == "true"
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 360
        seen += phone.execute_script("return document.querySelector('main').textContent")
        # A word cannot reach out of its place.
        assert phone.execute_script(
            "return [...document.querySelectorAll('.piece, .named')]"
            ".every((one) => getComputedStyle(one).unicodeBidi.includes('isolate'))"
        )
        assert phone.execute_script("return document.querySelectorAll('main img, main script, main b').length") == 0
        answer_question(phone, 0, 1, optional=True)
    assert phone.execute_script("return window.ran ?? null") is None
    assert errors_in(phone) == []
    for text in HOSTILE:
        shown = text.replace("\x00", "␀").replace("\x07", "␇").replace("\x1b", "␛")
        shown = shown.replace("\u2028", " ").replace("\u2029", " ")
        assert (shown or "(empty)") in seen


def test_pages_have_no_serious_barrier_in_light_and_dark_and_fit_a_phone(tmp_path, phone):
    folder = built(tmp_path, items=2, settings={"show": ("words", "sentences", "labels")})

    def checked() -> None:
        for scheme in ("light", "dark"):
            colours(phone, scheme)
            assert accessible(phone) == [], (heading(phone), scheme)
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 360

    with Server(folder) as server:
        phone.get(server.links[0])
        pages = []
        for _ in range(20):
            until(lambda: heading(phone) not in ("", *pages))
            pages.append(heading(phone))
            if pages[-1].startswith(("Practice", "Question")):
                phone.execute_script("document.querySelector('details').open = true")
                checked()
                answer_question(phone, 0, 1, wait=False)
                continue
            checked()
            if pages[-1].startswith("Thank"):
                break
            if pages[-1] == "Before you begin":
                phone.find_element("id", "agree").click()
            click_main(phone)
    assert pages[-1] == "Thank you"
    assert len(pages) == 8


def test_a_barrier_is_found(tmp_path, phone):
    # What the test above relies on: text that can hardly be read, and a field without a name.
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><html lang=en><title>x</title><main><p style='color: #bbb'>Text<input></main>")
    phone.get(page.as_uri())
    found = accessible(phone)
    assert [one.split(":")[0] for one in found] == ["color-contrast", "label"]


def test_a_page_says_what_is_wrong_with_a_link(tmp_path, driver):
    folder = built(tmp_path)
    with Server(folder) as server:
        driver.get(server.links[0].replace("/a/", "/a/x"))
        assert "please check that it is complete" in driver.find_element("tag name", "body").text
        driver.get(f"http://127.0.0.1:{server.port}/")
        until(lambda: heading(driver) == "A personal link is needed")
