"""gcloud's error texts as the typed errors of `numina_finetune.spot.cloud`."""

from __future__ import annotations

import re

from numina_finetune.spot.cloud import (
    AlreadyExists,
    CloudError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    StockOut,
    Transient,
)

_PATTERNS: tuple[tuple[type[CloudError], str], ...] = (
    (
        StockOut,
        r"no more capacity in the zone|insufficient (reserved )?capacity|not enough resources available"
        r"|RESOURCE_POOL_EXHAUSTED|\bstockout\b|currently unavailable in the .* zone",
    ),
    # Before the permissions: a zone that is closed to the project is a bad choice of zone, not of account. Before
    # what was not found: a type may not be found in a zone.
    (
        InvalidRequest,
        r"INVALID_ARGUMENT|LOCATION_POLICY_VIOLATED|Permission denied on 'locations/"
        r"|Location \S+ is not found or access is unauthorized",
    ),
    # Before the quotas: the rate of requests has a quota too, which refills within a minute.
    (Transient, r"RATE_LIMIT_EXCEEDED|rateLimitExceeded|requests per minute|RESOURCE_OPERATION_RATE_EXCEEDED"),
    (
        QuotaExceeded,
        r"Quota '?[\w .]+'? (exhausted|exceeded)|Quota limit '\w+' has been exceeded|QuotaFailure",
    ),
    (
        PermissionDenied,
        r"PERMISSION_DENIED|do not currently have an active account|Reauthentication (failed|required)"
        r"|invalid_grant|UNAUTHENTICATED|lacks? permission|does not have permission|problem refreshing"
        r"|API has not been used in project|SERVICE_DISABLED|Permission denied \(publickey\)|SSH Key is not present",
    ),
    (AlreadyExists, r"ALREADY_EXISTS|already exists"),
    # A node that is going away, seen while connecting to it.
    (NotFound, r"NOT_FOUND|HTTPError 404|was not found|has terminal state|could not fetch resource"),
    (
        Transient,
        r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL\b|ABORTED|HTTPError 5\d\d|HTTPError 429|HttpError 5\d\d"
        r"|network connectivity|Connection (reset|refused|timed out|aborted)|exited with return code \[255\]"
        r"|cannot be currently connected to|maintenance event|Name or service not known"
        r"|Temporary failure in name resolution|Max retries exceeded|timed out",
    ),
    (
        InvalidRequest,
        r"FAILED_PRECONDITION|unrecognized arguments|Invalid value for|Missing required"
        r"|must be specified|argument .*: (expected|Must|Bad)",
    ),
)


def typed(text: str) -> CloudError:
    """The error that a failed command's text tells; what is not known may pass, so it counts as `Transient`.

    The text of a queued resource's failure is read by the same table.
    """
    kind = next((kind for kind, pattern in _PATTERNS if re.search(pattern, text, re.IGNORECASE)), Transient)
    return kind(_short(text))


def _short(text: str) -> str:
    """The lines that say what went wrong, without gcloud's progress and its advice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((index for index, line in enumerate(lines) if line.startswith("ERROR:")), max(len(lines) - 4, 0))
    return " ".join(lines[first : first + 6])[:800]
