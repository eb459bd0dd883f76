# SPDX-License-Identifier: Apache-2.0
"""One plugged-in model on GPUs by ``ray.serve.llm`` and vLLM, where these are installed.

A plugged-in model is an ordinary model directory, so vLLM loads it like any other. There are no
tenants, no keys and no uploads then: Ray's own application answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offsite_ray.architectures import load_config
from offsite_ray.errors import ConfigError, first_line
from offsite_ray.serving.app import TORCH_NAMES, replica_options
from offsite_ray.serving.start import max_positions
from offsite_ray.storage import fetched

if TYPE_CHECKING:
    from offsite_ray.config import ApplicationConfig


def vllm_settings(config: ApplicationConfig) -> dict[str, Any]:
    """Return the fields of ``ray.serve.llm.LLMConfig``, as a Serve config file has them."""
    path = fetched(config.model).resolve()
    return {
        "model_loading_config": {
            "model_id": config.full_model_name or path.name,
            "model_source": str(path),
        },
        "engine_kwargs": {
            "dtype": TORCH_NAMES.get(config.dtype, "auto"),
            "max_model_len": config.max_prompt + config.max_output,
            "max_num_seqs": config.max_rows,
            "tensor_parallel_size": max(1, int(config.num_gpus)),
        },
        "deployment_config": replica_options(config),
    }


def vllm_application(config: ApplicationConfig) -> Any:
    """Return Ray's application of a plugged-in model.

    Raises:
        ConfigError: The optional extra is not installed.
    """
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise ConfigError(
            f"--engine vllm needs the extra: pip install 'offsite-ray[vllm]' ({first_line(error)})"
        ) from error
    settings = vllm_settings(config)
    most = max_positions(load_config(fetched(config.model)))
    wanted = settings["engine_kwargs"]["max_model_len"]
    settings["engine_kwargs"]["max_model_len"] = min(wanted, most)
    return build_openai_app({"llm_configs": [LLMConfig(**settings)]})
