#include "bindings/emulation.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/machine.h"
#include "emulation/selftest.h"
#include "plan/math.h"

namespace py = pybind11;
using namespace pybind11::literals;

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

#ifndef SIGNMAML_ON_PTX
// The linker puts this where the module's file begins in memory.
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));

py::list take_counts() {
    py::list launches;
    for (const emulation::LaunchCounts& counts : emulation::settings().counts) {
        py::list places;
        for (const auto& [key, of_place] : counts.places) {
            const auto& [code, place, bytes] = key;
            places.append(py::dict("code"_a = code - reinterpret_cast<std::uintptr_t>(&__ehdr_start),
                                   "kind"_a = name_of(place), "bytes"_a = bytes, "executions"_a = of_place.executions,
                                   "lanes"_a = of_place.lanes, "sectors"_a = of_place.sectors,
                                   "least_sectors"_a = of_place.least_sectors, "wavefronts"_a = of_place.wavefronts,
                                   "least_wavefronts"_a = of_place.least_wavefronts));
        }
        py::list arrays;
        for (const auto& [address, of_array] : counts.arrays) {
            arrays.append(py::dict("name"_a = of_array.name, "address"_a = address, "loaded"_a = of_array.loaded,
                                   "copied"_a = of_array.copied, "stored"_a = of_array.stored,
                                   "read_by_blocks"_a = of_array.read_by_blocks,
                                   "written_by_blocks"_a = of_array.written_by_blocks,
                                   "read_once"_a = of_array.read_once, "written_once"_a = of_array.written_once));
        }
        launches.append(py::dict("kernel"_a = counts.kernel, "grid"_a = counts.grid, "threads"_a = counts.threads,
                                 "shared_bytes"_a = counts.shared_bytes, "blocks"_a = counts.blocks,
                                 "counted_blocks"_a = counts.counted_blocks, "load_rounds"_a = counts.load_rounds,
                                 "places"_a = places, "arrays"_a = arrays));
    }
    emulation::settings().counts.clear();
    emulation::settings().counted_blocks = 0;
    return launches;
}

py::tuple wavefronts(const std::vector<std::int64_t>& addresses, int bytes, bool loads) {
    std::array<std::int64_t, emulation::kLanes> of_lanes;
    of_lanes.fill(-1);
    std::copy_n(addresses.begin(), std::min(addresses.size(), of_lanes.size()), of_lanes.begin());
    const emulation::Wavefronts found = emulation::wavefronts_of(of_lanes, bytes, loads);
    return py::make_tuple(found.taken, found.least);
}

void counted(Address in, Address out, int blocks) {
    const Arguments of_launch({{"in", in, 129 * 4, 4, false}, {"out", out, 64 * 4, 4, true}});
    launch_selftest_counted({reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out)}, blocks);
}
#endif  // SIGNMAML_ON_PTX

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
#ifndef SIGNMAML_ON_PTX
    m.def(
        "count",
        [](int blocks, const std::set<std::string>& in_full) {
#if !defined(__GNUC__) || defined(__clang__)
            throw std::runtime_error("counting needs a module built by GCC, which tells of every basic block");
#endif
            emulation::settings().counts.clear();
            emulation::settings().counted_blocks = blocks;
            emulation::settings().counted_in_full = in_full;
        },
        py::arg("blocks"), py::arg("in_full") = std::set<std::string>(),
        "From now on launches are counted instead of checked, and only this many blocks of each run (all of the "
        "kernels named), until the counts are taken.");
    m.def("take_counts", &take_counts,
          "The counts of every launch since `count`; `code` is an address in this module.");
    m.def("wavefronts", &wavefronts, py::arg("addresses"), py::arg("bytes"), py::arg("loads"),
          "Cycles of shared memory for one request of a warp, and the least for as many bytes; addresses by lane, "
          "negative where a lane takes no part.");
    m.def("selftest_counted", &counted);
    m.def(
        "selftest_quotient",
        [](int n, int value, std::int64_t most) { return selftest_quotient(n, divisor_of(value, most)); }, py::arg("n"),
        py::arg("value"), py::arg("most"), "n / value, as kernels compute it, where n is at most `most`.");
#endif  // SIGNMAML_ON_PTX
    m.def("selftest_fault", &fault);
    m.def("selftest_block_sum", &block_sum);
    m.def("selftest_matmul_tf32", &matmul_tf32);
    m.def("selftest_matmul_bf16", &matmul_bf16);
}

}  // namespace signmaml::bindings
