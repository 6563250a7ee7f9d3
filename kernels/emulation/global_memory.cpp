#include "global_memory.h"

#include <algorithm>
#include <string>
#include <vector>

namespace simt {
namespace {

constexpr size_t kElement = 2;  // bytes that share a stamp: no kernel stores less

// The last store to an element.
struct Stamp {
    uint32_t launch = 0;
    uint32_t block = 0;
    uint32_t epoch = 0;
    uint32_t sequence = 0;  // of the stores of the block
    int thread = 0;
    bool atomic = false;
    Site site;
};

struct Buffer {
    uintptr_t begin = 0, end = 0;
    bool writable = false;
    std::vector<Stamp> stamps;  // of a writable buffer, one per element
};

// What one block has made visible to the others.
struct Published {
    uint32_t sequence = 0;  // stores up to here
    uint32_t epoch = 0;     // by other threads than the publisher: only before this one
    int thread = 0;
    bool any = false;
};

std::vector<Buffer> buffers;  // by address
std::vector<Published> published;
uint32_t stores = 0, fenced = 0;  // of the running block
uint32_t counted_block = 0;

Buffer *buffer_of(uintptr_t address) {
    static size_t last = 0;
    if (last < buffers.size() && buffers[last].begin <= address && address < buffers[last].end) return &buffers[last];
    const auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                        [](uintptr_t a, const Buffer &buffer) { return a < buffer.begin; });
    if (after == buffers.begin()) return nullptr;
    last = static_cast<size_t>(after - buffers.begin()) - 1;
    return &buffers[last];
}

std::string describe(const char *verb, size_t bytes, Site site) {
    return std::string(verb) + " of " + std::to_string(bytes) + " bytes by thread " + std::to_string(me->index) +
           " at " + text(site);
}

std::string describe(const Stamp &stamp) {
    return "stored by thread " + std::to_string(stamp.thread) + " of block " + std::to_string(stamp.block) + " at " +
           text(stamp.site);
}

std::string nearest(uintptr_t address, const Buffer *below) {
    if (buffers.empty()) return "no buffer is registered";
    if (below == nullptr) return std::to_string(buffers[0].begin - address) + " bytes before the first buffer";
    return "offset " + std::to_string(address - below->begin) + " of a buffer of " +
           std::to_string(below->end - below->begin) + " bytes";
}

Buffer &checked_buffer(const void *pointer, size_t bytes, const char *verb, Site site) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    Buffer *buffer = buffer_of(address);
    if (buffer == nullptr || address >= buffer->end || bytes > buffer->end - address)
        fail(kOutOfBounds, describe(verb, bytes, site) + ", " + nearest(address, buffer));
    if (address % bytes != 0)
        fail(kMisaligned, describe(verb, bytes, site) + ", " + nearest(address, buffer));
    return *buffer;
}

void count_block() {
    if (counted_block == now.block) return;
    counted_block = now.block;
    stores = fenced = 0;
}

// Why the running thread may not rely on an earlier store of this launch; 0 if it may.
int unordered(const Stamp &stamp) {
    if (stamp.block == now.block)
        return stamp.epoch == now.epoch && stamp.thread != me->index ? kGlobalRace : 0;
    const Published &theirs = published[stamp.block];
    const bool visible = theirs.any && stamp.sequence <= theirs.sequence &&
                         (stamp.epoch < theirs.epoch || stamp.thread == theirs.thread);
    return visible && published[now.block].any ? 0 : kUnpublished;
}

template <class Visit>
void each_stamp(Buffer &buffer, const void *pointer, size_t bytes, Visit visit) {
    const size_t offset = reinterpret_cast<uintptr_t>(pointer) - buffer.begin;
    for (size_t i = offset / kElement; i <= (offset + bytes - 1) / kElement; ++i) visit(buffer.stamps[i]);
}

}  // namespace

void check_load(const void *address, size_t bytes, Access access, Site site) {
    Buffer &buffer = checked_buffer(address, bytes, "load", site);
    if (access == Access::coherent) count_spin(site);
    if (!buffer.writable) return;
    each_stamp(buffer, address, bytes, [&](const Stamp &stamp) {
        if (stamp.launch != now.launch) return;
        if (access == Access::read_only) fail(kStaleRead, describe("load", bytes, site) + ", " + describe(stamp));
        if (stamp.atomic) return;
        const int why = unordered(stamp);
        if (why != 0) fail(static_cast<Fault>(why), describe("load", bytes, site) + ", " + describe(stamp));
    });
}

void check_store(const void *address, size_t bytes, Site site) {
    Buffer &buffer = checked_buffer(address, bytes, "store", site);
    if (!buffer.writable) fail(kReadOnly, describe("store", bytes, site));
    count_block();
    ++stores;
    each_stamp(buffer, address, bytes, [&](Stamp &stamp) {
        if (stamp.launch == now.launch && !stamp.atomic && unordered(stamp) != 0)
            fail(kGlobalRace, describe("store", bytes, site) + ", " + describe(stamp));
        stamp = Stamp{now.launch, now.block, now.epoch, stores, me->index, false, site};
    });
}

uint32_t atomic_add(uint32_t *address, uint32_t value, Site site) {
    Buffer &buffer = checked_buffer(address, sizeof(uint32_t), "atomic addition", site);
    if (!buffer.writable) fail(kReadOnly, describe("atomic addition", sizeof(uint32_t), site));
    count_block();
    each_stamp(buffer, address, sizeof(uint32_t), [&](Stamp &stamp) {
        if (stamp.launch == now.launch && !stamp.atomic && unordered(stamp) != 0)
            fail(kGlobalRace, describe("atomic addition", sizeof(uint32_t), site) + ", " + describe(stamp));
        stamp = Stamp{now.launch, now.block, now.epoch, stores, me->index, true, site};
    });
    published[now.block] = Published{fenced, now.epoch, me->index, true};
    const uint32_t before = *address;
    *address = before + value;
    return before;
}

void fence_device() {
    count_block();
    fenced = stores;
}

int zero(void *address, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    const Buffer *buffer = buffer_of(begin);
    if (bytes == 0) return 0;
    if (buffer == nullptr || begin >= buffer->end || bytes > buffer->end - begin)
        return report(kOutOfBounds, "zeroing " + std::to_string(bytes) + " bytes, " + nearest(begin, buffer));
    if (!buffer->writable) return report(kReadOnly, "zeroing " + std::to_string(bytes) + " bytes");
    std::memset(address, 0, bytes);
    return 0;
}

bool register_buffer(const void *address, size_t bytes, bool writable) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    const auto is_same = [&](const Buffer &buffer) { return buffer.begin == begin; };
    buffers.erase(std::remove_if(buffers.begin(), buffers.end(), is_same), buffers.end());
    for (const Buffer &other : buffers)
        if (begin < other.end && other.begin < begin + bytes) return false;
    Buffer buffer;
    buffer.begin = begin;
    buffer.end = begin + bytes;
    buffer.writable = writable;
    if (writable) buffer.stamps.resize(bytes / kElement + 1);
    const auto after = std::upper_bound(buffers.begin(), buffers.end(), begin,
                                        [](uintptr_t a, const Buffer &other) { return a < other.begin; });
    buffers.insert(after, std::move(buffer));
    return true;
}

void forget_buffers() { buffers.clear(); }

void begin_launch(uint32_t blocks) {
    published.assign(blocks, Published{});
    stores = fenced = 0;
    counted_block = 0;
}

}  // namespace simt
