"""A few instructions of PTX, carried out by torch: the interpreter has no assembly, and what GPUs run must not be
seen there alone."""

from __future__ import annotations

import torch
from torch import Tensor


def by_hand(program: str, given: Tensor, dtype: torch.dtype, register: str = "$2") -> dict[str, Tensor]:
    """What `program` leaves in each register, for words `given` int32 in `register`. Floats are of `dtype`."""
    held = {register: given}

    def of(name: str) -> Tensor:
        if name.isdigit() or name.startswith("0x"):
            return torch.tensor([int(name, 0)]).to(torch.int32)
        return held[name]

    for line in program.strip("{} \n").splitlines():
        name, to, *sources = line.replace(",", "").rstrip(";").split()
        if name == ".reg":
            continue
        x, *more = (of(each) for each in sources)
        match name:
            case "mov.b32":
                held[to] = x
            case "and.b32":
                held[to] = x & more[0]
            case "or.b32":
                held[to] = x | more[0]
            case "xor.b32":
                held[to] = x ^ more[0]
            case "shl.b32":
                held[to] = (x.long() << more[0]).to(torch.int32)
            case "shr.b32":
                held[to] = ((x.long() & 0xFFFFFFFF) >> more[0]).to(torch.int32)
            case "lop3.b32":
                if sources[3] != "0xea":
                    raise ValueError(line)
                held[to] = x & more[0] | more[1]
            case "sub.f16x2":
                held[to] = (x.view(dtype) - more[0].view(dtype)).view(torch.int32)
            case "mul.f16x2" | "fma.rn.bf16x2":
                product, *rest = (each.view(dtype).view(-1, 2) for each in (x, *more))
                product = product * rest[0]
                held[to] = (product + rest[1] if len(rest) == 2 else product).view(torch.int32).flatten()
            case "add.f16x2":
                first, second = (each.view(dtype).view(-1, 2) for each in (x, more[0]))
                held[to] = (first + second).view(torch.int32).flatten()
            case _:
                raise ValueError(line)
    return held
