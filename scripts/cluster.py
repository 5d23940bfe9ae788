"""The manifests on a real Kubernetes, end to end, under clients that compare every answer; prints the figures.

``K8S_TOOLS=DIR python scripts/cluster.py [--image NAME] [--archive FILE] [--only STEP...]``, where DIR has ``up``
and ``load-image`` of a one-node cluster whose node answers its DNS. Rollout, killed pods, out of memory, drain, servers
that are stuck, clients that spread over the headless Service; then ``prod-tls`` with certificates and tokens of
Secrets, both renewed. Clients with our own retries (cluster_client.py) call all the while. Exit code 1 if a call or a
layer was lost, or a step's claim does not hold. Needs root, buildah, openssl and nftables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from flightquant.server.auth import new_token

ROOT = Path(__file__).resolve().parent.parent
CLIENT = Path(__file__).with_name("cluster_client.py")
CERTIFICATE = ROOT / "deploy/components/cert-manager/certificate.yaml"
PODS = ("-l", "app.kubernetes.io/name=flightquant")
ARCHIVE = Path(tempfile.gettempdir()) / "flightquant-image.tar"
PORT = 8815


class Cluster:
    """kubectl and the tools beside it."""

    def __init__(self, tools: Path, folder: Path) -> None:
        self._tools = tools
        self.folder = folder
        self.host = "flightquant"
        self.proof: list[str] = []
        """What a caller is told for TLS."""
        shown = subprocess.run([tools / "up"], check=True, stdout=subprocess.PIPE, text=True).stdout
        os.environ["KUBECONFIG"] = shown.strip().split("=", 1)[1]
        node = "jsonpath={.items[0].status.addresses[?(@.type=='InternalIP')].address}"
        self._resolver = folder / "resolv.conf"
        self._resolver.write_text(f"nameserver {kubectl('get', 'nodes', '-o', node)}\n")

    def load(self, image: str, archive: Path) -> None:
        """Make an image of this machine known to the cluster."""
        if not archive.exists():
            subprocess.run(["buildah", "push", "-q", image, f"docker-archive:{archive}:{image}"], check=True)
        subprocess.run([self._tools / "load-image", archive], check=True, stdout=subprocess.DEVNULL)

    def serve(self, overlay: str, namespace: str) -> None:
        """Nothing but an overlay's pods, fresh ones, in a namespace that kubectl is set to from now on."""
        path = str(ROOT / "deploy/overlays" / overlay)
        kubectl("config", "set-context", "--current", f"--namespace={namespace}")
        kubectl("delete", "-k", path, "--ignore-not-found", "--wait")
        kubectl("apply", "-k", path)

    def caller(self, kind: str, *arguments: str) -> list[str]:
        """The command line of a caller of the Service, which knows the cluster's names."""
        uri = f"grpc{'+tls' if '--ca' in self.proof else ''}://{self.host}.{namespace()}.svc.cluster.local:{PORT}"
        named = ["unshare", "--mount", "--", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"']
        program = [sys.executable, str(CLIENT), uri, kind, *arguments, *self.proof]
        return [*named, str(self._resolver), *program]

    def once(self, *proof: str) -> str:
        """What one call comes to that shows this and no more."""
        self.proof, kept = list(proof), self.proof
        command = self.caller("once")
        self.proof = kept
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()

    @contextmanager
    def client(self, kind: str, threads: int = 4) -> Iterator[dict[str, Any]]:
        """A client that runs meanwhile; its counts afterwards."""
        process = subprocess.Popen(self.caller(kind, str(threads)), stdout=subprocess.PIPE, text=True)
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


def namespace() -> str:
    """The namespace that kubectl is set to."""
    return kubectl("config", "view", "--minify", "-o", "jsonpath={..namespace}")


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


def restarts() -> int:
    """How often containers of the pods that are there were started again."""
    return sum(status["restartCount"] for pod in pods() for status in pod["status"]["containerStatuses"])


def lost(counts: dict[str, Any]) -> bool:
    """Whether a call failed or an answer was wrong."""
    return bool(counts["failed"] or counts["wrong"] or not counts["layers"])


def replace_pods() -> None:
    """Start other pods in the place of all."""
    kubectl("rollout", "restart", "deployment/flightquant")
    kubectl("rollout", "status", "deployment/flightquant", "--timeout=280s")


def rollout(cluster: Cluster) -> bool:
    """A restart of every pod under calls, 1,000 at least."""
    with cluster.client("calls") as counts:
        started = time.monotonic()
        replace_pods()
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
    with cluster.client("streams") as counts:
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
    before = restarts()
    with cluster.client("streams") as counts:
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
    with cluster.client("streams") as counts:
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


def process_of(pod: dict[str, Any]) -> int:
    """The number under which this machine knows a pod's server, which runs as its init's child."""
    container = pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mine = container in (folder / "cgroup").read_text()
            if mine and re.search(r"^NSpid:.*\s1$", (folder / "status").read_text(), re.MULTILINE):
                return int((folder / "task" / folder.name / "children").read_text())
    raise RuntimeError(f"no process of {container}")


def wait_for_event(pod: str, text: str) -> bool:
    """Whether a pod's killing was said with these words; events come behind what they tell of."""
    for _ in range(30):
        if text in kubectl("get", "events", f"--field-selector=involvedObject.name={pod},reason=Killing"):
            return True
        time.sleep(1)
    return False


def started_again(cluster: Cluster, title: str, pod: dict[str, Any], harm: AbstractContextManager[None]) -> bool:
    """A server that is harmed and goes on running: the liveness probe starts it again, the clients end whole."""
    before, name = restarts(), pod["metadata"]["name"]
    with cluster.client("streams") as counts:
        with harm:
            out = wait(lambda: not all_ready(), "the pod is not ready", 300)
            seconds = out + wait(lambda: restarts() > before, "the pod was started again", 300)
        back = wait(all_ready, "all pods are ready again")
        time.sleep(3)
    probed = wait_for_event(name, "failed liveness probe, will be restarted")
    print(
        f"{title}: not ready after {out:.0f} s, started again {'by its probe' if probed else 'BY NO PROBE'} after "
        f"{seconds:.0f} s, ready {back:.0f} s later; {counts['failed']} of {counts['calls']} streams failed, "
        f"{counts['wrong']} of {counts['layers']} layers lost or wrong"
    )
    return lost(counts) or not probed


@contextmanager
def stopping(pid: int) -> Iterator[None]:
    """SIGSTOP: the process is there and does nothing, not even for SIGTERM, until it is killed."""
    os.kill(pid, signal.SIGSTOP)
    yield


@contextmanager
def deafening(pid: int) -> Iterator[None]:
    """The Flight port answers nobody, while the health port does: only the server's calls to itself notice."""
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)  # outlives the process, as the pod's network does

    def nft(rule: str) -> None:
        inside = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}", "nft"]
        subprocess.run([*inside, *rule.split()], check=True)

    try:
        nft("add table inet fq")
        nft("add chain inet fq in { type filter hook input priority 0 ; }")
        nft(f"add rule inet fq in tcp dport {PORT} drop")
        yield
        nft("delete table inet fq")
    finally:
        os.close(network)


def fresh_pod() -> dict[str, Any]:
    """One of which a kubelet, which drops a pod's events beyond 25, still tells why it is started again."""
    replace_pods()
    wait(all_ready, "the old pods are gone")
    return pods()[0]


def stopped(cluster: Cluster) -> bool:
    """A server that stands still."""
    pod = fresh_pod()
    return started_again(cluster, "server stopped by SIGSTOP", pod, stopping(process_of(pod)))


def deaf(cluster: Cluster) -> bool:
    """A server whose calls do not come through."""
    pod = fresh_pod()
    return started_again(cluster, "port that answers nobody", pod, deafening(process_of(pod)))


def spread(cluster: Cluster) -> bool:
    """A client of the headless Service's name has both pods compute, and survives one of them."""

    def answered() -> dict[str, float]:
        """Layers that each pod has answered."""
        found = {}
        for pod in pods():
            with urllib.request.urlopen(f"http://{pod['status']['podIP']}:9464/metrics", timeout=30) as page:
                rows = re.search(r'^flightquant_rows_total\{status="ok"\} (\S+)', page.read().decode(), re.MULTILINE)
            assert rows is not None
            found[pod["metadata"]["name"]] = float(rows[1])
        return found

    cluster.host = "flightquant-headless"
    try:
        before = answered()
        with cluster.client("calls") as counts:
            time.sleep(10)
            shares = {name: rows - before[name] for name, rows in answered().items()}
            kubectl("delete", "pod", min(shares), "--grace-period=0", "--force")
            wait(all_ready, "another pod is ready")
            time.sleep(3)
    finally:
        cluster.host = "flightquant"
    told = " and ".join(f"{100 * rows / sum(shares.values()):.0f} %" for rows in shares.values())
    print(
        f"one client of the headless Service: {told} of its layers at the two pods; one of them killed: "
        f"{counts['failed']} of {counts['calls']} calls failed, {counts['wrong']} of {counts['layers']} answers wrong"
    )
    return lost(counts) or not all(shares.values())


class Secrets:
    """Certificates of an authority of our own and tokens, as Secrets of the namespace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = folder / "ca.crt"
        self._openssl("req", "-x509", "-subj", "/CN=test CA", "-keyout", folder / "ca.key", "-out", self.ca)

    def _openssl(self, *arguments: str | Path) -> None:
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        subprocess.run(["openssl", *arguments, *kind], check=True, capture_output=True)

    def certificate(self) -> None:
        """A fresh certificate, for the names that cert-manager would put into it."""
        names = yaml.safe_load(CERTIFICATE.read_text())["spec"]["dnsNames"]
        key, chain = self._folder / "tls.key", self._folder / "tls.crt"
        signed = ("-CA", self.ca, "-CAkey", self._folder / "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
        alternatives = f"subjectAltName={','.join(f'DNS:{name}' for name in names)}"
        self._openssl(
            "req", "-x509", "-subj", "/CN=flightquant", *signed, "-addext", alternatives, "-keyout", key, "-out", chain
        )
        self._put("tls", "flightquant-tls", f"--cert={chain}", f"--key={key}")

    def token(self) -> tuple[Path, str]:
        """A fresh token, the only one from now on: the file that holds it, and its line in the Secret."""
        token, line = new_token("trainer", "quantize")
        with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as file:
            file.write(token)
        tokens = self._folder / "tokens"
        tokens.write_text(f"{line}\n")
        self._put("generic", "flightquant-tokens", f"--from-file={tokens}")
        return Path(file.name), line

    @staticmethod
    def _put(*arguments: str) -> None:
        made = kubectl("create", "secret", *arguments, "--dry-run=client", "-o", "yaml")
        subprocess.run(["kubectl", "apply", "-f", "-"], input=made, check=True, capture_output=True, text=True)


def shown() -> str:
    """The certificate that the Service shows now."""
    address = kubectl("get", "service", "flightquant", "-o", "jsonpath={.spec.clusterIP}")
    return ssl.get_server_certificate((address, PORT), timeout=30)


def tls(cluster: Cluster) -> bool:
    """prod-tls with Secrets: who is let in; a certificate renewed by a rollout, a token without one, under calls."""
    secrets = Secrets(cluster.folder)
    cluster.serve("test-1.20-tls", "flightquant")
    secrets.certificate()
    token, _ = secrets.token()
    kubectl("rollout", "status", "deployment/flightquant", "--timeout=180s")
    wait(all_ready, "all pods are ready")
    by_ca, known = ("--ca", str(secrets.ca)), ("--token-file", str(token))
    told = {
        "with both": cluster.once(*by_ca, *known),
        "without a token": cluster.once(*by_ca),
        "without the CA": cluster.once("--ca", "/etc/ssl/certs/ca-certificates.crt", *known),
        "in the clear": cluster.once(*known),
    }
    print(f"TLS and tokens: {', '.join(f'{what}: {outcome}' for what, outcome in told.items())}")
    right = list(told.values()) == ["ok", "UnauthenticatedError", "UnavailableError", "UnavailableError"]

    cluster.proof, before = [*by_ca, *known], shown()
    with cluster.client("calls") as counts:
        secrets.certificate()
        replace_pods()
        wait(all_ready, "the old pods are gone")
        time.sleep(3)
    renewed = shown() != before
    print(
        f"certificate {'renewed' if renewed else 'NOT RENEWED'} by a rollout: {counts['failed']} of "
        f"{counts['calls']} calls failed, {counts['wrong']} of {counts['layers']} answers wrong"
    )

    other, line = secrets.token()
    names = [pod["metadata"]["name"] for pod in pods()]
    read = ("--", "cat", "/etc/flightquant/tokens/tokens")
    seconds = wait(lambda: all(line in kubectl("exec", name, *read) for name in names), "the Secret is there")
    time.sleep(2)  # the server looks once a second
    after = cluster.once(*by_ca, "--token-file", str(other)), cluster.once(*by_ca, *known)
    print(f"token replaced: the pods have it after {seconds:.0f} s; the new one: {after[0]}, the old one: {after[1]}")
    return not right or not renewed or lost(counts) or after != ("ok", "UnauthenticatedError")


PLAIN = (rollout, killed, out_of_memory, drained, stopped, deaf, spread)
STEPS = {step.__name__: step for step in (*PLAIN, tls)}


def run(cluster: Cluster, options: argparse.Namespace) -> list[str]:
    """The steps asked for; those that failed."""
    cluster.load(options.image, options.archive)
    if set(options.only) - {"tls"}:
        cluster.serve("test-1.20", "default")
        kubectl("rollout", "status", "deployment/flightquant", "--timeout=180s")
        wait(all_ready, "all pods are ready")
    failed = []
    for name in options.only:
        if name == "tls":
            kubectl("delete", "-n", "default", "deployment/flightquant", "--ignore-not-found", "--wait")
        try:
            bad = STEPS[name](cluster)
        except (TimeoutError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}")
            bad = True
        failed += [name] if bad else []
        sys.stdout.flush()
    return failed


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, default=os.environ.get("K8S_TOOLS"), help="DIR with up, load-image, ...")
    parser.add_argument("--image", default="localhost/flightquant:dev")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="made if missing")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    if options.tools is None:
        parser.error("K8S_TOOLS or --tools is needed")
    with tempfile.TemporaryDirectory() as folder:
        failed = run(Cluster(Path(options.tools), Path(folder)), options)
    print(f"failed: {', '.join(failed)}" if failed else "all steps hold")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
