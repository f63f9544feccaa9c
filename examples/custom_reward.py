"""A reward of your own in stage 3: a function from rollouts to one number each.

python examples/custom_reward.py --out out/custom_reward
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.training.cli import main as train
from mindomni_rt.training.stages.rewards import Rollout

HERE = Path(__file__).parent


def shows_one_colour(rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
    """1 where all coloured pixels lie within 0.1 of their mean colour, less where they scatter."""
    return np.array([one_colour(rollout.image) for rollout in rollouts], np.float32)


def one_colour(image: NDArray[np.generic]) -> float:
    """image (H, W, 3): uint8, or floats in [0, 1]."""
    pixels = np.asarray(image, np.float32).reshape(-1, 3) / (255 if image.dtype == np.uint8 else 1)
    coloured = pixels[np.ptp(pixels, axis=1) > 0.2]
    if not len(coloured):
        return 0.0
    return float((np.abs(coloured - coloured.mean(0)).max(1) < 0.1).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a checkpoint to start from")
    parser.add_argument("--out", default="out/custom_reward", help="run folder")
    options = parser.parse_args(arguments)
    # The configuration names the reward as module:function; this file's folder is on the path, so the module is found.
    config = HERE / "custom_reward.toml"
    code = train(["rgpo", "--config", str(config), "--quiet", f"model={options.model}", f"out={options.out}"])
    if code == 0:
        metrics = (Path(options.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for line in metrics:
            record = json.loads(line)
            print(f"step {record['step']}:", {k: round(v, 3) for k, v in record.items() if "reward" in k})
    return code


if __name__ == "__main__":
    raise SystemExit(main())
