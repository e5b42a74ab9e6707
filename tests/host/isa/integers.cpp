// integers.h: pieces cover the whole range exactly once, as evenly as possible.

#include "cpu/isa/integers.h"

#include "check.h"

using namespace signmaml::cpu::SIGNMAML_ISA;

namespace {

void cut(std::int64_t count, std::int64_t size) {
    const std::int64_t n = pieces(count, size);
    CHECK(n * size >= count && (n - 1) * size < count, "%d in pieces of %d: %d", int(count), int(size), int(n));
    std::int64_t smallest = count, largest = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t length = start_of(i + 1, count, n) - start_of(i, count, n);
        smallest = least(smallest, length);
        largest = most(largest, length);
    }
    CHECK(start_of(0, count, n) == 0 && start_of(n, count, n) == count, "%d in %d pieces", int(count), int(n));
    CHECK(largest <= size && largest - smallest <= 1, "%d in %d pieces of %d to %d", int(count), int(n), int(smallest),
          int(largest));
}

}  // namespace

int main() {
    for (std::int64_t count = 1; count <= 100; ++count) {
        for (std::int64_t size = 1; size <= 30; ++size) cut(count, size);
    }
    return failures == 0 ? 0 : 1;
}
