"""Reward models of any base and tokenizer, reward functions, and what is said of broken ones."""

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.models.loading import load_reward_model, load_tokenizer
from rlhf.models.rendering import encode_preference
from rlhf.models.rewards import load_reward
from rlhf.user_error import UserError
from tests.conftest import make_tokenizer, run_script

PROMPTS = [[{"role": "user", "content": f"Who mends net {i}?"}] for i in range(3)]
ANSWERS = ["The three sisters.", "Nobody", "They sing while they work."]


@pytest.fixture(scope="module")
def other(tmp_path_factory, data):
    """A reward model with a tokenizer of its own: fewer tokens, other ids."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = make_tokenizer(folder / "base", vocab_size=270)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    flags = {"dataset_names": data, "model_name_or_path": str(folder / "base"), "max_length": 64}
    flags["max_bad_percentage"] = 100  # half of the rows are too long for so few tokens
    return run_script("reward_modeling", output_dir=str(folder / "reward"), **flags)


def test_text_is_scored_as_the_pairs_that_it_was_trained_on(saved):
    """The tokens of a prompt and an answer that ended are those of a training pair's chosen side."""
    reward = load_reward(saved["reward"])
    answers = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    pairs = zip(PROMPTS, answers, answers[1:] + answers[:1], strict=True)
    rows = [encode_preference({"prompt": p, "chosen": c, "rejected": r}, reward.tokenizer, 128) for p, c, r in pairs]
    ids = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    scores = reward(PROMPTS, ANSWERS, [True] * 3)
    torch.testing.assert_close(scores, reward.score_tokens(ids))
    model = load_reward_model(saved["reward"], reward.tokenizer)  # by transformers' own forward, a row at a time
    torch.testing.assert_close(scores, torch.cat([model(torch.tensor([row])).logits[:, 0] for row in ids]).detach())
    # one that did not end is read at its last token
    unfinished = reward.score_tokens([row[:-1] for row in ids])
    torch.testing.assert_close(reward(PROMPTS, ANSWERS, [False] * 3), unfinished)


def test_a_reward_model_with_another_tokenizer_gets_the_text(saved, other, data, tmp_path):
    tokenizer = load_tokenizer(saved["sft"])
    reward = load_reward(other, tokenizer)
    assert not reward.same_tokens and load_reward(saved["reward"], tokenizer).same_tokens
    flags = {"model_name_or_path": saved["sft"], "dataset_names": data, "response_length": 8}
    run_script("ppo_training", reward_model_name_or_path=other, output_dir=str(tmp_path / "ppo"), **flags)
    samples = sorted((tmp_path / "ppo" / "samples").iterdir())[-1]
    sample = json.loads(samples.read_text().splitlines()[0])
    assert isinstance(sample["score"], float)


def test_a_long_answer_is_read_as_far_as_the_reward_model_can(other):
    scores = load_reward(other)(PROMPTS, ["net " * n for n in (1, 40, 4000)], [True, True, False])
    assert scores.isfinite().all()


def test_statistics_are_of_the_held_out_answers_and_go_with_a_merge(saved, tmp_path):
    reward = load_reward(saved["reward"])
    assert reward.std > 0 and reward.mean is not None
    import merge_peft_adapter

    arguments = ["--adapter_model_name", saved["reward"], "--output_name", str(tmp_path / "merged")]
    merge_peft_adapter.main(merge_peft_adapter.make_parser().parse_args(arguments))
    merged = load_reward(str(tmp_path / "merged"))
    assert (merged.mean, merged.std) == (reward.mean, reward.std)
    torch.testing.assert_close(
        merged(PROMPTS, ANSWERS, [True] * 3), reward(PROMPTS, ANSWERS, [True] * 3), atol=1e-4, rtol=1e-4
    )


FUNCTIONS = """
import math
def raises(prompts, completions, **columns):
    return [1 / ("Nobody" not in completion[0]["content"]) for completion in completions]
def nan(prompts, completions, **columns):
    return [math.nan if "sing" in completion[0]["content"] else 0 for completion in completions]
def none(prompts, completions, **columns):
    return [None for completion in completions]
def few(prompts, completions, **columns):
    return [1.0]
def huge(prompts, completions, **columns):
    return [10**39 for completion in completions]
def pairs(prompts, completions, **columns):
    import torch
    return torch.zeros(3, 2)
def table(prompts, completions, **columns):
    return {i: 1.0 for i in range(3)}
def nothing(prompts, completions, **columns):
    pass
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"raised ZeroDivisionError: .* \(rewards.py:4\)\n  prompt: 'Who mends net 1\?'\n  answer: 'Nobody'",
        ),
        ("nan", r"returned nan\n  prompt: 'Who mends net 2\?'\n  answer: 'They sing while they work.'"),
        ("none", r"returned None\n  prompt: 'Who mends net 0\?'"),
        ("few", "gave 1 scores for 3 answers"),
        ("huge", "returned 10000"),
        ("pairs", r"returned tensor\(\[0., 0.\]\)\n  prompt: 'Who mends net 0"),
        ("table", "returned dict: not a number an answer"),
        ("nothing", "returned NoneType: not a number an answer"),
    ],
)
def test_a_broken_reward_function_is_named_with_prompt_and_answer(tmp_path, name, message):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path}/rewards.py:{name}")(PROMPTS, ANSWERS, [True] * 3)


def test_a_reward_function_that_is_not_there(tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    with pytest.raises(
        UserError, match="has no function missing; it has raises, nan, none, few, huge, pairs, table, nothing"
    ):
        load_reward(f"{tmp_path}/rewards.py:missing")
    with pytest.raises(UserError, match="no such file"):
        load_reward(f"{tmp_path}/nothing.py:missing")


@pytest.mark.parametrize("text", ["{", "[]", '{"mean": 0, "std": 0}', '{"mean": NaN, "std": 1}'])
def test_damaged_statistics_of_a_reward_model_are_named(saved, tmp_path, text):
    folder = shutil.copytree(saved["reward"], tmp_path / "reward")
    (folder / "score_statistics.json").write_text(text)
    with pytest.raises(UserError, match="score_statistics.json holds no mean and deviation"):
        load_reward(str(folder))
