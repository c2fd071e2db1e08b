"""What the libraries read when they are imported: this module is imported before them."""

import logging
import os
import warnings

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers would report each run to the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of a data loader
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import complains on a CPU, where it is not used
# TRL's and transformers' own code still uses these names
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
# PEFT sets the right value for GPT-2's Conv1D and says so for each layer
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
