"""Finds the columns of a table: those that the recipe names, else those with an obvious name, else by what they hold.

Names are compared without case and outer blanks. A task's `Schema` lists its obvious names. Conversations have one
column with all turns, or a question and its answer in columns. A note reports each guess. Tables of tasks that this
version does not have are refused by the name of their task.

`profile_table` looks at the first rows: which columns hold texts, classes or lists, and what to train on them. A label
is chosen by its name and by how well a quick naive Bayes predicts it from the text.
"""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from turret.data import cells
from turret.data.cells import RowReader, label_of
from turret.data.examples import Example
from turret.data.table import (
    IDEOGRAPHS,
    NUMBER,
    ROLES,
    Answers,
    CellValue,
    ColumnFacts,
    DataSettings,
    Table,
    TableRow,
    find_column,
    is_missing,
    is_unnamed,
    list_columns,
    name_key,
    require_columns,
    words_in,
)
from turret.errors import DataError, SeveralLabels, quote, quote_all

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Roles = tuple[str, ...]  # keys of a recipe's [data]: the input columns, then the answer columns
LABELLED: Roles = ("text", "label")
PAIRED: Roles = ("text", "text_pair", "label")
SUMMARISED: Roles = ("document", "summary")
COMPLETED: Roles = ("prompt", "completion")
COMPARED: Roles = ("prompt", "chosen", "rejected")
TAGGED: Roles = ("tokens", "tags")
SPANNED: Roles = ("text", "spans")
TRIPLE: Roles = ("anchor", "positive", "negative")
OPTIONS = ("text", "text_pair", "label", "prompt", "completion", "messages")  # with an option of the command line
RoleColumns: TypeAlias = Mapping[str, str | Sequence[str]]  # role -> its column, or several
PLAIN_ROLES = ROLES[: ROLES.index("messages")]

WHOLE = ("messages", "conversations")  # column names of all turns
MORE_WHOLE = ("conversation", "chat", "dialog")  # obvious only if the task is known
INSTRUCTED = (("instruction", "output"), ("instruction", "response"))
MORE_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("source", "target"))
BESIDE = ("input", "system", "tools")  # roles that have the names of their usual columns
CHAT_ROLES = ("messages", "prompt", "completion", *BESIDE)  # the keys of a recipe's [data] for conversations

BESIDE_ALL = ("input", "inputs", "context", "passage", "history")  # columns that an answer usually depends on
BESIDE_PAIR = (*BESIDE_ALL, "instruction", "question", "query", "prompt", "system", "tools")

LOOKED_AT = 5000  # rows
TRIED = 1500  # rows on which naive Bayes is tried
_TRIED_TEXT = 1500  # characters of each
_FOLDS = 3
_CLOSE = 0.2  # two labels whose scores differ by less fit about equally
_FITS = 0.25  # Cohen's kappa from which on the text tells the label
_RIVALS_IN = 2000  # rows in which other columns of classes are looked for
_LABELS = ("label", "labels", "class", "target", "gold label", "label text", "label name")
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


@dataclass(frozen=True)
class Schema:
    """The columns that one task reads from a table, and the examples that it makes.

    Args:
        kind: of the task.
        names: by roles, the usual ones first, column names that are obvious for them.
        inputs: column names that are obvious if only one text is asked.
        example: makes the example of a row. Raises DataError for a wrong cell, Missing for one without a value.
        classes: whether answers are classes, which are counted, checked and listed.
        many: whether an example has any number of classes.
        conversations: whether the examples are conversations, whose columns have names of their own.
        show: how many of `names` show the task; others need the task's name.
        answers: how many of the roles, at the end, are answers.
        converses: whether what is asked is a conversation.
        spans: whether an answer is spans of the text, each with a class.
        several: whether several columns have an answer each: `data.label` is a list.
    """

    kind: str
    names: Mapping[Roles, Sequence[tuple[str, ...]]]
    inputs: Sequence[str]
    example: Callable[[RowReader], Example]
    classes: bool = False
    many: bool = False
    conversations: bool = False
    show: int = 1
    answers: int = 1
    converses: bool = False
    spans: bool = False
    several: bool = False

    @property
    def usual(self) -> Roles:
        """The roles of its columns if a recipe names none."""
        return next(iter(self.names))

    @property
    def roles(self) -> Roles:
        """All roles that a recipe may give a column."""
        own = CHAT_ROLES if self.conversations else ()
        return tuple(dict.fromkeys([*own, *(role for roles in self.names for role in roles)]))


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a task reads, by their roles."""

    schema: Schema
    roles: dict[str, str]  # ("text", "label"), ("document", "summary") or ("prompt", "completion") -> column
    note: str | None  # what was guessed

    @property
    def answer(self) -> str:
        """The column of the right answer."""
        return list(self.roles.values())[-1]


@dataclass(frozen=True)
class Finder:
    """Finds the columns of one table.

    Args:
        data: a recipe's `[data]`.
        columns: of the table, without those that `data.ignore` leaves out.
        trained: role -> column of the table that a version was trained on, for what the recipe does not name. The table
            may lack it.
    """

    data: DataSettings
    columns: Sequence[str]
    trained: Mapping[str, str]

    @classmethod
    def of(cls, data: DataSettings, columns: Sequence[str], trained: Mapping[str, str] | None = None) -> Finder:
        """Raises DataError if `data.ignore` names a column that is not there, or that is used."""
        return cls(data, kept_columns(data, columns), trained or {})

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Each column by its name without case and blanks; of equal names the first column."""
        return {name_key(name): name for name in reversed(self.columns)}

    def given(self, roles: Iterable[str]) -> dict[str, str]:
        """The columns that the recipe names for some roles. Raises DataError for one that is not there."""
        return require_columns(named_columns(self.data, roles), self.columns)

    def known(self, roles: Iterable[str]) -> tuple[dict[str, str], str | None]:
        """The columns that the version was trained on, as far as the table has them, and a note on the others."""
        own = {role: self.trained[role] for role in roles if role in self.trained}
        found = {role: column for role, name in own.items() if (column := find_column(name, self.columns)) is not None}
        missing = [name for role, name in own.items() if role not in found]
        return found, f"the table lacks {quote_all(missing, 60)}, on which the version was trained" if missing else None

    def find(self, schemas: Sequence[Schema]) -> Columns:
        """The columns that the recipe names, else those with an obvious name. Raises DataError.

        Args:
            schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        """
        task = schemas[0] if len(schemas) == 1 else None
        for schema in (schema for schema in schemas if schema.conversations):
            if conversations := self._conversations(schema, named=task is not None):
                return conversations
        chat = [role for role in named_columns(self.data, CHAT_ROLES) if role not in PLAIN_ROLES]
        if task and (strange := [role for role in chat if role not in task.roles]):
            raise DataError(
                f'data.{strange[0]} does not belong to {task.kind}: set task.kind = "chat", or leave it out'
            )
        schemas = [schema for schema in schemas if not schema.conversations]
        only = schemas[0] if len(schemas) == 1 else None
        given = self.given(dict.fromkeys((*PLAIN_ROLES, *(role for schema in schemas for role in schema.roles))))
        known, lacks = self.known(self.trained)
        note = None if given else lacks
        if given:  # the version knows the others
            own = [roles for roles in schemas[0].names if given.keys() & set(roles)]
            of_it: Roles = next((roles for roles in own if known.keys() <= set(roles)), next(iter(own), ()))
            known = {role: name for role, name in known.items() if role in of_it}
        given = {**given, **{role: name for role, name in known.items() if role not in given}}
        _check_named(given, only)
        found = []
        for schema in schemas:
            shown = list(schema.names) if only else list(schema.names)[: schema.show]
            for roles in sorted(shown, key=len, reverse=True):
                if given.keys() <= set(roles) and (guess := self._guess(roles, schema.names[roles], given)):
                    found.append(Columns(schema, guess, note))
                    break
        if not found:
            if not given:
                refuse_later(self.columns)
            raise DataError(self._not_found(given, only))
        found.sort(key=lambda each: (each.roles.keys() != given.keys(), -len(each.roles)))
        if len(found) > 1 and not given and len(found[0].roles) == len(found[1].roles):
            both = " and ".join(f"{f.schema.kind} ({quote_all(f.roles.values(), 60)})" for f in found[:2])
            raise DataError(
                f"the columns {quote_all(self.columns, 80)} fit {both}: set task.kind (--task), or name the columns "
                "under [data]"
            )
        notes = [note, self._guess_note(found[0].schema, found[0].roles, given)]
        return replace(found[0], note="; ".join(filter(None, notes)) or None)

    def inputs(self, schema: Schema) -> dict[str, str]:
        """The input columns by role. The table may have no answers. Raises DataError."""
        if schema.conversations or schema.converses:
            return self._questions()
        asked = [roles[: -schema.answers] for roles in schema.names]
        of_them = [role for role in PLAIN_ROLES if _in(role, asked)]
        given, (known, _) = self.given(of_them), self.known(role for role in self.trained if _in(role, asked))
        if given or not self.trained:
            fitting = [roles for roles in asked if given.keys() <= set(roles)]
        else:
            fitting = [roles for roles in asked if known.keys() == set(roles)]
        for roles in sorted(fitting, key=len, reverse=True):
            every = [names for own, names in schema.names.items() if own[: -schema.answers] == roles]
            obvious = [each[: len(roles)] for names in every for each in names]
            if len(roles) > 1 and (guess := self._guess(roles, obvious, {**known, **given})):
                return guess
        single = [roles[0] for roles in asked if len(roles) == 1]
        if role := next((role for role in single if role in given), None):
            return {role: given[role]}
        first = schema.usual[0]
        if single:
            names = [name for role, name in known.items() if role in single]
            names += [self.by_name[name] for name in dict.fromkeys((first, *schema.inputs)) if name in self.by_name]
            if names or len(self.columns) == 1:
                return {single[0]: names[0] if names else self.columns[0]}
        named = min(asked, key=lambda roles: (not set(roles) <= set(OPTIONS), len(roles)))
        options = " ".join(map(_option, named))
        one = len(named) == 1
        which = "which column has the inputs" if one else "which columns have the two texts"
        raise DataError(
            f"cannot tell {which}; the columns are {list_columns(self.columns)}: name {'one' if one else 'them'} with "
            f"{options}"
        )

    def _guess(
        self, roles: Roles, obvious: Sequence[tuple[str, ...]], given: Mapping[str, str]
    ) -> dict[str, str] | None:
        """A column for each role: the given one, else the one with an obvious name."""
        for names in [("",) * len(roles), *obvious]:
            guess = {
                role: given.get(role) or self.by_name.get(name, "") for role, name in zip(roles, names, strict=True)
            }
            if all(guess.values()) and len(set(guess.values())) == len(guess):
                return guess
        return None

    def _guess_note(self, schema: Schema, roles: Mapping[str, str], given: Mapping[str, str]) -> str | None:
        """What was guessed, and which columns are not used; None if the recipe names all that are."""
        guessed = [f"{role} is column {name!r}" for role, name in roles.items() if role not in given]
        unused = [name for name in self.columns if name not in roles.values()]
        others = f"; not used: {', '.join(unused)}" if unused else ""
        return f"guessed: {schema.kind}, {', '.join(guessed)}{others}" if guessed else None

    def _not_found(self, given: Mapping[str, str], only: Schema | None) -> str:
        """What the table lacks: of the task's roles those that fit the table best, and of these the fewest."""
        known = [LABELLED, SUMMARISED, COMPLETED, PAIRED] if only is None else list(only.names)
        found = {*given, *(self._obvious_roles(only, given) if only else ())}
        holding = [roles for roles in known if given.keys() <= set(roles)] or known[:1]
        roles = min(holding, key=lambda roles: (-len(found & set(roles)), len(roles)))
        if given:
            missing = [role for role in roles if role not in found] or [role for role in roles if role not in given]
            role = missing[0] if missing else roles[-1]
            named = f" beside {quote_all(given.values(), 40)}"
            what = f"the {role}{named} is" if role in OPTIONS else f"data.{role}{named} is"
            remedy = f"add {_option(role)}" if role in OPTIONS else f"set data.{role}"
            return f"cannot tell which column {what}; the columns are {list_columns(self.columns)}: {remedy}"
        if only:
            roles = COMPLETED if roles == SUMMARISED else roles
            keys = [f"data.{role}" for role in roles]
            options = f" ({' '.join(map(_option, roles))})" if set(roles) <= set(OPTIONS) else ""
            remedy = f"set {', '.join(keys[:-1])} and {keys[-1]}{options}"
        else:
            remedy = (
                "set data.text and data.label (--text, --label) to classify, or --prompt and --completion to write; "
                "`turret init FILE` looks for them in the cells"
            )
        return f"cannot tell which columns to use; the columns are {list_columns(self.columns)}: {remedy}"

    def _obvious_roles(self, schema: Schema, given: Mapping[str, str]) -> set[str]:
        """The roles for which a column that is not given has an obvious name."""
        free = self.by_name.keys() - {name_key(column) for column in given.values()}
        named = ((roles, names) for roles, every in schema.names.items() for names in every)
        return {role for roles, names in named for role, name in zip(roles, names, strict=True) if name in free}

    # --- conversations ------------------------------------------------------------------------------------------------

    def _conversations(self, schema: Schema, *, named: bool) -> Columns | None:
        """The columns of conversations, if the recipe names them, asks for the task, or the table shows them.

        Args:
            named: whether the recipe names that task.
        """
        given = named_columns(self.data, CHAT_ROLES)
        own = [role for role in given if role not in PLAIN_ROLES]  # roles that no other task has
        foreign = [role for role in named_columns(self.data, PLAIN_ROLES) if role not in CHAT_ROLES]
        if named and foreign:
            remedy = "name data.messages, or prompt and completion"
            raise DataError(f"data.{foreign[0]} does not belong to {schema.kind}: {remedy}")
        if not named and (foreign or (given and not own)):
            return None
        known, lacks = self.known(() if given else CHAT_ROLES)
        if "messages" in known or known.keys() >= {"prompt", "completion"}:
            return Columns(schema, known, lacks)
        roles = self._conversation_roles(known=named)
        if roles is None and (named or own):
            remedy = "name data.messages, or data.prompt and data.completion"
            raise DataError(f"cannot tell which columns to use; the columns are {list_columns(self.columns)}: {remedy}")
        if roles is None:
            return None
        return Columns(schema, roles, lacks if self.trained and not given else self._guess_note(schema, roles, given))

    def _questions(self) -> dict[str, str]:
        """The columns of conversations that may have no answers, by role. Raises DataError."""
        known, _ = self.known(() if named_columns(self.data, CHAT_ROLES) else CHAT_ROLES)
        roles = known if known.keys() & {"messages", "prompt"} else self._conversation_roles(known=True, asks=True)
        if roles is None:
            raise DataError(
                f"cannot tell which column has the conversations; the columns are {list_columns(self.columns)}: "
                "name data.messages or data.prompt"
            )
        return {role: name for role, name in roles.items() if role != "completion"}

    def _conversation_roles(self, *, known: bool, asks: bool = False) -> dict[str, str] | None:
        """The columns that the recipe names, else those with an obvious name, by role; None if there are none.

        Args:
            known: whether the task is known, so that more names are obvious.
            asks: whether the table may have questions without answers.
        """
        roles, low = self.given(CHAT_ROLES), self.by_name
        given = bool(roles)
        if not roles.keys() & {"messages", "prompt", "completion"}:
            names = (*WHOLE, *(MORE_WHOLE if known else ()))
            if whole := next((low[name] for name in names if name in low), None):
                roles = {"messages": whole} | roles
        if "messages" not in roles:
            for first, second in (*INSTRUCTED, *(MORE_PAIRS if known or given else ())):
                asked, answer = roles.get("prompt", low.get(first)), roles.get("completion", low.get(second))
                if asked and (answer or asks):
                    roles = {"prompt": asked, **({"completion": answer} if answer else {})} | roles
                    break
            else:
                return None
        for role in BESIDE:
            applies = role not in roles and (role != "input" or "messages" not in roles)
            if applies and role in low and low[role] not in roles.values():
                roles[role] = low[role]
        return roles


def _in(role: str, every: Iterable[Roles]) -> bool:
    return any(role in roles for roles in every)


def _option(role: str) -> str:
    return f"--{role.replace('_', '-')} COLUMN"


def align_columns(table: Table, names: Sequence[str]) -> Table:
    """The table with its columns called as in the training table. Raises DataError if it lacks one."""
    found = {name: find_column(name, table.columns) for name in names}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise DataError(
            f"{table.name} has no column {quote_all(missing, 60)}: its columns are {list_columns(table.columns)}"
        )
    if all(name == column for name, column in found.items()):
        return table
    own = {name: column for name, column in found.items() if column is not None}
    return replace(
        table,
        columns=tuple(names),
        read=lambda columns: table.read([own[name] for name in columns]),
        classes={name: table.classes[column] for name, column in own.items() if column in table.classes},
    )


def fitting_schemas(data: DataSettings, schemas: Sequence[Schema]) -> list[Schema]:
    """The schemas that read as many columns of answers as `data.label` names. Raises DataError without any."""
    several = isinstance(data.label, list)
    found = [schema for schema in schemas if schema.several == several]
    if not found:
        kind = schemas[0].kind
        raise DataError(
            f"{kind} reads one column of answers, and data.label is a list: name one column, or leave task.kind out"
            if several
            else f'{kind} answers several questions: name their columns, such as data.label = ["topic", "urgent"]'
        )
    return found


def with_answers(table: Table, names: Sequence[str]) -> Table:
    """The table with some columns as one, whose cells are `Answers`; as it is if it lacks one of them."""
    found = {name: column for name in names if (column := find_column(name, table.columns)) is not None}
    if len(found) < len(names):
        return table
    whole = column_of(names)

    def answer(name: str, cell: CellValue) -> CellValue:
        classes = table.classes.get(found[name])
        return cell if classes is None else label_of(cell, classes, multi_label=False)

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        own = [each for column in columns for each in (found.values() if column == whole else [column])]
        for place, row in table.read(own):
            cells = dict(zip(own, row, strict=True))
            answers = Answers((name, answer(name, cells.get(column))) for name, column in found.items())
            yield place, tuple(answers if column == whole else cells[column] for column in columns)

    others = tuple(column for column in table.columns if column not in found.values())
    return replace(table, columns=(*others, whole), read=read)


def _check_named(given: Mapping[str, str], only: Schema | None) -> None:
    """Raise DataError if no task has all the columns that the recipe names."""
    every = (LABELLED, PAIRED, SUMMARISED, COMPLETED, ("system", *COMPARED), TAGGED, SPANNED, TRIPLE)
    of_a_task = [set(roles) for roles in every]
    if not any(given.keys() <= roles for roles in of_a_task):
        raise DataError(f"data names {' and '.join(given)}, which belong to different tasks: name one pair of columns")
    if only and not any(given.keys() <= set(roles) for roles in only.names):
        strange = next(role for role in given if not _in(role, list(only.names)) or len(given) > 1)
        fewest = min(only.names, key=lambda roles: len(roles))
        raise DataError(f"data.{strange} does not belong to {only.kind}: name {' and '.join(fewest)}")


# --- names -----------------------------------------------------------------------------------------------------------


def named_columns(data: DataSettings, roles: Iterable[str]) -> dict[str, str]:
    """The columns that the recipe names for some roles, by role."""
    return {role: column_of(name) for role in roles if (name := getattr(data, role)) is not None}


def column_of(name: str | Sequence[str]) -> str:
    """The column of a name; several names are the columns that `with_answers` makes one of."""
    return name if isinstance(name, str) else ", ".join(name)


def kept_columns(data: DataSettings, columns: Sequence[str]) -> list[str]:
    """The columns that `data.ignore` leaves. Raises DataError if it names one that is not there, or that is used."""
    ignored = require_columns({name: name for name in data.ignore or ()}, columns)
    named = named_columns(data, (*PLAIN_ROLES, *CHAT_ROLES))
    if used := next((role for role, name in named.items() if find_column(name, list(ignored.values()))), None):
        raise DataError(f"data.ignore and data.{used} both name the column {quote(named[used], 40)}: keep one of them")
    return [name for name in columns if name not in ignored.values()]


# --- what cannot be learnt -------------------------------------------------------------------------------------------


def check_unused(data: DataSettings, table: Table, found: Columns) -> None:
    """Raise DataError if a column with values looks like input, is not used, and is not in `data.ignore`."""
    names = BESIDE_ALL if "messages" in found.roles else BESIDE_PAIR
    for name in kept_columns(data, table.columns):
        if name in found.roles.values() or name_key(name) not in names or not _has_values(table, name):
            continue
        remedy = (
            "name it under [data]" if found.schema.conversations else 'name it in data.input with task.kind = "chat"'
        )
        raise DataError(
            f"{table.name} has the column {quote(name, 40)}, which looks like input, and {found.schema.kind} does "
            f"not use it: {remedy}, or drop it with data.ignore = [{quote(name, 40)}]"
        )


def _has_values(table: Table, column: str) -> bool:
    return any(not is_missing(cell) and cell not in ([], {}) for _, (cell,) in table.read([column]))


def later_task_of(columns: Sequence[str]) -> str | None:
    """The task of a later version that a table with these columns belongs to."""
    names = {name_key(name) for name in columns}
    return "question_answering" if {"question", "context"} <= names and names & {"answers", "answer"} else None


def refuse_later(columns: Sequence[str]) -> None:
    """Raise DataError if the columns are those of a task that this version does not have."""
    if (task := later_task_of(columns)) is None:
        return
    used = [name for name in columns if name_key(name) in ("question", "context", "answers", "answer")]
    raise DataError(
        f"the columns {quote_all(used, 80)} belong to the task {task} (answers inside a context), which a later "
        "version will have: give another table, or name columns of a task of this version"
    )


# --- by what the cells hold ------------------------------------------------------------------------------------------


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

    def describe_classes(self, most: int = 3) -> str:
        """Its name with its most frequent classes."""
        names = [quote(label, 24) for label in list(self.classes)[:most]]
        return f"{quote(self.column, 40)} ({', '.join(names)}{', ...' if len(self.classes) > most else ''})"


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
        repeated=_count_repeated(table, columns),
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
        schema = _classifier(schemas)
        if schema is None or not _names_one(data) or (found := _Look(table, data).label_columns(schema, None)) is None:
            raise
    columns, ranked = found
    _require_one(ranked, "add {option}")
    role = next(role for role in LABELLED if role not in named_columns(data, LABELLED))
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
    named = ", ".join(each.describe_classes() for each in rivals[:3])
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


def _names_one(data: DataSettings) -> bool:
    """Whether the recipe names a text or a label, and no other column."""
    named = named_columns(data, PLAIN_ROLES)
    return len(named) == 1 and named.keys() <= set(LABELLED)


class _Look:
    """The first rows of a table, and what can be learnt from them."""

    def __init__(self, table: Table, data: DataSettings) -> None:
        self.table, self.data = table, data
        self.facts, self.rows = _looked_at(table, table.columns)
        self.hint = f"; {table.hint}" if table.hint else ""

    def columns(self, schemas: Sequence[Schema]) -> tuple[Columns, list[Candidate], bool]:
        """The columns by name, else by content; the columns that may be the label; whether it was content."""
        table, by_name, named = self.table, None, named_columns(self.data, PLAIN_ROLES)
        try:
            by_name = Finder.of(self.data, table.columns).find(schemas)
        except DataError as error:
            refuse_later(table.columns)
            if _names_one(self.data):
                require_columns(named, table.columns)
            elif named:
                raise DataError(f"{error}{self.hint}") from None
        if by_name is not None and not (by_name.schema.classes and tuple(by_name.roles) == LABELLED):
            return by_name, [], False
        schema = _classifier(schemas) if by_name is None else by_name.schema
        found = None if schema is None else self.label_columns(schema, by_name)
        if found is not None:
            columns, ranked = found
            _require_one(ranked, f"`turret init {shlex.quote(self.data.source)} {{option}}`")
            return columns, ranked, by_name is None or by_name.roles != columns.roles
        texts = sorted((each for each in self.facts.values() if each.is_texts), key=lambda each: -each.mean)
        written = next((each for each in schemas if each.usual == COMPLETED), None)
        if len(texts) > 1 and written is not None and not named:
            pair = [name for name in table.columns if name in (texts[0].name, texts[1].name)]
            return Columns(written, {"prompt": pair[0], "completion": pair[1]}, None), [], True
        raise DataError(
            f"{table.name} shows no column of texts with one of classes or answers; the columns are "
            f"{list_columns(table.columns, 100)}: name them with --text and --label, or --prompt and --completion"
            f"{self.hint}"
        )

    def label_columns(self, schema: Schema, by_name: Columns | None) -> tuple[Columns, list[Candidate]] | None:
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
        ranked = _rank_candidates(self.table, text, candidates, usual) if len(candidates) > 1 else candidates
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
        named = " and ".join([*(each.describe_classes() for each in fit[:2]), *more])
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


def _rank_candidates(table: Table, text: str, candidates: Sequence[Candidate], usual: str) -> list[Candidate]:
    """The candidates with Cohen's kappa of naive Bayes, cross-validated on some rows, the best first.

    Args:
        usual: the column that has the name of a label, which is first among equals.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    rows = islice(table.read([text, *(each.column for each in candidates)]), TRIED)
    by_text = {str(row[0])[:_TRIED_TEXT]: row[1:] for _, row in rows if row[0] is not None}  # equal texts count once
    texts = list(by_text)
    signs = sum(len(IDEOGRAPHS.findall(each)) for each in texts[:100])
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


def _count_repeated(table: Table, columns: Columns) -> int:
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
