#undef _FORTIFY_SOURCE  // its longjmp refuses to jump to another stack
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

namespace fusedattn::emulator {
namespace {

// An exception that unwinds takes most of it.
constexpr size_t stack_bytes = 128 * 1024;
// Stacks begin at different places of a page, lest what is on top of all of them share few lines of
// the caches.
constexpr size_t shift_bytes = 16 * 1024, shift_step = 192;
size_t next_shift = 0;

[[gnu::noinline]] void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

[[gnu::noinline]] void jump(jmp_buf& from, const ucontext_t& to) {
  if (_setjmp(from) == 0) setcontext(&to);
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, stack_bytes + shift_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  top_ = stack_bytes + (next_shift += shift_step) % shift_bytes;
  mprotect(stack_, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow faults
}

Fiber::~Fiber() { munmap(stack_, stack_bytes + shift_bytes); }

void Fiber::start(const std::function<void()>* body) {
  body_ = body;
  error_ = nullptr;
  if (state_ == State::ended) return;  // it waits in loop() for its next body
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = top_;
  context_.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, unsigned(self),
              unsigned(uint64_t(self) >> 32));
  state_ = State::fresh;
}

void Fiber::enter(unsigned low, unsigned high) {
  reinterpret_cast<Fiber*>(uintptr_t(uint64_t(high) << 32 | low))->loop();
}

void Fiber::loop() {
  for (;;) {
    try {
      (*body_)();
    } catch (...) {
      error_ = std::current_exception();
    }
    state_ = State::ended;
    jump(inside_, outside_);
  }
}

bool Fiber::resume() {
  if (state_ == State::fresh)
    jump(outside_, context_);
  else
    jump(outside_, inside_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return state_ == State::ended;
}

void Fiber::pause() {
  state_ = State::paused;
  jump(inside_, outside_);
}

}  // namespace fusedattn::emulator
