# SPDX-License-Identifier: Apache-2.0
"""Where artefacts lie: paths of this machine, or URIs of any filesystem of pyarrow or fsspec.

Whoever reads one asks :func:`fetched` for it, whoever writes one :func:`published`; paths are left
as they are by both.
"""

from offsite_ray.storage.fetching import fetched, found_by_all, model_at, own_folder, store_of
from offsite_ray.storage.listing import DATA_MANIFEST
from offsite_ray.storage.places import Place, place_of, reason
from offsite_ray.storage.publishing import (
    check_replaceable,
    check_replaceable_files,
    check_untaken,
    is_published,
    published,
    replaced,
    replaced_files,
)
from offsite_ray.storage.transfer import (
    PROBE,
    check_writable,
    entries_of,
    make_directory,
    retried,
    write_small,
)

__all__ = [
    "DATA_MANIFEST",
    "PROBE",
    "Place",
    "check_replaceable",
    "check_replaceable_files",
    "check_untaken",
    "check_writable",
    "entries_of",
    "fetched",
    "found_by_all",
    "is_published",
    "make_directory",
    "model_at",
    "own_folder",
    "place_of",
    "published",
    "reason",
    "replaced",
    "replaced_files",
    "retried",
    "store_of",
    "write_small",
]
