// Loads the CUDA driver when the program asks for it.
//
// The bindings call the driver's functions by name, as if linked with its library; a program that
// is would not even print its help where there is no driver. So the names are defined here: each is
// one jump through a table (written by build.rs, from symbols.txt) that points to `absent` until
// the driver is loaded. Hidden: the driver calls itself by these names too, and must not meet ours.

#include <dlfcn.h>
#include <stddef.h>

extern void *forebay_driver_table[] __attribute__((visibility("hidden")));
extern const char *const forebay_driver_names[] __attribute__((visibility("hidden")));
extern const size_t forebay_driver_count __attribute__((visibility("hidden")));

// CUDA_ERROR_NOT_FOUND: every function of the driver returns a CUresult.
int forebay_driver_absent(void) { return 500; }

// Fills the table. Null when that went well, else why not, as text that stays. Not for two threads
// at once.
const char *forebay_driver_load(void) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    const char *error = dlerror();
    return error ? error : "libcuda.so.1 cannot be loaded";
  }
  for (size_t i = 0; i < forebay_driver_count; i++) {
    void *function = dlsym(driver, forebay_driver_names[i]);
    if (function) {
      forebay_driver_table[i] = function;
    }
  }
  return NULL;
}
