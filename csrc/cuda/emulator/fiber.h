// A function that runs on a stack of its own and gives control back where it likes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <exception>
#include <functional>

namespace fusedattn::emulator {

// Switching costs no system call: contexts make the stack, jumps move between stacks.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Make resume() call `body` from its start. One that was abandoned midway is forgotten: what
  // stands on its stack is not destroyed.
  void start(const std::function<void()>* body);

  // Run until the body pauses or ends; an exception of the body comes out here. True at its end.
  bool resume();

  // Within the body: return from resume().
  void pause();

 private:
  static void enter(unsigned low, unsigned high);
  void loop();

  char* stack_;
  size_t top_;  // bytes of it that are used
  ucontext_t context_;
  jmp_buf inside_, outside_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  enum class State { fresh, paused, ended } state_ = State::fresh;
};

}  // namespace fusedattn::emulator
