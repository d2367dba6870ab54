"""Files of tensors: by the library at first, as views once their header is known; the same numbers and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from turret.bundles import bundle
from turret.errors import BundleError

WHERE = Path("adapter_model.safetensors")
NAMES = st.text("abc._0", min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    bundle._layouts.clear()
    yield
    bundle._layouts.clear()


def read(content: bytes) -> dict[str, Tensor]:
    return bundle.read_tensors(WHERE, np.frombuffer(bytearray(content), np.uint8))


def of(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=8), st.sampled_from([None, {"format": "pt"}]))
def test_a_known_header_gives_the_numbers_of_every_file_that_begins_with_it(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None
) -> None:
    first, second = of(shapes, 1), of(shapes, 2)
    assert equal(read(save(first, metadata)), first)
    assert bundle._layouts
    again = read(save(second, metadata))
    assert equal(again, second)
    assert len({each.untyped_storage().data_ptr() for each in again.values()}) == 1  # views of one run
    assert {name: each.shape for name, each in again.items()} == {name: each.shape for name, each in second.items()}
    if any(each.numel() for each in first.values()):
        assert not equal(again, first)


def test_tensors_of_other_types_are_read_by_the_library_every_time() -> None:
    for dtype in bundle.DTYPES.values():
        mixed = of({"a": (3, 4)}) | of({"b": (2, 5)}, 1, dtype if dtype != torch.float32 else torch.float64)
        assert all(equal(read(save(mixed)), mixed) for _ in range(2))
    assert not bundle._layouts


@pytest.mark.parametrize("change", [lambda whole: whole[:-4], lambda whole: whole + bytes(4), lambda whole: whole[:40]])
def test_a_file_that_is_longer_or_shorter_than_its_known_header_says_is_refused(change) -> None:
    whole = save(of({"a": (3, 4), "b": (7,)}))
    with pytest.raises(BundleError, match="not a readable safetensors") as unknown:
        read(change(whole))
    read(whole)
    assert bundle._layouts
    with pytest.raises(BundleError, match="not a readable safetensors") as known:
        read(change(whole))
    assert str(known.value) == str(unknown.value)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_behind_a_known_header_too(odd: float) -> None:
    numbers = of({"a": (3, 4), "b": (7,)})
    read(save(numbers))
    numbers["b"][2] = odd
    with pytest.raises(BundleError, match="tensor 'b'"):
        read(save(numbers))


def test_a_finite_file_whose_sum_is_not_is_read() -> None:
    numbers = {"a": torch.full((9,), 3e38)}
    assert all(equal(read(save(numbers)), numbers) for _ in range(2))


def test_headers_are_forgotten_before_they_are_many() -> None:
    for number in range(2 * bundle.CACHED_HEADERS):
        read(save({f"t{number}": torch.ones(2)}))
        assert 0 < len(bundle._layouts) <= bundle.CACHED_HEADERS


def test_what_was_read_as_views_can_be_stored_again(tmp_path: Path) -> None:
    whole = save(of({"a": (3, 4), "b": (7,)}))
    read(whole)
    save_file(read(whole), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == whole
