"""Forms of the console as a browser sends them, for the tests without a browser."""

from __future__ import annotations

import re

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
