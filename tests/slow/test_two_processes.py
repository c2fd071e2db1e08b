"""Two processes beside one over twenty steps of all trainers; one that is killed; disks of their own.

pytest tests/slow/test_two_processes.py
"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import run_processes, run_script
from tests.test_processes import SCRIPTS, metrics, without_dropout

ALL = SCRIPTS | {"ppo": "ppo_training"}


@pytest.fixture
def flags(request, base, saved, data, tmp_path):
    """Of a run of one stage without dropout, on so many rows."""
    stage, rows = request.param
    lines = Path(data).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:rows]))
    (tmp_path / "held.jsonl").write_text("".join(lines[-7:]))
    model = saved["sft"] if stage == "ppo" else without_dropout(base, tmp_path / "base")
    common = {
        "model_name_or_path": model,
        "dataset_names": tmp_path / "train.jsonl",
        "eval_dataset_names": tmp_path / "held.jsonl",
        "per_device_eval_batch_size": 3,
        "max_steps": 20,
        "use_cpu": True,
        "optim": "sgd",  # Adam's first steps are the gradients' signs, also of those that are 0 but for rounding
        "learning_rate": 0.05,
    }
    if stage == "ppo":
        return common | {"reward_model_name_or_path": saved["reward"], "response_length": 8, "max_steps": 5}
    return common | {"lora_dropout": 0}


def weights(folder):
    return {
        f"{path.name}:{name}": weight
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, weight in load_file(path).items()
    }


def furthest(folder, other) -> float:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys() and ours
    return max((ours[name] - weight).abs().max().item() for name, weight in theirs.items())


def further_metric(folder, other) -> float:
    ours, theirs = metrics(folder), metrics(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    return max(
        abs(ours[i][key] - value) / max(1, abs(value)) for i, line in enumerate(theirs) for key, value in line.items()
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("flags", [(stage, rows) for stage in ALL for rows in (9, 11, 16)], indirect=True)
def test_twenty_steps(flags, full, base, tmp_path, request, capsys):
    script = ALL[request.node.callspec.params["flags"][0]]
    if full:
        if script == "ppo_training":
            flags["model_name_or_path"] = without_dropout(base, tmp_path / "base")
        flags = {k: v for k, v in flags.items() if k != "lora_dropout"} | {"use_peft": False, "learning_rate": 0.01}
    per_device = 2 if script == "ppo_training" else 1
    two = {**flags, "per_device_train_batch_size": 2 * per_device, "output_dir": tmp_path / "two"}
    ended = run_processes(script, [two, two])
    assert [code for code, _ in ended] == [0, 0], ended
    run_script(script, **{**flags, "output_dir": tmp_path / "one", "per_device_train_batch_size": 4 * per_device})
    apart, metric = furthest(tmp_path / "two", tmp_path / "one"), further_metric(tmp_path / "two", tmp_path / "one")
    with capsys.disabled():
        print(f"\n{script} {'full' if full else 'LoRA'}: weights {apart:.1e}, losses and metrics {metric:.1e}")
    assert apart < 1e-5 and metric < 1e-5


STRATEGIES = [(stage, "group_by_length") for stage in SCRIPTS] + [("sft", "batch_rebalance")]


@pytest.mark.parametrize(("flags", "strategy"), [((stage, 23), way) for stage, way in STRATEGIES], indirect=["flags"])
def test_other_orders_of_rows(flags, strategy, tmp_path, request):
    """Three epochs, in which each process would draw an order of its own."""
    script = ALL[request.node.callspec.params["flags"][0]]
    flags |= {"train_sampling_strategy": strategy, "max_steps": 9}
    two = {**flags, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    ended = run_processes(script, [two, two])
    assert [code for code, _ in ended] == [0, 0], ended
    run_script(script, **{**flags, "output_dir": tmp_path / "one", "per_device_train_batch_size": 8})
    assert furthest(tmp_path / "two", tmp_path / "one") < 1e-5
    assert further_metric(tmp_path / "two", tmp_path / "one") < 1e-5


@pytest.mark.parametrize("flags", [(stage, 11) for stage in ALL], indirect=True)
def test_one_of_two_is_killed(flags, tmp_path, request, capsys):
    script = ALL[request.node.callspec.params["flags"][0]]
    flags |= {"save_steps": 2, "per_device_train_batch_size": 2, "max_steps": 8, "ddp_timeout": 20}
    whole = {**flags, "output_dir": tmp_path / "whole"}
    assert [code for code, _ in run_processes(script, [whole, whole])] == [0, 0]
    killed = {**flags, "output_dir": tmp_path / "killed"}
    first = next(iter(sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:])))).name
    ended = run_processes(script, [killed, killed], kill_after=tmp_path / "killed" / first / "manifest.json")
    assert ended[1][0] == -9 and ended[0][0] == 1, ended
    assert "is gone" in ended[0][1] and "Traceback" not in ended[0][1], ended[0][1]
    assert not (tmp_path / "killed" / "run.json").exists()
    for count in ("two", "one", "other"):
        shutil.copytree(tmp_path / "killed", tmp_path / count)
    two = {**flags, "output_dir": tmp_path / "two"}
    ended = run_processes(script, [two, two])
    assert [code for code, _ in ended] == [0, 0] and "continuing from" in ended[0][1], ended
    one = {**flags, "output_dir": tmp_path / "one", "per_device_train_batch_size": 4}
    ended = run_processes(script, [one])
    assert ended[0][0] == 0 and "number of processes: 2, and now 1" in ended[0][1], ended
    other = {**flags, "output_dir": tmp_path / "other"}
    ended = run_processes(script, [other])
    assert ended[0][0] == 2 and "rows a step" in ended[0][1] and "Traceback" not in ended[0][1], ended
    apart = furthest(tmp_path / "two", tmp_path / "whole"), furthest(tmp_path / "one", tmp_path / "whole")
    with capsys.disabled():
        print(f"\n{script}: resumed by two {apart[0]:.1e} off, by one {apart[1]:.1e}")
    assert apart[0] == 0 and apart[1] < 1e-6
    assert further_metric(tmp_path / "two", tmp_path / "whole") == 0


@pytest.mark.parametrize("flags", [("sft", 11)], indirect=True)
def test_disks_of_their_own(flags, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    flags |= {"save_steps": 2, "max_steps": 8, "output_dir": "run", "per_device_train_batch_size": 2}
    ended = run_processes("sft_training", [flags, flags], folders=places)
    assert [code for code, _ in ended] == [2, 2] and "is not the same folder on" in ended[0][1], ended
    shutil.rmtree(places[0] / "run")
    kill = places[0] / "run" / "checkpoint-4" / "manifest.json"
    run_processes("sft_training", [flags, flags], folders=[places[0]] * 2, kill_after=kill)
    shutil.copytree(places[0] / "run", places[1] / "run")
    shutil.rmtree(places[1] / "run" / "checkpoint-4")
    ended = run_processes("sft_training", [flags, flags], folders=places)
    assert [code for code, _ in ended] == [2, 2], ended
    said = "".join(text for _, text in ended)
    assert "differs from the first" in said and "checkpoint-4" in said and "Traceback" not in said, said
