"""The rooms behind the commands: data, models, ppo, evaluation, runs; each says in its docstring what it holds.
Beside them user_error (how a mistake ends) and processes (how several agree).

Importing any of them settles first, here, what the libraries read when they are imported.
"""

import ctypes
import logging
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers would report each run to the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of a data loader
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import complains on a CPU, where it is not used
# TRL's and transformers' own code still uses these names
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
# PEFT sets the right value for GPT-2's Conv1D and says so for each layer
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
    # glibc would give each large tensor fresh pages and take them back at once: up to a quarter of a training step on
    # a CPU goes into page faults (1.3 times the speed in benchmarks/ppo_speed.py). musl has no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: None)
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed
