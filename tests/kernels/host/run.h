// The host run as the test program sees it.
#pragma once

#include <stddef.h>
#include <stdint.h>

bool fb_host_has(const char *name);
// Of the order in which threads and blocks run.
void fb_host_seed(uint32_t seed);
void fb_host_launch(const char *name, const uint32_t grid[3], const uint32_t block[3],
                    size_t shared_bytes, const void *params, size_t params_bytes);

// Device memory, poisoned, whose end a kernel cannot pass unseen.
void *fb_host_allocate(size_t bytes);
void fb_host_release(void *memory);
// From now on a kernel that touches what is nobody's is named.
void fb_host_report_faults();
