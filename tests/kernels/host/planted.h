// Parameters of the kernels with planted faults (planted.cu).
#pragma once

#include <stdint.h>

struct fb_planted {
  const uint32_t *in; // [blocks][64]
  uint32_t *out;      // [blocks][64], of each block its input turned by one place
};
