# SPDX-License-Identifier: Apache-2.0
"""Artefacts at URIs: every verb from and to a real S3 server that fails, is killed, and alters."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.architectures import load_model
from offsite_ray.bundle import MANIFEST, digest_file
from offsite_ray.cli import main
from offsite_ray.config import FinetuneConfig
from offsite_ray.distillation import distill
from offsite_ray.errors import IntegrityError, StorageError
from offsite_ray.finetuning import finetune
from offsite_ray.results import CheckpointRecord
from offsite_ray.storage import check_untaken, fetched, place_of, published, transfer
from offsite_ray.storage.listing import UPLOAD
from offsite_ray.training import run_here
from tests.conftest import ROOT
from tests.loops import Stopped, distill_config, ignore, stop_after
from tests.stores import SECRET, Store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loops import Loop


pytestmark = pytest.mark.usefixtures("empty_cache")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


UNAVAILABLE, FORBIDDEN = "503 Slow Down", "403 Forbidden"
TRAINING = ("--max-steps", "2", "--batch-size", "2", "--seq-len", "32", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def model(loop: Loop, store: Store) -> str:
    return store.upload(loop.model, "model")


# The whole loop


@pytest.mark.slow
def test_every_verb_from_and_to_a_store(
    loop: Loop, store: Store, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = store.uri("text.txt")
    store.write("text.txt", loop.text.read_bytes())

    bundle, adapter, plugged = (store.uri(f"loop/{name}") for name in ("bundle", "adapter", "full"))
    made = run(capsys, "compress", "--model", model, "--plan", "1-2-1", "--out", bundle)
    assert made["out"] == "s3://bucket/loop/bundle"
    assert UPLOAD not in store.names("loop/bundle")
    assert run(capsys, "inspect", bundle)["id"] == made["id"]
    assert run(capsys, "verify", bundle, "--model", model)["checked_against"] == "s3://bucket/model"

    data = store.uri("loop/data")
    run(capsys, "prepare", "--tokenizer", bundle, "--text", text, "--out", data, "--block-size=32")
    assert run(capsys, "verify", data)["kind"] == "prepared_data"
    trained = run(
        capsys, "finetune", "--bundle", bundle, "--data", data, "--out", adapter, *TRAINING[:4]
    )
    distilled = store.uri("loop/distilled")
    run(
        capsys, "distill", "--model", model, "--bundle", bundle, "--data", text, "--out", distilled,
        "--num-workers", "0", *TRAINING,
    )  # fmt: skip
    assert run(capsys, "inspect", distilled)["recipe"]["distillation"] is not None
    baseline = store.uri("loop/baseline")
    run(capsys, "finetune", "--model", model, "--data", text, "--out", baseline, *TRAINING)

    assert run(capsys, "verify", adapter)["id"] == trained["id"]
    run(capsys, "plug-in", "--model", model, "--adapter", adapter, "--out", plugged)
    assert run(capsys, "verify", plugged)["kind"] == "plugged_in_model"
    load_model(fetched(plugged))
    out, report = store.uri("loop/result.json"), store.uri("loop/report")
    result = run(
        capsys, "evaluate", "--model", model, "--bundle", bundle, "--adapter", adapter,
        "--finetuned", baseline, "--text", text, "--out", out, "--report", report,
    )  # fmt: skip
    assert json.loads(store.read("loop/result.json")) == result
    assert store.names("loop/report") == ["report.html", "report.png"]
    assert result["recipe"]["model"] == "s3://bucket/model"
    assert result["settings"]["full_fine_tuned"]["perplexity"] > 0

    for name in store.names("loop"):
        assert SECRET.encode() not in store.read(f"loop/{name}"), name
    assert [name for name in store.names("loop") if name.startswith(".")] == []
    # Local and remote make the same, and a copy on disk is a bundle again.
    copy = fetched(bundle)
    assert run(capsys, "verify", str(copy))["id"] == made["id"]
    run(capsys, "compress", "--model", str(loop.model), "--plan=1-2-1", "--out", f"{tmp_path}/b")
    assert digest_file(copy / "model.safetensors") == digest_file(tmp_path / "b/model.safetensors")


def test_a_model_of_a_store_is_estimated_by_its_config_alone(
    model: str, store: Store, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "estimate", "--model", model, "--plan", "1-2-1", "--seq-len", "32")
    assert [path.name for path in empty_cache.glob("artefacts/*/*/*/*")] == ["config.json"]


def test_what_only_a_path_can_be_is_one_line(
    store: Store, loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--bundle", str(loop.bundle), "--data", str(loop.text), "--out", "x"]
    assert main([*words, "--log-dir", store.uri("logs")]) == 2
    assert capsys.readouterr().err == (
        "offsite-ray: error: --log-dir s3://bucket/logs must be a path of this machine, not a URI\n"
    )
    assert main(["serve", "--model", "m", "--adapter", store.uri("adapter")]) == 2
    assert SECRET not in capsys.readouterr().err


# Fetched once, and anew when it has changed


def test_a_node_fetches_once_until_something_changes(store: Store, empty_cache: Path) -> None:
    for name, content in (("config.json", b"{}"), ("a.safetensors", b"one"), ("code.py", b"")):
        store.write(f"plain/{name}", content)
    uri = store.uri("plain")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetched(uri))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = found[0]
    assert found == [first] * 3
    assert sorted(path.name for path in first.iterdir()) == ["a.safetensors", "config.json"]
    store.write("plain/a.safetensors", b"other")
    second = fetched(uri)
    assert (second / "a.safetensors").read_bytes() == b"other"
    assert (first / "a.safetensors").read_bytes() == b"one"  # as long as this process uses it
    words = f"from offsite_ray.storage import fetched; fetched({uri!r})"
    subprocess.run([sys.executable, "-c", words], check=True, cwd=ROOT)
    assert first.exists()


def test_an_altered_object_is_refused(loop: Loop, store: Store) -> None:
    uri = store.upload(loop.bundle, "altered")
    content = bytearray((loop.bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    store.write("altered/model.safetensors", bytes(content))
    with pytest.raises(IntegrityError, match=r"^s3://bucket/altered/model.safetensors was altered"):
        fetched(uri)
    place = place_of(store.uri("altered/model.safetensors"))
    place.filesystem.delete_file(place.path)
    with pytest.raises(IntegrityError, match=r"^s3://bucket/altered lacks 'model.safetensors'"):
        fetched(uri)


def test_an_altered_object_of_a_plain_model_is_refused(store: Store) -> None:
    publish(store.uri("published"), config_json="{}", model_safetensors="weights")
    assert UPLOAD in store.names("published")
    store.write("published/model.safetensors", b"WEIGHTS")
    with pytest.raises(IntegrityError, match=r"model.safetensors was altered"):
        fetched(store.uri("published"))


def test_nothing_at_a_uri(store: Store) -> None:
    with pytest.raises(StorageError, match=r"^there is nothing at s3://bucket/nothing$"):
        fetched(store.uri("nothing"))
    with pytest.raises(StorageError) as caught:
        check_untaken(store.uri("x").replace("@bucket", "@nothere"))
    assert "s3://nothere/x" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_any_filesystem_of_fsspec_will_do() -> None:
    uri = "memory://storage/model"
    publish(uri, config_json="{}", model_safetensors="weights")
    assert (fetched(uri) / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(StorageError, match="exists and is not empty"):
        check_untaken(uri)


# Whole or not at all


def test_what_is_there_is_never_overwritten(store: Store) -> None:
    store.write("mine/notes.md", b"mine")
    with pytest.raises(StorageError, match=r"^s3://bucket/mine .* it holds 'notes.md'"):
        check_untaken(store.uri("mine"))
    publish(store.uri("taken"), config_json="{}")
    with pytest.raises(StorageError, match=r"^s3://bucket/taken exists and is not empty"):
        publish(store.uri("taken"), config_json="[]")
    assert store.read("taken/config.json") == b"{}"


@pytest.mark.slow
def test_a_killed_upload_is_no_artefact_and_the_next_one_succeeds(
    store: Store, loop: Loop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = store.uri("killed/bundle")
    words = ["compress", "--model", str(loop.model), "--plan", "1-2-1", "--out", out]
    store.holding = "killed/bundle/model.safetensors"
    process = subprocess.Popen([sys.executable, "-m", "offsite_ray", *words], cwd=ROOT)
    assert store.held.wait(240)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.holding = ""
    store.go_on.set()
    assert UPLOAD in store.names("killed/bundle")
    assert MANIFEST not in store.names("killed/bundle")
    with pytest.raises(StorageError, match=r"^s3://bucket/killed/bundle holds what an upload left"):
        fetched(out)
    store.write("killed/bundle/model.safetensors", b"left by the one that was killed")
    run(capsys, *words)
    assert run(capsys, "verify", out)["kind"] == "emulator_bundle"
    assert UPLOAD not in store.names("killed/bundle")


def publish(uri: str, **files: str) -> None:
    with published(uri) as tmp:
        for name, content in files.items():
            (tmp / name.replace("_", ".")).write_text(content)


def test_of_two_uploads_to_one_name_one_is_refused(store: Store) -> None:
    uri, over, told = store.uri("two"), threading.Event(), []

    def late() -> None:
        try:
            publish(uri, config_json="{}", late_safetensors="late")
        except StorageError as error:
            told.append(str(error))

    def delayed(_: str, path: str) -> bool:
        return "late.safetensors" in path and not over.is_set()

    with store.fails(delayed, UNAVAILABLE):
        thread = threading.Thread(target=late)
        thread.start()
        while not store.refused:
            time.sleep(0.02)
        publish(uri, config_json="{}", early_safetensors="early")
        over.set()
        thread.join()
    assert told == ["another process is writing to s3://bucket/two; choose another --out"]
    names = {path.name for path in fetched(uri).iterdir()}
    assert names == {"config.json", "early.safetensors"}


# Retries


def test_a_store_that_fails_for_a_while_is_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.01)
    # The filesystem's own attempts, of which there are ten, are not enough.
    methods = {"POST": "a.safetensors", "HEAD": "config.json"}

    def failing(method: str, path: str) -> bool:
        return methods.get(method, "-") in path and store.refused < 12

    with store.fails(failing, UNAVAILABLE):
        publish(store.uri("retried"), config_json="{}", a_safetensors="weights")
    assert store.refused == 12
    with store.fails(
        lambda method, path: "a.safetensors" in path and store.refused < 3, UNAVAILABLE
    ):
        assert (fetched(store.uri("retried")) / "a.safetensors").read_bytes() == b"weights"
    assert store.refused == 3


def test_what_no_time_will_mend_is_one_line_at_once(store: Store) -> None:
    denied = pytest.raises(StorageError, match=r"^s3://bucket/gone\S* cannot be written: .*DENIED")
    with store.fails(lambda method, path: method == "PUT", FORBIDDEN), denied as caught:
        publish(store.uri("gone"), config_json="{}")
    assert SECRET not in str(caught.value)
    assert store.refused < 3


# Runs that go on elsewhere


def config_of(loop: Loop, out: str, **given: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "bundle": str(loop.bundle),
        "data": (str(loop.text),),
        "max_steps": 4,
        "checkpoint_every": 1,
        "batch_size": 2,
        "seq_len": 32,
        "learning_rate": 1e-3,
        "out": out,
    }
    return FinetuneConfig(**fields | given)


@pytest.mark.slow
def test_a_run_goes_on_where_its_machine_is_gone(
    loop: Loop, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = finetune(config_of(loop, str(tmp_path / "here")), run_here, ignore)
    out = store.uri("run/adapter")
    with pytest.raises(Stopped):
        finetune(config_of(loop, out), run_here, stop_after(3))
    assert any(name.endswith("checkpoint-00000002/state.json") for name in store.names("run"))
    assert all(SECRET.encode() not in store.read(f"run/{name}") for name in store.names("run"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(StorageError, match=r"s3://bucket/run/.adapter.run is left by a run"):
        finetune(config_of(loop, out), run_here, ignore)
    told: list[Any] = []
    there = finetune(config_of(loop, out, resume=True), run_here, told.append)
    assert told[0].first_step == 2
    assert [step.losses for step in there.history.steps] == [s.losses for s in here.history.steps]
    assert [name for name in store.names("run") if name.startswith(".")] == []
    with pytest.raises(StorageError, match="s3://bucket/run/adapter is finished"):
        finetune(config_of(loop, out, resume=True), run_here, ignore)


@pytest.mark.slow
def test_a_run_whose_result_was_cut_off_keeps_its_checkpoints(loop: Loop, store: Store) -> None:
    out = store.uri("cut/bundle")
    refused = pytest.raises(StorageError, match=r"offsite\.json cannot be written")
    with store.fails(lambda _, path: path.endswith("cut/bundle/offsite.json"), FORBIDDEN), refused:
        distill(distill_config(loop, out, max_steps=2), run_here, ignore)
    assert "config.json" in store.names("cut/bundle")
    told: list[Any] = []
    config = distill_config(loop, out, max_steps=2, resume=True)
    distill(config, run_here, told.append)
    assert told[0].first_step == 1
    assert MANIFEST in store.names("cut/bundle")


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_while_stops_no_run(loop: Loop, store: Store) -> None:
    steps: list[int] = []

    def report(record: Any) -> None:
        if isinstance(record, CheckpointRecord):
            steps.append(record.step)
        if getattr(record, "step", 0) == 3:
            store.failing = lambda method, path: False

    with store.fails(lambda method, path: "checkpoint-" in path, FORBIDDEN):
        finetune(config_of(loop, store.uri("outage/adapter")), run_here, report)
    assert steps == [3]  # none counts that is on this machine alone
    assert MANIFEST in store.names("outage/adapter")
