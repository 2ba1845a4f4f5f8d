"""A Llama-3 of 127 thousand parameters that any two programs can build alike.

An oracle run and a minisft run must start from the same weights and the same tokenizer, and nothing may be downloaded.
So the model is a function of a seed: NumPy's PCG64 draws the tensors one after another in the order of their sorted
names, and the tokenizer is Llama-3's in small: the 256 bytes, 53 merges (among them the blank line that Llama-3's
template writes after a header), Llama-3's split pattern, its eleven named special tokens in their order, and the
post-processor that adds a beginning-of-text token unless it is told not to.

Matrices are drawn with variance 1 / fan-in and norm weights around 1. The usual 0.02 would leave attention uniform and
the norms without effect, and a wrong mask or a forgotten weight would hardly show in a loss.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the byte alphabet: Ġ is the space, Ċ the newline; ı, ü, ö and ç are two bytes each. The letters ş and ğ have no
# merge on purpose: a mask that is computed from character offsets errs at a character of two tokens.
MERGES = (
    "Ċ+Ċ Ġ+t Ġ+a h+e i+n r+e o+n e+r a+r l+e a+n o+r i+s Ġ+s Ġ+b e+n Ġt+he Ġ+i Ġ+w o+u Ġ+o i+l d+e e+s s+t Ġ+k Ġ+h "
    "Ã+¼ Ä+± Ã+¶ Ã+§ a+l l+a i+r Ġ+d y+o Ġ+f Ġ+m in+g k+i m+a Ġb+ir l+ar l+er d+a Ġ+y Ġa+n Ġan+d n+d Ġ+c m+e ,+Ċ Ġ+e"
)
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
VOCAB_SIZE = 256 + 53 + len(SPECIAL_TOKENS)  # 320

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 309,
    "eos_token_id": 318,  # <|eot_id|>, as in the instruct models
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def write_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write a Hugging Face folder: config.json, model.safetensors (fp32), tokenizer.json, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(tiny_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    return folder


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face name -> fp32 tensor, drawn from one stream in the order of the sorted names."""
    random = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, shape in sorted(tiny_shapes().items()):
        normal = random.standard_normal(shape)
        if len(shape) == 1:
            weights[name] = (1 + 0.1 * normal).astype(np.float32)
        else:
            weights[name] = (normal / np.sqrt(shape[-1])).astype(np.float32)
    return weights


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of each parameter."""
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(CONFIG["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (VOCAB_SIZE, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes


def tiny_tokenizer() -> Tokenizer:
    """Ids 0-255 are the bytes, 256-308 the merges, 309-319 the special tokens."""
    merges = [tuple(merge.split("+")) for merge in MERGES.split()]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer
