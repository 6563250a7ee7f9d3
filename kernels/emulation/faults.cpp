#include "faults.h"

#include <cstring>

#include "threads.h"

namespace simt {
namespace {

std::string last_message;

struct Text {
    int status;
    const char *text;
};

constexpr Text kTexts[] = {
    {0, "no error"},
    {1, "invalid argument"},
    {9, "invalid configuration argument"},
    {kSharedRace, "race on shared memory"},
    {kUnwrittenRead, "read of shared memory that nobody wrote"},
    {kMissingWait, "missing wait: shared memory touched while a copy may still fill it"},
    {kUnwaitedCopy, "thread ended with copies under way"},
    {kDivergence, "divergence: threads met at different places"},
    {kPartialWarp, "collective without all 32 lanes"},
    {kDeadlock, "deadlock"},
    {kOutOfBounds, "access out of bounds"},
    {kMisaligned, "misaligned access"},
    {kReadOnly, "store to a read-only buffer"},
    {kStaleRead, "read-only load of what this launch wrote"},
    {kGlobalRace, "race on global memory"},
    {kUnpublished, "read of another block's store that was not published"},
};

}  // namespace

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

std::string text(Site site) {
    const char *slash = std::strrchr(site.file, '/');
    return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

const char *error_text(int status) {
    for (const Text &known : kTexts)
        if (known.status == status) return known.text;
    return "unknown status";
}

const std::string &message() { return last_message; }

int report(Fault fault, const std::string &what) {
    last_message = std::string(error_text(fault)) + ": " + what;
    return fault;
}

void clear_report() { last_message.clear(); }

void fail(Fault fault, const std::string &what) {
    report(fault, what + " (" + where_now() + ")");
    abandon_launch(fault);
}

}  // namespace simt
