"""Operations that XLA's own count leaves out."""

import re

from qwen_jax.sharding.hlo.flow import Place, walk
from qwen_jax.sharding.hlo.text import Module, sizes


def repeated_flops(module: Module) -> int:
    """Operations of products in loops after the first turn, which XLA's own analysis leaves out.

    Such loops are of the program, or XLA's: it computes a product in pieces while others travel.
    Every product is a convolution in a program for TPUs.
    """
    return sum(
        (place.times - 1) * _convolution_flops(place)
        for place in walk(module)
        if place.instruction.opcode == "convolution" and place.times > 1
    )


def _convolution_flops(place: Place) -> int:
    """Multiplications and additions, those with padding left out."""
    instruction, by_name = place.instruction, place.computation.by_name
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    shapes = (*(by_name[name].shape for name in instruction.operands), instruction.shape)
    x, kernel, out = (
        dict(zip(names, sizes(shape), strict=True))
        for names, shape in zip(labels, shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    flops = 2 * out["b"] * out["f"] * kernel["i"]
    for i in range(len(kernel) - 2):

        def field(name: str, default: str, i: int = i) -> str:
            return fields[name].split("x")[i] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        stride, *dilations = (
            int(field(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        met = (
            stride * o + dilations[0] * k - low
            for o in range(out[str(i)])
            for k in range(kernel[str(i)])
        )
        stop = dilations[1] * (x[str(i)] - 1) + 1
        flops *= sum(0 <= at < stop and at % dilations[1] == 0 for at in met)
    return flops
