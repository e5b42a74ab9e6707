// A few threads that stay, for loops over many independent pieces.
#pragma once

#include <cstdint>
#include <functional>

namespace signmaml::cpu {

// Calls body(begin, end) on ranges that together cover [0, items), on up to `threads` threads, the caller's among them,
// and returns when all are done. body must not throw, and no item may depend on another: which ranges there are, and
// which thread takes which, changes from call to call. With one thread there is one range.
//
// Safe after fork() (a child starts threads of its own) and from several threads at once (whoever comes while the
// threads are busy works alone). Every piece runs with default floating-point behaviour: subnormals are kept and
// rounding is to nearest, whatever the calling thread has set.
void parallel_for(std::int64_t items, int threads,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body);

}  // namespace signmaml::cpu
