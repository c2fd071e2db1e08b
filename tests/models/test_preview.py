"""Rows as a model will see them: `pytest tests/models/test_preview.py`."""

import prepare_data
from rlhf.models.loading import load_tokenizer
from rlhf.models.preview import CONTEXT, LOSS, PLAIN, limits, show_row


def test_colours_are_the_loss_mask(base):
    tokenizer = load_tokenizer(base)
    user, assistant = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho.")))
    row = {"dataset": "d", "prompt": [user], "completion": [assistant]}
    shown = show_row(row, "sft", tokenizer, **limits("sft", 64, None))
    assert f"{CONTEXT}### Human: Hi\n### Assistant:{PLAIN}{LOSS} Ho.<|endoftext|>{PLAIN}" in shown
    assert "dropped: answer alone" in show_row(row, "sft", tokenizer, **limits("sft", 2, None))
    row = {
        "dataset": "d",
        "prompt": [{"role": "user", "content": "Hi " * 99}],
        "chosen": [assistant],
        "rejected": [user],
    }
    row["rejected"] = [{"role": "assistant", "content": "No."}]
    assert "shortened to fit" in show_row(row, "preference", tokenizer, **limits("preference", 64, None))


def test_the_command_counts_tokens_and_lengths(base, data, capsys):
    flags = ["--dataset_names", data, "--task", "preference", "--model_name_or_path", base, "--max_length", "64"]
    prepare_data.main(prepare_data.make_parser().parse_args([*flags, "--preview", "2"]))
    out = capsys.readouterr().out
    assert "tokens" in out.splitlines()[0] and "rows can be trained on" in out and out.count("--- pairs, ") == 2
