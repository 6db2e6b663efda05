"""A program with an `Engine`: takes commands as JSON lines, each on a thread of its own, and prints what came of them.

python -m chaos.engine_program '{"model_path": ..., "tp_size": 2, ...}'
"""

from __future__ import annotations

import base64
import json
import sys
import threading
from typing import Any

from waybill import Engine, EngineDeadError

# What `Engine` itself raises for a request that it refuses.
USER_ERRORS = (ValueError, TypeError, RuntimeError)


class EngineProgram:
    """One engine, and the commands of a trial."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._engine = Engine(**options)
        self._tell({"id": "ready"})

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            print(json.dumps(message), flush=True)

    def run(self) -> None:
        """Until the commands end."""
        for line in sys.stdin:
            threading.Thread(target=self._obey, args=(json.loads(line),), daemon=True).start()
        self._engine.shutdown()

    def _obey(self, command: dict[str, Any]) -> None:
        try:
            result = getattr(self, command["do"])(command)
            self._tell({"id": command["id"], "result": result})
        except EngineDeadError as error:
            self._tell({"id": command["id"], "gone": str(error)})
        except Exception as error:
            # Whatever it was, the trial that asked judges it.
            refused = f"{type(error).__name__}: {error}"
            self._tell({"id": command["id"], "refused": refused, "is_users": isinstance(error, USER_ERRORS)})

    def generate(self, command: dict[str, Any]) -> Any:
        return self._portable(self._engine.generate(**command["request"]))

    def stream(self, command: dict[str, Any]) -> Any:
        chunks = self._engine.generate(**command["request"], stream=True)
        last: dict[str, Any] = {}
        for number, chunk in enumerate(chunks, 1):
            last = chunk
            if number == 1:
                self._tell({"id": command["id"], "first": True})
            if number == command["leave_after"]:
                chunks.close()
                break
        return self._portable(last)

    def call(self, command: dict[str, Any]) -> Any:
        return getattr(self._engine, command["method"])(**command["arguments"])

    @staticmethod
    def _portable(answer: dict[str, Any]) -> dict[str, Any]:
        """Rows as base64, in the form of the HTTP API."""
        meta = dict(answer["meta_info"])
        rows = meta.get("routed_experts")
        if rows is not None:
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
            shape = zip(("rows", "num_layers", "top_k"), rows.shape, strict=True)
            meta["routed_experts_meta"] = {**dict(shape), "dtype": rows.dtype.str}
        return {"output_ids": answer["output_ids"], "meta_info": meta}


if __name__ == "__main__":
    EngineProgram(json.loads(sys.argv[1])).run()
