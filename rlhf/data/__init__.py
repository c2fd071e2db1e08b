"""From a dataset's name to rows that a stage can train on.

Knows names, files, layouts of rows, the split, the mix, and the cache of prepared rows. Must not know a model, a
tokenizer or a trainer: rows are messages here, and become tokens in `rlhf.models.rendering`. The datasets themselves,
one function each, are in prepare_data.py.

Read in this order: names (what --dataset_names may say), sources (where raw rows come from, and how a dataset is
registered), files (readers), layouts (key sets of files), rows (what a row is, and when it is dropped), cache
(prepared once), mixing (split, leaks, samples, order), loading (`load_datasets`, which the scripts call).
"""
