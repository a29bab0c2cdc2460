"""The .proto files: the committed stubs are theirs, and nothing in them goes unexplained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))


def compile_protos(*options: str) -> None:
    arguments = ["protoc", f"-I{ROOT}", *options, *(str(ROOT / each) for each in FILES)]
    assert protoc.main(arguments) == 0


def test_the_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    compile_protos(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    generated = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(generated) == 3 * len(FILES)
    for name, content in generated.items():
        assert (ROOT / name).read_bytes() == content, f"{name} is old: run `make protos`"


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    path = tmp_path_factory.mktemp("protos") / "set"
    compile_protos("--include_source_info", f"--descriptor_set_out={path}")
    return list(FileDescriptorSet.FromString(path.read_bytes()).file)


def test_everything_in_the_protos_has_a_comment(descriptors: list[FileDescriptorProto]) -> None:
    unexplained = [
        f"{file.name}: {name}"
        for file in descriptors
        for path, name in parts(file)
        if not any(
            location.leading_comments.strip()
            for location in file.source_code_info.location
            if tuple(location.path) == path
        )
    ]
    assert unexplained == []


def test_the_walk_above_sees_every_field_and_value(descriptors: list[FileDescriptorProto]) -> None:
    names = {name for file in descriptors for _, name in parts(file)}
    assert {"Array.data", "DType.DTYPE_BOOL", "Ack.Status.STATUS_FULL", "Ack.draw", "Welcome.credits"} <= names
    assert {"TrajectoryIngestService", "TrajectoryIngestService.StreamTrajectoryGroups", "VersionSpan"} <= names


Path_ = tuple[int, ...]


def parts(file: FileDescriptorProto) -> Iterator[tuple[Path_, str]]:
    """Path in the file's source information, and name, of everything that can have a comment."""
    for index, message in enumerate(file.message_type):
        yield from message_parts(message, (4, index), message.name)
    for index, enum in enumerate(file.enum_type):
        yield from enum_parts(enum, (5, index), enum.name)
    for index, service in enumerate(file.service):
        yield (6, index), service.name
        for at, method in enumerate(service.method):
            yield (6, index, 2, at), f"{service.name}.{method.name}"


def message_parts(message: DescriptorProto, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    if message.options.map_entry:
        return
    yield path, name
    for at, field in enumerate(message.field):
        yield (*path, 2, at), f"{name}.{field.name}"
    for at, oneof in enumerate(message.oneof_decl):
        yield (*path, 8, at), f"{name}.{oneof.name}"
    for at, nested in enumerate(message.nested_type):
        yield from message_parts(nested, (*path, 3, at), f"{name}.{nested.name}")
    for at, enum in enumerate(message.enum_type):
        yield from enum_parts(enum, (*path, 4, at), f"{name}.{enum.name}")


def enum_parts(enum: EnumDescriptorProto, path: Path_, name: str) -> Iterator[tuple[Path_, str]]:
    yield path, name
    for at, value in enumerate(enum.value):
        yield (*path, 2, at), f"{name}.{value.name}"
