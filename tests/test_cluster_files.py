# SPDX-License-Identifier: Apache-2.0
"""What the files of cluster/ name is there: entry points, recipes, configurations, versions, ports.

The manifests themselves are checked in test_cluster_manifests.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import ray
import transformers
import yaml
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from offsite_ray.cli.arguments import parse
from offsite_ray.cli.verbs import VERBS
from offsite_ray.config import check_run_name
from offsite_ray.serving.app import build, config_of
from tests.conftest import ROOT
from tests.test_cluster_manifests import (
    CLUSTER,
    FILES,
    KUBERAY,
    OUR_IMAGE,
    Document,
    clusters,
    documents,
    found,
    gpus,
    gpus_of_workers,
    of_kind,
    party,
    secret_values,
)
from tests.test_package import PYPROJECT

RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
README = (CLUSTER / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
IN_IMAGE = "/opt/offsite-ray/"
USER = 1000
"""Of the image."""


def words_of(job: Document) -> list[str]:
    """Return the words of an entry point, with the files that its pods see in the place of paths.

    KubeRay pastes the line into a shell command, so there must be nothing in it but words.
    """
    assert not re.search(r"[^\w./=: -]", job["spec"]["entrypoint"].strip())
    return shlex.split(job["spec"]["entrypoint"])


def here(word: str, path: Path, tmp_path: Path) -> str:
    """Return the file of the repository, or of a ConfigMap, that a word names; else the word."""
    if word.startswith(IN_IMAGE):
        file = ROOT / word.removeprefix(IN_IMAGE)
        assert file.is_file()
        assert f"COPY {file.relative_to(ROOT).parts[0]} " in DOCKERFILE
        return str(file)
    if word.startswith("/etc/offsite-ray/"):
        name = Path(word).name
        (tmp_path / name).write_text(of_kind("ConfigMap", path)["data"][name])
        return str(tmp_path / name)
    return word


JOBS = [path for path in FILES if "kind: RayJob" in path.read_text()]


def test_there_is_a_job_for_each_step() -> None:
    assert {path.relative_to(KUBERAY).as_posix() for path in JOBS} == {
        "model-owner/distill.yaml", "model-owner/sweep.yaml", "data-owner/finetune.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_what_a_job_reads_and_writes_is_mounted(path: Path) -> None:
    job = of_kind("RayJob", path)
    (cluster,) = clusters(job)
    templates = [group["template"] for group in cluster.get("workerGroupSpecs", ())]
    mounted = [
        {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        for template in (cluster["headGroupSpec"]["template"], *templates)
    ]
    words = words_of(job)
    assert words[words.index("--runs") + 1] == "/mnt/storage/runs", "the record of the run"
    check_run_name(words[words.index("--run") + 1], "--run")
    config = [word for word in words if word.startswith("/etc/")]
    written = [word for word in words if word.startswith("/mnt/")]
    assert written
    assert all("/mnt/storage" in mounts for mounts in mounted)
    assert all(word.startswith("/mnt/storage") for word in written)
    assert all(str(Path(word).parent) in mounted[0] for word in config)


def test_the_distillation_runs_as_it_is_configured(tmp_path: Path) -> None:
    path = KUBERAY / "model-owner" / "distill.yaml"
    job = of_kind("RayJob", path)
    python, script, *words = (here(word, path, tmp_path) for word in words_of(job))
    shape = transformers.OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
    )
    shape.save_pretrained(tmp_path / "models" / "opt-6.7b")
    words = [str(tmp_path) if word == "/mnt/storage" else word for word in words]
    assert python == "python"
    done = subprocess.run(
        [sys.executable, script, *words, "--dry-run"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (cluster,) = clusters(job)
    assert said["num_workers"] == gpus_of_workers(cluster)


def test_the_sweep_has_a_gpu_for_each_trial(tmp_path: Path) -> None:
    path = KUBERAY / "model-owner" / "sweep.yaml"
    job = of_kind("RayJob", path)
    python, script, *words = (here(word, path, tmp_path) for word in words_of(job))
    assert (python, script) == ("python", str(ROOT / "jobs" / "sweep.py"))
    asked = parse(VERBS["sweep"], words, VERBS)
    config = asked.config
    assert (asked.run, asked.runs) == ("opt-1.3b-sweep", "/mnt/storage/runs")
    (cluster,) = clusters(job)
    assert config.max_concurrent * config.num_gpus == gpus_of_workers(cluster)
    # What is there when it begins is what it has.
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    paths = (config.model, config.out, *config.public, *config.private, *config.text)
    assert all(path.startswith("/mnt/storage/") for path in paths)


def test_the_data_owner_fine_tunes_on_one_gpu(tmp_path: Path) -> None:
    path = KUBERAY / "data-owner" / "finetune.yaml"
    job = of_kind("RayJob", path)
    program, verb, *words = (here(word, path, tmp_path) for word in words_of(job))
    assert program in PYPROJECT["project"]["scripts"]
    asked = parse(VERBS[verb], words, VERBS)
    config = asked.config
    assert (asked.run, asked.runs) == ("opt-6.7b-finetune", "/mnt/storage/runs")
    (cluster,) = clusters(job)
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert (config.num_workers, config.resume, config.model) == (0, True, None)
    assert job["spec"]["entrypointNumGpus"] == gpus(container) == 1


def test_the_service_is_that_of_serve() -> None:
    service = of_kind("RayService", KUBERAY / "model-owner" / "serve.yaml")
    text = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert text == yaml.safe_load((ROOT / "serve" / "gpu.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(text).applications
    config = config_of(application.args)
    (cluster,) = clusters(service)
    (group,) = cluster["workerGroupSpecs"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (worker,) = group["template"]["spec"]["containers"]
    assert group["minReplicas"] * gpus(worker) >= config.min_replicas * config.num_gpus
    assert gpus_of_workers(cluster) > config.max_replicas * config.num_gpus
    on_head = {mount["mountPath"] for mount in head["volumeMounts"]}
    assert {config.state, config.admin_key_file, str(Path(config.model).parent)} <= on_head
    assert [m["mountPath"] for m in worker["volumeMounts"]] == [str(Path(config.model).parent)]
    assert worker["readinessProbe"]["httpGet"]["port"] == text["http_options"]["port"]
    redis = of_kind("Service", KUBERAY / "model-owner" / "redis.yaml")
    address = f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == address
    # Where the head has no CPU, what takes one is on a worker, and outlives the head.
    (ingress,) = (d for d in application.deployments if d.name == "Ingress")
    built = build(application.args)
    assert built._bound_deployment.name == ingress.name
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    num_cpus = ingress.ray_actor_options.num_cpus
    assert num_cpus
    assert float(worker["resources"]["limits"]["cpu"]) > config.num_cpus + num_cpus
    # Two heads would wait for one disk, and for each other.
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}


def test_a_worker_has_the_time_to_drain() -> None:
    service = of_kind("RayService", KUBERAY / "model-owner" / "serve.yaml")
    (cluster,) = clusters(service)
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    seconds = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name), "Ray knows it by another name"
    text = yaml.safe_load(service["spec"]["serveConfigV2"])
    drain_timeout = text["applications"][0]["args"]["drain_timeout"]
    assert drain_timeout < int(seconds[name]) < pod["terminationGracePeriodSeconds"]


def test_clients_reach_the_port_of_the_service_and_no_other() -> None:
    (policy,) = (d for d in party("model-owner") if d["metadata"]["name"] == "clients-to-service")
    service = of_kind("RayService", KUBERAY / "model-owner" / "serve.yaml")
    port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]


def test_the_image_has_the_versions_of_the_constraints() -> None:
    tested = re.search(r"on Python (3\.\d+)", (ROOT / "constraints.txt").read_text())
    assert tested
    assert re.findall(r"^FROM (\S+)$", DOCKERFILE, re.M) == [f"python:{tested[1]}-slim-bookworm"]
    installs = re.findall(r"pip install (.+?)(?: &&|$)", DOCKERFILE, re.M)
    assert len(installs) == 2
    constrained, alone = installs
    assert "--constraint constraints.txt" in constrained
    assert "--no-deps" in alone
    assert "==" not in DOCKERFILE
    extras = re.search(r"\.\[(.+?)\]", constrained)
    assert extras
    assert set(extras[1].split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M)
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for source in " ".join(copied).split():
        assert (ROOT / source).exists()
        assert any(fnmatch(source, f"{line[1:]}*") for line in sent if line.startswith("!"))


def test_the_image_runs_as_the_user_of_the_manifests() -> None:
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.M) == [f"{USER}:{USER}"]
    assert f"useradd --uid {USER} " in DOCKERFILE
    pods = [pod for path in FILES for d in documents(path) for _, pod in found(d, "containers")]
    ours = [pod for pod in pods if OUR_IMAGE.fullmatch(pod["containers"][0]["image"])]
    assert {pod["securityContext"]["runAsUser"] for pod in ours} == {USER}


@pytest.mark.parametrize(
    ("device", "index"),
    [("cpu", "https://download.pytorch.org/whl/cpu"), ("cuda", ""), ("tpu", None)],
)
def test_the_device_chooses_the_index(device: str, index: str | None, tmp_path: Path) -> None:
    (step,) = (s for s in re.findall(r"^RUN (.+?[^\\])$", DOCKERFILE, re.M | re.S) if "case" in s)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "index=$PIP_EXTRA_INDEX_URL"\n')
    pip.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
    done = subprocess.run(["sh", "-c", step], env=env, capture_output=True, text=True, check=False)
    if index is None:
        assert done.returncode == 1
        assert done.stderr == "DEVICE=tpu must be cpu or cuda\n"
    else:
        assert done.stdout == f"index={index}\n"


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_takes_the_configuration(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "head_nod_type": "head"}, schema)
    assert config["provider"]["type"] == path.stem
    head, workers = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert workers["max_workers"] <= config["max_workers"]
    assert OUR_IMAGE.fullmatch(config["docker"]["image"])
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert not list(secret_values({"kind": "ray up", **config}))


def test_the_page_names_every_file_and_secret() -> None:
    files = [path.name for path in (*FILES, *RAY_UP, CLUSTER / "Dockerfile")]
    named = [
        s["secretName"]
        for path in FILES
        for d in documents(path)
        for _, s in found(d, "secretName")
    ]
    named += [s["secretKeyRef"]["name"] for path in FILES for d in documents(path)
              for _, s in found(d, "secretKeyRef")]  # fmt: skip
    assert [name for name in (*files, *named) if name not in README] == []
