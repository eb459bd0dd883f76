# SPDX-License-Identifier: Apache-2.0
"""Bundles on disk: safetensors, manifests, fingerprints, atomic writing."""

from offsite_ray.bundle.atomic import (
    atomic_directory,
    atomic_file,
    check_free,
    check_parent,
    link_or_copy,
    made_parent,
    storage_error,
)
from offsite_ray.bundle.digest import digest_file
from offsite_ray.bundle.fingerprint import Fingerprint, difference, fingerprint
from offsite_ray.bundle.manifest import (
    MANIFEST,
    Kind,
    Manifest,
    ModelFacts,
    read_manifest,
    read_verified,
    write_manifest,
)
from offsite_ray.bundle.shards import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    TensorDirectory,
    TensorInfo,
    TensorSpec,
    read_header,
    rewrite_model,
    specs,
    write_file,
    write_model,
)

__all__ = [
    "DTYPE_NAMES",
    "MANIFEST",
    "TORCH_DTYPES",
    "Fingerprint",
    "Kind",
    "Manifest",
    "ModelFacts",
    "TensorDirectory",
    "TensorInfo",
    "TensorSpec",
    "atomic_directory",
    "atomic_file",
    "check_free",
    "check_parent",
    "difference",
    "digest_file",
    "fingerprint",
    "link_or_copy",
    "made_parent",
    "read_header",
    "read_manifest",
    "read_verified",
    "rewrite_model",
    "specs",
    "storage_error",
    "write_file",
    "write_manifest",
    "write_model",
]
