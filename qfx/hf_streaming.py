from __future__ import annotations
from typing import Any
class Streaming:
    @classmethod
    def prepare(cls, model: Any, recipe: Any, *, strict: bool) -> "Streaming":
        raise NotImplementedError
    def finish(self, model: Any) -> None: ...
    def takes(self, name: str) -> bool: return False
    def operation(self) -> Any: ...
