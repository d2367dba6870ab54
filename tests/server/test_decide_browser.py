"""Compare and decide in Chromium: a person clicks, real workers train, and axe-core looks at each page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, expect
from server.conftest import Running
from server.test_decide_pages import trained
from server.test_train_browser import signed_in_page
from small_models import save_base
from workspace.test_other_machine import until

from turret.engine import SamplingParams
from turret.server.services import ServerSettings
from turret.workspace import Workspace

MAIL = "text,label\n" + "".join(f"the {'bill' if n % 2 else 'post'} number {n},{'AB'[n % 2]}\n" for n in range(60))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server, and a worker of its store."""
    base, workspace = save_base("bert", tmp_path / "small-bert"), Workspace(tmp_path / "store")
    command = [sys.executable, "-m", "turret", "worker", "--store", str(tmp_path / "store")]
    with workspace.engine(str(base)) as engine:
        made = Running(workspace, engine, ServerSettings(), SamplingParams).start()
        workspace.tokens  # noqa: B018  makes the store
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
        yield made
        worker.terminate()
        worker.wait(100)
        made.stop()


@pytest.mark.slow
def test_a_comparison_from_a_table_to_its_verdict(chromium: Browser, running: Running, tmp_path: Path) -> None:
    (tmp_path / "mail.csv").write_text(MAIL)
    person = signed_in_page(chromium, running.url, None, phone=False, dark=False)
    page = person.page
    page.goto(f"{running.url}/comparisons")
    person.look()
    person.click("link", "Start a comparison")
    person.look()
    person.choose(tmp_path / "mail.csv")
    person.click("button", "Send it")
    page.wait_for_url("**/train/recipe**")
    person.look()
    person.click("button", "Compare methods")
    page.wait_for_url("**/comparisons/start/compare")
    page.get_by_label("Methods").fill("base,lora,head")
    page.get_by_label("Baseline").fill("lora")
    page.get_by_label("Seeds").fill("1")
    person.look()
    person.click("button", "Check the plan")
    page.get_by_text("Time on one worker").wait_for()
    expect(page.locator("section table tbody tr")).to_have_count(3)
    person.look()
    person.click("button", "Start the comparison")
    page.wait_for_url("**/comparisons/studies/**")
    page.locator("table tbody tr").nth(2).wait_for()
    person.look()
    page.locator("iframe.report, #state .problem").first.wait_for(timeout=300_000)
    assert page.locator("#state .problem").all_inner_texts() == []
    expect(page.locator("#state .verdict")).to_have_count(1)
    expect(page.get_by_text("finished")).to_have_count(4)  # three cells, and the comparison
    person.look()
    page.goto(f"{running.url}/comparisons")
    person.look()
    person.check()
    for phone, dark in ((True, False), (False, True)):
        other = signed_in_page(chromium, running.url, None, phone=phone, dark=dark)
        other.page.goto(page.url)
        other.look()
        other.page.get_by_role("link", name="mail", exact=True).click()
        other.page.wait_for_url("**/comparisons/studies/**")
        other.look()
        other.page.close()
    page.close()


@pytest.mark.slow
def test_a_promise_on_a_table_and_on_what_the_training_held_out(chromium: Browser, running: Running) -> None:
    client = running.client()
    base = client.get("/api/status").json()["base"]["id"]
    recipe = f'name = "own"\nbase = "{base}"\n[data]\nsource = "mail.csv"\n'
    assert client.post("/api/runs", json={"recipe": recipe, "files": {"mail.csv": MAIL}}).status_code == 200
    table = client.post("/v1/files", files={"file": ("mail.csv", MAIL)}, data={"purpose": "fine-tune"}).json()["id"]
    until(lambda: running.workspace.runs()[0]["state"] == "finished", 300)
    person = signed_in_page(chromium, running.url, None, phone=False, dark=False)
    page = person.page
    for source in (table, ""):
        page.goto(f"{running.url}/adapters/own/1")
        person.click("link", "Promise…")
        page.get_by_label("Wrong at most").fill("50%")
        page.get_by_label("Confidence").fill("60%")
        page.get_by_label("Labelled examples").fill(source)
        person.click("button", "What will happen?")
        page.get_by_role("heading", name="What will happen").wait_for()
        person.look()
        person.click("button", "Make the promise")
        page.locator("#promise, .problem").first.wait_for()
        assert page.locator(".problem").all_inner_texts() == []
        assert "at most 50%" in page.locator("#promise").inner_text()
        person.look()
    person.check()
    page.close()


@pytest.mark.slow
def test_every_form_has_names_for_screen_readers_and_fits_a_phone(chromium: Browser, serve, workspace, put) -> None:
    for accuracy in (0.8, 0.95):
        put("a", accuracy=accuracy)
    workspace.promote("a@1", "production")
    workspace.gate("a", "production", add=["accuracy>=0.9"])
    runs = [trained(workspace, name, [0.9, 0.4]) for name in ("low", "high")]
    running = serve()
    for phone, dark in ((False, False), (True, True)):
        person = signed_in_page(chromium, running.url, None, phone=phone, dark=dark)
        page = person.page
        for path in (
            "/experiments/start?name=a&candidate=a@2",
            "/adapters/a/gates",
            "/adapters/a/1/promise",
            "/adapters/a",
        ):
            page.goto(running.url + path)
            person.look()
        person.click("button", "Show the difference")
        page.wait_for_url("**/diff**")
        person.look()
        page.goto(f"{running.url}/runs")
        for run in runs:
            page.get_by_role("checkbox", name=run[-6:]).check()
        person.look()
        person.click("button", "Overlay the curves")
        page.locator(".uplot").nth(1).wait_for()
        person.look()
        person.check()
        page.close()


@pytest.mark.slow
def test_an_experiment_starts_by_keyboard(chromium: Browser, serve, workspace, put) -> None:
    for accuracy in (0.8, 0.95):
        put("a", accuracy=accuracy)
    workspace.promote("a@1", "production")
    running = serve()
    person = signed_in_page(chromium, running.url, None, phone=False, dark=False)
    page = person.page
    page.goto(f"{running.url}/experiments/start?name=a&candidate=a@2")
    page.get_by_role("button", name="What will happen?").press("Enter")
    page.get_by_text("a@2 answers 5% of the users").wait_for()
    person.look()
    page.get_by_role("button", name="Start the experiment").press("Enter")
    page.wait_for_url("**/experiments/a/1")
    person.check()
    assert workspace.experiments()[0]["state"] == "running"
    page.close()
