"""Which logits should the small published model give?

Dequantises the file that the tests share, runs it with Hugging Face's transformers, all in f32, over three texts, and keeps
some logits of some positions. The Rust tests in `src/model/decoder/exactness.rs` read them. Run it again only to change the
texts or the positions; the result is committed.

    python3 -m venv venv
    venv/bin/pip install torch==2.15.0 transformers==5.24.0 gguf==0.19.0
    venv/bin/python tests/golden/make_real_logits.py

`smollm2.logits`, little endian: u32 sequences; for each u32 tokens and the token ids, u32. Then u32 positions; for each u32
sequence, u32 position, f32 log of the sum of all exponentials, u32 count, and that many pairs of u32 token id and f32 logit:
the largest logits, largest first, and some of every part of the vocabulary.
"""

import pathlib
import struct

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

LARGEST, SPREAD = 64, 36
CHAT = """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
What is the capital of France?<|im_end|>
<|im_start|>assistant
The capital of France is"""
CODE = """def quicksort(values):
    if len(values) <= 1:
        return values
    pivot = values[len(values) // 2]
    smaller = [value for value in values if value < pivot]
    larger = [value for value in values if value > pivot]
    return quicksort(smaller) + [pivot] + quicksort(larger)
"""
BOOK = HERE.parent.parent / "load-tests" / "text" / "alice.txt"
# Each text, its length in tokens and how many positions of it are kept, from the first to the last.
SEQUENCES = [(CHAT, 32, 10), (CODE, 64, 10), (None, 200, 20)]

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def read(path):
    """The model in f32, as transformers has it."""
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = OTHER_TENSORS.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"
            turned = {"attn_q": heads, "attn_k": kv_heads}.get(part)
            if turned:
                # From pairs (2i with 2i + 1), as the files have them, to halves (i with i + d/2).
                weight = weight.reshape(turned, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        weights[name] = torch.from_numpy(np.ascontiguousarray(weight))
    vocabulary, hidden = weights["model.embed_tokens.weight"].shape
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=field("llama.feed_forward_length"),
            num_hidden_layers=field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=field("llama.context_length"),
            rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=field("llama.rope.freq_base"),
            tie_word_embeddings=True,
        )
    ).eval()
    loaded = model.load_state_dict(weights, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys, loaded
    return model


def main():
    model = read(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name)
    sequences, positions = [], []
    for index, (text, length, kept) in enumerate(SEQUENCES):
        # The book from its first paragraph on, some way behind the head of its first chapter.
        text = text or BOOK.read_text()[400:]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        assert len(tokens) == length, f"text {index} has {len(tokens)} tokens"
        sequences.append(struct.pack(f"<{length + 1}I", length, *tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        for position in np.linspace(0, length - 1, kept).round().astype(int):
            row = logits[position]
            largest = row.topk(LARGEST).indices.tolist()
            spread = [id for id in range(7, len(row), len(row) // SPREAD) if id not in largest]
            pairs = b"".join(struct.pack("<If", id, row[id]) for id in largest + spread)
            log_sum = row.double().logsumexp(0)
            positions.append(struct.pack("<IIfI", index, position, log_sum, len(largest + spread)) + pairs)
    parts = [struct.pack("<I", len(sequences)), *sequences, struct.pack("<I", len(positions)), *positions]
    (HERE / "smollm2.logits").write_bytes(b"".join(parts))


if __name__ == "__main__":
    main()
