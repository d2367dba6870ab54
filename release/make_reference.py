"""Write the generated parts of the reference from the code. Run by `make reference` and `make docs`.

- docs/reference/commands.md: each command's help and options, from the command line itself
- docs/reference/recipe.md: keys, types and defaults of each table, from the classes of a recipe
- docs/reference/families.md and methods.md: what each family has and what each method can do on it
- docs/reference/http-schema.md: each route with its keys and limits, from the OpenAPI schema of the server

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`. Everything else on a page is
written by hand.

    python release/make_reference.py            write the pages
    python release/make_reference.py --check    write nothing; exit status 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from turret import recipe
from turret.cli.main import app
from turret.families import FAMILIES, Family
from turret.methods import METHODS, SHOWN
from turret.server.app import routes
from turret.tasks import TASKS
from turret.workspace.machine import OPERATIONS, fast_paths, kinds, refusals

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
BLOCK = re.compile(r"(<!-- generated: ([^\n]+?) -->\n)(.*?)(<!-- end of generated -->)", re.DOTALL)
SHARED = ("store", "as_json")  # options of every command, described once at the top of the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# --- commands --------------------------------------------------------------------------------------------------------


def command(name: str, _written: str) -> str:
    """The help of a command, such as `train` or `experiment start`, and a table of its arguments and options."""
    found: Any = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    rows = [parameter(each) for each in found.params if each.name not in SHARED and not each.hidden]
    text = "\n\n".join(" ".join(part.split()) for part in (found.help or "").split("\n\n"))
    return f"{text}\n" + (f"\n{table(('argument or option', 'meaning', 'default'), rows)}" if rows else "")


def parameter(each: Any) -> tuple[str, str, str]:
    """(name, meaning, default) of an argument or an option."""
    names = each.opts if each.opts[0].startswith("-") else [each.metavar or each.name.upper()]
    shown = ", ".join(f"`{name}`" for name in (*names, *each.secondary_opts))
    if each.opts[0].startswith("-") and not each.is_flag:
        shown = f"`{', '.join(names)} {each.metavar or value_name(each)}`"
    meaning = " ".join((each.help or "").split())
    if each.multiple and "repeatable" not in meaning.lower():
        meaning += " Repeatable."
    return shown, meaning, "required" if each.required else default_of(each)


def default_of(each: Any) -> str:
    if each.secondary_opts:
        return f"`{(each.opts if each.default else each.secondary_opts)[0]}`"
    if isinstance(each.default, (list, tuple)):
        return ", ".join(f"`{one}`" for one in each.default)
    return "" if each.default in (None, False) else f"`{each.default}`"


def value_name(each: Any) -> str:
    """What stands after an option: its choices, or the kind of its value."""
    kinds = [kind for kind in alternatives(each.type_descriptor.annotation) if kind is not type(None)]
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return "|".join(map(str, get_args(kinds[0])))
    return {int: "NUMBER", float: "NUMBER"}.get(kinds[0], "TEXT") if len(kinds) == 1 else "TEXT"


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """`int | str | None` -> (int, str, NoneType)."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for each in get_args(annotation) for kind in alternatives(each))
    return (annotation,)


# --- recipe ----------------------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \| (.*) \|$", re.MULTILINE)


def keys(section: str, written: str) -> str:
    """The keys of a table of the recipe: `recipe`, `data`, `task`, `train`, or a method's, such as `method lora`.

    Names, types, bounds and defaults come from the classes. The meaning of a key, and what a missing value means, stand
    on the page (`written`) and stay.
    """
    models: dict[str, type[BaseModel]] = {
        "data": recipe.Data,
        "task": recipe.Task,
        "train": recipe.Train,
        "promise": recipe.Promise,
    }
    models |= {"recipe": recipe.Recipe} | {f"method {kind}": each for kind, each in METHODS.items()}
    fields = {name: each for name, each in models[section].model_fields.items() if not is_table(each)}
    if section.startswith("method "):
        del fields["kind"]
    said = {found[1]: (found[2], found[3]) for found in ROW.finditer(written)}
    rows = [row(name, field, *said.get(name, ("", ""))) for name, field in fields.items()]
    return table(("key", "type", "default", "meaning"), rows)


def is_table(field: FieldInfo) -> bool:
    """Whether a key of the recipe is a table of its own, such as `data`."""
    kinds = alternatives(field.annotation)
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def row(name: str, field: FieldInfo, default: str, meaning: str) -> tuple[str, str, str, str]:
    if not meaning:
        raise SystemExit(f"docs/reference/recipe.md: write the meaning of {name} into its row")
    if field.is_required():
        default = default or "must be given"
    elif field.default is None:
        default = default or "none"
    else:
        default = f"`{toml(field.default)}`"
    kind = ", ".join(f"`{each}`" for each in TASKS) if field is recipe.Task.model_fields["kind"] else kind_of(field)
    return f"`{name}`", kind, default, meaning.replace("\\|", "|")


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def kind_of(field: FieldInfo) -> str:
    """The type of a key in words, with its bounds: `whole number, 1 to 1024`."""
    kinds = [kind for kind in alternatives(field.annotation) if kind is not type(None)]
    if recipe.Size.__metadata__[0] in field.metadata:  # type: ignore[attr-defined]
        return "number, fraction or split"
    words = [each for kind in kinds for each in type_words(kind, field.metadata if len(kinds) == 1 else ())]
    if len(words) == 1:
        return words[0]
    between = "; or " if any("," in each for each in words) else " or "
    return f"{', '.join(words[:-1])}{between}{words[-1]}"


def type_words(kind: Any, metadata: Sequence[Any]) -> list[str]:
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return type_words(inner, [part for each in more for part in getattr(each, "metadata", [each])])
    if get_origin(kind) is Literal:
        return [f"`{toml(each)}`" for each in get_args(kind)]
    if get_origin(kind) in (tuple, list):
        inner = get_args(get_args(kind)[0])[:1] or get_args(kind)[:1]
        return ["list of whole numbers" if inner == (int,) else "list of names"]
    if get_origin(kind) is dict:
        return ["table"]
    if kind is bool:
        return ["true", "false"]
    word = {int: "whole number", float: "number", str: "text"}[kind]
    return [word + (bounds(metadata) if kind in (int, float) else "")]


def bounds(metadata: Sequence[Any]) -> str:
    """`, 1 to 1024`; a bound that only keeps mistakes out, such as 10^12, is left out."""
    low = high = ""
    for each in metadata:
        if isinstance(each, Interval):
            return bounds([part for part in each if part is not None])
        if isinstance(each, (Ge, Gt)):
            value = each.ge if isinstance(each, Ge) else each.gt
            low = f"{value:g}" if isinstance(each, Ge) else f"above {value:g}"  # type: ignore[str-format]
        if isinstance(each, (Le, Lt)) and (each.le if isinstance(each, Le) else each.lt) < 100_000:  # type: ignore[operator]
            high = f"{each.le:g}" if isinstance(each, Le) else f"below {each.lt:g}"  # type: ignore[str-format]
    if low and high:
        return f", {low}, up to {high}" if low.startswith("above") else f", {low} to {high}"
    return f", {low}" if low.startswith("above") else f", {high}" if high else ""


# --- HTTP ------------------------------------------------------------------------------------------------------------

SCHEMA_HEAD = """# HTTP schema

<!-- The whole page is generated by release/make_reference.py. -->

Every route of `turret serve` with its parameters, keys and limits, from the server's own OpenAPI schema. A running
server has the same schema at `GET /openapi.json`. [HTTP](http.md) says what the keys mean.

"""


def schema_page() -> str:
    schema = routes(SimpleNamespace()).openapi()  # type: ignore[arg-type]
    parts = [
        route(f"{method.upper()} {path}", found, schema["components"]["schemas"])
        for path, methods in schema["paths"].items()
        for method, found in methods.items()
    ]
    return SCHEMA_HEAD + "\n".join(parts)


def route(name: str, found: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    text = f"## `{name}`\n\n{' '.join(str(found.get('description', '')).split())}\n"
    parameters = found.get("parameters", ())
    if parameters:
        rows = [
            (f"`{each['name']}`", each["in"], type_of(each["schema"], schemas), need(each, each["schema"]))
            for each in parameters
        ]
        text += "\n" + table(("parameter", "in", "type", "default"), rows)
    for content in found.get("requestBody", {}).get("content", {}).values():
        for title, body in bodies(content["schema"], schemas):
            wanted = body.get("required", ())
            rows = [
                (f"`{key}`", type_of(each, schemas), need({"required": key in wanted}, each))
                for key, each in body["properties"].items()
            ]
            text += f"\nBody, {title}:\n\n" + table(("key", "type", "default"), rows)
    return text


def bodies(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, schema) of each object that a body may be, or be a list of."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [(f"`{name}`", schemas[name])] if "properties" in schemas[name] else bodies(schemas[name], schemas)
    found = [each for part in schema.get("anyOf", ()) for each in bodies(part, schemas)]
    if schema.get("type") == "array":
        found += bodies(schema["items"], schemas)
    unique = dict(found)
    return list(unique.items())


def need(each: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if each.get("required"):
        return "required"
    default = schema.get("default")
    return "" if default is None else f"`{toml(default)}`"


def type_of(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """A schema in words: `whole number, 1 to 4096`, `text of 1 to 256 characters`, `list of …`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        inner = schemas[name]
        if "properties" not in inner:
            return type_of(inner, schemas)
        return "object: " + ", ".join(f"`{key}`" for key in inner["properties"])
    if "const" in schema:
        return f"`{toml(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{toml(each)}`" for each in schema["enum"])
    options = [each for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())) if each.get("type") != "null"]
    if options:
        return "; or ".join(dict.fromkeys(type_of(each, schemas) for each in options))
    kind = schema.get("type")
    if kind == "array":
        return f"list{extent(schema, 'minItems', 'maxItems', 'items')}, each {type_of(schema['items'], schemas)}"
    if kind == "string":
        return f"text{extent(schema, 'minLength', 'maxLength', 'characters')}"
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        if low is None or high is None:
            return word
        if low == high:
            return f"only {low:g}"
        if high == -low:
            return f"{word} within ±{figure(high)}"
        return (
            f"{word}, above {low:g}, up to {figure(high)}"
            if "minimum" not in schema
            else f"{word}, {figure(low)} to {figure(high)}"
        )
    if kind == "object" and schema.get("maxProperties") == 0:
        return "only an empty object"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object, each value {type_of(schema['additionalProperties'], schemas)}"
    return {"boolean": "true or false", "object": "object"}.get(str(kind), "any value")


def extent(schema: Mapping[str, Any], least: str, most: str, unit: str) -> str:
    low, high = schema.get(least, 0), schema.get(most)
    if high is None:
        return ""
    return f" of {figure(low)} to {figure(high)} {unit}" if low else f" of up to {figure(high)} {unit}"


def figure(number: float) -> str:
    if abs(number) == 2**53 - 1:
        return "(2^53 - 1)"
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


# --- families and methods --------------------------------------------------------------------------------------------


def families(_name: str, _written: str) -> str:
    """One row for each family."""
    rows = [
        (
            f"`{each.name}`",
            each.kind,
            ", ".join(kinds(each)),
            ", ".join(f"`{target}`" for target in each.lora_targets),
            "one by one" if each.rows_alone else "packed",
            ", ".join(f"`{path}`" for path in fast_paths(each)) or "none",
        )
        for each in listed()
    ]
    return table(("`model_type`", "kind", "tasks", "LoRA's default layers", "rows of a pass", "fast paths"), rows)


def listed() -> list[Family]:
    """The families of the table, without what was guessed in this process."""
    return [each for each in FAMILIES.values() if not each.guessed]


def cells(_name: str, _written: str) -> str:
    """What each method can do on each family, and the reasons of what it cannot."""
    reasons: dict[str, int] = {}
    rows = [(f"`{each.name}`", *(cell(method, each, reasons) for method in SHOWN.values())) for each in listed()]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return table(("", *(f"`{name}`" for name in SHOWN)), rows) + "\n" + "\n".join(notes) + "\n"


def cell(method: Any, family: Family, reasons: dict[str, int]) -> str:
    """`yes`, or what is possible and the numbers of the notes."""
    found = refusals(method, family)
    possible = {kind: [operation for operation in OPERATIONS if kind not in found[operation]] for kind in kinds(family)}
    said = [reason.replace(family.name, "this family") for each in found.values() for reason in each.values()]
    notes = sorted({reasons.setdefault(reason, len(reasons) + 1) for reason in said})
    words = {kind: "yes" if list(OPERATIONS) == able else ", ".join(able) or "no" for kind, able in possible.items()}
    text = (
        next(iter(words.values()))
        if len(set(words.values())) == 1
        else "; ".join(f"{kind}: {word}" for kind, word in words.items())
    )
    return text + (f" (note {', '.join(map(str, notes))})" if notes else "")


# --- pages -----------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[str, str], str]] = {
    "command": command,
    "keys": keys,
    "families": families,
    "cells": cells,
}


def filled(text: str) -> str:
    """A page with each of its generated parts written again."""

    def block(found: re.Match[str]) -> str:
        kind, _, name = found[2].partition(" ")
        return f"{found[1]}\n{GENERATORS[kind](name, found[3])}\n{found[4]}"

    return BLOCK.sub(block, text)


def pages() -> dict[Path, str]:
    """Every page with a generated part, as it should be."""
    named = [PAGES / name for name in ("commands.md", "recipe.md", "families.md", "methods.md")]
    return {page: filled(page.read_text(encoding="utf-8")) for page in named} | {
        PAGES / "http-schema.md": schema_page()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    check = parser.parse_args().check
    stale = [
        (page, text) for page, text in pages().items() if not page.exists() or page.read_text(encoding="utf-8") != text
    ]
    for page, text in stale:
        print(f"{page.relative_to(ROOT)} is out of date: run `make reference`" if check else f"wrote {page.name}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
