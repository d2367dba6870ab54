"""Checks the arguments of a public call, so that a wrong one costs one line instead of a traceback from deep inside.

Also names of devices, which recipes, commands and Python check.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, ParamSpec, TypeVar, get_args, get_origin, is_typeddict

from turret.errors import BadArgument, quote

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)
Check = Callable[[object], bool]

_LIST: tuple[str, Check] = (
    "a list",
    lambda value: isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)),
)
_FUNCTION: tuple[str, Check] = ("a function", callable)
_DICTIONARY: tuple[str, Check] = ("a dictionary", lambda value: isinstance(value, Mapping))
_TYPES: dict[str, tuple[str, Check]] = {  # the types of annotations: in the words of an error, and whether a value fits
    "str": ("text", lambda value: isinstance(value, str)),
    # numpy's numbers too
    "int": ("a whole number", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "Sequence": _LIST,
    "Iterable": _LIST,
    "Callable": _FUNCTION,
    "Say": _FUNCTION,
    "Ask": _FUNCTION,
    "None": ("None", lambda value: value is None),
    "tuple": ("a tuple", lambda value: isinstance(value, tuple)),
    "Messages": ("a list of messages", lambda value: _fits(value, "Sequence[Mapping]")),
    "Mapping": _DICTIONARY,
    "JsonMapping": _DICTIONARY,
    "JsonObject": _DICTIONARY,
    "dict": _DICTIONARY,
}
_UNCHECKED = (
    "M",
    "JsonValue",
    "Plain",
    "Source",
    "Texts",
)  # any model; any JSON; data and texts, whose readers say more


def check_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises BadArgument for an unknown, missing or ill-typed argument.

    Types are compared by the words of the annotations, so none has to be imported: a class by its name.
    """
    name = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def expected() -> tuple[inspect.Signature, dict[str, tuple[str, ...]]]:
        signature = inspect.signature(function)
        many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [each for each in signature.parameters.values() if each.kind not in many]
        typed = [each for each in named if each.annotation is not each.empty]
        spelt = {each.name: _alternatives(str(each.annotation)) for each in typed}
        return signature, {key: tuple(_spelt_out(each, function) for each in parts) for key, parts in spelt.items()}

    @functools.wraps(function)
    def call(*places: P.args, **names: P.kwargs) -> T:
        signature, types = expected()
        try:
            bound = signature.bind(*places, **names)
        except TypeError as error:
            raise BadArgument(f"{name}: {error}: {_remedy(names, signature)}") from None
        for key, value in bound.arguments.items():
            if isinstance(value, str) and "\0" in value and "Path" in types.get(key, ()):
                raise BadArgument(f"{name}: {key}: no path has the character NUL, given {quote(value)}: leave it out")
            if key in types and not _fits_one(value, types[key]):
                words = " or ".join(dict.fromkeys(map(_in_words, types[key])))
                made = ": make one of data with turret.Recipe(data=...)" if words == "a Recipe" else ""
                raise BadArgument(f"{name}: {key}: expected {words}, given {_describe_value(value)}{made}")
        return function(*places, **names)

    return call


def checked_methods(kind: C) -> C:
    """The class, with every public method and `__init__` checked as `check_arguments` does."""
    for name, value in list(vars(kind).items()):
        if inspect.isfunction(value) and (name == "__init__" or not name.startswith("_")):
            setattr(kind, name, check_arguments(value))
    return kind


def _spelt_out(wanted: str, function: Callable[..., object]) -> str:
    """With the alternatives of a named `Literal`, such as `Scope`, and a mapping for a TypedDict, in a sequence too."""
    for name in re.findall(r"\w+", wanted):
        alias = getattr(inspect.unwrap(function), "__globals__", {}).get(name)
        if get_origin(alias) is Literal:
            wanted = wanted.replace(name, f"Literal[{str(get_args(alias))[1:-1]}]")
        elif is_typeddict(alias) or get_origin(alias) is Mapping:
            wanted = re.sub(rf"\b{name}\b", "Mapping", wanted)
    return wanted


def _remedy(given: Iterable[str], signature: inspect.Signature) -> str:
    known = [key for key in signature.parameters if key != "self"]
    unknown = next((key for key in given if key not in known), None)
    near = difflib.get_close_matches(unknown, known, n=1) if unknown is not None else []
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'no argument'}"


def _describe_value(value: object) -> str:
    if isinstance(value, (list, tuple)) and value:
        return f"{quote(value, 40)} of {' and '.join(sorted({type(each).__name__ for each in value})[:3])}"
    return quote(value) if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _alternatives(annotation: str) -> tuple[str, ...]:
    """`str | Sequence[str | Path] | None` -> its three parts."""
    parts, depth, start = [], 0, 0
    for place, mark in enumerate(annotation):
        depth += (mark in "[(") - (mark in "])")
        if mark == "|" and depth == 0:
            parts.append(annotation[start:place].strip())
            start = place + 1
    return (*parts, annotation[start:].strip())


def _fits_one(value: object, wanted: Iterable[str]) -> bool:
    return any(_fits(value, each) for each in wanted)


def _fits(value: object, wanted: str) -> bool:
    head, _, inner = wanted.partition("[")
    head = head.rpartition(".")[2]
    if head == "Literal":
        return value in ast.literal_eval(f"({inner[:-1]},)")
    if head in _UNCHECKED:
        return True
    if head == "Input":
        return isinstance(value, str) or _is_a(value, "Prompt")
    if head not in _TYPES:
        return _is_a(value, head)
    _, check = _TYPES[head]
    if not check(value):
        return False
    if head in ("Sequence", "Iterable") and inner and isinstance(value, (list, tuple)):
        return all(_fits_one(each, _alternatives(inner[:-1])) for each in value)
    return True


def _is_a(value: object, name: str) -> bool:
    return any(each.__name__ == name for each in type(value).__mro__)


def _in_words(wanted: str) -> str:
    head, _, inner = wanted.partition("[")
    if head == "Literal":
        return " or ".join(map(str, ast.literal_eval(f"({inner[:-1]},)")))
    if head in ("Sequence", "Iterable") and inner in ("str]", "float]"):
        return "a list of " + ("texts" if inner == "str]" else "numbers")
    return _TYPES[head][0] if head in _TYPES else f"a {head.rpartition('.')[2]}"


# --- names of devices -------------------------------------------------------------------------------------------------
# The names of the devices on which a base computes, for recipes, commands and Python.


DEVICES = "auto, cpu, cuda, cuda:1 or mps"  # for error texts
_NAME = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def is_device(name: str) -> bool:
    """Whether a device can have this name, on some machine."""
    return _NAME.fullmatch(name) is not None
