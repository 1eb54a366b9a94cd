#!/usr/bin/env python3
"""Writes a llama model of a few MB with random weights and a tokenizer of single bytes.

For trying a backend where the real model cannot be carried: its answers mean nothing, but two
backends must give the same ones.    make_small_model.py FILE.gguf [q8_0|q4_0|q4_1|f16]
"""

import random
import struct
import sys

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4, 256, 512, 8, 2, 64, 2048
TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 8}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_texts():
    """How byte-level tokenizers write bytes: printable ones as they are, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(odd)) for byte in range(256)]


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def meta(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def u32(key, value):
    return meta(key, 4, struct.pack("<I", value))


def f32(key, value):
    return meta(key, 6, struct.pack("<f", value))


def string(key, value):
    return meta(key, 8, text(value))


def strings(key, values):
    return meta(key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))


def i32s(key, values):
    packed = struct.pack(f"<{len(values)}i", *values)
    return meta(key, 9, struct.pack("<IQ", 5, len(values)) + packed)


def weights(kind, columns, rows, numbers):
    """Rows of random weights whose products keep the size of what they multiply."""
    spread = columns**-0.5
    count = columns * rows
    if kind == "f16":
        values = [numbers.gauss(0, spread) for _ in range(count)]
        return struct.pack(f"<{count}e", *values)
    out = bytearray()
    bits = 256 if kind == "q8_0" else 16
    for _ in range(count // 32):
        scale = spread * 3.46 / bits * numbers.uniform(0.75, 1.25)
        out += struct.pack("<e", scale)
        if kind == "q4_1":
            out += struct.pack("<e", -7.5 * scale)
        out += numbers.randbytes(32 if kind == "q8_0" else 16)
    return bytes(out)


def tensors(kind):
    numbers = random.Random(1)
    vocab = 256 + len(SPECIAL)

    def matrix(name, columns, rows, kind=kind):
        return name, [columns, rows], TYPES[kind], weights(kind, columns, rows, numbers)

    def norm(name):
        scale = [0.75 + i % 5 / 8 for i in range(HIDDEN)]
        return name, [HIDDEN], 0, struct.pack(f"<{HIDDEN}f", *scale)

    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield matrix("token_embd.weight", HIDDEN, vocab, "q8_0")
    for layer in range(LAYERS):
        yield norm(f"blk.{layer}.attn_norm.weight")
        yield matrix(f"blk.{layer}.attn_q.weight", HIDDEN, query)
        yield matrix(f"blk.{layer}.attn_k.weight", HIDDEN, kv)
        yield matrix(f"blk.{layer}.attn_v.weight", HIDDEN, kv)
        yield matrix(f"blk.{layer}.attn_output.weight", query, HIDDEN)
        yield norm(f"blk.{layer}.ffn_norm.weight")
        yield matrix(f"blk.{layer}.ffn_gate.weight", HIDDEN, FFN)
        yield matrix(f"blk.{layer}.ffn_up.weight", HIDDEN, FFN)
        yield matrix(f"blk.{layer}.ffn_down.weight", FFN, HIDDEN)
    yield norm("output_norm.weight")


def main(path, kind="q8_0"):
    vocab = byte_texts() + SPECIAL
    metadata = [
        string("general.architecture", "llama"),
        string("general.name", f"random {kind}"),
        u32("llama.block_count", LAYERS),
        u32("llama.context_length", CONTEXT),
        u32("llama.embedding_length", HIDDEN),
        u32("llama.feed_forward_length", FFN),
        u32("llama.attention.head_count", HEADS),
        u32("llama.attention.head_count_kv", KV_HEADS),
        u32("llama.attention.key_length", HEAD_DIM),
        u32("llama.attention.value_length", HEAD_DIM),
        f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        f32("llama.rope.freq_base", 10000.0),
        u32("llama.rope.dimension_count", HEAD_DIM),
        u32("llama.vocab_size", len(vocab)),
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "smollm"),
        strings("tokenizer.ggml.tokens", vocab),
        i32s("tokenizer.ggml.token_type", [1] * 256 + [3] * len(SPECIAL)),
        strings("tokenizer.ggml.merges", []),
        u32("tokenizer.ggml.bos_token_id", 256),
        u32("tokenizer.ggml.eos_token_id", 256),
    ]
    body = list(tensors(kind))
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(body), len(metadata)))
    out += b"".join(metadata)
    offset = 0
    for name, shape, number, data in body:
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", number, offset)
        offset = (offset + len(data) + 31) // 32 * 32
    for _, _, _, data in body:
        out += b"\0" * (-len(out) % 32)
        out += data
    with open(path, "wb") as file:
        file.write(out)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:3] and sys.argv[2] not in TYPES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
