"""Lets Orbax reach s3:// through TensorStore, which can: Orbax itself names only gs:// and disks.

It asks one function how TensorStore is to open a path. For s3:// that is answered here as for gs://,
with the driver's name, the endpoint and the region put in. Without it a checkpoint would have to go
over a disk that all processes of a job share. To be dropped once Orbax does this
(https://github.com/google/orbax/pull/2739).
"""

import functools
import os
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

from gqa_scaling.files.storage import as_path, files_of

RETRIES = {"max_retries": 5, "initial_delay": "1s", "max_delay": "8s"}  # not a quarter of an hour


@functools.cache
def install() -> None:
    """Have Orbax open s3:// paths from now on, in this process."""
    ask = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(ask)
    def answer(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        scheme, remote, rest = directory.partition("://")
        if scheme != "s3" or not remote:
            return ask(directory, *args, **options)
        return _with_driver(ask(f"gs://{rest}", *args, **options), _driver(directory))

    tensorstore_utils.build_kvstore_tspec = answer


def _driver(path: str) -> dict[str, Any]:
    """What TensorStore must know of the server, as s3fs found it in environment and files."""
    files = files_of(as_path(path))
    files.connect()
    driver: dict[str, Any] = {"driver": "s3", "s3_request_retries": RETRIES}
    endpoint, region = files.s3.meta.endpoint_url, files.s3.meta.region_name
    if ".amazonaws.com" not in endpoint:  # there TensorStore finds the bucket's own region
        driver |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it looks, and complains, elsewhere first
        driver["aws_credentials"] = {"type": "environment"}
    return driver


def _with_driver(spec: Any, driver: dict[str, Any]) -> Any:
    """The spec with this driver in place of Google's, wherever it stands in it."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return {**spec, **driver}
    return {key: _with_driver(value, driver) for key, value in spec.items()}
