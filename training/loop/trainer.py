"""The loop that all stages share: accumulate, clip, step, average, log, save, resume, stop.

On one process it is plain PyTorch. Under torchrun the parameters are sharded by FSDP2 (`fully_shard`, one unit a
block), every process reads the same global batch and keeps its slice.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mindomni_rt.errors import BadCheckpointError, MindOmniError

from ..config import Config, OptimConfig
from ..data.record import Record, Stream
from ..errors import Interrupted, NonFiniteError
from ..stages.base import Draws, LossTerms, Sample, Stage
from . import checkpointing
from .fingerprint import differences, fingerprint
from .logs import Log
from .sharding import recompute_blocks, shard, world
from .steps import StepReader

SHOW = ("loss", "reward/total", "grad_norm")


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of 0-based step: linear warm-up, then constant, cosine or linear to lr · final at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    share = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final + (1 - config.final) * share)


class Trainer:
    """One run of one stage."""

    def __init__(
        self,
        config: Config,
        stage: Stage,
        stream: Stream,
        on_step: Callable[[int, Any], None] | None = None,
        evaluate: Callable[[Stage], dict[str, float]] | None = None,
        bar: bool = True,
    ) -> None:
        self.config, self.stage, self.on_step, self.bar = config, stage, on_step, bar
        self.evaluate = evaluate
        self.stream = StepReader(stream, config.optim.batch * config.optim.accumulate, self._begin)
        self.rank, self.processes = world()
        if config.optim.batch % self.processes:
            raise MindOmniError(f"optim.batch = {config.optim.batch} does not divide over {self.processes} processes")
        self._fingerprint = fingerprint(config, stage)
        chosen = set(stage.choose_trainable())
        stage.eval()  # dropout is on in updates only, not in rollouts
        if config.recompute:
            recompute_blocks(stage)
        if self.processes > 1:
            shard(stage, config.wants_bf16(stage.contexts.device.type))
        self.trained = {n: p for n, p in stage.model.named_parameters() if n in chosen}
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
        )
        self.ema = {n: p.detach().clone() for n, p in self.trained.items()} if o.ema else {}
        self.step = 0
        self._samples: list[Sample] = []
        self._stop = self._stop_everywhere = False
        self.folder = Path(config.out) / "checkpoints"

    # Saving

    def save(self) -> None:
        """A checkpoint of this moment; gathered by all processes, written by the first."""
        state = checkpointing.capture(
            self.step,
            self.trained,
            self.optimizer,
            self.ema,
            self.stream.state_dict(),
            self._fingerprint,
            keep=self.rank == 0,
        )
        if self.rank == 0:
            checkpointing.save(self.folder, state, self.config.keep)
        if self.processes > 1:
            torch.distributed.barrier()

    def resume(self) -> bool:
        """Continues from the newest checkpoint of this run, if there is one."""
        state = checkpointing.latest(self.folder)
        if state is None:
            return False
        changed = differences(state.fingerprint, self._fingerprint)
        if changed:
            raise BadCheckpointError(
                f"{self.folder} is of another run: {'; '.join(changed)}. Resume with the settings of its config.json, "
                "or use a new `out`"
            )
        if state.step > self.config.optim.steps:
            raise BadCheckpointError(
                f"{self.folder} holds step {state.step}, more than optim.steps = {self.config.optim.steps}: "
                "use a new `out`"
            )
        checkpointing.restore(state, self.trained, self.optimizer, self.ema)
        self.stream.load_state_dict(state.data)
        self.step = state.step
        return True

    # Training

    def run(self) -> None:
        """To the last step. Raises NonFiniteError, StorageError, Interrupted."""
        self.resume()
        steps = self.config.optim.steps
        with self._signals(), Log(self.config, self.step, self.rank == 0, self.bar) as log:
            if self.step == 0:
                self._evaluated(log)
            while self.step < steps:
                figures = self._one()
                last = self.step == steps
                if self.step % self.config.log_every == 0 or last:
                    log.write(self.step, figures, SHOW)
                if self._samples:
                    log.samples(self.step, self._samples)
                if last or (self.config.evaluate_every and self.step % self.config.evaluate_every == 0):
                    self._evaluated(log)
                stop = self._stop if self.processes == 1 else self._stop_everywhere
                if stop or last or self.step % self.config.save_every == 0:
                    self.save()
                if stop and not last:
                    raise Interrupted(f"stopped after step {self.step}, saved; the same command resumes")

    def _evaluated(self, log: Log) -> None:
        if self.evaluate is not None and self.config.evaluate_every:
            self.stage.eval()
            log.evaluation(self.step, self._mean(self.stage("apply_to", self.evaluate)))

    def _begin(self, records: Sequence[Record]) -> None:
        """Tells the stage what the step that begins is a mean over: its records in all processes."""
        o = self.config.optim
        parts = [
            (
                records[part * o.batch : (part + 1) * o.batch],
                Draws(self.config.seed, self.step, part, o.batch, 0, o.batch),
            )
            for part in range(o.accumulate)
        ]
        self.stage.begin_step(parts, self.processes)

    def _one(self) -> dict[str, float]:
        """One optimizer step (or `updates` of them, over one set of rollouts)."""
        o, began = self.config.optim, time.perf_counter()
        parts = []
        for part in range(o.accumulate):
            records = list(self.stream.next_batch(o.batch))
            here = o.batch // self.processes
            first = here * self.rank
            mine = records[first : first + here]
            draws = Draws(self.config.seed, self.step, part, o.batch, first, here)
            torch.manual_seed(self.config.seed * 1_000_003 + self.step * 1009 + part * 31 + self.rank)  # dropout
            parts.append((mine, draws, self.stage("prepare", mine, draws)))
        self._agree(sum(self.stage.passes(p) for _, _, p in parts))
        prepared = time.perf_counter()
        self.stage.train()
        rate = learning_rate(o, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures: dict[str, float] = {}
        for _ in range(self.stage.updates):
            figures = self._update(parts)
        self.stage.eval()
        if self.on_step is not None:
            self.on_step(self.step + 1, parts[-1][2])
        self.step += 1
        every = self.config.rgpo.dump_every
        due = self.rank == 0 and every > 0 and (self.step == 1 or self.step % every == 0)
        self._samples = self.stage.samples(parts[-1][2]) if due else []
        now = time.perf_counter()
        return {**figures, "lr": rate, "time/prepare": prepared - began, "time/update": now - prepared}

    def _update(self, parts: Sequence[tuple[Sequence[Record], Draws, Any]]) -> dict[str, float]:
        o = self.config.optim
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for records, draws, prepared in parts:
            terms: LossTerms = self.stage("terms", prepared)
            if not bool(torch.isfinite(terms.total)):
                raise NonFiniteError(self._diagnose(terms, records, draws))
            (terms.total / o.accumulate).backward()
            shown = {"loss": terms.total, **{f"loss/{n}": t for n, t in terms.parts.items()}}
            for name, value in {**{n: t.item() for n, t in shown.items()}, **terms.figures}.items():
                sums[name] = sums.get(name, 0.0) + value / o.accumulate
        norm = nn.utils.clip_grad_norm_(self.trained.values(), o.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not bool(torch.isfinite(norm)):
            bad = next(n for n, p in self.trained.items() if p.grad is not None and not _finite(p.grad))
            raise NonFiniteError(
                f"step {self.step + 1}: the gradient of {bad} is not finite although the loss is "
                f"({sums.get('loss')}); lower optim.lr, or train in fp32"
            )
        self.optimizer.step()
        if self.ema:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    self.ema[name].lerp_(parameter, 1 - o.ema)
        return {**self._mean(sums), "grad_norm": float(norm)}

    def _agree(self, passes: int) -> None:
        """Raises if the processes need different numbers of forward passes, which would deadlock.

        Shares a signal that one of them has received.
        """
        if self.processes == 1:
            return
        mine = torch.tensor([passes, int(self._stop)], device=self.stage.contexts.device)
        everyone = [torch.zeros_like(mine) for _ in range(self.processes)]
        torch.distributed.all_gather(everyone, mine)
        found, stops = zip(*(e.tolist() for e in everyone), strict=True)
        self._stop_everywhere = any(stops)  # a signal reaches the processes at different moments
        if len(set(found)) > 1:
            raise MindOmniError(
                f"step {self.step + 1}: the processes read different kinds of records (forward passes "
                f"{list(found)}); raise optim.batch, or train each kind in a run of its own"
            )

    def _mean(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean over processes."""
        if self.processes == 1:
            return sums
        names = sorted(sums)
        values = torch.tensor([sums[n] for n in names], dtype=torch.float64)
        gathered = [torch.zeros_like(values) for _ in range(self.processes)]
        device = self.stage.contexts.device
        moved = [g.to(device) for g in gathered]
        torch.distributed.all_gather(moved, values.to(device))
        return dict(zip(names, torch.stack(moved).mean(0).tolist(), strict=True))

    def _diagnose(self, terms: LossTerms, records: Sequence[Record], draws: Draws) -> str:
        """Names the term and the record that are not finite; each record is computed again alone."""
        bad = [n for n, t in terms.parts.items() if not bool(torch.isfinite(t))] or ["their weighted sum"]
        weights = [n for n, p in self.trained.items() if not _finite(p)]
        text = f"step {self.step + 1}: loss term {', '.join(bad)} is not finite"
        if weights:
            return f"{text}; the weight {weights[0]} is not either: an earlier step was too large, lower optim.lr"
        if self.processes == 1 and self.stage.name != "rgpo":
            for index, record in enumerate(records):
                alone = Draws(draws.seed, draws.step, draws.part, draws.count, draws.first + index, 1)
                with torch.no_grad():
                    found = self.stage("terms", self.stage("prepare", [record], alone)).total
                if not bool(torch.isfinite(found)):
                    where = getattr(record, "source", "") or record.instruction[:80]
                    return f"{text}; record {where} is the cause: check its image, or remove it"
        return f"{text}; no single record of the batch is: lower optim.lr, or train in fp32"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step under way."""

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                before[number] = signal.signal(number, stop)
            except ValueError:  # not the main thread: the caller keeps its own handlers
                break
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def use_average(self) -> None:
        """Copies the averaged weights, if kept, into the model, for the export."""
        with torch.no_grad():
            for name, average in self.ema.items():
                self.trained[name].copy_(average)


def _finite(tensor: Tensor) -> bool:
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())
