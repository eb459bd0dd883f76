# SPDX-License-Identifier: Apache-2.0
"""Serving plugged-in models: one trunk in memory, many tenants' adapter blocks beside it."""
