"""The train loop with plain objects in place of the roles and the learner."""

import errno
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distillm_ray.cluster.learner import Links
from distillm_ray.cluster.learner_turn import OwnDevice
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError, ModelError, RunDirectoryError, UserError
from distillm_ray.learner import train_loop
from distillm_ray.learner.checkpoint import CheckpointDirectory
from distillm_ray.learner.prefetch import Prefetcher, PreparedStep
from distillm_ray.learner.train_loop import TrainLoop
from distillm_ray.log.records import CheckpointRecord, EventRecord, ProbeRecord, Record, Sample
from distillm_ray.log.stopping import ENDED_EARLY, Standing
from distillm_ray.types import (
    TRAINING,
    AdapterBase,
    Bucket,
    DrawFacts,
    HiddenTargets,
    LearnerBatch,
    MicroBatchPlan,
    Mix,
    Prompt,
    RankPlan,
    Rollout,
    RunStatus,
    TeacherTargets,
    TrainStep,
    Validation,
    Weights,
)
from tests import make


def make_config(directory: Path, **learner: Any) -> Config:
    return make.config(
        run={"directory": directory},
        learner={"steps": 6, "batch_size": 1, "data_timeout_s": 30.0} | learner,
        rollout={"sync_interval": 2, "lookahead": 2},
        validation={"interval": 3},
        evaluation={"at_end": False},
        checkpoint={"interval": 2, "keep": 2},
    )


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_loop, "_POLL_S", 0.05)
    monkeypatch.setattr(train_loop, "_PACKING_S", 0.05)


def plan_of(step: int) -> RankPlan:
    rollout = make.rollout(f"student-{step}", response=[step + 3], ordinal=step)
    return RankPlan(
        phi=0.1 * step,
        facts=DrawFacts(phi=0.1 * step, psi=0.0, mix=Mix(fresh=1), fresh_ages=(0,)),
        micro_batches=(MicroBatchPlan(sequences=(make.planned(rollout),)),),
    )


class Roles:
    """Every role that the loop talks to. A draw waits for the steps and validations before it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lookahead = config.rollout.lookahead
        self.interval = config.validation.interval
        self.calls: list[tuple[str, int]] = []
        self.records: list[Record] = []
        self.published: list[Weights[Bucket]] = []
        self.completed = -1
        self.validated = -1
        self.stop_at: int | None = None
        self.failure: str | None = None
        self.losing: set[str] = set()
        self.leaving: dict[str, int] = {}  # nodes, and after which step their notice comes
        self.phase = TRAINING
        self.waits: list[str] = []
        self.waited: list[float] = []  # seconds, as run control was told
        self.wants = True
        self.wants_from_validation: int | None = None
        self.missing_step: int | None = None
        self.fail_targets = False
        self.reporting: int | None = None  # a step whose record is on its way to the log
        self.fail_report_of: int | None = None
        self.drawn: list[int] = []
        self.turn = OwnDevice()

    @property
    def links(self) -> Links:
        role = cast(Any, self)
        return Links(
            buffer=role,
            orchestrator=role,
            log=role,
            control=role,
            targets=role,
            turn=self.turn,
            nodes=("of the rank", "of the driver"),
        )

    # ---- the replay buffer

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        due = step // self.interval * self.interval
        too_early = step >= self.completed + self.lookahead or self.validated < due
        if too_early or step == self.missing_step:
            time.sleep(0.01)
            return None
        self.drawn.append(step)
        return plan_of(step)

    def waiting_for(self, step: int) -> str:
        return f"ordinal {step}"

    def state(self, completed: int) -> bytes:
        assert completed == self.completed, "the state of a step that is not the newest"
        return f"buffer {completed}".encode()

    def advance(self, completed: int) -> None:
        self.calls.append(("advance", completed))
        self.completed = completed

    def report(self, validation: Validation) -> float:
        self.calls.append(("validation", validation.step))
        self.validated = validation.step
        self.wants = self.wants or validation.step == self.wants_from_validation
        return 0.5

    def wants_weights(self) -> bool:
        return self.wants

    # ---- target stores

    def fetch(self, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
        if self.fail_targets:
            raise ClusterError("no store replies")
        values = np.zeros((1, 4), dtype=np.float32)
        return {one.rollout_id: HiddenTargets(values_TD=values) for one in rollouts}

    def start_flush(self) -> None:
        """There is no library."""

    # ---- the orchestrator

    def restore(self, state: bytes | None, completed: int) -> None:
        assert state == (None if completed == 0 else f"buffer {completed}".encode())
        self.calls.append(("restore", completed))
        self.completed = completed
        self.validated = completed // self.interval * self.interval if completed else -1

    def put(self, bucket: Bucket) -> Bucket:
        return bucket

    def publish(self, weights: Weights[Bucket]) -> None:
        self.calls.append(("publish", weights.version))
        self.published.append(weights)

    def start_probe(self, prompts: Sequence[Prompt]) -> None:
        assert [prompt.text for prompt in prompts] == ["why"]
        self.calls.append(("probe", self.completed))

    def finish_probe(self) -> list[Rollout]:
        return [
            make.rollout(
                "student-probe",
                prompt=[1],
                response=[2, 3],
                version=self.completed,
                logprobs=[-1.0, -1.0],
            )
        ]

    def report_step(self, train: TrainStep, facts: DrawFacts) -> None:
        self.calls.append(("step", train.step))
        self.reporting = train.step

    def finish_report(self) -> None:
        if self.reporting is not None and self.reporting == self.fail_report_of:
            raise ClusterError("the replay buffer died")
        self.reporting = None

    # ---- log and run control

    def add(self, record: Record) -> None:
        self.records.append(record)

    def standing(self) -> Standing:
        standing = Standing.of(
            self.records,
            metric=self.config.validation.metric,
            min_improvement=self.config.stop.min_improvement,
        )
        return replace(standing, generated_tokens=100 * max(self.completed, 0))

    def status(self) -> RunStatus:
        stop = self.completed == self.stop_at
        leaving = frozenset(name for name, at in self.leaving.items() if self.completed >= at)
        return RunStatus(phase=self.phase, stop=stop, failure=self.failure, leaving=leaving)

    def wait_for(self, what: str, waited_s: float) -> RunStatus:
        if what or (self.waits and self.waits[-1]):
            self.waits.append(what)
        self.waited.append(waited_s)
        return self.status()

    def lose(self, nodes: frozenset[str]) -> None:
        self.losing |= nodes


class FakeLearner:
    """A learner whose only weight is the number of its steps."""

    rank = 0

    def __init__(self) -> None:
        self.steps_taken = 0
        self.trained_on: list[str] = []
        self.skip_from: int | None = None
        self.full_at: int | None = None
        self.waits: list[float] = []  # seconds, of each step
        self.remark = ""
        self.self_divergence = 2e-7
        self.losses: dict[int, float] = {}  # sums over ten tokens; others: 30 minus the steps
        self.exported: dict[str, int] = {}  # steps of each exported student

    def train_step(
        self, batches: Sequence[LearnerBatch], step: int, *, wait_seconds: float
    ) -> TrainStep:
        assert step == self.steps_taken
        self.steps_taken += 1
        self.trained_on += [name for batch in batches for name in batch.rollout_ids]
        self.waits.append(wait_seconds)
        skipped = self.skip_from is not None and step >= self.skip_from
        return TrainStep(step=step + 1, loss=1.0, skipped=skipped, wait_seconds=wait_seconds)

    def validation_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        return self.losses.get(self.steps_taken, 30.0 - self.steps_taken), 10

    def self_check(self, batch: LearnerBatch) -> float:
        return self.self_divergence

    def token_logprobs(self, batch: LearnerBatch) -> NDArray[np.float32]:
        return np.array([-1.5, -1.25], dtype=np.float32)

    def adapter_base(self, dtype: torch.dtype) -> AdapterBase | None:
        return None

    def gather_weights(self, dtype: torch.dtype) -> Iterator[Bucket]:
        values = np.array([self.steps_taken], dtype=np.uint8)
        yield {"steps": ((1,), "uint8", values)}

    def save(self, directory: Path) -> None:
        if self.steps_taken == self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        (directory / "steps").write_text(str(self.steps_taken))

    def load(self, directory: Path) -> None:
        self.steps_taken = int((directory / "steps").read_text())

    def export(self, directory: Path, end_token_ids: Sequence[int]) -> None:
        assert end_token_ids == (2, 1)
        directory.mkdir()
        self.exported[directory.name] = self.steps_taken

    def barrier(self) -> None:
        """No other rank is late."""

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def collect(self, value: Any) -> list[Any]:
        return [value]


PROBE = make.prompt("probe", text="why", references=("so",))


def run(roles: Roles, learner: FakeLearner, config: Config, *, resume: bool = False) -> int:
    checkpoints = CheckpointDirectory(
        config.run.local_directory / "checkpoints", keep=2, metric=config.validation.metric
    )
    loop = TrainLoop(
        cast(Any, learner),
        roles.links,
        config,
        checkpoints,
        validation_batches=(),
        publish_dtype=torch.float32,
        end_token_ids=(2, 1),
        probe_prompts=(PROBE,),
        decode=lambda rollout: "as",
    )
    return loop.run(checkpoints.latest() if resume else None)


def test_a_run_publishes_advances_and_validates_in_this_order(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles, learner = Roles(config), FakeLearner()
    assert run(roles, learner, config) == 6
    assert roles.calls == [
        ("restore", 0),
        *[("probe", 0), ("validation", 0)],
        *[("advance", 1), ("step", 1)],
        *[("publish", 2), ("advance", 2), ("step", 2)],
        *[("advance", 3), ("step", 3), ("validation", 3)],
        *[("publish", 4), ("advance", 4), ("step", 4)],
        *[("advance", 5), ("step", 5)],
        *[("publish", 6), ("advance", 6), ("step", 6), ("probe", 6), ("validation", 6)],
    ]
    assert learner.trained_on == [f"student-{step}" for step in range(6)]
    assert (tmp_path / "model").is_dir()


def test_published_weights_are_those_of_their_version(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    run(roles, FakeLearner(), config)
    for weights in roles.published:
        [bucket] = weights.buckets
        assert bucket["steps"][2].tolist() == [weights.version]
        assert weights.nbytes == 1


def test_weights_are_not_published_without_demand(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.wants = False
    run(roles, FakeLearner(), config)
    assert roles.published == []


def test_the_last_weights_are_published_for_the_evaluation(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    evaluation = config.evaluation.model_copy(update={"at_end": True})
    roles = Roles(config)
    roles.wants = False
    run(roles, FakeLearner(), config.model_copy(update={"evaluation": evaluation}))
    assert [weights.version for weights in roles.published] == [6]


def test_weights_are_published_late_if_a_validation_raises_phi_above_zero(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.wants = False
    roles.wants_from_validation = 3
    run(roles, FakeLearner(), config)
    late = roles.calls.index(("publish", 3))  # there was no demand at step 2, the multiple before
    assert roles.calls[late - 1 : late + 2] == [
        ("validation", 3),
        ("publish", 3),
        *[("publish", 4)],
    ]


def test_a_probe_measures_the_log_probability_gap_of_engine_and_learner(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    run(roles, FakeLearner(), config)
    probes = [record for record in roles.records if isinstance(record, ProbeRecord)]
    assert [probe.step for probe in probes] == [0, 6]  # the weights of step 3 are not published
    # The engine returns -1 for each of the two tokens, the learner -1.5 and -1.25.
    assert probes[0].logprob_gap == pytest.approx(0.375)
    assert probes[0].samples == (Sample(prompt="why", reference="so", response="as"),)
    warnings = events(roles, "log-probabilities differ")
    assert len(warnings) == 1
    assert "0.375 nats" in warnings[0].detail


def test_checkpoints_hold_step_phi_and_the_newest_validation(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(Roles(config), FakeLearner(), config)
    kept = CheckpointDirectory(tmp_path / "checkpoints", keep=2).complete()
    assert [found.meta.step for found in kept] == [4, 6]
    assert kept[0].meta.validation == Validation(step=3, loss=2.7, tokens=10)
    assert kept[0].meta.phi == pytest.approx(0.3)  # of draw 3, the last one before it
    assert kept[1].meta.phi == 0.5  # set by the validation after step 6


def test_a_stopped_run_leaves_a_checkpoint_and_resumes_from_it(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles, learner = Roles(config), FakeLearner()
    roles.stop_at = 3
    assert run(roles, learner, config) == 3
    assert not (tmp_path / "model").exists()

    roles, learner = Roles(config), FakeLearner()
    assert run(roles, learner, config, resume=True) == 6
    assert roles.calls[:3] == [("restore", 3), ("publish", 3), ("publish", 4)]
    assert learner.trained_on == ["student-3", "student-4", "student-5"]
    assert learner.steps_taken == 6


def test_a_finished_run_that_is_resumed_trains_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(Roles(config), FakeLearner(), config)
    (tmp_path / "model").rmdir()
    learner = FakeLearner()
    assert run(Roles(config), learner, config, resume=True) == 6
    assert learner.trained_on == []


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_ids(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_skipped_steps=1)
    roles, learner = Roles(config), FakeLearner()
    learner.skip_from = 2
    with pytest.raises(UserError) as caught:
        run(roles, learner, config)
    path = tmp_path / "non_finite_step_00000004.json"
    assert str(path) in str(caught.value)
    assert "learner.max_skipped_steps = 1" in str(caught.value)
    assert json.loads(path.read_text())["rollout_ids_by_rank"] == [[["student-3"]]]


def test_samples_that_never_arrive_end_the_run_and_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path, data_timeout_s=0.2)
    roles = Roles(config)
    roles.missing_step = 1
    with pytest.raises(ClusterError) as caught:
        run(roles, FakeLearner(), config)
    assert "the samples of step 1" in str(caught.value)
    assert "waiting for ordinal 1" in str(caught.value)


def test_the_limit_of_a_wait_counts_in_the_training_phase_only(tmp_path: Path) -> None:
    """Evaluations before training may take longer than any step's samples."""
    config = make_config(tmp_path, data_timeout_s=0.2)
    roles = Roles(config)
    roles.missing_step, roles.phase = 0, "evaluating the student before training"

    def begin() -> None:
        roles.missing_step, roles.phase = None, TRAINING

    timer = threading.Timer(1.0, begin)
    timer.start()
    learner = FakeLearner()
    assert run(roles, learner, config) == 6
    assert "ordinal 0" in roles.waits
    assert learner.waits[0] < 0.2, "a longer wait would have ended the run"


def test_the_wait_for_late_samples_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_loop, "_POLL_S", 0.05)

    class Late(Roles):
        """The samples of step 1 come after rank 0 asked twice what is missing."""

        def waiting_for(self, step: int) -> str:
            if self.waits:
                self.missing_step = None
            return super().waiting_for(step)

    roles = Late(make_config(tmp_path))
    roles.missing_step = 1
    learner = FakeLearner()
    assert run(roles, learner, make_config(tmp_path)) == 6
    assert roles.waits[:2] == ["ordinal 1", "ordinal 1"]
    assert roles.waited == sorted(roles.waited)
    assert roles.waited[0] == 0.0 and roles.waited[-1] >= 2 * 0.05
    assert learner.waits[1] >= 2 * 0.05


def test_a_stop_is_noticed_while_samples_are_missing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.missing_step = 3
    timer = threading.Timer(0.5, lambda: setattr(roles, "stop_at", 3))
    timer.start()
    assert run(roles, FakeLearner(), config) == 3
    latest = CheckpointDirectory(tmp_path / "checkpoints", keep=2).latest()
    assert latest is not None and latest.meta.step == 3


def test_a_stop_before_the_first_step_leaves_nothing_behind(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.stop_at = 0
    assert run(roles, FakeLearner(), config) == 0
    assert not (tmp_path / "checkpoints").exists()


def test_a_failure_of_another_rank_ends_a_learner_that_waits(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.missing_step, roles.failure = 0, "another rank's disk is full"
    assert run(roles, FakeLearner(), config) == 0


def test_a_learner_reports_what_it_waits_for_and_clears_it(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.missing_step = 1
    timer = threading.Timer(0.5, lambda: setattr(roles, "missing_step", None))
    timer.start()
    run(roles, FakeLearner(), config)
    assert set(roles.waits[:-1]) == {"ordinal 1"}
    assert roles.waits[-1] == ""


def test_an_error_of_the_prefetching_thread_reaches_the_training_thread(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.fail_targets = True
    with pytest.raises(ClusterError, match="no store replies"):
        run(roles, FakeLearner(), config)


def test_a_checkpoint_is_committed_after_the_slowest_rank_has_written(tmp_path: Path) -> None:
    class SlowPeer(FakeLearner):
        """Rank 1 writes its last file when rank 0 waits for it."""

        def save(self, directory: Path) -> None:
            super().save(directory)
            self.directory = directory

        def barrier(self) -> None:
            (self.directory / "random-00001.pt").write_bytes(b"late")

    config = make_config(tmp_path)
    run(Roles(config), SlowPeer(), config)
    found = CheckpointDirectory(tmp_path / "checkpoints", keep=2).complete()
    assert [one.meta.step for one in found] == [4, 6]
    for one in found:
        assert (one.learner_path / "random-00001.pt").read_bytes() == b"late"
        manifest = json.loads((one.path / "manifest.json").read_text())
        assert manifest["learner/random-00001.pt"] == 4


def test_a_step_that_did_not_reach_the_log_is_in_no_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.fail_report_of = 4
    with pytest.raises(ClusterError, match="the replay buffer died"):
        run(roles, FakeLearner(), config)
    latest = CheckpointDirectory(tmp_path / "checkpoints", keep=2).latest()
    assert latest is not None
    assert latest.meta.step == 2, "a restart from step 4 would never log step 4"


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    learner = FakeLearner()
    learner.full_at = 4
    with pytest.raises(RunDirectoryError, match="step-00000002 remains valid"):
        run(Roles(config), learner, config)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000002"]


def prefetcher(roles: Roles, *, depth: int) -> Prefetcher:
    buffer = targets = cast(Any, roles)
    return Prefetcher(buffer, targets, rank=0, first_step=0, total_steps=6, depth=depth)


def get(ahead: Prefetcher, step: int) -> PreparedStep:
    prepared = ahead.poll(step, 5.0)
    assert prepared is not None
    return prepared


def test_the_prefetcher_draws_depth_steps_ahead_and_no_more(tmp_path: Path) -> None:
    roles = Roles(make_config(tmp_path))
    roles.completed, roles.validated = 100, 100
    with prefetcher(roles, depth=2) as ahead:
        get(ahead, 0)
        deadline = time.monotonic() + 5.0
        while len(roles.drawn) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert roles.drawn == [0, 1, 2]
        [get(ahead, step) for step in range(1, 6)]
    assert roles.drawn == [0, 1, 2, 3, 4, 5]


def test_leaving_the_prefetcher_ends_its_thread_even_with_a_pending_draw(tmp_path: Path) -> None:
    roles = Roles(make_config(tmp_path))
    roles.completed, roles.validated, roles.missing_step = 100, 100, 1
    started = time.monotonic()
    with prefetcher(roles, depth=1) as ahead:
        get(ahead, 0)
    assert time.monotonic() - started < 3.0
    assert not [one for one in threading.enumerate() if one.name.startswith("prefetch")]


# ---- the end -------------------------------------------------------------------------------------


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    updates = {
        name: getattr(config, name).model_copy(update=values) for name, values in sections.items()
    }
    return config.model_copy(update=updates)


def events(roles: Roles, name: str) -> list[EventRecord]:
    return [one for one in roles.records if isinstance(one, EventRecord) and one.name == name]


def test_a_run_without_improvement_ends_with_a_checkpoint_and_both_models(tmp_path: Path) -> None:
    config = changed(
        make_config(tmp_path, steps=12),
        stop={"patience": 2},
        checkpoint={"at_best": True},
        evaluation={"at_end": True},
    )
    roles, learner = Roles(config), FakeLearner()
    learner.losses = {0: 30.0, 3: 20.0, 6: 21.0, 9: 20.0}
    assert run(roles, learner, config) == 9
    (event,) = events(roles, ENDED_EARLY)
    assert event.step == 9
    assert event.detail == ("stop.patience: 2 validations without an improvement on 2.0000")
    # Step 3 has a checkpoint because it was the best, and it was kept beside the newest two.
    assert learner.exported == {"model": 9, "model-best": 3}
    assert roles.published[-1].version == 9  # for the evaluation
    kept = CheckpointDirectory(tmp_path / "checkpoints", keep=2).complete()
    assert [found.meta.step for found in kept] == [3, 8, 9]


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (250, 3), (300, 3), (10_000, 6)])
def test_a_run_ends_after_the_step_that_spends_its_tokens(
    tmp_path: Path, limit: int, steps: int
) -> None:
    config = changed(make_config(tmp_path), stop={"max_generated_tokens": limit})
    roles, learner = Roles(config), FakeLearner()
    assert run(roles, learner, config) == steps
    assert roles.calls[-1] == ("validation", steps)
    assert learner.exported == {"model": steps}
    assert len(events(roles, ENDED_EARLY)) == (steps < 6)


def test_a_raised_budget_goes_on_and_an_unchanged_one_trains_no_step(tmp_path: Path) -> None:
    config = changed(make_config(tmp_path), stop={"max_generated_tokens": 300})
    run(Roles(config), FakeLearner(), config)
    (tmp_path / "model").rmdir()

    again, learner = Roles(config), FakeLearner()
    assert run(again, learner, config, resume=True) == 3
    assert learner.trained_on == []
    assert learner.exported == {"model": 3}

    (tmp_path / "model").rmdir()
    raised, learner = changed(config, stop={"max_generated_tokens": 500}), FakeLearner()
    assert run(Roles(raised), learner, raised, resume=True) == 5
    assert learner.trained_on == ["student-3", "student-4"]


def test_the_best_checkpoint_by_rouge_is_that_of_the_highest_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        make_config(tmp_path),
        validation={"metric": "rouge_l"},
        checkpoint={"at_best": True, "interval": 100},
    )
    roles, learner = Roles(config), FakeLearner()
    scores = {0: 10.0, 3: 40.0, 6: 30.0}
    monkeypatch.setattr(
        train_loop, "_mean_rouge_l", lambda prompts, samples: scores[learner.steps_taken]
    )
    assert run(roles, learner, config) == 6
    assert [one.rouge_l for one in roles.records if isinstance(one, ProbeRecord)] == [10, 40, 30]
    assert ("publish", 3) in roles.calls  # no demand asked for it, the score did
    assert learner.exported == {"model": 6, "model-best": 3}


def test_the_score_of_a_probe_is_rouge_l_over_the_prompts_with_a_reference() -> None:
    prompts = (make.prompt(references=("a b c d",)), make.prompt(references=()))
    samples = tuple(Sample(prompt="", reference="", response="a b") for _ in prompts)
    # Precision 1, recall 1/2.
    assert train_loop._mean_rouge_l(prompts, samples) == pytest.approx(100 * 2 / 3)
    assert np.isnan(train_loop._mean_rouge_l(prompts[1:], samples[1:]))


# ---- the self-check ------------------------------------------------------------------------------


def test_the_first_batch_proves_that_the_student_costs_nothing_against_itself(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    run(roles, FakeLearner(), config)
    (event,) = events(roles, "self-check")
    assert "costs at most 2.0e-07 nats" in event.detail


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_loss_that_is_not_zero_against_itself_ends_the_run(tmp_path: Path, value: float) -> None:
    config = make_config(tmp_path)
    roles, learner = Roles(config), FakeLearner()
    learner.self_divergence = value
    with pytest.raises(ModelError, match=r"must be 0, got (0\.01|nan) nats"):
        run(roles, learner, config)
    assert learner.trained_on == []


def saved_steps(roles: Roles) -> list[int]:
    return [record.step for record in roles.records if isinstance(record, CheckpointRecord)]


@pytest.mark.parametrize("node", ["of the rank", "of the driver"])
def test_a_notice_that_a_node_will_be_taken_away_is_answered_by_a_checkpoint(
    tmp_path: Path, node: str
) -> None:
    config = make_config(tmp_path)
    roles, learner = Roles(config), FakeLearner()
    roles.leaving = {node: 3}
    assert run(roles, learner, config) == 6, "the run uses the node for as long as it is there"
    assert saved_steps(roles) == [2, 3, 4, 6]
    (told,) = [one for one in roles.records if getattr(one, "name", "") == "preemption"]
    assert isinstance(told, EventRecord)
    assert f"node {node}" in told.detail


def test_what_has_a_checkpoint_is_not_saved_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.leaving = {"of the rank": 0, "of the driver": 4}
    run(roles, FakeLearner(), config)
    assert saved_steps(roles) == [2, 4, 6]


def test_a_notice_for_a_node_of_others_changes_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = Roles(config)
    roles.leaving = {"of a generator": 3, "of the driver": 5}
    run(roles, FakeLearner(), config)
    assert saved_steps(roles) == [2, 4, 5, 6]
    assert roles.losing == {"of the driver"}, "what the driver expects to lose the learners by"


def test_a_notice_is_answered_while_samples_are_missing(tmp_path: Path) -> None:
    config = make_config(tmp_path, data_timeout_s=1.0)
    roles = Roles(config)
    roles.missing_step = 3
    roles.leaving = {"of the rank": 3}
    with pytest.raises(ClusterError, match="samples of step 3"):
        run(roles, FakeLearner(), config)
    assert saved_steps(roles) == [2, 3]


# ---- a device shared with a generator ------------------------------------------------------------


class RecordedDevice(OwnDevice):
    """A shared device. The generators keep it for `delays` calls of `ask`, again in each turn."""

    shared = True

    def __init__(self, roles: Roles, *, delays: int = 0) -> None:
        self.roles = roles
        self.delays = self.left = delays
        self.held = True

    def ask(self) -> None:
        self.left -= 1
        if not self.held and self.left < 0:
            self.held, self.left = True, self.delays
            self.roles.calls.append(("take", max(self.roles.completed, 0)))

    def take(self) -> None:
        while not self.held:
            self.ask()

    def lend(self) -> None:
        if self.held:
            self.held = False
            self.roles.calls.append(("lend", max(self.roles.completed, 0)))


class WatchedLearner(FakeLearner):
    """A learner that computes only while it holds its device."""

    def __init__(self, device: RecordedDevice) -> None:
        super().__init__()
        self.device = device

    def train_step(
        self, batches: Sequence[LearnerBatch], step: int, *, wait_seconds: float
    ) -> TrainStep:
        assert self.device.held
        return super().train_step(batches, step, wait_seconds=wait_seconds)

    def validation_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        assert self.device.held
        return super().validation_loss(batches)

    def token_logprobs(self, batch: LearnerBatch) -> NDArray[np.float32]:
        assert self.device.held
        return super().token_logprobs(batch)

    def gather_weights(self, dtype: torch.dtype) -> Iterator[Bucket]:
        assert self.device.held
        return super().gather_weights(dtype)


class ColocatedRoles(Roles):
    """Generators that work only while the learner has lent its device."""

    def __init__(self, config: Config, *, delays: int = 0) -> None:
        super().__init__(config)
        self.turn: RecordedDevice = RecordedDevice(self, delays=delays)
        self.generated = 0  # steps whose samples are there

    def draw(self, step: int, rank: int, timeout_s: float) -> RankPlan | None:
        if not self.turn.held:
            self.generated = max(self.completed, 0) + self.lookahead
        return super().draw(step, rank, timeout_s) if step < self.generated else None

    def restore(self, state: bytes | None, completed: int) -> None:
        assert not self.turn.held, "generators may have to start again"
        super().restore(state, completed)

    def finish_probe(self) -> list[Rollout]:
        assert not self.turn.held
        return super().finish_probe()


def test_a_shared_device_is_lent_for_samples_probes_and_restores_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path)
    roles = ColocatedRoles(config)
    assert run(roles, WatchedLearner(roles.turn), config) == 6
    turns = [call for call in roles.calls if call[0] in ("lend", "take", "restore", "probe")]
    assert turns[:6] == [
        *[("lend", 0), ("restore", 0), ("take", 0)],
        *[("probe", 0), ("lend", 0), ("take", 0)],
    ]
    names = [name for name, _ in roles.calls if name in ("lend", "take")]
    assert names == ["lend", "take"] * (len(names) // 2)
    steps_in_a_turn = [
        "".join(name[0] for name, _ in roles.calls).count("l"),
        sum(name == "step" for name, _ in roles.calls),
    ]
    assert steps_in_a_turn[0] < 3 + steps_in_a_turn[1], "some turns train on more than one step"


def test_a_step_begins_only_with_the_device_and_says_what_it_waits_for(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = ColocatedRoles(config, delays=2)
    assert run(roles, WatchedLearner(roles.turn), config) == 6
    assert "the generators, which finish their work on the shared devices" in roles.waits


def test_a_stop_ends_the_wait_for_a_device_with_a_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    roles = ColocatedRoles(config)

    def stop_while_it_waits() -> None:
        if roles.completed == 2:
            roles.stop_at = 2  # and the generators do not give the device up
            return
        RecordedDevice.ask(roles.turn)

    cast(Any, roles.turn).ask = stop_while_it_waits
    assert run(roles, WatchedLearner(roles.turn), config) == 2
    assert not roles.turn.held
    latest = CheckpointDirectory(tmp_path / "checkpoints", keep=2).latest()
    assert latest is not None
    assert latest.meta.step == 2
