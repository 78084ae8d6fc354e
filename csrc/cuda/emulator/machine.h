// A GPU of threads that are fibers. It runs the blocks of a kernel and the threads of a block in a
// random order, and ends a kernel that does what a GPU leaves undefined: with a std::runtime_error
// that names kernel, block and thread.
#pragma once

#include <cstdint>
#include <functional>

#include "flaws.h"
#include "memory.h"

namespace fusedattn::cuda {
struct Launch;
enum class Space;
}  // namespace fusedattn::cuda

namespace fusedattn::emulator {

// The running thread, as the kernel sees it.
struct Position {
  int thread = 0, block_size = 1;
  int64_t block = 0, grid_size = 1;
  int cluster_rank = 0, cluster_size = 1;
  char* shared = nullptr;
};
extern const Position* running_position;
inline const Position& position() { return *running_position; }

// Barriers. All threads of the group meet at one place in the source, or the kernel fails.
void sync_block(const Where& where);
void sync_warp(const Where& where);
void sync_cluster(const Where& where);

// The value that lane `from` brings. All lanes of the warp bring one of the same size.
uint64_t shuffle(uint64_t value, int bytes, int from, const Where& where);

// All lanes of the warp bring a slot of so many bytes, at most 64, and the last to come works on
// them. Returned are the 32 slots; they stay as they are until the lane's next exchange.
using SlotWork = void(void* slots);
const void* exchange(const void* slot, int bytes, SlotWork* at_last, const char* what,
                     const Where& where);

// Asynchronous copies of 16 bytes from global to shared memory (cp.async). They land as late as
// may be: when their thread waits for their group. Zeros are not read, and garbage is NaN.
enum class Landing : uint8_t { data, zeros, garbage };
void copy_async(void* to, const void* from, Landing landing);
void commit_copies();
// All but the thread's newest so many groups land.
void wait_copies(int newest);

// Check a load, store or atomic addition; alignment is that of its size.
void note(const void* at, int bytes, cuda::Space space, Access access);

// The place `at`, in the running block's shared memory, in that of another block of its cluster.
char* remote_shared(char* at, int rank);

// Run a kernel.
void run(const char* name, const cuda::Launch& launch, const std::function<void()>& kernel);

// Zeros, written by the host between kernels.
void set_zero(void* at, int64_t bytes);

// The seed of all orders from here on.
void seed(uint64_t value);

// What the kernels' launchers are told of the device.
struct Device {
  int capability = 90;
  int multiprocessors = 3;
  int max_shared_bytes = 227 * 1024;
  int cache_bytes = 16 << 20;
};
extern Device device;

// Times that a thread has been resumed.
int64_t switches();

}  // namespace fusedattn::emulator
