"""Check what clients send before anything else sees it.

Each reader takes a record from the wire and returns a validated value, or one line that says why the client is left out. A reason quotes
numbers and the names that the server expects, never text of the client's. Sizes are compared before anything is allocated or copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fbl_flower.federation.transport import restore, sent_dtype
from fbl_flower.federation.wire import EXTRA, NodeDescription, Reply, packed_header
from fbl_flower.params import Arrays

LARGEST_VALUE = 1e12  # of a weight, a running variance or a variate; one that trains is below 1e6
LARGEST_NUMBER = 10**9  # images of a client, seconds, and a loss: `classification` calls a model with this one diverged
MOST_PARTITIONS = 10**6
LONGEST_TEXT = 64  # of a name, a capability, a method
LONGEST_REASON = 280
ANOTHER_APP = "it did not describe itself as an FBL client"
NOT_FINITE = "its model or its loss is not finite"
DIVERGED = "its training has diverged: a value of its model, or its loss, is beyond all bounds"
COUNTS = f"a whole number of its answer is not from 0 to {LARGEST_NUMBER}"
_CODE = re.compile(r"[0-9a-f]{64}")
_NUMBERS = frozenset({"num-examples", "num-real", "train-loss", "seconds", "forgot", "other-generator"})
_FIELDS = frozenset({"partition-id", "num-partitions", "code", "name", "capability", "method", "trains-generator"})
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class _RefusedError(Exception):
    """Carries the reason out of a check."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a client's answer to a round must hold.

    Attributes:
        arrays: The model that was sent to it: its own has the same names, shapes and dtypes.
        precision: `transport.precision`.
        embeddings: The averaged alignment vectors, where that setting is on: the client may send some of the same shape.
        extras: By method, arrays of the names, shapes and dtypes that the client has to send.
        counts_real: Whether `num-examples` is the number of real images (`aggregation.weight-by`).
        largest: No value of an array is beyond it.
        refusal: Why nothing of the client can be used, whatever it sends; empty: something can.
    """

    arrays: Mapping[str, np.ndarray]
    precision: str = "fp32"
    embeddings: np.ndarray | None = None
    extras: Mapping[str, Arrays] = field(default_factory=dict)
    counts_real: bool = False
    largest: float = LARGEST_VALUE
    refusal: str = ""


def read_description(content: RecordDict) -> NodeDescription | str:
    """Read a node's answer to `query.describe`."""
    try:
        fields = _only_record(content, "node", ConfigRecord)
        _expect(fields.keys() == _FIELDS, f"{ANOTHER_APP} of this version")
        partitions = _whole(fields["num-partitions"], "num-partitions", low=1, high=MOST_PARTITIONS)
        _whole(fields["partition-id"], "partition-id", low=0, high=partitions - 1)
        _whole(fields["trains-generator"], "trains-generator", low=0, high=1)
        code = fields["code"]
        _expect(isinstance(code, str) and _CODE.fullmatch(code) is not None, "code: expected 64 hexadecimal digits")
        for name in ("name", "capability", "method"):
            text = fields[name]
            fits = isinstance(text, str) and len(text) <= LONGEST_TEXT and text.isprintable()
            _expect(fits, f"{name}: expected at most {LONGEST_TEXT} printable characters")
    except _RefusedError as refused:
        return str(refused)
    return NodeDescription.from_record(content)


def read_prepared(content: RecordDict) -> bool | str:
    """Read a client's answer to `train.prepare`, which is empty."""
    return "its answer is not the empty one that was expected" if content else True


def read_reply(content: RecordDict, expected: Expected) -> Reply | str:
    """Read a client's answer to a round; its model is restored from what was sent."""
    try:
        _expect(not expected.refusal, expected.refusal)
        _check_records(content, expected)
        reply = Reply.from_record(content)
        reply = replace(reply, arrays=restore(reply.arrays, expected.arrays, precision=expected.precision))
        _check_values(reply, largest=expected.largest)
    except _RefusedError as refused:
        return str(refused)
    return reply


def one_line(text: str, longest: int = LONGEST_REASON) -> str:
    """Return a text from elsewhere as one printable line of bounded length, fit for logs and files."""
    start = text[: 4 * longest]  # before anything that takes time by length
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(start.split()))
    return line if len(line) <= longest and len(start) == len(text) else line[: longest - 1] + "…"


def _check_records(content: RecordDict, expected: Expected) -> None:
    """Check names, types and sizes; nothing is copied."""
    wanted = {"arrays", "metrics", *(EXTRA + method for method in expected.extras)}
    for method in expected.extras:
        _expect(EXTRA + method in content, f"it did not send the arrays of its method, {method}")
    known = wanted if expected.embeddings is None else wanted | {"embeddings"}
    _expect(wanted <= content.keys() <= known, f"its answer cannot be read: expected the records {', '.join(sorted(wanted))}")
    numbers = _record(content, "metrics", MetricRecord)
    _expect(numbers.keys() == _NUMBERS, f"its answer cannot be read: expected the numbers {', '.join(sorted(_NUMBERS))}")
    examples = _whole(numbers["num-examples"], "num-examples", low=0, high=LARGEST_NUMBER)
    real = _whole(numbers["num-real"], "num-real", low=0, high=LARGEST_NUMBER)
    _expect(not expected.counts_real or examples == real, "num-examples: expected num-real, by aggregation.weight-by")
    for name in ("forgot", "other-generator"):
        _whole(numbers[name], name, low=0, high=1)
    for name in ("train-loss", "seconds"):
        _expect(type(numbers[name]) in (int, float), f"{name}: expected a number")
    precision = expected.precision
    sent = {name: (sent_dtype(array, precision=precision), array.shape) for name, array in expected.arrays.items()}
    _check_arrays(_record(content, "arrays", ArrayRecord), sent, "its model has other arrays than the global one")
    if expected.embeddings is not None and "embeddings" in content:
        vectors = _record(content, "embeddings", ArrayRecord)
        like = {"P": (expected.embeddings.dtype, expected.embeddings.shape)}
        _check_arrays(vectors, like, "its alignment vectors are not those of the federation's classes")
    for method, arrays in expected.extras.items():
        extra = _record(content, EXTRA + method, ArrayRecord)
        like = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        _check_arrays(extra, like, f"it did not send the arrays of its method, {method}")


def _check_arrays(record: ArrayRecord, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]], problem: str) -> None:
    _expect(record.keys() == expected.keys(), problem)
    for name, (dtype, shape) in expected.items():
        array = record[name]
        if array.dtype != str(dtype) or tuple(array.shape) != shape or packed_header(array) is None:
            raise _RefusedError(f"{problem}: expected {one_line(name, LONGEST_TEXT)} as {dtype} of shape {list(shape)}")


def _check_values(reply: Reply, *, largest: float) -> None:
    """Check numbers and values, all of which have the expected types."""
    numbers = np.array([reply.loss, reply.seconds])
    parts = [reply.arrays, {} if reply.embeddings is None else {"P": reply.embeddings}, *reply.extras.values()]
    arrays = [array for part in parts for array in part.values()]
    counts = [array for array in arrays if not np.issubdtype(array.dtype, np.floating)]
    _expect(all(_within(array, 0, LARGEST_NUMBER) for array in counts), COUNTS)
    values = [array for array in arrays if np.issubdtype(array.dtype, np.floating)]
    if all(_within(array, -largest, largest) for array in values) and _within(numbers, -1, LARGEST_NUMBER):
        return
    raise _RefusedError(DIVERGED if all(np.isfinite(array).all() for array in (numbers, *values)) else NOT_FINITE)


def _within(array: np.ndarray, low: float, high: float) -> bool:
    """Tell whether all values lie in a range; a NaN does not."""
    return array.size == 0 or bool(low <= array.min() and array.max() <= high)


def _only_record(content: RecordDict, name: str, kind: type[R]) -> R:
    _expect(content.keys() == {name}, ANOTHER_APP)
    return _record(content, name, kind)


def _record(content: RecordDict, name: str, kind: type[R]) -> R:
    record = content[name]
    if not isinstance(record, kind):
        raise _RefusedError(f"its answer cannot be read: {name} is no {kind.__name__}")
    return record


def _whole(value: object, name: str, *, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # a bool is no number here
        raise _RefusedError(f"{name}: expected a whole number from {low} to {high}")
    return value


def _expect(fact: bool, problem: str) -> None:
    if not fact:
        raise _RefusedError(problem)
