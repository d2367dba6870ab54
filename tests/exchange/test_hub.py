"""Push and pull against a stand-in of the Hub, by the real client: one commit, private, no token in any text."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from exchange.foreign import CONFIG, MANIFEST, TEXTS, WEIGHTS, contents
from exchange.hub_client import Client, Ran, client
from exchange.hub_stand_in import READ, WRITE, StandIn, stand_in
from small_disk import mounted_disk

from turret.bundles.fetch import PATIENCE
from turret.cli.main import run
from turret.errors import StoreError
from turret.workspace import Workspace

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def started() -> Iterator[StandIn]:
    with stand_in() as made:
        yield made


@pytest.fixture(scope="module")
def turret(started: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(started.url, tmp_path_factory.mktemp("hf")) as made:
        yield made


@pytest.fixture
def hub(started: StandIn) -> StandIn:
    """The Hub, empty."""
    started.repositories.clear()
    started.objects.clear()
    started.requests.clear()
    started.broken, started.silent = None, False
    return started


@pytest.fixture
def store(workspace: Workspace) -> str:
    return str(workspace.store.root)


def refused(ran: Ran) -> str:
    """The error line of a command that failed."""
    assert ran.status == 1, ran
    assert ran.out == ""
    assert ran.err.startswith("turret: ")
    assert ran.err.count("\n") == 1
    assert "bug in turret" not in ran.err
    assert WRITE not in ran.err
    assert READ not in ran.err
    return ran.err


@pytest.mark.slow
def test_push_makes_a_private_repository_that_holds_the_export_and_pull_brings_it_back(
    turret: Client, hub: StandIn, store: str, workspace: Workspace, tmp_path: Path
) -> None:
    ran = turret("push", "sentiment", "me/sentiment", "--store", store, "--json", token=WRITE)
    assert ran.status == 0, ran.err
    pushed, made = ran.json, hub.repositories["me/sentiment"]
    assert made.private
    assert pushed["private"]
    assert pushed["created"]
    assert pushed["commit"] == made.head[0]
    assert pushed["url"] == f"{hub.url}/me/sentiment"
    assert set(made.head[1]) == {WEIGHTS, CONFIG, MANIFEST, "README.md", ".gitattributes", *TOKENIZER}
    assert made.messages[-1].startswith("sentiment@1 (sha256:")
    assert len(made.commits) == 2  # the Hub's own first one, and one of turret
    workspace.export("sentiment", tmp_path / "out")
    for name, content in contents(tmp_path / "out").items():
        assert name == "README.md" or made.head[1][name] == content
    card = made.head[1]["README.md"].decode()
    assert "turret pull me/sentiment --name sentiment" in card
    assert 'PeftModel.from_pretrained(base, "me/sentiment")' in card.replace("'", '"')
    assert "FOLDER" not in card
    assert WRITE not in ran.out + ran.err + card

    elsewhere = str(tmp_path / "elsewhere")
    brought = turret("pull", "me/sentiment", "--store", elsewhere, "--json", token=READ)
    assert brought.status == 0, brought.err
    assert brought.json["version"] == "sentiment@1"
    assert brought.json["digest"] == pushed["digest"]
    assert Workspace(elsewhere).predict("sentiment", TEXTS) == workspace.predict("sentiment", TEXTS)


@pytest.mark.slow
def test_pushing_the_same_again_makes_no_commit_and_another_form_leaves_no_file_of_the_first(
    turret: Client, hub: StandIn, store: str
) -> None:
    first = turret("push", "writer", "me/writer", "--store", store, "--json", token=WRITE).json
    again = turret("push", "writer", "me/writer", "--store", store, "--json", token=WRITE).json
    assert not again["changed"]
    assert not again["created"]
    assert again["commit"] == first["commit"]
    merged = turret("push", "writer", "me/writer", "--merged", "--store", store, "--json", token=WRITE)
    assert merged.status == 0, merged.err
    found = set(hub.repositories["me/writer"].head[1])
    assert {"config.json", "model.safetensors", "README.md"} <= found
    assert not found & {WEIGHTS, CONFIG, MANIFEST}
    gguf = turret("push", "writer", "me/writer", "--gguf", "--store", store, token=WRITE)
    assert gguf.status == 0, gguf.err
    assert set(hub.repositories["me/writer"].head[1]) == {".gitattributes", "README.md", "adapter.gguf"}


def test_public_is_for_a_new_repository_and_an_old_one_keeps_what_it_is(
    turret: Client, hub: StandIn, store: str
) -> None:
    assert not turret("push", "writer", "me/open", "--public", "--store", store, "--json", token=WRITE).json["private"]
    assert not hub.repositories["me/open"].private
    ran = turret("push", "prefix", "me/open", "--store", store, token=WRITE)
    assert ran.status == 0, ran.err
    assert "a public repository" in ran.out
    assert "PEFT's generate() leaves the prefix out" in ran.out
    assert "elsewhere, pull it with --base" in ran.out


def test_a_repository_of_something_else_is_left_alone_unless_forced(turret: Client, hub: StandIn, store: str) -> None:
    turret("push", "writer", "me/thesis", "--store", store, token=WRITE)
    theirs = {"README.md": b"# My thesis\n", "thesis.tex": b"x", WEIGHTS: b"y"}
    hub.repositories["me/thesis"].add(theirs, "mine")
    assert "holds 'README.md', 'adapter_model.safetensors'" in refused(
        turret("push", "writer", "me/thesis", "--store", store, token=WRITE)
    )
    assert hub.repositories["me/thesis"].head[1] == theirs
    assert turret("push", "writer", "me/thesis", "--force", "--store", store, token=WRITE).status == 0
    assert hub.repositories["me/thesis"].head[1]["thesis.tex"] == b"x"


@pytest.mark.parametrize(
    ("hub_id", "token", "said"),
    [
        ("me/x", None, "wants a token: check the name, log in with `hf auth login` or set HF_TOKEN"),
        ("me/x", READ, "the token may not write there"),
        ("you/x", WRITE, "the token may not write there"),
        ("x", WRITE, "is no id of the Hub: expected OWNER/NAME"),
        ("../x", WRITE, "is no id of the Hub"),
    ],
)
def test_a_push_that_the_hub_refuses_is_one_line(
    hub_id: str, token: str | None, said: str, turret: Client, hub: StandIn, store: str
) -> None:
    assert said in refused(turret("push", "writer", hub_id, "--store", store, token=token))
    assert hub.repositories == {}


def test_a_pull_that_is_refused_is_one_line_and_stores_nothing(
    turret: Client, hub: StandIn, store: str, tmp_path: Path
) -> None:
    turret("push", "sentiment", "me/hidden", "--store", store, token=WRITE)
    into = ("--store", str(tmp_path / "store"))
    assert "is not there, or wants a token" in refused(turret("pull", "me/hidden", *into, token=None))
    assert "is not on the Hub" in refused(turret("pull", "me/nothing", *into, token=READ))
    assert "no such revision" in refused(turret("pull", "me/hidden", "--revision", "v9", *into, token=READ))
    turret("push", "sentiment", "me/whole", "--merged", "--store", store, token=WRITE)
    assert f"has no {WEIGHTS}" in refused(turret("pull", "me/whole", *into, token=READ))
    assert not (tmp_path / "store" / "turret.db").exists()


def test_pull_checks_what_it_fetched_as_import_does(turret: Client, hub: StandIn, store: str, tmp_path: Path) -> None:
    turret("push", "sentiment", "me/changed", "--store", store, token=WRITE)
    made = hub.repositories["me/changed"]
    files = dict(made.head[1])
    made.add({**files, CONFIG: files[CONFIG].replace(b'"r": 3', b'"r": 4')}, "changed")
    into = ("--store", str(tmp_path / "store"))
    assert "does not match the manifest" in refused(turret("pull", "me/changed", *into, token=READ))
    settings = {**json.loads(files[CONFIG]), "auto_map": {"AutoModel": "evil.Model"}}
    made.add({CONFIG: json.dumps(settings).encode(), WEIGHTS: files[WEIGHTS], "evil.py": b"raise SystemExit"}, "code")
    assert "names code" in refused(turret("pull", "me/changed", *into, token=READ))
    made.add({CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x04."}, "a pickle")
    assert f"has no {WEIGHTS}" in refused(turret("pull", "me/changed", *into, token=READ))
    assert not any("adapter_model.bin" in request for request in hub.requests)
    (old,) = [commit for commit, _ in made.commits[1:2]]
    assert turret("pull", "me/changed", "--revision", old, *into, token=READ).status == 0


def test_pull_takes_the_hub_even_if_a_folder_here_is_called_like_the_repository(
    turret: Client, hub: StandIn, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "nothing").mkdir(parents=True)
    assert "is not on the Hub" in refused(turret("pull", "me/nothing", "--store", store, token=READ))


def test_a_hub_that_is_down_gives_the_copy_in_its_cache_with_a_note_and_takes_no_push(
    turret: Client, hub: StandIn, store: str, tmp_path: Path
) -> None:
    pushed = turret("push", "sentiment", "me/cached", "--store", store, "--json", token=WRITE).json
    into = ("--store", str(tmp_path / "store"))
    assert turret("pull", "me/cached", *into, token=READ).status == 0
    hub.broken = 503
    again = turret("pull", "me/cached", *into, "--json", token=READ)
    assert again.status == 0, again.err
    assert again.json["digest"] == pushed["digest"]
    assert any("the Hub answered 503" in n and pushed["commit"] in n for n in again.json["notes"])
    assert "the Hub answered 503: try again later" in refused(turret("pull", "me/never", *into, token=READ))
    assert "the Hub answered 503: try again later" in refused(
        turret("push", "sentiment", "me/cached", "--store", store, token=WRITE)
    )


@pytest.mark.slow
def test_a_hub_that_is_silent_is_given_up_in_a_bounded_time(turret: Client, hub: StandIn, store: str) -> None:
    hub.silent = True
    started = time.monotonic()
    said = refused(turret("push", "sentiment", "me/silent", "--store", store, token=WRITE))
    assert f"did not answer for {PATIENCE:g} seconds" in said
    assert time.monotonic() - started < PATIENCE + 15


def test_a_push_on_a_full_disk_is_one_line_with_the_reason(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=8m") as disk:
        shutil.copytree(workspace.store.root, disk / "store")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 48 * 1024))
        with pytest.raises(
            StoreError, match=r"^sentiment@1 cannot be written to .*: No space left on device: .*free some space"
        ):
            Workspace(disk / "store").hub.push("sentiment", "me/x", form="merged")


def test_without_the_network_a_push_says_so_and_a_pull_too(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("push sentiment me/x", "pull me/x"):
        assert run([*command.split(), "--store", store]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it" in err
