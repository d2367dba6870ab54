"""Count the open connections of each client, and refuse those beyond a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from turret.errors import Busy, ServeRefused

Network = IPv4Network | IPv6Network
Peer = Sequence[str | int] | None  # an address of Python's sockets: (host, port, ...), or the path of a Unix socket
CLIENT_BITS = 64  # an IPv6 client is a network of this prefix length


def client_of(peer: Peer) -> str | None:
    """The client of a connection: an IPv4 address or an IPv6 /64 network; None for a Unix socket."""
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
    return str(ip_network((address, CLIENT_BITS), strict=False))


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """The addresses and networks of `--proxy`. Raises ServeRefused."""
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
    """The open connections.

    Args:
        limit: Of all connections.
        limit_per_client: Of the connections of one client; None for no limit.
        proxies: Networks without a limit per client, because their connections belong to many clients.
    """

    def __init__(self, limit: int, limit_per_client: int | None, proxies: Sequence[Network] = ()) -> None:
        self.limit, self.limit_per_client = limit, limit_per_client
        self.open = 0
        self.open_of: Counter[str] = Counter()
        self._proxies = proxies

    def limited(self, peer: Peer) -> str | None:
        """The client of a connection; None if it has no limit of its own."""
        client = client_of(peer) if self.limit_per_client is not None else None
        if client is None:
            return None
        address = ip_network(client).network_address
        return None if any(address in network for network in self._proxies) else client

    def enter(self, client: str | None) -> None:
        """Count one more connection. Raises Busy, and counts nothing, beyond a limit."""
        limit = self.limit_per_client
        if client is not None and limit is not None and self.open_of[client] >= limit:
            raise Busy(
                f"{limit} connections of {client} are open, which is the limit for one client: "
                "close some, or try again",
                1,
            )
        if self.open >= self.limit:
            raise Busy(f"{self.limit} connections are open: try again", 1)
        self.open += 1
        if client is not None:
            self.open_of[client] += 1

    def leave(self, client: str | None) -> None:
        """Count one connection less."""
        self.open -= 1
        subtract(self.open_of, client, 1)


def subtract(counts: Counter[str], key: str | None, count: int) -> None:
    """Lower the count of a key, and drop the key at zero."""
    if key is not None and key in counts:
        counts[key] -= count
        if counts[key] <= 0:
            del counts[key]
