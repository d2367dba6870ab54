"""Sign-in to the console by an OpenID Connect provider.

The provider says who somebody is. The access token of that name says what they may do: a person whose claim
`preferred_username` is `ann` gets the rights of the token `ann`, unless no person signs in by that token. Revoking it
ends their sessions. A claim `email` counts only if the provider has verified it. The flow is the authorization code
flow with PKCE, `state` and `nonce` (OpenID Connect Core 1.0, RFC 7636), by authlib.

Nothing is stored while a person is at the provider, so the provider may send them back to any server of the store. A
cookie in their browser has a random key, the end and the next page, with an HMAC under a secret that the servers share.
`state`, `nonce` and the code verifier are HMACs of the cookie under the same secret. A cookie counts once at a server;
at the others, the provider refuses a code that was used.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from turret.access import DEFAULT
from turret.errors import ServeRefused, Unauthorized, require_package
from turret.json_types import Plain
from turret.server.auth import HOST_PREFIX, is_loopback

PATH = "/sign-in/oidc"
BACK = "/sign-in/oidc/back"  # where the provider sends the browser
COOKIE = "turret_sign_in"
SECONDS = 600.0  # how long a sign-in may take
LIMIT = 1024  # cookies that have counted; the oldest one is forgotten
EMAIL = "email"
TIMEOUT = 10.0  # seconds for one request to the provider
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]  # no shared key


@dataclass(frozen=True)
class OidcSettings:
    """The provider, and which claims name a person's access token.

    Args:
        issuer: URL of the provider; `/.well-known/openid-configuration` is read from there.
        public_url: URL at which browsers reach this server, without a path.
        claim: The claim with the name of the access token.
        tenant_claim: The claim with its tenant; None: all are of the tenant `default`.
    """

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)
    public_url: str
    claim: str = "preferred_username"
    tenant_claim: str | None = None


@dataclass(frozen=True)
class Person:
    """Who signed in: the name and tenant of their access token, and where they wanted to go."""

    name: str
    tenant: str
    next: str


class Oidc:
    """Sign-ins by a provider. Every method that asks it may block for seconds: call it on a thread.

    Args:
        secret: The servers of a store share it.
        clock: Seconds since 1970.

    Raises:
        ServeRefused: A setting is wrong, authlib is not installed, or the provider cannot be read.
    """

    def __init__(self, settings: OidcSettings, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        for name, url in (("--oidc", settings.issuer), ("--public-url", settings.public_url)):
            _check_url(name, url)
        with require_package("--oidc", "authlib", "pip install 'turret[oidc]'", ServeRefused):
            import authlib.integrations.requests_client  # noqa: F401
        self.settings, self._secret, self._clock = settings, secret, clock
        self._counted: OrderedDict[str, None] = OrderedDict()  # cookies
        self._lock = threading.Lock()
        self._metadata = self._read_metadata()

    def begin(self, next: str) -> tuple[str, str]:
        """Start a sign-in.

        Args:
            next: The path to show when the person is signed in.

        Returns:
            The URL of the provider to go to, and the value of the cookie that binds the sign-in to this browser.
        """
        page = base64.urlsafe_b64encode(next.encode()).decode().rstrip("=")
        begun = f"{secrets.token_urlsafe(32)}.{self._clock() + SECONDS:.0f}.{page}"
        url, _ = self._session().create_authorization_url(
            self._metadata["authorization_endpoint"],
            state=self._derive_secret("state", begun),
            nonce=self._derive_secret("nonce", begun),
            code_verifier=self._derive_secret("verifier", begun),
        )
        return str(url), f"{begun}.{self._derive_secret('cookie', begun)}"

    def finish(self, cookie: str | None, query: Mapping[str, str]) -> Person:
        """The person whom the provider sent back, once for each sign-in.

        Args:
            cookie: The value that `begin` gave.
            query: The parameters of the URL that the provider sent the browser to.

        Raises:
            Unauthorized: The sign-in is unknown, too old or was refused, or the provider's answer is not valid.
        """
        begun, _, proof = (cookie or "").rpartition(".")
        if not _equal(proof, self._derive_secret("cookie", begun)) or not self._counts(begun):
            raise Unauthorized("this sign-in is not known here, or took longer than 10 minutes: begin again")
        if "code" not in query:
            raise Unauthorized(
                f"the provider refused the sign-in ({ascii(query.get('error', 'no code'))[:60]}): begin again"
            )
        if not _equal(query.get("state", ""), self._derive_secret("state", begun)):
            raise Unauthorized("the provider's answer is to another sign-in: begin again")
        claims = self._claims(begun, query["code"])
        name = claims.get(self.settings.claim)
        tenant = DEFAULT if self.settings.tenant_claim is None else claims.get(self.settings.tenant_claim)
        if not isinstance(name, str) or not isinstance(tenant, str):
            wanted = self.settings.claim if not isinstance(name, str) else self.settings.tenant_claim
            verified = " that it has verified" if wanted == EMAIL else ""
            raise Unauthorized(f"the provider named no {wanted}{verified}: choose another claim with --oidc-claim")
        page = begun.rpartition(".")[2]
        return Person(name, tenant, base64.urlsafe_b64decode(page + "=" * (-len(page) % 4)).decode())

    def _counts(self, begun: str) -> bool:
        """Whether a sign-in has not ended, and is finished here for the first time."""
        if self._clock() >= int(begun.split(".")[1]):
            return False
        with self._lock:
            if begun in self._counted:
                return False
            self._counted[begun] = None
            while len(self._counted) > LIMIT:
                self._counted.popitem(last=False)
        return True

    def _derive_secret(self, what: str, begun: str) -> str:
        """43 characters that only a server of the store can know."""
        made = hmac.digest(self._secret, f"{what} {begun}".encode("utf-8", "replace"), "sha256")
        return base64.urlsafe_b64encode(made).decode().rstrip("=")

    # Any: authlib and claims have no types.
    def _claims(self, begun: str, code: str) -> Mapping[str, Any]:
        """The claims of the ID token and of the userinfo endpoint, after the checks of OpenID Connect Core 3.1.3.7."""
        import requests
        from authlib.common.errors import AuthlibBaseError
        from authlib.oidc.core import CodeIDToken
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        metadata = self._metadata
        try:
            with self._session() as session:
                token = session.fetch_token(
                    metadata["token_endpoint"],
                    code=code,
                    code_verifier=self._derive_secret("verifier", begun),
                    timeout=TIMEOUT,
                )
                keys = KeySet.import_key_set(requests.get(metadata["jwks_uri"], timeout=TIMEOUT).json())
                decoded = jwt.decode(token["id_token"], keys, algorithms=ALGORITHMS)
                claims = CodeIDToken(
                    decoded.claims,
                    decoded.header,
                    {"iss": {"essential": True, "values": [metadata["issuer"]]}},
                    {
                        "nonce": self._derive_secret("nonce", begun),
                        "client_id": self.settings.client_id,
                        "access_token": token.get("access_token"),
                    },
                )
                claims.validate(leeway=60)
                found = dict(claims)
                _check_audience(found["aud"], self.settings.client_id)
                checked = _without_unverified_email(found)
                if self.settings.claim not in checked and "userinfo_endpoint" in metadata:
                    more = session.get(metadata["userinfo_endpoint"], timeout=TIMEOUT).json()
                    if more.get("sub") == found["sub"]:  # or the answer is about somebody else
                        checked = _without_unverified_email(more) | checked
        except requests.RequestException as error:
            raise Unauthorized(f"the provider does not answer ({type(error).__name__}): try again") from None
        except (AuthlibBaseError, JoseError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unauthorized(f"the provider's answer is not valid ({type(error).__name__}): begin again") from None
        return checked

    # Any: authlib has no types.
    def _session(self) -> Any:
        from authlib.integrations.requests_client import OAuth2Session

        return OAuth2Session(
            self.settings.client_id,
            self.settings.client_secret,
            scope="openid profile email",
            redirect_uri=self.settings.public_url.rstrip("/") + BACK,
            code_challenge_method="S256",
        )

    def _read_metadata(self) -> Mapping[str, str]:
        """What the provider says of itself. Raises ServeRefused."""
        import requests

        issuer = self.settings.issuer.rstrip("/")
        url = f"{issuer}/.well-known/openid-configuration"
        try:
            answer = requests.get(url, timeout=TIMEOUT)
            answer.raise_for_status()
            found: dict[str, str] = answer.json()
            known = found["issuer"].rstrip("/") == issuer and {
                "authorization_endpoint",
                "token_endpoint",
                "jwks_uri",
            } <= set(found)
        except (requests.RequestException, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ServeRefused(f"{ascii(url)[:200]} cannot be read ({type(error).__name__}): check --oidc") from None
        if not known:
            raise ServeRefused(f"{ascii(url)[:200]} does not describe the issuer {ascii(issuer)[:200]}: check --oidc")
        return found


def _check_audience(audience: Plain, client_id: str) -> None:
    """Raise Unauthorized for an ID token that was made for another client. Source: OpenID Connect Core 3.1.3.7, 3."""
    if client_id not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthorized("the provider's answer is for another client than this server: begin again")


def _without_unverified_email(claims: Mapping[str, Plain]) -> dict[str, Plain]:
    """The claims without an email that the provider has not verified: anybody could have entered it there."""
    verified = claims.get("email_verified") in (True, "true")  # some providers send a text
    return {name: value for name, value in claims.items() if name != EMAIL or verified}


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def cookie(value: str, *, secure: bool) -> str:
    """A Set-Cookie header for the value of `Oidc.begin`; empty: deletes it.

    SameSite is Lax: the provider's page sends the browser back, and Strict would leave the cookie out.
    """
    age, name = int(SECONDS) if value else 0, cookie_name(secure=secure)
    where = "/; Secure" if secure else PATH
    return f"{name}={value}; Path={where}; Max-Age={age}; HttpOnly; SameSite=Lax"


def cookie_name(*, secure: bool) -> str:
    """The cookie's name. Over https no other host may have set it."""
    return HOST_PREFIX + COOKIE if secure else COOKIE


def _check_url(option: str, url: str) -> None:
    parts = urlsplit(url)
    allowed = ("https", "http") if is_loopback(parts.hostname or "") else ("https",)
    if parts.scheme in allowed and parts.hostname:
        return
    raise ServeRefused(f"{option} {ascii(url)[:200]}: expected an https URL, or http on this machine")
