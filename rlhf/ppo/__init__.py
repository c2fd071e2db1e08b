"""PPO for language models: the algorithm and nothing else.

Knows a policy, its critic, a reference and a reward. Must not know datasets by name, YAML files or evaluation
reports; how a model is loaded or an answer sampled is in `rlhf.models`.

Read in this order: trainer (one update: experience, advantages, mini-batches, loss), experience (what is known of a
batch before training on it), algorithm (the papers' equations, rewards and advantages among them), config (PPO's own
flags), batches (which rows a mini-batch has), policy_and_value (policy, critic and reference on one base), evaluation
(answers to held-out prompts while training), checkpoint (what PPO adds to a checkpoint).
"""
