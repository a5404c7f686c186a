// What torch calls of an operation. No exception of this library's passes through torch: it is caught here, and torch
// throws its own with the same message.
//
// A wheel is built by clang and has clang's C++ library inside (csrc/manylinux.py), torch is built by gcc. Their
// exceptions look alike and end the process where one meets the other's.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <exception>

namespace unisd {

using BoxedFunction = void(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

// What `function` throws, kept until this thread's next error; null if it returns. Never inlined: the caller's frame,
// through which torch's exception passes, must have nothing to clean up and nothing to catch.
template <BoxedFunction* function>
__attribute__((noinline)) const char* error_of(StableIValue* stack, uint64_t num_arguments,
                                               uint64_t num_results) noexcept {
  static thread_local char message[2048];
  try {
    function(stack, num_arguments, num_results);
    return nullptr;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
  } catch (...) {
    std::snprintf(message, sizeof message, "an exception without a message");
  }
  return message;
}

template <BoxedFunction* function>
void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  const char* error = error_of<function>(stack, num_arguments, num_results);
  if (error != nullptr) aoti_torch_check(false, "unisd", __FILE__, __LINE__, error);
}

}  // namespace unisd

#define UNISD_BOX(function) unisd::boxed<TORCH_BOX(function)>
