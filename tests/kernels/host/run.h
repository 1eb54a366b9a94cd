// The host run as the test program sees it.
#pragma once

#include <stddef.h>
#include <stdint.h>

bool fb_host_has(const char *name);
// Of the order in which threads run.
void fb_host_seed(uint32_t seed);
void fb_host_launch(const char *name, const uint32_t grid[3], const uint32_t block[3],
                    size_t shared_bytes, const void *params, size_t params_bytes);
