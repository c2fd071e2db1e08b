"""What is drawn and shown of a log: `pytest tests/runs/test_log.py`."""

import json

from rlhf.runs.log import draw_curves, error_of, is_held_out, read_log


def test_a_held_out_metric_belongs_to_the_longest_name_that_fits():
    assert is_held_out("eval_hh_accuracy", "accuracy") and is_held_out("eval_hh_rewards/margins", "rewards/margins")
    assert is_held_out("eval_hh_mean_token_accuracy", "mean_token_accuracy")
    assert not is_held_out("eval_hh_mean_token_accuracy", "accuracy") and not is_held_out("train_loss", "loss")
    assert is_held_out("eval_hh_scores", "objective/scores")


def test_a_held_out_metric_is_shown_with_its_error_and_the_error_is_no_curve():
    found = {"eval_hh_accuracy": 0.54, "eval_hh_accuracy_se": 0.0498, "eval_hh_loss": 0.7}
    assert [error_of(found, key) for key in ("eval_hh_accuracy", "eval_hh_loss")] == [" +- 0.05", ""]
    assert not is_held_out("eval_hh_accuracy_se", "accuracy")


def test_curves_are_drawn_of_whatever_a_log_has(tmp_path):
    log, picture = tmp_path / "log.jsonl", tmp_path / "curves.png"
    log.write_text("".join(json.dumps({"step": i, "loss": 1 / i, "eval_hh_loss": 2 / i}) + "\n" for i in (1, 2)))
    draw_curves(log, picture)
    assert picture.stat().st_size > 5000
    log.write_text("")
    draw_curves(log, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_line_that_was_not_written_to_its_end_is_no_entry(tmp_path):
    """Or a run that was killed while it logged could not be continued."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2.0}]
