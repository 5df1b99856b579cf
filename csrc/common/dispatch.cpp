#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef DSD_X86
#include <cpuid.h>
#endif
#if defined(DSD_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsd {
namespace {

#ifdef DSD_X86
// Whether the processor has tile registers with bfloat16 products and Linux lets this process use them. The state of
// these registers is large, so a process must ask for it, once for all its threads.
bool tiles_permitted() {
#ifdef __linux__
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  if (!(edx & AMX_BF16) || !(edx & AMX_TILE)) return false;
  constexpr long REQUEST = 0x1023, XTILEDATA = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
  return syscall(SYS_arch_prctl, REQUEST, XTILEDATA) == 0;
#else
  return false;
#endif
}
#endif

bool present(InstructionSet set) {
  if (set == InstructionSet::portable) return true;
#ifdef DSD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == InstructionSet::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (set == InstructionSet::avx512) return avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (set == InstructionSet::avx512_bf16) return avx512_bf16;
  static const bool tiles = tiles_permitted();
  return avx512_bf16 && tiles;
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
    case InstructionSet::amx_bf16:
      return "amx_bf16";
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
  for (InstructionSet set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512,
                             InstructionSet::avx512_bf16, InstructionSet::amx_bf16})
    if (present(set)) sets.push_back(set);
  return sets;
}

InstructionSet instruction_set() { return InstructionSet(chosen().load(std::memory_order_relaxed)); }

void choose_instruction_set(const std::string& name) { chosen().store(int(find(name))); }

}  // namespace dsd
