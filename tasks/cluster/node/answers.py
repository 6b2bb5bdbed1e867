"""What an answer of /predict says, as far as the gateway counts it."""

from __future__ import annotations

from dataclasses import dataclass

import orjson


@dataclass(frozen=True, slots=True)
class Prediction:
    """The class an answer names, and whether the model took the photo for a leaf (False: out of distribution)."""

    named: str
    is_leaf: bool


def read_prediction(body: bytes) -> Prediction | None:
    """The prediction in a body; None where it names no class.

    Read from the body and not from headers that replicas would have to add: parsing one costs about a microsecond, and
    what is counted is what the user got, whatever serves it. An answer that does not mention leaves has one.
    """
    try:
        answer = orjson.loads(body)
    except ValueError:
        return None
    named = answer.get("class") if isinstance(answer, dict) else None
    return Prediction(named, answer.get("is_leaf") is not False) if isinstance(named, str) else None
