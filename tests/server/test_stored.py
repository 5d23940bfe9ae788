"""Stored sources: read and converted where the operator allowed it, and nowhere else, whatever a path looks like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fq_flight import eventually
from pyarrow import feather, flight
from safetensors.numpy import load_file, save_file

import flightquant
from flightquant.server.app import Server, running_server
from flightquant.server.config import ServerConfig

RNG = np.random.default_rng(7)
WEIGHTS = {f"layers.{i}.weight": RNG.standard_normal((8, 256), dtype=np.float32) for i in range(3)}
WEIGHTS["norm.weight"] = np.ones(256, np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``allowed/model`` and ``allowed/single.safetensors``, ``out``, and a model outside at ``secret``."""
    top = tmp_path_factory.mktemp("stored")
    for folder in (top / "allowed" / "model", top / "secret"):
        folder.mkdir(parents=True)
        save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(WEIGHTS, top / "allowed" / "single.safetensors", {"format": "pt"})
    (top / "out").mkdir()
    (top / "allowed-not").mkdir()
    save_file(WEIGHTS, top / "allowed-not" / "model.safetensors")
    (top / "allowed" / "link").symlink_to(top / "secret")
    (top / "allowed" / "linked").mkdir()
    (top / "allowed" / "linked" / "model.safetensors").symlink_to(top / "secret" / "model.safetensors")
    (top / "allowed" / "inner").symlink_to(top / "allowed" / "model")
    (top / "out" / "away").symlink_to(top / "secret")
    return top


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    config = ServerConfig(
        location="grpc://127.0.0.1:0",
        metrics_port=0,
        health_port=0,
        grace_s=5.0,
        source_root=(root / "allowed",),
        sink_root=(root / "out",),
    )
    with running_server(config) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[flight.FlightClient]:
    with flight.connect(server.location) as connected:
        yield connected


def command(source: Any, **options: Any) -> bytes:
    return json.dumps({"scheme": "int8", "source": str(source), **options}).encode()


def convert(client: flight.FlightClient, **request: Any) -> list[dict[str, Any]]:
    body = json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in request.items()})
    return [
        json.loads(told.body.to_pybytes()) for told in client.do_action(flight.Action("quantize_to", body.encode()))
    ]


@pytest.mark.parametrize("where", ["model", "single.safetensors", "model/model.safetensors", "inner", "model/../model"])
@pytest.mark.parametrize("form", ["path", "uri"])
def test_a_stored_source_is_answered_layer_by_layer(
    client: flight.FlightClient, root: Path, where: str, form: str
) -> None:
    source = f"{root}/allowed/{where}"
    raw = command(source if form == "path" else f"file://{source}", scheme="int4", group_size=64)
    info = client.get_flight_info(flight.FlightDescriptor.for_command(raw))
    assert info.total_records == len(WEIGHTS)
    (endpoint,) = info.endpoints
    table = client.do_get(endpoint.ticket).read_all()
    assert table.schema.equals(info.schema)
    expected = flightquant.quantize(WEIGHTS, "int4", group_size=64)
    rows = {row["layer_name"]: row for row in table.to_pylist()}
    assert set(rows) == set(WEIGHTS)
    for row in expected.to_pylist():
        for column in ("quantized_data", "scales", "status", "shape", "sqnr_db"):
            assert rows[row["layer_name"]][column] == row[column]


OUTSIDE = (
    "secret",
    "secret/model.safetensors",
    "nowhere",
    "allowed/nowhere",
    "allowed/link",
    "allowed/link/model.safetensors",
    "allowed/linked",
    "allowed/linked/model.safetensors",
    "allowed/../secret",
    "allowed/model/../../secret/model.safetensors",
    "allowed-not",
    "",
)


def refusal(client: flight.FlightClient, source: str) -> str:
    with pytest.raises(flight.FlightUnauthorizedError) as caught:
        client.do_get(flight.Ticket(command(source))).read_all()
    with pytest.raises(flight.FlightUnauthorizedError):
        client.get_flight_info(flight.FlightDescriptor.for_command(command(source)))
    facts = json.loads(caught.value.extra_info)
    assert facts["code"] == "permission_denied"
    assert not facts["got"]
    return str(caught.value).split(". Detail:")[0].split("with message: ")[-1]


def test_what_is_not_allowed_is_denied_with_the_same_words_whether_it_exists_or_not(
    client: flight.FlightClient, root: Path
) -> None:
    sources = [f"{root}/{outside}" for outside in OUTSIDE]
    sources += [f"file://{root}/secret", f"file://{root}/allowed/%2e%2e/secret", "/etc/passwd", "s3://bucket/model"]
    sources += ["file://[", "http://[::1", f"{root}/allowed/\ud800", "/\ud800", f"{root}/allowed/{'n' * 300}"]
    sources += ["allowed/model", "../secret", "file://host/etc", f"{root}/allowed/model\0", "http://localhost/x"]
    assert len({refusal(client, source) for source in sources}) == 1


def test_a_server_without_places_denies_all(root: Path) -> None:
    with running_server() as running, flight.connect(running.location) as client:
        refusal(client, f"{root}/allowed/model")
        with pytest.raises(flight.FlightUnauthorizedError):
            convert(client, source=root / "allowed" / "model", sink=root / "out" / "x", recipe={"scheme": "int4"})


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "not JSON"),
        (b"[]", "JSON list"),
        (b'{"scheme": "int8", "scheme": "int4", "source": "/"}', "names a key twice"),
        ('{"scheme": "int8", "source": "/"}'.encode("utf-16"), "not JSON"),
        (b'{"scheme": ' + b"[" * 900 + b"]" * 900 + b', "source": "/"}', "expected a string"),
        (b'{"scheme": "int8"}', 'no "source"'),
        (b'{"scheme": "int8", "source": 5}', "expected a path"),
        (b'{"scheme": "int99", "source": "/"}', "unknown scheme"),
        (b'{"op": "dequantize", "scheme": "int8", "source": "/"}', "op"),
        (b'{"scheme": "int8", "source": "/", "sink": "/x"}', "unknown key"),
    ],
)
def test_a_ticket_that_is_none_is_refused(client: flight.FlightClient, raw: bytes, word: str) -> None:
    with pytest.raises(flight.FlightServerError, match=f"invalid_request: .*{word}"):
        client.do_get(flight.Ticket(raw)).read_all()


def test_what_holds_no_weights_is_no_source(client: flight.FlightClient, root: Path) -> None:
    (root / "allowed" / "notes").mkdir(exist_ok=True)
    (root / "allowed" / "notes" / "readme.txt").write_text("text")
    with pytest.raises(flight.FlightServerError, match="invalid_request: the source holds no weights") as caught:
        client.do_get(flight.Ticket(command(root / "allowed" / "notes"))).read_all()
    assert str(root) not in str(caught.value)


def test_a_file_whose_offsets_lead_elsewhere_is_refused_and_the_server_lives(
    client: flight.FlightClient, root: Path
) -> None:
    path = root / "allowed" / "crafted.arrow"
    weights = pa.array([[0.5] * 300] * 3, pa.list_(pa.float32()))
    feather.write_feather(
        pa.table({"layer_name": ["a", "b", "c"], "weights": weights, "shape": [[300]] * 3}),
        path,
        compression="uncompressed",
    )
    sent, changed = (np.array(values, np.int32).tobytes() for values in ([0, 300, 600], [0, 2**30, 600]))
    assert path.read_bytes().count(sent) == 1
    path.write_bytes(path.read_bytes().replace(sent, changed))
    with pytest.raises(flight.FlightServerError, match="invalid_request: the rows cannot be read") as caught:
        client.do_get(flight.Ticket(command(path))).read_all()
    assert str(root) not in str(caught.value)
    assert client.do_get(flight.Ticket(command(root / "allowed" / "model"))).read_all().num_rows == len(WEIGHTS)


def test_leaving_early_ends_the_call(client: flight.FlightClient, server: Server, root: Path) -> None:
    reader = client.do_get(flight.Ticket(command(root / "allowed" / "model")))
    reader.read_chunk()
    reader.cancel()
    del reader
    eventually(lambda: server.admission.calls == 0)


class TestConversions:
    def test_a_model_is_converted_beside_its_source(self, client: flight.FlightClient, root: Path) -> None:
        sink = root / "out" / "int4"
        *progress, end = convert(client, source=root / "allowed" / "model", sink=sink, recipe={"scheme": "int4"})
        assert [told["layer"] for told in progress] == [f"layers.{i}.weight" for i in range(3)]
        assert [(told["done"], told["of"]) for told in progress] == [(1, 3), (2, 3), (3, 3)]
        assert end["complete"] is True
        assert (end["layers"], end["kept"]) == (3, 1)
        written = load_file(sink / "model.safetensors")
        answer = flightquant.quantize(WEIGHTS, "int4")
        packed = written["layers.0.weight_packed"].tobytes()
        assert packed == answer["quantized_data"][0].as_py()
        assert "quantization_config" in json.loads((sink / "config.json").read_text())

    @pytest.mark.parametrize(
        "where", ["secret/x", "out/../secret/x", "out/away/x", "allowed/x", "out/no/folder/x", "out"]
    )
    def test_no_sink_but_the_allowed_ones(self, client: flight.FlightClient, root: Path, where: str) -> None:
        before = sorted(os.listdir(root / "secret"))
        with pytest.raises(flight.FlightUnauthorizedError, match="permission_denied: this sink"):
            convert(client, source=root / "allowed" / "model", sink=f"{root}/{where}", recipe={"scheme": "int4"})
        assert sorted(os.listdir(root / "secret")) == before

    @pytest.mark.parametrize("where", ["file://[", "/\ud800", "relative", "\0"])
    def test_a_place_that_no_file_system_has_is_none_of_the_allowed_ones(
        self, client: flight.FlightClient, root: Path, where: str
    ) -> None:
        request: dict[str, Any] = {"source": root / "allowed" / "model", "sink": root / "out" / "x"}
        for field in ("source", "sink"):
            with pytest.raises(flight.FlightUnauthorizedError, match=f"permission_denied: this {field}"):
                convert(client, **{**request, field: where}, recipe={"scheme": "int4"})

    def test_a_sink_that_cannot_be_is_refused_without_a_name_of_the_servers(
        self, client: flight.FlightClient, root: Path
    ) -> None:
        (root / "out" / "unnamed").mkdir()
        (root / "out" / "unnamed" / "file").write_text("")
        (root / "out" / "alias").symlink_to("unnamed")
        (root / "out" / "alias.gguf").symlink_to("unnamed.gguf")
        (root / "allowed" / "alias").symlink_to("model")
        for sink, recipe, word in (
            ("alias", {"scheme": "int4"}, "the sink exists and is not empty"),
            ("alias.gguf", {"scheme": "int4", "target": "compressed-tensors"}, "the output is the sink"),
            ("new.gguf", {"scheme": "q8_0"}, "the source is no GGUF file"),
            ("n" * 255, {"scheme": "int4"}, "the sink's name is longer"),
        ):
            with pytest.raises(flight.FlightServerError, match=f"invalid_request: .*{word}") as caught:
                convert(client, source=root / "allowed" / "alias", sink=f"{root}/out/{sink}", recipe=recipe)
            assert str(root) not in str(caught.value)
            assert "unnamed" not in str(caught.value)
            assert b"unnamed" not in caught.value.extra_info

    @pytest.mark.parametrize("where", OUTSIDE[:9])
    def test_no_source_but_the_allowed_ones(self, client: flight.FlightClient, root: Path, where: str) -> None:
        with pytest.raises(flight.FlightUnauthorizedError, match="permission_denied: this source"):
            convert(client, source=f"{root}/{where}", sink=root / "out" / "stolen", recipe={"scheme": "int4"})
        assert not (root / "out" / "stolen").exists()

    @pytest.mark.parametrize(
        ("changed", "word"),
        [
            ({"recipe": None}, "no .recipe"),
            ({"recipe": {"scheme": "int99"}}, "unknown scheme"),
            ({"recipe": {"preset": "moon"}}, "unknown preset"),
            ({"recipe": {"preset": ["moon"]}}, "unknown preset"),
            ({"recipe": {"scheme": "int4", "keep": "no such layer"}}, "no tensor fits"),
            ({"extra": 1}, "unknown key"),
        ],
    )
    def test_a_request_that_is_none_is_refused(
        self, client: flight.FlightClient, root: Path, changed: dict[str, Any], word: str
    ) -> None:
        request = {"source": root / "allowed" / "model", "sink": root / "out" / "never", "recipe": {"scheme": "int4"}}
        with pytest.raises(flight.FlightServerError, match=f"invalid_request: .*{word}"):
            convert(client, **{**request, **changed})
        assert not (root / "out" / "never").exists()

    def test_a_layer_that_cannot_be_quantized_leaves_nothing(self, client: flight.FlightClient, root: Path) -> None:
        folder = root / "allowed" / "nan"
        folder.mkdir()
        save_file({"a.weight": np.full((2, 128), np.nan, np.float32)}, folder / "model.safetensors")
        with pytest.raises(flight.FlightServerError, match=r"invalid_request: .*a\.weight"):
            convert(client, source=folder, sink=root / "out" / "nan", recipe={"scheme": "int4"})
        assert not (root / "out" / "nan").exists()


def test_roots_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source_root"):
        ServerConfig(source_root=(tmp_path / "none",))
