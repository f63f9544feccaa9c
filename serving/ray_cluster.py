"""The Ray cluster of a command: a running one, or one on this machine for as long as the command runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from mindomni_rt.errors import BadRequestError, MissingExtraError

from .model import Model

_OBJECTS = 128 * 2**20  # bytes; what travels between processes here are prompts and file names


@contextlib.contextmanager
def cluster(address: str | None, replicas: int) -> Iterator[Any]:
    """The module `ray`, connected. Raises BadRequestError and MissingExtraError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # A core for each replica and one for Ray Data's own tasks, whatever the machine has: replicas share them.
        options |= {"num_cpus": replicas + 1, "include_dashboard": False, "object_store_memory": _OBJECTS}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadRequestError(f"--ray-address {address}: no cluster there: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_there(ray: Any, model: Model) -> None:
    """`Model.check` on a machine of the cluster, which may have other folders than this one. Raises MindOmniError."""
    try:
        ray.get(ray.remote(num_cpus=0)(Model.check).remote(model))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def resources(ray: Any, device: str) -> dict[str, float]:
    """What a replica takes: a GPU where the cluster has some and the model may use them, else a core."""
    if device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0:
        return {"num_gpus": 1}
    return {"num_cpus": 1}
