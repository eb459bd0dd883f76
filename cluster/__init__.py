# SPDX-License-Identifier: Apache-2.0
"""Where Ray runs; not installed, used from the repository root."""
