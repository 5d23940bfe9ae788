"""Buckets of a server that speaks S3: models come from there and go there, through pyarrow and through fsspec."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as official

from flightquant.client import QuantClient, open_source
from flightquant.client.convert import convert
from flightquant.client.recipes import Recipe

pytestmark = pytest.mark.oracle

BUCKET = "models"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        _, number = running.get_host_and_port()
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{number}"}.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{number}").create_bucket(Bucket=BUCKET)
        yield number
    finally:
        # What one holds, all servers of a process do.
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{number}/moto-api/reset", method="POST"))
        running.stop()


def uri(kind: str, port: int, path: str) -> str:
    if kind == "fsspec":
        return f"s3a://{BUCKET}/{path}"  # which pyarrow does not know
    return f"s3://key:secret@{BUCKET}/{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@pytest.mark.parametrize("kind", ["pyarrow", "fsspec"])
@pytest.mark.filterwarnings("default")
def test_from_bucket_to_bucket(tmp_path: Path, port: int, kind: str) -> None:
    if kind == "fsspec":
        pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    rng = np.random.default_rng(8)
    weights = {f"layers.{i}.up.weight": rng.standard_normal((64, 256), np.float32) for i in range(3)}
    (tmp_path / "m").mkdir()
    official.save_file(weights, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "none"}))
    bucket = boto3.resource("s3", endpoint_url=f"http://127.0.0.1:{port}").Bucket(BUCKET)
    for path in (tmp_path / "m").iterdir():
        bucket.upload_file(str(path), f"in/{path.name}")

    def run(source: Any, output: Any) -> None:
        client, recipe = QuantClient("local"), Recipe.parse({"scheme": "int4"})
        with open_source(source) as held:
            convert(held, output, recipe, lambda layers, command: client.stream(layers, **command.options()))

    run(tmp_path / "m", tmp_path / "out")
    run(uri(kind, port, "in"), uri(kind, port, "out"))
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {each.key.removeprefix("out/"): each.get()["Body"].read() for each in bucket.objects.filter(Prefix="out/")
            if not each.key.endswith("/")} == wanted  # fmt: skip
    with open_source(uri(kind, port, "in/model.safetensors")) as again:
        np.testing.assert_array_equal(again["layers.1.up.weight"].data.reshape(64, 256), weights["layers.1.up.weight"])


def test_what_is_not_there_is_told(port: int) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://models/none"):
        open_source(uri("pyarrow", port, "none"))
