// Launches of attention.
#pragma once

#include <algorithm>
#include <map>

#include "reference.h"

inline uint32_t tile_tokens(uint32_t heads, uint32_t kv_heads) {
  return std::max(1u, 16 / (heads / kv_heads));
}

inline void launch_attention(const fb_attention &p, uint32_t dim, uint32_t tiles,
                             uint32_t splits) {
  device->run("forebay_attention_" + std::to_string(dim), {tiles, p.kv_heads, splits}, 128,
              FB_ATTENTION_SHARED_BYTES(dim), p);
}

// Four tiles of one row a CTA.
inline void launch_attention_prefill(const fb_attention &p, uint32_t dim, uint32_t tiles,
                                     uint32_t splits) {
  device->run("forebay_attention_prefill_" + std::to_string(dim), {tiles / 4, p.kv_heads, splits},
              128, FB_ATTENTION_SHARED_BYTES(dim), p);
}

inline void launch_attention_merge(const fb_attention &p, uint32_t dim, uint32_t tokens) {
  device->run("forebay_attention_merge_" + std::to_string(dim), {tokens},
              std::min(1024u, p.heads * 32), 0, p);
}
