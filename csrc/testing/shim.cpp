// The host shim's scheduler: fibers, barriers, warp primitives. Never compiled with a sanitizer.
#include <sys/mman.h>

#include <cstdlib>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "testing/checks.h"

#undef threadIdx
#undef blockIdx

namespace shim {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxShared = 227 << 10;  // a block's, of the GPUs we build for
constexpr unsigned kMaxThreads = 1024;

// ---- state of the running launch

// Where the lanes of one mask meet. Two buffers: a fast lane fills the next one while a slow lane still reads.
struct Rendezvous {
  unsigned mask = 0, here = 0, phase = 0;
  unsigned arrived[2] = {};
  uint64_t value[2][32];
};

struct Warp {
  unsigned live = 0;
  std::vector<Rendezvous> meetings;
};

void* scheduler_stack;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
char* stacks;
size_t stack_count;
struct {
  void (*body)(void*);
  char* closure;
  size_t closure_bytes, dynamic_bytes;
  std::string kernel;
} call;

unsigned votes[2];
uint64_t switches;
unsigned seed;
std::string launches;
std::unordered_map<const void*, void*> shared_of_launch;

}  // namespace

Launcher* launcher;
Thread* current;
Fiber* running;
std::string error;
unsigned block_index;
uint32_t block_stamp, launch_stamp, epoch;

std::string where() { return " (block " + text(block_index) + ", thread " + text(running->index) + ")"; }

bool own_memory(const char* p) {
  return within(p, stacks, kStackBytes * stack_count) || within(p, fibers.data(), fibers.size() * sizeof(Fiber)) ||
         within(p, call.closure, call.closure_bytes);
}

// ---- context switch

namespace {

extern "C" void shim_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.globl shim_switch
.type shim_switch,@function
shim_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr int kSavedRegisters = 6;
#else
#error "the host shim switches stacks in x86-64 assembly"
#endif

void yield(State state) {
  Fiber* own = running;
  own->state = state;
  ++switches;
  shim_switch(&own->stack_pointer, scheduler_stack);
}

void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber;
  shim_switch(&scheduler_stack, fiber.stack_pointer);
  running = nullptr;
}

}  // namespace

// Keeps the first message; a fiber that failed never continues.
void fault(const std::string& message) {
  if (error.empty()) error = call.kernel + ": " + message;
  if (running) yield(State::Done);
}

namespace {

bool met(const Warp& warp, const Rendezvous& r) { return (r.mask & warp.live & ~r.here) == 0; }

void open_next_phase(Rendezvous& r) {
  r.arrived[r.phase & 1] = r.here;
  r.here = 0;
  ++r.phase;
}

void fiber_main() {
  call.body(call.closure);
  Warp& warp = warps[running->index / 32];
  warp.live &= ~(1u << (running->index & 31));
  for (Rendezvous& r : warp.meetings)  // the others no longer wait for this lane
    if (r.here && met(warp, r)) open_next_phase(r);
  yield(State::Done);
  __builtin_trap();
}

void prepare(Fiber& fiber, unsigned index, dim3 grid, dim3 block) {
  fiber.thread = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
  fiber.block = {block_index % grid.x, block_index / grid.x % grid.y, block_index / (grid.x * grid.y)};
  fiber.block_dim = block;
  fiber.grid_dim = grid;
  fiber.index = index;
  fiber.state = State::Ready;
  fiber.warp_epoch = 0;
  void** top = reinterpret_cast<void**>(stacks + kStackBytes * (index + 1));
  *--top = nullptr;  // alignment at the first call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// ---- one launch

std::vector<unsigned> in_order(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = seed == 1 ? n - 1 - i : i;
  return order;
}

void start_block(dim3 grid, dim3 block) {
  epoch = 0;
  votes[0] = votes[1] = 0;
  start_block_memory();
  for (Fiber& f : fibers) prepare(f, unsigned(&f - fibers.data()), grid, block);
  for (size_t w = 0; w < warps.size(); ++w) {
    const size_t lanes = std::min<size_t>(32, fibers.size() - w * 32);
    warps[w].live = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps[w].meetings.clear();
  }
}

bool can_run(const Fiber& f) {
  if (f.state == State::InWarp) return warps[f.index / 32].meetings[f.rendezvous].phase != f.phase;
  return f.state == State::Ready;
}

unsigned how_many(State state) {
  return unsigned(std::count_if(fibers.begin(), fibers.end(), [=](const Fiber& f) { return f.state == state; }));
}

// All live threads stand at a barrier; CUDA asks for the same barrier, reached by every thread of the block.
void release_barrier(unsigned waiting) {
  const unsigned exited = unsigned(fibers.size()) - waiting;
  if (exited) return fault("divergent barrier: " + text(waiting) + " threads at __syncthreads, " + text(exited) + " exited");
  for (const Fiber& f : fibers)
    if (f.barrier_line != fibers[0].barrier_line)
      return fault("divergent barrier: threads at the __syncthreads of lines " + text(fibers[0].barrier_line) + " and " +
                   text(f.barrier_line));
  for (Fiber& f : fibers) f.state = State::Ready;
  ++epoch;
  votes[epoch & 1] = 0;
}

void run_block(std::vector<unsigned>& order, std::mt19937& random) {
  while (error.empty()) {
    if (seed > 1) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (unsigned i : order) {
      if (!can_run(fibers[i])) continue;
      progress = true;
      resume(fibers[i]);
      if (!error.empty()) return;
    }
    if (progress) continue;
    const unsigned done = how_many(State::Done), waiting = how_many(State::AtBarrier);
    if (done == fibers.size()) return;
    if (waiting + done < fibers.size())
      return fault("deadlock: " + text(waiting) + " threads at __syncthreads, " + text(how_many(State::InWarp)) +
                   " in a warp primitive, " + text(done) + " exited");
    release_barrier(waiting);
  }
}

void allocate_stacks(unsigned threads) {
  if (stack_count >= threads) return;
  if (stacks) munmap(stacks, kStackBytes * stack_count);
  void* p = mmap(nullptr, kStackBytes * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  stacks = static_cast<char*>(p);
  stack_count = threads;
}

}  // namespace

// ---- what shim.h calls

void fail(const char* message) { fault(message + (running ? where() : std::string())); }

unsigned lane() { return running->index & 31; }

void launch_fibers(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*), void* closure,
                   size_t closure_bytes) {
  if (!error.empty()) return;
  std::string name = kernel;
  if (name.front() == '(') name = name.substr(1, name.size() - 2);
  call = {body, static_cast<char*>(closure), closure_bytes, dynamic_bytes, name};
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (!threads || threads > kMaxThreads) return fault("block of " + text(threads) + " threads");
  if (!blocks || grid.y > 65535 || grid.z > 65535)
    return fault("grid of " + text(grid.x) + " x " + text(grid.y) + " x " + text(grid.z));
  if (dynamic_bytes > kMaxShared) return fault(text(dynamic_bytes) + " bytes of dynamic shared memory");
  allocate_stacks(threads);
  fibers.resize(threads);
  warps.resize((threads + 31) / 32);
  start_launch_memory();
  shared_of_launch.clear();
  launch_stamp = block_stamp + 1;
  std::mt19937 random(seed);
  std::vector<unsigned> block_order = in_order(blocks), thread_order = in_order(threads);
  if (seed > 1) std::shuffle(block_order.begin(), block_order.end(), random);
  for (unsigned b : block_order) {
    block_index = b;
    ++block_stamp;
    start_block(grid, block);
    run_block(thread_order, random);
    if (!error.empty()) return;
  }
  launches += name + "|" + text(blocks) + "|" + text(threads) + "|" + text(dynamic_bytes) + "\n";
}

void* static_shared(const void* tag, const char* name, size_t bytes) {
  void*& p = shared_of_launch[tag];
  if (!p) p = add_shared(name, bytes);
  return p;
}

void* dynamic_shared(const char* name) { return static_shared(&call, name, call.dynamic_bytes); }

void block_sync(int line) {
  running->barrier_line = line;
  yield(State::AtBarrier);
}

int block_vote(int line, bool predicate, BlockVote kind) {
  unsigned& count = votes[epoch & 1];
  count += predicate;
  block_sync(line);
  if (kind == BlockVote::Count) return int(count);
  return kind == BlockVote::Or ? count > 0 : count == fibers.size();
}

WarpValues warp_exchange(unsigned mask, uint64_t value) {
  const unsigned own = lane();
  if (!(mask >> own & 1)) fault("lane " + text(own) + " calls a warp primitive whose mask leaves it out" + where());
  Warp& warp = warps[running->index / 32];
  unsigned k = 0;
  while (k < warp.meetings.size() && warp.meetings[k].mask != mask) ++k;
  if (k == warp.meetings.size()) {
    warp.meetings.reserve(64);  // a waiting lane holds an address into it
    if (k == 64) fail("more than 64 different masks in one warp");
    warp.meetings.emplace_back().mask = mask;
  }
  Rendezvous& r = warp.meetings[k];
  const unsigned phase = r.phase, buffer = phase & 1;
  if (!r.here) std::memset(r.value[buffer], 0xff, sizeof r.value[buffer]);
  r.value[buffer][own] = value;
  r.here |= 1u << own;
  if (met(warp, r)) {
    open_next_phase(r);
  } else {
    running->rendezvous = k;
    running->phase = phase;
    yield(State::InWarp);
  }
  return {r.value[buffer], r.arrived[buffer]};
}

void warp_sync(unsigned mask) {
  warp_exchange(mask, 0);
  ++running->warp_epoch;
}

}  // namespace shim

// ---- for the tests (ctypes)

extern "C" {
// seed: thread and block order; 0 natural, 1 reversed, else random.
void shim_reset(unsigned seed, int coalescing) {
  using namespace shim;
  reset_checks(coalescing != 0);
  error.clear();
  shim::seed = seed;
  switches = 0;
  running = nullptr;
}
// launcher: null for the fibers. What it has to complain about it says by shim_fail.
void shim_set_launcher(shim::Launcher* launcher) { shim::launcher = launcher; }
void shim_fail(const char* message) {
  if (shim::error.empty()) shim::error = message;
}
const char* shim_error() { return shim::error.c_str(); }
uint64_t shim_switches() { return shim::switches; }
// Every launch since the last call of this: a line "kernel|blocks|threads a block|dynamic shared bytes" each.
const char* shim_launches() {
  static std::string last;
  last.swap(shim::launches);
  shim::launches.clear();
  return last.c_str();
}
}
