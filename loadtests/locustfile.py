"""A Flight user for Locust that is honest under gevent; run by loadtests/run.py, or by hand:

``locust -f loadtests/locustfile.py --host grpc://127.0.0.1:8815 --mix small --users 16 --run-time 60s --headless``

pyarrow blocks the operating system's thread, which would stop every other greenlet. So every call runs on a thread of a
pool of gevent's that has as many threads as users; for each the time outside (waiting for a thread included) and inside
is reported: a gap says that the pool is too small. Write one, read one: with a window of 1 a single thread cannot hang.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar

import gevent
import pyarrow as pa
import traffic
from gevent.threadpool import ThreadPool
from locust import LoadTestShape, User, constant, constant_throughput, events, task
from pyarrow import flight

TIMEOUT_S = 120.0
MAX_USERS = 1024


class LostError(Exception):
    """An answer is missing or wrong: the one thing that may never happen."""


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--mix", choices=traffic.MIXES, default="small")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: calls a second of each user; 0: closed")
    parser.add_argument("--steps", default="", help="users of each step, such as 1,4,16,64")
    parser.add_argument("--step-s", type=float, default=15.0)
    parser.add_argument("--calls-csv", default="", help="one line for each call")


@events.init.add_listener
def _start(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    FlightUser.mix = traffic.make(options.mix)
    FlightUser.pool = ThreadPool(MAX_USERS)
    if options.rate:
        FlightUser.wait_time = constant_throughput(options.rate)
    if options.calls_csv:
        log = open(options.calls_csv, "w", newline="")  # noqa: SIM115 -- open as long as the process
        FlightUser.log = csv.writer(log)
        FlightUser.log.writerow(["ended", "users", "outcome", "outer_s", "inner_s", "bytes"])
        environment.events.quit.add_listener(lambda **_: log.close())
    if options.steps:
        environment.shape_class = Steps()
        environment.shape_class.runner = environment.runner


class Steps(LoadTestShape):
    """So many users for so long, one step after the other; ``1,64,1`` is a spike, ``64`` alone a soak."""

    def tick(self) -> tuple[int, float] | None:
        """Users now, and how fast they come."""
        options = self.runner.environment.parsed_options
        users = [int(count) for count in options.steps.split(",")]
        step = int(self.get_run_time() / options.step_s)
        return (users[step], 1000.0) if step < len(users) else None


class FlightUser(User):
    """One user with one connection: a call after the other, or batches of a stream that stays open."""

    wait_time = constant(0)
    mix: ClassVar[traffic.Mix]
    pool: ClassVar[ThreadPool]
    log: ClassVar[Any] = None

    def on_start(self) -> None:
        """Connect; a user with a stream gets a thread of its own, since a call belongs to its thread."""
        self._thread = ThreadPool(1) if self.mix.long_stream else self.pool
        self._client = flight.connect(self.host)
        self._answers: Iterator[float] | None = None

    def on_stop(self) -> None:
        """End the stream in good order."""
        if self._answers is not None:
            with suppress(pa.ArrowException, flight.FlightError):
                self._thread.spawn(self._answers.close).get()  # type: ignore[attr-defined]
        self._client.close()

    @task
    def quantize(self) -> None:
        """One request, timed outside and inside."""
        started = time.perf_counter()
        outcome, error, inner = "ok", None, 0.0
        work = self._next_of_stream if self.mix.long_stream else self._call
        try:
            inner = self._thread.spawn(work).get()
        except (pa.ArrowException, flight.FlightError, LostError, OSError) as raised:
            outcome, error = _outcome(raised), raised
            self._answers = None
        outer = time.perf_counter() - started
        nbytes = self.mix.nbytes // (len(self.mix.batches) if self.mix.long_stream else 1)
        refused = outcome == "overloaded"
        fire = self.environment.events.request.fire
        name = "refused" if refused else "outer"
        fire(
            request_type="Flight",
            name=name,
            response_time=outer * 1000,
            response_length=nbytes,
            exception=None if refused else error,
            context={},
        )
        if not error:
            fire(
                request_type="Flight",
                name="inner",
                response_time=inner * 1000,
                response_length=nbytes,
                exception=None,
                context={},
            )
        if self.log is not None:
            users = self.environment.runner.user_count
            self.log.writerow([f"{time.time():.3f}", users, outcome, f"{outer:.6f}", f"{inner:.6f}", nbytes])
        if refused:
            gevent.sleep(_retry_after(error))

    def _call(self) -> float:
        started = time.perf_counter()
        for _ in self._exchange(once=True):
            pass
        return time.perf_counter() - started

    def _next_of_stream(self) -> float:
        if self._answers is None:
            self._answers = self._exchange(once=False)
        return next(self._answers)

    def _exchange(self, *, once: bool) -> Iterator[float]:
        """One exchange: the seconds of each batch, whose answer was right."""
        mix = self.mix
        options = flight.FlightCallOptions(timeout=TIMEOUT_S if once else None)
        writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_command(mix.command), options)
        sent = 0
        try:
            writer.begin(mix.batches[0].schema)
            while True:
                for batch, right in zip(mix.batches, mix.right, strict=True):
                    started = time.perf_counter()
                    writer.write_batch(batch)
                    sent += batch.num_rows
                    answer = reader.read_chunk().data
                    if answer is None or traffic.row_hashes(answer) != right:
                        raise LostError("an answer is missing or wrong")
                    yield time.perf_counter() - started
                if once:
                    break
            writer.done_writing()
            end = json.loads(reader.read_chunk().app_metadata.to_pybytes())
            if end["rows"] != sent:
                raise LostError(f"{end['rows']} of {sent} layers arrived")
        except StopIteration:
            raise LostError("the stream was cut") from None
        finally:
            with suppress(pa.ArrowException, flight.FlightError, OSError):
                writer.close()


def _outcome(error: Exception) -> str:
    if isinstance(error, LostError):
        return "lost"
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(getattr(error, "extra_info", b""))["code"])
    return type(error).__name__


def _retry_after(error: Any) -> float:
    return float(json.loads(error.extra_info)["retry_after_s"])
