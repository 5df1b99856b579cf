"""csrc/hidden/cuda.cu itself runs on a CPU, with threads as fibers (emulated_cuda/); only its launch lines differ."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dsdistill.bench.verify import require, rms

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "hidden" / "cuda.cu"
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of RowType
LAUNCH = re.compile(r"([\w:]+(?:<[^;{}]*?>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
ENTRY = (
    'extern "C" int run(const dsd::HiddenRows* rows) { return dsd::launch_hidden_rows(*rows, nullptr); }\n'
)
GUARD = 600  # elements on both sides of what a kernel may touch: more than a row

# (width, elements between rows of y and of the target beyond it, first elements of y, target, bias and gradient).
LAYOUTS = (
    (8, 0, 0, (0, 0, 0, 0)),
    (264, 8, 16, (0, 0, 0, 0)),
    (520, 0, 0, (8, 16, 8, 8)),
    (264, 0, 0, (1, 0, 0, 0)),  # one of them misaligned: element by element
    (264, 0, 0, (0, 1, 0, 0)),
    (264, 0, 0, (0, 0, 1, 0)),
    (264, 0, 0, (0, 0, 0, 1)),
    (264, 1, 0, (0, 0, 0, 0)),
    (264, 0, 3, (0, 0, 0, 0)),
    (1, 0, 0, (0, 0, 0, 0)),
    (33, 5, 2, (3, 1, 2, 1)),
)


class HiddenRows(ctypes.Structure):
    """HiddenRows has the fields of csrc/hidden/rows.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in "y target bias weights factor values gradient".split()]
        + [(name, ctypes.c_int64) for name in "tokens width y_stride target_stride".split()]
        + [(name, ctypes.c_int) for name in "y_type target_type gradient_type".split()]
        + [("cosine", ctypes.c_bool)]
    )


def build(folder: Path, change=lambda source: source) -> ctypes.CDLL:
    source, launches = LAUNCH.subn(r"emulation::launch(\2, [&] { \1(\3); });", change(SOURCE.read_text()))
    assert launches == 4
    (folder / "cuda.cpp").write_text(source + ENTRY)
    command = ["g++", "-std=c++17", "-O1", "-g0", "-shared", "-fPIC", "-fno-strict-aliasing", "-w"]
    command += [f"-I{HERE / 'emulated_cuda'}", f"-I{SOURCE.parent}", "-o", str(folder / "cuda.so")]
    subprocess.run([*command, str(folder / "cuda.cpp")], check=True)
    return ctypes.CDLL(str(folder / "cuda.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++ on the PATH")
    return build(tmp_path_factory.mktemp("cuda"))


def placed(
    rows: torch.Tensor, stride: int, first: int, around: float = torch.nan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a view with these rows, `stride` apart, in memory that holds `around` elsewhere; and that memory."""
    count, width = rows.shape
    memory = torch.full((count * stride + first + 2 * GUARD,), around, dtype=rows.dtype)
    memory = memory[(-memory.data_ptr() % 16) // rows.element_size() :]
    view = memory.as_strided((count, width), (stride, 1), GUARD + first)
    view.copy_(rows)
    return view, memory


def truth(y, target, bias, weights, factor, cosine, dtype):
    """Return (values, gradients) by the formulas of csrc/hidden/rows.h."""
    x, t, w = y.to(dtype) + bias.to(dtype), target.to(dtype), weights.to(dtype)[:, None]
    if not cosine:
        return (w * (x - t).square()).sum(1), 2 * w * factor * (x - t)
    norms = [torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (x, t)]
    inverse = [torch.where(n > 1e-12, 1 / n.clamp(min=1e-30), 0) for n in norms]
    a, b = x * inverse[0], t * inverse[1]
    cos = (a * b).sum(1, keepdim=True)
    return (w * (1 - cos))[:, 0], -w * factor * (b - cos * a) * inverse[0]


def check(library, y_type, target_type, gradient_type, cosine, layout, tokens=11) -> None:
    width, y_extra, t_extra, first = layout
    generator = torch.Generator().manual_seed(width)
    y, target = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    y, target = y.to(y_type), target.to(target_type)
    bias, weights = torch.randn(1, width, generator=generator), torch.rand(tokens, generator=generator)
    weights[[2, tokens - 1]] = 0
    y[4] = -bias[0].to(y_type) if y_type == torch.float32 else 0  # with float32 a row without a direction
    factor = torch.tensor(0.37)
    exact = [truth(y, target, bias, weights, 0.37, cosine, dtype) for dtype in (torch.float64, torch.float32)]
    y[2], target[tokens - 1] = torch.nan, torch.nan  # tokens of weight 0 are never read
    for values, gradient in exact:
        values[[2, tokens - 1]], gradient[[2, tokens - 1]] = 0, 0

    y, _ = placed(y, width + y_extra, first[0])
    target, _ = placed(target, width + t_extra, first[1])
    bias, _ = placed(bias, width, first[2])
    weights, _ = placed(weights[None], tokens, 0)
    values, values_memory = placed(torch.full((1, tokens), torch.nan), tokens, 0, 7.0)
    gradient, gradient_memory = placed(
        torch.full((tokens, width), torch.nan, dtype=gradient_type or torch.float32), width, first[3], 7.0
    )
    rows = HiddenRows(tokens=tokens, width=width, y_stride=y.stride(0), target_stride=target.stride(0))
    rows.y, rows.target, rows.bias = y.data_ptr(), target.data_ptr(), bias.data_ptr()
    rows.weights, rows.factor, rows.values = weights.data_ptr(), factor.data_ptr(), values.data_ptr()
    rows.gradient = None if gradient_type is None else gradient.data_ptr()
    rows.y_type, rows.target_type = TYPES.index(y_type), TYPES.index(target_type)
    rows.gradient_type = TYPES.index(gradient_type or torch.float32)
    rows.cosine = cosine
    assert library.run(ctypes.byref(rows)) == 0

    # A value of cosine is a difference from 1.
    require("values", values[0], exact[0][0], exact[1][0], 1.0 if cosine else rms(exact[0][0]))
    memories = [(values_memory, tokens, 0)]
    if gradient_type is None:
        assert gradient.isnan().all()
    else:
        # With cosine and one feature only the rounding of cancelled terms is left, w · factor / ‖x‖.
        cancels = cosine and width == 1
        size = (
            (0.37 * weights / (y + bias).norm(dim=1)).nan_to_num(0, 0, 0).max()
            if cancels
            else exact[0][1].abs().max()
        )
        require("gradient", gradient, exact[0][1], exact[1][1].to(gradient_type), size.item())
        assert not gradient[[2, tokens - 1]].any()
        memories.append((gradient_memory, tokens * width, first[3]))
    for memory, count, offset in memories:
        assert (memory[: GUARD + offset] == 7).all() and (memory[GUARD + offset + count :] == 7).all()


COMBINATIONS = [
    (y, target, gradient)
    for y, target, gradient in itertools.product(TYPES, TYPES, (None, torch.float32, torch.bfloat16))
    if not (y == torch.float16 and gradient == torch.bfloat16)
]


@pytest.mark.parametrize("cosine", [False, True], ids=["mse", "cosine"])
def test_every_type_and_layout(library, cosine):
    """Odd widths, misaligned rows, weights of zero, rows without a direction; nothing is written past the end."""
    for combination, layout in itertools.product(COMBINATIONS, LAYOUTS):
        check(library, *combination, cosine, layout)


def test_nothing_to_do(library):
    assert library.run(ctypes.byref(HiddenRows(tokens=0, width=8))) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("aligned(rows.bias) && ", ""),  # an access of 16 bytes that is not aligned
        ("if (token >= rows.tokens) return;", "if (token > rows.tokens) return;"),  # one row too many
        ("if (COSINE) {\n    sums.squares_x", "if (COSINE && lane > 0) {\n    sums.squares_x"),  # lanes part
    ],
    ids=["misaligned", "row", "shuffle"],
)
def test_what_a_gpu_would_get_wrong_is_found(old, new, tmp_path):
    def change(source: str) -> str:
        assert old in source
        # With only float32 it compiles in a second.
        return re.sub(r"case RowType::\w+:\n.*?;\n", "", source.replace(old, new))

    broken = build(tmp_path, change)
    with pytest.raises(AssertionError):
        for cosine, layout in itertools.product((False, True), LAYOUTS):
            check(broken, torch.float32, torch.float32, torch.float32, cosine, layout)
