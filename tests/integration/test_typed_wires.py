"""The type checker sees remote calls: a method that an actor does not have is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
CALLS = """\
from ray.actor import ActorProxy

from distillm_ray.cluster.buffer import BufferActor
from distillm_ray.cluster.control import ControlActor
from distillm_ray.cluster.log import LogActor
from distillm_ray.cluster.orchestrator import OrchestratorActor
from distillm_ray.cluster.rollout import GeneratorActor
from distillm_ray.cluster.targets import ScorerActor, TargetStoreActor


async def good(buffer: ActorProxy[BufferActor], store: ActorProxy[TargetStoreActor]) -> bool:
    await buffer.advance.remote(3)
    return await store.has.remote("key", 3)


async def bad(
    buffer: ActorProxy[BufferActor],
    control: ActorProxy[ControlActor],
    log: ActorProxy[LogActor],
    orchestrator: ActorProxy[OrchestratorActor],
    generator: ActorProxy[GeneratorActor],
    scorer: ActorProxy[ScorerActor],
    store: ActorProxy[TargetStoreActor],
) -> str:
    buffer.renamed.remote(3)
    control.renamed.remote()
    log.renamed.remote()
    orchestrator.renamed.remote()
    generator.renamed.remote()
    scorer.renamed.remote()
    store.renamed.remote()
    buffer.advance.remote("three")
    buffer.advance.remote(3, 4)
    return await store.has.remote("key", 3)
"""


def test_a_remote_call_that_an_actor_does_not_have_fails_the_type_check(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    settings = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)], "include": ["calls.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "-p", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = sorted(item["range"]["start"]["line"] + 1 for item in found)
    marked = [
        number
        for number, line in enumerate(CALLS.splitlines(), start=1)
        if "renamed" in line or '"three"' in line or "3, 4" in line
    ]
    returned = len(CALLS.splitlines())  # returns a bool, but declares a str
    assert lines == [*marked, returned], json.dumps(found, indent=1)
