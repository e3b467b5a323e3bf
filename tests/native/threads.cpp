// Call each function of the library that has threads by one thread, by several, and by two callers
// at a time; OpenMP's threads, and those of the library's own.
//
// A program and no library, so that a sanitizer may watch every thread of it: `make sanitize`
// builds it with the library's sources. Answers of several threads must be those of one, to the bit
// where threads share no sum.

#include "../../kernels/csrc/interface.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int FLOAT32 = 0, BFLOAT16 = 1;  // types
constexpr int AVX512_BF16 = 4;            // instructions
constexpr int EXACT = 0;                  // activations: float32
constexpr int HIDDEN = 128, INTERMEDIATE = 192, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 32, LAYERS = 2,
              VOCABULARY = 700;
constexpr int THREADS = 4;

std::atomic<int> wrong{0};

void check(bool right, const std::string& what) {
  if (right) return;
  fprintf(stderr, "wrong: %s\n", what.c_str());
  wrong++;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

std::vector<float> random_floats(size_t count, unsigned seed, float scale = 1) {
  std::mt19937 draw(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& it : values) it = normal(draw);
  return values;
}

// Numbers of a type, as bytes.
struct Array {
  std::vector<char> bytes;
  int type;
  Array(const std::vector<float>& values, int of)
      : bytes(values.size() * (of == FLOAT32 ? 4 : 2)), type(of) {
    for (size_t i = 0; i < values.size(); i++) {
      const uint16_t narrow = to_bfloat16(values[i]);
      if (type == FLOAT32)
        memcpy(&bytes[4 * i], &values[i], 4);
      else
        memcpy(&bytes[2 * i], &narrow, 2);
    }
  }
  Array(size_t count, int of) : Array(std::vector<float>(count), of) {}
  float at(size_t i) const {
    float wide;
    uint16_t narrow;
    if (type == FLOAT32) return memcpy(&wide, &bytes[4 * i], 4), wide;
    return memcpy(&narrow, &bytes[2 * i], 2), from_bfloat16(narrow);
  }
  size_t size() const { return bytes.size() / (type == FLOAT32 ? 4 : 2); }
  // How far from another, of the other's length.
  double off(const Array& other) const {
    double difference = 0, length = 0;
    for (size_t i = 0; i < size(); i++) {
      difference += std::pow(double(at(i)) - other.at(i), 2);
      length += std::pow(double(other.at(i)), 2);
    }
    return std::sqrt(difference / length);
  }
};

// A random layer, packed by some threads: groups of 64 rows, in order or not, alike for all linears
// of one width.
struct Linear : GptqLinear {
  std::vector<int32_t> order, units_of, group_of;
  std::vector<uint32_t> packed;
  std::vector<float> scale_table;
  std::vector<uint8_t> zero_table;

  Linear(int width, int k, int n, bool shuffled, int pack_threads, unsigned seed) : GptqLinear{} {
    const int unit = width == 3 ? 32 : 32 / width, words_of = width == 3 ? 3 : 1;
    std::mt19937 draw(seed);
    std::vector<uint32_t> qweight(size_t(k) * width / 32 * n);
    for (uint32_t& it : qweight) it = uint32_t(draw());
    order.resize(k);
    std::iota(order.begin(), order.end(), 0);
    if (shuffled) std::shuffle(order.begin(), order.end(), std::mt19937(7));
    const int tiles = (n + 63) / 64, count = k / 64;
    units_of.assign(count, 64 / unit);
    group_of.resize(count);
    std::iota(group_of.begin(), group_of.end(), 0);
    packed.resize(size_t(tiles) * (k / unit) * words_of * 64);
    scale_table = random_floats(size_t(tiles) * count * 64, seed, 0.05f);
    zero_table.assign(scale_table.size(), uint8_t(1 << (width - 1)));
    bits = width, in_features = k, out_features = n, units = k / unit, segments = groups = count,
    float_scales = 1;
    rows = order.data(), segment_units = units_of.data(), segment_group = group_of.data(),
    words = packed.data();
    scales = scale_table.data(), zeros = zero_table.data();
    check(gptq_pack(width, 0, qweight.data(), rows, k, units, n, packed.data(), pack_threads) == 0,
          "pack");
  }
};

// A random model, with the caches of some sequences.
struct Model : GptqModel {
  std::vector<std::vector<float>> norms;
  std::vector<Array> weights;
  std::vector<GptqDecoderLayer> described;
  std::vector<std::vector<Array>> memory;  // of each sequence
  std::vector<std::vector<GptqKvCache>> caches;

  Model(const std::vector<Linear>& linears, bool all_packed, int of, int code, int multiplied_as)
      : GptqModel{} {
    layers = LAYERS, hidden = HIDDEN, heads = HEADS, kv_heads = KV_HEADS;
    head_dim = rotary_dim = HEAD_DIM, residual = 1;
    type = of, isa = code, activations = multiplied_as, eps = 1e-5f, scale = 0.17f;
    norms.assign(1, std::vector<float>(HIDDEN, 1.0f));
    const int q = HEADS * HEAD_DIM, kv = KV_HEADS * HEAD_DIM;
    const int shapes[7][2] = {{HIDDEN, q},           {HIDDEN, kv},           {HIDDEN, kv},
                              {q, HIDDEN},           {HIDDEN, INTERMEDIATE}, {HIDDEN, INTERMEDIATE},
                              {INTERMEDIATE, HIDDEN}};
    weights.reserve(7 * LAYERS);
    for (int i = 0; i < LAYERS; i++) {
      GptqProjection parts[7];
      for (int part = 0; part < 7; part++) {
        const auto [in, out] = shapes[part];
        const bool dense = !all_packed && part % 2;
        if (dense) weights.emplace_back(random_floats(size_t(in) * out, 7 * i + part, 0.1f), of);
        const int same = all_packed && (part == 1 || part == 2 || part == 5);
        parts[part] = {dense ? nullptr : &linears[part],
                       dense ? weights.back().bytes.data() : nullptr,
                       nullptr,
                       in,
                       out,
                       same};
      }
      GptqDecoderLayer decoder{};
      decoder.q = parts[0], decoder.k = parts[1], decoder.v = parts[2], decoder.o = parts[3];
      decoder.gate = parts[4], decoder.up = parts[5], decoder.down = parts[6];
      decoder.input_norm.weight = decoder.feed_forward_norm.weight = norms[0].data();
      decoder.window = i ? 40 : 0;
      described.push_back(decoder);
    }
    norm.weight = norms[0].data(), layer = described.data();
  }

  // New tokens of a sequence that has `past` others, with random keys and values.
  GptqSequence begin(int64_t past, int64_t tokens) {
    const int64_t capacity = past + tokens + 7;
    memory.emplace_back();
    caches.emplace_back();
    for (int i = 0; i < 2 * LAYERS; i++)
      memory.back().emplace_back(random_floats(size_t(KV_HEADS) * capacity * HEAD_DIM, unsigned(i)),
                                 type);
    for (int i = 0; i < LAYERS; i++)
      caches.back().push_back({memory.back()[2 * i].bytes.data(),
                               memory.back()[2 * i + 1].bytes.data(), nullptr, nullptr, capacity});
    return {past, tokens, caches.back().data()};
  }
};

std::vector<Linear> make_linears(int width, bool shuffled, int threads) {
  const int q = HEADS * HEAD_DIM, kv = KV_HEADS * HEAD_DIM;
  std::vector<Linear> linears;
  linears.reserve(7);
  unsigned seed = 0;
  for (const auto& [in, out] : {std::pair(HIDDEN, q),
                                {HIDDEN, kv},
                                {HIDDEN, kv},
                                {q, HIDDEN},
                                {HIDDEN, INTERMEDIATE},
                                {HIDDEN, INTERMEDIATE},
                                {INTERMEDIATE, HIDDEN}})
    linears.emplace_back(width, in, out, shuffled, threads, seed++);
  return linears;
}

Array step(const std::vector<Linear>& linears, bool all_packed, int type, int isa, int activations,
           int threads) {
  Model model(linears, all_packed, type, isa, activations);
  model.memory.reserve(3), model.caches.reserve(3);
  const GptqSequence sequences[] = {model.begin(300, 1), model.begin(5, 3), model.begin(0, 2)};
  const Array x(random_floats(6 * HIDDEN, 5), type);
  const std::vector<float> angles(6 * HEAD_DIM, 0.7f);
  Array y(6 * HIDDEN, type);
  check(gptq_decode_step(&model, x.bytes.data(), angles.data(), angles.data(), sequences, 3,
                         y.bytes.data(), threads) == 0,
        "step");
  return y;
}

Array prompt(const std::vector<Linear>& linears, int amx, int threads) {
  Model model(linears, true, BFLOAT16, AVX512_BF16, gptq_activations(AVX512_BF16));
  const int tokens = 150;
  const GptqSequence sequence = model.begin(40, tokens);
  const Array x(random_floats(size_t(tokens) * HIDDEN, 5), BFLOAT16);
  const std::vector<float> angles(tokens * HEAD_DIM, 0.7f);
  Array y(size_t(tokens) * HIDDEN, BFLOAT16);
  check(gptq_prefill(&model, x.bytes.data(), angles.data(), angles.data(), &sequence,
                     y.bytes.data(), amx, threads) == 0,
        "prompt");
  return y;
}

// The same by one thread and by several: equal to the bit, or off by no more than `tolerance`.
void compare(const std::string& what, const std::function<Array(int)>& call, double tolerance = 0) {
  const Array alone = call(1);
  for (int threads : {2, THREADS}) {
    const std::string by = what + " by " + std::to_string(threads) + " threads";
    gptq_own_threads(0);
    const Array together = call(threads);
    gptq_own_threads(1);
    check(call(threads).bytes == together.bytes, by + " of the library's own: other than OpenMP's");
    const double off = together.off(alone);
    check(tolerance ? off <= tolerance : together.bytes == alone.bytes,
          by + ": off by " + std::to_string(off));
  }
}

void call_everything() {
  const int best = gptq_isa(), amx = gptq_amx();
  for (int width : {3, 4}) {
    for (bool shuffled : {false, true}) {
      const std::vector<Linear> linears = make_linears(width, shuffled, THREADS);
      const Linear& linear = linears[4];
      const std::string name = std::to_string(width) + " bits" + (shuffled ? ", shuffled" : "");
      check(linear.packed == make_linears(width, shuffled, 1)[4].packed, name + ": packed words");
      for (int isa = 0; isa <= best; isa++) {
        const int type = isa >= AVX512_BF16 ? BFLOAT16 : FLOAT32;
        const int activations = isa >= AVX512_BF16 ? gptq_activations(isa) : EXACT;
        const std::string code = name + ", code " + std::to_string(isa);
        for (int m : {1, 7, 70})
          compare(code + ": rows", [&](int threads) {
            const Array x(random_floats(size_t(m) * HIDDEN, 3), type);
            Array y(size_t(m) * INTERMEDIATE, type);
            check(gptq_gemv(&linear, x.bytes.data(), y.bytes.data(), m, type, isa, activations,
                            threads) == 0,
                  "matmul");
            return y;
          });
        compare(code + ": unpacked", [&](int threads) {
          Array w(size_t(HIDDEN) * INTERMEDIATE, FLOAT32);
          gptq_unpack(&linear, 0, INTERMEDIATE / 64, w.bytes.data(), FLOAT32, isa, threads);
          return w;
        });
        for (bool all_packed : {false, true}) {
          const auto run = [&](int threads) {
            return step(linears, all_packed, type, isa, activations, threads);
          };
          compare(code + ": step", run, type == FLOAT32 ? 1e-5 : 2e-2);
        }
      }
      const auto panels = [&](const std::string& of, int type, int isa, int unit) {
        for (int m : {40, 1100})
          compare(name + ": panels" + of, [&](int threads) {
            const Array x(random_floats(size_t(m) * HIDDEN, 3), type);
            Array first(size_t(m) * INTERMEDIATE, type), second = first;
            const GptqLinear* const both[] = {&linears[4], &linears[5]};
            void* const y[] = {first.bytes.data(), second.bytes.data()};
            check(gptq_gemm(both, y, 2, x.bytes.data(), m, type, isa, unit, threads) == 0, "gemm");
            first.bytes.insert(first.bytes.end(), second.bytes.begin(), second.bytes.end());
            return first;
          });
      };
#ifdef X86
      if (best >= AVX2)
        for (int type : {FLOAT32, BFLOAT16}) panels(" of whole numbers", type, AVX2, 0);
#endif
      if (best < AVX512_BF16) continue;
      for (int unit = 0; unit <= amx; unit++) panels("", BFLOAT16, best, unit);
      for (int unit = 0; unit <= amx; unit++)
        compare(name + ": prompt", [&](int threads) { return prompt(linears, unit, threads); });
    }
  }
  for (int type : {FLOAT32, BFLOAT16}) {
    const int isa = best;
    const Array weight(random_floats(size_t(VOCABULARY) * HIDDEN, 9), type),
        x(random_floats(3 * HIDDEN, 8), type);
    const int tiles = (VOCABULARY + 63) / 64, groups = HIDDEN / 64;
    compare("head", [&](int threads) {
      Array y(3 * VOCABULARY, type);
      check(gptq_head(weight.bytes.data(), x.bytes.data(), y.bytes.data(), 3, HIDDEN, VOCABULARY,
                      type, isa, threads) == 0,
            "head");
      return y;
    });
    compare("short head", [&](int threads) {
      std::vector<uint32_t> words(size_t(tiles) * HIDDEN / 4 * 64);
      std::vector<float> scales(size_t(tiles) * groups * 64), errors(VOCABULARY),
          lengths(VOCABULARY);
      gptq_quantize_head(weight.bytes.data(), VOCABULARY, HIDDEN, words.data(), scales.data(),
                         errors.data(), lengths.data(), type, isa, threads);
      std::vector<int32_t> rows(HIDDEN), units(groups, 16), group(groups);
      std::iota(rows.begin(), rows.end(), 0);
      std::iota(group.begin(), group.end(), 0);
      const std::vector<uint8_t> zeros(scales.size(), 128);
      const GptqLinear narrow{8,
                              HIDDEN,
                              VOCABULARY,
                              HIDDEN / 4,
                              groups,
                              groups,
                              1,
                              rows.data(),
                              units.data(),
                              group.data(),
                              words.data(),
                              scales.data(),
                              zeros.data(),
                              nullptr};
      const int64_t wanted[] = {1, 5, 2};
      Array y(3 * VOCABULARY, type);
      const float longest = *std::max_element(lengths.begin(), lengths.end());
      check(gptq_top_logits(&narrow, errors.data(), longest, weight.bytes.data(), x.bytes.data(), 3,
                            wanted, nullptr, y.bytes.data(), type, isa, gptq_activations(isa),
                            threads) == 0,
            "short head");
      return y;
    });
  }
  check(gptq_read_bandwidth(1 << 20, 2, THREADS) > 0, "bandwidth");
}

// Steps of a batch and prompts of one model, by callers that do not wait for each other: they share
// its packed words and its tables, and each has buffers and caches of its own.
void share_a_model() {
  const int isa = gptq_isa(), type = isa >= AVX512_BF16 ? BFLOAT16 : FLOAT32;
  const int activations = isa >= AVX512_BF16 ? gptq_activations(isa) : EXACT;
  const std::vector<Linear> linears = make_linears(4, true, THREADS);
  const Array stepped = step(linears, true, type, isa, activations, 1);
  const Array read = type == BFLOAT16 ? prompt(linears, gptq_amx(), 1) : stepped;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; caller++)
    callers.emplace_back([&, caller] {
      for (int turn = 0; turn < 3; turn++) {
        if (caller % 2 && type == BFLOAT16)
          check(prompt(linears, gptq_amx(), 2).bytes == read.bytes, "a prompt beside steps");
        else
          check(step(linears, true, type, isa, activations, 2).off(stepped) <= 2e-2,
                "a step beside prompts");
      }
    });
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
  call_everything();
  share_a_model();
  std::thread one(call_everything), other(call_everything);
  one.join();
  other.join();
  printf("%s\n", wrong ? "some answers are wrong" : "all answers are those of one thread");
  return wrong ? 1 : 0;
}
