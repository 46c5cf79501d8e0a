"""How many units compete in each block: what the caller asks for, checked against the channels there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import gcd

from .errors import SurgeryError, UnknownNameError
from .sites import Site, Sites

Competitors = int | Mapping[str, int] | Callable[[Site], int | None]
SHOWN = 8


def block_sizes(sites: Sites, competitors: Competitors) -> dict[Site, int]:
    """Decide how many compete at every site that can be replaced; sites given none are left out.

    Raises SurgeryError when a number is below 2 or does not divide the channels, UnknownNameError when a
    path or glob matches no site.
    """
    choose = _chooser(sites, competitors)
    chosen = {site: choose(site) for site in sites if not site.reason}
    sizes = {site: size for site, size in chosen.items() if size is not None}
    for site, size in sizes.items():
        if size < 2:
            raise SurgeryError(
                f"{site.name} is given {size} competitors, but at least 2 have to compete. Use one of "
                f"{_some(divisors(site.channels or 0))}, or leave it out with where=."
            )
    _check_division(sizes)
    _check_functions(sites, sizes)
    return sizes


def divisors(number: int) -> list[int]:
    """List the divisors above 1, in ascending order.

    >>> divisors(12)
    [2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)} - {1})


def _chooser(sites: Sites, competitors: Competitors) -> Callable[[Site], int | None]:
    if isinstance(competitors, int):
        return lambda site: competitors
    if callable(competitors):
        return competitors
    for pattern in competitors:
        if not any(_matches(site, pattern) for site in sites):
            raise UnknownNameError("activation site", pattern, [site.name for site in sites])
    return lambda site: next((size for pattern, size in competitors.items() if _matches(site, pattern)), None)


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.path, pattern) or fnmatchcase(site.name, pattern)


def _check_division(sizes: Mapping[Site, int]) -> None:
    wrong = [site for site, size in sizes.items() if (site.channels or 0) % size]
    if not wrong:
        return
    first = wrong[0]
    size, channels = sizes[first], first.channels or 0
    same = [site for site in wrong if sizes[site] == size]
    others = f" So it is at {len(wrong) - 1} other sites." if len(wrong) > 1 else ""
    common = divisors(gcd(*(site.channels or 0 for site in same)))
    usable = common or divisors(channels)
    repair = f"Use one of {_some(usable)}." if usable else "Leave it out with where=."
    raise SurgeryError(
        f"{first.name} has {channels} channels, which {size} competitors do not divide. {repair}{others}"
    )


def _check_functions(sites: Sites, sizes: Mapping[Site, int]) -> None:
    """Only their order tells the calls of a function in one forward apart, so all of them change or none."""
    chosen = {site.path: site for site in sizes if site.function}
    for site in sites:
        if site.function and site.path in chosen and site not in sizes:
            raise SurgeryError(
                f"{site.name} is left alone, but {chosen[site.path].name} is not. "
                f"Give competitors to all {site.calls} calls of {site.path}, or to none."
            )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
