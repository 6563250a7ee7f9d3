#include "shared_memory.h"

#include <string>
#include <vector>

#include "global_memory.h"

namespace simt {
namespace {

constexpr uint32_t kWord = 4;

// An access by one or several lanes of one warp in one epoch of the warp.
struct Touch {
    uint32_t epoch = 0;  // of the block; 0: never
    uint32_t warp_epoch = 0;
    int thread = 0;
    bool several = false;  // other lanes than `thread`, too
    Site site;
};

struct Word {
    Touch write;
    Touch reads[2];  // of two different warps where there are two
    Touch copy;      // under way
};

struct Copy {
    uint32_t shared;
    const void *global;  // null: zeros
    uint32_t bytes;
    uint32_t group;
    Site site;
};

// One thread's copies, oldest first.
struct Copies {
    std::vector<Copy> under_way;
    uint32_t open_group = 0;
};

std::vector<uint8_t> bytes_;
std::vector<Word> words;
Copies copies[kMaxThreads];

bool in_this_block(const Touch &touch) { return touch.epoch >= now.first_epoch; }

// Whether nothing orders an earlier access before one that `thread` makes now.
bool unordered(const Touch &earlier, int thread) {
    if (earlier.epoch != now.epoch) return false;
    if (earlier.thread / kLanes != thread / kLanes) return true;
    return earlier.warp_epoch == warp_epoch(thread / kLanes) && (earlier.several || earlier.thread != thread);
}

std::string describe(const char *verb, int thread, Site site) {
    return std::string(verb) + " by thread " + std::to_string(thread) + " at " + text(site);
}

[[noreturn]] void fail_race(uint32_t address, const std::string &earlier, const std::string &later) {
    fail(kSharedRace, "byte " + std::to_string(address) + ", " + earlier + " and " + later + ", no barrier between");
}

Touch touch_now(int thread, Site site) {
    return Touch{now.epoch, warp_epoch(thread / kLanes), thread, false, site};
}

void check_place(uint32_t address, uint32_t bytes, const char *verb, int thread, Site site) {
    if (address % bytes != 0)
        fail(kMisaligned, describe(verb, thread, site) + " of " + std::to_string(bytes) + " bytes of shared memory at " +
                              std::to_string(address));
    if (address > now.shared_bytes || bytes > now.shared_bytes - address)
        fail(kOutOfBounds, describe(verb, thread, site) + " of " + std::to_string(bytes) +
                               " bytes of shared memory at " + std::to_string(address) + " of " +
                               std::to_string(now.shared_bytes));
}

void check_no_copy(const Word &word, uint32_t address, const char *verb, int thread, Site site) {
    if (in_this_block(word.copy))
        fail(kMissingWait, "byte " + std::to_string(address) + ", " +
                               describe("copy", word.copy.thread, word.copy.site) + " and " +
                               describe(verb, thread, site));
}

void record_read(Word &word, uint32_t address, int thread, Site site) {
    check_no_copy(word, address, "read", thread, site);
    if (!in_this_block(word.write))
        fail(kUnwrittenRead, "byte " + std::to_string(address) + ", " + describe("read", thread, site));
    if (unordered(word.write, thread))
        fail_race(address, describe("write", word.write.thread, word.write.site), describe("read", thread, site));
    const Touch touch = touch_now(thread, site);
    Touch &first = word.reads[0];
    const bool other_warp = first.epoch == now.epoch && first.thread / kLanes != thread / kLanes;
    Touch &mine = word.reads[other_warp ? 1 : 0];
    const bool joins = mine.epoch == touch.epoch && mine.warp_epoch == touch.warp_epoch &&
                       mine.thread / kLanes == thread / kLanes;
    if (joins)
        mine.several |= mine.thread != thread;
    else
        mine = touch;
}

// Whether a write by `thread` now is ordered after everything before it; ends the launch if not.
void check_write(const Word &word, uint32_t address, const char *verb, int thread, Site site) {
    check_no_copy(word, address, verb, thread, site);
    if (unordered(word.write, thread))
        fail_race(address, describe("write", word.write.thread, word.write.site), describe(verb, thread, site));
    for (const Touch &read : word.reads)
        if (unordered(read, thread))
            fail_race(address, describe("read", read.thread, read.site), describe(verb, thread, site));
}

void perform(const Copy &copy) {
    uint8_t *target = &bytes_[copy.shared];
    if (copy.global == nullptr)
        std::memset(target, 0, copy.bytes);
    else
        std::memcpy(target, copy.global, copy.bytes);
    for (uint32_t i = 0; i < copy.bytes / kWord; ++i) {
        Word &word = words[copy.shared / kWord + i];
        word.copy = Touch{};
        word.write = touch_now(me->index, copy.site);
    }
}

void begin_copy(uint32_t shared, const void *global, uint32_t bytes, bool valid, Site site) {
    check_place(shared, bytes, "copy", me->index, site);
    if (valid) check_load(global, bytes, Access::read_only, site);
    for (uint32_t i = 0; i < bytes / kWord; ++i) {
        Word &word = words[shared / kWord + i];
        check_write(word, shared + i * kWord, "copy", me->index, site);
        word.copy = touch_now(me->index, site);
    }
    Copies &mine = copies[me->index];
    mine.under_way.push_back(Copy{shared, valid ? global : nullptr, bytes, mine.open_group, site});
}

}  // namespace

const uint8_t *shared_read(uint32_t address, uint32_t bytes, Site site) {
    check_place(address, bytes, "read", me->index, site);
    for (uint32_t at = address; at < address + bytes; at += kWord)
        record_read(words[at / kWord], at, me->index, site);
    return &bytes_[address];
}

const uint8_t *shared_read_of(int thread, uint32_t address, Site site) {
    check_place(address, kWord, "read", thread, site);
    record_read(words[address / kWord], address, thread, site);
    return &bytes_[address];
}

uint8_t *shared_write(uint32_t address, uint32_t bytes, Site site) {
    check_place(address, bytes, "write", me->index, site);
    for (uint32_t at = address; at < address + bytes; at += kWord) {
        Word &word = words[at / kWord];
        check_write(word, at, "write", me->index, site);
        word.write = touch_now(me->index, site);
    }
    return &bytes_[address];
}

void cp_async16(uint32_t shared, const void *global, bool valid, Site site) {
    begin_copy(shared, global, 16, valid, site);
}

void cp_async8(uint32_t shared, const void *global, bool valid, Site site) {
    begin_copy(shared, global, 8, valid, site);
}

void cp_async_commit(Site) { ++copies[me->index].open_group; }

void cp_async_wait(int pending, Site) {
    Copies &mine = copies[me->index];
    size_t done = 0;
    while (done < mine.under_way.size() &&
           mine.under_way[done].group + static_cast<uint32_t>(pending) < mine.open_group)
        perform(mine.under_way[done++]);
    mine.under_way.erase(mine.under_way.begin(), mine.under_way.begin() + static_cast<long>(done));
}

void poison_shared() {
    bytes_.assign(now.shared_bytes, options.poison);
    const size_t count = (now.shared_bytes + kWord - 1) / kWord;
    if (words.size() < count) words.resize(count);
}

void check_no_copies(const Thread &thread) {
    const Copies &mine = copies[thread.index];
    if (!mine.under_way.empty())
        fail(kUnwaitedCopy, std::to_string(mine.under_way.size()) + " copies, the oldest " +
                                describe("issued", thread.index, mine.under_way[0].site));
}

void forget_copies() {
    for (Copies &mine : copies) mine = Copies{};
}

}  // namespace simt
