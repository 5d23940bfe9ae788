"""Models on the server's own storage: answers of a stored source, and whole conversions beside it.

What may be read and written is what the operator allowed: folders, and what lies in them once every link is followed.
Anything else is refused with the same words, whether it exists or not.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from flightquant.cython_core.engine import Engine, Limits
from flightquant.errors import (
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    LayerError,
    PermissionDeniedError,
    TooLargeError,
)
from flightquant.layers import Layer
from flightquant.server.admission import RETRY_AFTER_S, Admission
from flightquant.server.calls import Call, CallCancelledError
from flightquant.server.faults import Guard
from flightquant.server.metrics import Metrics
from flightquant.spec import Command, load_object
from flightquant.wire import answer_schema

MAX_FILES = 10_000
"""Files of a folder that is looked at."""
POLL_S = 0.2
JOIN_S = 30.0
SCHEMA = answer_schema(pa.schema([]))
MAX_SINK_BYTES = 200
"""Of a sink's own name: beside it stands a folder of a few letters more while the work goes on."""
_EXAMPLE = '{"scheme": "int4", "source": "/models/a"}'
_CONVERSION = '{"source": "/models/a", "sink": "/models/b", "recipe": {"preset": "local"}}'


@dataclass(frozen=True, slots=True)
class Places:
    """What the operator allowed.

    Attributes
    ----------
    sources, sinks : tuple of Path
        Folders that may be read from and written to, with all that is in them.
    """

    sources: tuple[Path, ...] = ()
    sinks: tuple[Path, ...] = ()

    def source(self, uri: object) -> str:
        """The real path of a source.

        Raises
        ------
        PermissionDeniedError
            It, or a file in it, is not in an allowed folder, or does not exist.
        """
        path = _real(uri, "source")
        if not _inside(path, self.sources) or not os.path.exists(path):
            raise _denied("source")
        for count, name in enumerate(_files(path)):
            if count >= MAX_FILES or not _inside(os.path.realpath(name), self.sources):
                raise _denied("source")
        return path

    def sink(self, uri: object) -> str:
        """The real path of a sink that may not exist yet.

        Raises
        ------
        PermissionDeniedError
            It is not in an allowed folder, or is such a folder itself.
        """
        path = _real(uri, "sink")
        parent = os.path.dirname(path)
        if not _inside(parent, self.sinks) or not os.path.isdir(parent):
            raise _denied("sink")
        if len(os.fsencode(os.path.basename(path))) > MAX_SINK_BYTES:
            raise InvalidRequestError(f"the sink's name is longer than {MAX_SINK_BYTES} bytes", field="sink")
        return path


def _real(uri: object, field: str) -> str:
    """The path that a URI or an absolute path names, every link and ``..`` followed."""
    if not isinstance(uri, str) or not uri:
        raise InvalidRequestError(f'"{field}" is {str(uri)[:80]!r}; expected a path or a file:// URI', field=field)
    try:
        parts = urlsplit(uri)
        path = unquote(parts.path) if parts.scheme == "file" and not parts.netloc else uri
        if "\0" in path or not os.path.isabs(path):
            raise _denied(field)
        return os.path.realpath(path)
    except ValueError:  # half an IPv6 address, or text that no file system can hold
        raise _denied(field) from None


def _inside(path: str, roots: tuple[Path, ...]) -> bool:
    return any(os.path.commonpath([path, root]) == str(root) for root in map(os.path.realpath, roots))


def _files(path: str) -> Iterator[str]:
    """Every entry below a folder; links are named, not followed."""
    for folder, folders, files in os.walk(path):
        yield from (os.path.join(folder, name) for name in (*folders, *files))


def _denied(field: str) -> PermissionDeniedError:
    return PermissionDeniedError(f"this {field} is not among the places that the operator allowed", field=field)


def read_request(raw: bytes) -> tuple[Command, str]:
    """The command and the source of a ticket or descriptor.

    Raises
    ------
    InvalidRequestError
        It is no command with a ``source``.
    """
    given = load_object(raw, example=_EXAMPLE)
    if "source" not in given:
        raise InvalidRequestError('the command has no "source"; expected a path or a file:// URI', field="source")
    source = given.pop("source")
    command = Command.parse(given)
    if command.op != "quantize":
        raise InvalidRequestError(f'stored sources have no op "{command.op}"; expected "quantize"', field="op")
    return command, source


class Stored:
    """Answers calls about stored models.

    Parameters
    ----------
    timeout_s : float
        The longest that a call may take.
    """

    def __init__(
        self,
        places: Places,
        engine: Engine,
        limits: Limits,
        admission: Admission,
        metrics: Metrics,
        timeout_s: float,
    ) -> None:
        self._places = places
        self._engine = engine
        self._limits = limits
        self._admission = admission
        self._metrics = metrics
        self._timeout_s = timeout_s

    def info(self, call: Call, raw: bytes) -> tuple[int, int]:
        """Layers and bytes of weights in a stored source."""
        with self._open(*self._begin(call, raw)[1:]) as source:
            return len(source), sum(source.tensors[name].nbytes for name in source)

    def answers(self, call: Call, context: Any, raw: bytes) -> Iterator[pa.RecordBatch]:
        """An answer batch for each layer of a stored source, in its order; one layer is held at a time.

        Raises
        ------
        FlightquantError
            As the contract says.
        CallCancelledError
            The client ended the call or is gone.
        """
        command, path = self._begin(call, raw)
        source = self._open(path)

        def run() -> Iterator[pa.RecordBatch]:
            with source:
                for layer in self._layers(source):
                    if context.is_cancelled():
                        raise CallCancelledError
                    self._check(call)
                    yield self._quantize(call, layer, command)

        return run()

    def _begin(self, call: Call, raw: bytes) -> tuple[Command, str]:
        command, uri = read_request(raw)
        call.op, call.scheme = command.op, command.layer_spec().scheme.name
        return command, self._places.source(uri)

    def _open(self, path: str) -> Any:
        from flightquant.client.sources import open_source

        try:
            source = open_source(path)
        except InvalidRequestError as error:
            raise InvalidRequestError("the source holds no weights in a format known here", field="source") from error
        except OSError as error:
            raise _denied("source") from error
        source.label = "the source"  # in messages, where its own name could be that of what a link leads to
        return source

    def _layers(self, source: Any) -> Iterator[Layer]:
        for name in source:
            if source.tensors[name].nbytes > self._limits.max_layer_bytes:
                raise TooLargeError(
                    f"a layer of the source has {source.tensors[name].nbytes} bytes; "
                    f"expected at most {self._limits.max_layer_bytes}",
                    field="source",
                )
        yield from source.layers()

    def _check(self, call: Call) -> None:
        """Raise if the server stops or the call's time is over."""
        if self._admission.ending:
            raise DrainingError("the server is stopping; repeat the call elsewhere", retry_after_s=RETRY_AFTER_S)
        if time.monotonic() > call.started + self._timeout_s:
            raise DeadlineError(
                f"the call took longer than {self._timeout_s:g} s, the server's limit for one call",
                field="call_timeout_s",
                expected=self._timeout_s,
            )

    def _quantize(self, call: Call, layer: Layer, command: Command) -> pa.RecordBatch:
        self._admission.hold(call, layer.nbytes)
        try:
            answer = self._engine.quantize_layers([layer], command)
            # Nothing was received: what is joined of a message is no byte.
            self._metrics.observe_answer(answer, 0, layer.data.itemsize)
            return answer.batch
        finally:
            self._admission.hold(call, 0)

    def quantize_to(self, call: Call, context: Any, body: bytes) -> Iterator[dict[str, Any]]:
        """Convert a stored source into a stored sink; progress for each layer, then what became of it.

        Raises
        ------
        FlightquantError
            As the contract says; nothing is left of the sink.
        """
        given = load_object(body, "body", _CONVERSION)
        unknown = given.keys() - {"source", "sink", "recipe"}
        if unknown:
            raise InvalidRequestError(
                f'unknown key "{min(unknown)[:80]}"; expected source, sink and recipe', field=min(unknown)[:80]
            )
        recipe = given.get("recipe")
        if not isinstance(recipe, Mapping):
            raise InvalidRequestError(
                'the request has no "recipe"; expected an object such as {"preset": "local"} or {"scheme": "int4"}',
                field="recipe",
            )
        source, sink = self._places.source(given.get("source")), self._places.sink(given.get("sink"))
        from flightquant.client.recipes import Recipe

        parsed = Recipe.parse(recipe)
        call.scheme = parsed.command.layer_spec().scheme.name
        return _Conversion(self, call, self._open(source), sink, parsed).run(context)


class _Conversion:
    """One conversion on a thread of its own, told of by a queue: the call's thread waits for who reads the answer."""

    def __init__(self, stored: Stored, call: Call, source: Any, sink: str, recipe: Any) -> None:
        self._stored = stored
        self._call = call
        self._source = source
        self._sink = sink
        self._recipe = recipe
        self._stop = threading.Event()
        self._events: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._convert, name="flightquant-conversion", daemon=True)

    def run(self, context: Any) -> Iterator[dict[str, Any]]:
        """Progress, then the result."""
        self._thread.start()
        try:
            while True:
                if context.is_cancelled():
                    raise CallCancelledError
                try:
                    event = self._events.get(timeout=POLL_S)
                except Empty:
                    continue
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.get("complete"):
                    return
        finally:
            self._stop.set()
            self._thread.join(JOIN_S)

    def _convert(self) -> None:
        from flightquant.client.convert import convert

        try:
            with self._source as source:
                result = convert(source, self._sink, self._recipe, self._quantize)
            self._events.put(
                {
                    "complete": True,
                    "layers": len(result.layers),
                    "kept": len(result.kept),
                    "bytes_in": result.bytes_in,
                    "bytes_out": result.bytes_out,
                    "seconds": result.seconds,
                }
            )
        except LayerError as error:
            self._events.put(InvalidRequestError(error.message, field="source"))
        except FileExistsError:
            self._events.put(InvalidRequestError("there is something at the sink already", field="sink"))
        except InvalidRequestError as error:
            # The client asked for another name than this, if a link led here.
            text = error.message.replace(self._sink, "the sink")
            text = text.replace(f'"{os.path.basename(self._sink)}"', "the sink")
            self._events.put(InvalidRequestError(text, field=error.field, expected=error.expected))
        except BaseException as error:  # the call's own thread tells it
            self._events.put(error)

    def _quantize(self, selection: Any, command: Command) -> Iterator[pa.RecordBatch]:
        of = len(selection)
        for done, (name, layer) in enumerate(selection.items(), 1):
            if self._stop.is_set():
                raise CallCancelledError
            self._stored._check(self._call)
            answer = self._stored._quantize(self._call, layer, command)
            yield answer
            sizes = {key: answer.column(key)[0].as_py() for key in ("bytes_in", "bytes_out", "sqnr_db")}
            self._events.put({"layer": name, "done": done, "of": of, **sizes})


def guarded(call: Call, answers: Iterator[Any]) -> Iterator[Any]:
    """What a stream gives after its handler has returned; what it raises as the Flight error of its code."""
    with Guard(call):
        try:
            yield from answers
        except GeneratorExit:
            call.outcome = "cancelled"
