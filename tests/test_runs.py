# SPDX-License-Identifier: Apache-2.0
"""Runs with a record: what it says of each end that a run may come to, and who may keep it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.local import environment
from offsite_ray.cli import main
from offsite_ray.cli.arguments import parse
from offsite_ray.cli.job import run_job
from offsite_ray.cli.verbs import VERBS
from offsite_ray.config import InspectConfig
from offsite_ray.errors import ConfigError, StorageError, TrainingError
from offsite_ray.runs import Recorder, RunRecord, list_runs, read_run, recorded, recording
from offsite_ray.runs.record import LOST_S, Attempt, utc_now
from offsite_ray.submit import RECIPE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop

CONFIG = InspectConfig(path="s3://me:HIDDEN@bucket/bundle")
HOLD = (
    "import sys, time; from offsite_ray.config import InspectConfig;"
    "from offsite_ray.runs import recorded\n"
    "with recorded(sys.argv[1], sys.argv[2], 'inspect', InspectConfig(path='p')):\n"
    "    print('at work', flush=True); time.sleep(600)"
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_of(runs: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / name / "run.json").read_text())
    return found


def test_a_run_says_what_was_asked_what_was_made_and_what_became_of_it(
    loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "adapter"
    words = [
        "finetune", f"--bundle={loop.bundle}", f"--data={loop.text}", f"--out={out}",
        "--max-steps=2", "--batch-size=2", "--seq-len=16",
    ]  # fmt: skip
    assert main([*words, "--run=first", f"--runs={runs}", "--json"]) == 0
    told = capsys.readouterr()
    assert {path.name for path in (runs / "first").iterdir()} == {
        "run.json", "recipe.yaml", "result.json", "metrics.jsonl", "log.jsonl", ".lock",
    }  # fmt: skip
    record = run_of(runs, "first")
    result = json.loads(told.out)
    assert (record["name"], record["verb"], record["status"]) == ("first", "finetune", "succeeded")
    assert (record["exit_status"], record["error"], len(record["attempts"])) == (0, None, 1)
    assert record["artefacts"] == [{"path": str(out), "kind": "out", "id": result["id"]}]
    assert record["device_hours"] == {"gpu": None, "cpu": None}
    assert {"offsite_ray", "python", "torch", "ray"} <= set(record["versions"])
    assert json.loads((runs / "first" / "result.json").read_text()) == result
    again = ["--config", str(runs / "first" / "recipe.yaml")]
    assert (
        parse(VERBS["finetune"], again, VERBS).config
        == parse(VERBS["finetune"], words[1:], VERBS).config
    )
    steps = [line["step"] for line in lines_of(runs / "first" / "metrics.jsonl")]
    assert {1, 2} <= set(steps)
    log = lines_of(runs / "first" / "log.jsonl")
    assert {(line["run"], line["verb"], line["attempt"]) for line in log} == {
        ("first", "finetune", 1)
    }
    said = [line["message"] for line in log]
    assert said[0] == "finetune begins"
    assert said[-1].startswith("finetune succeeded after ")
    assert set(told.err.splitlines()) <= set(said), "what is told is in the log, too"


def test_a_run_that_fails_says_why_and_may_be_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFSITE_RAY_RUNS", str(tmp_path))
    for _ in range(2):
        assert main(["inspect", str(tmp_path / "nowhere"), "--run", "fails"]) == 2
    record = run_of(tmp_path, "fails")
    assert (record["status"], record["exit_status"]) == ("failed", 2)
    assert f"error: {record['error']}\n" in capsys.readouterr().err
    assert [attempt["status"] for attempt in record["attempts"]] == ["failed", "failed"]
    assert {line["attempt"] for line in lines_of(tmp_path / "fails" / "log.jsonl")} == {1, 2}
    assert main(["verify", str(tmp_path), "--run", "fails"]) == 2
    assert "is a run of inspect, not of verify; choose another --run" in capsys.readouterr().err


def test_a_job_that_was_done_is_not_done_again_and_a_refusal_undoes_nothing(
    loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECIPE).write_text(f"model: {loop.model}\nplan: 1-2-1\nout: {tmp_path}/bundle\n")

    def job(*words: str) -> tuple[int, str]:
        status = run_job(str(tmp_path), "compress", "--run=made", "--runs=runs", *words)
        return status, capsys.readouterr().err

    assert job()[0] == 0
    recipe = (tmp_path / "runs/made/recipe.yaml").read_text()
    assert job() == (0, "offsite-ray: the run 'made' has done this already\n")
    status, told = job("plan=1-1-1")
    assert (status, "exists and is not empty" in told) == (2, True)
    assert job()[0] == 0
    record = run_of(tmp_path / "runs", "made")
    assert (record["status"], record["exit_status"], record["error"]) == ("succeeded", 0, None)
    assert [attempt["status"] for attempt in record["attempts"]] == ["succeeded", "failed"]
    assert (tmp_path / "runs/made/recipe.yaml").read_text() == recipe
    shutil.rmtree(tmp_path / "bundle")
    assert job()[0] == 0
    assert (tmp_path / "bundle/offsite.json").is_file()


@pytest.mark.parametrize(
    ("error", "status", "exit_status"),
    [
        (TrainingError("loss is nan"), "failed", 1),
        (KeyError("x"), "failed", 1),
        (KeyboardInterrupt(), "stopped", 130),
        (SystemExit(143), "stopped", 143),
    ],
)
def test_each_end_has_its_status(
    tmp_path: Path, error: BaseException, status: str, exit_status: int
) -> None:
    with pytest.raises(type(error)), recorded(str(tmp_path), "run", "inspect", CONFIG):
        raise error
    record = run_of(tmp_path, "run")
    assert (record["status"], record["exit_status"]) == (status, exit_status)
    last = lines_of(tmp_path / "run" / "log.jsonl")[-1]
    assert last["message"].startswith(status)
    assert ("traceback" in last) == isinstance(error, KeyError)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of processes that were killed and told to end, while somebody else tried."""
    runs = tmp_path_factory.mktemp("runs")
    held = {
        number: subprocess.Popen(
            [sys.executable, "-c", HOLD, runs, number.name], env=environment(),
            stdout=subprocess.PIPE, text=True,
        )
        for number in (signal.SIGKILL, signal.SIGTERM)
    }  # fmt: skip
    for process in held.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
    with (
        pytest.raises(StorageError, match="a process is at work on the run 'SIGKILL'; 'offsite-ra"),
        recorded(str(runs), "SIGKILL", "inspect", CONFIG),
    ):
        raise AssertionError("two at once")
    for number, process in held.items():
        process.send_signal(number)
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
    return runs


def test_a_run_that_is_told_to_end_was_stopped(killed: Path) -> None:
    record = run_of(killed, "SIGTERM")
    assert (record["status"], record["exit_status"]) == ("stopped", 143)
    assert record["ended"] is not None


def test_a_run_that_was_killed_is_lost_after_a_while(killed: Path) -> None:
    record = read_run(killed / "SIGKILL")
    assert record is not None
    assert record.to_json()["status"] == "running"
    assert record.to_json(utc_now())["status"] == "running"
    later = utc_now() + datetime.timedelta(seconds=LOST_S + 1)
    assert record.to_json(later)["status"] == "lost"
    assert record.to_json(later)["attempts"][-1]["status"] == "lost"
    with recorded(str(killed), "SIGKILL", "inspect", CONFIG):
        pass
    attempts = run_of(killed, "SIGKILL")["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["lost", "succeeded"]
    assert attempts[0]["ended"] == attempts[0]["seen"]


def test_a_run_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BEAT_S", 0.01)
    told = threading.Semaphore(0)
    with recorded(str(tmp_path), "run", "inspect", CONFIG, lambda _: told.release()) as recorder:
        old = utc_now() - datetime.timedelta(hours=1)
        *_, last = recorder.record.attempts
        assert last.seen > old.isoformat()
        (tmp_path / "run" / "run.json").unlink()
        for _ in range(3):
            assert told.acquire(timeout=30)
        assert run_of(tmp_path, "run")["status"] == "running"


def test_device_hours_are_devices_times_hours_over_all_attempts(tmp_path: Path) -> None:
    now = 0.0
    before = Attempt(started="2026-01-01T00:00:00+00:00", seen="", gpu_hours=2.0, status="failed")
    record = RunRecord(
        name="run",
        verb="distill",
        attempts=(before, Attempt(started="2026-01-02T00:00:00+00:00", seen="")),
    )
    recorder = Recorder(tmp_path, record, clock=lambda: now)
    for seconds, held in ((1800, (4, 8)), (3600, (0, 2)), (900, (0, 0))):
        recorder.hold(*held)
        now += seconds
    recorder.end("succeeded", 0)
    found = run_of(tmp_path, "")
    assert found["attempts"][1]["gpu_hours"] == pytest.approx(4 * 0.5)
    assert found["device_hours"] == {
        "gpu": pytest.approx(2 + 4 * 0.5),
        "cpu": pytest.approx(8 * 0.5 + 2),
    }


def test_no_password_is_written(tmp_path: Path) -> None:
    with recorded(str(tmp_path), "run", "inspect", CONFIG) as recorder:
        recorder.result({"out": CONFIG.path})
    with pytest.raises(ConfigError), recorded(str(tmp_path), "run", "inspect", CONFIG):
        raise ConfigError(f"{CONFIG.path} is none")
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "HIDDEN" not in written
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["inspect"]["path"] == "s3://bucket/bundle"


def test_an_address_in_quotes_leaves_a_record_that_can_be_read(tmp_path: Path) -> None:
    said = 'cannot open "s3://bucket/o?region=HIDDEN":\nno such bucket'
    with recorded(str(tmp_path), "run", "inspect", CONFIG) as recorder:
        recorder.metric({"said": said})
    with pytest.raises(KeyError), recorded(str(tmp_path), "run", "inspect", CONFIG):
        raise KeyError(said)
    assert run_of(tmp_path, "run")["error"].startswith("KeyError: ")
    (line,) = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert line["said"] == 'cannot open "s3://bucket/o":\nno such bucket'
    last = lines_of(tmp_path / "run" / "log.jsonl")[-1]
    assert "HIDDEN" not in json.dumps(last)
    assert "Traceback" in last["traceback"]


def test_a_record_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with recorded(str(tmp_path), "run", "inspect", CONFIG) as recorder:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("in the way")
        recorder.beat()
        recorder.metric({"loss": 1.0})
        recorder.result({})
    assert caplog.text.count("the record of the run cannot be written") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect p --run a", "--run a needs --runs DIR, or OFFSITE_RAY_RUNS: where its record"),
        ("inspect p --runs d", "--runs needs --run NAME"),
        ("inspect p --runs d --run a/b", "--run='a/b' must be letters, digits"),
        ("inspect p --runs s3://b/d --run a", "the directory of runs must be a path that every"),
        ("runs", "which runs? give --runs DIR, or set OFFSITE_RAY_RUNS"),
        ("runs --runs /no/such/folder", "no directory /no/such/folder"),
        ("runs --runs . --name none", "unknown run 'none'"),
        ("runs --run a", "unknown flag '--run'; did you mean '--runs'?"),
    ],
)
def test_a_mistake_is_said(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OFFSITE_RAY_RUNS", raising=False)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_runs_are_listed_without_torch(killed: Path) -> None:
    code = (
        "import sys; from offsite_ray.cli import main;"
        "code = main(['runs', '--json']); "
        "sys.exit(' '.join({'torch', 'ray', 'numpy'} & set(sys.modules)) or code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment(), "OFFSITE_RAY_RUNS": str(killed)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)["runs"]
    assert {run["name"] for run in listed} == {"SIGKILL", "SIGTERM"}


def test_runs_are_listed_as_a_table(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--runs", str(killed)]) == 0
    table = capsys.readouterr().out
    for word in ("SIGTERM", "inspect", "stopped", "not measured", "GPU h"):
        assert word in table
    assert main(["runs", "--runs", str(killed), "--name", "SIGTERM", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "SIGTERM"


def test_a_table_shows_paths_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "/mnt/exp[v2]/[/a]:dog:"
    with recorded(str(tmp_path), "run", "inspect", CONFIG) as recorder:
        recorder.result({"out": out})
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    assert out in capsys.readouterr().out


def test_a_damaged_record_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with recorded(str(tmp_path), "good", "inspect", CONFIG):
        pass
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    assert [run.name for run in list_runs(str(tmp_path))] == ["good"]
    assert "bad/run.json is no record of a run" in caplog.text


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(StorageError, match=r"run\.json is no record of a run"):
        read_run(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["run.json"]
