"""Share helpers between the Triton kernels of all operators."""

import triton
import triton.language as tl


@triton.jit
def narrow(x, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Return float32 `x` rounded to TYPE. UPCAST: it stays float32, because the interpreter truncates to bfloat16."""
    if UPCAST:
        if tl.bfloat16 == TYPE:
            bits = x.to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x
    return x.to(TYPE)


@triton.jit
def rounded_to_tf32(x):
    """Return float32 `x` rounded to TF32's 10 bits, ties to even, since matrix instructions only truncate."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).to(tl.float32, bitcast=True)
