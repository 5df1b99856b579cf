"""Check that the packages of an extra are installed, without importing them."""

import importlib.util

from dsdistill.config.errors import UserError

ONNX = ("onnx", "onnxscript", "onnxruntime")


def check_onnx(place: str) -> None:
    """Raise UserError unless the packages of the extra onnx are installed; `place` names what asks for them."""
    lacking = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(place, f"onnx, but no {' and no '.join(lacking)}", "pip install dsdistill[onnx]")
