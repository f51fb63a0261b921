"""Kubernetes' quantities, as far as adding two amounts of memory needs them."""

import re
from decimal import ROUND_CEILING, Decimal

_FACTORS: dict[str, Decimal] = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P"), 1)},
    **{
        unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)
    },
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")


def total_bytes(*quantities: str) -> int:
    """The sum, in whole bytes, rounded up."""
    total = sum((_amount(quantity) for quantity in quantities), Decimal(0))
    return int(total.to_integral_value(rounding=ROUND_CEILING))


def _amount(quantity: str) -> Decimal:
    match = _QUANTITY.match(quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is not a quantity: expected for instance 512Mi or 16Gi")
    number, unit = match.groups(default="")
    return Decimal(number) * _FACTORS[unit]
