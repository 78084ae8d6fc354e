#include "machine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common.cuh"
#include "fiber.h"
#include "flaws.h"

namespace fusedattn::emulator {

Device device;

namespace {

using cuda::Launch;
using cuda::Space;

struct Thread;

// Where a group of threads meets.
struct Meeting {
  const char* what = "";  // the kind of meeting that the first to arrive waits at
  Where where;
  int members = 0;
  std::vector<Thread*> waiting;
};

constexpr int slot_bytes = 64;

struct Warp {
  Meeting meeting;
  uint32_t epoch = 0;      // sync_warp()s passed
  uint32_t exchanges = 0;  // exchanges passed
  // Of this exchange, and of the one before, which a lane may not have left yet.
  alignas(slot_bytes) char slots[2][cuda::warp_size * slot_bytes];
};

struct Block {
  Meeting meeting;
  uint32_t epoch = 0;        // sync_block()s passed
  uint32_t last_remote = 0;  // 1 + epoch of the cluster when another block touched its memory
  int running = 0;           // threads that have not ended
  std::vector<Warp> warps;
  std::vector<char> memory;  // shared memory lies within, aligned
  char* shared = nullptr;
  Shadow shadow;
};

// A cp.async on its way.
struct Copy {
  char* to;
  const char* from;
  Landing landing;
  uint32_t group;
};

constexpr int copy_bytes = 16;

struct Thread {
  Position position;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Meeting* at = nullptr;  // where it waits
  bool ended = false;
  std::vector<Copy> copies;  // in flight, oldest first
  uint32_t groups = 0;       // committed
  Fiber fiber;

  int lane() const { return position.thread % cuda::warp_size; }
};

constexpr size_t shared_alignment = 1024;

// Steele, Lea and Flood's splitmix64.
struct Random {
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t(0); }

  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

  uint64_t state = 0;
};

class Machine {
 public:
  void run(const char* name, const Launch& launch, const std::function<void()>& kernel);
  template <class Function>
  void meet(Meeting& meeting, const char* what, const Where& where, const Function& at_last);
  void note(const void* at, int bytes, Space space, Access access);
  char* remote(char* at, int rank);
  [[noreturn]] void fail(const std::string& what) const;

  Thread& running() const { return *running_; }
  uint32_t next_serial() { return ++serial_; }

  std::mutex one_kernel;
  Random random;
  int64_t switches = 0;
  Meeting cluster_meeting;
  uint32_t cluster_epoch = 0;

 private:
  void check(const Launch& launch) const;
  void prepare(int64_t cluster, const std::function<void()>* body);
  void run_cluster();
  void end_thread(Thread& thread);
  [[noreturn]] void fail_stuck() const;
  std::string note_shared(const char* at, int bytes, Space space, Access access, const Moment& now);
  Moment now() const;

  const char* name_ = "";
  const Launch* launch_ = nullptr;
  Thread* running_ = nullptr;
  uint32_t serial_ = 0, first_serial_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;  // stacks are kept between kernels
  std::vector<Thread*> ready_;
  std::vector<Block> blocks_;  // of the running cluster
};

Machine machine;

std::string place(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

void Machine::fail(const std::string& what) const {
  std::string text = std::string("emulator: kernel ") + name_;
  if (running_ != nullptr)
    text += ", block " + std::to_string(running_->position.block) + ", thread " +
            std::to_string(running_->position.thread);
  throw std::runtime_error(text + ": " + what);
}

// --- running -------------------------------------------------------------------------------------

// What cudaLaunchKernelEx refuses.
void Machine::check(const Launch& launch) const {
  const auto require = [&](bool holds, const char* what) {
    if (!holds) fail(std::string("launch refused, ") + what + " (" + launch.text() + ")");
  };
  require(launch.grid >= 1 && launch.grid < int64_t(1) << 31, "grid is not in 1 … 2^31 - 1");
  require(launch.block >= 32 && launch.block <= 1024, "block is not in 32 … 1024");
  require(launch.block % 32 == 0, "block is not a multiple of 32");
  require(launch.shared_bytes >= 0 && launch.shared_bytes <= device.max_shared_bytes,
          "too much shared memory");
  require(launch.cluster >= 1 && launch.cluster <= 16, "cluster is not in 1 … 16");
  require(launch.cluster == 1 || device.capability >= 90, "clusters need sm_90");
  require(launch.grid % launch.cluster == 0, "grid is not a multiple of cluster");
}

void Machine::run(const char* name, const Launch& launch, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_kernel);
  name_ = name;
  enter_kernel(name);
  launch_ = &launch;
  running_ = nullptr;
  check(launch);
  while (threads_.size() < size_t(launch.cluster) * size_t(launch.block))
    threads_.push_back(std::make_unique<Thread>());

  std::vector<int64_t> order(size_t(launch.grid / launch.cluster));
  std::iota(order.begin(), order.end(), int64_t(0));
  std::shuffle(order.begin(), order.end(), random);
  first_serial_ = serial_ + 1;
  for (const int64_t cluster : order) {
    ++serial_;
    prepare(cluster, &kernel);
    run_cluster();
  }
}

void Machine::prepare(int64_t cluster, const std::function<void()>* body) {
  const int warps = launch_->block / cuda::warp_size;
  cluster_meeting = {};
  cluster_meeting.members = launch_->cluster * launch_->block;
  cluster_epoch = 0;
  ready_.clear();
  blocks_.resize(size_t(launch_->cluster));
  for (int rank = 0; rank < launch_->cluster; ++rank) {
    Block& block = blocks_[size_t(rank)];
    block.meeting = {};
    block.meeting.members = block.running = launch_->block;
    block.epoch = block.last_remote = 0;
    block.warps.assign(size_t(warps), Warp());
    for (Warp& warp : block.warps) warp.meeting.members = cuda::warp_size;
    // What no thread has written is NaN in every float type.
    block.memory.assign(size_t(launch_->shared_bytes) + shared_alignment, char(0xff));
    const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
    block.shared = block.memory.data() + (shared_alignment - address % shared_alignment);
    block.shadow = Shadow(launch_->shared_bytes, 2);
    for (int i = 0; i < launch_->block; ++i) {
      Thread& thread = *threads_[size_t(rank * launch_->block + i)];
      thread.position = {i,
                         launch_->block,
                         cluster * launch_->cluster + rank,
                         launch_->grid,
                         rank,
                         launch_->cluster,
                         block.shared};
      thread.block = &block;
      thread.warp = &block.warps[size_t(i / cuda::warp_size)];
      thread.at = nullptr;
      thread.ended = false;
      thread.copies.clear();
      thread.fiber.start(body);
      ready_.push_back(&thread);
    }
  }
  std::shuffle(ready_.begin(), ready_.end(), random);
}

void Machine::run_cluster() {
  int left = launch_->cluster * launch_->block;
  // Either any thread may be next, or those that were released last: then one warp runs on as far
  // as the barriers let it while the others have not begun.
  const bool ahead = random() % 2 == 0;
  while (left > 0) {
    if (ready_.empty()) fail_stuck();
    const size_t next = ahead ? ready_.size() - 1 : random() % ready_.size();
    std::swap(ready_[next], ready_.back());
    running_ = ready_.back();
    running_position = &running_->position;
    ready_.pop_back();
    ++switches;
    if (running_->fiber.resume()) {
      end_thread(*running_);
      --left;
    }
  }
  running_ = nullptr;
}

void Machine::end_thread(Thread& thread) {
  thread.ended = true;
  if (--thread.block->running == 0 && thread.block->last_remote == cluster_epoch + 1)
    fail(
        "the block ends and its shared memory with it, which another block of the cluster uses: "
        "no sync_cluster() stands between");
}

// No thread can go on.
void Machine::fail_stuck() const {
  std::string ended, waiting;
  int ends = 0, waits = 0;
  const Thread* example = nullptr;
  for (int i = 0; i < launch_->cluster * launch_->block; ++i) {
    const Thread& each = *threads_[size_t(i)];
    if (each.ended && ends++ < 4) ended += " " + std::to_string(each.position.thread);
    if (each.at == nullptr) continue;
    ++waits;
    if (example == nullptr)
      example = &each;
    else if (each.at->where.line() != example->at->where.line() && waiting.empty())
      waiting = "; thread " + std::to_string(each.position.thread) + " at " + each.at->what + ", " +
                place(each.at->where);
  }
  throw std::runtime_error(
      std::string("emulator: kernel ") + name_ + ", block " +
      std::to_string(example->position.block) + ": not all threads reach a barrier; " +
      std::to_string(waits) + " wait, thread " + std::to_string(example->position.thread) + " at " +
      example->at->what + ", " + place(example->at->where) + waiting + "; " + std::to_string(ends) +
      " have ended" + (ends ? ":" + ended + (ends > 4 ? " …" : "") : ""));
}

// --- meeting -------------------------------------------------------------------------------------

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

template <class Function>
void Machine::meet(Meeting& meeting, const char* what, const Where& where,
                   const Function& at_last) {
  const bool first = meeting.waiting.empty();
  if (!first && (meeting.where.line() != where.line() || !same(meeting.what, what) ||
                 !same(meeting.where.file_name(), where.file_name())))
    fail(std::string("divergence: it reaches ") + what + ", " + place(where) + ", thread " +
         std::to_string(meeting.waiting[0]->position.thread) + " waits at " + meeting.what + ", " +
         place(meeting.where));
  meeting.what = what;
  meeting.where = where;
  meeting.waiting.push_back(running_);
  running_->at = &meeting;
  if (int(meeting.waiting.size()) == meeting.members) {
    at_last();
    std::shuffle(meeting.waiting.begin(), meeting.waiting.end(), random);
    for (Thread* each : meeting.waiting) each->at = nullptr;
    ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  running_->fiber.pause();
}

// --- memory --------------------------------------------------------------------------------------

Moment Machine::now() const {
  const Position& at = running_->position;
  return {serial_, cluster_epoch, running_->block->epoch, running_->warp->epoch,
          uint16_t(at.cluster_rank * at.block_size + at.thread)};
}

std::string Machine::note_shared(const char* at, int bytes, Space space, Access access,
                                 const Moment& now) {
  for (Block& block : blocks_) {
    const int64_t offset = at - block.shared;
    if (offset < 0 || offset >= launch_->shared_bytes) continue;
    if (&block != running_->block) {
      if (space != Space::remote) return "another block's shared memory";
      if (cluster_epoch == 0) return "a block that may not have begun: sync_cluster() comes first";
      if (block.running == 0) return "a block that has ended";
      block.last_remote = cluster_epoch + 1;
    }
    if (offset + bytes > launch_->shared_bytes)
      return std::to_string(offset + bytes - launch_->shared_bytes) + " bytes past shared memory";
    const std::string other =
        block.shadow.note(offset, bytes, access, now, first_serial_, launch_->block);
    return other.empty() ? ""
                         : "a race at shared byte " + std::to_string(offset) + " with " + other;
  }
  const int64_t offset = at - running_->block->shared;
  return "outside shared memory: byte " + std::to_string(offset) + " of " +
         std::to_string(launch_->shared_bytes);
}

void Machine::note(const void* at, int bytes, Space space, Access access) {
  const Moment moment = now();
  const bool global = space == Space::global || space == Space::streaming;
  std::string problem;
  if (reinterpret_cast<uintptr_t>(at) % unsigned(bytes) != 0)
    problem = "misaligned";
  else if (global)
    problem = Memory::here().note(at, bytes, access, moment, first_serial_, launch_->block);
  else
    problem = note_shared(static_cast<const char*>(at), bytes, space, access, moment);
  if (problem.empty()) return;
  const char* const verbs[] = {"load", "store", "atomic addition", "copy", "landing of a copy"};
  const char* const spaces[] = {"global", "global", "shared", "remote shared"};
  char address[24];
  std::snprintf(address, sizeof address, "%p", at);
  fail(std::string(spaces[int(space)]) + " " + verbs[int(access)] + " of " + std::to_string(bytes) +
       " bytes at " + address + ": " + problem);
}

char* Machine::remote(char* at, int rank) {
  const int64_t offset = at - running_->block->shared;
  if (rank < 0 || rank >= launch_->cluster)
    fail("the cluster has no block " + std::to_string(rank));
  if (offset < 0 || offset >= launch_->shared_bytes)
    fail("remote_shared() of what is not the block's shared memory");
  return blocks_[size_t(rank)].shared + offset;
}

}  // namespace

// --- the interface -------------------------------------------------------------------------------

const Position* running_position = nullptr;

void sync_block(const Where& where) {
  Block& block = *machine.running().block;
  machine.meet(block.meeting, "sync_block()", where, [&] { ++block.epoch; });
}

void sync_warp(const Where& where) {
  Warp& warp = *machine.running().warp;
  machine.meet(warp.meeting, "sync_warp()", where, [&] { ++warp.epoch; });
}

void sync_cluster(const Where& where) {
  machine.meet(machine.cluster_meeting, "sync_cluster()", where, [] { ++machine.cluster_epoch; });
}

const void* exchange(const void* slot, int bytes, SlotWork* at_last, const char* what,
                     const Where& where) {
  Thread& self = machine.running();
  Warp& warp = *self.warp;
  char* slots = warp.slots[warp.exchanges % 2];
  std::memcpy(slots + self.lane() * bytes, slot, size_t(bytes));
  machine.meet(warp.meeting, what, where, [&] {
    ++warp.exchanges;
    if (at_last != nullptr) at_last(slots);
  });
  return slots;
}

uint64_t shuffle(uint64_t value, int bytes, int from, const Where& where) {
  if (from < 0 || from >= cuda::warp_size)
    machine.fail("shuffle from lane " + std::to_string(from) + ", " + place(where));
  const char* what = bytes == 4 ? "a shuffle of 4 bytes" : "a shuffle of 8 bytes";
  return static_cast<const uint64_t*>(exchange(&value, 8, nullptr, what, where))[from];
}

void copy_async(void* to, const void* from, Landing landing) {
  if (landing == Landing::data)
    machine.note(from, copy_bytes, Space::global, Access::load);
  else if (reinterpret_cast<uintptr_t>(from) % copy_bytes != 0)
    machine.fail("copy_async() of zeros: the address in global memory is misaligned");
  machine.note(to, copy_bytes, Space::shared, Access::copy);
  Thread& self = machine.running();
  self.copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), landing, self.groups});
}

void commit_copies() { ++machine.running().groups; }

void wait_copies(int newest) {
  Thread& self = machine.running();
  // Groups are counted on from kernel to kernel, so the difference is what has to be compared.
  const auto lands = [&](const Copy& copy) { return int(self.groups - copy.group) > newest; };
  size_t landed = 0;
  for (; landed < self.copies.size() && lands(self.copies[landed]); ++landed) {
    const Copy& copy = self.copies[landed];
    machine.note(copy.to, copy_bytes, Space::shared, Access::landing);
    if (copy.landing == Landing::data)
      std::memcpy(copy.to, copy.from, copy_bytes);
    else
      std::memset(copy.to, copy.landing == Landing::zeros ? 0 : 0xff, copy_bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(landed));
}

void note(const void* at, int bytes, cuda::Space space, Access access) {
  machine.note(at, bytes, space, access);
}

char* remote_shared(char* at, int rank) { return machine.remote(at, rank); }

void run(const char* name, const cuda::Launch& launch, const std::function<void()>& kernel) {
  machine.run(name, launch, kernel);
}

void set_zero(void* at, int64_t bytes) {
  Moment host;
  host.cluster = machine.next_serial();
  const std::string problem =
      Memory::here().note(at, int(bytes), Access::store, host, host.cluster, 1);
  if (!problem.empty()) throw std::runtime_error("emulator: set_zero: " + problem);
  std::memset(at, 0, size_t(bytes));
}

void seed(uint64_t value) { machine.random.state = value; }

int64_t switches() { return machine.switches; }

}  // namespace fusedattn::emulator
