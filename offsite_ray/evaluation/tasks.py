# SPDX-License-Identifier: Apache-2.0
"""lm-eval tasks on a model in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from offsite_ray.errors import DataError, TrainingError, first_line
from offsite_ray.evaluation.task_loading import LoadedTasks, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWSHOT_SEED = 1234
"""lm-eval's own default, so that a prompt is the one that others measured with."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    batch_size: int,
    max_length: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return task name to metric name to value, ``num_documents`` among the metrics.

    Args:
        model: Any causal model in evaluation mode; only read.
        tokenizer: The model's.
        tasks: As :func:`load_tasks` built them; their documents are not changed.
        batch_size: Requests of a forward pass.
        max_length: Tokens of context; by default what the model allows.

    Raises:
        DataError: A document does not fit its task.
        TrainingError: The model gives a likelihood that is not a number.
    """
    import lm_eval

    for task in tasks.loaded["tasks"].values():
        # The draw of examples goes on from task to task and model to model unless set anew.
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    # Above 0, lm-eval resamples some metrics in a pool of processes; a mean's error is closed form.
    resamples = int(all(map(_is_mean, tasks.loaded["tasks"].values())))
    try:
        with quiet():
            results = lm_eval.evaluate(
                lm=_language_model(model, tokenizer, batch_size, max_length),
                task_dict=tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=resamples,
                log_samples=False,
            )
    except (KeyError, IndexError, ValueError, AssertionError) as error:
        raise DataError(f"{_described(tasks)} cannot be run: {first_line(error)}") from error
    return {
        task: _plain_metrics(metrics, results["n-samples"].get(task))
        for task, metrics in results["results"].items()
    }


def _is_mean(task: Any) -> bool:
    return all(function.__name__ == "mean" for function in task.aggregation().values())


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int | None,
) -> Any:
    from lm_eval.models.huggingface import HFLM

    class FiniteLM(HFLM):  # type: ignore[misc]
        """lm-eval's model, which refuses an answer that is not a number."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(*args, **kwargs)
            if any(math.isnan(likelihood) for likelihood, _ in answers):
                raise TrainingError(
                    "the log-likelihood of an answer is not a number; the model has non-finite "
                    "weights, or its arithmetic overflows: try --dtype fp32"
                )
            return answers

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            hook = self.model.register_forward_hook(_refuse_nan)
            try:
                return super()._model_generate(*args, **kwargs)
            finally:
                hook.remove()

    return FiniteLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
    )


def _refuse_nan(_module: Any, _inputs: Any, output: Any) -> None:
    # Only the last position: those before it may be padding that attends to nothing.
    if output.logits[:, -1].isnan().any():
        raise TrainingError("the model generates from logits that are not numbers")


def _plain_metrics(metrics: Mapping[str, Any], counts: Any) -> dict[str, float]:
    """Return ``{"acc": 0.31, "acc_stderr": 0.01}`` of ``{"acc,none": 0.31, ...}``."""
    plain = {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    return plain if counts is None else {**plain, "num_documents": counts["effective"]}


def _described(tasks: LoadedTasks) -> str:
    return f"task{'s' * (len(tasks.names) > 1)} {', '.join(tasks.names)}"
