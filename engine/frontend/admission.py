"""How many samples may be in the frontend's hands: being prepared, held while weights change, waiting or running."""

from __future__ import annotations

from ..validation.field_error import FieldError


class OverloadedError(RuntimeError):
    """Too many requests wait already."""


class Admission:
    """Gives out permits, at most `most` at once. Lives on one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_taken = 0

    def take(self, num: int) -> Permits:
        """Permits for the samples of one request, from before its text is tokenised until they are given back.

        Raises:
            FieldError: so many are never free.
            OverloadedError: so many are not free now.
        """
        if num > self.most:
            raise FieldError(
                f"n: {num} samples (prompts times n) in one request, at most {self.most} may run and wait "
                "(--max-running-requests, --max-waiting-requests)",
                "n",
            )
        if self.num_taken + num > self.most:
            raise OverloadedError(
                f"{self.num_taken} requests run or wait, at most {self.most} may (--max-running-requests, "
                "--max-waiting-requests); try again later"
            )
        return Permits(self, num)


class Permits:
    """What one request holds of an admission."""

    def __init__(self, admission: Admission, num: int) -> None:
        self._admission = admission
        self._num = num
        admission.num_taken += num

    def give_back(self, num: int) -> None:
        """`num` samples have ended."""
        num = min(num, self._num)
        self._num -= num
        self._admission.num_taken -= num

    def release(self) -> None:
        """All that are left; may be called again."""
        self.give_back(self._num)
