"""Which names a store's files, versions, tags and domains may have: nothing outside of the store.

A name is read from a file or typed by a user, so it is checked before it becomes a path.
"""

import re
import secrets

VERSION_LENGTH = 16
CHECKSUM_LENGTH = 32  # hexadecimal digits of a checksum that name a file
SHORTEST_PREFIX = 4
LONGEST_DOMAIN = 200
INT64_MAX = 2**63 - 1
# Of new entries. Corpora number theirs from bases up to 2**63 - 2**39, and ids that are dealt
# follow the largest: one of 2**63 - 1 would leave none for ever.
LARGEST_ID = 2**63 - 2**37

_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_LENGTH}}}")
_PREFIX = re.compile(rf"[0-9a-f]{{{SHORTEST_PREFIX},{VERSION_LENGTH - 1}}}")
# A checksum, and what makes each commit's files its own (stores of before had the checksum alone).
_FILE = re.compile(rf"([0-9a-f]{{{CHECKSUM_LENGTH}}})(?:-[0-9a-f]{{12}})?\.(arrow|npy)")
_PLANNED = "0" * 12
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_version(name: str) -> bool:
    """Whether this is a whole version, as manifests are named."""
    return _VERSION.fullmatch(name) is not None


def is_prefix(name: str) -> bool:
    """Whether this may be the beginning of a version."""
    return _PREFIX.fullmatch(name) is not None


def is_tag(name: str) -> bool:
    """Whether a tag may have this name: none that can be taken for a version or HEAD."""
    return (
        _TAG.fullmatch(name) is not None
        and not (is_version(name) or is_prefix(name))
        and name != "HEAD"
    )


def check_tag(name: str) -> str:
    """The name, if a tag may have it.

    Raises:
        ValueError: it may not.
    """
    if not is_tag(name):
        raise ValueError(
            f"{name!r} cannot name a tag: up to 100 letters, digits, '.', '_' and '-', the first a "
            f"letter or digit, and not HEAD nor {SHORTEST_PREFIX} to {VERSION_LENGTH} hexadecimal "
            "digits, which name versions"
        )
    return name


def check_domain(name: str) -> str:
    """The name, if a domain may have it.

    Raises:
        ValueError: it is empty, long, would not print on one line, or holds a comma.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_DOMAIN:
        raise ValueError(f"a domain's name is 1 to {LONGEST_DOMAIN} characters, not {name!r}")
    if name != name.strip() or not name.isprintable():
        raise ValueError(
            f"a domain's name has no line breaks, control characters or spaces around it: {name!r}"
        )
    if "," in name:
        raise ValueError(
            f"a domain's name has no comma, because lists of domains are told with commas: {name!r}"
        )
    return name


def check_message(message: str) -> str:
    """The message, if a commit may have it.

    Raises:
        TypeError: it is no text. ValueError: it is empty, or no Unicode.
    """
    if not isinstance(message, str):
        raise TypeError(f"a commit's message is a text, not {message!r}")
    if not message.strip():
        raise ValueError("a commit needs a message that is not empty")
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a commit's message is no valid UTF-8 at character {error.start}: {message!a}"
        ) from error
    return message


def planned_name(sha256: str, kind: str) -> str:
    """The name of a file that a plan brings, until a publication makes it its own."""
    return f"{sha256[:CHECKSUM_LENGTH]}-{_PLANNED}.{kind}"


def own_name(planned: str, nonce: str) -> str:
    """The name of a file: by its content, and by the publication that brings it (`new_nonce`).

    The same content brought twice is two files, so that whoever removes files, because a
    publication failed or to collect garbage, can never take away what another has just brought.
    """
    checksum, kind = planned[:CHECKSUM_LENGTH], planned.rsplit(".", 1)[1]
    return f"{checksum}-{nonce}.{kind}"


def new_nonce() -> str:
    return secrets.token_hex(6)


def checksum_in(file: str, kind: str) -> str | None:
    """The checksum's beginning that a file's name carries; None when no such file has this name."""
    match = _FILE.fullmatch(file)
    return match[1] if match is not None and match[2] == kind else None
