"""Ten tables as people have them: other encodings, separators, formats and languages."""

from __future__ import annotations

import gzip
import io
import random
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from table_bytes import excel, jsonl, zstd

PRAISE = {
    "de": ("sehr gut und schön", "schnell geliefert, große Freude", "würde ich wieder kaufen"),
    "fr": ("très bon et agréable à utiliser", "livré rapidement, ça marche", "je suis très content"),
    "en": ("a great product that works", "fast delivery, very happy", "would buy it again"),
    "pl": ("świetny produkt, bardzo polecam", "szybka dostawa, jestem zadowolony", "kupię to jeszcze raz, dziękuję"),
    "ru": ("отличный товар, всем советую", "быстрая доставка, очень доволен", "куплю ещё раз, спасибо"),
    "es": ("muy buen producto, estoy encantado", "entrega rápida, todo perfecto", "lo compraría otra vez mañana"),
}
BLAME = {
    "de": ("leider völlig unbrauchbar", "kam beschädigt und zu spät an", "möchte mein Geld zurück"),
    "fr": ("vraiment mauvais, à éviter", "arrivé cassé et en retard", "je veux être remboursé"),
    "en": ("a bad product that broke", "came late and damaged", "want my money back"),
    "pl": ("słaba jakość, nie polecam nikomu", "przyszło uszkodzone i za późno", "proszę o zwrot pieniędzy, żałuję"),
    "ru": ("плохой товар, никому не советую", "пришло сломанным и поздно", "хочу вернуть деньги"),
    "es": ("muy mal producto, no funciona", "llegó roto y tardó además", "quiero mi dinero, qué decepción"),
}


def texts(language: str, count: int = 120) -> list[tuple[str, bool]]:
    """(text, whether it is praise)."""
    chance = random.Random(language)
    found = []
    for number in range(count):
        good = number % 2 == 0
        parts = (PRAISE if good else BLAME)[language]
        found.append((f"{chance.choice(parts)}, {chance.choice(parts)} ({number})", good))
    return found


def lines(rows: Sequence[Sequence[Any]], mark: str) -> str:
    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if mark in text or '"' in text else text

    return "".join(mark.join(map(cell, row)) + "\r\n" for row in rows)


def _german_office(folder: Path) -> Path:
    """Semicolons, cp1252, German headers, decimal commas, labels in mixed case with blanks, a column of customers."""
    names = ("Nr.", "Datum", "Kunde", "Kommentar", "Preis (€)", "Stimmung")
    spellings = (("positiv", "Positiv", "POSITIV "), ("negativ", "Negativ", " negativ"))
    rows = [
        (i, date(2024, 1, 1) + timedelta(i), f"K{i % 17:03}", text, f"{i},50", spellings[not good][i % 3])
        for i, (text, good) in enumerate(texts("de"))
    ]
    path = folder / "Kundenumfrage 2024.csv"
    path.write_bytes(lines([names, *rows], ";").encode("cp1252"))
    return path


def _two_columns(
    path: Path, language: str, names: tuple[str, str], labels: tuple[str, str], mark: str, codec: str
) -> Path:
    """Texts and their classes. labels: of praise and of blame."""
    rows = [(text, labels[not good]) for text, good in texts(language)]
    path.write_bytes(lines([names, *rows], mark).encode(codec))
    return path


def _french_export(folder: Path) -> Path:
    """Excel's `Unicode text`: UTF-16 with tabs in a .csv, French headers."""
    names, labels = ("Avis du client", "Évaluation"), ("bon", "mauvais")
    return _two_columns(folder / "avis.csv", "fr", names, labels, "\t", "utf-16")


def _polish_windows(folder: Path) -> Path:
    """cp1250 with semicolons."""
    return _two_columns(folder / "opinie.csv", "pl", ("Treść", "Ocena"), ("dobra", "zła"), ";", "cp1250")


def _russian_tsv(folder: Path) -> Path:
    """cp1251 in a .tsv."""
    return _two_columns(folder / "отзывы.tsv", "ru", ("Отзыв", "Рекомендую"), ("да", "нет"), "\t", "cp1251")


def _excel(folder: Path) -> Path:
    """A workbook with a title above the table, dates, a formula's sheet beside it, and empty rows."""
    rows: list[Sequence[Any]] = [["Encuesta de 2024"], [], ["Fecha", "Comentario del cliente", "Valoración"]]
    for i, (text, good) in enumerate(texts("es")):
        rows.append([date(2024, 1, 1) + timedelta(i), text, "buena" if good else "mala"])
        if i % 40 == 39:
            rows.append([])
    path = folder / "encuesta.xlsx"
    path.write_bytes(excel({"Opiniones": rows, "Resumen": [["Total", "=COUNTA(Opiniones!B:B)"]]}))
    return path


def _several_labels(folder: Path) -> Path:
    """JSONL with lists of labels."""
    rows = [
        {"ticket": f"T{i}", "body": text, "tags": ["quality"] if i % 3 else ["quality", "praise" if good else "refund"]}
        for i, (text, good) in enumerate(texts("en"))
    ]
    path = folder / "tickets.jsonl"
    path.write_bytes(jsonl(rows))
    return path


def _joined_labels(folder: Path) -> Path:
    """gzip; several labels in a cell, with semicolons."""
    rows = [
        (text, "delivery" if i % 3 else f"delivery; {'praise' if good else 'refund'}")
        for i, (text, good) in enumerate(texts("en"))
    ]
    path = folder / "feedback.csv.gz"
    path.write_bytes(gzip.compress(lines([("what they wrote", "topics"), *rows], ",").encode()))
    return path


def _parquet_numbers(folder: Path) -> Path:
    """Parquet with 0.0 and 1.0 for classes, and missing ones."""
    rows = [
        {"comment_text": text, "toxic": None if i % 20 == 19 else float(not good)}
        for i, (text, good) in enumerate(texts("en"))
    ]
    path = folder / "comments.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _no_header(folder: Path) -> Path:
    """No line of column names, and numbers for classes."""
    rows = [(1 if good else 0, text) for text, good in texts("en")]
    path = folder / "reviews_raw.csv"
    path.write_bytes(lines(rows, ",").encode())
    return path


def _questions(folder: Path) -> Path:
    """zstd; questions and answers under other names, for a base that writes."""
    rows = [(f"What did customer {i} say about us?", text) for i, (text, _) in enumerate(texts("en"))]
    path = folder / "faq.csv.zst"
    path.write_bytes(zstd(lines([("Customer question", "Our reply"), *rows], ",").encode()))
    return path


MAKERS = (
    _german_office, _french_export, _polish_windows, _russian_tsv, _excel, _several_labels, _joined_labels,
    _parquet_numbers, _no_header, _questions,
)  # fmt: skip
CLASSES = {  # of those that are classified
    "_german_office": ("negativ", "positiv"), "_french_export": ("bon", "mauvais"), "_polish_windows": ("dobra", "zła"),
    "_russian_tsv": ("да", "нет"), "_excel": ("buena", "mala"), "_several_labels": ("praise", "quality", "refund"),
    "_joined_labels": ("delivery", "praise", "refund"), "_parquet_numbers": ("0", "1"), "_no_header": ("0", "1"),
}  # fmt: skip


def stdin_of(content: bytes) -> io.TextIOWrapper:
    """A stand-in of `sys.stdin` with these bytes."""
    return io.TextIOWrapper(io.BytesIO(content))
