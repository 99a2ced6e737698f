// Tells ThreadSanitizer where OpenMP starts and joins threads. The runtime is not instrumented, so without this all
// that goes from the caller to a parallel region and back looks like a race. To be preloaded, in front of the runtime.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

namespace {

struct Region {
  void (*run)(void *);
  void *data;
  char start, end;  // their addresses stand for the two events: threads of a region are not ordered by one another's
};

void enter(void *argument) {
  Region *region = static_cast<Region *>(argument);
  __tsan_acquire(&region->start);
  region->run(region->data);
  __tsan_release(&region->end);
}

}  // namespace

extern "C" void GOMP_parallel(void (*run)(void *), void *data, unsigned num_threads, unsigned flags) {
  using Parallel = void(void (*)(void *), void *, unsigned, unsigned);
  static Parallel *const parallel = reinterpret_cast<Parallel *>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{run, data, 0, 0};
  __tsan_release(&region.start);
  parallel(enter, &region, num_threads, flags);
  __tsan_acquire(&region.end);
}
