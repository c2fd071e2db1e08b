"""A notice to stop: SIGTERM and SIGUSR1 (Slurm's and the clouds') and Ctrl-C end a run after its next step, saved.

Before and after training they end it at once, and so does a second one; again each second until it has ended, since
a library may catch the first. The exit codes tell a scheduler what to do:
85 and 130 mean that the same command goes on.
"""

import signal
import sys

EXIT_CODES = {"SIGTERM": 85, "SIGUSR1": 85, "SIGINT": 130}
asked, training = None, False  # the name of the first signal; whether the training loop runs


class Stopped(KeyboardInterrupt):
    """The end that a signal asked for; the message says what is kept."""

    def __init__(self, name: str, kept: str):
        super().__init__(f"stopped by {name}: {kept}")
        self.code = EXIT_CODES[name]


def listen() -> None:
    """Catch the signals from here on, in a script's main process and thread."""
    set_training(False)
    for name in EXIT_CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)


def on_signal(number, frame):
    global asked
    name = signal.Signals(number).name
    if not training or asked:
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: on_signal(number, frame))
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise Stopped(name, "what was saved before is kept" if training else "no step was under way")
    asked = name
    print(f"\n{name}: the run is saved after its next step; once more ends it at once", file=sys.stderr)


def ended() -> None:
    """A signal has done what it should: it is not repeated."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def set_training(runs: bool) -> None:
    """Say whether there is a step to wait for."""
    global asked, training
    asked, training = None, runs
