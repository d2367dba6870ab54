"""A valid reference survives a round trip; everything else is refused with one line of printable ASCII."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.errors import BadReference
from turret.reference import Reference, check_alias, check_name

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,99}", fullmatch=True).filter(
    lambda name: name.isascii() and ".." not in name and not name.endswith(".")
)
aliases = st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True).filter(str.isascii)
references = st.one_of(
    st.builds(Reference, names),
    st.builds(Reference, names, version=st.integers(1, 999_999_999)),
    st.builds(Reference, names, alias=aliases),
)


@given(references)
def test_a_reference_survives_being_written_and_read(reference: Reference) -> None:
    assert Reference.parse(str(reference)) == reference


@given(st.text())
def test_any_text_is_either_read_exactly_or_refused_in_one_ascii_line(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except BadReference as refusal:
        message = str(refusal)
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 300
    else:
        assert str(reference) == text
        assert re.fullmatch(r"[a-z0-9][a-z0-9._@-]*", text)
        assert ".." not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@3",
        "..",
        ".",
        "a..b",
        "../etc/passwd",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "%2e%2e",
        "a%2fb",
        "a\0b",
        "a" * 101,
        "Sentiment",
        "a" * 10_000,
        "s\u0435ntiment",  # Cyrillic e
        "\uff53entiment",  # full-width s
        "\u0661",  # an Arabic digit
        "a@\u0661",
        "-rf",
        "--help",
        ".hidden",
        "a.",
        "a b",
        " a",
        "a\n",
        "a@1\n",
        "a@",
        "a@0",
        "a@01",
        "a@-1",
        "a@1.5",
        "a@1234567890",
        "a@Production",
        "a@-x",
        "a@x@y",
        "a@" + "x" * 33,
        "a@../b",
        "\u202ea",
        "a\ud800",
    ],
)
def test_attacks_are_refused(text: str) -> None:
    with pytest.raises(BadReference) as refusal:
        Reference.parse(text)
    assert str(refusal.value).isascii()


def test_a_refusal_names_what_was_given_and_what_is_expected() -> None:
    with pytest.raises(BadReference, match=r"bad adapter name '\.\./x': expected .* such as sentiment"):
        Reference.parse("../x")
    with pytest.raises(BadReference, match=r"bad reference 'a@0': .* such as a@3 or an alias such as a@production"):
        Reference.parse("a@0")


def test_names_and_aliases_are_checked_alone_too() -> None:
    assert check_name("sentiment.v2_x-1") == "sentiment.v2_x-1"
    assert check_alias("candidate-2") == "candidate-2"
    for bad in ("3", "", "Production", "-x", "a" * 33):
        with pytest.raises(BadReference):
            check_alias(bad)
