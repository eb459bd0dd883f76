# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real Ray with its job server and token authentication, through a real connection."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests
import yaml

from cluster.local import LONG_S, ROOT, Head, environment, running_head
from offsite_ray import config as configs
from offsite_ray.cli import main
from offsite_ray.cli.arguments import help_text, parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.data import is_prepared
from offsite_ray.emulator import open_bundle
from offsite_ray.errors import ConfigError
from offsite_ray.submit.packing import check_installed, packed, pinned
from offsite_ray.uris import has_key
from tests.deployed import eventually
from tests.proxies import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.loops import Loop

SECRET = "not-for-others"
STEPS = 300


def recipe(folder: Path, **sections: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


# Without a cluster


def asked(*words: str) -> configs.SubmitConfig:
    config: configs.SubmitConfig = parse(VERBS["submit"], words, VERBS).config
    return config


def test_the_recipe_and_its_changes_are_for_the_verb(tmp_path: Path) -> None:
    file = recipe(
        tmp_path,
        compress={"plan": "1-2-1"},
        submit={"root": "/mnt", "driver_labels": {"tier": "steady"}, "follow": True},
        model="m",
    )
    given = asked("compress", "--config", str(file), "--no-follow", "out=o", "compress.seed=3")
    assert given == configs.SubmitConfig(
        verb="compress",
        recipe=str(file),
        words=("out=o", "compress.seed=3"),
        root="/mnt",
        driver_labels={"tier": "steady"},
    )
    assert given.run_name == "compress-recipe"
    assert asked("list", "--config", str(file)).root == "/mnt"


def test_help_says_whose_the_recipe_is() -> None:
    text = " ".join(help_text(VERBS["submit"]).split())
    assert "usage: offsite-ray submit VERB [options]" in text
    assert "are for the verb that is given" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distil --config FILE", "unknown verb to submit 'distil'; did you mean 'distill'?"),
        ("serve --config FILE", "unknown verb to submit 'serve'"),
        ("compress", "submit compress needs --config, the recipe to run"),
        ("compress --config FILE", "compress needs --out"),
        ("compress --config FILE out=o plam=1-2-1", "unknown key 'plam'; did you mean 'plan'?"),
        ("compress --config FILE out=o", "out='o' is below no folder that outlives the job"),
        ("compress --config FILE out=/o", "no cluster: give --address http://HEAD:8265"),
        ("compress --config FILE --name a/b", "name='a/b' must be letters, digits"),
        ("list --address head:8265", "address='head:8265' must be http://HOST:PORT"),
        ("list --address http://me:HIDDEN@head:8265", "address='head:8265' must be http://"),
        ("list seed=1", "submit list has no use for 'seed=1'"),
        ("stop", "submit stop needs --name"),
        ("list --driver-resources {steady:1}", "driver_resources: steady:1=None must be a number"),
        ("list --driver-resources '{steady: .nan}'", "steady=nan must be a number above 0"),
        ("list --root /r --runs s3://id:HIDDEN@b/r", "runs='s3://b/r' must be a path that every"),
        ("list --root runs", "root='runs' must be a whole path: the job does not begin in this"),
        ("list --root s3://id:HIDDEN@b/r", "root='s3://b/r' must be a path that every node sees"),
        ("list --driver-labels '{tier: 1}'", "driver_labels: tier=1 must be a text"),
        ("compress --config FILE out=s3://id:HIDDEN@bucket/o", "KEY=VALUE has a key"),
        ("compress --config FILE out=s3://b/o?secret_key=HIDDEN", "KEY=VALUE has a key"),
        ("compress --config LEAKY out=/o", "leaky.yaml has a key in an address"),
    ],
)
def test_a_mistake_is_said_before_anything_is_sent(
    words: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    good = recipe(tmp_path, compress={"model": "m", "plan": "1-2-1"})
    leaky = tmp_path / "leaky.yaml"
    leaky.write_text("model: s3://id:HIDDEN@bucket/m\nplan: 1-2-1\n")
    files = {"FILE": str(good), "LEAKY": str(leaky)}
    assert main(["submit", *(files.get(word, word) for word in shlex.split(words))]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert "HIDDEN" not in err


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("out: s3://id:se/cret@bucket/o", True),
        ("out: s3://bucket/o?region=eu&session_token=a", True),
        ("out: 'abfs://container@account.dfs.core.windows.net/o?account_KEY=a'", True),
        ("out: abfs://container@account.dfs.core.windows.net/o", False),
        ("out: s3://bucket/o?region=eu-central-1", False),
        ("endpoint: http://minio:9000\nmail: me@here", False),
        ("endpoint: http://minio:9000/me@here", False),
    ],
)
def test_a_key_in_an_address_is_told_from_a_port_and_an_option(text: str, has: bool) -> None:
    assert has_key(text) is has


def test_a_job_gets_the_recipe_the_package_and_the_versions(tmp_path: Path) -> None:
    with packed(b"model: m\n", "installed") as given:
        folder = given.pop("working_dir")
        files = {p.name: p.read_text() for p in Path(folder).iterdir()}
    assert given == {
        "py_modules": [str(ROOT / "offsite_ray")],
        "excludes": ["__pycache__"],
    }
    assert set(files) == {"recipe.yaml", "requirements.txt"}
    assert files["recipe.yaml"] == "model: m\n"
    assert f"transformers=={metadata.version('transformers')}\n" in files["requirements.txt"]
    assert "+" not in files["requirements.txt"], "another build of the same version will do"
    assert "pytest" not in files["requirements.txt"]
    with packed(b"", "pip") as given:
        assert given["pip"] == [f"{n}=={v}" for n, v in pinned().items() if n != "ray"]
    with packed(b"", "any") as given:
        assert [p.name for p in Path(given["working_dir"]).iterdir()] == ["recipe.yaml"]


def test_other_versions_on_the_cluster_are_named(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in pinned().items()))
    check_installed(file)
    file.write_text("torch==1.0\nno-such-package==2\n")
    with pytest.raises(
        ConfigError, match=r"torch 2\S+ \(submitted with 1.0\), no-such-package mis"
    ):
        check_installed(file)


# On a cluster


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Run a head, and a node whose like is not preempted."""
    with (
        running_head("--num-cpus=2") as found,
        found.worker("--num-cpus=1", '--resources={"steady": 1}', "--labels=tier=steady"),
    ):
        yield found


def words_of(head: Head, *words: str) -> list[str]:
    address = [] if any(word.startswith("--address=") for word in words) else [head.dashboard]
    return [
        sys.executable, "-m", "offsite_ray", "submit", "--json",
        *(f"--address={url}" for url in address), *words,
    ]  # fmt: skip


def submit(head: Head, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words_of(head, *words), env={**head.environment, **env}, capture_output=True, text=True,
        check=False, timeout=LONG_S,
    )  # fmt: skip


def test_a_job_runs_to_its_end_once(head: Head, loop: Loop, tmp_path: Path) -> None:
    file = recipe(tmp_path, compress={"model": str(loop.model), "out": "made/bundle"})
    words = ("compress", "--config", str(file), "--root", str(tmp_path), "--name", "made")
    done = submit(head, *words, "--follow", "plan=1-2-1", WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["job"], job["status"], job["exit_status"]) == ("made-1", "SUCCEEDED", 0)
    assert open_bundle(tmp_path / "made" / "bundle").manifest.plan is not None
    assert "submitted made-1\n" in done.stderr
    kept = json.loads((tmp_path / "runs" / "made" / "run.json").read_text())
    assert (kept["verb"], kept["status"], len(kept["attempts"])) == ("compress", "succeeded", 1)
    assert kept["artefacts"][0]["path"] == str(tmp_path / "made" / "bundle")
    assert "Running entrypoint" in done.stderr, "the log is shown"
    again = submit(head, *words, "plan=1-2-1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["job"] == "made-1"
    assert "made-1 has done this already; another --name and --out do it again" in again.stderr
    other = submit(head, "inspect", "--config", str(file), "--name", "made", "path=/p")
    assert other.returncode == 2
    assert "made-1 is a run of compress, not of inspect; choose another --name" in other.stderr
    told = requests.get(f"{head.dashboard}/api/jobs/", headers=head.headers, timeout=30).text
    (log,) = Path(head.scratch).rglob("job-driver-made-1.log")
    for secret in (SECRET, head.token):
        assert secret not in told + log.read_text() + done.stdout + done.stderr


def test_a_job_that_fails_gives_its_exit_status(head: Head, tmp_path: Path) -> None:
    file = recipe(tmp_path, inspect={"path": str(tmp_path / "nowhere")})
    words = ("inspect", "--config", str(file), "--follow")
    with ThreadPoolExecutor(2) as pool:
        failed = pool.submit(submit, head, *words, "--name=fails")
        lost = pool.submit(submit, head, *words, "--name=lost", "--root=/no/such/folder").result()
        done = failed.result()
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert "error: fails-1 failed with exit status 2: offsite-ray: error: " in last
    assert "nowhere" in last
    assert last.endswith("give the directory of a bundle")  # it would be refused again
    assert lost.returncode == 2
    assert "--root /no/such/folder: No such file or directory on the node" in lost.stderr
    found = json.loads(submit(head, "status", "--name=fails").stdout)
    assert (found["status"], found["exit_status"]) == ("FAILED", 2)


def test_the_driver_is_where_it_was_asked_for(head: Head, loop: Loop, tmp_path: Path) -> None:
    (steady,) = (n["node_id"] for n in head.nodes().values() if "steady" in n["resources_total"])
    file = recipe(tmp_path, inspect={"path": str(loop.bundle)})
    places = ("--driver-resources={steady: 0.1}", "--driver-labels={tier: steady}")

    def run(number: int) -> str:
        name = f"placed-{number}"
        words = ("inspect", "--config", str(file), "--name", name, "--follow", places[number])
        done = submit(head, *words)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["node"])

    with ThreadPoolExecutor(len(places)) as pool:
        assert set(pool.map(run, range(len(places)))) == {steady}


def test_workers_of_a_job_run_the_same_code_on_the_same_files(
    head: Head, loop: Loop, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(loop.text.read_text())
    file = recipe(
        tmp_path,
        prepare={
            "tokenizer": str(loop.model), "text": ["text.txt"], "block_size": 32,
            "num_workers": 1, "out": "data",
        },
    )  # fmt: skip
    done = submit(head, "prepare", "--config", str(file), f"--root={tmp_path}", "--follow")
    assert done.returncode == 0, done.stderr
    assert is_prepared(str(tmp_path / "data"))


@pytest.mark.parametrize("job", ["compress", "prepare", "finetune", "plug_in", "evaluate", "sweep"])
def test_each_of_these_verbs_is_a_job(job: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", "--help"], env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"usage: offsite-ray {job.replace('_', '-')} " in done.stdout


def test_ray_itself_submits_the_jobs_too(head: Head, loop: Loop, tmp_path: Path) -> None:
    file = recipe(tmp_path, compress={"model": str(loop.model), "plan": "1-2-1"})
    words = [
        "python", str(ROOT / "jobs" / "compress.py"), "--config", str(file),
        "--out", str(tmp_path / "bundle"),
    ]  # fmt: skip
    done = subprocess.run(
        ["ray", "job", "submit", f"--address={head.dashboard}", "--", *words],
        env=head.environment, capture_output=True, text=True, check=False, timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert open_bundle(tmp_path / "bundle").manifest.plan is not None


def test_a_run_survives_an_outage_is_stopped_and_goes_on(
    head: Head, loop: Loop, tmp_path: Path
) -> None:
    file = recipe(
        tmp_path,
        finetune={
            "bundle": "bundle", "data": ["rows.jsonl"], "out": str(tmp_path / "adapter"),
            "max_steps": STEPS, "checkpoint_every": 20, "batch_size": 4, "seq_len": 32,
        },
        submit={"root": str(loop.root), "name": "held", "driver_cpus": 1},
    )  # fmt: skip
    words = ("finetune", "--config", str(file))
    log = tmp_path / "follower.log"
    with Proxy(head.dashboard) as proxy, log.open("w") as stream:
        follower = subprocess.Popen(
            words_of(head, *words, "--follow", f"--address={proxy.url}"),
            env=head.environment, stdout=subprocess.DEVNULL, stderr=stream,
        )  # fmt: skip
        run = tmp_path / ".adapter.run"
        eventually(lambda: any(run.glob("checkpoint-*")), LONG_S)
        driver_of("finetune", str(loop.root)).suspend()
        eventually(lambda: f"{STEPS} steps; " in log.read_text(), LONG_S)
        proxy.down()
        eventually(lambda: f"lost {proxy.url}; held-1 goes on" in log.read_text(), LONG_S)
        proxy.up()
        eventually(lambda: f"{proxy.url} is back" in log.read_text(), LONG_S)
        second = submit(head, *words)
        assert second.returncode == 2
        assert "'held' is at work, as held-1 (RUNNING); follow it with" in second.stderr
        stopped = submit(head, "stop", "--name=held")
        assert json.loads(stopped.stdout)["status"] == "STOPPED", stopped.stderr
        assert follower.wait(LONG_S) == 1
    assert "held-1 was stopped; submit it again" in log.read_text()
    assert log.read_text().count(f"{STEPS} steps; ") == 1, "each line once, whatever was lost"
    done = submit(head, *words, "--follow")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == "held-2"
    assert "submitted held-2, which goes on with held-1" in done.stderr
    kept = json.loads((loop.root / "runs" / "held" / "run.json").read_text())
    ends = [attempt["status"] for attempt in kept["attempts"]]
    assert ends[-1] == "succeeded"
    assert ends[0] in ("stopped", "lost"), "Ray kills what it stops after a few seconds"
    assert f"{STEPS} steps, from step " in done.stderr
    assert (tmp_path / "adapter" / "offsite.json").is_file()


def driver_of(verb: str, root: str) -> psutil.Process:
    """Return the process of a job."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:4] == ["-m", "offsite_ray.cli.job", root] and words[4] == verb:
                return process
    raise AssertionError(f"no driver of {verb}")


def test_two_at_once_are_one(head: Head, tmp_path: Path) -> None:
    file = recipe(tmp_path, inspect={"path": str(tmp_path)})
    # It waits for a node that never comes.
    nowhere = ("--driver-resources", "{nowhere: 1}")
    words = ("inspect", "--config", str(file), "--name=twice", *nowhere)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: submit(head, *words), range(2)))
    assert sorted(one.returncode for one in both) == [0, 2], [one.stderr for one in both]
    (found,) = json.loads(submit(head, "list", "--name=twice").stdout)["jobs"]
    assert (found["job"], found["verb"]) == ("twice-1", "inspect")
    # The number of a job is taken once, even by one who did not see the other.
    code = (
        "import sys; from offsite_ray.submit import JobServer;"
        "JobServer(sys.argv[1]).submit('twice', 1, 'true')"
    )
    late = subprocess.run(
        [sys.executable, "-c", code, head.dashboard],
        env=head.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "twice-1 was submitted by somebody else at this moment" in late.stderr


@pytest.mark.parametrize(
    ("words", "env", "status", "said"),
    [
        (["list"], {"RAY_AUTH_TOKEN": "f" * 64}, 2, "refuses the token: Authentication failed"),
        (["list"], {"RAY_AUTH_MODE": "disabled"}, 2, "refuses the token: Authentication required"),
        (["status", "--name=mode"], {}, 2, "unknown run 'mode'"),
        (["list", "--address=http://127.0.0.1:9"], {}, 1, "no job server answers at http://127.0"),
    ],
    ids=["wrong token", "no token", "unknown run", "no server"],
)
def test_what_the_server_refuses_is_said_in_a_line(
    head: Head, words: list[str], env: dict[str, str], status: int, said: str
) -> None:
    # RAY_ADDRESS is of the driver's cluster, and wins over what Ray's own client is told.
    done = submit(head, *words, **{"RAY_ADDRESS": "http://127.0.0.1:1", **env})
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert head.token not in done.stderr
