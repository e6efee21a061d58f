"""The page at / in a headless Chromium."""

from __future__ import annotations

import base64
import re
import shutil

import pytest

import radio_fast
from radio_fast.serve.embedder import Embedder
from tests.conftest import golden_source
from tests.serve.live import picture, serving, until

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")

# What a browser makes of files that are dragged onto the window.
DROP = """
const data = new DataTransfer();
for (const [name, type, text] of arguments[0]) {
  data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
}
const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.getElementById("drop").dispatchEvent(event);
"""
# Of each map: its size and how many colours it has.
MAPS = """
return [...document.querySelectorAll("canvas")].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return [canvas.width, canvas.height, new Set(new Uint32Array(data.buffer)).size];
});
"""


@pytest.fixture(scope="module")
def server():
    model = radio_fast.load(golden_source("vit_h16"))
    with Embedder(model, resolution=(64, 96)) as embedder, serving(embedder, api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "no-proxy-server",
        "window-size=1100,1000", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, so that Selenium looks for none on the network.
    service = webdriver.chrome.service.Service(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def shown(self, selector: str, text: str) -> None:
        until(lambda: text in self.find(selector).text)


@pytest.fixture
def page(browser, server):
    """With the key typed in."""
    page = Page(browser, server.url)
    page.shown("#model", "Authorization: Bearer KEY")
    assert page.find("details").get_attribute("open")
    page.find("#key").send_keys("secret\t")
    page.shown("#model", "tiny")
    browser.get_log("browser")  # the 401
    yield page
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []  # its policy, too


def test_two_images(page, browser, tmp_path):
    paths = [tmp_path / "first.png", tmp_path / "<img src=x onerror=alert(1)>.jpg"]
    paths[0].write_bytes(picture(1, 80, 120))
    paths[1].write_bytes(picture(2, 90, 60, "JPEG"))
    page.find("#files").send_keys("\n".join(map(str, paths)))
    page.shown("#similarity", "Cosine similarity of the summaries: ")
    similarity = float(page.find("#similarity").text.split(": ")[1])
    with Embedder(radio_fast.load(golden_source("vit_h16")), resolution=(64, 96)) as embedder:
        one, two = (embedder.submit(path).result().summary for path in paths)
    assert similarity == pytest.approx((one @ two / one.norm() / two.norm()).item(), abs=1e-4)
    maps = browser.execute_script(MAPS)
    assert [size for *size, _ in maps] == [[6, 4], [6, 4]] and all(colours > 12 for *_, colours in maps)
    cards = [card.text for card in browser.find_elements("css selector", "article")]
    assert [card.splitlines()[0] for card in cards] == [path.name for path in paths]
    assert "120 × 80 pixels" in cards[0] and "60 × 90 pixels" in cards[1]
    assert all("96 × 64 pixels" in card and re.search(r"\d ms\nServer\ndecode [\d.]+ ms, wait", card) for card in cards)
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def test_dropped_again_and_something_else(page, browser):
    def drop(*files):
        browser.execute_script(DROP, [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files])

    drop(("a.png", "image/png", picture(1)), ("b.png", "image/png", picture(1)), ("c.png", "image/png", picture(2)))
    page.shown("#similarity", ": 1.0000")
    page.shown("#error", "The first two images are shown.")
    drop(("a.png", "image/png", picture(3)), ("notes.txt", "text/plain", b"no image"))
    page.shown("#error", "notes.txt: image 0 is no readable image")
    assert not page.find("#similarity").is_displayed()
    [(width, height, colours)] = browser.execute_script(MAPS)
    assert (width, height) == (6, 4) and colours > 12
    # The browser says by itself that an answer was a 415, and that notes.txt is no picture.
    assert all("415" in line["message"] or "blob:" in line["message"] for line in browser.get_log("browser"))


def test_the_interface(browser, server):
    page = Page(browser, f"{server.url}/docs")
    page.shown("#operations", "POST /embed")
    for text in ("multipart/form-data", "Image files: JPEG", "adaptor", "429", "EmbeddingList", "prompt_tokens"):
        page.shown("#operations", text)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
