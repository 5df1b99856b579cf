"""Helpers of the Triton kernels of every operator."""

import triton
import triton.language as tl


@triton.jit
def narrow(x, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 `x` as TYPE, rounded to nearest. UPCAST: bfloat16 stays in float32, since the interpreter cuts it off."""
    if UPCAST:
        if tl.bfloat16 == TYPE:
            bits = x.to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x
    return x.to(TYPE)


@triton.jit
def rounded_to_tf32(x):
    """float32 `x` rounded to the 10 bits of TF32, to nearest and ties to even: matrix instructions cut the rest off."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).to(tl.float32, bitcast=True)
