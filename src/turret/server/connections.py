"""Whose a connection is, and how many one client may hold. Knows addresses alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from turret.errors import Busy, ServeRefused

Network = IPv4Network | IPv6Network
SITE = 64  # bits of an IPv6 address that one client's addresses have in common


def client_of(peer: Any) -> str | None:
    """The client at the other end: an IPv4 address or an IPv6 /64 network; None for a Unix socket.

    peer: the address as Python's sockets say it, (host, port, ...).
    """
    if not isinstance(peer, tuple | list):
        return None
    try:
        address = ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, SITE), strict=False))


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and networks, as somebody wrote them. Raises ServeRefused."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ip_network(text.strip(), strict=False))
        except ValueError:
            raise ServeRefused(
                f"--proxy {ascii(text)[:60]}: expected an address or a network such as 10.0.0.0/8"
            ) from None
    return tuple(found)


class ClientConnections:
    """The open connections. most: of all; most_each: of one client, None for any number. A proxy's count for nobody."""

    def __init__(self, most: int, most_each: int | None, proxies: Sequence[Network] = ()) -> None:
        self.most, self.most_each = most, most_each
        self.open = 0
        self.open_of: Counter[str] = Counter()
        self._proxies = proxies

    def limited(self, peer: Any) -> str | None:
        """The client at the other end, where limits for one client hold for it."""
        client = client_of(peer) if self.most_each is not None else None
        if client is None:
            return None
        address = ip_network(client).network_address
        return None if any(address in network for network in self._proxies) else client

    def enter(self, client: str | None) -> None:
        """Count one more connection, or raise Busy and count nothing."""
        if client is not None and self.most_each is not None and self.open_of[client] >= self.most_each:
            raise Busy(
                f"{self.most_each} connections of {client} are open, which is the limit for one client: "
                "close some, or try again",
                1,
            )
        if self.open >= self.most:
            raise Busy(f"{self.most} connections are open: try again", 1)
        self.open += 1
        if client is not None:
            self.open_of[client] += 1

    def leave(self, client: str | None) -> None:
        """Count one connection less, of those that entered."""
        self.open -= 1
        take(self.open_of, client, 1)


def take(counts: Counter[str], key: str | None, count: int) -> None:
    """Less of one key; a key that counts nothing is forgotten."""
    if key is not None and key in counts:
        counts[key] -= count
        if counts[key] <= 0:
            del counts[key]
