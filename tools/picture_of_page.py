"""Make the README's pictures of the page, by a headless Chromium.

    deadpan train nano data.validation=nano:held-out
    deadpan serve base=nano tuned=runs/nano
    python tools/picture_of_page.py http://127.0.0.1:8000 PICTURE docs/pictures

Needs selenium, chromium and chromedriver. Serve with --votes of its own: a match is stored.
"""

import argparse
import shutil
import sys
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WIDTH, HEIGHT = 1200, 700
PATIENCE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("picture", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        sys.exit("no browser: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--no-proxy-server", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def wait(selector: str, number: int = 1) -> None:
        found = WebDriverWait(driver, PATIENCE)
        found.until(lambda d: len(d.find_elements(By.CSS_SELECTOR, selector)) >= number)
        time.sleep(1)

    def click(selector: str) -> None:
        driver.find_element(By.CSS_SELECTOR, selector).click()

    def drop(area: str) -> None:
        wait(f"{area} input[type=file]")
        field = driver.find_element(By.CSS_SELECTOR, f"{area} input[type=file]")
        field.send_keys(str(arguments.picture.resolve()))
        wait(f"{area} img")

    def save(name: str) -> None:
        path = arguments.folder / name
        picture = Image.open(BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        picture.save(path, quality=82, method=6)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")

    try:
        driver.get(f"{arguments.address}/en/")
        drop("#tell-picture")
        wait("#jokes .joke:not(.telling)", 2)
        for told in (2, 4):
            click("#tell")
            wait("#jokes .joke:not(.telling) li", told)
        save("page-tell.webp")
        driver.get(f"{arguments.address}/zh/")
        wait("[role=tab]", 2)
        driver.find_elements(By.CSS_SELECTOR, "[role=tab]")[1].click()
        drop("#arena-picture")
        click("#start")
        wait("#vote-left")
        save("page-arena.webp")
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
