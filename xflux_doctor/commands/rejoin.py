"""What the machines of a job do after a launch that failed (`run --retries N`): go on together, or none of them.

Each doctor has ended its own ranks and read its own log. They meet again, say how their part ended, and number 0 takes
the cause that is nearest to the root for that of all: what the others say of a lost rank is none. Its answer is the
next attempt, with the edits that each makes in its own copies, or the reason why nobody starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from xflux_doctor.commands.again import Attempt
from xflux_doctor.explain.rule import LEVELS
from xflux_doctor.facts import Meeting
from xflux_doctor.finding import Edit
from xflux_doctor.probes.meeting import Gathering, Place
from xflux_doctor.probes.reunion import Reunion
from xflux_doctor.probes.wire import clean
from xflux_doctor.roll import Roll

if TYPE_CHECKING:  # a start need not compile the rules
    from xflux_doctor.explain.diagnosis import Diagnosis

ENDING = 60.0
"""Seconds that a machine has to come beyond those of --wait-for-nodes: torch's launcher gives its ranks 30 s to end
after one has died, and the others hear of it only then."""
_ORDER = (*LEVELS[: LEVELS.index("consequence")], "told to end", "unknown", *LEVELS[LEVELS.index("consequence") :])
"""From the root outwards. What nobody knows stood in that machine's log alone, and is no consequence that is known."""
KEYS = frozenset({
    "resume_from_checkpoint", "gradient_checkpointing", "checkpointed_blocks", "cuda_graphs", "modulation",
    "stream_blocks", "train_batch_size", "gradient_accumulation_steps", "step_in_backward", "backward_clip",
    "optimizer", "quantization", "img_size", "distributed_type", "fsdp_version", "max_grad_norm",
})  # fmt: skip
"""What an attempt may change: number 0's answer comes over the network, and names no file and no model."""
_HINT = "Look at what {whom} says, then start all machines again with resume_from_checkpoint: latest."


class Word(msgspec.Struct, frozen=True):
    """How a machine's part of a launch ended."""

    exit_code: int
    seconds: float
    cause: str = "none"
    level: str = "warning"
    code: str | None = None
    rank: int | None = None

    @classmethod
    def of(cls, diagnosis: Diagnosis | None, exit_code: int, seconds: float) -> Word:
        if diagnosis is None:
            return cls(exit_code, seconds)
        return cls(exit_code, seconds, diagnosis.cause, diagnosis.level, diagnosis.code, diagnosis.rank)

    @property
    def depth(self) -> int:
        """Less is nearer to the root."""
        level = {
            "unknown": "unknown",
            "sigterm": "told to end",  # most often by a launcher, after another rank's end
            "peer-rank-died": "consequence",  # by the doctor's own word it is above the ranks'
        }.get(self.cause, self.level)
        return len(_ORDER) if self.cause == "none" or level not in _ORDER else _ORDER.index(level)


class Decision(msgspec.Struct, frozen=True):
    """What all machines do now."""

    machine: int
    """Whose cause it is."""
    cause: str
    code: str | None
    words: str
    edits: tuple[Edit, ...] | None
    """None: nobody starts again."""
    mark: str = ""


def first(words: Mapping[int, Word]) -> int:
    """The machine whose cause is nearest to the root; of several the one whose part ended first."""
    return min(words, key=lambda number: (words[number].depth, words[number].seconds, number))


def decide(words: Mapping[int, Word], following: Callable[[str], Attempt | None]) -> Decision:
    """The next attempt of all, by the code that decides for one machine: `following` a cause."""
    number = first(words)
    word = words[number]
    attempt = following(word.cause)
    if attempt is None:
        said = f"machine {number} ended with {word.exit_code}: {word.cause}, which would only come again"
        return Decision(number, word.cause, word.code, said, None)
    edits = tuple(edit for edit in attempt.edits if isinstance(edit, Edit))
    return Decision(number, word.cause, word.code, f"machine {number}: {attempt.words}", edits, attempt.mark)


@dataclass(frozen=True)
class Outcome:
    """What came of it: the decision, or why there is none."""

    decision: Decision | None
    words: str = ""
    """For a person, where nobody starts again."""

    @property
    def attempt(self) -> Attempt | None:
        found = self.decision
        return None if found is None or found.edits is None else Attempt(found.edits, found.words, found.mark)


class Fellows:
    """The other machines of the run, for as long as it lasts. Close it."""

    def __init__(self, place: Place, run: str, roll: Roll, wait: float, say: Callable[[str], None]) -> None:
        self._place, self._run, self._roll, self._say = place, run, roll, say
        self._seconds = wait + ENDING
        self._meeting: Gathering | None = None
        self.attempt = 0

    def close(self) -> None:
        self._roll.close()

    def elsewhere(self) -> str:
        """That the part of another machine has ended, in words; empty while none has."""
        lines = self._roll.ended(self.attempt)
        return ", ".join(f"the part of machine {number} ended with {line.exit_code}" for number, line in lines.items())

    def tell(self, exit_code: int, parts: str = "") -> None:
        """That this machine's part has ended; `parts`: why it does not start again."""
        self._roll.tell(self.attempt, exit_code, parts)

    def meet(self, word: Word, following: Callable[[str], Attempt | None]) -> Outcome:
        """Come together and decide. After an attempt was decided on `start` is next."""
        config = {"run": self._run, "attempt": str(self.attempt)}
        meeting = Reunion(
            self._place, config, self._seconds, self._say, word=msgspec.to_builtins(word),
            decide=lambda said: msgspec.to_builtins(decide(_words(said), following)),
            absent=lambda: frozenset(self._roll.parted()),
        )  # fmt: skip
        self._meeting = meeting
        found = meeting.open()
        decision = _decision(meeting.told) if found.together else None
        if decision is not None and decision.edits is not None:
            return Outcome(decision)
        self.leave()
        if decision is not None:
            return Outcome(decision, f"{decision.words}. Nobody starts again.")
        return Outcome(None, self._why(found))

    def start(self, ready: bool) -> str:
        """Wait until all have made the edits; empty where all start now, or else why none does."""
        assert self._meeting is not None
        found = self._meeting.agree(ready, self._seconds)
        self.leave()
        if not found.together:
            return self._why(found)
        self.attempt += 1
        return ""

    def leave(self) -> None:
        """End the meeting, if one is held."""
        if self._meeting is not None:
            self._meeting.close()
        self._meeting = None

    def _why(self, found: Meeting) -> str:
        """Who was missing, and what to do."""
        self._roll.look()
        parted = self._roll.parted()
        said = [f"machine {number} {why}" for number, why in sorted(parted.items())]
        away = [number for number in found.missing if number not in parted]
        if not parted:
            where = f"{found.address} within {self._seconds:.0f} s"
            said += [f"machine {number} did not come to {where}" for number in away]
            if found.trouble:
                here = "this machine could not listen" if found.rank == 0 else "machine 0 did not come"
                said.append(f"{here} to {where} ({found.detail or found.trouble})")
        said += [f"machine {number} left the meeting" for number in found.left]
        said += [f"machine {number} could not make its files ready" for number in found.stopped]
        said += [f"machine {number} came twice" for number in found.twice]
        said += [f"machine {number} is of another run, or of another attempt" for number in found.unlike]
        said = said or ["machine 0 said nothing that is known here"]
        whom = "it" if len(said) == 1 else "each of them"
        return f"{'; '.join(said)}. Nobody starts again. {_HINT.format(whom=whom)}"


def _words(said: Mapping[int, Any]) -> dict[int, Word]:
    """As they came over the network: what is no word counts as an end that nobody knows."""
    found = {}
    for number, value in said.items():
        try:
            word = msgspec.convert(value, Word)
            cause, code = clean(word.cause), None if word.code is None else clean(word.code)
            found[number] = msgspec.structs.replace(word, cause=cause, code=code)
        except msgspec.ValidationError:
            found[number] = Word(1, 0.0, "unknown")
    return found


def _decision(told: Mapping[str, Any]) -> Decision | None:
    """As it came over the network; None where it is none, or would change what no next attempt changes."""
    try:
        found = msgspec.convert(told, Decision)
    except msgspec.ValidationError:
        return None
    files = ("train", "accelerate", "deepspeed")
    known = all(edit.key and edit.file in files and edit.key[-1] in KEYS for edit in found.edits or ())
    code = None if found.code is None else clean(found.code)
    whole = msgspec.structs.replace(found, words=clean(found.words), cause=clean(found.cause), code=code)
    return whole if known else None
