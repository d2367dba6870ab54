"""Ten tables as strangers keep them, five that no rule was tuned on, and ten more; each maker's comment names its mess.

python tests/strange_tables.py FOLDER            writes all of them there
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import openpyxl

Phrases = Mapping[str, Sequence[str]]  # class -> what people write who mean it


@dataclass(frozen=True)
class Strange:
    """A table, and what a person would say of it.

    Args:
        input: the column of texts.
        label: the column of classes; "" if texts are answered.
        classes: that should be found, with the typos that are in the table.
        answer: what the user has to say, if anything: options of `turret init`.
        kind: of the task.
    """

    path: Path
    input: str
    label: str
    classes: tuple[str, ...]
    answer: tuple[str, ...] = ()
    kind: str = "classify"
    words: tuple[str, ...] = field(default=())  # that `init` or `plan` must say


def written(phrases: Phrases, count: int, seed: str) -> list[tuple[str, str]]:
    """(text, class) of `count` rows in an order of no meaning."""
    chance, names, rows = random.Random(seed), list(phrases), []
    for number in range(count):
        name = names[number % len(names)]
        first, second = chance.sample(list(phrases[name]), 2)
        rows.append((f"{first} {second} ({chance.randrange(1000, 9999)})", name))
    chance.shuffle(rows)
    return rows


def saved(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]], merged: Mapping[str, Sequence[str]] = {}) -> Path:
    """A workbook. merged: ranges of cells by sheet, such as `A1:F1`."""
    book = openpyxl.Workbook()
    assert book.active is not None
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
        for cells in merged.get(name, ()):
            sheet.merge_cells(cells)
    book.save(path)
    return path


def separated(path: Path, rows: Sequence[Sequence[Any]], mark: str, codec: str, end: str = "\r\n") -> Path:
    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if mark in text or '"' in text or "\n" in text else text

    path.write_bytes("".join(mark.join(map(cell, row)) + end for row in rows).encode(codec))
    return path


def day(number: int) -> datetime:
    return datetime(2025, 7, 1, 8, 30) + timedelta(hours=7 * number)


GERMAN = {
    "Rechnung": (
        "Auf der Rechnung steht ein falscher Betrag.", "Mir wurde der Posten doppelt berechnet.",
        "Bitte schicken Sie mir die Rechnung noch einmal.", "Die Mahnung ist unberechtigt, ich habe längst überwiesen.",
    ),
    "Lieferung": (
        "Das Paket ist seit einer Woche unterwegs.", "Die Lieferung kam an die falsche Adresse.",
        "Der Karton war beim Auspacken zerdrückt.", "Wann trifft meine Sendung endlich ein?",
    ),
    "Technik": (
        "Das Gerät lässt sich nicht mehr einschalten.", "Nach dem Update stürzt die App ständig ab.",
        "Ich kann mich mit meinem Passwort nicht anmelden.", "Der Drucker verbindet sich nicht mit dem WLAN.",
    ),
}  # fmt: skip
FRENCH = {
    "positif": (
        "Accueil très chaleureux, je reviendrai.", "Tout était parfait, merci à l'équipe.",
        "Un excellent conseil et un choix magnifique.", "Je suis ravie de mon achat.",
    ),
    "négatif": (
        "Attente interminable à la caisse.", "Le vendeur était désagréable et pressé.",
        "Produit cassé, et on refuse de me rembourser.", "Je suis déçu, c'est la dernière fois.",
    ),
    "neutre": (
        "Rien de particulier à signaler.", "Le magasin est correct, sans plus.",
        "C'était comme d'habitude.", "Les horaires sont les mêmes qu'avant.",
    ),
}  # fmt: skip
SPANISH = {
    "Envío": (
        "El paquete llegó tres días tarde.", "El repartidor dejó la caja en la calle.",
        "Todavía espero el envío de la semana pasada.", "La caja venía abierta y mojada.",
    ),
    "Producto": (
        "La tela se rompió al primer lavado.", "El color no es el de la foto.",
        "La talla es demasiado pequeña.", "El botón se cayó enseguida.",
    ),
    "Pago": (
        "Me cobraron dos veces con la tarjeta.", "No me aceptan el cupón de descuento.",
        "Necesito la factura de mi compra.", "El reembolso no aparece en mi cuenta.",
    ),
}  # fmt: skip
ITALIAN = {
    "Cucina": (
        "La pasta era scotta e fredda.", "Il risotto era squisito.",
        "Il pesce non era fresco.", "Un dolce davvero memorabile.",
    ),
    "Servizio": (
        "Il cameriere ci ha dimenticati.", "Personale gentile e veloce.",
        "Abbiamo aspettato un'ora per ordinare.", "Nessuno ci ha salutati all'ingresso.",
    ),
    "Locale": (
        "La sala era rumorosa e buia.", "Una terrazza bellissima sul lago.",
        "I bagni erano sporchi.", "Tavoli troppo vicini tra loro.",
    ),
}  # fmt: skip
ENGLISH = {
    "Positive": (
        "Friendly staff and a wonderful selection.", "I loved the new layout, great job.",
        "Best prices in town, very happy.", "They helped me find the perfect gift.",
    ),
    "Negative": (
        "The queue was endless and nobody cared.", "Rude cashier, I felt ignored.",
        "The shelves were empty and dirty.", "My refund was refused, awful.",
    ),
    "Mixed": (
        "Nice products, though the parking is a pain.", "Good staff but the prices went up.",
        "The cafe is fine, while the shop feels cramped.", "Helpful at the desk, slow at the till.",
    ),
}  # fmt: skip
DUTCH = {
    "Bezorging": (
        "Mijn pakket is nog steeds niet bezorgd.", "De koerier heeft niet aangebeld.",
        "De doos was kapot bij aankomst.", "De bezorging is drie keer verschoven.",
    ),
    "Betaling": (
        "Het bedrag is twee keer afgeschreven.", "Ik wil mijn geld terug op mijn rekening.",
        "De korting is niet verrekend.", "De betaling met iDEAL mislukt steeds.",
    ),
    "Website": (
        "De pagina laadt niet op mijn telefoon.", "Ik kan niet inloggen op mijn account.",
        "De knop om te bestellen doet niets.", "De zoekfunctie vindt geen enkel artikel.",
    ),
}  # fmt: skip
PORTUGUESE = {
    ("Entrega", "negativo"): (
        "A encomenda chegou atrasada e ninguém avisou.", "O carteiro deixou o pacote na chuva.",
        "Que decepção, a entrega falhou outra vez.",
    ),
    ("Entrega", "positivo"): (
        "A encomenda chegou antes do prazo, excelente.", "O carteiro foi muito simpático, obrigado.",
        "Que maravilha, a entrega foi rápida.",
    ),
    ("Preço", "negativo"): (
        "Que decepção, o preço subiu de novo.", "A promoção era mentira, paguei caro.",
        "O desconto não foi aplicado, péssimo.",
    ),
    ("Preço", "positivo"): (
        "O preço é justo, excelente promoção.", "Que maravilha de desconto, obrigado.",
        "Paguei pouco, a promoção foi rápida.",
    ),
}  # fmt: skip
POLISH = {
    "Faktura": (
        "Na fakturze jest zły numer NIP.", "Proszę o korektę faktury za maj.",
        "Nie otrzymałem faktury za zamówienie.", "Kwota na fakturze się nie zgadza.",
    ),
    "Dostawa": (
        "Przesyłka wciąż nie dotarła.", "Kurier zostawił paczkę u sąsiada.",
        "Paczka przyszła uszkodzona.", "Kiedy będzie dostawa mojego zamówienia?",
    ),
    "Reklamacja": (
        "Ekran przestał działać po tygodniu.", "Chcę zgłosić reklamację na buty.",
        "Towar jest wadliwy, proszę o wymianę.", "Pralka cieknie od pierwszego dnia.",
    ),
}  # fmt: skip
TICKETS = {
    "billing": (
        "I was charged twice for my subscription.", "Please send an invoice with our VAT number.",
        "My GPU was declined, though there is money on it.", "When will I see the refund?",
    ),
    "access": (
        "I cannot log in since this morning.", "The reset mail never arrives.",
        "Please unlock my account.", "Two-factor codes are rejected.",
    ),
    "bug": (
        "The export button does nothing.", "The page crashes when I scroll.",
        "Charts show yesterday's numbers.", "Search returns an error 500.",
    ),
}  # fmt: skip


# --- five workbooks --------------------------------------------------------------------------------------------------


def german_quarter(folder: Path) -> Strange:
    """A summary sheet first. A merged title and a blank row above the names in row 3. Dates. A channel that sorts
    before the subject and has as few values. "Rechnug" in two rows. A sum at the foot."""
    rows = written(GERMAN, 90, "de")
    lines: list[list[Any]] = [["Kundenfeedback 3. Quartal 2025"], [], []]
    lines[2] = ["Nr.", "Eingang", "Kanal", "Inhalt", "Bereich", "Bearbeiter"]
    for number, (text, topic) in enumerate(rows, 1):
        topic = "Rechnug" if topic == "Rechnung" and number < 12 else topic
        channel, clerk = ("E-Mail", "Telefon", "Filiale")[number * 7 % 3], ("MK", "TS", "AB", "JL")[number * 5 % 4]
        lines.append([number, day(number), channel, text, topic, clerk])
    lines.append(["Summe", None, None, len(rows)])
    summary = [["Übersicht"], ["Kanal", "Anzahl", "Anteil"], ["E-Mail", 30, 0.33], ["Telefon", 30, 0.33],
               ["Filiale", 30, 0.34], ["Gesamt", 90, 1]]  # fmt: skip
    path = saved(folder / "Kundenfeedback Q3.xlsx", {"Übersicht": summary, "Rohdaten": lines}, {"Rohdaten": ["A1:F1"]})
    words = ("Rohdaten", "Übersicht", "Kanal", "Rechnug")
    return Strange(path, "Inhalt", "Bereich", ("Lieferung", "Rechnug", "Rechnung", "Technik"), words=words)


def french_survey(folder: Path) -> Strange:
    """Two lines about the export, with two filled cells each. Names of groups, merged over their columns, above the
    names. A note of 1 to 5. The total at the foot, and a line about the source under it."""
    lines: list[list[Any]] = [
        ["Exporté le", date(2025, 3, 1)], ["Auteur", "Marie Dupont"], [],
        ["Visite", None, None, "Avis", None, None],
        ["Date", "Magasin", "Vendeur", "Note", "Verbatim", "Ressenti global"],
    ]  # fmt: skip
    for number, (text, feeling) in enumerate(written(FRENCH, 90, "fr")):
        note = {"positif": 5, "neutre": 3, "négatif": 1}[feeling] + (number % 4 == 0)
        lines.append([day(number).date(), ("Lyon", "Paris", "Lille")[number % 3], f"V{number % 7}", min(note, 5), text,
                      feeling])  # fmt: skip
    lines += [["Total", None, None, 271], ["Source : enquête clients, service marketing"]]
    path = saved(folder / "enquête.xlsx", {"Feuil1": lines}, {"Feuil1": ["A4:C4", "D4:F4"]})
    return Strange(path, "Verbatim", "Ressenti global", ("neutre", "négatif", "positif"), words=("Magasin",))


def spanish_months(folder: Path) -> Strange:
    """A legend first, then a sheet a month with the same columns. Priorities that nobody can tell from the text."""
    rows = written(SPANISH, 120, "es")
    legend = [["Prioridad", "Significado"], ["A", "urgente"], ["B", "normal"], ["C", "puede esperar"]]
    sheets: dict[str, list[list[Any]]] = {"Leyenda": legend}
    for month, part in (("Enero", rows[:80]), ("Febrero", rows[80:])):
        sheets[month] = [["Fecha", "Tienda", "Prioridad", "Comentario", "Categoría"]]
        for number, (text, topic) in enumerate(part):
            sheets[month].append(
                [day(number), ("Madrid", "Sevilla")[number % 2], "ABC"[number * 5 // 2 % 3], text, topic]
            )
    words = ("Enero", "Febrero", "Prioridad")
    path = saved(folder / "incidencias 2025.xlsx", sheets)
    return Strange(path, "Comentario", "Categoría", ("Envío", "Pago", "Producto"), words=words)


def italian_blocks(folder: Path) -> Strange:
    """An empty first column. A merged title. The class stands once, merged over the rows that it is for. A column
    without a name that says "sì" in some rows. "Totale" at the foot."""
    rows = sorted(written(ITALIAN, 90, "it"), key=lambda row: row[1])
    lines: list[list[Any]] = [[None, "Recensioni del ristorante"], [None, "Reparto", "Data", "Recensione", "Ospiti"]]
    merged, start = ["B1:E1"], 3
    for number, (text, topic) in enumerate(rows):
        new = not number or rows[number - 1][1] != topic
        if new and number:
            merged.append(f"B{start}:B{number + 2}")
            start = number + 3
        shown = topic if new else None
        lines.append([None, shown, day(number), text, 2 + number % 3, "sì" if number % 3 else "no"])
    merged.append(f"B{start}:B{len(rows) + 2}")
    lines.append([None, "Totale", None, None, sum(2 + number % 3 for number in range(90))])
    path = saved(folder / "recensioni.xlsx", {"Foglio1": lines}, {"Foglio1": merged})
    return Strange(path, "Recensione", "Reparto", ("Cucina", "Locale", "Servizio"))


def english_form(folder: Path) -> Strange:
    """A form's export behind a pivot table. Long questions as names. A store with three values; whether people would
    come back, which goes with the feeling. "Postive", "N/A" in three rows, a blank in others."""
    pivot = [["Store", "Answers"], ["North", 40], ["South", 30], ["Airport", 20], ["Grand Total", 90]]
    lines: list[list[Any]] = [
        ["Timestamp", "Store", "What did you like or dislike?", "Overall feeling", "Would you come back?"]
    ]
    for number, (text, feeling) in enumerate(written(ENGLISH, 120, "en")):
        back = "no" if feeling == "Negative" and number % 5 else "yes"
        shown = {7: "N/A", 33: "N/A", 58: "N/A", 20: None, 71: None}.get(number, feeling)
        if number in (4, 5, 6, 8) and feeling == "Positive":
            shown = "Postive"
        lines.append([day(number), ("North", "South", "Airport")[number * 4 % 3], text, shown, back])
    path = saved(folder / "Form responses.xlsx", {"Pivot": pivot, "Form Responses 1": lines})
    classes = ("Mixed", "N/A", "Negative", "Positive", "Postive")
    words = ("Store", "N/A", "Postive", "Form Responses 1")
    return Strange(path, lines[0][2], "Overall feeling", classes, words=words)


# --- five exports ----------------------------------------------------------------------------------------------------


def dutch_export(folder: Path) -> Strange:
    """cp1252, Excel's `sep=;`, a title and a blank row of separators above the names, a status, a total at the foot."""
    lines: list[list[Any]] = [["Export klachten 2025", "", "", "", ""], [""] * 5]
    lines.append(["Datum", "Filiaal", "Status", "Omschrijving", "Onderwerp"])
    for number, (text, topic) in enumerate(written(DUTCH, 90, "nl")):
        lines.append([f"{number % 28 + 1:02}-03-2025", ("Gent", "Delft", "Breda")[number % 3],
                      ("open", "gesloten")[number * 3 % 2], text, topic])  # fmt: skip
    lines.append(["Totaal", "", "", "90", ""])
    path = separated(folder / "klachten één.csv", [["sep=;"]], ";", "cp1252")
    rest = separated(folder / "rest", lines, ";", "cp1252")
    path.write_bytes(path.read_bytes() + rest.read_bytes())
    rest.unlink()
    return Strange(path, "Omschrijving", "Onderwerp", ("Bezorging", "Betaling", "Website"), words=("Filiaal",))


def portuguese_unicode(folder: Path) -> Strange:
    """UTF-16 with tabs, as Excel saves "Unicode text". Two columns of classes that both follow from the text: a subject
    and a feeling. Which one is meant, only the user knows."""
    lines: list[list[Any]] = [["Data", "Loja", "Mensagem", "Assunto", "Sentimento"]]
    phrases = {f"{topic}|{feeling}": texts for (topic, feeling), texts in PORTUGUESE.items()}
    for number, (text, both) in enumerate(written(phrases, 120, "pt")):
        topic, feeling = both.split("|")
        lines.append([f"{number % 28 + 1}/03/2025", ("Porto", "Braga", "Faro")[number % 3], text, topic, feeling])
    path = separated(folder / "mensagens.tsv", lines, "\t", "utf-16")
    answer = ("--label", "Sentimento")
    return Strange(path, "Mensagem", "Sentimento", ("negativo", "positivo"), answer, words=("Assunto",))


def polish_requests(folder: Path) -> Strange:
    """cp1250. A number and a branch before the text. "Fatkura" in two rows, "b/d" for no data, labels in mixed case."""
    lines: list[list[Any]] = [["Lp.", "Data", "Oddział", "Treść zgłoszenia", "Kategoria", "Uwagi"]]
    for number, (text, topic) in enumerate(written(POLISH, 96, "pl"), 1):
        shown = topic.upper() if number % 10 == 0 else topic
        shown = {5: "b/d", 44: "b/d"}.get(number, shown)
        if topic == "Faktura" and number < 10:
            shown = "Fatkura"
        lines.append([number, f"2025-02-{number % 28 + 1:02}", ("Kraków", "Łódź")[number % 2], text, shown, ""])
    path = separated(folder / "zgłoszenia.csv", lines, ",", "cp1250")
    words = ("Fatkura", "b/d", "Oddział")
    return Strange(
        path, "Treść zgłoszenia", "Kategoria", ("b/d", "Dostawa", "Faktura", "Fatkura", "Reklamacja"), words=words
    )


def broken_chats(folder: Path) -> Strange:
    """Chats of a help desk. Many begin with the assistant's greeting, some have nothing else. Three lines were cut off
    when the export stopped, and one is a list."""
    lines = []
    for number, (text, topic) in enumerate(written(TICKETS, 80, "chats")):
        reply = {"billing": "I refund it today.", "access": "I sent you a new link.", "bug": "We will mend it."}[topic]
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        if number % 4 == 0:
            turns.insert(0, {"role": "assistant", "content": "Hello, how can I help?"})
        if number % 20 == 7:
            turns = [{"role": "assistant", "content": "Hello, is anybody there?"}]
        line = json.dumps({"id": number, "messages": turns})
        lines.append({11: line[:40], 12: line[:-2], 50: line[:9], 60: "[1, 2]"}.get(number, line))
    path = folder / "helpdesk.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = ("--set", "data.bad_lines=skip")
    return Strange(path, "messages", "", (), answer, "chat", words=("4 ", "begin"))


def ticket_queue(folder: Path) -> Strange:
    """JSON Lines with a byte order mark. Six columns that look like classes: channel, language, priority, status,
    queue, assignee. A short subject beside the long body. Keys in another order on some lines."""
    lines = []
    for number, (text, queue) in enumerate(written(TICKETS, 120, "tickets")):
        row = {
            "ticket_id": f"T-{number:05}", "created_at": day(number).isoformat(),
            "channel": ("mail", "chat", "phone")[number * 5 % 3], "language": "en", "subject": f"Question {number}",
            "body": text, "priority": ("low", "high")[number * 3 // 2 % 2], "status": ("open", "closed")[number % 2],
            "queue": queue, "assignee": ("ann", "bob", "cleo", "dan")[number * 7 % 4],
        }  # fmt: skip
        lines.append(json.dumps(dict(reversed(row.items())) if number % 9 == 4 else row))
    path = folder / "tickets export.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ("\n".join(lines) + "\n").encode())
    return Strange(path, "body", "queue", ("access", "billing", "bug"), words=("priority",))


# --- five that no rule was tuned on -----------------------------------------------------------------------------------


PRACTICE = {
    "Wartezeit": (
        "Zwei Stunden im Wartezimmer trotz Termin.", "Man wartet ewig, bis man drankommt.",
        "Am Telefon hing ich zwanzig Minuten in der Schleife.", "Der Termin wurde dreimal verschoben.",
    ),
    "Personal": (
        "Die Dame am Empfang war unfreundlich.", "Das Team nimmt sich viel Zeit.",
        "Der Arzt hat kaum zugehört.", "Die Schwester war sehr einfühlsam.",
    ),
    "Räume": (
        "Die Toiletten waren schmutzig.", "Es gibt zu wenige Parkplätze vor der Praxis.",
        "Das Wartezimmer ist hell und gemütlich.", "Der Aufzug war wieder kaputt.",
    ),
}  # fmt: skip
SWEDISH = {
    "Retur": (
        "Jag vill skicka tillbaka skorna.", "Hur lämnar jag tillbaka varan?",
        "Returfraktsedeln saknas i paketet.", "Återbetalningen har inte kommit.",
    ),
    "Leverans": (
        "Paketet har inte kommit fram.", "Budet ringde aldrig på dörren.",
        "Kartongen var trasig vid leverans.", "När kommer min beställning?",
    ),
    "Konto": (
        "Jag kan inte logga in.", "Mitt lösenord fungerar inte längre.",
        "Byt e-postadress på mitt konto, tack.", "Varför är mitt konto spärrat?",
    ),
}  # fmt: skip
ISSUES = {
    "Bug": (
        "The import fails with a stack trace.", "After the update the menu is empty.",
        "Saving twice loses the second change.", 'The dialog "SamplingParams" freezes, see the log.',
    ),
    "Story": (
        "As a user I want to sort the list by date.", "As an editor I want to undo a delete.",
        "As an admin I would like to export all accounts.", "Users should be able to pick a dark theme.",
    ),
    "Task": (
        "Upgrade the build server to the new image.", "Rotate the keys of the staging cluster.",
        "Write the release notes.", "Remove the old feature flags.",
    ),
}  # fmt: skip
NEWS = {
    "Sport": (
        "L'équipe a gagné la finale aux tirs au but.", "Le coureur a battu le record du tour.",
        "La joueuse se retire après une blessure.", "Le match est reporté à cause de la neige.",
    ),
    "Économie": (
        "La banque centrale relève ses taux.", "Le chômage recule au deuxième trimestre.",
        "L'usine supprime trois cents emplois.", "Les prix de l'énergie baissent encore.",
    ),
    "Culture": (
        "Le musée ouvre une exposition sur l'art moderne.", "Son dernier roman a reçu un prix.",
        "Le festival de cinéma a dévoilé sa sélection.", "Une pièce oubliée revient au théâtre.",
    ),
}  # fmt: skip


def german_practice(folder: Path) -> Strange:
    """A hidden sheet of lists first. A row of counts above the names. Names with line breaks in them. A column of
    internal remarks that is nearly empty. "Wartezeti" in some rows. An average at the end, and the date of the
    export."""
    rows = written(PRACTICE, 90, "practice")
    lists = [["Wochentage", "Themen"], ["Mo", "Wartezeit"], ["Di", "Personal"], ["Mi", "Räume"]]
    lines: list[list[Any]] = [[None, 90, 90, 88, 90, 90, 3]]
    lines.append(["Nr", "Wochen-\ntag", "Versicherung", "Alter", "Was möchten Sie uns sagen?\n(Freitext)",
                  "Haupt-\nthema", "Notiz intern"])  # fmt: skip
    for number, (text, topic) in enumerate(rows, 1):
        topic = "Wartezeti" if topic == "Wartezeit" and number < 9 else topic
        age = None if number in (4, 9) else 18 + number * 13 % 70
        lines.append([number, ("Mo", "Di", "Mi", "Do", "Fr")[number % 5], ("gesetzlich", "privat")[number * 2 // 3 % 2],
                      age, text, topic, "Rückruf" if number in (7, 30, 61) else None])  # fmt: skip
    lines += [["Mittelwert", None, None, 47.2], [], ["Stand: 02.10.2025"]]
    book = saved(folder / "Patientenbefragung.xlsx", {"_listen": lists, "Antworten": lines})
    opened = openpyxl.load_workbook(book)
    opened["_listen"].sheet_state = "hidden"
    opened.active = opened["Antworten"]
    opened.save(book)
    classes = tuple(sorted({row[5] for row in lines[2:-3]}))
    return Strange(book, lines[1][4], lines[1][5], classes, words=("Wartezeti",))


def swedish_desk(folder: Path) -> Strange:
    """A language that no list of names knows. A title in row 2, and beside the table a legend with names of its own.
    A sum at the foot in words."""
    lines: list[list[Any]] = [[], ["Kundtjänst, ärenden i oktober"], []]
    lines.append(["Ärendenr", "Inkom", "Butik", "Meddelande", "Ärendetyp", "Prio", None, "Kod", "Betydelse"])
    legend = [["1", "brådskande"], ["2", "normal"], ["3", "kan vänta"]]
    for number, (text, topic) in enumerate(written(SWEDISH, 90, "sv"), 1):
        row = [1000 + number, day(number), ("Malmö", "Umeå")[number % 2], text, topic, number * 5 % 3 + 1]
        lines.append(row + ([None, *legend[number - 1]] if number <= 3 else []))
    lines.append(["Summa ärenden", None, None, 90])
    return Strange(saved(folder / "ärenden.xlsx", {"Blad1": lines}), "Meddelande", "Ärendetyp", tuple(SWEDISH))


def tracker_export(folder: Path) -> Strange:
    """An issue tracker's export: 22 columns, some of one name, descriptions of several lines with quotes, many columns
    of classes, most of them nearly constant or empty."""
    names = ["Summary", "Issue key", "Issue id", "Issue Type", "Status", "Project key", "Priority", "Resolution",
             "Assignee", "Reporter", "Created", "Updated", "Affects Version/s", "Component/s", "Labels", "Labels",
             "Description", "Environment", "Votes", "Sprint", "Comment", "Comment"]  # fmt: skip
    lines: list[list[Any]] = [names]
    for number, (text, kind) in enumerate(written(ISSUES, 96, "issues")):
        person = ("ann", "bob", "cleo")[number * 7 % 3]
        lines.append([
            f"Item {number}", f"AB-{number}", 40000 + number, kind, ("Open", "Done", "Waiting")[number * 5 % 3], "AB",
            ("Major", "Minor")[number * 3 // 2 % 2], "", person, "dora", f"2025-0{number % 9 + 1}-11 10:00",
            f"2025-1{number % 3}-02 09:00", f"1.{number % 4}", ("ui", "core")[number % 2], "", "", f"{text}\n\nThanks!",
            "", 0, f"Sprint {number % 6}", f"{person}: looked at it" if number % 3 else "", "",
        ])  # fmt: skip
    path = separated(folder / "issues.csv", lines, ",", "utf-8", "\n")
    return Strange(path, "Description", "Issue Type", ("Bug", "Story", "Task"))


def annotated_news(folder: Path) -> Strange:
    """JSON Lines of an annotation tool: a list of one label for each text, an empty list where nobody annotated yet,
    and a list of comments that is always empty. In French."""
    lines = []
    for number, (text, topic) in enumerate(written(NEWS, 90, "news")):
        label = [] if number in (3, 40) else [topic]
        lines.append(json.dumps({"id": number, "text": text, "label": label, "Comments": []}, ensure_ascii=False))
    path = folder / "all.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Strange(path, "text", "label", tuple(sorted(NEWS)))


def spanish_poll(folder: Path) -> Strange:
    """Semicolons, decimal commas, questions as names, a weekday. Under the table an average, and two lines of the
    report that are no rows of it: they have one field."""
    names = ["Fecha", "Día", "Sucursal", "Nota (0-10)", "¿Qué podemos mejorar?", "Motivo principal", "¿Volvería?"]
    lines: list[list[Any]] = [names]
    for number, (text, topic) in enumerate(written(SPANISH, 96, "poll")):
        lines.append([f"{number % 28 + 1:02}/10/2025", ("lunes", "martes", "viernes")[number % 3],
                      ("Centro", "Norte")[number * 3 // 2 % 2], f"{number * 7 % 10},5", text, topic,
                      ("sí", "no")[number * 5 // 3 % 2]])  # fmt: skip
    lines.append(["Promedio", "", "", "5,1", "", "", ""])
    path = separated(folder / "encuesta octubre.csv", [*lines, ["Fin del informe"], ["Registros: 96"]], ";", "utf-8")
    answer = ("--set", "data.bad_lines=skip")
    return Strange(path, names[4], names[5], ("Envío", "Pago", "Producto"), answer)


# --- ten more, each with a mess that the others do not have -----------------------------------------------------------


JAPANESE = {
    "配送": (
        "荷物がまだ届いていません。", "配達の時間を変更したいです。", "届いた箱がつぶれていました。",
        "追跡番号が間違っているようです。",
    ),
    "支払い": (
        "カードで二重に請求されました。", "領収書を再発行してください。", "返金はいつになりますか。",
        "クーポンの割引が適用されません。",
    ),
    "商品": (
        "電源を入れても動きません。", "色が写真と違います。", "サイズが合わないので交換したいです。",
        "部品が一つ足りません。",
    ),
}  # fmt: skip
RUSSIAN = {
    "Связь": (
        "Интернет пропадает каждый вечер.", "Не могу дозвониться, связь обрывается.",
        "Скорость намного ниже обещанной.", "В деревне совсем нет сигнала.",
    ),
    "Оплата": (
        "С меня дважды списали абонентскую плату.", "Пополнил счёт, а деньги не пришли.",
        "Почему подорожал мой тариф?", "Верните деньги за подписку.",
    ),
    "Оборудование": (
        "Роутер перегревается и выключается.", "Пульт от приставки не работает.",
        "Мастер не пришёл менять модем.", "Приставка не видит телевизор.",
    ),
}  # fmt: skip
ARABIC = {
    "المواعيد": (
        "انتظرت ساعتين رغم وجود موعد.", "لا أستطيع حجز موعد عبر التطبيق.",
        "تم تأجيل الموعد دون إخباري.", "أريد تغيير وقت الزيارة.",
    ),
    "الفواتير": (
        "المبلغ في الفاتورة غير صحيح.", "دفعت مرتين عن نفس الفحص.",
        "التأمين لم يغط التكلفة.", "أحتاج نسخة من الفاتورة.",
    ),
    "الطاقم": (
        "الممرضة كانت لطيفة جدا.", "موظف الاستقبال لم يكن مهذبا.",
        "الطبيب شرح لي كل شيء بصبر.", "لم يستمع إلي أحد.",
    ),
}  # fmt: skip
COUNCIL = {
    1: (
        "There is a deep pothole in front of the school.", "The pavement is broken and my mother fell.",
        "Please repaint the crossing on Mill Lane.", "The kerb has collapsed after the frost.",
    ),
    2: (
        "Our bins were not emptied again.", "Somebody dumped an old sofa in the lay-by.",
        "The recycling lorry left glass everywhere.", "We need a bigger garden waste container.",
    ),
    3: (
        "The street lamp outside number 9 flickers.", "It is pitch dark on the path to the station.",
        "Lights stay on the whole day in the park.", "The new lamps shine into our bedroom.",
    ),
}  # fmt: skip
TURKISH = {
    "İletişim": (
        "Yöneticim benimle hiç konuşmuyordu.", "Toplantılarda kimse kimseyi dinlemiyor.",
        "Kararlar bize hep en son söyleniyor.", "Geri bildirim almak imkânsızdı.",
    ),
    "Ücret": (
        "Maaşım üç yıldır aynı kaldı.", "Başka bir firma daha iyi ücret önerdi.",
        "Primler söz verildiği gibi ödenmedi.", "Yol parası artık yetmiyor.",
    ),
    "Çalışma saatleri": (
        "Her hafta sonu mesaiye çağrıldım.", "Vardiyalar son anda değişiyordu.",
        "Gece çalışmak sağlığımı bozdu.", "Çocuğumu okuldan alamıyordum.",
    ),
}  # fmt: skip
STUDENTS = {
    "Teaching": (
        "The lectures were clear and well paced.", "The professor skipped half of the proofs.",
        "Seminars felt like a second lecture.", "Great examples on the board every week.",
    ),
    "Workload": (
        "Three assignments in one week were too many.", "The reading list is far too long.",
        "I had no time left for my other courses.", "Deadlines collided with the exams.",
    ),
    "Facilities": (
        "The room was cold and the projector broken.", "There are not enough sockets in the library.",
        "The lab computers take ages to start.", "Please repair the chairs in hall B.",
    ),
}  # fmt: skip
CHINESE = {
    "物流": (
        "快递太慢了，等了十天才到。", "包装破了，东西都洒出来了。", "快递员没有打电话就走了。", "物流信息一直不更新。",
    ),
    "质量": (
        "用了两天就坏了。", "布料很薄，一洗就掉色。", "做工粗糙，线头很多。", "屏幕上有划痕。",
    ),
    "服务": (
        "客服半天不回消息。", "退款申请被拒绝了三次。", "客服态度很好，很快解决了。", "答应的赠品没有给我。",
    ),
}  # fmt: skip
CZECH = {
    "Doprava": (
        "Balík dorazil o týden později.", "Kurýr nezazvonil a odjel.",
        "Zásilka byla promočená.", "Kde je moje objednávka?",
    ),
    "Platba": (
        "Peníze mi strhli dvakrát.", "Faktura má špatné IČO.",
        "Slevový kód nefunguje.", "Kdy dostanu peníze zpět?",
    ),
    "Zboží": (
        'Monitor 27" má vadný pixel.', 'Přišla police 19" místo 24".',
        "Boty jsou o číslo menší.", "Konvice teče u dna.",
    ),
}  # fmt: skip
KOREAN = {
    "배송": (
        "택배가 아직 도착하지 않았어요.", "배송지를 잘못 적었습니다.", "상자가 찢어진 채로 왔어요.", "언제 출고되나요?",
    ),
    "결제": (
        "카드가 두 번 결제되었습니다.", "환불이 아직 안 들어왔어요.", "쿠폰 할인이 적용되지 않아요.",
        "영수증을 보내 주세요.",
    ),
    "계정": (
        "비밀번호를 잊어버렸어요.", "로그인이 계속 실패합니다.", "회원 탈퇴는 어떻게 하나요?",
        "인증 메일이 오지 않아요.",
    ),
}  # fmt: skip


def japanese_inquiries(folder: Path) -> Strange:
    """Japanese, without blanks between words. A cover sheet of prose and a sheet of counts first. Names of two blocks
    ("期間", "作成者") above the table; under its names a row that says the kind of each column. A total at the foot."""
    lines: list[list[Any]] = [
        ["期間", "2025/04/01〜2025/06/30"],
        ["作成者", "佐藤"],
        [],
        ["番号", "受付日", "店舗", "お問い合わせ内容", "区分", "対応状況"],
        ["(数値)", "(日付)", "(選択)", "(自由記述)", "(選択)", "(選択)"],
    ]
    for number, (text, topic) in enumerate(written(JAPANESE, 90, "ja"), 1):
        lines.append(
            [
                number,
                day(number),
                ("東京", "大阪", "福岡")[number * 7 % 3],
                text,
                topic,
                ("完了", "対応中")[number * 5 // 3 % 2],
            ]
        )
    lines.append(["合計", None, None, 90])
    cover = [["お問い合わせ一覧"], [], ["本書は社外秘です。取り扱いに注意してください。"]]
    counts = [["区分", "件数"], ["配送", 30], ["支払い", 30], ["商品", 30]]
    path = saved(folder / "お問い合わせ一覧.xlsx", {"表紙": cover, "集計": counts, "明細": lines})
    return Strange(path, "お問い合わせ内容", "区分", tuple(JAPANESE), words=("明細",))


def russian_hotline(folder: Path) -> Strange:
    """The names again at the top of every printed page, and a subtotal below each month, in the middle of the table.
    `#N/A` where a lookup of the topic failed. A region and an operator beside the topic."""
    names = ["№", "Дата", "Регион", "Оператор", "Обращение", "Тема", "Минут"]
    lines: list[list[Any]] = [["Горячая линия, журнал обращений"], [], names]
    for number, (text, topic) in enumerate(written(RUSSIAN, 96, "ru"), 1):
        shown = "#N/A" if number in (11, 47, 80) else topic
        lines.append(
            [
                number,
                day(number),
                ("Тверь", "Казань", "Омск")[number * 4 % 3],
                f"оп. {number * 5 % 4}",
                text,
                shown,
                number % 9 + 1,
            ]
        )
        if number % 32 == 0:
            lines.append(
                [f"Итого за {('январь', 'февраль', 'март')[number // 32 - 1]}", None, None, None, None, None, 160]
            )
            if number < 96:
                lines.append(names)
    lines.append(["Всего", None, None, None, None, None, 480])
    path = saved(folder / "журнал.xlsx", {"Лист1": lines})
    return Strange(path, "Обращение", "Тема", tuple(RUSSIAN), words=("Регион",))


def arabic_clinic(folder: Path) -> Strange:
    """Right to left, with Arabic digits as texts. Marks of direction, no-break and trailing blanks in the names and in
    some labels: the same label looks the same and differs. A branch and a status beside the topic."""
    lines: list[list[Any]] = [["\u200fاستبيان المرضى"], []]
    lines.append(["الرقم", "التاريخ\u00a0", "الفرع", "\u200fملاحظات المريض", "الموضوع ", "الحالة"])
    digits = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
    for number, (text, topic) in enumerate(written(ARABIC, 90, "ar"), 1):
        shown = {0: f"\u200f{topic}", 1: f"{topic} ", 2: f"{topic}\u00a0"}.get(number % 9, topic)
        lines.append(
            [
                str(number).translate(digits),
                day(number),
                ("الرياض", "جدة")[number * 3 // 2 % 2],
                text,
                shown,
                ("مغلق", "مفتوح", "جديد")[number * 7 % 3],
            ]
        )
    lines.append(["المجموع", None, None, "90".translate(digits)])
    path = saved(folder / "استبيان.xlsx", {"ورقة1": lines})
    book = openpyxl.load_workbook(path)
    book["ورقة1"].sheet_view.rightToLeft = True
    book.save(path)
    return Strange(path, "ملاحظات المريض", "الموضوع", tuple(ARABIC), words=("الفرع",))


def english_codes(folder: Path) -> Strange:
    """Classes are numbers, explained in a sheet of codes; region, severity and score are numbers too. A table of counts
    with names of its own above the data, in the same sheet. Filtered: most rows are hidden."""
    lines: list[list[Any]] = [["Region", "Reports"], [1, 24], [2, 24], [3, 24], [4, 24], []]
    lines.append(["Ref", "Received", "Region", "Resident's report", "Topic", "Severity", "Score"])
    for number, (text, topic) in enumerate(written({str(k): v for k, v in COUNCIL.items()}, 96, "council"), 1):
        lines.append(
            [
                f"C{number:04}",
                day(number),
                number * 7 % 4 + 1,
                text,
                int(topic),
                number * 5 // 3 % 3 + 1,
                number * 11 % 10 / 2,
            ]
        )
    codes = [["Code", "Topic"], [1, "Roads"], [2, "Waste"], [3, "Lighting"]]
    path = saved(folder / "Reports by residents.xlsx", {"Data": lines, "Codes": codes})
    book = openpyxl.load_workbook(path)
    sheet = book["Data"]
    sheet.auto_filter.ref = f"A7:G{len(lines)}"
    for number in range(8, len(lines) - 10):
        sheet.row_dimensions[number].hidden = number % 3 > 0
    book.save(path)
    return Strange(path, "Resident's report", "Topic", ("1", "2", "3"), words=("Severity",))


def turkish_exit(folder: Path) -> Strange:
    """Two columns of free text, the second of wishes that say nothing of the reason. Stars behind names of required
    questions. The dotted I in capitals and small. Carriage returns as `_x000D_`, dashes for no date, footnotes."""
    lines: list[list[Any]] = [
        ["Sicil", "Çıkış tarihi", "Departman", "Neden ayrılıyorsunuz?*", "Önerileriniz", "Ana neden*", "Kıdem (yıl)"]
    ]
    wishes = (
        "Yemekler daha çeşitli olsun.",
        "Servis saatleri değişsin.",
        "Teşekkür ederim.",
        "Başarılar dilerim herkese.",
    )
    for number, (text, reason) in enumerate(written(TURKISH, 96, "tr"), 1):
        shown = reason.replace("i", "İ").upper() if number % 12 == 0 else reason
        lines.append(
            [
                f"S-{number:03}",
                "—" if number % 10 == 3 else day(number),
                ("Üretim", "Depo", "Ofis")[number * 7 % 3],
                text.replace(". ", "._x000D_\n", 1),
                wishes[number * 5 % 4],
                shown,
                number % 12,
            ]
        )
    lines += [[], ["* Zorunlu alan"], ["Hazırlayan: İnsan Kaynakları"]]
    path = saved(folder / "çıkış görüşmeleri.xlsx", {"Sayfa1": lines})
    return Strange(path, "Neden ayrılıyorsunuz?*", "Ana neden*", tuple(TURKISH), words=("Departman",))


def survey_service(folder: Path) -> Strange:
    """An export of a survey service: names such as Q4 in row 1, the questions in row 2, identifiers as JSON in row 3.
    Columns of the service (status, progress, language) and two other questions with choices."""
    names = [
        "StartDate",
        "Status",
        "Progress",
        "Duration (in seconds)",
        "ResponseId",
        "UserLanguage",
        "Q1",
        "Q2",
        "Q4",
        "Q5",
    ]
    questions = [
        "Start Date",
        "Response Type",
        "Progress",
        "Duration (in seconds)",
        "Response ID",
        "User Language",
        "What is your year of study?",
        "Would you recommend the course?",
        "Please tell us in your own words\nwhat we should know.",
        "Which topic is your comment about?",
    ]
    lines: list[list[Any]] = [
        names,
        questions,
        [json.dumps({"ImportId": f"QID{place}"}) for place in range(len(names))],
    ]
    for number, (text, topic) in enumerate(written(STUDENTS, 96, "students"), 1):
        lines.append(
            [
                day(number),
                "IP Address",
                100,
                60 + number * 7 % 300,
                f"R_{number * 7919:x}",
                "EN",
                ("First", "Second", "Third")[number * 7 % 3],
                ("Yes", "No", "Not sure")[number * 5 // 2 % 3],
                text,
                topic,
            ]
        )
    path = separated(folder / "Course+evaluation_November.csv", lines, ",", "utf-8-sig", "\n")
    return Strange(path, "Q4", "Q5", ("Facilities", "Teaching", "Workload"))


def chinese_orders(folder: Path) -> Strange:
    """GB 18030. Lines that begin with # above and below the table. Numbers of orders with a tab in front, so that Excel
    keeps their digits. Blanks around names. A shop, a channel and the kind of the complaint."""
    lines: list[list[Any]] = [["订单号", " 下单时间", "店铺 ", "渠道", "评价内容 ", "问题类型", "金额(元)"]]
    for number, (text, kind) in enumerate(written(CHINESE, 96, "zh"), 1):
        lines.append(
            [
                f"\t20250{number:012}",
                day(number),
                ("旗舰店", "专卖店")[number * 3 // 2 % 2],
                ("小程序", "网页", "门店")[number * 7 % 3],
                text,
                kind,
                f"{number * 37 % 900}.50",
            ]
        )
    path = separated(folder / "评价导出.csv", lines, ",", "gb18030")
    before = "#评价明细查询\r\n#起始时间：[2025-07-01 00:00:00]\r\n#-----------列表开始-----------\r\n"
    after = "#-----------列表结束-----------\r\n#导出时间：[2025-10-01 08:00:00]\r\n"
    path.write_bytes(before.encode("gb18030") + path.read_bytes() + after.encode("gb18030"))
    return Strange(path, "评价内容", "问题类型", tuple(CHINESE), words=("渠道",))


def nested_issues(folder: Path) -> Strange:
    """JSON as an interface answers it: the rows are a list below a key, beside counts; their cells are objects in
    objects, some of them null, and a list of labels that is often empty."""
    issues = []
    for number, (text, kind) in enumerate(written(ISSUES, 96, "nested"), 1):
        fields = {
            "summary": f"Item {number}",
            "description": text,
            "issuetype": {"id": str(len(kind)), "name": kind},
            "status": {"name": ("Open", "Done")[number * 3 // 2 % 2]},
            "priority": None if number % 11 == 0 else {"name": ("Major", "Minor", "Trivial")[number * 7 % 3]},
            "labels": ["ui"] if number % 5 == 0 else [],
        }
        issues.append({"id": str(10000 + number), "key": f"AB-{number}", "fields": fields})
    path = folder / "search results.json"
    path.write_text(json.dumps({"startAt": 0, "total": 96, "issues": issues}, indent=1), encoding="utf-8")
    return Strange(path, "fields.description", "fields.issuetype.name", ("Bug", "Story", "Task"))


def czech_pipes(folder: Path) -> Strange:
    """cp1250 with pipes. The nameless index of a data frame in front. Inch marks that are no quotes. Lines end with LF
    or CRLF, and one is empty. "-" for no topic, "Doparva" in some rows, a shop and a state beside it."""
    out = ["|datum|prodejna|zpráva|téma|stav"]
    for number, (text, topic) in enumerate(written(CZECH, 96, "cs")):
        shown = {13: "-", 37: "-", 70: "-"}.get(number, topic)
        if topic == "Doprava" and number < 9:
            shown = "Doparva"
        shop, state = ("Brno", "Plzeň", "Praha")[number * 7 % 3], ("nový", "vyřízeno")[number * 5 // 3 % 2]
        out.append(f"{number}|{number % 28 + 1}. 3. 2025|{shop}|{text}|{shown}|{state}")
    out.insert(50, "")
    path = folder / "dotazy.csv"
    path.write_bytes("".join(line + ("\r\n" if place % 7 else "\n") for place, line in enumerate(out)).encode("cp1250"))
    classes = ("-", "Doparva", "Doprava", "Platba", "Zboží")
    return Strange(path, "zpráva", "téma", classes, words=("Doparva", "prodejna"))


def korean_shared(folder: Path) -> Strange:
    """JSON Lines from a data frame: the class as a number and as a word, NaN where there is none, a column of splits,
    keys that are missing on some lines, and escapes for every letter."""
    lines = []
    for number, (text, topic) in enumerate(written(KOREAN, 96, "ko")):
        row: dict[str, Any] = {
            "text": text,
            "label": list(KOREAN).index(topic),
            "label_text": topic,
            "split": ("train", "train", "test")[number * 7 % 3],
            "score": number * 13 % 10 / 10,
        }
        if number in (8, 60):
            row |= {"label": float("nan"), "label_text": None}
        if number % 17 == 4:
            del row["score"]
        lines.append(json.dumps(row))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Strange(path, "text", "label_text", tuple(sorted(KOREAN)))


WORKBOOKS = (german_quarter, french_survey, spanish_months, italian_blocks, english_form)
EXPORTS = (dutch_export, portuguese_unicode, polish_requests, broken_chats, ticket_queue)
TUNED: tuple[Callable[[Path], Strange], ...] = (*WORKBOOKS, *EXPORTS)
HELD_OUT: tuple[Callable[[Path], Strange], ...] = (
    german_practice, swedish_desk, tracker_export, annotated_news, spanish_poll,
)  # fmt: skip
MORE_WORKBOOKS = (japanese_inquiries, russian_hotline, arabic_clinic, english_codes, turkish_exit)
MORE_EXPORTS = (survey_service, chinese_orders, nested_issues, czech_pipes, korean_shared)
MORE: tuple[Callable[[Path], Strange], ...] = (*MORE_WORKBOOKS, *MORE_EXPORTS)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for make in (*TUNED, *HELD_OUT, *MORE):
        print(make(folder).path)


if __name__ == "__main__":
    main()
