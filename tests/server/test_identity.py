"""Who may call: every method and every wrong identity, over real connections."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest
from cryptography import x509
from fq_flight import NEVER_SENT, eventually
from fq_identity import AUDIENCE, ISSUER, Authority, Issuer, token_line
from fq_process import FREE_PORTS, command, server_process
from fq_rawflight import METHOD, batch_data, schema_data

import flightquant
from flightquant.client import Credentials, QuantClient
from flightquant.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError
from flightquant.layers import as_layer, layers_batch
from flightquant.server import auth, jwks
from flightquant.server.app import Server, running_server
from flightquant.server.auth import TokenFile, bearer_token
from flightquant.server.config import ConfigError, ServerConfig

SERVICE = METHOD.rpartition("/")[0]
METHODS = {
    "Handshake": "stream_stream",
    "ListFlights": "unary_stream",
    "GetFlightInfo": "unary_unary",
    "PollFlightInfo": "unary_unary",
    "GetSchema": "unary_unary",
    "DoGet": "unary_stream",
    "DoPut": "stream_stream",
    "DoExchange": "stream_stream",
    "DoAction": "unary_stream",
    "ListActions": "unary_stream",
}
"""Every method of the Flight service, with its kind."""
TOKEN, SOURCES_TOKEN, NOBODY_TOKEN = "t" * 43, "s" * 43, "n" * 43
WEIGHTS = {"w": np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)}
Make = Callable[..., Server]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Servers that end with the test; files are looked at again without a wait."""
    monkeypatch.setattr(auth, "RECHECK_S", 0.0)
    monkeypatch.setattr(jwks, "RETRY_S", 0.0)
    running = []

    def start(location: str = "grpc://127.0.0.1:0", **options: Any) -> Server:
        config = ServerConfig(location=location, metrics_port=0, health_port=0, grace_s=5.0, **options)
        running.append(running_server(config))
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two known tokens, that no test changes."""
    file = write_tokens(tmp_path_factory.mktemp("guarded"))
    config = ServerConfig("grpc://127.0.0.1:0", metrics_port=0, health_port=0, grace_s=5.0, token_file=file)
    with running_server(config) as server:
        yield server


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_tokens(tmp_path)


def write_tokens(folder: Path) -> Path:
    file = folder / "tokens"
    lines = [token_line("trainer", TOKEN, "quantize"), token_line("reader", SOURCES_TOKEN, "sources")]
    file.write_text("# who may call\n\n" + "".join(lines))
    return file


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    issuer = Issuer(tmp_path / "jwks.json")
    issuer.rotate("one")
    return issuer


def raw_call(location: str, method: str, headers: list[tuple[str, str | bytes]]) -> tuple[grpc.StatusCode, str, bytes]:
    """Call any method with nothing in it; its status, text and trailers."""
    with grpc.insecure_channel(location.removeprefix("grpc://")) as channel:
        kind = METHODS[method]
        given = iter([b""]) if kind.startswith("stream") else b""
        call: Any = getattr(channel, kind)(f"{SERVICE}/{method}")
        try:
            if kind.endswith("unary"):
                call(given, timeout=30, metadata=headers)
            else:
                list(call(given, timeout=30, metadata=headers))
        except grpc.RpcError as error:
            trailers = b"\n".join(
                value if isinstance(value, bytes) else value.encode() for _, value in error.trailing_metadata() or ()
            )
            return error.code(), error.details() or "", trailers
    return grpc.StatusCode.OK, "", b""


BAD_HEADERS: dict[str, list[tuple[str, str | bytes]]] = {
    "none": [],
    "wrong": [("authorization", "Bearer " + "x" * 43)],
    "doubled": [("authorization", f"Bearer {TOKEN}")] * 2,
    "another scheme": [("authorization", f"Basic {TOKEN}")],
    "no scheme": [("authorization", TOKEN)],
    "empty": [("authorization", "Bearer ")],
    "a part of it": [("authorization", f"Bearer {TOKEN[:-1]}")],
    "its hash": [("authorization", "Bearer " + token_line("x", TOKEN).split()[1])],
    "long": [("authorization", "Bearer " + "x" * 7000)],
    "another header": [("x-authorization", f"Bearer {TOKEN}")],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", BAD_HEADERS)
def test_every_method_refuses_who_is_not_known(guarded: Server, method: str, case: str) -> None:
    code, text, trailers = raw_call(guarded.location, method, BAD_HEADERS[case])
    if method == "PollFlightInfo":
        # Flight's Python server has no such method: nothing of ours runs, nothing is answered.
        assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
        return
    assert code is grpc.StatusCode.UNAUTHENTICATED, text
    assert text.startswith("unauthenticated: ")
    for word in (*NEVER_SENT, TOKEN):
        assert word not in text
        assert word.encode() not in trailers


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"PollFlightInfo"}))
def test_no_role_opens_a_method_that_nobody_named(guarded: Server, method: str) -> None:
    """Default deny: each identity reaches its own role's methods and no other."""
    for token, role in ((TOKEN, "quantize"), (SOURCES_TOKEN, "sources")):
        code, text, _ = raw_call(guarded.location, method, [("authorization", f"Bearer {token}")])
        if auth.METHOD_ROLES.get(method) == role:
            assert code is not grpc.StatusCode.PERMISSION_DENIED
        elif method in ("DoExchange", "DoAction", "ListActions"):
            assert code is grpc.StatusCode.PERMISSION_DENIED, text
            assert text.startswith("permission_denied: ")
        else:
            assert code is not grpc.StatusCode.OK


def test_headers_that_are_not_ascii() -> None:
    with pytest.raises(UnauthenticatedError):
        bearer_token({"authorization": ["Bearer tök"]})
    with pytest.raises(UnauthenticatedError):
        bearer_token({"authorization": [b"Bearer \xff\xfe"]})
    assert bearer_token({"authorization": ["bEARER abc"]}) == "abc"


def test_a_refused_body_is_not_read(make: Make, tokens: Path) -> None:
    server = make(token_file=tokens)
    batch = layers_batch([as_layer("w", np.ones((8, 1 << 20), np.float32))])
    sent = 0

    def messages() -> Iterator[bytes]:
        nonlocal sent
        yield schema_data(batch.schema, b'{"scheme": "int8"}')
        for _ in range(64):
            sent += 1
            yield batch_data(batch)

    with grpc.insecure_channel(server.location.removeprefix("grpc://")) as channel:
        call = channel.stream_stream(METHOD)(messages(), timeout=60)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert sent < 8


def test_a_known_token_is_served_and_named_in_the_log(tokens: Path) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    with server_process("--token-file", str(tokens)) as server:
        credentials = Credentials(token=TOKEN)
        with QuantClient(
            server.location, credentials=credentials, headers={"X-Request-Id": "call-7", "traceparent": trace}
        ) as client:
            table = client.quantize(WEIGHTS, "int8")
        assert table.column("quantized_data").equals(flightquant.quantize(WEIGHTS, "int8").column("quantized_data"))
        refused = pytest.raises(PermissionDeniedError, match='"reader" may not use DoExchange; expected the role quan')
        with QuantClient(server.location, credentials=Credentials(token=SOURCES_TOKEN)) as client, refused:
            client.quantize(WEIGHTS, "int8")
        server.signal(15)
        _, _, log = server.end()
    calls = [event for event in map(json.loads, log) if event["event"] == "call"]
    assert [(call["identity"], call["outcome"]) for call in calls] == [
        ("trainer", "ok"),
        ("reader", "permission_denied"),
    ]
    assert (calls[0]["request_id"], calls[0]["trace_id"]) == ("call-7", "a" * 32)
    assert not any(TOKEN in line or SOURCES_TOKEN in line for line in log)


def test_the_answer_carries_id_and_trace(make: Make) -> None:
    server, trace = make(), f"00-{'a' * 32}-{'b' * 16}-01"
    with grpc.insecure_channel(server.location.removeprefix("grpc://")) as channel:
        call = channel.unary_stream(f"{SERVICE}/ListActions")(
            b"", timeout=30, metadata=[("traceparent", trace), ("x-request-id", "me")]
        )
        headers = dict(call.initial_metadata())
        list(call)
    assert (headers["x-request-id"], headers["traceparent"]) == ("me", trace)


def test_a_changed_token_file_is_read_again_and_a_bad_one_is_not(
    make: Make, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(token_file=tokens)

    def call(token: str) -> None:
        with QuantClient(server.location, credentials=Credentials(token=token)) as client:
            client.quantize(WEIGHTS, "int8")

    call(TOKEN)
    other = tokens.with_suffix(".new")
    other.write_text(token_line("another", "u" * 43))
    other.rename(tokens)
    with pytest.raises(UnauthenticatedError):
        call(TOKEN)
    call("u" * 43)
    tokens.write_text("not an entry\n")
    with caplog.at_level(logging.ERROR, "flightquant.server"):
        call("u" * 43)
    assert "tokens not read again" in caplog.messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\n", "line 1 of the token file"),
        ("name sha256:abc\n", "line 1"),
        ("\nname plain-text-token\n", "line 2"),
        (token_line("name", TOKEN, "admin"), 'unknown role "admin"'),
        (b"\xff\xfe", "cannot read"),
    ],
    ids=str,
)
def test_a_token_file_that_says_nothing_is_an_error_at_start(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        TokenFile(file, frozenset())
    done = subprocess.run(command(*FREE_PORTS, "--token-file", str(file)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_token_from_a_file_is_read_for_every_call(make: Make, tokens: Path, tmp_path: Path) -> None:
    server, mine = make(token_file=tokens), tmp_path / "mine"
    with QuantClient(server.location, credentials=Credentials(token=mine)) as client:
        mine.write_text("wrong\n")
        with pytest.raises(UnauthenticatedError):
            client.quantize(WEIGHTS, "int8")
        mine.write_text(TOKEN + "\n")
        assert client.quantize(WEIGHTS, "int8").num_rows == 1


def test_the_command_makes_a_token_that_is_taken(make: Make, tmp_path: Path) -> None:
    flightquant_command = [sys.executable, "-c", "from flightquant.client.cli import main; main()"]
    words = [*flightquant_command, "token", "me", "--roles", "quantize"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    file = tmp_path / "tokens"
    file.write_text(done.stdout)
    assert done.stderr.strip() not in done.stdout
    with QuantClient(make(token_file=file).location, credentials=Credentials(token=done.stderr.strip())) as client:
        assert client.quantize(WEIGHTS, "int8").num_rows == 1
    for wrong in (["token", "two words"], ["token", "me", "--roles", "admin"]):
        assert subprocess.run([*flightquant_command, *wrong], capture_output=True, timeout=60).returncode == 2


class TestJwt:
    @pytest.fixture
    def server(self, make: Make, issuer: Issuer) -> Server:
        return make(jwt_jwks=str(issuer.jwks), jwt_issuer=ISSUER, jwt_audience=AUDIENCE)

    def call(self, server: Server, token: str) -> None:
        with QuantClient(server.location, credentials=Credentials(token=token), timeout_s=60) as client:
            client.quantize(WEIGHTS, "int8")

    def test_a_good_token(self, server: Server, issuer: Issuer) -> None:
        self.call(server, issuer.token("one"))
        self.call(server, issuer.token("one", aud=["other", AUDIENCE], roles=["quantize", "unknown here"]))
        self.call(server, issuer.token("one", roles="openid quantize"))

    @pytest.mark.parametrize(
        ("claims", "message"),
        [
            ({"exp": int(time.time()) - 3600}, "expired"),
            ({"aud": "another"}, "another audience"),
            ({"iss": "https://another.test"}, "another issuer"),
            ({"nbf": int(time.time()) + 3600}, "not valid"),
            ({"exp": None}, "not valid"),
            ({"sub": None}, "not valid"),
            ({"aud": None}, "not valid|another audience"),
        ],
        ids=str,
    )
    def test_a_bad_claim(self, server: Server, issuer: Issuer, claims: dict[str, Any], message: str) -> None:
        with pytest.raises(UnauthenticatedError, match=message):
            self.call(server, issuer.token("one", **claims))

    def test_roles_that_it_lacks(self, server: Server, issuer: Issuer) -> None:
        for roles in (["sources"], ["admin"], [], 7):
            with pytest.raises(PermissionDeniedError):
                self.call(server, issuer.token("one", roles=roles))

    def test_algorithms_that_are_not_allowed(self, server: Server, issuer: Issuer) -> None:
        good = jwt.decode(issuer.token("one"), options={"verify_signature": False})
        unsigned = jwt.encode(good, None, "none", headers={"kid": "one"})
        shared = jwt.encode(good, "k" * 32, "HS256", headers={"kid": "one"})
        for token in (unsigned, shared):
            with pytest.raises(UnauthenticatedError, match="algorithm"):
                self.call(server, token)

    def test_a_changed_signature_or_payload(self, server: Server, issuer: Issuer) -> None:
        head, body, signature = issuer.token("one").split(".")
        other = issuer.token("one", sub="root").split(".")[1]
        for token in (f"{head}.{other}.{signature}", f"{head}.{body}.{signature[::-1]}", f"{head}.{body}.", "a.b.c"):
            with pytest.raises(UnauthenticatedError):
                self.call(server, token)

    def test_keys_rotate(self, server: Server, issuer: Issuer) -> None:
        old = issuer.token("one")
        self.call(server, old)
        issuer.rotate("two")
        self.call(server, issuer.token("two"))
        with pytest.raises(UnauthenticatedError, match="key"):
            self.call(server, old)

    def test_a_set_that_cannot_be_read_later_changes_nothing(self, server: Server, issuer: Issuer) -> None:
        issuer.jwks.write_text("{")
        self.call(server, issuer.token("one"))

    def test_tokens_of_a_file_go_beside_it(self, make: Make, issuer: Issuer, tokens: Path) -> None:
        server = make(jwt_jwks=str(issuer.jwks), jwt_issuer=ISSUER, jwt_audience=AUDIENCE, token_file=tokens)
        self.call(server, TOKEN)
        self.call(server, issuer.token("one"))


class TestTls:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        return Authority(tmp_path)

    def serve(self, make: Make, authority: Authority, **options: Any) -> Server:
        pair = authority.issue_server()
        return make("grpc+tls://127.0.0.1:0", tls_cert=pair.certificate, tls_key=pair.key, **options)

    def test_a_client_that_knows_the_authority(self, make: Make, authority: Authority) -> None:
        server = self.serve(make, authority)
        assert server.location.startswith("grpc+tls://")
        with QuantClient(server.location, credentials=Credentials(ca=authority.file), timeout_s=60) as client:
            assert client.quantize(WEIGHTS, "int8").num_rows == 1

    def test_a_client_that_does_not(self, make: Make, authority: Authority, tmp_path: Path) -> None:
        server = self.serve(make, authority)
        other = Authority(tmp_path, "other")
        for location, ca in ((server.location, other.file), (server.location.replace("+tls", ""), None)):
            with (
                QuantClient(location, credentials=Credentials(ca=ca), retry=None, timeout_s=20) as client,
                pytest.raises(UnavailableError),
            ):
                client.quantize(WEIGHTS, "int8")

    @pytest.mark.parametrize("case", ["none", "another authority", "expired"])
    def test_mutual_refuses_the_handshake(self, make: Make, authority: Authority, tmp_path: Path, case: str) -> None:
        server = self.serve(make, authority, tls_client_ca=authority.file)
        credentials = Credentials(ca=authority.file)
        if case != "none":
            signer = Authority(tmp_path, "other") if case == "another authority" else authority
            pair = signer.issue("client", days=-1 if case == "expired" else 1)
            credentials = Credentials(ca=authority.file, certificate=pair.certificate, key=pair.key)
        with (
            QuantClient(server.location, credentials=credentials, retry=None, timeout_s=20) as client,
            pytest.raises(UnavailableError),
        ):
            client.quantize(WEIGHTS, "int8")

    @pytest.mark.parametrize(
        ("sans", "name"),
        [
            ([], "client"),
            ([x509.DNSName("trainer.ml.svc")], "trainer.ml.svc"),
            (
                [x509.UniformResourceIdentifier("spiffe://cluster/ns/ml/sa/trainer")],
                "spiffe://cluster/ns/ml/sa/trainer",
            ),
            ([x509.DNSName("first"), x509.DNSName("second")], "first"),
        ],
        ids=str,
    )
    def test_mutual_names_who_calls(
        self,
        make: Make,
        authority: Authority,
        sans: list[x509.GeneralName],
        name: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        server = self.serve(make, authority, tls_client_ca=authority.file)
        pair = authority.issue("client", sans)
        credentials = Credentials(ca=authority.file, certificate=pair.certificate, key=pair.key)
        with caplog.at_level(logging.INFO, "flightquant.server"):
            with QuantClient(server.location, credentials=credentials, timeout_s=60) as client:
                client.quantize(WEIGHTS, "int8")
            eventually(lambda: "call" in caplog.messages)
        (call,) = [record for record in caplog.records if record.getMessage() == "call"]
        assert call.fields["identity"] == name  # type: ignore[attr-defined]

    def test_mutual_and_a_token_are_both_asked_for(self, make: Make, authority: Authority, tokens: Path) -> None:
        server = self.serve(make, authority, tls_client_ca=authority.file, token_file=tokens)
        pair = authority.issue("client")
        for token in (None, TOKEN):
            credentials = Credentials(token, authority.file, pair.certificate, pair.key)
            with QuantClient(server.location, credentials=credentials, timeout_s=60) as client:
                if token is None:
                    with pytest.raises(UnauthenticatedError):
                        client.quantize(WEIGHTS, "int8")
                else:
                    assert client.quantize(WEIGHTS, "int8").num_rows == 1

    def test_half_a_configuration_is_an_error_at_start(self, authority: Authority, tmp_path: Path) -> None:
        pair, other = authority.issue_server(), authority.issue("other")
        nothing = tmp_path / "nothing.pem"
        nothing.write_text("")
        cert, key, tls = pair.certificate, pair.key, "grpc+tls://127.0.0.1:0"
        for named, options in [
            ("tls_key", {"location": tls, "tls_cert": cert}),
            ("tls_cert", {"location": tls, "tls_key": key}),
            ("tls_cert", {"location": tls}),
            ("tls_cert", {"location": tls, "tls_client_ca": authority.file}),
            ("tls_cert", {"tls_cert": cert, "tls_key": key}),
            ("tls_client_ca", {"tls_client_ca": authority.file}),
            ("tls_cert", {"location": tls, "tls_cert": cert, "tls_key": other.key}),
            ("tls_cert", {"location": tls, "tls_cert": nothing, "tls_key": key}),
            ("tls_cert", {"location": tls, "tls_cert": tmp_path / "missing", "tls_key": key}),
            ("tls_client_ca", {"location": tls, "tls_cert": cert, "tls_key": key, "tls_client_ca": nothing}),
            ("jwt_issuer", {"jwt_jwks": "keys.json", "jwt_audience": "x"}),
            ("jwt_jwks", {"jwt_issuer": "i", "jwt_audience": "x"}),
            ("jwt_jwks", {"jwt_jwks": "http://keys", "jwt_issuer": "i", "jwt_audience": "x"}),
            ("jwt_algorithms", {"jwt_algorithms": "RS256,HS256"}),
            ("jwt_algorithms", {"jwt_algorithms": "none"}),
            ("jwt_ca_file", {"jwt_ca_file": authority.file}),
            ("default_roles", {"default_roles": "admin"}),
        ]:
            with pytest.raises(ConfigError, match=f"^{named} is "):
                ServerConfig(**options)  # type: ignore[arg-type]

    def test_the_process_says_so(self, authority: Authority) -> None:
        pair = authority.issue_server()
        words = ("--location", "grpc+tls://127.0.0.1:0", "--tls-cert", str(pair.certificate))
        done = subprocess.run(command(*FREE_PORTS[2:], *words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert re.search("tls_key is", done.stderr)
        assert "Traceback" not in done.stderr
