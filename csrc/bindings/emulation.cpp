#include "bindings/emulation.h"

#include <cstdint>

#include "emulation/machine.h"
#include "emulation/selftest.h"

namespace py = pybind11;

namespace signmaml::bindings {
namespace {

using Address = std::uintptr_t;
using emulation::Buffer;

// Declares the memory that a launch may access, for the lifetime of this object.
class Arguments {
  public:
    explicit Arguments(std::vector<Buffer> buffers) { emulation::settings().buffers = std::move(buffers); }
    ~Arguments() { emulation::settings().buffers.clear(); }
};

void block_sum(Address in, Address out, std::int64_t rows, std::int64_t columns, int block) {
    const Arguments of_launch({{"in", in, rows * columns * 4, 4, false}, {"out", out, rows * 4, 4, true, true}});
    launch_selftest_block_sum({reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), columns},
                              static_cast<int>(rows), block);
}

void fault(int kind, Address in, Address out) {
    const Arguments of_launch({{"in", in, 128 * 4, 4, false}, {"out", out, 128 * 4, 4, true, true}});
    launch_selftest_fault(
        {static_cast<Fault>(kind), reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out)});
}

void matmul_tf32(Address a, Address b, Address c, int m, int n, int k) {
    const Arguments of_launch({{"a", a, std::int64_t{m} * k * 4, 4, false},
                               {"b", b, std::int64_t{k} * n * 4, 4, false},
                               {"c", c, std::int64_t{m} * n * 4, 4, true, true}});
    launch_selftest_matmul_tf32(
        {reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), reinterpret_cast<float*>(c), n, k}, m);
}

void matmul_bf16(Address a, Address b, Address c, int m, int n, int k) {
    const Arguments of_launch({{"a", a, std::int64_t{m} * k * 2, 2, false},
                               {"b", b, std::int64_t{n} * k * 2, 2, false},
                               {"c", c, std::int64_t{m} * n * 4, 4, true, true}});
    launch_selftest_matmul_bf16({reinterpret_cast<const std::uint16_t*>(a), reinterpret_cast<const std::uint16_t*>(b),
                                 reinterpret_cast<float*>(c), n, k},
                                m);
}

}  // namespace

void define_emulation(py::module_& m) {
    m.attr("emulated") = true;
    m.def(
        "configure",
        [](std::uint64_t seed, int blocks_alive, int multiprocessors, int architecture) {
            emulation::settings().tensor_cores = emulation::tensor_cores_of(architecture);
            emulation::settings().seed = seed;
            emulation::settings().blocks_alive = blocks_alive;
            emulation::settings().multiprocessors = multiprocessors;
        },
        py::arg("seed") = 0, py::arg("blocks_alive") = 1, py::arg("multiprocessors") = 2, py::arg("architecture") = 80,
        "Order of threads, blocks that run at the same time, the size that plans are told, and whose tensor cores sum "
        "(80: those whose sums lose most).");
    m.def("selftest_fault", &fault);
    m.def("selftest_block_sum", &block_sum);
    m.def("selftest_matmul_tf32", &matmul_tf32);
    m.def("selftest_matmul_bf16", &matmul_bf16);
}

}  // namespace signmaml::bindings
