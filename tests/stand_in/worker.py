"""One process, one stand-in: `python -m stand_in.worker THIN` reads jobs, a line of JSON each, and answers "0" for each
that was done: it loaded, ran requests, and wrote what was seen into a file.

Importing torch takes longer than most jobs, and FakeTensor is slow with a shape that it has not met. So each job has a
fork of a process that has run a request of the checkpoint in the folder THIN.

A job: out (the file), stand (fields of `runtime.Stand`), folder, load (options of `mindomni_rt.load`), requests (names
of those in `requests`, or pairs of a name and options), cache (folder of timings), refuse (kernel -> "always" or
"capture"), thread (requests run in one of their own), again (more such jobs in the same process; with `keep` in the
first the pipelines stay alive), blocks (of a stack that run in requests after the first, all unless given), suite
(parts of `bench gpu` instead of all that), seconds (the most that it may take).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

from .runtime import Runtime, Stand, prepare


class Worker:
    """What `job` asks for, in order."""

    def __init__(self, runtime: Runtime, job: dict[str, Any]) -> None:
        from .requests import StandIn

        self.runtime, self.job = runtime, job
        self.stand_in = StandIn(runtime)
        self.stand_in.recorder.refuse = job.get("refuse", {})

    def run(self) -> dict[str, Any]:
        runtime, job = self.runtime, self.job
        found: dict[str, Any] = {}
        with self.stand_in.running():
            if "suite" in job:
                from .suite import sections

                return {"sections": sections(job["suite"]), **self._watched()}
            alive = [self._pipeline(job, found)]
            found["again"] = [{} for _ in job.get("again", [])]
            for following, place in zip(job.get("again", []), found["again"], strict=True):
                if not job.get("keep"):
                    alive.clear()
                    gc.collect()
                alive.append(self._pipeline({"folder": job["folder"], **following}, place))
        found |= self._watched()
        found["streams"] = sorted({stream for _, stream in runtime.stand.streams})
        found["devices"] = sorted({device for device, _ in runtime.stand.streams})
        found["current"] = [runtime.device, *(runtime.stream(index) for index in range(runtime.stand.devices))]
        found["captures"], found["timings"] = runtime.stand.captures, runtime.stand.timings
        found["plans"] = len(runtime.stand.plans)
        found["layouts"] = dict(self.stand_in.fake.operations.layouts.seen)
        found["seconds"] = time.process_time()
        found["launches"] = [{**it.to_json(), "count": n} for it, n in self.stand_in.recorder.seen.items()]
        return found

    def _watched(self) -> dict[str, Any]:
        return {"faults": self.runtime.stand.faults, "stuck": bool(self.runtime.allocator.capturing)}

    def _pipeline(self, job: dict[str, Any], found: dict[str, Any]) -> Any:
        from .quick import remembered

        try:
            with remembered():
                pipeline = self.stand_in.load(Path(job["folder"]), **job["load"])
        except Exception as error:  # noqa: BLE001  # a test reports it
            found["load"] = {"error": "".join(traceback.format_exception(error))[-3000:], "kind": type(error).__name__}
            found["requests"] = []
            return None
        found["load"] = self._loaded(job, pipeline)
        found["requests"] = seen = []
        self.stand_in.index = self._index(job)
        if job.get("thread"):
            thread = threading.Thread(target=self._apart, args=(job, pipeline, seen))
            thread.start()
            thread.join()
        else:
            self._requests(job, pipeline, seen)
        return pipeline

    def _loaded(self, job: dict[str, Any], pipeline: Any) -> dict[str, Any]:
        from mindomni_rt.backends.fast.load import reserve

        from .plans import chosen

        allocator, index = self.runtime.allocator, self._index(job)
        load, kept = job["load"], reserve(pipeline.backend.device)
        found = chosen(
            pipeline.config, load.get("dtype", "bfloat16"), load.get("precision"), load.get("memory_budget"), kept
        )
        self.plan = (pipeline.config, found)
        vae = pipeline.backend.model.vae.post_quant_conv.weight.dtype
        return {
            "error": "", "used": allocator.used(index), "peak": allocator.devices[index].used_top,
            "pinned": allocator.pinned, "pinned_wanted": allocator.pinned_wanted, "reserve": kept,
            "fraction": list(allocator.fractions), "vae": str(vae).removeprefix("torch."),
            "resident": list(found.resident), "precision": str(found.precision), "plan": found.to_dict(),
        }  # fmt: skip

    @staticmethod
    def _index(job: dict[str, Any]) -> int:
        return int(job["load"].get("device", "cuda").partition(":")[2] or 0)

    def _apart(self, *arguments: Any) -> None:
        """In a thread of its own, whose current device is 0 as in every new thread."""
        with self.stand_in.fake.entered():
            self._requests(*arguments)

    def _requests(self, job: dict[str, Any], pipeline: Any, seen: list[dict[str, Any]]) -> None:
        import torch

        from mindomni_rt.benchmarks.measure import Meter

        from .plans import peak
        from .quick import few_blocks
        from .requests import OPTIONS, PLAIN

        for item in job.get("requests", list(PLAIN)):
            name, options = (item, {**PLAIN, **OPTIONS}[item]) if isinstance(item, str) else item
            with few_blocks(job["blocks"]) if seen and "blocks" in job else nullcontext():
                one = asdict(self.stand_in.request(pipeline, name, **options))
            one["planned"] = peak(*self.plan, one["work"]) if one["work"] else 0
            one["measured"] = Meter(torch.device("cuda", self._index(job))).peak()["reserved_bytes"]
            seen.append(one)


WARM: dict[str, Any] = {
    "load": {"device": "cuda:0"},
    "requests": [["warm", dict(num_inference_steps=2, max_new_tokens=3, height=512, width=512)]],
}


def warm(runtime: Runtime, thin: str) -> None:
    """Imports what every job needs and runs a request. What the package and torch keep of the device is forgotten."""
    import torch

    Worker(runtime, {"folder": thin, **WARM}).run()
    gc.collect()
    for found in gc.get_objects():
        if type(found) is _lru_cache_wrapper and found.__module__.partition(".")[0] == "mindomni_rt":
            found.cache_clear()
    torch.cuda._cached_device_count = None
    assert not runtime.allocator.used(0), "the first request left something on the device"
    gc.freeze()


def _job(runtime: Runtime, job: dict[str, Any]) -> None:
    """In a process of its own."""
    signal.alarm(job["seconds"])
    os.environ["XDG_CACHE_HOME"] = job["cache"]
    runtime.become(job.get("stand", {}))
    Path(job["out"]).write_text(json.dumps(Worker(runtime, job).run()))


def main() -> None:
    runtime = prepare(Stand())
    warm(runtime, sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _job(runtime, json.loads(line))
            except BaseException:  # noqa: BLE001  # the parent's loop is not this process's
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
