"""A real browser goes through the page: tell, another one, arena, runs; and nothing leaves this computer."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import deadpan
from deadpan.serve.votes import Outcome, Votes
from page import Comedian, make_runs, page_app, served

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

PATIENCE = 60
JOKE = "它是全家唯一读过用户协议的。"


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("no browser: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-proxy-server", "--lang=en", "--window-size=1280,1000",
        # Whatever would leave finds no address.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


class Page:
    """What a visitor sees and does."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def wait(self, seen: Callable[[WebDriver], object]) -> None:
        WebDriverWait(self.driver, PATIENCE).until(seen)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def click(self, selector: str) -> None:
        self.wait(lambda _: any(e.is_displayed() and e.is_enabled() for e in self.all(selector)))
        (element,) = (e for e in self.all(selector) if e.is_displayed())
        element.click()

    def drop(self, area: str, picture: Path) -> None:
        """Drop a picture; as far as the page can tell, a file that is chosen is the same."""
        self.wait(lambda _: self.all(f"{area} input[type=file]"))
        self.all(f"{area} input[type=file]")[0].send_keys(str(picture))

    def tab(self, name: str) -> None:
        (tab,) = (tab for tab in self.all("[role=tab]") if tab.text == name)
        tab.click()

    def requests(self) -> list[str]:
        """The addresses of all requests so far, of those that were refused too."""
        messages = (
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        )
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


def test_a_visitor_goes_through_the_page(
    driver: WebDriver, tmp_path: Path, pictures: list[Path]
) -> None:
    engines = {"nano": deadpan.load("nano").engine, "comedian": Comedian(JOKE, "还有一个。")}
    page = Page(driver)
    with Votes(tmp_path / "votes.db") as votes:
        app = page_app(engines, votes, make_runs(tmp_path / "runs"))
        with served(app) as address:
            driver.get(f"{address}/")
            assert driver.current_url == f"{address}/en/"

            # Tell: jokes come as soon as the picture is there, side by side.
            page.drop("#tell-picture", pictures[0])
            finished = "#jokes .joke:not(.telling)"
            page.wait(lambda _: len(page.all(finished)) == 2)
            assert page.texts("#jokes h3") == ["nano", "comedian"]
            described, joke = page.texts("#jokes .newest")
            assert described
            assert joke == JOKE
            left, right = (card.rect for card in page.all("#jokes .joke"))
            assert left["y"] == right["y"]
            assert left["x"] + left["width"] <= right["x"]
            page.wait(lambda _: page.all("#tell")[0].text == "Another one")
            page.click("#tell")
            page.wait(lambda _: len(page.all(f"{finished} li")) == 2)
            assert page.texts("#jokes .newest")[1] == "还有一个。"
            assert page.texts("#jokes li")[1] == JOKE

            # Arena: nobody is named before the vote.
            page.tab("Arena")
            page.drop("#arena-picture", pictures[1])
            page.wait(lambda _: page.all("#arena-picture img"))
            page.click("#start")
            page.wait(lambda _: page.texts("#vote-both-dry") == ["Both dry"])
            assert page.texts("#answers h3") == ["Left", "Right"]
            assert votes.all() == []
            page.click("#vote-both-dry")
            page.wait(lambda _: "·" in "".join(page.texts("#answers h3")))
            named = [text.split(" · ")[1] for text in page.texts("#answers h3")]
            (vote,) = votes.all()
            assert vote.outcome is Outcome.BOTH_DRY
            assert named == [vote.match.left, vote.match.right]
            assert sorted(named) == ["comedian", "nano"]
            page.wait(lambda _: len(page.all("#ranking tbody tr")) == 2)

            # Runs.
            page.tab("Runs")
            page.wait(lambda _: page.all("#run-page .curve svg"))
            assert "它在等年终奖" in "".join(page.texts("#run-page .probe"))
            assert page.all("#run-page .probe img")

            # The other language, and a phone.
            page.click(".masthead nav a")
            page.wait(lambda _: "讲一个" in page.texts("[role=tab]"))
            assert driver.current_url == f"{address}/zh/"
            phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            page.drop("#tell-picture", pictures[0])
            page.wait(lambda _: len(page.all(finished)) == 2)
            upper, lower = (card.rect for card in page.all("#jokes .joke"))
            assert upper["x"] == lower["x"]
            width = "return document.documentElement.scrollWidth"
            assert driver.execute_script(width) <= 390, "nothing sticks out"

            requested = page.requests()
            problems = [
                entry["message"]
                for entry in driver.get_log("browser")
                if entry["level"] == "SEVERE"
            ]
    assert len(requested) > 20
    # Chromium's own pages and what is within the page (data:, blob:) have no host.
    hosts = {urlsplit(url).hostname for url in requested if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
    assert problems == []
