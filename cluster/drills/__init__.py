# SPDX-License-Identifier: Apache-2.0
"""Drills: a real cluster of several nodes on one machine is broken, and what is lost is counted."""
