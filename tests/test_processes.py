"""Two processes give one's numbers, agree, and end together: `pytest tests/test_processes.py`."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf.runs.named_evaluation import OwnBatches, pooled, standard_errors
from tests.conftest import run_processes, run_script

OF_PAIRS = {"sft": (), "reward": ("accuracy", "margin"), "dpo": ("rewards/accuracies", "rewards/margins")}
SCRIPTS = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training"}


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 16])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_each_row_is_evaluated_once_in_as_many_batches_everywhere(rows, size):
    shares = [OwnBatches(rows, size, process, 3) for process in range(3)]
    counted = [row for share in shares for batch in list(share)[: share.real] for row in batch]
    assert sorted(counted) == list(range(rows))
    assert len({len(share) for share in shares}) == 1


def test_metrics_are_pooled_by_their_kind():
    values = [("loss", 1.0, 3), ("loss", 5.0, 1), ("min_reward", -2.0, 2), ("min_reward", 1.0, 2)]
    assert pooled(values) == {"loss": 2.0, "min_reward": -2.0}


def test_errors_of_pairs_metrics_are_the_rows_own():
    margins = [0.5, -0.1, 0.2, 0.0]  # a tie is no win
    found = standard_errors(margins, {"accuracy": 0.5, "margin": 0.15, "loss": 1.0})
    assert found == pytest.approx({"accuracy_se": (0.25 / 3) ** 0.5, "margin_se": statistics.stdev(margins) / 2})
    assert set(standard_errors(margins, ["rewards/margins"])) == {"rewards/margins_se"}
    assert standard_errors([0.5], ["accuracy"]) == standard_errors([], ["loss"]) == {}


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second", "flos"))} for line in lines]


def assert_same(folder, other):
    ours, theirs = metrics(folder), metrics(other)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_held_out_metrics_do_not_depend_on_the_batch(stage, base, saved, data, tmp_path):
    """Seven rows of several lengths, two dropped to the last batch: catches means of batches, and extremes of them."""
    model = base if stage == "sft" else saved["sft"]
    flags = {"model_name_or_path": model, "dataset_names": data, "validation_split_percentage": 15, "max_steps": 1}
    for size in (1, 3, 8):
        run_script(SCRIPTS[stage], output_dir=tmp_path / str(size), **flags, per_device_eval_batch_size=size)
    assert any("eval_pairs_loss" in line for line in metrics(tmp_path / "1"))
    logged = set().union(*metrics(tmp_path / "1"))
    errors = {key.removesuffix("_se") for key in logged if key.endswith("_se")}
    assert errors == {f"eval_pairs_{name}" for name in OF_PAIRS[stage]} and errors <= logged
    run = json.loads((tmp_path / "1" / "run.json").read_text())
    last, pairs = run["metrics"]["last"], run["data"]["evaluation"]["pairs"]["kept"]
    for key in (key for key in errors if "accura" in key):  # of TRL's own mean, of which nothing else is known
        assert last[f"{key}_se"] == pytest.approx((last[key] * (1 - last[key]) / (pairs - 1)) ** 0.5)
    assert_same(tmp_path / "3", tmp_path / "1")
    assert_same(tmp_path / "8", tmp_path / "1")


def without_dropout(base, folder):
    """SFT trains with the model's own, which draws other numbers for each row of a batch."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("stage", "rows"), [("sft", 9), ("reward", 11), ("dpo", 9)])
def test_two_processes_are_one(stage, rows, base, saved, data, tmp_path):
    """Losses, held-out metrics, statistics and weights over more than one epoch, in whose last batch of four rows the
    two processes have 2 and 1, or 1 and none.
    """
    lines = Path(data).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:rows]))
    (tmp_path / "held.jsonl").write_text("".join(lines[-7:]))
    flags = {
        "model_name_or_path": without_dropout(base, tmp_path / "base") if stage == "sft" else saved["sft"],
        "dataset_names": tmp_path / "train.jsonl",
        "eval_dataset_names": tmp_path / "held.jsonl",
        "per_device_eval_batch_size": 3,
        "max_steps": 7,
        "use_cpu": True,
        "optim": "sgd",  # Adam's first steps are the gradients' signs, also of those that are 0 but for rounding
        "learning_rate": 0.1,
    } | ({"lora_dropout": 0} if stage == "sft" else {})
    two = {**flags, "per_device_train_batch_size": 2, "output_dir": tmp_path / "two"}
    ended = run_processes(SCRIPTS[stage], [two, two])
    assert [code for code, _ in ended] == [0, 0], ended
    run_script(SCRIPTS[stage], **{**flags, "output_dir": tmp_path / "one", "per_device_train_batch_size": 4})
    assert_same(tmp_path / "two", tmp_path / "one")
    ours, theirs = (load_file(tmp_path / count / "adapter_model.safetensors") for count in ("two", "one"))
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() < 1e-5, name
    if stage == "reward":
        ours, theirs = (json.loads((tmp_path / n / "score_statistics.json").read_text()) for n in ("two", "one"))
        assert ours == pytest.approx(theirs, abs=1e-5)


DRIVER = """
import os, sys
from rlhf import processes
from rlhf.runs.command_line import run
class Parser:
    machine = ""
    def parse_args_and_config(self):
        processes.join(4)
        processes.exchange("here")
        return ()
def main():
    if processes.rank() == 1:
        {what}
    processes.exchange("there")
    print("went on")
run(main, Parser)
"""


@pytest.mark.parametrize(
    ("what", "codes", "says"),
    [
        ("os._exit(9)", [1, 9], "process 0: another process, or the network to it, is gone: no sign of life from"),
        ("1 / 0", [1, 1], "ZeroDivisionError: division by zero"),
        ("open('nowhere/file')", [1, 1], "FileNotFoundError"),  # an OSError, but no full disk
        ("sys.exit(0)", [2, 2], "something in the run called sys.exit(0) before its end"),
        ("import time; time.sleep(6)", [0, 0], "went on"),  # longer than the timeout: it works, and is waited for
    ],
)
def test_what_becomes_of_the_others(what, codes, says, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(what=what))
    ended = run_processes(tmp_path / "driver", [{}, {}], seconds=60)
    assert [code for code, _ in ended] == codes, ended
    # a mistake is said by the process that made it; anything else also by the first one, which has heard of it
    said = ended[1][1] if codes[1] == 2 else ended[0][1]
    assert says in said and "Traceback" not in ended[0][1], ended


@pytest.mark.parametrize("ranks", [[0], [0, 1], [1]])
def test_a_signal_that_a_library_swallows_comes_again_and_ends_all(ranks, tmp_path):
    """datasets hashes functions under a bare `except`."""
    what = "import contextlib, signal, time\n        with contextlib.suppress(BaseException):\n            "
    what += "signal.raise_signal(signal.SIGTERM)\n        time.sleep(20)"
    driver = DRIVER.replace("rank() == 1", f"rank() == {ranks[-1]}").format(what=what)
    (tmp_path / "driver.py").write_text(driver)
    ended = run_processes(tmp_path / "driver", [{} for _ in range(max(ranks) + 1)], seconds=60)
    assert {code for code, _ in ended} == {85}, ended
    assert "stopped by SIGTERM" in ended[0][1] and "Traceback" not in ended[0][1], ended


def test_a_mistake_of_one_process_ends_all_in_one_line(base, data, tmp_path):
    good = {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path / "out", "use_cpu": True}
    for bad in ({"learning_rate": -1}, {"dataset_names": tmp_path / "nowhere.jsonl"}, {"learning_rate": 1e-3}):
        for flags in ([good, {**good, **bad}], [{**good, **bad}, good]):
            ended = run_processes("sft_training", flags, seconds=60)
            assert [code for code, _ in ended] == [2, 2], ended
            said = "".join(text for _, text in ended)
            assert said.count("error:") == 1 and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()
