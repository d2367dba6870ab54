"""The documentation as pages: the build is strict, search finds, a missing page helps, a phone shows whole lines."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import browser

ROOT = Path(__file__).parents[1]
WIDE = ("measured/", "reference/commands/", "reference/api/", "tutorials/live/", "howto/add-a-family/", "")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None and "CI" not in os.environ,
    reason="mkdocs and mkdocstrings are not installed: run `make setup`",
)


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_search_knows_every_page(site: Path) -> None:
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    assert {"" if page == "." else f"{page}/" for page in pages} == found


@pytest.mark.slow
def test_the_site_has_llms_txt_with_links_to_its_pages(site: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert "howto/write-programs/" in links
    assert [link for link in links if not (site / link / "index.html").is_file()] == []


@pytest.mark.slow
def test_a_missing_page_says_where_to_start(site: Path) -> None:
    text = (site / "404.html").read_text()
    assert "This page does not exist" in text
    assert "/tutorials/classifier/" in text


@pytest.mark.slow
def test_a_dead_link_or_anchor_fails_the_build(tmp_path: Path) -> None:
    for folder in ("docs", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "images"))
    shutil.copytree(ROOT / "docs/images", tmp_path / "docs/images")
    (tmp_path / "release").mkdir()
    for file in ("mkdocs.yml", "llms.txt", "release/site_llms.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    page = tmp_path / "docs" / "index.md"
    for link in ("howto/nowhere.md", "howto/serve.md#no-such-heading"):
        page.write_text(f"# Turret\n\n[a link]({link})\n")
        done = build(tmp_path, tmp_path / "site")
        assert done.returncode != 0
        assert link.partition("#")[2] or link in done.stderr


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone_and_search_finds(address: str) -> None:
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 390, "height": 844})
        elsewhere: list[str] = []
        page.on("request", lambda request: None if request.url.startswith(address) else elsewhere.append(request.url))
        for path in WIDE:
            page.goto(f"{address}/{path}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(address)
        page.get_by_role("textbox", name="Search").fill("rollback")
        page.locator(".md-search-result__item").first.wait_for()
        assert "rollback" in page.locator(".md-search-result__list").inner_text().lower()
        assert elsewhere == []
