"""What every rank of the demo runs: a few steps of each ZeRO stage, then the training, its evaluation and a sample.

Rank 0 leaves in the output folder

    metrics.jsonl    one line per step, and one per evaluation on held-out text
    summary.json     everything else: sizes, losses, the sample, bytes by stage, measured and computed
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import tritonspeed as ts
from tritonspeed.cli.demo_model import next_byte_loss, write
from tritonspeed.cli.demo_progress import Progress, console, mib, ranks
from tritonspeed.cli.demo_stages import fresh_model, try_stage
from tritonspeed.cli.demo_text import Corpus, even_windows, load_corpus, random_windows
from tritonspeed.comm import Mesh
from tritonspeed.config import Config
from tritonspeed.config.keys import replace_at
from tritonspeed.zero.stages import STAGES

NUM_EVALUATIONS = 8  # while training, besides the one before it; closer together where the loss falls fastest
HELD_OUT_ROWS = 128
ROWS_AT_ONCE = 32
SAMPLE_BYTES = 240
TEMPERATURE = 0.7
DEFAULT_STEPS = 500  # where the config has no schedule with an end
PATIENCE = 1.5  # times the planned seconds: a machine that has become slower does not keep anybody waiting
AGREE_EVERY = 20  # steps between two agreements of the ranks on whether time is up


def build_parser() -> argparse.ArgumentParser:
    """What ``tritonspeed demo`` tells its ranks."""
    parser = argparse.ArgumentParser(prog="python -m tritonspeed.cli.demo_train")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--steps", type=int)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run as one rank of the demo."""
    args = build_parser().parse_args(argv)
    ts.init_distributed()
    mesh = ts.comm.mesh_of()
    corpus = load_corpus(args.data)
    config = ts.config.load(args.config)
    if mesh.rank == 0:
        console().print("a few steps of each ZeRO stage, to measure what it holds ...\n")
    stages = [try_stage(config, stage, corpus, mesh) for stage in STAGES]
    resolved = config.resolve(mesh.world)
    micro_step_s = stages[int(resolved.zero_optimization.stage)]["micro_step_ms"] / 1e3
    step_s = _slowest(mesh, micro_step_s * int(resolved.gradient_accumulation_steps or 1))
    num_steps = args.steps or max(1, min(_scheduled_steps(config) or DEFAULT_STEPS, int(args.seconds / step_s)))
    with open(args.out / "metrics.jsonl" if mesh.rank == 0 else os.devnull, "w", encoding="utf-8") as metrics:
        training = Training(config, corpus, mesh, num_steps, metrics)
        training.run(time_limit_s=float("inf") if args.steps else PATIENCE * args.seconds)
        summary = training.summary()
    if mesh.rank == 0:
        summary = {"config": args.config, **summary, "stages": stages}
        (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    ts.comm.shutdown()


def _slowest(mesh: Mesh, seconds: float) -> float:
    """The longest time that any rank took: all of them must plan alike."""
    return float(ts.comm.exchange(mesh, torch.tensor([seconds], dtype=torch.float64, device=mesh.device)).max())


def _scheduled_steps(config: Config) -> int | None:
    """When the config's schedule ends; None where it has no end."""
    total = config.scheduler.params.get("total_num_steps") if config.scheduler else None
    return int(total) if isinstance(total, int | float) else None


def _end_schedule_at(config: Config, num_steps: int) -> Config:
    """A schedule that ends when the training does, with a warm-up of a quarter of it at most."""
    if config.scheduler is None or "total_num_steps" not in config.scheduler.params:
        return config
    params = {**config.scheduler.params, "total_num_steps": max(2, num_steps)}
    if "warmup_num_steps" in params:
        params["warmup_num_steps"] = max(2, min(int(params["warmup_num_steps"]), num_steps // 4))
    return replace_at(config, "scheduler.params", params)


class Training:
    """The demo's training run on one rank.

    Args:
        config: not resolved; its schedule is made to end after ``num_steps``.
        corpus: the text.
        mesh: the ranks.
        num_steps: optimizer steps.
        metrics: open text file, one JSON object per line.
    """

    def __init__(self, config: Config, corpus: Corpus, mesh: Mesh, num_steps: int, metrics: TextIO) -> None:
        self.corpus, self.mesh, self.num_steps, self.metrics = corpus, mesh, num_steps, metrics
        model = fresh_model()
        self.num_bytes = model.config.max_bytes
        self.computed = ts.estimate(model, config, mesh.world)
        self.engine, _, _, _ = ts.initialize(model=model, config=_end_schedule_at(config, num_steps))
        self.tokens_per_step = self.engine.train_batch_size() * self.num_bytes
        self.steps = 0
        self.seconds = 0.0  # of training alone, without evaluations
        self.held_out: list[float] = []
        if mesh.rank == 0:
            self._announce(_scheduled_steps(config))

    def _announce(self, scheduled: int | None) -> None:
        where = "GPU" if self.mesh.device.type == "cuda" else "CPU"
        remark = f" (the config's schedule has {scheduled}; it now ends here)" if scheduled != self.num_steps else ""
        dtype = str(self.engine.get_data_types()[0]).removeprefix("torch.")
        console().print(
            f"model     a byte-level GPT of {self.computed.num_parameters / 1e6:.1f} M parameters in {dtype}, under"
            f" ZeRO-{self.computed.stage} on {ranks(self.mesh.world)}, {where}\n"
            f"text      {self.corpus.name}: {len(self.corpus.train):,} bytes, and"
            f" {len(self.corpus.held_out):,} held out\n"
            f"training  {self.num_steps} steps of {self.tokens_per_step:,} bytes{remark}\n"
            f"memory    {mib(self.computed.total_peak_bytes)} of model state per rank at the peak of a step, computed\n"
        )

    def run(self, time_limit_s: float) -> None:
        """Train, with evaluations before, on the way and after; stop early after ``time_limit_s``. Collective."""
        due = {round(self.num_steps * ((i + 1) / NUM_EVALUATIONS) ** 2) for i in range(NUM_EVALUATIONS)}
        self._evaluate()
        peak_of = "allocated" if self.mesh.device.type == "cuda" else "measured"  # a GPU's counts activations too
        shown = Progress(self.num_steps, self.computed.total_peak_bytes, peak_of, hidden=self.mesh.rank != 0)
        with shown as progress:
            while self.steps < self.num_steps:
                self._step()
                if self.steps % AGREE_EVERY == 0 and _slowest(self.mesh, self.seconds) > time_limit_s:
                    self.num_steps = self.steps
                if self.steps in due or self.steps == self.num_steps:
                    self._evaluate()
                report = self.engine.last_step
                assert report is not None, "a step leaves its report"
                progress.show(report, self.held_out[-1], self.tokens_per_s, self._seconds_left())

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks, since the first step."""
        return self.tokens_per_step * self.steps / self.seconds

    def _seconds_left(self) -> float:
        return self.seconds / self.steps * (self.num_steps - self.steps)

    def _step(self) -> None:
        start = time.perf_counter()
        engine, mesh = self.engine, self.mesh
        for _ in range(engine.gradient_accumulation_steps()):
            seed = engine.micro_steps * mesh.world + mesh.rank
            rows = engine.train_micro_batch_size_per_gpu()
            inputs, targets = random_windows(self.corpus.train, rows, self.num_bytes, seed)
            engine.backward(next_byte_loss(engine(inputs.to(engine.device)), targets.to(engine.device)))
            engine.step()
        self.steps += 1
        self.seconds += time.perf_counter() - start
        report = engine.last_step
        assert report is not None, "a step leaves its report"
        self._note(
            loss=report.loss,
            grad_norm=report.grad_norm,
            lr=report.lr[0],
            skipped=report.skipped,
            tokens_per_s=self.tokens_per_s,
            peak_bytes=report.peak_bytes,
        )

    def _note(self, **facts: Any) -> None:
        self.metrics.write(json.dumps({"step": self.steps, "seconds": round(self.seconds, 3), **facts}) + "\n")

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over the held-out windows, nats per byte; each rank takes its share. Collective."""
        mesh, device = self.mesh, self.mesh.device
        rows_per_rank = max(1, HELD_OUT_ROWS // mesh.world)
        inputs, targets = even_windows(self.corpus.held_out, rows_per_rank * mesh.world, self.num_bytes)
        rows = range(mesh.rank, len(inputs), mesh.world)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = list(rows[start : start + ROWS_AT_ONCE])
            total += len(some) * next_byte_loss(self.engine.module(inputs[some].to(device)), targets[some].to(device))
        ts.comm.sum_(mesh, total, "held-out loss")
        self.held_out.append(float(total) / len(inputs))
        self._note(held_out_loss=self.held_out[-1])

    def _sample(self) -> str:
        """What the model writes; every rank gathers it once and draws the same bytes. Collective."""
        model = self.engine.module
        with torch.no_grad(), ts.zero.GatheredParameters(model.parameters()):
            text = write(model, self.corpus.prompt, SAMPLE_BYTES, self.num_bytes, TEMPERATURE, seed=0)
        return text.decode(errors="replace")

    def summary(self) -> dict[str, Any]:
        """What became of it, with a sample. Collective."""
        text = self.corpus
        return {
            "versions": {"tritonspeed": ts.__version__, "torch": torch.__version__},
            "ranks": self.mesh.world,
            "device": self.mesh.device.type,
            "stage": self.computed.stage,
            "num_parameters": self.computed.num_parameters,
            "text": {"name": text.name, "train_bytes": len(text.train), "held_out_bytes": len(text.held_out)},
            "steps": self.steps,
            "tokens": self.tokens_per_step * self.steps,
            "tokens_per_s": self.tokens_per_s,
            "training_seconds": self.seconds,
            "held_out_loss": {"before": self.held_out[0], "after": self.held_out[-1], "unit": "nats per byte"},
            "sample": {"temperature": TEMPERATURE, "text": self._sample()},
        }


if __name__ == "__main__":
    main()
