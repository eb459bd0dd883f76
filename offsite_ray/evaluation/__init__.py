# SPDX-License-Identifier: Apache-2.0
"""Evaluation: perplexity and lm-eval tasks of the five settings, and the gaps between them."""

from offsite_ray.evaluation.settings import evaluate

__all__ = ["evaluate"]
