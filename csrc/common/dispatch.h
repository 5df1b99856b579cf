// The instruction sets that were built, and the one that is used.
#pragma once

#include <string>
#include <vector>

namespace dsd {

enum class InstructionSet : int { portable, avx2, avx512, avx512_bf16, amx_bf16 };

const char* name_of(InstructionSet set);

// The sets that are built into this library and present in this processor, the simplest first.
std::vector<InstructionSet> usable_instruction_sets();

// The best usable set, or the one that DSDISTILL_ISA or choose_instruction_set names.
InstructionSet instruction_set();

// Throws std::invalid_argument for a name that is unknown or not usable here.
void choose_instruction_set(const std::string& name);

// The build of a kernel for the instruction set that is used.
template <class Kernel>
const Kernel& select(const Kernel& portable, const Kernel* avx2, const Kernel* avx512, const Kernel* avx512_bf16,
                     const Kernel* amx_bf16) {
  switch (instruction_set()) {
    case InstructionSet::amx_bf16:
      return *amx_bf16;
    case InstructionSet::avx512_bf16:
      return *avx512_bf16;
    case InstructionSet::avx512:
      return *avx512;
    case InstructionSet::avx2:
      return *avx2;
    default:
      return portable;
  }
}

#ifdef DSD_X86
#define DSD_SELECT(kernel)                                                                                          \
  ::dsd::select(::dsd::portable::kernel, &::dsd::avx2::kernel, &::dsd::avx512::kernel, &::dsd::avx512_bf16::kernel, \
                &::dsd::amx_bf16::kernel)
#else
#define DSD_SELECT(kernel) (::dsd::portable::kernel)
#endif

}  // namespace dsd
