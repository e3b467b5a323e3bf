// What the library and the Python beside it must agree on, so that an old build is refused and
// never called.

#include "interface.h"

#include <cstring>
#include <type_traits>

namespace {

// A type as a letter: p pointer, i int32, l int64, f float, d double, v nothing.
template <typename T>
constexpr char letter() {
  if constexpr (std::is_pointer_v<T>) {
    return 'p';
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return 'i';
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return 'l';
  } else if constexpr (std::is_same_v<T, float>) {
    return 'f';
  } else if constexpr (std::is_same_v<T, double>) {
    return 'd';
  } else {
    static_assert(std::is_void_v<T>, "a kind of argument that has no letter");
    return 'v';
  }
}

// A function's type as letters: its result's, then its arguments'.
template <typename F>
struct Signature;

template <typename R, typename... A>
struct Signature<R(A...)> {
  static constexpr char letters[] = {letter<R>(), letter<A>()..., 0};
};

struct Size {
  const char* name;
  int64_t bytes;
};

struct Function {
  const char* name;
  const char* letters;
};

#define SIZE(NAME) {#NAME, sizeof(NAME)}
#define FUNCTION(NAME) {#NAME, Signature<decltype(NAME)>::letters}

constexpr Size SIZES[] = {
    SIZE(GptqLinear),  SIZE(GptqProjection),   SIZE(GptqNorm),    SIZE(GptqExpert),
    SIZE(GptqMixture), SIZE(GptqDecoderLayer), SIZE(GptqKvCache), SIZE(GptqSequence),
    SIZE(GptqModel),   SIZE(GptqLatent),
};
constexpr Function FUNCTIONS[] = {
    FUNCTION(gptq_isa),           FUNCTION(gptq_activations), FUNCTION(gptq_amx),
    FUNCTION(gptq_own_threads),   FUNCTION(gptq_pack),        FUNCTION(gptq_gemv),
    FUNCTION(gptq_unpack),        FUNCTION(gptq_gemm_from),   FUNCTION(gptq_gemm),
    FUNCTION(gptq_decode_step),   FUNCTION(gptq_prefill),     FUNCTION(gptq_head),
    FUNCTION(gptq_quantize_head), FUNCTION(gptq_top_logits),  FUNCTION(gptq_read_bandwidth),
};

}  // namespace

extern "C" {

int64_t gptq_sizeof(const char* name) {
  for (const Size& size : SIZES)
    if (strcmp(size.name, name) == 0) return size.bytes;
  return 0;
}

const char* gptq_signature(const char* name) {
  for (const Function& function : FUNCTIONS)
    if (strcmp(function.name, name) == 0) return function.letters;
  return nullptr;
}

}  // extern "C"
