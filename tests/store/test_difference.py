"""The distance between two versions is that of their weights, multiplied out."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from store.bundles import safetensors, write_bundle

from turret.errors import Corrupt
from turret.store.difference import weight_distance

LAYER = "base_model.model.encoder.layer.{}.query"


def bundle(tmp_path, tensors: dict[str, Any], config: dict[str, Any] | None = None, **said: Any):
    more = {"adapter_config.json": json.dumps(config or {}).encode()}
    return write_bundle(tmp_path, safetensors(tensors), more, said)


def files(folder):
    return {path.name: path for path in folder.iterdir()}


def lora(r: int, seed: int, layers: int = 2) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        found[LAYER.format(layer) + ".lora_A.weight"] = draw.normal(size=(r, 12)).astype(np.float32)  # (R, D_in)
        found[LAYER.format(layer) + ".lora_B.weight"] = draw.normal(size=(9, r)).astype(np.float32)  # (D_out, R)
    return found


def multiplied_out(tensors: dict[str, Any], scaling: float) -> np.ndarray:
    """The reference: B A of every layer, in one row."""
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    products = [
        scaling * tensors[f"{layer}.lora_B.weight"].astype(float) @ tensors[f"{layer}.lora_A.weight"].astype(float)
        for layer in layers
    ]
    return np.concatenate([product.reshape(-1) for product in products])


@pytest.mark.parametrize("ranks", [(4, 4), (4, 8), (8, 2), (16, 16)])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_compared_by_its_product_whatever_the_ranks(tmp_path, ranks, rslora) -> None:
    a, b = lora(ranks[0], 1), lora(ranks[1], 2)
    scalings = [32 / (r**0.5 if rslora else r) for r in ranks]
    folders = [
        bundle(tmp_path, each, {"peft_type": "LORA", "r": r, "lora_alpha": 32, "use_rslora": rslora})
        for each, r in zip((a, b), ranks, strict=True)
    ]
    groups, moved, rest = weight_distance(*map(files, folders))
    left, right = multiplied_out(a, scalings[0]), multiplied_out(b, scalings[1])
    assert rest == ()
    assert [(each.group, each.tensors) for each in groups] == [("encoder.layer.*.query", 2)]
    assert moved is not None
    assert moved.norm == pytest.approx(np.linalg.norm(left), rel=1e-12)
    assert moved.distance == pytest.approx(np.linalg.norm(right - left) / np.linalg.norm(left), rel=1e-12)


def test_factors_that_differ_with_the_same_product_are_not_apart(tmp_path) -> None:
    """A and B in another basis, and half the scaling with twice the B, give the same model."""
    a = lora(4, 1)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(4, 4)))[0]
    b = {name: turn @ value if "lora_A" in name else 2 * value @ turn.T for name, value in a.items()}
    config = {"peft_type": "LORA", "r": 4}
    folders = bundle(tmp_path, a, {**config, "lora_alpha": 8}), bundle(tmp_path, b, {**config, "lora_alpha": 4})
    _, moved, _ = weight_distance(*map(files, folders))
    assert moved is not None
    assert moved.distance < 1e-12
    spoiled = {name: value * 1.001 if name.endswith("0.query.lora_A.weight") else value for name, value in b.items()}
    _, moved, _ = weight_distance(files(folders[0]), files(bundle(tmp_path, spoiled, {**config, "lora_alpha": 4})))
    assert moved is not None
    assert 1e-4 < moved.distance < 1e-3


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64"])
def test_other_tensors_are_compared_as_they_are(tmp_path, dtype) -> None:
    draw = np.random.default_rng(0)
    a, b = ({"head.weight": (draw.normal(size=(7, 5)) * 8).astype(dtype)} for _ in range(2))
    groups, _, _ = weight_distance(files(bundle(tmp_path, a)), files(bundle(tmp_path, b)))
    left, right = a["head.weight"].astype(float), b["head.weight"].astype(float)
    assert groups[0].distance == pytest.approx(np.linalg.norm(right - left) / np.linalg.norm(left), rel=1e-12)


def test_bfloat16_is_read(tmp_path) -> None:
    values = np.asarray([1.0, -2.5, 0.125], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    zeros = np.zeros(3, np.uint16)
    _, moved, _ = weight_distance(files(bundle(tmp_path, {"a": bits})), files(bundle(tmp_path, {"a": zeros})))
    assert moved is not None
    assert (moved.norm, moved.distance) == (np.linalg.norm(values), 1.0)


def test_equal_versions_are_exactly_not_apart_and_from_zero_there_is_no_share(tmp_path) -> None:
    a, zero, empty = {"a": np.ones(3)}, {"a": np.zeros(3)}, {"a": np.zeros((0, 4))}
    one, nothing, none = (files(bundle(tmp_path, each)) for each in (a, zero, empty))
    assert weight_distance(one, one)[1].distance == 0.0
    assert weight_distance(nothing, nothing)[1].distance == 0.0
    assert weight_distance(nothing, one)[1].distance is None
    assert weight_distance(none, none)[1].distance == 0.0


def test_what_only_one_has_or_has_another_shape_is_named(tmp_path) -> None:
    a = {"both": np.ones(2), "a": np.ones(2), "shape": np.ones(2), "layer.lora_A.weight": np.ones((1, 2))}
    b = {"both": np.ones(2), "b": np.ones(2), "shape": np.ones(3)}
    a["layer.lora_B.weight"] = np.ones((2, 1))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    groups, moved, rest = weight_distance(files(bundle(tmp_path, a, config)), files(bundle(tmp_path, b)))
    assert [each.group for each in groups] == ["both"]
    assert moved.tensors == 1
    assert rest == ("a", "b", "layer", "shape")
    assert (
        weight_distance(files(bundle(tmp_path, {"a": np.ones(1)})), files(bundle(tmp_path, {"b": np.ones(1)})))[1]
        is None
    )


def test_diff_sets_two_versions_side_by_side(store, tmp_path) -> None:
    recipe = "seed = {}\n[train]\nlr = {}\n"
    for number, (rate, accuracy) in enumerate([(1e-3, 0.8), (3e-3, 0.9)], 1):
        said = {
            "method": {"kind": "lora", "r": 8},
            "lineage": {"data": f"sha256:{number}", "recipe": recipe.format(1, rate)},
        }
        metrics = {"test": {"accuracy": accuracy, "per_class": {"x": {"f1": accuracy}}}, f"only {number}": {"loss": 1}}
        store.put("a", bundle(tmp_path, {"w": np.full(4, number * 1.0)}, None, **said), metrics=metrics)
    found = store.diff("a@1", "a@2")
    assert found.versions == ("a@1", "a@2")
    assert found.differs == {"lineage.data": ("sha256:1", "sha256:2"), "lineage.recipe.train.lr": (1e-3, 3e-3)}
    assert found.metrics["test"]["accuracy"] == (0.8, 0.9, pytest.approx(0.1))
    assert found.metrics["test"]["per_class.x.f1"][2] == pytest.approx(0.1)
    assert found.metrics["only 1"]["loss"] == (1, None, None)
    assert found.moved is not None
    assert found.moved.distance == 1.0
    json.dumps(found.as_json(), allow_nan=False)


def test_a_damaged_version_is_not_compared(store, make_bundle, put) -> None:
    put()
    store.put("a", make_bundle(b"no safetensors"))
    with pytest.raises(Corrupt, match="is not a readable safetensors file"):
        store.diff("a@1", "a@2")


@pytest.mark.slow
def test_diff_loads_no_torch(store, put, where) -> None:
    put(), put()
    code = (
        "import sys; from turret.store import Store; store = Store(sys.argv[1])\n"
        "store.diff('a@1', 'a@2'); store.verify()\n"
        "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, where], check=True)
