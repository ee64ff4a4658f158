"""Which addresses a download may connect to: public ones, and those that the config allows.

URLs come from strangers; without this rule a manifest could make the cluster fetch from its own services.
The rule is applied twice: to what a name resolves to, and to the socket that is about to connect, so neither a
name that changes its address in between nor an odd spelling of an address gets around it.
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Networks of IANA's special-purpose registries that some versions of Python's ipaddress call global.
_SPECIAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "64:ff9b:1::/48", "3fff::/20", "5f00::/16", "fec0::/10")
]


class ForbiddenAddress(OSError):
    """A download wanted to connect to an address that is neither public nor allowed."""


def is_allowed(address: str, allowed: Sequence[Network]) -> bool:
    """Whether `address`, in its canonical spelling, is public or in one of the allowed networks.

    Private, loopback, link-local, shared, multicast and reserved addresses are not public, and an IPv6 address
    that carries an IPv4 address (mapped, 6to4, NAT64) is judged by that one.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    ip = _carried(ip) or ip
    return _is_public(ip) or any(ip in network for network in allowed)


class GuardedResolver(AbstractResolver):
    """Resolves names, as the system does, and keeps the addresses that are allowed; ForbiddenAddress if none is."""

    def __init__(self, allowed: Sequence[Network], names: AbstractResolver | None = None) -> None:
        self._allowed = allowed
        self._names = names or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._names.resolve(host, port, family)
        kept = [result for result in found if is_allowed(result["host"], self._allowed)]
        if not kept:
            raise ForbiddenAddress(f"{host} is {', '.join(result['host'] for result in found)}, which is not public")
        return kept

    async def close(self) -> None:
        await self._names.close()


def guarded_socket(allowed: Sequence[Network]) -> Callable[[tuple], socket.socket]:
    """A socket factory for aiohttp's connector that makes no socket for an address that is not allowed."""

    def make(address_info: tuple) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address_info
        if not is_allowed(host, allowed):
            raise ForbiddenAddress(f"{host} is not a public address")
        return socket.socket(family, kind, protocol)

    return make


def _is_public(ip: Address) -> bool:
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in _SPECIAL))


def _carried(ip: Address) -> ipaddress.IPv4Address | None:
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
