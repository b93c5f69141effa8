"""What stands for an attention that several devices share, where an `impl` is asked for."""

from typing import Any

from jaxtyping import Array


class Shared:
    """An `impl` under which several devices share a sequence: `jaxtok.parallel.Spread`."""

    placed: bool = False  # whether the rows of the calls are in the order of `place`; else all devices know all queries

    def attention(self, q: Array, k: Array, v: Array, **see: Any) -> tuple[Array, Array]:
        """As `attention`, of arrays that are cut over devices."""
        raise NotImplementedError

    def received(self, q: Array, k: Array, lse: Array, **see: Any) -> Array:
        """As `ops.evidence.received`."""
        raise NotImplementedError

    def some_rows(self, q: Array, k: Array, lse: Array, **see: Any) -> Array:
        """As `ops.evidence.rows`, of the last of the rows."""
        raise NotImplementedError

    def laid(self) -> "Shared":
        """The same for calls over rows that `place` has put in order."""
        raise NotImplementedError

    def place(self, x: Array, axis: int = 1) -> Array:
        """Rows of a prefill as the devices hold them."""
        raise NotImplementedError

    def restore(self, x: Array, axis: int = 1) -> Array:
        """Such rows in their own order."""
        raise NotImplementedError

    def last(self, x: Array, w: int, axis: int) -> Array:
        """The last w of such rows, in their own order."""
        raise NotImplementedError

    def rows(self, t: int) -> int:
        """The least number of rows, t or more, that the devices share equally."""
        raise NotImplementedError

    def hold(self, x: Array, *axes: str | None) -> Array:
        """x cut over the axes of the mesh ("data", "sequence", "tensor"; None = not), where its sizes allow."""
        raise NotImplementedError


Impl = str | Shared
