"""GGUF files: the tensors of a GGUF source quantized again, its metadata kept; the header is the ``gguf`` library's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from flightquant.client.sinks.base import Sink
from flightquant.client.sinks.work import PlacedFile
from flightquant.client.sources import Tensor
from flightquant.client.sources.gguf import GGUFSource
from flightquant.errors import InvalidRequestError
from flightquant.quantized import packed_data
from flightquant.reference import matrix_shape, packed_bytes
from flightquant.schemes import SCHEMES

_FILE_TYPES = {
    "q2_k": "MOSTLY_Q2_K",
    "q3_k": "MOSTLY_Q3_K_M",
    "q4_k": "MOSTLY_Q4_K_M",
    "q5_k": "MOSTLY_Q5_K_M",
    "q6_k": "MOSTLY_Q6_K",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
"""``general.file_type`` where it is not MOSTLY_ and the scheme's name."""


class GGUFSink(Sink):
    """One GGUF file.

    Raises
    ------
    InvalidRequestError
        The source is no GGUF file, or one of several shards, or a scheme is none of ggml's.
    """

    def _begin(self) -> None:
        import gguf

        if not isinstance(self._source, GGUFSource):
            raise InvalidRequestError(
                f"{self._source.label} is no GGUF file, and only such a file has the metadata that llama.cpp needs; "
                "make one with llama.cpp's convert_hf_to_gguf.py --outtype bf16 and quantize that",
                field="model",
            )
        known = tuple(name for name, scheme in SCHEMES.items() if "gguf" in scheme.packings)
        for name in self.plan.commands:
            spec = self.plan.spec(name)
            if spec.scheme.packing != "gguf":
                raise InvalidRequestError(
                    f"{spec.scheme.name} ({spec.scheme.packing}) is no GGUF format; expected {', '.join(known)}",
                    field="scheme",
                    got=spec.scheme.name,
                    expected=known,
                )
        if "split.count" in self._source.reader.fields:
            raise InvalidRequestError(
                f"{self._source.label} is one part of several; join them with llama.cpp's gguf-split --merge first",
                field="model",
            )
        draft = self._work.folder / "header"
        writer = gguf.GGUFWriter(draft, self._source.metadata.get("general.architecture", ""))
        alignment = int(self._source.reader.alignment)
        writer.data_alignment = alignment
        self._add_metadata(writer)
        self._places: dict[str, int] = {}
        position = 0
        for name, shape, kind, nbytes in self._tensors():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
            self._places[name] = position
            position += gguf.GGUFWriter.ggml_pad(nbytes, alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = draft.read_bytes()
        draft.unlink()
        self._start = gguf.GGUFWriter.ggml_pad(len(header), alignment)
        self._file = PlacedFile(self._work.output, header, self._start + position)

    def _tensors(self) -> Any:
        """Name, row-major shape, ggml type and bytes of every tensor."""
        for name, meta in self._source.tensors.items():
            if name in self.plan.commands:
                spec = self.plan.spec(name)
                yield name, meta.shape, spec.scheme.name.upper(), packed_bytes(spec, *matrix_shape(meta.shape))
            else:
                yield name, meta.shape, meta.dtype, meta.nbytes

    def _add_metadata(self, writer: Any) -> None:
        import gguf

        assert isinstance(self._source, GGUFSource)  # noqa: S101 - _begin() has checked
        for field in self._source.reader.fields.values():
            # The writer adds the first of these by itself, the others speak of the old tensors.
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", *_OF_TENSORS):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        most = Counter(command.scheme for command in self.plan.commands.values()).most_common(1)[0][0]
        main = self.plan.recipe.command.scheme if self.plan.recipe.mixture else most
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(main, f"MOSTLY_{main.upper()}")])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def _write_row(self, batch: pa.RecordBatch, row: int, name: str) -> int:
        data = packed_data(batch, row)
        self._file.write(self._start + self._places[name], data)
        return int(data.size)

    def _write_kept(self, tensor: Tensor, first: int, data: Any) -> None:
        self._file.write(self._start + self._places[tensor.name] + first, data)

    def _finish(self) -> None:
        self._file.sync()
        self._close()

    def _close(self) -> None:
        self._file.close()


_OF_TENSORS = ("general.file_type", "general.quantization_version")
