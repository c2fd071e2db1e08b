"""Merge a LoRA adapter into its base: a plain model folder that any library loads, proven equal before it is kept.

    python merge_peft_adapter.py --base_model_name=gpt2-medium --adapter_model_name=saved/gpt2_medium_ufb_dpo --output_name=saved/gpt2_medium_uc_ufb_merged
    python merge_peft_adapter.py --adapter_model_name=saved/gpt2_large_reward --output_name=saved/reward_merged --dtype=bfloat16
    python merge_peft_adapter.py --adapter_model_name=saved/a,saved/b --weights=0.5,0.5 --output_name=saved/a_and_b

Reads an adapter folder and the base that it names (`--base_model_name` may be left out, and is refused when it is another
one); a chain of adapters is merged from the base up. Writes the model, with a reward model's head, tokenizer, template and
generation config. The merge is done in float32 and cast last, in a hidden folder that is renamed when all is well.

Watch the last line: the largest difference between the logits of the merged folder and those of the adapter model.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from user_error import UserError

# Largest |logit difference| that a merge may show, as a share of the largest |logit|: rounding, not error.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def same_model(a: str, b: str) -> bool:
    """Whether two names are one model: the same name, the same folder, or folders with the same weights."""
    if a == b or Path(a).resolve() == Path(b).resolve():
        return True
    files = [sorted(Path(name).glob("*.safetensors")) for name in (a, b)]
    if not all(files) or len(files[0]) != len(files[1]):
        return False
    return all(x.read_bytes() == y.read_bytes() for x, y in zip(*files, strict=True))


def check_base(given: str | None, named: str, adapter: str) -> str:
    """The base to merge onto; the one that the adapter was trained on, whatever the user typed.

    Raises:
        UserError: if `--base_model_name` is another model.
    """
    from modeling import resolve_adapters

    if given is None:
        return named
    if resolve_adapters(given)[1]:
        raise UserError(f"--base_model_name {given} is an adapter itself: the base of {adapter} is {named}")
    if not same_model(given, named):
        raise UserError(
            f"--base_model_name {given} is not the base of {adapter}: it was trained on {named}\n"
            f"  leave --base_model_name out, or give {named}"
        )
    return given


def probe_logits(model):
    """Logits (or scores) on fixed token ids, in float32."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(32, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 32)
    ids = torch.randint(vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # a row at a time: a sequence classifier pools a batch by its pad token, which random ids may hold
        return torch.cat([model(input_ids=row[None]).logits.float() for row in ids])


def load_merged(base: str, adapters: list[str], weights: list[float] | None, tokenizer):
    """The base with its adapters merged, in float32, and the logits of the adapter model before its last merge.

    Args:
        adapters: from the base up, merged one after another; with `weights`, side by side as one weighted sum.
    """
    from modeling import explain_load, set_special_tokens

    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    is_reward = PeftConfig.from_pretrained(adapters[-1]).task_type == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    with explain_load(base):
        model = auto_class.from_pretrained(base, dtype=torch.float32, **({"num_labels": 1} if is_reward else {}))
    if getattr(model.config, "quantization_config", None):
        raise UserError(f"{base} is stored quantised: give the full-precision model with --base_model_name")
    set_special_tokens(model, tokenizer)
    for i, adapter in enumerate(adapters):
        with explain_load(adapter):
            if not weights:
                resize_for(model, adapter)
                model = PeftModel.from_pretrained(model, adapter)
            elif i == 0:
                model = PeftModel.from_pretrained(model, adapter, adapter_name="0")
            else:
                model.load_adapter(adapter, str(i))
        if not weights:
            expected = probe_logits(model.eval())
            model = model.merge_and_unload(safe_merge=True)
    if weights:
        # "cat" is the exact weighted sum of the adapters' updates, whatever their ranks
        model.add_weighted_adapter([str(i) for i in range(len(adapters))], weights, "sum", combination_type="cat")
        model.set_adapter("sum")
        expected = probe_logits(model.eval())
        model = model.merge_and_unload(safe_merge=True, adapter_names=["sum"])
    text_config, output = model.config.get_text_config(), model.get_output_embeddings()
    if output is not None and text_config.tie_word_embeddings:  # an adapter may have trained one of the two alone
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = torch.equal(
            output.weight, model.get_input_embeddings().weight
        )
    return model, expected


def resize_for(model, adapter: str) -> None:
    """Give the base as many embedding rows as the adapter was trained with, where it carries whole embeddings."""
    from peft.utils import load_peft_weights

    ends = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")
    rows = {w.shape[0] for name, w in load_peft_weights(adapter, device="cpu").items() if name.endswith(ends)}
    if len(rows) > 1:
        raise UserError(f"{adapter} holds embeddings of {sorted(rows)} rows: it cannot be merged")
    if rows and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def prove(folder: Path, expected, is_reward: bool, dtype: str) -> dict:
    """Reload a merged folder and compare its logits to the adapter model's.

    Raises:
        UserError: if they differ by more than rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    difference = (probe_logits(model.eval()) - expected).abs().max().item()
    largest = expected.abs().max().item()
    if info["missing_keys"] or not difference <= TOLERANCE[dtype] * max(1.0, largest):
        raise UserError(
            f"the merged model is not the adapter model: largest |logit difference| {difference:.2e}"
            f" where the largest |logit| is {largest:.2e}; nothing was kept"
        )
    return {"max_logit_difference": difference, "max_logit": largest, "dtype": dtype}


def main(args):
    output = Path(args.output_name)
    if output.exists() and not args.overwrite and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another --output_name, or add --overwrite to replace it")
    from modeling import explain_load, read_tokenizer, resolve_adapters

    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = args.adapter_model_name.split(",")
    weights = [float(w) for w in args.weights.split(",")] if args.weights else None
    if len(names) != len(weights or names[:1]):
        raise UserError(f"--adapter_model_name has {len(names)} adapters: give as many --weights, like 0.5,0.5")
    chains = [resolve_adapters(name) for name in names]
    for name, (_, chain) in zip(names, chains, strict=True):
        if not chain:
            raise UserError(f"{name} is no adapter: there is nothing to merge")
        if weights and len(chain) > 1:
            raise UserError(f"{name} is an adapter on the adapter {chain[1]}: merge that one first")
    for name, (base, _) in list(zip(names, chains, strict=True))[1:]:
        if not same_model(base, chains[0][0]):
            raise UserError(f"{name} was trained on {base}, but {names[0]} on {chains[0][0]}: they cannot be summed")
    base = check_base(args.base_model_name, chains[0][0], names[0])
    with explain_load(base):
        stored = AutoConfig.from_pretrained(base).dtype or torch.float32
    dtype = args.dtype or str(stored).removeprefix("torch.")
    adapters = names if weights else chains[0][1][::-1]
    tokenizer = read_tokenizer(names[0])

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model, expected = load_merged(base, adapters, weights, tokenizer)
        is_reward = not model.can_generate()
        model.to(getattr(torch, dtype)).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        del model
        proof = {"base": base, "adapters": adapters, **prove(unfinished, expected, is_reward, dtype)}
        (unfinished / "merge.json").write_text(json.dumps(proof, indent=2) + "\n")
        unfinished.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        unfinished.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{output}: {base} + {' + '.join(adapters)}, {dtype}")
    print(f"largest |logit difference| to the adapter model: {proof['max_logit_difference']:.2e}")
    if is_reward:
        print("next: give it to ppo_training.py as --reward_model_name_or_path")
    else:
        print(f"next: transformers serve, and in another terminal: transformers chat {output}")
    if args.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(args.push_to_hub, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=output)


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base_model_name", help="the model the adapter was trained on; read from the adapter when left out")
    add(
        "--adapter_model_name",
        required=True,
        help="adapter folder or hub id; several, separated by commas, with --weights",
    )
    add("--output_name", required=True, help="folder to write")
    add("--weights", help="weights of the adapters in their sum, separated by commas")
    add("--dtype", choices=list(TOLERANCE), help="of the stored weights; by default the base's")
    add("--overwrite", action="store_true", help="replace output_name if it exists")
    add("--push_to_hub", metavar="REPO_ID", help="also upload the result to a private repository of this name")
    return parser


if __name__ == "__main__":
    try:
        main(make_parser().parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
