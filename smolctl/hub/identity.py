"""The owner of a token and its permissions, as reported by the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from smolctl.errors import HubError
from smolctl.hub.connection import endpoint
from smolctl.hub.errors import answered
from smolctl.outside import checked


class _Named(TypedDict):
    name: str


class _Scope(TypedDict):
    entity: NotRequired[_Named | None]
    permissions: NotRequired[list[str] | None]


class _Scopes(TypedDict):
    scoped: NotRequired[list[_Scope] | None]


class _Token(TypedDict):
    displayName: NotRequired[str | None]
    role: NotRequired[str | None]
    fineGrained: NotRequired[_Scopes | None]


class _Auth(TypedDict):
    accessToken: NotRequired[_Token | None]


class _Whoami(TypedDict):
    """The fields of the Hub's response about a token that are read."""

    name: str
    orgs: NotRequired[list[_Named] | None]
    auth: NotRequired[_Auth | None]


@dataclass(frozen=True)
class Identity:
    """The owner of a token and its permissions."""

    user: str
    organizations: tuple[str, ...]
    token_name: str
    role: str  # read, write or fineGrained
    writable: tuple[str, ...] | None = None  # names to which a fine-grained token may write; None: all

    def require_write(self, repo: str) -> None:
        """Check that this token can write to a repository, as far as the Hub reports it.

        Raises:
            HubError: the token is read-only, the namespace belongs to somebody else, or is outside the
                token's scope.
        """
        namespace = repo.split("/")[0]
        token = f"token {self.token_name!r}" if self.token_name else "this token"
        if self.role == "read":
            raise HubError(
                f"{token} of {self.user} has read access only",
                "Create one with the role write at hf.co/settings/tokens.",
            )
        known = (self.user, *self.organizations)
        if namespace.lower() not in {name.lower() for name in known}:
            raise HubError(
                f"{repo}: {self.user} does not belong to {namespace}",
                f"Namespaces of this token: {', '.join(known)}. --create-pr proposes a change instead.",
            )
        if self.writable is not None and not {namespace.lower(), repo.lower()} & {
            name.lower() for name in self.writable
        }:
            scope = ", ".join(self.writable) or "nothing"
            raise HubError(
                f"{repo}: the fine-grained {token} may write to {scope}",
                f"Give it write access to repositories of {namespace} at hf.co/settings/tokens.",
            )


def read_identity(answer: object) -> Identity:
    """The relevant part of a whoami response.

    Raises:
        HubError: it is not a whoami response.
    """
    with answered():
        said = checked(_Whoami, answer, f"{endpoint()}: the answer about the token")
    token: _Token = (said.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    writable = None
    if token.get("role") == "fineGrained":
        writable = tuple(
            (scope.get("entity") or {"name": ""})["name"]
            for scope in scopes
            if any(right.startswith("repo.write") for right in scope.get("permissions") or ())
        )
    return Identity(
        user=said["name"],
        organizations=tuple(organization["name"] for organization in said.get("orgs") or ()),
        token_name=token.get("displayName") or "",
        role=token.get("role") or "unknown",
        writable=writable,
    )
