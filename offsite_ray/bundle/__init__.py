# SPDX-License-Identifier: Apache-2.0
"""Bundles on disk: safetensors, manifests, fingerprints, atomic writing."""

from offsite_ray.bundle.atomic import (
    atomic_directory,
    atomic_file,
    check_free,
    check_parent,
    made_parent,
    replaced_file,
    storage_errors,
    sync,
    write_json,
)
from offsite_ray.bundle.digest import digest_file, digest_plain, new_hasher
from offsite_ray.bundle.fingerprint import Fingerprint, difference, digests, fingerprint
from offsite_ray.bundle.locks import alone, locked
from offsite_ray.bundle.manifest import (
    MANIFEST,
    Kind,
    Manifest,
    ModelFacts,
    read_manifest,
    read_verified,
    write_manifest,
)
from offsite_ray.bundle.packed import (
    PackedDirectory,
    open_weights,
    packed_specs,
    write_packed,
)
from offsite_ray.bundle.remembered import user_cache
from offsite_ray.bundle.shards import (
    TensorSpec,
    lazy_spec,
    rewrite_model,
    specs,
    tensor_bytes,
    write_file,
    write_model,
)
from offsite_ray.bundle.tensors import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    TensorDirectory,
    TensorInfo,
    all_finite,
    read_header,
)

__all__ = [
    "DTYPE_NAMES",
    "MANIFEST",
    "TORCH_DTYPES",
    "Fingerprint",
    "Kind",
    "Manifest",
    "ModelFacts",
    "PackedDirectory",
    "TensorDirectory",
    "TensorInfo",
    "TensorSpec",
    "all_finite",
    "alone",
    "atomic_directory",
    "atomic_file",
    "check_free",
    "check_parent",
    "difference",
    "digest_file",
    "digest_plain",
    "digests",
    "fingerprint",
    "lazy_spec",
    "locked",
    "made_parent",
    "new_hasher",
    "open_weights",
    "packed_specs",
    "read_header",
    "read_manifest",
    "read_verified",
    "replaced_file",
    "rewrite_model",
    "specs",
    "storage_errors",
    "sync",
    "tensor_bytes",
    "user_cache",
    "write_file",
    "write_json",
    "write_manifest",
    "write_model",
    "write_packed",
]
