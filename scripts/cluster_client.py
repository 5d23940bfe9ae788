"""The program that calls the Service for cluster.py: with our own retries, every answer compared by hash.

``cluster_client.py URI calls|streams [THREADS]`` until SIGTERM, then prints its counts; ``once`` prints what one call
comes to; ``flood`` sends a few KiB that become more memory than a pod has. ``--ca FILE --token-file FILE`` for TLS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight, ipc

from flightquant import reference
from flightquant.client import Credentials, QuantClient, Retry
from flightquant.errors import FlightquantError
from flightquant.layers import as_layer, layers_batch
from flightquant.spec import Command

RETRY = Retry(patience_s=120)
STALL_S = 20
FLOOD_BYTES = 1536 << 20


def digest(data: Any) -> str:
    """A hash to compare answers by."""
    return hashlib.sha256(data).hexdigest()


def layers() -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Eight layers and the hashes of their right answers."""
    rng = np.random.default_rng(5)
    weights = {f"layers.{i}.weight": rng.standard_normal((64, 512), np.float32) for i in range(8)}
    spec = Command.build(scheme="int4", group_size=128).layer_spec()
    return weights, {
        name: digest(reference.quantize(w, spec, "float32", measure=False).data) for name, w in weights.items()
    }


class Client:
    """The program that calls the Service: calls or streams until it is told to stop, then tells what happened."""

    def __init__(self, uri: str, credentials: Credentials) -> None:
        self._uri, self._credentials = uri, credentials
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._weights, self._right = layers()
        self.counts = {"calls": 0, "failed": 0, "layers": 0, "wrong": 0, "slowest_s": 0.0}

    def run(self, kind: str, threads: int) -> None:
        """Until SIGTERM."""
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop.set())
        work = {"calls": self._call, "streams": self._stream}[kind]
        workers = [threading.Thread(target=self._loop, args=(work,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        print("started", flush=True)
        # A signal that one of gRPC's threads takes is seen only when this one next runs: join() would sleep for ever.
        while not self._stop.wait(1.0):
            pass
        for worker in workers:
            worker.join()
        print(json.dumps(self.counts), flush=True)

    def once(self) -> str:
        """What one call comes to, without retries: ``ok``, or its error."""
        try:
            with QuantClient(self._uri, credentials=self._credentials, retry=None, timeout_s=30) as client:
                self._call(client)
        except FlightquantError as error:
            return type(error).__name__
        return "wrong" if self.counts["wrong"] else "ok"

    def _loop(self, work: Callable[[QuantClient], int]) -> None:
        with QuantClient(self._uri, credentials=self._credentials, retry=RETRY, stall_s=STALL_S) as client:
            while not self._stop.is_set():
                started = time.monotonic()
                try:
                    answered, failed = work(client), 0
                except Exception as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    answered, failed = 0, 1
                with self._lock:
                    self.counts["calls"] += 1
                    self.counts["failed"] += failed
                    self.counts["layers"] += answered
                    self.counts["slowest_s"] = max(self.counts["slowest_s"], round(time.monotonic() - started, 2))

    def _check(self, table: pa.Table | pa.RecordBatch) -> int:
        names, data = table.column("layer_name").to_pylist(), table.column("quantized_data").to_pylist()
        wrong = sum(digest(found) != self._right[name] for name, found in zip(names, data, strict=True))
        with self._lock:
            self.counts["wrong"] += wrong
        return len(names)

    def _call(self, client: QuantClient) -> int:
        answered = self._check(client.quantize(self._weights, scheme="int4", group_size=128))
        if answered != len(self._weights):
            raise RuntimeError(f"{answered} of {len(self._weights)} layers answered")
        return answered

    def _stream(self, client: QuantClient) -> int:
        """One call as long as the client runs: a layer now and then."""
        sent = 0

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal sent
            while not self._stop.is_set():
                for name, weights in self._weights.items():
                    sent += 1
                    yield layers_batch([as_layer(name, weights)])
                time.sleep(0.2)

        answered = sum(self._check(batch) for batch in client.stream(batches(), scheme="int4", group_size=128))
        if answered != sent:
            raise RuntimeError(f"{answered} of {sent} layers answered")
        return answered


def flood(uri: str) -> None:
    """A few KiB that become more memory than a pod may have, before any code of ours sees them."""
    column = pa.array(np.zeros(FLOOD_BYTES // 4, np.float32))
    weights = pa.LargeListArray.from_arrays(pa.array([0, len(column)], pa.int64()), column)
    batch = pa.record_batch({"layer_name": ["flood"], "weights": weights})
    options = flight.FlightCallOptions(timeout=60, write_options=ipc.IpcWriteOptions(compression="zstd"))
    descriptor = flight.FlightDescriptor.for_command(b'{"op": "quantize", "scheme": "int4"}')
    with flight.connect(uri) as client:
        writer, reader = client.do_exchange(descriptor, options)
        try:
            writer.begin(batch.schema)
            writer.write_batch(batch)
            writer.done_writing()
            reader.read_chunk()
        except (pa.ArrowException, flight.FlightError, StopIteration) as error:
            print(type(error).__name__)


def main() -> None:
    """Be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri")
    parser.add_argument("kind", choices=["calls", "streams", "once", "flood"])
    parser.add_argument("threads", type=int, nargs="?", default=4)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--token-file", type=Path)
    options = parser.parse_args()
    # Every repetition is a warning; the counts say what came of them.
    logging.getLogger("flightquant").setLevel(logging.ERROR)
    client = Client(options.uri, Credentials(ca=options.ca, token=options.token_file))
    if options.kind == "flood":
        flood(options.uri)
    elif options.kind == "once":
        print(client.once())
    else:
        client.run(options.kind, options.threads)


if __name__ == "__main__":
    main()
