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
from turret.data.dataset import read_inputs
from turret.errors import LINE, DataError
from turret.recipe import Data
from turret.tasks.classify import Classify

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


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jsonl", '{"text": "a"}\n'), ("t.json", '[{"text": "a"}]'), ("t.csv", "text,n\na,1\n"), ("t.txt", "a\n")],
)
def test_a_byte_order_mark_is_no_letter_in_an_encoding_that_is_named(
    codec: str, name: str, content: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(f"\ufeff{content}".encode(codec))
    assert read_inputs(Data(source=str(path), encoding=codec, text="text"), Classify.schema()) == ["a"]


def test_an_unknown_encoding_of_a_text_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"data\.encoding 'utf-9' is unknown"):
        read_inputs(Data(source=str(tmp_path / "t.txt"), encoding="utf-9"), Classify.schema())


@pytest.mark.parametrize(
    ("text", "codecs"),
    [
        ("Na fakturze jest zły numer, a paczka wciąż nie dotarła; proszę o zwrot pieniędzy", "cp1250 iso8859_2"),
        ("Balík dorazil o týden později, kurýr nezazvonil a zásilka byla promočená", "cp1250 iso8859_2 cp852"),
        ("Az ügyfélszolgálat nem válaszol őszintén, később érkezett a csomag, mint ígérték", "cp1250 iso8859_2"),
        ("Yöneticim benimle hiç konuşmuyordu, maaşım üç yıldır aynı kaldı ve çıkış görüşmesi", "cp1254"),
        ("Prekė dar neatvyko, ačiū už greitą pristatymą; kodėl taip ilgai užtruko grąžinimas", "cp1257"),
        ("Пополнил счёт, а деньги не пришли; почему подорожал мой тариф", "cp1251 koi8_r"),
        ("快递太慢了，等了十天才到，客服半天不回消息，退款申请被拒绝了三次", "gb18030"),
        ("荷物がまだ届いていません。カードで二重に請求されました。", "cp932 euc_jp"),
    ],
)
def test_letters_of_many_languages_come_out_right_in_the_encodings_of_offices(
    text: str, codecs: str, tmp_path: Path
) -> None:
    words = text.split()
    texts = [
        (" ".join(words[number % len(words) :] + words[: number % len(words)]), "ab"[number % 2])
        for number in range(12)
    ]
    for codec in codecs.split():
        path = tmp_path / f"{codec}.csv"
        path.write_bytes("".join(f"{a}|{b}\r\n" for a, b in [("text", "label"), *texts]).encode(codec))
        data = load(path)
        assert {example.input for example in (*data.train, *data.test)} <= {each for each, _ in texts}, codec
