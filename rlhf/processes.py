"""Several processes as one run: they meet before and after training, agree, and a mistake in one ends all.

They meet at the store through which torch's processes find each other, not in a collective operation: one that
tokenises for an hour is waited for, whatever --ddp_timeout says. That is for training, when all are at the same step.
"""

import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

from rlhf.user_error import UserError, mistake

FAILED, LEFT, GONE, ALIVE, TIMEOUT = "rlhf/failed/", "rlhf/left/", "rlhf/gone/", "rlhf/alive/", 1800.0
PATIENCE = 10  # seconds in which all should have heard of a mistake
BEAT = 2  # seconds between two signs of life
_meetings, _limit, _over, _heart = 0, TIMEOUT, threading.Event(), None


class Elsewhere(UserError):
    """Another process's mistake, of which this one has heard."""

    def __init__(self, host: str, text: str, code: int):
        super().__init__(f"on {host}: {text}")
        self.host, self.code = host, code


class Lost(RuntimeError):
    """No sign of life from another process, or no answer from the store that all meet at."""


def launched() -> int:
    """How many processes torchrun or accelerate has started; mpirun's are counted by accelerate, later."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))


def group():
    """torch.distributed, where there are several processes and they have joined; else None."""
    if launched() < 2:
        return None
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return group().get_rank() if group() else 0


def store():
    return group().distributed_c10d._get_default_store()


def join(timeout: float = TIMEOUT) -> None:
    """Take this process's place among those that were launched, before accelerate would; all do, also one that has
    found a mistake.

    Args:
        timeout: seconds after which a collective operation that not all take part in is an error.
    """
    global _limit
    if launched() < 2 or group():
        return
    _limit = timeout
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    if not on_cpu or not torch.accelerator.is_available():  # accelerate knows how to join on other accelerators
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))


def ask(question):
    """What the store answers, in time: it is at the other end of a connection that may be dead without saying so.

    Raises:
        Lost: without an answer.
    """
    found = []

    def answer():
        with suppress(RuntimeError):
            found.append(question())

    asking = threading.Thread(target=answer, daemon=True)
    asking.start()
    asking.join(_limit)
    if not found:
        raise Lost("no answer from the first process's machine")
    return found[0]


def beat() -> None:
    """Give signs of life until this process leaves, however long it works without meeting the others."""
    with suppress(RuntimeError):
        while not _over.wait(BEAT):
            store().add(f"{ALIVE}{rank()}", 1)


def wait(key: str, other: int) -> str:
    """What another process leaves at a key of the store, as soon as it is there.

    Raises:
        Elsewhere: if a process says meanwhile that it has failed.
        Lost: if the other gives no sign of life for the seconds of --ddp_timeout.
    """
    pause, seen, since = 0.01, 0, time.time()
    while True:
        there, problem, beats = ask(lambda: (store().check([key]), elsewhere(), store().add(f"{ALIVE}{other}", 0)))
        if there:
            return ask(lambda: store().get(key).decode())
        if problem:
            raise problem
        if beats != seen:
            seen, since = beats, time.time()
        if time.time() - since > _limit:
            raise Lost(f"no sign of life from process {other}")
        time.sleep(pause)
        pause = min(pause * 1.5, 1)


def elsewhere() -> Elsewhere | None:
    """What the process said that failed first."""
    try:
        if group() and store().check([f"{FAILED}first"]):
            return Elsewhere(**json.loads(store().get(f"{FAILED}first")))
    except RuntimeError:  # the store is at the other end of a lost connection
        pass
    return None


def exchange(value) -> list:
    """What each process brings to this meeting, JSON-able, by rank. All have to come, and in the same order."""
    global _meetings, _heart
    if not group():
        return [value]
    if _heart is None:
        _heart = threading.Thread(target=beat, daemon=True)
        _heart.start()
    _meetings += 1
    store().set(f"rlhf/{_meetings}/{rank()}", json.dumps(value))
    return [json.loads(wait(f"rlhf/{_meetings}/{other}", other)) for other in range(group().get_world_size())]


def by_first(decide):
    """What the first process decides, on all."""
    return exchange(decide() if rank() == 0 else None)[0]


@contextmanager
def first_here_first():
    """On each machine one process does it before its others, which find then what it has cached."""
    global _meetings
    _meetings += 1
    turn = f"rlhf/{_meetings}/{rank() - local_rank()}"
    if group() and local_rank() > 0:
        wait(turn, rank() - local_rank())
    yield
    if group() and local_rank() == 0:
        store().set(turn, "done")


def check_common(parts: dict) -> None:
    """Raises a UserError that names the machine, and the parts in which it differs from the first process."""
    hashes = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in sorted(parts.items())}
    first, *others = exchange([platform.node(), hashes])
    for number, (host, theirs) in enumerate(others, start=1):
        if differ := [name for name in sorted(first[1] | theirs) if first[1].get(name) != theirs.get(name)]:
            raise UserError(
                f"process {number}, on {host}, differs from the first, on {first[0]}, in {', '.join(differ[:5])}\n"
                "  give all machines the same flags and files"
            )


def announce(text: str, code: int = 2) -> None:
    """Say that this process has failed, to the others, which end with the same code."""
    if not group():
        return
    failure = json.dumps({"host": platform.node(), "text": text, "code": code})
    store().set(f"{FAILED}{rank()}", failure)
    store().compare_set(f"{FAILED}first", "", failure)


def leave() -> None:
    """Stay until the others leave too, for a while; the first process last, since the store may be its own."""
    if not group():
        return
    _over.set()
    deadline, others = time.time() + PATIENCE, range(group().get_world_size())
    with suppress(RuntimeError):
        for word in (LEFT, GONE) if rank() == 0 else (LEFT,):
            store().set(f"{word}{rank()}", "")
            while not store().check([f"{word}{other}" for other in others]) and time.time() < deadline:
                time.sleep(0.05)
        store().set(f"{GONE}{rank()}", "")


def tell(error: UserError) -> int:
    """Say what is wrong, once a machine, and to the other processes; the exit code."""
    if launched() < 2:
        return mistake(error)
    for name in (signal.SIGTERM, signal.SIGINT):  # from here on they end it at once
        signal.signal(name, signal.SIG_DFL)
    heard = isinstance(error, Elsewhere)
    told = heard and error.code == 2 and error.host == platform.node()  # by that process itself
    if local_rank() == 0 and not told:
        mistake(error)
    join()
    if group() and not heard:
        announce(str(error))
        first_here, deadline = f"{FAILED}{rank() - local_rank()}", time.time() + 1
        while local_rank() > 0 and not store().check([first_here]) and time.time() < deadline:
            time.sleep(0.05)
        if not store().check([first_here]) or json.loads(store().get(first_here))["text"] != str(error):
            mistake(error)  # the first process of this machine has not said it
    leave()
    return error.code if heard else 2


def end_if_lost(error: Exception) -> None:
    """End this process, with exit code 1, where an error says that another is gone, or the network to it."""
    global _limit
    lost = isinstance(error, Lost) or (group() and isinstance(error, group().DistError))
    if not group() or not (lost or "gloo" in str(error) or "NCCL" in str(error)):
        return
    _limit = PATIENCE
    with suppress(Lost):
        if problem := ask(elsewhere):
            sys.exit(tell(problem))
    reason = str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0][:120]
    what = f"process {rank()}: another process, or the network to it, is gone: {reason}"
    mistake(UserError(f"{what}\n  what was saved is kept: the same command goes on from there"))
    sys.stdout.flush()
    os._exit(1)  # what the libraries would do at an orderly end may wait for the others
