"""The client against a server that answers by the reference: same table as in-process, whatever is cut and joined."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from fq_testing import STORAGE

from flightquant import dequantize, reference, wire
from flightquant.client import QuantClient, batching
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.layers import as_layer, layers_batch
from flightquant.reference import quality
from flightquant.spec import Command

Serve = Callable[..., Any]
OPTIONS: list[dict[str, Any]] = [
    {"scheme": "int4", "group_size": 32},
    {"scheme": "int4", "symmetric": False},
    {"scheme": "int8"},
    {"scheme": "int8", "symmetric": False, "scale_dtype": "float16"},
    {"scheme": "int8", "granularity": "tensor"},
    {"scheme": "int8", "granularity": "tensor", "symmetric": False},
    {"scheme": "int3", "symmetric": False},
    {"scheme": "int8", "packing": "fbgemm"},
    {"scheme": "int4", "packing": "onnx", "symmetric": False, "group_size": 128},
    {"scheme": "fp8_e4m3", "granularity": "tensor"},
    {"scheme": "fp8_e4m3", "granularity": "block"},
    {"scheme": "mxfp4"},
    {"scheme": "nvfp4"},
    {"scheme": "q8_0"},
    {"scheme": "q4_0"},
    {"scheme": "q5_1"},
    {"scheme": "iq4_nl"},
    {"scheme": "nf4"},
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MIN_BYTES", 32 << 10)
    monkeypatch.setattr(batching, "TARGET_BYTES", 256 << 10)
    monkeypatch.setattr(batching, "MAX_BYTES", 512 << 10)


def check_row(row: dict[str, Any], tensor: np.ndarray, command: Command) -> None:
    """One answer row is what the reference makes of the whole tensor, bit for bit."""
    layer = as_layer(row["layer_name"], tensor)
    spec = command.layer_spec()
    matrix = layer.data.reshape(reference.matrix_shape(layer.shape))
    wanted = reference.quantize(matrix, spec, layer.dtype)
    assert row["status"] == "ok", row["error"]
    assert row["shape"] == list(layer.shape)
    assert row["row_offset"] is None
    assert row["quantized_data"] == wanted.data.tobytes()
    for name, values in (("scales", wanted.scales), ("zero_points", wanted.zero_points)):
        assert (row[name] is None) == (values is None)
        if values is not None:
            assert np.array(row[name], np.float32).tobytes() == values.tobytes()
    for name, column in zip(("sqnr_db", "cosine", "max_abs_error"), quality.columns(wanted.sums), strict=True):
        assert np.float32(row[name]) == column[0]
    assert row["bytes_in"] == layer.nbytes
    scales = sum(a.nbytes for a in (wanted.scales, wanted.zero_points) if a is not None)
    assert row["bytes_out"] == wanted.data.nbytes + scales


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_in_parts_equal_whole_layers(serve: Serve, options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(5)
    weights = {
        "first": rng.normal(size=(3, 256)),
        "large": rng.normal(size=(700, 384)),
        "deep": rng.normal(size=(9, 64, 512)),
        "small": rng.normal(size=(5, 128)),
    }
    if options["scheme"] == "nf4":
        weights |= {"crossing": rng.normal(size=(5001, 32)), "short": rng.normal(size=(3, 7))}
    cast = {name: tensor.astype(STORAGE[dtype]) for name, tensor in weights.items()}
    server = serve()
    with QuantClient(server.uri) as client:
        table = client.quantize(cast, **options)
    command = Command.build(**options)
    assert table.column("layer_name").to_pylist() == list(weights)
    for row in table.to_pylist():
        check_row(row, cast[row["layer_name"]], command)
    cannot = options.get("granularity") == "tensor" and not options.get("symmetric", True)
    assert (len(server.faults.received) <= 4) == cannot


def test_the_header_for_quality_sums_is_sent(serve: Serve) -> None:
    server = serve()
    with QuantClient(server.uri) as client:
        client.quantize({"w": np.ones((2, 128), np.float32)}, "int4")
    assert wire.SUMS_HEADER in server.faults.headers


def test_mixed_dtypes_come_back_in_the_order_given(serve: Serve) -> None:
    rng = np.random.default_rng(6)
    dtypes = ["float32", "bfloat16", "float32", "float16", "float64", "bfloat16", "float32"]
    weights = {f"w{i}": rng.normal(size=(i + 1, 128)).astype(STORAGE[dtype]) for i, dtype in enumerate(dtypes)}
    with QuantClient(serve().uri) as client:
        table = client.quantize(weights, "int8")
    assert table.column("layer_name").to_pylist() == list(weights)
    assert table.column("scale_dtype").to_pylist()[:5] == ["float32", "bfloat16", "float32", "float16", "float32"]
    for row in table.to_pylist():
        check_row(row, weights[row["layer_name"]], Command.build(scheme="int8"))


def test_torch_and_ml_dtypes_bfloat16_are_sent_as_they_are(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.randn(16, 128, dtype=torch.bfloat16)
    same = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    server = serve()
    with QuantClient(server.uri) as client:
        rows = client.quantize({"torch": tensor, "ml_dtypes": same}, "int4").to_pylist()
    assert {row["bytes_in"] for row in rows} == {16 * 128 * 2}
    assert len(server.faults.received) == 1
    for row in rows:
        check_row(row, same, Command.build(scheme="int4"))


def chunked() -> pa.Table:
    batches = [
        layers_batch([as_layer(f"{chunk}.{i}", np.full((2, 128), chunk + i + 1, np.float32)) for i in range(3)])
        for chunk in range(4)
    ]
    return pa.Table.from_batches(batches)


class Stream:
    """Something of another library's, known by its Arrow method alone."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "given",
    [
        lambda table: table,
        lambda table: table.to_reader(),
        lambda table: Stream(table),
        lambda table: table.to_batches(),
        lambda table: iter(table.to_batches()),
        lambda table: table.combine_chunks().to_batches()[0],
    ],
    ids=["table", "reader", "stream", "list", "iterator", "batch"],
)
def test_every_chunk_of_arrow_input_is_read(serve: Serve, given: Callable[[pa.Table], Any]) -> None:
    with QuantClient(serve().uri) as client:
        table = client.quantize(given(chunked()), "int8")
    assert table.column("layer_name").to_pylist() == [f"{c}.{i}" for c in range(4) for i in range(3)]
    for name, array in dequantize(table).items():
        chunk, i = map(int, name.split("."))
        np.testing.assert_allclose(array, np.full((2, 128), chunk + i + 1), rtol=0.01)


@pytest.mark.usefixtures("small")
def test_a_slice_of_a_batch_sends_the_slice(serve: Serve) -> None:
    rng = np.random.default_rng(7)
    tensors = {f"w{i}": rng.normal(size=(400 * (i % 2) + 2, 512)).astype(np.float32) for i in range(6)}
    batch = layers_batch([as_layer(n, t) for n, t in tensors.items()])
    batch = batch.append_column("x_id", pa.array(range(6)))
    with QuantClient(serve().uri) as client:
        table = client.quantize(batch.slice(1, 4), "int4")
    assert table.column("layer_name").to_pylist() == ["w1", "w2", "w3", "w4"]
    assert table.column("x_id").to_pylist() == [1, 2, 3, 4]
    for row in table.to_pylist():
        check_row(row, tensors[row["layer_name"]], Command.build(scheme="int4"))


@pytest.mark.usefixtures("small")
def test_the_callers_row_offset_comes_back(serve: Serve) -> None:
    batch = layers_batch([as_layer("w", np.ones((800, 512), np.float32))], [64])
    with QuantClient(serve().uri) as client:
        rows = client.quantize(batch, "int4").to_pylist()
    assert [(row["row_offset"], row["shape"]) for row in rows] == [(64, [800, 512])]


@pytest.mark.usefixtures("small")
def test_a_bad_part_makes_its_layer_bad_and_no_other(serve: Serve) -> None:
    bad = np.ones((800, 512), np.float32)
    bad[700, 3] = np.nan
    weights = {"good": np.ones((4, 128), np.float32), "bad": bad, "after": np.ones((4, 128), np.float32)}
    with QuantClient(serve().uri) as client:
        rows = client.quantize(weights, "int4").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "non_finite", "ok"]
    assert rows[1]["shape"] == [800, 512]
    assert rows[1]["quantized_data"] is None
    assert rows[1]["bytes_in"] == bad.nbytes
    assert rows[1]["error"].startswith(f"weight {700 * 512 + 3} ")


def test_nothing_gives_an_empty_table(serve: Serve) -> None:
    with QuantClient(serve().uri) as client:
        for nothing in ({}, [], chunked().slice(0, 0)):
            table = client.quantize(nothing, "int4")
            assert table.num_rows == 0
            assert table.schema.names == [field.name for field in wire.ANSWER_FIELDS]


def test_metrics_can_be_left_out(serve: Serve) -> None:
    with QuantClient(serve().uri) as client:
        rows = client.quantize({"w": np.ones((2, 128), np.float32)}, "int4", metrics=False).to_pylist()
    assert rows[0]["sqnr_db"] is None


class TestMistakes:
    """What is wrong with the arguments is said before a call is opened."""

    @pytest.mark.parametrize(
        ("weights", "options", "message"),
        [
            ({"w": np.ones(4, np.float32)}, {"scheme": "int9"}, 'unknown scheme "int9"'),
            ({"w": np.ones(4, np.float32)}, {"group_size": 7}, '"group_size" is 7'),
            ({"w": np.ones(4, np.int32)}, {}, 'layer "w" has dtype int32'),
            ({3: np.ones(4, np.float32)}, {}, "name is 3"),
            (3, {}, "weights is a int; expected a mapping"),
        ],
    )
    def test_is_named(self, serve: Serve, weights: Any, options: dict[str, Any], message: str) -> None:
        server = serve()
        with QuantClient(server.uri) as client, pytest.raises(InvalidRequestError, match=message):
            client.quantize(weights, **{"scheme": "int4", **options})
        assert server.faults.received == []

    def test_in_the_middle_of_a_stream_ends_it(self, serve: Serve) -> None:
        weights = {"a": np.ones((1 << 20) + 128, np.float32), "b": np.ones(4, np.int32)}
        with QuantClient(serve().uri) as client, pytest.raises(InvalidRequestError, match='layer "b"'):
            client.quantize(weights, "int4")

    def test_on_error_abort_is_the_servers_to_say(self, serve: Serve, faults: Any) -> None:
        refusing = faults(fail_after=(0, LayerError("non_finite", 'layer "w": weight 0 is not finite')))
        with QuantClient(serve(refusing).uri) as client, pytest.raises(InvalidRequestError, match="weight 0"):
            client.quantize({"w": np.ones((1, 128), np.float32)}, "int4", on_error="abort")


class TestStream:
    def test_answers_come_before_the_next_batch_is_asked_for(self, serve: Serve) -> None:
        answered = threading.Semaphore(0)

        def batches() -> Iterator[pa.RecordBatch]:
            for i in range(5):
                if i:
                    assert answered.acquire(timeout=30)
                yield layers_batch([as_layer(f"w{i}", np.ones((2, 128), np.float32))])

        names = []
        with QuantClient(serve().uri, timeout_s=60) as client:
            for batch in client.stream(batches(), "int4"):
                names += batch.column("layer_name").to_pylist()
                answered.release()
        assert names == [f"w{i}" for i in range(5)]

    def test_progress_tells_each_layer_to_its_end(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch, small: None
    ) -> None:
        told: list[tuple[str, float]] = []
        weights = {"large": np.ones((800, 512), np.float32), "small": np.ones((4, 128), np.float32)}
        with QuantClient(serve().uri) as client:
            client.quantize(weights, "int4", progress=lambda name, fraction: told.append((name, fraction)))
        large = [fraction for name, fraction in told if name == "large"]
        assert len(large) > 2
        assert large == sorted(large)
        assert large[-1] == 1.0
        assert told[-1] == ("small", 1.0)

    def test_lazy_mappings_are_read_as_answers_are_taken(self, serve: Serve) -> None:
        loaded = []

        class Lazy(dict[str, Any]):
            def items(self) -> Any:
                for name in self:
                    loaded.append(name)
                    yield name, np.ones((8, 1 << 17), np.float32)

        weights = Lazy.fromkeys([f"w{i}" for i in range(40)])
        with QuantClient(serve().uri, window_bytes=8 << 20) as client:
            stream = client.stream(weights, "q8_0", metrics=False)
            next(stream)
            assert len(loaded) <= 6
            stream.close()  # type: ignore[attr-defined]

    def test_a_64_mib_batch_is_no_deadlock(self, serve: Serve, faults: Any) -> None:
        batch = layers_batch([as_layer(f"w{i}", np.zeros((1, 1 << 20), np.float32)) for i in range(16)])
        assert batching.batch_bytes(batch) == 64 << 20
        server = serve(faults(read_first=1))
        with QuantClient(server.uri, timeout_s=120) as client:
            table = client.quantize([batch, batch], "int8", metrics=False)
        assert table.num_rows == 32
        assert [rows for rows, _ in server.faults.received] == [4] * 8

    def test_one_client_serves_several_threads(self, serve: Serve) -> None:
        results: dict[int, pa.Table] = {}
        with QuantClient(serve().uri) as client:

            def work(i: int) -> None:
                results[i] = client.quantize({f"w{i}": np.full((4, 128), i + 1, np.float32)}, "int8")

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for i, table in results.items():
            assert table.column("layer_name").to_pylist() == [f"w{i}"]
        assert len(results) == 4
