# SPDX-License-Identifier: Apache-2.0
"""Evaluation: perplexity and lm-eval tasks of the five settings."""
