"""Triton's interpreter, made quicker, with the rounding of a GPU: it truncates to bfloat16 by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


def patch_interpreter(replace: Callable[[Any, str, Any], None]) -> None:
    """Replace attributes of the interpreter's module by `replace(module, name, value)`."""
    from triton.runtime import interpreter

    # Two thirds of the interpreter's time: the same patches at each call, and a check of each integer sum.
    builder, patch, patched = interpreter.interpreter_builder, interpreter._patch_lang, set[str]()
    options = dataclasses.replace(builder.options, sanitize_overflow=False)

    def patch_once(function: Any) -> SimpleNamespace:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    replace(builder, "options", options)
    replace(interpreter, "_patch_lang", patch_once)
    replace(interpreter, "_convert_float", rounding_to_nearest(interpreter._convert_float))


def rounding_to_nearest(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The function `convert` that casts bits, with casts between float32 and bfloat16 as a GPU's."""

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.is_fp32() and target.is_bf16():
            bits = np.ascontiguousarray(numbers).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(is_nan, bits >> 16 | 0x40, nearest).astype(np.uint16)
        if source.is_bf16() and target.is_fp32():
            return np.ascontiguousarray(numbers).view(np.uint16).astype(np.uint32) << 16
        return convert(numbers, source, target, rounding)

    return converted
