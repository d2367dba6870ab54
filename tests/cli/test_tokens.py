"""`turret token`: a token is shown once, listed without its secret, and revoked."""

from __future__ import annotations

import json

import pytest

from turret.cli.main import run
from turret.store import Store
from turret.store.access_tokens import which


@pytest.fixture
def store(tmp_path) -> str:
    return str(tmp_path / "store")


def test_a_token_is_shown_once_alone_on_stdout(store, capsys) -> None:
    assert run(["token", "create", "reader", "--store", store]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert "\n" not in secret
    assert "shown once" in err
    found = which(Store(store).tokens.list(), secret)
    assert found is not None
    assert (found.name, found.scopes) == ("reader", ("infer",))
    assert run(["token", "list", "--store", store]) == 0
    out = capsys.readouterr().out
    assert "reader" in out
    assert secret not in out
    assert run(["token", "create", "reader", "--store", store]) == 1
    assert "a token 'reader' exists or existed" in capsys.readouterr().err


def test_scopes_and_quotas_are_kept_and_listed_for_machines(store, capsys) -> None:
    more = ["--scope", "infer", "--scope", "admin", "--requests-per-minute", "60", "--tokens-per-minute", "9000"]
    assert run(["token", "create", "boss", *more, "--store", store, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made.pop("token").startswith("turret-")
    assert run(["token", "list", "--store", store, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"store": store, "tokens": [made]}
    assert set(made) == {"name", "scopes", "created", "revoked", "requests_per_minute", "tokens_per_minute"}
    assert (made["scopes"], made["requests_per_minute"], made["tokens_per_minute"]) == (["infer", "admin"], 60, 9000)


def test_a_revoked_token_stays_listed(store, capsys) -> None:
    run(["token", "create", "reader", "--store", store])
    assert run(["token", "revoke", "reader", "--store", store]) == 0
    capsys.readouterr()
    assert run(["token", "revoke", "reader", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revoked"]
    assert run(["token", "revoke", "nobody", "--store", store]) == 1
    assert "no token named 'nobody': the store has reader" in capsys.readouterr().err


def test_what_is_said_wrongly_is_status_2(store, capsys) -> None:
    assert run(["token", "create", "a b", "--store", store]) == 2
    assert run(["token", "create", "x", "--scope", "root", "--store", store]) == 2
    assert run(["token", "list", "--store", store]) == 0
    assert "no token" in capsys.readouterr().out
