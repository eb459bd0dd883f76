# SPDX-License-Identifier: Apache-2.0
"""Configurations of what is served: files, flags, and the engine of somebody else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from offsite_ray.cli import main
from offsite_ray.config import ApplicationConfig, ServeConfig
from offsite_ray.errors import ConfigError
from offsite_ray.serving.app import build, config_of
from offsite_ray.serving.vllm import vllm_application, vllm_settings

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "serve").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_file_builds_the_application(file: Path) -> None:
    deploy = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    (application,) = deploy.applications
    assert application.import_path == "offsite_ray.serving.app:build"
    config = config_of(application.args)
    assert config.model == application.args["model"]
    built = build(application.args)
    assert [type(built).__name__, built._bound_deployment.name] == ["Application", "Ingress"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_row": 3}, "unknown key 'max_row'; did you mean 'max_rows'"),
        ({"max_rows": "many"}, "max_rows: Input should be a valid integer"),
        ({"max_rows": 0}, "max_rows=0 must be at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas=2 must be at least 3"),
        ({"request_timeout": 0}, "request_timeout=0.0 must be above 0"),
        ({"adapter": ["acme"]}, "'acme' must be NAME=ADAPTER"),
        ({"adapter": ["a=x", "a=y"]}, "two adapters are called 'a'"),
        ({"adapter": ["../a=x"]}, "'../a' is no name for a model"),
        ({"adapter": ["a=x"], "full_model_name": "a"}, "both the full model and an adapter"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        config_of({"model": "m", **given})


def test_vllm_gets_its_settings() -> None:
    config = ServeConfig(
        model="runs/plugged-in", engine="vllm", dtype="bf16", num_gpus=2, max_prompt=1000,
        max_output=24, max_rows=8, min_replicas=1, max_replicas=3,
    )  # fmt: skip
    settings = vllm_settings(config)
    loading = settings["model_loading_config"]
    assert loading["model_id"] == "plugged-in"
    assert loading["model_source"] == str(Path("runs/plugged-in").resolve())
    assert settings["engine_kwargs"] == {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "tensor_parallel_size": 2,
    }
    # Ray's own class checks them, which needs no GPU; its public name does.
    try:
        from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    except ImportError as error:
        pytest.skip(f"ray.llm cannot be imported here: {error}")
    checked = LLMConfig(**settings)
    assert checked.deployment_config["autoscaling_config"]["max_replicas"] == 3


def test_without_the_extra_vllm_is_refused_and_the_extra_named() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'offsite-ray\[vllm\]'"):
            vllm_application(ApplicationConfig(model="runs/plugged-in"))
        return
    pytest.skip("vllm is installed")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter=a=missing"], "missing"),
        (["--engine=vllm", "--adapter=a=x"], "engine=vllm serves one plugged-in model"),
        (["--port=0"], "port=0 must be from 1 to 65535"),
        (["--num-gpu=1"], "did you mean '--num-gpus'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(ROOT / "examples" / "foundation")
    state = tmp_path / "state"
    assert main(["serve", f"--model={model}", f"--state={state}", "--port=18765", *words]) == 2
    assert said in capsys.readouterr().err
    assert not state.exists()
