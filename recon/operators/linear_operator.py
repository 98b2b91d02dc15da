"""Linear operators that compose like a formula: ``A @ B``, ``A.H``, ``A.gram``, ``A + B``, ``2 * A``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class LinearOperator(ABC):
    """A linear map between tensors, with its exact adjoint."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint: <A x, y> = <x, A^H y>."""

    def normal(self, x: Tensor) -> Tensor:
        """Apply A^H A; operators that know a shorter way override this."""
        return self.adjoint(self.forward(x))

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return self.forward(x)

    @property
    def H(self) -> LinearOperator:
        """The adjoint operator."""
        return _Adjoint(self)

    @property
    def gram(self) -> LinearOperator:
        """The self-adjoint operator A^H A."""
        return _Gram(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """A @ B: first B, then A."""
        return _Composition(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """A + B."""
        return _Sum(self, other)

    def __mul__(self, factor: complex) -> LinearOperator:
        """A * factor."""
        return _Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        """-A."""
        return _Scaled(self, -1.0)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        """A - B."""
        return _Sum(self, -other)


class _Adjoint(LinearOperator):
    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self._operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._operator.forward(y)

    @property
    def H(self) -> LinearOperator:
        return self._operator


class _Gram(LinearOperator):
    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self._operator.normal(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._operator.normal(y)

    @property
    def H(self) -> LinearOperator:
        return self


class _Composition(LinearOperator):
    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self._outer, self._inner = outer, inner

    def forward(self, x: Tensor) -> Tensor:
        return self._outer.forward(self._inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._inner.adjoint(self._outer.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        # (A B)^H (A B) = B^H (A^H A) B, so that a short way through A is kept.
        return self._inner.adjoint(self._outer.normal(self._inner.forward(x)))


class _Sum(LinearOperator):
    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self._left, self._right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self._left.forward(x) + self._right.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._left.adjoint(y) + self._right.adjoint(y)


class _Scaled(LinearOperator):
    def __init__(self, operator: LinearOperator, factor: complex) -> None:
        self._operator, self._factor = operator, factor

    def forward(self, x: Tensor) -> Tensor:
        return self._factor * self._operator.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return complex(self._factor).conjugate() * self._operator.adjoint(y)
