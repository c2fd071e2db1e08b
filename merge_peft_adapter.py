r"""Merge a LoRA adapter into its base: a plain model folder that any library loads, proven equal before it is kept.

    python merge_peft_adapter.py --base_model_name=gpt2-medium \
        --adapter_model_name=saved/gpt2_medium_ufb_dpo \
        --output_name=saved/gpt2_medium_uc_ufb_merged
    python merge_peft_adapter.py --adapter_model_name=saved/reward \
        --output_name=saved/reward_merged --dtype=bfloat16
    python merge_peft_adapter.py --adapter_model_name=saved/a,saved/b \
        --weights=0.5,0.5 --output_name=saved/a_and_b

Reads an adapter folder and the base that it names: `--base_model_name` may be left out; a copy of that base is taken
and another model refused. A chain of adapters is merged from the base up. Writes the model, with a reward model's
head, tokenizer, template and generation config. All is merged in float32 and cast last, in a hidden folder that is
renamed when it has been proven.

Watch the last lines: how far the merged model's logits are from the adapter model's, and those from the base's.
In float32 the former is at most 1e-4 of the largest logit; in another dtype, what that rounds away.
"""

import glob
import json
import math
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path

from rlhf.user_error import ToolParser, UserError, check_folder, missing_path, number, run_tool

# Largest |logit difference| that float32 arithmetic may cause, as a share of the largest |logit|: rounding, not error.
TOLERANCE = 1e-4
DTYPES = ("float32", "bfloat16", "float16")


def probe_logits(model):
    """Logits (or scores) on fixed token ids, in float32."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # a row at a time: a sequence classifier pools a batch by its pad token, which random ids may hold
        return torch.cat([model.eval()(input_ids=row[None]).logits.float() for row in ids])


def difference(logits, expected, what: str) -> float:
    """The largest difference; above what rounding explains, the end: exit code 1."""
    largest = (logits - expected).abs().max().item()
    if not largest <= TOLERANCE * max(1.0, expected.abs().max().item()):  # nor is NaN
        raise SystemExit(
            f"error: {what}: largest |logit difference| {largest:.2e} where the largest |logit| is "
            f"{expected.abs().max().item():.2e}; nothing was kept"
        )
    return largest


def merge(model):
    """Merge a PeftModel's active adapters into its base: (model, logits before, how far the adapters had moved them).

    The logits before are proven equal to those after.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    if not hasattr(model.base_model, "merge_and_unload"):
        raise UserError(f"a {model.active_peft_config.peft_type.value} adapter cannot be merged into weights")
    inner = model.get_base_model()
    layers = [layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None]
    if any(isinstance(layer, LoraLayer) for layer in layers) and layers[0].weight is layers[-1].weight:
        output = layers[-1].get_base_layer() if isinstance(layers[-1], LoraLayer) else layers[-1]
        output.weight = torch.nn.Parameter(output.weight.detach().clone())  # or a change of one would change both
    expected = probe_logits(model)
    with model.disable_adapter():
        effect = (expected - probe_logits(model)).abs().max().item()
    # not safe_merge, which doubles memory to look for NaN: the logits would show it
    try:
        model = model.merge_and_unload(adapter_names=model.active_adapters)
    except RuntimeError as error:
        if "bias" not in str(error):
            raise
        why = "the adapter has biases (lora_bias) where its base has none: no plain model can hold them"
        raise UserError(f"{why}\n  use it with PEFT as it is, or train one without lora_bias") from error
    text_config, output = model.config.get_text_config(), model.get_output_embeddings()
    if output is not None and text_config.tie_word_embeddings:  # an adapter may have trained one of the two alone
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = torch.equal(
            output.weight, model.get_input_embeddings().weight
        )
    difference(probe_logits(model), expected, "merging changed the model")
    return model, expected, effect


def cast(model, dtype) -> None:
    """Change the weights' dtype, but not of buffers that are computed anew at each load (rotary frequencies)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def prove(folder: Path, written, expected) -> float:
    """The largest |logit difference| of a merged folder to the adapter model, with whatever the stored dtype rounds.

    Args:
        written: the logits of what was written.
        expected: those of the adapter model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    is_reward = AutoConfig.from_pretrained(folder).architectures[0].endswith("SequenceClassification")
    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise SystemExit(f"error: the merged model lacks {sorted(info['missing_keys'])[0]}; nothing was kept")
    logits = probe_logits(model)
    difference(logits, written, "the merged folder is not the adapter model")
    return (logits - expected).abs().max().item()


@contextmanager
def replaced_when_done(output: Path):
    """A hidden folder that becomes the output at the end, or nothing; what killed merges left of it is removed."""
    import psutil

    parent = next(folder for folder in output.absolute().parents if folder.exists())
    prefix = f".{output.name}.merging-{platform.node()}-"
    for left in glob.glob(str(parent / (glob.escape(prefix) + "*"))):
        pid = left.rsplit("-", 1)[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    work = parent / f"{prefix}{os.getpid()}"
    try:
        (work / "new").mkdir(parents=True)
        yield work / "new"
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rename(work / "old")
        (work / "new").rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_given(args, names: list[str], output: Path) -> None:
    """What a mistake can be told by before a library is imported."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not args.overwrite:
            raise UserError(f"{output} exists: choose another --output_name, or add --overwrite to replace it")
        if not (output / "merge.json").exists():
            raise UserError(f"{output} was not written by this script, so --overwrite does not replace it")
    if len(names) != len(args.weights or names[:1]):
        raise UserError(f"--adapter_model_name has {len(names)} adapters: give as many --weights, like 0.5,0.5")
    if args.weights and not any(args.weights):
        raise UserError("--weights: all are 0, so that nothing would be merged")
    missing_path("base_model_name", args.base_model_name)
    for name in names:
        missing_path("adapter_model_name", name)
    check_folder("--output_name", output)


def plan(args, names: list[str]) -> tuple[str, list[list[str]]]:
    """The base, and what is merged into it step by step: each adapter of a chain, or all adapters of a sum at once."""
    from rlhf.models.adapters import check_base, resolve_adapters

    chains = [resolve_adapters(name, moved=args.base_model_name is not None) for name in names]
    for name, (_, chain) in zip(names, chains, strict=True):
        if not chain:
            raise UserError(f"{name} is no adapter: there is nothing to merge")
        if args.weights and len(chain) > 1:
            raise UserError(f"{name} is an adapter on the adapter {chain[1]}: merge that one first")
    first, chain = chains[0]
    steps = [names] if args.weights else [[adapter] for adapter in reversed(chain)]
    base = check_base(args.base_model_name, first, steps[0][0])
    for name, (named, _) in zip(names, chains, strict=True):
        if named != first:
            check_base(base, named, name)
    return base, steps


def merge_all(base: str, steps: list[list[str]], weights: list[float] | None, tokenizer):
    """The base with all of `plan`'s steps merged into it, and of the last of them what `merge` gives."""
    from rlhf.models.adapters import load_adapter, load_sum, resize_for
    from rlhf.models.loading import load_merge_base

    adapter = steps[-1][0]
    model = load_merge_base(base, adapter, tokenizer)
    for step in steps:
        resize_for(model, step[0])
        if weights:
            model = load_sum(model, step, weights)
        else:  # an adapter under a reward model's is a policy's
            model = load_adapter(model, step[0], task=step is steps[-1])
        model, expected, effect = merge(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{adapter} has a tokenizer of {len(tokenizer)} tokens, but embeddings for {rows}")
    return model, expected, effect


def main(args):
    output, names = Path(args.output_name), args.adapter_model_name.split(",")
    check_given(args, names, output)
    import torch
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from rlhf.models.adapters import check_apart, read_config
    from rlhf.models.loading import read_tokenizer
    from rlhf.models.rewards import STATISTICS

    disable_progress_bar()
    set_verbosity_error()
    base, steps = plan(args, names)
    check_apart("--output_name", output, [*names, base])
    tokenizer = read_tokenizer(names[0], base=base)
    stored = str(read_config(base).get("dtype") or read_config(base).get("torch_dtype"))
    dtype = args.dtype or (stored if stored in DTYPES else "float32")
    adapters = [adapter for step in steps for adapter in step]
    try:
        with replaced_when_done(output) as folder:
            model, expected, effect = merge_all(base, steps, args.weights, tokenizer)
            is_reward = not model.can_generate()
            cast(model, getattr(torch, dtype))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if (Path(names[0]) / STATISTICS).exists() and not args.weights:
                shutil.copy(Path(names[0]) / STATISTICS, folder)
            cast(model, torch.float32)
            written = probe_logits(model)
            del model
            error = prove(folder, written, expected)
            about = {"base": base, "adapters": adapters, "weights": args.weights, "dtype": dtype}
            about |= {"max_logit_difference": error, "max_logit": expected.abs().max().item()}
            about |= {"adapter_effect": effect}
            (folder / "merge.json").write_text(json.dumps(about, indent=2) + "\n")
    except (OSError, SafetensorError) as reason:
        raise UserError(f"cannot write {output}: {reason}") from reason
    print(f"{output}: {base} + {' + '.join(adapters)}, {dtype}")
    print(f"largest |logit difference| to the adapter model: {error:.2e} (and of that to its base: {effect:.2e})")
    if not effect:
        print("nothing that was looked at differs from the base: was this adapter trained?")
    elif error > effect / 10:
        print(f"{dtype} rounds away a good part of what was learned: --dtype=float32 keeps it")
    if is_reward:
        print("next: give it to ppo_training.py as --reward_model_name_or_path")
    else:
        print(f"next: transformers serve, and in another terminal: transformers chat {output}")
    if args.push_to_hub:
        from huggingface_hub import HfApi

        repo = HfApi().create_repo(args.push_to_hub, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo.repo_id, folder_path=output)


def numbers(text: str) -> list[float]:
    return [number(float, -math.inf)(part) for part in text.split(",")]


def make_parser():
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--base_model_name", help="the model the adapter was trained on; read from the adapter when left out")
    several = "several, separated by commas, with --weights"
    add("--adapter_model_name", required=True, help=f"adapter folder or hub id; {several}")
    add("--output_name", required=True, help="folder to write")
    add("--weights", type=numbers, help="weights of the adapters in their sum, separated by commas")
    add("--dtype", choices=DTYPES, help="of the stored weights; by default the base's")
    add("--overwrite", action="store_true", help="replace output_name if it is an earlier merge's")
    add("--push_to_hub", metavar="REPO_ID", help="also upload the result to a private repository of this name")
    return parser


if __name__ == "__main__":
    run_tool(main, make_parser)
