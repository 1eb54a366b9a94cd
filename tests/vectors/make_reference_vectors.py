#!/usr/bin/env python3
"""Writes logits_smollm2.json: logits of a forward pass written independently of the tests' one.

    python3 -m pip install gguf numpy
    python3 tests/vectors/make_reference_vectors.py MODEL.gguf tests/vectors/logits_smollm2.json

numpy, double precision, weights as PyPI's `gguf` dequantises them, and rotary positions in the
other convention (halves of a head instead of neighbours, query and key rows reordered to match),
so that a mistake in one is unlikely to be in the other.
"""
import json
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

TOKENS = [19556, 28, 905, 17, 198, 504, 3575, 282, 4649, 314, 7042, 30, 669, 253, 4052, 6422, 1, 4093,
          198, 49151, 2, 33, 34, 35, 0, 1000, 20000, 30000, 40000, 216, 216, 216]
IDS = [0, 1, 2, 198, 216, 253, 260, 284, 1000, 7042, 20000, 49151]


def main():
    reader = GGUFReader(sys.argv[1])

    def value(key):
        return reader.fields["llama." + key].contents()

    tensors = {t.name: t for t in reader.tensors}

    def weight(name):
        t = tensors[name + ".weight"]
        return dequantize(t.data, t.tensor_type).astype(np.float64).reshape([int(n) for n in t.shape[::-1]])

    layers, heads, kv_heads = value("block_count"), value("attention.head_count"), value("attention.head_count_kv")
    eps, theta = np.float32(value("attention.layer_norm_rms_epsilon")).astype(np.float64), value("rope.freq_base")
    dim = value("rope.dimension_count")

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight(name)

    def halves(w, count):
        return w.reshape(count, dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)

    angles = np.outer(np.arange(len(TOKENS)), theta ** (-np.arange(0, dim, 2) / dim))
    cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2))

    def rotated(x):       # heads, positions, dim
        turned = np.concatenate([-x[..., dim // 2:], x[..., :dim // 2]], -1)
        return x * cos + turned * sin

    embedding = weight("token_embd")
    x = embedding[TOKENS]
    mask = np.triu(np.full((len(TOKENS),) * 2, -np.inf), 1)
    for i in range(layers):
        b = "blk.%d." % i
        h = norm(x, b + "attn_norm")
        q = (h @ halves(weight(b + "attn_q"), heads).T).reshape(len(TOKENS), heads, dim).swapaxes(0, 1)
        k = (h @ halves(weight(b + "attn_k"), kv_heads).T).reshape(len(TOKENS), kv_heads, dim).swapaxes(0, 1)
        v = (h @ weight(b + "attn_v").T).reshape(len(TOKENS), kv_heads, dim).swapaxes(0, 1)
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(a, heads // kv_heads, 0) for a in (k, v))
        s = q @ k.swapaxes(1, 2) / np.sqrt(dim) + mask
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + (p @ v).swapaxes(0, 1).reshape(len(TOKENS), -1) @ weight(b + "attn_output").T
        h = norm(x, b + "ffn_norm")
        g = h @ weight(b + "ffn_gate").T
        x = x + (g / (1 + np.exp(-g)) * (h @ weight(b + "ffn_up").T)) @ weight(b + "ffn_down").T
    logits = norm(x, "output_norm") @ embedding.T
    with open(sys.argv[2], "w") as f:
        json.dump({"tokens": TOKENS, "ids": IDS, "argmax": [int(n) for n in logits.argmax(-1)],
                   "logits": [[round(float(n), 9) for n in row] for row in logits[:, IDS]]}, f)
        f.write("\n")


main()
