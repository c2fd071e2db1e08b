"""What every training run shares: its flags, its folder, its log, its checks.

Knows the command line, output folders and checkpoints, and the trainers. Must not know where rows come from, nor the
mathematics of a stage.

Read in this order: command_line (flags, YAML files, what the machine has, how a mistake ends), folder (what is
resumed, run.json, the model card), log (training_log.jsonl, the bar, the curves), trainers (TRL's, with what must hold
checked), named_evaluation (metrics by dataset).
"""
