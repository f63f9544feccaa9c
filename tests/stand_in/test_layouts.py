"""The VAE at the published sizes: pictures keep their layout (NHWC) between its ends."""

from __future__ import annotations

from typing import Any

import pytest

from .runs import Runs

pytestmark = pytest.mark.timeout(1800)
SHORT: dict[str, Any] = dict(num_inference_steps=1, max_new_tokens=4, think=False)
EDIT: dict[str, Any] = dict(image=True, edit_features="vit+vae", **SHORT)
LARGE: dict[str, Any] = dict(height=1536, width=2048, **SHORT)


def seen(runs: Runs, options: dict[str, Any], **load: Any) -> tuple[dict[str, int], set[str]]:
    """Convolutions, operands copied and other copies of the VAE's stages; where the host waits in them."""
    found = runs(folder=runs.thin, load={"device": "cuda:0", **load}, requests=[["one", options]])
    assert not found["load"]["error"] and not found["requests"][0]["error"], found
    counts = {name: count for name, count in found["layouts"].items() if name.startswith("vae")}
    return counts, {text.split()[2].partition(":")[0] for text in found["requests"][0]["syncs"] if text[:3] == "vae"}


@pytest.mark.parametrize(
    "load", [{}, {"precision": "int4", "memory_budget": "8GB"}], ids=["resident", "visiting the device"]
)
def test_only_the_ends_change_layout(runs: Runs, load: dict[str, Any]) -> None:
    """One operand a stage: latents on their way in, the reference picture on its way in."""
    assert seen(runs, EDIT, **load)[0] == {
        "vae_encode convolutions": 28, "vae_encode operands": 1, "vae convolutions": 36, "vae operands": 1
    }  # fmt: skip


@pytest.mark.parametrize("load", [{}, {"precision": "int8", "memory_budget": "16GB"}], ids=["device", "pinned"])
def test_stripes_keep_their_layout(runs: Runs, load: dict[str, Any]) -> None:
    """Activations that wait on the host cross without a wait too; only the pixels are waited for."""
    found, waits = seen(runs, LARGE, **load)
    assert found.pop("vae convolutions") > 100
    assert found == {"vae operands": 1} and waits == {"mindomni_rt/backends/torch/backend.py"}
