"""What every training run shares: its flags, its folder, its log, its trainers.

Knows the command line, output folders and checkpoints, and TRL's trainers. Must not know where rows come from, nor how
PPO works.

Read in this order: command_line (the flags of all scripts, YAML files, what the machine has, how a mistake ends),
folder (which checkpoint a run resumes from, run.json, the model card), log (training_log.jsonl, the bar, the learning
curves), trainers (TRL's trainers with our checks of their first steps), named_evaluation (metrics by dataset).
"""
