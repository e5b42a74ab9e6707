// Counts what a GPU's memory system would do for a launch, from what the emulated threads do.
//
// A GPU executes the lanes of a warp together, the emulator one after the other. So every lane writes down the places
// in the code that it passes, and the traces of a warp are joined whenever its lanes meet: the lanes that wait at the
// lowest address execute it together, which is how lanes come together again after a branch. This needs code whose
// order in memory is that of the source, with every function inlined into its kernel, and the compiler's help to learn
// of every basic block (GCC's -fsanitize-coverage=trace-pc; CMakeLists.txt has the flags).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace signmaml::emulation {

inline constexpr int kLanes = 32;
inline constexpr std::int64_t kSectorBytes = 32;  // what global memory is read and written by

enum class Place : int {
    kBasicBlock,
    kGlobalLoad,
    kGlobalStore,
    kSharedLoad,
    kSharedStore,
    kCopy,  // from global to shared memory, asynchronous
    kMma,
    kShuffle,
    kWarpBarrier,
    kBlockBarrier,
};

inline const char* name_of(Place place) {
    switch (place) {
        case Place::kBasicBlock: return "block";
        case Place::kGlobalLoad: return "global_load";
        case Place::kGlobalStore: return "global_store";
        case Place::kSharedLoad: return "shared_load";
        case Place::kSharedStore: return "shared_store";
        case Place::kCopy: return "copy";
        case Place::kMma: return "mma";
        case Place::kShuffle: return "shuffle";
        case Place::kWarpBarrier: return "warp_barrier";
        default: return "barrier";
    }
}

// What one lane did at one place.
struct Event {
    std::uintptr_t code;  // the address in the code
    Place place;
    int bytes;                 // that the lane moves
    std::uintptr_t address;    // of the data
    std::uintptr_t to_shared;  // the target of a copy
};

// What all warps did at one place.
struct PlaceCounts {
    std::int64_t executions = 0;  // by a warp with at least one lane
    std::int64_t lanes = 0;
    // Of global memory: sectors that a request touches, and that the same bytes would fill.
    std::int64_t sectors = 0, least_sectors = 0;
    // Of shared memory: cycles that a request takes, and that one without conflicts of banks would.
    std::int64_t wavefronts = 0, least_wavefronts = 0;
};

// The bytes of one global array that the counted blocks touched, in whole sectors.
struct ArrayCounts {
    std::string name;
    std::int64_t loaded = 0;  // a sector counts once a block: the next time it is in the first-level cache
    std::int64_t copied = 0;  // past the first-level cache: a sector counts at every request
    std::int64_t stored = 0;  // likewise
    std::int64_t read_by_blocks = 0, written_by_blocks = 0;  // a sector counts once a block
    std::int64_t read_once = 0, written_once = 0;            // a sector counts once
};

struct LaunchCounts {
    std::string kernel;
    std::array<std::int64_t, 3> grid{};
    std::int64_t threads = 0, shared_bytes = 0;
    std::int64_t blocks = 0, counted_blocks = 0;
    // Loads from global memory one after the other, kLoadsInFlight at a time: between two barriers, those of the warp
    // that has most of them.
    std::int64_t load_rounds = 0;
    std::map<std::tuple<std::uintptr_t, Place, int>, PlaceCounts> places;
    std::map<std::uintptr_t, ArrayCounts> arrays;  // by their address
};

inline constexpr int kLoadsInFlight = 4;

// Cycles that shared memory takes for one request of a warp, and the least for as many bytes. `addresses` are of the
// active lanes, by lane; the others are negative.
struct Wavefronts {
    std::int64_t taken, least;
};
Wavefronts wavefronts_of(const std::array<std::int64_t, kLanes>& addresses, int bytes, bool loads);

// An array of global memory.
struct Array {
    std::string name;
    std::uintptr_t address;
};

// Counts the blocks of one launch.
class Counter {
  public:
    explicit Counter(LaunchCounts& counts) : counts_(counts) {}

    // A warp's lanes meet: joins what they did since they last met. `array_of` finds the array of an address.
    void join(int warp, const std::array<std::vector<Event>*, kLanes>& traces, Array (*array_of)(std::uintptr_t));
    // All warps of the block meet, or the block ends.
    void end_interval();
    void end_block();

  private:
    using Sectors = std::set<std::uintptr_t>;
    struct OfArray {
        Sectors read_by_block, written_by_block, loaded_by_block, read, written;
    };

    void take(const Event& first, const std::array<const Event*, kLanes>& lanes);
    void take_global(int warp, const Event& first, const std::array<const Event*, kLanes>& lanes, const Array& array);

    LaunchCounts& counts_;
    std::map<std::uintptr_t, OfArray> arrays_;
    std::vector<std::int64_t> loads_of_warp_;  // since the last barrier
};

}  // namespace signmaml::emulation
