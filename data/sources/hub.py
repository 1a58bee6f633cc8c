"""What errors of the Hugging Face libraries mean."""

from __future__ import annotations

_MAY_PASS = {408, 425, 429}  # HTTP; and all from 500 on


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and those it came from, the outermost first. The libraries often hide the cause there."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    return chain


def is_away(error: BaseException) -> bool:
    """Whether the network or the Hub failed, and not the question: by HTTP status, else by the kind of error."""
    chain = chain_of(error)
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if any("OfflineModeIsEnabled" in text for text in (*kinds, *map(str, chain))):  # the user said so
        return False
    for each in chain:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status is not None:
            return status >= 500 or status in _MAY_PASS
    return bool(kinds & {"ConnectionError", "Timeout", "TimeoutError", "TransportError"})
