"""How each key of a config.json is treated: read, harmless, or refused because it changes what the model computes.

If a key is refused as not understood and you know what it does, add it to `RULES`. Keys are named by patterns in which
`*` matches anything; the first pattern that matches counts. That a key is harmless for the four families was checked in
their classes of transformers 4.51 to 5: they do not read it, or it changes no logits.
"""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lamini_jax.backbone.json_file import shown
from lamini_jax.errors import UserError

_SILENT = (None, False, "", [], {})  # values that say that the model does not have what the key is about
_LARGEST = 2**31 - 1


class Kind(NamedTuple):
    """What a value must be, and the words for it in a message."""

    description: str
    accepts: Callable[[Any], bool]
    may_be_null: bool = True


class Rule(NamedTuple):
    """A row of the table. A refused key is accepted with a `neutral` value; a value that is read must be of `kind`."""

    verdict: Literal["read", "harmless", "refused"]
    why: str
    neutral: tuple[Any, ...] = ()
    kind: Kind | None = None


def _whole(least: int, most: int = _LARGEST) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30


COUNT = Kind("a whole number of at least 1", _whole(1), may_be_null=False)
COUNT_OR_NULL = COUNT._replace(may_be_null=True)
LAYER = Kind("a whole number of at least 0", _whole(0))
POSITIVE = Kind("a number above 0", lambda value: _finite(value) and value > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: _finite(value) and value >= 0, may_be_null=False)
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: type(value) is str, may_be_null=False)
TEXTS = Kind("a list of texts", lambda value: type(value) is list and all(type(part) is str for part in value))
OBJECT = Kind("an object", lambda value: type(value) is dict)


def _rows(verdict: str, why: str, names: str, neutral=(), kind: Kind | None = None) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Rule(verdict, why, neutral, kind))


def _read(kind: Kind, names: str) -> dict[str, Rule]:
    return _rows("read", "is part of the model's description", names, kind=kind)


def _harmless(why: str, names: str) -> dict[str, Rule]:
    return _rows("harmless", why, names)


def _refused(why: str, names: str, *neutral: Any) -> dict[str, Rule]:
    return _rows("refused", why, names, (*_SILENT, *neutral))


def _required(why: str, names: str, *neutral: Any) -> dict[str, Rule]:
    """Keys whose value `false` says that the model lacks something that ours has."""
    return _rows("refused", why, names, (None, True, *neutral))


RULES: dict[str, Rule] = {
    **_read(TEXT, "model_type hidden_act"),
    **_read(COUNT, "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size"),
    **_read(COUNT_OR_NULL, "num_key_value_heads head_dim max_position_embeddings"),
    **_read(LAYER, "max_window_layers sliding_window"),
    **_read(NOT_NEGATIVE, "rms_norm_eps"),
    **_read(POSITIVE, "rope_theta"),
    **_read(OBJECT, "rope_scaling rope_parameters"),
    **_read(FLAG, "tie_word_embeddings use_sliding_window attention_bias mlp_bias qkv_bias use_qkv_bias"),
    **_read(FLAG, "qk_norm use_qk_norm"),
    **_read(TEXTS, "layer_types"),
    # Notes of tools and people.
    **_harmless("is private to the library that wrote it", "_*"),
    **_harmless(
        "is the mark of a tool",
        "unsloth* axolotl* mergekit* merge_method llamafactory* llama_factory* trl_* transformers.js_config "
        "transformers_js_config neuron openvino* onnx* optimum* vllm* sglang* tensorrt* *_version version sagemaker*",
    ),
    **_harmless(
        "is a name or a note",
        "name_or_path architectures model_name model_id base_model base_model_name* license* language tags author* "
        "creator description date created* dataset* finetuned_from source homepage organization",
    ),
    **_harmless(
        "says how weights are stored or computed with, which --config.backbone.dtype decides here",
        "dtype torch_dtype bf16 fp16 fp32 use_bfloat16 torchscript torch_compile compile_config disable_compile",
    ),
    **_harmless(
        "chooses a program for the same attention or the same layer",
        "attn_implementation attention_implementation attn_impl use_flash_attn* use_flash_attention* flash_attn* "
        "use_sdpa* use_memory_efficient_attention use_xformers use_fused_* fused_* use_kernels use_liger* "
        "chunk_size_feed_forward pretraining_tp tp_plan tensor_parallel* pipeline_parallel* sequence_parallel*",
    ),
    **_harmless("is about the cache", "use_cache* cache_* max_cache_len return_legacy_cache prefill_chunk_size"),
    # What matters only in training.
    **_harmless(
        "matters only in training",
        "*dropout* *_pdrop layerdrop initializer_* init_* gradient_checkpointing* use_gradient_checkpointing "
        "*_loss_coef* *_loss_weight *z_loss* label_smoothing* neftune* learning_rate optimizer* train_* training_* "
        "num_train_* batch_size deepspeed* rescale_prenorm_residual tf_legacy_loss xla_device",
    ),
    **_harmless(
        "is a length of training or of the tokenizer; max_position_embeddings is what counts",
        "max_sequence_length max_seq_length max_seq_len seq_length seq_len model_max_length n_ctx n_positions",
    ),
    **_harmless("says how the vocabulary was padded", "pad_vocab_* make_vocab_size_divisible_by"),
    # What is used by the tokenizer, by generation and for other tasks.
    **_harmless(
        "belongs to the tokenizer",
        "*_token_id *_token_ids *_token *_token_index tokenizer_* padding_side truncation_side prefix chat_template",
    ),
    **_harmless(
        "is a setting of generation",
        "max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams "
        "num_beam_groups penalty_alpha dola_layers temperature top_k top_p top_h min_p typical_p epsilon_cutoff "
        "eta_cutoff diversity_penalty repetition_penalty encoder_repetition_penalty length_penalty "
        "*no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
        "forced_decoder_ids sequence_bias token_healing guidance_scale low_memory watermarking_config "
        "num_return_sequences return_dict_in_generate output_attentions output_hidden_states output_scores "
        "output_logits output_router_logits is_assistant num_assistant_tokens* assistant_* "
        "prompt_lookup_num_tokens max_matching_ngram_size target_lookbehind generation_* use_mtp speculation_type",
    ),
    **_harmless(
        "is about other tasks than generating",
        "return_dict use_return_dict is_decoder id2label label2id num_labels problem_type finetuning_task "
        "task_specific_params classifier_* summary_* cross_attention_hidden_size tie_last_hidden_states",
    ),
    # What changes the arithmetic.
    **_refused("says that the weights are quantized", "quantization* quant_* compression_config load_in_* *quantized*"),
    **_refused(
        "scales what the model computes",
        "*_multiplier logits_scaling logit_scale scale_emb scale_depth embedding_scale emb_scale attention_scale "
        "attn_scale attention_scaling scaling_factor rope_ratio embed_scale output_scale residual_scale",
        1,
    ),
    **_refused(
        "scales what the model computes",
        "query_pre_attn_scalar dim_model_base mup* attn_temperature* scale_embeddings scale_embedding "
        "scale_attn_by_inverse_layer_idx attn_factor floor_scale normalize_embeddings",
    ),
    **_required("says that attention is not scaled", "scale_attn_weights"),
    **_refused("limits what the model computes", "*softcap* clip_qkv *_clip_val clip_*"),
    **_refused("rotates a part of each head", "partial_rotary_factor rotary_pct rotary_percent rope_percent", 1),
    **_refused(
        "says that positions are encoded differently",
        "rotary_dim rope_interleave* rotary_interleaved no_rope_* nope_* rope_local_base_freq alibi* use_alibi "
        "rotary_emb_base rope_base use_ntk* use_dynamic_ntk use_logn_attn mrope* learned_position*",
    ),
    **_refused("says that positions are encoded differently", "position_embedding_type", "rope", "rotary"),
    **_required("says that positions are encoded differently", "use_rope use_rotary*"),
    **_required("says that tokens attend to later ones", "is_causal causal"),
    **_refused("says that tokens attend to later ones", "use_bidirectional* bidirectional*"),
    **_refused(
        "says that attention is of another kind",
        "attention_chunk_size attention_types sliding_window_pattern local_att* global_att* qk_layernorm *qk_l2norm* "
        "attention_sink* use_attention_sinks attn_bias attention_out*_bias o_bias multi_query attention_type "
        "full_attention_interval linear_attn* linear_attention* q_lora_rank kv_lora_rank qk_*_head_dim v_head_dim "
        "attn_output_gate share_kv* num_kv_shared_layers cross_layer* per_layer_config",
        0,
    ),
    **_refused(
        "says that layers are mixtures of experts, or are not all alike",
        "*expert* moe_* *_moe decoder_sparse_step mlp_only_layers first_k_dense_replace router_* layers_block_type "
        "num_nextn_predict_layers block_configs num_loops early_exit* altup* laurel*",
        0,
    ),
    **_refused(
        "says that the norms are different",
        "layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon norm_eps use_layer_norm parallel_* "
        "use_parallel_residual post_norm* use_post_norm* sandwich_norm apply_residual_connection_post_layernorm "
        "norm_bias zero_centered* use_bias bias lm_head_bias",
    ),
    **_refused("says that the norms are different", "norm_type norm_class normalization", "rmsnorm", "rms_norm"),
    **_required("says that the norms are different", "use_rms_norm rms_norm"),
    **_refused("is another activation", "hidden_activation activation_function activation", "silu", "swish"),
    **_refused(
        "says that there is more to the model than this decoder",
        "*vision* *audio* text_config encoder_config decoder_config speech* image_* mm_* is_encoder_decoder "
        "add_cross_attention tie_encoder_decoder pruned_heads",
    ),
    **_refused("names code of the model's own (remove it if that is the library's)", "auto_map"),
}
_UNKNOWN = Rule("refused", "is not understood, and could change the result; remove it if it does not", _SILENT)


def rule_of(key: str) -> Rule:
    """The row of the table for a key; a key that matches no pattern is refused."""
    return next((rule for pattern, rule in RULES.items() if fnmatchcase(key, pattern)), _UNKNOWN)


def check(path: Path, values: Mapping[str, Any]) -> None:
    """Raises UserError, naming the key, for a refused value, or a value of the wrong type for a key that is read."""
    for key, value in values.items():
        rule = rule_of(key)
        if rule.verdict == "refused" and not _is_one_of(value, rule.neutral):
            note = "" if rule is _UNKNOWN else ", which is not supported"
            raise UserError(f"{path}: {shown(key)} {json_of(value)} {rule.why}{note}")
        if rule.kind:
            check_kind(path, key, value, rule.kind)


def check_kind(path: Path, key: str, value: Any, kind: Kind) -> None:
    """Raises UserError for a value of another kind."""
    if value is None and kind.may_be_null or kind.accepts(value):
        return
    raise UserError(f"{path}: {key} {json_of(value)} is not {kind.description}")


def json_of(value: Any) -> str:
    """A value as it is written in the file."""
    return shown(json.dumps(value))


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether the value is among the others; true and false do not equal 1 and 0."""
    return any(value == other and (type(value) is bool) == (type(other) is bool) for other in others)
