#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dsd {
namespace {

bool present(InstructionSet set) {
  if (set == InstructionSet::portable) return true;
#ifdef DSD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == InstructionSet::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 && (set == InstructionSet::avx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

InstructionSet find(const std::string& name) {
  std::string usable;
  for (InstructionSet set : usable_instruction_sets()) {
    if (name == name_of(set)) return set;
    usable += std::string(usable.empty() ? "" : ", ") + name_of(set);
  }
  throw std::invalid_argument("instruction set: got '" + name + "', expected one of " + usable);
}

std::atomic<int>& chosen() {
  static std::atomic<int> value([] {
    if (const char* wanted = std::getenv("DSDISTILL_ISA")) return int(find(wanted));
    return int(usable_instruction_sets().back());
  }());
  return value;
}

}  // namespace

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512_bf16:
      return "avx512_bf16";
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

std::vector<InstructionSet> usable_instruction_sets() {
  std::vector<InstructionSet> sets;
  for (InstructionSet set :
       {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::avx512_bf16})
    if (present(set)) sets.push_back(set);
  return sets;
}

InstructionSet instruction_set() { return InstructionSet(chosen().load(std::memory_order_relaxed)); }

void choose_instruction_set(const std::string& name) { chosen().store(int(find(name))); }

}  // namespace dsd
