"""Evaluations whose outcome is known beforehand, and their mishaps: `pytest tests/test_evaluate_model.py`."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import evaluate_model
from prepare_data import load_datasets
from rlhf.evaluation import answers as evaluation_answers
from rlhf.evaluation.answers import Answer, Contestant, answer_line, read, stored_answers, token_kl
from rlhf.user_error import UserError
from tests.conftest import ROOT, make_tokenizer, run_script

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A random model whose tokenizer knows fewer words."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = make_tokenizer(folder, vocab_size=270)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=1,
                        bos_token_id=0, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Judges with known preferences."""
    path = tmp_path_factory.mktemp("judges") / "judges.py"
    path.write_text(
        "def letters(prompts, completions, **columns):\n    return [len(c[0]['content']) for c in completions]\n"
        "def indifferent(prompts, completions, **columns):\n    return [7] * len(completions)\n"
        "def broken(prompts, completions, **columns):\n    return [float('nan')] * len(completions)\n"
    )
    return str(path)


def evaluate(folder, **flags):
    """(report.json, samples.csv) of a run in this process."""
    flags = {"response_length": 8, "output_dir": folder, **flags}
    evaluate_model.main(evaluate_model.make_parser().parse_args([f"--{key}={value}" for key, value in flags.items()]))
    with (folder / "samples.csv").open(newline="") as file:  # a text like a formula has an apostrophe before
        rows = [{k: re.sub(r"^'(?=[=+\-@\t\r])", "", v) for k, v in row.items()} for row in csv.DictReader(file)]
    return json.loads((folder / "report.json").read_text()), rows


def figures(report, label):
    return next(iter(report["groups"].values()))[label]


def test_a_model_against_itself_wins_half_at_a_kl_of_0(base, data, judges, tmp_path):
    judge = f"{judges}:letters"
    report, samples = evaluate(
        tmp_path, model_name_or_path=base, baseline=base, reward_model_name_or_path=judge, eval_dataset_names=data
    )
    found = figures(report, "base")
    wins = found["judged"]["letters"]["against_baseline"]
    assert (wins["mean"], wins["low"], wins["high"], wins["ties"]) == (0.5, 0.5, 0.5, len(samples))
    assert found["kl"]["mean"] == found["kl"]["high"] == 0 and found["kl_by"] == "tokens"


def test_a_known_preference_gives_the_rates_counted_by_hand_across_tokenizers(
    base, other, data, judges, tmp_path, capsys
):
    judge = f"{judges}:letters,{judges}:indifferent"
    flags = {"baseline": other, "reward_model_name_or_path": judge, "eval_dataset_names": data}
    report, samples = evaluate(tmp_path, model_name_or_path=base, **flags)
    found = figures(report, "base")
    for rival, key in (("other", "against_baseline"), ("reference", "against_data")):
        won = [(len(row["base"]) > len(row[rival])) + (len(row["base"]) == len(row[rival])) / 2 for row in samples]
        assert found["judged"]["letters"][key]["mean"] == pytest.approx(sum(won) / len(won))
        assert found["judged"]["indifferent"][key]["mean"] == 0.5
    lengths = [len(row["base"]) for row in samples]
    assert found["judged"]["letters"]["score"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert all(int(float(row["base letters"])) == len(row["base"]) for row in samples)
    assert found["kl_by"] == "text" and math.isfinite(found["kl"]["mean"])
    assert figures(report, "data")["judged"]["letters"]["against_data"]["mean"] == 0.5
    printed = capsys.readouterr().out
    assert "nan" not in printed.lower() and "by the text's log-ratio" in printed
    table = printed[printed.index("by letters") : printed.index("report: ")].splitlines()
    assert max(map(len, table)) <= 80, max(table, key=len)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "| base |" in (tmp_path / "report.md").read_text()


def random_policy(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1, initializer_range=0.6)
    tokenizer = SimpleNamespace(pad_token_id=3, eos_token_id=0)
    return SimpleNamespace(policy=GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_is_that_of_all_answers_that_there_are(temperature):
    """Every answer of up to three tokens of a vocabulary of four, 0 being the stop."""
    ours, theirs, prompt = random_policy(0), random_policy(1), [1, 2]
    answers = [[*start, 0] for n in range(3) for start in product((1, 2, 3), repeat=n)]
    answers += [list(whole) for whole in product((1, 2, 3), repeat=3)]
    prompts, lengths = [prompt] * len(answers), [len(answer) for answer in answers]
    p, states = read(ours, prompts, answers, temperature)
    q, their_states = read(theirs, prompts, answers, temperature)
    assert sum(map(math.exp, p)) == pytest.approx(1, abs=1e-5)
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    found = token_kl(ours, theirs, states, their_states, lengths, temperature)
    assert exact > 0.1
    assert sum(math.exp(a) * kl for a, kl in zip(p, found, strict=True)) == pytest.approx(exact, rel=1e-4)
    assert token_kl(ours, ours, states, states, lengths, temperature) == [0] * len(answers)


def test_equal_sizes_are_no_equal_tokens(base):
    ours, theirs = (Contestant(base, "base", 8, None) for _ in range(2))
    assert evaluation_answers.same_tokens(ours, theirs)
    swapped = ours.tokenizer.get_vocab() | {"a": ours.tokenizer.get_vocab()["b"], "b": ours.tokenizer.get_vocab()["a"]}
    theirs.tokenizer.get_vocab = lambda: swapped
    assert not evaluation_answers.same_tokens(ours, theirs)


def test_perplexities_are_those_of_the_logits(base, data, tmp_path):
    report, samples = evaluate(tmp_path, model_name_or_path=base, eval_dataset_names=f"{data}#5")
    model = Contestant(base, "base", 8, None)
    loss, tokens = 0.0, 0
    for row in samples:
        text = f"### Human: {row['prompt']}\n### Assistant: {row['reference']}<|endoftext|>"
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        start = len(model.tokenizer(f"### Human: {row['prompt']}\n### Assistant:")["input_ids"])
        with torch.no_grad():
            loss += model.policy(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).sum()
        tokens += ids.shape[1] - start
    found = figures(report, "base")
    assert found["reference_perplexity"] == pytest.approx(math.exp(-loss / tokens), rel=1e-4)
    assert found["kl"] is None and found["judged"] == {}


@pytest.mark.parametrize(
    "damage",
    [lambda line: line[:-20], lambda line: line.replace("Gull", "Bull"), lambda line: '{"x": 1}', lambda line: "[]"],
)
def test_kept_answers_that_are_not_as_they_were_written_are_cut_out_and_said(damage, tmp_path, capsys):
    made = {("a", i): Answer([1, i], f"Gull {i}.", True) for i in range(3)}
    lines = [answer_line(*item).strip() for item in made.items()]
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(f"{line}\n" for line in (lines[0], damage(lines[1]), lines[2])))
    del made["a", 1]
    assert stored_answers(path) == made and "1 kept answers are cut short or damaged" in capsys.readouterr().out
    assert stored_answers(path) == made and capsys.readouterr().out == ""


def test_the_best_of_several_is_what_the_judge_likes_and_makes_pairs_to_train_on(base, data, judges, tmp_path):
    flags = {"reward_model_name_or_path": f"{judges}:letters,{judges}:indifferent", "eval_dataset_names": data}
    report, samples = evaluate(tmp_path, model_name_or_path=base, best_of=4, **flags)
    (answers,) = (tmp_path / "answers").glob("base_*.jsonl")
    by_prompt = {}
    for (prompt, _), made in stored_answers(answers).items():
        by_prompt.setdefault(prompt, []).append(len(made.text))
    assert all(len(lengths) == 4 for lengths in by_prompt.values())
    curve = report["best_of"]["base"]["curve"]["letters"]
    assert curve["4"] == pytest.approx(sum(map(max, by_prompt.values())) / len(by_prompt))
    assert sum(len(row["base best of 4"]) for row in samples) == pytest.approx(curve["4"] * len(samples))
    assert sum(len(row["base"]) for row in samples) == pytest.approx(curve["1"] * len(samples))
    assert curve["1"] < curve["2"] < curve["4"]
    assert report["best_of"]["base"]["gain"]["letters"]["mean"] == pytest.approx(curve["4"] - curve["1"])
    assert report["best_of"]["base"]["gain"]["indifferent"] | {"rows": 0} == {
        "mean": 0,
        "low": 0,
        "high": 0,
        "rows": 0,
    }
    pairs = str(tmp_path / "pairs_base.jsonl")
    train, _, _ = load_datasets(pairs, "preference", validation_split_percentage=0)
    assert len(train) > 20
    assert all(len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in train)


def test_people_judge_beside_the_reward_models(base, other, data, judges, tmp_path, capsys):
    flags = {"model_name_or_path": base, "baseline": other, "eval_dataset_names": f"{data}#12"}
    flags["reward_model_name_or_path"] = f"{judges}:letters,{judges}:indifferent"
    _, samples = evaluate(tmp_path, **flags)
    lines = []
    for i, row in enumerate(samples):  # ann likes what is longer, bob too, but for one answer
        sides = ("base", "other") if i % 2 else ("other", "base")
        left, right = (row[side] for side in sides)
        line = {"prompt": [{"role": "user", "content": row["prompt"]}], "left": left, "right": right}
        line |= {"left_model": sides[0], "right_model": sides[1]}
        lines.append(
            line | {"vote": "tie" if len(left) == len(right) else "left" if len(left) > len(right) else "right"}
        )
    decided = [i for i, line in enumerate(lines) if line["vote"] != "tie"]
    bobs = [line | {"vote": "both bad"} if i == decided[0] else line for i, line in enumerate(lines)]
    for name, votes in (("ann", lines), ("bob", bobs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    capsys.readouterr()
    report, _ = evaluate(tmp_path, votes=f"{tmp_path}/ann.jsonl, {tmp_path}/bob.jsonl", **flags)
    people, judged = report["people"], figures(report, "base")["judged"]["letters"]["against_baseline"]
    assert people["judges"]["letters"]["accuracy"]["mean"] == people["judges"]["letters"]["kappa"] == 1
    assert people["judges"]["indifferent"]["accuracy"]["mean"] == 0.5
    ours = judged["mean"] * 12 + people["wins"]["base"]["against_baseline"]["mean"] * 24
    lost = len(samples[decided[0]]["base"]) > len(samples[decided[0]]["other"])
    assert ours == pytest.approx(judged["mean"] * 36 + (-0.5 if lost else 0.5))
    assert people["other_answers"] == 0
    (both,) = people["people"]
    assert (both["first"], both["second"], both["pairs"]) == ("ann", "bob", 12)
    assert both["same"]["mean"] == pytest.approx(11 / 12) and 0 < both["kappa"] < 1
    printed = capsys.readouterr().out
    for title in ("by human", "judges beside human", "people beside each other"):
        assert f"{title}:" in printed and f"**{title}**" in (tmp_path / "report.md").read_text()
        assert f"<caption>{title}</caption>" in (tmp_path / "report.html").read_text()
    table = printed[printed.index("by human") : printed.index("report: ")].splitlines()
    assert max(map(len, table)) <= 80, max(table, key=len)
    assert "Wilson's 95% intervals" in printed and "report.html" in printed
    # of reward models alone: how far people agree with them
    del flags["model_name_or_path"], flags["baseline"]
    report, _ = evaluate(tmp_path / "reward", votes=tmp_path / "ann.jsonl", **flags)
    assert report["people"]["judges"]["letters"]["accuracy"]["mean"] == 1
    assert report["people"]["other_answers"] == 12  # it is not on these models
    assert "<caption>judges beside human</caption>" in (tmp_path / "reward" / "report.html").read_text()


@pytest.fixture
def stops(monkeypatch):
    """Lets Ctrl-C come in the second batch; afterwards counts the answers that are made."""
    sample, made = Contestant.sample, []

    def interrupted(self, prompts, noise, temperature):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(len(prompts))
        return sample(self, prompts, noise, temperature)

    monkeypatch.setattr(Contestant, "sample", interrupted)
    return made


def test_an_interrupted_evaluation_goes_on_where_it_was(base, data, tmp_path, stops):
    flags = {"model_name_or_path": base, "eval_dataset_names": data, "per_device_eval_batch_size": 20}
    with pytest.raises(KeyboardInterrupt, match=r"20 of 48 answers of base are in .*jsonl"):
        evaluate(tmp_path / "stopped", **flags)
    (stored,) = (tmp_path / "stopped" / "answers").iterdir()
    stored.write_bytes(stored.read_bytes() + b'{"prompt": "12ab')  # as if killed within a line
    stops.append(0)
    _, again = evaluate(tmp_path / "stopped", **flags)
    assert sum(stops) == 48
    assert again == evaluate(tmp_path / "whole", **flags)[1]
    stops.clear()
    stops += [0, 0]
    evaluate(tmp_path / "stopped", **flags)
    assert sum(stops) == 0  # all are there
    evaluate(tmp_path / "stopped", **flags, seed=1)
    assert sum(stops) == 48  # other settings, other answers
    evaluate(tmp_path / "stopped", **flags | {"eval_dataset_names": f"{data}#10"})
    assert sum(stops) == 48  # fewer prompts of the same


def test_ctrl_c_says_what_there_is(base, data, tmp_path):
    command = [sys.executable, ROOT / "evaluate_model.py", f"--model_name_or_path={base}", f"--output_dir={tmp_path}"]
    command += [f"--eval_dataset_names={data}", "--per_device_eval_batch_size=1", "--response_length=100"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit it ignored
    )
    deadline = time.time() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("answers/*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    says = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in says, says
    assert "stopped: " in says and "answers of base are in" in says and "the same command goes on" in says


def test_empty_answers_are_counted_and_leave_no_nan(base, data, judges, tmp_path, monkeypatch, capsys):
    silent = Answer([0], "", True)
    monkeypatch.setattr(Contestant, "sample", lambda self, prompts, *_: [silent] * len(prompts))
    flags = {"baseline": base, "reward_model_name_or_path": f"{judges}:letters", "eval_dataset_names": data}
    report, _ = evaluate(tmp_path, model_name_or_path=base, **flags)
    found = figures(report, "base")
    assert (found["empty"], found["rouge_avg"], found["distinct_1"], found["words"]) == (48, 0, None, 0)
    assert "empty answers: base 48" in capsys.readouterr().out
    assert "nan" not in (tmp_path / "report.md").read_text().lower()


def test_a_reward_model_of_another_family_judges_the_text(base, other, data, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(other)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=256, num_labels=1, pad_token_id=0)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    flags = {"reward_model_name_or_path": tmp_path / "judge", "eval_dataset_names": data}
    report, _ = evaluate(tmp_path / "report", model_name_or_path=base, baseline=other, **flags)
    assert figures(report, "base")["judged"]["judge"]["score"]["rows"] == 48
    wins = figures(report, "base")["judged"]["judge"]["against_baseline"]
    assert wins["wins"] + wins["losses"] > 40


def test_answers_too_long_for_the_judge_are_left_out_and_said(base, tmp_path, capsys):
    GPT2ForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "judge")
    make_tokenizer(tmp_path / "judge")
    answers = ["Down the hill.", "Past the bakery.", "and on " * 200]
    rows = [{"prompt": f"Where to, {i}?", "chosen": answers[i % 3], "rejected": "No."} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"reward_model_name_or_path": tmp_path / "judge", "eval_dataset_names": tmp_path / "pairs.jsonl"}
    report, samples = evaluate(tmp_path / "pairs", **flags)
    assert report["left_out"] == 3 and len(samples) == 6
    assert "too long for a judge: 3" in capsys.readouterr().out
    report, samples = evaluate(tmp_path / "models", model_name_or_path=base, **flags)
    assert figures(report, "base")["judged"]["judge"]["against_data"]["rows"] == 6
    assert sum(row["reference judge"] == "" for row in samples) == 3
    assert "of the data's answers judge could read 6 to their end" in capsys.readouterr().out


def test_prompts_without_answers_are_evaluated_without_them(base, judges, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Where is {i}?"}}\n' for i in range(6)))
    flags = {"baseline": base, "reward_model_name_or_path": f"{judges}:letters", "temperature": 0}
    names = {"model_name_or_path": base, "eval_dataset_names": tmp_path / "prompts.jsonl"}
    report, samples = evaluate(tmp_path / "report", **flags, **names)
    assert list(next(iter(report["groups"].values()))) == ["base"] and len(samples) == 6
    printed = capsys.readouterr().out
    assert "ROUGE" not in printed and "against data" not in printed and "KL along greedy answers" in printed


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    """Four replies to each of ten prompts: longer is better, but for two that are tied."""
    path = tmp_path_factory.mktemp("data") / "rankings.jsonl"
    replies = ["the best one of all of them", "a good reply", "a fine reply", "no"]
    rows = [{"prompt": f"Question {i}?", "responses": replies, "ranks": [0, 1, 1, 2]} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_reward_model_that_is_right_and_one_that_has_no_opinion(rankings, judges, tmp_path, capsys):
    judge = f"{judges}:letters,{judges}:indifferent"
    report, samples = evaluate(tmp_path, reward_model_name_or_path=judge, eval_dataset_names=rankings)
    right, none = (report["reward_models"][name]["rankings"] for name in ("letters", "indifferent"))
    assert len(samples) == 50 and right["accuracy"]["mean"] == 1 and none["accuracy"]["mean"] == 0.5
    assert (
        right["ranked_sets"] == 10 and right["kendall"] == pytest.approx(1) and right["spearman"] == pytest.approx(1)
    )
    assert none["kendall"] is None and none["length_correlation"] is None
    assert right["length_correlation"] > 0.9 and right["longer_scored_higher"] == 1
    lengths = [len(row[side]) for row in samples for side in ("chosen", "rejected")]
    statistics = json.loads((tmp_path / "score_statistics.json").read_text())
    assert statistics["mean"] == pytest.approx(sum(lengths) / len(lengths)) and statistics["rows"] == 100
    assert statistics["std"] == pytest.approx(torch.tensor(lengths).double().std(correction=0).item())
    printed = capsys.readouterr().out
    assert "nan" not in printed.lower() and "order within ranked sets" in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "nothing to evaluate"),
        ({"model_name_or_path": "m"}, "--dataset_names is missing"),
        ({"model_name_or_path": "m", "dataset_names": "demo", "best_of": 2}, "--best_of needs"),
        ({"baseline": "m", "reward_model_name_or_path": "r", "dataset_names": "demo"}, "--baseline needs"),
        ({"model_name_or_path": "m", "dataset_names": "demo", "top_p": 0}, "--top_p 0 leaves no token"),
        ({"model_name_or_path": "m", "dataset_names": "demo", "top_k": 5, "temperature": "0,1"}, "do nothing"),
        ({"model_name_or_path": "./nowhere", "dataset_names": "demo"}, "./nowhere"),
        ({"model_name_or_path": "m", "dataset_names": "demo", "votes": "none.jsonl"}, "--votes none.jsonl"),
        ({"model_name_or_path": "BASE", "eval_dataset_names": "DATA", "votes": "DATA"}, "a vote without 'left'"),
        ({"model_name_or_path": "BASE", "eval_dataset_names": "DATA", "response_length": 125}, "no room for a prompt"),
        ({"model_name_or_path": "BASE", "dataset_names": "DATA", "validation_split_percentage": 0.01}, "is held out"),
        ({"model_name_or_path": "BASE", "eval_dataset_names": "DATA", "reward_model_name_or_path": "JUDGES:broken"},
         "returned nan"),
        ({"model_name_or_path": "BASE", "eval_dataset_names": "DATA", "reward_model_name_or_path": "BASE"},
         "a reward model has one"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_to_type(flags, says, base, data, judges, tmp_path):
    for name, value in (("BASE", base), ("DATA", data), ("JUDGES", judges)):
        flags = {key: str(flag).replace(name, value) for key, flag in flags.items()}
    with pytest.raises(UserError) as error:
        evaluate(tmp_path / "out", **flags)
    assert says in str(error.value) and 1 <= len(str(error.value).splitlines()) <= 3, error.value
    assert not (tmp_path / "out" / "report.json").exists()


def test_prompts_that_a_model_cannot_read_are_left_out_of_the_comparison(base, other, data, tmp_path, monkeypatch):
    prompt_ids = Contestant.prompt_ids
    shutil.copytree(base, tmp_path / "twin")  # of the same tokens: its KL is by the prompt's own

    def forgetful(self, prompt):
        return None if self.name != base and "number 7" in prompt[0]["content"] else prompt_ids(self, prompt)

    monkeypatch.setattr(Contestant, "prompt_ids", forgetful)
    for baseline in (str(tmp_path / "twin"), other):
        flags = {"model_name_or_path": base, "eval_dataset_names": data, "baseline": baseline}
        report, samples = evaluate(tmp_path / "report", **flags)
        assert len(samples) == 47 and "1 prompts left out" in report["data"]["notes"][0]
    monkeypatch.setattr(Contestant, "prompt_ids", lambda self, prompt: None)
    with pytest.raises(UserError, match="no prompt fits"):
        evaluate(tmp_path / "none", **flags)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir"):
        evaluate(tmp_path / "file", **flags)


def test_a_reward_model_with_a_head_of_its_own_is_read_at_the_end_of_the_answer(base, data, tmp_path):
    """Against transformers' own classifier, a row at a time."""
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    model.save_pretrained(tmp_path / "judge")
    tokenizer = Contestant(base, "base", 8, None).tokenizer
    tokenizer.save_pretrained(tmp_path / "judge")
    report, samples = evaluate(
        tmp_path / "report", reward_model_name_or_path=tmp_path / "judge", eval_dataset_names=data
    )
    for row in samples[:5]:
        ids = tokenizer(f"### Human: {row['prompt']}\n### Assistant: {row['chosen']}<|endoftext|>")["input_ids"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert float(row["chosen judge"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not (SHARED / "models/stories260K").exists(), reason="the real model is not here")
def test_a_real_model_on_real_dialogues(tmp_path, judges):
    report, samples = evaluate(
        tmp_path,
        model_name_or_path=SHARED / "models/stories260K",
        reward_model_name_or_path=f"{judges}:letters",
        eval_dataset_names=f"{SHARED / 'data/hh_helpful_online/test.jsonl.gz'}#8",
        response_length=16,
    )
    found = figures(report, "stories260K")
    assert len(samples) == 8 and 10 < found["reference_perplexity"] < 200


def test_a_reward_model_whose_score_is_no_number_is_refused():
    def broken(prompts, completions, ended, columns):
        return torch.tensor([float("nan")] * len(prompts))

    with pytest.raises(UserError, match="broken gives nan to the answer 'Yes.'"):
        evaluation_answers.judge(
            broken, "broken", [[{"role": "user", "content": "?"}]], [Answer([], "Yes.", True)], {}, 1
        )


def test_an_answer_whose_end_a_judge_cuts_off_has_no_score():
    cutting = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=0),
        encode=lambda prompt, text, ended: [*range(1, len(text) + 1), *[0] * ended][:4],
        score_tokens=lambda rows: torch.tensor([float(len(row)) for row in rows]),
    )
    prompts = [[{"role": "user", "content": "?"}]] * 3
    answers = [Answer([], "abc", True), Answer([], "abcdef", True), Answer([], "abcdef", False)]
    assert evaluation_answers.judge(cutting, "cutting", prompts, answers, {}, 2) == [4, None, 4]


def test_answers_are_drawn_by_seed_prompt_and_sample_alone():
    noise = evaluation_answers.noise_for
    assert torch.equal(noise(1, "ab", 0, 5), noise(1, "ab", 0, 9)[:5])
    assert not torch.equal(noise(1, "ab", 0, 5), noise(1, "ab", 1, 5))
    assert not torch.equal(noise(1, "ab", 0, 5), noise(2, "ab", 0, 5))


def test_labels_are_short_where_that_tells_models_apart():
    names = ["saved/a/sft", "saved/b/sft", "owner/model", "x.py:gold", "my/data"]
    assert list(evaluate_model.labels_of(names)) == ["saved/a/sft", "saved/b/sft", "model", "gold", "my/data"]


def test_the_pages_way_to_ask_an_adapter_answers_as_it_was_trained(base, data, tmp_path, capsys):
    folder = run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path / "sft")
    page = (ROOT / "docs" / "merging.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "pipeline" in block]
    capsys.readouterr()
    code = code.replace("saved/gpt2_medium_ufb_dpo", str(folder)).replace("Name two herbs.", "Who mends nets?")
    exec(code.replace('"Who mends nets?"}]', '"Who mends nets?"}], max_new_tokens=8, do_sample=False'), {})
    said = capsys.readouterr().out.strip()
    model = Contestant(str(folder), "sft", 8, None)
    prompt = model.prompt_ids([{"role": "user", "content": "Who mends nets?"}])
    assert said == model.sample([prompt], torch.zeros(1, 8), 0)[0].text


def test_a_grid_gives_a_column_for_each_model_and_setting_and_draws_only_what_is_new(base, other, data, tmp_path):
    flags = {"model_name_or_path": base, "baseline": other, "eval_dataset_names": f"{data}#4"}
    _, plain = evaluate(tmp_path, **flags)
    kept = set((tmp_path / "answers").iterdir())
    report, samples = evaluate(tmp_path, **flags, top_p="1,0.5")
    assert report["models"] == {"other p1.0": other, "base p1.0": base, "base p0.5": base}
    assert [row["base p1.0"] for row in samples] == [row["base"] for row in plain]
    assert [row["base p0.5"] for row in samples] != [row["base"] for row in plain]
    assert kept < set((tmp_path / "answers").iterdir()) and len(list((tmp_path / "answers").iterdir())) == 3
