"""Which logits should small models of each family give?

Makes random small models with Hugging Face's transformers, writes each as a GGUF file in f32 and the logits that
transformers computes beside it. The Rust test `logits_agree_with_transformers` reads both. Run it again only to change
the models; the results are committed.

    python3 -m venv --system-site-packages venv
    venv/bin/pip install 'transformers==4.38.2' 'numpy<2' gguf    # beside torch, 1.13 or later
    venv/bin/python tests/golden/make_logits.py

A `.logits` file, little endian: u32 tokens, u32 prompt tokens, u32 vocabulary; the token ids, u32; and f32 logits
`[tokens, vocabulary]`: the prompt's in one forward pass, the rest one token at a time with the cache. Keys and values
are rounded to f16 in the cache, as ours are.
"""

import pathlib
import struct

import gguf
import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).parent
TOKENS, PROMPT = 83, 67  # both past a chunk of 64, neither a whole number of blocks

LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OTHER_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name):
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_TENSORS[rest]}"


def interleave(weight, heads):
    """Rows of each head from halves (i with i + d/2) to pairs (2i with 2i + 1), as GGUF files of `llama` have them."""
    first, second = np.split(weight.reshape(heads, -1, weight.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(weight.shape)


def randomise(model, generator):
    """Weights large enough that attention is not uniform and no part of the model is lost in another."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                weight.copy_(2 * noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(1.3 * noise / weight.shape[-1] ** 0.5)


def write_model(path, arch, config, model):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith("inv_freq"):
            continue
        weight = weight.numpy().astype(np.float32)
        if arch == "llama" and "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


update_exactly = DynamicCache.update


def update_in_f16(cache, keys, values, *args, **kwargs):
    """Rounds keys and values to f16, as our blocks do, so that nothing but the order of sums is left to differ."""
    return update_exactly(cache, keys.half().float(), values.half().float(), *args, **kwargs)


DynamicCache.update = update_in_f16


def write_logits(path, config, model, generator):
    tokens = torch.randint(config.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        out = model(tokens[:, :PROMPT], use_cache=True)
        rows = [out.logits[0]]
        for at in range(PROMPT, TOKENS):
            out = model(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    logits = torch.cat(rows).numpy().astype("<f4")
    head = struct.pack("<3I", TOKENS, PROMPT, config.vocab_size)
    path.write_bytes(head + tokens[0].numpy().astype("<u4").tobytes() + logits.tobytes())
    print(path.name, "logits between", logits.min(), "and", logits.max())


def make(arch, config_type, model_type, **sizes):
    config = config_type(
        num_hidden_layers=2, max_position_embeddings=256, rms_norm_eps=1e-5, attn_implementation="eager", **sizes
    )
    generator = torch.Generator().manual_seed(7)
    model = model_type(config).float().eval()
    randomise(model, generator)
    write_model(HERE / f"tiny-{arch}.gguf", arch, config, model)
    write_logits(HERE / f"tiny-{arch}.logits", config, model, generator)


# Sizes that are no multiples of a panel's 16 rows, and heads of 16 and of 24, so that remainders are seen.
make("llama", LlamaConfig, LlamaForCausalLM, vocab_size=131, hidden_size=64, intermediate_size=88,
     num_attention_heads=4, num_key_value_heads=2, rope_theta=10_000.0, tie_word_embeddings=False)
make("qwen2", Qwen2Config, Qwen2ForCausalLM, vocab_size=131, hidden_size=72, intermediate_size=88,
     num_attention_heads=3, num_key_value_heads=1, rope_theta=1_000_000.0, tie_word_embeddings=True)
