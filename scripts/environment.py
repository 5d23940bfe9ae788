"""Make a virtual environment and install flightquant in it with one extra; do nothing where that stands already.

Runs on a bare Python 3.11. Usage: ``python scripts/environment.py .venv test``. The install is a regular one, not
editable, so that the tests meet what a user meets. "Already" is judged by the content of every file that the install
depends on, not by time stamps.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("LICENSE", "README.md", "meson.build", "meson.options", "pyproject.toml", "scripts/environment.py")
FOLDERS = ("client", "cython_core", "server", "src")
INTERPRETER = f"{sys.version} {sys.executable}"


def fingerprint() -> str:
    """Hash of the names and contents of all files that are installed or compiled."""
    paths = [ROOT / name for name in INPUTS]
    for folder in FOLDERS:
        paths += (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def check_machine() -> None:
    """Leave with a sentence that helps where this Python cannot build an extension."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"Python {sys.version.split()[0]} is too old; name one of 3.11 or later: make ... PYTHON=python3.11")
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(f"{sys.executable} cannot make virtual environments; install python3-venv or use another PYTHON=")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(f"{sys.executable} has no Python.h; install python3-dev or use another PYTHON=")


def install(home: Path, extra: str) -> None:
    """Build in ``home``/build, which later calls reuse, and install with ``extra``'s dependencies."""
    import tomllib  # not at the top: the message about an old Python comes first

    with (ROOT / "pyproject.toml").open("rb") as file:
        requires = tomllib.load(file)["build-system"]["requires"]
    environment = {**os.environ, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *requires, "ninja"], check=True, env=environment)
    subprocess.run(
        [*pip, "--no-build-isolation", f"--config-settings=build-dir={home / 'build'}", f"{ROOT}[{extra}]"],
        check=True,
        env=environment,
    )


def main() -> None:
    """Bring the environment up to date."""
    check_machine()
    home, extra = Path(sys.argv[1]).absolute(), sys.argv[2]
    stamp = home / "flightquant.json"
    if home.exists() and not stamp.exists():
        sys.exit(f"{home} was not made by this script; remove it or name another: make ... VENV=.venv-{extra}")
    state = json.loads(stamp.read_text()) if stamp.exists() else {}
    now = fingerprint()
    if state.get("interpreter") != INTERPRETER:
        print(f"Making {home}", flush=True)
        venv.create(home, clear=True, symlinks=True, with_pip=True)
        state = {"interpreter": INTERPRETER}
    extras = state.get("extras", []) if state.get("fingerprint") == now else []
    if extra in extras:
        return
    # What breaks off half-way is done again.
    stamp.write_text(json.dumps({"interpreter": INTERPRETER}))
    print(f"Installing flightquant[{extra}] in {home}", flush=True)
    install(home, extra)
    stamp.write_text(json.dumps({"interpreter": INTERPRETER, "fingerprint": now, "extras": [*extras, extra]}))


if __name__ == "__main__":
    main()
