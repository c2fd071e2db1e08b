"""What every training run shares: its flags, its folder, its log, its trainers.

Knows the command line, output folders and checkpoints, and TRL's trainers. Must not know where rows come from, nor how
PPO works. Read in this order, first the command line: command_line (flags and YAML files, read before a library is
imported), flags (one table of what each does), checks (of values), renamed (other systems' names), yaml_files,
description (flags.json, made of the libraries), arguments (the dataclasses, what the machine has); then the run:
folder (which one may be used, which checkpoint is resumed), identity (what a result depends on), checkpoints (whole
ones), record (run.json, the model card), memory (does it fit?), measured_memory, log (and curves), trainers (TRL's,
with our checks), resuming, soundness (finite, moving), signals (SIGTERM, Ctrl-C), named_evaluation (by dataset),
last_batch (of an epoch, on several processes).
"""
