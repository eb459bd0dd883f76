# SPDX-License-Identifier: Apache-2.0
"""Offsite-tuning (Xiao, Lin, Han, arXiv 2302.04870) as a platform on Ray."""

__version__ = "0.1.0"
