"""Control of a server by a trainer: pauses and weight updates. Needs no torch.

`waybill.engine.weight_sync.sender.WeightSender` drives an `EngineControl` as it drives an `Engine`.
"""

from __future__ import annotations

from typing import Any, Self

import httpx
import msgspec

from ..engine.control.methods import ControlMethods
from ..engine.control.operations import CheckWeights, ControlOperation
from .answer import check_status, http_options


class EngineControl(ControlMethods):
    """A connection to one server. `timeout_s` bounds every call: transfers, and the requests that an update waits for, too.

    Every method raises `ServerError`, a `RuntimeError` with the server's message, where the server refuses.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(base_url, api_key, timeout_s), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get_server_info(self) -> dict[str, Any]:
        """Options, sizes, counters and state of the server."""
        response = self._http.get("/get_server_info")
        check_status(response)
        info: dict[str, Any] = response.json()
        return info

    def _control(self, operation: ControlOperation) -> Any:
        # Null is the default of every field that may have it.
        fields = {name: value for name, value in msgspec.structs.asdict(operation).items() if value is not None}
        response = self._http.post(operation.route(), json=fields)
        check_status(response)
        content = response.json()
        return content["checksums"] if isinstance(operation, CheckWeights) else content
