"""What sglang's trainers call around an update of weights. There a session makes packed weights loadable and packs them
again; here weights are taken in the checkpoint's form at any time, and an update is complete with its last tensor. So these
change nothing, and the end of a session says whether anything is missing."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ..control.blocked import BlockedKind
from ..frontend.tokenizer_manager import TokenizerManager
from ..validation import dialect_fields
from ..validation.request_model import RequestModel
from .bodies import BodyReader
from .errors import error_body, json_response


class BeginInput(RequestModel):
    neutral_fields = dialect_fields.BEGIN_UPDATE


class EndInput(RequestModel):
    neutral_fields = dialect_fields.MESSAGE


class PostProcessInput(RequestModel):
    """slime's, for weights that are quantised in place."""

    neutral_fields = dialect_fields.MESSAGE

    restore_weights_before_load: bool = False
    post_process_quantization: bool = False


def update_sessions_router(manager: TokenizerManager, bodies: BodyReader) -> APIRouter:
    router = APIRouter(route_class=bodies.route_class(), include_in_schema=False)

    @router.post("/begin_weight_update")
    async def begin(body: BeginInput | None = None) -> Response:
        return json_response({"success": True, "message": "weights are taken at any time"})

    @router.post("/end_weight_update")
    async def end(body: EndInput | None = None) -> Response:
        blocked = manager.blocked
        if blocked is None or blocked.kind is BlockedKind.RELEASED:
            return json_response({"success": True, "message": "the weights are whole"})
        content = {"success": False, "message": blocked.message, **error_body(blocked.message, 400)}
        return json_response(content, 400)

    @router.post("/post_process_weights")
    async def post_process(body: PostProcessInput | None = None) -> Response:
        return json_response({"success": True, "message": "weights are taken in the checkpoint's form"})

    return router
