# SPDX-License-Identifier: Apache-2.0
"""The whole loop on one machine, without downloads: ``offsite-ray demo``."""
