// What the shim's scheduler (shim.cpp) and its access checks (checks.cpp) know of each other.
#pragma once
#include <string>

#include "testing/shim.h"

namespace shim {

enum class State { Ready, AtBarrier, InWarp, Done };

struct Fiber : Thread {
  void* stack_pointer;
  State state;
  unsigned index;       // in the block
  unsigned warp_epoch;  // __syncwarp calls so far
  int barrier_line;
  unsigned rendezvous, phase;  // which of its warp's rendezvous it waits for
};

extern Fiber* running;         // null outside a kernel
extern std::string error;      // the first fault since shim_reset
extern unsigned block_index;   // of the running block in its grid
extern uint32_t block_stamp;   // distinct for every block of every launch
extern uint32_t launch_stamp;  // the first block_stamp of this launch
extern uint32_t epoch;         // block barriers passed

void fault(const std::string& message);  // ends the launch; does not return into a kernel
std::string where();
bool own_memory(const char* p);  // locals, threadIdx and its like, kernel parameters

inline std::string text(uint64_t v) { return std::to_string(v); }
inline bool within(const char* p, const void* begin, size_t bytes) {
  return p >= static_cast<const char*>(begin) && p < static_cast<const char*>(begin) + bytes;
}

void reset_checks(bool coalescing);
void start_launch_memory();
void start_block_memory();
void* add_shared(const char* name, size_t bytes);

enum Access { Read, Write, Atomic };
void check(const void* p, size_t bytes, Access access, bool natural_alignment, const void* pc);

}  // namespace shim
