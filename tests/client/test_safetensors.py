"""The safetensors reader and writer against the format's own library, and against files made to mislead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as official

from flightquant.client.safetensors import SafetensorsError, SafetensorsFile, file_header, tensor_bytes
from flightquant.layers import layers_batch


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TENSORS = {
    "f32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "f16": np.arange(5, dtype=np.float16),
    "f64": np.array(3.5),
    "i8": np.array([-1, 2, 3], np.int8),
    "i64": np.array([[7]], np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
}


class TestReader:
    def test_reads_what_the_library_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        official.save_file(TENSORS, path, metadata={"format": "pt", "naïve": "ö"})
        file = SafetensorsFile(path)
        assert file.metadata == {"format": "pt", "naïve": "ö"}
        assert set(file.tensors) == set(TENSORS)
        for name, wanted in TENSORS.items():
            got = file.array(name)
            assert got.shape == wanted.shape
            assert got.tobytes() == wanted.tobytes()
            assert not got.flags.writeable

    def test_layers_share_the_files_memory_up_to_the_request(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        official.save_file({"odd": np.ones(3, np.int8), **TENSORS}, path)
        with SafetensorsFile(path) as file:
            address = np.frombuffer(file.data("f32"), np.uint8).ctypes.data
            layer = file.layer("f32")
            assert (layer.shape, layer.dtype, layer.copied) == ((3, 4), "float32", 0)
            assert layers_batch([layer]).column("weights").values.buffers()[1].address == address
            bf16 = file.layer("bf16")
        assert (bf16.dtype, bf16.data.dtype) == ("bfloat16", np.uint16)
        assert bf16.data.tobytes() == TENSORS["bf16"].tobytes()

    def test_a_misaligned_tensor_is_neither_copied_nor_misread(self, tmp_path: Path) -> None:
        values = np.arange(1000, dtype=np.float32)
        header = {"a": entry("U8", [1], 0, 1), "w": entry("F32", [1000], 1, 4001)}
        file = SafetensorsFile(raw_file(tmp_path / "m", header, b"x" + values.tobytes()))
        layer = file.layer("w")
        batch = layers_batch([layer])
        assert batch.column("weights")[0].as_py() == values.tolist()
        assert batch.column("weights").values.buffers()[1].address == layer.data.ctypes.data

    def test_integers_and_fp8_cannot_become_layers(self, tmp_path: Path) -> None:
        header = {"a": entry("F8_E4M3", [2], 0, 2), "b": entry("I8", [2], 2, 4)}
        file = SafetensorsFile(raw_file(tmp_path / "m", header, b"abcd"))
        assert bytes(file.data("a")) == b"ab"
        for name in "ab":
            with pytest.raises(SafetensorsError, match="expected F32"):
                file.layer(name)

    @pytest.mark.parametrize(
        ("header", "data", "message"),
        [
            (b"[]", b"", "no JSON object"),
            (b'{"a"', b"", "no JSON object"),
            (b" {}", b"", "no JSON object"),
            (b'{"a": "\xff"}', b"", "no JSON object"),
            (b"[" * 5000, b"", "no JSON object"),
            (b"{" + b'"a":{' * 5000, b"", "no JSON object"),
            (b'{"a": 1, "a": 2}', b"", "a name twice"),
            (b'{"a": {"dtype": "U8", "dtype": "U8"}}', b"", "a name twice"),
            ({"__metadata__": {"a": 1}}, b"", "text to text"),
            ({"__metadata__": []}, b"", "text to text"),
            ({"a": []}, b"", "not described"),
            ({"a": {"dtype": "U8", "shape": []}}, b"", "not described"),
            ({"a": {**entry("U8", [], 0, 1), "more": 1}}, b"x", "not described"),
            ({"a": entry("U9", [1], 0, 1)}, b"x", 'unknown dtype "U9"'),
            ({"a": entry("F4", [1], 0, 1)}, b"x", "whole bytes"),
            ({"a": entry("U8", [-1], 0, 1)}, b"x", "wrong kind"),
            ({"a": entry("U8", [True], 0, 1)}, b"x", "wrong kind"),
            ({"a": entry("U8", [1.0], 0, 1)}, b"x", "wrong kind"),  # type: ignore[list-item]
            ({"a": entry("U8", [1], -1, 0)}, b"x", "wrong kind"),
            ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x", "wrong kind"),
            ({"a": entry("U8", [2], 0, 1)}, b"x", "has 1 bytes; its dtype and shape make 2"),
            ({"a": entry("F32", [1 << 40, 1 << 40], 0, 4)}, b"xxxx", "make"),
            ({"a": entry("U8", [1], 1, 0)}, b"x", "has -1 bytes"),
            ({"a": entry("U8", [1], 1, 2)}, b"xx", "leaves a hole"),
            ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx", "overlaps"),
            ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xxx", "leaves a hole"),
            ({"a": entry("U8", [2], 0, 2)}, b"x", "end at byte 2, its data at 1"),
            ({"a": entry("U8", [1], 0, 1)}, b"xx", "end at byte 1, its data at 2"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_header_that_lies_is_refused(self, tmp_path: Path, header: Any, data: bytes, message: str) -> None:
        with pytest.raises(SafetensorsError, match=message):
            SafetensorsFile(raw_file(tmp_path / "m", header, data))

    @pytest.mark.parametrize("length", [0, 1, 3, 100_000_001, 1 << 63])
    def test_a_header_length_that_cannot_be_is_refused(self, tmp_path: Path, length: int) -> None:
        with pytest.raises(SafetensorsError, match=f"would have {length} bytes"):
            SafetensorsFile(raw_file(tmp_path / "m", b"{}", length=length))

    @pytest.mark.parametrize("content", [b"", b"1234567"])
    def test_a_stub_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(SafetensorsError, match="at least 8"):
            SafetensorsFile(tmp_path / "m")

    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_file_or_an_error(self, tmp_path_factory: Any, content: bytes) -> None:
        path = tmp_path_factory.mktemp("fuzz") / "m"
        raw_file(path, content, length=None)
        try:
            file = SafetensorsFile(path)
        except SafetensorsError:
            return
        assert sum(info.nbytes for info in file.tensors.values()) == path.stat().st_size - 8 - len(content)


class TestHeader:
    def write(self, path: Path, tensors: dict[str, np.ndarray]) -> None:
        kinds = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8", "int64": "I64", "bfloat16": "BF16"}
        header, placed = file_header({n: (kinds[t.dtype.name], t.shape) for n, t in tensors.items()}, {"format": "pt"})
        raw = bytearray(max((info.end for info in placed.values()), default=len(header)))
        raw[: len(header)] = header
        for name, info in placed.items():
            raw[info.begin : info.end] = tensors[name].tobytes()
        path.write_bytes(raw)

    def test_the_library_reads_what_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        self.write(path, TENSORS)
        for name, got in official.load_file(path).items():
            assert got.tobytes() == TENSORS[name].tobytes()
            assert got.shape == TENSORS[name].shape

    def test_every_tensor_is_aligned_to_its_size(self, tmp_path: Path) -> None:
        self.write(tmp_path / "m", TENSORS)
        raw = (tmp_path / "m").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        assert start % 8 == 0
        for info in SafetensorsFile(tmp_path / "m").tensors.values():
            itemsize = tensor_bytes(info.dtype, (1,))
            assert (start + info.begin) % itemsize == 0

    def test_no_tensors_make_a_file_too(self, tmp_path: Path) -> None:
        self.write(tmp_path / "m", {})
        assert official.load_file(tmp_path / "m") == {}

    def test_unknown_dtypes_are_refused(self) -> None:
        with pytest.raises(SafetensorsError, match='unknown dtype "Q4_0"'):
            file_header({"a": ("Q4_0", (32,))}, {})
