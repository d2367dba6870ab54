"""Forms of the console as a browser sends them, for the tests without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

PAGES = (
    *("/adapters", "/train", "/runs", "/comparisons", "/playground", "/panels", "/experiments", "/store"),
    *("/store/tokens", "/store/usage", "/store/audit", "/store/jobs"),
)
SCRIPT = "<script>alert(1)</script>"


def form_token(client, path: str = "/adapters") -> str:
    return re.search(r'"x-form-token": "(\w+)"', client.get(path).text)[1]


def post(client, path: str, proof: str | None = None, *, site: str | None = "same-origin", **fields: str):
    headers = {"content-type": "application/x-www-form-urlencoded"} | ({"sec-fetch-site": site} if site else {})
    said = {"form_token": proof if proof is not None else form_token(client), **fields}
    return client.post(path, data=said, headers=headers)


def signed_in(running, secret: str):
    client = running.client()
    got = post(client, "/sign-in", form_token(client, "/sign-in"), token=secret)
    assert got.status_code == 303, got.text
    return client


class Fields(HTMLParser):
    """What the forms of a page would send, but for hidden fields: name -> values."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self._select, self._text = "", ""  # the field that has the text which comes next
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name, kind, value = given.get("name") or "", given.get("type"), given.get("value") or ""
        if tag == "select":
            self._select, self.found[name] = name, []
        elif tag == "textarea":
            self._text, self.found[name] = name, [""]
        elif tag == "option" and "selected" in given:
            self._text, self.found[self._select] = self._select if "value" not in given else "", [value]
        elif tag == "input" and kind not in ("hidden", "file"):
            self.found.setdefault(name, []).extend([value] if kind != "checkbox" or "checked" in given else [])

    def handle_endtag(self, tag: str) -> None:
        self._text = self._text if tag not in ("textarea", "option") else ""

    def handle_data(self, data: str) -> None:
        if self._text:
            self.found[self._text] = [data.removeprefix("\n")]
