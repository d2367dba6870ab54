"""Compare and decide in Chromium: a person clicks, real workers train, and axe-core looks at each page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from server.conftest import Running
from server.test_train_browser import signed_in_page
from small_models import save_base

from turret.engine import SamplingParams
from turret.server.settings import ServerSettings
from turret.workspace import Workspace


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
    rows = "".join(f"the {'bill' if n % 2 else 'post'} number {n},{'AB'[n % 2]}\n" for n in range(60))
    (tmp_path / "mail.csv").write_text("text,label\n" + rows)
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
    assert page.locator("section table tbody tr").count() == 3
    person.look()
    person.click("button", "Start the comparison")
    page.wait_for_url("**/comparisons/studies/**")
    page.locator("table tbody tr").nth(2).wait_for()
    person.look()
    page.locator("iframe.report, #state .problem").first.wait_for(timeout=300_000)
    assert page.locator("#state .problem").all_inner_texts() == []
    assert page.locator("#state .verdict").count() == 1
    assert page.get_by_text("finished").count() == 4, "three cells, and the comparison"
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
