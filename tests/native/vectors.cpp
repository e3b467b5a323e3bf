// Load a build of the library and hold its answers against vectors, on the machine that it is for.
//
//     vectors LIBRARY FILE
//
// tools/write_vectors.py writes the file, and says how it lies. Every kind of code that the
// processor has is called, by one thread and by several; prints what was wrong, if anything was.

#include "../../kernels/csrc/interface.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace {

constexpr int FLOAT32 = 0;                     // a type
constexpr int EXACT = 0, INT16 = 1, INT8 = 2;  // activations
// How far answers may be off by sums in float32, and by activations in 16 and in 8 bits.
constexpr double SUM = 1e-5, ROUNDED = 2e-4, COARSE = 3e-2;
constexpr int THREADS[] = {1, 2, 3};

int calls = 0, wrong = 0;

void check(bool right, const std::string& what) {
  calls++;
  if (right) return;
  wrong++;
  fprintf(stderr, "wrong: %s\n", what.c_str());
}

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "error: %s\n", what.c_str());
  exit(2);
}

// The library's functions, by the names that Python has them by.
struct Library {
#define NAMES(DO) \
  DO(gptq_isa)    \
  DO(gptq_activations) DO(gptq_own_threads) DO(gptq_pack) DO(gptq_gemv) DO(gptq_decode_step)
#define FIELD(NAME) decltype(&::NAME) NAME;
  NAMES(FIELD)

  explicit Library(const char* path) {
#ifdef _WIN32
    const HMODULE library = LoadLibraryA(path);
    const auto find = [&](const char* name) {
      return reinterpret_cast<void*>(GetProcAddress(library, name));
    };
#else
    void* library = dlopen(path, RTLD_NOW);
    const auto find = [&](const char* name) { return dlsym(library, name); };
#endif
    if (!library) fail(std::string("cannot load ") + path);
#define FIND(NAME)                                      \
  NAME = reinterpret_cast<decltype(NAME)>(find(#NAME)); \
  if (!NAME) fail(std::string("the library has no " #NAME));
    NAMES(FIND)
  }
};

// A piece of the writer's memory, brought here.
struct Block {
  uint64_t address;
  std::vector<uint64_t> words;  // aligned as what it holds
  uint64_t size;
};

struct Vectors {
  std::vector<Block> blocks;
  std::vector<std::pair<std::string, std::vector<uint64_t>>> tests;  // a name, and its numbers

  explicit Vectors(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) fail(std::string("cannot read ") + path);
    const auto read = [&](void* to, size_t size) {
      if (size && fread(to, size, 1, file) != 1) fail(std::string(path) + " is cut short");
    };
    uint64_t head[3];
    read(head, sizeof head);
    if (memcmp(head, "GPTQVEC1", 8) != 0) fail(std::string(path) + " holds no vectors");
    std::vector<bool> structure;
    for (uint64_t i = 0; i < head[1]; i++) {
      uint64_t of[3];
      read(of, sizeof of);
      blocks.push_back({of[0], std::vector<uint64_t>((of[1] + 7) / 8), of[1]});
      structure.push_back(of[2] != 0);
      read(blocks.back().words.data(), of[1]);
    }
    for (uint64_t i = 0; i < head[2]; i++) {
      char name[64];
      uint64_t count;
      read(name, sizeof name);
      read(&count, sizeof count);
      tests.emplace_back(name, std::vector<uint64_t>(count));
      read(tests.back().second.data(), count * sizeof(uint64_t));
    }
    fclose(file);
    // What points into the writer's memory points here.
    for (size_t i = 0; i < blocks.size(); i++)
      if (structure[i])
        for (uint64_t& word : blocks[i].words)
          if (char* here = find(word)) word = reinterpret_cast<uint64_t>(here);
  }

  char* find(uint64_t address) {
    for (Block& block : blocks)
      if (address >= block.address && address - block.address < block.size)
        return reinterpret_cast<char*>(block.words.data()) + (address - block.address);
    return nullptr;
  }

  template <typename T>
  T* at(uint64_t address) {
    char* here = find(address);
    if (!here) fail("an address of the vectors points nowhere");
    return reinterpret_cast<T*>(here);
  }
};

// How far from what is right, of its length.
double off(const std::vector<float>& y, const float* right) {
  double difference = 0, length = 0;
  for (size_t i = 0; i < y.size(); i++) {
    difference += std::pow(double(y[i]) - right[i], 2);
    length += std::pow(double(right[i]), 2);
  }
  return std::sqrt(difference / length);
}

// Call with each kind of code of this processor: `call` fills y by so many threads.
template <typename F>
void check_codes(const Library& library, const std::string& name, size_t size, const float* right,
                 double most, const F& call) {
  for (int isa = 0; isa <= library.gptq_isa(); isa++) {
    const int best = library.gptq_activations(isa);
    std::vector<int> kinds = {EXACT};
    if (best == INT16) kinds.insert(kinds.end(), {INT16, INT8});  // bfloat16's are not for float32
    for (int activations : kinds) {
      const std::string code =
          name + ", code " + std::to_string(isa) + "." + std::to_string(activations);
      std::vector<float> alone;
      for (int threads : THREADS) {
        std::vector<float> y(size, 0.0f);
        check(call(isa, activations, threads, y.data()) == 0, code + ": memory");
        const double by = off(y, right);
        check(by <= (activations == EXACT   ? most
                     : activations == INT16 ? ROUNDED
                                            : COARSE),
              code + ", " + std::to_string(threads) + " threads: off by " + std::to_string(by));
        if (threads == 1) alone = y;
        if (most == SUM) check(y == alone, code + ": other by several threads");
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("vectors LIBRARY FILE");
  const Library library(arguments[1]);
  Vectors vectors(arguments[2]);
  library.gptq_own_threads(1);
  for (const auto& test : vectors.tests) {
    const std::string& name = test.first;
    const std::vector<uint64_t>& of = test.second;
    if (name.compare(0, 4, "pack") == 0) {
      const GptqLinear& linear = *vectors.at<GptqLinear>(of[0]);
      const size_t bytes = of[3];
      for (int threads : THREADS) {
        std::vector<uint32_t> words(bytes / 4);
        library.gptq_pack(int(of[1]), 0, vectors.at<uint32_t>(of[2]), linear.rows,
                          linear.in_features, linear.units, linear.out_features, words.data(),
                          threads);
        check(memcmp(words.data(), linear.words, bytes) == 0, name);
      }
    } else if (name.compare(0, 4, "rows") == 0) {
      const GptqLinear& linear = *vectors.at<GptqLinear>(of[0]);
      const float* x = vectors.at<float>(of[1]);
      const int64_t m = int64_t(of[3]);
      check_codes(library, name, size_t(m * linear.out_features), vectors.at<float>(of[2]), SUM,
                  [&](int isa, int activations, int threads, float* y) {
                    return library.gptq_gemv(&linear, x, y, m, FLOAT32, isa, activations, threads);
                  });
    } else if (name.compare(0, 4, "step") == 0) {
      GptqModel& model = *vectors.at<GptqModel>(of[0]);
      check_codes(library, name, size_t(of[6]), vectors.at<float>(of[5]), 10 * SUM,
                  [&](int isa, int activations, int threads, float* y) {
                    model.isa = isa, model.activations = activations;
                    return library.gptq_decode_step(
                        &model, vectors.at<float>(of[1]), vectors.at<float>(of[2]),
                        vectors.at<float>(of[3]), vectors.at<GptqSequence>(of[4]), 1, y, threads);
                  });
    } else {
      fail("no kind of vectors is named " + name);
    }
  }
  printf("%d checks of %d vectors, code %d: %d wrong\n", calls, int(vectors.tests.size()),
         library.gptq_isa(), wrong);
  return wrong || !calls ? 1 : 0;
}
