"""Answers as a hostile client can put them on the wire, and a grid that unpacks them as Flower's grid of a deployment does."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde_utils import error_to_proto, metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage  # type: ignore[attr-defined]
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import strategies as st

from fbl_flower.federation import client
from fbl_flower.federation.local import LocalGrid
from fbl_flower.federation.wire import array_record

Objects = dict[str, bytes]  # by the hash of what they hold, as Flower stores and sends them


@dataclass
class RawArray:
    """What an array's object says, true or not."""

    dtype: Any
    shape: Any
    stype: Any
    data: bytes = field(repr=False)
    chunks: Any = None  # numbers of the chunks; None: the one that there is
    body: bytes | None = None  # in place of all of it


@dataclass
class RawAnswer:
    """An answer before it is packed: arrays by name, or a record of Flower's, by record."""

    records: dict[str, dict[str, RawArray] | MetricRecord | ConfigRecord]
    reply_to: str | None = None
    error: Error | None = None
    done: list[str] = field(default_factory=list)  # what was changed


def raw_answer(content: RecordDict) -> RawAnswer:
    records: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records[name] = {k: RawArray(a.dtype, list(a.shape), a.stype, a.data) for k, a in record.items()}
        else:
            records[name] = record.copy()
    return RawAnswer(records)


def packed(answer: RawAnswer, request: Message) -> tuple[str, Objects]:
    """Return the id of the message that answers `request`, and all its objects."""
    objects: Objects = {}

    def add(kind: str, children: Iterable[str], body: bytes) -> str:
        content = f"{kind} {','.join(dict.fromkeys(children))} {len(body)}".encode() + b"\0" + body
        identity = hashlib.sha256(content).hexdigest()
        objects[identity] = content
        return identity

    def add_array(array: RawArray) -> str:
        chunk = add("ArrayChunk", [], array.data)
        chunks = [0] if array.chunks is None else array.chunks
        told = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "arraychunk_ids": chunks}
        return add("Array", [chunk], json.dumps(told).encode() if array.body is None else array.body)

    children: list[str] = []
    if answer.error is None:
        references = {}
        for name, record in answer.records.items():
            if isinstance(record, dict):
                arrays = {key: add_array(array) for key, array in record.items()}
                references[name] = add("ArrayRecord", arrays.values(), json.dumps(arrays).encode())
            else:
                references[name] = record.object_id
                objects[record.object_id] = record.deflate()
        children = [add("RecordDict", references.values(), json.dumps(references).encode())]
    metadata = metadata_to_proto(Message(RecordDict(), reply_to=request).metadata)
    metadata.message_id = ""
    if answer.reply_to is not None:
        metadata.reply_to_message_id = answer.reply_to
    error = None if answer.error is None else error_to_proto(answer.error)
    return add("Message", children, ProtoMessage(metadata=metadata, error=error).SerializeToString()), objects


class WireGrid(LocalGrid):
    """Nodes that answer what `answer(node, request)` returns; an answer is unpacked when it is pulled, by Flower's own code."""

    is_simulated = False

    answer: Callable[[int, Message], RawAnswer]

    def __init__(self, nodes: Iterable[int]) -> None:
        self.nodes = list(nodes)
        super().__init__(client.app, num_nodes=len(self.nodes), run_config={})
        self.requests: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"{len(self.requests):064x}"
            self.requests[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            request = self.requests[message_id]
            identity, objects = packed(self.answer(request.metadata.dst_node_id, request), request)
            reply = inflate_object_from_contents(identity, objects)
            assert isinstance(reply, Message)
            replies.append(reply)
        return replies


# -- strategies --------------------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "a\nb", "\x1b[31m", "\u202e", "x" * 5000, "../..", "None", "arrays", "metrics", "extra.fedgen", "P"]),
)
INTS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([-(2**63), -(10**9) - 1, -1, 10**9, 10**9 + 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]),
)
FLOATS = st.one_of(
    st.floats(), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, -1e300, 1e38, 3.4e38, 1e30, 1e9, -1.0])
)
NUMBERS: st.SearchStrategy[Any] = st.one_of(INTS, FLOATS, st.lists(INTS, max_size=3), st.lists(FLOATS, max_size=3))
SCALARS: st.SearchStrategy[Any] = st.one_of(
    NUMBERS, TEXTS, st.binary(max_size=8), st.booleans(), st.lists(TEXTS, max_size=3), st.just("y" * 200_000)
)
DTYPES = [
    "float32", "float16", "float64", "int8", "int64", "uint64", "bool", "complex64", ">f4", "<f4", "S4", "U4", "V4", "O",
    "datetime64[s]", "f4,f4", "(2,)f4", "float128", "f", "", "float32\n", "|V0", "bfloat16",
]  # fmt: skip
SHAPES: st.SearchStrategy[Any] = st.one_of(
    st.lists(INTS, max_size=4),
    st.sampled_from([[2**62, 4], [0], [], [-1], [1] * 40, [True], [2.5], ["3"], None, "3", [10**30], [0, 10**12], [[3]]]),
)
VALUES = [np.nan, np.inf, -np.inf, 3e38, -1e38, 1e30, 1e13, 9e11, -9e11, 1e6, -1e4, 1e-45, 0.0, -5.0]


@st.composite
def hostile_answers(draw: st.DrawFn, honest: RawAnswer, *, most: int = 2, reply_to: bool = True) -> RawAnswer:
    """Change an honest answer in one or more ways; `reply_to`: it may also be no answer to what was asked, which costs the time-out."""
    answer = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, most))):
        kinds = ["record", "name", "error"] + ["reply_to"] * reply_to
        if any(isinstance(record, dict) and record for record in answer.records.values()):
            kinds += ["array", "array", "array", "values", "values", "packing", "names"]
        if any(not isinstance(record, dict) for record in answer.records.values()):
            kinds += ["number", "number", "number"]
        _CHANGES[kind := draw(st.sampled_from(kinds))](draw, answer)
        answer.done.append(kind)
    return answer


def _some_arrays(draw: st.DrawFn, answer: RawAnswer) -> tuple[str, dict[str, RawArray]]:
    found = {name: record for name, record in answer.records.items() if isinstance(record, dict) and record}
    name = draw(st.sampled_from(sorted(found)))
    return name, found[name]


def _change_array(draw: st.DrawFn, answer: RawAnswer) -> None:
    """What it says of itself is not true, or it is no array at all."""
    _, arrays = _some_arrays(draw, answer)
    array = arrays[draw(st.sampled_from(sorted(arrays)))]
    match draw(st.sampled_from(["dtype", "shape", "stype", "cut", "longer", "bytes", "chunks", "body", "header"])):
        case "dtype":
            array.dtype = draw(st.one_of(st.sampled_from(DTYPES), TEXTS, st.none(), INTS))
        case "shape":
            array.shape = draw(SHAPES)
        case "stype":
            array.stype = draw(st.one_of(TEXTS, st.none()))
        case "cut":
            array.data = array.data[: draw(st.integers(0, len(array.data)))]
        case "longer":
            array.data = draw(st.binary(min_size=1, max_size=8)) + array.data
        case "bytes":
            array.data = draw(st.binary(max_size=64))
        case "chunks":
            array.chunks = draw(
                st.one_of(st.lists(INTS, max_size=4), st.just([0] * 20_000), st.just([0, 0]), st.none(), st.just("0"))
            )
        case "body":
            array.body = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"{}", b"[]", b"null", b"[" * 3000, b'{"a"'])))
        case "header":
            place = draw(st.integers(0, min(127, max(len(array.data) - 1, 0))))
            array.data = array.data[:place] + draw(st.binary(min_size=1, max_size=1)) + array.data[place + 1 :]


def _change_values(draw: st.DrawFn, answer: RawAnswer) -> None:
    """A proper array of the right form, with other values."""
    _, arrays = _some_arrays(draw, answer)
    every = draw(st.booleans())
    value = draw(st.sampled_from(VALUES))
    for key in sorted(arrays) if every else [draw(st.sampled_from(sorted(arrays)))]:
        array = arrays[key]
        if isinstance(array.dtype, str) and array.dtype in ("float32", "float16", "int64") and _is_shape(array.shape):
            with np.errstate(all="ignore"):
                one = np.array(value if array.dtype != "int64" else np.nan_to_num(value, posinf=1e18, neginf=-1e18))
                arrays[key] = _proper(np.broadcast_to(one.astype(array.dtype), array.shape).copy())


def _change_packing(draw: st.DrawFn, answer: RawAnswer) -> None:
    """A proper array of another dtype or shape."""
    _, arrays = _some_arrays(draw, answer)
    name = draw(st.sampled_from(sorted(arrays)))
    dtype = draw(
        st.sampled_from(["float16", "float32", "float64", "int8", "int64", "uint64", "bool", "complex128", ">f4", "S4"])
    )
    shape = draw(st.sampled_from([arrays[name].shape, [], [0], [3], [1, 1, 1]]))
    if _is_shape(shape):
        arrays[name] = _proper(np.zeros(shape, dtype=dtype))


def _change_names(draw: st.DrawFn, answer: RawAnswer) -> None:
    _, arrays = _some_arrays(draw, answer)
    name = draw(st.sampled_from(sorted(arrays)))
    match draw(st.sampled_from(["drop", "rename", "add", "all"])):
        case "drop":
            del arrays[name]
        case "rename":
            arrays[draw(st.one_of(TEXTS, st.just("\ud800")))] = arrays.pop(name)
        case "add":
            arrays[draw(TEXTS)] = copy.deepcopy(arrays[name])
        case "all":
            arrays.clear()


def _change_record(draw: st.DrawFn, answer: RawAnswer) -> None:
    other: Any = draw(
        st.one_of(
            st.builds(dict),
            st.dictionaries(TEXTS, NUMBERS, max_size=2).map(MetricRecord),
            st.dictionaries(TEXTS, SCALARS, max_size=2).map(ConfigRecord),
            st.just({"P": _proper(np.zeros((10, 32), np.float32))}),
        )
    )
    names = st.sampled_from([*answer.records, "arrays", "metrics", "node", "embeddings", "extra.scaffold", "extra.fedgen"])
    answer.records[draw(st.one_of(names, TEXTS))] = other


def _change_name(draw: st.DrawFn, answer: RawAnswer) -> None:
    if answer.records:
        name = draw(st.sampled_from(sorted(answer.records)))
        record = answer.records.pop(name)
        if draw(st.booleans()):
            answer.records[draw(st.one_of(TEXTS, st.just("\udfff")))] = record


def _change_number(draw: st.DrawFn, answer: RawAnswer) -> None:
    found = sorted(name for name, record in answer.records.items() if not isinstance(record, dict))
    record: Any = answer.records[draw(st.sampled_from(found))]
    key = draw(st.sampled_from([*sorted(record), "other"]))
    if draw(st.integers(0, 5)) == 0:
        record.pop(key, None)
    else:
        record[key] = draw(NUMBERS if isinstance(record, MetricRecord) else SCALARS)


def _change_error(draw: st.DrawFn, answer: RawAnswer) -> None:
    text = draw(st.one_of(TEXTS, st.just("é\n" * 100_000), st.just("<class 'x'>:<'" + "z" * 400 + "'>")))
    answer.error = Error(draw(st.integers(0, 12) | st.sampled_from([-1, 2**40])), text)


def _change_reply_to(draw: st.DrawFn, answer: RawAnswer) -> None:
    answer.reply_to = draw(st.sampled_from(["", "unknown", f"{0:064x}", f"{1:064x}"]))


_CHANGES: Mapping[str, Callable[[st.DrawFn, RawAnswer], None]] = {
    "array": _change_array, "values": _change_values, "packing": _change_packing, "names": _change_names,
    "record": _change_record, "name": _change_name, "number": _change_number, "error": _change_error,
    "reply_to": _change_reply_to,
}  # fmt: skip


def _is_shape(shape: Any) -> bool:
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 10**6 for size in shape)
    return sizes and len(shape) < 9 and int(np.prod(shape, dtype=np.float64)) < 10**6


def _proper(array: np.ndarray) -> RawArray:
    record = array_record({"x": array})["x"]
    return RawArray(record.dtype, list(record.shape), record.stype, record.data)
