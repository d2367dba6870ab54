"""`turret token`: a token is shown once, listed without its secret, and revoked."""

from __future__ import annotations

import json
import os

import pytest

from turret.access import Access
from turret.cli.main import run
from turret.store import Store
from turret.store.access_tokens import token_with_secret


@pytest.fixture
def store(tmp_path) -> str:
    return str(tmp_path / "store")


def test_a_token_is_shown_once_alone_on_stdout(store, capsys) -> None:
    assert run(["token", "create", "reader", "--store", store]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert "\n" not in secret
    assert "shown once" in err
    found = token_with_secret(Store(store).tokens.list(), secret)
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
    keys = {"name", "scopes", "created", "revoked", "requests_per_minute", "tokens_per_minute"}
    assert set(made) == keys | {"tenant", "adapters", "bases", "expires", "former_until", "sign_in"}
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


def test_a_token_of_a_tenant_has_its_adapters_bases_and_end(store, capsys) -> None:
    more = ["--adapters", "legal-*", "--adapters", "tax", "--base", "org/base", "--expires", "90d", "--json"]
    assert run(["token", "create", "bot", "--tenant", "legal", *more, "--store", store]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["tenant"], made["adapters"], made["bases"]) == ("legal", ["legal-*", "tax"], ["org/base"])
    assert made["expires"] > made["created"]
    assert run(["token", "list", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == []
    assert run(["--tenant=legal", "token", "list", "--store", store]) == 0
    assert "legal-* tax" in capsys.readouterr().out
    assert "TURRET_TENANT" not in os.environ
    assert run(["token", "create", "x", "--adapters", "a*b", "--store", store]) == 2
    assert run(["token", "create", "x", "--expires", "soon", "--store", store]) == 2
    assert run(["token", "list", "--tenant", "No Body", "--store", store]) == 2
    assert "bad tenant 'No Body'" in capsys.readouterr().err


def test_a_rotation_prints_the_new_secret_and_says_until_when_the_one_before_lives(store, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TURRET_TENANT", "legal")
    assert run(["token", "create", "bot", "--store", store]) == 0
    first = capsys.readouterr().out.strip()
    assert run(["token", "rotate", "bot", "--overlap", "12h", "--store", store]) == 0
    out, err = capsys.readouterr()
    assert "valid until 20" in err
    known = Store(store, Access("legal")).tokens.list()
    assert token_with_secret(known, first) == token_with_secret(known, out.strip()) == known[0]
    assert run(["token", "rotate", "bot", "--overlap", "0", "--store", store]) == 0
    assert "not valid any more" in capsys.readouterr().err
    assert run(["token", "rotate", "nobody", "--store", store]) == 1
