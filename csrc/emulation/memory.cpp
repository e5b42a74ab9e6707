#include "emulation/memory.h"

#include <stdexcept>
#include <utility>

namespace signmaml::emulation {
namespace {

bool same_thread(const Visitor& a, const Visitor& b) { return a.block == b.block && a.thread == b.thread; }

// Whether the earlier access happened before the later one: the same thread, or a barrier in between.
bool ordered(const Visitor& earlier, const Visitor& later) {
    if (!earlier.exists() || same_thread(earlier, later)) return true;
    if (earlier.block != later.block) return false;
    if (earlier.block_epoch != later.block_epoch) return true;
    return earlier.warp == later.warp && earlier.warp_epoch != later.warp_epoch;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

}  // namespace

std::string describe(const Visitor& who) {
    return "block " + std::to_string(who.block) + ", thread " + std::to_string(who.thread);
}

void TrackedMemory::Readers::add(const Visitor& who) {
    if (last.exists() && last.block != who.block) {
        several_blocks = true;
    } else if (!last.exists() || last.block_epoch != who.block_epoch) {
        several_threads = several_warps = false;
    } else if (last.warp != who.warp) {
        several_threads = several_warps = true;
    } else if (last.warp_epoch != who.warp_epoch) {
        several_threads = false;
    } else if (last.thread != who.thread) {
        several_threads = true;
    }
    last = who;
}

bool TrackedMemory::Readers::race_with_writer(const Visitor& who) const {
    if (!last.exists()) return false;
    if (several_blocks || last.block != who.block) return true;
    if (last.block_epoch != who.block_epoch) return false;
    if (several_warps || last.warp != who.warp) return true;
    return last.warp_epoch == who.warp_epoch && (several_threads || last.thread != who.thread);
}

TrackedMemory::TrackedMemory(std::string name, void* base, std::size_t bytes, std::size_t element_bytes, bool writable,
                             bool starts_written)
    : name_(std::move(name)),
      base_(static_cast<char*>(base)),
      bytes_(bytes),
      element_bytes_(element_bytes),
      writable_(writable),
      elements_((bytes + element_bytes - 1) / element_bytes) {
    if (starts_written) {
        for (Element& element : elements_) element.written = true;
    }
}

bool TrackedMemory::holds(const void* address) const {
    const auto* at = static_cast<const char*>(address);
    return at >= base_ && at < base_ + bytes_;
}

void TrackedMemory::visit(const void* address, std::size_t bytes, Access access, const Visitor& who) {
    const auto* at = static_cast<const char*>(address);
    const auto offset = static_cast<std::size_t>(at - base_);
    if (at < base_ || offset + bytes > bytes_) {
        fail("out of bounds: " + describe(who) + " touches " + std::to_string(bytes) + " bytes at byte " +
             std::to_string(at - base_) + " of '" + name_ + "', which has " + std::to_string(bytes_));
    }
    if (access != Access::kRead && !writable_) fail("read only: " + describe(who) + " writes to '" + name_ + "'");
    for (std::size_t i = offset / element_bytes_; i * element_bytes_ < offset + bytes; ++i) {
        Element& element = elements_[i];
        const auto where = [&] { return "element " + std::to_string(i) + " of '" + name_ + "'"; };
        const bool equal_writes = access == Access::kFlag && element.by_flag;
        if (!ordered(element.writer, who) && !equal_writes) {
            fail("race: " + describe(who) + (access == Access::kRead ? " reads " : " writes ") + where() +
                 ", written by " + describe(element.writer) + " with no barrier in between");
        }
        if (access == Access::kRead) {
            if (!element.written)
                fail("uninitialised: " + describe(who) + " reads " + where() + ", which nobody wrote");
            element.readers.add(who);
            continue;
        }
        if (element.readers.race_with_writer(who)) {
            fail("race: " + describe(who) + " writes " + where() + ", read by " + describe(element.readers.last) +
                 " or another thread with no barrier in between");
        }
        element.writer = who;
        element.readers = Readers{};
        element.by_flag = access == Access::kFlag;
        element.written = true;
    }
}

}  // namespace signmaml::emulation
