"""A real browser for the tests of a study's pages."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def need_browser() -> None:
    """Skip the test, by name, where there is no browser."""
    pytest.importorskip("selenium", reason="the pages are tried in a browser through selenium, which is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("the pages are tried in Chromium through chromedriver, which are not installed")


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser with an empty profile, which puts what it saves into its folder `saved`."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    saved = profile / "saved"
    saved.mkdir(parents=True)
    options.add_argument(f"--user-data-dir={profile / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(saved)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    try:
        driver.saved = saved
        screen(driver)
        yield driver
    finally:
        driver.quit()


def screen(driver: Any, *, width: int = 900, height: int = 1000) -> None:
    """As a desk or a phone has it; a window itself is never narrower than 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def colours(driver: Any, scheme: str) -> None:
    """`light` or `dark`, as the person prefers; nothing moves, so that a page is at once as it stays."""
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def until(holds: Callable[[], object], *, seconds: float = 10) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError("it has not come about")
        time.sleep(0.02)


def heading(driver: Any) -> str:
    """The page's heading; empty while there is none."""
    return str(driver.execute_script("return document.querySelector('h1')?.textContent ?? ''"))


def status_text(driver: Any) -> str:
    """What the page says of saving."""
    return str(driver.execute_script("return document.getElementById('status').textContent"))


def click_main(driver: Any) -> None:
    """Click the page's one large button."""
    driver.find_element("css selector", "button.main").click()


def press(driver: Any, *keys: str) -> None:
    """Press keys, wherever the focus is."""
    from selenium.webdriver import ActionChains

    chain = ActionChains(driver)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def begin(driver: Any, link: str) -> None:
    """Open a link, agree, and leave the instructions."""
    driver.get(link)
    until(lambda: heading(driver) == "Before you begin")
    driver.find_element("id", "agree").click()
    click_main(driver)
    until(lambda: heading(driver) == "Instructions")
    click_main(driver)
    until(lambda: heading(driver).startswith(("Practice", "Question")))


def answer_question(driver: Any, answer: int, confidence: int, *, wait: bool = True, optional: bool = False) -> None:
    """Choose and save; with `wait` until the next page is there.

    Parameters
    ----------
    optional
        Where the page asks nothing, such as the one after practice, go on.
    """
    before = heading(driver)
    if not optional or before.startswith(("Practice", "Question")):
        driver.find_element("id", f"answer-{answer}").click()
        driver.find_element("id", f"confidence-{confidence}").click()
    click_main(driver)
    if wait:
        until(lambda: heading(driver) not in ("", before))


def accessible(driver: Any) -> list[str]:
    """Violations of impact `serious` or `critical` that axe finds in the page as it stands."""
    package = pytest.importorskip("axe_playwright_python", reason="axe comes with axe-playwright-python")
    source = (Path(package.__path__[0]) / "axe.min.js").read_text(encoding="utf-8")
    # By the driver, whose scripts the page's policy does not bind.
    driver.execute_script(source)
    found = driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    return [
        f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
