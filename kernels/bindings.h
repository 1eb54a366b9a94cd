// What bindgen reads: abi.h, and as functions what is a macro there.
#include "abi.h"

static inline uint32_t fb_attention_shared_bytes(uint32_t head_dim) {
  return FB_ATTENTION_SHARED_BYTES(head_dim);
}
