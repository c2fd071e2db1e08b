"""What judges answers: a reward model, alone or as an adapter on the policy's own base, or a function in Python.

reward = load_reward("saved/reward")                  # hub id, model folder, adapter folder
reward = load_reward("my_rewards.py:short_answers")   # def short_answers(prompts, completions, **columns)
scores = reward(prompts, completions, ended, columns)
"""

import importlib.util
import inspect
import json
import math
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel

from rlhf.models.adapters import adapter_weights, base_revision
from rlhf.models.fingerprints import (
    configs_sha256,
    differing_tokens,
    sha256_of,
    tokenizer_sha256,
    weights_sha256,
)
from rlhf.models.loading import load_reward_model, load_tokenizer, max_positions, resolve_model, trained_head
from rlhf.models.rendering import encode_dialogue
from rlhf.models.rollout import plain, read_scores
from rlhf.models.shared_base import active_adapter, attach_adapter
from rlhf.models.templates import Unrenderable, shorten_prompt, token_ids
from rlhf.user_error import UserError

# In a reward model's folder: the mean and standard deviation of its scores of held-out answers.
STATISTICS = "score_statistics.json"
LARGEST = torch.finfo(torch.float32).max


class RewardModel:
    """Scores of a causal transformer with a scalar head, read at the last token.

    Attributes:
        tokenizer: the one it was trained with; text is rendered by its template.
        same_tokens: whether the policy's tokens can be scored as they are.
        mean, std: of its scores of held-out answers; None if its folder does not say.
    """

    def __init__(self, model, head, tokenizer, name: str, adapter: str | None = None, differs: list[str] = ()):
        self.model, self.head, self.tokenizer, self.name, self.adapter = model, head, tokenizer, name, adapter
        self.same_tokens = not differs
        self.max_length = max_positions(plain(model))
        self.mean, self.std = read_statistics(Path(name) / STATISTICS)

    def fingerprint(self) -> list[str]:
        """Hashes of all that decides its scores."""
        base, adapter = resolve_model(self.name)
        hashes = [
            part for name in (base, adapter) if name for part in (weights_sha256(name) or name, configs_sha256(name))
        ]
        return [*hashes, tokenizer_sha256(self.tokenizer), str(self.mean), str(self.std)]

    def score_tokens(self, rows: list[list[int]], batch_size: int = 64) -> torch.Tensor:
        """The score of each row of its own tokens, (rows,)."""
        with active_adapter(self.model, self.adapter) if self.adapter else nullcontext():
            return read_scores(self.model, self.head, rows, self.tokenizer.pad_token_id, batch_size)

    def __call__(self, prompts, completions, ended, columns=None) -> torch.Tensor:
        """The scores of answers given as text, (rows,).

        Args:
            prompts: lists of messages.
            completions: the answers' texts.
            ended: whether each answer ended by itself; one that did not has no EOS to be read.
        """
        try:
            return self.score_tokens([self.encode(*row) for row in zip(prompts, completions, ended, strict=True)])
        except Unrenderable as reason:
            raise UserError(f"the reward model {self.name} cannot read a prompt with its answer: {reason}") from reason

    def encode(self, prompt, completion: str, ended: bool) -> list[int]:
        """Tokens of prompt and answer, of which the prompt gives way where the model has too few positions."""
        prompt_ids, answer, _ = encode_dialogue(self.tokenizer, prompt, [{"role": "assistant", "content": completion}])
        answer = answer[: None if ended else -1][: self.max_length - min(len(prompt_ids), self.max_length // 2)]
        if len(prompt_ids) + len(answer) > self.max_length:
            prompt = shorten_prompt(self.tokenizer, prompt, self.max_length - len(answer))
            prompt_ids = token_ids(self.tokenizer, prompt, add_generation_prompt=True)
        return prompt_ids + answer


class RewardFunction:
    """A function of a Python file, called as TRL's GRPOTrainer calls its reward functions: `function(prompts=...,
    completions=..., **columns)`, with prompts and completions as lists of messages, gives one number an answer."""

    same_tokens, mean, std = False, None, None

    def __init__(self, name: str):
        path, _, function = name.rpartition(":")
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file, to take the reward function {function} from")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
        self.name, self.function = name, getattr(module, function, None)
        if not callable(self.function):
            known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
            raise UserError(f"{path} has no function {function}; it has {', '.join(known) or 'none'}")

    def fingerprint(self) -> list[str]:
        """The hash of its file: what that imports is the user's own to keep."""
        return [sha256_of(Path(self.name.rpartition(":")[0])), self.name.rpartition(":")[2]]

    def __call__(self, prompts, completions, ended, columns=None) -> torch.Tensor:
        """The function's scores, (rows,).

        Raises:
            UserError: naming prompt and answer, if the function raises or returns anything but finite numbers.
        """
        answers = [[{"role": "assistant", "content": text}] for text in completions]
        scores = self.call(prompts, answers, columns or {})
        if len(scores) != len(prompts):
            raise UserError(f"the reward function {self.name} gave {len(scores)} scores for {len(prompts)} answers")
        for prompt, text, value in zip(prompts, completions, scores, strict=True):
            if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
                raise self.complain(f"returned {value}", prompt, text)
        return torch.tensor(scores, dtype=torch.float32)

    def call(self, prompts, completions, columns) -> list:
        try:
            scores = self.function(prompts=prompts, completions=completions, **columns)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything: say where, for which answer
            for i in range(len(prompts) if len(prompts) > 1 else 0):
                one = slice(i, i + 1)
                self.call(prompts[one], completions[one], {key: values[one] for key, values in columns.items()})
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"raised {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
            if len(prompts) > 1:
                raise UserError(f"the reward function {self.name} {what}, but for no answer alone") from error
            raise self.complain(what, prompts[0], completions[0][0]["content"]) from error
        if isinstance(scores, dict) or not hasattr(scores, "__iter__"):
            raise UserError(
                f"the reward function {self.name} returned {type(scores).__name__}: not a number an answer"
            )
        return [value.item() if getattr(value, "shape", None) in ((), (1,)) else value for value in scores]

    def complain(self, what: str, prompt, text: str) -> UserError:
        return UserError(
            f"the reward function {self.name} {what}\n  prompt: {prompt[-1]['content'][:200]!r}\n"
            f"  answer: {text[:200]!r}"
        )


def read_statistics(path: Path) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a reward model's scores; None where they were not stored."""
    if not path.exists():
        return None, None
    try:
        statistics = json.loads(path.read_text())
        mean, std = float(statistics["mean"]), float(statistics["std"])
    except (OSError, ValueError, KeyError, TypeError):
        mean = std = math.nan
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise UserError(f"{path} holds no mean and deviation of scores: remove it, or bring back a whole copy")
    return mean, std


def store_statistics(scores: torch.Tensor, folder: str) -> None:
    """Write down mean and standard deviation of a reward model's scores, (rows,), in its folder."""
    statistics = {"mean": scores.mean().item(), "std": scores.std().item(), "rows": len(scores)}
    if not all(map(math.isfinite, statistics.values())):
        raise UserError(f"the reward model's scores have mean {statistics['mean']} and deviation {statistics['std']}")
    (Path(folder) / STATISTICS).write_text(json.dumps(statistics) + "\n")


def load_reward(name: str, tokenizer=None, model_args=None, policy=None):
    """A reward by name: a function `file.py:function`, or a reward model, frozen.

    Args:
        tokenizer: the policy's; a model that was trained with another gets the text instead of the tokens.
        policy: a PeftModel of `model_args.model_name_or_path`; a reward adapter on the same base joins it there.
    """
    if ".py:" in name:
        return RewardFunction(name)
    own = load_tokenizer(name)
    differs = differing_tokens(own, tokenizer) if tokenizer else []
    if differs:
        PartialState().print(f"{name} has another {' and '.join(differs)} than the policy: it is given the text")
    base, adapter = resolve_model(name)
    if adapter and isinstance(policy, PeftModel) and shares_base(adapter, base, model_args):
        head = trained_head(adapter)
        attach_adapter(policy, adapter, "reward")
        linear = torch.nn.Linear(head.shape[1], 1, bias=False, device=policy.device).requires_grad_(False)
        linear.weight.copy_(head)
        return RewardModel(policy, linear, own, name, adapter="reward", differs=differs)
    model = load_reward_model(name, own, model_args)
    return RewardModel(model, plain(model).score, own, name, differs=differs)


def shares_base(adapter: str, base: str, model_args) -> bool:
    """Whether a reward adapter is a LoRA, with nothing beside its head, on the very model that the policy has."""
    policy_base, policy_adapter = resolve_model(model_args.model_name_or_path)
    revision = base_revision(policy_adapter) if policy_adapter else model_args.model_revision
    return (
        Path(base).resolve() == Path(policy_base).resolve()
        and base_revision(adapter) == revision
        and all(".lora_" in key or ".score." in key for key in adapter_weights(adapter))
    )
