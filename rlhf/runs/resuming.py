"""Checkpoints from which a run goes on as if nothing had happened: for any `transformers.Trainer`, by inheritance.

Beside what the Trainer saves, a checkpoint holds what its loop keeps in variables (losses not logged yet, the log's
length, whether the epoch's end is still to come) and, last, a manifest.
"""

import errno
import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback

from rlhf.runs import signals
from rlhf.runs.checkpoints import newest_whole, problem_with, remove, rotate, write_manifest
from rlhf.runs.log import LOG, read_log
from rlhf.runs.signals import Stopped
from rlhf.user_error import UserError

UNLOGGED = "unlogged.json"
ROOM = 1 << 20  # bytes; a disk with less is full, whatever the error that a library makes of it


class Phases(TrainerCallback):
    """Tells a trainer in which phase it saves, after a step or at an epoch's end; and has it save, and say in
    `stop_asked` for which signal, as soon as all processes know of it.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_unlogged()
        signals.set_training(True)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.epoch_ends = True

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.epoch_ends = False
        accelerator, names = self.trainer.accelerator, [None, *signals.EXIT_CODES]
        asked = names.index(signals.asked)
        if accelerator.num_processes > 1:  # one that heard of it stops all, at the same step
            asked = int(accelerator.gather(torch.tensor([asked], device=accelerator.device)).max())
        if asked and getattr(self.trainer, "can_stop", True):
            self.trainer.stop_asked = names[asked]
            control.should_save = control.should_training_stop = True


class Resumable:
    """Mixin: whole checkpoints of one run, resumed to the same weights and the same log.

    `folder.begin` gives it the run's id, before `train()`.
    """

    run_id, lock = None, None
    log_lines = 0  # of the log, before what is logged next
    epoch_ends = False  # whether what is saved now belongs to an epoch's end
    stop_asked = None  # the signal for which this save is the last thing to do
    _resumed, _rng_is_set, _last_grad_norm, _last_rate = None, False, None, None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Phases(self))

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._started = time.time()
        self._resumed = None
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint) / UNLOGGED
            self._resumed = {"path": str(resume_from_checkpoint), **json.loads(path.read_text())}
            self._started, self.log_lines = self._started - self._resumed["seconds"], self._resumed["log_lines"]
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException:
            if self.lock is not None:  # else held until run.json is written
                self.lock.release()
            raise
        finally:
            signals.set_training(False)

    def unlogged(self) -> dict:
        """What the training loop knows beside the Trainer's state, of this process."""
        found = {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "grad_norm": self._last_grad_norm if self._last_grad_norm is None else float(self._last_grad_norm),
            "rate": self._last_rate,
            "training": self.model.training,  # TRL logs the metrics of the model's mode
        }
        for name in ("_metrics", "_total_train_tokens"):  # TRL's
            if hasattr(self, name):
                found[name] = getattr(self, name)
        return found

    def restore_unlogged(self) -> None:
        """At the start of the loop, which has just set all this to nothing."""
        if self._resumed is None:
            return
        processes = self._resumed["processes"]
        own = self._own = dict(processes[self.args.process_index % len(processes)])
        if len(processes) != self.args.world_size:  # what each has summed up by itself; the log averages it
            own |= {name: mean(process[name] for process in processes) for name in ("loss", "total_loss")}
        self.model.train(own["training"])
        self._tr_loss += own["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = own["total_loss"], own["last_logged"]
        self._initial_global_step = 0  # the summary at the end is of the whole run
        if "_total_train_tokens" in own:
            self._total_train_tokens = own["_total_train_tokens"]
        for mode, metrics in own.get("_metrics", {}).items():
            self._metrics[mode].clear()
            self._metrics[mode].update(metrics)

    def _get_grad_norm(self, *args, **kwargs):
        self._last_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._last_grad_norm

    def _get_learning_rate(self):
        self._last_rate = super()._get_learning_rate()
        return self._last_rate

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():
            remove(checkpoint)  # another run's of the same step, or what a kill left of ours
        self.accelerator.wait_for_everyone()
        processes = gather_object([self.unlogged()])
        with self.no_rotation(), self.disk_errors(checkpoint):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if self.args.should_save:
                state = {"processes": processes, "log_lines": len(read_log(folder / LOG))}
                state |= {"epoch_ends": self.epoch_ends, "seconds": time.time() - self._started}
                (checkpoint / UNLOGGED).write_text(json.dumps(state) + "\n")
                write_manifest(checkpoint, self.run_id)
        if self.args.should_save:
            rotate(folder, self.run_id, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.stop_asked:
            raise Stopped(self.stop_asked, f"saved at step {self.state.global_step}")

    @contextmanager
    def no_rotation(self):
        """The Trainer would rotate before the manifest is written, and other runs' checkpoints too."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    @contextmanager
    def disk_errors(self, checkpoint: Path):
        """A disk that is full in mid-run leaves the last whole checkpoint, and says so."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            full = full or "No space left" in str(error) or shutil.disk_usage(checkpoint.parent).free < ROOM
            if not (full or isinstance(error, OSError)):
                raise
            whole, _ = newest_whole(checkpoint.parent, self.run_id)
            kept = f"{whole.name} is whole: the same command goes on from there" if whole else "none was saved before"
            reason = "the disk is full" if full else error
            raise UserError(f"{checkpoint} could not be written: {reason}\n  {kept}") from error

    def _run_epoch(self, *args, **kwargs):
        self.finish_epoch()
        if self.state.global_step >= self.state.max_steps:  # the loop would look only after one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def finish_epoch(self) -> None:
        """What came after the save at an epoch's last step, where the run was killed then."""
        resumed, self._resumed = self._resumed, None
        if resumed is None or resumed["epoch_ends"] or self.state.epoch is None:
            return
        done = self.state.global_step >= self.state.max_steps
        if not (done or float(self.state.epoch).is_integer()):
            return
        self._load_rng_state(resumed["path"])
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        last = self._own["grad_norm"], self.model_wrapped, None, self.state.epoch, None, self._started
        self._maybe_log_save_evaluate(self._tr_loss, *last, learning_rate=self._own["rate"])
        self._rng_is_set = True

    def _load_rng_state(self, checkpoint):
        if not self._rng_is_set:
            super()._load_rng_state(checkpoint)
        self._rng_is_set = False

    def _finalize_training(self, trial, num_train_samples, start_time):
        self.finish_epoch()
        with self.no_rotation():
            return super()._finalize_training(trial, num_train_samples, self._started)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        if problem := problem_with(best):
            raise UserError(f"the best checkpoint {best} cannot be loaded: {problem}")
        super()._load_best_model()
