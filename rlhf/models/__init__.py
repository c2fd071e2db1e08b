"""Models, adapters and tokens: what would be a silent bug if it drifted from script to script.

Knows base models, LoRA adapters, tokenizers and their templates, generation and rewards. Must not know datasets by
name, a training loop or an output folder.

Read in this order: loading (each model by its name), adapters (what an adapter is, which base it has, and that all of
it was loaded), lora (the flags of one), fingerprints (hashes of weights and tokenizers), templates (messages to text
to tokens), rendering (loss, truncation), tokenizing (datasets), preview (rows as a model sees them), rollout (sampling
and reading answers), rewards (what judges them), shared_base (several adapters on one base), shards (a weight's
parts); flat_rows, fast_linear, token_logprobs (the same, sooner), lean (all three for TRL's trainers).
"""
