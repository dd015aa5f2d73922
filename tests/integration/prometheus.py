"""A Prometheus that scrapes one address."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.integration.ray_nodes import free_ports
from tests.integration.tiny import POLL_S

_START_S = 60.0


def find_prometheus() -> str | None:
    """The program, as `make prometheus` or Debian's package installs it."""
    return shutil.which(str(Path(sys.executable).parent / "prometheus")) or shutil.which(
        "prometheus"
    )


class Prometheus:
    """A server on the loopback interface, which scrapes `target` every second."""

    def __init__(self, program: str, folder: Path, target: str) -> None:
        (port,) = free_ports(1)
        self._url = f"http://127.0.0.1:{port}"
        self.started = time.time()
        folder.mkdir()
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {"job_name": "run", "static_configs": [{"targets": [target]}]},
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Prometheus:
        deadline = time.monotonic() + _START_S
        while True:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            try:
                urllib.request.urlopen(f"{self._url}/-/ready", timeout=_START_S).close()
            except urllib.error.URLError:
                time.sleep(POLL_S)
                continue
            return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def over_time(self, query: str) -> list[dict[str, Any]]:
        """The series of a query, each second from the server's start until now."""
        now = time.time()
        form = {"query": query, "start": self.started, "end": now, "step": 1}
        body = urllib.parse.urlencode(form).encode()
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query_range", body) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def highest(self, query: str) -> float:
        """The highest value of the only series of a query."""
        (series,) = self.over_time(query)
        return max(float(value) for _, value in series["values"])
