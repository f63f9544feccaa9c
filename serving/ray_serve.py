"""The server over many devices: Ray Serve keeps replicas of the same application and routes to the shortest queue."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mindomni_rt.checks import shown
from mindomni_rt.errors import BadRequestError

from .app import create_app
from .engine import Engine
from .model import Model
from .ray_cluster import check_there, cluster, resources
from .settings import KEY, Settings

NAME = "mindomni"
# One request is painted and one waits at each replica. All others wait at Ray's router, where a lost replica cannot
# take them with it, and from where they go to whichever is free first.
ONGOING = 2


def parse_replicas(text: str) -> tuple[int, int]:
    """ "4" or, to scale with the load, "1:8" → (least, most). Raises BadRequestError."""
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise BadRequestError(f"--replicas {shown(text)}: expected a number, or LEAST:MOST such as 1:8")
    return least, most


def application(model: Model, settings: Settings, replicas: tuple[int, int], needs: dict[str, float]) -> Any:
    """The deployment, ready for `ray.serve.run`."""
    from ray import serve

    def build() -> Any:
        # In the replica's process. Ray sends it no request before this returns.
        engine = Engine(model.load, max_queue=settings.max_queue, max_batch=settings.max_batch, probe=model.probe)
        engine.start()
        engine.wait_loaded()
        return create_app(engine, settings, model)

    class Replica:
        """One copy of the model on one device."""

        def check_health(self) -> None:
            """Ray calls this, and starts the replica anew where it raises."""
            found: Any = self
            if found.app.state.server.engine.state == "failed":
                raise RuntimeError("the model failed")

    least, most = replicas
    options: dict[str, Any] = {"num_replicas": least}
    if least < most:
        options = {
            "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ONGOING}
        }
    replica: Any = serve.ingress(build)(Replica)
    deployment: Any = serve.deployment(
        replica,
        name=NAME,
        max_ongoing_requests=ONGOING,
        max_queued_requests=settings.max_queue * most,
        ray_actor_options=needs,
        graceful_shutdown_timeout_s=settings.grace,
        health_check_period_s=5,
        health_check_timeout_s=60,
        **options,
    )
    return deployment.bind()


def configured(arguments: dict[str, Any]) -> Any:
    """The deployment of a Ray Serve configuration file, by its `args`; deploy/rayservice.yaml has an example.

    model: a path or hub id; options, defaults: as of `Model`; settings: fields of `Settings`; replicas: "1:8"; needs: a
    replica's resources. The API key is MINDOMNI_API_KEY of the environment. Raises BadRequestError.
    """
    if "model" not in arguments:
        raise BadRequestError("args of the application have no model: expected a path or hub id")
    _only(arguments, {"model", "options", "defaults", "settings", "replicas", "needs"}, "args of the application")
    found = arguments.get("settings", {})
    _only(found, {f.name for f in fields(Settings)} - {"api_key"}, "settings of the application")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    settings = Settings(api_key=os.environ.get(KEY) or None, **given)
    model = Model(path=arguments["model"], options=arguments.get("options", {}), defaults=arguments.get("defaults", {}))
    replicas = parse_replicas(str(arguments.get("replicas", "1")))
    return application(model, settings, replicas, arguments.get("needs", {"num_gpus": 1}))


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    if not set(given) <= known:
        raise BadRequestError(f"{where}: {', '.join(sorted(set(given) - known))}: expected some of {sorted(known)}")


def run(
    model: Model, settings: Settings, *, host: str, port: int, replicas: tuple[int, int], address: str | None
) -> int:
    """Serves until a signal comes; then replicas finish what they have. Raises MindOmniError."""
    stop = threading.Event()
    with cluster(address, replicas[1]) as ray:
        from ray import serve

        if address is not None:
            check_there(ray, model)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.deadline + settings.grace})
        needs = resources(ray, str(model.options.get("device")))
        try:
            serve.run(application(model, settings, replicas, needs), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise BadRequestError(f"no replica could be started: {error}") from error
        try:
            stop.wait()
        finally:
            serve.delete(NAME)
            serve.shutdown()
    return 0
