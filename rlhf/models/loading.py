"""Tokenizers, base models, adapters: what would be a silent bug if it drifted from script to script.

A model is named by a hub id, a full model folder or an adapter folder, everywhere. Every adapter that we write is one
LoRA directly on a base that is no adapter: a policy stage continues the adapter that it is given, a reward model
starts from its weights with a fresh head. So `base + adapter` is always the whole model, for any PEFT tool.
"""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from transformers.utils import cached_file
from trl import get_quantization_config

from rlhf.models.adapters import (
    IF_THERE,
    adapter_weights,
    base_revision,
    check_finite,
    check_unchanged,
    explain_load,
    load_adapter,
    merge_command,
    resize_for,
    resolve_adapters,
    task_of,
)
from rlhf.models.lora import check_continues, lora_config
from rlhf.models.rendering import install_template, set_system_prompt
from rlhf.models.rollout import stop_ids
from rlhf.models.shards import shape_of
from rlhf.models.shared_base import place_lora
from rlhf.models.templates import UNUSED_BYTE
from rlhf.user_error import UserError

HEADS = ("score", "classifier", "classification_head", "v_head", "qa_outputs")  # what a policy has not


def resolve_model(name: str) -> tuple[str, str | None]:
    """(base model, adapter or None); a chain of adapters is refused, since training continues exactly one."""
    base, adapters = resolve_adapters(name)
    if len(adapters) > 1:
        raise UserError(
            f"{name} is an adapter on the adapter {adapters[1]}: merge them first,\n  {merge_command(name)}"
        )
    return base, adapters[0] if adapters else None


def load_tokenizer(name: str, revision: str = "main", system_prompt: str | None = None):
    """The tokenizer of a model or adapter folder (its base's where it has none), ready to train and to pad.

    It has a chat template (the plain one where the model has none), an `eos_token` that ends an answer, and a
    `pad_token` that no text contains and that is no stop token, so that padding never hides an EOS. Saved with the
    model, it carries all three to the next stage, and the system prompt of rows without one, where there is one.
    """
    tokenizer = read_tokenizer(name, revision)
    install_template(tokenizer)
    if system_prompt is not None:
        set_system_prompt(tokenizer, system_prompt)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        tokenizer.add_special_tokens({"pad_token": _spare_token(tokenizer)})
    tokenizer.padding_side = "right"
    return tokenizer


def read_tokenizer(name: str, revision: str = "main", base: str | None = None):
    """The tokenizer as it is stored: the adapter folder's own, or that of the base (of `base`, where it has moved)."""
    named, adapters = resolve_adapters(name, moved=base is not None)
    base = base or named
    source = next((a for a in adapters if cached_file(a, "tokenizer_config.json", **IF_THERE)), base)
    if adapters:
        revision = base_revision(adapters[-1]) if source == base else "main"
    with explain_load(source):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def set_special_tokens(model, tokenizer) -> None:
    """Tell a model what its tokenizer pads and stops with; the stops that it had are kept."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = stop_ids(model, tokenizer) or None
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _spare_token(tokenizer):
    """An existing token to pad with: a reserved one, the unknown token, or the byte that no text contains."""
    in_use = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    special = [t.content for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in in_use]
    for mark in ("pad", "reserved", "unused", "unk"):
        for token in special:
            if mark in token.lower():
                return token
    if UNUSED_BYTE in tokenizer.get_vocab():
        # single_word: the letter inside a word stays two bytes of text
        return AddedToken(UNUSED_BYTE, single_word=True, special=True)
    raise UserError("the tokenizer has no token to pad with: set a pad_token that is not its eos_token")


def _load_base(auto_class, base, adapter, model_args, tokenizer, **kwargs):
    revision = model_args.model_revision if model_args else "main"
    if adapter:
        check_unchanged(base, adapter)
    with explain_load(base):
        model, info = auto_class.from_pretrained(
            base,
            revision=base_revision(adapter) if adapter else revision,
            dtype=model_args.dtype if model_args else "float32",
            attn_implementation=model_args.attn_implementation if model_args else None,
            quantization_config=get_quantization_config(model_args) if model_args else None,
            output_loading_info=True,
            **kwargs,
        )
    check_finite(model.named_parameters(), base)
    rows = shape_of(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > rows:
        pair = "not a pair"
        if adapter and resize_for(model, adapter) > rows:
            pair = f"the adapter brings its own, merge it first,\n  {merge_command(adapter)}"
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens but {base} has embeddings for {rows}: {pair}")
    if auto_class is AutoModelForSequenceClassification and not hasattr(model, "score"):
        raise UserError(f"{base} ({type(model).__name__}) has no `score` at its last token: it makes no reward model")
    set_special_tokens(model, tokenizer)
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights at a first forward in eval mode: training would lose its gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # trainers switch off nn.Dropout but not dropout by a number (OPT's): policy and reference would differ
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model, info


def _load_policy_base(base, adapter, model_args, tokenizer):
    """A causal language model with all its weights, to put a policy's adapter on."""
    if adapter and task_of(adapter) != "CAUSAL_LM":
        raise UserError(f"{adapter} is a reward model, not a policy: give the SFT run's folder")
    model, info = _load_base(AutoModelForCausalLM, base, adapter, model_args, tokenizer)
    check_policy(model, info, base)
    return model


def check_policy(model, info, base: str) -> None:
    """Refuse what only loads as a causal language model: a model with another head, or an encoder.

    Raises:
        UserError: saying which.
    """
    if heads := [key for key in info["unexpected_keys"] if key.split(".")[0] in HEADS]:
        raise UserError(f"{base} is no policy: it has a head of its own, {heads[0]}")
    if info["missing_keys"]:
        raise UserError(f"{base} lacks weights of a causal language model: {sorted(info['missing_keys'])[:3]}")
    if {module.is_causal for module in model.modules() if hasattr(module, "is_causal")} == {True}:
        return
    ids = torch.tensor([[1, 2, 1], [1, 2, 3]], device=model.device)
    with torch.no_grad():  # what comes later must not be seen
        first, other = model.eval()(ids).logits[:, :2]
    if (first - other).abs().max() > 1e-3 * first.abs().max():
        raise UserError(f"{base} ({type(model).__name__}) is an encoder, whose words see those that follow: no policy")


def load_policy(model_args, tokenizer, seed: int):
    """The policy to train: (model, peft_config).

    An adapter folder gives a trainable PeftModel and None (its adapter is continued); anything else gives the plain
    model and the LoRA to put on it, or None with `--no_use_peft`. A LoRA put on it next is drawn from `seed`.
    """
    set_seed(seed)
    base, adapter = resolve_model(model_args.model_name_or_path)
    if adapter:
        check_continues(adapter, model_args)
    model = _load_policy_base(base, adapter, model_args, tokenizer)
    if adapter is None:
        return model, lora_config(model, model_args, "CAUSAL_LM") if model_args.use_peft else None
    return load_adapter(model, adapter, trainable=True), None


def train_in_float32(model) -> None:
    """Undo what TRL's trainers do to the adapter on a quantised base: in bfloat16, small steps round away."""
    for parameter in model.parameters() if getattr(model, "is_quantized", False) else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_frozen_policy(name: str, tokenizer):
    """A policy to sample from or compare with: base and adapter where it has one, in eval mode, nothing trainable."""
    base, adapter = resolve_model(name)
    model = _load_policy_base(base, adapter, None, tokenizer)
    if adapter:
        model = load_adapter(model, adapter)
    return model.eval().requires_grad_(False)


def new_reward_model(model_args, tokenizer, seed: int):
    """A reward model to train: the base with a scalar `score` head, the weights of an SFT adapter continued under it.

    The head is drawn from `seed`, unless the model already is a reward model, whose head is continued.

    Returns:
        (model, peft_config) as from `load_policy`.
    """
    base, adapter = resolve_model(model_args.model_name_or_path)
    set_seed(seed)
    model, info = _load_base(AutoModelForSequenceClassification, base, adapter, model_args, tokenizer, num_labels=1)
    if not set(info["missing_keys"]) <= {"score.weight"}:
        raise UserError(f"{base} does not fit a sequence classifier: {sorted(info['missing_keys'])[:3]} are missing")
    if adapter is None:
        return model, lora_config(model, model_args, "SEQ_CLS") if model_args.use_peft else None
    check_continues(adapter, model_args)
    if task_of(adapter) == "SEQ_CLS":
        return load_adapter(model, adapter, trainable=True), None
    config = LoraConfig.from_pretrained(adapter)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    model = get_peft_model(model, config)
    # the trunk has the same module names under both heads, so the policy's LoRA fits as it is
    weights = {"base_model.model.score.weight": model.get_base_model().score.weight} | adapter_weights(adapter)
    place_lora(model, weights, "default", f"the adapter {adapter} does not fit a reward model")
    return model, None


def trained_head(adapter: str) -> torch.Tensor:
    """The scalar head that a reward adapter was trained with, (1, hidden).

    Raises:
        UserError: if it has none, or one of several labels.
    """
    task_of(adapter)  # refuses what is neither
    heads = [value for key, value in adapter_weights(adapter).items() if ".score." in key]
    if len(heads) != 1:
        raise UserError(
            f"{adapter} has no trained `score` head: it is not a reward model\n  reward_modeling.py makes one"
        )
    if heads[0].shape[0] != 1:
        raise UserError(f"{adapter} has {heads[0].shape[0]} labels: a reward model has one")
    return heads[0]


def load_reward_model(name: str, tokenizer, model_args=None):
    """A trained reward model for scoring with its own tokenizer, frozen and in eval mode.

    Raises:
        UserError: if the folder holds no trained head, or more than one label.
    """
    base, adapter = resolve_model(name)
    head = trained_head(adapter) if adapter else None
    with explain_load(base):
        labels = 1 if adapter else AutoConfig.from_pretrained(base).num_labels
    if labels != 1:
        raise UserError(f"{name} has {labels} labels: a reward model has one")
    model, info = _load_base(AutoModelForSequenceClassification, base, adapter, model_args, tokenizer, num_labels=1)
    if adapter:
        model = load_adapter(model, adapter)
        loaded = model.get_base_model().score.modules_to_save["default"].weight
        assert torch.equal(loaded.cpu(), head.to(loaded.dtype)), "the head in memory is not the one in the folder"
    elif info["missing_keys"]:
        raise UserError(f"{base} has no trained head ({sorted(info['missing_keys'])[0]}): its scores would be random")
    return model.eval().requires_grad_(False)


def load_merge_base(base: str, adapter: str, tokenizer):
    """The base to merge an adapter into: in float32, of the class that the adapter's task asks for."""
    auto_class, head, options = AutoModelForCausalLM, set(), {}
    if task_of(adapter) == "SEQ_CLS":
        auto_class, weights = AutoModelForSequenceClassification, adapter_weights(adapter)
        labels = [weight.shape[0] for key, weight in weights.items() if key.endswith("score.weight")]
        head, options = ({"score.weight"}, {"num_labels": labels[0]}) if labels else (set(), {})
    with explain_load(base):
        model, info = auto_class.from_pretrained(
            base, revision=base_revision(adapter), dtype="float32", output_loading_info=True, **options
        )
    check_finite(model.named_parameters(), base)
    if lacks := sorted(info["missing_keys"] - head):
        raise UserError(f"neither {base} nor {adapter} has {lacks[0]}: the merged model's would be random")
    if not options:
        check_policy(model, info, base)
    set_special_tokens(model, tokenizer)
    return model


def max_positions(model) -> int:
    """The longest sequence that the model's position embeddings allow."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1_000_000_000


def fit_length(max_length: int | None, model) -> int:
    """`max_length` within the model's positions, saying so where it had to be lowered."""
    positions = max_positions(model)
    if max_length is None:
        return positions
    if max_length > positions:
        print(f"max_length {max_length} is beyond the model's {positions} positions: {positions} is used")
    return min(max_length, positions)
