"""What every training run shares: its flags, its folder, its log, its trainers.

Knows the command line, output folders and checkpoints, and TRL's trainers. Must not know where rows come from, nor how
PPO works. Read in this order: command_line (the flags of all scripts, YAML files, what the machine has, how a mistake
ends), folder (which folder a run may use, which checkpoint it resumes from), identity (what its result depends on),
checkpoints (when one is whole), record (run.json, the model card), log (training_log.jsonl, the learning curves),
trainers (TRL's trainers with our checks), and what these inherit: resuming (exact checkpoints), soundness (finite, and
moving), signals (SIGTERM and Ctrl-C), named_evaluation (metrics by dataset).
"""
