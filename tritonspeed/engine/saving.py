"""The engine's checkpoints, under DeepSpeed's names: what of a run is saved, and how it is resumed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritonspeed.checkpoint import Record, RunFacts, SaveFailed
from tritonspeed.checkpoint.agree import same_text
from tritonspeed.checkpoint.collect import Collected, collect
from tritonspeed.checkpoint.loading import load, resume_optimizer, settings_of
from tritonspeed.checkpoint.model_folder import ModelFolder, configs_of
from tritonspeed.checkpoint.randomness import random_state, set_random_state
from tritonspeed.checkpoint.restore import Wanted, buffers_of
from tritonspeed.checkpoint.saver import Job, Saver
from tritonspeed.checkpoint.script import put_script
from tritonspeed.engine.on_signal import SaveOnSignal
from tritonspeed.version import __version__

if TYPE_CHECKING:
    from tritonspeed.comm import Mesh
    from tritonspeed.config import Config
    from tritonspeed.precision import Policy
    from tritonspeed.zero import Away, ShardedModel

log = logging.getLogger("tritonspeed")
MODEL = "model"
"""Beside the ranks' folders: what ``from_pretrained`` opens."""


class Saving:
    """The half of the engine that saves and loads. Every call is collective: all ranks make it."""

    module: nn.Module
    config: Config
    policy: Policy
    mesh: Mesh
    sharded: ShardedModel
    away: Away
    lr_scheduler: Any
    training_dataloader: Any
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int
    _accumulation: int
    _micro_batch: Any
    _num_backwards: int
    _losses: list[Tensor]
    _plan_sending: Callable[[], None]
    _saver: Saver | None = None
    _signals: SaveOnSignal | None = None
    _folder: Path | None = None  # where a checkpoint was last saved or loaded

    # saving

    def save_checkpoint(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that a run needs to go on, into ``save_dir/tag``. Collective.

        With ``checkpoint.async_save`` it returns when the state has been copied, and a thread writes on: a failure is
        raised by the next call, or by ``wait_for_checkpoint``.

        Args:
            save_dir: a folder that all ranks see.
            tag: name of the checkpoint; None is ``global_step<N>``.
            client_state: whatever else is to be kept, each rank its own: plain values, tensors, arrays.
            save_latest: let ``latest`` name it.
            exclude_frozen_parameters: leave out what is not trained.

        Returns:
            True.

        Raises:
            SaveFailed: nothing was committed, earlier checkpoints are untouched: the disk, or something in
                ``client_state`` that cannot be kept.
            CheckpointBusy: another process saves into this folder.
            ValueError: the ranks gave different tags, and ``checkpoint.tag_validation`` is "Fail".
        """
        self.away.require_here("save_checkpoint()")
        settings = self.config.checkpoint
        collected = collect(self.sharded, exclude_frozen_parameters)
        job = Job(
            folder=Path(save_dir),
            tag=self._agreed_tag(f"global_step{self.global_steps}" if tag is None else str(tag)),
            records=collected.records,
            scalars=collected.scalars,
            state=self._rank_state(client_state or {}),
            parameters=collected.parameters,
            step=self.global_steps,
            facts=self._facts(save_latest),
            set_latest=save_latest,
            keep_last=settings.keep_last,
            extras=self._model_writer(collected, exclude_frozen_parameters) if settings.save_model else None,
        )
        self._folder = job.folder
        if self._saver is None:
            self._saver = Saver(self.mesh, empty=self._host_empty)
        if settings.saves_in_background:
            self._saver.start(job)
        else:
            self._saver.save(job)
        if self.mesh.rank == 0:
            put_script(job.folder)
        return True

    def wait_for_checkpoint(self) -> None:
        """Until the last asynchronous save is committed; nothing where none is under way. Collective.

        Raises:
            SaveFailed: it was not; the same on all ranks.
        """
        if self._saver is not None:
            self._saver.wait()

    def _check_save(self) -> None:
        """Raise what went wrong in an asynchronous save that has ended."""
        if self._saver is not None:
            self._saver.check()

    def _watch_signals(self) -> None:
        """From now on SIGTERM ends the run after the step that is under way, saved; where the config asks for it."""
        if self.config.checkpoint.save_on_sigterm:
            self._signals = SaveOnSignal()

    def _save_if_asked(self) -> None:
        """Save and leave, if a signal came to any rank. Collective where signals are watched.

        Raises:
            SystemExit: saved, or there is no folder to save into.
        """
        if self._signals is None or not self._signals.asked(self.mesh):
            return
        folder = self.config.checkpoint.save_dir or self._folder
        code = self.config.checkpoint.exit_code
        if folder is None:
            log.error("SIGTERM: not saved, since nobody named a folder: set checkpoint.save_dir in the config")
            raise SystemExit(code)
        try:
            self.wait_for_checkpoint()
        except SaveFailed as error:  # of the save before: this one may go well
            log.error("%s", error)
        self.save_checkpoint(folder, client_state=self.client_state_on_signal())
        self.wait_for_checkpoint()
        if self.mesh.rank == 0:
            log.warning("SIGTERM: step %d is saved in %s, the run ends with code %d", self.global_steps, folder, code)
        raise SystemExit(code)

    def client_state_on_signal(self) -> dict[str, Any]:
        """What is kept as ``client_state`` where a signal saves, not the caller: assign a function of your own."""
        return {}

    def _host_empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory for snapshots, in the ledger while the saver keeps it."""
        held, account = self.sharded.homes.empty(numel, dtype, crosses=True), self.sharded.ledger.host
        account.add("communication", held.nbytes)
        weakref.finalize(held, account.add, "communication", -held.nbytes)
        return held

    def _agreed_tag(self, tag: str) -> str:
        first, same = same_text(self.mesh, tag, "checkpoint: tag")
        rule = self.config.checkpoint.tag_validation.lower()
        if not same and rule == "fail":
            raise ValueError(
                f"the ranks gave save_checkpoint() different tags, rank {self.mesh.rank} {tag!r} and rank 0 {first!r}: "
                "give the same one on every rank"
            )
        if not same and rule == "warn" and self.mesh.rank == 0:
            log.warning("the ranks gave save_checkpoint() different tags: rank 0's, %r, is taken on all", first)
        return first

    def _facts(self, save_latest: bool) -> dict[str, Any]:
        return {
            "tritonspeed": __version__,
            "torch": torch.__version__,
            "stage": self.sharded.stage.number,
            "dtype": str(self.policy.param).removeprefix("torch."),
            "samples": self.global_samples,
            "latest": save_latest,
        }

    def _rank_state(self, client_state: dict[str, Any]) -> dict[str, Any]:
        """What this rank keeps for itself; rank 0 what is common to all, too."""
        state: dict[str, Any] = {
            "random": random_state(self.mesh.device),
            "losses": [loss.item() for loss in self._losses],
            "client_state": client_state,
            "buffers": {name: buffer.detach() for name, buffer in buffers_of(self.sharded).items()},
        }
        if hasattr(self.training_dataloader, "state_dict"):
            state["data"] = self.training_dataloader.state_dict()
        if self.mesh.rank == 0:
            state["run"] = self._run_state(client_state)
        return state

    def _run_state(self, client_state: dict[str, Any]) -> dict[str, Any]:
        """``RunFacts``, and the config."""
        optimizer = self.sharded.stepper
        scheduler = self.lr_scheduler
        return {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "micro_steps": self.micro_steps,
            "skipped_steps": self.skipped_steps,
            "world": self.mesh.world,
            "accumulation": self._accumulation,
            "micro_batch": self._micro_batch,
            "num_accumulated": self._num_backwards,
            "optimizer": type(optimizer.inner).__name__ if optimizer else None,
            "param_groups": settings_of(optimizer) if optimizer else [],
            "scaler": optimizer.scaler.state_dict() if optimizer else None,
            "scheduler": scheduler.state_dict() if hasattr(scheduler, "state_dict") else None,
            "client_state": client_state,
            "config": {each.path: each.value for each in self.config.origin.given},
        }

    def _model_writer(self, collected: Collected, exclude_frozen: bool) -> Callable[[Path, Sequence[Record]], None]:
        """What writes ``model/`` beside the checkpoint: every rank its part, from what it saves anyway."""
        buffers = {name: buffer.detach().clone() for name, buffer in buffers_of(self.sharded).items()}
        configs = configs_of(self.module, self.policy.param)
        folder = ModelFolder(collected.parameters, buffers, configs, exclude_frozen=exclude_frozen)
        return lambda place, records: folder.write(place / MODEL, records, self.mesh.rank)

    # loading

    def load_checkpoint(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from a checkpoint of any world size, stage and tier: ours, or DeepSpeed's. Collective.

        Args:
            load_dir: what ``save_checkpoint`` was given, or the folder of one checkpoint.
            tag: which; None takes what ``latest`` names, and if that is damaged the newest that is good, and says so.
            load_module_strict: everything must fit the model and the optimizer; False loads what fits and logs the
                rest.
            load_optimizer_states: with the optimizer's states, settings, loss scale and gradients in accumulation.
            load_lr_scheduler_states: with the schedule's.
            load_module_only: parameters alone: no counters either.
            custom_load_fn: called with ``src=`` the whole state dict and ``dst=`` the module; loads parameters instead.

        Returns:
            (path of the checkpoint, what this rank gave as ``client_state``); (None, None) where there is none.

        Raises:
            CorruptCheckpoint: the one that was named is damaged, or all are. The model may be partly overwritten.
            MismatchedCheckpoint: it is another model's or optimizer's; nothing was changed.
        """
        self.away.require_here("load_checkpoint()")
        self.wait_for_checkpoint()
        wanted = Wanted(
            states=load_optimizer_states and not load_module_only and self.sharded.stepper is not None,
            masters=bool(self.config.zero_optimization.load_from_fp32_weights),
            strict=load_module_strict,
        )
        loaded = load(
            self.sharded,
            Path(load_dir),
            None if tag is None else str(tag),
            wanted,
            self.config.checkpoint.verify,
            self._problems_with,
            custom_load_fn,
        )
        if loaded is None:
            return None, None
        if not load_module_only:
            self._resume(loaded.facts, loaded.own, wanted, load_lr_scheduler_states)
        self._folder = loaded.path.parent
        return str(loaded.path), dict(loaded.own.get("client_state", loaded.facts.client_state))

    def _problems_with(self, facts: RunFacts) -> list[str]:
        """Why an accumulation cannot go on here, in words."""
        if not facts.num_accumulated or self._micro_steps_done(facts) is not None:
            return []
        return [
            f"it was saved {facts.num_accumulated} micro-steps into a step of {facts.accumulation} × "
            f"{facts.micro_batch} samples × {facts.world} ranks, which is no whole number of micro-steps of a step of "
            f"{self._accumulation} × {self._micro_batch} × {self.mesh.world}: those gradients would be left out"
        ]

    def _micro_steps_done(self, facts: RunFacts) -> int | None:
        """How many micro-steps of ours the samples make that gradients are there of; None where they do not."""
        if (facts.micro_batch, facts.world) == (self._micro_batch, self.mesh.world):
            return facts.num_accumulated
        theirs = (facts.micro_batch or 0) * facts.world
        ours = (self._micro_batch or 0) * self.mesh.world
        if theirs * facts.accumulation != ours * self._accumulation:
            return None
        done, rest = divmod(facts.num_accumulated * theirs, ours) if ours else (facts.num_accumulated, 0)
        return None if rest else done

    def _resume(self, facts: RunFacts, own: dict[str, Any], wanted: Wanted, with_schedule: bool) -> None:
        """Counters, settings, schedule, loss scale, random states, data."""
        self.global_steps, self.global_samples = facts.global_steps, facts.global_samples
        self.skipped_steps = facts.skipped_steps
        done = (self._micro_steps_done(facts) or 0) if wanted.states and facts.num_accumulated else 0
        same = (facts.world, facts.accumulation) == (self.mesh.world, self._accumulation)
        self.micro_steps = facts.micro_steps if same else facts.global_steps * self._accumulation + done
        if facts.num_accumulated and not done:
            self.micro_steps -= self.micro_steps % self._accumulation
        self._num_backwards = done
        self._losses.clear()
        self._losses += [torch.tensor(loss, device=self.mesh.device) for loss in own.get("losses", ()) if done]
        if wanted.states and self.sharded.stepper is not None:
            resume_optimizer(self.sharded.stepper, facts)
        if with_schedule and facts.scheduler is not None and hasattr(self.lr_scheduler, "load_state_dict"):
            self.lr_scheduler.load_state_dict(facts.scheduler)
        if "random" in own:
            set_random_state(own["random"], self.mesh.device)
        if "data" in own and hasattr(self.training_dataloader, "load_state_dict"):
            self.training_dataloader.load_state_dict(own["data"])
        self._plan_sending()
