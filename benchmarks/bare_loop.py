"""The loop that stages.py measures beside the trainers: what a user would write who needs none of them.

PEFT, AdamW, the stage's loss as its paper has it; on rows padded to the longest of a batch, or laid end to end, where
attention is called row by row in a registered attention function and all else once a batch. Logits are computed of
all positions, as a model gives them. Dropout is the trainers': the model's and LoRA's in SFT, none of pairs.

It also computes the held-out loss of saved adapters, whoever trained them. stages.py makes its data and runs it:
nothing of this repository is imported here, so that none of its settings are in use.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peft
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
BETA = 0.1  # DPO's, as TRL has it


def row_by_row(module, query, key, value, attention_mask, scaling=None, dropout=0.0, lengths=None, **kwargs):
    """Attention of rows that lie end to end, for transformers' attention interface."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [scaled_dot_product_attention(*p, dropout_p=dropout, scale=scaling, is_causal=True) for p in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("row_by_row", row_by_row)


def load(folder: Path, stage: str, attention: str):
    """The base of a stage."""
    auto_class, more = transformers.AutoModelForCausalLM, {}
    if stage == "reward":
        auto_class, more = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    return auto_class.from_pretrained(folder / "base", attn_implementation=attention, **more)


class Batch:
    """Rows as (tokens of the prompt, of the chosen answer, of the rejected one): all chosen, then all rejected."""

    def __init__(self, rows: list, stage: str, padding: int | None):
        """Padded with that token, or end to end if it is None."""
        sequences = [(row[0], row[side]) for side in ((1,) if stage == "sft" else (1, 2)) for row in rows]
        self.lengths, self.padded = [len(prompt + answer) for prompt, answer in sequences], padding is not None
        ids = [torch.tensor(prompt + answer) for prompt, answer in sequences]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in sequences]
        if self.padded:
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            ids = pad_sequence(ids, batch_first=True, padding_value=padding)
            self.inputs = {"input_ids": ids, "attention_mask": mask}
            self.labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        else:
            positions = torch.cat([torch.arange(n) for n in self.lengths])
            self.inputs = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None], "lengths": self.lengths}
            self.labels = torch.cat(labels)[None]

    def mean_loss(self, model) -> torch.Tensor:
        logits = model(**self.inputs, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), self.labels[:, 1:].flatten())

    def log_probabilities(self, model) -> torch.Tensor:
        """Of each row's answer, (rows,)."""
        logits, labels = model(**self.inputs, use_cache=False).logits[:, :-1], self.labels[:, 1:]
        each = -cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        if self.padded:
            return each.sum(1)
        return torch.stack([row.sum() for row in pad(each[0], (1, 0)).split(self.lengths)])

    def scores(self, model) -> torch.Tensor:
        """Of each row's last token, (rows,)."""
        if self.padded:
            return model(**self.inputs, use_cache=False).logits[:, 0]
        net = model.get_base_model()
        hidden = net.transformer(**self.inputs, use_cache=False).last_hidden_state[0]
        return net.score(hidden[torch.tensor(self.lengths).cumsum(0) - 1])[:, 0]

    def loss(self, model, stage: str) -> torch.Tensor:
        if stage == "sft":
            return self.mean_loss(model)
        if stage == "reward":
            chosen, rejected = self.scores(model).chunk(2)
            return -logsigmoid(chosen - rejected).mean()
        with torch.no_grad(), model.disable_adapter():
            reference = self.log_probabilities(model)
        chosen, rejected = (self.log_probabilities(model) - reference).chunk(2)
        return -logsigmoid(BETA * (chosen - rejected)).mean()


def train(args) -> None:
    """Prints the first and the last loss and the seconds as a trainer would, and saves the adapter."""
    torch.manual_seed(args.seed)
    base = load(args.folder, args.stage, "sdpa" if args.what == "padded" else "row_by_row")
    padding = base.config.pad_token_id if args.what == "padded" else None
    lora = peft.LoraConfig(task_type="SEQ_CLS" if args.stage == "reward" else "CAUSAL_LM", **LORA)
    model = peft.get_peft_model(base, lora).train()
    for module in model.modules() if args.stage != "sft" else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    rows = json.loads((args.folder / "tokens.json").read_text())["train"]
    order = torch.randperm(len(rows)).tolist()
    start = time.perf_counter()
    for step in range(args.steps):
        picked = [rows[i] for i in order[step * args.batch : (step + 1) * args.batch]]
        loss = Batch(picked, args.stage, padding).loss(model, args.stage)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in (0, args.steps - 1):
            print({"loss": loss.item()}, flush=True)
    print({"train_runtime": time.perf_counter() - start})
    model.save_pretrained(args.out)


def held_out(args) -> None:
    """Prints the loss of each adapter on the held-out rows."""
    rows, losses = json.loads((args.folder / "tokens.json").read_text())["test"], []
    batches = [Batch(rows[i : i + args.batch], args.stage, None) for i in range(0, len(rows), args.batch)]
    for adapter in args.adapters:
        model = peft.PeftModel.from_pretrained(load(args.folder, args.stage, "row_by_row"), adapter).eval()
        with torch.no_grad():
            losses.append(statistics.mean(batch.loss(model, args.stage).item() for batch in batches))
    print(json.dumps(losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with base/ and tokens.json, as stages.py makes them")
    parser.add_argument("stage", choices=["sft", "reward", "dpo"])
    parser.add_argument("what", choices=["padded", "unpadded", "held_out"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out")
    parser.add_argument("--adapters", nargs="+")
    parsed = parser.parse_args()
    held_out(parsed) if parsed.what == "held_out" else train(parsed)
