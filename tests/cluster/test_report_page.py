"""The report page in a real browser: nothing fetched, no error, readable on desk and phone.

It stands with the cluster suite because that one may install Debian packages.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tempflow import report
from tempflow.checkpoints import open_store
from tests.cluster import foreign
from tests.cluster.build import BROWSER
from tests.unit.sdk.test_report import a_run, with_trouble

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if foreign.kubeconfig() and not Path(BROWSER).exists():
        pytest.skip("needs chromium, which is installed for our own cluster alone")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """A page of a run with a long name and many epochs."""
    run = a_run(tmp_path, name="a-run-with-a-name-of-forty-five-characters-45", epochs=150)
    with_trouble(run)
    target = tmp_path / "report.html"
    target.write_text(report.page(report.gather(open_store(str(run)))), encoding="utf-8")
    return target


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)], ids=["desk", "phone"])
def test_page_is_whole_quiet_and_fits(
    chromium: Browser, page_file: Path, width: int, height: int
) -> None:
    tab = chromium.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page_file.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert complaints == []
    # Nothing is wider than the window, and no text is too small to read.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.evaluate(
        "[...document.querySelectorAll('h1,h2,p,td,th,b,figcaption,.legend')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    charts = tab.locator("figure.chart")
    assert charts.count() >= 6
    for index in range(charts.count()):
        box = charts.nth(index).bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 150
    tab.close()
