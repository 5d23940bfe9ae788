"""One function that opens whatever holds weights: files, folders, tables, data sets, dicts, modules, streams."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyarrow import fs

from flightquant.client.sources import checkpoint, gguf, tables
from flightquant.client.sources.base import MappingSource, Source, Tensor, TensorMeta
from flightquant.client.sources.places import Place, place
from flightquant.errors import InvalidRequestError

__all__ = ["Place", "Source", "Tensor", "TensorMeta", "open_source", "place"]

_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_source(thing: Any) -> Source:
    """Open anything that holds weights; nothing but names and shapes is read before it is asked for.

    Parameters
    ----------
    thing : Source, path, URI, mapping, module, Arrow data or data set
        A safetensors file, a folder of them (with its index, if it has one), a Parquet, Arrow IPC or GGUF file, a
        folder of Parquet or Arrow files (a partitioned data set), each as a local path or as a URI that pyarrow or
        fsspec opens (``s3://``, ``gs://``, ...); a mapping of names to NumPy or torch arrays; anything with
        ``state_dict()``; a pyarrow Table, RecordBatch, reader or Dataset (filtered, if you like); any object with
        ``__arrow_c_stream__``. Arrow data has the contract's request columns; a stream that can be read only once
        is put into a temporary file.

    Returns
    -------
    Source
        A mapping of layer names to layers. Close it, or use it in a ``with`` block.

    Raises
    ------
    InvalidRequestError
        It is none of these, or not what its format says.
    OSError
        It does not exist or cannot be read.
    """
    if isinstance(thing, Source):
        return thing
    if isinstance(thing, str | os.PathLike):
        return _open_place(place(thing))
    if isinstance(thing, Mapping):
        return MappingSource(thing)
    if callable(getattr(thing, "state_dict", None)):
        return MappingSource(thing.state_dict(), type(thing).__name__)
    return tables.open_arrow(thing)


def _open_place(where: Place) -> Source:
    info = where.info()
    if info.type == fs.FileType.Directory:
        return _open_folder(where)
    with where.open() as file:
        magic = file.read(8)
    if magic[:4] == b"GGUF":
        return gguf.GGUFSource(where)
    if magic[:4] == b"PAR1":
        return tables.FileTableSource(where, "parquet")
    if magic[:6] == b"ARROW1":
        return tables.FileTableSource(where, "ipc")
    if where.name.endswith(_PICKLES):
        raise InvalidRequestError(
            f"{where.name} is a pickle, which could run anything when opened; load it with torch and save its tensors "
            "with safetensors.torch.save_file"
        )
    return checkpoint.open_file(where)


def _open_folder(where: Place) -> Source:
    names = [where.relative(info.path) for info in where.files(recursive=True)]
    if any(name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name for name in names):
        return checkpoint.open_folder(where)
    kinds = {_TABLE_SUFFIXES[suffix] for name in names for suffix in _TABLE_SUFFIXES if name.endswith(suffix)}
    if len(kinds) == 1:
        return tables.FileTableSource(where, kinds.pop())
    found = "both Parquet and Arrow files" if kinds else "neither *.safetensors nor Parquet or Arrow files"
    raise InvalidRequestError(f"{where.uri} has {found}; expected a folder of one kind")
