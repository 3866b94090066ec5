"""What a pass reports: how often it fired and, for every near miss, where and why not."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Skip:
    """A place where a pass did not fire: the node where its pattern begins, and what did not hold."""

    node: str
    reason: str


@dataclass
class PassResult:
    """What one run of a pass did; a pass that fired nowhere has changed nothing."""

    fired: int = 0
    skipped: list[Skip] = field(default_factory=list)

    def skip(self, node, reason: str) -> None:
        """Record that the pattern began at `node` (a graphsurgeon node) but did not hold, and why."""
        self.skipped.append(Skip(node.name, reason))

    def reasons(self) -> Counter[str]:
        """How many near misses there were for each reason: a deep model has the same one in every block."""
        return Counter(skip.reason for skip in self.skipped)
