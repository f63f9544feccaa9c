"""One toy run as its own process: `python run_toy.py STAGE MODEL OUT STEPS PAUSE`; writes final.pt at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from toy import ToyStream, toy_config, toy_contexts

from mindomni_rt.training.loop.sharding import start_processes
from mindomni_rt.training.loop.trainer import Trainer
from mindomni_rt.training.stages.base import Stage
from mindomni_rt.training.stages.pretrain import Pretrain
from mindomni_rt.training.stages.prior import Prior
from mindomni_rt.training.stages.rgpo import Rgpo
from mindomni_rt.training.stages.sft import Sft


def wordy(rollouts):
    """A reward with some spread: the share of distinct tokens."""
    return np.array([len(set(r.token_ids)) / 6 for r in rollouts])


def main() -> None:
    stage, model, out, steps, pause = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    start_processes(torch.device("cpu"))
    optim = {"steps": steps, "batch": 4, "lr": 1e-3, "ema": 0.9, "warmup": 2, "schedule": "cosine", "accumulate": 2}
    tables = {"optim": optim, "data": {"drop": 0.3}, "distill": {"weight": 16.0}, "save_every": 2, "keep": 3}
    if stage == "sft":
        tables |= {"lora": {"rank": 2, "dropout": 0.1}}
    if stage == "prior":  # texts of unequal length
        tables |= {"prior": {"rounds": "text"}, "data": {"drop": 0.0}}
    if stage == "rgpo":  # as at full size: bf16 weights that are frozen, float32 adapters
        optim |= {"batch": 2, "accumulate": 1}
        rewards = {"rewards": ["wordy"], "weights": [1.0], "replay": 1}
        tables |= {"lora": {"rank": 2}, "rgpo": rewards, "precision": "bf16", "recompute": True}
    config = toy_config(stage, model, out, **tables)
    contexts = toy_contexts(model)
    if stage == "rgpo":
        contexts.model.to(torch.bfloat16).vae.float()
        built: Stage = Rgpo(contexts.model, contexts, config, {"wordy": wordy})
    else:
        built = {"prior": Prior, "pretrain": Pretrain, "sft": Sft}[stage](contexts.model, contexts, config)
    stream = ToyStream({"rgpo": (0, 1), "prior": (1, 3)}.get(stage, (0, 1, 2)))
    trainer = Trainer(config, built, stream, on_step=lambda *_: time.sleep(float(pause)), bar=False)
    trainer.run()
    if trainer.rank == 0 and trainer.processes == 1:
        state = {
            **{n: p.detach() for n, p in trainer.trained.items()},
            **{f"ema.{n}": t for n, t in trainer.ema.items()},
        }
        torch.save(state, out / "final.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
