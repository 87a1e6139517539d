// The machine behind cuda_emulation.h. Compiled without sanitizers: it tells them about the fibers
// and about the order that barriers give to memory accesses, and keeps its own accesses from them.
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Present only if a sanitizer is linked.
extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size)
    __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size)
    __attribute__((weak));
}

namespace percov2_emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;  // per block
constexpr std::size_t kStack = 256 * 1024;

struct Place {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what.c_str());
  std::fflush(nullptr);
  std::_Exit(3);
}

// A group of fibers that meet again and again. Two sets of values: nobody comes to the meeting
// after the next one before everybody has left this one.
struct Meeting {
  int members = 0;
  int present = 0;
  unsigned generation = 0;
  Place place;
  std::uint64_t values[2][kWarp];
  char order[2];  // what ThreadSanitizer takes for a lock

  void begin(int of) {
    members = of;
    present = 0;
  }
};

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  bool alive = false;
  const Meeting* waits_for = nullptr;
  unsigned generation = 0;

  bool runnable() const {
    return alive && (waits_for == nullptr || waits_for->generation != generation);
  }
};

// Fibers allocate nothing of what is here: ThreadSanitizer sees allocations, too.
struct Machine {
  Machine() {
    barriers.reserve(64);
    barrier_names.reserve(64);
    shared.reserve(16);
  }

  Order order = Order::kForward;
  std::uint64_t random = 1;
  int omitted = -1;
  std::vector<Place> barriers;
  std::vector<std::string> barrier_names;
  std::int64_t meetings = 0;
  std::int64_t launches = 0;

  std::vector<std::unique_ptr<Fiber>> fibers;
  Meeting warps[kMostThreads / kWarp];
  Meeting whole;
  Fiber host;
  int threads = 0;
  int current = -1;
  int running = 0;
  unsigned block = 0;
  const std::function<void()>* body = nullptr;
  std::vector<std::pair<Place, void*>> shared;  // of the block that runs
  std::vector<void*> spent;                     // of earlier blocks: freed after the launch
  std::vector<void*> identities;                // for ThreadSanitizer
  std::size_t identities_used = 0;
  char launch_order = 0;
  const void* host_stack = nullptr;
  std::size_t host_stack_size = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::uint64_t draw() {
  std::uint64_t z = (machine().random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Goes on with another fiber, or with the host if `next` is negative.
void switch_to(int next) {
  Machine& m = machine();
  Fiber& from = m.current < 0 ? m.host : *m.fibers[static_cast<std::size_t>(m.current)];
  Fiber& to = next < 0 ? m.host : *m.fibers[static_cast<std::size_t>(next)];
  if (&from == &to) return;
  m.current = next;
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to.tsan, 1);  // orders nothing
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(from.alive ? &from.fake_stack : nullptr,
                                   next < 0 ? m.host_stack : to.stack,
                                   next < 0 ? m.host_stack_size : kStack);
  }
  swapcontext(&from.context, &to.context);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  }
}

void report_deadlock() {
  Machine& m = machine();
  std::string text = "threads wait for others that have left or wait elsewhere:";
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& fiber = *m.fibers[static_cast<std::size_t>(i)];
    if (fiber.alive) {
      text += " thread " + std::to_string(i) + " at " + fiber.waits_for->place.text();
      if (text.size() > 200) break;
    }
  }
  fail(text);
}

// The next fiber in the order in force; -1 if none is left.
int pick() {
  Machine& m = machine();
  if (m.running == 0) return -1;
  const int step = m.order == Order::kReverse ? m.threads - 1 : 1;
  int next = m.order == Order::kRandom ? static_cast<int>(draw() % static_cast<unsigned>(m.threads))
                                       : m.current + m.threads;
  for (int i = 0; i < m.threads; ++i) {
    next = (next + step) % m.threads;
    if (m.fibers[static_cast<std::size_t>(next)]->runnable()) return next;
  }
  report_deadlock();
  return -1;
}

void fiber_main() {
  Machine& m = machine();
  Fiber& self = *m.fibers[static_cast<std::size_t>(m.current)];
  if (__sanitizer_finish_switch_fiber != nullptr) {
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (m.host_stack == nullptr) {  // the first fiber ever comes from the host
      m.host_stack = bottom;
      m.host_stack_size = size;
    }
  }
  if (__tsan_acquire != nullptr) __tsan_acquire(&m.launch_order);
  (*m.body)();
  if (__tsan_release != nullptr) __tsan_release(&m.launch_order);
  self.alive = false;
  --m.running;
  switch_to(pick());
}

// Waits until all members of a meeting have come. Returns which of its two sets of values is
// theirs.
int meet(Meeting& meeting, const Place& place, int member, std::uint64_t value, bool ordered) {
  Machine& m = machine();
  ++m.meetings;
  if (meeting.present == 0) {
    meeting.place = place;
  } else if (!(meeting.place == place)) {
    fail("threads meet at different calls, " + meeting.place.text() + " and " + place.text());
  }
  const unsigned generation = meeting.generation;
  const int set = static_cast<int>(generation & 1);
  if (member >= 0) meeting.values[set][member] = value;
  if (ordered && __tsan_release != nullptr) __tsan_release(&meeting.order[set]);
  if (++meeting.present == meeting.members) {
    meeting.present = 0;
    ++meeting.generation;
  } else {
    Fiber& self = *m.fibers[static_cast<std::size_t>(m.current)];
    self.waits_for = &meeting;
    self.generation = generation;
    switch_to(pick());
    self.waits_for = nullptr;
  }
  if (ordered && __tsan_acquire != nullptr) __tsan_acquire(&meeting.order[set]);
  return set;
}

Meeting& own_warp() {
  Machine& m = machine();
  return m.warps[m.current / kWarp];
}

bool is_omitted(const Place& place) {
  Machine& m = machine();
  std::size_t i = 0;
  while (i < m.barriers.size() && !(m.barriers[i] == place)) ++i;
  if (i == m.barriers.size()) {
    m.barriers.push_back(place);
    m.barrier_names.push_back(place.text());
  }
  return static_cast<int>(i) == m.omitted;
}

// A thread for ThreadSanitizer. Two fibers of a launch never share one, or accesses of different
// blocks would seem ordered; launches are ordered, so a later one takes them again.
void* next_identity() {
  Machine& m = machine();
  if (__tsan_create_fiber == nullptr) return nullptr;
  if (m.identities_used == m.identities.size()) m.identities.push_back(__tsan_create_fiber(0));
  return m.identities[m.identities_used++];
}

void run_block() {
  Machine& m = machine();
  for (Meeting& warp : m.warps) warp.begin(kWarp);
  m.whole.begin(m.threads);
  while (m.fibers.size() < static_cast<std::size_t>(m.threads)) {
    auto fiber = std::make_unique<Fiber>();
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    fiber->stack = static_cast<char*>(memory);
    m.fibers.push_back(std::move(fiber));
  }
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = *m.fibers[static_cast<std::size_t>(i)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.alive = true;
    fiber.waits_for = nullptr;
    fiber.fake_stack = nullptr;
    fiber.tsan = next_identity();
  }
  m.running = m.threads;
  m.current = -1;
  switch_to(pick());
  for (const auto& [place, memory] : m.shared) m.spent.push_back(memory);
  m.shared.clear();
}

}  // namespace

void configure(Order order, std::uint64_t seed, int omitted) {
  Machine& m = machine();
  m.order = order;
  m.random = seed;
  m.omitted = omitted;
}

int barrier_count() { return static_cast<int>(machine().barriers.size()); }
const char* barrier_place(int barrier) {
  return machine().barrier_names[static_cast<std::size_t>(barrier)].c_str();
}
std::int64_t meeting_count() { return machine().meetings; }
std::int64_t launch_count() { return machine().launches; }

void run(std::int64_t blocks, int threads, const std::function<void()>& body) {
  Machine& m = machine();
  if (blocks < 1 || blocks > INT32_MAX) fail("a grid of " + std::to_string(blocks) + " blocks");
  if (threads < kWarp || threads > kMostThreads || threads % kWarp != 0) {
    fail("a block of " + std::to_string(threads) + " threads");
  }
  ++m.launches;
  m.identities_used = 0;
  m.body = &body;
  m.threads = threads;
  m.host.alive = true;
  if (__tsan_get_current_fiber != nullptr) m.host.tsan = __tsan_get_current_fiber();
  if (__tsan_release != nullptr) __tsan_release(&m.launch_order);
  std::vector<unsigned> order(static_cast<std::size_t>(blocks));
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<unsigned>(m.order == Order::kReverse ? order.size() - 1 - i : i);
  }
  for (std::size_t i = order.size(); m.order == Order::kRandom && i > 1; --i) {
    std::swap(order[i - 1], order[draw() % i]);
  }
  for (const unsigned block : order) {
    m.block = block;
    run_block();
  }
  if (__tsan_acquire != nullptr) __tsan_acquire(&m.launch_order);
  for (void* memory : m.spent) std::free(memory);
  m.spent.clear();
}

Index thread_index() { return {static_cast<unsigned>(machine().current)}; }
Index block_index() { return {machine().block}; }
int lane() { return machine().current % kWarp; }

void* shared_memory(const char* file, int line, std::size_t bytes) {
  Machine& m = machine();
  const Place place{file, line};
  for (const auto& [other, memory] : m.shared) {
    if (!(other == place)) continue;
    if (__tsan_acquire != nullptr) __tsan_acquire(memory);
    return memory;
  }
  void* memory = std::malloc(bytes);
  if (memory == nullptr) fail("no shared memory");
  std::memset(memory, 0xA5, bytes);
  if (__tsan_release != nullptr) __tsan_release(memory);  // the memory, not what is put there
  m.shared.emplace_back(place, memory);
  return memory;
}

void sync_block(const char* file, int line) {
  const Place place{file, line};
  if (!is_omitted(place)) meet(machine().whole, place, -1, 0, true);
}

void sync_warp(const char* file, int line) {
  const Place place{file, line};
  if (!is_omitted(place)) meet(own_warp(), place, -1, 0, true);
}

const std::uint64_t* exchange(const char* file, int line, unsigned mask, std::uint64_t value) {
  if (mask != 0xFFFFFFFFu) fail("a mask that does not name all lanes");
  Meeting& warp = own_warp();
  return warp.values[meet(warp, {file, line}, lane(), value, false)];
}

}  // namespace percov2_emulation
