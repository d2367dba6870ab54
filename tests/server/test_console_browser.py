"""The console in Chromium: a user's path through each page, by mouse and keyboard, on a desktop and a phone.

A test fails if one of its pages sends a request to another host or writes an error to its console.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Browser, Page, browser, expect
from server.conftest import SEEDS, Running
from server.console_forms import PAGES
from server.console_pictures import PICTURES, WORDS, differences, words_of
from server.echo import FINGERPRINT, LABELS, Echo
from server.test_playground import TOOLS, real
from simulated_comparison import made
from store.bundles import tensors, write_bundle

from turret.compare.report import write_report
from turret.compare.results import Confusions, Coverage, Details, Reliability, RunReport
from turret.data import TextPair
from turret.errors import NotFound
from turret.recipe import Recipe
from turret.server.services import ServerSettings
from turret.tasks import Mistake
from turret.tasks.calibration import Bin
from turret.train.curve import Curve, StepRecord
from turret.workspace import Workspace

PHONE = {"width": 360, "height": 760}
Open = Callable[..., Page]
__all__ = ["real"]  # a fixture


ASKED = TextPair("A <b>long</b> text.", "Another one.")
REPORTED = {
    "classify": Details(
        tuple(Mistake(row, "A text about money.", "sport", "money", 0.0, 0.9, "0.90") for row in range(9)),
        "classify",
        Confusions(LABELS, ((7, 1, 0), (0, 4, 2), (1, 0, 9))),
        {"": Reliability(0.05, (Bin(0.8, 0.9, 5, 0.86, 0.8), Bin(0.9, 1.0, 7, 0.97, 1.0)), 0.1, 1.4, 60)},
        Coverage(0.9, 0.92, 0.8, 0.97, 1.2),
    ),
    "generate": Details((Mistake(0, ASKED, "a tale", "another tale that is longer " * 9, 0.1),), "generate"),
}


def filled(folder: Path) -> Workspace:
    """Two versions of `news`, `tale` that generates, a training, a comparison, an experiment with outcomes."""
    workspace = Workspace(folder / "store")
    for accuracy in (0.91, 0.52):
        put(workspace, folder, "news", "classify", accuracy)
    put(workspace, folder, "tale", "generate", 0.7)
    workspace.promote("news@1", "production")
    workspace.gate("news", "production", add=["accuracy>=0.8"])
    report = workspace.store.root / "comparisons" / "news-0123456789"
    report.mkdir(parents=True)
    write_report(made("full,lora", seeds=2, count=60), report, lambda path, text: path.write_text(text, "utf-8"))
    live, draw = workspace.experiment("news"), random.Random(3)
    live.start(["news@2"], steps=[0.3, 0.5], guards=None)
    for number in range(120):
        live.assign(f"u{number}")
    live.outcomes((None, f"u{number}", draw.randint(0, 1)) for number in range(120))
    return workspace


def put(workspace: Workspace, folder: Path, name: str, kind: str, accuracy: float) -> None:
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": kind, "labels": list(LABELS)}}
    bundle = write_bundle(folder / "bundles", tensors(next(SEEDS)), said=said)
    run = workspace.store.new_run(name, f'name = "{name}"', "sha256:x")
    workspace.store.training_runs().write_report(run, RunReport.of("test", 12, REPORTED[kind]).to_json())
    metrics = {"test": {"accuracy": accuracy, "loss": 0.4}}
    workspace.store.put(name, bundle, run=run, metrics=metrics, result=lambda version: {"metrics": metrics})


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    workspace = filled(tmp_path_factory.mktemp("console"))
    made = Running(workspace, Echo(workspace.store, load_seconds=0.02), ServerSettings())
    yield made.start()
    made.stop()


class Watched:
    """The requests and the console messages of the pages of one test."""

    def __init__(self, url: str) -> None:
        self.url, self.asked, self.complaints = url, set[str](), list[str]()
        self.expected = ["status of 409"]  # of a refusal that a test causes: Chromium logs each

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(each in message.text for each in self.expected):
            self.complaints.append(message.text)

    def check(self) -> None:
        assert self.complaints == []
        ours = urlsplit(self.url).netloc
        assert [each for each in self.asked if urlsplit(each).netloc not in (ours, "") or each.startswith("ws")] == []


@pytest.fixture
def opened(chromium: Browser, running: Running) -> Iterator[Open]:
    """`opened("/adapters", phone=True)`: a page, watched until the test ends."""
    watched = Watched(running.url)
    contexts = []

    def opened(
        path: str, *, phone: bool = False, url: str = running.url, expected: tuple[str, ...] = (), **settings: Any
    ) -> Page:
        size = PHONE if phone else {"width": 1200, "height": 800}
        contexts.append(chromium.new_context(viewport=size, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        watched.url = url
        watched.expected += expected
        watched.watch(page)
        page.goto(url + path)
        return page

    yield opened
    for each in contexts:
        each.close()
    watched.check()


def run_of(workspace: Workspace) -> Any:
    """A running training, with a curve of some steps."""
    run = workspace.store.new_run("news", 'name = "news"\n[train]\nepochs = 3\n', "sha256:x")
    curve = Curve(run.curve)
    for number in range(1, 21):
        curve.append(step(number))
    return run, curve


def step(number: int) -> StepRecord:
    metrics = {"accuracy": 0.5 + number / 100, "loss": 1.0} if number % 10 == 0 else None
    split = "test" if metrics else None
    return StepRecord(number, 40, number / 20, 2 / number, 1e-3, 1.0, 8, 500, 0.1, 5e3, 10**8, metrics, split)


# --- every page -------------------------------------------------------------------------------------------------------

EVERY = (
    *PAGES,
    *("/adapters/news", "/adapters/news/1", "/adapters/news/move/promote?version=1", "/experiments/news/1"),
    *("/comparisons/news-0123456789", "/experiments/news/1/do/ramp", "/adapters/none"),
)


@pytest.mark.slow
@pytest.mark.parametrize("phone", [False, True], ids=["desktop, light", "phone, dark"])
def test_axe_finds_nothing_on_any_page_and_none_is_wider_than_the_screen(opened: Open, phone: bool) -> None:
    page = opened("/", phone=phone, color_scheme="dark" if phone else "light", expected=("status of 404",))
    for path in EVERY:
        page.goto(page.url.partition("/")[0] + "//" + urlsplit(page.url).netloc + path)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{path}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


CUT = """() => [...document.querySelectorAll("main :is(input, select)")].filter((each) => {
  const style = getComputedStyle(each), pen = document.createElement("canvas").getContext("2d");
  pen.font = style.font;
  const room = each.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  return each.clientWidth && pen.measureText(each.placeholder || each.selectedOptions?.[0]?.text || "").width > room;
}).map((each) => each.name)"""


def test_on_a_phone_no_field_is_cut_off_and_a_box_to_tick_is_no_circle(opened: Open) -> None:
    page = opened("/experiments/start", phone=True)
    assert page.evaluate(CUT) == []
    box = page.get_by_role("checkbox").first
    assert box.evaluate("each => parseFloat(getComputedStyle(each).borderRadius) < each.clientWidth / 4")
    page.goto(page.url.replace("/experiments/start", "/adapters/news/move/promote"))
    assert page.evaluate(CUT) == []


@pytest.mark.slow
def test_a_token_is_made_rotated_and_revoked_by_keyboard_and_mouse(opened: Open, serve) -> None:
    page = opened("/store", url=serve().url)  # a server of its own: the first token closes it
    page.get_by_role("link", name="Tokens").click()
    page.get_by_label("Name").fill("team")
    page.get_by_label("admin: everything of its tenant").check()
    page.get_by_label("Lives for").fill("1d")
    page.keyboard.press("Enter")
    secret = page.locator(".done code").inner_text()
    assert secret.startswith("turret-")
    page.goto(urlsplit(page.url)._replace(path="/sign-in", query="").geturl())
    page.get_by_label("Token").fill(secret)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Store").click()
    page.get_by_role("link", name="Tokens").click()
    page.get_by_role("link", name="New secret… of team").click()
    page.get_by_role("button", name="New secret").click()
    assert page.locator(".done code").inner_text() != secret
    page.get_by_role("link", name="Audit log").click()
    page.locator("tbody tr").nth(1).wait_for()
    page.get_by_role("link", name="Tokens").click()
    page.get_by_role("link", name="Revoke… of team").click()
    page.locator("dialog").get_by_text("It is the token that you are signed in with.").wait_for()
    page.get_by_role("button", name="Revoke").click()
    page.get_by_label("Token").wait_for()  # it has ended the session


# --- a path through each page ----------------------------------------------------------------------------------------


def test_from_the_list_to_a_version_and_back(opened: Open) -> None:
    page = opened("/")
    assert page.title() == "Adapters · Turret"
    page.get_by_role("link", name="news", exact=True).click()
    expect(page.get_by_role("heading", name="news", exact=True)).to_be_visible()
    page.locator("table").get_by_role("link", name="news@2", exact=True).click()
    page.wait_for_url("**/adapters/news/2")
    expect(page.get_by_text("52.0%")).to_be_visible()
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("No problem in news@2").wait_for()
    page.go_back()
    page.wait_for_url("**/adapters/news")
    page.go_back()
    page.wait_for_url("**/adapters")


@pytest.mark.slow
def test_a_gate_refuses_in_the_dialog_and_what_passes_moves_the_alias(opened: Open, running: Running) -> None:
    page = opened("/adapters/news", expected=("status of 404",))
    page.get_by_role("link", name="Promote news@2").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_label("Version").input_value() == "2"
    dialog.get_by_role("button", name="Promote").click()
    dialog.get_by_role("alert").wait_for()
    assert "test.accuracy>=0.8 is required, found 0.52" in dialog.get_by_role("alert").inner_text()
    assert str(running.workspace.resolve("news")) == "news@1"
    dialog.get_by_label("Alias").fill("candidate")
    dialog.get_by_role("button", name="Promote").click()
    page.get_by_role("status").wait_for()
    assert page.get_by_role("status").inner_text() == "candidate names news@2 now."
    page.locator("#rollback-candidate").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    page.get_by_role("dialog").get_by_role("alert").wait_for()  # the alias named nothing before
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.slow
def test_curves_grow_while_a_run_trains(opened: Open, running: Running) -> None:
    run, curve = run_of(running.workspace)
    page = opened("/runs")
    page.get_by_role("link", name=run.id[-6:]).click()
    page.locator(".uplot").nth(3).wait_for()
    page.get_by_text("step 20 of 40").wait_for()
    for number in range(21, 31):
        curve.append(step(number))
    page.get_by_text("step 30 of 40").wait_for()
    running.workspace.store.end_run(
        run,
        "finished",
        result={
            "version": "news@1",
            "metrics": {"test": {"accuracy": 0.91}},
            "timing": {"train_seconds": 3.2, "examples_per_second": 80.0, "tokens_per_second": 5e3},
            "memory": {"peak_bytes": 3 * 10**8, "above_base_bytes": 10**8, "predicted_bytes": None},
            "parameters": {"trainable": 1000, "stored": 1000, "total": 100_000},
        },
    )
    page.get_by_text("finished").wait_for()
    legends = " ".join(each.inner_text() for each in page.locator(".u-legend").all())
    assert "–" not in legends  # without a cursor, the newest values
    assert re.search(r"step\W*30\D", legends)
    assert re.search(r"accuracy, test\W*80\.0%", legends)
    expect(page.get_by_text("91.0%")).to_be_visible()
    expect(page.get_by_text("1.0k of 100k parameters")).to_be_visible()
    page.get_by_text("Recipe").click()
    expect(page.get_by_text("epochs = 3")).to_be_visible()


@pytest.mark.slow
def test_a_run_that_waits_has_no_charts_and_one_that_ended_says_what_it_lacks(opened: Open, running: Running) -> None:
    recipe = 'name = "news"\nbase = "org/base"\n[data]\nsource = "org/data"\n'
    waiting = running.workspace.queue.submit(Recipe.from_toml(recipe))
    page = opened(f"/runs/{waiting['id']}")
    page.get_by_text("at place 1 of the 1 trainings that wait").wait_for()
    assert not page.locator(".plots").is_visible()
    running.workspace.queue.cancel(waiting["id"])
    page.get_by_text("no evaluation was made during the training").wait_for()
    expect(page.get_by_text("no step was made")).to_have_count(3)


def test_a_report_opens_in_the_page_as_tall_as_it_is(opened: Open) -> None:
    page = opened("/comparisons")
    page.get_by_role("heading").get_by_role("link").click()
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", level=1).wait_for()
    page.wait_for_function("document.querySelector('iframe').clientHeight > 900")
    page.go_back()
    page.wait_for_url("**/comparisons")


def test_one_text_goes_to_several_versions_side_by_side(opened: Open, running: Running) -> None:
    with suppress(NotFound):
        running.engine.unload("news@2")
    page = opened("/playground")
    page.get_by_label("Text").fill("a text of five words")
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.get_by_label("Text").press("Control+Enter")
    page.locator(".panel .receipt").nth(3).wait_for()
    expect(page.locator(".panel")).to_have_count(4)  # the bare base generates too
    assert "to load" in page.locator(".panel", has_text="news@2").inner_text()
    written = page.locator(".panel", has_text="tale@1")
    assert "a text of five words" in written.locator(".written").inner_text()
    assert "First word" in written.inner_text()
    page.get_by_role("button", name="Ask").click()
    page.locator(".panel", has_text="news@2").get_by_text("in memory already").wait_for()


def test_a_text_that_cannot_be_asked_is_told_in_place(opened: Open) -> None:
    page = opened("/playground?model=none@1")
    page.evaluate("document.querySelectorAll('[name=model]').forEach((each) => (each.checked = each.value == 'echo'))")
    page.evaluate("document.querySelector('[name=model]:checked').value = 'none@1'")
    page.get_by_label("Text").fill("x")
    page.get_by_role("button", name="Ask").click()
    page.locator(".panel [role=alert]").wait_for()
    assert "no adapter named" in page.locator(".panel [role=alert]").inner_text()


@pytest.mark.slow
def test_a_streamed_answer_is_stopped_and_the_chat_goes_on_after_it(opened: Open, serve) -> None:
    slow = serve(pace=0.4)
    page = opened("/playground?as=chat", url=slow.url, expected=("status of 400",))  # its base has no chat template
    page.get_by_label("Your turn").fill("one two three four five six seven eight")
    page.get_by_role("button", name="Send").click()
    page.locator("output.written", has_text="one").wait_for()
    page.get_by_label("Your turn").fill("nine")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Wait for the answers").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop").wait_for(state="detached")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn").nth(2).wait_for()
    said = page.locator(".turn").nth(1).inner_text()
    assert "one" in said
    assert "eight" not in said
    assert len(slow.engine.cancelled) == 1
    page.close()  # it still asks, and its server stops before the pages of a test are closed


def faults(page: Page) -> list[str]:
    """What axe-core finds, and whether the page is wider than the screen."""
    found = Axe().run(page).response["violations"]
    lines = [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]
    fits = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return lines if fits else [*lines, "wider than the screen"]


@pytest.mark.slow
def test_a_chat_goes_on_and_a_link_and_the_history_bring_it_back(opened: Open, real: Running) -> None:
    """With a decoder that answers. In the dark, then on a phone."""
    permissions = ["clipboard-read", "clipboard-write"]
    page = opened(
        "/playground?as=chat&model=a@1&model=base", url=real.url, permissions=permissions, color_scheme="dark"
    )
    page.set_default_timeout(120_000)
    page.get_by_text("Settings of generated texts").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Show the probability").check()
    page.get_by_label("Your turn").fill("one two")
    page.get_by_label("Your turn").press("Control+Enter")
    page.locator(".panel .receipt").nth(1).wait_for()
    assert page.locator(".panel output.written").first.locator(".token[title*='%']").count() > 9
    assert faults(page) == []
    assert page.get_by_label("Your turn").input_value() == ""
    page.get_by_label("Your turn").fill("three")
    page.get_by_role("button", name="Send").press("Enter")
    page.locator(".panel .turn").nth(5).wait_for()
    page.locator(".panel .receipt").nth(1).wait_for()
    page.get_by_label("Your turn").fill("four")
    page.get_by_role("button", name="Copy a link").click()
    page.get_by_role("button", name="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert "seed=7" in link
    assert "form_token" not in link
    assert "?as=chat#" in link, "no server sees what stands behind it"
    page.locator(".panel details").first.get_by_text("As code").click()
    page.get_by_role("button", name="Copy", exact=True).first.click()
    page.get_by_role("button", name="Copied").nth(1).wait_for()
    assert "/v1/chat/completions" in page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.set_viewport_size(PHONE)
    page.goto(link)
    page.locator(".panel .turn").nth(7).wait_for()
    assert (page.get_by_label("Your turn").input_value(), page.get_by_label("Seed").input_value()) == ("four", "7")
    assert page.locator("[data-stream]").count() == 0, "a link asks nothing"
    page.get_by_text("Asked before").click()
    page.get_by_text("Tools").click()
    assert faults(page) == []
    assert page.locator("[data-history] a").all_inner_texts() == ["three", "one two"]
    page.get_by_role("link", name="one two").click()
    page.wait_for_function("document.getElementById('text').value === 'one two'")
    page.goto(f"{real.url}/playground?as=chat&model=base")
    page.get_by_text("Tools").click()
    page.get_by_label("Definitions").fill(json.dumps(TOOLS))
    page.get_by_label("Call one").select_option("required")
    page.get_by_label("Your turn").fill("how is it?")
    page.get_by_role("button", name="Send").click()
    page.get_by_label("Result of weather").fill("mild")
    assert faults(page) == []
    page.get_by_label("Call one").select_option("none")
    page.get_by_role("button", name="Send the result").click()
    page.locator(".turn.tool").wait_for()
    page.locator(".panel .receipt").wait_for()
    page.get_by_role("link", name="A file").click()
    table = {"name": "a.csv", "mimeType": "", "buffer": b"no,text\n1,the film\n2,a cup\n"}
    page.get_by_label("File").set_input_files(table)
    page.get_by_role("button", name="Send it").click()
    page.get_by_role("button", name="Ask", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as CSV").click()
    with download.value.path().open(encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    assert (download.value.suggested_filename, head, len(rows)) == ("answers.csv", ["no", "text", "a@1"], 2)
    assert faults(page) == []
    page.get_by_text("Asked before").click()
    page.get_by_role("button", name="Clear the history").click()
    assert page.evaluate("localStorage.length") == 0
    expect(page.locator("[data-history]")).to_be_hidden()


@pytest.mark.slow
def test_an_experiment_is_read_ramped_and_ended(opened: Open, running: Running) -> None:
    page = opened("/experiments")
    page.get_by_role("link", name="news#1").click()
    page.locator(".uplot").nth(1).wait_for()
    expect(page.get_by_text("no problem found")).to_be_visible()
    page.get_by_role("link", name="Ramp to 50%").click()
    page.get_by_role("dialog").get_by_role("button", name="Ramp").click()
    page.get_by_text("ramped:").wait_for()
    assert running.workspace.experiment("news").status().experiment.weights["candidate"] == pytest.approx(0.5)
    page.get_by_role("link", name="Promote…").click()
    page.get_by_role("dialog").get_by_role("button", name="Promote and end").click()
    page.get_by_role("dialog").get_by_role("alert").wait_for()  # the gate
    page.get_by_role("link", name="Cancel").click()
    page.get_by_role("link", name="Roll back…").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back and end").click()
    page.get_by_text("ended", exact=True).wait_for()
    expect(page.get_by_role("link", name="Ramp")).to_have_count(0)


def test_the_store_is_checked_and_traffic_moves(opened: Open, running: Running) -> None:
    page = opened("/store")
    page.get_by_role("button", name="Verify all").click()
    page.get_by_text("No problem in the store").wait_for()
    page.get_by_role("button", name="What would gc remove?").click()
    page.get_by_text("A gc would remove").wait_for()
    for _ in range(3):
        running.client().post("/v1/classify", json={"model": "news@1", "input": "x"})
    page.locator("#traffic").get_by_role("cell", name="news@1", exact=True).first.wait_for()


def test_a_server_that_has_gone_is_told(opened: Open) -> None:
    page = opened("/adapters/news/1", expected=("htmx:afterRequest", "htmx:sendError", "ERR_FAILED"))
    page.route("**/verify", lambda route: route.abort())
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("The server does not answer").wait_for()


# --- keyboard and phone ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_can_be_reached_by_keyboard_and_the_focus_is_seen(opened: Open) -> None:
    page = opened("/adapters")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Train from a table"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "news"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url("**/adapters/news")
    page.locator("#promote").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    assert page.evaluate("document.activeElement.name") == "version"
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement == document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "promote"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_is_wider_than_a_phone(opened: Open, running: Running, dark: bool) -> None:
    run = running.workspace.runs()[0]["id"] if running.workspace.runs() else run_of(running.workspace)[0].id
    paths = ["/adapters", "/adapters/news", "/adapters/news/1", "/adapters/news/move/promote", "/runs", f"/runs/{run}"]
    paths += ["/comparisons", "/comparisons/news-0123456789", "/playground", "/experiments", "/experiments/news/1"]
    page = opened("/store", phone=True, color_scheme="dark" if dark else "light")
    for path in ["/store", *paths]:
        page.goto(running.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((each) => each.type != 'hidden'"
        assert page.evaluate(unnamed + " && !each.labels.length && !each.ariaLabel).length") == 0, path
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
    assert ("20, 23, 27" in page.evaluate("getComputedStyle(document.documentElement).backgroundColor") + shade) == dark


# --- signing in ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signing_in_and_out(opened: Open, chromium: Browser, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "store")
    _, secret = workspace.tokens.create("boss", ["admin"])
    guarded = Running(workspace, Echo(workspace.store), ServerSettings()).start()
    try:
        page = opened("/runs", url=guarded.url)
        page.wait_for_url("**/sign-in?next=%2Fruns")
        page.keyboard.type(secret)  # the field has the focus
        page.keyboard.press("Enter")
        page.wait_for_url("**/runs")
        (kept,) = page.context.cookies()
        assert (kept["httpOnly"], kept["sameSite"], kept["path"]) == (True, "Strict", "/")
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/sign-in")
        assert page.context.cookies() == []
        page.goto(guarded.url + "/runs")
        page.wait_for_url("**/sign-in**")
    finally:
        guarded.stop()


def test_a_page_of_another_site_changes_nothing(opened: Open, running: Running) -> None:
    """A form on a page of another origin posts to this server, in a real browser."""
    page = opened("/adapters")
    proof = page.evaluate("JSON.parse(document.body.getAttribute('hx-headers'))['x-form-token']")
    action = f"{running.url}/adapters/news/move/promote"
    form = f"<form method=post action={action}><input name=version value=1><input name=alias value=stolen>"
    other = page.context.new_page()
    other.route("http://other.test/", lambda route: route.fulfill(
        content_type="text/html", body=f"{form}<input name=form_token value={proof}><button>Win</button></form>"
    ))  # fmt: skip
    other.goto("http://other.test/")
    other.get_by_role("button").click()
    other.get_by_text("a page of another site sent this").wait_for()
    assert "stolen" not in running.workspace.resolve("news@1").aliases


# --- the pictures of the documentation -------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_word_on_a_page_than_on_its_picture_is_noticed_and_another_number_is_not(opened: Open) -> None:
    before = {"adapters": words_of(opened("/adapters"))}
    assert len(before["adapters"]) > 10
    page = opened("/adapters")
    page.evaluate("document.querySelector('h1').append(' 17')")
    assert differences(before, {"adapters": words_of(page)}) == []
    page.evaluate("document.querySelector('h1').append(' rephrased')")
    assert "the other way: rephrased" in differences(before, {"adapters": words_of(page)})[0]


def test_every_picture_of_the_console_has_its_words_and_is_shown_on_a_page() -> None:
    docs = Path(__file__).parents[2] / "docs"
    folder = docs / "images" / "console"
    assert set(json.loads((folder / WORDS).read_text("utf-8"))) == set(PICTURES)
    assert {path.stem for path in folder.glob("*.png")} == set(PICTURES)
    page = (docs / "howto" / "console.md").read_text("utf-8")
    assert set(re.findall(r"images/console/([\w-]+)\.png", page)) == set(PICTURES)


def test_the_numbers_by_class_fit_a_phone(opened: Open) -> None:
    """With the style sheet's own rules for phones; the control takes them away."""
    page = opened("/adapters/news/1", phone=True)
    numbers = "".join(f"<td class=n>{each}</td>" for each in ("100.0%", "82.9%", "90.7%", "41"))
    head = "".join(f"<th class=n>{each}</th>" for each in ("precision", "recall", "F1", "examples"))
    page.evaluate(
        "html => document.querySelector('main').insertAdjacentHTML('beforeend', html)",
        "<section class=card><div class=scroll id=probe><table class=plain>"
        f"<thead><tr><th>class</th>{head}</tr></thead><tbody><tr><td>entertainment</td>{numbers}</tr></tbody></table></div></section>",
    )
    wider = "document.querySelector('#probe').scrollWidth - document.querySelector('#probe').clientWidth"
    assert page.evaluate(wider) <= 1
    page.evaluate("document.querySelectorAll('#probe th, #probe td').forEach(each => each.style.padding = '9px 12px')")
    assert page.evaluate(wider) > 1
