"""From a dataset's name to rows that a stage can train on.

Knows names, files, layouts of rows, the split, the mix, and the cache of prepared rows. Must not know a model, a
tokenizer or a trainer: rows are messages here, and become tokens in `rlhf.models.rendering`.

To add a dataset, add a function to prepare_data.py, not here. Read in this order: names (the grammar of
--dataset_names), sources (where rows come from), files (readers of each format), layouts (which keys a row may have),
trees (Open Assistant's), votes (of people), messages (out of what datasets hold), rows (what a row is, when it is
dropped), columns (that it is read whole), cache (prepared once), mixing (split, leaks, samples, order), loading
(`load_datasets`).
"""
