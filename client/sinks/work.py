"""Unfinished output: a hidden folder beside the target with the files so far and a journal of what is in them.

The target appears by one rename, when all is there. After a crash the journal says which layers are written; their
bytes depend on nothing but source and recipe, so that the rest can be added and the whole is what it would have been.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flightquant.client.sources import Place
from flightquant.errors import InvalidRequestError

JOURNAL = "journal.jsonl"
OUTPUT = "output"
WRITE_BYTES = 1 << 20


class Work:
    """The folder of one unfinished output.

    Parameters
    ----------
    target : Place
        What will appear; a local path's folder lies beside it, another's in the system's temporary folder.
    digest : str
        Of all that the bytes depend on; work begun for another digest is not gone on with.
    resume : bool
        Go on with what is there; else it is thrown away.

    Attributes
    ----------
    output : Path
        Where the file or folder grows.
    done : dict of str to dict
        The finished tensors and what was noted of each.
    placed : bool
        Whether the output is in its place.

    Raises
    ------
    InvalidRequestError
        Another process is at it, the target exists, or the work was begun with other options.
    OSError
        The folder cannot be made.
    """

    def __init__(self, target: Place, digest: str, *, resume: bool) -> None:
        self.target = target
        self.folder = self._folder()
        self.output = self.folder / OUTPUT
        self.done: dict[str, dict[str, Any]] = {}
        self.placed = False
        self._journal = self.folder / JOURNAL
        self._check_target(resume=resume)
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock()
            try:
                self._open({"work": digest, "boot": _boot()}, resume=resume)
            except BaseException:
                if not resume:
                    shutil.rmtree(self.folder, ignore_errors=True)
                self._unlock()
                raise
        except OSError as error:
            # The user knows only the name that was asked for.
            raise type(error)(error.errno, error.strerror, target.uri) from None

    def _open(self, header: Mapping[str, Any], *, resume: bool) -> None:
        kept = self._read(header) if resume else None
        if kept is None:
            self._clear()
            self._journal.write_text(json.dumps(header) + "\n")
        else:
            os.truncate(self._journal, kept)
        self._out = self._journal.open("ab", buffering=0)

    def _folder(self) -> Path:
        if self.target.local is not None:
            path = self.target.local.absolute()
            return path.with_name(f".{path.name}.flightquant")
        digest = hashlib.sha256(self.target.uri.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"flightquant-{os.getuid()}-{digest}"

    def _check_target(self, *, resume: bool) -> None:
        local = self.target.local
        if local is None:
            # What is gone on with may have been copied in part already.
            if (resume and self._journal.exists()) or not self._stands_there():
                return
            full = ""
        elif not local.exists() or (local.is_dir() and not any(local.iterdir())):
            return
        else:
            full = " and is not empty" if local.is_dir() else ""
        raise InvalidRequestError(f"{self.target.uri} exists{full}; remove it or choose another output", field="output")

    def _stands_there(self) -> bool:
        """Whether there is a file of a URI, or one below it."""
        try:
            found = self.target.info()
        except FileNotFoundError:
            return False
        return found.is_file or bool(self.target.files(recursive=True))

    def _lock(self) -> None:
        self._held = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise InvalidRequestError(
                f"another process is writing {self.target.uri}; wait for it, or choose another output", field="output"
            ) from None

    def _read(self, header: Mapping[str, Any]) -> int | None:
        """Take in the journal; how many of its bytes hold, None if there is nothing to go on with."""
        try:
            raw = self._journal.read_bytes()
        except FileNotFoundError:
            return None
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0].get("boot") != header["boot"]:
            return None  # what was not on the disk yet when the machine stopped is lost, in whatever order
        if lines[0] != header:
            raise InvalidRequestError(
                f"{self.target.uri} was begun with other options or another source; repeat the first command, or leave "
                "--resume away to begin anew",
                field="resume",
            )
        self.done = {line.pop("name"): line for line in lines[1:]}
        return len(whole)

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def note(self, name: str, **facts: Any) -> None:
        """Say that a tensor's bytes are written: to the files first, then to the journal."""
        self.done[name] = facts
        os.write(self._out.fileno(), json.dumps({"name": name, **facts}).encode() + b"\n")

    def commit(self) -> int:
        """Put the output in its place; its size in bytes.

        Raises
        ------
        OSError
            It cannot be put there.
        """
        files = [path for path in sorted(self.output.rglob("*")) if path.is_file()] or [self.output]
        size = sum(path.stat().st_size for path in files)
        if self.target.local is not None:
            self.output.replace(self.target.local)
            self.placed = True
            _sync(self.target.local.absolute().parent)
        else:
            self._upload(files)
            self.placed = True
        self.discard()
        return size

    def _upload(self, files: list[Path]) -> None:
        """Copy all, weights first: a folder without its configuration and index is none to any loader."""
        uploaded: list[Place] = []
        try:
            for path in sorted(files, key=lambda path: path.suffix == ".json"):
                place = self.target if path == self.output else self.target.child(str(path.relative_to(self.output)))
                uploaded.append(place)
                with path.open("rb") as source, place.create() as sink:
                    shutil.copyfileobj(source, sink, 8 << 20)
        except BaseException:
            for place in uploaded:
                with contextlib.suppress(OSError):
                    place.filesystem.delete_file(place.path)
            raise

    def leave(self) -> None:
        """Stop, and leave what is done for a later call."""
        self._out.close()
        self._unlock()

    def discard(self) -> None:
        """Remove the folder."""
        self._out.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        # Ctrl-C may have come in the midst of it once already.
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)


def _boot() -> str:
    """What tells this start of the machine from others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


class PlacedFile:
    """A file whose pieces have their places from the beginning, and are written in any order.

    Parameters
    ----------
    path : Path
        A file that is there already, of the right size, is gone on with.
    header : bytes
    size : int
        Bytes of the whole file.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.size = size
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(self._file).st_size != size:
                _check_room(path, size)
                # All room at once: what is written then waits for none, and a full disk is told before the work.
                os.posix_fallocate(self._file, 0, size)
            self.write(0, header)
        except BaseException:
            self.close()
            raise

    def write(self, position: int, data: Any) -> None:
        """Write all of a buffer at a position.

        Raises
        ------
        OSError
            The disk is full, say.
        """
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        while view.nbytes:
            count = os.pwrite(self._file, view[:WRITE_BYTES], position)
            # To the disk from now on, while the next is computed: the wait at the end is short.
            os.posix_fadvise(self._file, position, count, os.POSIX_FADV_DONTNEED)
            position += count
            view = view[count:]

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(28, f"No space left on device: {size} bytes are needed, {free} are free")
