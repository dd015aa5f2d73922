"""Make the project's virtual environment from a lock file, and make the lock files.

    python3 scripts/environment.py install [--lock requirements/cuda.lock]
    python3 scripts/environment.py lock [--upgrade]

Needs only the standard library. It makes `.venv`, installs a pinned uv into it, and runs uv with
the settings that were made for pip, which uv does not read: index, certificates, time-out and
folders with wheels.
"""

# Why not uv.lock and `uv sync`? Tried with uv 0.13.9:
# - uv.lock records the index and the address of every file, and the absolute path of a local wheel.
#   A lock made with torch's CPU wheel in one folder is rejected by `uv sync --locked` where the
#   wheel lies in another folder or comes from PyTorch's index. Our locks hold names and versions.
# - It resolves all environments at once: locking fails unless torch's CPU wheel for each supported
#   Python is at hand, and with a local CPU wheel the `gpu` extra gets the CPU torch as well.
# - Its overrides hold for all extras. vLLM's CPU build must not bring torchvision or triton, vLLM
#   for CUDA needs both.
# - A script would still have to install uv and hand pip's settings on.

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

UV_VERSION = "0.13.9"
PYTHON_VERSIONS = ("3.11", "3.12")
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
REQUIREMENTS = Path("requirements")

VENV_HELP = f"""\
Python {" or ".join(PYTHON_VERSIONS)} with its venv module is needed and was not found: install it
(Debian, Ubuntu: `apt-get install python3-venv`) or name it: make setup PYTHON=/path/to/python3.11
"""
UV_HELP = """\
pip could not install uv, which installs everything else. Check that PyPI can be reached
(PIP_INDEX_URL, PIP_CERT, HTTPS_PROXY), then run `make setup` again.
"""
INSTALL_HELP = """\
The installation failed; uv's message is above. Possible remedies:
  - a download broke off: run `make setup` again, finished downloads are kept
  - the connection is slow: UV_HTTP_TIMEOUT=600 make setup
  - PyPI is behind a mirror: PIP_INDEX_URL=<its address> make setup; a proxy: HTTPS_PROXY=<address>
  - "invalid peer certificate": SSL_CERT_FILE=<the authority's PEM file> make setup
  - torch's CPU build cannot be reached: get {torch_wheel}
    elsewhere and run PIP_FIND_LINKS=<its folder> make setup
    (if the wheel is for the other Python: make setup PYTHON=python3.11, or python3.12)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="make .venv and install a lock file into it")
    install.add_argument("--lock", type=Path, default=REQUIREMENTS / "cpu.lock")
    lock = commands.add_parser("lock", help="resolve requirements/*.in into requirements/*.lock")
    lock.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    arguments = parser.parse_args()

    os.chdir(ROOT)
    make_venv()
    if arguments.command == "install":
        install_lock(arguments.lock)
    else:
        make_locks(upgrade=arguments.upgrade)
    say("done")


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def run_or_exit(
    *command: str | Path, environment: Mapping[str, str] | None = None, help_text: str = ""
) -> None:
    """Run a command; if it fails, print `help_text` and exit with its status."""
    status = subprocess.run(command, env=environment).returncode
    if status != 0:
        print(help_text, end="", file=sys.stderr)
        sys.exit(status)


# --- virtual environment -----------------------------------------------------------------------


def make_venv() -> None:
    """Make `.venv` with a supported Python and the pinned uv, unless it exists."""
    if not is_supported(VENV_PYTHON, "pip"):
        candidates = [sys.executable, *(f"python{version}" for version in PYTHON_VERSIONS)]
        python = next((name for name in candidates if is_supported(name, "ensurepip")), None)
        if python is None:
            sys.exit(VENV_HELP)
        say(f"making .venv with {python}")
        run_or_exit(python, "-m", "venv", "--clear", VENV, help_text=VENV_HELP)
    # Without network access if it is installed already.
    pip_install = (VENV_PYTHON, "-m", "pip", "install", "--quiet")
    run_or_exit(*pip_install, f"uv=={UV_VERSION}", help_text=UV_HELP)


def is_supported(python: str | Path, module: str) -> bool:
    """Whether this interpreter runs, has a supported version, and has the module."""
    code = f"import sys, {module}; print('%d.%d' % sys.version_info[:2])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return found.stdout.strip() in PYTHON_VERSIONS


# --- pip's settings for uv ---------------------------------------------------------------------


def read_pip_settings() -> dict[str, str]:
    """Return pip's settings by name, merged from its files and variables as pip merges them."""
    output = subprocess.run(
        [VENV_PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later one wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)='(.*)'$", output, re.MULTILINE):
            settings[name.removeprefix("default-")] = value.replace("\\n", " ").strip()
    return settings


def uv_environment(pip_settings: Mapping[str, str], links: list[str]) -> dict[str, str]:
    """Return the environment for uv. Its own variables take precedence over pip's settings."""
    environment = {
        "UV_HTTP_RETRIES": "5",
        "UV_HTTP_TIMEOUT": pip_settings.get("timeout", "120"),
        "SSL_CERT_FILE": pip_settings.get("cert", ""),
        "UV_DEFAULT_INDEX": pip_settings.get("index-url", ""),
        **os.environ,
        "UV_FIND_LINKS": ",".join(links),
    }
    return {name: value for name, value in environment.items() if value}


def wheel_folders(pip_settings: Mapping[str, str]) -> list[str]:
    """Return the folders and pages with wheels that uv's variable and pip's settings name."""
    links = os.environ.get("UV_FIND_LINKS", "").split(",")
    links += pip_settings.get("find-links", "").split()
    # uv refuses folders that do not exist.
    return [link for link in links if "://" in link or (link and Path(link).expanduser().is_dir())]


def has_wheel(links: list[str], pattern: str) -> bool:
    """Whether a local folder has a matching wheel. Pages on the network are not searched."""
    folders = [Path(link.removeprefix("file://")).expanduser() for link in links]
    patterns = (pattern, pattern.replace("+", "%2B"))
    return any(any(folder.glob(name)) for folder in folders for name in patterns)


# --- install -----------------------------------------------------------------------------------


def install_lock(lock: Path) -> None:
    """Make `.venv` contain the lock's packages and this project, nothing else."""
    torch_pin = re.search(r"^torch==(\S+)", lock.read_text(), re.MULTILINE)
    assert torch_pin, f"{lock} pins no torch"
    python = next(VENV.glob("lib/python3.*")).name.removeprefix("python")
    tag = f"cp{python.replace('.', '')}"
    torch_wheel = f"torch-{torch_pin[1]}-{tag}-{tag}-*{os.uname().machine}.whl"
    pip_settings = read_pip_settings()
    links: list[str] = []
    torch_index: list[str] = []
    # With the CUDA lock no folder is used: a CPU wheel in it would satisfy `torch==` as well.
    if torch_pin[1].endswith("+cpu"):
        links = wheel_folders(pip_settings)
        if not has_wheel(links, torch_wheel):
            say(f"no folder in PIP_FIND_LINKS has {torch_wheel}: using PyTorch's CPU index")
            torch_index = ["--torch-backend", "cpu"]

    environment = uv_environment(pip_settings, links)
    help_text = INSTALL_HELP.format(torch_wheel=torch_wheel)
    say(f"installing {lock}; the first time takes minutes")
    # `sync` installs exactly the lock: it resolves nothing and removes everything else. Bytecode is
    # compiled here because otherwise each of a run's processes would compile vLLM at its start.
    sync = (UV, "pip", "sync", "--compile-bytecode", "--python", VENV_PYTHON, *torch_index, lock)
    run_or_exit(*sync, environment=environment, help_text=help_text)
    say("installing this project, editable")
    # The build backend is in the lock, so this downloads nothing.
    editable = ("--no-deps", "--no-build-isolation", "--editable", ".")
    project = (UV, "pip", "install", "--quiet", "--python", VENV_PYTHON, *editable)
    run_or_exit(*project, environment=environment, help_text=help_text)


# --- lock --------------------------------------------------------------------------------------


def make_locks(*, upgrade: bool) -> None:
    """Resolve the locks for Linux on x86-64 and the oldest Python; they install on 3.12 too."""
    pip_settings = read_pip_settings()
    links = wheel_folders(pip_settings)
    with_folders = uv_environment(pip_settings, links)
    without = uv_environment(pip_settings, [])  # a CPU wheel would replace the CUDA build of torch
    torch_index = [] if has_wheel(links, "torch-*+cpu-*.whl") else ["--torch-backend", "cpu"]
    upgrades = ["--upgrade"] if upgrade else []
    project = ["pyproject.toml", "--extra", "dev"]
    make_lock("cpu", [*project, *torch_index, *upgrades], with_folders)
    make_lock("cuda", [*project, "--extra", "gpu", *upgrades], without)
    make_lock("bench", ["--no-deps", *upgrades], without)


def make_lock(name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Resolve `NAME.in` and the arguments into `NAME.lock`, which names no address."""
    lock = REQUIREMENTS / f"{name}.lock"
    overrides = REQUIREMENTS / f"{name}-overrides.txt"
    say(f"resolving {lock}")
    run_or_exit(
        *(UV, "pip", "compile", "--quiet", REQUIREMENTS / f"{name}.in", *arguments),
        *(["--override", overrides] if overrides.exists() else []),
        *("--python-version", PYTHON_VERSIONS[0], "--python-platform", "linux"),
        *("--custom-compile-command", "make lock", "--output-file", lock),
        environment=environment,
    )
    if leaked := re.search(r"^(?:.*(?:://|\s@\s).*|-.*)$", lock.read_text(), re.MULTILINE):
        sys.exit(f"{lock} names an address or a local file: {leaked[0]}")


if __name__ == "__main__":
    main()
