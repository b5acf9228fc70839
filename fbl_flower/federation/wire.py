"""What travels between server and clients, and nothing else. Class counts have no field here; FedGen sends them among its own arrays.

Four kinds of message: `query.describe` (who is there), `train.generator` (one round of training the generator together),
`train.prepare` (get the data ready), `train` (one round of the classifier's training).
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType

from fbl_flower.params import Arrays

DESCRIBE, TRAIN_GENERATOR, PREPARE, TRAIN = "query.describe", "train.generator", "train.prepare", "train"
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
EXTRA = "extra."  # before a method's name: its own arrays in a message
_DTYPES = {
    str(dtype): dtype for dtype in map(np.dtype, "?bBhHiIlLefd")
}  # of the arrays that travel, in this machine's byte order
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, kw_only=True)
class NodeDescription:
    """A node's answer to `query.describe`; nothing in it depends on the data.

    Attributes:
        partition_id, num_partitions: The node's place among the nodes.
        code: Fingerprint of the code that the node runs (`code_fingerprint`).
        name: What the node calls itself (`name` of its node config).
        capability, method: As the node states them in its node config; empty where it does not.
        trains_generator: Whether it takes part where the clients train a generator together.
    """

    partition_id: int
    num_partitions: int
    code: str
    name: str = ""
    capability: str = ""
    method: str = ""
    trains_generator: bool = True

    def to_record(self) -> RecordDict:
        fields: dict[str, int | str] = {
            "partition-id": self.partition_id, "num-partitions": self.num_partitions, "code": self.code,
            "name": self.name, "capability": self.capability, "method": self.method,
            "trains-generator": int(self.trains_generator),
        }  # fmt: skip
        return RecordDict({"node": ConfigRecord(dict(fields))})

    @classmethod
    def from_record(cls, content: RecordDict) -> NodeDescription:
        node = content.config_records["node"]
        return cls(
            partition_id=int(str(node["partition-id"])),
            num_partitions=int(str(node["num-partitions"])),
            code=str(node["code"]),
            name=str(node.get("name", "")),
            capability=str(node.get("capability", "")),
            method=str(node.get("method", "")),
            trains_generator=bool(node.get("trains-generator", 1)),
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server asks of one client.

    Attributes:
        run: Identity of the run, the same after a resume; names the client's state.
        client: Number of the client (a node may host several).
        server_round: From 1; 0 while preparing.
        checkpoint_round: Round of the server's last checkpoint.
        last_round: The last round in which the client succeeded; 0 if none yet.
        arrays: The global model; empty while preparing.
        embeddings: float [C, D], averaged alignment vectors, where that setting is on; else None.
        extras: For each method that needs more than the model, its named arrays.
        generator: `generator.name` as the server settled it; empty where nobody fills.
        generator_id: Of a federated generator, the hash of its recipe.
        generator_files: Its files, by name, where the client does not have them yet.
    """

    run: str
    client: int
    server_round: int = 0
    checkpoint_round: int = 0
    last_round: int = 0
    arrays: Mapping[str, np.ndarray]
    embeddings: np.ndarray | None = None
    extras: Mapping[str, Arrays] = field(default_factory=dict)
    generator: str = ""
    generator_id: str = ""
    generator_files: Mapping[str, bytes] = field(default_factory=dict)

    def to_record(
        self, packed: ArrayRecord | None = None, packed_extras: Mapping[str, ArrayRecord] | None = None
    ) -> RecordDict:
        """Pack the request; `packed` and `packed_extras`, if given, hold `arrays` and `extras` already: a round has many clients."""
        numbers: dict[str, int | str] = {
            "run": self.run, "client": self.client, "server-round": self.server_round,
            "checkpoint-round": self.checkpoint_round, "last-round": self.last_round,
            "generator": self.generator, "generator-id": self.generator_id,
        }  # fmt: skip
        content = RecordDict({"request": ConfigRecord(dict(numbers)), "arrays": packed or array_record(self.arrays)})
        if self.embeddings is not None:
            content["embeddings"] = array_record({"P": self.embeddings})
        for method, extra in (packed_extras or _packed(self.extras)).items():
            content[EXTRA + method] = extra
        if self.generator_files:
            content["generator"] = ConfigRecord(dict(self.generator_files))
        return content

    @classmethod
    def from_record(cls, content: RecordDict) -> Request:
        numbers = _record(content, "request", ConfigRecord)
        files = _record(content, "generator", ConfigRecord) if "generator" in content else {}
        return cls(
            run=str(numbers["run"]),
            client=int(str(numbers["client"])),
            server_round=int(str(numbers["server-round"])),
            checkpoint_round=int(str(numbers["checkpoint-round"])),
            last_round=int(str(numbers["last-round"])),
            arrays=named_arrays(_record(content, "arrays", ArrayRecord)),
            embeddings=_embeddings(content),
            extras=_extras(content),
            generator=str(numbers["generator"]),
            generator_id=str(numbers["generator-id"]),
            generator_files={name: data for name, data in files.items() if isinstance(data, bytes)},
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A client's answer to a round.

    Attributes:
        arrays: The client's model, or its difference to what was received (`federation.transport`).
        num_examples: Size of the set that it trained on; with `aggregation.weight-by = "real"` that of its real images.
        num_real: Its real images.
        loss: Mean training loss; 0 for a client without images.
        seconds: Time that the client took.
        forgot: Whether the client took part before and finds nothing of it on its disk: it started afresh.
        other_generator: Whether its synthetic images are of another generator than in its last round.
        embeddings: The client's alignment vectors, only where averaging them is on.
        extras: For a method that sends more than the model, its named arrays: the same names from every client of it.
    """

    arrays: Mapping[str, np.ndarray]
    num_examples: int
    num_real: int
    loss: float
    seconds: float
    forgot: bool = False
    other_generator: bool = False
    embeddings: np.ndarray | None = None
    extras: Mapping[str, Arrays] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        metrics: dict[str, int | float] = {
            "num-examples": self.num_examples, "num-real": self.num_real, "train-loss": self.loss, "seconds": self.seconds,
            "forgot": int(self.forgot), "other-generator": int(self.other_generator),
        }  # fmt: skip
        content = RecordDict({"arrays": array_record(self.arrays), "metrics": MetricRecord(dict(metrics))})
        if self.embeddings is not None:
            content["embeddings"] = array_record({"P": self.embeddings})
        for method, extra in _packed(self.extras).items():
            content[EXTRA + method] = extra
        return content

    @classmethod
    def from_record(cls, content: RecordDict) -> Reply:
        metrics = _record(content, "metrics", MetricRecord)
        return cls(
            arrays=named_arrays(_record(content, "arrays", ArrayRecord)),
            num_examples=int(str(metrics["num-examples"])),
            num_real=int(str(metrics["num-real"])),
            loss=float(str(metrics["train-loss"])),
            seconds=float(str(metrics["seconds"])),
            forgot=bool(metrics["forgot"]),
            other_generator=bool(metrics["other-generator"]),
            embeddings=_embeddings(content),
            extras=_extras(content),
        )


def array_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Pack named arrays, in the format of Flower's own `Array(ndarray)`: what `numpy.save` writes."""
    record = ArrayRecord()  # filled one by one: from a dict, it copies every Array
    for name, array in arrays.items():
        data = _npy_header(array.dtype, array.shape) + array.tobytes()
        record[name] = Array(dtype=str(array.dtype), shape=array.shape, stype=SType.NUMPY, data=data)
    return record


@functools.lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return what `numpy.save` writes before the values of an array in C order. The models of a run have few shapes."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def named_arrays(record: ArrayRecord) -> Arrays:
    """Unpack named arrays, each in its own dtype.

    Raises:
        ValueError: An array is not exactly what `array_record` writes for the dtype and shape that it declares.
    """
    arrays: Arrays = {}
    for name, array in record.items():
        header = packed_header(array)
        if header is None:
            raise ValueError("an array is not packed as it declares")
        values = np.frombuffer(array.data, dtype=np.dtype(array.dtype), offset=len(header))
        arrays[name] = values.reshape(array.shape).copy()
    return arrays


def packed_header(array: Array) -> bytes | None:
    """Return the header of a packed array, or None if its dtype, shape, header and length do not agree.

    The header is compared with the one that `numpy.save` would write, and not parsed: for models of many small arrays, parsing took longer
    than everything else in a message. Nothing is allocated.
    """
    shape = tuple(array.shape)
    if array.stype != SType.NUMPY or array.dtype not in _DTYPES or len(shape) > _MOST_DIMENSIONS:
        return None
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        return None
    dtype = _DTYPES[array.dtype]
    num_bytes = dtype.itemsize * math.prod(shape)
    if num_bytes > len(array.data):
        return None
    header = _npy_header(dtype, shape)
    return header if len(array.data) == len(header) + num_bytes and array.data.startswith(header) else None


@functools.cache
def code_fingerprint() -> str:
    """Return a hash of this package's source code.

    Flower's simulation can run clients from other files than the server's: Ray imports from the folder in which the background
    SuperLink was first started. The server compares fingerprints and refuses such a federation.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if "_app" in path.relative_to(root).parts:  # entry files that only an installed package carries
            continue
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _record(content: RecordDict, name: str, kind: type[R]) -> R:
    """Return one record of a message; Flower's own `array_records` and the like copy all of them to find it."""
    record = content[name]
    if not isinstance(record, kind):
        raise TypeError(f"{name}: got {type(record).__name__}; wanted {kind.__name__}")
    return record


def _embeddings(content: RecordDict) -> np.ndarray | None:
    return named_arrays(_record(content, "embeddings", ArrayRecord))["P"] if "embeddings" in content else None


def _packed(extras: Mapping[str, Arrays]) -> dict[str, ArrayRecord]:
    return {method: array_record(arrays) for method, arrays in extras.items()}


def _extras(content: RecordDict) -> dict[str, Arrays]:
    return {
        name.removeprefix(EXTRA): named_arrays(record)
        for name, record in content.items()
        if name.startswith(EXTRA) and isinstance(record, ArrayRecord)
    }
