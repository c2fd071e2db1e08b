"""Models, adapters and tokens: what would be a silent bug if it drifted from script to script.

Knows base models, LoRA adapters, tokenizers and their templates, generation and rewards. Must not know datasets by
name, a training loop or an output folder.

Read in this order: loading (tokenizer, policy and reward model, each by its name), adapters (which base an adapter
has, and that all of it was loaded), fingerprints (hashes of weights and tokenizers), rendering (messages to tokens and
labels, truncation), preview (rows as a model sees them), rollout (sampling answers and reading them), rewards (what
judges an answer), shared_base (several adapters on one base). flat_rows and fast_linear give the same numbers sooner
on a CPU.
"""
