"""What a frontend sends to leaders, and what comes back; the other messages are in `io_struct.py`."""

from __future__ import annotations

import msgspec

from ..control.blocked import Blocked
from ..control.operations import ControlOperation
from ..io_struct import FirstToken, OutputBatch, OutputOptions, SamplingParams, TransferSource
from ..vision.placed_image import PlacedImage


class TokenizedGenerateReqInput(msgspec.Struct, frozen=True, tag="generate"):
    """One sample of one prompt, tokenized and validated. `seq` numbers everything a frontend sends."""

    seq: int
    rid: str
    input_ids: bytes  # int32, little-endian
    sampling_params: SamplingParams
    output_options: OutputOptions = OutputOptions()
    priority: int = 0
    extra_key: str = ""
    # Its prefill is one engine's and its decode another's.
    transfer: TransferSource | None = None
    # In order, and what the prefix cache knows the prompt by then: `input_ids` with the number of its image, negative, in
    # place of each of an image's tokens.
    images: list[PlacedImage] = []
    cache_ids: bytes = b""  # int32

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.input_ids) // 4


ABORTED = "aborted by request"
ABORTED_BY_PAUSE = "aborted by a pause"


class AbortReq(msgspec.Struct, frozen=True, tag="abort"):
    """Abort every request whose rid starts with `rid`, the one that has it (`exact`), or all of them. `message` is for
    their finish reason."""

    seq: int
    rid: str = ""
    abort_all: bool = False
    exact: bool = False
    message: str = ABORTED


class SeqNotice(msgspec.Struct, frozen=True, tag="notice"):
    """The message of this number went to another leader: so that every leader knows every number."""

    seq: int


class GetInternalStateReq(msgspec.Struct, frozen=True, tag="get_internal_state"):
    """Ask a leader for counters and sizes; it has no number, and is answered without entering a step."""

    op_id: str
    check_pages: bool = True


class TransferNotice(msgspec.Struct, frozen=True, tag="transfer"):
    """From whoever moves pages or rows between engines, for the leader beside it; it has no number.

    Where the decode is, `part` names what has arrived in this `attempt`: "routes", or the pages of a tp rank ("pages0"),
    the first of them with what the prefill has come to. Where the prefill is: "released" by the other side. With an
    `error` it did not arrive, or is not wanted any more.
    """

    key: str
    part: str
    attempt: int = 0
    error: str = ""
    first: FirstToken | None = None
    # Of rows: not that the other side has none of these pages, they did not come.
    is_lost: bool = False


class ControlReq(msgspec.Struct, frozen=True, tag="control"):
    """Have an operation done; see `control/operations.py`."""

    seq: int
    op_id: str
    operation: ControlOperation


class ShutdownReq(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the loop after the step in flight; every rank of the replica exits with status 0."""

    seq: int


NumberedMessage = TokenizedGenerateReqInput | SeqNotice | AbortReq | ControlReq | ShutdownReq
# Handled as they come.
UnnumberedMessage = GetInternalStateReq | TransferNotice
FrontendMessage = NumberedMessage | UnnumberedMessage


# --- leader -> frontend ---------------------------------------------------------------------------------------------


class SyncWait(msgspec.Struct, frozen=True, array_like=True):
    """How long a leader has waited for the dp rank `straggler`, which came last, in how many steps, and why that one was
    late (`engine.scheduler.agreement.Cause`)."""

    straggler: int
    cause: str
    seconds: float
    num_steps: int


class ControlReply(msgspec.Struct, frozen=True, tag="control_reply"):
    """A leader's answer to a control operation."""

    op_id: str
    success: bool
    message: str = ""
    state: dict[str, int | float | str] = {}
    # Why nobody may generate after this operation; None if nothing stands against it.
    blocked: Blocked | None = None
    # What an operation asks for, encoded by whoever knows what it is.
    payload: bytes = b""
    sync_waits: list[SyncWait] = []
    # Of the engine after the operation; None from who cannot tell.
    weight_version: str | None = None


BackendMessage = OutputBatch | ControlReply
