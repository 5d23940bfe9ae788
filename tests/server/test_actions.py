"""What the actions answer, and that their errors are typed like all others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import check_error, exchange
from fq_testing import request
from pyarrow import flight

import flightquant
from flightquant.cython_core import active_isa, available_isas
from flightquant.describe import describe
from flightquant.schemes import SCHEMES
from flightquant.server.app import Server


def act(client: flight.FlightClient, name: str, body: bytes = b"") -> list[Any]:
    """The action's answers, from JSON."""
    return [json.loads(result.body.to_pybytes()) for result in client.do_action(flight.Action(name, body))]


def test_every_action_is_listed_with_a_line(client: flight.FlightClient) -> None:
    listed = {action.type: action.description for action in client.list_actions()}
    assert set(listed) == {"schemes", "estimate", "version", "quantize_to"}
    assert all(text and "\n" not in text for text in listed.values())


def test_schemes(client: flight.FlightClient) -> None:
    answers = {answer["name"]: answer for answer in act(client, "schemes")}
    assert list(answers) == list(SCHEMES)
    int4 = answers["int4"]
    assert int4["bits"] == 4
    assert int4["group_sizes"] == [32, 64, 128, 256]
    assert int4["defaults"] == {
        "bit_width": 4, "packing": "ct-int32", "granularity": "group", "group_size": 128, "symmetric": True,
        "calibration": "absmax", "scale_dtype": "the weights' own"
    }  # fmt: skip
    assert "compressed-tensors" in int4["exact_with"]
    assert answers["q4_0"]["packing"] == "gguf"
    assert answers["q4_0"]["defaults"]["scale_dtype"] == "float16"
    assert answers["nf4"]["packing"] == "bnb-hi-first"
    assert answers["nf4"]["defaults"] == {
        "bit_width": 4, "packing": "bnb-hi-first", "granularity": "group", "group_size": 64, "symmetric": True,
        "calibration": "absmax", "scale_dtype": "float32"
    }  # fmt: skip
    assert list(int4["packings"]) == ["ct-int32", "gptq", "gptq-v2", "awq", "onnx", "fbgemm"]
    assert answers["arrowquant"]["bit_widths"] == [4, 2, 8]
    assert answers["arrowquant"]["defaults"]["symmetric"] is False
    assert int4["packings"]["onnx"]["group_sizes"] == [16, 32, 64, 128, 256]
    assert answers == {answer["name"]: answer for answer in describe()}


def test_version(server: Server, client: flight.FlightClient) -> None:
    (answer,) = act(client, "version")
    assert answer["flightquant"] == flightquant.__version__
    assert answer["contract"] == "1"
    assert answer["isa"] == active_isa()
    assert answer["isas"] == list(available_isas())
    assert answer["threads"] == server.engine.n_threads
    assert answer["pyarrow"] == pa.__version__


@pytest.mark.parametrize(
    "command",
    [
        {"scheme": "int4"},
        {"scheme": "int4", "symmetric": False, "group_size": 32},
        {"scheme": "int4", "granularity": "tensor", "symmetric": False},
        {"scheme": "int8"},
        {"bit_width": 8, "granularity": "tensor"},
        {"scheme": "int3", "symmetric": False},
        {"bit_width": 2},
        {"scheme": "fp8_e4m3"},
        {"scheme": "fp8_e5m2", "granularity": "tensor"},
        {"scheme": "fp8_e4m3", "granularity": "block"},
        {"scheme": "mxfp4"},
        {"scheme": "mxfp8"},
        {"scheme": "nvfp4"},
        {"scheme": "q8_0"},
        {"scheme": "q4_0"},
        {"scheme": "q4_1"},
        {"scheme": "q5_0"},
        {"scheme": "q5_1"},
        {"scheme": "iq4_nl"},
        {"scheme": "nf4", "group_size": 512},
        {"scheme": "arrowquant", "bit_width": 2, "group_size": 32},
        {"scheme": "mlx", "bit_width": 6},
        {"scheme": "hqq4"},
        {"scheme": "hqq3", "group_size": 32},
        {"scheme": "int4", "packing": "awq", "group_size": 64},
        {"scheme": "int3", "packing": "gptq", "granularity": "channel"},
    ],
    ids=str,
)
def test_an_estimate_is_what_the_work_gives(client: flight.FlightClient, command: dict[str, Any]) -> None:
    shapes = {"matrix": [6, 256], "row": [128], "cube": [2, 3, 128], "empty": [0, 128], "no rows": [3, 0]}
    if "packing" in command:
        shapes = {"matrix": [64, 256], "cube": [2, 32, 128], "empty": [0, 128], "no rows": [3, 0]}
    (answer,) = act(client, "estimate", json.dumps({**command, "shapes": shapes}).encode())
    reply = exchange(client, command, [request({name: np.ones(shape, np.float32) for name, shape in shapes.items()})])
    done = {row["layer_name"]: row["bytes_out"] for row in reply.rows()}
    assert {row["status"] for row in reply.rows()} == {"ok"}
    assert answer["layers"] == done
    assert answer["bytes_out"] == sum(done.values())


BAD_BODIES: list[tuple[bytes, str]] = [
    (b'{"scheme": "int4", "packing": "awq", "shapes": {"w": [31, 128]}}', "shapes"),
    (b'{"scheme": "hqq2", "shapes": {"w": [3, 128]}}', "shapes"),
    (b"", "body"),
    (b"nonsense", "body"),
    (b"[" * 100_000, "body"),
    (b"[]", "body"),
    (b'{"scheme": "int4", "scheme": "int8", "shapes": {}}', "body"),
    (b'{"scheme": "int4", "shapes": {"a": [128], "a": [256]}}', "body"),
    ('{"scheme": "int4", "shapes": {}}'.encode("utf-16"), "body"),
    (b'{"op": "verify", "scheme": "int4", "shapes": {"a": [128]}}', "op"),
    (b'{"scheme": "int4", "shapes": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", "shapes"),
    (b'{"scheme": "int4"}', "shapes"),
    (b'{"scheme": "int4", "shapes": [1]}', "shapes"),
    (b'{"shapes": {}}', "scheme"),
    (b'{"scheme": "int9", "shapes": {}}', "scheme"),
    (b'{"scheme": "int4", "shapes": {"a": 7}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [1.5]}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [true]}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [-1, 128]}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [4294967296, 4294967296]}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [1, 1, 1, 1, 1, 1, 1, 1, 128]}}', "shapes"),
    (b'{"scheme": "int4", "shapes": {"a": [4, 100]}}', "shapes"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_a_bad_estimate(client: flight.FlightClient, body: bytes, field: str) -> None:
    with pytest.raises(flight.FlightServerError) as caught:
        act(client, "estimate", body)
    extra = check_error(caught.value)
    assert (extra["code"], extra["field"]) == ("invalid_request", field)


def test_an_estimate_too_long(client: flight.FlightClient) -> None:
    with pytest.raises(flight.FlightServerError) as caught:
        act(client, "estimate", b" " * (17 << 20))
    assert check_error(caught.value)["code"] == "too_large"


@pytest.mark.parametrize("name", ["nonsense", "", "x" * 10_000, "CancelFlightInfo"], ids=lambda name: name[:20])
def test_an_unknown_action(client: flight.FlightClient, name: str) -> None:
    with pytest.raises(flight.FlightServerError) as caught:
        act(client, name)
    assert check_error(caught.value)["field"] == "action"


def test_methods_that_are_not_offered(client: flight.FlightClient) -> None:
    path = flight.FlightDescriptor.for_path("a")

    def put() -> None:
        writer, _ = client.do_put(path, pa.schema([("a", pa.int8())]))
        writer.close()

    methods = {
        "DoPut": put,
        "ListFlights": lambda: list(client.list_flights()),
        "Handshake": lambda: client.authenticate_basic_token("user", "password"),
    }
    for name, method in methods.items():
        with pytest.raises(flight.FlightServerError) as caught:
            method()
        extra = check_error(caught.value)
        assert (extra["code"], extra["field"], extra["got"]) == ("invalid_request", "method", name)
    # pyarrow's client turns every error of this one method into an OSError.
    with pytest.raises(OSError, match=r"^invalid_request: this server has no GetSchema; ") as plain:
        client.get_schema(path)
    assert "Traceback" not in str(plain.value)
