"""Which versions of what is sent or written down this version of sapo reads: oldest to newest; it writes the newest.

The one place for all of them. How a format changes without stopping a run: a release that reads the new version, too,
comes before the one that writes it; whatever meets a version that it does not read refuses it, and says both.
"""

from dataclasses import dataclass

from sapo_learner.errors import Mismatch


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    oldest: int
    newest: int

    @property
    def range(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def reads(self, version: object) -> bool:
        return type(version) is int and self.oldest <= version <= self.newest

    def refusal(self, version: object, reader: str = "this sapo") -> str:
        """What is wrong with a version that is not read."""
        return f"{self.name} {version}, {reader} reads {self.range}"

    def fix(self, version: object) -> str:
        if type(version) is int and version > self.newest:
            return "upgrade whatever reads it first, then what writes it"
        return "use the sapo that wrote it, or upgrade what writes it"

    def check(self, version: object, *, where: str) -> None:
        """Raises Mismatch."""
        if not self.reads(version):
            raise Mismatch(self.refusal(version), where=where, fix=self.fix(version))


WIRE = Format("schema version", 1, 1)
"""Of a trajectory group: on the stream, in the log, and in the archive's entries."""
CHECKPOINT = Format("checkpoint format", 1, 1)
ARCHIVE = Format("archive format", 2, 2)
"""Of its segments; what an entry holds is WIRE's."""
PRUNED = Format("pruned.json format", 1, 1)
MANIFEST = Format("manifest format", 1, 1)
"""Of a policy, with the snapshot's files that it names."""
EVALUATION = Format("evaluation file format", 1, 1)
