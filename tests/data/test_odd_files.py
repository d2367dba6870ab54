"""Damaged and odd files are read as they are, or refused with one line whose remedy works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from odd_files import Odd, odd_files
from small_tables import load
from table_bytes import GERMAN, POLISH, RUSSIAN, csv

from turret.data import Dataset
from turret.errors import LINE, DataError

ODD = odd_files()


def read(path: Path, settings: dict[str, Any]) -> Dataset:
    data = {key: value for key, value in settings.items() if key not in ("kind", "multi_label")}
    return load(path, settings.get("kind"), multi_label=settings.get("multi_label", False), **data)


def test_there_are_many_odd_files_and_each_says_why() -> None:
    assert len({each.name for each in ODD}) == len(ODD) >= 40
    assert all(each.reason for each in ODD)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_an_odd_file_is_read_or_its_remedy_works(odd: Odd, tmp_path: Path) -> None:
    path = tmp_path / odd.name
    path.write_bytes(odd.content)
    settings = dict(odd.settings)
    if odd.said is not None:
        with pytest.raises(DataError, match=odd.said) as caught:
            read(path, settings)
        line = str(caught.value)
        assert line.isprintable()
        assert len(line) <= LINE - len("turret: ")
        if odd.final:
            assert "a later version will have" in line
            return
        assert odd.remedy or odd.renamed or odd.repaired
        settings |= odd.remedy
        if odd.renamed:
            path = path.rename(path.with_name(odd.renamed))
        if odd.repaired:
            path.write_bytes(odd.repaired)
    data = read(path, settings)
    assert len(data.train) + len(data.test) >= 11
    if odd.note is not None:
        assert any(re.search(odd.note, note) for note in data.notes), data.notes


def test_letters_come_out_right_whatever_the_encoding(tmp_path: Path) -> None:
    for texts, codec in ((GERMAN, "cp1252"), (POLISH, "cp1250"), (RUSSIAN, "cp1251"), (GERMAN, "utf-16")):
        path = tmp_path / f"{codec}.csv"
        path.write_bytes(csv(texts).encode(codec))
        data = load(path)
        read_texts = {example.input for example in (*data.train, *data.test)}
        assert f"{texts[0][0]} 0" in read_texts
        assert set(data.labels) == {label for _, label in texts}
