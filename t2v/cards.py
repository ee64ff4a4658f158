"""What GPUs can do: the figures of their makers' data sheets, dense bf16 and all of the memory."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU: FLOP/s of bf16 products without sparsity, and bytes that a process can use of its memory."""

    name: str
    flops_per_s: float
    memory_bytes: float


# The first whose words are all in the name that CUDA or Ray gives. A card reports a little less than its label says.
CARDS = (
    Card("H200", 989e12, 139.8 * GIB),
    Card("H100 NVL", 835e12, 93.0 * GIB),
    Card("H100 PCIe", 756e12, 79.1 * GIB),
    Card("H100", 989e12, 79.1 * GIB),
    Card("H20", 148e12, 95.0 * GIB),
    Card("H800", 989e12, 79.1 * GIB),
    Card("B200", 2250e12, 178.0 * GIB),
    Card("A100 80GB", 312e12, 79.1 * GIB),
    Card("A100", 312e12, 39.4 * GIB),
    Card("A800", 312e12, 79.1 * GIB),
    Card("L40S", 362e12, 44.4 * GIB),
    Card("L40", 181e12, 44.4 * GIB),
    Card("A6000", 155e12, 47.4 * GIB),
    Card("A10G", 70e12, 22.0 * GIB),
    Card("4090", 165e12, 23.6 * GIB),
)


def find_card(name: str) -> Card | None:
    """The card of that name, as CUDA ("NVIDIA A100-SXM4-80GB") or Ray ("A100-80G") has it; None if it is unknown."""
    words = name.upper().replace("-", " ").split()
    words = ["80GB" if word == "80G" else word for word in words]
    return next((card for card in CARDS if set(card.name.upper().split()) <= set(words)), None)


def mfu(flops_of_rank: float, seconds: float, device_name: str) -> float | None:
    """Model FLOPs utilisation: what a rank computed in so many seconds over what its card could; None if unknown."""
    card = find_card(device_name)
    return flops_of_rank / seconds / card.flops_per_s if card else None
