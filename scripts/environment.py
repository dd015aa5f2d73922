"""Make the project's virtual environment from a lock file, and make the lock files.

    python3 scripts/environment.py install [--lock requirements/cuda.lock]
    python3 scripts/environment.py lock

Runs with the standard library alone: it makes `.venv`, puts a pinned uv into it, and lets uv do
the rest. What is set for pip (an index, certificates, folders with wheels, a time-out) is handed on
to uv. The CPU build of torch comes from such a folder where one holds it, and from PyTorch's
CPU index otherwise.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

UV_VERSION = "0.13.9"
PYTHON_VERSIONS = ("3.11", "3.12")
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
REQUIREMENTS = Path("requirements")

INSTALL_HELP = """\
Installing failed; uv's message is above. What helps:
  - a download that broke off: run `make setup` again, finished downloads are kept
  - a slow line: UV_HTTP_TIMEOUT=600 make setup
  - a mirror of PyPI: PIP_INDEX_URL=<its address> make setup; a proxy: HTTPS_PROXY=<its address>
  - "invalid peer certificate": SSL_CERT_FILE=<the authority's PEM file> make setup
  - torch's CPU build is out of reach: fetch {torch_wheel}
    elsewhere and run PIP_FIND_LINKS=<the folder it is in> make setup
    (a folder with a wheel for the other Python: make setup PYTHON=python3.11, or python3.12)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="make .venv and install a lock file into it")
    install.add_argument("--lock", type=Path, default=REQUIREMENTS / "cpu.lock")
    lock = commands.add_parser("lock", help="resolve requirements/*.in into requirements/*.lock")
    lock.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    arguments = parser.parse_args()

    os.chdir(ROOT)
    started = time.monotonic()
    make_venv()
    pip_settings = read_pip_settings()
    if arguments.command == "install":
        status = install_lock(arguments.lock, pip_settings)
    else:
        status = make_locks(pip_settings, upgrade=arguments.upgrade)
    if status == 0:
        say(f"done in {time.monotonic() - started:.0f} s")
    return status


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


# --- the virtual environment -------------------------------------------------------------------


def make_venv() -> None:
    """Make `.venv` with a supported Python and the pinned uv, unless it is there already."""
    if run_quietly(VENV_PYTHON, "-c", f"import pip; {check_version_code()}") != 0:
        python = find_python()
        say(f"making .venv with {python}")
        if subprocess.run([python, "-m", "venv", "--clear", str(VENV)]).returncode != 0:
            sys.exit(
                f"`{python} -m venv` failed: install its venv module (Debian, Ubuntu: "
                "`apt-get install python3-venv`) or name another Python: `make setup PYTHON=...`"
            )
    installed = ""
    if UV.exists():
        installed = subprocess.run([UV, "--version"], capture_output=True, text=True).stdout
    if UV_VERSION not in installed.split():
        say(f"installing uv {UV_VERSION} into .venv")
        command = [VENV_PYTHON, "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"]
        if subprocess.run(command).returncode != 0:
            sys.exit(
                "pip could not install uv: without it nothing else can be installed. Check that "
                "PyPI can be reached (PIP_INDEX_URL, PIP_CERT, HTTPS_PROXY), then `make setup`."
            )


def find_python() -> str:
    """The Python that runs this file if it is supported, else one from the PATH, else exit."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in PYTHON_VERSIONS:
        return sys.executable
    for version in PYTHON_VERSIONS:
        candidate = shutil.which(f"python{version}")
        if candidate and run_quietly(candidate, "-c", check_version_code()) == 0:
            return candidate
    sys.exit(
        f"Python {' or '.join(PYTHON_VERSIONS)} is needed, got {sys.version.split()[0]} and found "
        "no other on the PATH: name one with `make setup PYTHON=/path/to/python3.11`"
    )


def check_version_code() -> str:
    versions = [tuple(map(int, version.split("."))) for version in PYTHON_VERSIONS]
    return f"import sys; sys.exit(sys.version_info[:2] not in {versions})"


def run_quietly(program: str | Path, *arguments: str) -> int:
    """The exit status, or 127 where there is no such program."""
    try:
        return subprocess.run([program, *arguments], capture_output=True).returncode
    except OSError:
        return 127


# --- pip's settings, for uv --------------------------------------------------------------------


def read_pip_settings() -> dict[str, str]:
    """pip's settings by name, merged from its files and variables as `pip install` would."""
    output = subprocess.run(
        [VENV_PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later one wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)='(.*)'$", output, re.MULTILINE):
            settings[name] = value.replace("\\n", " ").strip()
    return settings


def uv_environment(pip_settings: Mapping[str, str], find_links: list[str]) -> dict[str, str]:
    """The environment for uv: pip's settings where uv's own variables don't say otherwise."""
    environment = dict(os.environ)
    environment.setdefault("UV_HTTP_RETRIES", "5")
    environment.setdefault("UV_HTTP_TIMEOUT", pip_settings.get("timeout", "120"))
    environment["UV_FIND_LINKS"] = ",".join(find_links)
    if "cert" in pip_settings:
        environment.setdefault("SSL_CERT_FILE", pip_settings["cert"])
    if "index-url" in pip_settings and "UV_INDEX_URL" not in environment:
        environment.setdefault("UV_DEFAULT_INDEX", pip_settings["index-url"])
    return {name: value for name, value in environment.items() if value}


def wheel_folders(pip_settings: Mapping[str, str]) -> list[str]:
    """Folders and pages with wheels: uv's own variable and pip's, without folders not there."""
    links = os.environ.get("UV_FIND_LINKS", "").split(",")
    links += pip_settings.get("find-links", "").split()
    return [
        link
        for link in dict.fromkeys(links)
        if link and ("://" in link or Path(link).expanduser().is_dir())
    ]


# --- install -----------------------------------------------------------------------------------


def install_lock(lock: Path, pip_settings: Mapping[str, str]) -> int:
    """Make `.venv` hold what the lock names and this project, nothing else. The exit status."""
    torch_pin = re.search(r"^torch==(\S+)", lock.read_text(), re.MULTILINE)
    assert torch_pin, f"{lock} pins no torch"
    torch_version = torch_pin[1]
    torch_wheel = torch_wheel_pattern(torch_version)
    # A CPU wheel in a folder satisfies a plain `torch==` too, and would shadow the CUDA build.
    wants_cpu_torch = torch_version.endswith("+cpu")
    find_links = wheel_folders(pip_settings) if wants_cpu_torch else []
    options: list[str] = []
    if wants_cpu_torch and not has_wheel(find_links, torch_wheel):
        say(f"no folder of PIP_FIND_LINKS holds {torch_wheel}: taking PyTorch's CPU index")
        options += ["--torch-backend", os.environ.get("UV_TORCH_BACKEND", "cpu")]

    environment = uv_environment(pip_settings, find_links)
    say(f"installing {lock} (sizes of the larger downloads follow; the first time takes minutes)")
    # `sync` installs exactly the lock: it resolves no dependencies and removes what is not named.
    # Bytecode belongs to the installation: a dozen processes would else compile vLLM at once.
    sync = [UV, "pip", "sync", "--compile-bytecode", "--python", VENV_PYTHON, *options, lock]
    status = subprocess.run(sync, env=environment).returncode
    if status == 0:
        say("installing this project, editable")
        # The build backend is in the lock, so nothing is downloaded here.
        project = ["--no-deps", "--no-build-isolation", "--editable", "."]
        command = [UV, "pip", "install", "--quiet", "--python", VENV_PYTHON, *project]
        status = subprocess.run(command, env=environment).returncode
    if status != 0:
        print(INSTALL_HELP.format(torch_wheel=torch_wheel), file=sys.stderr)
    return status


def torch_wheel_pattern(version: str) -> str:
    """The file name, with wild cards, of torch's wheel for the environment's Python on Linux."""
    output = subprocess.run(
        [VENV_PYTHON, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    tag = output.strip()
    return f"torch-{version}-{tag}-{tag}-*{os.uname().machine}.whl"


def has_wheel(find_links: list[str], pattern: str) -> bool:
    """Whether a local folder holds such a wheel; pages on the network are not asked."""
    return any(
        next(Path(link.removeprefix("file://")).expanduser().glob(name), None)
        for link in find_links
        if "://" not in link or link.startswith("file://")
        for name in (pattern, pattern.replace("+", "%2B"))
    )


# --- lock --------------------------------------------------------------------------------------


def make_locks(pip_settings: Mapping[str, str], *, upgrade: bool) -> int:
    """Resolve the locks for Linux on x86-64 and the oldest Python; they install on 3.12 too.

    The CPU's and CUDA's hold everything, `bench.lock` only what comes on top of either.
    """
    find_links = wheel_folders(pip_settings)
    pyproject = Path("pyproject.toml")
    dev, gpu = ["--extra", "dev"], ["--extra", "gpu"]
    no_cpu_wheel = not has_wheel(find_links, "torch-*+cpu-*.whl")
    cpu_torch = ["--torch-backend", "cpu"] if no_cpu_wheel else []
    # A CPU wheel would shadow the CUDA build of torch: no folders for the other two.
    return (
        compile_lock("cpu", [pyproject], [*dev, *cpu_torch], upgrade, pip_settings, find_links)
        or compile_lock("cuda", [pyproject], [*dev, *gpu], upgrade, pip_settings, [])
        or compile_lock("bench", [], ["--no-deps"], upgrade, pip_settings, [])
    )


def compile_lock(
    name: str,
    inputs: list[Path],
    options: list[str],
    upgrade: bool,
    pip_settings: Mapping[str, str],
    find_links: list[str],
) -> int:
    """Resolve the inputs and `NAME.in` into `NAME.lock`, which names no address.

    Returns the exit status.
    """
    lock = REQUIREMENTS / f"{name}.lock"
    command: list[str | Path] = [UV, "pip", "compile", "--quiet", *options]
    command += ["--python-version", PYTHON_VERSIONS[0], "--python-platform", "linux"]
    command += ["--custom-compile-command", "make lock", "--output-file", lock]
    overrides = REQUIREMENTS / f"{name}-overrides.txt"
    if overrides.exists():
        command += ["--override", overrides]
    if upgrade:
        command.append("--upgrade")
    say(f"resolving {lock}")
    status = subprocess.run(
        [*command, *inputs, REQUIREMENTS / f"{name}.in"],
        env=uv_environment(pip_settings, find_links),
    ).returncode
    if status != 0:
        return status
    if leaked := re.findall(r"^(?:.*(?:://|\s@\s).*|-.*)$", lock.read_text(), re.MULTILINE):
        print(f"{lock} names an address or a local file: {leaked[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
