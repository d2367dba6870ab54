"""The pictures of the console in docs/images/console, taken by Chromium from the store of `console_store.py`.

PYTHONPATH=tests python -m server.console_pictures STORE FOLDER [NAME…]    every picture, or those of these names
PYTHONPATH=tests python -m server.console_pictures STORE FOLDER --check    takes none; fails if a page has other words

The words of each page are kept beside its picture, in words.json. Numbers are left out: they differ at every training.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openpyxl
from browser import Page, browser
from server.console_store import BASE, fill, recipe

from turret import LoRA, Workspace
from turret.access import OPERATOR
from turret.server.engines import Engines
from turret.server.logs import Log
from turret.server.services import Services
from turret.store import AccessToken
from turret.workspace.job_process import TrainingWhileServing

Steps = Callable[[Page], Any]
WORDS = "words.json"  # beside the pictures
UNITS = {"ms", "s", "min", "h", "d", "days", "ago", "kB", "MB", "GB", "AM", "PM"}  # by the machine and the time of day
# What a page shows, without what a machine or a moment decides: times, places, identifiers, code, measurements.
VISIBLE = """() => {
  const copy = document.body.cloneNode(true);
  const left = "script, style, time, code, pre, svg, iframe, .mono, .when, .measured";
  copy.querySelectorAll(left).forEach(each => each.remove());
  const walker = document.createTreeWalker(copy, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) found.push(walker.currentNode.data);
  return found.join(" ");
}"""
TEXT = "The central bank kept its rate, and shares in London rose as traders had hoped."


def nothing(page: Page) -> None:
    """The page as it opens."""


def moving(page: Page) -> None:
    page.get_by_role("link", name="Promote news@1").click()
    page.get_by_label("Alias").fill("candidate")
    page.get_by_role("button", name="Promote", exact=True).click()
    page.locator("dialog .problem").wait_for()


def playing(page: Page) -> None:
    page.get_by_label("Text").fill(TEXT)
    for box in page.get_by_role("checkbox").all()[:6]:
        box.check()
    page.get_by_role("button", name="Ask").click()
    page.locator(".panel .receipt").nth(1).wait_for()


def tickets() -> bytes:
    """A workbook as an office has it: a title, then the names, then rows."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = "Tickets"
    sheet.append(["Support, October"])
    sheet.append([])
    sheet.append(["No.", "Message", "Channel", "Team"])
    words = {"Billing": "The invoice {} is wrong", "Shipping": "The parcel {} is late", "Access": "I cannot log in, {}"}
    for number in range(120):
        team = list(words)[number % 3]
        sheet.append([number, words[team].format(number), ("mail", "chat")[number // 3 % 2], team])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def sent(page: Page) -> None:
    page.get_by_label("File").set_input_files({"name": "tickets.xlsx", "mimeType": "", "buffer": tickets()})
    page.get_by_role("button", name="Send it").click()
    page.wait_for_url("**/train/recipe**")


def asking_rows(page: Page) -> None:
    page.get_by_label("File").set_input_files({"name": "tickets.xlsx", "mimeType": "", "buffer": tickets()})
    page.get_by_role("button", name="Send it").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("link", name="Download as CSV").wait_for()


def planned(page: Page) -> None:
    page.set_default_timeout(180_000)
    sent(page)
    page.get_by_role("button", name="Check the plan").click()
    page.wait_for_url("**/train/plan")


def compared(page: Page) -> None:
    page.set_default_timeout(180_000)
    sent(page)
    page.get_by_role("button", name="Compare methods").click()
    page.get_by_label("Methods").fill("base,head,lora:r=4/8")
    page.get_by_label("Baseline").fill("head")
    page.get_by_role("button", name="Check the plan").click()
    page.get_by_text("Time on one worker").wait_for()


def overlaid(page: Page) -> None:
    for box in page.get_by_role("checkbox").all()[:2]:
        box.check()
    page.get_by_role("button", name="Overlay the curves").click()
    settled(page)


def foretold(page: Page) -> None:
    page.get_by_role("button", name="What will happen?").click()
    page.get_by_role("heading", name="What will happen").wait_for()


def settled(page: Page) -> None:
    page.locator(".uplot").first.wait_for()
    page.wait_for_timeout(300)


def checked(page: Page) -> None:
    page.get_by_role("button", name="Verify all").click()
    page.locator("#checked .done").wait_for()


def unfolded(page: Page) -> None:
    page.wait_for_timeout(800)


# name -> (path, steps, phone, dark)
PICTURES: dict[str, tuple[str, Steps, bool, bool]] = {
    "adapters": ("/adapters", nothing, False, False),
    "adapter": ("/adapters/news", nothing, False, False),
    "promote": ("/adapters/news", moving, False, False),
    "version": ("/adapters/news/2", nothing, False, False),
    "train-recipe": ("/train", sent, False, False),
    "train-plan": ("/train", planned, False, False),
    "trainings": ("TRAININGS", nothing, False, False),
    "run": ("RUN", settled, False, False),
    "run-phone-dark": ("RUN", settled, True, True),
    "comparisons": ("/comparisons", nothing, False, False),
    "comparison": ("COMPARISON", unfolded, False, False),
    "comparison-plan": ("/train?then=compare", compared, False, False),
    "overlay": ("/runs", overlaid, False, False),
    "diff": ("/adapters/news/diff?first=1&second=2", nothing, False, False),
    "gates": ("/adapters/news/gates", nothing, False, False),
    "experiment-start": ("/experiments/start?name=news&candidate=news@1", foretold, False, False),
    "playground": ("/playground", playing, False, False),
    "playground-file": ("/playground?as=file", asking_rows, False, False),
    "playground-phone": ("/playground", playing, True, False),
    "experiment": ("/experiments/news/1", settled, False, False),
    "store": ("/store", checked, False, False),
    "panel": ("/panels/desk", nothing, False, False),
    "usage": ("/store/usage", settled, False, False),
    "tokens": ("/store/tokens", nothing, False, False),
    "sign-in": ("SIGN-IN", nothing, False, False),
}


@contextmanager
def serving(workspace: Workspace, slots: int = 0) -> Iterator[tuple[str, Services]]:
    """A server on the bundled base, at a free port. slots: of trainings beside its answers."""
    from turret.engine import SamplingParams
    from turret.server.app import Server, bind, url_of

    listening = bind("127.0.0.1", 0)
    with workspace.engine(BASE) as engine:
        served = Services(workspace, Engines(engine), SamplingParams, log=Log(io.StringIO()))
        served.view(OPERATOR).refresh()
        server = Server(served)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        with ExitStack() as stack:
            if slots:
                beside = TrainingWhileServing(workspace.store, [engine], slots=slots, pass_seconds=0.25, say=print)
                stack.enter_context(beside)
            yield url_of(listening), served
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def training_beside(workspace: Workspace, copy: Path) -> Iterator[str]:
    """A server on a copy of the store, as `turret serve --train` starts it: three trainings are under way."""
    shutil.copytree(workspace.store.root, copy, ignore=shutil.ignore_patterns("turret.db*"))
    with (
        closing(sqlite3.connect(workspace.store.root / "turret.db")) as own,  # it may be open: a file alone is no copy
        closing(sqlite3.connect(copy / "turret.db")) as other,
    ):
        own.backup(other)
    there = Workspace(copy)
    for name, rank in (("news-r4", 4), ("news-r8", 8), ("news-r16", 16)):
        there.queue.submit(recipe(name, LoRA(r=rank, lora_alpha=2 * rank), 400, epochs=8))
    with serving(there, slots=3) as (url, _):
        while sum(run["state"] == "running" and len(there.curve(run["id"])) > 0 for run in there.runs()) < 3:
            time.sleep(0.5)
        yield url


def words_of(page: Page) -> list[str]:
    """The different words of a page, without units and without those that have a digit."""
    words = set(re.findall(r"[\w']+", page.evaluate(VISIBLE))) - UNITS
    return sorted(word for word in words if not re.search(r"\d|_", word))


def differences(before: Mapping[str, Iterable[str]], now: Mapping[str, Iterable[str]]) -> list[str]:
    """A line for each page whose words are not those of its picture."""
    lines = []
    for name, words in now.items():
        old, new = set(before.get(name, ())), set(words)
        if old != new:
            gone, come = (", ".join(sorted(each)[:12]) or "none" for each in (old - new, new - old))
            lines.append(f"{name}: words that the picture has and the page has not: {gone}; the other way: {come}")
    return lines


def main(store: Path, folder: Path, wanted: list[str], check: bool) -> int:
    workspace = fill(store)
    newest = max((run for run in workspace.runs() if run["name"] == "news"), key=lambda run: run["id"])
    special = {
        "SIGN-IN": "/sign-in",
        "RUN": f"/runs/{newest['id']}",
        "COMPARISON": f"/comparisons/{workspace.comparisons()[0]['key']}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / WORDS
    before = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    now: dict[str, list[str]] = {}
    with (
        tempfile.TemporaryDirectory() as beside,
        serving(workspace) as (main_url, served),
        ExitStack() as stack,
        browser() as chromium,
    ):
        for name, (path, steps, phone, dark) in PICTURES.items():
            if wanted and name not in wanted:
                continue
            if path == "SIGN-IN":  # the last: a server that has seen a token stays closed
                served.guard.set_tokens([AccessToken("me", ("admin",), "", None, None, None, hash="")])
            url = main_url
            if path == "TRAININGS":
                path, url = "/runs", stack.enter_context(training_beside(workspace, Path(beside) / "store"))
            size = {"width": 390, "height": 844} if phone else {"width": 1200, "height": 760}
            page = chromium.new_page(viewport=size, color_scheme="dark" if dark else "light", device_scale_factor=1)
            page.goto(url + special.get(path, path))
            steps(page)
            now[name] = words_of(page)
            if not check:
                shown = page.evaluate("document.documentElement.scrollHeight")
                page.set_viewport_size({**size, "height": min(max(shown, 500), 760 if name == "comparison" else 1500)})
                page.wait_for_timeout(150)
                page.screenshot(path=folder / f"{name}.png")
                print(name, (folder / f"{name}.png").stat().st_size)
            page.close()
            stack.close()
    if check:
        lines = differences(before, now)
        print("\n".join(lines) or f"{len(now)} pictures have the words of their pages")
        return int(bool(lines))
    kept.write_text(json.dumps(before | now, ensure_ascii=False, indent=1, sort_keys=True) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("store", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("names", nargs="*")
    options.add_argument("--check", action="store_true")
    given = options.parse_args()
    sys.exit(main(given.store, given.folder, given.names, given.check))
