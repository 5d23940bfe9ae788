"""The manifests on a real Kubernetes, end to end: rollout, killed pod, out of memory, drain; prints the figures.

``K8S_TOOLS=DIR python scripts/cluster.py [--image NAME] [--archive FILE]``, where DIR has ``up``, ``load-image`` and
``down`` of a one-node cluster. Clients with our own retries call the Service all the while and compare every answer
with the NumPy reference by hash. Exit code 1 if a call or a layer was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight, ipc

from flightquant import reference
from flightquant.client import QuantClient, Retry
from flightquant.layers import as_layer, layers_batch
from flightquant.spec import Command

ROOT = Path(__file__).resolve().parent.parent
PODS = ("-l", "app.kubernetes.io/name=flightquant")
RETRY = Retry(patience_s=120)
FLOOD_BYTES = 1536 << 20
ARCHIVE = Path(tempfile.gettempdir()) / "flightquant-image.tar"


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

    def __init__(self, uri: str, kind: str, threads: int) -> None:
        self._uri, self._kind, self._threads = uri, kind, threads
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._weights, self._right = layers()
        self.counts = {"calls": 0, "failed": 0, "layers": 0, "wrong": 0, "slowest_s": 0.0}

    def run(self) -> None:
        """Until SIGTERM."""
        signal.signal(signal.SIGTERM, lambda number, frame: self._stop.set())
        work = {"calls": self._call, "streams": self._stream}[self._kind]
        workers = [threading.Thread(target=self._loop, args=(work,)) for _ in range(self._threads)]
        for worker in workers:
            worker.start()
        print("started", flush=True)
        for worker in workers:
            worker.join()
        print(json.dumps(self.counts), flush=True)

    def _loop(self, work: Callable[[QuantClient], int]) -> None:
        with QuantClient(self._uri, retry=RETRY, stall_s=20) as client:
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


class Cluster:
    """kubectl and the tools beside it."""

    def __init__(self, tools: Path) -> None:
        self._tools = tools
        shown = subprocess.run([tools / "up"], check=True, stdout=subprocess.PIPE, text=True).stdout
        os.environ["KUBECONFIG"] = shown.strip().split("=", 1)[1]

    def load(self, image: str, archive: Path) -> None:
        """Make an image of this machine known to the cluster."""
        if not archive.exists():
            subprocess.run(["buildah", "push", "-q", image, f"docker-archive:{archive}:{image}"], check=True)
        subprocess.run([self._tools / "load-image", archive], check=True, stdout=subprocess.DEVNULL)

    def caller(self, what: str, *arguments: str) -> list[str]:
        """The command line of this program as a caller of the Service."""
        address = kubectl("get", "service", "flightquant", "-o", "jsonpath={.spec.clusterIP}")
        return [sys.executable, __file__, what, f"grpc://{address}:8815", *arguments]

    @contextmanager
    def client(self, kind: str, threads: int) -> Iterator[dict[str, Any]]:
        """A client that runs meanwhile; its counts afterwards."""
        process = subprocess.Popen(self.caller("client", kind, str(threads)), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(2)
        counts: dict[str, Any] = {}
        try:
            yield counts
        finally:
            process.terminate()
            out, _ = process.communicate(timeout=300)
        counts |= json.loads(out.splitlines()[-1])


def kubectl(*arguments: str, timeout: float = 300) -> str:
    """What kubectl prints."""
    return subprocess.run(["kubectl", *arguments], check=True, capture_output=True, text=True, timeout=timeout).stdout


def pods() -> list[dict[str, Any]]:
    """The service's pods that are not ending."""
    items = json.loads(kubectl("get", "pods", *PODS, "-o", "json"))["items"]
    return [item for item in items if "deletionTimestamp" not in item["metadata"]]


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether a pod is ready."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def wait(holds: Callable[[], Any], what: str, timeout_s: float = 180) -> float:
    """Seconds until it held."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(what)
        time.sleep(0.2)
    return time.monotonic() - started


def all_ready(count: int = 2) -> bool:
    """Whether so many pods are there, and all are ready."""
    found = pods()
    return len(found) == count and all(is_ready(pod) for pod in found)


def lost(counts: dict[str, Any]) -> bool:
    """Whether a call failed or an answer was wrong."""
    return bool(counts["failed"] or counts["wrong"] or not counts["layers"])


def rollout(cluster: Cluster) -> bool:
    """A restart of every pod under calls, 1,000 at least."""
    with cluster.client("calls", 4) as counts:
        started = time.monotonic()
        kubectl("rollout", "restart", "deployment/flightquant")
        kubectl("rollout", "status", "deployment/flightquant", "--timeout=280s")
        seconds = time.monotonic() - started
        # Old pods still drain; and there have to be a thousand calls.
        wait(all_ready, "the old pods are gone")
        time.sleep(max(0.0, 45 - seconds))
    print(
        f"rollout restart in {seconds:.0f} s: {counts['failed']} of {counts['calls']} calls failed, "
        f"{counts['wrong']} of {counts['layers']} answers wrong, slowest call {counts['slowest_s']} s"
    )
    return lost(counts) or counts["calls"] < 1000


def killed(cluster: Cluster) -> bool:
    """Each pod in turn is killed without a word, under streams that would have gone on."""
    with cluster.client("streams", 4) as counts:
        for pod in pods():
            kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
            wait(all_ready, "another pod is ready")
        time.sleep(5)
    print(
        f"two pods killed under {counts['calls']} streams: {counts['failed']} failed, "
        f"{counts['wrong']} of {counts['layers']} layers lost or wrong"
    )
    return lost(counts)


def out_of_memory(cluster: Cluster) -> bool:
    """A message that inflates beyond a pod's memory: the kernel ends it, it starts again, the clients end whole."""

    def restarts() -> int:
        return sum(status["restartCount"] for pod in pods() for status in pod["status"]["containerStatuses"])

    before = restarts()
    with cluster.client("streams", 4) as counts:
        subprocess.run(cluster.caller("flood"), check=False, timeout=120, stdout=subprocess.DEVNULL)
        wait(lambda: restarts() > before, "a pod has started again")
        back = wait(all_ready, "all pods are ready again")
        time.sleep(3)
    reasons = {
        status["lastState"]["terminated"]["reason"]
        for pod in pods()
        for status in pod["status"]["containerStatuses"]
        if status.get("lastState")
    }
    print(
        f"out of memory ({', '.join(sorted(reasons))}), ready again {back:.0f} s after its start; {counts['calls']} "
        f"streams: {counts['failed']} failed, {counts['wrong']} of {counts['layers']} layers lost or wrong"
    )
    return lost(counts) or "OOMKilled" not in reasons


def drained(cluster: Cluster) -> bool:
    """SIGTERM to a server that has streams: its pod is not ready while it still runs, and no stream is lost."""
    with cluster.client("streams", 4) as counts:
        name = pods()[0]["metadata"]["name"]

        def running_and_not_ready() -> bool:
            (pod,) = [pod for pod in pods() if pod["metadata"]["name"] == name]
            state = pod["status"]["containerStatuses"][0]["state"]
            return "running" in state and not is_ready(pod)

        kubectl("exec", name, "--", "sh", "-c", "kill -TERM 1")
        seconds = wait(running_and_not_ready, "the pod is not ready", 60)
        addresses = kubectl(
            "get", "endpoints", "flightquant", "-o", "jsonpath={.subsets[*].addresses[*].targetRef.name}"
        )
        wait(all_ready, "the pod is ready again")
        time.sleep(3)
    out = name not in addresses.split()
    print(
        f"drain: not ready {seconds:.1f} s after SIGTERM while it still ran, {'out of' if out else 'STILL IN'} the "
        f"endpoints; {counts['failed']} of {counts['calls']} streams failed, {counts['wrong']} of {counts['layers']} "
        "layers lost or wrong"
    )
    return lost(counts) or not out


def main() -> None:
    """Run everything; or be the client or the flood."""
    if sys.argv[1:2] == ["client"]:
        # Every repetition is a warning; the counts say what came of them.
        logging.getLogger("flightquant").setLevel(logging.ERROR)
        Client(sys.argv[2], sys.argv[3], int(sys.argv[4])).run()
        return
    if sys.argv[1:2] == ["flood"]:
        flood(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, default=os.environ.get("K8S_TOOLS"), help="DIR with up, load-image, ...")
    parser.add_argument("--image", default="localhost/flightquant:dev")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="made if missing")
    parser.add_argument("--only", nargs="+", choices=["rollout", "killed", "out_of_memory", "drained"])
    options = parser.parse_args()
    if options.tools is None:
        parser.error("K8S_TOOLS or --tools is needed")
    cluster = Cluster(Path(options.tools))
    cluster.load(options.image, options.archive)
    overlay = str(ROOT / "deploy/overlays/test-1.20")
    kubectl("delete", "-k", overlay, "--ignore-not-found", "--wait")
    kubectl("apply", "-k", overlay)
    kubectl("rollout", "status", "deployment/flightquant", "--timeout=180s")
    wait(all_ready, "all pods are ready")
    failed = []
    for step in (rollout, killed, out_of_memory, drained):
        if options.only is None or step.__name__ in options.only:
            try:
                bad = step(cluster)
            except (TimeoutError, subprocess.SubprocessError) as error:
                print(f"{step.__name__}: {error}")
                bad = True
            failed += [step.__name__] if bad else []
            sys.stdout.flush()
    print(f"failed: {', '.join(failed)}" if failed else "all steps hold")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
