"""What a checkpoint remembers of its run: the resolved config, and fingerprints of what the run reads.

It is one text under the key `run` of the checkpoint's content, next to the state, and has the same form and
the same checksums in a file as in a folder of shards. It is read without the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mptfoundry.checkpoints.sharded import read_value
from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.errors import CheckpointError

RUN = "run"


@dataclass(frozen=True)
class RunNotes:
    """What a run was.

    Attributes:
        config: The resolved config as YAML, as in the run's `config.yaml`.
        fingerprints: The content of each stream and of the tokenizer, as hexadecimal digits by its key in the
            config; see `config.changes.changed_inputs`.
    """

    config: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """What the checkpoint holds."""
        return json.dumps(asdict(self))


def read_notes(checkpoint: Path) -> RunNotes | None:
    """What a checkpoint remembers of its run; None if an older version or another program wrote it.

    Raises:
        CheckpointError: It is damaged, or loading it would run code.
    """
    if checkpoint.is_dir():
        text = read_value(checkpoint, RUN)
    else:
        content = load_plain(checkpoint)
        text = content.get(RUN) if isinstance(content, dict) else None
    if text is None:
        return None
    try:
        values = json.loads(text)
        config, fingerprints = values["config"], values["fingerprints"]
        if not all(isinstance(each, str) for each in (config, *fingerprints.values())):
            raise TypeError("not texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: damaged, what it notes of its run can't be read.") from error
    return RunNotes(config, fingerprints)
