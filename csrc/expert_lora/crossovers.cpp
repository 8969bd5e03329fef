#include "crossovers.h"

#include "products.h"
#include "tiles.h"

#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define CRAM_EXPORT extern "C" __attribute__((visibility("default")))

namespace cram {
namespace {

struct Row {
  const char *vendor, *unit;
  Crossover wide, half;
};

constexpr Row kRows[] = {
#define CRAM_CROSSOVER(vendor, unit, from, base, gradient, half_from, half_base, half_gradient) \
  {vendor, unit, {from, base, gradient}, {half_from, half_base, half_gradient}},
#include "crossovers_table.h"
#undef CRAM_CROSSOVER
};

const char* vendor() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d)) {
    if (b == signature_INTEL_ebx) return "Intel";
    if (b == signature_AMD_ebx) return "AMD";
  }
#endif
  return "";
}

const char* widest() {
  if (has_tiles()) return "tiles";
  if (has_pairs()) return "pairs";
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

// The first row that fits; the rows of no vendor have every unit.
Row find() {
  const char *maker = vendor(), *unit = widest();
  for (const Row& row : kRows) {
    if (!std::strcmp(row.unit, unit) && (!*row.vendor || !std::strcmp(row.vendor, maker))) return row;
  }
  return {"", unit, {1, 0, 0}, {1, 0, 0}};
}

Row found_row() {
  static const Row row = find();
  return row;
}

struct InForce {
  Row row = found_row();
  Unit unit = has_tiles() ? Unit::tiles : has_pairs() ? Unit::pairs : Unit::lanes;
};

InForce& in_force() {
  static InForce found;
  return found;
}

}  // namespace

Crossover crossover(bool half) { return half ? in_force().row.half : in_force().row.wide; }

Unit unit_for(bool half) { return half ? in_force().unit : Unit::lanes; }

}  // namespace cram

// The row in force in words: vendor, unit, six numbers as in crossovers_table.h, and why there are no tiles, if there
// are none. Separated by tabs.
CRAM_EXPORT const char* cram_crossovers() {
  static thread_local std::string text;
  const cram::Row& row = cram::in_force().row;
  const char* reason = cram::why_no_tiles();
  text = std::string(row.vendor) + "\t" + row.unit;
  for (const cram::Crossover& each : {row.wide, row.half}) {
    for (int64_t number : {each.from, each.base, each.gradient}) text += "\t" + std::to_string(number);
  }
  text += std::string("\t") + (reason ? reason : "");
  return text.c_str();
}

// Whether products of bfloat16 x round float32 factors to bfloat16 before they multiply.
CRAM_EXPORT int cram_rounds_factors() { return cram::unit_for(true) != cram::Unit::lanes; }

// For the program that measures a row, and for tests: other crossovers in this process, and at most that unit. A
// negative unit puts back what the table says.
CRAM_EXPORT void cram_set_crossovers(
    int64_t from, int64_t base, int64_t gradient, int64_t half_from, int64_t half_base, int64_t half_gradient,
    int64_t unit) {
  cram::InForce found;
  if (unit >= 0) {
    found.row.wide = {from, base, gradient};
    found.row.half = {half_from, half_base, half_gradient};
    if (unit < static_cast<int64_t>(found.unit)) {
      found.unit = cram::Unit::lanes;
      if (unit && cram::has_pairs()) found.unit = cram::Unit::pairs;
    }
  }
  cram::in_force() = found;
}
