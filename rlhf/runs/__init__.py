"""What every training run shares: its flags, its folder, its log, its trainers.

Knows the command line, output folders and checkpoints, and TRL's trainers. Must not know where rows come from, nor how
PPO works.

Read in this order: command_line (flags and YAML files, read before a library is imported), flags (one table of what
each does), checks (of values), renamed (other systems' names), yaml_files, description (flags.json, made of the
libraries), arguments (the dataclasses, what the machine has), folder (which checkpoint a run resumes from, run.json,
the model card), log (training_log.jsonl, the bar, the curves), trainers (TRL's, with our checks of their first
steps), named_evaluation (metrics by dataset).
"""
