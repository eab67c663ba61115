"""Small random checkpoints, in files named and filled as Hugging Face's are, for tests to import.

Letters: V vocabulary, D width, F MLP width, Q all query heads side by side, G all key-value heads, W head width.
Tensors are (output, input), as PyTorch keeps them.
"""

import functools
import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lamini_jax.data import world

ABSENT = object()  # as an override: the field is left out of config.json

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LEARNED_TOKENS = 395
SPECIAL_TOKENS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
BEGIN, END, START_HEADER, END_HEADER, END_OF_TURN = range(LEARNED_TOKENS, LEARNED_TOKENS + len(SPECIAL_TOKENS))
TOKENIZER_SIZE = LEARNED_TOKENS + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ '\\n\\n' ~ message.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{%- endif -%}
"""

# What every family's config.json says. Sizes are tiny, and such that no two axes of a matrix are the same by accident.
# The eps is so large that a program with another one computes something else.
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": BEGIN,
    "eos_token_id": END_OF_TURN,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-2,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "vocab_size": 416,
}
_FAMILIES = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": [END, END_OF_TURN],
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    # The window is there in real files too, switched off.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 1,
        "sliding_window": 8,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 24,
        "max_window_layers": 1,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}

# 16-wide heads with this theta turn once in 6, 14, 30, 64, ... tokens. An original context of 32 tokens keeps what
# turns within 8 of them and stretches what needs more than 32; two frequencies lie between the two rules.
_LLAMA3_SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
_LLAMA3_SCALING |= {"original_max_position_embeddings": 32, "rope_type": "llama3"}

# Files written by transformers 5, which renamed fields.
_RENAMED = {"rope_theta": ABSENT, "rope_scaling": ABSENT, "torch_dtype": ABSENT, "dtype": "float32"}

# name -> (model type, what its config.json says differently)
PRESETS: dict[str, tuple[str, dict]] = {
    "llama1": ("llama", {"num_key_value_heads": ABSENT, "rope_theta": ABSENT, "attention_bias": ABSENT}),
    "llama31": ("llama", {"rope_scaling": _LLAMA3_SCALING, "torch_dtype": "bfloat16"}),
    "llama32_tied": ("llama", {"rope_scaling": _LLAMA3_SCALING, "head_dim": 16, "tie_word_embeddings": True}),
    "llama_linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float16"}),
    "llama_no_groups": ("llama", {"num_key_value_heads": 4}),
    "llama_eight_groups": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 3}),
    "llama_renamed": ("llama", {**_RENAMED, "rope_parameters": {"rope_theta": 500.0, **_LLAMA3_SCALING}}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "head_dim": 24}),
    "mistral_window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}),
    "qwen2_renamed": (
        "qwen2",
        {
            **_RENAMED,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def make_preset(directory: Path, name: str, **arguments) -> Path:
    """A checkpoint of `PRESETS`, made with further arguments of `make`."""
    model_type, overrides = PRESETS[name]
    return make(directory, model_type, **{**overrides, **arguments})


def make(directory: Path, model_type: str, *, shards=1, tokenizer=True, seed=0, **config_overrides) -> Path:
    """Writes a checkpoint with random weights in `shards` files, and returns its directory."""
    directory.mkdir(parents=True)
    config = {**_COMMON, "model_type": model_type, **_FAMILIES[model_type], **config_overrides}
    config = {name: value for name, value in sorted(config.items()) if value is not ABSENT}
    _write(directory / "config.json", config)
    generation = {"bos_token_id": BEGIN, "eos_token_id": [END, END_OF_TURN], "do_sample": True, "temperature": 0.6}
    _write(directory / "generation_config.json", generation)
    storage = STORAGE[config.get("torch_dtype") or config["dtype"]]
    save_weights(directory, random_weights(config, np.random.default_rng(seed), storage), shards)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def random_weights(config: dict, rng: np.random.Generator, storage=np.float32) -> dict[str, np.ndarray]:
    """Tensors of a model of this config, by their names: logits vary by several units, attention is not uniform."""
    heads = config["num_attention_heads"]
    V, D, F = (config[name] for name in ("vocab_size", "hidden_size", "intermediate_size"))
    W = config.get("head_dim") or D // heads
    Q, G = heads * W, config.get("num_key_value_heads", heads) * W
    family = config["model_type"]

    def normal(*shape, mean=0.0, deviation=1.0):
        return (mean + deviation * rng.standard_normal(shape, np.float32)).astype(storage)

    def matrix(outputs, inputs, gain=1.0):
        return normal(outputs, inputs, deviation=gain * inputs**-0.5)

    weights = {"model.embed_tokens.weight": normal(V, D)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": normal(D, mean=1, deviation=0.2),
            "post_attention_layernorm.weight": normal(D, mean=1, deviation=0.2),
            "self_attn.q_proj.weight": matrix(Q, D, 1.4),
            "self_attn.k_proj.weight": matrix(G, D, 1.4),
            "self_attn.v_proj.weight": matrix(G, D),
            "self_attn.o_proj.weight": matrix(D, Q),
            "mlp.gate_proj.weight": matrix(F, D),
            "mlp.up_proj.weight": matrix(F, D),
            "mlp.down_proj.weight": matrix(D, F),
        }
        if family == "qwen2":
            sizes = {"q_proj": Q, "k_proj": G, "v_proj": G}
            block |= {f"self_attn.{name}.bias": normal(size, deviation=0.5) for name, size in sizes.items()}
        if family == "qwen3":
            block |= {f"self_attn.{name}.weight": normal(W, mean=1.2, deviation=0.3) for name in ("q_norm", "k_norm")}
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()}
    weights["model.norm.weight"] = normal(D, mean=1, deviation=0.2)
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = matrix(V, D)
    return weights


def save_weights(directory: Path, weights: dict[str, np.ndarray], shards: int = 1) -> None:
    """One file, or several of consecutive tensors, wherever that cuts, with an index."""
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for number, names in enumerate(np.array_split(list(weights), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names.tolist()}, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names.tolist(), file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def edit(file: Path, **changes) -> None:
    """Changes fields of a JSON file, `ABSENT` ones away."""
    fields = {**json.loads(file.read_text()), **changes}
    _write(file, {name: value for name, value in fields.items() if value is not ABSENT})


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and what belongs to it."""
    (directory / "tokenizer.json").write_text(_trained_tokenizer())
    added = {
        str(LEARNED_TOKENS + i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, text in enumerate(SPECIAL_TOKENS)
    }
    names = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[-1]}
    _write(directory / "special_tokens_map.json", names)
    settings = {
        "added_tokens_decoder": added,
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(directory / "tokenizer_config.json", settings)


@functools.cache
def _trained_tokenizer() -> str:
    """A byte-level BPE of the generated world, special tokens after the learned ones, as one JSON text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    questions = itertools.islice(world.training_stream(0), 2000)
    tokenizer.train_from_iterator((text for qa in questions for text in (qa.question, qa.answer)), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE
    begin = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[0]} $A",
        pair=f"{SPECIAL_TOKENS[0]} $A {SPECIAL_TOKENS[0]}:1 $B:1",
        special_tokens=[(SPECIAL_TOKENS[0], BEGIN)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer.to_str(pretty=True)


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
