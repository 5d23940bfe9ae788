"""A server under Locust: figures, plots, and exit code 1 if an answer was lost or wrong. ``make loadtest``

``python loadtests/run.py --mix large --steps 1,4,16,64 --step-s 20 --compare`` writes into --out:
``calls.csv`` (each call), Locust's own CSV and ``report.html``, ``server.csv`` (the metrics of the same seconds),
``steps.json``, ``load.png``. ``--compare`` repeats it against a server that answers the same without computing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import traffic
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
FREE_PORTS = ("--location", "grpc://127.0.0.1:0", "--metrics-port", "0", "--health-port", "0")
WATCHED = (
    "flightquant_calls_in_flight",
    "flightquant_calls_in_flight_peak",
    "flightquant_calls_waiting",
    "flightquant_batch_bytes_in_flight",
    "flightquant_engine_batches",
    "flightquant_process_threads",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "flightquant_payload_bytes_total",
)
SETTLE_S = 2.0
"""Of each step, the seconds at its start that do not count: users come, streams open."""


class Server:
    """``flightquant serve``, or the server that does not compute, and its metrics once a second."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        ready = json.loads(self._process.stdout.readline())
        self.location: str = ready["flight"]
        self._metrics: str | None = ready.get("metrics")
        self._pages: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._metrics:
            self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            with urllib.request.urlopen(str(self._metrics), timeout=30) as answer:
                self._pages.append((time.time(), answer.read().decode()))

    def samples(self) -> list[dict[str, float]]:
        """The watched metrics, once a second; read only now, since a page takes as long as many calls."""
        found = []
        for when, page in self._pages:
            sample = {"time": when}
            for family in text_string_to_metric_families(page):
                for item in family.samples:
                    if item.name in WATCHED and item.labels.get("direction", "in") == "in":
                        sample[item.name] = item.value
            found.append(sample)
        return found

    def stop(self) -> int:
        """Drain; the exit code."""
        self._stop.set()
        if self._metrics:
            self._thread.join()
            self._process.terminate()
        else:
            self._process.kill()
        code = self._process.wait(60)
        self._log.close()
        return code


def drive(location: str, options: argparse.Namespace, out: Path) -> list[dict[str, str]]:
    """Run Locust against a server; its calls."""
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(HERE / "locustfile.py"),
        "--headless",
        "--host",
        location,
    ]
    command += ["--mix", options.mix, "--rate", str(options.rate), "--steps", options.steps]
    command += ["--step-s", str(options.step_s), "--calls-csv", str(out / "calls.csv"), "--only-summary"]
    command += [
        "--csv",
        str(out / "locust"),
        "--html",
        str(out / "report.html"),
        "--stop-timeout",
        "30",
        "--exit-code-on-error",
        "0",
    ]
    with (out / "locust.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    with (out / "calls.csv").open() as file:
        return list(csv.DictReader(file))


def figures(
    calls: list[dict[str, str]], options: argparse.Namespace, samples: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """What each step came to."""
    first = min((float(call["ended"]) - float(call["outer_s"]) for call in calls), default=0.0)
    return [
        step_figures(int(users), first + options.step_s * place, options.step_s, calls, samples)
        for place, users in enumerate(options.steps.split(","))
    ]


def step_figures(
    users: int, begin: float, length: float, calls: list[dict[str, str]], samples: list[dict[str, float]]
) -> dict[str, Any]:
    """What one step came to; calls count where they ended."""
    inside = [call for call in calls if begin + SETTLE_S <= float(call["ended"]) < begin + length]
    ended = [call for call in calls if begin <= float(call["ended"]) < begin + length]
    good = [call for call in inside if call["outcome"] == "ok"]
    times = sorted(float(call["outer_s"]) for call in good)
    gaps = sorted(float(call["outer_s"]) - float(call["inner_s"]) for call in good)
    seen = [sample for sample in samples if begin + SETTLE_S <= sample["time"] < begin + length]
    refused = sum(call["outcome"] == "overloaded" for call in ended)
    found: dict[str, Any] = {
        "users": users,
        "calls": len(good),
        "refused": refused,
        "failed": sum(call["outcome"] not in ("ok", "overloaded") for call in ended),
        "gb_s": sum(int(call["bytes"]) for call in good) / 1e9 / (length - SETTLE_S),
        **{
            f"p{share}_ms": 1000 * times[min(len(times) - 1, len(times) * share // 100)] if times else None
            for share in (50, 95, 99)
        },
        "pool_gap_p99_ms": 1000 * gaps[len(gaps) * 99 // 100] if gaps else None,
    }
    if len(seen) > 1:
        spent = seen[-1]["process_cpu_seconds_total"] - seen[0]["process_cpu_seconds_total"]
        received = seen[-1]["flightquant_payload_bytes_total"] - seen[0]["flightquant_payload_bytes_total"]
        found["server_cores"] = spent / (seen[-1]["time"] - seen[0]["time"])
        found["cpu_s_per_gib"] = spent / (received / 2**30) if received else None
        found["in_flight"] = statistics.median(sample["flightquant_calls_in_flight"] for sample in seen)
        found["peak_in_flight"] = seen[-1]["flightquant_calls_in_flight_peak"]
        found["rss_mb"] = seen[-1]["process_resident_memory_bytes"] / 1e6
    return found


def plot(steps: list[dict[str, Any]], floor: list[dict[str, Any]], samples: list[dict[str, float]], path: Path) -> None:
    """Throughput and latency against users; the server's metrics of the same minutes beside them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    users = [step["users"] for step in steps]
    axes[0, 0].plot(users, [step["gb_s"] for step in steps], "o-", label="flightquant")
    if floor:
        axes[0, 0].plot(users, [step["gb_s"] for step in floor], "o--", label="without computing")
    axes[0, 0].set(title="Throughput", xlabel="users", ylabel="GB/s of weights", ylim=0)
    for share in (50, 95, 99):
        axes[0, 1].plot(users, [step[f"p{share}_ms"] for step in steps], "o-", label=f"p{share}")
    axes[0, 1].set(title="Time of a call", xlabel="users", ylabel="ms", yscale="log")
    clock = [sample["time"] - samples[0]["time"] for sample in samples]
    axes[1, 0].plot(clock, [sample["flightquant_calls_in_flight"] for sample in samples], label="calls in flight")
    axes[1, 0].plot(clock, [sample["flightquant_process_threads"] for sample in samples], label="threads")
    axes[1, 0].set(title="Server", xlabel="s", ylim=0)
    for name, label in (
        ("process_resident_memory_bytes", "resident"),
        ("flightquant_batch_bytes_in_flight", "batches"),
    ):
        axes[1, 1].plot(clock, [sample[name] / 2**20 for sample in samples], label=label)
    axes[1, 1].set(title="Server's memory", xlabel="s", ylabel="MiB", ylim=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def show(title: str, steps: list[dict[str, Any]]) -> None:
    """The steps as a table."""
    print(title)
    print(
        "users   calls refused failed   GB/s   p50 ms   p95 ms   p99 ms  gap ms  in flight (peak)  cores  s/GiB  RSS MB"
    )
    for step in steps:
        cells = [
            f"{step['users']:5} {step['calls']:7} {step['refused']:7} {step['failed']:6} {step['gb_s']:6.2f}",
            *(
                f"{step[name]:8.1f}" if step[name] is not None else "       -"
                for name in ("p50_ms", "p95_ms", "p99_ms")
            ),
            f"{step['pool_gap_p99_ms']:7.1f}" if step["pool_gap_p99_ms"] is not None else "      -",
        ]
        if "rss_mb" in step:
            cells.append(f"{step['in_flight']:9.0f} {step['peak_in_flight']:7.0f} {step['server_cores']:6.2f}")
            cells.append(f"{step['cpu_s_per_gib'] or 0:6.2f} {step['rss_mb']:7.0f}")
        print(" ".join(cells))


def main() -> None:
    """Run, print, plot, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=traffic.MIXES, default="small")
    parser.add_argument("--steps", default="1,4,16,64", help="users of each step; 4,64,4 is a spike, 64 alone a soak")
    parser.add_argument("--step-s", type=float, default=12.0)
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: calls a second of each user; 0: closed")
    parser.add_argument("--max-calls", type=int, default=128, help="the server's limit; fewer than users: overload")
    parser.add_argument(
        "--max-queued", type=int, default=64, help="calls that may wait for a place; the rest is refused"
    )
    parser.add_argument("--compare", action="store_true", help="also against a server that does not compute")
    parser.add_argument("--out", type=Path, default=Path("build/load"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    serve = [str(Path(sys.executable).with_name("flightquant")), "serve", *FREE_PORTS, "--log-level", "warning"]
    server = Server(
        [*serve, "--max-calls", str(options.max_calls), "--max-queued", str(options.max_queued)],
        options.out / "server.log",
    )
    try:
        calls = drive(server.location, options, options.out)
    finally:
        code = server.stop()
    samples = server.samples()
    steps = figures(calls, options, samples)
    with (options.out / "server.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["time", *WATCHED])
        writer.writeheader()
        writer.writerows(samples)
    floor: list[dict[str, Any]] = []
    if options.compare:
        plain = Server([sys.executable, str(HERE / "floor.py")], options.out / "floor.log")
        try:
            floor = figures(drive(plain.location, options, options.out / "floor"), options, [])
        finally:
            plain.stop()
    show(f"{options.mix}, {'open loop' if options.rate else 'closed loop'}", steps)
    if floor:
        show("the same without computing", floor)
        ratios = [
            f"{step['users']}: {step['gb_s'] / other['gb_s']:.2f}" for step, other in zip(steps, floor, strict=True)
        ]
        print("throughput over that without computing, by users:", ", ".join(ratios))
    (options.out / "steps.json").write_text(json.dumps({"steps": steps, "floor": floor}, indent=1))
    plot(steps, floor, samples, options.out / "load.png")
    sys.exit(judge(steps, options, code))


def judge(steps: list[dict[str, Any]], options: argparse.Namespace, code: int) -> str | int:
    """What went wrong, or 0."""
    if code != 0:
        return f"the server ended with {code}"
    if any(step["failed"] for step in steps):
        return "calls were lost, failed or answered wrongly: see calls.csv"
    if not all(step["calls"] for step in steps):
        return "a step has no call that ended well"
    most = max(step["users"] for step in steps)
    peak = max(step.get("peak_in_flight", 0) for step in steps)
    # In a closed loop every user is always in a call: fewer at the server means that the test itself was the limit.
    if not options.rate and peak != min(most, options.max_calls):
        return f"the server never had more than {peak:.0f} calls at once; expected {min(most, options.max_calls)}"
    return 0


if __name__ == "__main__":
    main()
