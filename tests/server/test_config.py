"""Options are checked once; each has an environment variable that no Kubernetes Service can set."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from fq_process import command, server_process
from pyarrow import flight

from flightquant.cython_core.engine import Limits
from flightquant.server.cli import serve
from flightquant.server.config import ConfigError, ServerConfig, default_bytes_in_flight
from flightquant.server.memory import memory_limit

DOCS = Path(__file__).parents[2] / "docs" / "server.md"
# What kubelet sets for a Service of any name: NAME_SERVICE_HOST, NAME_SERVICE_PORT(_PORTNAME), NAME_PORT,
# NAME_PORT_<number>_<PROTOCOL>(_PROTO|_PORT|_ADDR).
FROM_A_SERVICE = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT(_.*)?|_PORT|_PORT_[0-9]+_(TCP|UDP|SCTP)(_.*)?)")

BAD: list[tuple[str, Any]] = [
    ("location", "127.0.0.1:8815"),
    ("location", "grpc://127.0.0.1"),
    ("location", "grpc://:8815"),
    ("location", "http://127.0.0.1:8815"),
    ("location", "grpc://127.0.0.1:99999"),
    ("location", "grpc://127.0.0.1:8815/path"),
    ("location", "grpc://user@127.0.0.1:8815"),
    ("location", "grpc://[::1:8815"),
    ("metrics_port", -1),
    ("health_port", 65536),
    ("threads", 0),
    ("grace_s", -1.0),
    ("grace_s", float("nan")),
    ("drain_delay_s", float("inf")),
    ("max_calls", 0),
    ("max_bytes_in_flight", 0),
    ("call_timeout_s", 0.0),
    ("idle_timeout_s", 0.0),
    ("liveness_timeout_s", 0.0),
    ("max_queued", -1),
    ("queue_timeout_s", -1.0),
    ("log_level", "loud"),
    ("log_format", "xml"),
    ("limits", Limits(max_rows=0)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_value_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{name: value})


@pytest.mark.parametrize(
    ("location", "host"),
    [("grpc://0.0.0.0:0", "0.0.0.0"), ("grpc+tcp://localhost:1", "localhost"), ("grpc://[::1]:0", "[::1]")],
)
def test_locations(location: str, host: str) -> None:
    assert ServerConfig(location=location).host == host


def option_parameters() -> dict[str, typer.models.OptionInfo]:
    """The options of ``flightquant serve``."""
    return {
        name: parameter.annotation.__metadata__[0]
        for name, parameter in inspect.signature(serve, eval_str=True).parameters.items()
    }


def test_every_option_has_a_variable_that_no_service_can_set() -> None:
    names = [option.envvar for option in option_parameters().values()]
    assert len(set(names)) == len(names) > 10
    for name in names:
        assert isinstance(name, str)
        assert name.startswith("FLIGHTQUANT_SERVE_")
        assert not FROM_A_SERVICE.fullmatch(name), name
    assert FROM_A_SERVICE.fullmatch("FLIGHTQUANT_SERVE_METRICS_PORT")


def test_every_setting_can_be_set() -> None:
    settings = {field.name for field in fields(ServerConfig)} - {"limits"}
    limits = {field.name for field in fields(Limits)} - {"max_dims"}  # the contract's own
    assert settings | limits == set(option_parameters())


def test_every_option_is_documented() -> None:
    text = DOCS.read_text()
    for name, option in option_parameters().items():
        assert f"| `--{name.replace('_', '-')}` | `{option.envvar}` |" in text


def test_variables_are_read_and_options_win() -> None:
    env: dict[str, str | None] = {
        "FLIGHTQUANT_SERVE_MAX_CALLS": "7",
        "FLIGHTQUANT_SERVE_THREADS": "1",
        "FLIGHTQUANT_SERVE_LOG_FORMAT": "text",
        "FLIGHTQUANT_SERVE_METRICS_PORT": "tcp://10.0.0.1:9464",
    }
    with server_process("--max-calls", "5", env=env) as server:
        with urllib.request.urlopen(server.ready["metrics"], timeout=10) as page:
            text = page.read().decode()
        with flight.connect(server.location) as client:
            (result,) = client.do_action("version")
            assert json.loads(result.body.to_pybytes())["threads"] == 1
        server.signal(signal.SIGTERM)
        code, _, log = server.end()
    assert "flightquant_calls_limit 5.0" in text
    assert code == 0
    assert re.fullmatch(r"\S+Z info ready .*\bthreads=1\b.*", log[0])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--location", "nonsense"), "location is 'nonsense'"),
        (("--metrics-port", "x"), "--metrics-port"),
        (("--log-level", "loud"), "loud"),
    ],
)
def test_a_bad_option_is_said_without_a_traceback(words: tuple[str, str], named: str) -> None:
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_asking_for_help_starts_nothing() -> None:
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--metrics-port" in done.stdout


def write(root: Path, name: str, text: str) -> None:
    """A file below ``root``, with its folders."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


V2 = "0::/pod/box\n"
V1 = "12:cpu,cpuacct:/x\n4:memory:/pod/box\n"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        (V2, {"sys/fs/cgroup/pod/box/memory.max": f"{GIB}\n"}, GIB),
        (V2, {"sys/fs/cgroup/pod/box/memory.max": "max\n", "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        (V2, {"sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
        (V2, {"sys/fs/cgroup/pod/box/memory.max": "max\n"}, None),
        (V1, {"sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (V1, {"sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        (V2, {}, None),
        (None, {}, None),
    ],
)
def test_the_memory_limit_is_the_cgroups(
    tmp_path: Path, groups: str | None, files: dict[str, str], limit: int | None
) -> None:
    if groups is not None:
        write(tmp_path, "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path, name, text)
    machine = memory_limit(tmp_path / "nowhere")
    assert memory_limit(tmp_path) == (limit or machine)
    assert default_bytes_in_flight(tmp_path) == (limit or machine) // 4


def test_a_small_limit_leaves_room_for_a_message(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", V2)
    write(tmp_path, "sys/fs/cgroup/memory.max", str(64 << 20))
    assert default_bytes_in_flight(tmp_path) == 64 << 20


def test_the_client_alone_never_loads_the_server() -> None:
    """The server's packages are an extra: nothing else may need them."""
    code = "import sys, flightquant.client; print({'grpc', 'prometheus_client', 'flightquant.server'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n"
