"""One ``DoExchange``: batches of layers in, for each a batch of answers out, then the end message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flightquant.cython_core.engine import Answer, Engine, Limits, Session
from flightquant.cython_core.magnitude import AmaxSession
from flightquant.cython_core.restore import QuantizedSession
from flightquant.errors import DeadlineError, DrainingError, FlightquantError, InvalidRequestError, TooLargeError
from flightquant.server.admission import RETRY_AFTER_S, Admission
from flightquant.server.calls import Call, CallCancelledError
from flightquant.server.metrics import Metrics
from flightquant.spec import Command

MAX_METADATA_MESSAGES = 1024
LEAVING_S = 0.02
ASK_S = 0.05
ASK_BETWEEN_S = 1.0
"""Least time between two questions to gRPC whether a call was cancelled, within a batch and between two: it does a turn
of transport to find out, with Python's lock held. Between batches the next read or write fails anyway, or the stream
ends, where it is asked."""

_COMMAND = 'a command descriptor with a JSON object such as {"op": "quantize", "scheme": "int4"}'


class Exchange:
    """Runs the exchanges of one server; it holds nothing of any call.

    Parameters
    ----------
    engine : Engine
        The process's one engine, shared by all calls.
    timeout_s : float
        The longest that a call may take.
    """

    def __init__(
        self, engine: Engine, limits: Limits, admission: Admission, metrics: Metrics, timeout_s: float
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._admission = admission
        self._metrics = metrics
        self._timeout_s = timeout_s

    def run(self, call: Call, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Answer one exchange, from its descriptor to its end message.

        Parameters
        ----------
        context, descriptor, reader, writer
            As Flight hands them to ``do_exchange``.

        Raises
        ------
        FlightquantError
            As the contract says.
        CallCancelledError
            The client ended the call or is gone.
        """
        command = read_command(descriptor)
        call.op = command.op
        if command.op == "quantize":
            call.scheme = command.layer_spec().scheme.name
        step = _Step(call, context, self._admission, self._timeout_s)
        schema = step.read(lambda: reader.schema)
        session = self._open(schema, command)
        _check_metadata_size(metadata_bytes(schema), self._limits.max_metadata_bytes, "the schema has")
        call.totals = session.end
        step.write(lambda: writer.begin(session.schema))
        metadata_messages = 0
        while True:
            self._admission.wait_for_room(step.check)
            stages: dict[str, float] = {}
            try:
                chunk = self._receive(call, step, reader, stages)
                if chunk is None:
                    break
                metadata_messages += chunk.data is None
                _check_metadata_messages(metadata_messages)
                size = 0 if chunk.app_metadata is None else chunk.app_metadata.size
                _check_metadata_size(size, self._limits.max_metadata_bytes, "a message has")
                if chunk.data is not None:
                    self._answer(call, step, session, chunk, writer, stages)
                # The next read must not find this batch still held.
                del chunk
            finally:
                if stages:
                    self._metrics.observe_stages(stages, call.trace_id)
        step.write(lambda: writer.write_metadata(session.end.to_json()))

    def _open(self, schema: pa.Schema, command: Command) -> Session | QuantizedSession:
        if command.op == "quantize":
            return self._engine.session(schema, command, self._limits)
        if command.op == "amax":
            return AmaxSession(self._engine, schema, command, self._limits)
        return QuantizedSession(self._engine, schema, command, self._limits)

    def _receive(self, call: Call, step: _Step, reader: Any, stages: dict[str, float]) -> Any:
        """The next chunk, or None at the end of the stream."""
        started = time.perf_counter()
        self._admission.listen(call)
        try:
            chunk = step.read(reader.read_chunk)
        except StopIteration:
            chunk = None
        finally:
            self._admission.heard(call)
        if chunk is not None:
            _note(call, stages, {"receive": time.perf_counter() - started})
        step.check(at_end=chunk is None)
        return chunk

    def _answer(
        self,
        call: Call,
        step: _Step,
        session: Session | QuantizedSession,
        chunk: Any,
        writer: Any,
        stages: dict[str, float],
    ) -> None:
        """Answer one batch, and hold nothing of it afterwards."""
        # The sizes of its buffers are all that may be asked of a batch before the engine has checked it.
        batch = chunk.data
        held = batch.get_total_buffer_size()
        self._admission.hold(call, held)
        try:
            answer = _compute(call, step, session, batch)
            _note(call, stages, answer.seconds)
            self._admission.hold(call, held + answer.batch.get_total_buffer_size())
            started = time.perf_counter()
            if call.sums and answer.sums is not None:
                step.write(partial(writer.write_with_metadata, answer.batch, answer.sums.tobytes()))
            else:
                step.write(partial(writer.write_batch, answer.batch))
            _note(call, stages, {"write": time.perf_counter() - started})
            self._metrics.observe_answer(answer, held, session.value_bytes, stages, call.trace_id)
            stages.clear()
        finally:
            self._admission.hold(call, 0)


def _compute(call: Call, step: _Step, session: Session | QuantizedSession, batch: pa.RecordBatch) -> Answer:
    call.computing = True
    try:
        if isinstance(session, QuantizedSession):
            return session.answer(batch, should_stop=step.is_due)
        return session.quantize(batch, should_stop=step.is_due)
    except DeadlineError:
        # The engine knows that it was told to stop, the step knows why.
        step.check()
        raise
    finally:
        call.computing = False


def _note(call: Call, stages: dict[str, float], more: Mapping[str, float]) -> None:
    """Add stages that ran one after the other until now."""
    stages.update(more)
    if call.stages is not None:
        begin = call.seconds - sum(more.values())
        for stage, seconds in more.items():
            call.stages.note(stage, begin, seconds)
            begin += seconds


class _Step:
    """One step of a call after the other: its reads and writes, and whether the call has to end before its stream."""

    def __init__(self, call: Call, context: Any, admission: Admission, timeout_s: float) -> None:
        self._context = context
        self._admission = admission
        self._timeout_s = timeout_s
        self._deadline = call.started + timeout_s
        self._asked = time.monotonic()
        self._cancelled = False

    def _is_cancelled(self, now: float, rest_s: float) -> bool:
        """Whether the client ended the call, as far as gRPC said when it was last asked, at most ``rest_s`` ago."""
        if now - self._asked >= rest_s and not self._cancelled:
            self._asked = now
            self._cancelled = self._context.is_cancelled()
        return self._cancelled

    def is_due(self) -> bool:
        """Whether :meth:`check` would raise."""
        now = time.monotonic()
        return now > self._deadline or self._admission.ending or self._is_cancelled(now, ASK_S)

    def check(self, *, at_end: bool = False) -> None:
        """Raise if the call has to end; ``at_end`` of a stream, which may look whole to the end because it was cut."""
        now = time.monotonic()
        if self._is_cancelled(now, 0.0 if at_end else ASK_BETWEEN_S):
            raise CallCancelledError
        if self._admission.ending:
            raise DrainingError(
                "the server is stopping and this call did not end in time; repeat it elsewhere",
                retry_after_s=RETRY_AFTER_S,
            )
        if now > self._deadline:
            raise DeadlineError(
                f"the call took longer than {self._timeout_s:g} s, the server's limit for one call",
                field="call_timeout_s",
                expected=self._timeout_s,
            )

    def read(self, read: Callable[[], Any]) -> Any:
        """What ``read`` gives; bytes that Arrow cannot make sense of are the client's mistake.

        Raises
        ------
        StopIteration
            The end of the stream.
        InvalidRequestError, TooLargeError, CallCancelledError
        """
        try:
            return read()
        except StopIteration:
            raise
        except MemoryError:
            raise TooLargeError("a message needs more memory than the server has", field="message") from None
        except Exception as error:
            # A client that leaves in mid-message looks like one that sent nonsense; the context knows a moment later.
            time.sleep(LEAVING_S)
            if self._context.is_cancelled():
                raise CallCancelledError from None
            raise InvalidRequestError(
                f"the request stream is not a readable Arrow stream ({type(error).__name__}); "
                "expected a schema, then record batches of it",
                field="stream",
                got=type(error).__name__,
                expected="an Arrow IPC stream of one schema",
            ) from None

    def write(self, write: Callable[[], None]) -> None:
        """Do ``write``; if it fails because nobody reads any more, the call was cancelled."""
        try:
            write()
        except FlightquantError:
            raise
        except (OSError, flight.FlightError):
            # Flight's word for a client that is gone, which can come before the context knows it.
            raise CallCancelledError from None
        except Exception:
            if self._context.is_cancelled():
                raise CallCancelledError from None
            raise


def read_command(descriptor: Any) -> Command:
    """The command in a descriptor.

    Raises
    ------
    InvalidRequestError
        There is no descriptor, it is a path, or its command is none of the contract's.
    """
    return Command.parse(command_bytes(descriptor))


def command_bytes(descriptor: Any) -> bytes:
    """The bytes of a command descriptor.

    Raises
    ------
    InvalidRequestError
        There is no descriptor, or it is a path.
    """
    kind = None if descriptor is None else descriptor.descriptor_type.name
    if kind != "CMD":
        got = {"PATH": "a path descriptor"}.get(kind or "", "no descriptor")
        raise InvalidRequestError(f"the call has {got}; expected {_COMMAND}", field="descriptor", got=got)
    command: bytes = descriptor.command
    return command


def metadata_bytes(schema: pa.Schema) -> int:
    """Bytes of the metadata of a checked schema and of its fields."""
    found = [schema.metadata, *(field.metadata for field in schema)]
    return sum(len(key) + len(value) for each in found if each for key, value in each.items())


def _check_metadata_messages(messages: int) -> None:
    if messages > MAX_METADATA_MESSAGES:
        raise TooLargeError(
            f"the stream has more than {MAX_METADATA_MESSAGES} messages of metadata alone",
            field="app_metadata",
            got=messages,
            expected=MAX_METADATA_MESSAGES,
        )


def _check_metadata_size(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise TooLargeError(
            f"{what} {size} bytes of metadata; expected at most {limit}",
            field="max_metadata_bytes",
            got=size,
            expected=limit,
        )
