"""A notice to stop: SIGTERM and SIGUSR1 (Slurm's and the clouds') and Ctrl-C end a run after its next step, saved.

Before and after training they end it at once, and so does a second one. The exit codes tell a scheduler what to do:
85 and 130 mean that the same command goes on.
"""

import signal
import sys

import torch
from transformers import TrainerCallback

EXIT_CODES = {"SIGTERM": 85, "SIGUSR1": 85, "SIGINT": 130}
_asked, _training = None, False  # the name of the first signal; whether the training loop runs


class Stopped(KeyboardInterrupt):
    """The end that a signal asked for; the message says what is kept."""

    def __init__(self, name: str, kept: str):
        super().__init__(f"stopped by {name}: {kept}")
        self.code = EXIT_CODES[name]


def listen() -> None:
    """Catch the signals from here on, in a script's main process and thread."""
    global _asked, _training
    _asked, _training = None, False
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _on_signal)


def _on_signal(number, frame):
    global _asked
    name = signal.Signals(number).name
    if not _training or _asked:
        raise Stopped(name, "what was saved before is kept" if _training else "no step was under way")
    _asked = name
    print(f"\n{name}: the run is saved after its next step; once more ends it at once", file=sys.stderr)


class StopWhenAsked(TrainerCallback):
    """Has the trainer save, and `stop_asked` say which signal, as soon as all processes know of it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        global _training
        _training = True

    def on_step_end(self, args, state, control, **kwargs):
        accelerator, asked = self.trainer.accelerator, list(EXIT_CODES).index(_asked) + 1 if _asked else 0
        if accelerator.num_processes > 1:  # one that heard of it stops all, at the same step
            asked = int(accelerator.gather(torch.tensor([asked], device=accelerator.device)).max())
        if asked and getattr(self.trainer, "can_stop", True):
            self.trainer.stop_asked = list(EXIT_CODES)[asked - 1]
            control.should_save = control.should_training_stop = True


def training_is_over() -> None:
    """From here on a signal has nothing to wait for."""
    global _training
    _training = False
