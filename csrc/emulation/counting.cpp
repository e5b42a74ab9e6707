#include "emulation/counting.h"

#include <algorithm>

namespace signmaml::emulation {
namespace {

constexpr int kBanks = 32;
constexpr std::int64_t kWordBytes = 4;  // of a bank
constexpr int kBytesOfCycle = 128;      // that shared memory returns

// Cycles for the lanes [first, end): the most different words that one bank holds.
std::int64_t cycles_of(const std::array<std::int64_t, kLanes>& addresses, int first, int end, int bytes) {
    std::set<std::int64_t> words;
    for (int lane = first; lane < end; ++lane) {
        if (addresses[lane] < 0) continue;
        for (std::int64_t at = addresses[lane]; at < addresses[lane] + bytes; at += kWordBytes) {
            words.insert(at / kWordBytes);
        }
    }
    std::array<std::int64_t, kBanks> of_bank{};
    for (const std::int64_t word : words) ++of_bank[word % kBanks];
    return *std::max_element(of_bank.begin(), of_bank.end());
}

// Whether all pairs of lanes whose numbers differ in `bit` read the same address.
bool pairs_agree(const std::array<std::int64_t, kLanes>& addresses, int bit) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const std::int64_t other = addresses[lane ^ bit];
        if (addresses[lane] >= 0 && other >= 0 && addresses[lane] != other) return false;
    }
    return true;
}

std::int64_t in_bytes(const std::set<std::uintptr_t>& sectors) {
    return static_cast<std::int64_t>(sectors.size()) * kSectorBytes;
}

}  // namespace

// Accesses of 8 bytes go by halves of a warp, those of 16 by quarters. Loads whose pairs of lanes read the same address
// (lanes n and n ^ 1, or n and n ^ 2) go twice as many at a time. NVIDIA has said so of compute capability 7 in its
// developer forum ("Unexpected shared memory bank conflict", answer 2); nothing newer is documented.
Wavefronts wavefronts_of(const std::array<std::int64_t, kLanes>& addresses, int bytes, bool loads) {
    int lanes_at_once = std::min(kLanes, kBytesOfCycle / std::max(bytes, static_cast<int>(kWordBytes)));
    if (loads && lanes_at_once < kLanes && (pairs_agree(addresses, 1) || pairs_agree(addresses, 2))) lanes_at_once *= 2;
    Wavefronts found{0, 0};
    std::set<std::int64_t> words;
    std::int64_t active = 0;
    for (int first = 0; first < kLanes; first += lanes_at_once) {
        found.taken += cycles_of(addresses, first, first + lanes_at_once, bytes);
    }
    for (const std::int64_t address : addresses) {
        if (address < 0) continue;
        ++active;
        for (std::int64_t at = address; at < address + bytes; at += kWordBytes) words.insert(at / kWordBytes);
    }
    const auto quotient = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
    found.least = quotient(static_cast<std::int64_t>(words.size()), kBanks);
    // A register of every lane takes a cycle to return, or half of one if lanes agree by pairs.
    if (loads) found.least = std::max(found.least, quotient(active * bytes, 2 * kBytesOfCycle));
    return found;
}

void Counter::join(int warp, const std::array<std::vector<Event>*, kLanes>& traces, Array (*array_of)(std::uintptr_t)) {
    std::array<std::size_t, kLanes> next{};
    for (;;) {
        const Event* first = nullptr;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (traces[lane] == nullptr || next[lane] == traces[lane]->size()) continue;
            const Event& event = (*traces[lane])[next[lane]];
            if (first == nullptr || event.code < first->code) first = &event;
        }
        if (first == nullptr) break;
        std::array<const Event*, kLanes> together{};
        for (int lane = 0; lane < kLanes; ++lane) {
            if (traces[lane] == nullptr || next[lane] == traces[lane]->size()) continue;
            const Event& event = (*traces[lane])[next[lane]];
            if (event.code != first->code || event.place != first->place) continue;
            together[lane] = &event;
            ++next[lane];
        }
        const bool global =
            first->place == Place::kGlobalLoad || first->place == Place::kGlobalStore || first->place == Place::kCopy;
        take(*first, together);
        if (global) take_global(warp, *first, together, array_of(first->address));
    }
    for (std::vector<Event>* trace : traces) {
        if (trace != nullptr) trace->clear();
    }
}

void Counter::take(const Event& first, const std::array<const Event*, kLanes>& lanes) {
    PlaceCounts& counts = counts_.places[{first.code, first.place, first.bytes}];
    ++counts.executions;
    std::array<std::int64_t, kLanes> in_shared;
    in_shared.fill(-1);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] == nullptr) continue;
        ++counts.lanes;
        const bool copies = first.place == Place::kCopy;
        in_shared[lane] = static_cast<std::int64_t>(copies ? lanes[lane]->to_shared : lanes[lane]->address);
    }
    const bool loads = first.place == Place::kSharedLoad;
    if (!loads && first.place != Place::kSharedStore && first.place != Place::kCopy) return;
    const Wavefronts found = wavefronts_of(in_shared, first.bytes, loads);
    counts.wavefronts += found.taken;
    counts.least_wavefronts += found.least;
}

void Counter::take_global(int warp, const Event& first, const std::array<const Event*, kLanes>& lanes,
                          const Array& array) {
    Sectors sectors;
    std::set<std::uintptr_t> addresses;
    for (const Event* event : lanes) {
        if (event == nullptr) continue;
        sectors.insert(event->address / kSectorBytes);
        addresses.insert(event->address);
    }
    // Accesses are aligned and of one size, so that two of them are the same bytes or have none in common.
    const auto bytes = static_cast<std::int64_t>(addresses.size()) * first.bytes;
    PlaceCounts& counts = counts_.places[{first.code, first.place, first.bytes}];
    counts.sectors += static_cast<std::int64_t>(sectors.size());
    counts.least_sectors += (bytes + kSectorBytes - 1) / kSectorBytes;
    OfArray& seen = arrays_[array.address];
    ArrayCounts& of_array = counts_.arrays[array.address];
    of_array.name = array.name;
    if (first.place == Place::kGlobalStore) {
        of_array.stored += in_bytes(sectors);
        seen.written_by_block.insert(sectors.begin(), sectors.end());
        return;
    }
    if (first.place == Place::kCopy) {
        of_array.copied += in_bytes(sectors);
    } else {
        seen.loaded_by_block.insert(sectors.begin(), sectors.end());
    }
    seen.read_by_block.insert(sectors.begin(), sectors.end());
    loads_of_warp_.resize(std::max(loads_of_warp_.size(), static_cast<std::size_t>(warp) + 1));
    ++loads_of_warp_[warp];
}

void Counter::end_interval() {
    if (loads_of_warp_.empty()) return;
    const std::int64_t most = *std::max_element(loads_of_warp_.begin(), loads_of_warp_.end());
    counts_.load_rounds += (most + kLoadsInFlight - 1) / kLoadsInFlight;
    loads_of_warp_.clear();
}

void Counter::end_block() {
    end_interval();
    ++counts_.counted_blocks;
    for (auto& [address, seen] : arrays_) {
        ArrayCounts& of_array = counts_.arrays[address];
        of_array.loaded += in_bytes(seen.loaded_by_block);
        of_array.read_by_blocks += in_bytes(seen.read_by_block);
        of_array.written_by_blocks += in_bytes(seen.written_by_block);
        seen.read.insert(seen.read_by_block.begin(), seen.read_by_block.end());
        seen.written.insert(seen.written_by_block.begin(), seen.written_by_block.end());
        of_array.read_once = in_bytes(seen.read);
        of_array.written_once = in_bytes(seen.written);
        seen.loaded_by_block.clear();
        seen.read_by_block.clear();
        seen.written_by_block.clear();
    }
}

}  // namespace signmaml::emulation
