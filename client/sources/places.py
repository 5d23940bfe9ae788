"""Where things lie: local paths, and URIs of what pyarrow or fsspec can reach, all opened in one way."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from flightquant.errors import InvalidRequestError, UnavailableError

_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_ARROWS_OWN = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")


@dataclass(frozen=True, slots=True)
class Place:
    """A path in a file system.

    Attributes
    ----------
    filesystem : pyarrow.fs.FileSystem
    path : str
        In the terms of the file system.
    uri : str
        As it was given; what messages say.
    local : Path or None
        The same as a local path, where it is one.
    """

    filesystem: Any
    path: str
    uri: str
    local: Path | None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.path).name

    def info(self) -> Any:
        """The file system's description (type, size, time) of what lies there.

        Raises
        ------
        OSError
            Nothing lies there, or it cannot be looked at.
        """
        found = _guarded(self, lambda: self.filesystem.get_file_info(self.path))
        if found.type == fs.FileType.NotFound:
            raise FileNotFoundError(2, "No such file or directory", self.uri)
        return found

    def child(self, relative: str) -> Place:
        """A path below this one."""
        return Place(
            self.filesystem,
            f"{self.path.rstrip('/')}/{relative}",
            f"{self.uri.rstrip('/')}/{relative}",
            self.local / relative if self.local else None,
        )

    def open(self) -> Any:
        """The file, for reading at any position.

        Raises
        ------
        OSError
            It cannot be opened.
        """
        return _guarded(self, lambda: self.filesystem.open_input_file(self.path))

    def create(self) -> Any:
        """The file, for writing from its beginning.

        Raises
        ------
        OSError
            It cannot be written.
        """
        return _guarded(self, lambda: self.filesystem.open_output_stream(self.path))

    def files(self, *, recursive: bool = False) -> list[Any]:
        """The files below, sorted by path.

        Raises
        ------
        OSError
            The folder cannot be listed.
        """
        selector = fs.FileSelector(self.path, recursive=recursive)
        found = _guarded(self, lambda: self.filesystem.get_file_info(selector))
        return sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.path)

    def relative(self, path: str) -> str:
        """A path that the file system listed below this one, seen from here."""
        return path[len(self.path.rstrip("/")) + 1 :]


def _guarded(place: Place, call: Any) -> Any:
    """What the call gives; the file systems' errors named by what the user asked for."""
    try:
        return call()
    except OSError as error:
        if error.errno is not None and error.strerror:
            told = os.strerror(error.errno) if place.local else re.sub(r"^\[Errno \d+\] ", "", error.strerror)
            raise type(error)(error.errno, told, place.uri) from None
        raise UnavailableError(f"{place.uri} cannot be reached: {_first_sentence(error)}") from None
    except (pa.ArrowException, ValueError) as error:
        raise UnavailableError(f"{place.uri} cannot be reached: {_first_sentence(error)}") from None


def _first_sentence(error: BaseException) -> str:
    return str(error).split(". Detail:")[0].splitlines()[0][:300] if str(error) else type(error).__name__


def place(where: str | os.PathLike[str]) -> Place:
    """The place that a path or a URI names.

    ``s3://``, ``gs://``, ``abfs://`` and ``hdfs://`` are opened by pyarrow, with the options that it knows in the
    URI's query (``?endpoint_override=host:9000&scheme=http&region=...``); other schemes by fsspec.

    Raises
    ------
    InvalidRequestError
        No file system is known for the URI, or it is empty.
    """
    text = os.fspath(where)
    if not text:
        raise InvalidRequestError("the path is empty; expected that of a file or folder, or a URI", field="uri")
    found = _URI.match(text)
    if found is None or found[1] == "file":
        path = Path(text.removeprefix("file://"))
        return Place(fs.LocalFileSystem(), str(path), text, path)
    shown = re.sub(r"//[^/@]*@", "//", text.split("?")[0])  # no keys in messages
    try:
        if found[1] in _ARROWS_OWN:
            filesystem, path_text = fs.FileSystem.from_uri(text)
        else:
            import fsspec

            foreign, path_text = fsspec.core.url_to_fs(text)
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(foreign))
    except ImportError as error:
        raise InvalidRequestError(
            f"{shown} needs the package {error.name or 'that fsspec names: ' + str(error)}; "
            "install it, or copy the files to a local path first",
            field="uri",
            got=shown,
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidRequestError(f"cannot open {shown}: {_first_sentence(error)}", field="uri", got=shown) from None
    return Place(filesystem, path_text, shown, None)
