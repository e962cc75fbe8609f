// The only file that knows torch's exceptions beyond the stable ABI, which has none: NotImplementedError in Python is
// c10::NotImplementedError in C++. Where this torch lacks what is looked for, RuntimeError, its base, has to do: always
// on macOS, where torch's libraries keep these types to themselves.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <typeinfo>

#include "refuse.h"

namespace rmsnorm {

#if !defined(__APPLE__)
struct SourceLocation {  // as c10 has it
  const char* function;
  const char* file;
  uint32_t line;
};

#define RMSNORM_OF_TORCH(name) __asm__(name) __attribute__((weak, visibility("default")))
extern const std::type_info torch_not_implemented RMSNORM_OF_TORCH("_ZTIN3c1019NotImplementedErrorE");
extern const std::type_info torch_value RMSNORM_OF_TORCH("_ZTIN3c1010ValueErrorE");
extern const std::type_info torch_type RMSNORM_OF_TORCH("_ZTIN3c109TypeErrorE");
extern const std::type_info torch_out_of_memory RMSNORM_OF_TORCH("_ZTIN3c1016OutOfMemoryErrorE");
// c10::Error::Error(SourceLocation, std::string), which fills all of them: they add nothing to it.
void construct_torch_error(void* place, SourceLocation where, std::string text)
    RMSNORM_OF_TORCH("_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE");
#undef RMSNORM_OF_TORCH

void* allocate_exception(size_t size) noexcept __asm__("__cxa_allocate_exception");
[[noreturn]] void throw_exception(void* object, const std::type_info* type,
                                  void (*destroy)(void*)) __asm__("__cxa_throw");
#endif

// Raises the exception that Python knows by this name, with these words.
[[noreturn]] inline void raise_as_torch(const std::string& name, const std::string& text) {
#if defined(__APPLE__)
  (void)name;
  refuse(text);
#else
  const std::type_info* type = name == "NotImplementedError" ? &torch_not_implemented
                               : name == "ValueError"        ? &torch_value
                               : name == "TypeError"         ? &torch_type
                               : name == "OutOfMemoryError"  ? &torch_out_of_memory
                                                             : nullptr;
  if (!type || !construct_torch_error) refuse(text);
  void* object = allocate_exception(1024);  // c10::Error has 128 bytes in torch 2.13
  construct_torch_error(object, {"", "", 0}, text);
  throw_exception(object, type, [](void* error) { static_cast<std::exception*>(error)->~exception(); });
#endif
}

}  // namespace rmsnorm
