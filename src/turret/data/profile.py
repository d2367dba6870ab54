"""Looks at the first rows of a table: which columns hold texts, classes or lists, and what to train on them.

A label is chosen by its name and by how well a quick naive Bayes predicts it from the text.
"""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from turret.data import cells
from turret.data.columns import (
    COMPLETED,
    LABELLED,
    PLAIN_ROLES,
    Columns,
    Finder,
    Schema,
    kept_columns,
    named_columns,
    refuse_later,
)
from turret.data.table import (
    DATE,
    NUMBER,
    Answers,
    CellValue,
    DataSettings,
    Table,
    is_empty,
    is_missing,
    is_unnamed,
    list_columns,
    require_columns,
    trimmed,
    words_in,
)
from turret.errors import DataError, SeveralLabels, shown

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LOOKED_AT = 5000  # rows
TRIED = 1500  # rows on which naive Bayes is tried
_KEPT = 200  # characters of a cell, which is enough to tell different ones
_TRIED_TEXT = 1500  # characters of each
_FOLDS = 3
_CLOSE = 0.2  # two labels whose scores differ by less fit about equally
_FITS = 0.25  # Cohen's kappa from which on the text tells the label
_RIVALS_IN = 2000  # rows in which other columns of classes are looked for
_LABELS = ("label", "labels", "class", "target", "gold label", "label text", "label name")
_FRACTION = re.compile(r"[+-]?[0-9]*[.,](?!0+$)[0-9]+")
_IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # scripts without blanks between words
_WHO = re.compile(
    r"(user|kunde|customer|client|patient|author|autor|account|konto|session|group|gruppe|person)", re.IGNORECASE
)

# Parts of names, in lower case without accents: English, German, French, Spanish, Italian, Dutch, Portuguese, Polish.
_LABEL_WORDS = words_in(
    """label, class, klass, clase, categor, kategor, topic, thema, theme, tema, temat, argoment, onderwerp, rubri,
    assunto, asunto, sujet, sentiment, sentyment, feeling, mood, emotion, emoci, emozion, emotie, emoca, emocj,
    stimmung, gefuhl, ressenti, humeur, gevoel, nastroj, opinion, intent, absicht, intencion, intencao, zamiar,
    target, bereich, abteilung, department, reparto, departament, afdeling, dzial, departement, queue, motif, motivo,
    anliegen, einstufung, einordnung, urteil, verdict, toxic, spam, stance, polarit, etiquet, etichett, etykiet,
    rotulo, schlagwort, tag, fachgebiet, sachgebiet"""
)
_GRADE_WORDS = words_in(
    """rating, bewertung, note, ocena, beoordeling, valutazion, valoracion, avaliac, stars, sterne, score, type, typ,
    tipo, art, soort, rodzaj, reason, grund, powod, reden, result, outcome, severity, urgen, dringlich"""
)
_META_WORDS = words_in(
    """kanal, channel, canal, kanaal, store, shop, filial, tienda, loja, negozio, magasin, sklep, oddzial, winkel,
    branch, standort, location, site, region, land, country, pays, pais, paese, kraj, city, stadt, ville, ciudad,
    citta, cidade, miasto, plaats, language, lang, sprache, langue, idioma, lingua, taal, jezyk, status, statut,
    estado, stato, state, priorit, prioridad, assignee, agent, bearbeiter, vendeur, owner, date, datum, fecha, month,
    monat, mois, mes, mese, maand, miesiac, year, jahr, week, woche, source, quelle, fuente, origen, origem, fonte,
    bron, zrodlo, gender, geschlecht, sexe, sexo, genere, geslacht, plec, device, gerat, platform, version, browser,
    split, fold, lp, nr, id"""
)
_TEXT_WORDS = words_in(
    """text, texte, texto, testo, tekst, content, inhalt, contenu, contenido, contenuto, inhoud, conteudo, tresc,
    message, nachricht, mensaje, messaggio, bericht, mensagem, wiadomosc, comment, kommentar, commentaire,
    comentario, commento, opmerking, komentarz, review, rezension, avis, resena, recension, recensie, opinia,
    verbatim, feedback, description, beschreibung, descripcion, descrizion, omschrijving, descricao, opis, body,
    anfrage, question, frage, sentence, satz, tweet, post, complaint, beschwerde, reclam, klacht, anliegen, freitext"""
)


@dataclass
class ColumnFacts:
    """What the cells of one column are like."""

    name: str
    filled: int = 0
    length: int = 0  # characters of all texts
    words: int = 0
    numbers: int = 0
    dates: int = 0
    lists: int = 0
    several: int = 0  # lists of two or more
    values: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def add(self, cell: CellValue) -> None:
        if isinstance(cell, Answers):
            cell = [cells.answer_to(name, trimmed(str(each))) for name, each in cell.items() if not is_empty(each)]
        if isinstance(cell, (list, tuple)):
            self.filled += bool(cell)
            self.lists += 1
            self.several += len(cell) > 1
            self.values.update(str(each) for each in cell)
            turns = [each for each in cell if isinstance(each, dict)]
            self.lengths += [len(str(turns))] if turns else [len(str(each)) for each in cell]
            return
        text = "" if is_missing(cell) else trimmed(str(cell))
        if not text:
            return
        self.filled += 1
        self.length += len(text)
        self.lengths.append(len(text))
        self.words += len(text.split()) + len(_IDEOGRAPHS.findall(text)) // 2
        self.numbers += bool(NUMBER.fullmatch(text))
        self.dates += bool(DATE.fullmatch(text))
        self.values[text[:_KEPT]] += 1

    @property
    def mean(self) -> float:
        """Characters of a filled cell."""
        return self.length / max(1, self.filled)

    @property
    def is_texts(self) -> bool:
        """Whether most cells are sentences, nearly all different."""
        words = self.words / max(1, self.filled)
        return not self.lists and self.filled > 0 and words >= 2 and 2 * len(self.values) >= self.filled

    @property
    def is_classes(self) -> bool:
        """Whether a few short values recur."""
        if self.filled < 4 or self.dates * 2 > self.filled:
            return False
        most = max(3, min(100, self.filled // 4))
        fractions = sum(n for value, n in self.values.items() if _FRACTION.fullmatch(value))
        return 2 <= len(self.values) <= most and self.mean <= 60 and fractions * 10 < self.filled

    @property
    def usual_length(self) -> int:
        """Characters that nine of ten texts do not exceed."""
        return sorted(self.lengths)[int(0.9 * (len(self.lengths) - 1))] if self.lengths else 0


@dataclass(frozen=True)
class Candidate:
    """A column that may be the label.

    Args:
        column: its name.
        classes: class -> rows that were looked at.
        name: what its name adds, from -0.4 for a channel or a date to 0.6 for a label.
        kappa: Cohen's kappa of naive Bayes, which predicts it from the text; None: it was not tried.
        same_as_best: whether it says the same as the best candidate in other words.
    """

    column: str
    classes: Mapping[str, int]
    name: float
    kappa: float | None = None
    same_as_best: bool = False

    @property
    def score(self) -> float:
        return self.name + max(0.0, self.kappa or 0.0)

    def close_to(self, best: Candidate) -> bool:
        """Whether it fits about as well as the best one, and the text tells it, or tells neither."""
        tells = (self.kappa or 0.0) >= _FITS or (best.kappa or 0.0) < _FITS
        return tells and best.score - self.score < _CLOSE

    def described(self, most: int = 3) -> str:
        """Its name with its most frequent classes."""
        names = [shown(label, 24) for label in list(self.classes)[:most]]
        return f"{shown(self.column, 40)} ({', '.join(names)}{', ...' if len(self.classes) > most else ''})"


@dataclass(frozen=True)
class Profile:
    """What a table shows, and how Turret would learn from it."""

    rows: int  # that were looked at
    more: bool  # whether the table has more
    kind: str  # of the task
    roles: dict[str, str]  # role -> column
    facts: dict[str, ColumnFacts]  # by column
    guessed: bool  # from the content of columns, not from their names
    multi_label: bool = False
    separator: str | None = None  # between the labels of a cell
    alike: bool = False  # labels that differ in case or blanks only
    repeated: int = 0  # rows that are equal to an earlier one
    classes: dict[str, int] = field(default_factory=dict)  # label -> rows
    candidates: tuple[Candidate, ...] = ()  # other columns that may be the label, the best first
    kappa: float | None = None  # of the label, as in `Candidate`

    @property
    def others(self) -> list[str]:
        """Columns that are not used."""
        return [name for name in self.facts if name not in self.roles.values()]

    @property
    def groups(self) -> list[str]:
        """Unused columns whose names say who a row is about, and whose values recur."""
        unused = [self.facts[name] for name in self.others if _WHO.search(name)]
        return [each.name for each in unused if 2 < len(each.values) < 0.9 * each.filled]


def profile_table(table: Table, data: DataSettings, schemas: Sequence[Schema]) -> Profile:
    """Look at a table.

    Args:
        data: what is known already: named columns, `separator`.
        schemas: of the tasks that may suit.

    Raises:
        SeveralLabels: two columns fit equally well as the label.
        DataError: there is nothing that a task could learn from, or the wrong column is named.
    """
    look = _Look(table, data)
    if not look.rows:
        raise DataError(f"{table.name} has columns and no rows: give a table with rows{look.hint}")
    columns, ranked, guessed = look.columns(schemas)
    best = next((each for each in ranked if each.column == columns.roles.get("label")), None)
    found = Profile(
        look.rows,
        look.rows == LOOKED_AT,
        columns.schema.kind,
        columns.roles,
        look.facts,
        guessed,
        repeated=_repeated(table, columns),
        candidates=tuple(each for each in ranked if each is not best),
        kappa=None if best is None else best.kappa,
    )
    own = columns.schema.classes and not columns.schema.spans
    return _with_labels(found, data, columns) if own else found


def columns_of(table: Table, data: DataSettings, schemas: Sequence[Schema]) -> Columns:
    """The columns by their names; if the recipe names a text or a label alone, the other one by its content.

    Raises:
        SeveralLabels: two columns fit equally well as the label.
        DataError: the columns cannot be told.
    """
    try:
        return Finder.of(data, table.columns).find(schemas)
    except DataError:
        look, schema = _Look(table, data), _classifier(schemas)
        if schema is None or not look.names_one or (found := look.labelled(schema, None)) is None:
            raise
    columns, ranked = found
    _require_one(ranked, "add {option}")
    role = next(role for role in LABELLED if role not in look.named)
    return replace(columns, note=f"guessed from the cells: {role} is column {columns.roles[role]!r}")


def rivals_note(table: Table, data: DataSettings, columns: Columns) -> list[str]:
    """A note on the other columns that may be the label, if there are any."""
    if not columns.schema.classes or columns.schema.spans:
        return []
    others = [name for name in kept_columns(data, table.columns) if name not in columns.roles.values()]
    try:
        facts, _ = _looked_at(table, others, _RIVALS_IN)
    except DataError:  # a column that is not used cannot be read
        return []
    rivals = sorted(_candidates(others, facts), key=lambda each: -each.name)
    if not rivals:
        return []
    more = f" and {len(rivals) - 3} more" if len(rivals) > 3 else ""
    named = ", ".join(each.described() for each in rivals[:3])
    return [f"label is column {columns.answer!r}; other columns with classes: {named}{more}"]


def _looked_at(table: Table, columns: Sequence[str], most: int = LOOKED_AT) -> tuple[dict[str, ColumnFacts], int]:
    """The facts of some columns, and the number of rows that were looked at."""
    facts = {name: ColumnFacts(name) for name in columns}
    rows = 0
    for _, row in islice(table.read(columns), most):
        rows += 1
        for column, cell in zip(facts.values(), row, strict=True):
            column.add(cell)
    return facts, rows


def _classifier(schemas: Sequence[Schema]) -> Schema | None:
    return next((each for each in schemas if LABELLED in each.names and each.classes), None)


class _Look:
    """The first rows of a table, and what can be learnt from them."""

    def __init__(self, table: Table, data: DataSettings) -> None:
        self.table, self.data = table, data
        self.named = named_columns(data, PLAIN_ROLES)
        self.hint = f"; {table.hint}" if table.hint else ""

    @cached_property
    def _looked_at(self) -> tuple[dict[str, ColumnFacts], int]:
        return _looked_at(self.table, self.table.columns)

    @property
    def facts(self) -> dict[str, ColumnFacts]:
        return self._looked_at[0]

    @property
    def rows(self) -> int:
        return self._looked_at[1]

    @property
    def names_one(self) -> bool:
        """Whether the recipe names a text or a label alone."""
        return len(self.named) == 1 and self.named.keys() <= set(LABELLED)

    def columns(self, schemas: Sequence[Schema]) -> tuple[Columns, list[Candidate], bool]:
        """The columns by name, else by content; the columns that may be the label; whether it was content."""
        table, by_name = self.table, None
        try:
            by_name = Finder.of(self.data, table.columns).find(schemas)
        except DataError as error:
            refuse_later(table.columns)
            if self.names_one:
                require_columns(self.named, table.columns)
            elif self.named:
                raise DataError(f"{error}{self.hint}") from None
        if by_name is not None and not (by_name.schema.classes and tuple(by_name.roles) == LABELLED):
            return by_name, [], False
        schema = _classifier(schemas) if by_name is None else by_name.schema
        found = None if schema is None else self.labelled(schema, by_name)
        if found is not None:
            columns, ranked = found
            _require_one(ranked, f"`turret init {shlex.quote(self.data.source)} {{option}}`")
            return columns, ranked, by_name is None or by_name.roles != columns.roles
        texts = sorted((each for each in self.facts.values() if each.is_texts), key=lambda each: -each.mean)
        written = next((each for each in schemas if each.usual == COMPLETED), None)
        if len(texts) > 1 and written is not None and not self.named:
            pair = [name for name in table.columns if name in (texts[0].name, texts[1].name)]
            return Columns(written, {"prompt": pair[0], "completion": pair[1]}, None), [], True
        raise DataError(
            f"{table.name} shows no column of texts with one of classes or answers; the columns are "
            f"{list_columns(table.columns, 100)}: name them with --text and --label, or --prompt and --completion"
            f"{self.hint}"
        )

    def labelled(self, schema: Schema, by_name: Columns | None) -> tuple[Columns, list[Candidate]] | None:
        """The columns of texts and classes, and the columns that may be the label, the best first; None without them.

        Args:
            by_name: the columns as their names say.
        """
        kept, facts = kept_columns(self.data, self.table.columns), self.facts
        given = require_columns(named_columns(self.data, LABELLED), kept)
        text = given.get("text") or (by_name.roles["text"] if by_name else None)
        if text is None:
            texts = [facts[name] for name in kept if facts[name].is_texts and name != given.get("label")]
            text = max(texts, key=_text_score).name if texts else None
        if text is None:
            return None
        usual = by_name.roles["label"] if by_name else ""
        candidates = _candidates([name for name in kept if name != text], facts, usual)
        if label := given.get("label"):
            ranked = sorted(candidates, key=lambda each: (each.column != label, -each.name))
            return Columns(schema, {"text": text, "label": label}, None), ranked
        if not candidates:
            return None
        ranked = _ranked(self.table, text, candidates, usual) if len(candidates) > 1 else candidates
        return Columns(schema, {"text": text, "label": ranked[0].column}, None), ranked


# --- the label -------------------------------------------------------------------------------------------------------


def _candidates(columns: Iterable[str], facts: Mapping[str, ColumnFacts], usual: str = "") -> list[Candidate]:
    """The columns of classes, in the order of the table.

    Args:
        usual: a column that has the name of a label, whatever its cells are.
    """
    return [
        Candidate(name, dict(facts[name].values.most_common()), max(_name_value(name), 0.6 if name == usual else -1.0))
        for name in columns
        if not is_unnamed(name) and (facts[name].is_classes or name == usual)
    ]


def _require_one(ranked: Sequence[Candidate], command: str) -> None:
    """Raise SeveralLabels if other columns fit about as well as the best one.

    Args:
        command: with `{option}` where `--label COLUMN` goes.
    """
    if len(ranked) < 2 or ranked[0].kappa is None:
        return
    fit = [each for each in ranked if each is ranked[0] or (each.close_to(ranked[0]) and not each.same_as_best)]
    if len(fit) > 1:
        more = [f"{len(fit) - 2} more"] if len(fit) > 2 else []
        named = " and ".join([*(each.described() for each in fit[:2]), *more])
        asked = " or ".join(command.format(option=f"--label {shlex.quote(each.column)}") for each in fit[:2])
        raise SeveralLabels(
            f"which column is the label? {named} fit about equally: {asked}",
            {each.column: list(each.classes) for each in fit},
        )


def _text_score(facts: ColumnFacts) -> float:
    """Long cells are texts; a name that says so counts as much as four times the length."""
    named = any(_has(word, _TEXT_WORDS) for word in _words(facts.name))
    return math.log(max(facts.mean, 1.0)) + (math.log(4) if named else 0.0)


def _words(name: str) -> list[str]:
    """The words of a name in lower case and without accents: `isSpam_Flag` is `is`, `spam`, `flag`."""
    plain = "".join(c for c in unicodedata.normalize("NFD", name.replace("ł", "l").replace("ß", "ss")) if c.isascii())
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain).lower())


def _has(word: str, stems: Iterable[str], *, inside: bool = True) -> bool:
    """Whether a word is a stem, begins with one of four letters or more, or has one of five or more in it.

    Args:
        inside: a stem in the middle of the word counts: German compounds end with what they are.
    """
    return any(
        word == stem or (len(stem) > 3 and word.startswith(stem)) or (inside and len(stem) > 4 and stem in word)
        for stem in stems
    )


def _name_value(name: str) -> float:
    """What the name of a column says about it as a label, from -0.4 to 0.9."""
    words = _words(name)
    if " ".join(words) in _LABELS:
        return 0.9
    others = [word for word in words if not _has(word, _META_WORDS, inside=False)]
    value = 0.5 if any(_has(word, _LABEL_WORDS) for word in others) else 0.0
    if not value and any(_has(word, _GRADE_WORDS) for word in others):
        value = 0.2
    meta = any(_has(word, _META_WORDS) for word in words) or _WHO.search(name)
    return value - 0.4 if meta else value


def _ranked(table: Table, text: str, candidates: Sequence[Candidate], usual: str) -> list[Candidate]:
    """The candidates with Cohen's kappa of naive Bayes, cross-validated on some rows, the best first.

    Args:
        usual: the column that has the name of a label, which is first among equals.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    rows = islice(table.read([text, *(each.column for each in candidates)]), TRIED)
    by_text = {str(row[0])[:_TRIED_TEXT]: row[1:] for _, row in rows if row[0] is not None}  # equal texts count once
    texts = list(by_text)
    signs = sum(len(_IDEOGRAPHS.findall(each)) for each in texts[:100])
    letters = {"analyzer": "char", "ngram_range": (1, 2)} if signs > 200 else {"token_pattern": r"(?u)\b\w\w+\b"}
    try:
        vectors = CountVectorizer(binary=True, max_features=20_000, **letters).fit_transform(texts)
    except ValueError:  # no words
        return list(candidates)
    own = {each.column: [_cell_key(row[place]) for row in by_text.values()] for place, each in enumerate(candidates)}
    found = [replace(each, kappa=_kappa(vectors, own[each.column])) for each in candidates]
    best, *others = sorted(found, key=lambda each: (-each.score, each.column != usual))
    others = [replace(each, same_as_best=_same(own[each.column], own[best.column])) for each in others]
    if _are_numbers(best.classes):  # a column of names says more than one of their numbers
        spelt = next((each for each in others if each.same_as_best and not _are_numbers(each.classes)), None)
        if spelt is not None:
            others = [replace(best, same_as_best=True), *(each for each in others if each is not spelt)]
            best = replace(spelt, same_as_best=False)
    return [best, *others]


def _are_numbers(classes: Iterable[str]) -> bool:
    return all(NUMBER.fullmatch(each) for each in classes)


def _cell_key(cell: CellValue) -> str:
    """Equal for cells that mean the same label; "" for none."""
    key = "" if is_missing(cell) else cells.key_of(str(cell))
    return "" if key in cells.NO_VALUES else key


def _same(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two columns say the same in other words, such as a number and its name."""
    pairs = {(a, b) for a, b in zip(first, second, strict=True) if a and b}
    return len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})


def _kappa(vectors: csr_matrix, labels: Sequence[str]) -> float:
    """How far naive Bayes is better than chance: 1 if it is always right, 0 if it guesses."""
    import numpy as np
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB

    counts = Counter(labels)
    kept = np.array([place for place, label in enumerate(labels) if label and counts[label] >= _FOLDS], dtype=int)
    wanted = np.array([labels[place] for place in kept])
    if len(set(wanted)) < 2:
        return 0.0
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    return float(
        cohen_kappa_score(wanted, cross_val_predict(MultinomialNB(alpha=0.3), vectors[kept], wanted, cv=folds))
    )


# --- more about the rows ---------------------------------------------------------------------------------------------


def _repeated(table: Table, columns: Columns) -> int:
    pairs = Counter(tuple(map(str, row)) for _, row in islice(table.read(tuple(columns.roles.values())), LOOKED_AT))
    return sum(count - 1 for count in pairs.values())


def _with_labels(found: Profile, data: DataSettings, columns: Columns) -> Profile:
    facts, several = found.facts[columns.answer], columns.schema.several
    counts = Counter({label: count for label, count in facts.values.items() if label.strip()})
    many, separator = facts.several > 0 and not several, data.separator
    if not (many or several) and separator is None and (joined := cells.joined_by(counts)) is not None:
        separator, many = joined[0], True
    if separator:
        parts: Counter[str] = Counter()
        for label, count in counts.items():
            parts.update({part.strip(): count for part in label.split(separator) if part.strip()})
        counts = parts
    spellings = cells.spellings(counts)
    classes = cells.classes_of(counts, spellings)
    alike = any(label != name for label, name in spellings.items())
    return replace(
        found, multi_label=many, separator=separator or None, alike=alike, classes=dict(classes.most_common())
    )
