"""arrow_quant_v2's calls: names, argument orders and columns as its programs know them, and weights given back."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import flightquant
from flightquant.compat import (
    ArrowQuantV2,
    AsyncArrowQuantV2,
    DiffusionQuantConfig,
    dequantize,
    numpy_to_arrow_table,
)
from flightquant.errors import InvalidRequestError, LayerError

COLUMNS = ["layer_name", "quantized_data", "scales", "zero_points", "shape", "bit_width"]
RNG = np.random.default_rng(5)
WEIGHTS = {
    "layers.1.weight": RNG.standard_normal((6, 256), dtype=np.float32),
    "layers.0.weight": RNG.standard_normal((4, 96), dtype=np.float32),
    "bias": RNG.standard_normal(100, dtype=np.float32),
}
ERROR_BOUND = {2: 1.5, 4: 0.3, 8: 0.02}


def nan_weights() -> dict[str, Any]:
    bad = WEIGHTS["layers.0.weight"].copy()
    bad[1, 2] = np.nan
    return {"a": WEIGHTS["layers.1.weight"], "bad": bad, "z": WEIGHTS["bias"]}


def check_restored(result: Any, bits: int, weights: dict[str, Any] = WEIGHTS) -> None:
    restored = dequantize(result)
    assert list(restored) == list(weights)
    for name, array in weights.items():
        assert restored[name].shape == array.shape
        assert np.abs(restored[name] - array).max() < ERROR_BOUND[bits]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("quantize", ["weights", "bit_width"]),
        ("quantize_batch", ["weights_dict", "bit_width", "continue_on_error", "parallel"]),
        (
            "quantize_batch_with_progress",
            ["weights_dict", "bit_width", "progress_callback", "continue_on_error", "parallel"],
        ),
        ("quantize_arrow", ["weights_table", "bit_width"]),
        ("quantize_arrow_batch", ["record_batch", "bit_width"]),
        ("quantize_batch_arrow", ["weights_table", "bit_width", "continue_on_error"]),
        ("quantize_batch_smart", ["weights", "bit_width"]),
    ],
)
@pytest.mark.parametrize("kind", [ArrowQuantV2, AsyncArrowQuantV2])
def test_calls_have_their_names_and_argument_order(kind: type, call: str, arguments: list[str]) -> None:
    assert list(inspect.signature(getattr(kind, call)).parameters)[1:] == arguments


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("call", ["quantize", "quantize_batch", "quantize_batch_with_progress"])
def test_a_dict_comes_back_layer_by_layer_in_the_width_asked_for(call: str, bits: int) -> None:
    results = getattr(ArrowQuantV2(mode="diffusion"), call)(WEIGHTS, bits)
    assert list(results) == list(WEIGHTS)
    for name, row in results.items():
        assert sorted(row) == sorted(COLUMNS[1:])
        rows, cols = (1, *WEIGHTS[name].shape)[-2:]
        words = cols if bits == 8 else -(-cols * bits // 32) * 4
        assert len(row["quantized_data"]) == rows * words
        assert len(row["scales"]) == len(row["zero_points"]) == rows * {256: 2, 96: 3, 100: 1}[cols]
        assert row["shape"] == list(WEIGHTS[name].shape)
        assert row["bit_width"] == bits
    check_restored(results, bits)


def test_lists_of_floats_are_taken() -> None:
    as_lists = {"w": WEIGHTS["bias"].tolist()}
    assert ArrowQuantV2().quantize(as_lists, 8) == ArrowQuantV2().quantize_batch({"w": WEIGHTS["bias"]}, 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_arrow_call_answers_with_the_same_rows(bits: int) -> None:
    table = numpy_to_arrow_table(WEIGHTS)
    assert table.column("weights").num_chunks == len(WEIGHTS)
    quantizer = ArrowQuantV2("base")
    result = quantizer.quantize_arrow(table, bits)
    assert result.schema.names == COLUMNS
    assert result.schema.field("bit_width").type == pa.uint8()
    check_restored(result, bits)
    whole = table.combine_chunks()
    assert quantizer.quantize_arrow(whole, bits).equals(result)
    assert quantizer.quantize_batch_arrow(table, bit_width=bits).equals(result)
    assert quantizer.quantize_batch_smart(WEIGHTS, bits).equals(result)
    assert quantizer.quantize_batch_smart(table, bits).equals(result)
    batch = quantizer.quantize_arrow_batch(whole.to_batches()[0], bits)
    assert isinstance(batch, pa.RecordBatch)
    assert pa.Table.from_batches([batch]).equals(result)
    check_restored(batch, bits)


def test_the_bytes_are_the_library_call_s() -> None:
    name = "layers.1.weight"
    answer = flightquant.quantize({name: WEIGHTS[name]}, "int4", group_size=128, symmetric=False)
    row = ArrowQuantV2().quantize_batch(WEIGHTS)[name]
    assert row["quantized_data"] == answer["quantized_data"][0].as_py()
    assert row["zero_points"] == answer["zero_points"][0].as_py()


def test_a_table_without_shapes_has_one_row_a_layer() -> None:
    table = pa.table({"layer_name": ["w"], "weights": pa.array([[1.0] * 64], pa.list_(pa.float32())), "note": ["x"]})
    assert ArrowQuantV2().quantize_arrow(table)["shape"].to_pylist() == [[64]]


def test_one_thread_gives_the_same_bytes() -> None:
    quantizer = ArrowQuantV2()
    assert quantizer.quantize_batch(WEIGHTS, 4, parallel=False) == quantizer.quantize_batch(WEIGHTS, 4, parallel=True)


def test_other_float_dtypes_are_taken_as_they_are() -> None:
    halves = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    check_restored(ArrowQuantV2().quantize_batch(halves, 8), 8)


def test_progress_is_told_and_its_failures_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, float]] = []
    ArrowQuantV2().quantize_batch_with_progress(WEIGHTS, 4, lambda name, share: told.append((name, share)))
    assert told == [(name, (i + 1) / 3) for i, name in enumerate(WEIGHTS)]

    def broken(name: str, share: float) -> None:
        raise RuntimeError(name)

    assert len(ArrowQuantV2().quantize_batch_with_progress(WEIGHTS, 4, progress_callback=broken)) == 3
    assert "progress callback" in caplog.text


def test_a_bad_layer_ends_the_call_and_is_named() -> None:
    with pytest.raises(LayerError, match=r'layer "bad": .*NaN') as caught:
        ArrowQuantV2().quantize_batch(nan_weights(), 4)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(LayerError, match=r'layer "bad": .*NaN'):
        ArrowQuantV2().quantize_arrow(numpy_to_arrow_table(nan_weights()))


def test_what_is_no_layer_ends_the_call_and_is_named() -> None:
    with pytest.raises(LayerError, match='layer "words"'):
        ArrowQuantV2().quantize_batch({"words": np.array(["x"])})


def test_bad_layers_are_left_out_and_reported() -> None:
    weights = {**nan_weights(), "words": np.array(["x"])}
    with pytest.warns(UserWarning, match='layer "bad"'):
        results = ArrowQuantV2().quantize_batch(weights, 4, continue_on_error=True)
    assert list(results) == ["a", "z"]
    assert list(results.failed) == ["bad", "words"]
    with pytest.warns(UserWarning, match='layer "bad"'):
        table = ArrowQuantV2().quantize_batch_arrow(numpy_to_arrow_table(nan_weights()), 4, True)
    assert table["layer_name"].to_pylist() == ["a", "z"]
    assert list(json.loads(table.schema.metadata[b"flightquant.failed_layers"])) == ["bad"]
    assert table.schema.names == COLUMNS


@pytest.mark.parametrize("call", ["quantize", "quantize_batch", "quantize_arrow", "quantize_batch_smart"])
@pytest.mark.parametrize("bits", [0, 3, 16, True, "4"])
def test_a_width_that_is_none_is_refused(call: str, bits: Any) -> None:
    weights = numpy_to_arrow_table(WEIGHTS) if "arrow" in call else WEIGHTS
    with pytest.raises(InvalidRequestError, match="expected 2, 4 or 8"):
        getattr(ArrowQuantV2(), call)(weights, bits)


@pytest.mark.parametrize(
    "call", ["quantize_diffusion_model", "quantize_diffusion_model_arrow", "quantize_layer_auto", "get_markov_metrics"]
)
def test_what_had_no_sound_meaning_names_what_to_use(call: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{call} is not supported; use "):
        getattr(ArrowQuantV2(), call)()


@pytest.mark.parametrize(
    "weights",
    [[1.0], {"w": [1.0]}, {"w": np.ones(3)}, {"w": np.ones(0, np.float32)}, {"w": np.ones(3, np.int8)}],
    ids=str,
)
def test_what_no_table_can_be_made_of_is_refused(weights: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected a"):
        numpy_to_arrow_table(weights)


def test_tables_share_memory_with_their_arrays() -> None:
    array = WEIGHTS["layers.1.weight"]
    values = numpy_to_arrow_table({"w": array})["weights"].chunk(0).values
    assert values.buffers()[1].address == array.ctypes.data


def test_a_table_without_a_column_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match='"weights" is missing'):
        ArrowQuantV2().quantize_arrow(pa.table({"layer_name": ["a"]}))
    with pytest.raises(InvalidRequestError, match="no column 'quantized_data'"):
        dequantize(pa.table({"layer_name": ["a"]}))


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of diffusion, base"):
        ArrowQuantV2(mode="turbo")


@pytest.mark.parametrize(("profile", "bits", "group"), [("edge", 2, 256), ("local", 4, 128), ("cloud", 8, 64)])
def test_profiles(profile: str, bits: int, group: int) -> None:
    config = DiffusionQuantConfig.from_profile(profile)
    assert (config.bit_width, config.group_size, config.deployment_profile) == (bits, group, profile)


@pytest.mark.parametrize(
    "options",
    [
        {"bit_width": 3},
        {"modality": "smell"},
        {"deployment_profile": "moon"},
        {"group_size": 100},
        {"min_accuracy": 2.0},
        {"beta_schedule": "square"},
        {"enable_transition_optimization": True},
        {"enable_mixed_precision": True},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        DiffusionQuantConfig(**options)
    with pytest.raises(InvalidRequestError, match="no profile"):
        DiffusionQuantConfig.from_profile("moon")


def test_the_async_twin_gives_the_same() -> None:
    told: list[str] = []

    async def run() -> None:
        quantizer = AsyncArrowQuantV2()
        results, table, _ = await asyncio.gather(
            quantizer.quantize_batch_with_progress(WEIGHTS, 4, lambda name, share: told.append(name)),
            quantizer.quantize_arrow(numpy_to_arrow_table(WEIGHTS)),
            quantizer.quantize_batch_smart(WEIGHTS),
        )
        assert results == ArrowQuantV2().quantize_batch(WEIGHTS, 4)
        assert table.equals(ArrowQuantV2().quantize_arrow(numpy_to_arrow_table(WEIGHTS)))
        with pytest.raises(InvalidRequestError, match="not supported"):
            await quantizer.quantize_diffusion_model_async("a", "b")

    asyncio.run(run())
    assert told == list(WEIGHTS)
