// Names and launches of the matrix products.
#pragma once

#include "reference.h"

enum Epilogue { STORE, RESIDUAL, QKV, SWIGLU };
const char *const epilogue_names[] = {"store", "residual", "qkv", "swiglu"};

inline std::string gemm_kernel(uint32_t type, Epilogue epilogue, uint32_t n) {
  return std::string("forebay_gemm_") + type_names[type] + "_" + epilogue_names[epilogue] + "_" +
         std::to_string(n);
}

// Whether a warp goes through the parts of K in turn, or several have one each.
enum Parts { AS_ADVISED, SPREAD, IN_TURN };

inline void launch_gemm(fb_gemm &p, Epilogue epilogue, uint32_t n, uint32_t tokens,
                        Parts parts = AS_ADVISED) {
  p.ksplit = fb_ksplit(p.weight.rows, p.weight.columns);
  p.in_turn = parts == AS_ADVISED ? fb_gemm_in_turn(p.weight.rows, tokens, n) : parts == IN_TURN;
  const uint32_t shares = p.in_turn ? 1 : p.ksplit;
  const Grid grid = {fb_gemm_grid_x(p.weight.rows, shares), (tokens + n - 1) / n, 1};
  device->run(gemm_kernel(p.weight.type, epilogue, n), grid, FB_GEMM_WARPS * 32,
              fb_gemm_shared_bytes(p.weight.type, n, shares), p);
}
