# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; each is a script that is run from the repository root."""
