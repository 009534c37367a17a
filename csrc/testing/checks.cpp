// The shim's access checks: bounds, alignment, read-only, races, coalescing. A checked build compiles the kernels with
// -fsanitize=thread,alignment,... but links no sanitizer: the functions that such code calls are the ones below.
#include "testing/checks.h"

#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace shim {
namespace {

constexpr size_t kSharedBytes = 228 << 10;  // an SM's, of the GPUs we build for
constexpr size_t kSharedGap = 64;           // between two shared arrays, so that an overrun does not land in the next

// A thread at a point of its block's order.
struct Stamp {
  uint32_t block, epoch;
  uint16_t thread, warp_epoch;
};
// Per granule of a buffer. Two readers of different threads: a writer races with at least one of them whoever it is.
struct Cell {
  Stamp writer, reader, other_reader, atomic;
};
struct FreeCells {
  void operator()(Cell* p) const { std::free(p); }
};
struct Buffer {
  char *begin, *end;
  std::string name;
  bool shared, read_only;
  size_t granule;                          // bytes that a cell stands for
  std::unique_ptr<Cell, FreeCells> cells;  // calloc: pages that no access reaches cost nothing

  Buffer(void* p, size_t bytes, std::string n, bool is_shared, bool is_read_only, size_t bytes_a_cell)
      : begin(static_cast<char*>(p)),
        end(begin + bytes),
        name(std::move(n)),
        shared(is_shared),
        read_only(is_read_only),
        granule(bytes_a_cell),
        cells(static_cast<Cell*>(std::calloc(bytes / granule + 1, sizeof(Cell)))) {}
  std::string label() const { return shared ? "shared memory " + name : name; }
};

alignas(128) char arena[kSharedBytes + 64 * kSharedGap];
size_t arena_used;
std::vector<Buffer> registered, shared_arrays;

bool unordered(const Stamp& s, bool shared) {
  if (s.block < launch_stamp) return false;
  if (s.block != block_stamp) return !shared;
  if (s.thread == running->index || s.epoch != epoch) return false;
  const bool same_warp = s.thread / 32 == running->index / 32;
  return !(same_warp && s.warp_epoch != uint16_t(running->warp_epoch));
}

void report_race(const Buffer& b, size_t byte, const char* what, const char* earlier, const Stamp& s) {
  fault(std::string("race: ") + what + " of " + b.label() + " byte " + text(byte) + " " + earlier + " by block " +
        text(s.block - launch_stamp) + " thread " + text(s.thread) + " with no barrier between" + where());
}

void check_order(Buffer& b, size_t index, Access access) {
  Cell& cell = b.cells.get()[index];
  const size_t byte = index * b.granule;
  const char* what = access == Read ? "read" : access == Write ? "write" : "atomic";
  if (unordered(cell.writer, b.shared)) return report_race(b, byte, what, "written", cell.writer);
  if (access != Atomic && unordered(cell.atomic, b.shared)) return report_race(b, byte, what, "updated atomically", cell.atomic);
  if (access != Read)
    for (const Stamp& s : {cell.reader, cell.other_reader})
      if (unordered(s, b.shared)) return report_race(b, byte, what, "read", s);
  const Stamp now{block_stamp, epoch, uint16_t(running->index), uint16_t(running->warp_epoch)};
  if (access == Write) cell.writer = now;
  if (access == Atomic) cell.atomic = now;
  if (access == Read) {
    if (cell.reader.thread != now.thread || cell.reader.block != now.block) cell.other_reader = cell.reader;
    cell.reader = now;
  }
}

// ---- coalescing: the 32-byte sectors that one warp's execution of one access touches

struct Place {
  const void* pc;
  uint32_t block, thread_or_warp, nth;
  bool operator==(const Place&) const = default;
};
struct PlaceHash {
  size_t operator()(const Place& p) const {
    uint64_t h = reinterpret_cast<uintptr_t>(p.pc);
    for (uint64_t v : {p.block, p.thread_or_warp, p.nth}) h = (h ^ v) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
    return h;
  }
};
bool count_sectors;
std::unordered_map<Place, unsigned, PlaceHash> executions;
std::unordered_map<Place, std::unordered_set<uint64_t>, PlaceHash> requests[2];
uint64_t access_count[2][5];  // [write][log2 of bytes]

void count(const char* p, size_t bytes, bool write, const void* pc) {
  int log = 0;
  while (log < 4 && (size_t(2) << log) <= bytes) ++log;
  ++access_count[write][log];
  if (!count_sectors) return;
  const unsigned nth = executions[{pc, block_stamp, running->index, 0}]++;
  auto& sectors = requests[write][{pc, block_stamp, running->index / 32, nth}];
  for (uintptr_t s = uintptr_t(p) / 32; s <= (uintptr_t(p) + bytes - 1) / 32; ++s) sectors.insert(s);
}

// ---- one access

extern "C" {
extern char __ehdr_start __attribute__((visibility("hidden")));
extern char _end __attribute__((visibility("hidden")));
}

bool constant_of_library(const char* p) { return p >= &__ehdr_start && p < &_end && !within(p, arena, sizeof arena); }

Buffer* find(const char* p) {
  for (Buffer& b : within(p, arena, sizeof arena) ? shared_arrays : registered)
    if (p >= b.begin && p < b.end) return &b;
  return nullptr;
}

void report_out_of_bounds(const char* p, size_t bytes, const char* what) {
  const Buffer* nearest = nullptr;
  size_t best = ~size_t(0);
  for (const Buffer& b : within(p, arena, sizeof arena) ? shared_arrays : registered) {
    const size_t distance = p < b.begin ? b.begin - p : p - b.end;
    if (distance < best) best = distance, nearest = &b;
  }
  if (!nearest) return fault("access to shared memory, none of which was declared" + where());
  fault(std::string("out of bounds ") + what + " of " + text(bytes) + " bytes at byte " + std::to_string(p - nearest->begin) +
        " of " + nearest->label() + " (" + text(nearest->end - nearest->begin) + " bytes)" + where());
}

// A GPU moves at most 16 bytes a thread and request.
void check_range(const void* p, size_t bytes, Access access, const void* pc) {
  if (!running) return;
  for (size_t i = 0; i < bytes; i += 16)
    check(static_cast<const char*>(p) + i, std::min<size_t>(16, bytes - i), access, false, static_cast<const char*>(pc) + i / 16);
}

}  // namespace

void check(const void* address, size_t bytes, Access access, bool natural_alignment, const void* pc) {
  if (!running || !error.empty()) return;
  char* p = static_cast<char*>(const_cast<void*>(address));
  if (own_memory(p) || constant_of_library(p)) return;
  const bool in_arena = within(p, arena, sizeof arena);
  if (registered.empty() && !in_arena) return;  // nothing registered: races in shared memory only
  Buffer* b = find(p);
  if (!b || p + bytes > b->end) return report_out_of_bounds(p, bytes, access == Read ? "read" : "write");
  if (natural_alignment && uintptr_t(p) % bytes)
    return fault("misaligned " + text(bytes) + "-byte access to " + b->label() + where());
  if (access != Read && b->read_only) return fault("write to the read-only " + b->label() + where());
  if (!in_arena) count(p, bytes, access != Read, pc);
  const size_t first = (p - b->begin) / b->granule, last = (p - b->begin + bytes - 1) / b->granule;
  for (size_t i = first; i <= last && error.empty(); ++i) check_order(*b, i, access);
}

void on_atomic(void* p, size_t bytes) { check(p, bytes, Atomic, true, __builtin_return_address(0)); }

void reset_checks(bool coalescing) {
  registered.clear();
  count_sectors = coalescing;
  requests[0].clear();
  requests[1].clear();
  std::memset(access_count, 0, sizeof access_count);
}

void start_launch_memory() {
  shared_arrays.clear();
  arena_used = 0;
}

void start_block_memory() {
  std::memset(arena, 0xff, arena_used);  // shared memory starts with arbitrary contents
  executions.clear();
}

void* add_shared(const char* name, size_t bytes) {
  const size_t begin = arena_used;
  arena_used += (bytes + kSharedGap + 127) / 128 * 128;
  if (arena_used > sizeof arena) fault("too much shared memory");
  shared_arrays.emplace_back(arena + begin, bytes, name, true, false, 1);
  std::memset(arena + begin, 0xff, bytes);
  return arena + begin;
}

}  // namespace shim

// ---- what a checked build calls

using shim::Read;
using shim::Write;
#define PC __builtin_return_address(0)

extern "C" {

#define TSAN_HOOKS(N)                                                            \
  void __tsan_read##N(void* p) { shim::check(p, N, Read, true, PC); }            \
  void __tsan_write##N(void* p) { shim::check(p, N, Write, true, PC); }          \
  void __tsan_unaligned_read##N(void* p) { shim::check(p, N, Read, false, PC); } \
  void __tsan_unaligned_write##N(void* p) { shim::check(p, N, Write, false, PC); }
TSAN_HOOKS(1)
TSAN_HOOKS(2)
TSAN_HOOKS(4)
TSAN_HOOKS(8)
TSAN_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { shim::check_range(p, n, Read, PC); }
void __tsan_write_range(void* p, size_t n) { shim::check_range(p, n, Write, PC); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

// Thread instrumentation leaves memcpy and its like alone: a checked build renames the kernels' calls of them to these.
void* shim_memcpy(void* to, const void* from, size_t n) {
  shim::check_range(from, n, Read, PC);
  shim::check_range(to, n, Write, PC);
  return memcpy(to, from, n);
}
void* shim_memmove(void* to, const void* from, size_t n) {
  shim::check_range(from, n, Read, PC);
  shim::check_range(to, n, Write, PC);
  return memmove(to, from, n);
}
void* shim_memset(void* to, int value, size_t n) {
  shim::check_range(to, n, Write, PC);
  return memset(to, value, n);
}

// UBSan's interface: these see the type that the source asked for, however g++ then splits or merges the access.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};

static std::string at(const SourceLocation& l) {
  const std::string file = l.file ? l.file : "?";
  return " at " + file.substr(file.rfind('/') + 1) + ":" + shim::text(l.line);
}
static void undefined(const char* what, const SourceLocation* l) {
  if (shim::running) shim::fault(what + at(*l) + shim::where());
}

void __ubsan_handle_type_mismatch_v1(TypeMismatch* d, void* p) {
  if (!shim::running) return;
  const shim::Buffer* b = shim::find(static_cast<char*>(p));
  shim::fault("misaligned " + shim::text(1u << d->log_alignment) + "-byte access to " + (b ? b->label() : "memory") + " as " +
              d->type->name + at(d->location) + shim::where());
}
void __ubsan_handle_out_of_bounds(SourceLocation* l, void*) { undefined("array index out of bounds", l); }
void __ubsan_handle_add_overflow(SourceLocation* l, void*, void*) { undefined("signed overflow in +", l); }
void __ubsan_handle_sub_overflow(SourceLocation* l, void*, void*) { undefined("signed overflow in -", l); }
void __ubsan_handle_mul_overflow(SourceLocation* l, void*, void*) { undefined("signed overflow in *", l); }
void __ubsan_handle_negate_overflow(SourceLocation* l, void*) { undefined("signed overflow in negation", l); }
void __ubsan_handle_divrem_overflow(SourceLocation* l, void*, void*) { undefined("division by zero or overflow", l); }
void __ubsan_handle_shift_out_of_bounds(SourceLocation* l, void*, void*) { undefined("shift out of bounds", l); }

// ---- for the tests (ctypes)

// granule: accesses within one so many bytes count as one place for races.
void shim_register(void* p, size_t bytes, const char* name, int read_only, int granule) {
  shim::registered.emplace_back(p, bytes, name, false, read_only != 0, granule);
}
// The i-th of the memory registered since shim_reset; false past the last.
bool shim_registered(int i, void** p, size_t* bytes, const char** name, int* read_only) {
  if (size_t(i) >= shim::registered.size()) return false;
  const shim::Buffer& b = shim::registered[size_t(i)];
  *p = b.begin;
  *bytes = size_t(b.end - b.begin);
  *name = b.name.c_str();
  *read_only = b.read_only;
  return true;
}
uint64_t shim_count(int write, int log2_bytes) { return shim::access_count[write][log2_bytes]; }
void shim_coalescing(int write, uint64_t* requests, uint64_t* sectors) {
  *requests = shim::requests[write].size();
  *sectors = 0;
  for (const auto& request : shim::requests[write]) *sectors += request.second.size();
}

}  // extern "C"
