// What a race detector must see, and what it must not: `races KIND` makes one race, `races none`
// the same accesses in an order that a barrier gives them. `make sanitize` calls it before it
// believes the detector.

#include <cstdio>
#include <cstring>

namespace {

constexpr int COUNT = 64;  // of threads' parts, each of one vector

typedef float floats __attribute__((vector_size(64)));

floats shared[COUNT];
int total;

// Write part `i` and, where nothing keeps a thread from going on, read another thread's too early.
void write(const char* kind, int i) {
  const floats value = floats{} + float(i);
  if (strcmp(kind, "vector") == 0)
    shared[i] = value;
  else
    memcpy(&shared[i], &value, sizeof value);
}

float read(const char* kind, int i, size_t size) {
  floats value{};
  if (strcmp(kind, "vector") == 0)
    value = shared[i];
  else
    memcpy(&value, &shared[i], size);
  return value[3];
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const char* kind = arguments[1];
  const bool none = strcmp(kind, "none") == 0;
  const size_t size =
      sizeof(floats) - size_t(count - 2);  // not known when this is compiled: a call of memcpy
  float sum = 0;
#pragma omp parallel num_threads(4) reduction(+ : sum)
  {
#pragma omp for nowait
    for (int i = 0; i < COUNT; i++) write(kind, i);
    if (strcmp(kind, "number") == 0) total++;
    if (none) {
#pragma omp barrier
    }
#pragma omp for
    for (int i = 0; i < COUNT; i++) sum += read(kind, COUNT - 1 - i, size);
  }
  printf("%s: %g %d\n", kind, double(sum), total);
  return 0;
}
